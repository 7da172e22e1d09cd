"""Losses on attention maps: the cosine regulariser of DeepViT (arXiv:2103.11886) and Refiner (arXiv:2106.03714)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32


def attention_cosine(maps: Sequence[Tensor], pairs: int | None = None) -> Tensor:
    """How alike the maps of neighbouring blocks are, to be made smaller in training.

    The mean over batch, queries and keys of ``1/n * sum_{i < n} cos(A_i, A_{i+1})``, the cosine over the heads. (The
    metric that the method is judged by, ``distillkit.evaluation.attention``, takes it over the queries.) The releases
    add 0.1 times this to the cross-entropy, with n = 12, or 2 where their loss is left at its defaults.

    Args:
        maps: of the blocks in order, each (B, heads, T, T).
        pairs: n, the first so many pairs; None = all.

    Returns:
        () in -1..1.

    Raises:
        ValueError: fewer than n + 1 maps, or maps of different shapes.
    """
    count = max(len(maps) - 1, 1) if pairs is None else pairs
    if count < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if len(maps) < count + 1:
        raise ValueError(f"{count} pairs of neighbours need {count + 1} maps at least, got {len(maps)}")
    shapes = {tuple(m.shape) for m in maps[: count + 1]}
    if len(shapes) > 1:
        raise ValueError(f"maps must have one shape (B, heads, T, T), got {sorted(shapes)}")
    lifted = [at_least_float32(m) for m in maps[: count + 1]]
    cosines = [F.cosine_similarity(a, b, dim=1) for a, b in pairwise(lifted)]
    return torch.stack(cosines).mean()
