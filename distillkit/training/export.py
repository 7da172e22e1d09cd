"""`distillkit export`: the student as safetensors, torch.export and ONNX, each compared with the student itself.

Of a classifier all of it is exported, normalisation included. Of a detector:

What is exported to torch.export and ONNX is the dense part of a detector: a batch of pictures in, class and edge logits
of every level out. Non-maximum suppression is left to the caller; decode.json says all that decoding needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from distillkit.evaluation.classes import normalised
from distillkit.models.rotated_retina import RotatedRetina, anchors_of
from distillkit.schema import ClassificationRecipe, Recipe
from distillkit.training import build, checkpoint
from distillkit.training.build import Classes
from distillkit.training.errors import RunError
from distillkit.training.named import named_model

FORMATS = ("safetensors", "torch-export", "onnx")
#: largest difference that still counts as the same, in units of the logits
TOLERANCE = 1e-3


class Logits(nn.Module):
    """A classifier with normalisation: (B, 3, H, W) in 0..1 -> class logits (B, C)."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return (self.classifier(normalised(self.classifier, pictures)),)


class Dense(nn.Module):
    """A detector without its decoding: (B, 3, H, W) in 0..1 -> class logits of each level, then edge logits of each."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        classes, edges = self.detector.forward_raw(pictures)  # type: ignore[operator]
        return (*classes, *edges)


def export(
    recipe: Recipe, weights: str | Path | None, folder: Path, formats: Sequence[str], console: Console | None = None
) -> dict[str, float]:
    """Write the student in each of ``formats`` and compare what was written with it.

    Args:
        weights: what ``named_model`` takes: a row's name, or a file; None: the student as the recipe has it.
        folder: gets student.safetensors, student.pt2, student.onnx, and decode.json for the last two.
        formats: of ``FORMATS``.

    Returns:
        the largest difference of each format's outputs (safetensors: weights) from the student's.

    Raises:
        RunError: a format that is not known, a student without trained weights or with no plain dense part, packages
            that are missing, or a difference above ``TOLERANCE``.
    """
    console = console or Console()
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise RunError(f"unknown format {unknown[0]!r}: one or several of {', '.join(FORMATS)}")
    data = build.build_classes(recipe)
    student = named_model(recipe, weights, len(data.classes)).eval()
    folder.mkdir(parents=True, exist_ok=True)

    differences: dict[str, float] = {}
    if "safetensors" in formats:
        differences["safetensors"] = _safetensors(student, folder / "student.safetensors")
    if set(formats) & {"torch-export", "onnx"}:
        classes = isinstance(recipe, ClassificationRecipe)
        dense, pictures = _logits(student, recipe) if classes else _dense(student, recipe)
        with torch.no_grad():
            wanted = dense(pictures)
        if "torch-export" in formats:
            differences["torch-export"] = _torch_export(dense, pictures, wanted, folder / "student.pt2")
        if "onnx" in formats:
            differences["onnx"] = _onnx(dense, pictures, wanted, folder / "student.onnx")
        decoding = _labelling(data, pictures) if classes else _decoding(student, data, pictures)
        checkpoint.write_json(folder / "decode.json", decoding)
        if not classes:
            say = (
                "torch-export and onnx hold the dense part, without non-maximum suppression; how to decode: decode.json"
            )
            console.print(say, highlight=False, soft_wrap=True)
    for name, difference in differences.items():
        console.print(f"{name}: largest difference to the student {difference:.2g}", highlight=False, soft_wrap=True)
    wrong = [name for name, difference in differences.items() if not difference <= TOLERANCE]
    if wrong:
        raise RunError(f"{wrong[0]} differs from the student by {differences[wrong[0]]:.2g}, more than {TOLERANCE}")
    return differences


def _dense(student: nn.Module, recipe: Recipe) -> tuple[Dense, Tensor]:
    """The dense part, and two seeded pictures of the recipe's size, made up to whole cells of the coarsest level."""
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


def _logits(student: nn.Module, recipe: Recipe) -> tuple[Logits, Tensor]:
    pictures = torch.rand(2, 3, *recipe.data.size, generator=torch.Generator().manual_seed(0))
    return Logits(student).eval(), pictures


def _safetensors(student: nn.Module, path: Path) -> float:
    weights = student.state_dict()
    checkpoint.save_weights(path, weights)
    written = checkpoint.load_weights(path)
    return _largest([written[name] for name in weights], list(weights.values()))


def _torch_export(dense: nn.Module, pictures: Tensor, wanted: tuple[Tensor, ...], path: Path) -> float:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(dense, (pictures,), dynamic_shapes=({0: batch},))
    checkpoint.atomically(path, lambda part: _save_program(program, part))
    with torch.no_grad():
        return _largest(torch.export.load(path).module()(pictures), wanted)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:  # a file object: for a path, torch insists on the suffix .pt2
        torch.export.save(program, file)


def _onnx(dense: nn.Module, pictures: Tensor, wanted: tuple[Tensor, ...], path: Path) -> float:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise RunError(f"onnx needs the package {error.name!r}: pip install 'distillkit[export]'") from error
    batch = torch.export.Dim("batch", min=1)
    levels = range(len(wanted) // 2)
    names = ["logits"] if len(wanted) == 1 else [f"{what}_{i}" for what in ("classes", "edges") for i in levels]
    program = torch.onnx.export(
        dense,
        (pictures,),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["pictures"],
        output_names=names,
        verbose=False,
    )
    assert program is not None
    checkpoint.atomically(path, lambda part: program.save(part, external_data=False))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(names, {"pictures": pictures.numpy()})
    return _largest([torch.from_numpy(array) for array in got], wanted)


def _largest(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference; NaN where anything is NaN, which Python's ``max`` would lose."""
    pairs = zip(got, wanted, strict=True)
    return float(torch.stack([(a.double() - b.double()).detach().abs().max() for a, b in pairs if b.numel()]).max())


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


def _labelling(data: Classes, pictures: Tensor) -> dict[str, Any]:
    return {
        "input": "pictures: (batch, 3, height, width), float32, red green blue, 0..1, not normalised",
        "height": pictures.shape[2],
        "width": pictures.shape[3],
        "outputs": "logits (batch, classes)",
        "scores": "softmax(logits)",
        "classes": list(data.classes),
    }


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
