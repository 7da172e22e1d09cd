"""The task losses of a dense head with box distributions. Li et al., Generalized Focal Loss, arXiv:2006.04388."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distillkit.boxes.anchors import grid_anchors, grid_strides, inside
from distillkit.boxes.assign import atss
from distillkit.boxes.distribution import decode, encode, integral
from distillkit.boxes.iou import aligned_iou
from distillkit.boxes.maps import Maps, Where, where_of
from distillkit.boxes.precision import at_least_float32
from distillkit.losses.focal import distribution_focal, quality_focal
from distillkit.losses.iou import giou_loss
from distillkit.losses.reduce import mean_over_ranks

#: logits (M, E, K), points (M, 2) and boxes (M, 4 or 5), both in strides -> box loss, distribution focal loss and,
#: without gradient, the quality of the predicted boxes in 0..1: (M,) each
BoxLosses = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def upright_losses(logits: Tensor, points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``BoxLosses`` of 4 edges: GIoU loss, distribution focal loss, IoU. boxes: (M, 4)."""
    predicted = decode(points, integral(logits))
    # the farthest target lies before the last bin, so that every target has a bin on either side
    distances = encode(points, boxes, logits.shape[-1] - 1.1)
    dfl = distribution_focal(logits, distances).mean(-1)
    return giou_loss(predicted, boxes), dfl, aligned_iou(predicted.detach(), boxes)


def gfl_losses(
    classes: Maps,
    edges: Maps,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    strides: Sequence[int],
    centre: float = 0.0,
    octave: float = 8.0,
    scores: Maps | None = None,
    weights: tuple[float, float, float] = (1.0, 2.0, 0.25),
    dense: bool | None = None,
    box_losses: BoxLosses = upright_losses,
) -> dict[str, Tensor]:
    """Quality focal, box and distribution focal loss of a batch, over all levels at once, positives chosen by ATSS.

    The class loss is divided by the number of positives (each picture counts at least one), the box losses, which weigh
    a positive by its highest class probability, by the sum of these weights; both are means over the ranks. So no loss
    depends on the size of the batch or the number of ranks. A batch without positives gives box losses of zero that can
    still be differentiated.

    Args:
        classes: logits, (C,) an anchor.
        edges: logits of the distributions, (4, K) an anchor: left, top, right, bottom, bins 0..K-1 in strides; (5, K)
            for rotated boxes, see ``losses.rotated_gfl``.
        boxes: of every picture (k, 4) pixels, or rotated (k, 5), k >= 0.
        labels: of every picture (k,) int64, 0..C-1.
        sizes: of every picture (height, width) before padding; anchors in the padding take no part.
        strides: pixels a cell of each level.
        centre: where in its cell a point stands, in cells.
        octave: side of an anchor in strides.
        scores: class probabilities, where they are not ``sigmoid(classes)`` (GFLv2); the class loss is then on them.
        weights: of the three losses.
        dense: compute the box losses on all anchors with weight 0 outside the positives, which waits for no device;
            None: only where the maps are not on the CPU.
        box_losses: what of the distributions and boxes of positives; ``upright_losses``: GIoU.

    Returns:
        ``loss_cls``, ``loss_bbox``, ``loss_dfl``: scalars, float32 or wider.

    Raises:
        ValueError: maps that do not describe as many pictures as the targets, or several anchors a cell.
    """
    _check(classes, edges, boxes)
    device = edges.levels[0].device
    dense = (device.type != "cpu" or torch.compiler.is_compiling()) if dense is None else dense
    anchors = grid_anchors(classes.sizes, strides, centre, octave, device)
    stride = grid_strides(classes.sizes, strides, device)
    target = _targets(anchors, classes, boxes, labels, sizes)

    where = Where(None) if dense else where_of(target.positive, classes.counts, classes.sizes)[0]
    rows = classes.positions(where)
    cell = rows % len(anchors)
    points = (anchors[:, :2] + anchors[:, 2:])[cell] / 2 / stride[cell, None]
    goal = in_strides(target.boxes[rows], stride[cell, None])
    box_loss, dfl, quality = box_losses(edges.at(where), points, goal)

    said = (classes if scores is None else scores).all().flatten(0, 1)
    best = at_least_float32(said.detach()[rows].amax(-1))
    weight = target.positive.flatten()[rows] * (best.sigmoid() if scores is None else best)
    wanted = quality.new_zeros(len(target.labels)).index_put((rows,), quality)
    focal = quality_focal(said, target.labels, wanted, from_probabilities=scores is not None)

    positives = mean_over_ranks(target.positives)
    # clamped rather than shifted by an epsilon, which would show in small batches
    total = mean_over_ranks(weight.sum()).clamp(min=1e-6)
    return {
        "loss_cls": weights[0] * (focal * target.counted).sum() / positives,
        "loss_bbox": weights[1] * (weight * box_loss).sum() / total,
        "loss_dfl": weights[2] * (weight * dfl).sum() / total,
    }


def in_strides(boxes: Tensor, stride: Tensor) -> Tensor:
    """Boxes (M, 4) or (M, 5) in pixels -> in strides (M, 1); angles stay."""
    return torch.cat([boxes[:, :4] / stride, boxes[:, 4:]], 1)


@dataclass(frozen=True)
class _Targets:
    """What every anchor of a batch shall say, (B*N,) in the order of ``Maps.all()``.

    labels: C for background. boxes: (B*N, 4 or 5), of no meaning for background. positive, counted (in the picture):
    bool, positive (B, N). positives: scalar, how many there are, each picture counting at least one.
    """

    labels: Tensor
    boxes: Tensor
    positive: Tensor
    counted: Tensor
    positives: Tensor


def _targets(
    anchors: Tensor,
    classes: Maps,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
) -> _Targets:
    label_rows, box_rows, positive, counted = [], [], [], []
    for box, label, size in zip(boxes, labels, sizes, strict=True):
        valid = inside((anchors[:, :2] + anchors[:, 2:]) / 2, size)
        index = atss(anchors, classes.counts, box, valid=valid).gt_index
        # background is -1: it reads the row put behind the objects
        label_rows.append(torch.cat([label, label.new_full((1,), classes.shape[0])])[index])
        box_rows.append(torch.cat([box, box.new_ones(1, box.shape[1])])[index])
        positive.append(index >= 0)
        counted.append(valid)
    chosen = torch.stack(positive)
    number = chosen.sum(1).clamp(min=1).sum().to(anchors.dtype)
    return _Targets(torch.cat(label_rows), torch.cat(box_rows), chosen, torch.cat(counted), number)


def _check(classes: Maps, edges: Maps, boxes: Sequence[Tensor]) -> None:
    wanted = boxes[0].shape[1] if boxes else 4
    if classes.anchors != 1 or len(edges.shape) != 2 or edges.shape[0] != wanted:
        raise ValueError(
            f"expected one anchor a cell and {wanted} edges of K bins, got {classes.anchors} anchor(s) and edges "
            f"{edges.shape}"
        )
    if classes.sizes != edges.sizes:
        raise ValueError(
            f"class maps are {classes.sizes} large, edge maps {edges.sizes}; they must agree level by level"
        )
    if classes.images != len(boxes):
        raise ValueError(f"the head saw {classes.images} pictures, the targets describe {len(boxes)}")
