"""Pairs of rotated boxes that overlaps go wrong on, and their overlap by shapely."""

import math

import shapely
import torch
from torch import Tensor

from distillkit.boxes.rotated import corners

KINDS = (
    "any place",
    "the same",
    "quarter turns",
    "quarter turns and sides swapped",
    "whole turns",
    "slid along an axis",
    "touching",
    "1e-6 apart",
    "nested",
    "nearly parallel",
)


def some_boxes(number: int, seed: int = 0, longest: float = 100.0) -> Tensor:
    """Sides of 1 to ``longest`` pixels, evenly on a logarithmic scale, up to two turns: (number, 5) float64."""
    g = torch.Generator().manual_seed(seed)
    place, size = torch.rand(number, 2, generator=g) * 1000, longest ** torch.rand(number, 2, generator=g)
    return torch.cat([place, size, (torch.rand(number, 1, generator=g) - 0.5) * 8 * math.pi], 1).double()


def some_pairs(kind: str, number: int, longest: float = 1000.0) -> tuple[Tensor, Tensor]:
    """Two times (number, 5) float64, in numbers that float32 holds, too."""
    index = KINDS.index(kind)
    a = some_boxes(number, index, longest).float().double()
    return a, partner(a, kind, 100 + index, longest).float().double()


def partner(a: Tensor, kind: str, seed: int, longest: float) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    b = a.clone()
    random = torch.rand(a.shape, generator=g, dtype=a.dtype)
    along = torch.stack([a[:, 4].cos(), a[:, 4].sin()], 1) * a[:, 2:3]
    if kind == "any place":
        b = some_boxes(len(a), seed, longest)
        b[:, :2] = a[:, :2] + (random[:, :2] - 0.5) * (a[:, 2:4] + b[:, 2:4]) / 2
    elif kind.startswith("quarter turns"):
        b[:, 4] += (random[:, 4] * 8 - 4).round() * math.pi / 2
        if "swapped" in kind:
            b[:, 2:4] = a[:, 2:4].flip(1)
    elif kind == "whole turns":
        b[:, 4] += (random[:, 4] * 4 - 2).round() * 2 * math.pi
    elif kind == "slid along an axis":
        b[:, :2] += along * random[:, :1]
    elif kind == "touching":
        b[:, :2] += along
    elif kind == "1e-6 apart":
        b += (random - 0.5) * 2e-6
    elif kind == "nested":
        b[:, 2:4] *= random[:, 2:4]
    elif kind == "nearly parallel":
        b[:, 4] += (random[:, 4] - 0.5) * 10 ** -(random[:, 3] * 8)
    return b


def by_shapely(a: Tensor, b: Tensor) -> Tensor:
    """IoU of box i with box i. Without ``grid_size``, shapely loses some pairs whose sides coincide."""
    middle = torch.cat([a[:, :2], torch.zeros(len(a), 3)], 1)
    first, second = (shapely.polygons(corners(boxes.double() - middle).numpy()) for boxes in (a, b))
    shared = shapely.area(shapely.intersection(first, second, grid_size=1e-9))
    return torch.from_numpy(shared / (shapely.area(first) + shapely.area(second) - shared))
