"""Detection data with rotated boxes: what its annotation formats share. Objects are four points until the last step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distillkit.boxes.rotated import from_corners
from distillkit.data.detection import LEFT_OUT, Pictures, Split
from distillkit.data.problems import Findings
from distillkit.data.quads import area, crossing, part_inside
from distillkit.data.transforms import Transform

#: least area of an object, in square pixels: below, four points are taken to lie on a line
FLAT = 1e-6


class QuadRow(NamedTuple):
    """One object of a picture.

    id: its place in the file ("line 3"), for messages. quad: x1, y1, ..., x4, y4 in pixels, in order around the object.
    """

    id: str
    quad: tuple[float, ...]
    label: int
    difficult: bool


@dataclass(frozen=True)
class RotatedRecord:
    """One picture and everything written about it: a ``Pictured`` with boxes of four points.

    Args:
        image_id: its number in the data set.
        path: the picture.
        size: (height, width).
        quads: float64 (k, 4, 2) x, y in pixels as annotated, in order around each object, from any corner, either way.
        labels: int64 (k,), 0..C-1.
        difficult: bool (k,) objects that evaluation does not ask for.
        usable: bool (k,) False for objects that nothing can be learned from (no area, crossing sides, outside the
            picture).
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    quads: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    usable: np.ndarray


RotatedSplit = Split[RotatedRecord]


class RotatedDetection(Pictures[RotatedRecord]):
    """Rotated boxes: items as ``Pictures`` says, with boxes float32 (k, 5).

    A box is cx, cy, w, h in pixels and an angle in radians, clockwise in the picture, in no particular range: the
    smallest rectangle around the four points of the object.

    Args:
        split: the annotations.
        transform: ``Resize`` (evaluation), ``Augment`` (training) or the like; None: pictures as they are.
        seed: of the augmentation.
        teach_difficult: difficult objects are learned like the others, as in the published DOTA training; otherwise
            they are left out of the targets.
        skip_empty: pictures without an object to be learned are left out, as in the published DOTA training.
    """

    def __init__(
        self,
        split: RotatedSplit,
        transform: Transform | None = None,
        seed: int = 0,
        teach_difficult: bool = False,
        skip_empty: bool = False,
    ):
        super().__init__(split, transform, seed)
        self.teach_difficult = teach_difficult
        if skip_empty:
            self.records = [record for record in self.records if self.taught(record).any()]

    def taught(self, record: RotatedRecord) -> np.ndarray:
        return record.usable if self.teach_difficult else record.usable & ~record.difficult

    def targets(self, record: RotatedRecord, taught: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(record.quads[taught]), torch.from_numpy(record.labels[taught])

    def truth(self) -> list[dict[str, Any]]:
        """What evaluation compares with, one dict a picture, in order, every object of the annotations included.

        image_id int, boxes float64 (k, 5) in pixels of the picture on disk, quads float64 (k, 4, 2) the points as they
        were annotated, labels int64 (k,), difficult bool (k,).
        """
        return [
            {
                "image_id": record.image_id,
                "boxes": from_corners(torch.from_numpy(record.quads)),
                "quads": torch.from_numpy(record.quads),
                "labels": torch.from_numpy(record.labels),
                "difficult": torch.from_numpy(record.difficult),
            }
            for record in self.records
        ]


def record_of_quads(
    image_id: int, path: Path, size: tuple[int, int], rows: list[QuadRow], findings: Findings
) -> RotatedRecord:
    """A picture's record. What is wrong with its quads goes to ``findings``; one that is not finite is left out."""
    finite = []
    for row in rows:
        if np.isfinite(row.quad).all():
            finite.append(row)
        else:
            findings.add(row.id, f"{_shown(row.quad)} is not finite", "write eight finite numbers x1 y1 ... x4 y4")
    quads = np.array([row.quad for row in finite], np.float64).reshape(-1, 4, 2)
    return RotatedRecord(
        image_id=image_id,
        path=path,
        size=size,
        quads=quads,
        labels=np.array([row.label for row in finite], np.int64),
        difficult=np.array([row.difficult for row in finite], bool),
        usable=_examine(quads, size, [row.id for row in finite], findings),
    )


def _examine(quads: np.ndarray, size: tuple[int, int], ids: list[str], findings: Findings) -> np.ndarray:
    """bool (k,): whether something can be learned from each quad in a picture (height, width). That a rotated box
    reaches over the border in part is no mistake: its object may not."""
    height, width = size
    points = torch.from_numpy(quads)
    crossed = crossing(points)
    wrongs = {
        "crosses itself (give its points in order around the object)": crossed,
        "has no area": ~crossed & (area(points) <= FLAT),
        f"lies outside the picture of {width} x {height}": _outside(points, size),
    }
    for i, id in enumerate(ids):
        for what, wrong in wrongs.items():
            if wrong[i]:
                findings.add(id, f"{_shown(quads[i].reshape(-1))} {what}", LEFT_OUT, fatal=False)
                break
    return ~torch.stack(list(wrongs.values())).any(0).numpy()


def _outside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether each quad (k, 4, 2) is nowhere in the picture; only those that reach over its border are cut."""
    height, width = size
    over = ((points < 0) | (points > points.new_tensor([width, height]))).any(-1).any(-1)
    outside = torch.zeros(len(points), dtype=torch.bool)
    if over.any():
        outside[over] = part_inside(points[over], (0, 0, width, height)) == 0
    return outside


def _shown(quad: Any) -> str:
    return "quad [" + " ".join(f"{v:g}" for v in quad) + "]"
