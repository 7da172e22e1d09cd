"""The tiles of a recipe's pictures, cut before anything reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from distillkit import schema
from distillkit.data.tile import Tiled, tile
from distillkit.data.tiling import Tiling
from distillkit.schema import Recipe
from distillkit.training.build import tiles_folder
from distillkit.training.folder import alone_in
from distillkit.training.processes import processes

#: (what is being cut, how many pictures of it are done, how many there are)
Progress = Callable[[str, int, int], None]


def cut_tiles(recipe: Recipe, splits: Iterable[str], progress: Progress | None = None) -> dict[str, Tiled]:
    """Cut what is not cut yet of splits of a recipe; nothing where its pictures are used as they are.

    Of several processes the first one cuts, and the others wait: for longer than they may, where the set is large. Cut
    it beforehand then, with `distillkit tile` or `check`.

    Args:
        splits: of train, val and test; those that the recipe does not name are left out.

    Returns:
        by name of the split's folder, what its tiles hold.

    Raises:
        DataError, TileError: see ``data.tile.tile``. RunError: another process is cutting there.
    """
    data = recipe.data
    if not isinstance(data, schema.DotaData) or data.tiles is None:
        return {}
    folder, tiles = tiles_folder(recipe, data, data.tiles), data.tiles
    tiling = Tiling(tiles.size, tiles.overlap, tuple(tiles.scales))
    cut = {}
    if processes().is_main_process:
        for split in filter(None, (getattr(data, name) for name in dict.fromkeys(splits))):
            seen = (lambda done, total, split=split: progress(f"tiles of {split}", done, total)) if progress else None
            workers = max(1, min(data.workers, os.cpu_count() or 1))
            with alone_in(folder):
                cut[split] = tile(data.root, split, folder, data.classes, tiling, processes=workers, progress=seen)
    processes().wait_for_everyone()
    return cut
