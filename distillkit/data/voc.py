"""Detection data in PASCAL VOC's XML (host.robots.ox.ac.uk/pascal/VOC, VOC2012 development kit)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from distillkit.data.detection import PictureDetection, Record, Row, Split, examine, missing_picture, record_of
from distillkit.data.problems import Findings
from distillkit.data.transforms import Transform

# fmt: off
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on


class VocDetection(PictureDetection):
    """A VOC detection set; items as ``PictureDetection`` says, ``image_id`` = place in the list, from 1.

    Args:
        root: folder with ``ImageSets/Main``, ``Annotations`` and ``JPEGImages``.
        split: a list in ``ImageSets/Main``, such as "train": one name a line.
        classes: class names by label; None: VOC's twenty.
        transform, seed: as in ``CocoDetection``.

    VOC counts pixels from 1 and a box includes its last pixel: ``xmin = 1, xmax = 10`` covers the ten leftmost columns
    and is x1 = 0, x2 = 10 here. Objects marked ``difficult`` are no targets of training; ``to_coco_json()`` marks them
    as crowd, so that in evaluation a prediction inside one counts neither as right nor as wrong.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ):
        super().__init__(read_voc(root, split, classes), transform, seed)


def read_voc(root: str | Path, split: str, classes: Sequence[str] | None = None) -> Split:
    """What a VOC list and its XML files say, and all that is wrong with it. Raises nothing: see ``Split.problems``."""
    root, names = Path(root), list(classes or VOC_CLASSES)
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    findings = Findings(str(path))
    stems = stems_of(path, "ImageSets/Main", findings)
    records: list[Record] = []
    for number, stem in enumerate(stems, 1):
        inside = Findings(str(root / "Annotations" / f"{stem}.xml"))
        record = _record(root, stem, number, {name: label for label, name in enumerate(names)}, inside)
        findings.problems += inside.problems
        if record is not None:
            records.append(record)
    return Split(str(path), names, list(range(1, len(names) + 1)), records, findings.problems)


def stems_of(path: Path, folder: str, findings: Findings) -> list[str]:
    """The names in a list in ``folder``, without repetitions."""
    if not path.is_file():
        findings.add(None, "no such file", f"correct root, or name a list in {folder}")
        return []
    lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.split()]
    if not lines:
        findings.add(None, "the split is empty: no image is listed", "name a list that has images")
    stems: dict[str, None] = {}
    for line in lines:
        if line in stems:
            findings.add(f"image {line}", "this image is listed twice", "list every image once")
        stems[line] = None
    return list(stems)


def _record(root: Path, stem: str, number: int, labels: dict[str, int], findings: Findings) -> Record | None:
    """One picture's XML; None where nothing can be made of it, with the reason in ``findings``."""
    id = f"image {stem}"
    tree = tree_of(id, findings)
    if tree is None:
        return None
    picture = _picture(root, stem, tree)
    if picture is None:
        findings.problems.append(missing_picture(root / "JPEGImages" / f"{stem}.jpg", number))
        return None
    size = _size(tree, picture)
    if size is None:
        findings.add(id, "<size> lacks a positive <width> or <height>", "write the picture's size in pixels")
        return None
    rows = [_row(element, f"object {i}", size, labels, findings) for i, element in enumerate(tree.findall("object"), 1)]
    return record_of(number, picture, size, [row for row in rows if row is not None])


def tree_of(id: str, findings: Findings) -> ElementTree.Element | None:
    """The XML file that the findings are about; None where it cannot be read, with the reason in them."""
    try:
        return ElementTree.parse(findings.file).getroot()
    except FileNotFoundError:
        findings.add(id, "no such file", "add the annotation or take the name out of the list")
    except ElementTree.ParseError as error:
        findings.add(id, f"line {error.position[0]}: not XML ({error})", "write the file again")
    return None


def _picture(root: Path, stem: str, tree: ElementTree.Element) -> Path | None:
    """The file named like the XML; failing that, the one that <filename> names (often stale in copies of VOC)."""
    folder = root / "JPEGImages"
    for name in (f"{stem}.jpg", f"{stem}.png", f"{stem}.jpeg", tree.findtext("filename", "").strip()):
        if name and (folder / name).is_file():
            return folder / name
    return None


def _size(tree: ElementTree.Element, picture: Path) -> tuple[int, int] | None:
    """(height, width), from the picture's header where the XML has no <size>."""
    element = tree.find("size")
    if element is None:
        try:
            with Image.open(picture) as image:
                return image.height, image.width
        except OSError:
            return None
    height, width = (number(element.findtext(key)) for key in ("height", "width"))
    return (int(height), int(width)) if height and width and height > 0 and width > 0 else None


def _row(
    element: ElementTree.Element, id: str, size: tuple[int, int], labels: dict[str, int], findings: Findings
) -> Row | None:
    """One <object>; None where it is broken, with the reason in ``findings``."""
    name = element.findtext("name", "").strip()
    corners = [number(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = corners
    if name not in labels:
        findings.add(id, f"class {name!r} is unknown; known are {', '.join(labels)}", "add it to classes")
    elif x1 is None or y1 is None or x2 is None or y2 is None:
        findings.add(id, f"<bndbox> is {corners}", "write four numbers xmin, ymin, xmax, ymax")
    else:
        box = (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
        useful = examine(box, size, id, findings)
        if useful is not None:
            difficult = element.findtext("difficult", "0").strip() == "1"
            return Row(box, labels[name], box[2] * box[3], difficult, useful)
    return None


def number(text: str | None) -> float | None:
    """What an element says; None where it is missing or no number."""
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
