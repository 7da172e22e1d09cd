"""RandAugment for a picture and its label map together. Cubuk et al., arXiv:1909.13719, with timm's operations.

Each layer draws one of 15 operations and then, half of the time, leaves the picture as it is. Token labelling, VOLO,
ViP and most of timm's recipes use ``rand-m9-mstd0.5-inc1``: magnitude m = 9 of 10, normal noise of standard deviation
0.5, clipped to 0..10, and operations that grow with m:

    =============================  =========================================================================
    Rotate                         +-3 m degrees, counter-clockwise around the middle
    ShearX, ShearY                 +-0.03 m: each row (column) is moved by that part of its distance from the first
    TranslateXRel, TranslateYRel   +-0.045 m of the side
    PosterizeIncreasing            keep 4 - int(0.4 m) bits, at least 1
    SolarizeIncreasing             invert values from 256 - int(25.6 m) on
    SolarizeAdd                    add int(11 m), at most 128, to values below 128
    Color-, Contrast-, Brightness-, SharpnessIncreasing    factor 1 +- 0.09 m, at least 0.1
    AutoContrast, Equalize, Invert
    =============================  =========================================================================

Operations, ranges, probability and order are those of ``timm.data.rand_augment_transform``; the tests compare them.
What differs:

- everything is drawn from the generator that is handed in;
- at m = 10 timm keeps 0 bits, a black picture, which Pillow refuses today;
- pictures may be uint8 tensors; torchvision's operations on them round otherwise than PIL's, and blend the rim of a
  moved picture with the fill, where PIL cuts;
- pixels are interpolated bilinearly (timm draws bilinear or bicubic each time; "random" does, for PIL pictures).

A geometric operation is one affine matrix from the new picture to the old one. Picture and map are given the same one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distillkit.data.label_map import RELEASED, LabelMap, released

MOST = 10.0  # the magnitude at which ranges end
OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
GEOMETRIC = RELEASED
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


class Operation(NamedTuple):
    """One operation that was drawn: its name, its argument (0 where it has none) and how pixels are interpolated."""

    name: str
    amount: float
    interpolation: InterpolationMode = InterpolationMode.BILINEAR


@dataclass(frozen=True)
class RandAugment:
    """RandAugment as this module says.

    Args:
        magnitude: m, 0..10.
        std: standard deviation of the noise on m.
        layers: operations drawn for a picture, with repetition.
        probability: that an operation drawn is carried out.
        fill: grey level, or one a channel, where a moved picture shows what was outside.
        interpolation: of moved pictures.
        convention: "release": label maps are moved as in the published code, to the nearest cell (``released`` of
            ``label_map``), which needs the published order: flips, RandAugment, then the crop.

    Raises:
        ValueError: values out of these ranges.
    """

    magnitude: float = 9.0
    std: float = 0.5
    layers: int = 2
    probability: float = 0.5
    fill: float | Sequence[float] = 128
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    convention: Literal["default", "release"] = "default"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("magnitude", 0.0, MOST),
            ("std", 0.0, math.inf),
            ("layers", 0.0, math.inf),
            ("probability", 0.0, 1.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected a number in {low:g}..{high:g}, got {getattr(self, name)}")
        if self.interpolation not in (*MODES, "random"):
            raise ValueError(f"interpolation must be one of {(*MODES, 'random')}, got {self.interpolation!r}")
        if self.convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {self.convention!r}")

    @classmethod
    def from_config(cls, config: str, **options: Any) -> RandAugment:
        """From timm's notation: ``rand-m9-n3-mstd0.5-inc1``, with ``p0.5`` for the probability.

        ``options`` are the other arguments. Raises ValueError for what is not there: policies without ``inc1``, other
        sets or weights of operations (``t...``), magnitudes above 10 (``mmax``).
        """
        kind, *parts = config.split("-")
        names = {"m": "magnitude", "mstd": "std", "n": "layers", "p": "probability"}
        found: dict[str, Any] = {"magnitude": MOST, "std": 0.0}
        increasing = False
        for part in parts:
            key, number = re.fullmatch(r"([a-z]*)(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
            if not re.fullmatch(r"\d+(\.\d+)?", number) or key not in (*names, "inc"):
                raise ValueError(f"{config!r}: {part!r} is not understood; known are {', '.join(names)} and inc1")
            if key == "inc":
                increasing = float(number) == 1
            else:
                found[names[key]] = int(number) if key == "n" else float(number)
        if kind != "rand" or not increasing:
            raise ValueError(f"{config!r}: only 'rand-...-inc1' is there, operations that grow with the magnitude")
        return cls(**(found | options))

    def draw(self, generator: torch.Generator) -> list[Operation]:
        """The operations for one picture, in order. What is drawn does not depend on what was drawn before, so that
        the same generator stands at the same place afterwards, whatever came."""
        choices = torch.randint(len(OPERATIONS), (self.layers,), generator=generator).tolist()
        done, sign, cubic = torch.rand(3, self.layers, generator=generator, dtype=torch.float64)
        noise = torch.randn(self.layers, generator=generator, dtype=torch.float64) * self.std
        drawn = []
        for i, choice in enumerate(choices):
            if done[i] >= self.probability:
                continue
            level = min(max(self.magnitude + float(noise[i]), 0.0), MOST) / MOST
            bicubic = self.interpolation == "bicubic" or (self.interpolation == "random" and bool(cubic[i] < 0.5))
            name = OPERATIONS[choice]
            amount = amount_of(name, level, -1 if sign[i] < 0.5 else 1)
            drawn.append(Operation(name, amount, MODES["bicubic" if bicubic else "bilinear"]))
        return drawn

    def __call__(
        self, image: Any, label_map: LabelMap | None, generator: torch.Generator
    ) -> tuple[Any, LabelMap | None]:
        """A picture and its label map, changed together.

        Args:
            image: uint8 (3, H, W), a plain tensor or a tv_tensor, or a PIL picture in RGB.
            label_map: None: the picture has none.
            generator: what is drawn here; nothing else is random.
        """
        if isinstance(image, Tensor) and self.interpolation != "bilinear":
            raise ValueError(
                f"interpolation={self.interpolation!r} needs PIL pictures: torchvision moves tensors "
                "with 'bilinear' only"
            )
        for operation in self.draw(generator):
            image = self.apply(operation, image)
            if label_map is not None:
                label_map = self.apply(operation, label_map)
        return image, label_map

    def apply(self, operation: Operation, what: Any) -> Any:
        """One operation on a picture or on a label map, which photometric ones leave as it is."""
        name, amount, interpolation = operation
        if name not in GEOMETRIC:
            return what if isinstance(what, LabelMap) else PHOTOMETRIC[name](what, amount)
        if isinstance(what, LabelMap) and self.convention == "release":
            return released(what, name, amount)
        height, width = F.get_size(what)
        back = back_of(name, amount, (height, width))
        fill = self.fill if isinstance(self.fill, (int, float)) else list(self.fill)
        return F.perspective(what, None, None, interpolation, fill, coefficients=[*back, 0.0, 0.0])


def amount_of(name: str, level: float, sign: int) -> float:
    """The argument of an operation.

    Args:
        level: magnitude / 10, in 0..1.
        sign: 1 or -1, for operations that go either way.
    """
    if name == "Rotate":
        return sign * 30.0 * level
    if name in ("ShearX", "ShearY"):
        return sign * 0.3 * level
    if name in ("TranslateXRel", "TranslateYRel"):
        return sign * 0.45 * level
    if name == "PosterizeIncreasing":
        return max(1, 4 - int(level * 4))
    if name == "SolarizeIncreasing":
        return 256 - int(level * 256)
    if name == "SolarizeAdd":
        return min(128, int(level * 110))
    if name in ("AutoContrast", "Equalize", "Invert"):
        return 0.0
    return max(0.1, 1.0 + sign * 0.9 * level)


def back_of(name: str, amount: float, size: tuple[int, int]) -> tuple[float, ...]:
    """A geometric operation as a, b, c, d, e, f: place (x, y) of the new picture shows (a x + b y + c, d x + e y + f)
    of the old one, in pixels; ``size`` (height, width). PIL's and timm's senses of direction."""
    height, width = size
    if name == "ShearX":
        return 1.0, amount, 0.0, 0.0, 1.0, 0.0
    if name == "ShearY":
        return 1.0, 0.0, 0.0, amount, 1.0, 0.0
    if name == "TranslateXRel":
        return 1.0, 0.0, amount * width, 0.0, 1.0, 0.0
    if name == "TranslateYRel":
        return 1.0, 0.0, 0.0, 0.0, 1.0, amount * height
    cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def _solarize(image: Any, threshold: float) -> Any:
    return image if threshold > 255 else F.solarize(image, threshold)


def _solarize_add(image: Any, added: float) -> Any:
    if isinstance(image, PIL.Image.Image):
        table = [min(255, i + int(added)) if i < 128 else i for i in range(256)]
        return image.point(table * len(image.getbands()))
    plain = image.as_subclass(Tensor)
    changed = torch.where(plain < 128, plain + int(added), plain)  # below 256: added is at most 128
    return tv_tensors.wrap(changed, like=image) if isinstance(image, tv_tensors.TVTensor) else changed


PHOTOMETRIC: dict[str, Callable[[Any, float], Any]] = {
    "AutoContrast": lambda image, _: F.autocontrast(image),
    "Equalize": lambda image, _: F.equalize(image),
    "Invert": lambda image, _: F.invert(image),
    "PosterizeIncreasing": lambda image, bits: F.posterize(image, int(bits)),
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": F.adjust_saturation,
    "ContrastIncreasing": F.adjust_contrast,
    "BrightnessIncreasing": F.adjust_brightness,
    "SharpnessIncreasing": F.adjust_sharpness,
}
