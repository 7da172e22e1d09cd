"""Divergence of class probabilities, taken apart at the true class. Zhao et al., arXiv:2203.08679, section 3."""

import torch
from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.losses.kl import kl_divergence


def decoupled_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of every row: how far the two are apart on the true class, and on the order of all others; times T^2.

        target     = T^2 * KL between (p_y, 1 - p_y) of teacher and student
        non_target = T^2 * KL between the softmaxes over the C - 1 other classes

    with p = softmax(logits / T) and y the label. Taken together, KL = target + (1 - p_y of the teacher) * non_target.

    Args:
        student, teacher: logits (B, C), C >= 2; no gradient flows into the teacher's.
        labels: (B,) integers 0..C-1.
        temperature: T >= 1.

    Returns:
        target and non_target, (B,) each, in float32 or wider. Nothing waits for the device.
    """
    student_pair, student_others = _apart(student, labels, temperature)
    teacher_pair, teacher_others = _apart(teacher.detach(), labels, temperature)
    target = kl_divergence(student_pair, teacher_pair, temperature, "sum")
    return target, kl_divergence(student_others, teacher_others, temperature, "sum")


def _apart(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, C) -> logits of the true class and of all others as one (B, 2), and of the others by themselves (B, C-1)."""
    logits, labels = at_least_float32(logits), labels.long()[:, None]
    index = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, index + (index >= labels))  # the indices, with a gap at the label
    together = temperature * (others / temperature).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, labels), together], 1), others
