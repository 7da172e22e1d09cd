"""A split in DOTA's layout that was cut into tiles: learned and predicted tile by tile, judged picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from distillkit.data.dota import DotaDetection, read_dota
from distillkit.data.rotated import RotatedDetection
from distillkit.data.tiling import Tile
from distillkit.data.transforms import Transform


class TiledDota(DotaDetection):
    """Tiles that ``data.tile.tile`` cut; items as ``RotatedDetection`` says, one a tile.

    Args:
        tiles: folder that holds ``split/images`` and ``split/labelTxt`` of the tiles.
        root: folder of the pictures they were cut from, in DOTA's layout.
        split, classes, transform, seed, teach_difficult, skip_empty: as in ``DotaDetection``.

    Attributes:
        places: of the tiles, by image_id.
        whole: the pictures themselves; their labels are read when they are first asked for, in evaluation.
    """

    def __init__(
        self,
        tiles: str | Path,
        root: str | Path,
        split: str,
        classes: str | Sequence[str] = "v1.0",
        transform: Transform | None = None,
        seed: int = 0,
        teach_difficult: bool = False,
        skip_empty: bool = False,
    ):
        super().__init__(tiles, split, classes, transform, seed, teach_difficult, skip_empty)
        self._source = (root, split, classes)
        self.places = {record.image_id: Tile.parse(record.path.stem) for record in self.records}

    @cached_property
    def whole(self) -> RotatedDetection:
        return RotatedDetection(read_dota(*self._source))

    def truth(self) -> list[dict[str, Any]]:
        """Of the whole pictures, as ``RotatedDetection.truth`` gives it."""
        return self.whole.truth()
