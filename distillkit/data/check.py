"""Find everything that is wrong with a data set before a training run does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from distillkit.data.detection import Split, read_picture
from distillkit.data.problems import DataError, Problem

Progress = Callable[[int, int], None]


def check_dataset(split: Split, progress: Progress | None = None) -> Iterator[Problem]:
    """All problems of a data set, as they are found: first those of the annotations, then those of every picture.

    Args:
        split: from ``read_coco(root, annotations, images)`` or ``read_voc(root, split, classes)``, which raise nothing.
        progress: called as (pictures read, pictures in all) after each picture; every picture is decoded in full.

    A ``fatal`` problem is raised, in the same words, when the data set is built or its picture read.
    """
    yield from split.problems
    for done, record in enumerate(split.records, 1):
        try:
            read_picture(record)
        except DataError as error:
            yield from error.problems
        if progress is not None:
            progress(done, len(split.records))
