"""Rotated GFL, as in ``distillkit.models.rotated_gfl``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.adapters.gfl import head_of
from distillkit.adapters.rotated import RotatedHead
from distillkit.boxes.anchors import grid_points, grid_strides
from distillkit.boxes.rotated_distribution import angle_bins
from distillkit.core.views import DenseDetections, View
from distillkit.models.rotated_gfl import RotatedGFL, decoded


def rotated_gfl(model: RotatedGFL) -> RotatedGFLHead:
    """``Features`` are the pyramid's maps."""
    return RotatedGFLHead(**head_of(model), convention=model.angle)


class RotatedGFLHead(RotatedHead):
    """Four distances in strides and an angle in radians: ``DenseDetections.support`` has a row for each."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.support = torch.stack([torch.arange(self.bins, dtype=torch.float32)] * 4 + [angle_bins(self.bins)])

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        view = super().view(model, kind, tensors, output)
        return replace(view, turned=True) if isinstance(view, DenseDetections) else view

    def decoded(self, view: DenseDetections, centre: float) -> Tensor:
        assert view.edges is not None
        logits = view.edges.all().float()
        points = grid_points(view.edges.sizes, view.strides, centre, logits.device)
        return decoded(logits, points, grid_strides(view.edges.sizes, view.strides, logits.device))
