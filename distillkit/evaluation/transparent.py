"""Scores of transparent and mirror-like objects, as their data sets define them.

Trans10K (arXiv:2003.13948): background, things and stuff, scored at the network's size. Mirrors and glass (MSD, GDD):
foreground or not, scored on a soft map at the picture's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.evaluation.segmentation import (
    confusion_matrix,
    mean_known,
    predicted_classes,
    shares,
    total_confusion,
)
from distillkit.losses.segmentation import IGNORE, nearest

#: weight of precision in the F measure of mirrors, beta squared
BETA2 = 0.3
#: thresholds of the F measure, 0..1
THRESHOLDS = 256


@dataclass(frozen=True)
class TransparentRow:
    """Of one class, -1 where it cannot be told: IoU (0..1) over the set, balanced error rate (0..100), the mean over
    the pictures that show the class (-1 for the background too), and how many pixels it has."""

    iou: float
    ber: float
    pixels: int


@dataclass(frozen=True)
class TransparentResult:
    """Scores on Trans10K.

    Args:
        numbers: miou, the mean over the foreground classes; accuracy, the share of foreground pixels that were called
            what they are (what is called foreground and is not costs nothing): 0..1. mae, the mean over pictures of
            \\|predicted - true class index\\|. mber, the mean over the foreground classes, 0..100, less is better.
        classes: by name.
        confusion: int64 (C, C): pixels of class row that were called column.
    """

    numbers: dict[str, float]
    classes: dict[str, TransparentRow]
    confusion: np.ndarray


def transparent_counts(logits: Tensor, mask: Tensor, legacy_truncate: bool = False) -> dict[str, Any]:
    """What is kept of a picture of Trans10K, scored at the network's size: ``counts`` of ``segment_dataset``.

    Args:
        logits: (C, h, w), of one view: ``segment_dataset`` with neither scales nor flip, for ``legacy_truncate``.
        mask: int64 (H, W), 0 = background; brought to h x w, nearest neighbour.
        legacy_truncate: keep what the release's accuracy and BER are computed from too.

    Returns "confusion", sparse int64 (C, C), and, for ``legacy_truncate``, "truncated", that of logits cut to integers.
    """
    mask = nearest(mask[None], logits.shape[-2:])[0]
    kept = {"confusion": confusion_matrix(predicted_classes(logits), mask, len(logits)).to_sparse()}
    if legacy_truncate:
        kept["truncated"] = confusion_matrix(predicted_classes(logits.trunc()), mask, len(logits)).to_sparse()
    return kept


def transparent_metrics(
    found: Sequence[dict[str, Any]], classes: Sequence[str], legacy_truncate: bool = False
) -> TransparentResult:
    """Trans10K's scores.

    BER of class c in a picture is 100 (1 - (TP / pixels of c + TN / other pixels) / 2). As in the release, TN are the
    other pixels that were called exactly what they are, which is stricter than "not c".

    Args:
        found: of every picture what ``transparent_counts`` gives, or ``pixel_counts`` (at the picture's own size).
        classes: names by label, the background first.
        legacy_truncate: accuracy and BER as published, which are of logits cut to integers (equal ones then go to the
            first class, often the background). Off by default: the true predictions count.

    Raises ValueError where there is nothing to score, another number of classes, or no "truncated" for the release.
    """
    if legacy_truncate and not all("truncated" in row for row in found):
        raise ValueError(
            "legacy_truncate needs 'truncated' of every picture: transparent_counts(..., legacy_truncate=True)"
        )
    exact = total_confusion(found, classes)
    name = "truncated" if legacy_truncate else "confusion"
    scored = total_confusion(found, classes, name)
    pictures = np.stack([row["confusion"].to_dense().numpy() for row in found])
    right, true, called = np.diag(exact), exact.sum(1), exact.sum(0)
    iou = shares(right, true + called - right)
    ber = _class_bers(np.stack([row[name].to_dense().numpy() for row in found]))
    numbers = {
        "miou": mean_known(iou[1:]),
        "accuracy": float(shares(np.diag(scored)[1:].sum(), scored[1:].sum())),
        "mae": _mean_absolute_error(pictures),
        "mber": mean_known(ber[1:]),
    }
    rows = {label: TransparentRow(float(iou[i]), float(ber[i]), int(true[i])) for i, label in enumerate(classes)}
    return TransparentResult(numbers, rows, exact)


def _class_bers(pictures: np.ndarray) -> np.ndarray:
    """(C,) from the confusion (N, C, C) of pictures: of every class the mean over those that show it; -1: the
    background, and classes that none shows."""
    right = np.diagonal(pictures, axis1=1, axis2=2)
    true, labelled = pictures.sum(2), pictures.sum((1, 2))[:, None]
    others = right.sum(1, keepdims=True) - right
    # a picture that is all of one class has no others to be wrong about
    specificity = np.where(labelled > true, others / np.maximum(labelled - true, 1), 1.0)
    errors = 100 * (1 - (right / np.maximum(true, 1) + specificity) / 2)
    return np.array([-1.0] + [mean_known(errors[true[:, c] > 0, c]) for c in range(1, true.shape[1])])


def _mean_absolute_error(pictures: np.ndarray) -> float:
    labels = np.arange(pictures.shape[1])
    wrong = (pictures * abs(labels[:, None] - labels)).sum((1, 2))
    return mean_known(shares(wrong, pictures.sum((1, 2))))


def mirror_counts(logits: Tensor, mask: Tensor) -> dict[str, Any]:
    """What is kept of a picture of mirrors or glass: ``counts`` of ``segment_dataset``.

    The foreground's softmax probability is cut to 8 bits, as in the picture file that the release scores, then brought
    to the mask's size (bilinear, corners not aligned); from 0.5 on a pixel is foreground.

    Args:
        logits: (2, h, w), background and foreground.
        mask: int64 (H, W), 0, 1 or ``IGNORE``.

    Returns "iou", "accuracy", "ber" and "mae", floats in 0..1, and "precision" and "recall", float64 (256,), at
    thresholds 0, 1/255, ..., 1 of the map less its least and over its greatest value.

    Raises ValueError for other shapes or labels, or a mask without a labelled pixel.
    """
    if logits.dim() != 3 or len(logits) != 2:
        raise ValueError(f"expected logits (2, h, w), background and foreground, got {tuple(logits.shape)}")
    levels = (255 * logits.float().softmax(0)[1]).floor() / 255
    size = (mask.shape[-2], mask.shape[-1])
    soft = F.interpolate(levels[None, None], size, mode="bilinear", align_corners=False)[0, 0].cpu()
    return soft_counts(soft, mask)


def soft_counts(soft: Tensor, mask: Tensor) -> dict[str, Any]:
    """Of a soft map (H, W) in 0..1 what ``mirror_counts`` gives.

    IoU is 0 where truth or prediction is empty, as published. A part of BER that has no pixels counts as right.
    """
    if soft.shape != mask.shape:
        raise ValueError(f"the map is {tuple(soft.shape)}, the mask {tuple(mask.shape)}")
    labelled = mask != IGNORE
    soft, truth = soft[labelled].double(), mask[labelled]
    if not len(truth) or not 0 <= int(truth.min()) <= int(truth.max()) <= 1:
        raise ValueError(f"expected a mask of 0 and 1, and {IGNORE} for ignored, got labels {truth.unique().tolist()}")
    there = truth == 1
    said = soft >= 0.5
    tp, positives, called = (int(x.sum()) for x in (there & said, there, said))
    tn, negatives = int((~there & ~said).sum()), len(truth) - positives
    found = tp / positives if positives else 1.0
    kept = tn / negatives if negatives else 1.0
    precision, recall = _curve(soft, there)
    return {
        "iou": tp / (positives + called - tp) if positives and called else 0.0,
        "accuracy": (tp + tn) / len(truth),
        "ber": 1 - (found + kept) / 2,
        "mae": float((soft - truth).abs().mean()),
        "precision": precision,
        "recall": recall,
    }


def _curve(soft: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall, float64 (256,), of the stretched map >= threshold; 0 where no pixel is there for it."""
    least, greatest = soft.aminmax()
    stretched = (soft - least) / (greatest - least) if greatest > least else torch.zeros_like(soft)
    # how many thresholds a pixel is at or above; the first, 0, always; 1e-9: (3 / 255) * 255 may be 2.9999999
    above = (stretched * (THRESHOLDS - 1) + 1e-9).floor().long()
    called, right = (
        torch.bincount(levels, minlength=THRESHOLDS).flip(0).cumsum(0).flip(0).double()
        for levels in (above, above[there])
    )
    return right / called.clamp(min=1), right / there.sum().clamp(min=1)


def mirror_metrics(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Scores of mirrors and glass, all in 0..1, from what ``mirror_counts`` gives of every picture.

    iou, accuracy, ber and mae are means over pictures. max_f_beta is the greatest F measure (beta^2 = 0.3) of
    precision and recall, each averaged over the pictures first.

    Raises ValueError where there is no prediction.
    """
    if not found:
        raise ValueError("there is no prediction to score")
    numbers = {name: float(np.mean([row[name] for row in found])) for name in ("iou", "accuracy", "ber", "mae")}
    precision, recall = (torch.stack([row[name] for row in found]).mean(0) for name in ("precision", "recall"))
    f_beta = (1 + BETA2) * precision * recall / (BETA2 * precision + recall).clamp(min=1e-12)
    return numbers | {"max_f_beta": float(f_beta.max())}
