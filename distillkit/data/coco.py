"""Detection data in COCO's JSON (cocodataset.org, "Data format"): boxes are x, y, width, height in pixels from 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from distillkit.data.detection import (
    PictureDetection,
    R,
    Record,
    Row,
    Split,
    examine,
    existing,
    missing_picture,
    record_of,
)
from distillkit.data.problems import DataError, Findings, Problem
from distillkit.data.transforms import Transform

T = TypeVar("T")
Size = tuple[int, int]
#: (annotation, its id for messages, label, size of its picture, findings) -> the object; None where it is broken
ObjectOf = Callable[[dict[str, Any], str, int, Size, Findings], T | None]
#: (image id, path, size, objects, findings) -> the picture's record
RecordOf = Callable[[int, Path, Size, list[T], Findings], R]


class CocoDetection(PictureDetection):
    """A COCO detection set; items as ``PictureDetection`` says.

    Args:
        root: folder of the data set.
        annotations: the JSON file, relative to root.
        images: folder of the pictures, relative to root.
        transform: ``Resize`` (evaluation), ``Augment`` (training) or the like; None: pictures as they are.
        seed: of the augmentation.

    Labels are 0..C-1 in the order of the file's category ids; ``category_ids[label]`` gives the id back. Crowd regions
    are no targets of training and stay in ``to_coco_json()``, where evaluation ignores what lies in them.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        images: str | Path = "images",
        transform: Transform | None = None,
        seed: int = 0,
    ):
        super().__init__(read_coco(root, annotations, images), transform, seed)


def read_coco(root: str | Path, annotations: str | Path, images: str | Path = "images") -> Split[Record]:
    """What a COCO file says, and what is wrong with it (``Split.problems``). Opens no picture, raises nothing."""
    return read_objects(Path(root) / annotations, Path(root) / images, _upright, _record)


def read_objects(path: Path, folder: Path, object_of: ObjectOf[T], record_of: RecordOf[T, R]) -> Split[R]:
    """What a COCO file says of pictures in a folder, whatever its objects are. Opens no picture, raises nothing."""
    findings = Findings(str(path))
    try:
        content = _content(path)
    except DataError as error:
        return Split(str(path), [], [], [], error.problems)
    names = _categories(content["categories"], findings)
    pictures = _pictures(content["images"], findings)
    labels = {id: label for label, id in enumerate(names)}
    rows = _rows(content["annotations"], pictures, labels, object_of, findings)
    records = [record_of(i, folder / name, size, rows[i], findings) for i, (name, size) in pictures.items()]
    there = list(existing(r.path for r in records))
    findings.problems += [missing_picture(r.path, r.image_id) for r, found in zip(records, there) if not found]
    records = [r for r, found in zip(records, there) if found]
    return Split(str(path), list(names.values()), list(names), records, findings.problems)


def _upright(annotation: dict[str, Any], id: str, label: int, size: Size, findings: Findings) -> Row | None:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        findings.add(id, f"bbox is {_short(box)}", "write four numbers x, y, width, height")
        return None
    x, y, width, height = (float(v) for v in box)
    useful = examine((x, y, width, height), size, id, findings)
    if useful is None:
        return None
    area = annotation.get("area")
    area = float(area) if isinstance(area, (int, float)) else width * height
    return Row((x, y, width, height), label, area, bool(annotation.get("iscrowd")), useful)


def _record(image_id: int, path: Path, size: Size, rows: list[Row], _: Findings) -> Record:
    return record_of(image_id, path, size, rows)


def _content(path: Path) -> dict[str, list[Any]]:
    """The file's three lists. Raises DataError where they cannot be had."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what, remedy = "no such file", "correct the path (root and annotations)"
    except json.JSONDecodeError as error:
        what = f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        remedy = "the file is cut off or was edited by hand; write it again"
    except (OSError, UnicodeDecodeError) as error:
        what, remedy = f"cannot be read ({error})", "name a COCO JSON file"
    else:
        lists = ("images", "annotations", "categories")
        if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in lists):
            return content
        what, remedy = f"lacks one of the lists {', '.join(lists)}", "name a COCO detection file"
    raise DataError([Problem(str(path), None, what, remedy)])


def _categories(rows: list[Any], findings: Findings) -> dict[int, str]:
    """Name by id, in the order of the ids."""
    names: dict[int, str] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("id"), int) or "name" not in row:
            what = f"category {_short(row)} lacks an integer id or a name"
            findings.add(None, what, "give every category an id and a name")
        elif row["id"] in names:
            findings.add(f"category {row['id']}", "this id is given twice", "give every category its own id")
        elif str(row["name"]) in names.values():
            what = f"the name {row['name']!r} is given twice"
            findings.add(f"category {row['id']}", what, "give every category its own name")
        else:
            names[row["id"]] = str(row["name"])
    if not rows:
        findings.add(None, "no category is listed", "list the classes under 'categories'")
    return dict(sorted(names.items()))


def _pictures(rows: list[Any], findings: Findings) -> dict[int, tuple[str, Size]]:
    """File name and (height, width) by id, in the order of the file."""
    pictures: dict[int, tuple[str, Size]] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("id"), int) or not isinstance(row.get("file_name"), str):
            what = f"image {_short(row)} lacks an integer id or a file_name"
            findings.add(None, what, "give every image an id and a file_name")
            continue
        height, width = row.get("height"), row.get("width")
        if row["id"] in pictures:
            findings.add(f"image {row['id']}", "this id is given twice", "give every image its own id")
        elif not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
            what = f"width and height are {width!r} and {height!r}"
            findings.add(f"image {row['id']}", what, "write the picture's size in pixels")
        else:
            pictures[row["id"]] = (row["file_name"], (height, width))
    if not rows:
        findings.add(None, "the split is empty: no image is listed", "name a file that has images")
    return pictures


def _rows(
    annotations: list[Any],
    pictures: dict[int, tuple[str, Size]],
    labels: dict[int, int],
    object_of: ObjectOf[T],
    findings: Findings,
) -> dict[int, list[T]]:
    """The objects of each picture, by image id."""
    rows: dict[int, list[T]] = {image: [] for image in pictures}
    seen: set[int] = set()
    for annotation in annotations:
        if not isinstance(annotation, dict) or not isinstance(annotation.get("id"), int):
            what = f"annotation {_short(annotation)} has no integer id"
            findings.add(None, what, "give every annotation its own id")
        elif annotation["id"] in seen:
            id = f"annotation {annotation['id']}"
            findings.add(id, "this id is given twice", "give every annotation its own id")
        else:
            seen.add(annotation["id"])
            row = _row(annotation, pictures, labels, object_of, findings)
            if row is not None:
                rows[annotation["image_id"]].append(row)
    if pictures and not annotations:
        what, remedy = "no image has a box", "nothing can be learned or measured from it; name the labelled file"
        findings.add(None, what, remedy, fatal=False)
    return rows


def _row(
    annotation: dict[str, Any],
    pictures: dict[int, tuple[str, Size]],
    labels: dict[int, int],
    object_of: ObjectOf[T],
    findings: Findings,
) -> T | None:
    """The object of an annotation; None where it is broken, with the reason in ``findings``."""
    id = f"annotation {annotation['id']}"
    image, category = annotation.get("image_id"), annotation.get("category_id")
    if not isinstance(image, int) or image not in pictures:
        what = f"belongs to image {image!r}, which is not listed (or is itself broken)"
        findings.add(id, what, "add the image or remove the annotation")
    elif not isinstance(category, int) or category not in labels:
        what = f"category {category!r} is unknown; the file has {_short(list(labels))}"
        findings.add(id, what, "add the category or correct the annotation")
    else:
        return object_of(annotation, id, labels[category], pictures[image][1], findings)
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
