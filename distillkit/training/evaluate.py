"""Scoring a model on a split, and `distillkit eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from torch import nn

from distillkit import schema
from distillkit.data.rotated import RotatedDetection
from distillkit.data.tiled import TiledDota
from distillkit.evaluation.predict import Progress
from distillkit.evaluation.rotated import RotatedResult, rotated_metrics
from distillkit.evaluation.submission import Task, check_names, horizontal, read_submission, write_submission
from distillkit.schema import Recipe
from distillkit.training import build
from distillkit.training.build import DetectionData
from distillkit.training.errors import RunError
from distillkit.training.named import named_model
from distillkit.training.processes import processes
from distillkit.training.tasks import Result, task_of
from distillkit.training.tiles import cut_tiles


class Share:
    """Every ``world``-th sample of a data set, from ``rank`` on: one process's part of an evaluation."""

    def __init__(self, data: DetectionData, rank: int, world: int):
        self.data, self.indices = data, range(rank, len(data), world)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return self.data[epoch, self.indices[index]]


def score(recipe: Recipe, model: nn.Module, data: DetectionData, progress: Progress | None = None) -> Result:
    """The metrics of the recipe's task for a model on a split. The model is moved to this process's device.

    With several processes each runs a share of the pictures, and all get the result.
    """
    found = predicted(recipe, model, data, progress)
    return judged(recipe, found, data)


def predicted(
    recipe: Recipe, model: nn.Module, data: DetectionData, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """What a model finds, one dict a picture; what it finds on tiles is put together."""
    state = processes()
    model.to(state.device)
    share = Share(data, state.process_index, state.num_processes)
    task = task_of(recipe)
    found = task.find(recipe, model, share, recipe.data.batch, state.device, progress, recipe.data.workers)
    return task.whole(recipe, gather_object(found), data)


def submit(folder: Path, found: Sequence[dict[str, Any]], data: RotatedDetection, task: Task) -> Path:
    """Write predictions on a set in files as those of DOTA's tasks; the path of their archive."""
    return write_submission(folder, found, _names(data), data.classes, task)


def check_submission(recipe: Recipe, data: RotatedDetection) -> None:
    """Raises SubmissionError where a recipe asks for a submission, and the names of its data cannot stand in one."""
    if getattr(recipe.evaluate, "submission", None):
        check_names(_names(data), data.classes)


def _names(data: RotatedDetection) -> dict[int, str]:
    """Of the pictures on disk, without ending, by image_id."""
    pictures = data.whole if isinstance(data, TiledDota) else data
    return {record.image_id: record.path.stem for record in pictures.records}


def judged(recipe: Recipe, found: Sequence[dict[str, Any]], data: Any) -> Result:
    """Predictions against the truth of a data set."""
    return task_of(recipe).judge(recipe, found, data)


def plain(result: Result) -> dict[str, Any]:
    """The numbers by name, and under ``classes`` those of each class: ap, ap50, ap75 and boxes, or those of its task;
    the confusion matrix besides, where there is one."""
    numbers = {**result.numbers, "classes": {name: asdict(row) for name, row in result.classes.items()}}
    confusion = getattr(result, "confusion", None)
    return numbers if confusion is None else {**numbers, "confusion": confusion.tolist()}


def evaluate_submission(recipe: Recipe, path: Path, split: Literal["train", "val", "test"]) -> RotatedResult:
    """Score the files of DOTA's Task1 or Task2, a folder or an archive, on a split of a recipe.

    Raises:
        RunError: the recipe's data have no pictures with names. SubmissionError: see ``read_submission``.
    """
    if not isinstance(recipe.data, schema.DotaData):
        raise RunError(f"a submission is scored on data of kind dota; those of {recipe.name!r} are {recipe.data.kind}")
    pictures = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tiles": None})})
    data = build.build_data(pictures, split, augmented=False)
    submission = read_submission(path, _names(data), data.classes)
    truth = data.truth() if submission.task == "Task1" else horizontal(data.truth())
    return rotated_metrics(submission.predictions, truth, data.classes)


def evaluate(recipe: Recipe, model: str | None, split: Literal["train", "val", "test"]) -> Result:
    """Score a model of a recipe on a split, at the recipe's size, with a progress bar.

    Args:
        model: what ``named_model`` takes; None: the student as the recipe has it.

    Raises:
        RunError: no such model, or one without trained weights. CheckpointError: weights that do not fit.
    """
    cut_tiles(recipe, [split])
    data = build.build_data(recipe, split, augmented=False)
    detector = named_model(recipe, model, data.classes)
    with ProgressBar(TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task(f"{model or 'student'} on {split}", total=len(data))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return score(recipe, detector, data, progress)
