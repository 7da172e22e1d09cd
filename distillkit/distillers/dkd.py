"""Decoupled knowledge distillation. Zhao et al., arXiv:2203.08679, section 3."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import ClassLogits
from distillkit.distillers.classes import hard_labels, matched_logits
from distillkit.losses.dkd import decoupled_kl


class DKD(Distiller):
    """Hinton's loss in two terms with weights of their own: the true class against all others, and the others alone.

        loss = mean over pictures of T^2 * (alpha * TCKD + beta * NCKD)

    TCKD is the KL divergence of (p_y, 1 - p_y), NCKD that of the softmax over the C - 1 classes that are not y. In
    ``LogitKD`` NCKD has the weight 1 - p_y of the teacher, next to nothing where the teacher is sure; here it is beta
    for every picture.

    Args:
        alpha, beta: weights of TCKD and NCKD. Released recipes have alpha = 1 and a beta for each pair: 2 to 8 on
            CIFAR-100, 0.5 for ResNet-34 and ResNet-18 on ImageNet.
        temperature: T >= 1; 4 in the released recipes for CIFAR-100, 1 for ImageNet.
        weight, teacher, name: as in ``Distiller``.
        student_at, teacher_at: module paths of the logits, where they are not the output.

    Reads:
        ``ClassLogits.logits`` (B, C) of both; targets (B,), the class of every picture.

    Default and release are the same, but for the first epochs: the release lets the weight grow over 20 of them on
    CIFAR-100 (1 on ImageNet), epoch by epoch; here ``weight=Weight(1.0, "warmup", steps=...)``, step by step. With two
    classes NCKD is 0.

    Raises:
        ValueError: temperature below 1; weights below 0 or both 0; soft targets (mixup, cutmix), which have no one true
            class; numbers of classes that differ, or one class.
    """

    reads = ClassLogits
    short_name = "dkd"
    reads_labels = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        weight: float | Weight = 1.0,
        student_at: str | None = None,
        teacher_at: str | None = None,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        if min(alpha, beta) < 0 or alpha == beta == 0:
            raise ValueError(f"alpha and beta must be 0 or more and not both 0, got {alpha} and {beta}")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: ClassLogits, teacher: ClassLogits, targets: Any) -> Tensor:
        s, t = matched_logits(student, teacher)
        target, non_target = decoupled_kl(s, t, hard_labels(targets, s), self.temperature)
        return (self.alpha * target + self.beta * non_target).mean()
