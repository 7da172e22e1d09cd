"""Sets of pictures with image-level labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distillkit import plugins, schema
from distillkit.data.mask_transforms import MaskAugment, MaskResize, MaskTransform
from distillkit.data.problems import DataError, Problem
from distillkit.data.weak import VocLabels, label_classes
from distillkit.schema import WeakRecipe
from distillkit.training.build.classes import Classes, pair, source_of


def build(recipe: WeakRecipe, split: str, augmented: bool) -> Any:
    """A set with labels: as a classifier is trained on it, or as its activation maps are made and judged."""
    data, source = recipe.data, source_of(recipe, split)
    how: dict[str, Any] = {"transform": _augment(data) if augmented else resize_of(recipe), "seed": recipe.seed}
    if not isinstance(data, schema.VocLabelData):
        return plugins.build("data", data.name, split=split, **how, **data.options)
    labelling = data.masks if data.labels == "masks" else None
    pictures = VocLabels(data.root, source, data.classes, data.labels, None, labelling, data.images, **how)
    saliency, masks = data.saliency, labelling if augmented else data.masks
    if split == "train" and labelling is None:  # true masks of what is trained on only judge pseudo masks
        masks = masks if there_are(data, masks, pictures.keys) == len(pictures) else None
    if split != "train":  # and saliency elsewhere is only looked at
        saliency = saliency if next(files_there(data, saliency, pictures.keys), None) else None
    made = VocLabels(data.root, source, data.classes, data.labels, saliency, masks, data.images, **how)
    if split == "train" and recipe.masks.rule == "saliency":
        _check_saliency(made)
    return made


def there_are(data: schema.VocLabelData, folder: str | None, keys: Sequence[str]) -> int:
    """How many of the pictures have a file in a folder."""
    return sum(1 for _ in files_there(data, folder, keys))


def files_there(data: schema.VocLabelData, folder: str | None, keys: Sequence[str]) -> Iterator[Path]:
    """The pictures' files in a folder."""
    if folder is not None:
        yield from (path for key in keys if (path := Path(data.root) / folder / f"{key}.png").is_file())


def _check_saliency(pictures: VocLabels) -> None:
    """Raises DataError for pictures without a saliency map, whose pseudo masks could not be made after hours."""
    remedy = "masks.rule is saliency: add the map, or choose threshold or crf"
    missing = [record.key for record in pictures.records if record.saliency is None]
    if missing:
        raise DataError(
            [Problem(pictures.source, f"image {key}", "no saliency map of this picture", remedy) for key in missing]
        )


def classes_of(recipe: WeakRecipe) -> Classes:
    """The foreground, from files beside the pictures where they say it."""
    data = recipe.data
    if isinstance(data, schema.VocLabelData):
        problems: list[Problem] = []
        names = label_classes(Path(data.root), data.classes, data.labels, problems)
        if problems:
            raise DataError(problems)
    else:
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
