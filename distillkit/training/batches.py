"""From samples to what a wrapped model is called with, where a task does more than put them in a list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from distillkit import schema
from distillkit.core.teacher import Renormalise
from distillkit.data.classes import collate
from distillkit.evaluation.classes import moments
from distillkit.schema import Recipe

AS_LOADED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and deviation of pictures in 0..1 that nothing was done to


def batches(recipe: Recipe, student: nn.Module, classes: int) -> dict[str, Any]:
    """``collate``, ``prepare`` and ``drop_last`` of a ``Job``, where the recipe's task has its own."""
    if not isinstance(recipe, schema.ClassificationRecipe):
        return {}
    prepare = Prepared(recipe.data.augment, student, classes)
    return {"collate": collate, "prepare": prepare, "drop_last": drop_last(recipe)}


def drop_last(recipe: Recipe) -> bool:
    """Whether an epoch ends with its last whole batch: classifiers need the statistics of a batch."""
    return isinstance(recipe, schema.ClassificationRecipe)


class Prepared:
    """Normalised as the student wants it, mixed by mixup or CutMix; labels alone where there are no label maps.

    What is drawn comes from torch's global generator, which checkpoints hold.
    """

    def __init__(self, augment: schema.ClassAugment, student: nn.Module, classes: int):
        self.normalise = Renormalise(AS_LOADED, moments(student))
        kinds = ((augment.mixup, v2.MixUp), (augment.cutmix, v2.CutMix))
        self.mixing = [kind(alpha=alpha, num_classes=classes) for alpha, kind in kinds if alpha]

    def __call__(self, pictures: Tensor, targets: dict[str, Any]) -> tuple[Tensor, Any]:
        labels = targets["labels"]
        if self.mixing:
            chosen = self.mixing[int(torch.randint(len(self.mixing), ()))]
            pictures, labels = chosen(pictures, labels)
        pictures = self.normalise(pictures)
        return pictures, {**targets, "labels": labels} if "label_map" in targets else labels
