"""Distillation of class logits. Hinton et al., arXiv:1503.02531; on dense heads: Zheng et al., arXiv:2204.05957."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from distillkit.boxes.precision import at_least_float32
from distillkit.boxes.regions import AnchorWeight, Region, check_region
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import BoxTargets, ClassLogits, DenseDetections
from distillkit.distillers.dense import check_grids, mean_count, sum_of_level_means
from distillkit.losses.kl import kl_divergence, mean_kl_divergence


class LogitKD(Distiller):
    """Teach the student the teacher's class probabilities.

    Without a region it reads one row of logits a picture (Hinton et al., section 2):

        loss = T^2 * mean over pictures of KL(softmax(teacher / T) || softmax(student / T))

    With a region it reads the C logits of a dense head at the region's anchors (arXiv:2204.05957, as released):

        row_i = T^2 * mean over the C classes of p_t * (log p_t - log p_s)
        loss  = (sum_i w_i row_i) / (number of anchors, over all levels, mean over ranks)

    Args:
        region: None for a classifier; for a dense head which anchors take part, as in ``LD``.
        temperature: T >= 1.
        protocol: ``softmax`` across the classes, or ``sigmoid``: each class is its own yes/no question, as dense heads
            are trained; the binary cross entropy less the teacher's own entropy, so that 0 means equal.
        anchor_weight: w_i: ``one``, or the student's ``score``, or the ``iou`` of the anchor and its box.
        convention: ``default`` as above; ``release``: the mean of each level's anchors, summed over levels.
        dense, weight, teacher, name: as in ``LD``.
        student_at, teacher_at: module paths of a classifier's logits, where they are not its output.

    Reads:
        ``ClassLogits.logits`` (B, C), or ``DenseDetections.classes`` of both, (C,) logits an anchor.

    Where the default departs from the release: its mean per level lets one anchor alone on its level count as much as a
    hundred on another, and depends on how images are spread over ranks; one count over all levels does neither. The
    release's weight is 10, for the main region at T = 2. Over one class a softmax is constant and teaches nothing: the
    release trains on in silence, here it is an error.

    Raises:
        ValueError: temperature below 1; unknown words; a region that is none;
            numbers of classes that differ; softmax over one class.
    """

    short_name = "kd"

    def __init__(
        self,
        region: Region | None = None,
        temperature: float = 2.0,
        weight: float | Weight = 1.0,
        protocol: Literal["softmax", "sigmoid"] = "softmax",
        anchor_weight: AnchorWeight = "one",
        convention: Literal["default", "release"] = "default",
        dense: bool | None = None,
        student_at: str | None = None,
        teacher_at: str | None = None,
        teacher: str | None = None,
        name: str | None = None,
    ):
        if region is not None:
            check_region(region, anchor_weight)
        super().__init__(weight, teacher, name or (f"{self.short_name}_{region.name}" if region else self.short_name))
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        if protocol not in ("softmax", "sigmoid"):
            raise ValueError(f"protocol must be 'softmax' or 'sigmoid', got {protocol!r}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        if region is None and convention == "release":
            raise ValueError(
                "convention='release' speaks of a dense head's levels: give a region, or leave it out for a classifier"
            )
        self.reads = DenseDetections if region else ClassLogits
        self.region = region
        self.temperature = temperature
        self.protocol = protocol
        self.anchor_weight = anchor_weight
        self.convention = convention
        self.dense = dense
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: Any, teacher: Any, targets: Any) -> Tensor:
        if self.region is None:
            return self._pictures(student, teacher)
        return self._anchors(student, teacher, targets)

    def _pictures(self, student: ClassLogits, teacher: ClassLogits) -> Tensor:
        self._check_classes(student.logits.shape[-1], teacher.logits.shape[-1])
        if self.protocol == "softmax":
            return mean_kl_divergence(student.logits, teacher.logits, self.temperature)
        return self._rows(student.logits, teacher.logits, "sum").mean()

    def _anchors(self, student: DenseDetections, teacher: DenseDetections, targets: BoxTargets) -> Tensor:
        self._check_classes(student.classes.shape[0], teacher.classes.shape[0])
        check_grids(student, teacher)
        assert self.region is not None
        where, weight = self.region(student, targets, self.anchor_weight, self.dense)
        rows = self._rows(student.classes.at(where), teacher.classes.at(where), "mean")  # (M,)
        if self.convention == "release":
            return sum_of_level_means(rows, weight, where, student.classes)
        return (weight * rows).sum() / mean_count(weight > 0)

    def _rows(self, student: Tensor, teacher: Tensor, over_classes: Literal["mean", "sum"]) -> Tensor:
        """(M, C) logits -> (M,)."""
        if self.protocol == "softmax":
            return kl_divergence(student, teacher, self.temperature, over_classes)
        per_class = binary_divergence(student, teacher, self.temperature)
        return per_class.mean(-1) if over_classes == "mean" else per_class.sum(-1)

    def _check_classes(self, student: int, teacher: int) -> None:
        if student != teacher:
            raise ValueError(
                f"the student has {student} classes, the teacher {teacher}; both need the same classes in the same "
                "order: build them with the same num_classes="
            )
        if student == 1 and self.protocol == "softmax":
            raise ValueError("a softmax over one class is constant and teaches nothing; use protocol='sigmoid'")


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL between the Bernoulli distributions sigmoid(logits / T), entry by entry, at least in float32.

    Same shape as the logits; no gradient reaches the teacher. Gradient: T * (sigmoid(student / T) - sigmoid(teacher /
    T)).
    """
    s, t = at_least_float32(student) / temperature, at_least_float32(teacher.detach()) / temperature
    target = t.sigmoid()
    cross = binary_cross_entropy_with_logits(s, target, reduction="none")
    return (cross - binary_cross_entropy_with_logits(t, target, reduction="none")) * temperature**2
