"""Boxes of four points: how they move with a picture, and how much of them a window shows.

A rotated box is carried through transforms as its four points and is made a rectangle once, at the end. torchvision
makes it one again after every crop and resize, which is off by pixels where the aspect changes, and by default clamps
it at the picture's border, which crushes it. ``Quads`` are torchvision's boxes without either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

POINTS = tv_tensors.BoundingBoxFormat.XYXYXYXY

#: what torchvision does to the points themselves, as long as nothing is clamped
INHERITED = (F.horizontal_flip, F.vertical_flip, F.pad)
#: what nothing here needs; torchvision would return rectangles near the right ones, without a word
REFUSED = (F.affine, F.rotate, F.perspective, F.elastic, F.center_crop, F.resized_crop)

Window = tuple[float, float, float, float]


class Quads(tv_tensors.BoundingBoxes):
    """k boxes of four points each: a torchvision box of format XYXYXYXY, float (k, 8), that is never clamped.

    Flips, ``resize``, ``crop`` and ``pad`` move every point exactly, also out of the picture; torchvision's other
    geometric functionals raise TypeError. Converted to another format it becomes a plain ``BoundingBoxes``.

    Args:
        points: float (k, 4, 2) or (k, 8) x, y in pixels; in order around the object, from any corner, either way.
        canvas_size: (height, width) of the picture.
    """

    def __new__(cls, points: Tensor, *, canvas_size: tuple[int, int]) -> Quads:
        flat = points.as_subclass(Tensor).reshape(-1, 8)
        boxes: Any = super().__new__(cls, flat, format=POINTS, canvas_size=canvas_size, clamping_mode=None)
        return boxes

    @property
    def points(self) -> Tensor:
        """(k, 4, 2), a plain tensor."""
        return self.as_subclass(Tensor).reshape(-1, 4, 2)

    @classmethod
    def _wrap(cls, tensor: Tensor, *, format: Any, **rest: Any) -> Any:
        if format in (POINTS, POINTS.value):
            return super()._wrap(tensor, format=POINTS, **rest)
        return tv_tensors.BoundingBoxes._wrap(tensor, format=format, **rest)

    @classmethod
    def _wrap_output(cls, output: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """``to``, ``clone`` and ``detach`` keep the class: torchvision's own method would make it ``BoundingBoxes``."""
        plain = super()._wrap_output(output, args, kwargs)
        if isinstance(plain, tv_tensors.BoundingBoxes) and plain.shape[-1:] == (8,):
            return cls(plain, canvas_size=plain.canvas_size)
        return plain


@F.register_kernel(F.resize, Quads)
def _resize(boxes: Quads, size: list[int] | None, max_size: int | None = None, **_: Any) -> Quads:
    nothing = torch.empty(0, 4)
    _, (height, width) = F.resize_bounding_boxes(nothing, boxes.canvas_size, size, max_size)
    scale = boxes.points.new_tensor([width / boxes.canvas_size[1], height / boxes.canvas_size[0]])
    return Quads(boxes.points * scale, canvas_size=(height, width))


@F.register_kernel(F.crop, Quads)
def _crop(boxes: Quads, top: int, left: int, height: int, width: int) -> Quads:
    return Quads(boxes.points - boxes.points.new_tensor([left, top]), canvas_size=(height, width))


def _refuse(boxes: Quads, *_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "quads move exactly with flips, resize, crop and pad alone; for this transform convert them first, to "
        "another format of torchvision's boxes, and look at what it makes of them"
    )


for functional in REFUSED:
    F.register_kernel(functional, Quads)(_refuse)


def area(polygons: Tensor) -> Tensor:
    """Area of polygons (..., n, 2) whose sides do not cross: (...), at least 0 (the shoelace formula)."""
    x, y = (polygons - polygons.mean(-2, keepdim=True)).unbind(-1)
    return (x * y.roll(-1, -1) - y * x.roll(-1, -1)).sum(-1).abs() / 2


def part_inside(polygons: Tensor, window: Window) -> Tensor:
    """How much of each polygon lies in a window, as a share of its area: (..., n, 2) -> float64 (...), in 0..1.

    Args:
        polygons: their sides must not cross; they may be concave, and turn either way.
        window: x1, y1, x2, y2.

    Exact: every side is cut where it crosses one of the window's four lines, and all points are moved to the nearest
    place in the window. What lies outside is then folded flat onto the border and has no area.
    """
    polygons = polygons.double()
    low, high = polygons.new_tensor(window[:2]), polygons.new_tensor(window[2:])
    side = polygons.roll(-1, -2) - polygons
    steps = torch.where(side == 0, 1, side)
    cuts = torch.cat([(low - polygons) / steps, (high - polygons) / steps], -1).clamp(0, 1).sort(-1).values
    along = torch.cat([torch.zeros_like(cuts[..., :1]), cuts], -1)  # (..., n, 5): the side's start, then its cuts
    points = polygons[..., None, :] + along[..., None] * side[..., None, :]
    folded = points.maximum(low).minimum(high).flatten(-3, -2)
    return (area(folded) / area(polygons).clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)


def crossing(quads: Tensor) -> Tensor:
    """Whether two opposite sides of a quad cross: (k, 4, 2) -> bool (k,). Sides that only touch do not."""
    a, b, c, d = quads.double().unbind(-2)
    return _cross(a, b, c, d) | _cross(b, c, d, a)


def _cross(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Whether the segments ab and cd have one inner point in common."""
    return (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)


def _side(a: Tensor, b: Tensor, point: Tensor) -> Tensor:
    """Above 0 on one side of the line through a and b, below 0 on the other."""
    u, v = b - a, point - a
    return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
