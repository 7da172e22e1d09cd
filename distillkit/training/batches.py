"""From samples to what a wrapped model is called with, where a task does more than put them in a list."""

from __future__ import annotations

from typing import Any

from torch import nn

from distillkit.schema import Recipe
from distillkit.training.tasks import task_of


def batches(recipe: Recipe, student: nn.Module, classes: int) -> dict[str, Any]:
    """``collate``, ``prepare``, ``call`` and ``drop_last`` of a ``Job``, where the recipe's task has its own."""
    return {**task_of(recipe).batches(recipe, student, classes), "drop_last": drop_last(recipe)}


def drop_last(recipe: Recipe) -> bool:
    """Whether an epoch ends with its last whole batch."""
    return task_of(recipe).DROP_LAST
