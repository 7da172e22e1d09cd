"""Weak segmentation: a classifier is trained on image-level labels, pseudo masks are made of its activation maps, and a
segmentation model learns from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.core.adapter import AS_LOADED
from distillkit.core.teacher import Renormalise
from distillkit.data.mask_check import check_masks
from distillkit.data.problems import DataError, Problem
from distillkit.data.segmentation import MaskFiles
from distillkit.data.weak import collate_labels
from distillkit.evaluation.classes import moments
from distillkit.evaluation.predict import Progress
from distillkit.evaluation.pseudo_masks import CamResult, cam_dataset, cam_metrics
from distillkit.schema import VocLabelData, WeakRecipe
from distillkit.training import build
from distillkit.training.build import Classes
from distillkit.training.build.label_data import there_are
from distillkit.training.cams import predict_cams as predict
from distillkit.training.errors import RunError
from distillkit.training.export import Logits
from distillkit.training.tasks import Exported
from distillkit.training.weak import figures, further

__all__ = [
    "DROP_LAST",
    "DRY",
    "batches",
    "check_judged",
    "check_taught",
    "doubts",
    "exported",
    "figures",
    "find",
    "further",
    "judge",
    "predict",
    "read_files",
    "whole",
]

DRY = 2
DROP_LAST = True  # classifiers need the statistics of a batch


def batches(recipe: WeakRecipe, student: nn.Module, classes: int) -> dict[str, Any]:
    return {"collate": collate_labels, "prepare": Prepared(student)}


class Prepared:
    """Normalised as the student wants it."""

    def __init__(self, student: nn.Module):
        self.normalise = Renormalise(AS_LOADED, moments(student))

    def __call__(self, pictures: Tensor, targets: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        return self.normalise(pictures), targets


def find(
    recipe: WeakRecipe,
    model: nn.Module,
    data: Any,
    batch: int,
    device: torch.device | str,
    progress: Progress | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """The counts of every picture's activation maps, made with its true labels."""
    cam = recipe.cam
    return cam_dataset(
        model,
        data,
        device,
        progress,
        workers,
        cam.scales,
        cam.flip,
        cam.method,
        cam.target_layer,
        cam.thresholds,
    )


def whole(recipe: WeakRecipe, found: Sequence[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    return list(found)


def judge(recipe: WeakRecipe, found: Sequence[dict[str, Any]], data: Any) -> CamResult:
    """Of the activation maps; what comes after them is not known yet (-1)."""
    result = cam_metrics(found, data.classes)
    first = {name: result.numbers[name] for name in ("miou", "mAP")}
    later = {"mask_miou": -1.0, "miou": -1.0}
    return replace(result, numbers={f"cam_{name}": n for name, n in (first | result.numbers).items()} | later)


# -- data -------------------------------------------------------------------------------------------------------------


def check_taught(split: str, data: Any) -> None:
    if not len(data):
        raise RunError(f"data.{split} has no picture: name another list")


def check_judged(split: str, data: Any) -> None:
    check_taught(split, data)
    if "mask" not in data[0, 0][1]:
        raise RunError(f"data.{split} is what models are judged on, and has no masks: name their folder in data.masks")


def read_files(recipe: WeakRecipe, split: Any, progress: Progress | None = None) -> Iterator[Problem]:
    if getattr(recipe.data, split, None) is None:
        return
    try:
        # true masks of training pictures, where there are some, judge pseudo masks
        data = build.build_data(recipe, split, augmented=split == "train" and recipe.segment is None)
    except DataError:  # said where the set is built
        return
    if isinstance(data, MaskFiles):
        yield from check_masks(data, progress)


def doubts(recipe: WeakRecipe) -> Iterator[tuple[str, str]]:
    data = recipe.data
    if not isinstance(data, VocLabelData) or recipe.segment is None:
        return
    try:
        keys = build.build_data(recipe, "train", augmented=True).keys
    except DataError:  # said where the set is built
        return
    if 0 < (found := there_are(data, data.masks, keys)) < len(keys):
        yield (
            "data.masks",
            f"{found} of {len(keys)} training pictures have a true mask: pseudo masks are not scored (mask_miou is -1)",
        )


# -- export -----------------------------------------------------------------------------------------------------------


def exported(recipe: WeakRecipe, student: nn.Module, data: Classes) -> Exported:
    """The classifier."""
    pictures = torch.rand(2, 3, *recipe.data.size, generator=torch.Generator().manual_seed(0))
    decoding = {
        "input": "pictures: (batch, 3, height, width), float32, red green blue, 0..1, not normalised",
        "height": pictures.shape[2],
        "width": pictures.shape[3],
        "outputs": "logits (batch, classes) of the whole picture",
        "scores": "sigmoid(logits): how likely the picture shows each class, independently of the others",
        "classes": list(data.classes),
    }
    return Exported(Logits(student).eval(), pictures, ["logits"], decoding)
