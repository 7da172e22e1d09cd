"""Views of classifiers and segmentation models: class logits, of pictures, tokens, pixels, and feature maps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from torch.nn.functional import interpolate, pad

from distillkit.core.views.base import View, columns_of, other_classes


@dataclass(frozen=True)
class ClassLogits(View):
    """logits: (B, C), before softmax or sigmoid."""

    logits: Tensor

    def picked(self, columns: Tensor, names: int) -> Self:
        return replace(self, logits=columns_of(self.logits, columns, names))

    def match(self, student: ClassLogits) -> ClassLogits:
        if self.logits.shape != student.logits.shape:
            raise ValueError(
                f"class logits differ: teacher {tuple(self.logits.shape)}, student {tuple(student.logits.shape)}; "
                "teacher and student need the same classes in the same order, or their names: "
                "Teacher(model, classes=[...]) and wrap(..., classes=[...])"
            )
        return self


@dataclass(frozen=True)
class Features(View):
    """maps: feature maps (B, C, H, W), or token sequences (B, N, C).

    scale: of a teacher's pictures, sides in those of the student's, whose sizes its maps are brought to; None: not one
        number for the batch.
    """

    maps: tuple[Tensor, ...]
    scale: float | None = 1.0

    def at_scale(self, scale: float | None) -> Self:
        return replace(self, scale=scale)

    def match(self, student: Features) -> Features:
        """Maps of resized pictures at the student's sizes, place for place: bilinear, corners not aligned."""
        if len(self.maps) != len(student.maps):
            raise ValueError(
                f"teacher gives {len(self.maps)} feature maps, student {len(student.maps)}; "
                "name the same number of paths on both sides"
            )
        if self.scale == 1:
            return self
        for i, (mine, theirs) in enumerate(zip(self.maps, student.maps, strict=True)):
            if mine.dim() == 3 and mine.shape[1] != theirs.shape[1]:
                raise ValueError(
                    f"the teacher has {mine.shape[1]} tokens, the student {theirs.shape[1]}, as its pictures are of "
                    "another size; tokens are not resampled: leave out scale= and size= of its Teacher, or read maps "
                    f"(B, C, H, W) for number {i}"
                )
        pairs = zip(self.maps, student.maps, strict=True)
        maps = (_by_place(m, s, self.scale) if m.dim() == 4 else m for m, s in pairs)
        return replace(self, maps=tuple(maps), scale=1.0)


@dataclass(frozen=True)
class TokenLogits(View):
    """What a classifier says of a picture, and of each of its tokens.

    Args:
        classes: (B, C) of the whole picture; None where it was not computed (a teacher that is read for its tokens).
        tokens: (B, N, C), row by row.
        grid: (height, width) with height * width == N.
    """

    classes: Tensor | None
    tokens: Tensor
    grid: tuple[int, int]

    def picked(self, columns: Tensor, names: int) -> Self:
        classes = None if self.classes is None else columns_of(self.classes, columns, names)
        return replace(self, classes=classes, tokens=columns_of(self.tokens, columns, names))

    def match(self, student: TokenLogits) -> TokenLogits:
        if self.tokens.shape[-1] != student.tokens.shape[-1]:
            raise other_classes(self.tokens.shape[-1], student.tokens.shape[-1])
        return self


@dataclass(frozen=True)
class PixelLogits(View):
    """logits: (B, C, h, w), of every pixel, or of every cell of a coarser map, before the softmax."""

    logits: Tensor

    def picked(self, columns: Tensor, names: int) -> Self:
        return replace(self, logits=columns_of(self.logits, columns, names, 1))

    def match(self, student: PixelLogits) -> PixelLogits:
        """The teacher's at the student's size: interpolated (bilinear, corners not aligned) where they differ."""
        if self.logits.shape[1] != student.logits.shape[1]:
            raise other_classes(self.logits.shape[1], student.logits.shape[1])
        logits = _at_size(self.logits, student.logits)
        return self if logits is self.logits else PixelLogits(logits)


@dataclass(frozen=True)
class ActivationMaps(View):
    """Class logits of every cell of a classifier's last map: class activation maps before the ReLU.

    Args:
        maps: (B, K, h, w): the C foreground classes and, where ``background``, one more channel, the last.
        background: whether the last channel is the background's.
    """

    maps: Tensor
    background: bool

    @property
    def classes(self) -> int:
        """C, without the background."""
        return self.maps.shape[1] - self.background


def _by_place(maps: Tensor, like: Tensor, scale: float | None) -> Tensor:
    """Maps of resized pictures, cell by cell where those of ``like`` are.

    Strides are powers of two, so that a map has ``scale * 2**k`` times the cells; what it has more or less of them is
    padding at the right and below, which is cut off or filled up with the last cells.
    """
    if scale is None or maps.shape[2:] == like.shape[2:]:
        return _at_size(maps, like)
    sides, missing = [], []
    for mine, theirs in zip(maps.shape[2:], like.shape[2:], strict=True):
        times = scale * 2.0 ** round(math.log2(mine / theirs / scale))
        side = theirs if abs(mine - times * theirs) <= 1 else max(1, round(mine / times))
        sides.append(side)
        missing.append(max(0, theirs - side))
    maps = maps if tuple(sides) == maps.shape[2:] else interpolate(maps, sides, mode="bilinear", align_corners=False)
    height, width = like.shape[2:]
    return pad(maps[..., :height, :width], (0, missing[1], 0, missing[0]), mode="replicate")


def _at_size(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (B, C, h, w) at the height and width of ``like``."""
    size = like.shape[2:]
    return maps if maps.shape[2:] == size else interpolate(maps, size=size, mode="bilinear", align_corners=False)
