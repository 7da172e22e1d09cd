"""Rotated boxes (cx, cy, w, h, angle): corners, the smallest box around points, conventions of the angle.

Pixels and radians; the angle turns clockwise as seen in the picture (y points down). Every function takes any angle.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from distillkit.boxes.precision import at_least_float32

Convention = Literal["le90", "le135", "oc"]
CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))
PAIRS = ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3))
SAME = 1 + 1e-9  # measures closer than by this factor are equal but for rounding


def corners(boxes: Tensor) -> Tensor:
    """The four corners, (..., 5) -> (..., 4, 2): top left, top right, bottom right, bottom left of the box at angle 0.

    So the first side has length w and runs in the direction of the angle.
    """
    along, across = _axes(boxes)
    centre = boxes[..., :2]
    return torch.stack([centre + x * along + y * across for x, y in CORNERS], -2)


def upright(boxes: Tensor) -> Tensor:
    """The smallest axis-aligned box around each: (..., 5) -> (..., 4) x1, y1, x2, y2."""
    along, across = _axes(boxes)
    reach = along.abs() + across.abs()
    return torch.cat([boxes[..., :2] - reach, boxes[..., :2] + reach], -1)


def _axes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """From the centre to the middles of the right and of the lower side, (..., 2) each."""
    cos, sin = boxes[..., 4].cos(), boxes[..., 4].sin()
    half_width, half_height = boxes[..., 2:3] / 2, boxes[..., 3:4] / 2
    return half_width * torch.stack([cos, sin], -1), half_height * torch.stack([-sin, cos], -1)


def from_corners(quads: Tensor) -> Tensor:
    """The box of smallest area around four points each: (k, 4, 2) -> (k, 5).

    The points may come in any order, cross, lie on a line or coincide. Of the four ways to write a rectangle, it is the
    one whose angle is nearest to the direction from the first to the second point: ``corners`` undone.

    Raises:
        ValueError: another shape.
    """
    if quads.dim() != 3 or quads.shape[1:] != (4, 2):
        raise ValueError(f"expected corners (k, 4, 2), got {tuple(quads.shape)}")
    points = quads.double()
    first, second = zip(*PAIRS)
    # the smallest box has a side along a side of the convex hull, and these six directions hold all of those
    directions = points[:, second] - points[:, first]
    boxes = _smallest(points, directions)
    ahead = torch.atan2(directions[:, 0, 1], directions[:, 0, 0])
    quarters = ((ahead - boxes[:, 4]) / (math.pi / 2)).round()
    sides = torch.where((quarters.remainder(2) == 1)[:, None], boxes[:, 2:4].flip(1), boxes[:, 2:4])
    angle = boxes[:, 4:] + quarters[:, None] * (math.pi / 2)
    return torch.cat([boxes[:, :2], sides, angle], 1).to(at_least_float32(quads).dtype)


def smallest(points: Tensor) -> Tensor:
    """The box of smallest area around all points, as those of a polygon: (P, 2) -> (5,). P >= 1.

    Raises:
        ValueError: another shape, or no point.
    """
    if points.dim() != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"expected at least one point, (P, 2), got {tuple(points.shape)}")
    hull = _hull(points.double())
    return _smallest(hull[None], (hull.roll(-1, 0) - hull)[None])[0].to(at_least_float32(points).dtype)


def _smallest(points: Tensor, directions: Tensor) -> Tensor:
    """Of the boxes around the points (k, P, 2) along one of the directions (k, D, 2), the smallest: (k, 5)."""
    corner = points[:, :1]
    length = directions.norm(dim=-1, keepdim=True)
    # two equal points have no direction: any other will do, it only adds one more box to choose from
    along = torch.where(length > 0, directions, directions.new_tensor([1.0, 0.0])) / torch.where(length > 0, length, 1)
    across = torch.stack([-along[..., 1], along[..., 0]], -1)
    places = torch.stack([along, across], 2) @ (points - corner).mT[:, None]  # (k, D, 2, P)
    low, high = places.amin(-1), places.amax(-1)
    size = high - low
    best = _first_smallest(size)
    row = torch.arange(len(points), device=points.device)
    along, across, size, centre = along[row, best], across[row, best], size[row, best], (low + high)[row, best] / 2
    place = corner[:, 0] + centre[:, :1] * along + centre[:, 1:] * across
    return torch.cat([place, size, torch.atan2(along[:, 1:], along[:, :1])], 1)


def _first_smallest(size: Tensor) -> Tensor:
    """(k, D, 2) -> (k,): the least area, of equal ones the least perimeter, of those the first. Where three points make
    a rectangle several are as small, and rounding must not choose among them."""
    area, perimeter = size.prod(-1), size.sum(-1)
    least = area <= area.amin(1, keepdim=True) * SAME
    perimeter = torch.where(least, perimeter, torch.inf)
    least = perimeter <= perimeter.amin(1, keepdim=True) * SAME
    places = torch.arange(size.shape[1], device=size.device)
    return torch.where(least, places, size.shape[1]).amin(1)


def _hull(points: Tensor) -> Tensor:
    """The corners of the convex hull in order, (P, 2) -> (H, 2), by Andrew's monotone chain."""
    ordered = sorted(set(map(tuple, points.tolist())))

    def chain(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
        kept: list[tuple[float, float]] = []
        for x, y in run:
            while len(kept) > 1:
                (x0, y0), (x1, y1) = kept[-2:]
                if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                    break
                kept.pop()
            kept.append((x, y))
        return kept

    hull = chain(ordered)[:-1] + chain(ordered[::-1])[:-1]
    return points.new_tensor(hull or ordered)


def normalize(boxes: Tensor, convention: Convention) -> Tensor:
    """The same rectangles with their angles in the range of a convention: (..., 5) -> (..., 5).

    Args:
        boxes: any angles.
        convention: "le90": w >= h, angle in [-pi/2, pi/2); "le135": w >= h, angle in [-pi/4, 3 pi/4); "oc", OpenCV's
            from 4.5.1: angle in (0, pi/2], sides in any order. A range holds exactly, in the boxes' own dtype. A square
            keeps its angle up to half turns under the first two.

    Raises:
        ValueError: another convention.
    """
    x, y, w, h, angle = boxes.unbind(-1)
    if convention == "oc":
        # (0, pi/2] is [-pi/2, 0) seen from the other side
        turned, quarters = _wrap(-angle, -math.pi / 2, math.pi / 2)
        angle, odd = -turned, quarters.remainder(2) == 1
        return torch.stack([x, y, torch.where(odd, h, w), torch.where(odd, w, h), angle], -1)
    if convention not in ("le90", "le135"):
        raise ValueError(f"the convention of angles must be 'le90', 'le135' or 'oc', got {convention!r}")
    angle = torch.where(w < h, angle + math.pi / 2, angle)
    angle, _ = _wrap(angle, -math.pi / 2 if convention == "le90" else -math.pi / 4, math.pi)
    return torch.stack([x, y, torch.maximum(w, h), torch.minimum(w, h), angle], -1)


def _wrap(angle: Tensor, low: float, period: float) -> tuple[Tensor, Tensor]:
    """The angles in [low, low + period), and how many periods were taken off."""
    ends = angle.new_tensor([low, low + period])
    last = torch.nextafter(ends[1], ends[0])
    count = ((angle - low) / period).floor()
    count = torch.where((angle >= ends[0]) & (angle <= last), 0, count)  # rounding must not move what fits
    return torch.clamp(angle - count * period, ends[0], last), count


def to_torchvision(boxes: Tensor) -> Tensor:
    """Our boxes as torchvision's CXCYWHR, whose angle is in degrees and counter-clockwise: (..., 5) -> (..., 5)."""
    return torch.cat([boxes[..., :4], -boxes[..., 4:].rad2deg()], -1)


def from_torchvision(boxes: Tensor) -> Tensor:
    """torchvision's CXCYWHR as our boxes: (..., 5) -> (..., 5)."""
    return torch.cat([boxes[..., :4], -boxes[..., 4:].deg2rad()], -1)
