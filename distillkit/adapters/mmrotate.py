"""Rotated detectors of mmrotate 1.x, called as mmdet's: ``model(inputs, data_samples, mode="loss")``.

A rotated detector is a class of mmdet with a head, a box coder or regions of mmrotate. All with a neck have features;
the dense heads below have ``DenseDetections`` too. None of them has distributions: they regress numbers, and
``to_distribution`` makes distributions of those of a rotated RetinaNet. (The angle scores of CSL are a sigmoid a bin,
and the codes of PSC phases: neither is a distribution.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillkit.adapters.mmdet import Anchors, Decodable, MMDet, MMDetHead, joined, known_head
from distillkit.adapters.rotated import corners_apart
from distillkit.boxes.rotated import normalize, upright
from distillkit.core.adapter import comes_from
from distillkit.core.views import BoxTargets, DenseDetections

#: as in ``adapters.mmdet.HEADS``
HEADS = {
    "RetinaHead": ("boxes",),
    "RotatedATSSHead": ("boxes", "centerness"),
    "RotatedFCOSHead": ("boxes", "angles", "centerness"),
    "RotatedRTMDetHead": ("boxes", "angles"),
    "RotatedRTMDetSepBNHead": ("boxes", "angles"),
}
#: mmrotate's names of what angles are written in; "r360" is any angle
AngleVersion = Literal["le90", "le135", "oc", "r360"]


def is_rotated(model: nn.Module) -> bool:
    """Whether anything of mmrotate is in a detector of mmdet."""
    if "mmrotate" not in sys.modules:
        return False
    parts = (part for module in model.modules() for part in (module, getattr(module, "bbox_coder", None)))
    return any(comes_from(part, "mmrotate.") for part in parts if part is not None)


def mmrotate(model: nn.Module) -> MMRotate:
    """The adapter of a rotated detector, by its head."""
    head: Any = getattr(model, "bbox_head", None)
    # not those of four free corners, nor upright ones
    turns = known_head(head, HEADS) and (head.bbox_coder.encode_size == 5 or hasattr(head, "angle_coder"))
    return MMRotateHead(model) if turns else MMRotate(model)


class MMRotate(MMDet):
    """Any rotated detector: ground truth for distillers is written as the detector writes its own."""

    heads = HEADS

    def __init__(self, model: nn.Module):
        super().__init__()
        self.version = _angle_version(model)

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        targets = super().targets(args, kwargs, given)
        return targets and replace(targets, boxes=[to_mmrotate(boxes, self.version) for boxes in targets.boxes])

    def boxes_of(self, boxes: Tensor) -> Any:
        from mmrotate.structures import RotatedBoxes

        return RotatedBoxes(boxes)


class MMRotateHead(MMRotate, MMDetHead):
    """A detector with one of ``HEADS``, found out from the model. Anchors are seen as the upright boxes that they are,
    whatever angle the generator writes them with."""

    sides, columns = 5, 5

    def __init__(self, model: nn.Module):
        MMDetHead.__init__(self, model)
        self.version = _angle_version(model)
        head: Any = model.bbox_head
        self.angle_coder = getattr(head, "angle_coder", None)
        if self.anchors_of is not None:
            self.anchors_of = UprightAnchors(self.priors)

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        assert isinstance(view, Decodable)
        priors = joined(self.priors.grid_priors(list(view.classes.sizes), device=view.classes.levels[0].device))
        numbers = view.all_numbers()
        if view.angles is not None:
            assert self.angle_coder is not None
            angles = [self.angle_coder.decode(rows, keepdim=True) for rows in view.angles.all().float()]
            numbers = torch.cat([numbers, torch.stack(angles)], -1)
        decoded = [self.coder.decode(priors, rows) for rows in numbers]
        return torch.stack([getattr(boxes, "tensor", boxes) for boxes in decoded])

    def encoded(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        from mmdet.structures.bbox import HorizontalBoxes
        from mmrotate.structures import RotatedBoxes

        if anchors.shape[1] == 4:
            middles, seen = (anchors[:, :2] + anchors[:, 2:]) / 2, HorizontalBoxes(anchors)
        else:
            middles, seen = anchors[:, :2], RotatedBoxes(anchors)
        return self.coder.encode(seen, RotatedBoxes(torch.cat([middles, boxes[:, 2:]], 1)))

    def distances(self, predicted: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Of corners. Coders of anchors keep centres inside of the picture, where they predict."""
        height, width = size
        last = boxes.new_tensor([width - 1, height - 1])

        def inside(rotated: Tensor) -> Tensor:
            centres = torch.minimum(rotated[:, :2].clamp(min=0), last)
            return torch.cat([centres, rotated[:, 2:]], 1)

        return corners_apart(inside(predicted), inside(boxes))


class UprightAnchors(Anchors):
    """Anchors that are written as rotated boxes, though they are upright."""

    def made(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        anchors = super().made(sizes, device)
        return upright(anchors) if anchors.shape[1] == 5 else anchors


def to_mmrotate(boxes: Tensor, version: AngleVersion) -> Tensor:
    """The same rectangles (..., 5) with their angles in the range of mmrotate's ``version``.

    "le90" and "le135" are ours (``boxes.rotated.normalize``), but that mmrotate turns squares by a quarter. Its "oc"
    has angles in [-pi/2, 0), as OpenCV before 4.5.1, where ours has (0, pi/2]. "r360": any angle, left as it is.

    Raises:
        ValueError: another version.
    """
    if version == "r360":
        return boxes
    if version != "oc":
        return normalize(boxes, version)
    x, y, w, h, angle = normalize(boxes, "oc").unbind(-1)
    turned = angle - math.pi / 2
    whole = turned >= 0  # a quarter, to rounding: half a turn back instead
    least = torch.full_like(angle, -math.pi / 2)
    return torch.stack(
        [x, y, torch.where(whole, w, h), torch.where(whole, h, w), torch.where(whole, least, turned)], -1
    )


def from_mmrotate(boxes: Tensor, version: AngleVersion) -> Tensor:
    """mmrotate's boxes (..., 5) in our convention of the same name. Both count radians clockwise as seen."""
    return boxes if version == "r360" else normalize(boxes, version)


def _angle_version(model: nn.Module) -> AngleVersion:
    """That of the coder which the model's boxes come from: of the last one, where there are stages."""
    versions = [getattr(getattr(module, "bbox_coder", None), "angle_version", None) for module in model.modules()]
    return ([version for version in versions if version] or ["r360"])[-1]
