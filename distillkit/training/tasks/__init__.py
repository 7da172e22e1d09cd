"""What each task has of its own: a module here, with the functions of ``Task``, which the command line's verbs call.

One more task is a recipe in `schema/tasks.py`, a reader of its data and its models in `build/`, and a module here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor, nn

from distillkit.data.problems import Problem
from distillkit.evaluation.predict import Progress
from distillkit.schema import Recipe
from distillkit.training.build import Classes

_MODULES = {
    "detection": "detection",
    "rotated-detection": "detection",
    "classification": "classification",
    "segmentation": "segmentation",
    "weak-segmentation": "weak_segmentation",
    "text": "text",
}

#: (what is being done, how much of it is done, how much there is)
NamedProgress = Callable[[str, int, int], None]


class Result(Protocol):
    """numbers: by name. classes: of each class by name, a dataclass of numbers."""

    @property
    def numbers(self) -> dict[str, float]: ...
    @property
    def classes(self) -> Mapping[str, Any]: ...


class Section(NamedTuple):
    """Of a report. figure: None where there is nothing to draw; the note says why. file: its name, without ending."""

    title: str
    note: str
    file: str
    figure: Figure | Image | None


@dataclass(frozen=True)
class Trained:
    """What a report is about.

    Args:
        data: the split whose first pictures are shown.
        jobs: folder of each training.
        teachers, students: by name; students in the order of the rows, the first one to compare with.
    """

    data: Any
    jobs: Mapping[str, Path]
    teachers: Mapping[str, nn.Module]
    students: Mapping[str, nn.Module]

    @property
    def models(self) -> dict[str, nn.Module]:
        return {**self.teachers, **self.students}


@dataclass(frozen=True)
class Asked:
    """What `distillkit predict` is asked for.

    Args:
        images: pictures, or folders of them.
        folder: for what is written.
        submission: also the files of this task of DOTA.
        saliency: also maps of what is no background.
        progress: called with what is done, and how much of it of how much.
        weights: which model, as it was named.
    """

    images: Sequence[Path]
    folder: Path
    submission: Any = None
    saliency: bool = False
    progress: NamedProgress | None = None
    weights: str | Path | None = None


class Exported(NamedTuple):
    """module: pictures (B, 3, H, W) in 0..1 -> a tuple of tensors called ``outputs``. pictures: an example. decoding:
    what decode.json says of the outputs. note: for whoever exports."""

    module: nn.Module
    pictures: Tensor
    outputs: list[str]
    decoding: dict[str, Any]
    note: str | None = None


class Task(Protocol):
    """Functions and constants of a task's module. recipe: one of this task. data: what ``build_data`` makes of it."""

    #: pictures of a dry step
    DRY: int
    #: an epoch ends with its last whole batch
    DROP_LAST: bool

    def batches(self, recipe: Any, student: nn.Module, classes: int) -> dict[str, Any]:
        """``collate``, ``prepare`` and ``call`` of a ``Job``, where the task has its own."""

    def find(
        self,
        recipe: Any,
        model: nn.Module,
        data: Any,
        batch: int,
        device: torch.device | str,
        progress: Progress | None = None,
        workers: int = 0,
    ) -> list[dict[str, Any]]:
        """What the model finds, one dict a sample of ``data``."""

    def whole(self, recipe: Any, found: Sequence[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
        """What was found in samples, as found in pictures."""

    def judge(self, recipe: Any, found: Sequence[dict[str, Any]], data: Any) -> Result:
        """What was found against the truth of a data set."""

    def check_taught(self, split: str, data: Any) -> None:
        """Raises RunError where nothing can be learned from a split."""

    def check_judged(self, split: str, data: Any) -> None:
        """Raises RunError where models cannot be judged on a split."""

    def read_files(self, recipe: Any, split: Any, progress: Progress | None = None) -> Iterator[Problem]:
        """All that is wrong with the files of a split, where data are in files that have to be read to know."""

    def doubts(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """(place in the recipe, what) of settings that are right, and seldom meant."""

    def further(self, jobs: Any, row: Any, model: nn.Module) -> dict[str, Any]:
        """What a run does with a row's trained model beside judging it, and what of the table's row that changes.

        jobs: the run's ``Jobs``.
        """

    def figures(self, recipe: Any, trained: Trained) -> Iterator[Section]:
        """The sections of a report behind the curves."""

    def predict(self, recipe: Any, model: nn.Module, classes: Classes, asked: Asked) -> list[dict[str, Any]]:
        """Write what a model on its device finds in pictures; what predictions.json holds."""

    def exported(self, recipe: Any, student: nn.Module, classes: Classes) -> Exported:
        """What of a student torch-export and onnx hold."""


def task_of(recipe: Recipe) -> Task:
    """The module of a recipe's task."""
    return cast(Task, import_module(f"{__name__}.{_MODULES[recipe.task]}"))
