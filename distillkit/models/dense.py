"""What the dense detectors share: pictures to one batch, targets checked, head maps to boxes.

The detectors are called as torchvision's are: ``model(images, targets)`` in train mode gives a dict of task losses,
``model(images)`` in eval mode a list of dicts of boxes (k, 4), or rotated (k, 5), in pixels of the picture, scores (k,)
and labels (k,).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from distillkit.boxes.anchors import grid_points, inside
from distillkit.boxes.distribution import decode, integral
from distillkit.boxes.iou import check_boxes

Images = Sequence[Tensor] | Tensor
Targets = Sequence[Mapping[str, Tensor]]
Sizes = list[tuple[int, int]]


@dataclass(frozen=True)
class Inference:
    """From head maps to boxes.

    Args:
        score: what a class must score above, 0..1.
        iou: boxes of one class that overlap more than this are one object.
        most: boxes kept of a picture.
        before_nms: anchors kept of a level, by their best class.
    """

    score: float = 0.05
    iou: float = 0.6
    most: int = 100
    before_nms: int = 1000


def to_batch(images: Images, multiple: int, fill: Tensor) -> tuple[Tensor, Sizes]:
    """Put pictures of any sizes into one tensor, at its top left.

    Args:
        images: pictures (3, H, W), floating point, or one tensor (B, 3, H, W).
        multiple: height and width of the batch are multiples of this many pixels.
        fill: (3, 1, 1), the colour of the padding at the right and below.

    Returns:
        (B, 3, H', W') and the (height, width) of every picture before padding.

    Raises:
        ValueError: no picture, or one of another shape or of integers.
    """
    if len(images) == 0:
        raise ValueError("images is empty: a batch needs at least one picture")
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                f"image {i}: expected floating point (3, height, width) with values in 0..1, "
                f"got {image.dtype} of shape {tuple(image.shape)}"
            )
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes))
    if isinstance(images, Tensor) and images.shape[-2:] == (height, width):
        return images, sizes
    batch = fill.to(images[0].dtype).expand(len(images), 3, height, width).clone()
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def split_targets(
    targets: Targets | None, images: int, num_classes: int, columns: int = 4
) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes and labels of every picture, checked.

    The values are looked at only on the CPU: elsewhere it would wait for the device.

    Raises:
        ValueError: no targets, not one per picture, boxes that are not (k, columns), or what would be trained as
            background without a word: a box that is not finite or has no area, a label outside 0..num_classes-1.
    """
    if targets is None:
        raise ValueError("in train mode the detector is called model(images, targets); targets is missing")
    if len(targets) != images:
        raise ValueError(f"{images} images but {len(targets)} targets: give one dict(boxes, labels) per image")
    for i, target in enumerate(targets):
        if not {"boxes", "labels"} <= set(target):
            raise ValueError(f"target {i}: expected dict(boxes, labels), got keys {sorted(target)}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != columns or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"target {i}: expected boxes (k, {columns}) and labels (k,), got {tuple(boxes.shape)} and "
                f"{tuple(labels.shape)}"
            )
        check_boxes(i, boxes)
        looked_at = labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels) > 0
        if looked_at and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"target {i}: labels {sorted(set(labels.tolist()))} are not all in 0..{num_classes - 1}")
    return [t["boxes"] for t in targets], [t["labels"] for t in targets]


def candidates(
    scores: Sequence[Tensor],
    edges: Sequence[Tensor],
    size: tuple[int, int],
    strides: Sequence[float],
    centre: float,
    before_nms: int = 1000,
) -> tuple[Tensor, Tensor]:
    """The best anchors of one picture, decoded. Those in the padding, which training leaves out, score 0.

    Args:
        scores: per level (C, H, W), probabilities.
        edges: per level (4*K, H, W), logits of the four edges' distributions over 0..K-1 strides.
        size: (height, width) of the picture in pixels, to which boxes are clipped.
        strides: pixels per cell of each level.
        centre: where in its cell an anchor's point stands, in cells.
        before_nms: anchors kept of a level, by their best class.

    Returns:
        boxes (n, 4) in pixels and scores (n, C), level after level; the best first in a level that has more than
        ``before_nms`` anchors, else in the order y, x.
    """
    boxes, kept = [], []
    for level_scores, level_edges, stride in zip(scores, edges, strides, strict=True):
        rows = level_scores.flatten(1).T.float()
        logits = level_edges.view(4, -1, len(rows)).permute(2, 0, 1)
        height, width = level_scores.shape[-2:]
        points = grid_points([(height, width)], [stride], centre, rows.device)
        rows = rows * inside(points, size)[:, None]
        if len(rows) > before_nms:
            best = rows.amax(1).topk(before_nms).indices
            rows, logits, points = rows[best], logits[best], points[best]
        boxes.append(clip_boxes_to_image(decode(points, integral(logits.float()) * stride), size))
        kept.append(rows)
    return torch.cat(boxes), torch.cat(kept)


def predict(
    scores: Sequence[Tensor],
    edges: Sequence[Tensor],
    sizes: Sizes,
    strides: Sequence[float],
    centre: float,
    how: Inference,
) -> list[dict[str, Tensor]]:
    """Boxes of a batch: ``candidates``, then every class above ``how.score``, then class-wise NMS.

    Args:
        scores: per level (B, C, H, W), probabilities.
        edges: per level (B, 4*K, H, W), logits.
        sizes: per picture (height, width) before padding.
        strides, centre: as in ``candidates``.

    Returns:
        per picture boxes (k, 4), scores (k,) falling, labels (k,) int64.
    """
    found = []
    for i, size in enumerate(sizes):
        boxes, all_scores = candidates(
            [s[i] for s in scores], [e[i] for e in edges], size, strides, centre, how.before_nms
        )
        anchor, label = torch.where(all_scores > how.score)
        boxes, best = boxes[anchor], all_scores[anchor, label]
        keep = batched_nms(boxes, best, label, how.iou)[: how.most]
        found.append({"boxes": boxes[keep], "scores": best[keep], "labels": label[keep]})
    return found
