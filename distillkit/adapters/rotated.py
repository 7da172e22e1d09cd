"""What the adapters of rotated detectors share: their targets, and how far apart two rotated boxes are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.boxes.rotated import Convention, corners, normalize
from distillkit.core.views import BoxTargets


class RotatedHead(DistributionHead):
    """A head of five distributions an anchor, whose boxes are (k, 5): cx, cy, w, h, angle.

    The objects' angles are written for distillers as the detector writes its own. The proof compares corners, whichever
    a box begins with: half a turn more is the same box.

    Args:
        convention: of the detector, see ``boxes.rotated.normalize``.
        The others as in ``DistributionHead``.
    """

    sides, columns = 5, 5

    def __init__(self, *args: Any, convention: Convention, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.convention: Convention = convention

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        targets = super().targets(args, kwargs, given)
        return targets and replace(targets, boxes=[normalize(boxes, self.convention) for boxes in targets.boxes])

    def distances(self, predicted: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        return corners_apart(predicted, boxes)


def corners_apart(predicted: Tensor, boxes: Tensor) -> Tensor:
    """(P, 5), (N, 5) -> (P, N) pixels, of four corners the largest, on one axis."""
    mine, theirs = corners(predicted), corners(boxes).flatten(1)
    apart = [torch.cdist(mine.roll(i, 1).flatten(1), theirs, p=float("inf")) for i in range(4)]
    return torch.stack(apart).amin(0)
