"""Rotated RetinaNet, as in ``distillkit.models.rotated_retina``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from distillkit.adapters.rotated import RotatedHead
from distillkit.boxes.distribution import integral
from distillkit.boxes.rotated_distribution import decode_deltas, delta_bins
from distillkit.core.views import DenseDetections, View
from distillkit.models.rotated_retina import ANCHORS, RotatedRetina, anchors_of


def rotated_retina(model: RotatedRetina) -> RotatedRetinaHead:
    """``Features`` are the pyramid's maps."""
    return RotatedRetinaHead(
        classes="head.retina_cls",
        edges="head.retina_reg",
        strides=model.strides,
        bins=model.bins,
        centre=model.centre,
        features=[f"neck[{i}]" for i in range(len(model.strides))],
        convention=model.angle,
    )


class RotatedRetinaHead(RotatedHead):
    """Five distributions of what is done to each of nine anchors a cell, whose upright boxes the view holds."""

    per_cell = ANCHORS

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.support = delta_bins(self.bins)

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        view = super().view(model, kind, tensors, output)
        if not isinstance(view, DenseDetections):
            return view
        return replace(view, anchors=_anchors(view, self.centre))

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        assert view.edges is not None
        return decode_deltas(_anchors(view, centre), integral(view.edges.all().float(), view.support))


def _anchors(view: DenseDetections, centre: float) -> Tensor:
    return anchors_of(view.classes.sizes, view.strides, centre, view.classes.levels[0].device)
