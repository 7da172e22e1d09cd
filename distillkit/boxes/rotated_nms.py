"""Greedy non-maximum suppression of rotated boxes, exact, in blocks of the best boxes left."""

import torch
from torch import Tensor

from distillkit.boxes.rotated_iou import columns_of, near, overlap_at

BLOCK = 256


@torch.no_grad()
def rotated_nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float, most: int | None = None) -> Tensor:
    """From the best score down, keep every box that overlaps none kept before it by more than ``iou``.

    For the levels of a pyramid, or for the tiles of one large picture, join their boxes, in pixels of that picture, and
    call this once. Runs on the CPU, and returns to the device of the boxes. Time grows with the boxes kept times all
    boxes (about 1 ns each) and with the overlapping pairs among those.

    Args:
        boxes: (N, 5) pixels and radians, any angle, any size of coordinates.
        scores: (N,); of equal scores the earlier box comes first.
        labels: (N,) integers: boxes of different labels leave each other alone. None: all are of one class.
        iou: largest overlap of two boxes kept, 0..1.
        most: how many boxes to keep at most, the best ones.

    Returns:
        (K,) int64 indices of the boxes kept, best first.

    Raises:
        ValueError: shapes that do not fit, ``iou`` out of range.
    """
    _check(boxes, scores, labels, iou)
    order = scores.cpu().argsort(descending=True, stable=True)
    columns = columns_of(boxes.cpu())[:, order]
    kinds = (scores.new_zeros(len(scores)) if labels is None else labels).cpu()[order]
    most = len(boxes) if most is None else most
    kept, found = [order[:0]], 0
    while len(order) and found < most:
        best = _resolve(columns[:, :BLOCK], kinds[:BLOCK], iou)
        kept.append(order[:BLOCK][best])
        found += len(best)
        rest = BLOCK + _untouched(columns[:, best], columns[:, BLOCK:], kinds[best], kinds[BLOCK:], iou)
        order, columns, kinds = order[rest], columns[:, rest], kinds[rest]
    return torch.cat(kept)[:most].to(boxes.device)


def _resolve(columns: Tensor, kinds: Tensor, iou: float) -> Tensor:
    """Which of a few boxes, best first, are kept: (6, n), (n,) -> (k,) indices."""
    hides = torch.zeros(len(kinds), len(kinds), dtype=torch.bool)
    for _, i, j in near(columns, columns, (kinds, kinds)):
        i, j = i[i < j], j[i < j]
        hides[i, j] = overlap_at(columns, columns, i, j) > iou
    kept = torch.ones(len(kinds), dtype=torch.bool)
    for row in hides.any(1).nonzero()[:, 0].tolist():
        if kept[row]:
            kept &= ~hides[row]
    return kept.nonzero()[:, 0]


def _untouched(kept: Tensor, others: Tensor, kept_kinds: Tensor, kinds: Tensor, iou: float) -> Tensor:
    """Which boxes no kept one hides: (6, k), (6, n), (k,), (n,) -> (r,) indices."""
    hidden = torch.zeros(len(kinds), dtype=torch.bool)
    for _, i, j in near(kept, others, (kept_kinds, kinds)):
        hidden[j[overlap_at(kept, others, i, j) > iou]] = True
    return (~hidden).nonzero()[:, 0]


def _check(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(f"expected rotated boxes (N, 5) as cx, cy, w, h, angle, got {tuple(boxes.shape)}")
    for name, values in (("scores", scores), ("labels", labels)):
        if values is not None and values.shape != boxes.shape[:1]:
            raise ValueError(f"expected one of {name} a box, ({len(boxes)},), got {tuple(values.shape)}")
    if not 0 <= iou <= 1:
        raise ValueError(f"iou must be in 0..1, got {iou}")
