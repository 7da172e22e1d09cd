"""What data of all tasks have in common: their classes, and splits that a recipe may leave out."""

from __future__ import annotations

from typing import Any, NamedTuple

from distillkit.schema import Recipe
from distillkit.training.errors import RunError


class Classes(NamedTuple):
    """classes: names by label. category_ids: the data's own number of each."""

    classes: list[str]
    category_ids: list[int]


def source_of(recipe: Recipe, split: str) -> Any:
    """What ``data`` says of a split: a file, a folder, a number; the split's own name for registered data.

    Raises RunError where it says nothing.
    """
    source = getattr(recipe.data, split, split)
    if source is None:
        raise RunError(f"data.{split} is not set in the recipe {recipe.name!r}: name the {split} split, or use another")
    return source


def pair(values: list[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second
