"""Relational knowledge distillation (RKD). Park et al., arXiv:1904.05068."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import Features
from distillkit.distillers.classes import check_pictures
from distillkit.losses.relations import angles, relative_distances


class RelationalKD(Distiller):
    """Match how the pictures of a batch lie to each other, by their distances and by their angles.

        loss = distance_weight * mean over pairs    of huber(d_s, d_t)                               (section 3.2.1)
             + angle_weight    * mean over triplets of huber(a_s, a_t)                               (section 3.2.2)

    d: the distance of two pictures' embeddings over the mean of all pairs' distances; a: the cosine of the angle at one
    picture between two others. Pairs and triplets are of different pictures.

    Args:
        student_at, teacher_at: module paths of the embeddings, on either side.
        distance_weight, angle_weight: as in the released training of classifiers (of embeddings for retrieval: 1 and
            2); a term of weight 0 is not computed.
        normalize: bring embeddings to unit length first, as the released training of classifiers does on both sides.
        convention: ``default`` as above; ``release``: means over all B^2 pairs and B^3 triplets, those of a picture
            with itself included: (B-1)/B and (B-1)(B-2)/B^2 of the default.
        weight, teacher, name: as in ``Distiller``.

    Reads:
        ``Features`` of both: embeddings (B, D), or (B, C, H, W) maps, of which the mean over places is taken. D may
        differ. The losses of several are added up.

    The loss is of the pairs and triplets in one batch: it depends on which pictures, and how many, are in the batch of
    a rank, and no sum over ranks restores the value of one large batch. It keeps B^2 * D and B^3 numbers.

    The paper sums over pairs and triplets and leaves embeddings as they are; the release, whose weights these are,
    takes means. Of embeddings that coincide an angle is 0 and has no gradient; the release divides by 1e-12.

    Raises:
        ValueError: an unknown convention; weights below 0 or both 0; tokens (B, N, C); embeddings that differ in
            number; fewer than 3 pictures on a rank: two are always as far apart as pictures are on average.
    """

    reads = Features
    short_name = "rkd"

    def __init__(
        self,
        student_at: str | list[str],
        teacher_at: str | list[str],
        weight: float | Weight = 1.0,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        normalize: bool = False,
        convention: Literal["default", "release"] = "default",
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if min(distance_weight, angle_weight) < 0 or distance_weight == angle_weight == 0:
            raise ValueError(
                "distance_weight and angle_weight must be 0 or more and not both 0, got "
                f"{distance_weight} and {angle_weight}"
            )
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.normalize, self.convention = normalize, convention
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: Features, teacher: Features, targets: Any) -> Tensor:
        maps = zip(student.maps, teacher.match(student).maps, strict=True)
        first, *rest = [self._of_embeddings(self._embedding(s), self._embedding(t.detach())) for s, t in maps]
        return sum(rest, first)

    def _embedding(self, x: Tensor) -> Tensor:
        x = at_least_float32(embedding(x))
        return F.normalize(x, dim=1) if self.normalize else x

    def _of_embeddings(self, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) != len(teacher):
            raise ValueError(f"{len(student)} embeddings of the student, {len(teacher)} of the teacher")
        check_pictures(len(student), "two are always as far apart as pictures are on average")
        loss = student.new_zeros(())
        if self.distance_weight:
            loss = loss + self.distance_weight * self._distances(student, teacher)
        if self.angle_weight:
            loss = loss + self.angle_weight * self._angles(student, teacher)
        return loss

    def _distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        huber = F.smooth_l1_loss(relative_distances(student), relative_distances(teacher), reduction="none")
        return huber.mean() if self.convention == "release" else huber.sum() / (n * (n - 1))

    def _angles(self, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        huber = F.smooth_l1_loss(angles(student), angles(teacher), reduction="none")
        if self.convention == "release":
            return huber.mean()
        different = ~torch.eye(n, dtype=torch.bool, device=huber.device)  # i and k; where one of them is j it is 0
        return (huber * different).sum() / (n * (n - 1) * (n - 2))


def embedding(x: Tensor) -> Tensor:
    """(B, D) as it is; of a map (B, C, H, W) the mean over places."""
    if x.dim() == 4:
        return x.mean((2, 3))
    if x.dim() != 2:
        raise ValueError(
            f"relations are of embeddings (B, D) or maps (B, C, H, W), got {tuple(x.shape)}; of a transformer name a "
            "layer behind its pooling, as in student_at='fc_norm'"
        )
    return x
