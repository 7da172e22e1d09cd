"""The task losses of a dense head with box distributions. Li et al., Generalized Focal Loss, arXiv:2006.04388."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distillkit.boxes.anchors import grid_anchors, grid_strides
from distillkit.boxes.assign import match
from distillkit.boxes.distribution import decode, encode, integral
from distillkit.boxes.iou import aligned_iou
from distillkit.boxes.maps import Maps, Where, where_of
from distillkit.boxes.precision import at_least_float32
from distillkit.losses.focal import distribution_focal, quality_focal
from distillkit.losses.iou import giou_loss
from distillkit.losses.reduce import mean_over_ranks


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
) -> dict[str, Tensor]:
    """Quality focal, GIoU and distribution focal loss of a batch, over all levels at once, positives chosen by ATSS.

    The class loss is divided by the number of positives (each picture counts at least one), the box losses, which weigh
    a positive by its highest class probability, by the sum of these weights; both are means over the ranks. So no loss
    depends on the size of the batch or the number of ranks. A batch without positives gives box losses of zero that can
    still be differentiated.

    Args:
        classes: logits, (C,) an anchor.
        edges: logits of the distributions, (4, K) an anchor: left, top, right, bottom, bins 0..K-1 in strides.
        boxes: of every picture (k, 4) pixels, k >= 0.
        labels: of every picture (k,) int64, 0..C-1.
        sizes: of every picture (height, width) before padding; anchors in the padding take no part.
        strides: pixels a cell of each level.
        centre: where in its cell a point stands, in cells.
        octave: side of an anchor in strides.
        scores: class probabilities, where they are not ``sigmoid(classes)`` (GFLv2); the class loss is then on them.
        weights: of the three losses.
        dense: compute the box losses on all anchors with weight 0 outside the positives, which waits for no device;
            None: only where the maps are not on the CPU.

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
    giou, dfl, quality = _box_losses(edges.at(where), anchors[cell], stride[cell], target.boxes[rows])

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
        "loss_bbox": weights[1] * (weight * giou).sum() / total,
        "loss_dfl": weights[2] * (weight * dfl).sum() / total,
    }


def _box_losses(logits: Tensor, anchors: Tensor, stride: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GIoU loss, distribution focal loss and, detached, the IoU of every predicted box: (M,) each.

    logits: (M, 4, K). anchors, boxes: (M, 4) pixels, boxes being the objects' own. stride: (M,).
    """
    points = (anchors[:, :2] + anchors[:, 2:]) / 2 / stride[:, None]
    goal = boxes / stride[:, None]
    predicted = decode(points, integral(logits))
    # the farthest target lies before the last bin, so that every target has a bin on either side
    distances = encode(points, goal, logits.shape[-1] - 1.1)
    dfl = distribution_focal(logits, distances).mean(-1)
    return giou_loss(predicted, goal), dfl, aligned_iou(predicted.detach(), goal)


@dataclass(frozen=True)
class _Targets:
    """What every anchor of a batch shall say, (B*N,) in the order of ``Maps.all()``.

    labels: C for background. boxes: (B*N, 4), zeros for background. positive, counted (in the picture): bool, positive
    (B, N). positives: scalar, how many there are, each picture counting at least one.
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
        found = match(anchors, classes.counts, box, size)
        index = found.assignment.gt_index
        # background is -1: it reads the row put behind the objects
        label_rows.append(torch.cat([label, label.new_full((1,), classes.shape[0])])[index])
        box_rows.append(torch.cat([box, box.new_zeros(1, 4)])[index])
        positive.append(index >= 0)
        counted.append(found.valid)
    chosen = torch.stack(positive)
    number = chosen.sum(1).clamp(min=1).sum().to(anchors.dtype)
    return _Targets(torch.cat(label_rows), torch.cat(box_rows), chosen, torch.cat(counted), number)


def _check(classes: Maps, edges: Maps, boxes: Sequence[Tensor]) -> None:
    if classes.anchors != 1 or len(edges.shape) != 2 or edges.shape[0] != 4:
        raise ValueError(
            f"expected one anchor a cell and 4 edges of K bins, got {classes.anchors} anchor(s) and edges {edges.shape}"
        )
    if classes.sizes != edges.sizes:
        raise ValueError(
            f"class maps are {classes.sizes} large, edge maps {edges.sizes}; they must agree level by level"
        )
    if classes.images != len(boxes):
        raise ValueError(f"the head saw {classes.images} pictures, the targets describe {len(boxes)}")
