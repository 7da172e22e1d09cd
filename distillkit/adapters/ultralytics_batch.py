"""Batches and predictions of ultralytics' detection models, and ours: from one to the other.

A batch is a dict: ``img`` (B, 3, H, W) RGB in 0..1; of the n objects of all its pictures ``cls`` (n, 1), ``bboxes``
(n, 4) cx, cy, w, h in shares of the picture, and ``batch_idx`` (n,), which picture each belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from distillkit.adapters.dense_head import LOOKED_AT
from distillkit.boxes.iou import check_boxes
from distillkit.core.views import BoxTargets
from distillkit.models.dense import Inference, to_batch

#: how predictions become boxes, as in its own validation; how many go into NMS
INFERENCE = Inference(score=0.001, iou=0.7, most=300)
BEFORE_NMS = 30_000
#: what its trainer fills pictures up with
GREY = 114 / 255


def batch_of(pictures: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None, multiple: int) -> Any:
    """A batch, or without targets its pictures alone; these are filled up at the right and below.

    Args:
        pictures: (3, h, w) in 0..1, of any sizes.
        targets: dict(boxes (k, 4) x1 y1 x2 y2 in pixels, labels (k,)), one a picture.
        multiple: height and width of the batch are multiples of this many pixels.
    """
    batch, _ = to_batch(pictures, multiple, pictures[0].new_full((3, 1, 1), GREY))
    if targets is None:
        return batch
    sides = batch.new_tensor([batch.shape[3], batch.shape[2]]).repeat(2)
    boxes = torch.cat([row["boxes"] for row in targets]) / sides
    counts = torch.tensor([len(row["labels"]) for row in targets])
    return {
        "img": batch,
        "cls": torch.cat([row["labels"] for row in targets])[:, None].float(),
        "bboxes": torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1),
        "batch_idx": torch.arange(len(targets)).repeat_interleave(counts).to(batch),
    }


def box_targets(batch: Mapping[str, Any]) -> BoxTargets:
    """Ground truth of a batch, in pixels; objects may stand in any order.

    Raises ValueError for a box that is not finite or has no area (looked at on the CPU only).
    """
    images, _, height, width = batch["img"].shape
    order = batch["batch_idx"].flatten().long().argsort(stable=True)
    counts = torch.bincount(batch["batch_idx"].flatten().long(), minlength=images).tolist()
    boxes = corners_of(batch["bboxes"].float()[order])
    boxes = (boxes * boxes.new_tensor([width, height, width, height])).split(counts)
    labels = batch["cls"].flatten().long()[order].split(counts)
    for i, box in enumerate(boxes):
        check_boxes(i, box)
    return BoxTargets(list(boxes), list(labels), [(height, width)] * images)


def corners_of(boxes: Tensor) -> Tensor:
    """(n, 4) cx, cy, w, h -> x1, y1, x2, y2."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], 1)


def surest(row: Tensor, corners: bool) -> dict[str, Tensor]:
    """The anchors (N, 4 + C) of one picture that are surest, as the proof looks at."""
    scores, labels = row[:, 4:].max(1)
    best = scores.topk(min(LOOKED_AT, len(scores))).indices
    boxes = row[best, :4]
    return {"boxes": boxes if corners else corners_of(boxes), "scores": scores[best], "labels": labels[best]}


def kept(row: Tensor, corners: bool, size: tuple[int, int], how: Inference) -> dict[str, Tensor]:
    """What NMS leaves of the anchors (N, 4 + C) of one picture."""
    row = row.float()
    anchor, label = (row[:, 4:] > how.score).nonzero(as_tuple=True)
    scores = row[anchor, 4 + label]
    best = scores.topk(min(len(scores), BEFORE_NMS)).indices
    boxes, scores, label = row[anchor[best], :4], scores[best], label[best]
    boxes = boxes if corners else corners_of(boxes)
    keep = batched_nms(boxes, scores, label, how.iou)[: how.most]  # of boxes that reach beyond the picture, as it does
    return {"boxes": clip_boxes_to_image(boxes[keep], size), "scores": scores[keep], "labels": label[keep]}
