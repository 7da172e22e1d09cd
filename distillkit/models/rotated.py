"""From head maps to rotated boxes, for the detectors that predict them."""

from collections.abc import Callable

import torch
from torch import Tensor

from distillkit.boxes.anchors import inside
from distillkit.boxes.maps import Maps
from distillkit.boxes.rotated import Convention, normalize
from distillkit.boxes.rotated_nms import rotated_nms
from distillkit.models.dense import Inference, Sizes

#: which anchors (n,) of a picture and their edge logits (n, 5, K) -> boxes (n, 5) in pixels
Decode = Callable[[Tensor, Tensor], Tensor]
#: as Rotated-LD tests on DOTA, where a picture has up to thousands of objects
AS_PUBLISHED = Inference(score=0.05, iou=0.1, most=2000, before_nms=2000)


def predict_rotated(
    scores: Maps, edges: Maps, sizes: Sizes, points: Tensor, decode: Decode, how: Inference, convention: Convention
) -> list[dict[str, Tensor]]:
    """Boxes of a batch: the best anchors of each level, then every class above ``how.score``, then class-wise NMS.

    Args:
        scores: probabilities, (C,) an anchor.
        edges: logits, (5, K) an anchor.
        sizes: per picture (height, width) before padding; anchors in the padding score 0.
        points: (N, 2) the anchors' centres in pixels.
        decode: see ``Decode``.
        convention: how angles are written, see ``boxes.rotated.normalize``.

    Returns:
        per picture boxes (k, 5), not clipped: a turned box cut at the rim would be none; scores (k,) falling; labels
        (k,) int64.
    """
    found = []
    for image, size in enumerate(sizes):
        anchors, rows, logits = best_anchors(scores, edges, image, inside(points, size), how.before_nms)
        boxes = normalize(decode(anchors, logits), convention)
        anchor, label = torch.where(rows > how.score)
        boxes, best = boxes[anchor], rows[anchor, label]
        keep = rotated_nms(boxes, best, label, how.iou, how.most)
        found.append({"boxes": boxes[keep], "scores": best[keep], "labels": label[keep]})
    return found


def best_anchors(scores: Maps, edges: Maps, image: int, valid: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``most`` anchors of each level with the highest class probabilities in one picture of the batch.

    Args:
        valid: (N,) bool; the others score 0.

    Returns:
        their positions (n,) among the picture's N anchors, scores (n, C) and edge logits (n, *edges.shape), float32.
    """
    at, rows, logits, start = [], [], [], 0
    per_level = zip(scores.levels, edges.levels, scores.counts, scores.per_cell, strict=True)
    for level, distributions, count, anchors in per_level:
        said = level[image].float().view(anchors, *scores.shape, -1).permute(2, 0, 1).reshape(count, -1)
        said = said * valid[start : start + count, None]
        best = said.amax(1).topk(min(most, count)).indices
        cell, anchor = best // anchors, best % anchors
        grid = distributions[image].float().view(anchors, -1, count // anchors)
        logits.append(grid[anchor, :, cell].view(-1, *edges.shape))
        rows.append(said[best])
        at.append(best + start)
        start += count
    return torch.cat(at), torch.cat(rows), torch.cat(logits)
