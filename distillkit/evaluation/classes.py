"""A classifier's predictions on a whole data set, and how right they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from distillkit.adapters import own_adapter
from distillkit.core.adapter import logits_in, said_by
from distillkit.evaluation.predict import Progress, evaluating, in_order


@dataclass(frozen=True)
class ClassRow:
    """Of one class: share of its pictures that were found (recall), of those called so that are (precision, -1 where
    none is called so), and how many pictures it has."""

    recall: float
    precision: float
    pictures: int


@dataclass(frozen=True)
class ClassificationResult:
    """Scores of a classifier.

    Args:
        numbers: top1 and top5 (0..1), and loss, the mean cross entropy.
        classes: by name.
        confusion: int64 (C, C): pictures of class row that were called column.
    """

    numbers: dict[str, float]
    classes: dict[str, ClassRow]
    confusion: np.ndarray


def classify_dataset(
    model: nn.Module,
    dataset: Any,
    batch: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Logits (C,) and label of every picture, on the CPU; pictures are normalised as the model says.

    Args:
        dataset: ``dataset[(0, index)]`` gives (image in 0..1, target with label).
        progress: called as (pictures done, pictures in all) after each batch.
    """
    found: list[dict[str, Any]] = []
    with evaluating(model), torch.inference_mode():
        for items in in_order(dataset, batch, workers):
            pictures = torch.stack([image for image, _ in items]).to(device)
            logits = class_logits(model, pictures).float().cpu()
            found += [{"logits": row, "label": target["label"]} for row, (_, target) in zip(logits, items, strict=True)]
            if progress is not None:
                progress(len(found), len(dataset))
    return found


def class_logits(model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, C) of pictures (B, 3, H, W) in 0..1, wherever in its output the model has them."""
    return logits_in(model(normalised(model, pictures)), type(model).__name__)


def normalised(model: nn.Module, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in 0..1 as ``model`` wants them: less the mean and over the deviation that it says
    (timm's ``pretrained_cfg``), else ImageNet's."""
    mean, std = (pictures.new_tensor(moment)[:, None, None] for moment in moments(model))
    return (pictures - mean) / std


def moments(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a model's input: as it says itself, as its own adapter does, else ImageNet's."""
    given = getattr(own_adapter(model), "norm", None)
    return said_by(model) or given or (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def class_metrics(found: Sequence[dict[str, Any]], classes: Sequence[str]) -> ClassificationResult:
    """How right predictions are.

    A logit that is not a number is no answer: such a picture counts as wrong. Of equal logits the first counts.

    Raises ValueError where there is no prediction, or another number of classes.
    """
    if not found:
        raise ValueError("there is no prediction to score")
    logits, labels = torch.stack([f["logits"] for f in found]), torch.tensor([f["label"] for f in found])
    if logits.shape[1] != len(classes):
        raise ValueError(f"the model tells {logits.shape[1]} classes apart, the data have {len(classes)}")
    known = logits.isfinite().all(1)
    order = logits.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
    right = (order == labels[:, None]) & known[:, None]
    said = torch.where(known, order[:, 0], (labels + 1) % len(classes))
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels.numpy(), said.numpy()), 1)
    true, called = confusion.sum(1), confusion.sum(0)
    rows = {
        name: ClassRow(
            recall=float(confusion[i, i] / true[i]) if true[i] else -1.0,
            precision=float(confusion[i, i] / called[i]) if called[i] else -1.0,
            pictures=int(true[i]),
        )
        for i, name in enumerate(classes)
    }
    numbers = {
        "top1": float(right[:, :1].any(1).double().mean()),
        "top5": float(right[:, :5].any(1).double().mean()),
        "loss": float(nn.functional.cross_entropy(logits.double(), labels)),
    }
    return ClassificationResult(numbers, rows, confusion)
