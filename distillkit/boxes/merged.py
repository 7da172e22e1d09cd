"""For rotated RetinaNet, as in Rotated-LD (Zheng et al., arXiv:2204.05957): main and valuable region in one.

Give it to a distiller, ``LD(Merged())``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distillkit.boxes.maps import Where
from distillkit.boxes.overlap import Overlap
from distillkit.boxes.regions import AnchorWeight, Detections, Truth, choose, matched


@dataclass(frozen=True)
class Merged:
    """All anchors that overlap an object by at least ``gamma`` times its positive threshold. Default weight "iou".

    The threshold is that of ATSS; there is no upper bound and no test of centres.

    Of rotated objects the release takes the boxes with the angle left out (``overlap="angle-free"``). Its region
    depends on how an angle is written and lies across an object that stands upright: see
    benchmarks/results/rotated_regions.md.

    Args:
        gamma: 0..1.
        overlap: of rotated objects, see ``boxes.overlap.Overlap``.
    """

    gamma: float = 0.25
    overlap: Overlap = "rotated"
    name: ClassVar[str] = "merged"
    level_means: ClassVar[bool] = True

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        rows = []
        for m in matched(view, targets, overlap=self.overlap):
            if len(m.boxes) == 0:
                rows.append(m.anchors.new_zeros(len(m.anchors)))
                continue
            selected = (m.iou >= self.gamma * m.assignment.threshold[:, None]) & m.valid
            rows.append(torch.where(selected, m.iou, 0).amax(0))
        return choose(view, [(torch.stack(rows), weight or "iou", 1.0)], dense)
