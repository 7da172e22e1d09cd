"""The view of detectors with queries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.core.views.base import View, columns_of, other_classes
from distillkit.losses.queries import partners


@dataclass(frozen=True)
class QueryDetections(View):
    """What a detector with queries (DETR and its like) says of every query, after its last decoder layer.

    Args:
        logits: (B, Q, C); where ``exclusive`` (B, Q, C + 1), the last of "no object".
        boxes: (B, Q, 4) cx, cy, w, h in shares of the picture.
        exclusive: classes exclude each other, as under a softmax (DETR); else each is its own yes or no (RT-DETR).
        edges: logits (B, Q, 4, K) of where each edge is, one tensor a decoder layer, the last the last layer's; None
            for heads without distributions (D-FINE has them).
        reference: (B, Q, 4) the boxes that the edges are told from; with ``edges``.
        support: (K,) what each bin means, in sides of the reference box, outwards; with ``edges``.
        paired: (B, Q) bool, of a teacher's that was matched: which of the student's queries it has something to say to;
            None: all.
    """

    logits: Tensor
    boxes: Tensor
    exclusive: bool
    edges: tuple[Tensor, ...] | None = None
    reference: Tensor | None = None
    support: Tensor | None = None
    paired: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """(B, Q, C) probability of each class, at least in float32."""
        logits = at_least_float32(self.logits)
        return logits.softmax(-1)[..., :-1] if self.exclusive else logits.sigmoid()

    @property
    def confidence(self) -> Tensor:
        """(B, Q) probability of the most probable class, without gradient; 0 for queries that are not ``paired``."""
        best = self.scores.detach().amax(-1)
        return best if self.paired is None else best * self.paired

    def picked(self, columns: Tensor, names: int) -> Self:
        """The logit of "no object" stays where it is."""
        logits = columns_of(self.logits[..., : self.logits.shape[-1] - self.exclusive], columns, names)
        if self.exclusive:
            logits = torch.cat([logits, self.logits[..., -1:]], -1)
        return replace(self, logits=logits)

    def match(self, student: QueryDetections) -> QueryDetections:
        """The teacher's queries in the order of the student's that they belong to, see ``losses.queries.partners``."""
        mine, theirs = student.scores, self.scores
        if mine.shape[-1] != theirs.shape[-1]:
            raise other_classes(theirs.shape[-1], mine.shape[-1])
        index = partners(mine, student.boxes, theirs, self.boxes)
        at = index.clamp(min=0)
        return replace(
            self,
            logits=_rows(self.logits, at),
            boxes=_rows(self.boxes, at),
            edges=self.edges and tuple(_rows(layer, at) for layer in self.edges),
            reference=None if self.reference is None else _rows(self.reference, at),
            paired=index >= 0,
        )


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows (B, Q) of a (B, R, ...) tensor: (B, Q, ...)."""
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], index]
