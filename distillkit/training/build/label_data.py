"""Sets of pictures with image-level labels."""

from __future__ import annotations

from typing import Any

from distillkit import plugins, schema
from distillkit.data.mask_transforms import MaskAugment, MaskResize, MaskTransform
from distillkit.data.weak import VocLabels
from distillkit.schema import WeakRecipe
from distillkit.training.build.classes import Classes, pair, source_of


def build(recipe: WeakRecipe, split: str, augmented: bool) -> Any:
    """A set with labels: as a classifier is trained on it, or as its activation maps are made and judged."""
    data, source = recipe.data, source_of(recipe, split)
    how: dict[str, Any] = {"transform": _augment(data) if augmented else resize_of(recipe), "seed": recipe.seed}
    if isinstance(data, schema.VocLabelData):
        masks = None if augmented else data.masks
        return VocLabels(data.root, source, data.classes, data.labels, data.saliency, masks, data.images, **how)
    return plugins.build("data", data.name, split=split, **how, **data.options)


def classes_of(recipe: WeakRecipe) -> Classes:
    """The foreground."""
    names = build(recipe, "val", augmented=False).classes
    return Classes(list(names), list(range(1, len(names) + 1)))


def resize_of(recipe: WeakRecipe) -> MaskResize:
    """How pictures are brought to what activation maps are made of."""
    size = recipe.cam.size
    return MaskResize(None if size is None else pair(size), interpolation="bicubic")


def _augment(data: Any) -> MaskTransform:
    a = data.augment
    return MaskAugment(
        pair(data.size),
        pair(a.scale) if a.scale else None,
        pair(data.size) if a.crop else False,
        flip=a.flip,
        color=a.color,
        hue=a.hue,
        rotate90=a.rotate90,
        short_side=data.short_side,
        interpolation="bicubic",
    )
