"""Pictures in a folder, or in tar files as webdataset has them: their names, and each of them when it is asked for."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from distillkit.data.problems import DataError, Problem

#: file endings of pictures, in folders and in tar files
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class PictureList:
    """Pictures in a folder or in tar files, sorted by key: the path in the folder, or the member's name, with slashes.

    Args:
        sources: the one folder, or the tar files.
        sizes: bytes of each picture's file.
        places: of each picture in tar files, which of the sources and where in it; empty for a folder.
    """

    sources: list[Path]
    keys: list[str]
    sizes: list[int]
    places: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sha256(self) -> str:
        """Of all keys and sizes, in order. It sees pictures that come, go or change their size, at the price of one
        listing; not pixels that change in a file of the same length."""
        digest = hashlib.sha256()
        for key, size in zip(self.keys, self.sizes, strict=True):
            digest.update(f"{key}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def where(self, index: int) -> str:
        """The file of a picture, for messages."""
        if not self.places:
            return str(self.sources[0] / self.keys[index])
        return f"{self.sources[self.places[index][0]]}: {self.keys[index]}"

    def read(self, index: int) -> Image.Image:
        """A picture as RGB, as the file stores its pixels. Raises DataError, with one problem, if that cannot be."""
        try:
            with Image.open(BytesIO(self._content(index))) as picture:
                return picture.convert("RGB")
        except Image.DecompressionBombError as error:
            what, remedy = f"the picture is too large to be read whole ({error})", "make it smaller or take it out"
        except (OSError, SyntaxError, ValueError) as error:
            what, remedy = f"the picture cannot be decoded ({error})", "copy the file again, take it out or skip it"
        raise DataError([Problem(self.where(index), None, what, remedy)])

    def _content(self, index: int) -> bytes:
        if not self.places:
            return (self.sources[0] / self.keys[index]).read_bytes()
        source, offset = self.places[index]
        with self.sources[source].open("rb") as file:
            file.seek(offset)
            return file.read(self.sizes[index])


class _Picture(NamedTuple):
    """key, bytes, and where it is: the number of the tar file and the place in it, or (0, 0) for a file of its own."""

    key: str
    size: int
    place: tuple[int, int] = (0, 0)


def list_pictures(images: str | Path | Sequence[str | Path]) -> PictureList:
    """All pictures in a folder and the folders in it, or in uncompressed tar files, as webdataset has them.

    Files are not opened, members of tar files not unpacked. Names that begin with a dot are left out. Tar files may be
    named as webdataset does, see ``expanded``.

    Raises:
        DataError: names everything that is wrong: no pictures, empty files, names that lead out of the folder, members
            that are links, two of one name, tar files that are compressed or broken off.
    """
    given = [images] if isinstance(images, str | Path) else images
    paths = [Path(name) for path in given for name in ([path] if Path(path).exists() else expanded(str(path)))]
    problems: list[Problem] = []
    tars = len(paths) > 1 or (len(paths) == 1 and paths[0].is_file())
    found: list[_Picture] = []
    for number, path in enumerate(paths):
        found += _in_tar(path, number, problems) if tars else _in_folder(path, problems)
    found.sort()
    problems += _wrong_names(found, paths)
    if not found and not problems:
        tarred = not tars and any(paths[0].glob("*.tar"))
        remedy = "name the tar files themselves: they are there" if tarred else "correct the path"
        what = f"no picture in it (looked for {', '.join(PICTURES)})"
        problems.append(Problem(", ".join(map(str, paths)) or "images", None, what, remedy))
    if problems:
        raise DataError(problems)
    places = [picture.place for picture in found] if tars else []
    return PictureList(paths, [picture.key for picture in found], [picture.size for picture in found], places)


def expanded(pattern: str) -> list[str]:
    """Names with ranges of numbers in braces, written out: "train-{0008..0010}.tar" is train-0008.tar, train-0009.tar
    and train-0010.tar. Numbers are as wide as the wider one of the range where that begins with a zero."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    width = max(len(first), len(last)) if any(re.match(r"0\d", end) for end in (first, last)) else 0
    numbers = sorted((int(first), int(last)))
    before, rests = pattern[: found.start()], expanded(pattern[found.end() :])
    return [f"{before}{number:0{width}d}{rest}" for number in range(numbers[0], numbers[1] + 1) for rest in rests]


def _in_folder(root: Path, problems: list[Problem], prefix: str = "", above: tuple[Path, ...] = ()) -> list[_Picture]:
    """above: the folders that lead here, as links may lead in a circle."""
    if not root.is_dir():
        problems.append(Problem(str(root), None, "no such folder", "name a folder of pictures, or tar files"))
        return []
    here, found = (root / prefix).resolve(), []
    if here in above:
        return []
    with os.scandir(here) as entries:
        for entry in entries:
            key = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _in_folder(root, problems, f"{key}/", (*above, here))
            elif _is_picture(key) and entry.is_file():
                found.append(_Picture(key, entry.stat().st_size))
            elif _is_picture(key):
                problems.append(Problem(str(root / key), None, "no file, or a link to none", "correct or delete it"))
    return found


def _in_tar(path: Path, number: int, problems: list[Problem]) -> Iterator[_Picture]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = member.name.removeprefix("./")
                if member.isdir() or not _is_picture(key) or key.rpartition("/")[2].startswith("."):
                    continue
                if not member.isreg() or member.issparse():
                    what = "the member is a link or no plain file"
                    problems.append(Problem(str(path), key, what, "pack the picture itself (tar --dereference)"))
                    continue
                yield _Picture(key, member.size, (number, member.offset_data))
    except (tarfile.TarError, OSError) as error:
        remedy = "name a folder of pictures, or whole tar files that are not compressed"
        problems.append(Problem(str(path), None, f"not a readable tar file ({error})", remedy))


def _wrong_names(found: list[_Picture], sources: list[Path]) -> Iterator[Problem]:
    """Of sorted pictures."""
    for picture in found:
        source = str(sources[picture.place[0]])
        if not stays_inside(picture.key):
            what = "the name leads out of the folder, or holds a backslash or a control character"
            yield Problem(source, repr(picture.key), what, "rename it")
        elif picture.size == 0:
            yield Problem(source, picture.key, "the file is empty", "copy it again or take it out")
    repeats = [(one, other) for one, other in pairwise(found) if one.key == other.key]
    if repeats:
        one, other = repeats[0]
        what, remedy = f"a picture of this name is in {sources[one.place[0]]}, too", "rename one of them"
        if len(repeats) > 1:
            what += f" (and {len(repeats) - 1} more such names)"
            remedy = (
                "name each tar file once; where numbers start again in each, count on through all of them, or put the "
                f"tar file's name in front, as in 0001/{other.key}"
            )
        yield Problem(str(sources[other.place[0]]), other.key, what, remedy)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def stays_inside(key: str) -> bool:
    return not any(part in ("", ".", "..") for part in key.split("/")) and not re.search(r"[\\\x00-\x1f]", key)
