"""Which tokens are asked for: ELECTRA's masking. Clark et al., arXiv:2003.10555, as LV-BERT's code has it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distillkit.text.vocabulary import Vocabulary

SHARE, MORE, KEPT = 0.15, 0.005, 0.15


class Masked(NamedTuple):
    """inputs: (B, T), what the generator sees. positions: (B, M). weights: (B, M), 1 where a position is asked for, 0
    where a text has fewer. writes: (B, M) bool: a position's first mention."""

    inputs: Tensor
    positions: Tensor
    weights: Tensor
    writes: Tensor


def mask_tokens(
    ids: Tensor,
    keep: Tensor,
    vocabulary: Vocabulary,
    share: float = SHARE,
    convention: Literal["default", "release"] = "default",
    generator: torch.Generator | None = None,
) -> Masked:
    """Choose 15 % of the tokens of each text, rounded, at least one and at most ``int(0.155 T)``; 85 % of
    them become [MASK], the others stay as they are.

    [CLS], [SEP], [MASK] and padding are never chosen. By default no token is chosen twice. ``convention="release"``
    draws with replacement: a token drawn twice is hidden once, and counts twice in the loss.

    Args:
        ids, keep: (B, T) token numbers, and 0 at padding.
        generator: what is drawn; None: torch's own.
    """
    length = ids.shape[1]
    special = torch.tensor([vocabulary.start, vocabulary.end, vocabulary.mask], device=ids.device)
    may = keep.bool() & ~torch.isin(ids, special)
    most = max(1, int((share + MORE) * length))
    wanted = (keep.sum(1) * share).round().clamp(1, most).long()
    if convention == "default":
        noise = torch.rand(ids.shape, generator=generator, device=ids.device)
        order = noise.masked_fill(~may, -1.0).argsort(dim=1, descending=True, stable=True)
        positions, wanted = order[:, :most], torch.minimum(wanted, may.sum(1))
    else:
        chances = may.float().clamp(min=1e-20)  # of a text that has none to choose, all are alike
        positions = torch.multinomial(chances, most, replacement=True, generator=generator)
        wanted = wanted * may.any(1)
    weights = (torch.arange(most, device=ids.device) < wanted[:, None]).float()
    first = first_mentions(positions, weights)
    hidden = torch.rand(positions.shape, generator=generator, device=ids.device) >= KEPT
    inputs = write(ids, positions, torch.full_like(positions, vocabulary.mask), first & hidden)
    return Masked(inputs, positions, weights, first)


def first_mentions(positions: Tensor, weights: Tensor) -> Tensor:
    """(B, M) bool: asked for, and not mentioned before in its row."""
    same = positions[:, :, None] == positions[:, None, :]
    earlier = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril(-1)
    return (weights > 0) & ~(same & earlier).any(2)


def write(ids: Tensor, positions: Tensor, values: Tensor, where: Tensor) -> Tensor:
    """A copy of ids (B, T) with ``values`` at ``positions``, both (B, M), as far as ``where`` is true."""
    length = ids.shape[1]
    padded = torch.cat([ids, ids[:, :1]], 1)  # one more column, where what is not to be written goes
    return padded.scatter(1, torch.where(where, positions, length), values)[:, :length]
