"""DOTA's submission files: one text file a class, written from predictions and read back.

Task1 (oriented boxes), ``Task1_{class}.txt``: lines ``picture score x1 y1 x2 y2 x3 y3 x4 y4``. Task2 (horizontal),
``Task2_{class}.txt``: lines ``picture score xmin ymin xmax ymax``. Pixels of the original picture; the picture is named
without its ending. A class without detections has an empty file. (captain-whu.github.io/DOTA/evaluation.html)
"""

from __future__ import annotations

import io
import math
import os
import shutil
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from distillkit.boxes.rotated import corners, from_corners, upright
from distillkit.evaluation.rotated import to_original

Task = Literal["Task1", "Task2"]
COORDINATES: dict[str, int] = {"Task1": 8, "Task2": 4}
ARCHIVE = "submission.zip"

#: a submission beyond these is refused before it is read
MOST_BYTES = 1 << 30
MOST_FILES = 10_000
LONGEST = 4096  # bytes of a line
#: no picture is as wide; larger coordinates are mistakes that would spoil the arithmetic of areas
FARTHEST = 1e7


class SubmissionError(ValueError):
    """A submission that cannot be written or read; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Submission:
    """What submission files hold.

    task: "Task1" or "Task2".
    predictions: what ``rotated_metrics`` takes, one a picture, in the order of the names given to ``read_submission``:
        image_id, boxes float64 (k, 5) (Task2: angle 0), scores float64 (k,) falling, labels (k,), scale (1, 1).
    """

    task: Task
    predictions: list[dict[str, Any]]


def write_submission(
    folder: str | Path,
    predictions: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    classes: Sequence[str],
    task: Task = "Task1",
) -> Path:
    """Write the files of a task, and ``submission.zip`` with all of them.

    Args:
        folder: is made, or replaced as a whole if it holds an earlier submission. It is the old one or the new one,
            never a mixture, whatever happens meanwhile.
        predictions: as for ``rotated_metrics``.
        names: of the pictures, without ending, by image_id.
        classes: names by label.
        task: "Task1": the four corners; "Task2": the upright box around them.

    Returns the path of the archive.

    Raises SubmissionError for a folder with other files in it, a picture without a name, names that the format cannot
    hold (white space in a picture's, path separators in a class's), and labels that are no class.
    """
    folder = Path(folder).absolute()
    check_names(names, classes)
    _check_replaceable(folder)
    with _replaced(folder) as part:
        paths = [part / f"{task}_{name}.txt" for name in classes]
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in paths]
            for prediction in predictions:
                _write_picture(files, prediction, names, classes, task)
        with zipfile.ZipFile(part / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, path.name)
    return folder / ARCHIVE


def check_names(names: Mapping[int, str], classes: Sequence[str]) -> None:
    """Raises SubmissionError for names that the format cannot hold, see ``write_submission``."""
    for name in classes:
        if not name or name != Path(name).name or "\\" in name or name in (".", ".."):
            raise SubmissionError(f"class {name!r} cannot be part of a file's name; name it otherwise")
    for id, name in names.items():
        if not name or len(name.split()) != 1 or name.strip() != name:
            raise SubmissionError(
                f"image {id}: its name {name!r} is empty or has white space, which divides the fields"
            )


def check_writable(folder: Path, names: Mapping[int, str], classes: Sequence[str]) -> None:
    """Raises SubmissionError where ``write_submission`` would, whatever the predictions are."""
    check_names(names, classes)
    _check_replaceable(folder)


def read_submission(path: str | Path, names: Mapping[int, str], classes: Sequence[str]) -> Submission:
    """Read a submission from a folder or a zip archive. Nothing is unpacked to the disk.

    Args:
        names: of all pictures, without ending, by image_id.
        classes: names by label; each must have its file, and there must be no other.

    Four corners become the smallest rectangle around them (``from_corners``), as in labels.

    Raises SubmissionError, naming file and line: nothing there, no archive, files in it that lead elsewhere or are no
    part of a submission, files of both tasks, a class without file, unknown pictures, lines of another number of
    fields, values that are no finite numbers, a right side left of the left one.
    """
    path = Path(path)
    numbers = {name: place for place, name in enumerate(names.values())}
    if len(numbers) < len(names):
        raise SubmissionError("two pictures have one name; a submission cannot tell them apart")
    columns = Columns(array("q"), array("q"), array("d"), array("d"))
    with _opened(path) as (listed, open_file):
        task, files = _files(path, listed, classes)
        for label, file in enumerate(files):
            with _stream(open_file, file, _shown(path, file)) as stream:
                _read_class(stream, _shown(path, file), label, COORDINATES[task], numbers, columns)
    return Submission(task, _predictions(columns, list(names), task))


def horizontal(truth: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The truth of a data set for Task2: the upright boxes around the four points that were annotated (``quads``)."""
    around = [torch.cat([quads.amin(1), quads.amax(1)], 1) for quads in (picture["quads"] for picture in truth)]
    return [{**picture, "boxes": _level(boxes)} for picture, boxes in zip(truth, around, strict=True)]


def _write_picture(
    files: Sequence[IO[str]],
    prediction: Mapping[str, Any],
    names: Mapping[int, str],
    classes: Sequence[str],
    task: Task,
) -> None:
    """One picture's lines, in the order of its prediction."""
    id = prediction["image_id"]
    name = names.get(id)
    if name is None:
        raise SubmissionError(f"image {id} is predicted, but has no name; give the names of all pictures")
    scale = torch.tensor(prediction["scale"], dtype=torch.float64)
    boxes = to_original(prediction["boxes"].detach().cpu(), scale)
    values = corners(boxes).reshape(-1, 8) if task == "Task1" else upright(boxes)
    scores, labels = prediction["scores"].tolist(), prediction["labels"].tolist()
    for score, label, row in zip(scores, labels, values.tolist(), strict=True):
        if not 0 <= label < len(classes):
            raise SubmissionError(f"image {id}: predicted label {label}, there are {len(classes)} classes")
        # 9 digits hold a float32 exactly: equal scores stay equal, others different
        files[label].write(f"{name} {score:.9g} {' '.join(f'{v:.4f}' for v in row)}\n")


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SubmissionError(f"{folder} is a file; name a folder")
    strange = [p.name for p in folder.iterdir() if not _is_ours(p.name)] if folder.is_dir() else []
    if strange:
        raise SubmissionError(f"{folder} holds {strange[0]!r}, which is no part of a submission; name another folder")


def _is_ours(name: str) -> bool:
    return name == ARCHIVE or (name.startswith(("Task1_", "Task2_")) and name.endswith(".txt"))


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of ``folder`` when all went well, and is removed when not."""
    part, old = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "old"))
    _put_back(old, folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in part.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        _put_back(old, folder)
        shutil.rmtree(part, ignore_errors=True)


def _put_back(old: Path, folder: Path) -> None:
    """Undo a replacement that stopped half-way; or clear away what a finished one replaced."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class Columns:
    """Detections as they are read, packed: place of the picture, label, score, and the coordinates in a row."""

    picture: array
    label: array
    score: array
    coordinates: array


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, int], Callable[[str], IO[bytes]]]]:
    """The files there, by name with their size, and a function that opens one for reading bytes."""
    if path.is_dir():
        sizes = {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.name != ARCHIVE}
        yield sizes, lambda name: (path / name).open("rb")
        return
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise SubmissionError(f"{path}: no such folder or archive") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise SubmissionError(f"{path}: expected a folder or a zip archive ({error})") from error
    with archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        sizes = {m.filename: m.file_size for m in members}
        if len(sizes) < len(members):
            raise SubmissionError(f"{path}: two files in it have one name; make the archive again")
        yield sizes, archive.open


def _stream(open_file: Callable[[str], IO[bytes]], name: str, shown: str) -> IO[bytes]:
    try:
        return open_file(name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        # damaged, of an unknown compression, encrypted, no right to read
        raise SubmissionError(f"{shown}: cannot be read ({error}); write it again") from error


def _files(path: Path, sizes: Mapping[str, int], classes: Sequence[str]) -> tuple[Task, list[str]]:
    """The task, and each class's file; everything else there is an error."""
    if len(sizes) > MOST_FILES or sum(sizes.values()) > MOST_BYTES:
        raise SubmissionError(
            f"{path}: {len(sizes)} files of {sum(sizes.values())} bytes; a submission has at most {MOST_FILES} files "
            f"of {MOST_BYTES} bytes together"
        )
    for task in COORDINATES:
        expected = [f"{task}_{name}.txt" for name in classes]
        if not any(name in sizes for name in expected):
            continue
        missing = [name for name in expected if name not in sizes]
        if missing:
            raise SubmissionError(
                f"{_shown(path, missing[0])} is missing; a class without detections has an empty file"
            )
        strange = [name for name in sizes if name not in expected]
        if strange:
            raise SubmissionError(
                f"{_shown(path, strange[0])} is no part of {task} with the classes {', '.join(classes)}; remove it, or "
                "name the classes it was made for"
            )
        return task, expected  # type: ignore[return-value]
    found = f"found {next(iter(sizes))!r}" if sizes else "it is empty"
    raise SubmissionError(f"{path}: expected Task1_{classes[0]}.txt or Task2_{classes[0]}.txt; {found}")


def _shown(path: Path, name: str) -> str:
    return f"{path / name}" if path.is_dir() else f"{path}: {name}"


def _read_class(
    stream: IO[bytes], file: str, label: int, coordinates: int, numbers: Mapping[str, int], columns: Columns
) -> None:
    for number, line in enumerate(_lines(stream, file), 1):
        where = f"{file}, line {number}"
        if len(line) == LONGEST:
            raise SubmissionError(f"{where}: longer than {LONGEST} bytes; write one detection a line")
        try:
            fields = line.decode("utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise SubmissionError(f"{where}: not text in UTF-8 ({error})") from error
        if fields:
            place, score, row = _parsed(fields, where, coordinates, numbers)
            columns.picture.append(place)
            columns.label.append(label)
            columns.score.append(score)
            columns.coordinates.extend(row)


def _lines(stream: IO[bytes], file: str) -> Iterator[bytes]:
    """Lines, or the first ``LONGEST`` bytes of those that are longer."""
    buffered = io.BufferedReader(stream)  # type: ignore[type-var]  # an archive's own readline stops early
    try:
        while line := buffered.readline(LONGEST):
            yield line
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise SubmissionError(f"{file}: cannot be read ({error}); write it again") from error


def _parsed(
    fields: Sequence[str], where: str, coordinates: int, numbers: Mapping[str, int]
) -> tuple[int, float, list[float]]:
    if len(fields) != coordinates + 2:
        raise SubmissionError(
            f"{where}: {len(fields)} fields; expected {coordinates + 2}: picture, score, {coordinates} coordinates"
        )
    if fields[0] not in numbers:
        raise SubmissionError(f"{where}: picture {fields[0]!r} is unknown; write its name without the ending")
    score, *row = (_number(field, where) for field in fields[1:])
    if max(map(abs, row)) > FARTHEST:
        raise SubmissionError(f"{where}: a coordinate is {max(row, key=abs):g}; expected pixels of the picture")
    if coordinates == 4 and (row[2] < row[0] or row[3] < row[1]):
        raise SubmissionError(f"{where}: box {row}; expected xmin <= xmax and ymin <= ymax")
    return numbers[fields[0]], score, row


def _number(field: str, where: str) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SubmissionError(f"{where}: {field!r} is not a finite number")
    return value


def _predictions(columns: Columns, ids: Sequence[int], task: Task) -> list[dict[str, Any]]:
    """One prediction a picture, detections by falling score, of equal ones the first read first."""
    picture, label = _tensor(columns.picture, torch.int64), _tensor(columns.label, torch.int64)
    score, values = _tensor(columns.score, torch.float64), _tensor(columns.coordinates, torch.float64)
    boxes = from_corners(values.reshape(-1, 4, 2)) if task == "Task1" else _level(values.reshape(-1, 4))
    order = score.argsort(descending=True, stable=True)
    order = order[picture[order].argsort(stable=True)]
    counts = torch.bincount(picture, minlength=len(ids)).tolist()
    parts: Iterable[tuple[Tensor, ...]] = zip(*(column[order].split(counts) for column in (boxes, score, label)))
    return [
        {"image_id": id, "boxes": boxes, "scores": scores, "labels": labels, "scale": (1.0, 1.0)}
        for id, (boxes, scores, labels) in zip(ids, parts, strict=True)
    ]


def _tensor(column: array, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(column, dtype=dtype).clone() if column else torch.zeros(0, dtype=dtype)


def _level(boxes: Tensor) -> Tensor:
    """x1, y1, x2, y2 as rotated boxes of angle 0: (k, 4) -> (k, 5)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, torch.zeros_like(x1)], 1)
