"""Transfer between encoders of text: hidden states (TinyBERT, Jiao et al., arXiv:1909.10351, equation 8) and attention
(MiniLM, Wang et al., arXiv:2002.10957, equation 4). Padding takes no part in either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.boxes.precision import at_least_float32
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import Features
from distillkit.distillers.feature_imitation import check_numbers, project, sum_of

Paths = str | list[str]


class HiddenStates(Distiller):
    """Make hidden states of the student equal those of the teacher, after a linear projection where widths differ.

        loss = sum over pairs of layers of mean over (real tokens, channels) of (P student - teacher)^2

    Args:
        student_at, teacher_at: module paths of layers on either side, in the same order, as in
            ["lvbert.layers.3", "lvbert.layers.7"]: as many of one as of the other, whatever the depths are.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``Features`` of both, (B, T, D); of the targets ``attention_mask`` (B, T), where the call has one.

    Raises ValueError: layers that differ in number, or texts in length: student and teacher need one vocabulary.
    """

    reads = Features
    short_name = "hidden"

    def __init__(
        self,
        student_at: Paths,
        teacher_at: Paths,
        weight: float | Weight = 1.0,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        self.student_at, self.teacher_at = student_at, teacher_at
        self.projections = nn.ModuleList()

    def prepare(self, student_widths: list[int] | None, teacher_widths: list[int] | None) -> None:
        if student_widths is None or teacher_widths is None:
            return
        check_numbers(len(student_widths), len(teacher_widths))
        self.projections = nn.ModuleList(
            nn.Linear(s, t) if s != t else nn.Identity() for s, t in zip(student_widths, teacher_widths, strict=True)
        )

    def forward(self, student: Features, teacher: Features, targets: Any) -> Tensor:
        check_numbers(len(student.maps), len(teacher.maps))
        pairs = enumerate(zip(student.maps, teacher.maps, strict=True))
        return sum_of(self._of_layer(i, s, t.detach(), targets) for i, (s, t) in pairs)

    def _of_layer(self, i: int, student: Tensor, teacher: Tensor, targets: Any) -> Tensor:
        student = project(student, self.projections[i]) if len(self.projections) else student
        if student.shape != teacher.shape or student.dim() != 3:
            raise ValueError(
                f"hidden states {i} are {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the "
                "teacher: expected (texts, tokens, width) of both; name layers, and use one vocabulary for both"
            )
        each = (at_least_float32(student) - at_least_float32(teacher)).square().mean(-1)
        return mean_of_real(each, targets)


class AttentionMaps(Distiller):
    """Make tokens of the student look where they look in the teacher.

        loss = sum over pairs of layers of mean over (real tokens, heads) of KL(teacher's weights || student's)

    Args:
        student_at, teacher_at: module paths of attention weights, (B, heads, T, T), of models with
            ``attn_implementation="eager"``: "lvbert.layers.2.attention[1]", "bert.encoder.layer.0.attention.self[1]".
        heads: ``mean``: over the heads of either side, whose numbers may then differ; ``each``: head by head, as in
            MiniLM.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``Features`` of both; of the targets ``attention_mask`` (B, T), where the call has one.

    Raises ValueError: an unknown word; maps that differ in number, in length or, with ``each``, in heads.
    """

    reads = Features
    short_name = "attention_maps"

    def __init__(
        self,
        student_at: Paths,
        teacher_at: Paths,
        heads: str = "mean",
        weight: float | Weight = 1.0,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if heads not in ("mean", "each"):
            raise ValueError(f"heads must be 'mean' or 'each', got {heads!r}")
        self.student_at, self.teacher_at, self.heads = student_at, teacher_at, heads

    def forward(self, student: Features, teacher: Features, targets: Any) -> Tensor:
        check_numbers(len(student.maps), len(teacher.maps))
        pairs = enumerate(zip(student.maps, teacher.maps, strict=True))
        return sum_of(self._of_layer(i, s, t.detach(), targets) for i, (s, t) in pairs)

    def _of_layer(self, i: int, student: Tensor, teacher: Tensor, targets: Any) -> Tensor:
        s, t = at_least_float32(student), at_least_float32(teacher)
        if self.heads == "mean" and s.dim() == t.dim() == 4:
            s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
        if s.shape != t.shape or s.dim() != 4:
            raise ValueError(
                f"attention maps {i} are {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the "
                "teacher: expected (texts, heads, tokens, tokens), of one length and, with heads='each', as many heads"
            )
        tiny = torch.finfo(s.dtype).tiny
        rows = (torch.special.xlogy(t, t) - t * s.clamp(min=tiny).log()).sum(-1).mean(1)  # (B, T)
        return mean_of_real(rows, targets)


def mean_of_real(each: Tensor, targets: Any) -> Tensor:
    """The mean of (B, T) over the tokens that ``attention_mask`` of the targets keeps; over all where there is none."""
    mask = targets.get("attention_mask") if isinstance(targets, Mapping) else None
    if mask is None:
        return each.mean()
    kept = mask.to(each.dtype)
    return (each * kept).sum() / kept.sum().clamp(min=1)
