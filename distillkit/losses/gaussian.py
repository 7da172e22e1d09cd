"""Distances of rotated boxes seen as Gaussians: smooth at every angle, also where boxes do not overlap.

A box (cx, cy, w, h, angle) becomes the Gaussian around its centre whose axes are the box's: indifferent to half turns,
and to w and h swapped with a quarter turn. A square has no angle then, and no gradient on it.

All determinants and traces are written out for 2 x 2, as sums of terms that are never negative: equal boxes are 0 apart
exactly, not up to rounding, whose square root would be seen. A side below 0.001 pixels counts as 0.001: a box without
area has finite losses and gradients.
"""

import torch
from torch import Tensor

from distillkit.boxes.precision import at_least_float32

SHORTEST = 1e-3  # pixels; a shorter side counts as this


def gwd_loss(pred: Tensor, target: Tensor) -> Tensor:
    """``log(1 + d)``, d the normalised Wasserstein distance: Yang et al., arXiv:2101.11952, as Rotated-LD has it.

    ``d = W / (2 (|Sp| |St|)^(1/8))`` with ``W^2 = |mp - mt|^2 + tr Sp + tr St - 2 tr (Sp^(1/2) St Sp^(1/2))^(1/2)`` and
    ``S = R diag(w^2/4, h^2/4) R'``. The distance itself, not its square, and no ``1 - 1/(1 + d)`` around it.

    Args:
        pred, target: (M, 5) pixels and radians, any angle. Both have a gradient; 0 where they are equal.

    Returns:
        (M,) >= 0, float32 or wider.
    """
    apart, first, second, cos2, sin2 = _pair(pred, target)
    (a, b), (c, d) = first / 2, second / 2
    # sides in the same order: the target with its sides swapped is the target a quarter turn further
    swapped = (a - b) * (c - d) < 0
    c, d = torch.where(swapped, d, c), torch.where(swapped, c, d)
    cos2, sin2 = torch.where(swapped, sin2, cos2), torch.where(swapped, cos2, sin2)
    # the trace of (Sp^(1/2) St Sp^(1/2))^(1/2) at equal angles, at a quarter turn, and at this angle
    straight, across = a * c + b * d, a * d + b * c
    turned = _root(cos2 * straight.square() + sin2 * across.square())
    more = sin2 * (a - b) * (a + b) * (c - d) * (c + d) / (straight + turned)  # straight - turned
    shapes = (a - c).square() + (b - d).square() + 2 * more
    distance = _root(apart.square().sum(1) + shapes)
    return torch.log1p(distance / (2 * (a * b * c * d).sqrt().sqrt()))


def kld_loss(pred: Tensor, target: Tensor) -> Tensor:
    """``1 - 1/(1 + log(1 + D))``, D twice the divergence KL(pred || target): Yang et al., arXiv:2106.01883.

    ``D = (mp - mt)' St^-1 (mp - mt) + tr (St^-1 Sp) + ln(|St| / |Sp|) - 2`` with ``S = R diag(w^2/4, h^2/4) R'``, taken
    for 1e-6 where it is less, as Rotated-LD does: equal boxes have a loss of 1e-6 and no gradient.

    Args:
        pred, target: (M, 5) pixels and radians, any angle.

    Returns:
        (M,) in 0..1, float32 or wider.
    """
    apart, first, second, cos2, sin2 = _pair(pred, target)
    (a, b), (c, d) = first / 2, second / 2
    x, y = _turned(apart, target)
    centres = (x / c).square() + (y / d).square()
    shapes = cos2 * ((a / c).square() + (b / d).square()) + sin2 * ((a / d).square() + (b / c).square())
    divergence = centres + shapes + 2 * (c.log() + d.log() - a.log() - b.log()) - 2
    return 1 - 1 / (1 + torch.log1p(divergence.clamp(min=1e-6)))


def probiou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Hellinger distance, 1 - ProbIoU: Llerena et al., arXiv:2106.06072, their L1.

    ``(1 - exp(-B))^(1/2)`` with the Bhattacharyya distance
    ``B = (mp - mt)' (Sp + St)^-1 (mp - mt) / 4 + ln(|(Sp + St) / 2| / (|Sp| |St|)^(1/2)) / 2`` and
    ``S = R diag(w^2/12, h^2/12) R'``, the variances of a box filled evenly.

    Args:
        pred, target: (M, 5) pixels and radians, any angle. Both have a gradient; 0 where they are equal, next to 0
            where they are far apart.

    Returns:
        (M,) in 0..1, float32 or wider.
    """
    apart, first, second, cos2, sin2 = _pair(pred, target)
    (a, b), (c, d) = first, second
    product = 4 * a * b * c * d
    # |Sp + St| = product + excess, up to 12^2
    excess = (a * b - c * d).square() + cos2 * (a * d - b * c).square() + sin2 * (a * c - b * d).square()
    (x, y), (u, v) = _turned(apart, pred), _turned(apart, target)
    spread = (b * x).square() + (a * y).square() + (d * u).square() + (c * v).square()
    bhattacharyya = 3 * spread / (product + excess) + torch.log1p(excess / product) / 2
    return _root(-torch.expm1(-bhattacharyya))


def _pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centres apart (M, 2), sides of each (2, M), squared cosine and sine of the angle between them (M,).

    Raises:
        ValueError: other shapes.
    """
    if pred.shape != target.shape or pred.dim() != 2 or pred.shape[1] != 5:
        raise ValueError(f"expected two times (M, 5), got {tuple(pred.shape)} and {tuple(target.shape)}")
    pred, target = at_least_float32(pred), at_least_float32(target)
    angle = pred[:, 4] - target[:, 4]
    sides, others = (boxes[:, 2:4].clamp(min=SHORTEST).mT for boxes in (pred, target))
    return pred[:, :2] - target[:, :2], sides, others, angle.cos().square(), angle.sin().square()


def _turned(apart: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(M, 2) along the width and the height of (M, 5) boxes: (M,), (M,)."""
    angle = at_least_float32(boxes[:, 4])
    cos, sin = angle.cos(), angle.sin()
    return apart[:, 0] * cos + apart[:, 1] * sin, apart[:, 1] * cos - apart[:, 0] * sin


def _root(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, not infinite."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)
