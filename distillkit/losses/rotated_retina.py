"""The task losses of rotated RetinaNet with a distribution head (Rotated-LD: Zheng et al., arXiv:2204.05957).

Focal loss for the classes (Lin et al., arXiv:1708.02002); for the boxes a distance of Gaussians, of the decoded box and
its object: GWD (Yang et al., arXiv:2101.11952) or KLD (Yang et al., arXiv:2106.01883). They do not care how an object's
angle is written: half a turn more, or a quarter with the sides swapped, is the same Gaussian.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from distillkit.boxes.anchors import inside
from distillkit.boxes.distribution import integral
from distillkit.boxes.maps import Maps, Where, where_of
from distillkit.boxes.max_iou import assign
from distillkit.boxes.overlap import pairwise_overlap, seen_as
from distillkit.boxes.precision import at_least_float32
from distillkit.boxes.rotated_distribution import decode_deltas
from distillkit.losses.gaussian import gwd_loss, kld_loss
from distillkit.losses.reduce import mean_over_ranks

GaussianLoss = Literal["gwd", "kld"]
#: each box loss and its published weight
GAUSSIAN = {"gwd": (gwd_loss, 5.0), "kld": (kld_loss, 1.0)}


@dataclass(frozen=True)
class RetinaTargets:
    """What every anchor of a batch shall say, in the order of ``Maps.all()``.

    Args:
        labels: (B, N) int64, C for background.
        boxes: (B, N, 5) its object; of no meaning for background.
        counted: (B, N) bool, False for anchors that take no part.
    """

    labels: Tensor
    boxes: Tensor
    counted: Tensor


@torch.no_grad()
def retina_targets(
    anchors: Tensor,
    classes: int,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
) -> RetinaTargets:
    """Assign by the overlap with the upright box around each object: positive from 0.5, background below 0.4.

    As released. By the overlap with the object itself, long objects that lie across would have no positives but their
    one best anchor, as no upright anchor overlaps them by half: 31 % of HIT-UAV's objects, here 21 %.

    Args:
        anchors: (N, 4).
        classes: C.
        boxes, labels, sizes: of every picture (k, 5), (k,), (height, width) before padding.
    """
    label_rows, box_rows, counted = [], [], []
    valid = [inside((anchors[:, :2] + anchors[:, 2:]) / 2, size) for size in sizes]
    for box, label, takes_part in zip(boxes, labels, valid, strict=True):
        index = assign(pairwise_overlap(seen_as(box, "enclosing"), anchors), takes_part)
        counted.append(index > -2)
        index = index.clamp(min=-1)  # what is no object's reads the row put behind the objects
        label_rows.append(torch.cat([label, label.new_full((1,), classes)])[index])
        box_rows.append(torch.cat([box, box.new_ones(1, 5)])[index])
    return RetinaTargets(torch.stack(label_rows), torch.stack(box_rows), torch.stack(counted))


def retina_losses(
    classes: Maps,
    edges: Maps,
    anchors: Tensor,
    target: RetinaTargets,
    support: Tensor,
    loss: GaussianLoss = "gwd",
    dense: bool | None = None,
    convention: Literal["default", "release"] = "default",
) -> dict[str, Tensor]:
    """Focal loss (alpha 0.25, gamma 2) and box loss of a batch, both divided by the number of positives.

    Each picture counts at least one positive; the number is the mean over ranks. The release divides KLD by the
    positives of each level of this process instead, and adds the levels up (``convention="release"``): there an object
    alone on its level counts as much as all of another level together, and the weight 1 means up to as many times more
    as there are levels.

    Args:
        classes: logits, (C,) an anchor.
        edges: logits of the distributions, (5, K) an anchor: x, y, w, h, angle.
        anchors: (N, 4) pixels.
        support: (5, K) values of the bins.
        loss: "gwd", weight 5, or "kld", weight 1.
        convention: of the box loss, as above; GWD is the same in both.
        dense: compute the box loss on all anchors with weight 0 outside the positives, which waits for no device; None:
            only where the maps are not on the CPU.

    Returns:
        ``loss_cls``, ``loss_bbox``: scalars, float32 or wider.
    """
    device = edges.levels[0].device
    dense = (device.type != "cpu" or torch.compiler.is_compiling()) if dense is None else dense
    positive = target.labels < classes.shape[0]
    where = Where(None) if dense else where_of(positive, classes.counts, classes.sizes)[0]
    rows = classes.positions(where)
    deltas = integral(edges.at(where), support)
    function, weight = GAUSSIAN[loss]
    distance = function(decode_deltas(anchors[rows % len(anchors)], deltas), target.boxes.flatten(0, 1)[rows])

    logits = at_least_float32(classes.all())
    wanted = torch.nn.functional.one_hot(target.labels, classes.shape[0] + 1)[..., :-1].to(logits.dtype)
    focal = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2).sum(-1)
    positives = mean_over_ranks(positive.sum(1).clamp(min=1).sum().to(logits.dtype))
    divisor = positives
    if convention == "release" and loss == "kld":
        level = torch.arange(len(classes.counts), device=device).repeat_interleave(
            torch.tensor(classes.counts, device=device)
        )
        divisor = torch.stack([part.sum() for part in positive.split(classes.counts, 1)])[level[rows % len(anchors)]]
    return {
        "loss_cls": (focal * target.counted).sum() / positives,
        "loss_bbox": weight * (distance * positive.flatten()[rows] / divisor.clamp(min=1)).sum(),
    }
