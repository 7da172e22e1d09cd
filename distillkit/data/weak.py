"""Sets with image-level labels, for class activation maps: which classes a picture shows, not where.

``dataset[(epoch, index)]`` -> image float32 (3, H, W) in 0..1, and a target dict of labels (float32 (C,), 1 for every
class of the foreground that is there), key (str), and where the set was given them: saliency (float32 (1, H, W) in
0..1, aligned with the image) with has_saliency (bool), and mask (int64 (H, W): 0 = background, i + 1 = classes[i],
``IGNORE`` = not labelled), which is there to judge activation maps. ``dataset.classes`` has no background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillkit.data.mask_files import SHOWN, Record, find, find_pictures, listed
from distillkit.data.mask_transforms import MaskTransform
from distillkit.data.problems import Findings, Problem
from distillkit.data.segmentation import (
    BACKGROUND,
    CLASS_FILE,
    LISTS,
    MaskFiles,
    Pixels,
    checked_classes,
    class_names,
    label_table,
    read_json,
    stacked,
)
from distillkit.data.voc import VOC_CLASSES, tree_of
from distillkit.losses.segmentation import IGNORE

MAIN_LISTS = "ImageSets/Main"


class VocLabels(MaskFiles):
    """Image-level labels in Pascal VOC's folders; items as this module says.

    Args:
        root: folder with ``ImageSets``, ``JPEGImages`` and labels.
        split: a list in ``ImageSets/Segmentation``, or where it is not there in ``ImageSets/Main``: one name a line.
        classes: names of the foreground; "background" in front is left out. None: those of the labels' JSON file, else
            VOC's twenty.
        labels: where a picture's classes are from. A JSON file below root, or an absolute path: {"classes": [...],
            "labels": {NAME: [class, ...]}}. "masks": all that its mask shows, read with each picture. None: ROOT's
            image_labels.json where it is there, else all objects (difficult ones, too) in ROOT/Annotations/NAME.xml.
        saliency: folder below root, or an absolute path, of NAME.png: grey, as large as the picture, 0 = not salient.
            Pictures without one are trained without: their has_saliency is False and their saliency 0. None: no
            saliency in the targets.
        masks: folder of NAME.png, for evaluation (and labels="masks", which has "SegmentationClass" by default). None:
            no masks in the targets.
        images, transform, seed: as in ``VocMasks``.

    Everything is found by name, nothing by its place in a list. A class list of a JSON file that does not begin with
    "background" says that 0 in a mask is a class (as in road scenes, where every pixel is something): such a set gives
    labels, but no masks, as what activation maps make of it could not be compared with them.

    Raises:
        DataError: see ``MaskFiles``; labels that are missing, cannot be read or are no class; masks without background.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        classes: Sequence[str] | None = None,
        labels: str | Path | None = None,
        saliency: str | Path | None = None,
        masks: str | Path | None = None,
        images: str | Path = "JPEGImages",
        transform: MaskTransform | None = None,
        seed: int = 0,
    ):
        root, problems = Path(root), list[Problem]()
        path = _list_of(root, split)
        findings = Findings(str(path))
        keys = listed(path, f"{LISTS} or {MAIN_LISTS}", findings)
        problems += findings.problems
        self.from_masks, self.shows_masks = labels == "masks", masks is not None
        file = _label_file(root, labels)
        content = _content(file, problems)
        names = _foreground(file, content, classes, problems)
        folder = masks if masks is not None else "SegmentationClass" if self.from_masks else None
        if folder is not None and file is not None:
            _check_background(file, content, problems)
        pictures = find_pictures(root / images, keys, str(path), problems)
        drawn = {} if folder is None else find(root / folder, keys, [".png"], str(path), problems)
        salient = {} if saliency is None else _saliency(root / saliency, keys, str(path), problems)
        records = [
            Record(key, pictures[key], drawn.get(key), salient.get(key))
            for key in keys
            if key in pictures and (folder is None or key in drawn)
        ]
        self.labels: np.ndarray | None = None
        if not self.from_masks:
            found = (
                _annotated(root, records, problems)
                if file is None
                else _said(file, content.get("labels"), records, problems)
            )
            self.labels = _multi_hot(found, records, names, problems)
        table = label_table(len(names) + 1)
        options = {"transform": transform, "seed": seed, "with_saliency": saliency is not None}
        super().__init__(str(path), names, records, table, problems, **options)

    def load(self, index: int, epoch: int = 0) -> Pixels:
        pixels = super().load(index, epoch)
        if self.labels is not None:
            labels = self.labels[index]
        else:
            assert pixels.mask is not None
            labels = shown_classes(pixels.mask, len(self.classes))
        return pixels._replace(labels=labels, mask=pixels.mask if self.shows_masks else None)


def shown_classes(mask: np.ndarray, classes: int) -> np.ndarray:
    """float32 (classes,): 1 for every class that a mask shows (0 = background), be it one pixel."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    return (counts[1 : classes + 1] > 0).astype(np.float32)


def label_classes(
    root: Path, classes: Sequence[str] | None, labels: str | Path | None, problems: list[Problem]
) -> list[str]:
    """The names of the foreground that ``VocLabels`` has with these arguments. No picture need be there."""
    file = _label_file(root, labels)
    return _foreground(file, _content(file, problems), classes, problems)


def _list_of(root: Path, split: str) -> Path:
    path = root / LISTS / f"{split}.txt"
    other = root / MAIN_LISTS / f"{split}.txt"
    return other if other.is_file() and not path.is_file() else path


def _label_file(root: Path, labels: str | Path | None) -> Path | None:
    """The JSON file to read: for labels, or for the names of the classes alone."""
    if labels is not None and labels != "masks":
        return root / labels
    file = root / CLASS_FILE
    return file if file.is_file() else None


def _content(file: Path | None, problems: list[Problem]) -> Mapping[str, Any]:
    if file is None:
        return {}
    if file.suffix in (".npy", ".npz", ".pkl", ".pickle"):
        what = "not read: such a file of labels can run code when it is opened (pickle)"
        problems.append(
            Problem(str(file), None, what, 'write JSON: {"classes": [...], "labels": {NAME: [class, ...]}}')
        )
        return {}
    return read_json(file, problems) or {}


def _foreground(
    file: Path | None, content: Mapping[str, Any], classes: Sequence[str] | None, problems: list[Problem]
) -> list[str]:
    """The names given, else those of the file, else VOC's; without a background in front."""
    names, source = list(VOC_CLASSES), "classes"
    if classes is not None:
        names = list(classes)
    elif file is not None and "classes" in content:
        names, source = class_names(content, file, problems), str(file)
    names = names[1:] if names[:1] == [BACKGROUND] else names
    return checked_classes(names, source, problems)


def _check_background(file: Path, content: Mapping[str, Any], problems: list[Problem]) -> None:
    names = content.get("classes")
    if isinstance(names, list) and names and names[0] != BACKGROUND:
        what = f"{names[0]!r} comes first, so that 0 in masks is {names[0]!r}; activation maps need 0 = {BACKGROUND!r}"
        remedy = f"write {BACKGROUND!r} first if that is what 0 is in these masks, or do without masks"
        problems.append(Problem(str(file), "classes", what, remedy))


def _saliency(folder: Path, keys: Sequence[str], source: str, problems: list[Problem]) -> dict[str, Path]:
    missing: list[Problem] = []
    there = find(folder, keys, [".png"], source, missing)
    if missing and there:  # some are there, so the folder is the right one
        remedy = "it is trained without saliency (local-to-global transfer: attention transfer); add the map or not"
        missing = [Problem(p.file, p.id, "no saliency map of this picture", remedy, fatal=False) for p in missing]
    problems += missing
    return there


def _said(
    file: Path, said: Any, records: Sequence[Record], problems: list[Problem]
) -> dict[str, tuple[str, list[str]]]:
    """What a JSON file says of each picture: the file, and names of classes."""
    if not isinstance(said, dict):
        if not any(problem.file == str(file) for problem in problems):
            what = f'"labels" is {str(said)[:60]}, expected {{NAME: [class, ...]}}'
            problems.append(Problem(str(file), "labels", what, 'write "labels": {NAME: [class, ...]}'))
        return {}
    found = {}
    for record in records:
        names = said.get(record.key)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[record.key] = (str(file), names)
        else:
            what = "it has no labels there" if names is None else f"its labels are {str(names)[:60]}, expected a list"
            remedy = "add its classes ([] for none), under the name that the list of pictures has"
            problems.append(Problem(str(file), f"image {record.key}", what, remedy))
    return found


def _annotated(root: Path, records: Sequence[Record], problems: list[Problem]) -> dict[str, tuple[str, list[str]]]:
    """As ``_said``, from VOC's XML files."""
    folder = root / "Annotations"
    if not folder.is_dir():
        remedy = f"add {CLASS_FILE} or Annotations to {root}, name a JSON file of labels, or ask for labels: masks"
        problems.append(Problem(str(folder), None, f"neither it nor {root / CLASS_FILE} is there", remedy))
        return {}
    found = {}
    for record in records:
        findings = Findings(str(folder / f"{record.key}.xml"))
        tree = tree_of(f"image {record.key}", findings)
        problems += findings.problems
        if tree is not None:
            names = [element.findtext("name", "").strip() for element in tree.findall("object")]
            found[record.key] = (findings.file, names)
    return found


def _multi_hot(
    found: Mapping[str, tuple[str, list[str]]], records: Sequence[Record], classes: list[str], problems: list[Problem]
) -> np.ndarray:
    """float32 (N, C); names that are no class go to ``problems``."""
    places = {name: place for place, name in enumerate(classes)}
    labels = np.zeros((len(records), len(classes)), np.float32)
    for row, record in enumerate(records):
        file, names = found.get(record.key, ("", []))
        for name in dict.fromkeys(names):
            if name in places:
                labels[row, places[name]] = 1
            elif name != BACKGROUND:
                known = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
                what = f"class {name!r} is unknown; known are {known}"
                problems.append(Problem(file, f"image {record.key}", what, "add it to classes, or correct the name"))
    return labels


def collate_labels(items: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
    """(images (B, 3, H, W), targets): labels (B, C) and, of a set with saliency, saliency (B, 1, H, W) and has_saliency
    bool (B,).

    Raises ValueError where sizes differ.
    """
    images, targets = zip(*items, strict=True)
    together: dict[str, Any] = {"labels": torch.stack([target["labels"] for target in targets])}
    if "saliency" in targets[0]:
        together["saliency"] = stacked([target["saliency"] for target in targets], "saliency", targets)
        together["has_saliency"] = torch.tensor([target["has_saliency"] for target in targets])
    return stacked(images, "images", targets), together
