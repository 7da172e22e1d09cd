"""Edge distributions as somebody else would tell them: from another point, in other bins, or of the box's other frame.

They are gathered first and changed then, so that only what a loss reads is worked on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distillkit.boxes.distribution import resample
from distillkit.boxes.maps import Maps, Where
from distillkit.boxes.rotated_distribution import opposite_frames


@dataclass(frozen=True)
class MovedEdges(Maps):
    """Distances from a point, told from a point ``offset`` cells further right and down, in other bins.

    Build it with ``of``. ``levels`` are the maps as they were, ``shape`` is that of what is read, (4, L).

    Args:
        source: the distributions, ``shape == (4, K)``.
        support: (K,) the value of each of their bins.
        to: (L,) those of the bins that they are told in.
        offset: in strides, to the right and down.
        temperature: they are softened by it before they are told anew.
    """

    source: Maps | None = None
    support: Tensor | None = None
    to: Tensor | None = None
    offset: float = 0.0
    temperature: float = 1.0

    @staticmethod
    def of(source: Maps, support: Tensor, to: Tensor, offset: float = 0.0) -> MovedEdges:
        shape = (*source.shape[:-1], len(to))
        return MovedEdges(source.levels, shape, source.anchors, source, support, to, offset)

    def __post_init__(self) -> None:
        """The maps were checked as ``source``."""

    def tempered(self, temperature: float) -> MovedEdges:
        return replace(self, temperature=temperature)

    def at(self, where: Where) -> Tensor:
        assert self.source is not None
        return self._moved(self.source.at(where))

    def all(self) -> Tensor:
        assert self.source is not None
        return self._moved(self.source.all())

    def _moved(self, logits: Tensor) -> Tensor:
        assert self.to is not None
        if not self.offset:
            return resample(logits, self.support, self.to, temperature=self.temperature)
        parts = zip(logits.split(2, -2), (self.offset, -self.offset), strict=True)
        return torch.cat([resample(part, self.support, self.to, by, self.temperature) for part, by in parts], -2)


@dataclass(frozen=True)
class FacingEdges(Maps):
    """The teacher's distributions in that one of its boxes' two frames which is nearer to the student's.

    A box is the same after half a turn, and its left is then called right, its top bottom. Beside the seam of the angle
    a teacher at 89 degrees and a student at -89 mean nearly one box, and each other's opposite distances. The angle's
    own distribution is the same in both frames.

    angle: the student's, ``shape == (1, K)``.
    """

    angle: Maps | None = None

    def at(self, where: Where) -> Tensor:
        assert self.angle is not None
        rows = super().at(where)
        return rows if where.dense else _facing(rows, self.angle.at(where))  # of all they are turned already

    def all(self) -> Tensor:
        assert self.angle is not None
        return _facing(super().all(), self.angle.all())


def angles_of(edges: Maps) -> Maps:
    """The fifth of five distributions an anchor, without gradient."""
    levels = tuple(
        m.detach().unflatten(1, (anchors, *edges.shape))[:, :, 4:].flatten(1, 3)
        for m, anchors in zip(edges.levels, edges.per_cell, strict=True)
    )
    return Maps(levels, (1, edges.shape[-1]), edges.anchors)


def _facing(teacher: Tensor, angle: Tensor) -> Tensor:
    """Distributions (..., 5, K), and the student's angle (..., 1, K)."""
    opposite = opposite_frames(angle[..., 0, :], teacher[..., 4, :].detach())
    renamed = torch.cat([teacher[..., :4, :].roll(2, -2), teacher[..., 4:, :]], -2)
    return torch.where(opposite[..., None, None], renamed, teacher)
