"""GFL and GFLv2, as in ``distillkit.models.gfl``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.boxes.maps import Maps
from distillkit.core.taps import Place
from distillkit.core.views import DenseDetections, View
from distillkit.models.gfl import GFL
from distillkit.models.rotated_gfl import RotatedGFL


def gfl(model: GFL) -> DistributionHead:
    """The edge logits of GFL are ``scale(gfl_reg(x))``: the tap is on the scales, one a level, not on ``gfl_reg``.

    ``Features`` are the pyramid's maps.
    """
    kind = GFLv2Head if model.head.quality else DistributionHead
    return kind(**head_of(model))


def head_of(model: GFL | RotatedGFL) -> dict[str, Any]:
    """What a ``DistributionHead`` is told of these detectors, which have the same head."""
    return {
        "classes": "head.gfl_cls",
        "edges": "head.scales.*",
        "strides": model.strides,
        "bins": model.bins,
        "centre": model.centre,
        "octave": model.octave,
        "features": [f"neck[{i}]" for i in range(len(model.strides))],
    }


class GFLv2Head(DistributionHead):
    """The class probability of GFLv2 is the sigmoid of its logits times a quality, which is tapped too."""

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        places = super().places(model, kind, at)
        return (*places, Place(("head.reg_conf",), fires=len(self.strides))) if kind is DenseDetections else places

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind is not DenseDetections:
            return super().view(model, kind, tensors, output)
        levels = len(self.strides)
        view = super().view(model, kind, tensors[: 2 * levels], output)
        assert isinstance(view, DenseDetections)
        scores = tuple(c.sigmoid() * q for c, q in zip(tensors[:levels], tensors[2 * levels :], strict=True))
        return replace(view, scores=Maps(scores, view.classes.shape))
