"""Sets of pictures with masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distillkit import plugins, schema
from distillkit.data.coco_semantic import CocoSemantic, semantic_classes
from distillkit.data.mask_scenes import MaskScenes
from distillkit.data.mask_transforms import MaskAugment, MaskResize, MaskTransform
from distillkit.data.problems import DataError, Problem
from distillkit.data.segmentation import VocMasks, mask_classes
from distillkit.data.trans10k import TRANS_CLASSES, TransMasks
from distillkit.recipe import student_of
from distillkit.schema import SegmentationRecipe
from distillkit.training.build.classes import Classes, pair, source_of
from distillkit.training.build.models import teacher_configs

#: share of the shorter side; of the boundary maps that FANet was published with
BOUNDARY = 8 / 512


def build(recipe: SegmentationRecipe, split: str, augmented: bool) -> Any:
    """A set for segmentation."""
    data, source = recipe.data, source_of(recipe, split)
    how: dict[str, Any] = {"transform": _augment(recipe) if augmented else build_resize(data), "seed": recipe.seed}
    match data:
        case schema.VocMaskData():
            masks = data.train_masks if augmented and data.train_masks is not None else data.masks
            return VocMasks(data.root, source, data.classes, masks, data.images, **how)
        case schema.CocoSemanticData():
            files = data.images, data.masks, data.names
            return CocoSemantic(data.root, source, data.categories, data.others, *files, **how)
        case schema.TransData():
            return TransMasks(data.root, source, **how)
        case schema.MaskSceneData():
            return MaskScenes(source, pair(data.size), split=split, digits=pair(data.digits), **how)
        case _:
            return plugins.build("data", data.name, split=split, **how, **data.options)


def classes_of(recipe: SegmentationRecipe) -> Classes:
    """From files beside the pictures, where they say it."""
    data = recipe.data
    problems: list[Problem] = []
    if isinstance(data, schema.TransData):
        names = TRANS_CLASSES
    elif isinstance(data, schema.CocoSemanticData):
        names = semantic_classes(Path(data.root), data.val, data.categories, data.others, problems)
    elif isinstance(data, schema.VocMaskData):
        names = mask_classes(Path(data.root), data.classes, problems)
    else:
        names = build(recipe, "val", augmented=False).classes
    if problems:
        raise DataError(problems)
    return Classes(list(names), list(range(len(names))))


def build_resize(data: Any) -> MaskResize:
    """How pictures become the network's input wherever nothing is drawn at random: evaluation and prediction."""
    return MaskResize(pair(data.size) if data.resize else None, data.keep_ratio)


def _augment(recipe: SegmentationRecipe) -> MaskTransform:
    data, a = recipe.data, recipe.data.augment
    return MaskAugment(
        pair(data.size) if data.resize else None,
        pair(a.scale) if a.scale else None,
        pair(data.size) if a.crop else False,
        data.keep_ratio,
        flip=a.flip,
        color=a.color,
        hue=a.hue,
        rotate90=a.rotate90,
        boundary=data.boundary or (BOUNDARY if _has_boundary_stream(recipe) else None),
        boundary_between=data.boundary_between,
    )


def _has_boundary_stream(recipe: SegmentationRecipe) -> bool:
    """Whether a model that is trained is known to predict boundaries."""
    taught = [config for config in teacher_configs(recipe).values() if config.train is not None]
    students = [student_of(recipe, row.student) for row in recipe.compare]
    return any(isinstance(model, schema.FANetModel) for model in (*taught, *students))
