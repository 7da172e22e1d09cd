"""Pictures, masks and saliency maps as files: where those of a list are, and what is stored in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from distillkit.data.detection import existing
from distillkit.data.picture_list import PICTURES, stays_inside
from distillkit.data.problems import Findings, Problem
from distillkit.data.voc import stems_of

#: how many wrong values of a mask, and names, a message shows
SHOWN = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One picture of a set, called ``key`` there, and the files that belong to it; None where there is none."""

    key: str
    image: Path
    mask: Path | None = None
    saliency: Path | None = None


@dataclass(frozen=True)
class LabelTable:
    """What the values in mask files stand for.

    Args:
        labels: the label of each value.
        expected: what values there may be, for messages.
        remedy: what to do about others.
        others: the label of all other values; None: they are an error.
    """

    labels: Mapping[int, int]
    expected: str
    remedy: str
    others: int | None = None

    def read(self, values: np.ndarray, findings: Findings) -> np.ndarray:
        """uint8 (H, W) labels of the values, uint8 or uint16 (H, W), in a file. Those that are none go to
        ``findings``."""
        counts = np.bincount(values.ravel())
        there = np.flatnonzero(counts).tolist()
        wrong = [(value, int(counts[value])) for value in there if value not in self.labels]
        if wrong and self.others is None:
            shown = ", ".join(f"{value} ({count} pixels)" for value, count in wrong[:SHOWN])
            more = f" and {len(wrong) - SHOWN} more values" if len(wrong) > SHOWN else ""
            findings.add("mask", f"{shown}{more}: no label, expected {self.expected}", self.remedy)
        label_of = np.zeros(len(counts), np.uint8)
        label_of[there] = [self.labels.get(value, self.others or 0) for value in there]
        return label_of[values]


def listed(path: Path, folder: str, findings: Findings) -> list[str]:
    """The names in a list in ``folder``: one a line, without ending."""
    names = stems_of(path, folder, findings)
    for name in names:
        if not stays_inside(name):
            what = "the name leads out of the folder, or holds a backslash or a control character"
            findings.add(f"image {name!r}", what, "write the names of pictures alone, one a line, without ending")
    return [name for name in names if stays_inside(name)]


def find(
    folder: Path, names: Sequence[str], endings: Sequence[str], source: str, problems: list[Problem]
) -> dict[str, Path]:
    """The file of each name in a folder: with the first of the endings that is there. Names without a file, and a
    folder that is not there, go to ``problems``. source: what lists the names."""
    if not folder.is_dir():
        problems.append(Problem(str(folder), None, "no such folder", "correct the path; it is looked for below root"))
        return {}
    candidates = [(name, folder / f"{name}{ending}") for name in names for ending in endings]
    there: dict[str, Path] = {}
    for (name, path), exists in zip(candidates, existing(path for _, path in candidates)):
        if exists:
            there.setdefault(name, path)
    for name in names:
        if name not in there:
            what = "no such file" if len(endings) == 1 else f"no such file, nor with {', '.join(endings[1:])}"
            remedy = f"copy it there, or take the name out of {source}"
            problems.append(Problem(str(folder / f"{name}{endings[0]}"), f"image {name}", what, remedy))
    return there


def find_pictures(folder: Path, names: Sequence[str], source: str, problems: list[Problem]) -> dict[str, Path]:
    return find(folder, names, PICTURES, source, problems)


def read_picture(path: Path, problems: list[Problem]) -> np.ndarray | None:
    """uint8 (H, W, 3) RGB as the file stores it (an EXIF rotation is not applied), or None and a problem."""
    return _opened(path, "picture", lambda picture: np.array(picture.convert("RGB")), problems)


def read_values(path: Path, what: str, problems: list[Problem]) -> np.ndarray | None:
    """The integers (H, W) that a palette or grey PNG stores, or (H, W, 3) of a coloured one; None and a problem where
    it cannot be read. what: "mask" or "saliency map", for messages."""
    return _opened(path, what, _stored, problems)


def one_channel(values: np.ndarray | None, path: Path, what: str, remedy: str, problems: list[Problem]) -> bool:
    """Whether there are values of one channel; a problem where there are three."""
    if values is not None and values.ndim != 2:
        said = "it is a colour picture, expected one channel (a palette or grey PNG)"
        problems.append(Problem(str(path), what, said, remedy))
    return values is not None and values.ndim == 2


def check_same_size(
    picture: np.ndarray, other: np.ndarray, path: Path, what: str, image: Path, problems: list[Problem]
) -> None:
    if picture.shape[:2] != other.shape[:2]:
        (height, width), (high, wide) = picture.shape[:2], other.shape[:2]
        said = f"the {what} is {wide} x {high} pixels, its picture {image} is {width} x {height}"
        remedy = f"make the {what} of this picture again, at its size (an EXIF rotation of the picture is not applied)"
        problems.append(Problem(str(path), what, said, remedy))


def files_in(folder: Path, endings: Iterable[str]) -> list[str]:
    """Names of the files with one of these endings in a folder, sorted, those that begin with a dot left out."""
    wanted = tuple(endings)
    names = (path.name for path in folder.iterdir() if path.name.lower().endswith(wanted))
    return sorted(name for name in names if not name.startswith("."))


def _opened(path: Path, what: str, read: Callable[[Image.Image], T], problems: list[Problem]) -> T | None:
    try:
        with Image.open(path) as picture:
            return read(picture)
    except FileNotFoundError:
        said, remedy = "no such file", "copy it there again: it was there when the set was built"
    except Image.DecompressionBombError as error:
        said, remedy = f"the {what} is too large to be read whole ({error})", "make it smaller or take it out"
    except (OSError, SyntaxError, ValueError) as error:
        said, remedy = f"the {what} cannot be decoded ({error})", "copy the file again or take it out of the list"
    problems.append(Problem(str(path), what, said, remedy))
    return None


def _stored(picture: Image.Image) -> np.ndarray:
    """Pillow stretches grey levels of 2 and 4 bits to 0..255, which makes other labels of them: taken back here."""
    if picture.mode in ("RGB", "RGBA"):
        return np.array(picture.convert("RGB"))
    if picture.mode not in ("P", "L", "1") and not picture.mode.startswith("I"):
        raise ValueError(f"its pixels are {picture.mode}, expected a palette or grey levels")
    tiles = getattr(picture, "tile", None)  # how Pillow is about to read the pixels
    stretched = {"L;2": 85, "L;4": 17}.get(tiles[0][3], 1) if tiles else 1
    values = np.array(picture)
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"its values are {values.min()}..{values.max()}, expected at most 16 bits")
    return (values // stretched).astype(np.uint16) if values.itemsize > 1 else values.astype(np.uint8) // stretched
