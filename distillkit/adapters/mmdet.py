"""Detectors of mmdet, called as it calls them: ``model(inputs, data_samples, mode="loss")``.

Every one has features, the maps of its neck. The dense heads below also have ``DenseDetections``: what the head
returns, so that GFL's edge logits are those after the scales. A teacher is called as for a prediction and runs no
further than what is read: the neck for features, the head's convolutions for detections; it decodes nothing, and its
NMS, assigner and losses do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.boxes.anchors import grid_anchors, grid_points
from distillkit.boxes.iou import check_boxes
from distillkit.boxes.maps import Maps
from distillkit.core.adapter import AS_LOADED, Adapter, Norm
from distillkit.core.errors import ViewError
from distillkit.core.taps import Place
from distillkit.core.views import BoxTargets, DenseDetections, Features, View

#: heads whose outputs are known: what they return after the class logits and the boxes, a factor of their scores or
#: nothing. A subclass that changes how it predicts is another head.
HEADS = {
    "GFLHead": None,
    "RetinaHead": None,
    "ATSSHead": "centerness",
    "FCOSHead": "centerness",
    "RTMDetHead": None,
    "RTMDetSepBNHead": None,
}
PREDICTING = ("forward", "forward_single", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")
#: of a picture's meta data, what stays as it is when a model is asked what it predicts in pixels of its input
META = ("img_shape", "pad_shape", "batch_input_shape")


def mmdet(model: nn.Module) -> MMDet:
    """The adapter of a detector, by its head."""
    return MMDetHead(model) if _known_head(getattr(model, "bbox_head", None)) else MMDet()


class MMDet(Adapter):
    """Any detector of mmdet: features at the neck, losses as mmengine reads them.

    Pictures are those that the student's ``data_preprocessor`` has made. A teacher with other mean and std, or with the
    other order of channels, gets them as its own would have made them, but for the colour that a batch is padded with:
    it is 0 after the student's normalisation.
    """

    def normalisation(self, model: nn.Module) -> Norm | None:
        if self.norm is not None:
            return self.norm
        prepared = getattr(model, "data_preprocessor", None)
        if not getattr(prepared, "_enable_normalize", False):
            return AS_LOADED
        return tuple(prepared.mean.flatten().tolist()), tuple(prepared.std.flatten().tolist())  # type: ignore[union-attr]

    def channels(self, model: nn.Module) -> Literal["rgb", "bgr"] | None:
        """mmdet reads pictures as BGR, and has models for both."""
        return "rgb" if getattr(model.data_preprocessor, "_channel_conversion", False) else "bgr"

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is Features and at is None and (maps := _neck(model)):
            return (Place(maps),)
        if kind is DenseDetections:
            head = type(getattr(model, "bbox_head", getattr(model, "roi_head", None))).__name__
            raise ViewError(
                f"{type(model).__name__} of mmdet has the head {head}, of which distillkit reads no detections; of "
                f"{', '.join(HEADS)} it does. Distil its features, or pass adapter=distillkit.DistributionHead(...)"
            )
        return super().places(model, kind, at)

    def widths(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> list[int] | None:
        return super().widths(model, kind, _neck(model) if at is None else at)

    def losses(self, output: Any) -> dict[str, Tensor]:
        """As mmengine's ``parse_losses``: entries with "loss" in their name, each tensor's mean, lists summed up."""
        return {
            name: torch.stack([v.mean() for v in value]).sum() if isinstance(value, list | tuple) else value.mean()
            for name, value in output.items()
            if "loss" in name
        }

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        """Ground truth of the data samples, without what is to be ignored. The picture is what is padded to a multiple
        of the preprocessor's divisor, in which mmdet's assigners choose anchors, not all of the batch's."""
        samples = _samples(args, kwargs) if given is None else given
        if samples is None:
            return None
        boxes, labels, sizes = [], [], []
        for i, sample in enumerate(samples):
            truth = sample.gt_instances
            box = getattr(truth.bboxes, "tensor", truth.bboxes)
            check_boxes(i, box)
            boxes.append(box)
            labels.append(truth.labels)
            height, width = sample.metainfo.get("pad_shape", sample.img_shape)[:2]
            sizes.append((int(height), int(width)))
        return BoxTargets(boxes, labels, sizes)

    def without_targets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A prediction in pixels of the input, on data samples that hold sizes alone: a detector writes its predictions
        into them."""
        inputs = args[0] if args else kwargs["inputs"]
        samples = _samples(args, kwargs)
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "tensor")
        if samples is None or mode != "loss":
            raise ViewError(
                "in train mode a detector of mmdet is called model(inputs, data_samples, mode='loss'), "
                f"got mode={mode!r}"
                f"{' and no data samples' if samples is None else ''}"
            )
        return (inputs, [_sizes_alone(sample) for sample in samples]), {"mode": "predict"}


class MMDetHead(MMDet, DistributionHead):
    """A detector with one of ``HEADS``, found out from the model.

    Of a head without distributions the boxes are read as well, for the proof, and its regions follow its own anchors.

    Raises:
        ViewError: class logits with a softmax.
    """

    def __init__(self, model: nn.Module):
        head: Any = model.bbox_head
        kind = _known_head(head)
        if kind is None:
            raise ViewError(f"{type(head).__name__} is none of the heads that are known: {', '.join(HEADS)}")
        if not head.use_sigmoid_cls:
            raise ViewError(
                f"{type(head).__name__} has a softmax over classes and background; distillkit reads sigmoids"
            )
        strides = [stride if isinstance(stride, int) else stride[0] for stride in head.prior_generator.strides]
        levels = range(len(strides))
        distributions = kind == "GFLHead"
        squares = _squares(head.prior_generator)
        super().__init__(
            classes=[f"bbox_head[0][{i}]" for i in levels],
            edges=[f"bbox_head[1][{i}]" for i in levels],
            strides=strides,
            bins=head.reg_max + 1 if distributions else 1,
            centre=squares[0] if squares else 0.0,
            features=_neck(model),
            octave=squares[1] if squares else 8.0,
        )
        self.per_cell = head.num_base_priors
        self.distributions = distributions
        self.factors = tuple(f"bbox_head[2][{i}]" for i in levels) if HEADS[kind] else ()
        self.anchors_of: Callable[..., Sequence[Tensor]] | None = None if squares else head.prior_generator.grid_priors
        self.coder = head.bbox_coder
        self.name = type(head).__name__

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is not DenseDetections:
            return super().places(model, kind, at)
        return (self.classes, self.edges, *([Place(self.factors)] if self.factors else []))

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind is not DenseDetections or self.distributions:
            return super().view(model, kind, tensors, output)
        levels = len(self.strides)
        classes, boxes, factors = (tuple(tensors[i * levels : (i + 1) * levels]) for i in range(3))
        read = Decodable(
            classes=Maps(classes, (classes[0].shape[1] // self.per_cell,), self.per_cell),
            edges=None,
            strides=self.strides,
            centre=self.centre,
            octave=self.octave,
            boxes=Maps(boxes, (4,), self.per_cell),
        )
        if self.anchors_of is not None:
            sizes = [tuple(level.shape[-2:]) for level in classes]
            read = replace(read, anchors=torch.cat(list(self.anchors_of(sizes, device=classes[0].device))))
        if factors:
            scores = tuple(c.detach().sigmoid() * f.detach().sigmoid() for c, f in zip(classes, factors, strict=True))
            read = replace(read, scores=Maps(scores, read.classes.shape, self.per_cell))
        return read

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """What mmdet predicts, in torchvision's form; boxes are clipped to the picture without its padding."""
        found = [sample.pred_instances for sample in output]
        rows = [{"boxes": p.bboxes, "scores": p.scores, "labels": p.labels} for p in found]
        pictures = [torch.empty((3, *sample.img_shape[:2]), device="meta") for sample in output]
        return super().proof(view, rows, (pictures,), {})

    def unexplained(
        self,
        view: DenseDetections,
        predicted: Tensor,
        image: int,
        size: tuple[int, int],
        distance: Tensor,
        allowed: Tensor,
    ) -> str:
        if self.distributions:
            return super().unexplained(view, predicted, image, size, distance, allowed)
        return (
            f"what {self.name} returns does not explain the detector's own boxes: one of picture {image} is "
            f"{distance.amin(1).max().item():.2f} pixels from every box decoded from it (strides {self.strides}). A "
            "head that decodes or predicts in another way needs an adapter of its own"
        )

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        if not isinstance(view, Decodable):
            return super().decoded(view, centre)
        assert view.boxes is not None
        sizes, device = view.classes.sizes, view.classes.levels[0].device
        if view.anchors is not None:
            priors = view.anchors
        elif "DistancePoint" in type(self.coder).__name__:
            priors = grid_points(sizes, view.strides, centre, device)
        else:
            priors = grid_anchors(sizes, view.strides, centre, view.octave, device)
        return torch.stack([self.coder.decode(priors, boxes) for boxes in view.boxes.all().float()])


@dataclass(frozen=True)
class Decodable(DenseDetections):
    """boxes: (4,) numbers an anchor, as the head's coder decodes them; for the proof."""

    boxes: Maps | None = None


def _known_head(head: Any) -> str | None:
    """Which of ``HEADS`` a head is: its class, or a base that it predicts in the same way as."""
    for base in type(head).__mro__:
        if base.__name__ in HEADS and base.__module__.startswith("mmdet."):
            same = all(getattr(type(head), name, None) is getattr(base, name, None) for name in PREDICTING)
            return base.__name__ if same else None
    return None


def _squares(priors: Any) -> tuple[float, float] | None:
    """(centre, octave) of a generator of one square or one point a cell; None for any other anchors."""
    if hasattr(priors, "offset"):  # points
        return float(priors.offset), 8.0
    found = set()
    for (stride, _), base in zip(priors.strides, priors.base_anchors, strict=True):
        if len(base) != 1:
            return None
        x1, y1, x2, y2 = (base[0] / stride).tolist()
        if x1 != y1 or x2 != y2:
            return None
        found.add((round((x1 + x2) / 2, 4), round(x2 - x1, 4)))
    return found.pop() if len(found) == 1 else None


def _neck(model: nn.Module) -> tuple[str, ...] | None:
    """Paths of the neck's maps, where their number is known."""
    neck, head = getattr(model, "neck", None), getattr(model, "bbox_head", None)
    if neck is None:
        return None
    maps = getattr(neck, "num_outs", None) or len(getattr(getattr(head, "prior_generator", None), "strides", ()))
    if not maps and hasattr(neck, "convs"):  # a channel mapper, before transformers
        maps = len(neck.convs) + len(neck.extra_convs or ())
    return tuple(f"neck[{i}]" for i in range(maps)) or None


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("data_samples")


def _sizes_alone(sample: Any) -> Any:
    """A data sample of the same class with nothing but the sizes of the input."""
    meta = {name: sample.metainfo[name] for name in META if name in sample.metainfo}
    return type(sample)(metainfo={**meta, "ori_shape": meta["img_shape"], "scale_factor": (1.0, 1.0)})
