"""Boxes as DETR has them, and their edges as distributions around a reference box (D-FINE, arXiv:2410.13842)."""

from __future__ import annotations

import torch
from torch import Tensor

from distillkit.boxes.distribution import integral


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) cx, cy, w, h -> (..., 4) x1, y1, x2, y2."""
    centre, side = boxes.split(2, -1)
    return torch.cat([centre - side / 2, centre + side / 2], -1)


def outwards(offsets: Tensor) -> Tensor:
    """(..., 4) offsets of left, top, right and bottom, to the right and down <-> away from the box."""
    left_top, right_bottom = offsets.split(2, -1)
    return torch.cat([-left_top, right_bottom], -1)


def decode_around(reference: Tensor, edges: Tensor, support: Tensor) -> Tensor:
    """Boxes (..., 4) x1, y1, x2, y2 whose edges stand outside of those of a reference box by their expected values.

    Args:
        reference: (..., 4) cx, cy, w, h.
        edges: (..., 4, K) logits: left, top, right, bottom.
        support: (K,) what each bin means, in sides of the reference box (widths for left and right, heights else).
    """
    side = reference[..., 2:].tile(2)
    return corners(reference) + outwards(integral(edges, support) * side)


def moved_around(
    mass: Tensor, support: Tensor, reference: Tensor, to_support: Tensor, to: Tensor
) -> tuple[Tensor, Tensor]:
    """The same places of the edges, as distributions around another reference box.

    Each bin's mass moves to where its place lies from the other box, and is split linearly between the two bins around
    it there, which keeps the expected place; what falls outside of the other's support goes to its end bin.

    Args:
        mass: (..., 4, K) probabilities. support: (K,). reference: (..., 4). As in ``decode_around``.
        to_support, to: the same of the other box, L bins.

    Returns:
        (..., 4, L) probabilities, and (..., 4) bool: whether the expected place lies within the other's support.
    """
    outside = outwards(corners(reference) - corners(to))
    side, to_side = reference[..., 2:].tile(2), to[..., 2:].tile(2).clamp(min=1e-6)
    values = (outside[..., None] + side[..., None] * support) / to_side[..., None]
    expected = (mass * values).sum(-1)
    within = (expected >= to_support[0]) & (expected <= to_support[-1])
    values = values.clamp(to_support[0], to_support[-1]).contiguous()
    right = torch.searchsorted(to_support, values).clamp(1, len(to_support) - 1)
    share = (values - to_support[right - 1]) / (to_support[right] - to_support[right - 1])
    moved = mass.new_zeros(*mass.shape[:-1], len(to_support))
    return moved.scatter_add(-1, right - 1, mass * (1 - share)).scatter_add(-1, right, mass * share), within
