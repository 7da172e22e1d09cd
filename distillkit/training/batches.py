"""From samples to what a wrapped model is called with, where a task does more than put them in a list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from distillkit import schema
from distillkit.data.classes import collate
from distillkit.evaluation.classes import normalised
from distillkit.schema import Recipe


def batches(recipe: Recipe, student: nn.Module, classes: int) -> dict[str, Any]:
    """``collate`` and ``prepare`` of a ``Job``, where the recipe's task has its own."""
    if not isinstance(recipe, schema.ClassificationRecipe):
        return {}
    return {"collate": collate, "prepare": Prepared(recipe.data.augment, student, classes)}


class Prepared:
    """Normalised as the student wants it, mixed by mixup or CutMix; labels alone where there are no label maps.

    What is drawn comes from torch's global generator, which checkpoints hold.
    """

    def __init__(self, augment: schema.ClassAugment, student: nn.Module, classes: int):
        self.student = student
        kinds = ((augment.mixup, v2.MixUp), (augment.cutmix, v2.CutMix))
        self.mixing = [kind(alpha=alpha, num_classes=classes) for alpha, kind in kinds if alpha]

    def __call__(self, pictures: Tensor, targets: dict[str, Any]) -> tuple[Tensor, Any]:
        labels = targets["labels"]
        if self.mixing:
            chosen = self.mixing[int(torch.randint(len(self.mixing), ()))]
            pictures, labels = chosen(pictures, labels)
        pictures = normalised(self.student, pictures)
        return pictures, {**targets, "labels": labels} if "label_map" in targets else labels
