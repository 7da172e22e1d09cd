"""Channel-wise knowledge distillation (CWD). Shu et al., arXiv:2011.13256, section 3.2."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.boxes.precision import at_least_float32
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import Features, PixelLogits
from distillkit.distillers.feature_imitation import check_numbers, project, sum_of
from distillkit.losses.pixels import channel_divergence

#: the paper's weights, of logits and of features
LOGITS_WEIGHT, FEATURES_WEIGHT = 3.0, 50.0


class ChannelKD(Distiller):
    """Teach the student where in the picture each of the teacher's channels is strong.

        loss = T^2 * mean over pictures and channels of KL(softmax(teacher / T) || softmax(student / T)),

    each softmax over the H * W places of one channel (equations 3 and 4). Of several maps the losses are added up.

    Args:
        student_at, teacher_at: module paths of feature maps on either side, in the same order; neither: the logits of
            the two models.
        temperature: T >= 1.
        weight: None: the paper's, 3 on logits and 50 on features.
        teacher, name: as in ``Distiller``.

    Reads:
        ``PixelLogits`` of both, (B, C, H, W); with paths ``Features`` of both, (B, C, H, W) maps.

    Where the widths of features differ, a 1x1 projection of the student's is made by ``prepare`` and trained along.
    Where maps differ in height or width, the teacher's are resized to the student's (bilinear, corners not aligned).
    Paper and release agree, so that there is no ``convention``: the release divides the sum by pictures and channels.
    A constant added to a channel changes nothing.

    Raises:
        ValueError: temperature below 1; a path for one side alone; maps that differ in number or, without projection,
            width; that are no maps, or of one place.
    """

    short_name = "channel_kd"

    def __init__(
        self,
        student_at: str | list[str] | None = None,
        teacher_at: str | list[str] | None = None,
        temperature: float = 4.0,
        weight: float | Weight | None = None,
        teacher: str | None = None,
        name: str | None = None,
    ):
        if (student_at is None) != (teacher_at is None):
            raise ValueError(
                f"student_at is {student_at!r} and teacher_at {teacher_at!r}: name feature maps of both models, or of "
                "neither to compare their logits"
            )
        if weight is None:
            weight = LOGITS_WEIGHT if student_at is None else FEATURES_WEIGHT
        super().__init__(weight, teacher, name)
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        self.reads = PixelLogits if student_at is None else Features
        self.temperature = temperature
        self.student_at, self.teacher_at = student_at, teacher_at
        self.projections = nn.ModuleList()

    def prepare(self, student_widths: list[int] | None, teacher_widths: list[int] | None) -> None:
        """Make a projection for every map whose width differs on the two sides."""
        if student_widths is None or teacher_widths is None:
            return
        check_numbers(len(student_widths), len(teacher_widths))
        self.projections = nn.ModuleList(
            nn.Linear(s, t) if s != t else nn.Identity() for s, t in zip(student_widths, teacher_widths, strict=True)
        )

    def forward(self, student: Any, teacher: Any, targets: Any) -> Tensor:
        if isinstance(student, PixelLogits):
            return self._of_map(student.logits, teacher.match(student).logits, 0)
        check_numbers(len(student.maps), len(teacher.maps))
        return sum_of(
            self._of_map(project(s, self.projections[i]) if len(self.projections) else s, t, i)
            for i, (s, t) in enumerate(zip(student.maps, teacher.maps))
        )

    def _of_map(self, student: Tensor, teacher: Tensor, i: int) -> Tensor:
        if student.dim() != 4 or teacher.dim() != 4 or student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"map {i} is {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the teacher, expected "
                "(B, C, H, W) of as many channels. Channels are matched by a projection where their numbers are known "
                "before the first step: name convolutions or linear layers in student_at and teacher_at"
            )
        size = student.shape[2:]
        if size.numel() == 1:
            raise ValueError(f"map {i} has one place, over which a softmax is constant: name a layer before pooling")
        teacher = at_least_float32(teacher.detach())
        if teacher.shape[2:] != size:
            teacher = F.interpolate(teacher, size=size, mode="bilinear", align_corners=False)
        return channel_divergence(student, teacher, self.temperature).mean()
