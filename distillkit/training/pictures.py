"""Pictures that a command line names: their files, and what is written of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from distillkit.data.large import size_of
from distillkit.data.problems import DataError
from distillkit.training.errors import RunError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def named_pictures(images: Sequence[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Each picture and the file it is drawn to.

    Raises RunError where there is none, or two would be drawn to one file.
    """
    paths = [p for path in images for p in (_inside(path) if path.is_dir() else [path])]
    if not paths:
        raise RunError(f"no picture in {', '.join(map(str, images))} (looked for {', '.join(SUFFIXES)})")
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise RunError(f"{path} and {other} would both be drawn to {path.stem}.png: rename one, or call twice")
    return [(path, folder / f"{path.stem}.png") for path in paths]


def check_headers(paths: Iterable[Path]) -> None:
    """Raises RunError with all files that are no pictures, before hours are spent on the others."""
    broken = []
    for path in paths:
        try:
            size_of(path)
        except DataError as error:
            broken += error.problems
    if broken:
        raise RunError(str(DataError(broken)))


def read_picture(path: Path) -> Image.Image:
    """In RGB. Raises RunError where it cannot be decoded."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"{path}: cannot be read as a picture ({error})") from error


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
