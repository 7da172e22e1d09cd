"""Rotated boxes as five distributions, in the two forms of the detectors here. Boxes: cx, cy, w, h, angle in radians.

Around a point (rotated GFL): four distances to the edges in the box's own frame, whose x axis is turned by the angle,
and the angle, whose K bins stand evenly around the half circle after which a box is itself again. The last bin and the
first are neighbours.

Around an anchor (rotated RetinaNet, Rotated-LD): what moves, stretches and turns an upright anchor.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32

#: an angle's gradient grows as its bins' mean direction shrinks; below this length (0..1) it grows no further
SHORTEST = 0.1


def angle_bins(bins: int, device: torch.device | str = "cpu") -> Tensor:
    """(K,) the angle of every bin, radians: from -pi/2 on, pi/K apart."""
    return (torch.arange(bins, device=device, dtype=torch.float32) / bins - 0.5) * math.pi


def mean_angle(logits: Tensor) -> Tensor:
    """The mean direction of distributions over ``angle_bins``, by the doubled angle: half of atan2(E sin 2a, E cos 2a).

    Exact for two neighbouring bins whose shares are those of ``losses.focal.periodic_distribution_focal``. A fresh
    head's distribution is flat and its mean direction of no length, where the derivative of atan2 has no bound: the
    gradient is that of a direction no shorter than ``SHORTEST``.

    Args:
        logits: (..., K).

    Returns:
        (...,) radians in [-pi/2, pi/2].
    """
    sin, cos = mean_direction(logits)
    y, x = sin.detach(), cos.detach()
    slope = (x * sin - y * cos) / (x * x + y * y).clamp(min=SHORTEST**2) / 2
    return torch.atan2(y, x) / 2 + slope - slope.detach()


def mean_direction(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of twice the angle, averaged over distributions (..., K) on ``angle_bins``: (...,) each. Their
    vector is 1 long where the angle is certain, and 0 where all are as likely."""
    p = F.softmax(at_least_float32(logits), -1)
    doubled = 2 * angle_bins(p.shape[-1], p.device).to(p.dtype)
    return (p * doubled.sin()).sum(-1), (p * doubled.cos()).sum(-1)


def opposite_frames(student: Tensor, teacher: Tensor) -> Tensor:
    """Whether two distributions of an angle (..., K) are nearer across the seam at a quarter turn, so that
    their frames name opposite edges alike: bool (...,). False where the student says too little of the angle yet."""
    sin, cos = mean_direction(student)
    apart = mean_angle(teacher) - torch.atan2(sin, cos) / 2
    return (apart.abs() > math.pi / 2) & (sin**2 + cos**2 > SHORTEST**2)


def decode_turned(points: Tensor, distances: Tensor, angle: Tensor) -> Tensor:
    """Boxes from distances in their own frames, in one unit.

    Args:
        points: (..., 2).
        distances: (..., 4) to the left, top, right and bottom edge of the frame turned by the angle.
        angle: (...,) radians.

    Returns:
        (..., 5): w is left + right, h is top + bottom.
    """
    left, top, right, bottom = distances.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    along, across = (right - left) / 2, (bottom - top) / 2
    x = points[..., 0] + cos * along - sin * across
    y = points[..., 1] + sin * along + cos * across
    return torch.stack([x, y, left + right, top + bottom, angle], -1)


def encode_turned(points: Tensor, boxes: Tensor, limit: float | None = None) -> Tensor:
    """Distances from points to the edges of boxes (..., 5) in the boxes' frames, the inverse of ``decode_turned``.

    Args:
        points: (..., 2) in the unit of the boxes.
        limit: clamp to 0..limit.

    Returns:
        (..., 4) left, top, right, bottom; negative where the point is outside and there is no limit.
    """
    dx, dy = points[..., 0] - boxes[..., 0], points[..., 1] - boxes[..., 1]
    cos, sin = boxes[..., 4].cos(), boxes[..., 4].sin()
    along, across = cos * dx + sin * dy, cos * dy - sin * dx
    w, h = boxes[..., 2] / 2, boxes[..., 3] / 2
    distances = torch.stack([w + along, h + across, w - along, h - across], -1)
    return distances if limit is None else distances.clamp(0, limit)


def delta_bins(bins: int = 9) -> Tensor:
    """(5, K) the values of the bins of x, y, w, h (-2..2) and of the angle (-5..2 radians), as Rotated-LD has them."""
    shift = torch.linspace(-2, 2, bins)
    return torch.stack([shift, shift, shift, shift, torch.linspace(-5, 2, bins)])


def decode_deltas(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes from what is done to upright anchors: centre moved by shares of its sides, sides times exp, turned.

    Args:
        anchors: (..., 4) x1, y1, x2, y2.
        deltas: (..., 5) of x, y, w, h and the angle.

    Returns:
        (..., 5) in the unit of the anchors.
    """
    sides = anchors[..., 2:] - anchors[..., :2]
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    return torch.cat([centres + sides * deltas[..., :2], sides * deltas[..., 2:4].exp(), deltas[..., 4:]], -1)
