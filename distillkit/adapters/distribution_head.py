"""Any dense detector whose head predicts box edges as distributions: named by module paths, not rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.boxes.anchors import grid_points, grid_strides
from distillkit.boxes.distribution import decode, integral
from distillkit.boxes.iou import check_boxes
from distillkit.boxes.maps import Maps
from distillkit.core.adapter import Adapter, input_name
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.taps import Place
from distillkit.core.views import BoxTargets, DenseDetections, Features, View

LOOKED_AT = 50  # predictions of one picture that the proof compares
PIXELS, SCORE = 0.1, 1e-3  # how far a box's edge and its score may be from what is tapped
HALF = 2**-7  # the same in half precision: of the box's largest coordinate, and of a score


class DistributionHead(Adapter):
    """Where a dense detector's class logits and edge distributions are.

    ``DistributionHead(classes="head.gfl_cls", edges="head.scales.*", strides=(8, 16, 32, 64, 128), bins=17)``

    The detector is called as torchvision's are: ``model(images, targets)`` gives losses in train mode,
    ``model(images)`` gives ``[{"boxes", "scores", "labels"}]`` in eval mode. At the first step the boxes and scores it
    predicts are compared with those of what is tapped; where they differ (a wrong path, offset or number of bins) it is
    an AdapterError.

    Args:
        classes: path of the class logits, one shared by all levels or one a level, e.g. ``["conv_77[:80]", ...]``.
        edges: path of the edge logits (before softmax, after any scale), likewise; 4*K channels.
        strides: pixels per cell of each level, in the order in which the paths fire.
        bins: number of bins K (values 0..K-1 strides), or the bins' values in strides.
        centre: where in its cell a point stands: 0 the corner, 0.5 the middle.
        features: paths of the maps that ``Features`` means unless a distiller names others, e.g. the neck's outputs.
        octave: side of the square anchor box, in strides, that assigners and regions use.
    """

    #: distributions an anchor, E; numbers of a box; anchors a cell
    sides, columns, per_cell = 4, 4, 1

    def __init__(
        self,
        classes: str | Sequence[str],
        edges: str | Sequence[str],
        strides: Sequence[int],
        bins: int | Sequence[float],
        centre: float = 0.0,
        features: str | Sequence[str] | None = None,
        octave: float = 8.0,
    ):
        super().__init__()
        if isinstance(strides, int) or not strides:
            raise ValueError(f"strides must be one number a level, as in (8, 16, 32), got {strides!r}")
        self.strides = tuple(strides)
        self.classes = _place(classes, len(self.strides), "classes")
        self.edges = _place(edges, len(self.strides), "edges")
        self.bins = bins if isinstance(bins, int) else len(bins)
        self.support = None if isinstance(bins, int) else torch.tensor(list(bins), dtype=torch.float32)
        self.centre, self.octave = centre, octave
        self.features = None if features is None else (features,) if isinstance(features, str) else tuple(features)

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is DenseDetections:
            return (self.classes, self.edges)
        if kind is Features and at is None and self.features:
            return (Place(self.features),)
        return super().places(model, kind, at)

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind is not DenseDetections:
            return super().view(model, kind, tensors, output)
        levels = len(self.strides)
        if len(tensors) != 2 * levels:
            raise ViewError(
                f"{self.classes.paths} and {self.edges.paths} gave {len(tensors)} maps, expected one of each for the "
                f"{levels} strides {self.strides}"
            )
        classes, edges = tensors[:levels], tensors[levels:]
        channels = edges[0].shape[1]
        if channels % (self.sides * self.bins):
            raise ViewError(
                f"{self.edges.paths[0]!r} has {channels} channels, "
                f"which is not a multiple of {self.sides} edges x {self.bins} bins; "
                "bins= is the number of bins (reg_max + 1), or the path needs a channel range, as in 'conv[80:]'"
            )
        anchors = channels // (self.sides * self.bins)
        if anchors != self.per_cell:
            raise ViewError(
                f"{self.edges.paths[0]!r} has {channels} channels, {anchors} anchors a cell of {self.sides} edges x "
                f"{self.bins} bins, and {type(self).__name__} is for {self.per_cell}. If bins= (reg_max + 1) is right, "
                "write an adapter whose view gives DenseDetections.anchors, the boxes of all anchors"
            )
        if self.support is not None and self.support.device != edges[0].device:
            self.support = self.support.to(edges[0].device)
        return DenseDetections(
            classes=Maps(tuple(classes), (classes[0].shape[1] // anchors,), anchors),
            edges=Maps(tuple(edges), (self.sides, self.bins), anchors),
            strides=self.strides,
            centre=self.centre,
            support=self.support,
            octave=self.octave,
        )

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> BoxTargets | None:
        """Ground truth from torchvision's form, a list of dict(boxes, labels).

        Raises ValueError for a box that is not finite or has no area (looked at on the CPU only).
        """
        rows = super().targets(args, kwargs, given)
        if rows is None:
            return None
        if not isinstance(rows, Sequence) or not all(
            isinstance(row, Mapping) and "boxes" in row and "labels" in row for row in rows
        ):
            form = "(k, 4) x1 y1 x2 y2" if self.columns == 4 else "(k, 5) cx cy w h angle"
            raise ViewError(f"targets: expected a list of dict(boxes {form}, labels (k,)), one a picture")
        for i, row in enumerate(rows):
            if row["boxes"].shape[1:] != (self.columns,):
                raise ViewError(
                    f"target {i}: boxes are {tuple(row['boxes'].shape)}, this head's are (k, {self.columns}); "
                    "upright objects need an upright detector, rotated ones a rotated one"
                )
            check_boxes(i, row["boxes"])
        return BoxTargets([r["boxes"] for r in rows], [r["labels"] for r in rows], _sizes(_pictures(args, kwargs)))

    def widths(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> list[int] | None:
        return super().widths(model, kind, self.features if at is None else at)

    def needs_proof(self, kind: type[View]) -> bool:
        return kind is DenseDetections

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Every predicted box must be one decoded from the tapped edges, with the tapped probability of its class."""
        assert isinstance(view, DenseDetections)
        assert view.edges is not None
        predictions = _predictions(output)
        sizes = _sizes(_pictures(args, kwargs))
        half = view.edges.levels[0].dtype in (torch.float16, torch.bfloat16)
        boxes, probabilities = self.decoded(view, self.centre), _probabilities(view)
        seen = 0
        for i, (row, size) in enumerate(zip(predictions, sizes, strict=True)):
            predicted = row["boxes"][:LOOKED_AT].to(boxes)
            if not len(predicted):
                continue
            seen += len(predicted)
            allowed = PIXELS + (HALF * predicted.abs().amax(1) if half else torch.zeros_like(predicted[:, 0]))
            distance = self.distances(predicted, boxes[i], size)
            if not bool((distance.amin(1) <= allowed).all()):
                raise AdapterError(self._unexplained_box(view, predicted, i, size, distance, allowed))
            explains = distance <= allowed[:, None]
            self._check_scores(row, i, probabilities[i], explains, 2 * HALF if half else SCORE)
        return seen > 0

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        """Every anchor's box, as the detector decodes it with its points at ``centre``: (B, N, columns) pixels."""
        assert view.edges is not None
        edges = view.edges.all().float()
        points = grid_points(view.edges.sizes, view.strides, centre, edges.device)
        strides = grid_strides(view.edges.sizes, view.strides, edges.device)
        return decode(points, integral(edges, view.support) * strides[:, None])

    def distances(self, predicted: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Predicted boxes (P, columns) to decoded ones (N, columns): (P, N) pixels, the largest of a box's sides.

        size: (height, width) of the picture, to which both are clipped here, as detectors clip.
        """
        height, width = size
        limit = boxes.new_tensor([width, height, width, height])
        clipped = torch.minimum(boxes.clamp(min=0), limit)
        predicted = torch.minimum(predicted.clamp(min=0), limit)
        return torch.cdist(predicted, clipped, p=float("inf"))

    def _unexplained_box(
        self,
        view: DenseDetections,
        predicted: Tensor,
        image: int,
        size: tuple[int, int],
        distance: Tensor,
        allowed: Tensor,
    ) -> str:
        other = 0.5 if self.centre != 0.5 else 0.0
        from_there = self.distances(predicted, self.decoded(view, other)[image], size)
        hint = f" With centre={other} it would fit." if bool((from_there.amin(1) <= allowed).all()) else ""
        return (
            f"the tapped distributions do not explain the detector's own boxes: one of picture {image} is "
            f"{distance.amin(1).max().item():.2f} pixels from every box decoded from {', '.join(self.edges.paths)} "
            f"(strides {self.strides}, {self.bins} bins, centre {self.centre}).{hint} Look for a scale between the "
            "tapped layer and the softmax (tap its output), the order of levels, and the picture's size"
        )

    def _check_scores(
        self, row: Mapping[str, Tensor], image: int, probabilities: Tensor, explains: Tensor, allowed: float
    ) -> None:
        """probabilities: (N, C) of every anchor. explains: (P, N), whether an anchor has the predicted box."""
        scores, labels = row["scores"][:LOOKED_AT].to(probabilities), row["labels"][:LOOKED_AT].long()
        classes = probabilities.shape[1]
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise AdapterError(
                f"the detector predicts label {labels.max().item()} in picture {image}, and "
                f"{', '.join(self.classes.paths)} has {classes} classes: name the layer of the class logits, one "
                "channel a label"
            )
        tapped = probabilities[:, labels].T  # (P, N)
        error = (tapped - scores[:, None]).abs().masked_fill(~explains, torch.inf).amin(1)
        if not bool((error <= allowed).all()):
            raise AdapterError(
                f"the tapped class logits do not explain the detector's own scores: one of picture {image} is "
                f"{error.max().item():.3f} from the class probability by {', '.join(self.classes.paths)} of its label, "
                "at the anchor of its box. Name the layer before the sigmoid, one channel a label. A head that "
                "multiplies its class probabilities by something, as GFLv2 by a quality, needs an adapter that gives "
                "the view's scores="
            )


def _place(paths: str | Sequence[str], levels: int, what: str) -> Place:
    """One path shared by all levels (it fires once a level), a ``*`` path, or one path a level."""
    if isinstance(paths, str):
        return Place((paths,), fires=1 if "*" in paths else levels)
    if len(paths) != levels:
        raise ViewError(
            f"{what}: {len(paths)} paths for {levels} strides; give one path a level, or one that all levels share"
        )
    return Place(tuple(paths))


def _pictures(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs[input_name(kwargs)]


def _sizes(pictures: Any) -> list[tuple[int, int]]:
    """(height, width) of every picture of a call."""
    return [(p.shape[-2], p.shape[-1]) for p in pictures]


def _predictions(output: Any) -> Sequence[Mapping[str, Tensor]]:
    """The predicted boxes, scores and labels of each picture, best first."""
    if not isinstance(output, Sequence) or not all(
        isinstance(row, Mapping) and {"boxes", "scores", "labels"} <= row.keys() for row in output
    ):
        raise AdapterError(
            f"in eval mode the detector returns {type(output).__name__}; "
            "to prove the taps, expected [dict(boxes, scores, labels)], one a picture, in pixels of the picture given"
        )
    return output


def _probabilities(view: DenseDetections) -> Tensor:
    """Every anchor's class probabilities: (B, N, C)."""
    return view.classes.all().float().sigmoid() if view.scores is None else view.scores.all().float()
