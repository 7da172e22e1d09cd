"""Kullback-Leibler divergence at a temperature. Hinton et al., arXiv:1503.02531; LD: Zheng et al., arXiv:2204.05957."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32


def kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, bin_reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """``T^2 * KL(softmax(teacher/T) || softmax(student/T))`` of every row.

    The gradient with respect to a student row is ``T * (softmax(student/T) - softmax(teacher/T))``, divided by K under
    "mean". Half precision is lifted to float32: at T = 10 the differences are of the order of 1e-3.

    Args:
        student: logits (..., K).
        teacher: logits (..., K); no gradient flows into them.
        temperature: T >= 1.
        bin_reduction: "mean" divides by K, as the release of LD does (its weights assume it); "sum" is the divergence
            of the textbook, K times as large.

    Returns:
        (...,) in float32 or wider.

    Raises:
        ValueError: shapes that differ, a temperature below 1, an unknown reduction.
    """
    _check(student, teacher, temperature)
    if bin_reduction not in ("mean", "sum"):
        raise ValueError(f"bin_reduction must be 'mean' or 'sum', got {bin_reduction!r}")
    log_student, target = _distributions(student, teacher, temperature)
    # kl_div takes 0 * log 0 as 0, which bins that underflowed need
    rows = F.kl_div(log_student, target, reduction="none").sum(-1) * temperature**2
    return rows / student.shape[-1] if bin_reduction == "mean" else rows


def mean_kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean of ``kl_divergence`` over the rows, summed over classes: a scalar, in as few operations as there are.

    Args, and errors: as ``kl_divergence``.
    """
    _check(student, teacher, temperature)
    log_student, target = _distributions(student, teacher, temperature)
    rows = student.numel() // student.shape[-1]
    return F.kl_div(log_student, target, reduction="sum") * (temperature**2 / rows)


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; the last number counts bins or classes: use models that agree, or resample one"
        )
    if temperature < 1:
        raise ValueError(f"temperature must be at least 1, got {temperature}")


def _distributions(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logarithms of the student's, and the teacher's."""
    log_student = F.log_softmax(at_least_float32(student) / temperature, -1)
    return log_student, F.softmax(at_least_float32(teacher.detach()) / temperature, -1)
