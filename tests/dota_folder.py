"""A folder in DOTA's own layout and with DOTA's classes, made of HIT-UAV's small pictures; one of them stitched, 8000
pixels wide and high."""

from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

#: what vehicles of HIT-UAV are called in DOTA; its other classes have no counterpart and are left out
NAMES = {"car": "small-vehicle", "other-vehicle": "large-vehicle"}
SIDE = 8000


class Window(NamedTuple):
    """A picture of HIT-UAV: its pixels (h, w, 3), and per object eight coordinates, class and difficult flag."""

    pixels: np.ndarray
    objects: list[tuple[np.ndarray, str, str]]


def make_dota(hit_uav: Path, root: Path, busy: int = 4) -> Path:
    """train: two pictures of HIT-UAV and one stitched of 8000 x 8000; val: one of 1500 x 1200, stitched as well.

    Args:
        busy: how many rows of the large picture have cars; in the others are pictures whose objects are not annotated,
            so that a training that leaves out empty tiles is short.
    """
    train, val = read(hit_uav / "train"), read(hit_uav / "val")
    for number, window in enumerate(train[:2]):
        write(root / "train", f"P{number:04}", window)
    write(root / "train", "P8000", stitched(train, SIDE, SIDE, busy))
    write(root / "val", "P0100", stitched(val, 1200, 1500, busy=4))
    return root


def read(split: Path) -> list[Window]:
    windows = []
    for path in sorted((split / "images").glob("*.jpg")):
        lines = (split / "labelTxt" / f"{path.stem}.txt").read_text().splitlines()
        rows = [words for line in lines if len(words := line.split()) == 10 and words[8] in NAMES]
        objects = [(np.array(row[:8], float).reshape(4, 2), NAMES[row[8]], row[9]) for row in rows]
        windows.append(Window(np.array(Image.open(path).convert("RGB")), objects))
    return windows


def stitched(windows: list[Window], height: int, width: int, busy: int) -> Window:
    """Windows side by side and below each other, over and over; of those that the border cuts nothing is annotated."""
    side = windows[0].pixels.shape[0]
    pixels = np.zeros((height, width, 3), np.uint8)
    objects, which = [], count()
    for row, y in enumerate(range(0, height, side)):
        for x in range(0, width, side):
            window = windows[next(which) % len(windows)]
            there = pixels[y : y + side, x : x + side]
            there[:] = window.pixels[: there.shape[0], : there.shape[1]]
            corner = np.array([x, y])
            if row < busy and x + side <= width and y + side <= height:
                objects += [(quad + corner, name, difficult) for quad, name, difficult in window.objects]
    return Window(pixels, objects)


def write(split: Path, name: str, window: Window) -> None:
    for folder in ("images", "labelTxt"):
        (split / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(window.pixels).save(split / "images" / f"{name}.png", compress_level=1)
    lines = ["imagesource:HIT-UAV", "gsd:null"]
    for quad, label, difficult in window.objects:
        lines.append(" ".join(f"{value:.1f}" for value in quad.flatten()) + f" {label} {difficult}")
    (split / "labelTxt" / f"{name}.txt").write_text("\n".join(lines) + "\n")
