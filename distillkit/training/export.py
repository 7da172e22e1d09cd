"""`distillkit export`: the student as safetensors, torch.export and ONNX, each compared with the student itself.

Of a classifier and of a segmentation model all of it is exported, normalisation included; of a detector its dense part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from distillkit.evaluation.classes import normalised
from distillkit.evaluation.segmentation import pixel_logits_in
from distillkit.schema import Recipe
from distillkit.training import build, checkpoint
from distillkit.training.errors import RunError
from distillkit.training.named import named_model
from distillkit.training.tasks import Exported, task_of

FORMATS = ("safetensors", "torch-export", "onnx")
#: largest difference that still counts as the same, in units of the logits
TOLERANCE = 1e-3


class Logits(nn.Module):
    """A model with normalisation: (B, 3, H, W) in 0..1 -> class logits (B, C), or of every pixel (B, C, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        output = self.model(normalised(self.model, pictures))
        return (pixel_logits_in(output),)  # of a classifier, they have the same names


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
    student = named_model(recipe, weights, data.classes).eval()
    folder.mkdir(parents=True, exist_ok=True)

    differences: dict[str, float] = {}
    if "safetensors" in formats:
        differences["safetensors"] = _safetensors(student, folder / "student.safetensors")
    if set(formats) & {"torch-export", "onnx"}:
        out = task_of(recipe).exported(recipe, student, data)
        with torch.no_grad():
            wanted = out.module(out.pictures)
        if "torch-export" in formats:
            differences["torch-export"] = _torch_export(out, wanted, folder / "student.pt2")
        if "onnx" in formats:
            differences["onnx"] = _onnx(out, wanted, folder / "student.onnx")
        checkpoint.write_json(folder / "decode.json", out.decoding)
        if out.note is not None:
            console.print(out.note, highlight=False, soft_wrap=True)
    for name, difference in differences.items():
        console.print(f"{name}: largest difference to the student {difference:.2g}", highlight=False, soft_wrap=True)
    wrong = [name for name, difference in differences.items() if not difference <= TOLERANCE]
    if wrong:
        raise RunError(f"{wrong[0]} differs from the student by {differences[wrong[0]]:.2g}, more than {TOLERANCE}")
    return differences


def _safetensors(student: nn.Module, path: Path) -> float:
    weights = student.state_dict()
    checkpoint.save_weights(path, weights)
    written = checkpoint.load_weights(path)
    return _largest([written[name] for name in weights], list(weights.values()))


def _torch_export(out: Exported, wanted: tuple[Tensor, ...], path: Path) -> float:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(out.module, (out.pictures,), dynamic_shapes=({0: batch},))
    checkpoint.atomically(path, lambda part: _save_program(program, part))
    with torch.no_grad():
        return _largest(torch.export.load(path).module()(out.pictures), wanted)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:  # a file object: for a path, torch insists on the suffix .pt2
        torch.export.save(program, file)


def _onnx(out: Exported, wanted: tuple[Tensor, ...], path: Path) -> float:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise RunError(f"onnx needs the package {error.name!r}: pip install 'distillkit[export]'") from error
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        out.module,
        (out.pictures,),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["pictures"],
        output_names=out.outputs,
        verbose=False,
    )
    assert program is not None
    checkpoint.atomically(path, lambda part: program.save(part, external_data=False))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(out.outputs, {"pictures": out.pictures.numpy()})
    return _largest([torch.from_numpy(array) for array in got], wanted)


def _largest(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference; NaN where anything is NaN, which Python's ``max`` would lose."""
    pairs = zip(got, wanted, strict=True)
    return float(torch.stack([(a.double() - b.double()).detach().abs().max() for a, b in pairs if b.numel()]).max())
