"""Localization distillation. Zheng et al., CVPR 2022 (arXiv:2102.12252) and TPAMI 2023 (arXiv:2204.05957)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from distillkit.boxes.regions import AnchorWeight, Main, Region, check_region
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import BoxTargets, DenseDetections
from distillkit.distillers.dense import check_edges, mean_count, sum_of_level_means
from distillkit.losses.kl import kl_divergence
from distillkit.losses.reduce import mean_over_ranks

Normalize = Literal["images", "weight_sum", "num_pos", "none"]

#: images per GPU in the release's R18, R34 and R101 runs, for which its weights were chosen
IMAGES_PER_GPU = 3


class LD(Distiller):
    """Teach the student the teacher's distribution over the place of every box edge.

    Of anchor i, with weight w_i, E edges and K bins an edge, at temperature T (arXiv:2204.05957, as released):

        row_ie = T^2 * mean over the K bins of p_t * (log p_t - log p_s),     p = softmax(logits / T)
        loss   = sum_i w_i * (mean over e of row_ie) * 3 / images             (a quarter of it in the valuable region)

    Args:
        region: which anchors take part: ``Main()``, ``Valuable(gamma=0.25)`` or ``MainAndValuable()`` of
            ``boxes.regions``, or those for other assigners of ``boxes.fcos``, ``boxes.max_iou`` and ``boxes.merged``.
            ``Main()`` unless given.
        temperature: T >= 1.
        weight: what the loss is multiplied by, a number or a schedule; 0.25 is the release's for GFL.
        anchor_weight: w_i: ``score``, the student's highest class probability; ``iou`` of the anchor and its box;
            ``one``; None: the region's own, which is the release's: ``score`` for main, ``iou`` for valuable.
        bin_reduction: ``mean`` over the K bins as above, 1/K of the textbook's KL, which the release's weights assume;
            ``sum``: the textbook's, K times as large.
        normalize: what the sum over anchors is divided by: ``images / 3`` as above; ``weight_sum``: the sum of the
            weights w_i, as GFL does with its box loss; ``num_pos``: the number of the region's anchors; ``none``: 1.
            Both counts are the mean over ranks. All but ``none`` give the same loss for a batch repeated.
        convention: ``default`` as above; ``release``: what the published code sums up, see below.
        dense: True reads every anchor, with weight 0 outside the region, and never waits for the device; False reads
            the region's anchors alone; None: True unless on the CPU.
        teacher: which teacher, where there are several.
        name: of the loss; ``ld_main``, ``ld_valuable``, ... after the region unless given.

    Reads:
        ``DenseDetections`` of both: ``edges``, (E, K) logits an anchor; of the student also its class logits, for its
        scores.

    Default and release. The release does not divide by the images, so that its loss grows with the batch. The default
    is the mean over images times the release's 3 images per GPU: the same number at that batch size, and the same
    strength at any other, so published weights keep their meaning. Everything else is the release's, also where the
    paper says less: the mean over bins (1/K of a KL), and the quarter in the valuable region. In the merged region of
    rotated boxes ``release`` is Rotated-LD's: each level's mean over its anchors, summed over edges and levels.

    Raises:
        ValueError: a temperature below 1; unknown words; a region that is none; ``normalize`` together with
            ``convention="release"``, which says it already; teacher and student that differ in edges, in how
            they are told, in anchors a cell or level sizes; a head without distributions.
    """

    reads = DenseDetections
    short_name = "ld"
    reads_classes = False

    def __init__(
        self,
        region: Region | None = None,
        temperature: float = 10.0,
        weight: float | Weight = 0.25,
        anchor_weight: AnchorWeight | None = None,
        convention: Literal["default", "release"] = "default",
        dense: bool | None = None,
        teacher: str | None = None,
        name: str | None = None,
        bin_reduction: Literal["mean", "sum"] = "mean",
        normalize: Normalize = "images",
    ):
        region = Main() if region is None else region
        check_region(region, anchor_weight)
        super().__init__(weight, teacher, name or f"{self.short_name}_{region.name}")
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        if bin_reduction not in ("mean", "sum"):
            raise ValueError(f"bin_reduction must be 'mean' or 'sum', got {bin_reduction!r}")
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be one of {', '.join(map(repr, get_args(Normalize)))}, got {normalize!r}")
        if convention == "release" and normalize != "images":
            raise ValueError(f"convention='release' has its own sum: leave out normalize={normalize!r}")
        self.region = region
        self.temperature = temperature
        self.anchor_weight = anchor_weight
        self.convention = convention
        self.bin_reduction: Literal["mean", "sum"] = bin_reduction
        self.normalize = normalize
        self.dense = dense

    def forward(self, student: DenseDetections, teacher: DenseDetections, targets: BoxTargets) -> Tensor:
        mine, theirs = check_edges(student, teacher)
        where, weight = self.region(student, targets, self.anchor_weight, self.dense)  # M anchors and their weights
        theirs = theirs.tempered(self.temperature)
        rows = kl_divergence(mine.at(where), theirs.at(where), self.temperature, self.bin_reduction)  # (M, E)
        share = getattr(self.region, "share", 1.0)
        if self.convention == "default":
            return share * (weight * rows.mean(-1)).sum() / self._count(weight, targets)
        if getattr(self.region, "level_means", False):
            return share * sum_of_level_means(rows.sum(-1), weight, where, mine)
        return share * (weight * rows.sum(-1)).sum() / 4

    def _count(self, weight: Tensor, targets: BoxTargets) -> Tensor | float:
        """What the sum over anchors of ``weight`` (M,) is divided by."""
        if self.normalize == "weight_sum":
            return mean_over_ranks(weight.sum()).clamp(min=1e-6)
        if self.normalize == "num_pos":
            return mean_count(weight > 0)
        return targets.images / IMAGES_PER_GPU if self.normalize == "images" else 1.0
