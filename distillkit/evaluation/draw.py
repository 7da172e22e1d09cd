"""Boxes, upright or rotated, drawn on pictures, with class names and scores, for reports and for eyes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distillkit.boxes.rotated import corners, upright

#: shorter pictures are enlarged to this height and width at least, so that labels can be read
SIDE = 384
TEXT = 13  # pixels
GAP = 8  # pixels between two pictures side by side

Picture = Tensor | np.ndarray | Image.Image


def draw_boxes(
    image: Picture,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None = None,
    classes: Sequence[str] | None = None,
    score: float = 0.0,
    title: str | None = None,
) -> Image.Image:
    """A copy of a picture with boxes on it.

    Args:
        image: float (3, H, W) in 0..1, uint8 (3, H, W) or (for arrays) uint8 (H, W, 3), or a Pillow picture; RGB.
        boxes: (k, 4) x1, y1, x2, y2 in its pixels, or rotated ones (k, 5) cx, cy, w, h and angle in radians.
        labels: (k,) int64. Each class has its own colour.
        scores: (k,) in 0..1, written behind the name and drawn lowest first; None: for ground truth.
        classes: names by label; None: the label itself is written.
        score: boxes below it are left out.
        title: written in a strip above the picture.

    Returns an RGB picture, at least ``SIDE`` pixels high and wide: small ones are enlarged by a whole factor.
    """
    picture = _pillow(image)
    factor = max(1, -(-SIDE // min(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    taken: list[tuple[float, float, float, float]] = []
    kept = torch.arange(len(boxes)) if scores is None else scores.cpu().argsort()
    for i in kept.tolist():
        if scores is not None and scores[i] < score:
            continue
        label = int(labels[i])
        name = str(label) if classes is None else classes[label]
        text = name if scores is None else f"{name} {float(scores[i]):.2f}"
        colour = _colour(label)
        outline = _outline if boxes.shape[-1] == 4 else _rotated_outline
        _write(pen, font, text, outline(pen, boxes[i], factor, colour), colour, picture.size, taken)
    return picture if title is None else titled(picture, title)


def side_by_side(
    image: Picture,
    truth: dict[str, Tensor],
    prediction: dict[str, Tensor],
    classes: Sequence[str] | None = None,
    score: float = 0.3,
) -> Image.Image:
    """One picture twice: with the true boxes (boxes, labels) and with the predicted ones (boxes, scores, labels) of at
    least ``score``; upright boxes or rotated ones. Arguments are those of ``draw_boxes``, which makes both."""
    left = draw_boxes(image, truth["boxes"], truth["labels"], None, classes, title="truth")
    scores = prediction["scores"]
    right = draw_boxes(image, prediction["boxes"], prediction["labels"], scores, classes, score, title="predicted")
    return beside([left, right])


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, on white."""
    width = sum(p.width for p in pictures) + GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + GAP
    return row


def _pillow(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if image.is_floating_point():
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(image))


def _colour(label: int) -> tuple[int, int, int]:
    """Hues a golden angle apart: any few neighbouring labels are easy to tell from each other."""
    hue = int(label * 0.618034 * 255) % 255
    red, green, blue = Image.new("HSV", (1, 1), (hue, 200, 255)).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    return red, green, blue


def _outline(pen: ImageDraw.ImageDraw, box: Tensor, factor: int, colour: tuple[int, int, int]) -> list[float]:
    """Draw a box and return it in pixels of the enlarged picture."""
    x1, y1, x2, y2 = around = [float(v) * factor for v in box]
    # torchvision's convention to Pillow's: the last pixel that is inside
    pen.rectangle([x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)], outline=colour, width=2)
    return around


def _rotated_outline(pen: ImageDraw.ImageDraw, box: Tensor, factor: int, colour: tuple[int, int, int]) -> list[float]:
    """Draw a rotated box and return the upright one around it, in pixels of the enlarged picture."""
    box = box.detach().cpu().double()
    # Pillow counts from the middle of a pixel
    points = [(x * factor - 0.5, y * factor - 0.5) for x, y in corners(box).tolist()]
    # of a slanted line 2 wide Pillow draws little more than 1
    pen.line([*points, points[0], points[1]], fill=colour, width=3, joint="curve")
    return [v * factor for v in upright(box).tolist()]


def _write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    text: str,
    box: Sequence[float],
    colour: tuple[int, int, int],
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """A label on a ground of its colour: above the box, or else below or inside it, wherever no other label is."""
    width, height = pen.textlength(text, font) + 4, TEXT + 4
    x = min(max(box[0], 0), size[0] - width)
    places = [(x, y, x + width, y + height) for y in (box[1] - height, box[3], box[1], box[3] - height)]
    inside = [p for p in places if p[1] >= 0 and p[3] <= size[1]] or [(x, 0, x + width, height)]
    place = next((p for p in inside if not any(_meet(p, other) for other in taken)), inside[0])
    pen.rectangle(place, fill=colour)
    pen.text((place[0] + 2, place[1]), text, fill="black", font=font)
    taken.append(place)


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def titled(picture: Image.Image, title: str) -> Image.Image:
    """A picture below a strip with its title."""
    strip = TEXT + 8
    whole = Image.new("RGB", (picture.width, picture.height + strip), "white")
    ImageDraw.Draw(whole).text((4, 2), title, fill="black", font=ImageFont.load_default(TEXT))
    whole.paste(picture, (0, strip))
    return whole
