"""From a picture with boxes to what a detector is fed, through torchvision v2 and its tv_tensors.

Geometry is torchvision's: continuous pixel coordinates, (0, 0) the outer corner of the first pixel, so that a box is
scaled with the picture and mirrored as ``x -> width - x``. What is drawn at random is drawn here, from the one
generator that is handed in: torchvision's own random transforms read the global state, which depends on the order of
calls and on the number of workers.

Boxes are upright, or rotated: those are four points each (``Quads``) until the last step makes rectangles of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from distillkit.boxes.rotated import from_corners
from distillkit.data.quads import Quads, part_inside

#: the least part of a rotated box that a crop must show for the box to stay (DOTA's published split)
LEAST_INSIDE = 0.7

Size = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A picture and its boxes, before or between transforms.

    Args:
        image: uint8 (3, H, W), or float32 in 0..1, RGB.
        boxes: in its pixels: float32 (k, 4) x1, y1, x2, y2; or ``Quads``, float (k, 8).
        labels: int64 (k,).
    """

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.image.shape[-2], self.image.shape[-1]


def sample_of(image: Tensor, boxes: Tensor, labels: Tensor) -> Sample:
    """A sample from plain tensors. boxes: (k, 4) upright, or (k, 4, 2) or (k, 8), the points of rotated ones."""
    size = (image.shape[-2], image.shape[-1])
    return Sample(tv_tensors.Image(image), _boxes(boxes, size), labels)


def generator_for(seed: int, epoch: int, index: int) -> torch.Generator:
    """The generator of one sample: a function of (seed, epoch, index) and of nothing else."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


class Transform(Protocol):
    """What a data set is given as ``transform``."""

    def indices(self, index: int, length: int, generator: torch.Generator) -> list[int]:
        """The pictures that sample ``index`` of ``length`` is made of, itself first."""

    def __call__(self, samples: Sequence[Sample], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """The image float32 (3, H, W) in 0..1, and a dict of labels (k,) and boxes: float32 (k, 4) upright ones, or
        (k, 5) cx, cy, w, h, angle in radians, the smallest rectangles around quads."""


@dataclass(frozen=True)
class Resize:
    """The transform for evaluation: no randomness; every box is kept.

    Args:
        size: S for S x S, (height, width), or None to leave the picture as it is.
        keep_ratio: False: stretch to ``size``. True: the largest picture of unchanged aspect that fits. ``size`` then
            bounds the long and the short side, whichever way the picture stands, as in mmdet's (1333, 800).
        pad: with ``keep_ratio``: fill with black, right and below, to exactly ``size``, as some detectors were trained.
            (Detectors here pad batches by themselves, but no further than they must, and predict nothing there; what
            is filled up here is picture to them.) The picture then has to fit ``size`` as it stands.

    The target gets ``scale``: (sx, sy), network pixels per pixel of the original, exact after rounding to whole pixels.
    Raises ValueError for sizes that are not positive.
    """

    size: int | Size | None = None
    keep_ratio: bool = False
    pad: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and min(_pair(self.size)) < 1:
            raise ValueError(f"size: expected positive pixels, got {self.size}")

    def indices(self, index: int, length: int, generator: torch.Generator) -> list[int]:
        return [index]

    def __call__(self, samples: Sequence[Sample], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        (sample,) = samples
        height, width = sample.size
        new = (height, width) if self.size is None else fitted(sample.size, _pair(self.size), self.keep_ratio, self.pad)
        # in float: rounding to 256 levels before the network moved a small detector's AP on 82 pictures by 0.5
        out = _resized(Sample(_as_float(sample.image), sample.boxes, sample.labels), new)
        if self.pad and self.size is not None:
            out = _padded(out, _pair(self.size))
        image, target = _finished(out)
        return image, target | {"scale": (new[1] / width, new[0] / height)}


@dataclass(frozen=True)
class Augment:
    """The transform for training: mosaic, crop, resize, flip, colour, in this order.

    Args:
        size, keep_ratio, pad: as in ``Resize``.
        flip: probability of a mirror image.
        flip_vertical, flip_diagonal: probability of a picture upside down, and of one mirrored both ways. A picture
            gets one of the three or none, so their sum is at most 1.
        crop: the smallest side of a random crop as a share of the picture's, in (0, 1]; None: no crop. Boxes are cut at
            its border; one of which less than a pixel in width or height is left is removed. Rotated boxes are not cut:
            one of which the crop shows 0.7 of the area stays whole, any other is removed.
        multi_scale: (lo, hi): ``size`` is multiplied by a factor drawn uniformly from it for every sample.
        mosaic: probability of a picture made of four: around a random centre, a crop of each at the size it would have
            alone. The picture of this index is one of them.
        color: strength c of brightness, contrast and saturation: each is multiplied by a factor in [1 - c, 1 + c].

    Raises ValueError for values out of these ranges.
    """

    size: int | Size | None = None
    keep_ratio: bool = False
    pad: bool = False
    flip: float = 0.5
    crop: float | None = None
    multi_scale: tuple[float, float] | None = None
    mosaic: float = 0.0
    color: float = 0.0
    flip_vertical: float = 0.0
    flip_diagonal: float = 0.0

    def __post_init__(self) -> None:
        Resize(self.size)
        for name in ("flip", "flip_vertical", "flip_diagonal", "mosaic", "color"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in 0..1, got {getattr(self, name)}")
        flips = self.flip + self.flip_vertical + self.flip_diagonal
        if flips > 1 + 1e-9:
            raise ValueError(f"flip, flip_vertical and flip_diagonal: expected a sum of at most 1, got {flips:g}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop: expected the smallest share of a side, in (0, 1], got {self.crop}")
        if self.multi_scale is not None and not 0 < self.multi_scale[0] <= self.multi_scale[1]:
            raise ValueError(f"multi_scale: expected 0 < lo <= hi, got {self.multi_scale}")
        if self.size is None and (self.mosaic or self.multi_scale):
            raise ValueError("mosaic and multi_scale need size: give the network's input as S or (height, width)")

    def indices(self, index: int, length: int, generator: torch.Generator) -> list[int]:
        if not self.mosaic or draw(generator) >= self.mosaic:
            return [index]
        return [index, *torch.randint(length, (3,), generator=generator).tolist()]

    def __call__(self, samples: Sequence[Sample], generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        size = self._size(generator)
        if len(samples) == 1:
            sample = samples[0]
        else:
            assert size is not None
            sample = _mosaic(samples, size, generator)
        if self.crop is not None:
            sample = _random_crop(sample, self.crop, generator)
        if size is not None:
            sample = _resized(sample, fitted(sample.size, size, self.keep_ratio, self.pad))
        for mirror in self._mirrors(draw(generator)):
            sample = Sample(mirror(sample.image), mirror(sample.boxes), sample.labels)
        if self.color:
            sample = _coloured(sample, self.color, generator)
        if self.pad and size is not None:
            sample = _padded(sample, size)
        return _finished(sample)

    def _mirrors(self, drawn: float) -> list[Callable[[Any], Any]]:
        """What a number drawn from 0..1 does to a picture."""
        if drawn < self.flip:
            return [F.horizontal_flip]
        if drawn < self.flip + self.flip_vertical:
            return [F.vertical_flip]
        both = drawn < self.flip + self.flip_vertical + self.flip_diagonal
        return [F.horizontal_flip, F.vertical_flip] if both else []

    def _size(self, generator: torch.Generator) -> Size | None:
        if self.size is None:
            return None
        height, width = _pair(self.size)
        if self.multi_scale is None:
            return height, width
        factor = draw(generator, *self.multi_scale)
        return max(1, round(height * factor)), max(1, round(width * factor))


def fitted(picture: Size, bound: Size, keep_ratio: bool, pad: bool = False) -> Size:
    """(height, width) of a picture resized into a bound (height, width); the rules are those of ``Resize``."""
    if not keep_ratio:
        return bound
    (height, width), (most_high, most_wide) = picture, bound
    if not pad and (height > width) != (most_high > most_wide):
        most_high, most_wide = most_wide, most_high
    factor = min(most_high / height, most_wide / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def cropped(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """The part of a sample inside a window.

    Upright boxes are cut at its border, and removed where the cut leaves less than a pixel in width or height; one that
    the border does not touch is kept, however small. Rotated boxes with ``LEAST_INSIDE`` of their area in the window
    are kept whole, the others removed.
    """
    whole = _shifted(sample.boxes, -left, -top)
    if isinstance(sample.boxes, Quads):
        cut = whole
        kept = part_inside(whole.reshape(-1, 4, 2), (0, 0, width, height)) >= LEAST_INSIDE
    else:
        cut = _clamped(whole, (height, width))
        kept = ((cut[:, 2:] - cut[:, :2]).amin(1) >= 1) | (cut == whole).all(1)
    return sample_of(F.crop(sample.image, top, left, height, width), cut[kept], sample.labels[kept])


def _random_crop(sample: Sample, smallest: float, generator: torch.Generator) -> Sample:
    height, width = (max(1, round(side * draw(generator, smallest, 1.0))) for side in sample.size)
    return _window(sample, (height, width), generator)


def _window(sample: Sample, size: Size, generator: torch.Generator) -> Sample:
    room = [whole - part + 1 for whole, part in zip(sample.size, size)]
    top, left = (int(torch.randint(r, (), generator=generator)) for r in room)
    return cropped(sample, top, left, *size)


def _mosaic(samples: Sequence[Sample], size: Size, generator: torch.Generator) -> Sample:
    """Four pictures around a centre that is drawn from the middle half; each is enlarged to cover ``size`` with its
    aspect kept, and a random part of it fills its quarter."""
    height, width = size
    y, x = round(height * draw(generator, 0.25, 0.75)), round(width * draw(generator, 0.25, 0.75))
    tiles = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
    canvas = torch.empty(3, height, width, dtype=torch.uint8)
    boxes, labels = [], []
    for sample, (top, left, bottom, right) in zip(samples, tiles, strict=True):
        factor = max(height / sample.size[0], width / sample.size[1])
        covering = (max(height, round(sample.size[0] * factor)), max(width, round(sample.size[1] * factor)))
        tile = _window(_resized(sample, covering), (bottom - top, right - left), generator)
        canvas[:, top:bottom, left:right] = tile.image
        boxes.append(_shifted(tile.boxes, left, top))
        labels.append(tile.labels)
    return sample_of(canvas, torch.cat(boxes), torch.cat(labels))


def _resized(sample: Sample, size: Size) -> Sample:
    if size == sample.size:
        return sample
    return Sample(F.resize(sample.image, list(size), antialias=True), F.resize(sample.boxes, list(size)), sample.labels)


def _padded(sample: Sample, size: Size) -> Sample:
    below, right = size[0] - sample.size[0], size[1] - sample.size[1]
    return Sample(F.pad(sample.image, [0, 0, right, below]), F.pad(sample.boxes, [0, 0, right, below]), sample.labels)


def _coloured(sample: Sample, strength: float, generator: torch.Generator) -> Sample:
    image = sample.image
    for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = adjust(image, draw(generator, 1 - strength, 1 + strength))
    return Sample(image, sample.boxes, sample.labels)


def _finished(sample: Sample) -> tuple[Tensor, dict[str, Any]]:
    image = _as_float(sample.image).as_subclass(Tensor)
    if isinstance(sample.boxes, Quads):
        boxes = from_corners(sample.boxes.points).float()
    else:
        boxes = _clamped(sample.boxes.as_subclass(Tensor), sample.size)
    return image, {"boxes": boxes, "labels": sample.labels}


def _as_float(image: tv_tensors.Image) -> tv_tensors.Image:
    return F.to_dtype(image, torch.float32, scale=True)


def _clamped(boxes: Tensor, size: Size) -> Tensor:
    height, width = size
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=boxes.dtype))


def _shifted(boxes: Tensor, right: int, down: int) -> Tensor:
    plain = boxes.as_subclass(Tensor)
    return plain + plain.new_tensor([right, down]).repeat(plain.shape[1] // 2)


def _boxes(boxes: Tensor, size: Size) -> tv_tensors.BoundingBoxes:
    if boxes.shape[1:] != (4,):
        return Quads(boxes, canvas_size=size)
    return tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def draw(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A number between the two, each as likely."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
