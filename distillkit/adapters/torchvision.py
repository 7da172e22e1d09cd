"""torchvision's detectors: what FCOS, RetinaNet and SSD (``torchvision_dense``), Faster and Mask R-CNN
(``torchvision_rcnn``) share.

Their classifiers need no adapter, their segmentation models have that of ``segmenter``. A detector that went through
``to_distribution`` has edge distributions, too.

torchvision's detectors normalise and resize pictures themselves (``GeneralizedRCNNTransform``): what distillers get as
targets is in the pixels of the resized picture, and the proof resizes predictions alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.adapters.dense_head import DenseHead, pictures_of, predictions_of
from distillkit.boxes.maps import Maps
from distillkit.core.adapter import Adapter
from distillkit.core.errors import ViewError
from distillkit.core.taps import Place
from distillkit.core.views import BoxTargets, ClassLogits, DenseDetections, Features, View

#: (height, width) of the picture without numbers by which strides are found out: whole cells on every level
PROBE = (1024, 1024)


def torchvision_detector(model: nn.Module) -> Adapter | None:
    """The adapter of a detector of torchvision, or of a subclass; None: it is none."""
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
    from torchvision.models.detection.ssd import SSD

    from distillkit.adapters import torchvision_dense

    if isinstance(model, FCOS):
        return torchvision_dense.FCOSAdapter(model)
    if isinstance(model, RetinaNet):
        return torchvision_dense.RetinaNetAdapter(model)
    if isinstance(model, SSD):
        return torchvision_dense.SSDAdapter(model)
    if isinstance(model, FasterRCNN):
        from distillkit.adapters.torchvision_rcnn import RCNNAdapter

        return RCNNAdapter(model)
    return None


@dataclass(frozen=True)
class AnchorDetections(DenseDetections):
    """``DenseDetections`` of anchors that torchvision made, with what their boxes are decoded from.

    Args:
        numbers: what the head regresses, 4 an anchor; None for a head with distributions, or where no box is read.
        shapes: of every level, what makes its anchors: teacher and student must agree.
        resize: how pictures are resized, in words.
    """

    numbers: Maps | None = None
    shapes: tuple[Any, ...] = ()
    resize: str = ""

    def only(self, keep: Sequence[int]) -> Any:
        return replace(super().only(keep), numbers=None, shapes=tuple(self.shapes[i] for i in keep))

    def match(self, student: DenseDetections) -> Any:
        if isinstance(student, AnchorDetections):
            theirs = dict(zip(student.strides, zip(student.classes.sizes, student.shapes, strict=True), strict=True))
            for stride, size, shape in zip(self.strides, self.classes.sizes, self.shapes, strict=True):
                if stride not in theirs:
                    continue
                if theirs[stride][0] != size:
                    raise ValueError(
                        f"the maps of stride {stride} differ: teacher {size}, student {theirs[stride][0]} (height, "
                        "width). torchvision's detectors resize pictures themselves: build both with the same "
                        f"min_size= and max_size= (teacher: {self.resize}; student: {student.resize})"
                    )
                if theirs[stride][1] != shape and not self._is_pooled(student):
                    raise ValueError(
                        f"the anchors of stride {stride} differ: teacher {shape}, student {theirs[stride][1]}; build "
                        "both with the same anchor_generator="
                    )
        return super().match(student)


@dataclass(frozen=True)
class PyramidFeatures(Features):
    """What the backbone returned, one map a level."""

    resize: str = ""

    def match(self, student: Features) -> Any:
        if isinstance(student, PyramidFeatures):
            for i, (mine, theirs) in enumerate(zip(self.maps, student.maps)):
                if mine.shape[2:] != theirs.shape[2:]:
                    raise ValueError(
                        f"map {i} is {tuple(mine.shape[2:])} in the teacher and {tuple(theirs.shape[2:])} in the "
                        "student. torchvision's detectors resize pictures themselves: build both with the same "
                        f"min_size= and max_size= (teacher: {self.resize}; student: {student.resize}) and backbones of "
                        "the same strides"
                    )
        return super().match(student)


class TorchvisionDetector(DenseHead):
    """What all of them share: features are the backbone's maps, targets are resized as the detector resizes.

    Args:
        model: the detector.
        anchors: its generator of anchors; anchors_at: the path of it.
    """

    #: label of the data's first class: 1 where 0 is the background
    first_class = 0

    def __init__(self, model: nn.Module, anchors: nn.Module, anchors_at: str):
        super().__init__()
        self.name = type(model).__name__
        self.transform: Any = model.transform
        self.levels = levels_of(model)
        self.per_cell = tuple(anchors.num_anchors_per_location())  # type: ignore[operator]
        if len(self.per_cell) != len(self.levels):
            raise ViewError(
                f"{self.name}: its anchor_generator is for {len(self.per_cell)} maps, its backbone returns "
                f"{len(self.levels)}"
            )
        self.anchors = Place((f"{anchors_at}[0]",))  # they are the same for every picture of a batch
        self.shapes = _shapes(anchors)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(level.stride for level in self.levels)

    @property
    def resize(self) -> str:
        """In words, for messages."""
        size = getattr(self.transform, "fixed_size", None)
        if size is not None:
            return f"a fixed size of {size}"
        return f"min_size={self.transform.min_size}, max_size={self.transform.max_size}"

    def own_size(self, model: nn.Module) -> str | None:
        return self.resize

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        places = self.teacher_places(model, kind, at)
        if kind in (DenseDetections, Features) and self.draws_sizes:
            raise ViewError(
                f"the student resizes every picture to a size that it draws from min_size={self.transform.min_size}, "
                "and its teacher would see another: give it one min_size= and draw the size in your data's transforms, "
                "for both"
            )
        return places

    def teacher_places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is DenseDetections:
            return self.dense_places()
        if kind is Features and at is None:
            return (Place(("backbone[*]",)),)
        if kind is ClassLogits and at is None:
            raise ViewError(
                f"{self.name} has class logits of every anchor, and none of a whole picture: say which anchors, as in "
                "LogitKD(Main())"
            )
        return super().places(model, kind, at)

    def dense_places(self) -> tuple[Place, ...]:
        raise NotImplementedError

    def view(self, model: nn.Module, kind: type[View], tensors: list[Any], output: Any) -> View:
        view = super().view(model, kind, tensors, output) if kind is not DenseDetections else self.dense_view(tensors)
        if type(view) is Features and len(view.maps) == len(self.levels):
            return PyramidFeatures(view.maps, resize=self.resize)
        return view

    def dense_view(self, tensors: list[Any]) -> DenseDetections:
        raise NotImplementedError

    def widths(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> list[int] | None:
        if kind is Features and at is None:
            return [level.width for level in self.levels]
        return super().widths(model, kind, at)

    @property
    def draws_sizes(self) -> bool:
        """Whether pictures are resized at random in training."""
        return len(self.transform.min_size) > 1 and getattr(self.transform, "fixed_size", None) is None

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        """In pixels of the resized pictures. None where sizes are drawn: then nothing here reads them."""
        if self.draws_sizes:
            return None
        targets = super().targets(args, kwargs, given)
        if targets is None:
            return None
        ratios = self.ratios(pictures_of(args, kwargs), targets.sizes)
        return replace(targets, boxes=[scaled(b, *r) for b, r in zip(targets.boxes, ratios, strict=True)])

    def sizes(self, pictures: Any) -> list[tuple[int, int]]:
        """After the detector's own resizing, without padding. Worked out, as its ``resize`` draws a size in training
        even where there is one alone, and so would change what the student draws after it."""
        fixed, most, least = (
            getattr(self.transform, "fixed_size", None),
            self.transform.max_size,
            self.transform.min_size,
        )
        if self.transform.training and getattr(self.transform, "_skip_resize", False):
            return super().sizes(pictures)
        sizes = []
        for height, width in super().sizes(pictures):
            scale = min(least[-1] / min(height, width), most / max(height, width))
            sizes.append((fixed[1], fixed[0]) if fixed else (math.floor(height * scale), math.floor(width * scale)))
        return sizes

    def ratios(self, pictures: Any, resized: list[tuple[int, int]]) -> list[tuple[float, float]]:
        """What x and y of each picture are multiplied by when it is resized to these ``sizes``."""
        pairs = zip(super().sizes(pictures), resized, strict=True)
        return [(w / width, h / height) for (height, width), (h, w) in pairs]

    def call(self, model: nn.Module, pictures: Any, targets: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if targets is None:
            return (pictures,), {}
        rows = [{"boxes": t["boxes"], "labels": t["labels"] + self.first_class} for t in targets]
        return (pictures, rows), {}

    def detections(self, model: nn.Module, output: Any, pictures: Sequence[Tensor]) -> Any:
        return [{**row, "labels": row["labels"] - self.first_class} for row in predictions_of(output)]

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        pictures = pictures_of(args, kwargs)
        ratios = self.ratios(pictures, self.sizes(pictures))
        rows = [
            {**row, "boxes": scaled(row["boxes"], *ratio)}
            for row, ratio in zip(predictions_of(output), ratios, strict=True)
        ]
        return super().proof(view, rows, args, kwargs)

    def unexplained(
        self,
        view: DenseDetections,
        predicted: Tensor,
        image: int,
        size: tuple[int, int],
        distance: Tensor,
        allowed: Tensor,
    ) -> str:
        return (
            f"{self.name} does not predict what its layers say: a box of picture {image} is "
            f"{distance.amin(1).max().item():.2f} pixels from that of every anchor. If its head or the post-processing "
            "is your own, write an adapter: docs/write-an-adapter.md"
        )


@dataclass(frozen=True)
class Level:
    """One of the maps that a backbone returns. stride: in pixels; width: channels."""

    stride: int
    width: int


def scaled(boxes: Tensor, x: float, y: float) -> Tensor:
    """Boxes (k, 4) with x1 and x2, y1 and y2 multiplied; nothing is copied to the device for it."""
    if x == y:
        return boxes if x == 1 else boxes * x
    return torch.stack([side * by for side, by in zip(boxes.unbind(1), (x, y, x, y), strict=True)], 1)


@torch.no_grad()
def levels_of(model: Any) -> tuple[Level, ...]:
    """What the backbone returns, by a run without numbers."""
    backbone, size = model.backbone, getattr(model.transform, "fixed_size", None)
    height, width = PROBE if size is None else (size[1], size[0])
    ghosts = {n: t.detach().to("meta") for n, t in chain(backbone.named_parameters(), backbone.named_buffers())}
    maps = torch.func.functional_call(backbone, ghosts, (torch.empty(2, 3, height, width, device="meta"),))
    maps = [maps] if isinstance(maps, Tensor) else list(maps.values())
    return tuple(Level(round(width / m.shape[-1]), m.shape[1]) for m in maps)


def _shapes(anchors: Any) -> tuple[Any, ...]:
    """Of every level, what makes its anchors."""
    if hasattr(anchors, "sizes"):
        return tuple((tuple(s), tuple(r)) for s, r in zip(anchors.sizes, anchors.aspect_ratios, strict=True))
    return tuple((tuple(s), tuple(r)) for s, r in zip(pairwise(anchors.scales), anchors.aspect_ratios, strict=True))
