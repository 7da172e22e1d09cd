"""Box regression losses on overlaps."""

import torch
from torch import Tensor


def giou_loss(pred: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """``1 - GIoU`` of each pair. Rezatofighi et al., arXiv:1902.09630.

    Args:
        pred: (M, 4) x1, y1, x2, y2, in any unit.
        target: (M, 4) in the same unit.
        eps: least value of the union's and the enclosing box's area.

    Returns:
        (M,) in 0..2.
    """
    inside = (torch.minimum(pred[:, 2:], target[:, 2:]) - torch.maximum(pred[:, :2], target[:, :2])).clamp(min=0)
    outside = (torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])).clamp(min=0)
    intersection = inside.prod(1)
    areas = (pred[:, 2:] - pred[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1)
    union = (areas - intersection).clamp(min=eps)
    enclosing = outside.prod(1).clamp(min=eps)
    return 1 - intersection / union + (enclosing - union) / enclosing
