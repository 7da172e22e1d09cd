"""Token labels: what a patch token is taught, and the loss. Jiang et al., arXiv:2104.10858 ("All tokens matter").

An annotator's scores for every cell of a picture are stored as its k best classes. Pooled to the student's grid of
tokens and put through a softmax they are the soft target of every patch token; pooled to one cell, of the class token:

    loss = class_weight * CE(class token, image label) + dense_weight * mean over tokens of CE(token, its label)

Scores are raw logits, pooled before the softmax. What places are pooled is decided where the geometry of the picture
is known, in ``distillkit.data.label_map``; here is arithmetic.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32

Fill = Literal["auto", "zero", "min"]

#: from this many classes on, "auto" fills with zeros as the release does
MANY_CLASSES = 1000
#: the part the annotator keeps in the image label where it agrees with the ground truth, and where it does not
AGREED, DISAGREED = 0.5, 0.9


class SoftTargets(NamedTuple):
    """What a batch is taught.

    ground_truth: (B, C) the annotation, one-hot with smoothing. image: (B, C) the annotator's label of the whole view,
    for the class token. tokens: (B, N, C) its label of every token, row by row.
    """

    ground_truth: Tensor
    image: Tensor
    tokens: Tensor


class TokenLabelTerms(NamedTuple):
    """The two terms of the loss, weights included."""

    classes: Tensor
    tokens: Tensor

    @property
    def total(self) -> Tensor:
        return self.classes + self.tokens


def dense_logits(scores: Tensor, indices: Tensor, classes: int, fill: Fill = "auto") -> Tensor:
    """All C logits of every cell: (B, k, H, W) -> float32 (B, C, H, W).

    Args:
        scores: the logits that were stored.
        indices: int64 (B, k, H, W), their classes, all different within a cell.
        classes: C.
        fill: the logit of the classes that were not stored. "zero": 0, as released; a cell whose best logit v is low
            is then close to uniform (v = 5 of 1000 classes has 0.13). "min": the least logit stored in the cell; with
            few classes, or negative logits, zeros would give what was not stored more than what was. "auto", the
            default: "zero" from 1000 classes on, else "min"; the release has zeros always.
    """
    batch, _, height, width = scores.shape
    rest = _rest(scores, classes, fill)
    dense = torch.zeros(batch, classes, height, width, device=scores.device) if rest is None else rest.float()
    return dense.expand(-1, classes, -1, -1).clone().scatter_(1, indices, scores.float())


def pool(scores: Tensor, indices: Tensor, points: Tensor, weights: Tensor, classes: int, fill: Fill = "auto") -> Tensor:
    """The weighted mean of the logits at a few places for each of T tokens: float32 (B, T, C).

    Equal to interpolating ``dense_logits`` bilinearly at every place, between the centres of cells and flat beyond the
    outer ones, as RoIAlign does; but only the k stored classes of the four cells around a place are touched, so that it
    takes T * S * 4k additions a picture and not C * H * W.

    Args:
        scores, indices, classes, fill: as in ``dense_logits``.
        points: (B, T, S, 2) x, y in cells; cell (r, c) covers [c, c+1] x [r, r+1].
        weights: (B, T, S), of sum 1 over S; where they are all 0 every logit is 0, which is a uniform label.
    """
    batch, _, height, width = scores.shape
    tokens = points.shape[1]
    cells, shares = _neighbours(points, height, width)
    shares = (shares * weights[..., None, :]).float().flatten(2)
    where = cells.reshape(batch, 1, -1)

    def around(values: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, T, n, 4S): values of the cells around the places."""
        n = values.shape[1]
        return values.flatten(2).gather(2, where.expand(-1, n, -1)).reshape(batch, n, tokens, -1).transpose(1, 2)

    pooled = torch.zeros(batch, tokens, classes, device=scores.device)
    rest = _rest(scores, classes, fill)
    above = scores.float()
    if rest is not None:
        pooled += (around(rest.float()).squeeze(2) * shares).sum(-1, keepdim=True)
        above = above - rest
    added = around(above) * shares[:, :, None]
    return pooled.scatter_add_(2, around(indices).flatten(2), added.flatten(2))


def smoothed(labels: Tensor, classes: int, smoothing: float = 0.1) -> Tensor:
    """One-hot rows with label smoothing: int64 (B,) -> float32 (B, C), s / C everywhere and 1 - s more at the label."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def soft_targets(
    image_logits: Tensor, token_logits: Tensor, labels: Tensor, smoothing: float = 0.1, normalized: bool = True
) -> SoftTargets:
    """The targets of a batch from pooled logits.

    Args:
        image_logits: (B, C).
        token_logits: (B, C, h, w).
        labels: int64 (B,) the annotation.
        smoothing: s, 0.1 as published.
        normalized: rows are ``p * (1 - s) + s / C`` and sum to 1. False, as released: ``p * (1 - s + s / C) + s / C``,
            which sums to 1 + s / C (1.0001 for 1000 classes, 1.02 for 5).
    """
    classes = image_logits.shape[1]
    on = 1 - smoothing if normalized else 1 - smoothing + smoothing / classes

    def target(logits: Tensor) -> Tensor:
        return at_least_float32(logits).softmax(-1).mul_(on).add_(smoothing / classes)

    tokens = target(token_logits.flatten(2).transpose(1, 2))
    return SoftTargets(smoothed(labels, classes, smoothing), target(image_logits), tokens)


def mixed(target: Tensor, lam: float | Tensor) -> Tensor:
    """Targets of a batch that was mixed with itself in reverse order: ``lam * y + (1 - lam) * y reversed``."""
    return lam * target + (1 - lam) * target.flip(0)


def blended(image_target: Tensor, ground_truth: Tensor) -> Tensor:
    """Image labels with the annotation mixed in: (B, C), (B, C) -> (B, C).

    ``r * image_target + (1 - r) * ground_truth``, with r = 0.5 for pictures where both have the same best class and 0.9
    where not: the annotator counts for more where it disagrees. That is what was released and what trained the
    published models, though it reads as if the contrary were meant.
    """
    agree = image_target.argmax(-1, keepdim=True) == ground_truth.argmax(-1, keepdim=True)
    part = torch.where(agree, AGREED, DISAGREED).to(image_target.dtype)
    return part * image_target + (1 - part) * ground_truth


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over rows of ``-sum_c target_c * log softmax(logits)_c``: a scalar, float32 or wider.

    Args:
        logits: (..., C). Their first dimension may be m times that of the targets: the batch then stands m times in a
            row, and so do its targets.
        target: (..., C).
        weight: (...,) of the rows. The sum is divided by the number of rows and not by the sum of weights: a loss that
            depends neither on the batch nor on how it is spread over ranks.

    Raises:
        ValueError: shapes that do not fit.
    """
    if len(logits) != len(target) and len(logits) % len(target) == 0:
        times = len(logits) // len(target)
        target = target.repeat(times, *[1] * (target.ndim - 1))
        weight = weight if weight is None else weight.repeat(times, *[1] * (weight.ndim - 1))
    if logits.shape != target.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and soft targets {tuple(target.shape)} do not fit; the last number counts "
            "classes, the first samples: the label maps and the student must have the same classes and grid of tokens"
        )
    rows = -(at_least_float32(target) * F.log_softmax(at_least_float32(logits), -1)).sum(-1)
    return (rows if weight is None else rows * weight).mean()


def token_label_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    class_target: Tensor,
    token_target: Tensor | None = None,
    *,
    ground_truth: Tensor | None = None,
    lam: float | Tensor = 1.0,
    dense_weight: float = 0.5,
    class_weight: float = 1.0,
    token_weight: Tensor | None = None,
) -> TokenLabelTerms:
    """The loss of token labelling.

    Args:
        class_logits: (B, C) of the class token.
        token_logits: (B, N, C) of the patch tokens; what MixToken mixed is put back before (``mix_token.mix``).
        class_target: (B, C) soft labels of the views.
        token_target: (B, N, C) soft labels of the tokens; None, without label maps: every token gets ``class_target``.
        ground_truth: (B, C) annotations, mixed into the image labels as ``blended`` says; None, as in token labelling
            as published (VOLO's fine-tuning has it).
        lam: the part of its own picture that every sample kept under MixToken, realised on the grid
            (``mix_token.realised``), as number or scalar tensor; image labels are mixed with it, after the blending.
        dense_weight: 0.5, as in the paper and VOLO; TokenLabeling's own published commands train with 1.
        class_weight: 1.
        token_weight: (B, N) of the tokens, for instance ``PooledLabels.known``; None: 1.

    Every term is a mean over the batch, and the dense one over tokens too: it does not grow with N.
    """
    if token_target is None:
        token_target = class_target[:, None].expand(token_logits.shape)
    if ground_truth is not None:
        class_target = blended(class_target, ground_truth)
    return TokenLabelTerms(
        class_weight * soft_cross_entropy(class_logits, mixed(class_target, lam)),
        dense_weight * soft_cross_entropy(token_logits, token_target, token_weight),
    )


def _rest(scores: Tensor, classes: int, fill: Fill) -> Tensor | None:
    """(B, 1, H, W): the logit of the classes that were not stored; None: 0."""
    if fill not in ("auto", "zero", "min"):
        raise ValueError(f"fill must be 'auto', 'zero' or 'min', got {fill!r}")
    zero = fill == "zero" or (fill == "auto" and classes >= MANY_CLASSES)
    return None if zero else scores.amin(1, keepdim=True)


def _neighbours(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four cells around every place and their shares in it: int64 and float (B, T, 4, S)."""
    x, y = (points - 0.5).unbind(-1)  # from here on centres of cells are whole numbers
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    right, below = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    rows, columns = torch.stack([top, top, below, below], -2), torch.stack([left, right, left, right], -2)
    down, across = y - top, x - left
    shares = torch.stack(
        [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], -2
    )  # same order as the cells
    return (rows * width + columns).long(), shares
