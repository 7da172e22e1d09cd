"""Pair-wise distillation: structured knowledge distillation (SKD). Liu et al., arXiv:1903.04197, section 3.1."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import Features
from distillkit.distillers.feature_imitation import sum_of
from distillkit.losses.pixels import similarities


class PairwiseKD(Distiller):
    """Match how alike the places of a picture are to each other.

        loss = mean over pictures and pairs of nodes (i, j) of (a_s - a_t)^2,    a = cosine of node i and node j

    A node is a patch of the map, its features pooled; pairs are all N^2, those of a node with itself, which cost 0,
    included. Of several maps the losses are added up.

    Args:
        student_at, teacher_at: module paths of the maps on either side, in the same order.
        pool_scale: the side of a patch as a share of the map's, in 0..1: 0.5, the release's, makes 2 x 2 nodes; small
            ones see more, and cost the square of their number. As many nodes as fit, at most one a place.
        pool: ``average`` (the paper) or ``max`` (the release) over a patch; None: ``average``, and ``max`` with
            ``convention="release"``.
        convention: ``default``, or ``release``: see below.
        weight: the release's is 1.
        teacher, name: as in ``Distiller``.

    Reads:
        ``Features`` of both: (B, C, H, W) maps. C may differ, and so may H and W.

    Default and release. The release holds the lengths of nodes, which the cosine divides by, constant in the gradient,
    so that a step may change lengths for nothing; the default takes the gradient of the cosine itself. The release's
    patches have sides of ``floor(pool_scale * side)``, and where that leaves a rest one more patch of the rest: 65
    places make 3 nodes, the last of one place. The default divides both maps evenly into as many nodes.

    Raises:
        ValueError: pool_scale not above 0 and at most 1; unknown words; maps that differ in number, are none, or with
            ``convention="release"`` make other numbers of nodes; a single node, of which there are no pairs.
    """

    reads = Features
    short_name = "pairwise_kd"

    def __init__(
        self,
        student_at: str | list[str],
        teacher_at: str | list[str],
        weight: float | Weight = 1.0,
        pool_scale: float = 0.5,
        pool: Literal["average", "max"] | None = None,
        convention: Literal["default", "release"] = "default",
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if not 0 < pool_scale <= 1:
            raise ValueError(f"pool_scale must be above 0 and at most 1, got {pool_scale}")
        if pool not in ("average", "max", None):
            raise ValueError(f"pool must be 'average', 'max' or None, got {pool!r}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        self.release = convention == "release"
        self.pool_scale = pool_scale
        self.pool = pool or ("max" if self.release else "average")
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: Features, teacher: Features, targets: Any) -> Tensor:
        maps = zip(student.maps, teacher.match(student).maps, strict=True)
        return sum_of(self._of_map(s, t.detach(), i) for i, (s, t) in enumerate(maps))

    def _of_map(self, student: Tensor, teacher: Tensor, i: int) -> Tensor:
        shapes = f"map {i} is {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the teacher"
        if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
            raise ValueError(f"{shapes}, expected (B, C, H, W) of the same pictures: name layers before pooling")
        s, t = self._nodes(student, teacher)
        if s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"{shapes}: they make {s.shape[2]} x {s.shape[3]} and {t.shape[2]} x {t.shape[3]} nodes; name layers "
                "of the same stride, or leave out convention='release'"
            )
        if s.shape[2:].numel() == 1:
            raise ValueError(f"{shapes}: with pool_scale={self.pool_scale} they make one node, and no pair; lower it")
        mine, theirs = (similarities(x.flatten(2), self.release) for x in (s, t))
        return F.mse_loss(mine, theirs)

    def _nodes(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) of either side -> (B, C, h, w), at least in float32."""
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        if self.release:
            return self._in_patches(student), self._in_patches(teacher)
        most = round(1 / self.pool_scale)
        rows, columns = (min(most, *sides) for sides in zip(student.shape[2:], teacher.shape[2:]))
        pool = F.adaptive_max_pool2d if self.pool == "max" else F.adaptive_avg_pool2d
        return pool(student, (rows, columns)), pool(teacher, (rows, columns))

    def _in_patches(self, x: Tensor) -> Tensor:
        patch = [max(1, int(side * self.pool_scale)) for side in x.shape[2:]]
        pool = F.max_pool2d if self.pool == "max" else F.avg_pool2d
        return pool(x, patch, ceil_mode=True)
