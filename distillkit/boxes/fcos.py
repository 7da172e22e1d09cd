"""For heads trained as FCOS (Tian et al., arXiv:1904.01355): its assigner with centre sampling, and LD's regions on it.

Give them to a distiller, ``LD(FCOSMain())`` and ``LD(FCOSValuable())``, and the head ``DistributionHead(centre=0.5)``.
Without anchor boxes there is no overlap: the main region are the positive points; the valuable region are the other
points inside an object, which are negative only because of centre sampling or the range of sizes of their level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distillkit.boxes.anchors import grid_points
from distillkit.boxes.distribution import encode
from distillkit.boxes.maps import Where
from distillkit.boxes.regions import VALUABLE_SHARE, AnchorWeight, Detections, Truth, choose

#: a level of stride s takes objects whose farthest edge is up to 8 s away (64 pixels at stride 8)
REACH = 8


@torch.no_grad()
def assign(
    points: Tensor, strides: Sequence[int], counts: Sequence[int], gt: Tensor, radius: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Which object every point answers for, by masks alone (no wait for the device).

    A point is positive for an object where it is inside its box, within ``radius`` strides of the box's centre on both
    axes, and its farthest edge lies in the level's range: up to 8 strides, and more than the level before takes; the
    first level has no lower end and the last no upper. Of several objects the smallest wins, the first on ties.

    Args:
        points: (N, 2), level after level.
        strides, counts: pixels a cell, and points, of each level.
        gt: (k, 4); k = 0 makes everything background.
        radius: in strides.

    Returns:
        gt_index (N,) int64, -1 for background; inside (N,) bool: strictly inside at least one box.
    """
    if len(gt) == 0:
        return points.new_full((len(points),), -1, dtype=torch.int64), points.new_zeros(len(points), dtype=torch.bool)
    ends = [REACH * float(stride) for stride in strides[:-1]]

    def per_point(values: Sequence[float]) -> Tensor:
        """One value a level -> (N, 1)."""
        return torch.cat([points.new_full((n, 1), value) for n, value in zip(counts, values, strict=True)])

    lower, upper = per_point([-1.0, *ends]), per_point([*ends, torch.inf])
    reach = radius * per_point([float(stride) for stride in strides])[:, None]

    centres = (gt[:, :2] + gt[:, 2:]) / 2
    near_centre = torch.cat(
        [torch.maximum(centres - reach, gt[:, :2]), torch.minimum(centres + reach, gt[:, 2:])], -1
    )  # (N, k, 4)
    distances = encode(points[:, None], gt)  # (N, k, 4)
    farthest = distances.amax(-1)
    inside = distances.amin(-1) > 0
    positive = inside & (encode(points[:, None], near_centre).amin(-1) > 0) & (farthest >= lower) & (farthest <= upper)
    area = torch.where(positive, (gt[:, 2:] - gt[:, :2]).prod(-1), torch.inf)
    smallest, index = area.min(1)
    return torch.where(smallest < torch.inf, index, -1), inside.any(1)


@dataclass(frozen=True)
class FCOSMain:
    """The positive points. Weight "score" (default) or "one".

    Args:
        radius: of centre sampling, in strides.
    """

    radius: float = 1.5
    name: ClassVar[str] = "main"

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        positive, _ = _regions(view, targets, self.radius)
        return choose(view, [(positive, _without_overlap(weight), 1.0)], dense)


@dataclass(frozen=True)
class FCOSValuable:
    """The points inside an object that are not positive. Weight "score" (default) or "one".

    Args:
        radius: of centre sampling, in strides.
    """

    radius: float = 1.5
    name: ClassVar[str] = "valuable"
    share: ClassVar[float] = VALUABLE_SHARE

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        _, valuable = _regions(view, targets, self.radius)
        return choose(view, [(valuable, _without_overlap(weight), 1.0)], dense)


def _regions(view: Detections, targets: Truth, radius: float) -> tuple[Tensor, Tensor]:
    """(B, N) of 1 and 0: the main and the valuable region, computed once a step for all distillers."""
    if view.whole is not None:
        counts, every = list(view.whole.classes.counts), _regions(view.whole, targets, radius)
        main, valuable = (torch.cat([rows.split(counts, 1)[i] for i in view.kept], 1) for rows in every)
        return main, valuable
    maps, strides = view.classes, tuple(view.strides)
    if maps.anchors != 1:
        raise ValueError(
            f"FCOS has one point a cell, this head has {maps.anchors} anchors a cell; use a region of boxes.max_iou"
        )
    if any(boxes.shape[1] != 4 for boxes in targets.boxes):
        raise ValueError("FCOS assigns upright boxes (k, 4), these objects are rotated; use a region of boxes.regions")
    key = ("fcos", maps.sizes, strides, view.centre, radius)
    if key not in targets.memo:
        points = grid_points(maps.sizes, strides, view.centre, maps.levels[0].device)
        found = [assign(points, strides, maps.counts, boxes, radius) for boxes in targets.boxes]
        positive = torch.stack([index >= 0 for index, _ in found])
        inside = torch.stack([i for _, i in found])
        targets.memo[key] = positive.float(), (inside & ~positive).float()
    return targets.memo[key]


def _without_overlap(weight: AnchorWeight | None) -> AnchorWeight:
    if weight == "iou":
        raise ValueError("FCOS has points and no anchor boxes, so there is no IoU to weigh with: use 'score' or 'one'")
    return weight or "score"
