"""Detection data sets that are pictures in files: what their annotation formats share."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distillkit.data.problems import DataError, Findings, Problem, listing
from distillkit.data.transforms import Resize, Sample, Transform, generator_for, sample_of

log = logging.getLogger("distillkit.data")

#: how far, in pixels, a box may reach over the picture's border before it is called a mistake (files round to pixels)
SLACK = 1.0
#: what is done with a box that nothing can be learned from
LEFT_OUT = "it is left out of training, but evaluation counts it as a box that was missed; correct or remove it"

Box = tuple[float, float, float, float]


class Row(NamedTuple):
    """One object of a picture; the fields are those of ``Record``."""

    box: Box
    label: int
    area: float
    crowd: bool
    usable: bool


class Pictured(Protocol):
    """A picture of a data set; what is written about its objects depends on the kind of boxes.

    image_id: its number in the annotations. path: the picture. size: (height, width) as annotated.
    """

    @property
    def image_id(self) -> int: ...

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> tuple[int, int]: ...


R = TypeVar("R", bound=Pictured)


@dataclass(frozen=True)
class Record:
    """One picture and everything written about it: a ``Pictured`` with upright boxes.

    Args:
        boxes: float64 (k, 4) x, y, width, height in pixels, as in COCO, all that were written down.
        labels: int64 (k,), 0..C-1.
        areas: float64 (k,) pixels: of the object's outline where that is known, else of its box.
        crowd: bool (k,) crowds (COCO) and difficult objects (VOC): no target of training; in evaluation, a prediction
            that lies in one counts neither as right nor as wrong.
        usable: bool (k,) False for boxes that nothing can be learned from (no area, outside the picture).
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    usable: np.ndarray


@dataclass(frozen=True)
class Split(Generic[R]):
    """What one annotation file (or list) says, and all that is wrong with what it says. ``check_dataset`` reads it.

    Args:
        file: the annotations, for messages.
        classes: names by label.
        category_ids: the file's own number of each class, by label.
        records: the pictures in the file's order; without those that are named in a fatal problem.
        problems: everything found without opening a picture.
    """

    file: str
    classes: list[str]
    category_ids: list[int]
    records: list[R]
    problems: list[Problem]


class Pictures(Dataset[tuple[Tensor, dict[str, Any]]], ABC, Generic[R]):
    """``dataset[(epoch, index)]`` -> image float32 (3, H, W) in 0..1 and a target dict.

    The target holds boxes in pixels of this image, labels int64 (k,), image_id int and size (H0, W0) of the picture as
    it is on disk; from ``Resize`` also scale (sx, sy), image over original. A sample depends on (seed, epoch, index)
    alone.

    Pictures are opened with Pillow as the file stores its pixels: an EXIF rotation is not applied, as in COCO, whose
    boxes refer to the stored pixels. Pictures without boxes are kept.

    Raises DataError when it is built on annotations that cannot be used, and at reading for a picture that cannot be
    decoded or is not of the annotated size. Boxes that nothing can be learned from are left out of the targets; the log
    "distillkit.data" gets one warning that names them.
    """

    def __init__(self, split: Split[R], transform: Transform | None = None, seed: int = 0):
        fatal = [p for p in split.problems if p.fatal]
        if fatal:
            raise DataError(fatal)
        if split.problems:
            log.warning(listing(split.problems, 3))
        self.classes = split.classes
        self.category_ids = split.category_ids
        self.records = split.records
        self.transform: Transform = transform or Resize()
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = key
        generator = generator_for(self.seed, epoch, index)
        samples = [self.load(i) for i in self.transform.indices(index, len(self), generator)]
        image, target = self.transform(samples, generator)
        record = self.records[index]
        return image, target | {"image_id": record.image_id, "size": record.size}

    @property
    def usable_boxes(self) -> int:
        """How many boxes can be learned, and found."""
        return sum(int(self.taught(record).sum()) for record in self.records)

    def load(self, index: int) -> Sample:
        """Picture ``index`` as it is on disk, with the boxes to be learned."""
        record = self.records[index]
        image = torch.from_numpy(read_picture(record)).permute(2, 0, 1).contiguous()
        boxes, labels = self.targets(record, self.taught(record))
        return sample_of(image, boxes, labels)

    @abstractmethod
    def taught(self, record: R) -> np.ndarray:
        """bool (k,): which objects of a picture are to be learned."""

    @abstractmethod
    def targets(self, record: R, taught: np.ndarray) -> tuple[Tensor, Tensor]:
        """Boxes and labels of these objects, as ``sample_of`` takes them."""


class PictureDetection(Pictures[Record]):
    """Upright boxes: items as ``Pictures`` says, with boxes float32 (k, 4) x1, y1, x2, y2. Crowds and broken boxes are
    not taught."""

    def taught(self, record: Record) -> np.ndarray:
        return record.usable & ~record.crowd

    def targets(self, record: Record, taught: np.ndarray) -> tuple[Tensor, Tensor]:
        corners = record.boxes[taught]
        corners = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
        return torch.from_numpy(corners.astype(np.float32)), torch.from_numpy(record.labels[taught])

    def to_coco_json(self) -> dict[str, Any]:
        """The ground truth as a COCO dict (images, annotations, categories), every box of the annotations included."""
        return coco_json(self.classes, self.category_ids, self.records)


def coco_json(classes: list[str], category_ids: list[int], records: Iterable[Record]) -> dict[str, Any]:
    """A COCO ground-truth dict of records. Annotations are numbered from 1: the evaluator takes 0 for "no match"."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records:
        height, width = record.size
        images.append({"id": record.image_id, "file_name": record.path.name, "height": height, "width": width})
        for box, label, area, crowd in zip(record.boxes, record.labels, record.areas, record.crowd, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": category_ids[label],
                    "bbox": box.tolist(),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": i, "name": name} for i, name in zip(category_ids, classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_picture(record: Pictured) -> np.ndarray:
    """The picture of a record, uint8 (H, W, 3) RGB. Raises DataError, with one problem, where it cannot be used."""
    problem = f"image {record.image_id}"
    try:
        with Image.open(record.path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError([missing_picture(record.path, record.image_id)]) from None
    except Image.DecompressionBombError as error:
        what, remedy = f"the picture is too large to be read whole ({error})", "cut it into tiles (distillkit tile)"
        raise DataError([Problem(str(record.path), problem, what, remedy)]) from error
    except (OSError, SyntaxError, ValueError) as error:
        what = f"the picture cannot be decoded ({error})"
        raise DataError([Problem(str(record.path), problem, what, "copy the file again or take it out")]) from error
    check_size(record, pixels.shape[:2])
    return pixels


def check_size(record: Pictured, size: tuple[int, ...]) -> None:
    """Raises DataError, with one problem, where a picture is not of the annotated size."""
    if size != record.size:
        height, width = size
        what = f"the picture is {width} x {height} pixels, the annotations say {record.size[1]} x {record.size[0]}"
        remedy = "correct width and height (EXIF rotation is not applied), or the boxes are not where they should be"
        raise DataError([Problem(str(record.path), f"image {record.image_id}", what, remedy)])


def missing_picture(path: Path, image_id: int) -> Problem:
    return Problem(str(path), f"image {image_id}", "no such file", "copy it there, or take it out of the annotations")


def existing(paths: Iterable[Path]) -> Iterator[bool]:
    """Whether each path is there, by one listing of each folder instead of one question a file."""
    folders: dict[Path, set[str]] = {}
    for path in paths:
        if path.parent not in folders:
            folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        yield path.name in folders[path.parent]


def examine(box: Box, size: tuple[int, int], id: str, findings: Findings) -> bool | None:
    """Whether something can be learned from a box x, y, width, height in a picture (height, width); None for a box that
    is no box at all. What is wrong with it goes to ``findings``."""
    x, y, w, h = box
    height, width = size
    shown = "box (x, y, width, height) = [" + ", ".join(f"{v:g}" for v in box) + "]"
    if not np.isfinite(box).all():
        findings.add(id, f"{shown} is not finite", "write four finite numbers x, y, width, height")
        return None
    if w <= 0 or h <= 0:
        findings.add(id, f"{shown} has no area", LEFT_OUT, fatal=False)
        return False
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        what = f"{shown} lies outside the picture of {width} x {height}"
        findings.add(id, what, LEFT_OUT, fatal=False)
        return False
    if x < -SLACK or y < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
        what = f"{shown} reaches outside the picture of {width} x {height}"
        findings.add(id, what, "it is cut at the border in training; correct it if that is not meant", fatal=False)
    return True


def record_of(image_id: int, path: Path, size: tuple[int, int], rows: list[Row]) -> Record:
    return Record(
        image_id=image_id,
        path=path,
        size=size,
        boxes=np.array([r.box for r in rows], np.float64).reshape(-1, 4),
        labels=np.array([r.label for r in rows], np.int64),
        areas=np.array([r.area for r in rows], np.float64),
        crowd=np.array([r.crowd for r in rows], bool),
        usable=np.array([r.usable for r in rows], bool),
    )
