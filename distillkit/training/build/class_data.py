"""Sets of pictures with a class each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN

from distillkit import plugins, schema
from distillkit.data.class_transforms import Middle, Random
from distillkit.data.classes import Cifar, DigitPictures, PictureFolder, TarPictures, class_folders
from distillkit.data.label_store import MANIFEST, LabelStore
from distillkit.data.randaugment import RandAugment
from distillkit.data.release_maps import ReleaseMaps
from distillkit.schema import ClassificationRecipe
from distillkit.training.build.classes import Classes, pair, source_of
from distillkit.training.errors import RunError


def build(recipe: ClassificationRecipe, split: str, augmented: bool) -> Any:
    """A set for classification. Label maps are read where pictures are augmented: they are of the training split."""
    data, source = recipe.data, source_of(recipe, split)
    how: dict[str, Any] = {"transform": _class_transform(recipe, augmented), "seed": recipe.seed}
    pictures: Any
    if isinstance(data, schema.FolderData):
        classes = class_folders(Path(data.root) / data.train)
        pictures = PictureFolder(data.root, source, classes, **how)
    elif isinstance(data, schema.CifarData):
        pictures = Cifar(data.root, split, data.classes, **how)
    elif isinstance(data, schema.TarData):
        pictures = TarPictures(data.root, source, data.classes, **how)
    elif isinstance(data, schema.DigitData):
        pictures = DigitPictures(source, pair(data.size), split, **how)
    else:
        return plugins.build("data", data.name, split=split, **how, **data.options)
    if augmented and isinstance(data, schema.FolderData | schema.TarData) and data.label_maps:
        pictures.maps = _label_maps(Path(data.label_maps), data.annotator, pictures)
        if _as_released(recipe):
            pictures.region = "full"
    return pictures


def classes_of(recipe: ClassificationRecipe) -> Classes:
    """Those of the training split."""
    if isinstance(recipe.data, schema.FolderData):
        names = class_folders(Path(recipe.data.root) / recipe.data.train)
    elif isinstance(recipe.data, schema.TarData):
        names = recipe.data.classes
    else:
        names = build(recipe, "val", augmented=False).classes
    return Classes(names, list(range(len(names))))


def _label_maps(folder: Path, annotator: str | None, pictures: Any) -> LabelStore | ReleaseMaps:
    """Maps of these pictures that `distillkit label` made, or published ones, a file a picture."""
    classes = len(pictures.classes)
    if not (folder / MANIFEST).exists() and next(folder.glob("*/*.pt"), None) is not None:
        if annotator is not None:
            raise RunError(f"{folder}: published label maps do not say who made them; leave out data.annotator")
        published = ReleaseMaps(folder, classes)
        published.check(pictures.pictures)
        return published
    maps = LabelStore(folder)
    if maps.classes != classes:
        raise RunError(
            f"{folder}: its label maps are of {maps.classes} classes ({maps.info.annotator.name}), the data have "
            f"{classes}: let a model that was trained for these classes label the pictures"
        )
    maps.check(pictures.pictures, annotator)
    return maps


def _as_released(recipe: ClassificationRecipe) -> bool:
    """Whether label maps are to be read as the published training does: as if they covered the whole picture, moved by
    RandAugment to the nearest cell, which is done before the crop."""
    return any(isinstance(d, schema.TokenLabeling) and d.convention == "release" for d in recipe.distillers)


def _class_transform(recipe: ClassificationRecipe, augmented: bool) -> Middle | Random:
    data = recipe.data
    if not augmented:
        return Middle(pair(data.size), data.crop_pct)
    a, r = data.augment, data.augment.rand_augment
    convention: Literal["default", "release"] = "release" if _as_released(recipe) else "default"
    fill = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]  # as in timm
    return Random(
        pair(data.size),
        scale=pair(a.scale) if a.scale else None,
        ratio=pair(a.ratio),
        interpolation=a.interpolation,
        crop_last=a.crop_last or convention == "release",
        flip=a.flip,
        flip_vertical=a.flip_vertical,
        color=a.color,
        rand_augment=RandAugment(r.magnitude, r.deviation, r.layers, fill=fill, convention=convention) if r else None,
        erase=a.erase,
    )
