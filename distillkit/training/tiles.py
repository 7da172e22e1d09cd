"""The tiles of a recipe's pictures, cut before anything reads them."""

from __future__ import annotations

import os
from collections.abc import Callable

from distillkit import schema
from distillkit.data.tile import Tiled, tile
from distillkit.data.tiling import Tiling
from distillkit.schema import Recipe
from distillkit.training.build import tiles_folder
from distillkit.training.processes import processes

#: (what is being cut, how many pictures of it are done, how many there are)
Progress = Callable[[str, int, int], None]


def cut_tiles(recipe: Recipe, progress: Progress | None = None) -> dict[str, Tiled]:
    """Cut what is not cut yet of the splits that a recipe names; nothing where its pictures are used as they are.

    Of several processes the first one cuts, and the others wait.

    Returns:
        by split, what its folder of tiles holds.

    Raises:
        DataError, TileError: see ``data.tile.tile``.
    """
    data = recipe.data
    if not isinstance(data, schema.DotaData) or data.tiles is None:
        return {}
    folder, tiles = tiles_folder(recipe, data, data.tiles), data.tiles
    tiling = Tiling(tiles.size, tiles.overlap, tuple(tiles.scales))
    cut = {}
    if processes().is_main_process:
        for split in dict.fromkeys((data.train, data.val, data.test)):
            if split is None:
                continue
            seen = (lambda done, total, split=split: progress(f"tiles of {split}", done, total)) if progress else None
            workers = min(data.workers, os.cpu_count() or 1)
            cut[split] = tile(data.root, split, folder, data.classes, tiling, processes=max(1, workers), progress=seen)
    processes().wait_for_everyone()
    return cut
