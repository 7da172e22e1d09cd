"""Quality focal loss and distribution focal loss. Li et al., Generalized Focal Loss, arXiv:2006.04388, eq. 4 and 6."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32


def quality_focal(
    logits: Tensor, labels: Tensor, scores: Tensor, beta: float = 2.0, from_probabilities: bool = False
) -> Tensor:
    """``sum over classes of |y - p|^beta * BCE(p, y)``, where y is the score at the anchor's label and 0 elsewhere.

    Args:
        logits: (N, C), or probabilities in 0..1 where ``from_probabilities``.
        labels: (N,) int64, 0..C-1, and C for background.
        scores: (N,) quality in 0..1 (IoU of the predicted box), read only where the label is not C; no gradient.
        beta: how strongly well-predicted anchors are turned down, >= 0.
        from_probabilities: the detector multiplies probabilities (GFLv2), so there is no logit.

    Returns:
        (N,) in float32 or wider.
    """
    x = at_least_float32(logits)
    n, c = x.shape
    y = x.new_zeros(n, c + 1).scatter(1, labels[:, None], scores.detach().to(x.dtype)[:, None])[:, :c]
    if from_probabilities:
        p = x
        with torch.autocast(x.device.type, enabled=False):  # which refuses this function, whatever the precision
            entropy = F.binary_cross_entropy(p, y, reduction="none")
    else:
        p = x.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return ((y - p).abs().pow(beta) * entropy).sum(1)


def distribution_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy against the two bins around a target, each weighted by how near the target is.

    Args:
        logits: (..., K) of bins 0..K-1.
        target: (...,) in bins, 0..K-1; no gradient.

    Returns:
        (...,) in float32 or wider.
    """
    x = at_least_float32(logits)
    target = target.detach().to(x.dtype)
    left = target.floor().clamp(0, x.shape[-1] - 2)
    log_p = F.log_softmax(x, -1)
    at = left.long().unsqueeze(-1)
    near, far = log_p.gather(-1, at).squeeze(-1), log_p.gather(-1, at + 1).squeeze(-1)
    return -(left + 1 - target) * near - (target - left) * far


def periodic_distribution_focal(logits: Tensor, target: Tensor) -> Tensor:
    """The same for bins in a circle: the last bin and the first are neighbours.

    The shares of the two bins around a target are those whose mean direction is the target, sines of the distances to
    the other bin in place of the distances: a distribution that has learned them decodes to it exactly
    (``boxes.rotated_distribution.mean_angle``).

    Args:
        logits: (..., K) of bins 0..K-1, K >= 3, one period in all.
        target: (...,) in bins, any number, taken modulo K; no gradient.

    Returns:
        (...,) in float32 or wider.
    """
    x = at_least_float32(logits)
    bins, target = x.shape[-1], target.detach().to(x.dtype)
    left = target.floor()
    step = 2 * math.pi / bins
    to_left, to_right = ((left + 1 - target) * step).sin(), ((target - left) * step).sin()
    at = left.long().remainder(bins).unsqueeze(-1)
    log_p = F.log_softmax(x, -1)
    near, far = log_p.gather(-1, at).squeeze(-1), log_p.gather(-1, (at + 1).remainder(bins)).squeeze(-1)
    return -(to_left * near + to_right * far) / (to_left + to_right)
