"""Views: the typed, named tensors a distiller reads. A distiller sees views only, never a model."""

from distillkit.core.views.base import BoxTargets, View
from distillkit.core.views.dense import DenseDetections
from distillkit.core.views.logits import ActivationMaps, ClassLogits, Features, PixelLogits, TokenLogits
from distillkit.core.views.queries import QueryDetections

__all__ = [
    "ActivationMaps",
    "BoxTargets",
    "ClassLogits",
    "DenseDetections",
    "Features",
    "PixelLogits",
    "QueryDetections",
    "TokenLogits",
    "View",
]
