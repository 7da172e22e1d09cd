"""Distillation of the class logits of every pixel. Liu et al., arXiv:1903.04197, section 3.1; regions are our own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import PixelLogits
from distillkit.distillers.dense import mean_count
from distillkit.losses.pixels import near_borders, pixel_divergence
from distillkit.losses.segmentation import IGNORE, nearest


class PixelKD(Distiller):
    """Teach the student the teacher's class probabilities at every pixel of a region.

        pixel_i = T^2 * KL(softmax(teacher_i / T) || softmax(student_i / T))
        loss    = (sum of pixel_i over the region) / (number of the region's pixels, mean over ranks)

    Args:
        region: ``whole``: every pixel, ignored ones too: there the teacher is the only one who teaches. ``main``: the
            labelled pixels. ``valuable``: the labelled pixels near a border of classes, those with a labelled pixel of
            another class no more than ``width`` rows and columns away. They are part of ``main``.
        width: of the valuable region, to either side of the border, in pixels of the masks: below 1 a share of their
            diagonal (0.02, which boundary metrics also use), else a whole number of pixels.
        temperature: T >= 1; the paper has 1.
        weight, teacher, name: as in ``Distiller``. Its loss is called ``pixel_kd``, or by its region too, as
            ``pixel_kd_valuable``.
        student_at, teacher_at: module paths of the logits, where they are not the model's output.

    Reads:
        ``PixelLogits`` of both, (B, C, h, w); the teacher's are resized to the student's (bilinear). For ``main`` and
        ``valuable`` also the targets: "masks", or the masks themselves, integers (B, H, W) with 255 = ignored. Masks of
        another size than the logits are read at the centre of each cell, and the region reaches at least one cell.

    The regions are distillkit's own definition and no paper's: what main and valuable localization regions are to boxes
    (arXiv:2204.05957), carried over to pixels. A label knows one class a pixel; beside a border, where it is least sure
    which, the teacher's probabilities say more than it does.

    ``whole`` at T = 1 is the paper's pixel-wise distillation. Its release grows with the batch: it takes the cross
    entropy, whose gradient is the same, and its sum over pictures. With n pictures on a GPU and its weight of 10 it is
    ``weight=10 * n``. A region without a pixel costs 0.

    Raises:
        ValueError: temperature below 1; an unknown region; a width that is neither a share nor a whole number; numbers
            of classes that differ; a softmax over one class; targets that are no masks.
    """

    reads = PixelLogits
    short_name = "pixel_kd"

    def __init__(
        self,
        region: Literal["whole", "main", "valuable"] = "whole",
        temperature: float = 1.0,
        weight: float | Weight = 1.0,
        width: float = 0.02,
        student_at: str | None = None,
        teacher_at: str | None = None,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name or (self.short_name + (f"_{region}" if region != "whole" else "")))
        if region not in ("whole", "main", "valuable"):
            raise ValueError(f"region must be 'whole', 'main' or 'valuable', got {region!r}")
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        if width <= 0 or (width >= 1 and width != int(width)):
            raise ValueError(
                "width must be a share of the masks' diagonal, above 0 and below 1, or a whole number of pixels, "
                f"got {width}"
            )
        self.region = region
        self.temperature = temperature
        self.width = width
        self.student_at, self.teacher_at = student_at, teacher_at

    def forward(self, student: PixelLogits, teacher: PixelLogits, targets: Any) -> Tensor:
        if student.logits.shape[1] == 1:
            raise ValueError(
                "a softmax over one class is constant and teaches nothing: build both models with two classes, what is "
                "looked for and the rest"
            )
        pixels = pixel_divergence(student.logits, teacher.match(student).logits, self.temperature)  # (B, h, w)
        chosen = self._region(pixels, targets)
        return (pixels * chosen).sum() / mean_count(chosen)

    @torch.no_grad()
    def _region(self, pixels: Tensor, targets: Any) -> Tensor:
        """(B, h, w) bool."""
        if self.region == "whole":
            return torch.ones_like(pixels, dtype=torch.bool)
        masks = masks_of(targets, len(pixels))
        cells = nearest(masks, pixels.shape[1:])
        if self.region == "main":
            return cells != IGNORE
        width = self.width if self.width >= 1 else self.width * math.hypot(*masks.shape[1:])
        reach = [max(1, round(width * n / side)) for n, side in zip(cells.shape[1:], masks.shape[1:])]
        return near_borders(cells, reach)


def masks_of(targets: Any, pictures: int) -> Tensor:
    """Targets, or the ``masks`` among them, integers (B, H, W); ValueError for anything else."""
    masks = targets.get("masks") if isinstance(targets, Mapping) else targets
    if isinstance(masks, Tensor) and masks.dim() == 3 and len(masks) == pictures and _is_integer(masks.dtype):
        return masks
    got = type(targets).__name__
    if isinstance(masks, Tensor):
        got = f"{masks.dtype} {tuple(masks.shape)}"
    elif isinstance(targets, Mapping):
        got = f"a mapping of {', '.join(map(repr, targets)) or 'nothing'}"
    raise ValueError(
        f"this region needs the class of every pixel, 'masks' of integers ({pictures}, H, W) with {IGNORE} = ignored, "
        f"as targets; got {got}. Without masks use region='whole'"
    )


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
