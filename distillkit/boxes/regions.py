"""Regions: on which anchors of a dense detector a distiller acts, and with what weight. Zheng et al., arXiv:2204.05957.

The main region are the positives of the ATSS assigner. The valuable localization region are the anchors around an
object that overlap it well but not well enough to be positive: between ``gamma`` times its positive threshold and the
threshold itself. An anchor can be in both.

Objects may be rotated; anchors are upright. What of a rotated object its overlap with anchors is measured by is the
regions' ``overlap``: the object itself, ``rotated``, unless told otherwise.

Two paths lead to the same loss. The gathering one finds the region's anchors and reads only those; it waits for the
device. The dense one gives every anchor a weight, 0 outside, and waits for nothing: the choice on accelerators.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from distillkit.boxes.anchors import grid_anchors
from distillkit.boxes.assign import Matched, match
from distillkit.boxes.iou import area, centre_distance, enclosing_diagonal, intersection
from distillkit.boxes.maps import Maps, Where, where_of
from distillkit.boxes.overlap import Overlap, hull, pairwise_overlap, seen_as, shared_part
from distillkit.boxes.precision import at_least_float32

Measure = Literal["diou", "release", "iou"]
AnchorWeight = Literal["score", "iou", "one"]
#: the release divides the sum over anchors and 4 edges by 16 in the valuable region, by 4 in the main region
VALUABLE_SHARE = 0.25


class Detections(Protocol):
    """What a region reads of a dense head (``core.views.DenseDetections``)."""

    @property
    def classes(self) -> Maps: ...
    @property
    def scores(self) -> Maps | None: ...
    @property
    def strides(self) -> Sequence[int]: ...
    @property
    def centre(self) -> float: ...
    @property
    def octave(self) -> float: ...
    @property
    def anchors(self) -> Tensor | None: ...
    @property
    def whole(self) -> "Detections | None":
        """The same with all levels, where some were left out: which anchors are whose is decided there."""

    @property
    def kept(self) -> Sequence[int]: ...


class Truth(Protocol):
    """What a region reads of the targets (``core.views.BoxTargets``)."""

    @property
    def boxes(self) -> Sequence[Tensor]: ...
    @property
    def sizes(self) -> Sequence[tuple[int, int]]: ...
    @property
    def memo(self) -> dict[Any, Any]: ...


class Region(Protocol):
    """Called with the student's detections and the targets.

    Args:
        weight: of an anchor: "score", the student's highest class probability (detached); "iou", its overlap with the
            object it stands for; "one"; None: the region's own default.
        dense: every anchor with a weight (``Where(None)``), or only those of the region. None: dense unless on the CPU.

    Returns:
        where, and the weights in the order of ``Maps.at(where)``: (M,) or (B*N,).

    ``name`` is the word for it in the names of losses. A region may also have ``share``, what ``LD`` multiplies its
    loss by (1 without), and ``level_means``: True where the release averages over the anchors of each level.
    """

    @property
    def name(self) -> str: ...

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]: ...


def check_region(region: Any, weight: AnchorWeight | None) -> None:
    """Raise ValueError unless a distiller was given a region, made and not just named, and a weight that exists."""
    if isinstance(region, type) or not callable(region) or not hasattr(region, "name"):
        raise ValueError(f"region must be a region object such as Main(), got {region!r}")
    if weight not in (None, *get_args(AnchorWeight)):
        raise ValueError(f"anchor_weight must be 'score', 'iou', 'one' or None, got {weight!r}")


@dataclass(frozen=True)
class Main:
    """The positives of ATSS. Default weight "score".

    Args:
        topk: candidates a level of the assigner.
        overlap: of rotated objects, see ``boxes.overlap.Overlap``.
    """

    topk: int = 9
    overlap: Overlap = "rotated"
    name: ClassVar[str] = "main"

    def overlaps(self, view: Detections, targets: Truth) -> Tensor:
        """(B, N) overlap of every anchor of the region with its object, 0 outside."""
        return torch.stack([m.assignment.iou for m in matched(view, targets, self.topk, self.overlap)])

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        return choose(view, [(self.overlaps(view, targets), weight or "score", 1.0)], dense)


@dataclass(frozen=True)
class Valuable:
    """The valuable localization region. Default weight "iou".

    Args:
        gamma: lower bound as a share of the positive threshold, 0..1; the smaller, the larger the region; 1 is empty.
        measure: see ``valuable_weight``; the published code used "release", the paper describes "diou", the default.
        topk: candidates a level of the assigner, which sets the threshold.
        share: what ``LD`` multiplies the loss by; the release divides by 16 here and by 4 in the main region.
        overlap: of rotated objects, see ``boxes.overlap.Overlap``.
    """

    gamma: float = 0.25
    measure: Measure = "diou"
    topk: int = 9
    share: float = VALUABLE_SHARE
    overlap: Overlap = "rotated"
    name: ClassVar[str] = "valuable"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in 0..1, got {self.gamma}")
        if self.measure not in ("diou", "release", "iou"):
            raise ValueError(f"measure must be 'diou', 'release' or 'iou', got {self.measure!r}")

    def overlaps(self, view: Detections, targets: Truth) -> Tensor:
        """(B, N) overlap of every anchor of the region with its object, 0 outside."""
        rows = []
        for m in matched(view, targets, self.topk, self.overlap):
            row = valuable_weight(m.anchors, m.boxes, m.assignment.threshold, self.gamma, self.measure, m.iou)
            rows.append(row * m.valid)
        return torch.stack(rows)

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        return choose(view, [(self.overlaps(view, targets), weight or "iou", 1.0)], dense)


@dataclass(frozen=True)
class MainAndValuable:
    """Both regions in one pass; an anchor in both has the sum of its weights. Each has its own default weight.

    Args:
        main: the main region.
        valuable: the valuable region; its weights are multiplied by its ``share``.
    """

    main: Main = field(default_factory=Main)
    valuable: Valuable = field(default_factory=Valuable)
    name: ClassVar[str] = "main_valuable"

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        main = (self.main.overlaps(view, targets), weight or "score", 1.0)
        valuable = (self.valuable.overlaps(view, targets), weight or "iou", self.valuable.share)
        return choose(view, [main, valuable], dense)


@torch.no_grad()
def valuable_weight(
    anchors: Tensor,
    gt: Tensor,
    threshold: Tensor,
    gamma: float = 0.25,
    measure: Measure = "diou",
    iou: Tensor | None = None,
) -> Tensor:
    """The overlap of every anchor of the valuable region with its object (the largest, if several), 0 elsewhere.

    An anchor belongs to an object where ``gamma * threshold <= X < threshold``. Both bounds are known before any anchor
    is looked at, so nothing is sorted. X is, with d the distance of the centres and c the diagonal around both boxes,
    "diou": ``IoU - d^2/c^2`` (the paper); "release": ``intersection / area of the anchor - d^2/c^2`` (the published
    code, whose overlap routine has no union in this mode); "iou": IoU.

    Args:
        anchors: (N, 4).
        gt: (k, 4) or rotated (k, 5), with c around their upright hull; k = 0 gives zeros.
        threshold: (k,) the positive thresholds (``Assignment.threshold``).
        gamma: 0..1.
        measure: X.
        iou: (k, N) overlap of every object with every anchor, where it is known already.
    """
    if len(gt) == 0:
        return anchors.new_zeros(len(anchors))
    iou = pairwise_overlap(gt, anchors) if iou is None else iou
    x = _measured(anchors, gt, iou, measure)
    selected = (x >= gamma * threshold[:, None]) & (x < threshold[:, None])
    return torch.where(selected, iou, 0).amax(0)


def _measured(anchors: Tensor, gt: Tensor, iou: Tensor, measure: Measure) -> Tensor:
    if measure == "iou":
        return iou
    around = hull(gt)[:, None]
    if measure == "diou":
        overlap = iou
    elif gt.shape[1] == 4:
        overlap = intersection(around, anchors) / area(anchors).clamp(min=1e-6)
    else:
        overlap = shared_part(gt, anchors)
    return overlap - centre_distance(around, anchors) / enclosing_diagonal(around, anchors).clamp(min=1e-6)


def matched(view: Detections, targets: Truth, topk: int = 9, overlap: Overlap = "rotated") -> list[Matched]:
    """One entry a picture, computed once a step for all distillers (kept in ``targets.memo``).

    Raises:
        ValueError: several anchors a cell without ``view.anchors``, ``view.anchors`` of another number than the maps',
            or other pictures than the targets'.
    """
    if view.whole is not None:
        every = matched(view.whole, targets, topk, overlap)
        return [m.only(view.kept, view.whole.classes.counts) for m in every]
    maps, strides = view.classes, tuple(view.strides)
    if maps.images != len(targets.boxes):
        raise ValueError(f"the head saw {maps.images} pictures, the targets describe {len(targets.boxes)}")
    key = ("matched", maps.sizes, strides, view.centre, view.octave, view.anchors is None, topk, overlap)
    if key not in targets.memo:
        anchors = _anchors(view)
        targets.memo[key] = [
            match(anchors, maps.counts, seen_as(boxes, overlap), size, topk)
            for boxes, size in zip(targets.boxes, targets.sizes, strict=True)
        ]
    return targets.memo[key]


def _anchors(view: Detections) -> Tensor:
    maps = view.classes
    if view.anchors is not None:
        if len(view.anchors) != sum(maps.counts):
            raise ValueError(
                f"the view's anchors= has {len(view.anchors)} boxes, its maps have {sum(maps.counts)} anchors a picture"
            )
        return view.anchors
    if maps.anchors != 1:
        raise ValueError(
            f"this head has {maps.anchors} anchors a cell, squares of side octave= only describe one: give anchors="
        )
    return grid_anchors(maps.sizes, view.strides, view.centre, view.octave, maps.levels[0].device)


def choose(
    view: Detections, parts: Sequence[tuple[Tensor, AnchorWeight, float]], dense: bool | None
) -> tuple[Where, Tensor]:
    """The union of several regions, each ``(overlaps (B, N), kind of weight, factor)``; their weights add up.

    An overlap above 0 puts an anchor into its region. Returns where, and the weights in the order of
    ``Maps.at(where)``.
    """
    if dense is None:
        dense = view.classes.levels[0].device.type != "cpu" or torch.compiler.is_compiling()
    if dense:
        where = Where(None)
    else:
        union = torch.stack([overlaps for overlaps, _, _ in parts]).amax(0)
        where, _ = where_of(union, view.classes.counts, view.classes.sizes)
    rows = view.classes.positions(where)
    weights = [factor * _weigh(view, where, overlaps.flatten()[rows], kind) for overlaps, kind, factor in parts]
    return where, torch.stack(weights).sum(0)


def _weigh(view: Detections, where: Where, overlaps: Tensor, kind: AnchorWeight) -> Tensor:
    if kind == "iou":
        return overlaps
    inside_region = (overlaps > 0).to(overlaps.dtype)
    if kind == "one":
        return inside_region
    if kind == "score":
        return inside_region * best_score(view, where)
    raise ValueError(f"an anchor's weight must be 'score', 'iou' or 'one', got {kind!r}")


@torch.no_grad()
def best_score(view: Detections, where: Where) -> Tensor:
    """(M,) the highest class probability of the anchors at ``where``, detached."""
    maps = view.classes if view.scores is None else view.scores
    best = maps.largest() if where.dense else maps.at(where).amax(-1)
    best = at_least_float32(best)
    return best.sigmoid() if view.scores is None else best
