"""DIST: distillation from a stronger teacher. Huang et al., arXiv:2205.10536, section 4."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import ClassLogits
from distillkit.distillers.classes import check_pictures, matched_logits
from distillkit.losses.relations import pearson


class DIST(Distiller):
    """Match how the teacher's probabilities go together, not their values.

        loss = T^2 * (beta * inter + gamma * intra)
        inter = mean over pictures of 1 - correlation of the C probabilities of a picture
        intra = mean over classes  of 1 - correlation of the B probabilities of a class

    with Pearson's correlation of student and teacher and p = softmax(logits / T).

    Args:
        beta, gamma: weights of the two relations.
        temperature: T >= 1; 1 by default in the release.
        weight, teacher, name: as in ``Distiller``.
        student_at, teacher_at: module paths of the logits, where they are not the output.

    Reads:
        ``ClassLogits.logits`` (B, C) of both. No targets, so mixed pictures are fine.

    The intra term relates the pictures of one batch: it depends on which pictures, and how many, are in the batch of a
    rank, and no sum over ranks restores the value of one large batch. The inter term is a mean over pictures.

    The defaults are the release's, T^2 included, which the listing in the paper's appendix leaves out (equal at T = 1).
    As there, 1e-8 is added to the product of the norms, so that a class next to no one of the batch is given weighs
    nothing; equal sides then give a little more than 0. The loss does not change with the scale of p's variation, so
    its gradient is large while the student's logits are all nearly equal (a head set to zeros): clip gradients there.

    Raises:
        ValueError: temperature below 1; weights below 0 or both 0; numbers of classes that differ; with beta fewer than
            3 classes, with gamma fewer than 3 pictures on a rank: two numbers always correlate by 1 or -1.
    """

    reads = ClassLogits
    short_name = "dist"

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight: float | Weight = 1.0,
        student_at: str | None = None,
        teacher_at: str | None = None,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        if min(beta, gamma) < 0 or beta == gamma == 0:
            raise ValueError(f"beta and gamma must be 0 or more and not both 0, got {beta} and {gamma}")
        self.beta, self.gamma, self.temperature = beta, gamma, temperature
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: ClassLogits, teacher: ClassLogits, targets: Any) -> Tensor:
        logits = matched_logits(student, teacher, fewest=3 if self.beta else 2)
        s, t = ((x / self.temperature).softmax(1) for x in logits)
        loss = s.new_zeros(())
        if self.beta:
            loss = loss + self.beta * (1 - pearson(s, t).mean())
        if self.gamma:
            check_pictures(len(s), "two always correlate by 1 or -1 (gamma=0 leaves the relation among pictures out)")
            loss = loss + self.gamma * (1 - pearson(s.T, t.T).mean())
        return loss * self.temperature**2
