"""torchvision's FCOS, RetinaNet and SSD: class logits and four numbers, or distributions, of every anchor."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distillkit.adapters.to_distribution import DistributionLayer
from distillkit.adapters.torchvision import AnchorDetections, TorchvisionDetector
from distillkit.boxes.distribution import integral
from distillkit.boxes.maps import Computed, Maps
from distillkit.core.taps import Place
from distillkit.core.views import BoxTargets, DenseDetections

OCTAVE = 8.0  # FCOS has points; side of the squares around them, in strides, by which regions measure overlap


class OneStage(TorchvisionDetector):
    """A head with class logits and four numbers, or distributions, of every anchor."""

    classes_at, numbers_at = "head.classification_head.cls_logits", "head.regression_head.bbox_reg"
    fires_once_a_level = True  # a layer that all levels share
    centre, octave = 0.0, 0.0
    unit: ClassVar[Literal["strides", "anchors"]] = "anchors"

    def __init__(self, model: nn.Module):
        super().__init__(model, model.anchor_generator, "anchor_generator")  # type: ignore[arg-type]
        self.coder: Any = model.box_coder
        fires = len(self.levels) if self.fires_once_a_level else 1
        self.classes = Place((self.classes_at,), fires)
        regression = dict(model.named_modules()).get(self.numbers_at)
        self.layer = regression if isinstance(regression, DistributionLayer) else None
        self.numbers = Place((f"{self.numbers_at}.logits" if self.layer else self.numbers_at,), fires)

    def dense_places(self) -> tuple[Place, ...]:
        return (self.classes, self.numbers, self.anchors)

    def dense_view(self, tensors: list[Any]) -> DenseDetections:
        count = len(self.levels)
        levels, numbers, (anchors, *_) = tensors[:count], tuple(tensors[count : 2 * count]), tensors[2 * count :]
        classes = Maps(tuple(levels), (levels[0].shape[1] // self.per_cell[0],), _one_or_each(self.per_cell))
        bins = None if self.layer is None else self.layer.bins
        edges = None if bins is None else Maps(numbers, (4, len(bins)), classes.anchors)
        return AnchorDetections(
            classes=classes,
            edges=edges,
            strides=self.strides,
            centre=self.centre,
            support=bins,
            octave=self.octave,
            unit=self.unit,
            anchors=self.seen_as(anchors.float()),
            scores=self.scores(classes, tensors),
            numbers=Maps(numbers, (4,), classes.anchors) if edges is None else None,
            shapes=self.shapes,
            resize=self.resize,
        )

    def seen_as(self, anchors: Tensor) -> Tensor:
        """What regions take anchors (N, 4) for."""
        return anchors

    def scores(self, classes: Maps, tensors: list[Any]) -> Maps | None:
        """Class probabilities where they are not the sigmoid of ``classes``."""
        return None

    def boxes(self, view: DenseDetections) -> Tensor:
        assert isinstance(view, AnchorDetections)
        assert view.anchors is not None
        if view.edges is not None:
            numbers = integral(view.edges.all().float(), view.support)
        else:
            assert view.numbers is not None
            numbers = view.numbers.all().float()
        return torch.stack([self.decoded(row, view.anchors) for row in numbers])

    def decoded(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """(N, 4) as the head regresses them, and the view's anchors -> boxes (N, 4)."""
        return self.coder.decode_single(numbers, anchors)

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        targets = super().targets(args, kwargs, given)
        if targets is not None and self.layer is not None:
            for i, boxes in enumerate(targets.boxes):
                if len(boxes) and boxes.device.type == "cpu":
                    self.layer.check_reach(*self.extremes(boxes[:, 2:] - boxes[:, :2]), f"the boxes of target {i}")
        return targets

    def extremes(self, sides: Tensor) -> tuple[float, float]:
        """The least and the greatest number that some anchor of objects with these (k, 2) sides is taught at least."""
        raise NotImplementedError


class FCOSAdapter(OneStage):
    """Distances in sizes of a level's one anchor, which stand for its stride; a score is sqrt(class * centerness)."""

    octave = OCTAVE
    unit = "strides"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.centerness = Place(("head.regression_head.bbox_ctrness",), len(self.levels))

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(int(sizes[0]) for sizes, _ in self.shapes)

    def dense_places(self) -> tuple[Place, ...]:
        return (*super().dense_places(), self.centerness)

    def seen_as(self, anchors: Tensor) -> Tensor:
        """Squares of ``octave`` strides around the points; the anchor itself is one stride wide."""
        grown = (anchors[:, 2:] - anchors[:, :2]) * ((self.octave - 1) / 2)
        return torch.cat([anchors[:, :2] - grown, anchors[:, 2:] + grown], 1)

    def scores(self, classes: Maps, tensors: list[Any]) -> Maps:
        return Computed(_mean_of_both, classes, Maps(tuple(tensors[-len(self.levels) :]), (1,)))

    def decoded(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        shrunk = (anchors[:, 2:] - anchors[:, :2]) * ((1 - 1 / self.octave) / 2)
        cells = torch.cat([anchors[:, :2] + shrunk, anchors[:, 2:] - shrunk], 1)
        return self.coder.decode(numbers.relu(), cells)

    def extremes(self, sides: Tensor) -> tuple[float, float]:
        """From its centre an object reaches half of its longest side, on the last level in the largest strides."""
        return 0.0, float(sides.max()) / 2 / self.strides[-1]


class RetinaNetAdapter(OneStage):
    """What is done to each of several anchors a cell: deltas of the centre, and logarithms of the sides."""

    def extremes(self, sides: Tensor) -> tuple[float, float]:
        """Logarithms of sides over those of the largest anchor, where they are larger; the smallest, if smaller."""
        shapes = [
            (size * ratio**-0.5, size * ratio**0.5)
            for sizes, ratios in self.shapes
            for size in sizes
            for ratio in ratios
        ]
        least, greatest = 0.0, 0.0
        for mine, anchors, weight in zip(sides.T, zip(*shapes), self.coder.weights[2:], strict=True):
            least = min(least, weight * math.log(float(mine.min()) / min(anchors)))
            greatest = max(greatest, weight * math.log(float(mine.max()) / max(anchors)))
        return least, greatest


class SSDAdapter(OneStage):
    """A layer for each level, and a softmax over the classes with the background as the first of them."""

    classes_at, numbers_at = "head.classification_head.module_list.*", "head.regression_head.module_list.*"
    fires_once_a_level = False
    centre = 0.5
    first_class = 1

    def scores(self, classes: Maps, tensors: list[Any]) -> Maps:
        return Computed(_of_objects, classes)


@torch.no_grad()
def _mean_of_both(classes: Tensor, centerness: Tensor) -> Tensor:
    """FCOS's scores: the geometric mean of its class probabilities and its centerness."""
    return (classes.sigmoid() * centerness.sigmoid()).sqrt()


@torch.no_grad()
def _of_objects(classes: Tensor) -> Tensor:
    """SSD's scores: 0 for the background, which is no object's class."""
    said = classes.softmax(-1)
    return torch.cat([torch.zeros_like(said[..., :1]), said[..., 1:]], -1)


def _one_or_each(numbers: tuple[int, ...]) -> int | tuple[int, ...]:
    return numbers[0] if len(set(numbers)) == 1 else numbers
