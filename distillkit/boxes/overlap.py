"""How objects, upright (k, 4) x1 y1 x2 y2 or rotated (k, 5) cx cy w h angle, lie to upright anchors (N, 4)."""

from typing import Literal

import torch
from torch import Tensor

from distillkit.boxes.distribution import encode
from distillkit.boxes.iou import pairwise_iou
from distillkit.boxes.rotated import upright
from distillkit.boxes.rotated_distribution import encode_turned
from distillkit.boxes.rotated_iou import aligned_rotated_iou, pairwise_rotated_iou

#: what of a rotated object its overlap with anchors is measured by: itself; the upright box around it; or its box with
#: the angle left out, cx cy w h, as Rotated-LD's regions have it
Overlap = Literal["rotated", "enclosing", "angle-free"]


def seen_as(boxes: Tensor, overlap: Overlap) -> Tensor:
    """Rotated objects (k, 5) as that form of ``Overlap``: (k, 5), or (k, 4). Upright ones stay as they are."""
    if boxes.shape[-1] == 4 or overlap == "rotated":
        return boxes
    if overlap == "enclosing":
        return upright(boxes)
    half = boxes[..., 2:4] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def hull(boxes: Tensor) -> Tensor:
    """(..., 4) or (..., 5) -> (..., 4): the upright box around, of the same centre."""
    return boxes if boxes.shape[-1] == 4 else upright(boxes)


def turned(anchors: Tensor) -> Tensor:
    """Upright boxes (..., 4) in the form of rotated ones (..., 5), angle 0."""
    sides = anchors[..., 2:] - anchors[..., :2]
    return torch.cat([(anchors[..., :2] + anchors[..., 2:]) / 2, sides, torch.zeros_like(sides[..., :1])], -1)


def pairwise_overlap(objects: Tensor, anchors: Tensor) -> Tensor:
    """Intersection over union of all: (k, 4 or 5), (N, 4) -> (k, N)."""
    if objects.shape[-1] == 4:
        return pairwise_iou(objects, anchors)
    return pairwise_rotated_iou(objects, turned(anchors))


def shared_part(objects: Tensor, anchors: Tensor) -> Tensor:
    """Of rotated objects (k, 5): (k, N) intersection over the anchors' area."""
    return pairwise_rotated_iou(turned(anchors), objects, over="first").T


def candidate_overlap(objects: Tensor, anchors: Tensor) -> Tensor:
    """Intersection over union of rotated objects (k, 5) and anchors of each, (k, M, 4): (k, M)."""
    pairs = objects[:, None].expand(-1, anchors.shape[1], -1)
    return aligned_rotated_iou(pairs.reshape(-1, 5), turned(anchors).reshape(-1, 5)).view(anchors.shape[:2])


def contains(boxes: Tensor, points: Tensor, margin: float = 0.0) -> Tensor:
    """Whether points (..., 2) are inside boxes (..., 4 or 5) by more than ``margin`` on each side, broadcast."""
    distances = encode(points, boxes) if boxes.shape[-1] == 4 else encode_turned(points, boxes)
    return distances.amin(-1) > margin
