"""For heads with several anchors a cell, as RetinaNet (Lin et al., arXiv:1708.02002): the boxes of all anchors.

They are the ``anchors`` of the ``DenseDetections`` that such a head's adapter gives; ``DistributionHead`` has none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distillkit.boxes.anchors import Sizes, Strides, grid_points


def shaped_anchors(
    sizes: Sizes,
    strides: Strides,
    centre: float = 0.0,
    octave: float = 4.0,
    scales: int = 3,
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Anchors of several shapes around every point, in the order level, y, x, ratio, scale. Units: pixels.

    Args:
        sizes: (H, W) of each level.
        strides: pixels a cell of each level.
        centre: where a point stands in its cell, in cells.
        octave: side of the smallest square anchor, in strides.
        scales: anchors an octave: sides are ``octave * 2^(i / scales)``.
        ratios: height over width; the area stays that of the square.

    Returns:
        (N, 4) x1, y1, x2, y2, with ``scales * len(ratios)`` anchors a cell: ``DenseDetections.anchors``.
    """
    side = octave * 2 ** (torch.arange(scales, device=device) / scales)
    height = torch.tensor(ratios, device=device).sqrt()
    half = torch.stack([side / height[:, None], side * height[:, None]], -1).view(-1, 2) / 2  # (A, 2) strides
    levels = []
    for size, stride in zip(sizes, strides, strict=True):
        points = grid_points([size], [stride], centre, device)[:, None]
        levels.append(torch.cat([points - half * stride, points + half * stride], -1).view(-1, 4))
    return torch.cat(levels)
