"""Boxes as four distances from a point, each distance a distribution over bins. Li et al., arXiv:2006.04388."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32


def integral(logits: Tensor, support: Tensor | None = None) -> Tensor:
    """Expected value of a distribution over bins.

    Args:
        logits: (..., K). No temperature: decoding always reads the distribution as it is.
        support: (K,) value of each bin, or (E, K), a row for each of the E edges; 0..K-1 unless given.

    Returns:
        (...,) in the support's unit (strides of the level).
    """
    p = F.softmax(at_least_float32(logits), -1)
    return (p * _support(support, p)).sum(-1)  # a matrix product would fall to half precision under autocast


def decode(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes from distances, in one unit: (..., 2), (..., 4) left, top, right, bottom -> (..., 4) x1, y1, x2, y2."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def encode(points: Tensor, boxes: Tensor, limit: float | None = None) -> Tensor:
    """Distances from a point to a box's edges, the inverse of ``decode``.

    Args:
        points: (..., 2).
        boxes: (..., 4) x1, y1, x2, y2 in the unit of the points.
        limit: clamp to 0..limit. Training on K bins uses K - 1.1, so that the bin to the right always exists.

    Returns:
        (..., 4) left, top, right, bottom; negative where the point is outside and there is no limit.
    """
    distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)
    return distances if limit is None else distances.clamp(0, limit)


def resample(
    logits: Tensor, support: Tensor | None, to: Tensor | None, offset: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """The same distribution over other bins, as another reference point would have said it.

    Each bin's mass moves to its value plus ``offset`` and is split linearly between the two bins around it there, which
    keeps the expected value; mass beyond the bins goes to the one at the end. Told in finer bins a distribution stays
    on those next to its own values; nothing is made up in between.

    Args:
        logits: (..., K).
        support: (K,) value of each bin, increasing; 0..K-1 unless given.
        to: (L,) the values of the new bins, increasing; those of ``support`` unless given.
        offset: in the support's unit.
        temperature: the distribution is ``softmax(logits / temperature)``. Softened first and moved then, as what a
            distiller compares is the softened one.

    Returns:
        (..., L) temperature * log-probabilities: logits to be read at that temperature.
    """
    p = F.softmax(at_least_float32(logits) / temperature, -1)
    values = _support(support, p)
    bins = values if to is None else to.to(p)
    moved = (values + offset).clamp(bins[0], bins[-1])
    right = torch.searchsorted(bins, moved).clamp(1, len(bins) - 1)
    to_right = (moved - bins[right - 1]) / (bins[right] - bins[right - 1])
    one_hot = torch.eye(len(bins), device=p.device, dtype=p.dtype)
    split = one_hot[right - 1] * (1 - to_right)[:, None] + one_hot[right] * to_right[:, None]
    with torch.autocast(p.device.type, enabled=False):
        return (p @ split).clamp(min=torch.finfo(p.dtype).tiny).log() * temperature


def _support(support: Tensor | None, like: Tensor) -> Tensor:
    bins = like.shape[-1]
    if support is None:
        return torch.arange(bins, device=like.device, dtype=like.dtype)
    if support.shape not in ((bins,), like.shape[-2:]):
        raise ValueError(
            f"the support has shape {tuple(support.shape)}, the distribution {bins} bins; give one value a bin"
        )
    return support.to(like)
