"""A segmentation model's predictions on a whole data set, and how right they are.

A picture is counted as soon as it is predicted, and only its counts are kept: what a set takes does not grow with the
size of its pictures, and counts of several processes are put together by joining the lists.

Boundary IoU: Cheng et al., arXiv:2103.16562.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.adapters.segmenter import NAMES
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.predict import Progress, evaluating, in_order
from distillkit.losses.segmentation import IGNORE

#: width of the bands of boundary IoU, a share of the picture's diagonal
BAND = 0.02

#: logits (C, h, w) at the network's size and mask int64 (H, W) at its own -> what is kept of a picture, small
Counts = Callable[[Tensor, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class PixelRow:
    """Of one class, -1 where it cannot be told: IoU and boundary IoU over the set (-1: neither there nor predicted),
    share of its pixels that were found (accuracy, -1: not there), and how many pixels it has."""

    iou: float
    boundary_iou: float
    accuracy: float
    pixels: int


@dataclass(frozen=True)
class PixelResult:
    """Scores of a segmentation model, 0..1.

    Args:
        numbers: miou, boundary_iou and mean_accuracy, means over the classes that have the number; pixel_accuracy.
        classes: by name.
        confusion: int64 (C, C): pixels of class row that were called column.
    """

    numbers: dict[str, float]
    classes: dict[str, PixelRow]
    confusion: np.ndarray


def segment_dataset(
    model: nn.Module,
    dataset: Any,
    batch: int = 8,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    workers: int = 0,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    counts: Counts | None = None,
) -> list[dict[str, Any]]:
    """Run a model over a data set, in its order, and count.

    Args:
        model: on ``device``; pictures (B, 3, H, W), normalised as it says -> logits (B, C, H, W), or a dict of "out".
        dataset: ``dataset[(0, index)]`` gives (image in 0..1, target with "mask" int64 (H, W), of any size, and "key").
            Pictures of a batch may differ in size; those of one size are run together.
        progress: called as (pictures done, pictures in all) after each batch.
        scales, flip: each picture is seen at all of these sizes, and mirrored too; softmax probabilities are averaged.
        counts: what is kept of a picture; None: ``pixel_counts``, which ``pixel_metrics`` takes.

    Returns per picture what ``counts`` gives, and its key. The model runs in eval mode under ``inference_mode``; every
    module's mode is restored after.

    Raises ValueError, with the picture's key, where ``counts`` does, and for what are no logits.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales: expected one positive number or more, got {tuple(scales)}")
    found: list[dict[str, Any]] = []
    with evaluating(model), torch.inference_mode():
        for items in in_order(dataset, batch, workers):
            rows: dict[int, dict[str, Any]] = {}
            for places in _of_one_size([image for image, _ in items]):
                pictures = torch.stack([items[i][0] for i in places]).to(device)
                seen = seen_at(model, normalised(model, pictures), scales, flip)
                rows.update({i: _counted(logits, items[i][1], counts) for i, logits in zip(places, seen)})
            found += [rows[i] for i in range(len(items))]
            if progress is not None:
                progress(len(found), len(dataset))
    return found


def seen_at(model: nn.Module, pictures: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False) -> Tensor:
    """Float32 logits (B, C, h, w) of normalised pictures (B, 3, h, w), which are scaled bilinearly with antialiasing.

    Of several views these are logarithms of the mean probabilities, so that softmax gives the mean and a view more
    changes nothing for what reads them.
    """
    size = pictures.shape[-2:]
    views = [_at_scale(pictures, scale) for scale in scales]
    logits = [_resized(_logits(model, view), size) for view in views]
    if flip:
        logits += [_resized(_logits(model, view.flip(-1)), size).flip(-1) for view in views]
    if len(logits) == 1:
        return logits[0]
    mean = logits[0].log_softmax(1)
    for other in logits[1:]:
        mean = torch.logaddexp(mean, other.log_softmax(1))
    return mean - np.log(len(logits))


def pixel_counts(logits: Tensor, mask: Tensor) -> dict[str, Any]:
    """What is kept of a picture: "confusion", sparse int64 (C, C), and "boundary_intersection" and "boundary_union",
    int64 (C,).

    Logits are brought to the mask's size (bilinear, corners not aligned), and the first of the greatest is predicted.

    Args:
        logits: (C, h, w).
        mask: int64 (H, W), labels 0..C-1 or ``IGNORE``.

    Raises ValueError for other labels or shapes.
    """
    predicted = predicted_classes(logits, (mask.shape[-2], mask.shape[-1]))
    classes = len(logits)
    confusion = confusion_matrix(predicted, mask, classes)
    intersection, union = boundary_counts(predicted, mask, classes)
    # a picture shows few of the classes: 40 000 pictures of COCO would take 2 GB
    return {"confusion": confusion.to_sparse(), "boundary_intersection": intersection, "boundary_union": union}


def predicted_classes(logits: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """uint8 (H, W), on the CPU: the first of the greatest of logits (C, h, w) that are brought to ``size``.

    Where one is not a number the answer is ``IGNORE``, which is no class and wrong everywhere.
    """
    if logits.dim() != 3 or not 1 <= len(logits) <= IGNORE:
        raise ValueError(f"expected logits (C, h, w) of at most {IGNORE} classes, got {tuple(logits.shape)}")
    if size is not None:
        logits = _resized(logits[None], size)[0]
    greatest, said = logits.max(0)  # a NaN is the greatest; six times as fast as argmax on the CPU
    return said.to(torch.uint8).masked_fill(greatest.isnan(), IGNORE).cpu()


def confusion_matrix(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """int64 (C, C): labelled pixels of class row that were called column.

    A prediction that is no class (``IGNORE``) counts as the class after the true one: wrong.

    Raises ValueError for a label that is no class, and for shapes that differ.
    """
    if predicted.shape != mask.shape:
        raise ValueError(f"the prediction is {tuple(predicted.shape)}, the mask {tuple(mask.shape)}")
    labelled = mask != IGNORE
    truth, said = mask[labelled].long(), predicted[labelled].long()
    if len(truth) and not 0 <= int(truth.min()) <= int(truth.max()) < classes:
        wrong = int(truth.max()) if int(truth.max()) >= classes else int(truth.min())
        raise ValueError(f"the mask has label {wrong}; expected 0..{classes - 1}, or {IGNORE} for ignored")
    said = said.where(said < classes, (truth + 1) % classes)
    return torch.bincount(truth * classes + said, minlength=classes * classes).view(classes, classes)


def boundary_counts(predicted: Tensor, mask: Tensor, classes: int, band: float = BAND) -> tuple[Tensor, Tensor]:
    """int64 (C,) each: pixels in the intersection and in the union of a class's inner bands in truth and prediction.

    A band is what erosion by ``band`` of the diagonal (in whole pixels, at least 1) takes away: the class's pixels with
    another class, or the outside of the picture, at most so far in x and in y. Ignored pixels count in no band, and
    have no boundary in either map.

    Args:
        predicted, mask: integers (H, W), classes or ``IGNORE``.
    """
    known = mask != IGNORE
    reach = max(round(band * float(np.hypot(*mask.shape))), 1)
    shown = known & (predicted != IGNORE)
    truth, said = _band(mask, known, reach), _band(predicted, shown, reach)
    both = truth & said & (mask == predicted)
    sums = [
        torch.bincount(labels[where].long(), minlength=classes) for labels, where in ((mask, truth), (predicted, said))
    ]
    intersection = torch.bincount(mask[both].long(), minlength=classes)
    return intersection, sums[0] + sums[1] - intersection


def pixel_metrics(found: Sequence[dict[str, Any]], classes: Sequence[str]) -> PixelResult:
    """How right predictions are, over all pixels of a set.

    A class that is neither in the truth nor in the predictions has no part in the means and shows -1; one that is not
    in the truth has no accuracy.

    Args:
        found: what ``pixel_counts`` gives, of every picture.
        classes: names by label.

    Raises ValueError where there is no prediction or no labelled pixel, or another number of classes.
    """
    confusion = total_confusion(found, classes)
    intersection, union = (
        torch.stack([row[name] for row in found]).sum(0).numpy() for name in ("boundary_intersection", "boundary_union")
    )
    right, true, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    iou, boundary, accuracy = shares(right, true + called - right), shares(intersection, union), shares(right, true)
    numbers = {
        "miou": mean_known(iou),
        "boundary_iou": mean_known(boundary),
        "pixel_accuracy": float(right.sum() / confusion.sum()),
        "mean_accuracy": mean_known(accuracy),
    }
    rows = {
        name: PixelRow(float(iou[i]), float(boundary[i]), float(accuracy[i]), int(true[i]))
        for i, name in enumerate(classes)
    }
    return PixelResult(numbers, rows, confusion)


def total_confusion(found: Sequence[dict[str, Any]], classes: Sequence[str], name: str = "confusion") -> np.ndarray:
    """int64 (C, C), the sum over pictures. Raises ValueError as ``pixel_metrics`` does."""
    if not found:
        raise ValueError("there is no prediction to score")
    total = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for row in found:
        if row[name].shape != total.shape:
            raise ValueError(f"the model tells {len(row[name])} classes apart, the data have {len(classes)}")
        total += row[name]
    if not total.any():
        raise ValueError("no pixel of the set is labelled: there is nothing to score")
    return total.numpy()


def shares(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """float64, part / whole, -1 where there is no whole."""
    return np.where(whole > 0, part / np.maximum(whole, 1), -1.0)


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """(C,) IoU of each class, -1 of one that is neither there nor found, from pixels (C, C), rows the truth."""
    right = np.diag(confusion)
    return shares(right, confusion.sum(0) + confusion.sum(1) - right)


def mean_known(values: np.ndarray) -> float:
    """The mean of those that are not -1; -1 where all are."""
    known = values[values >= 0]
    return float(known.mean()) if len(known) else -1.0


def _of_one_size(pictures: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of pictures, those of one size together."""
    sizes = [tuple(picture.shape) for picture in pictures]
    for size in dict.fromkeys(sizes):
        yield [i for i, other in enumerate(sizes) if other == size]


def _counted(logits: Tensor, target: dict[str, Any], counts: Counts | None) -> dict[str, Any]:
    if "mask" not in target:
        raise ValueError(f"picture {target.get('key')}: its target has no mask, so nothing can be scored on it")
    try:
        return {**(counts or pixel_counts)(logits, target["mask"]), "key": target["key"]}
    except ValueError as error:
        raise ValueError(f"picture {target['key']}: {error}") from error


def _logits(model: nn.Module, pictures: Tensor) -> Tensor:
    output = model(pictures)
    logits = pixel_logits_in(output)
    if not isinstance(logits, Tensor) or logits.dim() != 4 or len(logits) != len(pictures):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"{type(model).__name__}: expected logits ({len(pictures)}, C, H, W) or a dict of them as 'out', got {got}"
        )
    return logits.float()


def pixel_logits_in(output: Any) -> Any:
    """What stands for the logits of every pixel in a model's output, which is these, or a mapping of them."""
    if not isinstance(output, Mapping):
        return output
    return next((output[name] for name in NAMES if name in output), None)


def _at_scale(pictures: Tensor, scale: float) -> Tensor:
    height, width = (max(round(scale * side), 1) for side in pictures.shape[-2:])
    if (height, width) == pictures.shape[-2:]:
        return pictures
    return F.interpolate(pictures, (height, width), mode="bilinear", align_corners=False, antialias=True)


def _resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def _band(labels: Tensor, known: Tensor, reach: int) -> Tensor:
    """Known pixels with another known label, or the outside, within ``reach`` in x and y: where the least and the
    greatest label around a pixel are not both its own."""
    labels = labels.to(torch.uint8)
    greatest, least = labels.where(known, 0), labels.where(known, IGNORE)
    for axis in (-1, -2):
        greatest = _around(greatest, reach, axis, torch.maximum, 0)
        least = _around(least, reach, axis, torch.minimum, IGNORE)
    band = (greatest != labels) | (least != labels)
    for rim in (band[:reach], band[-reach:], band[:, :reach], band[:, -reach:]):
        rim.fill_(True)
    return band & known


def _around(x: Tensor, reach: int, axis: int, extreme: Callable[[Tensor, Tensor], Tensor], neutral: int) -> Tensor:
    """The extreme of the 2 reach + 1 values around each, along an axis; windows are doubled until they are as wide."""
    out = F.pad(x, (reach, reach) if axis == -1 else (0, 0, reach, reach), value=neutral)
    wide = 1
    while wide < 2 * reach + 1:
        step = min(wide, 2 * reach + 1 - wide)
        length = out.shape[axis] - step
        out = extreme(out.narrow(axis, 0, length), out.narrow(axis, step, length))
        wide += step
    return out
