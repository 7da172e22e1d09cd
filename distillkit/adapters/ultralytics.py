"""Models of ultralytics, called as its trainer calls them: ``model(batch)`` with its dict of ``img``, ``cls``,
``bboxes`` and ``batch_idx``.

Every one with a head on several maps has features, the maps that the head reads. Detection models (``Detect``,
``v10Detect``) also have ``DenseDetections``: what the head's two branches return, level by level, before anything is
joined or decoded. A teacher gets the pictures alone and runs no further than what is read: to the neck for features, to
the end of the branches for detections. It decodes nothing, and neither NMS nor its assigner and losses run.

ultralytics is under the AGPL: it is never imported here, and found by the name of a model's class alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.adapters.ultralytics_batch import INFERENCE, batch_of, box_targets, kept, surest
from distillkit.boxes.anchors import grid_points, grid_strides
from distillkit.boxes.distribution import decode
from distillkit.boxes.maps import Maps
from distillkit.core.adapter import AS_LOADED, Adapter, Norm
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.taps import AllTapsFired, Place, Taps
from distillkit.core.views import ClassLogits, DenseDetections, Features, View

#: heads of which detections are read; a subclass of them predicts something else as well (masks, angles, key points)
HEADS = ("Detect", "v10Detect")
#: what its losses are called where a version returns them without names
LOSSES = ("box_loss", "cls_loss", "dfl_loss")
#: side of the square picture without numbers by which widths are found out
PROBE = 256


def ultralytics(model: nn.Module) -> Ultralytics:
    """The adapter of a model, by its head."""
    head = _head(model)
    if type(head).__name__ in HEADS:
        return UltralyticsHead(model)
    adapter = Ultralytics()
    adapter.grows_with_batch = any(base.__name__ == "Detect" for base in type(head).__mro__)
    return adapter


class Ultralytics(Adapter):
    """Any model of ultralytics: features where its head reads them, losses as the model computes them.

    Pictures are RGB in 0..1, as its trainer gives them, and are not normalised further.
    """

    form = "model(batch)"
    #: whether its losses come multiplied by the pictures of a batch; RT-DETR's and a classifier's do not
    grows_with_batch = False

    def normalisation(self, model: nn.Module) -> Norm | None:
        return self.norm or AS_LOADED

    def channels(self, model: nn.Module) -> Literal["rgb", "bgr"] | None:
        return "rgb"

    def class_names(self, model: nn.Module) -> Sequence[str] | None:
        """``model.names``, unless they are numbers: those of a model whose data are not known yet."""
        names = getattr(model, "names", None) or {}
        if not isinstance(names, Mapping):
            names = dict(enumerate(names))
        if all(str(name) == str(i) for i, name in names.items()):
            return None
        return [str(names[i]) for i in sorted(names)]

    def with_pictures(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = _batch(args, kwargs)
        if not isinstance(batch, Mapping):
            return super().with_pictures(args, kwargs, change)
        return ({**batch, "img": change(batch["img"])},), {}

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        _check_gains(model)
        return self.teacher_places(model, kind, at)

    def teacher_places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        head = _head(model)
        if kind is Features and at is None and len(maps := _inputs(head)) > 1:
            return (Place(maps),)
        if kind is ClassLogits and at is None:
            if isinstance(getattr(head, "linear", None), nn.Module):  # what a classifier returns is a softmax
                return (Place((f"{_path(head)}.linear",)),)
            raise ViewError(
                f"{type(model).__name__} has no class logits of a whole picture; of a detection model say which "
                "anchors, as in LogitKD(Main())"
            )
        if kind is DenseDetections:
            raise ViewError(
                f"{type(model).__name__} of ultralytics has the head {type(head).__name__}, of which distillkit reads "
                f"no detections; of {' and '.join(HEADS)} it does. Distil its features"
            )
        return super().places(model, kind, at)

    def widths(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> list[int] | None:
        """By a run without numbers up to the head: a block's last module is not the last that it runs."""
        if kind is not Features:
            return super().widths(model, kind, at)
        paths = _inputs(_head(model)) if at is None else at
        if any("[" in path or path.startswith(_path(_head(model))) for path in paths):
            return super().widths(model, kind, paths)
        return _widths(model, paths)

    def losses(self, output: Any) -> dict[str, Tensor]:
        """Each of its losses under the name that its trainer prints."""
        loss, items = output if isinstance(output, tuple) and len(output) == 2 else (output, {})
        if not isinstance(loss, Tensor):
            return {}
        names = tuple(items) if isinstance(items, Mapping) else LOSSES
        if loss.dim() == 1 and len(names) == len(loss):
            return dict(zip(names, loss.unbind(), strict=True))
        return {"task": loss.sum()}

    def task_losses(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """For one picture, so that they keep their proportion to those of distillers at any batch size."""
        losses, batch = self.losses(output), _batch(args, kwargs)
        if not isinstance(batch, Mapping) or not self.grows_with_batch:
            return losses
        return {name: loss / len(batch["img"]) for name, loss in losses.items()}

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> Any:
        """Ground truth of the batch, in pixels; of batches without upright boxes, their classes."""
        batch = _batch(args, kwargs) if given is None else given
        if not isinstance(batch, Mapping):
            return super().targets(args, kwargs, given)
        if "bboxes" not in batch or batch["bboxes"].shape[-1] != 4:
            return batch.get("cls")
        return box_targets(batch)

    def call(self, model: nn.Module, pictures: Any, targets: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pictures filled up with its trainer's grey, at the right and below, to whole cells of the coarsest map."""
        multiple = max(int(model.stride.max()), 32)  # type: ignore[operator, union-attr]
        return (batch_of(pictures, targets, multiple),), {}

    def without_targets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The pictures of a batch; a student of another family gives them as they are, or as a list of equal sizes."""
        pictures = _batch(args, kwargs)
        if isinstance(pictures, Mapping):
            pictures = pictures["img"]
        if isinstance(pictures, list | tuple):
            pictures = torch.stack(list(pictures))
        return (pictures,), {}


class UltralyticsHead(Ultralytics, DistributionHead):
    """A detection model, found out from the model.

    Of a head of which one branch is for predictions without NMS (YOLO26, YOLOv10) the other is read: what the first
    learns does not reach the backbone, by its own design. Where ``fuse()`` has left the first alone, that is read.

    Args:
        model: the model.
        octave: as in ``DistributionHead``.
    """

    grows_with_batch = True

    def __init__(self, model: nn.Module, octave: float = 8.0):
        head = _head(model)
        self.alone = head.cv2 is None
        boxes, classes = (f"{_path(head)}.{'one2one_' if self.alone else ''}{name}.*" for name in ("cv2", "cv3"))
        self.has_distributions = head.reg_max > 1
        super().__init__(
            classes=classes,
            edges=boxes,
            strides=[int(stride) for stride in head.stride.tolist()],
            bins=head.reg_max,
            centre=0.5,
            features=_inputs(head),
            octave=octave,
        )
        self.num_classes = int(head.nc)
        self.inference = INFERENCE

    def teacher_places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is DenseDetections:
            return (self.classes, self.edges)
        return super().teacher_places(model, kind, at)

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind is not DenseDetections:
            return super().view(model, kind, tensors, output)
        head, levels = _head(model), len(self.strides)
        return YoloDetections(
            classes=Maps(tuple(tensors[:levels]), (self.num_classes,)),
            edges=Maps(tuple(tensors[levels:]), (4, self.bins)) if self.has_distributions else None,
            strides=self.strides,
            centre=self.centre,
            octave=self.octave,
            distances=None if self.has_distributions else Maps(tuple(tensors[levels:]), (4,)),
            corners=bool(head.end2end or getattr(head, "xyxy", False)),
            one_to_one=bool(head.end2end),
        )

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        if not isinstance(view, YoloDetections) or view.distances is None:
            return super().decoded(view, centre)
        maps = view.distances
        points = grid_points(maps.sizes, view.strides, centre, maps.levels[0].device)
        strides = grid_strides(maps.sizes, view.strides, maps.levels[0].device)
        return decode(points, maps.all().float() * strides[:, None])

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """What the model predicts, best first, in torchvision's form.

        Where it predicts by the branch that is not read, its decoding is held against that branch's own maps, and what
        is tapped against those that the head returns of the other.
        """
        assert isinstance(view, YoloDetections)
        predicted, raw = output if isinstance(output, tuple) else (output, {})
        if view.one_to_one and not self.alone:
            check_same(view, raw["one2many"])
            view = view.made_of(raw["one2one"])
        if view.one_to_one:
            rows = [{"boxes": row[:, :4], "scores": row[:, 4], "labels": row[:, 5]} for row in predicted]
        else:
            rows = [surest(row, view.corners) for row in predicted.transpose(1, 2)]
        return super().proof(view, rows, args, kwargs)

    def detections(self, model: nn.Module, output: Any, pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """By ``inference``: an anchor may be of several classes, as in its own validation. Where the model predicts
        without NMS, none is done."""
        head, predicted = _head(model), output[0] if isinstance(output, tuple) else output
        sizes = [(p.shape[-2], p.shape[-1]) for p in pictures]
        if head.end2end:
            rows = [row[row[:, 4] > self.inference.score][: self.inference.most] for row in predicted]
            return [
                {"boxes": clip_boxes_to_image(row[:, :4], size), "scores": row[:, 4], "labels": row[:, 5].long()}
                for row, size in zip(rows, sizes, strict=True)
            ]
        corners = getattr(head, "xyxy", False)
        anchors = predicted.transpose(1, 2)
        return [kept(row, corners, size, self.inference) for row, size in zip(anchors, sizes, strict=True)]

    def distances(self, predicted: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """As they are: it predicts boxes that reach beyond the picture."""
        return torch.cdist(predicted, boxes, p=float("inf"))

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
            f"{', '.join(self.edges.paths)} do not explain the model's own boxes: one of picture {image} is "
            f"{distance.amin(1).max().item():.2f} pixels from that of every anchor (strides {self.strides}, "
            f"{self.bins} bins, points in the middle of their cells). A head that decodes in another way needs an "
            "adapter of its own: docs/write-an-adapter.md"
        )


@dataclass(frozen=True)
class YoloDetections(DenseDetections):
    """``DenseDetections`` of a ``Detect`` head, with what its predictions are read by.

    Args:
        distances: (4,) numbers an anchor, in strides, of a head without distributions.
        corners: boxes are predicted as x1, y1, x2, y2, and not as cx, cy, w, h.
        one_to_one: they are those of the branch that needs no NMS.
    """

    distances: Maps | None = None
    corners: bool = False
    one_to_one: bool = False

    without_edges: ClassVar[str] = (
        "has a head with reg_max: 1 (YOLO26), which regresses four distances by a layer a level; "
        "distillkit.to_distribution replaces one layer alone. Build it from its yaml with reg_max: 16, take one that "
        "has distributions (YOLOv8, YOLO11), or leave this distiller out: LogitKD and FeatureImitation work"
    )

    def only(self, keep: Sequence[int]) -> YoloDetections:
        return replace(super().only(keep), distances=self.distances and self.distances.only(keep))

    def made_of(self, raw: Mapping[str, Tensor]) -> YoloDetections:
        """The same of another branch: ``boxes`` (B, 4 * bins, N) and ``scores`` (B, C, N), levels one after another."""
        counts, sizes = list(self.classes.counts), self.classes.sizes

        def levels(joined: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.unflatten(2, size) for part, size in zip(joined.split(counts, 2), sizes, strict=True))

        boxes = levels(raw["boxes"])
        return replace(
            self,
            classes=replace(self.classes, levels=levels(raw["scores"])),
            edges=self.edges and replace(self.edges, levels=boxes),
            distances=self.distances and replace(self.distances, levels=boxes),
        )


def check_same(view: YoloDetections, raw: Mapping[str, Tensor]) -> None:
    """Raise AdapterError unless a view holds the maps of a branch, see ``YoloDetections.made_of``."""
    tapped, said = view, view.made_of(raw)
    for mine, theirs in (
        (tapped.classes, said.classes),
        (tapped.edges or tapped.distances, said.edges or said.distances),
    ):
        assert mine is not None
        assert theirs is not None
        if not all(torch.allclose(a, b) for a, b in zip(mine.levels, theirs.levels, strict=True)):
            raise AdapterError(
                "the tapped maps are not those that the head returns as one2many: a head that does more than its cv2 "
                "and cv3 needs an adapter of its own: docs/write-an-adapter.md"
            )


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _head(model: nn.Module) -> Any:
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential):
        raise ViewError(
            f"{type(model).__name__}: expected a model of ultralytics.nn.tasks, e.g. YOLO('yolo11n.yaml').model"
        )
    return layers[-1]


def _path(head: Any) -> str:
    return f"model.{head.i}"


def _inputs(head: Any) -> tuple[str, ...]:
    """Paths of the maps that the head reads."""
    read = [head.f] if isinstance(head.f, int) else head.f
    return tuple(f"model.{i if i >= 0 else head.i + i}" for i in read)


def _check_gains(model: nn.Module) -> None:
    """A student weighs its losses by what its trainer puts into ``args``."""
    if getattr(model, "criterion", None) is None and not hasattr(getattr(model, "args", None), "box"):
        raise ViewError(
            f"{type(model).__name__} has no gains of its losses in model.args, which its own trainer sets: "
            "model.args = ultralytics.cfg.get_cfg(), or get_cfg(overrides={'box': 7.5, ...})"
        )


@torch.no_grad()
def _widths(model: nn.Module, paths: tuple[str, ...]) -> list[int] | None:
    """Channels of the maps that modules before the head return; None where one does not run."""
    ghosts = {n: t.detach().to("meta") for n, t in chain(model.named_parameters(), model.named_buffers())}
    channels = getattr(model, "yaml", {}).get("channels", 3)
    place = Place(paths)
    taps = Taps(model, [place], type(model).__name__)
    stop = _head(model).register_forward_pre_hook(_halt)
    taps.start()
    try:
        torch.func.functional_call(model, ghosts, (torch.empty(2, channels, PROBE, PROBE, device="meta"),))
    except AllTapsFired:
        caught = taps.stop()
        return [m.shape[1] for m in taps.read(caught, place)] if all(caught.values()) else None
    finally:
        stop.remove()
        taps.remove()
    return None


def _halt(module: nn.Module, args: Any) -> None:
    raise AllTapsFired
