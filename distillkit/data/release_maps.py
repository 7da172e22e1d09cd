"""Label maps of the published format, one torch file a picture, with the interface of ``LabelStore``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from distillkit.data.label_store import LabelMapError, Region, some
from distillkit.data.picture_list import PictureList, stays_inside

#: float16 holds every whole number up to this one
EXACT = 2048


class ReleaseMaps:
    """The label maps that TokenLabeling and ReLabel published for ImageNet, and others of their format.

    A file ``<root>/<class folder>/<stem>.pt`` holds one tensor (2, k, H, W) float16: scores, then class indices. The
    stem is what stands before the first dot of the picture's name, and of a picture's path only the last two parts are
    looked at. The maps cover the centre square of their pictures. The format says nothing of annotator and pictures.

    Args:
        root: the folder of the class folders.
        classes: of the annotator; at most 2049, as float16 holds no larger index for certain.

    Raises:
        LabelMapError: no maps there, or too many classes; from ``maps[key]``, a file that is not such a map.

    Attributes: classes, k, grid, region as ``LabelMaps``; k and grid are the first map's, and all must have them.
    """

    region: Region = "center_square"

    def __init__(self, root: str | Path, classes: int = 1000):
        self.root, self.classes = Path(root), classes
        if classes > EXACT + 1:
            raise LabelMapError(
                f"{root}: {classes} classes, but indices in float16 are wrong above {EXACT}: label the pictures anew, "
                "with `distillkit label`"
            )
        first = self._first()
        if first is None:
            raise LabelMapError(f"{root}: no <class>/<picture>.pt in it: name the folder of the class folders")
        shape = read_release_map(first, classes)[0].shape
        self.k, self.grid = shape[0], (shape[1], shape[2])

    def _first(self) -> Path | None:
        """A map, by listing no more than it takes: there may be more than a million."""
        folders = sorted(filter(Path.is_dir, self.root.glob("*")))
        return next((path for folder in folders for path in sorted(folder.glob("*.pt"))), None)

    @property
    def keys(self) -> list[str]:
        """Class folder and stem of every map, as "n01440764/n01440764_10026"."""
        return sorted(f"{path.parent.name}/{path.name.removesuffix('.pt')}" for path in self.root.glob("*/*.pt"))

    def __len__(self) -> int:
        return sum(1 for _ in self.root.glob("*/*.pt"))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._path(key).is_file()

    def __getitem__(self, key: str) -> tuple[Tensor, Tensor]:
        path = self._path(key)
        scores, indices = read_release_map(path, self.classes)
        if scores.shape != (self.k, *self.grid):
            shape, others = tuple(scores.shape), (self.k, *self.grid)
            raise LabelMapError(f"{path}: {shape}, other maps here are {others}: copy the maps again")
        return scores, indices

    def check(self, pictures: PictureList | Iterable[str]) -> None:
        """Raises LabelMapError where pictures have no map, or two of them the same one."""
        keys = pictures.keys if isinstance(pictures, PictureList) else list(pictures)
        seen: dict[Path, str] = {}
        for key in keys:
            other = seen.setdefault(self._path(key), key)
            if other != key:
                raise LabelMapError(
                    f"{self._path(key)}: the map of {other} and of {key}, as names end at the first dot: rename the "
                    "pictures and label them anew, with `distillkit label`"
                )
        # each folder is listed once: asking for each of a million files takes minutes on a network disk
        there = {folder: set(os.listdir(folder)) for folder in {path.parent for path in seen} if folder.is_dir()}
        without = [key for path, key in seen.items() if path.name not in there.get(path.parent, ())]
        if without:
            raise LabelMapError(f"{self.root}: {len(without)} pictures have no map ({some(without)})")

    def _path(self, key: str) -> Path:
        if not stays_inside(key) or "/" not in key:
            raise LabelMapError(f"{key!r}: expected the path of a picture, as in n01440764/n01440764_10026.JPEG")
        folder, name = key.split("/")[-2:]
        return self.root / folder / f"{name.split('.')[0]}.pt"


def read_release_map(path: str | Path, classes: int = EXACT) -> tuple[Tensor, Tensor]:
    """A map of the published format: (scores float32 (k, H, W), indices int64 (k, H, W)). No code in it is run.

    Raises:
        LabelMapError: no such file, or not such a map, or one with indices that float16 may have changed.
    """
    path = Path(path)
    if not path.is_file():
        raise LabelMapError(f"{path}: no such file; expected the map of a picture")
    try:
        stored = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and struct raise types of their own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LabelMapError(f"{path}: not a readable tensor ({reason}): copy it again") from error
    if not isinstance(stored, Tensor) or stored.dim() != 4 or len(stored) != 2 or not stored.is_floating_point():
        shape = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise LabelMapError(f"{path}: expected a tensor (2, k, H, W) of scores and class indices, got {shape}")
    scores, places = stored.float()
    indices = places.long()
    if not scores.isfinite().all() or not torch.equal(indices.float(), places) or indices.min() < 0:
        raise LabelMapError(f"{path}: its second half are no class indices, or a score is not finite: copy it again")
    if indices.max() >= min(classes, EXACT):
        raise LabelMapError(
            f"{path}: class {indices.max()}, expected less than {min(classes, EXACT)}: the maps are of another number "
            "of classes, or of so many that float16 does not hold them; then label anew, with `distillkit label`"
        )
    return scores, indices
