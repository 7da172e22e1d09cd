"""What ``gfl_losses`` sums up for rotated boxes: four distances in the box's own frame and the angle, as distributions.

A box is the same after half a turn, and its distances are then called by the opposite names: left is right, top is
bottom. No way of naming them is without a seam. Here the seam is where the head itself has it: of the two frames of an
object the distances are measured in the one nearer to the angle that the head predicts. So a head that says 89 degrees
where the truth is -89 is 2 degrees off, and its distances are right as they stand. A box whose sides are swapped and
which is turned by a quarter is the same box too: the longer side is the width.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from distillkit.boxes.distribution import integral
from distillkit.boxes.rotated import normalize
from distillkit.boxes.rotated_distribution import decode_turned, encode_turned, mean_angle
from distillkit.boxes.rotated_iou import aligned_rotated_iou
from distillkit.losses.focal import distribution_focal, periodic_distribution_focal
from distillkit.losses.gaussian import gwd_loss, kld_loss, probiou_loss

RotatedLoss = Literal["iou", "gwd", "kld", "probiou"]
GAUSSIAN = {"gwd": gwd_loss, "kld": kld_loss, "probiou": probiou_loss}


def rotated_losses(
    logits: Tensor, points: Tensor, boxes: Tensor, loss: RotatedLoss = "iou"
) -> tuple[Tensor, Tensor, Tensor]:
    """Box loss, distribution focal loss and quality (rotated IoU, no gradient): ``BoxLosses`` of 4 distances and angle.

    Args:
        logits: (M, 5, K): distances left, top, right, bottom, bins 0..K-1; angle, K bins around half a turn.
        points: (M, 2) in strides.
        boxes: (M, 5) in strides, any angle.
        loss: "iou": 1 - rotated IoU; or a distance of Gaussians, see ``losses.gaussian``.

    Returns:
        (M,) each; the distribution focal loss is the mean over the five.
    """
    distances, angle = integral(logits[:, :4]), mean_angle(logits[:, 4])
    predicted = decode_turned(points, distances, angle)
    goal = normalize(boxes, "le90")
    half_turns = ((angle.detach() - goal[:, 4]) / math.pi).round()
    near = torch.cat([goal[:, :4], (goal[:, 4] + half_turns * math.pi)[:, None]], 1)

    bins = logits.shape[-1]
    in_bins = (goal[:, 4] / math.pi + 0.5) * bins
    dfl = torch.cat(
        [
            distribution_focal(logits[:, :4], encode_turned(points, near, bins - 1.1)),
            periodic_distribution_focal(logits[:, 4], in_bins)[:, None],
        ],
        1,
    ).mean(1)
    if loss == "iou":
        iou = aligned_rotated_iou(predicted, goal)
        return 1 - iou, dfl, iou.detach()
    return GAUSSIAN[loss](predicted, goal), dfl, aligned_rotated_iou(predicted.detach(), goal)
