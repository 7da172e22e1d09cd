"""From a picture with its mask and its saliency map to what a network is fed; all of them are moved together.

Geometry is torchvision's (v2 functionals). What is drawn at random comes from the one generator that is handed in,
never from a global state. Pictures are interpolated, masks and saliency maps keep their values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distillkit.data.boundary import Between, boundary_band, in_pixels
from distillkit.data.transforms import Size, draw, fitted
from distillkit.losses.segmentation import IGNORE

#: red, green and blue of ImageNet's mean colour, which normalisation makes 0
MEAN_COLOUR = (124, 116, 104)

Interpolation = Literal["bilinear", "bicubic"]


class MaskView(NamedTuple):
    """What comes out of a transform; None where nothing went in.

    Args:
        image: float32 (3, H, W) in 0..1.
        mask: int64 (H, W) labels, ``IGNORE`` where there is none.
        saliency: float32 (1, H, W) in 0..1: what the view shows of the map, divided by its maximum there + 1e-10, as
            L2G does (arXiv:2204.03206). Where nothing of it is salient it stays 0.
        boundary: uint8 (H, W), 1 near a boundary of the mask, where the transform was asked for it.
    """

    image: Tensor
    mask: Tensor | None
    saliency: Tensor | None
    boundary: Tensor | None = None


class MaskTransform(Protocol):
    """What a set is given as ``transform``."""

    def __call__(
        self, image: Tensor, mask: Tensor | None, saliency: Tensor | None, generator: torch.Generator
    ) -> MaskView:
        """image: uint8 (3, H, W). mask: labels (H, W). saliency: (H, W), 0 = not salient."""


@dataclass(frozen=True)
class MaskResize:
    """The transform for evaluation: the picture at the network's size, the mask as its file has it.

    Args:
        size: S for S x S, (height, width), or None to leave the picture as it is.
        keep_ratio: False: stretch to ``size``. True: the largest picture of unchanged aspect that fits, ``size``
            bounding the long and the short side whichever way the picture stands; nothing is filled up, so pictures
            then differ in size.

    A saliency map is brought to the picture's new size. Raises ValueError for sizes that are not positive.
    """

    size: int | Size | None = None
    keep_ratio: bool = False
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check_size("size", self.size)
        _check_interpolation(self.interpolation)

    def __call__(
        self, image: Tensor, mask: Tensor | None, saliency: Tensor | None, generator: torch.Generator
    ) -> MaskView:
        # in float: rounding to 256 levels before the network moves scores
        parts = _Parts(F.to_dtype(tv_tensors.Image(image), torch.float32, scale=True), None, _map(saliency))
        if self.size is not None:
            size = fitted(parts.size, _pair(self.size), self.keep_ratio)
            parts = _resized(parts, size, self.interpolation)
        return _finished(parts._replace(mask=_map(mask)))


@dataclass(frozen=True)
class MaskAugment:
    """The transform for training: quarter turns, resize, crop, mirror image, colour, in this order.

    Args:
        size, keep_ratio: as in ``MaskResize``: what pictures are brought to before ``scale`` changes it, so that a
            network is trained at the scales at which it is evaluated with the same two.
        scale: (lo, hi): the picture is then larger by a factor drawn uniformly from it; None: 1.
        crop: the window that is shown, at a place of which each is as likely: True: of ``size``; or S, or (height,
            width). Where the picture is smaller it lies anywhere in the window, each place as likely; what it does not
            fill is ``fill`` in the picture, ``IGNORE`` in the mask and 0 in the saliency map. False: all of the picture
            is shown at ``size``: stretched, or with ``keep_ratio`` filled up.
        flip: probability of a mirror image.
        color: strength c of brightness, contrast and saturation: each is multiplied by a factor in [1 - c, 1 + c].
        hue: turned by a part of the colour circle in [-hue, hue], at most 0.5.
        rotate90: the most quarter turns, 0..3: their number is drawn from 0..rotate90. FakeMix has 2 on MSD.
        short_side: S, or (lo, hi) to draw it from: the picture's short side is made so long with unchanged aspect, and
            ``size`` does nothing to it, as in L2G on VOC (short side 512, crop 448). Needs ``crop``.
        interpolation: of the picture.
        boundary: thickness of the boundaries of the view's mask, which the view then gets: pixels, or a share of the
            window's shorter side, below 1; None: none.
        boundary_between: "foreground": between the background, which is class 0, and all else (FakeMix, TransLab).
            "classes": between any two classes, for masks without a background. See ``data.boundary``.
        fill: uint8 red, green and blue.

    L2G's release draws the crop's x from the height's slack and its y from the width's, so that most crops leave the
    picture (a picture of 680 x 512 never shows its right part). That is a mistake, and not here.

    Raises ValueError for values out of these ranges and for settings that leave pictures of several sizes.
    """

    size: int | Size | None = None
    scale: tuple[float, float] | None = (0.5, 2.0)
    crop: bool | int | Size = True
    keep_ratio: bool = False
    flip: float = 0.5
    color: float = 0.0
    hue: float = 0.0
    rotate90: int = 0
    short_side: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    boundary: int | float | None = None
    boundary_between: Between = "foreground"
    fill: tuple[int, int, int] = MEAN_COLOUR

    def __post_init__(self) -> None:
        _check_size("size", self.size)
        _check_interpolation(self.interpolation)
        if not isinstance(self.crop, bool):
            _check_size("crop", self.crop)
        for name, most in (("flip", 1), ("color", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected a number in 0..{most}, got {getattr(self, name)}")
        if self.rotate90 not in (0, 1, 2, 3):
            raise ValueError(f"rotate90: expected the most quarter turns, 0..3, got {self.rotate90}")
        for name in ("scale", "short_side"):
            value = getattr(self, name)
            low, high = value if isinstance(value, tuple | list) else (value or 1, value or 1)
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected 0 < lo <= hi, got {value}")
        if self.boundary_between not in ("foreground", "classes"):
            raise ValueError(f"boundary_between: expected 'foreground' or 'classes', got {self.boundary_between!r}")
        if len(self.fill) != 3 or not all(0 <= level <= 255 for level in self.fill):
            raise ValueError(f"fill: expected red, green and blue in 0..255, got {self.fill}")
        self._check_one_size()
        if self.boundary is not None:
            in_pixels(self.boundary, self._window())

    def _check_one_size(self) -> None:
        if self.size is None and isinstance(self.crop, bool):
            raise ValueError(
                "pictures would keep their own sizes, which no batch can hold: give size, or crop as S or "
                f"(height, width); got size=None, crop={self.crop}"
            )
        if self.crop is False and (self.scale is not None or self.short_side is not None):
            raise ValueError(
                "crop=False shows the whole picture at size, so scale and short_side must be None; got "
                f"scale={self.scale}, short_side={self.short_side}"
            )

    def __call__(
        self, image: Tensor, mask: Tensor | None, saliency: Tensor | None, generator: torch.Generator
    ) -> MaskView:
        parts = _Parts(tv_tensors.Image(image), _map(mask), _map(saliency))
        turns = _up_to(self.rotate90, generator)
        if turns:  # exact; torchvision's rotate samples
            parts = parts.all(lambda part: type(part)(torch.rot90(part, turns, (-2, -1))))
        parts = _resized(parts, self._new_size(parts.size, generator), self.interpolation)
        window = self._window()
        top, left = (_offset(have, want, generator) for have, want in zip(parts.size, window, strict=True))
        parts = _shown(parts, window, top, left)
        if draw(generator) < self.flip:
            parts = parts.all(F.horizontal_flip)
        parts = parts._replace(image=self._coloured(parts.image, generator))
        view = _finished(_filled_up(parts, window, top, left, self.fill))
        if view.mask is None or self.boundary is None:
            return view
        return view._replace(boundary=boundary_band(view.mask, self.boundary, between=self.boundary_between))

    def _new_size(self, picture: Size, generator: torch.Generator) -> Size:
        """(height, width) of all of the picture, before the crop."""
        base: tuple[float, float] = picture
        if self.short_side is not None:
            low, high = self.short_side if isinstance(self.short_side, tuple | list) else (self.short_side,) * 2
            factor = (low + _up_to(high - low, generator)) / min(picture)
            base = picture[0] * factor, picture[1] * factor
        elif self.size is not None:
            base = fitted(picture, _pair(self.size), self.keep_ratio, pad=self.crop is False)
        factor = 1.0 if self.scale is None else draw(generator, *self.scale)
        return max(1, round(base[0] * factor)), max(1, round(base[1] * factor))

    def _window(self) -> Size:
        size = self.size if isinstance(self.crop, bool) else self.crop
        assert size is not None
        return _pair(size)

    def _coloured(self, image: Any, generator: torch.Generator) -> Any:
        if self.color:
            for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
                image = adjust(image, draw(generator, 1 - self.color, 1 + self.color))
        return F.adjust_hue(image, draw(generator, -self.hue, self.hue)) if self.hue else image


class _Parts(NamedTuple):
    """A picture (3, H, W), its mask and its saliency map (H, W), as tv_tensors."""

    image: Any
    mask: Any
    saliency: Any

    @property
    def size(self) -> Size:
        return self.image.shape[-2], self.image.shape[-1]

    def all(self, change: Callable[[Any], Any]) -> _Parts:
        return _Parts(*(None if part is None else change(part) for part in self))


def _map(values: Tensor | None) -> tv_tensors.Mask | None:
    return None if values is None else tv_tensors.Mask(values)


def _resized(parts: _Parts, size: Size, interpolation: Interpolation) -> _Parts:
    if size == parts.size:
        return parts
    image = F.resize(parts.image, list(size), InterpolationMode(interpolation), antialias=True)
    return _Parts(image, *(None if part is None else _nearest(part, size) for part in parts[1:]))


def _nearest(part: tv_tensors.Mask, size: Size) -> tv_tensors.Mask:
    """Each pixel's value is the one under its middle. torchvision's own for masks is that under its upper left corner,
    which moves a mask against its picture by up to half a pixel of the larger of the two."""
    plain = part.as_subclass(Tensor)[None]
    return tv_tensors.Mask(F.resize(plain, list(size), InterpolationMode.NEAREST_EXACT)[0])


def _offset(have: int, want: int, generator: torch.Generator) -> int:
    """Where a window of ``want`` begins in a side of ``have``, each place as likely; below 0 the window is longer."""
    room = _up_to(abs(have - want), generator)
    return room if have >= want else -room


def _shown(parts: _Parts, window: Size, top: int, left: int) -> _Parts:
    """What a window shows of the parts, without what lies outside of them."""
    height, width = (min(have, want) for have, want in zip(parts.size, window, strict=True))
    return parts.all(lambda part: F.crop(part, max(top, 0), max(left, 0), height, width))


def _filled_up(parts: _Parts, window: Size, top: int, left: int, fill: tuple[int, int, int]) -> _Parts:
    if parts.size == window:
        return parts
    above, before = max(-top, 0), max(-left, 0)
    around = [before, above, window[1] - parts.size[1] - before, window[0] - parts.size[0] - above]
    image = F.pad(parts.image, around, fill=[float(level) for level in fill])
    mask, saliency = (
        None if part is None else F.pad(part, around, fill=value)
        for part, value in ((parts.mask, IGNORE), (parts.saliency, 0))
    )
    return _Parts(image, mask, saliency)


def _finished(parts: _Parts) -> MaskView:
    image = F.to_dtype(parts.image, torch.float32, scale=True).as_subclass(Tensor).contiguous()
    image = image.clamp(0, 1)  # bicubic goes beyond what is there
    mask = None if parts.mask is None else parts.mask.as_subclass(Tensor).long()
    if parts.saliency is None:
        return MaskView(image, mask, None)
    saliency = parts.saliency.as_subclass(Tensor).float()[None]
    return MaskView(image, mask, saliency / (saliency.max() + 1e-10))


def _up_to(most: int, generator: torch.Generator) -> int:
    """0..most, each as likely."""
    return int(torch.randint(most + 1, (), generator=generator))


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_size(name: str, size: int | Size | None) -> None:
    if size is not None and min(_pair(size)) < 1:
        raise ValueError(f"{name}: expected positive pixels, got {size}")


def _check_interpolation(name: str) -> None:
    if name not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation: expected 'bilinear' or 'bicubic', got {name!r}")
