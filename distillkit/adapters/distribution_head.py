"""Any dense detector whose head predicts box edges as distributions: named by module paths, not rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.adapters.dense_head import DenseHead
from distillkit.boxes.anchors import grid_points, grid_strides
from distillkit.boxes.distribution import decode, integral
from distillkit.boxes.maps import Maps
from distillkit.core.errors import ViewError
from distillkit.core.taps import Place
from distillkit.core.views import DenseDetections, Features, View


class DistributionHead(DenseHead):
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

    #: distributions an anchor, E; anchors a cell
    sides, per_cell = 4, 1

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

    def widths(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> list[int] | None:
        return super().widths(model, kind, self.features if at is None else at)

    def boxes(self, view: DenseDetections) -> Tensor:
        return self.decoded(view, self.centre)

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        """Every anchor's box, as the detector decodes it with its points at ``centre``: (B, N, columns) pixels."""
        assert view.edges is not None
        edges = view.edges.all().float()
        points = grid_points(view.edges.sizes, view.strides, centre, edges.device)
        strides = grid_strides(view.edges.sizes, view.strides, edges.device)
        return decode(points, integral(edges, view.support) * strides[:, None])

    def unexplained(
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


def _place(paths: str | Sequence[str], levels: int, what: str) -> Place:
    """One path shared by all levels (it fires once a level), a ``*`` path, or one path a level."""
    if isinstance(paths, str):
        return Place((paths,), fires=1 if "*" in paths else levels)
    if len(paths) != levels:
        raise ViewError(
            f"{what}: {len(paths)} paths for {levels} strides; give one path a level, or one that all levels share"
        )
    return Place(tuple(paths))
