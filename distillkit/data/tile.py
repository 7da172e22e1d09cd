"""Cut a split in DOTA's layout into tiles that a detector can be trained on, in DOTA's layout again.

An object goes with every tile that shows 0.7 or more of its area, as a whole, as in the published DOTA training; see
``distillkit.data.tiling`` for where tiles are cut. One departure: an object that a tile's border cuts keeps its
difficult flag (mmrotate writes 2, which its training and evaluation do not look at).
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distillkit.data.check import Progress
from distillkit.data.dota import read_dota
from distillkit.data.problems import DataError, Problem, listing
from distillkit.data.quads import part_inside
from distillkit.data.rotated import RotatedRecord
from distillkit.data.tiling import NAME, PART, Tile, Tiling, windows, write_tiles

log = logging.getLogger("distillkit.data")

#: what a call was asked for; and a line for every picture that is done
MANIFEST, DONE = "tiling.json", "tiled.jsonl"


class TileError(ValueError):
    """Tiles that cannot be made or gone on with as asked."""


class Tiled(NamedTuple):
    """What a folder of tiles holds: from how many pictures, how many tiles, how many objects on them."""

    pictures: int
    tiles: int
    objects: int


def tile(
    root: str | Path,
    split: str,
    out: str | Path,
    classes: str | Sequence[str] = "v1.0",
    tiling: Tiling | None = None,
    labelled: bool = True,
    processes: int = 1,
    progress: Progress | None = None,
) -> Tiled:
    """Cut ``root/split`` into ``out/split``: ``images/*.png`` and ``labelTxt/*.txt``, named as ``Tile.stem`` says.

    Args:
        root, split, classes, labelled: what ``read_dota`` reads.
        out: folder of the tiles. May hold those of an interrupted call: the pictures that are done are not cut again,
            unless they or their labels have changed since, or tiles of theirs are gone.
        processes: how many pictures are cut at a time.
        progress: called as (pictures done, pictures in all).

    The same input gives the same tiles, however often it is interrupted and with any number of processes. Files appear
    under their names when they are complete. Memory is that of a window, if pyvips is installed (see ``open_windows``).
    Objects that nothing can be learned from are on no tile; the log "distillkit.data" gets one warning that names them.

    Raises:
        DataError: what is wrong with the input; nothing is cut then. For a picture that turns out to be broken when its
            pixels are read, after all others have been cut.
        TileError: ``out`` holds tiles that were cut in another way, or from other pictures, or other files.
    """
    tiling = tiling or Tiling()
    annotated = read_dota(root, split, classes, labelled)
    fatal = [problem for problem in annotated.problems if problem.fatal]
    if fatal:
        raise DataError(fatal)
    if annotated.problems:
        log.warning(listing(annotated.problems, 3))
    folder = Path(out) / split
    _begin(folder, {**asdict(tiling), "classes": annotated.classes, "labelled": labelled})
    done = _done(folder, annotated.records)
    todo = {record.path: record for record in annotated.records if record.path.stem not in done}
    _clear(folder, {path.stem for path in todo})
    tiles = {path: windows(path.stem, record.size, tiling) for path, record in todo.items()}
    work = partial(write_tiles, folder=folder / "images", tiling=tiling)
    problems: list[Problem] = []
    for finished, (path, error) in enumerate(_each(work, tiles, processes), len(done) + 1):
        if error is not None:
            problems += error.problems
        else:
            row = {"source": _mark(todo[path]), "tiles": [place.stem for place in tiles[path]], "objects": 0}
            if labelled:
                row["objects"] = _write_labels(todo[path], tiles[path], folder / "labelTxt", annotated.classes, tiling)
            _append(folder / DONE, row)
            done[path.stem] = row
        if progress is not None:
            progress(finished, len(annotated.records))
    if problems:
        raise DataError(problems)
    return Tiled(len(done), sum(len(d["tiles"]) for d in done.values()), sum(d["objects"] for d in done.values()))


def _write_labels(record: RotatedRecord, tiles: list[Tile], folder: Path, classes: list[str], tiling: Tiling) -> int:
    """Write the label files of a picture's tiles; returns how many objects stand in them."""
    objects = 0
    for tile in tiles:
        lines = _lines(record, tile, classes, tiling)
        _write_text(folder / f"{tile.stem}.txt", "".join(line + "\n" for line in lines))
        objects += len(lines)
    return objects


def _lines(record: RotatedRecord, tile: Tile, classes: list[str], tiling: Tiling) -> list[str]:
    """The tile's objects as label lines, their points in pixels of the tile."""
    corner = np.array([tile.x, tile.y])
    quads = record.quads * tile.scale - corner
    near = ((quads.max(1) > 0) & (quads.min(1) < tiling.size)).all(1) & record.usable
    shown = np.zeros(len(quads), bool)
    parts = part_inside(torch.from_numpy(quads[near]), (0, 0, tiling.size, tiling.size))
    shown[near] = (parts >= tiling.inside).numpy()
    return [
        " ".join(str(round(v, 4)) for v in quads[i].reshape(-1).tolist())
        + f" {classes[record.labels[i]]} {int(record.difficult[i])}"
        for i in np.flatnonzero(shown)
    ]


def _each(
    work: Callable[[Path, list[Tile]], DataError | None], tiles: dict[Path, list[Tile]], processes: int
) -> Iterator[tuple[Path, DataError | None]]:
    """Every picture when its tiles are written, and what is wrong with it."""
    if processes <= 1:
        for path, places in tiles.items():
            yield path, work(path, places)
        return
    # not forked: a process that has run torch has threads, which a fork does not copy
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(work, path, places): path for path, places in tiles.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(folder: Path, arguments: dict[str, Any]) -> None:
    """Make the folders, or go on in those of a call with the same arguments. Raises TileError for other arguments."""
    path = folder / MANIFEST
    arguments = json.loads(json.dumps(arguments))
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{k}: {there.get(k)!r} there, {v!r} now" for k, v in arguments.items() if there.get(k) != v]
        if differing:
            raise TileError(f"{folder} holds tiles cut in another way ({'; '.join(differing)}): use another folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise TileError(f"{folder} holds files that are no tiles of ours (there is no {MANIFEST}): use an empty folder")
    for name in ("images", "labelTxt") if arguments["labelled"] else ("images",):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for unfinished in (folder / name).glob(f"*{PART}"):
            unfinished.unlink()
    _write_text(path, json.dumps(arguments, indent=1) + "\n")


def _done(folder: Path, records: list[RotatedRecord]) -> dict[str, dict[str, Any]]:
    """What was written of the pictures whose tiles are complete and still theirs, by the picture's name.

    Raises TileError where tiles of pictures are there that are not in the split.
    """
    path = folder / DONE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith("\n"):  # cut off while it was written
        _write_text(path, "".join(lines[:-1]))
        lines.pop()
    rows = {row["source"]["name"]: row for row in map(json.loads, lines)}  # of a picture's lines the last one holds
    gone = sorted(set(rows) - {record.path.stem for record in records})
    if gone:
        shown = ", ".join(gone[:5]) + (", ..." if len(gone) > 5 else "")
        raise TileError(
            f"{folder} holds tiles of {len(gone)} pictures that are not in the split ({shown}): use another folder"
        )
    there = {picture.stem for picture in (folder / "images").iterdir()}
    if (folder / "labelTxt").is_dir():
        there &= {text.stem for text in (folder / "labelTxt").iterdir()}
    marks = {record.path.stem: _mark(record) for record in records if record.path.stem in rows}
    return {n: row for n, row in rows.items() if row["source"] == marks[n] and there.issuperset(row["tiles"])}


def _mark(record: RotatedRecord) -> dict[str, Any]:
    """What a picture and its labels are known again by: whether tiles are still those of their source."""
    there = record.path.stat()
    labels = [record.quads.tolist(), record.labels.tolist(), record.difficult.tolist()]
    digest = hashlib.sha256(json.dumps(labels).encode()).hexdigest()
    return {"name": record.path.stem, "bytes": there.st_size, "changed": there.st_mtime_ns, "labels": digest}


def _clear(folder: Path, names: set[str]) -> None:
    """Remove the tiles of pictures that are cut (again): those of an unfinished call, or of another picture."""
    for path in [*(folder / "images").iterdir(), *folder.glob("labelTxt/*")]:
        match = NAME.fullmatch(path.stem)
        if match is not None and match[1] in names:
            path.unlink()


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
