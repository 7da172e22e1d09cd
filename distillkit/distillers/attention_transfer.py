"""Attention transfer. Zagoruyko and Komodakis, arXiv:1612.03928, section 3.1."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from distillkit.boxes.precision import at_least_float32
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import Features


class AttentionTransfer(Distiller):
    """Make the student look where the teacher looks.

        loss = sum over maps of mean over pictures of |Q_s / |Q_s| - Q_t / |Q_t||                       (equation 2)

    Q is a picture's attention, (H * W,): the mean over channels of |map|^p. All norms are Euclidean.

    Args:
        student_at, teacher_at: module paths of the maps on either side, in the same order, such as the ends of the
            stages.
        p: the larger, the more the strongest channels count; at least 1.
        convention: ``default``: the paper's norm; ``release``: its code's mean, over pictures and places, of the
            squared differences, to be used with ``weight=1000``, its beta.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``Features`` of both: (B, C, H, W) maps or (B, N, C) tokens; C may differ.

    Where maps differ in height or width, the teacher's attention is averaged over the student's cells (adaptive average
    pooling) before it is normalised; the paper says that it can be interpolated, and not how. Tokens of differing
    number are an error: which are pictures' places and which are class tokens, they do not say.

    The paper's factor beta / 2 is ``weight``. The two conventions are different losses, not one at two scales: the
    gradient of the norm keeps its size until the two agree, that of the square fades, and of maps with more places the
    release's is smaller.

    Raises:
        ValueError: p below 1; an unknown convention; maps that differ in number, kind or, as tokens, in length.
    """

    reads = Features
    short_name = "attention"

    def __init__(
        self,
        student_at: str | list[str],
        teacher_at: str | list[str],
        weight: float | Weight = 1.0,
        p: float = 2.0,
        convention: Literal["default", "release"] = "default",
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if p < 1:
            raise ValueError(f"p must be at least 1, got {p}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        self.p, self.convention = p, convention
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: Features, teacher: Features, targets: Any) -> Tensor:
        maps = zip(student.maps, teacher.match(student).maps, strict=True)
        first, *rest = [self._of_map(s, t.detach(), i) for i, (s, t) in enumerate(maps)]
        return sum(rest, first)

    def _of_map(self, student: Tensor, teacher: Tensor, i: int) -> Tensor:
        s, t = attention(student, self.p), attention(teacher, self.p)
        if s.dim() == t.dim() == 3:
            t = F.adaptive_avg_pool2d(t, (s.shape[1], s.shape[2]))
        if s.shape != t.shape:
            raise ValueError(
                f"map {i} is {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the teacher: name "
                "maps (B, C, H, W) on both sides, or as many tokens (B, N, C)"
            )
        difference = F.normalize(s.flatten(1), dim=1) - F.normalize(t.flatten(1), dim=1)
        if self.convention == "release":
            return difference.square().mean()
        return vector_norm(difference, dim=1).mean()


def attention(x: Tensor, p: float) -> Tensor:
    """Mean over channels of |x|^p, at least in float32: (B, C, H, W) -> (B, H, W), or tokens (B, N, C) -> (B, N)."""
    if x.dim() not in (3, 4):
        raise ValueError(
            f"attention needs maps (B, C, H, W) or tokens (B, N, C), got {tuple(x.shape)}: name a layer before pooling"
        )
    return at_least_float32(x).abs().pow(p).mean(1 if x.dim() == 4 else 2)
