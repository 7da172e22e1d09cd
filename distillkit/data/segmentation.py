"""Semantic segmentation sets: pictures with a mask each, in Pascal VOC's folders; what all such sets share.

``dataset[(epoch, index)]`` -> image float32 (3, H, W) in 0..1, and a target dict of mask (int64 (H, W), ``IGNORE`` =
not labelled), key (str: what the picture is called in its set) and, where the transform makes it, boundary (uint8
(H, W)). From ``MaskResize``, for evaluation, the image is of the network's size and the mask as its file has it.
A sample depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distillkit.data.mask_files import (
    LabelTable,
    Record,
    check_same_size,
    find,
    find_pictures,
    listed,
    one_channel,
    read_picture,
    read_values,
)
from distillkit.data.mask_transforms import MaskResize, MaskTransform
from distillkit.data.problems import DataError, Findings, Problem, listing
from distillkit.data.transforms import generator_for
from distillkit.data.voc import VOC_CLASSES
from distillkit.losses.segmentation import IGNORE

log = logging.getLogger("distillkit.data")

BACKGROUND = "background"
VOC_MASK_CLASSES = [BACKGROUND, *VOC_CLASSES]
#: the file of a set that has the names of its classes and, for weak supervision, the classes of each picture
CLASS_FILE = "image_labels.json"
LISTS = "ImageSets/Segmentation"

Item = tuple[Tensor, dict[str, Any]]


class Pixels(NamedTuple):
    """A picture as it is stored, and what is known of it.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: uint8 (H, W) labels, ``IGNORE`` = not labelled.
        saliency: (H, W), 0 = not salient.
        labels: float32 (C,), 1 for the classes that are there.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    saliency: np.ndarray | None = None
    labels: np.ndarray | None = None


class MaskPictures(Dataset[Item], ABC):
    """Items as this module, or ``data.weak``, says.

    Args:
        classes: names by label.
        keys: of the pictures, in order.
        transform: None: the picture as it is.
        problems: what is wrong with the set and does not keep it from being used. ``data.mask_check`` lists it.
        with_saliency: targets have saliency (1, H, W), 0 where there is none, and whether there is: has_saliency.
    """

    def __init__(
        self,
        classes: Sequence[str],
        keys: Sequence[str],
        transform: MaskTransform | None = None,
        seed: int = 0,
        problems: Sequence[Problem] = (),
        with_saliency: bool = False,
    ):
        self.classes, self.keys = list(classes), list(keys)
        self.transform: MaskTransform = transform or MaskResize()
        self.seed = seed
        self.problems = list(problems)
        self.with_saliency = with_saliency

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        epoch, index = place
        pixels = self.load(index, epoch)
        mask, saliency = (
            None if part is None else torch.from_numpy(part.astype(np.float32) if part.itemsize > 1 else part)
            for part in (pixels.mask, pixels.saliency)
        )
        image = torch.from_numpy(pixels.image).permute(2, 0, 1).contiguous()
        view = self.transform(image, mask, saliency, generator_for(self.seed, epoch, index))
        target: dict[str, Any] = {"key": self.keys[index]}
        if pixels.labels is not None:
            target["labels"] = torch.from_numpy(pixels.labels)
        if view.mask is not None:
            target["mask"] = view.mask
        if view.boundary is not None:
            target["boundary"] = view.boundary
        if self.with_saliency:
            none = view.image.new_zeros(1, *view.image.shape[1:])
            target["saliency"] = none if view.saliency is None else view.saliency
            target["has_saliency"] = view.saliency is not None
        return view.image, target

    @abstractmethod
    def load(self, index: int, epoch: int = 0) -> Pixels:
        """Picture ``index``; composed ones may differ by epoch. Raises DataError, with all that is wrong with it."""

    def where(self, index: int) -> str:
        """The file that a picture's labels are in, for messages."""
        return self.keys[index]


class MaskFiles(MaskPictures):
    """Pictures, masks and saliency maps in files, which are read when they are asked for.

    Args:
        source: the list of the pictures, for messages.
        records: of the pictures, in order.
        table: what the values in masks stand for.
        problems: all that was found wrong with the set without opening a picture.

    Raises:
        DataError: with every fatal one of the problems; at reading for files that cannot be decoded, sizes that differ
            and values that are no label. The log "distillkit.data" gets one warning of what is not fatal.
    """

    def __init__(
        self,
        source: str,
        classes: Sequence[str],
        records: Sequence[Record],
        table: LabelTable,
        problems: Sequence[Problem],
        **options: Any,
    ):
        fatal = [problem for problem in problems if problem.fatal]
        if fatal:
            raise DataError(fatal)
        if problems:
            log.warning(listing(problems, 3))
        super().__init__(classes, [record.key for record in records], problems=problems, **options)
        self.source, self.records, self.table = source, list(records), table

    def load(self, index: int, epoch: int = 0) -> Pixels:
        record, problems = self.records[index], list[Problem]()
        image = read_picture(record.image, problems)
        mask = None if record.mask is None else self.read_mask(record.mask, problems)
        saliency = None if record.saliency is None else _read_saliency(record.saliency, problems)
        for part, path, what in ((mask, record.mask, "mask"), (saliency, record.saliency, "saliency map")):
            if image is not None and part is not None and path is not None:
                check_same_size(image, part, path, what, record.image, problems)
        if problems or image is None:
            raise DataError(problems)
        return Pixels(image, mask, saliency)

    def read_mask(self, path: Path, problems: list[Problem]) -> np.ndarray | None:
        """uint8 (H, W) labels, or None and a problem."""
        values = read_values(path, "mask", problems)
        remedy = "store labels, not colours (Pillow: open the palette file without converting it)"
        if not one_channel(values, path, "mask", remedy, problems):
            return None
        return self.labelled(values, self.table, path, problems)

    def labelled(self, values: Any, table: LabelTable, path: Path, problems: list[Problem]) -> np.ndarray:
        findings = Findings(str(path))
        labels = table.read(values, findings)
        problems += findings.problems
        return labels

    def where(self, index: int) -> str:
        record = self.records[index]
        return str(record.mask or record.image)


def _read_saliency(path: Path, problems: list[Problem]) -> np.ndarray | None:
    values = read_values(path, "saliency map", problems)
    return values if one_channel(values, path, "saliency map", "store grey levels, 0 = not salient", problems) else None


class VocMasks(MaskFiles):
    """Masks in Pascal VOC's folders, given by people or made by a model.

    Args:
        root: folder with ``ImageSets/Segmentation``, ``JPEGImages`` and ``SegmentationClass``.
        split: a list in ``ImageSets/Segmentation``, such as "train": one name a line.
        classes: names by label, as masks have them; a background is a class like the others. None: those in ROOT's
            image_labels.json ({"classes": [...]}), where there is one; else VOC's: background and twenty.
        masks: folder of NAME.png below root, or an absolute path: palette or grey PNGs of labels, 255 = not labelled.
            Pseudo masks are found here too.
        images: folder of NAME.jpg (or .jpeg, .png and so on; the first that is there) below root.
        transform: ``MaskAugment`` or ``MaskResize``; None: the picture as it is.
        seed: of augmentation.

    Raises:
        DataError: see ``MaskFiles``.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        classes: Sequence[str] | None = None,
        masks: str | Path = "SegmentationClass",
        images: str | Path = "JPEGImages",
        transform: MaskTransform | None = None,
        seed: int = 0,
    ):
        root = Path(root)
        problems: list[Problem] = []
        names = mask_classes(root, classes, problems)
        path = root / LISTS / f"{split}.txt"
        findings = Findings(str(path))
        keys = listed(path, LISTS, findings)
        problems += findings.problems
        pictures = find_pictures(root / images, keys, str(path), problems)
        drawn = find(root / masks, keys, [".png"], str(path), problems)
        records = [Record(key, pictures[key], drawn[key]) for key in keys if key in pictures and key in drawn]
        super().__init__(str(path), names, records, label_table(len(names)), problems, transform=transform, seed=seed)


def label_table(classes: int) -> LabelTable:
    """Of masks that store labels."""
    return LabelTable(
        {value: value for value in (*range(classes), IGNORE)},
        f"0..{classes - 1} ({classes} classes) or {IGNORE} (not labelled)",
        "give the classes that these masks have, or make the masks again",
    )


def mask_classes(root: Path, classes: Sequence[str] | None, problems: list[Problem]) -> list[str]:
    """Names by label: those given, else those of ``CLASS_FILE`` in root, else VOC's."""
    file = root / CLASS_FILE
    if classes is not None:
        names, source = list(classes), "classes"
    elif file.is_file():
        content = read_json(file, problems)
        names, source = [] if content is None else class_names(content, file, problems), str(file)
    else:
        return list(VOC_MASK_CLASSES)
    return checked_classes(names, source, problems)


def checked_classes(names: list[str], source: str, problems: list[Problem]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        what = f"named twice: {', '.join(repeated)}"
        problems.append(Problem(source, "classes", what, "give every class a name of its own"))
    if len(names) > IGNORE:
        what = f"{len(names)} classes, at most {IGNORE} are possible: {IGNORE} in a mask is what is not labelled"
        problems.append(Problem(source, "classes", what, "take rare classes together"))
    return names


def read_json(path: Path, problems: list[Problem]) -> Mapping[str, Any] | None:
    """The object in a JSON file; None, and a problem, where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem(str(path), None, "no such file", "correct the path; it is looked for below root"))
    except (ValueError, OSError) as error:
        problems.append(Problem(str(path), None, f"not JSON ({error})", "write the file again"))
    else:
        if isinstance(content, dict):
            return content
        problems.append(
            Problem(str(path), None, f"a JSON {type(content).__name__}, expected an object", "see the docs")
        )
    return None


def class_names(content: Mapping[str, Any], path: Path, problems: list[Problem]) -> list[str]:
    names = content.get("classes")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    what = f'"classes" is {str(names)[:60]}, expected a list of names by label'
    problems.append(Problem(str(path), "classes", what, 'write "classes": ["background", ...]'))
    return []


def collate_masks(items: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
    """(images (B, 3, H, W), targets): masks (B, H, W) and, where there are some, boundary (B, H, W).

    Raises ValueError where sizes differ: masks at the size of their files are for evaluation, one by one.
    """
    images, targets = zip(*items, strict=True)
    together: dict[str, Any] = {"masks": stacked([target["mask"] for target in targets], "masks", targets)}
    if "boundary" in targets[0]:
        together["boundary"] = stacked([target["boundary"] for target in targets], "boundary", targets)
    return stacked(images, "images", targets), together


def stacked(tensors: Sequence[Tensor], what: str, targets: Sequence[Mapping[str, Any]]) -> Tensor:
    """A batch of tensors of one size. Raises ValueError that names two pictures whose sizes differ."""
    for tensor, target in zip(tensors, targets, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{what}: {target['key']} is {tuple(tensor.shape)}, {targets[0]['key']} {tuple(tensors[0].shape)}; "
                "a batch needs one size: use MaskAugment, or evaluate pictures one by one"
            )
    return torch.stack(list(tensors))
