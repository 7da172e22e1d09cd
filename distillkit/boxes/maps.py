"""Dense head outputs as the detector made them, one map per pyramid level, and the gathering of single anchors.

A detector's head writes maps of shape (B, A*C, H, W): A anchors a cell, C numbers an anchor (channel ``a*C + c``).
Permuting and joining all of them, to read the few per cent that a loss needs, is most of what a dense loss costs.
Here the anchors are gathered first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Where:
    """Which anchors of a batch.

    Args:
        index: one triple ``(image, anchor, cell)`` of equally long int64 tensors per level (``cell = y*W + x``), or
            None for every anchor of every image (the path without host sync, where a weight of 0 leaves one out).
            No anchor may stand there twice: gradients are written, not added up.
    """

    index: tuple[tuple[Tensor, Tensor, Tensor], ...] | None

    @property
    def dense(self) -> bool:
        return self.index is None


@dataclass(frozen=True)
class Maps:
    """One tensor per level, (B, A*prod(shape), H, W).

    Args:
        levels: the maps, finest level first, on any device, any float dtype.
        shape: what one anchor holds: ``(C,)`` class logits or ``(E, K)`` logits of E edges of K bins.
        anchors: A, anchors per cell; one number a level where they differ (SSD).
    """

    levels: tuple[Tensor, ...]
    shape: tuple[int, ...]
    anchors: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for i, (m, anchors) in enumerate(zip(self.levels, self.per_cell, strict=True)):
            want = anchors * prod(self.shape)
            if m.dim() != 4 or m.shape[1] != want:
                raise ValueError(
                    f"level {i}: expected (B, {want}, H, W) for {anchors} anchor(s) of {self.shape}, "
                    f"got {tuple(m.shape)}"
                )

    @property
    def per_cell(self) -> tuple[int, ...]:
        """Anchors a cell of each level."""
        return (self.anchors,) * len(self.levels) if isinstance(self.anchors, int) else self.anchors

    def only(self, keep: Sequence[int]) -> "Maps":
        """The levels of these numbers."""
        anchors = self.anchors if isinstance(self.anchors, int) else tuple(self.anchors[i] for i in keep)
        return Maps(tuple(self.levels[i] for i in keep), self.shape, anchors)

    def tempered(self, temperature: float) -> "Maps":
        """The same, read as logits at this temperature; of distributions that are changed on the way the softened ones
        are."""
        return self

    @property
    def images(self) -> int:
        return self.levels[0].shape[0]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of each level."""
        return tuple((m.shape[-2], m.shape[-1]) for m in self.levels)

    @property
    def counts(self) -> tuple[int, ...]:
        """Anchors of one image at each level: H*W*A."""
        return tuple(h * w * anchors for (h, w), anchors in zip(self.sizes, self.per_cell, strict=True))

    def at(self, where: Where) -> Tensor:
        """The chosen anchors, levels in order: (M, *shape); all, image by image, if ``where.dense``: (B*N, *shape)."""
        if where.index is None:
            return self.all().flatten(0, 1)
        rows = [
            _Gather.apply(m.unflatten(1, (anchors, -1)).flatten(3), *index)
            for m, anchors, index in zip(self.levels, self.per_cell, where.index, strict=True)
        ]
        return torch.cat(rows).view(-1, *self.shape)

    def positions(self, where: Where) -> Tensor:
        """The rows of ``all().flatten(0, 1)`` that ``at(where)`` holds: (M,) int64.

        So anything known of every anchor, ``q`` (B, N), is read in the same order with ``q.flatten()[positions]``.
        """
        if where.index is None:
            return torch.arange(self.images * sum(self.counts), device=self.levels[0].device)
        rows, start = [], 0
        for (image, anchor, cell), count, anchors in zip(where.index, self.counts, self.per_cell, strict=True):
            rows.append(image * sum(self.counts) + start + cell * anchors + anchor)
            start += count
        return torch.cat(rows)

    def largest(self) -> Tensor:
        """The largest number of every anchor: (B*N,), in the order of ``all()`` but without its copy of the maps."""
        rows = [
            m.unflatten(1, (anchors, -1)).flatten(3).amax(2).transpose(1, 2).flatten(1)
            for m, anchors in zip(self.levels, self.per_cell, strict=True)
        ]
        return torch.cat(rows, 1).flatten()

    def all(self) -> Tensor:
        """Every anchor: (B, N, *shape), N in the order level, y, x, anchor."""
        rows = []
        for m, anchors in zip(self.levels, self.per_cell, strict=True):
            b, _, h, w = m.shape
            rows.append(m.view(b, anchors, -1, h, w).permute(0, 3, 4, 1, 2).reshape(b, h * w * anchors, *self.shape))
        return torch.cat(rows, 1)


class Picked(Maps):
    """Some of the C numbers of every anchor, in an order of their own, chosen once the anchors are gathered.

    Args:
        source: maps (C,).
        columns: (P,) int64, which of them.
    """

    source: Maps
    columns: Tensor

    def __init__(self, source: Maps, columns: Tensor):
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "shape", (len(columns),))
        object.__setattr__(self, "anchors", source.anchors)

    @property
    def levels(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The maps as they would have been made, copied at each reading."""
        maps = zip(self.source.levels, self.per_cell, strict=True)
        return tuple(m.unflatten(1, (a, -1)).index_select(2, self.columns).flatten(1, 2) for m, a in maps)

    @property
    def images(self) -> int:
        return self.source.images

    @property
    def per_cell(self) -> tuple[int, ...]:
        return self.source.per_cell

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self.source.sizes

    def only(self, keep: Sequence[int]) -> "Picked":
        return Picked(self.source.only(keep), self.columns)

    def at(self, where: Where) -> Tensor:
        return self.source.at(where).index_select(-1, self.columns)

    def all(self) -> Tensor:
        return self.source.all().index_select(-1, self.columns)


class Computed(Maps):
    """Numbers of every anchor that are computed from others where they are read, and not before.

    Args:
        function: (..., C) of each anchor, and (..., n) of each other -> (..., C), row by row.
        first: the maps (C,) that it takes the shape of.
        others: what it reads besides, of the same levels and anchors.
    """

    function: Callable[..., Tensor]
    of: tuple[Maps, ...]

    def __init__(self, function: Callable[..., Tensor], first: Maps, *others: Maps):
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "of", (first, *others))
        object.__setattr__(self, "shape", first.shape)
        object.__setattr__(self, "anchors", first.anchors)

    @property
    def levels(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The maps as they would have been made, computed at each reading."""
        return tuple(rows.movedim(-1, 2).flatten(1, 2) for rows in self._rows())

    @property
    def images(self) -> int:
        return self.of[0].images

    @property
    def per_cell(self) -> tuple[int, ...]:
        return self.of[0].per_cell

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self.of[0].sizes

    def only(self, keep: Sequence[int]) -> "Computed":
        return Computed(self.function, *(maps.only(keep) for maps in self.of))

    def at(self, where: Where) -> Tensor:
        return self.function(*(maps.at(where) for maps in self.of))

    def largest(self) -> Tensor:
        rows = [rows.amax(-1).flatten(2).transpose(1, 2).flatten(1) for rows in self._rows()]
        return torch.cat(rows, 1).flatten()

    def all(self) -> Tensor:
        return self.function(*(maps.all() for maps in self.of))

    def _rows(self) -> list[Tensor]:
        """Of each level (B, A, H, W, C), without a copy of the maps."""
        levels = zip(*(maps.levels for maps in self.of), strict=True)
        return [
            self.function(*(m.unflatten(1, (anchors, -1)).movedim(2, -1) for m in maps))
            for maps, anchors in zip(levels, self.per_cell, strict=True)
        ]


class _Gather(torch.autograd.Function):
    """Read single anchors of a grid (B, A, C, cells): (M, C). Each at most once, so the gradient needs no accumulation,
    which costs more than the reading (and a sort, on CUDA)."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, image: Tensor, anchor: Tensor, cell: Tensor) -> Tensor:
        ctx.save_for_backward(image, anchor, cell)
        ctx.shape = grid.shape
        return grid.transpose(2, 3)[image, anchor, cell]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        into = grad.new_zeros(ctx.shape)
        into.transpose(2, 3)[ctx.saved_tensors] = grad
        return into, None, None, None


def where_of(weight: Tensor, counts: Sequence[int], sizes: Sequence[tuple[int, int]]) -> tuple[Where, Tensor]:
    """The anchors of non-zero weight, and their weights, level after level.

    Args:
        weight: (B, N), anchors in the order level, y, x, anchor.
        counts: anchors of one image at each level.
        sizes: (H, W) of each level.

    Returns:
        where, and the weights (M,) in the order of ``Maps.at(where)``. Waits for the device (``nonzero``).
    """
    index, weights = [], []
    for w, count, (height, width) in zip(weight.split(list(counts), 1), counts, sizes, strict=True):
        image, at = w.nonzero(as_tuple=True)
        per_cell = count // (height * width)
        cell = torch.div(at, per_cell, rounding_mode="floor")
        index.append((image, at - cell * per_cell, cell))
        weights.append(w[image, at])
    return Where(tuple(index)), torch.cat(weights)
