"""Losses between the detections of two sets of queries, and which of one belong to which of the other.

Carion et al., DETR, arXiv:2005.12872, section 3.1.
"""

import torch
from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.boxes.queries import corners
from distillkit.losses.iou import giou_loss

#: how much class, L1 and GIoU count when queries are matched: those of DETR
COSTS = (1.0, 5.0, 2.0)


def box_distances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU of boxes, the two box losses of DETR.

    Args:
        a, b: (..., 4) cx, cy, w, h in shares of the picture, broadcast against each other.

    Returns:
        (...,) sum over the four numbers of |a - b|, and (...,) in 0..2; at least in float32.
    """
    a, b = torch.broadcast_tensors(at_least_float32(a), at_least_float32(b))
    overlap = giou_loss(corners(a).reshape(-1, 4), corners(b).reshape(-1, 4), eps=1e-9)
    return (a - b).abs().sum(-1), overlap.view(a.shape[:-1])


@torch.no_grad()
def partners(scores: Tensor, boxes: Tensor, other_scores: Tensor, other_boxes: Tensor) -> Tensor:
    """Which of the other's R queries each of Q queries is matched with: (B, Q) int64, -1 where with none.

    One to one, so that the sum of ``confidence * cost`` is smallest. cost = 1 - p(class) + 5 L1 + 2 (1 - GIoU), as DETR
    matches with objects (Carion et al., arXiv:2005.12872), where class and confidence are those of the other's most
    probable class: the surer the other is, the more its choice counts. Of more than Q queries the other's Q most
    confident take part.

    Args:
        scores, other_scores: class probabilities, (B, Q, C) and (B, R, C).
        boxes, other_boxes: (B, Q, 4) and (B, R, 4) cx, cy, w, h in 0..1.

    Waits for the device: the assignment runs on the CPU.
    """
    from scipy.optimize import linear_sum_assignment  # here: views import this file, and shall not wait for scipy

    queries = scores.shape[1]
    confidence, label = other_scores.float().max(-1)  # (B, R)
    confidence, chosen = confidence.topk(min(queries, confidence.shape[1]), 1)  # (B, M)
    label = label.gather(1, chosen)
    theirs = other_boxes.float().gather(1, chosen[..., None].expand(-1, -1, 4))
    wrong = 1 - scores.float().gather(2, label[:, None].expand(-1, queries, -1))  # (B, Q, M)
    l1, giou = box_distances(boxes.float()[:, :, None], theirs[:, None])
    cost = (COSTS[0] * wrong + COSTS[1] * l1 + COSTS[2] * giou) * confidence[:, None]
    columns = torch.full((len(scores), queries), -1)
    # what is not finite is no partner here, and is told of where losses are looked at
    for image, costs in enumerate(cost.nan_to_num(nan=1e9, posinf=1e9, neginf=1e9).cpu().numpy()):
        mine, column = linear_sum_assignment(costs)
        columns[image, mine] = torch.from_numpy(column)
    columns = columns.to(scores.device)
    return chosen.gather(1, columns.clamp(min=0)).where(columns >= 0, -1)
