"""The models that a command line can name: the recipe's student, a teacher, a row of the table, a file with weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from distillkit import recipe as recipes
from distillkit import schema
from distillkit.schema import Recipe
from distillkit.training import build, checkpoint
from distillkit.training.errors import RunError

#: how many classes there are, or their names by label
Labels = int | Sequence[str]

FINAL = "final.safetensors"


def named_model(recipe: Recipe, name: str | Path | None, classes: Labels) -> nn.Module:
    """A model of a recipe, with trained weights.

    Args:
        name: a teacher ("teacher", or its name among several); a row of ``compare``, as the run left it; a file with
            weights of the recipe's student; None, or "student" where no row is called so: the student as it comes.
        classes: how many, or their names by label.

    Raises:
        RunError: no such model; one that the run has not trained yet; a student that comes with random weights.
        CheckpointError: weights that do not fit.
    """
    teachers = build.teacher_configs(recipe)
    rows = {row.row: row for row in recipe.compare}
    if name in teachers:
        return _teacher(recipe, str(name), teachers[str(name)], classes)
    if name in rows:
        return _row(recipe, rows[str(name)], classes)
    if name is None or name == "student":
        _refuse_random(recipe, classes)
    elif not Path(name).is_file():
        known = ", ".join(dict.fromkeys([*teachers, *rows, "student"]))
        raise RunError(f"{name}: neither a file with weights of the student, nor one of {known}")
    if name is None or name == "student":
        return build.build_model(recipe.student, classes, recipe.evaluate, recipe.data.size)
    student = _empty(recipe, recipe.student, classes)
    build.load_checkpoint(student, Path(name))
    return student


def folder_of(recipe: Recipe, name: str | Path | None) -> Path | None:
    """Where the run keeps a row, or a teacher that it trains; None for every other model that can be named."""
    if name in {row.row for row in recipe.compare}:
        return _run_folder(recipe) / recipes.slug(str(name))
    teacher = build.teacher_configs(recipe).get(str(name))
    if teacher is None or teacher.train is None or teacher.checkpoint is not None:
        return None
    return _run_folder(recipe) / build.teacher_folder(str(name))


def _empty(recipe: Recipe, config: schema.AnyModel, classes: Labels) -> nn.Module:
    """A model whose weights are all read afterwards: those that it would start a training from need not be had."""
    without = {"pretrained": False} if "pretrained" in type(config).model_fields else {}
    return build.build_model(config.model_copy(update=without), classes, recipe.evaluate, recipe.data.size)


def _row(recipe: Recipe, row: schema.Row, classes: Labels) -> nn.Module:
    student = _empty(recipe, recipes.student_of(recipe, row.student), classes)
    checkpoint.load_into(student, _trained(recipe, row.row, recipes.slug(row.row)))
    return student


def _teacher(recipe: Recipe, name: str, config: schema.AnyTeacher, classes: Labels) -> nn.Module:
    if config.train is None or config.checkpoint is not None:
        return build.build_model(config, classes, recipe.evaluate, recipe.data.size)
    teacher = _empty(recipe, config, classes)
    checkpoint.load_into(teacher, _trained(recipe, name, build.teacher_folder(name)))
    return teacher


def _trained(recipe: Recipe, name: str, folder: str) -> Path:
    weights = _run_folder(recipe) / folder / FINAL
    if not weights.exists():
        raise RunError(f"{name} is trained by the run, which has not done it yet: {weights} does not exist")
    return weights


def _refuse_random(recipe: Recipe, classes: Labels) -> None:
    if not recipes.is_untrained(recipe.student.model_dump()) and not build.other_head(recipe.student, classes):
        return
    folder = _run_folder(recipe)
    finals = [folder / recipes.slug(row.row) / FINAL for row in recipe.compare]
    there = ", ".join(str(path) for path in finals if path.exists())
    rows = ", ".join(repr(row.row) for row in recipe.compare)
    raise RunError(
        f"the student of {recipe.name!r} comes with random weights: name a row of the recipe ({rows}) that was "
        f"trained, or a file with weights; {f'there are {there}' if there else f'{folder} holds none yet'}"
    )


def _run_folder(recipe: Recipe) -> Path:
    return Path(recipe.output) / recipe.name
