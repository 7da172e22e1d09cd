"""Adaptive training sample selection. Zhang et al., arXiv:1912.02424."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distillkit.boxes.anchors import inside
from distillkit.boxes.iou import centre_distance, pairwise_iou
from distillkit.boxes.overlap import candidate_overlap, contains, hull, pairwise_overlap

#: a positive's centre is inside its object by more than so many pixels on each side
MARGIN = 0.01


@dataclass(frozen=True)
class Assignment:
    """Which object every anchor of one picture answers for.

    Args:
        gt_index: (N,) int64, -1 for background.
        iou: (N,) overlap with that object, 0 for background.
        threshold: (k,) the overlap from which on an anchor was positive; infinite where no anchor could be.
    """

    gt_index: Tensor
    iou: Tensor
    threshold: Tensor


@dataclass(frozen=True)
class Matched:
    """One picture's anchors and objects.

    Args:
        anchors: (N, 4).
        boxes: (k, 4) the objects, or (k, 5) rotated ones.
        valid: (N,) bool, the anchor's centre is in the picture.
        iou: (k, N) overlap of every object with every anchor.
        assignment: what ATSS makes of them.
    """

    anchors: Tensor
    boxes: Tensor
    valid: Tensor
    iou: Tensor
    assignment: Assignment

    def only(self, keep: Sequence[int], counts: Sequence[int]) -> "Matched":
        """The anchors of these levels, of which each has so many (``counts``), assigned as among all."""

        def kept(rows: Tensor) -> Tensor:
            levels = rows.split(list(counts), -1)
            return torch.cat([levels[i] for i in keep], -1)

        a = self.assignment
        assignment = Assignment(kept(a.gt_index), kept(a.iou), a.threshold)
        return Matched(kept(self.anchors.T).T, self.boxes, kept(self.valid), kept(self.iou), assignment)


@torch.no_grad()
def match(anchors: Tensor, counts: Sequence[int], gt: Tensor, size: tuple[int, int], topk: int = 9) -> Matched:
    """Assign the objects of one picture, (k, 4) or rotated (k, 5), to its anchors (N, 4).

    Args:
        size: (height, width) without padding; anchors centred in the padding take no part.

    Other arguments as in ``atss``.
    """
    valid = inside((anchors[:, :2] + anchors[:, 2:]) / 2, size)
    iou = pairwise_overlap(gt, anchors)
    return Matched(anchors, gt, valid, iou, atss(anchors, counts, gt, topk, valid, iou))


@torch.no_grad()
def atss(
    anchors: Tensor,
    counts: Sequence[int],
    gt: Tensor,
    topk: int = 9,
    valid: Tensor | None = None,
    iou: Tensor | None = None,
) -> Assignment:
    """Assign objects to anchors. Works with masks alone: no wait for the device.

    Of every level the ``topk`` anchors whose centres are nearest to an object's are its candidates. The mean plus the
    (unbiased) standard deviation of their overlaps is its threshold. Candidates that reach it and whose centre is
    inside the object are positive; an anchor wanted by several objects goes to the one it overlaps most.

    Args:
        anchors: (N, 4), level after level.
        counts: anchors of each level.
        gt: (k, 4) or rotated (k, 5), whose overlap and inside are those of the turned box; k = 0 makes everything
            background.
        topk: candidates a level, >= 1.
        valid: (N,) bool, anchors that take part; all unless given.
        iou: (k, N) overlap of every object with every anchor, where it is known already.
    """
    if len(gt) == 0:
        return Assignment(
            torch.full(anchors.shape[:1], -1, device=anchors.device), anchors.new_zeros(len(anchors)), gt.new_zeros(0)
        )
    nearest = _nearest(centre_distance(hull(gt)[:, None], anchors), counts, topk, valid)
    if iou is not None:
        overlap = iou.gather(1, nearest)
    elif gt.shape[1] == 4:
        overlap = pairwise_iou(gt, anchors).gather(1, nearest)
    else:
        overlap = candidate_overlap(gt, anchors[nearest])
    takes_part = torch.ones_like(overlap, dtype=torch.bool) if valid is None else valid[nearest]
    threshold = _mean_plus_deviation(overlap, takes_part)
    centres = (anchors[:, :2] + anchors[:, 2:])[nearest] / 2
    positive = takes_part & (overlap >= threshold[:, None]) & contains(gt[:, None], centres, MARGIN)
    wanted = overlap.new_zeros(len(gt), len(anchors)).scatter(1, nearest, torch.where(positive, overlap, 0))
    best, index = wanted.max(0)
    return Assignment(torch.where(best > 0, index, -1), best, threshold)


def _nearest(distance: Tensor, counts: Sequence[int], topk: int, valid: Tensor | None) -> Tensor:
    """(k, N) distances -> (k, M) indices of the ``topk`` nearest anchors of each level."""
    if valid is not None:
        distance = distance.masked_fill(~valid, torch.inf)
    start, found = 0, []
    for level in distance.split(list(counts), 1):
        found.append(level.topk(min(topk, level.shape[1]), 1, largest=False).indices + start)
        start += level.shape[1]
    return torch.cat(found, 1)


def _mean_plus_deviation(x: Tensor, mask: Tensor) -> Tensor:
    """Of every row's masked entries; infinite for rows with fewer than two, which have no deviation."""
    n = mask.sum(1)
    mean = (x * mask).sum(1) / n.clamp(min=1)
    variance = ((x - mean[:, None]).square() * mask).sum(1) / (n - 1).clamp(min=1)
    return torch.where(n > 1, mean + variance.sqrt(), torch.inf)
