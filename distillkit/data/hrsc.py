"""Rotated detection data in HRSC2016's XML: ships from above (Liu et al., ICPRAM 2017)."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import torch

from distillkit.boxes.rotated import corners
from distillkit.data.detection import Split, missing_picture
from distillkit.data.large import size_of
from distillkit.data.problems import DataError, Findings
from distillkit.data.rotated import QuadRow, RotatedDetection, RotatedRecord, RotatedSplit, record_of_quads
from distillkit.data.transforms import Transform
from distillkit.data.voc import number, stems_of, tree_of

HRSC_CLASSES = ["ship"]
BOX = ("mbox_cx", "mbox_cy", "mbox_w", "mbox_h", "mbox_ang")


class HrscDetection(RotatedDetection):
    """HRSC2016 as one class, "ship"; items as ``RotatedDetection`` says, ``image_id`` = place in the list, from 1.

    Args:
        root, split: as in ``read_hrsc``.
        transform, seed, teach_difficult, skip_empty: as in ``RotatedDetection``.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Transform | None = None,
        seed: int = 0,
        teach_difficult: bool = False,
        skip_empty: bool = False,
    ):
        super().__init__(read_hrsc(root, split), transform, seed, teach_difficult, skip_empty)


def read_hrsc(root: str | Path, split: str) -> RotatedSplit:
    """What a list of HRSC2016 and its XML files say, and all that is wrong with it. Raises nothing.

    Args:
        root: folder with ``ImageSets/{split}.txt``, one name a line, and ``FullDataSet/AllImages/*.bmp`` and
            ``FullDataSet/Annotations/*.xml``.
        split: such as "trainval".

    A box is ``mbox_cx``, ``mbox_cy``, ``mbox_w``, ``mbox_h`` in pixels and ``mbox_ang`` in radians, clockwise. Of the
    pictures the headers alone are read.
    """
    root = Path(root)
    path = root / "ImageSets" / f"{split}.txt"
    findings = Findings(str(path))
    records: list[RotatedRecord] = []
    for image_id, stem in enumerate(stems_of(path, "ImageSets", findings), 1):
        inside = Findings(str(root / "FullDataSet" / "Annotations" / f"{stem}.xml"))
        record = _record(root / "FullDataSet" / "AllImages", stem, image_id, inside)
        findings.problems += inside.problems
        if record is not None:
            records.append(record)
    return Split(str(path), HRSC_CLASSES, [1], records, findings.problems)


def _record(folder: Path, stem: str, image_id: int, findings: Findings) -> RotatedRecord | None:
    """One picture's XML; None where nothing can be made of it, with the reason in ``findings``."""
    tree = tree_of(f"image {stem}", findings)
    if tree is None:
        return None
    picture = folder / f"{stem}.{tree.findtext('Img_FileFmt', 'bmp').strip()}"
    if not picture.is_file():
        findings.problems.append(missing_picture(picture, image_id))
        return None
    try:
        size = size_of(picture)
    except DataError as error:
        findings.problems += error.problems
        return None
    objects = tree.findall("HRSC_Objects/HRSC_Object")
    rows = [_row(element, f"object {i}", findings) for i, element in enumerate(objects, 1)]
    return record_of_quads(image_id, picture, size, [row for row in rows if row is not None], findings)


def _row(element: ElementTree.Element, id: str, findings: Findings) -> QuadRow | None:
    """One <HRSC_Object>; None where it is broken, with the reason in ``findings``."""
    box = [number(element.findtext(key)) for key in BOX]
    if None in box:
        findings.add(id, f"{', '.join(BOX)} are {box}", "write five numbers, the angle in radians")
        return None
    quad = corners(torch.tensor(box, dtype=torch.float64)).flatten().tolist()
    return QuadRow(id, tuple(quad), 0, element.findtext("difficult", "0").strip() == "1")
