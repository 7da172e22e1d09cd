"""Pictures that are larger than memory should be: read window by window.

Where pyvips is installed (the extra ``dota``) a picture of any size is read in bounded memory: formats that can only be
decoded from the top, like PNG and JPEG, are unpacked once to a temporary file. Pillow decodes the whole picture, which
is quicker for small ones, and refuses those of more than 179 million pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from distillkit.data.problems import DataError, Problem

Size = tuple[int, int]

#: pixels up to which a picture is decoded as a whole, by Pillow
SMALL = 4096 * 4096
#: rows of an overview that are made at a time
STRIP = 64
INSTALL = "install pyvips, which reads it in parts: pip install 'distillkit[dota]'"
COPY = "copy the file again, save it as PNG or TIFF, or take it out"


class Windows(Protocol):
    """An open picture. There is nothing to close."""

    @property
    def size(self) -> Size:
        """(height, width)."""

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The pixels of a window inside the picture: uint8 (height, width, 3) RGB, as the file stores them (an EXIF
        rotation is not applied). Raises DataError where they cannot be decoded."""


def open_windows(path: str | Path) -> Windows:
    """A picture to be read in windows. Raises DataError, with one problem, for a file that is missing, no picture, or
    too large for Pillow where pyvips is not installed."""
    path, vips = Path(path), _pyvips()
    try:
        with _pillow(path) as picture:
            large = picture.width * picture.height > SMALL
    except TooLargeError:
        if vips is None:
            raise
        return _VipsWindows(path, vips)
    if large and vips is not None:
        with suppress(DataError):  # a format that libvips does not know, like BMP
            return _VipsWindows(path, vips)
    with _pillow(path) as picture:
        return _PillowWindows(picture)


def size_of(path: str | Path) -> Size:
    """(height, width) of a picture, from its header. Raises DataError as ``open_windows`` does."""
    try:
        with _pillow(Path(path)) as picture:
            return picture.height, picture.width
    except TooLargeError:
        return open_windows(path).size


def overview(picture: Windows, side: int) -> tuple[np.ndarray, int]:
    """A picture made smaller by a whole factor, so that neither side is above ``side``; read in strips.

    Returns uint8 (height // factor, width // factor, 3) RGB, and the factor, 1 for a picture that is small enough.
    """
    height, width = picture.size
    factor = -(-max(height, width) // side)
    if factor == 1:
        return picture.read(0, 0, width, height), 1
    rows, columns = height // factor, width // factor
    small = np.empty((rows, columns, 3), np.uint8)
    for first in range(0, rows, STRIP):
        strip = small[first : first + STRIP]
        pixels = picture.read(0, first * factor, columns * factor, len(strip) * factor)
        strip[:] = pixels.reshape(len(strip), factor, columns, factor, 3).mean((1, 3), dtype=np.float32).round()
    return small, factor


class TooLargeError(DataError):
    """Pillow refuses the picture."""


class _VipsWindows:
    def __init__(self, path: Path, vips: ModuleType):
        self.path, self.error = path, vips.Error
        with self._named():
            image = vips.Image.new_from_file(str(path), access="random", fail_on="truncated")
            self.image: Any = _as_rgb(image)

    @property
    def size(self) -> Size:
        return self.image.height, self.image.width

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        with self._named():
            return self.image.crop(x, y, width, height).numpy()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """pyvips' errors as ours."""
        try:
            yield
        except self.error as error:
            raise _undecodable(self.path, " ".join(str(error).split())) from error


def _as_rgb(image: Any) -> Any:
    """Three bands of 8 bits, as Pillow's ``convert("RGB")``: alpha is dropped."""
    if image.hasalpha():
        image = image[: image.bands - 1]
    if image.interpretation != "srgb":
        image = image.colourspace("srgb")
    return image if image.format == "uchar" else image.cast("uchar")


class _PillowWindows:
    def __init__(self, picture: Image.Image):
        self.pixels = np.asarray(picture.convert("RGB"))

    @property
    def size(self) -> Size:
        return self.pixels.shape[0], self.pixels.shape[1]

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self.pixels[y : y + height, x : x + width].copy()


@contextmanager
def _pillow(path: Path) -> Iterator[Image.Image]:
    """A picture opened by Pillow, whose errors, also while it is decoded, become ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is what this module is for
            picture = Image.open(path)
        with picture:
            yield picture
    except FileNotFoundError:
        what, remedy = "no such file", "correct the path, or copy the picture there"
        raise DataError([Problem(str(path), None, what, remedy)]) from None
    except Image.DecompressionBombError as error:
        raise TooLargeError([Problem(str(path), None, f"Pillow refuses the picture ({error})", INSTALL)]) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _undecodable(path, str(error)) from error


def _undecodable(path: Path, why: str) -> DataError:
    return DataError([Problem(str(path), None, f"the picture cannot be decoded ({why})", COPY)])


def _pyvips() -> ModuleType | None:
    try:
        import pyvips
    except (ImportError, OSError):  # OSError: pyvips is there, the library that it calls is not
        return None
    return pyvips
