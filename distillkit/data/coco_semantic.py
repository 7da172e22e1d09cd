"""Semantic segmentation from PNGs of COCO's category ids (Kirillov et al., arXiv:1801.00868)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from distillkit.data.mask_files import LabelTable, Record, files_in, find, find_pictures, listed
from distillkit.data.mask_transforms import MaskTransform
from distillkit.data.problems import Findings, Problem
from distillkit.data.segmentation import BACKGROUND, MaskFiles, checked_classes, read_json
from distillkit.losses.segmentation import IGNORE

UNLABELLED = 0

# fmt: off
#: COCO's 133 categories of panoptic segmentation: things 1..90, stuff 92..200
PANOPTIC = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush", 92: "banner",
    93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain", 112: "door-stuff",
    118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house", 130: "light", 133: "mirror-stuff",
    138: "net", 141: "pillow", 144: "platform", 145: "playingfield", 147: "railroad", 148: "river", 149: "road",
    151: "roof", 154: "sand", 155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind",
    181: "window-other", 184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}
# fmt: on


class CocoSemantic(MaskFiles):
    """Masks whose pixels are category ids: of COCO's panoptic segmentation with the segments of a class taken together.

    Args:
        root, split: "{split}" in the paths below, which are relative to root, is the split's name.
        categories: the categories that are classes, in this order: {id: name}; or a JSON file with "categories":
            [{"id": ..., "name": ...}], such as COCO's annotations, relative to root; None: COCO's 133. Class i is the
            i-th of them, ``category_ids`` has their ids. Id 0 is what is not labelled, and so is 255 where no category
            has it; both become ``IGNORE``.
        others: what pixels of all other ids are: None: an error; "ignore": not labelled; "background": class 0,
            "background", in front of the categories.
        images: folder of NAME.jpg.
        masks: folder of NAME.png, palette or grey. (COCO's own panoptic PNGs are coloured, with numbers of segments;
            its converter to semantic PNGs writes what is read here.)
        names: a list with one name a line; None: every mask in the folder.
        transform, seed: as in ``VocMasks``.

    Raises:
        DataError: see ``MaskFiles``; categories that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        categories: str | Path | Mapping[int, str] | None = None,
        others: Literal["ignore", "background"] | None = None,
        images: str = "images",
        masks: str = "semantic",
        names: str | None = "annotations/semantic_{split}.txt",
        transform: MaskTransform | None = None,
        seed: int = 0,
    ):
        if others not in (None, "ignore", "background"):
            raise ValueError(f"others: expected None, 'ignore' or 'background', got {others!r}")
        root = Path(root)
        pictures_at, masks_at = (root / folder.format(split=split) for folder in (images, masks))
        problems: list[Problem] = []
        known, source = categories_of(root, split, categories, problems)
        if names is None:
            keys, listing = _all_names(masks_at, problems), str(masks_at)
        else:
            path = root / names.format(split=split)
            findings = Findings(str(path))
            keys, listing = listed(path, str(path.parent), findings), str(path)
            problems += findings.problems
        pictures = find_pictures(pictures_at, keys, listing, problems)
        drawn = find(masks_at, keys, [".png"], listing, problems)
        records = [Record(key, pictures[key], drawn[key]) for key in keys if key in pictures and key in drawn]
        classes = _named(known, others)
        checked_classes(classes, source, problems)
        self.category_ids = list(known)
        table = _table(known, others, source)
        super().__init__(listing, classes, records, table, problems, transform=transform, seed=seed)


def semantic_classes(
    root: Path, split: str, categories: str | Path | None, others: str | None, problems: list[Problem]
) -> list[str]:
    """The classes of ``CocoSemantic`` by label. No picture need be there."""
    return _named(categories_of(root, split, categories, problems)[0], others)


def _named(known: Mapping[int, str], others: str | None) -> list[str]:
    return [BACKGROUND] * (others == "background") + list(known.values())


def _all_names(masks: Path, problems: list[Problem]) -> list[str]:
    names = [name.removesuffix(".png") for name in files_in(masks, [".png"])] if masks.is_dir() else []
    if masks.is_dir() and not names:
        problems.append(Problem(str(masks), None, "no mask (.png) in it", "name a folder of masks"))
    return names


def _table(known: Mapping[int, str], others: str | None, source: str) -> LabelTable:
    first = 1 if others == "background" else 0
    labels = {UNLABELLED: IGNORE, IGNORE: IGNORE} | {id: label for label, id in enumerate(known, first)}
    return LabelTable(
        labels,
        f"the ids of {len(known)} categories ({source}) or {UNLABELLED} (not labelled)",
        'give all categories of these masks, or say what the others are: others="ignore" or "background"',
        {None: None, "ignore": IGNORE, "background": 0}[others],
    )


def categories_of(
    root: Path, split: str, categories: str | Path | Mapping[int, str] | None, problems: list[Problem]
) -> tuple[dict[int, str], str]:
    """The categories of ``CocoSemantic``, {id: name}, and where they are from. No picture need be there."""
    if categories is None:
        return dict(PANOPTIC), "COCO's panoptic ones"
    if isinstance(categories, Mapping):
        return _checked({"categories": [{"id": i, "name": n} for i, n in categories.items()]}, "categories", problems)
    path = root / str(categories).format(split=split)
    content = read_json(path, problems)
    return ({}, str(path)) if content is None else _checked(content, str(path), problems)


def _checked(content: Mapping[str, Any], source: str, problems: list[Problem]) -> tuple[dict[int, str], str]:
    entries = content.get("categories")
    known: dict[int, str] = {}
    if not isinstance(entries, list) or not entries:
        problems.append(Problem(source, "categories", "none are there", "name a COCO file that has categories"))
        return known, source
    for number, entry in enumerate(entries):
        id, name = (entry.get(key) for key in ("id", "name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(id, int) or not isinstance(name, str) or not 0 < id < 2**16:
            what = f"it is {entry!r}, expected an id in 1..65535 and a name (0 is what is not labelled)"
            problems.append(Problem(source, f"category {number}", what, "correct the entry"))
        elif id in known:
            what = f"id {id} is {known[id]!r} and {name!r}"
            problems.append(Problem(source, f"category {number}", what, "give every category an id of its own"))
        else:
            known[id] = name
    return known, source
