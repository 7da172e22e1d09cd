"""Sets of upright and of rotated boxes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from distillkit import plugins, schema
from distillkit.data.coco import CocoDetection, read_coco
from distillkit.data.coco_rotated import CocoRotated
from distillkit.data.dota import DOTA_CLASSES, DotaDetection
from distillkit.data.hrsc import HRSC_CLASSES, HrscDetection
from distillkit.data.problems import DataError
from distillkit.data.scenes import Scenes
from distillkit.data.tiled import TiledDota
from distillkit.data.transforms import Augment, Resize, Transform
from distillkit.data.voc import VOC_CLASSES, VocDetection
from distillkit.schema import BoxRecipe, Recipe
from distillkit.training.build.classes import Classes, pair, source_of


class DetectionData(Protocol):
    """What a run asks of a detection set; see ``distillkit.data``."""

    classes: list[str]
    category_ids: list[int]

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]: ...
    def to_coco_json(self) -> dict[str, Any]: ...


def build(recipe: BoxRecipe, split: str, augmented: bool) -> Any:
    """A ``DetectionData``, augmented as the recipe says or only resized."""
    data, source = recipe.data, source_of(recipe, split)
    transform = _transform(data, augmented)
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
        return Scenes(source, pair(data.size), recipe.seed, split, pair(data.digits), transform, **turned)
    return plugins.build("data", data.name, split=split, transform=transform, seed=recipe.seed, **data.options)


def classes_of(recipe: BoxRecipe) -> Classes:
    """From the annotations of the val split alone."""
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
    built = build(recipe, "val", augmented=False)
    return Classes(built.classes, built.category_ids)


def _rotated(
    recipe: BoxRecipe,
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


def build_resize(data: schema.BoxData) -> Resize:
    """How pictures become the network's input wherever nothing is drawn at random: evaluation and prediction."""
    return Resize(pair(data.size), data.keep_ratio, data.pad)


def _transform(data: schema.BoxData, augmented: bool) -> Transform:
    if not augmented:
        return build_resize(data)
    a = data.augment
    return Augment(
        pair(data.size),
        data.keep_ratio,
        data.pad,
        flip=a.flip,
        flip_vertical=a.flip_vertical,
        flip_diagonal=a.flip_diagonal,
        crop=a.crop.min_scale if a.crop else None,
        multi_scale=pair(a.multi_scale) if a.multi_scale else None,
        mosaic=a.mosaic,
        color=a.color,
    )
