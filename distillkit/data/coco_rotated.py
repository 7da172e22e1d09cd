"""Rotated detection data in COCO's JSON: the smallest rectangle around each object's polygons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillkit.boxes.rotated import corners, smallest
from distillkit.data.coco import read_objects
from distillkit.data.problems import Findings
from distillkit.data.rotated import QuadRow, RotatedDetection, RotatedSplit, record_of_quads
from distillkit.data.transforms import Transform


class CocoRotated(RotatedDetection):
    """A COCO file with polygons; items as ``RotatedDetection`` says. Labels are as in ``CocoDetection``.

    Args:
        root, annotations, images: as in ``CocoDetection``.
        transform, seed, teach_difficult, skip_empty: as in ``RotatedDetection``.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        images: str | Path = "images",
        transform: Transform | None = None,
        seed: int = 0,
        teach_difficult: bool = False,
        skip_empty: bool = False,
    ):
        super().__init__(read_coco_rotated(root, annotations, images), transform, seed, teach_difficult, skip_empty)


def read_coco_rotated(root: str | Path, annotations: str | Path, images: str | Path = "images") -> RotatedSplit:
    """What a COCO file with polygons says, and all that is wrong with it. Opens no picture, raises nothing.

    ``segmentation`` is a list of polygons x1, y1, x2, y2, ...; one of four points is kept as it is, around all others
    goes the rectangle of smallest area. Crowds are difficult objects: the four points are those of their ``bbox``.
    Run-length masks of other objects are an error.
    """
    return read_objects(Path(root) / annotations, Path(root) / images, _quad, record_of_quads)


def _quad(annotation: dict[str, Any], id: str, label: int, size: tuple[int, int], findings: Findings) -> QuadRow | None:
    """The object of an annotation; None where it is broken, with the reason in ``findings``."""
    if annotation.get("iscrowd"):
        return _crowd(annotation, id, label, findings)
    polygons = annotation.get("segmentation")
    if isinstance(polygons, dict):
        what = "segmentation is a run-length mask (RLE)"
        findings.add(id, what, "write polygons, as pycocotools and OpenCV's findContours make them of masks")
    elif not isinstance(polygons, list) or not polygons:
        remedy = "write a list of polygons, or read the file as a set of upright boxes"
        findings.add(id, "there is no segmentation", remedy)
    elif not all(_is_polygon(polygon) for polygon in polygons):
        what = "segmentation has a polygon that is no list of three or more points, or is not finite"
        findings.add(id, what, "write numbers x1, y1, x2, y2, x3, y3, ... for each")
    else:
        points = torch.tensor([float(v) for polygon in polygons for v in polygon], dtype=torch.float64).view(-1, 2)
        return QuadRow(id, _four(points), label, difficult=False)
    return None


def _is_polygon(values: Any) -> bool:
    numbers = isinstance(values, list) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    return numbers and len(values) >= 6 and len(values) % 2 == 0


def _four(points: Tensor) -> tuple[float, ...]:
    four = points if len(points) == 4 else corners(smallest(points))
    return tuple(four.flatten().tolist())


def _crowd(annotation: dict[str, Any], id: str, label: int, findings: Findings) -> QuadRow | None:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        findings.add(id, f"it is a crowd, and bbox is {box!r}", "write four numbers x, y, width, height")
        return None
    x, y, w, h = (float(v) for v in box)
    return QuadRow(id, (x, y, x + w, y, x + w, y + h, x, y + h), label, difficult=True)
