"""Hard distillation, and the distillation token of DeiT. Touvron et al., arXiv:2012.12877, equation 3."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import ClassLogits
from distillkit.distillers.classes import matched_logits


class HardToken(Distiller):
    """Let the student name the class that the teacher names.

        loss = mean over pictures of cross_entropy(student, argmax(teacher))

    Args:
        student_at: the head that learns it: a distillation token's, so that the class token's keeps the labels; None:
            the student's output.
        teacher_at: module path of the teacher's logits, where they are not its output.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``ClassLogits.logits`` (B, C) of both. No targets, so mixed pictures are fine.

    timm's ``deit_*_distilled_*`` models return the mean of both heads, in train mode too, until they are told to train
    with distillation; only then a pair (class token's logits, distillation token's). Left untold, the task loss would
    teach the labels to both heads:

        student.set_distilled_training(True)
        model = wrap(student, teacher, [HardToken(student_at="head_dist")], lambda out, y: cross_entropy(out[0], y))

    In eval mode they return the mean in either case. As a teacher such a model is read in eval mode.

    The paper halves both losses. With weights of 1 their shares are the same and their sum is twice as large: nothing
    to AdamW, the learning rate to SGD. Default and release are the same otherwise. Equal sides do not give 0 but the
    student's own uncertainty.

    Raises:
        ValueError: numbers of classes that differ, or one class.
    """

    reads = ClassLogits
    short_name = "hard_token"

    def __init__(
        self,
        student_at: str | None = None,
        weight: float | Weight = 1.0,
        teacher_at: str | None = None,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: ClassLogits, teacher: ClassLogits, targets: Any) -> Tensor:
        s, t = matched_logits(student, teacher)
        return F.cross_entropy(s, t.argmax(1))
