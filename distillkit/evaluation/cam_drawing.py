"""Class maps and masks drawn over their pictures, for reports and for eyes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from distillkit.evaluation.draw import Picture, _pillow, beside, titled


def voc_palette() -> np.ndarray:
    """uint8 (256, 3), RGB: the colours of Pascal VOC's masks by label: black, dark red, green, ...; 255 is cream.

    The bits of a label, three at a time, are the bits of red, green and blue, the highest first.
    """
    labels = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= (((labels >> (3 * place + channel)) & 1) << (7 - place)).astype(np.uint8)
    return colours


def mask_picture(mask: Tensor) -> Image.Image:
    """A mask of labels 0..255, (H, W), as a picture with VOC's palette, which holds the labels themselves."""
    _check_mask(mask)
    picture = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
    picture.putpalette(voc_palette().tobytes())
    return picture


def draw_mask(image: Picture, mask: Tensor, title: str | None = None, alpha: float = 0.6) -> Image.Image:
    """A picture under its mask in VOC's colours; the background, 0, stays as it is.

    Args:
        image: as ``draw_boxes``. A mask of another size than it is brought to its size, by nearest pixels.
        mask: labels 0..255, (H, W).
        alpha: how much of the colour that is seen is the mask's.
    """
    picture = _pillow(image)
    labels = np.asarray(mask_picture(mask).resize(picture.size, Image.Resampling.NEAREST))
    strength = np.where(labels == 0, 0.0, alpha)
    return _over(picture, voc_palette()[labels], strength, title)


def draw_class_map(image: Picture, strength: Tensor, title: str | None = None, alpha: float = 0.6) -> Image.Image:
    """A picture under the heat of one class map.

    Args:
        image: as ``draw_boxes``.
        strength: (H, W) in 0..1; of another size than the picture it is interpolated.
        alpha: how much of the colour that is seen is the map's.
    """
    from matplotlib import colormaps

    if strength.dim() != 2:
        raise ValueError(f"a class map must be (H, W), got {tuple(strength.shape)}; draw_class_maps takes (C, H, W)")
    picture = _pillow(image)
    heat = Image.fromarray(strength.detach().cpu().float().numpy())
    values = np.asarray(heat.resize(picture.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colours = (colormaps["turbo"](values)[..., :3] * 255).round()
    return _over(picture, colours, np.full(values.shape, alpha), title)


def draw_class_maps(image: Picture, maps: Tensor, classes: Sequence[str] | None = None) -> Image.Image:
    """A picture, and beside it the heat of every class whose map is not 0.

    Args:
        maps: (C, H, W) in 0..1.
        classes: names by label; None: the label itself is written.
    """
    if classes is not None and len(classes) != len(maps):
        raise ValueError(f"there are {len(maps)} class maps and {len(classes)} names")
    shown = maps.flatten(1).amax(1).nonzero().flatten().tolist()
    names = [str(i) if classes is None else classes[i] for i in shown]
    drawn = [draw_class_map(image, maps[i], name) for i, name in zip(shown, names)]
    return beside([titled(_pillow(image), "picture"), *drawn])


def _check_mask(mask: Tensor) -> None:
    if (
        mask.dim() != 2
        or mask.is_floating_point()
        or (mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) < 256)
    ):
        raise ValueError(f"a mask must be whole numbers 0..255, (H, W), got {mask.dtype} {tuple(mask.shape)}")


def _over(picture: Image.Image, colours: np.ndarray, strength: np.ndarray, title: str | None) -> Image.Image:
    """Colours (H, W, 3) over a picture, each pixel as strong as (H, W) in 0..1 says."""
    below, weight = np.asarray(picture, np.float32), strength[..., None]
    drawn = Image.fromarray((below * (1 - weight) + colours * weight).round().astype(np.uint8))
    return drawn if title is None else titled(drawn, title)
