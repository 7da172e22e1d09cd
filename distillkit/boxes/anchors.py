"""Points and square anchors of a feature pyramid, in the order level, y, x. Units: pixels of the network's input."""

from collections.abc import Sequence

import torch
from torch import Tensor

Sizes = Sequence[tuple[int, int]]
Strides = Sequence[float]


def grid_points(sizes: Sizes, strides: Strides, centre: float, device: torch.device | str) -> Tensor:
    """The point every cell's distances are measured from.

    Args:
        sizes: (H, W) of each level.
        strides: pixels a cell of each level.
        centre: where the point stands in its cell, in cells: 0 the corner, 0.5 the middle.

    Returns:
        (N, 2) x, y.
    """
    levels = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        x = (torch.arange(width, device=device, dtype=torch.float32) + centre) * stride
        y = (torch.arange(height, device=device, dtype=torch.float32) + centre) * stride
        levels.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).view(-1, 2))
    return torch.cat(levels)


def grid_strides(sizes: Sizes, strides: Strides, device: torch.device | str) -> Tensor:
    """(N,) stride of every cell's level, float32."""
    return torch.cat(
        [
            torch.full((height * width,), float(stride), device=device)
            for (height, width), stride in zip(sizes, strides, strict=True)
        ]
    )


def grid_anchors(sizes: Sizes, strides: Strides, centre: float, octave: float, device: torch.device | str) -> Tensor:
    """(N, 4) one square a cell around its point, ``octave`` strides wide."""
    points = grid_points(sizes, strides, centre, device)
    half = grid_strides(sizes, strides, device)[:, None] * (octave / 2)
    return torch.cat([points - half, points + half], 1)


def inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 2) x, y and (height, width) -> (N,) bool: the point stands in the picture, not in its padding."""
    return (points[:, 0] < size[1]) & (points[:, 1] < size[0])
