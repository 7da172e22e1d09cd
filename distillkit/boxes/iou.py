"""Overlaps of axis-aligned boxes (x1, y1, x2, y2)."""

import torch
from torch import Tensor


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box with every other: (N, 4), (K, 4) -> (N, K); 0 where the union is empty."""
    inter = intersection(a[:, None], b)
    return inter / (area(a)[:, None] + area(b) - inter).clamp(min=1e-6)


def aligned_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of box i with box i: (N, 4), (N, 4) -> (N,); 0 where the union is empty."""
    inter = intersection(a, b)
    return inter / (area(a) + area(b) - inter).clamp(min=1e-6)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area of the intersection: (..., 4), (..., 4) -> (...), broadcast."""
    # one coordinate at a time: tensors that end in a dimension of 2 are several times slower
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    return width.clamp_(min=0) * height.clamp_(min=0)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def centre_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of the boxes' centres: (..., 4), (..., 4) -> (...), broadcast."""
    x = (a[..., 0] + a[..., 2]) / 2 - (b[..., 0] + b[..., 2]) / 2
    y = (a[..., 1] + a[..., 3]) / 2 - (b[..., 1] + b[..., 3]) / 2
    return x * x + y * y


def enclosing_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """Squared diagonal of the smallest box around both: (..., 4), (..., 4) -> (...), broadcast."""
    width = torch.maximum(a[..., 2], b[..., 2]) - torch.minimum(a[..., 0], b[..., 0])
    height = torch.maximum(a[..., 3], b[..., 3]) - torch.minimum(a[..., 1], b[..., 1])
    return width * width + height * height


def check_boxes(target: int, boxes: Tensor) -> None:
    """Raise ValueError naming the first box of target ``target`` that is not finite or has no area.

    boxes: (k, 4) x1, y1, x2, y2 or rotated (k, 5) cx, cy, w, h, angle. Looked at only on the CPU: elsewhere it would
    wait for the device.
    """
    if boxes.device.type != "cpu" or torch.compiler.is_compiling():
        return
    rotated = boxes.shape[1] == 5
    sides = boxes[:, 2:4] if rotated else boxes[:, 2:] - boxes[:, :2]
    good = boxes.isfinite().all(1) & (sides > 0).all(1)
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        upright = "x1, y1, x2, y2 in pixels with x1 < x2 and y1 < y2"
        form = "cx, cy, w, h in pixels and an angle in radians, with w > 0 and h > 0" if rotated else upright
        raise ValueError(f"target {target}: box {at} is {boxes[at].tolist()}; expected finite {form}")
