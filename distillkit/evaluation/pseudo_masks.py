"""Pseudo masks: which class each pixel of a picture shows, made of its class maps; and how right they are on a set.

Masks are int64 (H, W): 0 = background, i + 1 = class i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distillkit.evaluation.cam import SCALES, class_maps
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.crf import Backend, DenseCRF, dense_crf
from distillkit.evaluation.predict import Progress, evaluating, in_order
from distillkit.evaluation.segmentation import class_ious, confusion_matrix, mean_known, total_confusion

THRESHOLD = 0.25  # of the release of L2G
THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3)  # and what it sweeps
BACKGROUND = "background"
Rule = Literal["threshold", "saliency", "crf"]

# ---- one picture


def pseudo_mask(
    maps: Tensor,
    rule: Rule = "threshold",
    threshold: float | None = None,
    saliency: Tensor | None = None,
    picture: Tensor | None = None,
    crf: DenseCRF | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The mask by one of the rules ``threshold_mask``, ``saliency_mask`` and ``crf_mask``; arguments are theirs.

    Args:
        threshold: the background's strength, or that of the saliency; None: 0.25, or 0.5 of the saliency.

    Raises:
        ValueError: an unknown rule, or one without what it reads.
    """
    strength = THRESHOLD if threshold is None else threshold
    if rule == "threshold":
        return threshold_mask(maps, strength)
    if rule == "saliency":
        if saliency is None:
            raise ValueError("rule 'saliency' needs the picture's saliency map (H, W); without one use 'threshold'")
        return saliency_mask(maps, saliency, 0.5 if threshold is None else threshold)
    if rule == "crf":
        if picture is None:
            raise ValueError("rule 'crf' needs the picture, uint8 (3, H, W)")
        return crf_mask(maps, picture, strength, crf, backend)
    raise ValueError(f"rule must be 'threshold', 'saliency' or 'crf', got {rule!r}")


def threshold_mask(maps: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """argmax of (threshold, map 1, map 2, ...): the strongest class where it is above the threshold.

    Args:
        maps: (C, H, W) in 0..1, as ``class_maps`` makes them.
        threshold: the background's strength everywhere.
    """
    _check(maps)
    strength, best = maps.max(0)
    return torch.where(strength > threshold, best + 1, 0)


def saliency_mask(maps: Tensor, saliency: Tensor, threshold: float = 0.5) -> Tensor:
    """Background where the saliency is below the threshold; elsewhere the strongest class, however weak it is.

    A salient pixel where all maps are 0 is background, too: there is no class to give it.

    Args:
        maps: (C, H, W) in 0..1.
        saliency: (H, W) or (1, H, W) in 0..1.
        threshold: of the saliency.
    """
    _check(maps)
    if saliency.squeeze(0).shape != maps.shape[1:]:
        raise ValueError(
            f"the saliency map is {tuple(saliency.shape)} and the class maps are {tuple(maps.shape[1:])}: resize it to "
            "their (height, width)"
        )
    strength, best = maps.max(0)
    return torch.where((saliency.squeeze(0) >= threshold) & (strength > 0), best + 1, 0)


def crf_mask(
    maps: Tensor,
    picture: Tensor,
    threshold: float = THRESHOLD,
    settings: DenseCRF | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The strongest class after a dense CRF, which starts from (threshold, map 1, map 2, ...) over their sum.

    Classes whose map is 0 everywhere, which the picture does not show, have no part in it.

    Args:
        maps: (C, H, W) in 0..1.
        picture: uint8 (3, H, W), RGB.
        settings, backend: as ``dense_crf``.
    """
    _check(maps)
    shown = maps.flatten(1).amax(1).nonzero().flatten()
    if not len(shown):
        return torch.zeros(maps.shape[1:], dtype=torch.int64, device=maps.device)
    strengths = torch.cat([torch.full_like(maps[:1], threshold), maps[shown]])
    best = dense_crf(strengths, picture, settings, backend).argmax(0)
    return torch.cat([shown.new_zeros(1), shown + 1])[best]


def _check(maps: Tensor) -> None:
    if maps.dim() != 3 or not maps.is_floating_point():
        raise ValueError(f"class maps must be float (C, H, W) in 0..1, got {maps.dtype} {tuple(maps.shape)}")


# ---- a set


@dataclass(frozen=True)
class CamRow:
    """Of one class, -1 where it cannot be told: IoU over the set at the best threshold, and average precision of its
    logits; and how many pictures show it."""

    iou: float
    average_precision: float
    pictures: int


@dataclass(frozen=True)
class CamResult:
    """Scores of a classifier's class maps, 0..1.

    Args:
        numbers: miou, the mean IoU over background and classes at the best of the thresholds, and that threshold;
            miou@0.25 and so on, at each; mAP, the mean over the classes of the average precision of the logits.
        classes: by name; the background first.
        confusion: int64 (C + 1, C + 1) at the best threshold: pixels of class row that were called column.
    """

    numbers: dict[str, float]
    classes: dict[str, CamRow]
    confusion: np.ndarray


def cam_dataset(
    model: nn.Module,
    dataset: Any,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    workers: int = 0,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    method: str = "cam",
    target_layer: str | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[dict[str, Any]]:
    """Make the class maps of every picture with its true labels, and compare their ``threshold_mask`` with its mask.

    Args:
        model: on ``device``.
        dataset: ``dataset[(0, index)]`` gives (image in 0..1, target with labels (C,), key, and mask int64 of any size,
            255 = ignored).
        progress: called as (pictures done, pictures in all) after each picture.
        scales, flip, method, target_layer: as ``class_maps``.

    Returns per picture, on the CPU, its key, logits (C,), labels (C,) and for every threshold a sparse confusion matrix
    (C + 1, C + 1), called "confusion@0.25": what ``cam_metrics`` takes.

    Raises ValueError, with the picture's key, for what does not fit.
    """
    found: list[dict[str, Any]] = []
    with evaluating(model):
        for [(image, target)] in in_order(dataset, 1, workers):
            if "mask" not in target:
                raise ValueError(
                    f"picture {target['key']}: it has no mask to compare with; give the data set its masks"
                )
            image, mask = image.to(device), target["mask"]
            try:
                maps = class_maps(
                    model, image, target["labels"], scales, flip, method, (mask.shape[0], mask.shape[1]), target_layer
                )
                row = {
                    f"confusion@{threshold:g}": _confusion(maps, mask, threshold).to_sparse()
                    for threshold in thresholds
                }
            except ValueError as error:
                raise ValueError(f"picture {target['key']}: {error}") from error
            with torch.inference_mode():
                logits = model(normalised(model, image[None]))[0].float().cpu()
            found.append({**row, "key": target["key"], "logits": logits, "labels": target["labels"]})
            if progress is not None:
                progress(len(found), len(dataset))
    return found


def _confusion(maps: Tensor, mask: Tensor, threshold: float) -> Tensor:
    return confusion_matrix(threshold_mask(maps, threshold).cpu(), mask, len(maps) + 1)


def cam_metrics(found: Sequence[dict[str, Any]], classes: Sequence[str]) -> CamResult:
    """How right class maps are.

    A class that is neither in the masks nor in the predictions has no part in a mean IoU; one that no picture, or every
    one, is labelled with has none in the mAP. A logit that is not a number counts as the lowest.

    Args:
        found: of ``cam_dataset``.
        classes: names of the foreground.

    Raises ValueError where there is no prediction, or another number of classes.
    """
    if not found:
        raise ValueError("there is no prediction to score")
    names = [BACKGROUND, *classes]
    confusions = {
        float(name.removeprefix("confusion@")): total_confusion(found, names, name)
        for name in found[0]
        if name.startswith("confusion@")
    }
    ious = {threshold: class_ious(confusion) for threshold, confusion in confusions.items()}
    best = max(ious, key=lambda threshold: mean_known(ious[threshold]))
    logits, labels = torch.stack([f["logits"] for f in found]), torch.stack([f["labels"] for f in found]) > 0
    precisions = [-1.0, *(average_precision(logits[:, i], labels[:, i]) for i in range(len(classes)))]
    pictures = [len(found), *labels.sum(0).tolist()]
    numbers = {
        "miou": mean_known(ious[best]),
        "threshold": best,
        **{f"miou@{threshold:g}": mean_known(values) for threshold, values in ious.items()},
        "mAP": mean_known(np.array(precisions)),
    }
    rows = {name: CamRow(float(ious[best][i]), precisions[i], pictures[i]) for i, name in enumerate(names)}
    return CamResult(numbers, rows, confusions[best])


def average_precision(logits: Tensor, shown: Tensor) -> float:
    """Of one class over a set: the mean, over the pictures that show it, of the precision of all with as high a logit.

    Args:
        logits: (N,). shown: bool (N,).

    Returns a number in 0..1; -1 where no picture or every one shows it.
    """
    if not shown.any() or shown.all():
        return -1.0
    from sklearn.metrics import average_precision_score

    values = logits.nan_to_num(nan=-torch.inf).clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    return float(average_precision_score(shown.numpy(), values.numpy()))
