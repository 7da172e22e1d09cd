"""For rotated RetinaNet, as in Rotated-LD (Zheng et al., arXiv:2204.05957): main and valuable region in one.

Give it to a distiller, ``LD(Merged())``; the head's adapter gives the view its anchors' upright boxes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distillkit.boxes.maps import Where
from distillkit.boxes.regions import AnchorWeight, Detections, Truth, choose, matched


@dataclass(frozen=True)
class Merged:
    """All anchors that overlap an object by at least ``gamma`` times its positive threshold. Default weight "iou".

    The threshold is that of ATSS; there is no upper bound and no test of centres. For rotated objects the targets hold
    their upright boxes (centre, width and height with the angle left out), as the release has it.

    Args:
        gamma: 0..1.
    """

    gamma: float = 0.25
    name: ClassVar[str] = "merged"
    level_means: ClassVar[bool] = True

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        rows = []
        for m, boxes in zip(matched(view, targets), targets.boxes):
            if len(boxes) == 0:
                rows.append(m.anchors.new_zeros(len(m.anchors)))
                continue
            selected = (m.iou >= self.gamma * m.assignment.threshold[:, None]) & m.valid
            rows.append(torch.where(selected, m.iou, 0).amax(0))
        return choose(view, [(torch.stack(rows), weight or "iou", 1.0)], dense)
