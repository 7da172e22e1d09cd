"""What of a detector is exported to torch.export and ONNX: its dense part.

A batch of pictures in, class and edge logits of every level out. Non-maximum suppression is left to the caller;
decode.json says all that decoding needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distillkit.core.adapter import comes_from
from distillkit.models.rotated_retina import RotatedRetina, anchors_of
from distillkit.schema import BoxRecipe
from distillkit.training.build import Classes
from distillkit.training.errors import RunError
from distillkit.training.tasks import Exported


class Dense(nn.Module):
    """A detector without its decoding: (B, 3, H, W) in 0..1 -> class logits of each level, then edge logits of each."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        classes, edges = self.detector.forward_raw(pictures)  # type: ignore[operator]
        return (*classes, *edges)


def exported_detector(recipe: BoxRecipe, student: nn.Module, data: Classes) -> Exported:
    """Raises RunError for a student with no plain dense part."""
    dense, pictures = _dense(student, recipe)
    levels = range(len(student.strides))  # type: ignore[arg-type]
    names = [f"{what}_{i}" for what in ("classes", "edges") for i in levels]
    note = "torch-export and onnx hold the dense part, without non-maximum suppression; how to decode: decode.json"
    return Exported(dense, pictures, names, _decoding(student, data, pictures), note)


def _dense(student: nn.Module, recipe: BoxRecipe) -> tuple[Dense, Tensor]:
    """The dense part, and two seeded pictures of the recipe's size, made up to whole cells of the coarsest level."""
    for package in ("mmdet", "mmrotate", "torchvision", "transformers", "ultralytics"):
        if comes_from(student, f"{package}."):
            raise RunError(
                f"{type(student).__name__} is {package}'s: torch-export and onnx hold the dense part of distillkit's "
                f"own detectors alone. Export safetensors, load it into the model that {package} builds, and use that "
                "package's own way of exporting"
            )
    missing = [name for name in ("forward_raw", "strides", "bins", "centre", "inference") if not hasattr(student, name)]
    if missing:
        raise RunError(
            f"{type(student).__name__} lacks {', '.join(missing)}: torch-export and onnx hold forward_raw(batch) -> "
            "(class logits, edge logits), and decode.json the rest; export safetensors, or give the model these"
        )
    coarsest = max(student.strides)  # type: ignore[arg-type]
    height, width = (-(-side // coarsest) * coarsest for side in recipe.data.size)
    generator = torch.Generator().manual_seed(0)
    return Dense(student).eval(), torch.rand(2, 3, height, width, generator=generator)


BOXES = {
    4: "edge e (left, top, right, bottom) is sum over k of k * stride * softmax(edges[e*bins:(e+1)*bins])[k] pixels "
    "from the point ((x + centre) * stride, (y + centre) * stride) of cell x, y",
    5: "p(e) = softmax(edges[e*bins:(e+1)*bins]). The angle, in radians and clockwise as seen, is half of "
    "atan2(sum of p(4)[k] * sin(2a_k), sum of p(4)[k] * cos(2a_k)) with a_k = (k / bins - 0.5) * pi. Edge e (left, "
    "top, right, bottom of the box in the frame turned by the angle) is sum over k of k * stride * p(e)[k] pixels "
    "from the point ((x + centre) * stride, (y + centre) * stride) of cell x, y",
}
DELTAS = (
    "anchor a of a cell has the channels classes[a*C:(a+1)*C] and edges[a*5*bins:(a+1)*5*bins]. It is upright, centred "
    "at ((x + centre) * stride, (y + centre) * stride), of width and height anchors[a] * stride. Delta e (x, y, w, h, "
    "angle) is sum over k of support[e][k] * softmax(its edges[e*bins:(e+1)*bins])[k]. The box is centred x * "
    "width and y * height from the anchor's centre, width * exp(w) wide, height * exp(h) high and turned by the angle, "
    "in radians and clockwise as seen"
)


def _decoding(student: Any, data: Classes, pictures: Tensor) -> dict[str, Any]:
    """All that turns the outputs into boxes."""
    columns = getattr(student, "columns", 4)
    say = {
        "input": "pictures: (batch, 3, height, width), float32, red green blue, 0..1, not normalised",
        "height": pictures.shape[2],
        "width": pictures.shape[3],
        "outputs": f"classes_i (batch, classes, h, w) and edges_i (batch, {columns}*bins, h, w) of level i, logits",
        "scores": "sigmoid(classes)",
        "boxes": BOXES[columns],
        "strides": list(student.strides),
        "bins": student.bins,
        "centre": student.centre,
        "classes": list(data.classes),
        "category_ids": list(data.category_ids),
        "score": student.inference.score,
        "nms_iou": student.inference.iou,
        "most": student.inference.most,
    }
    if isinstance(student, RotatedRetina):
        sides = anchors_of([(1, 1)], [1], student.centre)
        say |= {
            "boxes": DELTAS,
            "outputs": f"classes_i (batch, {len(sides)}*classes, h, w) and edges_i (batch, {len(sides)}*5*bins, h, w) "
            "of level i, logits",
            "anchors": (sides[:, 2:] - sides[:, :2]).tolist(),
            "support": student.support.tolist(),
        }
    return say
