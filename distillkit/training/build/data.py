"""The `data` block of a recipe as data sets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from distillkit import plugins, schema
from distillkit.data.class_transforms import Middle, Random
from distillkit.data.classes import Cifar, DigitPictures, PictureFolder, TarPictures, class_folders
from distillkit.data.coco import CocoDetection, read_coco
from distillkit.data.coco_rotated import CocoRotated
from distillkit.data.dota import DOTA_CLASSES, DotaDetection
from distillkit.data.hrsc import HRSC_CLASSES, HrscDetection
from distillkit.data.label_store import MANIFEST, LabelStore
from distillkit.data.problems import DataError
from distillkit.data.randaugment import RandAugment
from distillkit.data.release_maps import ReleaseMaps
from distillkit.data.scenes import Scenes
from distillkit.data.tiled import TiledDota
from distillkit.data.transforms import Augment, Resize, Transform
from distillkit.data.voc import VOC_CLASSES, VocDetection
from distillkit.schema import Recipe
from distillkit.training.errors import RunError


class DetectionData(Protocol):
    """What a run asks of a detection set; see ``distillkit.data``."""

    classes: list[str]
    category_ids: list[int]

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]: ...
    def to_coco_json(self) -> dict[str, Any]: ...


def build_data(recipe: Recipe, split: Literal["train", "val", "test"], augmented: bool) -> Any:
    """The data of a split: a ``DetectionData``, augmented as the recipe says or only resized.

    Raises:
        RunError: the recipe has no such split. DataError: annotations that cannot be used.
    """
    if isinstance(recipe, schema.ClassificationRecipe):
        return _classes(recipe, split, augmented)
    data = recipe.data
    transform = _transform(data, augmented)
    source: Any = getattr(data, split, None)
    if source is None and not isinstance(data, schema.CustomData):
        raise RunError(f"data.{split} is not set in the recipe {recipe.name!r}: name the {split} split, or use another")
    if isinstance(data, schema.DotaData | schema.HrscData | schema.CocoRotatedData):
        return _rotated(recipe, data, split, transform, augmented)
    if isinstance(data, schema.CocoData):
        return CocoDetection(data.root, source, data.images.format(split=split), transform, recipe.seed)
    if isinstance(data, schema.VocData):
        return VocDetection(data.root, source, data.classes, transform, recipe.seed)
    if isinstance(data, schema.SceneData):
        turned: dict[str, Any] = (
            {"rotated": True, "turn": data.turn} if isinstance(data, schema.RotatedSceneData) else {}
        )
        return Scenes(source, _pair(data.size), recipe.seed, split, _pair(data.digits), transform, **turned)
    return plugins.build("data", data.name, split=split, transform=transform, seed=recipe.seed, **data.options)


def _classes(recipe: schema.ClassificationRecipe, split: str, augmented: bool) -> Any:
    """A set for classification. Label maps are read where pictures are augmented: they are of the training split."""
    data = recipe.data
    source: Any = getattr(data, split, split)
    if source is None:
        raise RunError(f"data.{split} is not set in the recipe {recipe.name!r}: name the {split} split, or use another")
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
        pictures = DigitPictures(source, _pair(data.size), split, **how)
    else:
        return plugins.build("data", data.name, split=split, **how, **data.options)
    if augmented and isinstance(data, schema.FolderData | schema.TarData) and data.label_maps:
        pictures.maps = _label_maps(Path(data.label_maps), data.annotator, pictures)
        if _as_released(recipe):
            pictures.region = "full"
    return pictures


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


def _as_released(recipe: schema.ClassificationRecipe) -> bool:
    """Whether label maps are to be read as the published training does: as if they covered the whole picture, moved by
    RandAugment to the nearest cell, which is done before the crop."""
    return any(isinstance(d, schema.TokenLabeling) and d.convention == "release" for d in recipe.distillers)


def _class_transform(recipe: schema.ClassificationRecipe, augmented: bool) -> Middle | Random:
    data = recipe.data
    if not augmented:
        return Middle(_pair(data.size), data.crop_pct)
    a, r = data.augment, data.augment.rand_augment
    convention: Literal["default", "release"] = "release" if _as_released(recipe) else "default"
    fill = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]  # as in timm
    return Random(
        _pair(data.size),
        scale=_pair(a.scale) if a.scale else None,
        ratio=_pair(a.ratio),
        interpolation=a.interpolation,
        crop_last=a.crop_last or convention == "release",
        flip=a.flip,
        flip_vertical=a.flip_vertical,
        color=a.color,
        rand_augment=RandAugment(r.magnitude, r.deviation, r.layers, fill=fill, convention=convention) if r else None,
        erase=a.erase,
    )


def _rotated(
    recipe: Recipe,
    data: schema.DotaData | schema.HrscData | schema.CocoRotatedData,
    split: str,
    transform: Transform,
    augmented: bool,
) -> Any:
    """A set of rotated boxes in files. What is left out of training alone is left in where models are judged."""
    source = getattr(data, split)
    how: dict[str, Any] = {
        "transform": transform,
        "seed": recipe.seed,
        "teach_difficult": data.teach_difficult,
        "skip_empty": data.skip_empty and augmented,
    }
    if isinstance(data, schema.HrscData):
        return HrscDetection(data.root, source, **how)
    if isinstance(data, schema.CocoRotatedData):
        return CocoRotated(data.root, source, data.images.format(split=split), **how)
    if data.tiles is None:
        return DotaDetection(data.root, source, data.classes, **how)
    return TiledDota(tiles_folder(recipe, data, data.tiles), data.root, source, data.classes, **how)


def tiles_folder(recipe: Recipe, data: schema.DotaData, tiles: schema.Tiles) -> Path:
    """Where the tiles of a recipe's data are; runs that cut the same data in the same way share them."""
    if tiles.folder is not None:
        return Path(tiles.folder)
    root, scales = Path(data.root).resolve(), "-".join(f"{scale:g}" for scale in tiles.scales)
    source = hashlib.sha256(json.dumps([str(root), data.classes]).encode()).hexdigest()[:8]
    return Path(recipe.output) / "tiles" / f"{root.name}-{tiles.size}-{tiles.overlap}-{scales}-{source}"


class Classes(NamedTuple):
    """classes: names by label. category_ids: the data's own number of each."""

    classes: list[str]
    category_ids: list[int]


def build_classes(recipe: Recipe) -> Classes:
    """The classes of a recipe's data, from the annotations of its val split alone: no picture need be there.

    Raises:
        DataError: annotations that name no class.
    """
    if isinstance(recipe, schema.ClassificationRecipe):
        if isinstance(recipe.data, schema.FolderData):
            classes = class_folders(Path(recipe.data.root) / recipe.data.train)
        elif isinstance(recipe.data, schema.TarData):
            classes = recipe.data.classes
        else:
            classes = build_data(recipe, "val", augmented=False).classes
        return Classes(classes, list(range(len(classes))))
    data = recipe.data
    if isinstance(data, schema.DotaData):
        names = DOTA_CLASSES[data.classes] if isinstance(data.classes, str) else data.classes
        return Classes(list(names), list(range(1, len(names) + 1)))
    if isinstance(data, schema.CocoData):
        there = read_coco(data.root, data.val, data.images.format(split="val"))
        if not there.classes:
            raise DataError(there.problems)
        return Classes(there.classes, there.category_ids)
    if isinstance(data, schema.HrscData):
        return Classes(HRSC_CLASSES, [1])
    if isinstance(data, schema.VocData):
        names = data.classes or VOC_CLASSES
        return Classes(list(names), list(range(1, len(names) + 1)))
    built = build_data(recipe, "val", augmented=False)
    return Classes(built.classes, built.category_ids)


def build_resize(data: schema.BoxData) -> Resize:
    """How pictures become the network's input wherever nothing is drawn at random: evaluation and prediction."""
    return Resize(_pair(data.size), data.keep_ratio, data.pad)


def _transform(data: schema.BoxData, augmented: bool) -> Transform:
    if not augmented:
        return build_resize(data)
    a = data.augment
    return Augment(
        _pair(data.size),
        data.keep_ratio,
        data.pad,
        flip=a.flip,
        flip_vertical=a.flip_vertical,
        flip_diagonal=a.flip_diagonal,
        crop=a.crop.min_scale if a.crop else None,
        multi_scale=_pair(a.multi_scale) if a.multi_scale else None,
        mosaic=a.mosaic,
        color=a.color,
    )


def _pair(values: list[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second
