"""torchvision's Faster R-CNN and what is built on it (Mask R-CNN, Keypoint R-CNN).

``DenseDetections`` are the region proposal network's: one logit an anchor, whether there is an object. ``ClassLogits``
are those of the second stage, a row for each region that the student looks at in this step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.adapters.dense_head import LOOKED_AT, SCORE, predictions_of
from distillkit.adapters.torchvision import AnchorDetections, TorchvisionDetector, scaled
from distillkit.boxes.maps import Maps
from distillkit.core.errors import AdapterError
from distillkit.core.taps import Place
from distillkit.core.views import ClassLogits, DenseDetections, View

Sizes = list[tuple[int, int]]


@dataclass(frozen=True)
class RegionLogits(ClassLogits):
    """Of a student: class logits (M, C) of its regions, the background first.

    Args:
        regions: of each picture (m, 4) x1, y1, x2, y2 pixels of the resized picture.
        sizes: of each resized picture (height, width).
    """

    regions: list[Tensor]
    sizes: Sizes


@dataclass(frozen=True)
class RegionTeacher(ClassLogits):
    """Of a teacher: what it needs to say something of any region. Its second stage runs on the student's alone.

    Args:
        logits: none yet.
        heads: its second stage.
        maps: what its backbone returned.
        sizes: of each resized picture (height, width).
        lowered: the dtype of the autocast that its backbone ran under; None: it ran under none.
        classes: which of its class logits, as ``picked``; None: all.
    """

    heads: Any
    maps: Mapping[str, Tensor]
    sizes: Sizes
    lowered: torch.dtype | None = None
    classes: tuple[Tensor, int] | None = None

    def picked(self, columns: Tensor, names: int) -> RegionTeacher:
        return replace(self, classes=(columns, names))

    def match(self, student: ClassLogits) -> Any:
        """What it says of the student's regions, which are resized where the two resize pictures differently. Its
        second stage runs under the autocast of its first."""
        if not isinstance(student, RegionLogits):
            raise ValueError(
                "the teacher has class logits of regions, the student of whole pictures: read a layer of both, "
                "student_at= and teacher_at="
            )
        said = ClassLogits(self._said_of(student))
        return (said if self.classes is None else said.picked(*self.classes)).match(student)

    @torch.no_grad()
    def _said_of(self, student: RegionLogits) -> Tensor:
        own = next(self.heads.parameters())
        regions = []
        for boxes, (h, w), (height, width) in zip(student.regions, student.sizes, self.sizes, strict=True):
            regions.append(scaled(boxes.detach().to(own.dtype), width / w, height / h))
        maps = {name: m if self.lowered else m.to(own.dtype) for name, m in self.maps.items()}
        with torch.autocast(own.device.type, self.lowered, enabled=self.lowered is not None):
            pooled = self.heads.box_roi_pool(maps, regions, self.sizes)
            logits, _ = self.heads.box_predictor(self.heads.box_head(pooled))
        return logits


class RCNNAdapter(TorchvisionDetector):
    """Of a teacher runs its backbone, proposal network, or second stage on the student's regions, and no more."""

    first_class = 1

    def __init__(self, model: Any):
        super().__init__(model, model.rpn.anchor_generator, "rpn.anchor_generator")
        self.classes = Place(("rpn.head.cls_logits",), len(self.levels))

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is ClassLogits and at is None:
            regions = Place(("roi_heads.box_roi_pool",), reads="input")
            return (Place(("roi_heads.box_predictor[0]",)), regions)
        return super().places(model, kind, at)

    def teacher_places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is ClassLogits and at is None:
            return (Place(("transform",), reads="output"), Place(("backbone",), reads="output"))
        return super().teacher_places(model, kind, at)

    def dense_places(self) -> tuple[Place, ...]:
        return (self.classes, self.anchors)

    def view(self, model: Any, kind: type[View], tensors: list[Any], output: Any) -> View:
        if kind is not ClassLogits or len(tensors) != 2:
            return super().view(model, kind, tensors, output)
        if isinstance(tensors[0], Tensor):
            logits, (_, regions, sizes) = tensors
            return RegionLogits(logits, regions, sizes)
        (images, _), maps = tensors
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        device = images.tensors.device.type
        lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return RegionTeacher(torch.empty(0), model.roi_heads, maps, images.image_sizes, lowered)

    def dense_view(self, tensors: list[Any]) -> DenseDetections:
        levels, anchors = tuple(tensors[:-1]), tensors[-1]
        return AnchorDetections(
            classes=Maps(levels, (1,), levels[0].shape[1]),
            edges=None,
            strides=self.strides,
            anchors=anchors.float(),
            shapes=self.shapes,
            resize=self.resize,
        )

    def needs_proof(self, kind: type[View]) -> bool:
        """The proposal network is not to be seen in what is predicted; the second stage is."""
        return kind is ClassLogits

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Every predicted score must be the probability of its label in one of the tapped regions."""
        if not isinstance(view, RegionLogits):
            return True  # a teacher's logits are made in the step
        seen = 0
        said = view.logits.float().softmax(-1).split([len(r) for r in view.regions])
        for i, (row, probabilities) in enumerate(zip(predictions_of(output), said, strict=True)):
            scores, labels = row["scores"][:LOOKED_AT].float(), row["labels"][:LOOKED_AT]
            if not len(scores):
                continue
            seen += len(scores)
            error = (probabilities[:, labels] - scores).abs().amin(0).max().item()
            if error > SCORE:
                raise AdapterError(
                    f"{self.name} does not predict what 'roi_heads.box_predictor' says: a score of picture {i} is "
                    f"{error:.3f} from the probability of its label in every region. If its second stage is your own, "
                    "write an adapter: docs/write-an-adapter.md"
                )
        return seen > 0
