"""Rotated detection data in DOTA's text labels (Xia et al., arXiv:1711.10398; captain-whu.github.io/DOTA)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from distillkit.data.detection import Split
from distillkit.data.large import size_of
from distillkit.data.problems import DataError, Findings, Problem
from distillkit.data.rotated import QuadRow, RotatedDetection, RotatedRecord, RotatedSplit, record_of_quads
from distillkit.data.transforms import Transform

# fmt: off
_V1_0 = (
    "plane", "baseball-diamond", "bridge", "ground-track-field", "small-vehicle", "large-vehicle", "ship",
    "tennis-court", "basketball-court", "storage-tank", "soccer-ball-field", "roundabout", "harbor", "swimming-pool",
    "helicopter",
)
# fmt: on
#: the classes of DOTA's versions, by label
DOTA_CLASSES = {
    "v1.0": _V1_0,
    "v1.5": (*_V1_0, "container-crane"),
    "v2.0": (*_V1_0, "container-crane", "airport", "helipad"),
}
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
HEADERS = ("imagesource:", "gsd:")


class DotaDetection(RotatedDetection):
    """A set in DOTA's layout; items as ``RotatedDetection`` says, ``image_id`` = place in the order of names, from 1.

    Args:
        root, split, classes: as in ``read_dota``.
        transform, seed, teach_difficult, skip_empty: as in ``RotatedDetection``.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        classes: str | Sequence[str] = "v1.0",
        transform: Transform | None = None,
        seed: int = 0,
        teach_difficult: bool = False,
        skip_empty: bool = False,
    ):
        super().__init__(read_dota(root, split, classes), transform, seed, teach_difficult, skip_empty)


def read_dota(
    root: str | Path, split: str, classes: str | Sequence[str] = "v1.0", labelled: bool = True
) -> RotatedSplit:
    """What a folder in DOTA's layout says, and all that is wrong with it: see ``Split.problems``.

    Args:
        root, split: ``root/split/images`` holds the pictures and ``root/split/labelTxt`` a text file of the same name
            for each. With classes "v1.5" or "v2.0" the labels may also be where DOTA unpacks them:
            ``labelTxt-v1.5/DOTA-v1.5_train`` or ``labelTxt-v1.5`` in place of ``labelTxt``.
        classes: "v1.0", "v1.5" or "v2.0" for DOTA's own, or the set's class names by label.
        labelled: False: there are no labels, as in DOTA's test split.

    A label file has a line per object, ``x1 y1 x2 y2 x3 y3 x4 y4 class difficult``, in pixels; difficult is 0, or 1 or
    2 for objects that evaluation does not ask for, and may be missing. Header lines ("imagesource:", "gsd:") and empty
    lines are skipped. Of the pictures the headers alone are read.

    Raises ValueError for another version; nothing else.
    """
    names = dota_classes(classes)
    folder = Path(root) / split
    pictures, problems = _pictures(folder / "images")
    labels = _label_folder(folder, classes)
    if labelled:
        problems += _unmatched(pictures, labels)
    numbers = {name: label for label, name in enumerate(names)}
    records: list[RotatedRecord] = []
    for image_id, (stem, path) in enumerate(sorted(pictures.items()), 1):
        findings = Findings(str(labels / f"{stem}.txt"))
        record = _record(image_id, path, numbers, findings, labelled)
        problems += findings.problems
        if record is not None:
            records.append(record)
    if labelled and records and not any(len(record.quads) for record in records):
        remedy = "nothing can be learned or measured from it; name the labelled folder"
        problems.append(Problem(str(labels), None, "no image has an object", remedy, fatal=False))
    return Split(str(labels if labelled else folder), names, list(range(1, len(names) + 1)), records, problems)


def dota_classes(classes: str | Sequence[str]) -> list[str]:
    """Class names by label. Raises ValueError for a version that is none of DOTA's."""
    if not isinstance(classes, str):
        return list(classes)
    if classes not in DOTA_CLASSES:
        raise ValueError(f"classes: expected one of {', '.join(DOTA_CLASSES)}, or a list of names; got {classes!r}")
    return list(DOTA_CLASSES[classes])


def _pictures(folder: Path) -> tuple[dict[str, Path], list[Problem]]:
    """Pictures by name without ending."""
    if not folder.is_dir():
        return {}, [Problem(str(folder), None, "no such folder", "correct root or split; pictures are in split/images")]
    findings = Findings(str(folder))
    pictures: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURES:
            continue
        if path.stem in pictures:
            what = f"there are two pictures of this name, {pictures[path.stem].name} and {path.name}"
            findings.add(f"image {path.stem}", what, "keep one: labels are found by the name without its ending")
        pictures[path.stem] = path
    if not pictures:
        findings.add(None, "the split is empty: there is no picture", f"put pictures there ({', '.join(PICTURES)})")
    return pictures, findings.problems


def _label_folder(folder: Path, classes: str | Sequence[str]) -> Path:
    """Where the labels are, or, where there are none, where they should be."""
    places = []
    if isinstance(classes, str):
        own = folder / f"labelTxt-{classes}"
        places = [own / f"DOTA-{classes}_{folder.name}", own / "labelTxt", own]
        if own.is_dir():  # packed still: the labels of another version beside it are not meant
            return next((place for place in places if any(place.glob("*.txt"))), own)
    return folder / "labelTxt"


def _unmatched(pictures: dict[str, Path], labels: Path) -> list[Problem]:
    """Pictures without labels, and labels without a picture."""
    if not labels.is_dir():
        remedy = "correct root or split; labels are in split/labelTxt. For pictures without labels: distillkit predict"
        return [Problem(str(labels), None, "no such folder", remedy)]
    stems = {path.stem for path in labels.glob("*.txt")}
    if not stems:
        return [Problem(str(labels), None, "there is no label file (.txt) in it", "unpack the archive of labels there")]
    problems = [
        Problem(
            str(labels / f"{stem}.txt"),
            None,
            f"no such file, but there is a picture {pictures[stem].name}",
            "add its labels (an empty file if it shows no object), or take the picture out",
        )
        for stem in sorted(set(pictures) - stems)
    ]
    for stem in sorted(stems - set(pictures)):
        what = "there is no picture of this name in images"
        problems.append(Problem(str(labels / f"{stem}.txt"), None, what, "copy it there, or take the labels out"))
    return problems


def _record(
    image_id: int, path: Path, labels: dict[str, int], findings: Findings, labelled: bool
) -> RotatedRecord | None:
    """One picture and its label file; None where nothing can be made of them, with the reason in ``findings``."""
    try:
        size = size_of(path)
    except DataError as error:
        findings.problems += error.problems
        return None
    lines = _lines(findings) if labelled else []
    rows = [_row(line, f"line {number}", labels, findings) for number, line in enumerate(lines, 1)]
    return record_of_quads(image_id, path, size, [row for row in rows if row is not None], findings)


def _lines(findings: Findings) -> list[str]:
    try:
        return Path(findings.file).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []  # said by _unmatched
    except (OSError, UnicodeDecodeError) as error:
        findings.add(None, f"cannot be read ({error})", "write it again, as text in UTF-8")
        return []


def _row(line: str, id: str, labels: dict[str, int], findings: Findings) -> QuadRow | None:
    """The object of a line; None for a header, an empty line, and a broken one, with the reason in ``findings``."""
    words = line.split()
    if not words or line.lower().startswith(HEADERS):
        return None
    numbers = _numbers(words[:8])
    if len(numbers) < 8:
        what = f"{len(numbers)} coordinates stand before {' '.join(words[len(numbers) :]) or 'the end'!r}"
        findings.add(id, what, "write eight, x1 y1 x2 y2 x3 y3 x4 y4, then the class and 0 or 1 for difficult")
    elif len(words) not in (9, 10):
        what = f"{len(words)} words, expected 9 or 10"
        findings.add(id, what, "write eight coordinates, a class without spaces and 0 or 1 for difficult")
    elif words[8] not in labels:
        findings.add(
            id, f"class {words[8]!r} is unknown{_nearest(words[8], labels)}", "correct it or add it to classes"
        )
    elif words[9:] not in ([], ["0"], ["1"], ["2"]):
        findings.add(id, f"the difficult flag is {words[9]!r}", "write 0, 1 or 2, or leave it out")
    else:
        return QuadRow(id, tuple(numbers), labels[words[8]], words[9:] in (["1"], ["2"]))
    return None


def _numbers(words: list[str]) -> list[float]:
    """The numbers that stand in front."""
    numbers: list[float] = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            break
    return numbers


def _nearest(word: str, known: dict[str, int]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known are {', '.join(known)})"
