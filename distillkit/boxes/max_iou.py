"""For heads trained as RetinaNet (Lin et al., arXiv:1708.02002): its assigner by overlap, and LD's regions on it.

Give them to a distiller, ``LD(MaxIoUMain())`` and ``LD(MaxIoUValuable())``. They read the boxes of all anchors from the
view (``boxes.shapes``), or one square a cell.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from distillkit.boxes.maps import Where
from distillkit.boxes.overlap import Overlap
from distillkit.boxes.regions import VALUABLE_SHARE, AnchorWeight, Detections, Truth, Valuable, choose, matched


@torch.no_grad()
def assign(iou: Tensor, valid: Tensor, positive: float = 0.5, negative: float = 0.4) -> Tensor:
    """Which object every anchor of one picture answers for.

    Positive from ``positive`` on, for the object it overlaps most; besides, every object gets the anchors of its own
    highest overlap (a later object before an earlier one), so that none goes without. Background below ``negative``;
    ignored between.

    Args:
        iou: (k, N) of every object with every anchor; k = 0 makes everything background.
        valid: (N,) bool: anchors that take part; the others are ignored.
        positive, negative: 0..1.

    Returns:
        (N,) int64: the object's index, -1 for background, -2 for ignored.
    """
    background = torch.where(valid, -1, -2)
    if len(iou) == 0:
        return background
    iou = iou.masked_fill(~valid, -1)
    best, index = iou.max(0)
    assigned = torch.where(best >= positive, index, torch.where(best >= negative, -2, background))
    highest = iou.amax(1, keepdim=True)
    own = (iou == highest) & (highest > 0)
    last = (own * torch.arange(1, len(iou) + 1, device=iou.device)[:, None]).amax(0)
    return torch.where(last > 0, last - 1, assigned)


@dataclass(frozen=True)
class MaxIoUMain:
    """The positives by highest overlap. Default weight "score".

    Args:
        positive, negative: thresholds of the assigner.
        overlap: of rotated objects, see ``boxes.overlap.Overlap``; "enclosing" is how rotated RetinaNet assigns.
    """

    positive: float = 0.5
    negative: float = 0.4
    overlap: Overlap = "enclosing"
    name: ClassVar[str] = "main"

    def overlaps(self, view: Detections, targets: Truth) -> Tensor:
        """(B, N) overlap of every positive anchor with its object, 0 elsewhere."""
        rows = []
        for m in matched(view, targets, overlap=self.overlap):
            index = assign(m.iou, m.valid, self.positive, self.negative)
            if len(m.iou) == 0:
                rows.append(torch.zeros_like(index, dtype=m.anchors.dtype))
                continue
            rows.append(torch.where(index >= 0, m.iou.gather(0, index.clamp(min=0)[None])[0], 0))
        return torch.stack(rows)

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        return choose(view, [(self.overlaps(view, targets), weight or "score", 1.0)], dense)


@dataclass(frozen=True)
class MaxIoUValuable:
    """The valuable region without the positives by highest overlap. Default weight "iou".

    Its bounds are those of ``Valuable``, from the thresholds of ATSS; several anchors stand in a cell, and its nine
    nearest anchors of a level count every shape.

    Args:
        valuable: the region before the positives are taken out.
        main: the positives.
    """

    valuable: Valuable = field(default_factory=Valuable)
    main: MaxIoUMain = field(default_factory=MaxIoUMain)
    name: ClassVar[str] = "valuable"
    share: ClassVar[float] = VALUABLE_SHARE

    def __call__(
        self, view: Detections, targets: Truth, weight: AnchorWeight | None = None, dense: bool | None = None
    ) -> tuple[Where, Tensor]:
        negative = self.main.overlaps(view, targets) == 0
        return choose(view, [(self.valuable.overlaps(view, targets) * negative, weight or "iou", 1.0)], dense)
