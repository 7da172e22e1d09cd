"""Distillation of detectors with queries: DETR, RT-DETR, D-FINE and their like.

DETRDistill: Chang et al., ICCV 2023 (arXiv:2211.10156), matches the teacher's queries with the student's.
KD-DETR: Wang et al., CVPR 2024 (arXiv:2211.08071), weights each by the teacher's confidence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.boxes.queries import moved_around
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import QueryDetections
from distillkit.distillers.logit_kd import binary_divergence
from distillkit.losses.kl import kl_divergence
from distillkit.losses.queries import COSTS, box_distances
from distillkit.losses.reduce import mean_over_ranks


class QueryKD(Distiller):
    """Teach the student's queries what the teacher's say: the class, and the box.

        row_q = classes * KL_q + l1 * |b_s - b_t|_1 + giou * (1 - GIoU(b_s, b_t))
        loss  = (sum over queries of w_q row_q) / (sum of w_q, mean over ranks)

    Each teacher's query q speaks to the one student's query that it is matched with (Hungarian matching of class and
    boxes, ``losses.queries.partners``). w_q is the teacher's confidence, the probability of its most probable class.
    KL_q is over the classes and "no object" where they exclude each other (DETR), else the sum over classes of the KL
    between two yes/no questions (RT-DETR, D-FINE), at temperature T and times T^2.

    Args:
        temperature: T >= 1.
        classes, l1, giou: how much each part counts; those of DETR's own loss unless given. ``classes=0``: boxes alone.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``QueryDetections`` of both, after the last decoder layer; numbers of queries may differ.

    Where it departs from the papers: DETRDistill matches the teacher's sure and unsure queries apart, and stage by
    stage; here one matching weighs them by confidence, as KD-DETR's loss does. KD-DETR needs no matching, as it feeds
    the teacher's queries to both models, which changes the student's forward.

    The matching waits for the device once a step, and cannot be part of a compiled graph.

    Raises:
        ValueError: a temperature below 1, a negative factor, nothing that counts; numbers of classes that differ;
            classes that exclude each other on one side alone.
    """

    reads = QueryDetections
    short_name = "query_kd"

    def __init__(
        self,
        temperature: float = 1.0,
        weight: float | Weight = 1.0,
        classes: float = COSTS[0],
        l1: float = COSTS[1],
        giou: float = COSTS[2],
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        _check_temperature(temperature)
        if min(classes, l1, giou) < 0 or classes == l1 == giou == 0:
            raise ValueError(
                f"classes, l1 and giou must be at least 0, and not all 0, got {classes}, {l1} and {giou}: to turn a "
                "distiller off, leave it out"
            )
        self.temperature = temperature
        self.classes, self.l1, self.giou = classes, l1, giou

    def forward(self, student: QueryDetections, teacher: QueryDetections, targets: Any) -> Tensor:
        l1, giou = box_distances(student.boxes, teacher.boxes.detach())
        rows = self.l1 * l1 + self.giou * giou
        if self.classes:
            rows = rows + self.classes * self._of_classes(student, teacher)
        return confident_mean(rows, teacher)

    def _of_classes(self, student: QueryDetections, teacher: QueryDetections) -> Tensor:
        """(B, Q)."""
        if student.exclusive != teacher.exclusive:
            which = ("student", "teacher") if student.exclusive else ("teacher", "student")
            raise ValueError(
                f"the classes of the {which[0]} exclude each other (a softmax with 'no object'), those of the "
                f"{which[1]} do not (sigmoids), so that their logits cannot be compared: use classes=0, which learns "
                "the boxes alone"
            )
        if student.exclusive:
            return kl_divergence(student.logits, teacher.logits, self.temperature, "sum")
        return binary_divergence(student.logits, teacher.logits, self.temperature).sum(-1)


class QueryLD(Distiller):
    """Localization distillation for queries: teach every decoder layer the teacher's distribution over each edge.

        row_lq = T^2 * mean over the 4 edges e of within_qe * KL(p_t || p_lq)
        loss   = mean over decoder layers l of (sum over queries of w_q row_lq) / (sum of w_q, mean over ranks)

    p_lq is the student's distribution in layer l, p_t that of the teacher's last layer, both softmax(logits / T), of
    the query that it is matched with; w_q as in ``QueryKD``. Layers of D-FINE tell an edge's place from a box of their
    own query's: the teacher's mass is moved to where it lies as seen from the student's box
    (``boxes.queries.moved_around``). within_qe is 0 for edges that the teacher expects further off than the student has
    bins for, as of the few queries at the start that lie apart: there it would learn to say "as far as I can".

    Within one model D-FINE does the same to its earlier layers, from its last (Peng et al., arXiv:2410.13842); LD
    between two models is Zheng et al., arXiv:2102.12252.

    Args:
        temperature: T >= 1.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``QueryDetections`` of both, with ``edges``.

    The matching waits for the device once a step, and cannot be part of a compiled graph.

    Raises:
        ValueError: a temperature below 1; a model without distributions; numbers of classes that differ.
    """

    reads = QueryDetections
    short_name = "query_ld"

    def __init__(
        self,
        temperature: float = 5.0,
        weight: float | Weight = 1.0,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: QueryDetections, teacher: QueryDetections, targets: Any) -> Tensor:
        for role, view in (("student", student), ("teacher", teacher)):
            if view.edges is None:
                raise ValueError(
                    f"the {role}'s queries have boxes and no distributions over their edges, which D-FINE has: use "
                    "QueryKD, which learns the boxes"
                )
        assert student.edges is not None
        wanted, within = self._seen_from(student, teacher)
        layers = [self._rows(edges, wanted, within) for edges in student.edges]
        return confident_mean(torch.stack(layers).mean(0), teacher)

    def _seen_from(self, student: QueryDetections, teacher: QueryDetections) -> tuple[Tensor, Tensor]:
        """The teacher's distributions (B, Q, 4, K) as they are from the student's reference boxes; (B, Q, 4) bool."""
        assert teacher.edges is not None
        assert teacher.reference is not None
        assert teacher.support is not None
        assert student.reference is not None
        assert student.support is not None
        mass = F.softmax(at_least_float32(teacher.edges[-1].detach()) / self.temperature, -1)
        return moved_around(
            mass,
            teacher.support.to(mass),
            teacher.reference.detach().to(mass),
            student.support.to(mass),
            student.reference.detach().to(mass),
        )

    def _rows(self, edges: Tensor, wanted: Tensor, within: Tensor) -> Tensor:
        """(B, Q)."""
        log = F.log_softmax(at_least_float32(edges) / self.temperature, -1)
        divergence = F.kl_div(log, wanted, reduction="none").sum(-1)
        return (within * divergence).mean(-1) * self.temperature**2


def confident_mean(rows: Tensor, teacher: QueryDetections) -> Tensor:
    """Mean of (B, Q) rows, weighted by the teacher's confidence; 0 where it has none."""
    weight = teacher.confidence
    return (weight * rows).sum() / mean_over_ranks(weight.sum()).clamp(min=1e-6)


def _check_temperature(temperature: float) -> None:
    if temperature < 1:
        raise ValueError(f"temperature must be at least 1, got {temperature}")
