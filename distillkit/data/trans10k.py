"""Transparent objects with masks in the folders of Trans10K (Xie et al., arXiv:2003.13948)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distillkit.data.mask_files import LabelTable, Record, files_in, read_values
from distillkit.data.mask_transforms import MaskTransform
from distillkit.data.picture_list import PICTURES
from distillkit.data.problems import Problem
from distillkit.data.segmentation import MaskFiles, label_table

TRANS_CLASSES = ["background", "things", "stuff"]
#: of coloured masks: red + green + blue, whose mean is 0, 85 or 255
_COLOURS = LabelTable(
    {0: 0, 255: 1, 765: 2},
    "colours with red + green + blue = 0 (background), 255 (things) or 765 (stuff)",
    "write the mask again as PNG: resizing or JPEG makes other colours",
)


class TransMasks(MaskFiles):
    """Transparent things and stuff: classes background, things, stuff.

    Args:
        root, split: pictures are at ROOT/SPLIT/images/NAME.jpg and their masks at ROOT/SPLIT/masks/NAME.png, or
            NAME_mask.png as Trans10K calls them; or the same below ROOT/SPLIT/easy and ROOT/SPLIT/hard, both of which
            are then read, with keys easy/NAME and hard/NAME. "test/hard" is a split too.
        transform, seed: as in ``VocMasks``.

    Coloured masks are Trans10K's: a pixel whose mean is 0 is background, 85 a thing, 255 stuff. In palette and grey
    masks 0, 1 and 2 are these classes, and 255 is not labelled.

    Raises:
        DataError: no such folder, pictures without a mask; at reading as ``MaskFiles``.
    """

    def __init__(self, root: str | Path, split: str, transform: MaskTransform | None = None, seed: int = 0):
        folder = Path(root) / split
        parts = [part for part in ("easy", "hard") if (folder / part).is_dir()] or [""]
        problems: list[Problem] = []
        records = [record for part in parts for record in _records(folder / part, part and f"{part}/", problems)]
        if not records and not problems:
            problems.append(Problem(str(folder), None, "no picture in it", "name a split that has pictures"))
        table = label_table(len(TRANS_CLASSES))
        super().__init__(str(folder), TRANS_CLASSES, records, table, problems, transform=transform, seed=seed)

    def read_mask(self, path: Path, problems: list[Problem]) -> np.ndarray | None:
        values = read_values(path, "mask", problems)
        if values is None:
            return None
        if values.ndim == 2:
            return self.labelled(values, self.table, path, problems)
        return self.labelled(values.sum(2, dtype=np.uint16), _COLOURS, path, problems)


def _records(folder: Path, prefix: str, problems: list[Problem]) -> list[Record]:
    images, masks = folder / "images", folder / "masks"
    absent = [path for path in (images, masks) if not path.is_dir()]
    if absent:
        remedy = "correct root and split: SPLIT/images and SPLIT/masks, or these two below SPLIT/easy and SPLIT/hard"
        problems += [Problem(str(path), None, "no such folder", remedy) for path in absent]
        return []
    drawn = {name.removesuffix(".png").removesuffix("_mask"): masks / name for name in files_in(masks, [".png"])}
    records = []
    for name in files_in(images, PICTURES):
        stem = name.rpartition(".")[0]
        mask = drawn.pop(stem, None)
        if mask is None:
            what = f"it has no mask {stem}.png or {stem}_mask.png in {masks}, or another picture of this name has it"
            problems.append(Problem(str(images / name), f"image {stem}", what, "add the mask or take the picture out"))
        else:
            records.append(Record(f"{prefix}{stem}", images / name, mask))
    for stem, mask in drawn.items():
        what = f"there is no picture {stem} in {images}"
        problems.append(Problem(str(mask), "mask", what, "it is not used; add the picture or delete it", fatal=False))
    return records
