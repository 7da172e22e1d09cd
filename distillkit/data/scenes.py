"""Scenes of handwritten digits on photographs, composed on the fly: a detection set that needs no download.

Digits and photographs come with scikit-learn: ``load_digits`` (UCI ML handwritten digits, 1797 of 8 x 8 pixels) and
``load_sample_images`` (china.jpg and flower.jpg). A scene is a random crop of a photograph on which one to six digits
are drawn, scaled, turned and coloured so that they stand out from what lies under them. What is true of it is known
exactly: boxes, rotated boxes, masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distillkit.boxes.rotated import corners
from distillkit.data.detection import Record, coco_json
from distillkit.data.transforms import Resize, Sample, Transform, generator_for, sample_of

#: the digits (by their place in load_digits, which goes writer by writer) and the columns of either photograph
#: (as shares of its width) that a split may use: no split sees a stroke or a pixel of another's
SPLITS = {
    "train": (range(0, 1200), (0.0, 0.6)),
    "val": (range(1200, 1500), (0.6, 0.8)),
    "test": (range(1500, 1797), (0.8, 1.0)),
}
ENLARGED = 6  # pixels a side for each of the 8 x 8 of a digit
GLYPH = 10 * ENLARGED  # with an empty margin of one of them, which rounds strokes that reach the border
TURN = math.radians(30)  # digits are turned by up to this
SIDES = (0.25, 0.55)  # height of a digit's 8 x 8 field as a share of the scene's shorter side, unless told otherwise
CONTRAST = (0.3, 0.6)  # distance of a digit's brightness (0..1) from what lies under it
OVERLAP = 0.1  # of the smaller of two boxes; drawn pixels never touch
TRIES = 8  # to place a digit before it is given up
INK = 0.5  # of full ink: where the outline of a stroke is drawn
BRIGHTNESS = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)

Key = tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """A scene of k digits, and everything that is true of it.

    Args:
        image: uint8 (H, W, 3), RGB.
        boxes: float32 (k, 4) x1, y1, x2, y2 pixels: the smallest around each mask.
        rotated_boxes: float32 (k, 5) cx, cy, w, h in pixels, angle in radians, clockwise in the image: the smallest
            around the pixels of each mask among the rectangles turned as the digit is.
        masks: bool (k, H, W): the pixels of which a digit makes half or more. They do not overlap.
        labels: int64 (k,): the digits, 0..9.
    """

    image: np.ndarray
    boxes: np.ndarray
    rotated_boxes: np.ndarray
    masks: np.ndarray
    labels: np.ndarray

    @property
    def image_labels(self) -> np.ndarray:
        """float32 (10,): 1 for every digit that is there."""
        return np.isin(np.arange(10), self.labels).astype(np.float32)


class Scenes(Dataset[tuple[Tensor, dict[str, Any]]]):
    """``n`` scenes; ``dataset[(epoch, index)]`` gives items as ``PictureDetection`` does.

    Args:
        n: number of scenes (in an epoch).
        size: S for S x S, or (height, width), in pixels, at least 32.
        seed: scenes are a function of (seed, split, index), for "train" also of the epoch: no scene is shown twice.
        split: "train", "val" or "test"; each has its own digits and its own part of the photographs.
        digits: fewest and most digits of a scene; fewer are drawn where there is no room.
        transform: as in ``CocoDetection``; None: the scene as it is.
        extras: adds rotated_boxes (k, 5) and masks (k, H, W) bool to the target; these are not transformed, so this
            excludes ``transform``.
        rotated: the target's boxes are rotated ones, (k, 5), as ``RotatedDetection`` has them.
        turn: digits are turned by up to this many degrees either way, below 90: a 6 and a 9 differ by half a turn, so
            at 60 they are still a sixth of a turn apart, at 90 they are one.
        sides: least and greatest height of a digit's field, as a share of the scene's shorter side, up to 0.7: turned,
            a greater one may not fit in.

    Raises ValueError for a split, size or number that cannot be.
    """

    def __init__(
        self,
        n: int,
        size: int | tuple[int, int] = 128,
        seed: int = 0,
        split: str = "train",
        digits: tuple[int, int] = (1, 6),
        transform: Transform | None = None,
        extras: bool = False,
        rotated: bool = False,
        turn: float = 30,
        sides: tuple[float, float] = SIDES,
    ):
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if n < 1 or min(self.size) < 32 or not 0 <= digits[0] <= digits[1]:
            raise ValueError(
                f"expected n >= 1, size >= 32 and 0 <= fewest <= most digits, got n={n}, size={size}, digits={digits}"
            )
        if extras and transform is not None:
            raise ValueError("extras: rotated boxes and masks are not transformed; leave out transform or extras")
        if not 0 <= turn < 90:
            raise ValueError(f"turn: expected degrees, at least 0 and below 90, got {turn}")
        self.n, self.seed, self.split, self.digits, self.extras = n, seed, split, digits, extras
        if not 0 < sides[0] <= sides[1] <= 0.7:
            raise ValueError(f"sides: expected shares 0 < least <= greatest <= 0.7, got {sides}")
        self.rotated, self.turn, self.sides = rotated, math.radians(turn), sides
        self.transform: Transform = transform or Resize()
        self.classes = [str(d) for d in range(10)]
        self.category_ids = list(range(1, 11))
        _glyphs(), _photographs()  # once, before workers are made

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: Key) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = key
        generator = generator_for(self.seed, epoch, index)
        chosen = self.transform.indices(index, self.n, generator)
        scenes = [self.scene(i, epoch) for i in chosen]
        image, target = self.transform([_sample(s, self.rotated) for s in scenes], generator)
        target |= {"image_id": index + 1, "size": self.size}
        if self.extras:
            target["rotated_boxes"] = torch.from_numpy(scenes[0].rotated_boxes)
            target["masks"] = torch.from_numpy(scenes[0].masks)
        return image, target

    def scene(self, index: int, epoch: int = 0) -> Scene:
        """Scene ``index`` and everything that is true of it. Raises IndexError beyond ``n``."""
        if not 0 <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        shown = epoch if self.split == "train" else 0
        rng = np.random.default_rng([self.seed, list(SPLITS).index(self.split), shown, index])
        return compose(rng, self.size, self.split, self.digits, self.turn, self.sides)

    def to_coco_json(self) -> dict[str, Any]:
        """The ground truth (of epoch 0) as a COCO dict; areas are those of the masks."""
        return coco_json(self.classes, self.category_ids, (self._record(i) for i in range(self.n)))

    def truth(self) -> list[dict[str, Any]]:
        """What evaluation compares rotated boxes with (of epoch 0), as ``RotatedDetection.truth`` gives it."""
        scenes = (self.scene(i) for i in range(self.n))
        return [
            {
                "image_id": image_id,
                "boxes": torch.from_numpy(scene.rotated_boxes).double(),
                "labels": torch.from_numpy(scene.labels),
                "difficult": torch.zeros(len(scene.labels), dtype=torch.bool),
            }
            for image_id, scene in enumerate(scenes, 1)
        ]

    def _record(self, index: int) -> Record:
        scene = self.scene(index)
        corners = scene.boxes.astype(np.float64)
        return Record(
            image_id=index + 1,
            path=Path(f"{self.split}-{index}.png"),
            size=self.size,
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1),
            labels=scene.labels,
            areas=scene.masks.sum((1, 2)).astype(np.float64),
            crowd=np.zeros(len(corners), bool),
            usable=np.ones(len(corners), bool),
        )


def compose(
    rng: np.random.Generator,
    size: tuple[int, int],
    split: str,
    digits: tuple[int, int],
    turn: float = TURN,
    sides: tuple[float, float] = SIDES,
) -> Scene:
    """Draw one scene of (height, width) pixels with digits turned by up to ``turn`` radians; everything random comes
    from ``rng``."""
    pool, columns = SPLITS[split]
    glyphs, labels = _glyphs()
    canvas = _background(rng, size, columns)
    taken = np.zeros(size, bool)
    placed: list[_Digit] = []
    for _ in range(int(rng.integers(digits[0], digits[1] + 1))):
        which = int(rng.integers(pool.start, pool.stop))
        angle = rng.uniform(-turn, turn)
        alpha = _turned(glyphs[which], min(size) * rng.uniform(*sides), angle)
        digit = _place(rng, alpha, angle, int(labels[which]), taken, [p.box for p in placed])
        if digit is not None:
            window = slice(digit.top, digit.top + alpha.shape[0]), slice(digit.left, digit.left + alpha.shape[1])
            taken[window] |= alpha > 0
            _paint(rng, canvas[window], alpha)
            placed.append(digit)
    return Scene(
        image=(canvas * 255).round().astype(np.uint8),
        boxes=np.array([d.box for d in placed], np.float32).reshape(-1, 4),
        rotated_boxes=np.array([d.rotated_box for d in placed], np.float32).reshape(-1, 5),
        masks=np.array([d.mask_in(size) for d in placed], bool).reshape(-1, *size),
        labels=np.array([d.label for d in placed], np.int64),
    )


@dataclass(frozen=True)
class _Digit:
    """A digit whose patch has its corner at (top, left) of the scene. mask: bool (h, w), the patch's drawn pixels."""

    mask: np.ndarray
    top: int
    left: int
    angle: float
    label: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        left, top = self.left, self.top
        return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1

    @property
    def rotated_box(self) -> tuple[float, float, float, float, float]:
        """The extent of the pixels, as squares, along the digit's own axes."""
        row, column = np.nonzero(self.mask)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = column + self.left + 0.5, row + self.top + 0.5
        along, across = x * cos + y * sin, y * cos - x * sin
        corner = (abs(cos) + abs(sin)) / 2  # how far along an axis a pixel's corner is from its centre
        a1, a2, c1, c2 = along.min() - corner, along.max() + corner, across.min() - corner, across.max() + corner
        a, c = (a1 + a2) / 2, (c1 + c2) / 2
        return a * cos - c * sin, a * sin + c * cos, a2 - a1, c2 - c1, self.angle

    def mask_in(self, size: tuple[int, int]) -> np.ndarray:
        scene = np.zeros(size, bool)
        scene[self.top : self.top + self.mask.shape[0], self.left : self.left + self.mask.shape[1]] = self.mask
        return scene


def _place(
    rng: np.random.Generator,
    alpha: np.ndarray,
    angle: float,
    label: int,
    taken: np.ndarray,
    boxes: list[tuple[int, int, int, int]],
) -> _Digit | None:
    """A digit at a random free place; None if there is none in ``TRIES`` draws."""
    room = np.array(taken.shape) - alpha.shape + 1
    for _ in range(TRIES):
        top, left = (int(v) for v in rng.integers(room))
        digit = _Digit(alpha >= 0.5, top, left, angle, label)
        touches = taken[top : top + alpha.shape[0], left : left + alpha.shape[1]] & (alpha > 0)
        if not touches.any() and all(_shared(digit.box, box) <= OVERLAP for box in boxes):
            return digit
    return None


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection of two boxes over the smaller one's area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))


def _turned(glyph: Image.Image, side: float, angle: float) -> np.ndarray:
    """Coverage 0..1 of a digit ``side`` pixels high, turned clockwise, float32 and cut to where it is above 0."""
    cos, sin, zoom = math.cos(angle), math.sin(angle), 8 * ENLARGED / side
    whole = math.ceil(GLYPH / zoom * (abs(cos) + abs(sin)))
    middle, centre = whole / 2, GLYPH / 2
    back = (
        *(zoom * cos, zoom * sin, centre - zoom * (cos + sin) * middle),
        *(-zoom * sin, zoom * cos, centre - zoom * (cos - sin) * middle),
    )
    turned = glyph.transform((whole, whole), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    ink = np.asarray(turned, np.float32) / 255
    alpha = ((ink - INK) * (side / 8) + 0.5).clip(0, 1)  # from paper to ink within about a pixel at every size
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paint(rng: np.random.Generator, under: np.ndarray, alpha: np.ndarray) -> None:
    """Blend a digit into ``under`` (h, w, 3), in a random colour that is lighter or darker than what it covers."""
    covered = float((under @ BRIGHTNESS * alpha).sum() / alpha.sum())
    step = rng.uniform(*CONTRAST)
    up = rng.random() < 0.5 if step <= covered <= 1 - step else covered < 0.5
    target = min(max(covered + (step if up else -step), 0.0), 1.0)
    hue = rng.random(3)
    colour = ((hue - hue @ BRIGHTNESS) * 0.8 + target).clip(0, 1).astype(np.float32)
    under += alpha[..., None] * (colour - under)


def _background(rng: np.random.Generator, size: tuple[int, int], columns: tuple[float, float]) -> np.ndarray:
    """A crop of a photograph from a range of its columns, float32 (height, width, 3) in 0..1.

    Crops are of the same sizes in every split: no wider than the narrowest range of columns.
    """
    photographs = _photographs()
    photograph = photographs[int(rng.integers(len(photographs)))]
    narrowest = min(right - left for _, (left, right) in SPLITS.values()) * photograph.width
    height, width = size
    zoom = min(narrowest / width, photograph.height / height) * rng.uniform(0.5, 1.0)
    left = rng.uniform(columns[0] * photograph.width, columns[1] * photograph.width - zoom * width)
    top = rng.uniform(0, photograph.height - zoom * height)
    part = (left, top, left + zoom * width, top + zoom * height)
    crop = photograph.resize((width, height), Image.Resampling.BILINEAR, box=part)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    light = np.float32(rng.uniform(0.7, 1.2) / 255)
    return (np.asarray(crop, np.float32) * light).clip(0, 1)


@lru_cache(maxsize=1)
def _glyphs() -> tuple[list[Image.Image], np.ndarray]:
    """scikit-learn's digits enlarged to GLYPH x GLYPH (8-bit grey, 255 = ink), and which digit each is."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.pad((digits.images * (255 / 16)).round().astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    return [Image.fromarray(d).resize((GLYPH, GLYPH), Image.Resampling.BICUBIC) for d in small], digits.target


@lru_cache(maxsize=1)
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _sample(scene: Scene, rotated: bool) -> Sample:
    image = torch.from_numpy(scene.image).permute(2, 0, 1).contiguous()
    boxes = corners(torch.from_numpy(scene.rotated_boxes)) if rotated else torch.from_numpy(scene.boxes)
    return sample_of(image, boxes, torch.from_numpy(scene.labels))
