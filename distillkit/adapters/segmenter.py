"""Segmentation models: the class logits of every pixel, wherever in its output a model has them.

Ours, torchvision's and transformers' are known by themselves. For another one that returns logits in one of the forms
below, pass ``adapter=Segmenter()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distillkit.core.adapter import Adapter
from distillkit.core.errors import ViewError
from distillkit.core.taps import Place
from distillkit.core.views import ClassLogits, PixelLogits, View
from distillkit.models.segmentation import SegmentationModel

#: what the logits are called in a mapping: by torchvision and our models, by transformers
NAMES = ("out", "logits")


class Segmenter(Adapter):
    """A model that returns logits (B, C, h, w): a tensor; a mapping with "out" or "logits"; or an object with .logits.

    Train and eval mode may return different ones of these. The features of a segmentation model are read by module
    path, as of any other.

    Args:
        mean, std: as ``Adapter``.
    """

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind is ClassLogits and not at:
            raise ViewError(
                f"{type(model).__name__} has class logits of every pixel, and none of a whole picture: use PixelKD or "
                "ChannelKD, or name a layer that returns logits (B, C), as in student_at='classifier'"
            )
        if kind is not PixelLogits:
            return super().places(model, kind, at)
        if at and len(at) > 1:
            raise ViewError(f"pixel logits are read at one module path, got {len(at)}: {', '.join(map(repr, at))}")
        return (Place(at),) if at else ()

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind is not PixelLogits:
            return super().view(model, kind, tensors, output)
        name = type(model).__name__
        return PixelLogits(_checked(tensors[0], name, "the tapped module") if tensors else _logits(output, name))


def is_segmenter(model: nn.Module) -> bool:
    """Whether a model is one of ours, or of torchvision's or transformers', whose classes are known by where they come
    from and by what they are called: nothing is imported that may not be there."""
    return isinstance(model, SegmentationModel) or any(
        c.__module__.startswith("torchvision.models.segmentation.") or c.__name__.endswith("ForSemanticSegmentation")
        for c in type(model).__mro__
    )


def _logits(output: Any, model: str) -> Tensor:
    if isinstance(output, Mapping):
        for name in NAMES:
            if name in output:
                return _checked(output[name], model, f"{name!r} of its output")
        raise ViewError(
            f"{model}: expected 'out' or 'logits', the logits of every pixel, in its output, got "
            f"{', '.join(map(repr, output)) or 'an empty mapping'}; name the layer, as in student_at='classifier'"
        )
    return _checked(output if isinstance(output, Tensor) else getattr(output, "logits", output), model, "its output")


def _checked(logits: Any, model: str, what: str) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 4:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ViewError(
            f"{model}: expected {what} to be the logits of every pixel (B, C, h, w), got {shape}; name the layer, as "
            "in student_at='classifier'"
        )
    return logits
