"""Detectors of mmdet, called as it calls them: ``model(inputs, data_samples, mode="loss")``.

Every one has features, the maps of its neck. The dense heads below also have ``DenseDetections``: what the head
returns, so that GFL's edge logits are those after the scales. A teacher is called as for a prediction and runs no
further than what is read: the neck for features, the head's convolutions for detections; it decodes nothing, and its
NMS, assigner and losses do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.adapters.to_distribution import DistributionLayer
from distillkit.boxes.anchors import grid_anchors, grid_points
from distillkit.boxes.distribution import integral
from distillkit.boxes.iou import check_boxes
from distillkit.boxes.maps import Computed, Maps
from distillkit.core.adapter import AS_LOADED, Adapter, Norm
from distillkit.core.errors import ViewError
from distillkit.core.taps import Place
from distillkit.core.views import BoxTargets, DenseDetections, Features, View

#: heads whose outputs are known: what they return after the class logits. A subclass that changes how it predicts is
#: another head.
HEADS = {
    "GFLHead": ("edges",),
    "RetinaHead": ("boxes",),
    "ATSSHead": ("boxes", "centerness"),
    "FCOSHead": ("boxes", "centerness"),
    "RTMDetHead": ("boxes",),
    "RTMDetSepBNHead": ("boxes",),
}
PREDICTING = ("forward", "forward_single", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")
#: of a picture's meta data, what stays as it is when a model is asked what it predicts in pixels of its input
META = ("img_shape", "pad_shape", "batch_input_shape")
#: sizes of maps whose anchors are remembered, for pictures of several sizes
REMEMBERED = 16
#: the last regression layer of a RetinaHead, which ``to_distribution`` gives distributions
REGRESSION = "bbox_head.retina_reg"


def mmdet(model: nn.Module) -> MMDet:
    """The adapter of a detector, by its head."""
    return MMDetHead(model) if known_head(getattr(model, "bbox_head", None)) else MMDet()


class MMDet(Adapter):
    """Any detector of mmdet: features at the neck, losses as mmengine reads them.

    Pictures are those that the student's ``data_preprocessor`` has made. A teacher with other mean and std, or with the
    other order of channels, gets them as its own would have made them, but for the colour that a batch is padded with:
    it is 0 after the student's normalisation.
    """

    heads: ClassVar[Mapping[str, tuple[str, ...]]] = HEADS
    form = "model(inputs, data_samples, mode='loss')"

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

    def class_names(self, model: nn.Module) -> Sequence[str] | None:
        """Of a model that mmdet's ``init_detector`` has made, or whose ``dataset_meta`` was set otherwise."""
        return (getattr(model, "dataset_meta", None) or {}).get("classes")

    def with_pictures(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The data samples get the sizes of what pictures are resized to; boxes in them stay, a teacher reads none."""
        before = args[0] if args else kwargs["inputs"]
        args, kwargs = super().with_pictures(args, kwargs, change)
        after, samples = args[0] if args else kwargs["inputs"], _samples(args, kwargs)
        if samples is None or before.shape == after.shape:
            return args, kwargs
        ratio = after.shape[-2] / before.shape[-2], after.shape[-1] / before.shape[-1]
        scaled = [_with_sizes(sample, *ratio) for sample in samples]
        if len(args) > 1:
            return (args[0], scaled, *args[2:]), kwargs
        return args, {**kwargs, "data_samples": scaled}

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is Features and at is None and (maps := _neck(model)):
            return (Place(maps),)
        if kind is DenseDetections:
            head = type(getattr(model, "bbox_head", getattr(model, "roi_head", None))).__name__
            raise ViewError(
                f"{type(model).__name__} of mmdet has the head {head}, of which distillkit reads no detections; of "
                f"{', '.join(self.heads)} it does. Distil its features, or pass "
                "adapter=distillkit.DistributionHead(...)"
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
            box = _tensor(truth.bboxes)
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

    def call(self, model: nn.Module, pictures: Any, targets: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What its ``data_preprocessor`` makes of them, which takes BGR in 0..255, as mmdet reads it."""
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        prepared: Any = model.data_preprocessor
        if prepared.device != (device := next(model.parameters()).device):  # the wrapper's moves do not tell it
            prepared.to(device)
        samples = []
        for i, picture in enumerate(pictures):
            size = (int(picture.shape[-2]), int(picture.shape[-1]))
            sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
            if targets is not None:
                boxes, labels = targets[i]["boxes"], targets[i]["labels"]
                sample.gt_instances = InstanceData(bboxes=self.boxes_of(boxes), labels=labels)
                nothing = InstanceData(bboxes=self.boxes_of(boxes[:0]), labels=labels[:0])
                sample.ignored_instances = nothing
            samples.append(sample)
        batch = {"inputs": [255 * picture.flip(0) for picture in pictures], "data_samples": samples}
        data = prepared(batch, training=targets is not None)
        return (data["inputs"], data["data_samples"]), {"mode": "predict" if targets is None else "loss"}

    def boxes_of(self, boxes: Tensor) -> Any:
        """Boxes (k, 4) as its data samples hold them."""
        return boxes

    def detections(self, model: nn.Module, output: Any, pictures: Sequence[Tensor]) -> Any:
        found = [sample.pred_instances for sample in output]
        return [{"boxes": _tensor(f.bboxes), "scores": f.scores, "labels": f.labels} for f in found]


class MMDetHead(MMDet, DistributionHead):
    """A detector with one of ``HEADS``, found out from the model.

    Of a head without distributions the boxes are read as well, for the proof, and its regions follow its own anchors.
    One that went through ``to_distribution`` has distributions of what its coder decodes.

    Raises:
        ViewError: class logits with a softmax.
    """

    def __init__(self, model: nn.Module):
        head: Any = model.bbox_head
        kind = known_head(head, self.heads)
        if kind is None:
            raise ViewError(f"{type(head).__name__} is none of the heads that are known: {', '.join(self.heads)}")
        if not head.use_sigmoid_cls:
            raise ViewError(
                f"{type(head).__name__} has a softmax over classes and background; distillkit reads sigmoids"
            )
        strides = [stride if isinstance(stride, int) else stride[0] for stride in head.prior_generator.strides]
        levels = range(len(strides))
        regression = getattr(head, "retina_reg", None)
        self.layer = regression if isinstance(regression, DistributionLayer) else None
        squares = _squares(head.prior_generator)
        outputs = {name: [f"bbox_head[{place}][{i}]" for i in levels] for place, name in enumerate(self.heads[kind], 1)}
        first, *more = outputs.values()
        super().__init__(
            classes=[f"bbox_head[0][{i}]" for i in levels],
            edges=first if self.layer is None else f"{REGRESSION}.logits",
            strides=strides,
            bins=head.reg_max + 1 if kind == "GFLHead" else 1 if self.layer is None else self.layer.bins.tolist(),
            centre=squares[0] if squares else 0.0,
            features=_neck(model),
            octave=squares[1] if squares else 8.0,
        )
        self.per_cell = head.num_base_priors
        self.outputs = tuple(outputs) if self.layer is None else ("edges",)
        self.more = tuple(Place(tuple(paths)) for paths in more)
        self.priors = head.prior_generator
        self.anchors_of = None if squares else Anchors(self.priors)
        self.coder = head.bbox_coder
        self.told_by = _told_by(head)
        self.name = type(head).__name__

    @property
    def own_decoding(self) -> bool:
        """Whether boxes are decoded by the head's coder; else from distances to the edges, in strides."""
        return self.layer is not None or "edges" not in self.outputs

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is not DenseDetections:
            return super().places(model, kind, at)
        return (self.classes, self.edges, *self.more)

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind is not DenseDetections or not self.own_decoding:
            return super().view(model, kind, tensors, output)
        count, given = len(self.strides), {}
        for place, name in enumerate(("classes", *self.outputs)):
            maps = tuple(tensors[place * count : (place + 1) * count])
            given[name] = Maps(maps, (maps[0].shape[1] // self.per_cell,), self.per_cell)
        classes, edges = given["classes"], given.get("edges")
        device = classes.levels[0].device
        if edges is not None:
            edges = Maps(edges.levels, (self.sides, self.bins), self.per_cell)
        return Decodable(
            classes=classes,
            edges=edges,
            strides=self.strides,
            centre=self.centre,
            support=None if self.support is None else self.support.to(device),
            octave=self.octave,
            unit="anchors",
            anchors=None if self.anchors_of is None else self.anchors_of(classes.sizes, device),
            scores=Computed(_product, classes, given["centerness"]) if "centerness" in given else None,
            numbers=given.get("boxes"),
            angles=given.get("angles"),
            told_by=self.told_by,
        )

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        """Raises ValueError, too, for an object that the bins of ``to_distribution`` cannot say (on the CPU only)."""
        targets = super().targets(args, kwargs, given)
        if targets is not None and self.layer is not None:
            for i, boxes in enumerate(targets.boxes):
                if len(boxes) and boxes.device.type == "cpu":
                    self.layer.check_reach(*self.extremes(boxes), f"the boxes of target {i}")
        return targets

    def extremes(self, boxes: Tensor) -> tuple[float, float]:
        """The least and the greatest number that some anchor is taught at least: of every object the anchor that fits
        it best, at its place."""
        anchors = joined(self.priors.grid_priors([(1, 1)] * len(self.strides), device=boxes.device))
        numbers = self.encoded(anchors.repeat(len(boxes), 1), boxes.repeat_interleave(len(anchors), 0))
        numbers = numbers.unflatten(0, (len(boxes), len(anchors)))
        best = numbers[torch.arange(len(boxes)), numbers.abs().amax(-1).argmin(1)]
        return float(best.min()), float(best.max())

    def encoded(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What anchors are taught of objects of these sides in their middle, both (M, 4)."""
        shift = (anchors[:, :2] + anchors[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
        return self.coder.encode(anchors, boxes + torch.cat([shift, shift], 1))

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """What mmdet predicts, in torchvision's form; boxes are clipped to the picture without its padding."""
        found = [sample.pred_instances for sample in output]
        rows = [{"boxes": _tensor(p.bboxes), "scores": p.scores, "labels": p.labels} for p in found]
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
        if not self.own_decoding:
            return super().unexplained(view, predicted, image, size, distance, allowed)
        return (
            f"what {self.name} returns does not explain the detector's own boxes: one of picture {image} is "
            f"{distance.amin(1).max().item():.2f} pixels from every box decoded from it (strides {self.strides}). A "
            "head that decodes or predicts in another way needs an adapter of its own"
        )

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        if not isinstance(view, Decodable):
            return super().decoded(view, centre)
        sizes, device = view.classes.sizes, view.classes.levels[0].device
        if view.anchors is not None:
            priors = view.anchors
        elif "DistancePoint" in type(self.coder).__name__:
            priors = grid_points(sizes, view.strides, centre, device)
        else:
            priors = grid_anchors(sizes, view.strides, centre, view.octave, device)
        return torch.stack([self.coder.decode(priors, numbers) for numbers in view.all_numbers()])


@dataclass(frozen=True)
class Decodable(DenseDetections):
    """``DenseDetections`` of a head whose boxes its coder decodes.

    Args:
        numbers: (4,) or (5,) of every anchor, for the proof; None: the means of ``edges``.
        angles: of a head that has them apart: (n,), as its coder of angles decodes them.
        told_by: what gives a distribution's values their meaning, by name: it must be the same in both.
    """

    numbers: Maps | None = None
    angles: Maps | None = None
    told_by: Mapping[str, Any] = field(default_factory=dict)

    def all_numbers(self) -> Tensor:
        """(B, N, 4) or (B, N, 5), as the coder takes them, without angles that stand apart."""
        if self.numbers is not None:
            return self.numbers.all().float()
        assert self.edges is not None
        return integral(self.edges.all().float(), self.support)

    def match(self, student: DenseDetections) -> Any:
        if self.edges and student.edges and isinstance(student, Decodable):
            for name, mine in self.told_by.items():
                if mine != (theirs := student.told_by.get(name, mine)):
                    raise ValueError(
                        f"the distributions mean different things: the teacher's head has {name}={mine}, the student's "
                        f"{theirs}; build both with the same"
                    )
        return super().match(student)


class Anchors:
    """The anchors (N, 4) of a generator, remembered by the sizes of the maps."""

    def __init__(self, generator: Any):
        self.generator = generator
        self._made: dict[Any, Tensor] = {}

    def __call__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():  # nothing of a graph may outlive it
            return self.made(sizes, device)
        key = (tuple(sizes), device)
        if key not in self._made:
            if len(self._made) == REMEMBERED:
                self._made.clear()
            self._made[key] = self.made(sizes, device)
        return self._made[key]

    def made(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        return joined(self.generator.grid_priors(list(sizes), device=device))


def joined(priors: Sequence[Any]) -> Tensor:
    """What a generator made for each level, boxes of mmdet or tensors, in one tensor."""
    return torch.cat([_tensor(level) for level in priors])


def known_head(head: Any, heads: Mapping[str, Any] = HEADS) -> str | None:
    """Which of ``heads`` a head is: its class, or a base that it predicts in the same way as."""
    for base in type(head).__mro__:
        if base.__name__ in heads and base.__module__.startswith(("mmdet.", "mmrotate.")):
            same = all(getattr(type(head), name, None) is getattr(base, name, None) for name in PREDICTING)
            return base.__name__ if same else None
    return None


def _product(classes: Tensor, factor: Tensor) -> Tensor:
    """The scores of a head that multiplies its class probabilities by a centerness."""
    return classes.detach().sigmoid() * factor.detach().sigmoid()


def _told_by(head: Any) -> dict[str, Any]:
    """What of its anchors and its coder gives a head's numbers their meaning."""
    found: dict[str, Any] = {"bbox_coder": type(head.bbox_coder).__name__}
    for name, value in vars(head.bbox_coder).items():
        if isinstance(value, bool | float | str | tuple | list):
            found[f"bbox_coder.{name}"] = list(value) if isinstance(value, tuple) else value
    bases = getattr(head.prior_generator, "base_anchors", ())
    for stride, base in zip(head.prior_generator.strides, bases, strict=bool(bases)):
        found[f"anchors of stride {stride[0]}"] = [[round(side, 2) for side in anchor] for anchor in base.tolist()]
    if version := getattr(head.prior_generator, "angle_version", None):
        found["anchor_generator.angle_version"] = version
    return found


def _tensor(boxes: Any) -> Tensor:
    """Boxes of mmdet, or a tensor that they are already."""
    return getattr(boxes, "tensor", boxes)


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


def _with_sizes(sample: Any, y: float, x: float) -> Any:
    """A data sample of the same class with the sizes of its picture multiplied, and nothing else."""
    sizes = {name: sample.metainfo[name][:2] for name in META if name in sample.metainfo}
    return type(sample)(metainfo={name: (round(h * y), round(w * x)) for name, (h, w) in sizes.items()})


def _sizes_alone(sample: Any) -> Any:
    """A data sample of the same class with nothing but the sizes of the input."""
    meta = {name: sample.metainfo[name] for name in META if name in sample.metainfo}
    return type(sample)(metainfo={**meta, "ori_shape": meta["img_shape"], "scale_factor": (1.0, 1.0)})
