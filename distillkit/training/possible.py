"""Whether a recipe can be run to its end, as far as that is cheap to say: before anything is trained or deleted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from distillkit import recipe as recipes
from distillkit import schema
from distillkit.schema import Recipe
from distillkit.training import build
from distillkit.training.errors import RunError
from distillkit.training.optim import build_optimizer
from distillkit.training.weak import SEGMENT, segmentation_recipe


@dataclass(frozen=True)
class Planned:
    """A training of a recipe.

    Args:
        where: its place in the recipe, for messages.
        folder: its folder in the run folder.
        model, train: its blocks, with its own changes.
        distillers: all, none, or names.
        recipe: with the data that it is trained on.
    """

    where: str
    folder: str
    model: schema.AnyModel
    train: schema.Train
    distillers: Literal["all", "none"] | list[str]
    recipe: Recipe


def teacher_place(name: str) -> str:
    """Where in a recipe a teacher is."""
    return name if name == "teacher" else f"teachers.{name}"


def planned(recipe: Recipe) -> Iterator[Planned]:
    """All trainings: of teachers that are trained first, then of every row, then of what learns from their masks."""
    for name, config in build.teacher_configs(recipe).items():
        if config.train is not None and config.checkpoint is None:
            train = recipes.train_of(recipe, config.train)
            yield Planned(teacher_place(name), build.teacher_folder(name), config, train, "none", recipe)
    for i, row in enumerate(recipe.compare):
        model, train = recipes.student_of(recipe, row.student), recipes.train_of(recipe, row.train)
        taught = recipes.taught_by(recipe, row.data)
        yield Planned(f"compare.{i} ({row.row})", recipes.slug(row.row), model, train, row.distillers, taught)
    if isinstance(recipe, schema.WeakRecipe) and recipe.segment is not None:
        yield from _segmenting(recipe)


def _segmenting(recipe: schema.WeakRecipe) -> Iterator[Planned]:
    """Of the segmentation models those of the first row, and of the first that learns from true masks: the others
    differ in their masks alone. Pseudo masks are not there yet; those of the val split stand for them."""
    assert isinstance(recipe.data, schema.VocLabelData)  # else a recipe has no segment
    rows = {row.masks: row for row in reversed(recipe.compare)}
    for masks, row in rows.items():
        folder = Path(recipe.output) / recipe.name / recipes.slug(row.row)
        run = segmentation_recipe(recipe, folder, None)
        if masks == "pseudo":
            run = run.model_copy(update={"data": run.data.model_copy(update={"train": recipe.data.val})})
        yield Planned(f"segment ({masks} masks)", f"{folder.name}/{SEGMENT}", run.student, run.train, "none", run)


def check_teacher(where: str, config: schema.AnyTeacher, classes: int | Sequence[str]) -> None:
    """Raises RunError for a teacher whose pretrained weights are of other classes: its classifier would be drawn at
    random, and that is what it would teach."""
    classes = build.own_classes(config) or classes
    if config.train is None and (known := build.other_head(config, classes)):
        name = getattr(config, "model", None) or getattr(config, "pretrained", None)
        raise RunError(
            f"{where}: the pretrained weights of {name} are of {known} classes, the data have "
            f"{build.count_of(classes)}: it "
            "would teach with a random classifier; let it learn these classes first, as in `train: {epochs: 5}`, or "
            "give its checkpoint"
        )


def check_same_classes(step: Planned, recipe: Recipe, classes: list[str], others: list[str]) -> None:
    """Raises RunError for a row whose own data have other classes: its labels would mean something else."""
    if step.recipe.task == recipe.task and classes != others:
        raise RunError(
            f"its data have the classes {', '.join(classes)}; data.train has {', '.join(others)}: rows of a table need "
            "the same classes in the same order"
        )


def check_optimizer(step: Planned, model: nn.Module) -> None:
    """Raises RunError for an optimizer that the model is not made for."""
    if step.train.epochs:
        build_optimizer(model, step.train.optimizer)
