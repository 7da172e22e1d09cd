"""From a picture, and its label map where it has one, to what a classifier is fed; drawn from one generator.

The stack is timm's: random resized crop, flips, RandAugment or colour jitter, random erasing (Wightman et al.,
arXiv:2110.00476). Label maps go through the same torchvision functionals, which record where the view lies on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distillkit.data.label_map import LabelMap
from distillkit.data.randaugment import RandAugment
from distillkit.data.transforms import Size, draw

TRIES = 10
ERASED, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


class View(NamedTuple):
    """A picture, float32 (3, H, W) in 0..1, and its label map."""

    image: Tensor
    label_map: LabelMap | None


@dataclass(frozen=True)
class Middle:
    """The view for evaluation: resized, and the middle cut out.

    Args:
        size: (height, width) of the view.
        share: the view's part of the resized picture's shorter side, in (0, 1].
    """

    size: Size
    share: float = 0.9

    def __call__(self, image: tv_tensors.Image, label_map: LabelMap | None, generator: torch.Generator) -> View:
        height, width = image.shape[-2:]
        factor = max(self.size[0] / height, self.size[1] / width) / self.share
        larger = [max(low, round(side * factor)) for low, side in zip(self.size, (height, width), strict=True)]

        def view(part: Any) -> Any:
            return F.center_crop(F.resize(part, larger, InterpolationMode.BICUBIC, antialias=True), list(self.size))

        return _finished(*_both(view, image, label_map))


@dataclass(frozen=True)
class Random:
    """A random view for training.

    Args:
        size: (height, width) of the view.
        scale: (least, most) part of the picture's area that the crop shows; None: all of it, stretched.
        ratio: (narrowest, widest) width over height of the crop.
        interpolation: of the crop; "random": bicubic or bilinear.
        crop_last: the crop comes after all other changes of geometry and colour, which see the whole picture.
        flip, flip_vertical: probabilities.
        color: strength of brightness, contrast and saturation, each multiplied by a factor in [1 - color, 1 + color];
            left out where there is ``rand_augment``, as in timm.
        rand_augment: None: none.
        erase: probability that a rectangle becomes noise.
    """

    size: Size
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    crop_last: bool = False
    flip: float = 0.5
    flip_vertical: float = 0.0
    color: float = 0.0
    rand_augment: RandAugment | None = None
    erase: float = 0.0

    def __call__(self, image: tv_tensors.Image, label_map: LabelMap | None, generator: torch.Generator) -> View:
        crop = self._crop(tuple(image.shape[-2:]), generator)
        if not self.crop_last:
            image, label_map = _both(crop, image, label_map)
        for probability, mirror in ((self.flip, F.horizontal_flip), (self.flip_vertical, F.vertical_flip)):
            if draw(generator) < probability:
                image, label_map = _both(mirror, image, label_map)
        if self.rand_augment is not None:
            image, label_map = self.rand_augment(image, label_map, generator)
        elif self.color:
            for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
                image = adjust(image, draw(generator, 1 - self.color, 1 + self.color))
        if self.crop_last:
            image, label_map = _both(crop, image, label_map)
        view = _finished(image, label_map)
        return View(erased(view.image, generator), view.label_map) if draw(generator) < self.erase else view

    def _crop(self, size: Size, generator: torch.Generator) -> Callable[[Any], Any]:
        """A window drawn in a picture of ``size``, and resized."""
        height, width = size
        top, left, high, wide = (0, 0, height, width)
        if self.scale is not None:
            top, left, high, wide = window((height, width), self.scale, self.ratio, generator)
        name = self.interpolation
        if name == "random":
            name = "bicubic" if draw(generator) < 0.5 else "bilinear"

        def crop(part: Any) -> Any:
            return F.resized_crop(part, top, left, high, wide, list(self.size), InterpolationMode(name), antialias=True)

        return crop


def _both(change: Callable[[Any], Any], image: Any, label_map: LabelMap | None) -> tuple[Any, LabelMap | None]:
    return change(image), None if label_map is None else change(label_map)


def _finished(image: Any, label_map: LabelMap | None) -> View:
    return View(F.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor), label_map)


def window(
    size: Size, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: area and shape drawn up to ``TRIES`` times until it fits; else the
    largest part in the middle whose shape is allowed."""
    height, width = size
    low, high = (math.log(side) for side in ratio)
    for _ in range(TRIES):
        area = height * width * draw(generator, *scale)
        shape = math.exp(draw(generator, low, high))
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < tall <= height:
            return _below(height - tall, generator), _below(width - wide, generator), tall, wide
    shape = min(max(width / height, ratio[0]), ratio[1])
    tall, wide = min(height, round(width / shape)), min(width, round(height * shape))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def erased(image: Tensor, generator: torch.Generator) -> Tensor:
    """The picture with noise in a rectangle of ``ERASED`` of its area, as timm's pixel mode gives it before
    normalisation; as it was where none of ``TRIES`` fits."""
    _, height, width = image.shape
    low, high = (math.log(side) for side in ERASED_RATIO)
    for _ in range(TRIES):
        area, shape = height * width * draw(generator, *ERASED), math.exp(draw(generator, low, high))
        tall, wide = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < tall < height and 0 < wide < width:
            top, left = _below(height - tall, generator), _below(width - wide, generator)
            noise = torch.randn(3, tall, wide, generator=generator)
            moments = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            mean, std = (torch.tensor(moment)[:, None, None] for moment in moments)
            image = image.clone()
            image[:, top : top + tall, left : left + wide] = mean + std * noise
            break
    return image


def _below(room: int, generator: torch.Generator) -> int:
    """0..room, each as likely."""
    return int(torch.randint(room + 1, (), generator=generator))
