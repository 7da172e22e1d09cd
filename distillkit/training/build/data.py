"""The `data` block of a recipe as data sets."""

from __future__ import annotations

from typing import Any, Literal

from distillkit.schema import Recipe
from distillkit.training.build import box_data, class_data, label_data, mask_data, text_data
from distillkit.training.build.classes import Classes

#: the module that reads the data of a task: ``build(recipe, split, augmented)`` and ``classes_of(recipe)``
_READERS: dict[str, Any] = {
    "detection": box_data,
    "rotated-detection": box_data,
    "classification": class_data,
    "segmentation": mask_data,
    "weak-segmentation": label_data,
    "text": text_data,
}


def build_data(recipe: Recipe, split: Literal["train", "val", "test"], augmented: bool) -> Any:
    """The data of a split, augmented as the recipe says or only brought to the network's size.

    Raises:
        RunError: the recipe has no such split. DataError: annotations that cannot be used.
    """
    return _READERS[recipe.task].build(recipe, split, augmented)


def build_classes(recipe: Recipe) -> Classes:
    """The classes of a recipe's data, from what its files say of them alone: no picture need be there.

    Raises:
        DataError: annotations that name no class.
    """
    return _READERS[recipe.task].classes_of(recipe)
