"""Find everything that is wrong with a data set before a training run does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from distillkit.data.detection import Pictured, Split, check_size, read_picture
from distillkit.data.large import SMALL, open_windows
from distillkit.data.problems import DataError, Problem

Progress = Callable[[int, int], None]

STRIP = 1024  # rows that are decoded at once of large pictures


def check_dataset(split: Split[Any], progress: Progress | None = None) -> Iterator[Problem]:
    """All problems of a data set, as they are found: first those of the annotations, then those of every picture.

    Args:
        split: from ``read_coco(root, annotations, images)``, ``read_voc(root, split, classes)``, ``read_dota`` or the
            like, which raise nothing.
        progress: called as (pictures read, pictures in all) after each picture; every picture is decoded in full.

    A ``fatal`` problem is raised, in the same words, when the data set is built or its picture read.
    """
    yield from split.problems
    for done, record in enumerate(split.records, 1):
        try:
            _decode(record)
        except DataError as error:
            yield from error.problems
        if progress is not None:
            progress(done, len(split.records))


def _decode(record: Pictured) -> None:
    """Decode a picture in full. Raises DataError, with one problem, where that cannot be done."""
    height, width = record.size
    if height * width <= SMALL:
        read_picture(record)
        return
    windows = open_windows(record.path)
    check_size(record, windows.size)
    for top in range(0, height, STRIP):
        windows.read(0, top, width, min(STRIP, height - top))
