"""Scoring a detector on a split, and `distillkit eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from torch import nn

from distillkit.evaluation.coco import CocoResult, coco_metrics
from distillkit.evaluation.predict import Progress, predict_dataset
from distillkit.schema import Recipe
from distillkit.training import build
from distillkit.training.build import DetectionData
from distillkit.training.named import named_model
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


def evaluate(recipe: Recipe, model: str | None, split: Literal["train", "val", "test"]) -> CocoResult:
    """Score a model of a recipe on a split, at the recipe's size, with a progress bar.

    Args:
        model: what ``named_model`` takes; None: the student as the recipe has it.

    Raises:
        RunError: no such model, or one without trained weights. CheckpointError: weights that do not fit.
    """
    data = build.build_data(recipe, split, augmented=False)
    detector = named_model(recipe, model, len(data.classes))
    with ProgressBar(TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task(f"{model or 'student'} on {split}", total=len(data))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return score(detector, data, recipe.data.batch, recipe.data.workers, progress)
