"""Relations: how numbers of one row go together, and how the rows of a batch lie to each other."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from distillkit.boxes.precision import at_least_float32


def pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of the last dimension, in -1..1: (..., K) twice -> (...), in float32 or wider.

    ``eps`` is added to the product of the two norms: rows that hardly vary correlate with nothing, rather than by their
    rounding.
    """
    a, b = (at_least_float32(x) for x in (a, b))
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (vector_norm(a, dim=-1) * vector_norm(b, dim=-1) + eps)


def relative_distances(x: Tensor) -> Tensor:
    """Distance of every two rows, over the mean of those of different rows: (B, D) -> (B, B), 0 on the diagonal.

    Park et al., arXiv:1904.05068, section 3.2.1. Gradients of rows that coincide are 0.
    """
    distances = vector_norm(_differences(x), dim=-1)
    mean = distances.sum() / (len(x) * (len(x) - 1))
    return distances / mean.clamp(min=1e-12)


def angles(x: Tensor) -> Tensor:
    """The cosine, at row j, of the angle between rows i and k: (B, D) -> (B, B, B), entry [j, i, k].

    Park et al., arXiv:1904.05068, section 3.2.2. 0, without gradient, where row i or k is row j or coincides with it.
    """
    differences = _differences(x)
    distances = vector_norm(differences, dim=-1, keepdim=True)
    # where two rows coincide there is no direction: 0 / 1, and no gradient that 1 / 0 would blow up
    directions = differences / torch.where(distances > 0, distances, torch.ones_like(distances))
    return directions @ directions.transpose(1, 2)


def _differences(x: Tensor) -> Tensor:
    """(B, D) -> (B, B, D): entry [j, i] leads from row j to row i."""
    x = at_least_float32(x)
    return x[None] - x[:, None]
