"""Scoring a detector on a split, and `distillkit eval`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from torch import nn

from distillkit.evaluation.coco import CocoResult, coco_metrics
from distillkit.evaluation.predict import Progress, predict_dataset
from distillkit.recipe import Recipe
from distillkit.training import build, checkpoint
from distillkit.training.build import DetectionData
from distillkit.training.errors import RunError
from distillkit.training.processes import processes


class Share:
    """Every ``world``-th sample of a data set, from ``rank`` on: one process's part of an evaluation."""

    def __init__(self, data: DetectionData, rank: int, world: int):
        self.data, self.indices = data, range(rank, len(data), world)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return self.data[epoch, self.indices[index]]


def score(
    model: nn.Module, data: DetectionData, batch: int, workers: int, progress: Progress | None = None
) -> CocoResult:
    """COCO's metrics of a detector on a split. The model is moved to this process's device.

    With several processes each runs a share of the pictures, and all get the result.
    """
    state = processes()
    model.to(state.device)
    share = Share(data, state.process_index, state.num_processes)
    found = predict_dataset(model, share, batch, state.device, progress, workers)
    return coco_metrics(gather_object(found), data)


def plain(result: CocoResult) -> dict[str, Any]:
    """The 12 numbers (0..1) by name, and under ``classes`` ap, ap50, ap75 and boxes of each class."""
    return {**result.numbers, "classes": {name: asdict(row) for name, row in result.classes.items()}}


def evaluate(recipe: Recipe, model: str, split: Literal["train", "val", "test"]) -> CocoResult:
    """Score a model of a recipe on a split, at the recipe's size, with a progress bar.

    Args:
        model: "teacher" (or the name of one of several), "student" as the recipe has it, or a file with its weights.

    Raises:
        RunError: no such model, or a teacher that is still to be trained. CheckpointError: weights that do not fit.
    """
    data = build.build_data(recipe, split, augmented=False)
    detector = named_model(recipe, model, len(data.classes))
    with ProgressBar(TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task(f"{model} on {split}", total=len(data))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return score(detector, data, recipe.data.batch, recipe.data.workers, progress)


def named_model(recipe: Recipe, model: str, classes: int) -> nn.Module:
    """The model that ``evaluate`` is asked for."""
    teachers = build.teacher_configs(recipe)
    if model == "student" or model not in teachers:
        student = build.build_model(recipe.student, classes, recipe.evaluate)
        if model != "student":
            build.load_checkpoint(student, _existing(model, teachers))
        return student
    config = teachers[model]
    teacher = build.build_model(config, classes, recipe.evaluate)
    if config.train is not None and config.checkpoint is None:
        weights = Path(recipe.output) / recipe.name / build.teacher_folder(model) / "final.safetensors"
        if not weights.exists():
            raise RunError(f"{model} is trained by the run, which has not done it yet: {weights} does not exist")
        checkpoint.load_into(teacher, weights)
    return teacher


def _existing(model: str, teachers: Iterable[str]) -> Path:
    if not Path(model).is_file():
        names = ", ".join(["student", *teachers])
        raise RunError(f"{model}: neither a file with weights of the student, nor one of {names}")
    return Path(model)
