"""How a picture is cut into tiles, and the pixels of a tile. Imports no torch: the processes that cut start with it.

The rules are those of the published DOTA training (Rotated-LD, which uses mmrotate's split): windows of 1024 pixels
with 200 shared between neighbours, the last of a row moved back to the border; a window stays if the picture fills more
than 0.6 of it (where none does, the fullest); what a picture does not fill has the mean colour of ImageNet.
At other scales the picture is resized here, not at training: a tile is ``size`` pixels at every scale.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from distillkit.data.large import Windows, open_windows
from distillkit.data.problems import DataError

#: ending of a file that is being written; it is renamed when it is complete
PART = ".part"
NAME = re.compile(r"(.+)__(\d+(?:\.\d+)?)__(\d+)___(\d+)")


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut.

    Args:
        size: side of a tile in pixels.
        overlap: pixels that neighbouring tiles share, less than ``size``.
        scales: the pictures are cut at each of these sizes; 0.5: at half their size.
        filled: a window stays if the picture fills more than this share of it; where no window does at any scale, the
            fullest stay.
        inside: an object goes with a window that shows this share of its area or more.
        colour: red, green, blue of what the picture does not fill. (The published 104, 116, 124 are blue, green, red.)

    Raises ValueError for values that cannot be.
    """

    size: int = 1024
    overlap: int = 200
    scales: tuple[float, ...] = (1.0,)
    filled: float = 0.6
    inside: float = 0.7
    colour: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"overlap: expected 0 <= overlap < size, got {self.overlap} with size {self.size}")
        written = [f"{scale:g}" for scale in self.scales]  # in the names of tiles
        exact = all(s > 0 and float(w) == s and "e" not in w for s, w in zip(self.scales, written, strict=True))
        if not written or len(set(written)) < len(written) or not exact:
            raise ValueError(f"scales: expected different numbers above 0, of up to six digits; got {self.scales}")
        for name in ("filled", "inside"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in 0..1, got {getattr(self, name)}")


class Tile(NamedTuple):
    """Where a tile was cut.

    Args:
        name: the picture's, without ending.
        scale: what the picture was resized by.
        x, y: the tile's left upper corner in pixels of the resized picture: a point p of the tile is
            ``(p + (x, y)) / scale`` in the picture.
    """

    name: str
    scale: float
    x: int
    y: int

    @property
    def stem(self) -> str:
        """The tile's file name without ending, as DOTA's development kit writes it."""
        return f"{self.name}__{self.scale:g}__{self.x}___{self.y}"

    @classmethod
    def parse(cls, stem: str) -> Tile:
        """``stem`` undone. Raises ValueError for a name that is no tile's."""
        match = NAME.fullmatch(stem)
        if match is None:
            raise ValueError(f"{stem!r} is no tile's name, such as P0001__1__0___824")
        name, scale, x, y = match.groups()
        return cls(name, float(scale), int(x), int(y))


def starts(side: int, size: int, overlap: int) -> list[int]:
    """Where windows start along a side of a picture; the last ends at the border. [0] for a side that fits in one."""
    if side <= size:
        return [0]
    step = size - overlap
    return [min(step * i, side - size) for i in range(math.ceil((side - size) / step) + 1)]


def windows(name: str, size: tuple[int, int], tiling: Tiling) -> list[Tile]:
    """The tiles of a picture (height, width), by scale, row and column."""
    height, width = size
    filled: dict[Tile, float] = {}
    for scale in tiling.scales:
        high, wide = _scaled(height, scale), _scaled(width, scale)
        share = min(high, tiling.size) * min(wide, tiling.size) / tiling.size**2
        ys, xs = (starts(side, tiling.size, tiling.overlap) for side in (high, wide))
        filled |= {Tile(name, scale, x, y): share for y, x in product(ys, xs)}
    least = min(tiling.filled, max(filled.values()) - 1e-9)
    return [tile for tile, share in filled.items() if share > least]


def _scaled(side: int, scale: float) -> int:
    """Whole pixels of a resized side; what is left over at its end, less than one, is not looked at."""
    return max(1, math.floor(side * scale + 1e-6))


def read_tile(picture: Windows, tile: Tile, tiling: Tiling) -> np.ndarray:
    """A tile's pixels: uint8 (size, size, 3) RGB. Raises DataError where they cannot be decoded.

    At other scales than 1 by antialiased bilinear interpolation, which sees what lies around the tile: neighbours fit
    together without a seam.
    """
    height, width = picture.size
    wide = min(tiling.size, _scaled(width, tile.scale) - tile.x)
    high = min(tiling.size, _scaled(height, tile.scale) - tile.y)
    whole = np.empty((tiling.size, tiling.size, 3), np.uint8)
    whole[:] = tiling.colour
    whole[:high, :wide] = _resized(picture, tile, wide, high)
    return whole


def _resized(picture: Windows, tile: Tile, wide: int, high: int) -> np.ndarray:
    if tile.scale == 1:
        return picture.read(tile.x, tile.y, wide, high)
    height, width = picture.size
    left, top = tile.x / tile.scale, tile.y / tile.scale
    right, bottom = min((tile.x + wide) / tile.scale, width), min((tile.y + high) / tile.scale, height)
    margin = math.ceil(max(1.0, 1 / tile.scale)) + 1  # the reach of the filter
    x, y = max(0, math.floor(left) - margin), max(0, math.floor(top) - margin)
    x_end, y_end = min(width, math.ceil(right) + margin), min(height, math.ceil(bottom) + margin)
    around = Image.fromarray(picture.read(x, y, x_end - x, y_end - y))
    part = (left - x, top - y, right - x, bottom - y)
    return np.asarray(around.resize((wide, high), Image.Resampling.BILINEAR, box=part))


def write_tiles(picture: Path, tiles: Sequence[Tile], folder: Path, tiling: Tiling) -> DataError | None:
    """Write tiles of a picture as PNG into a folder, under their stems. What is wrong with the picture, or None."""
    try:
        opened = open_windows(picture)
        for tile in tiles:
            path = folder / f"{tile.stem}.png"
            part = path.with_name(path.name + PART)
            Image.fromarray(read_tile(opened, tile, tiling)).save(part, "PNG", compress_level=3)
            os.replace(part, path)
    except DataError as error:
        return error
    return None
