"""Find everything that is wrong with a set of masks or of image-level labels before a training run does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from distillkit.data.boundary import boundary_band
from distillkit.data.mask_transforms import MaskAugment
from distillkit.data.problems import DataError, Problem
from distillkit.data.segmentation import MaskPictures, Pixels
from distillkit.losses.segmentation import IGNORE

Progress = Callable[[int, int], None]


def check_masks(dataset: MaskPictures, progress: Progress | None = None) -> list[Problem]:
    """All problems of a set that could be built, from reading every file of it.

    What is ``fatal`` is raised in the same words when the picture is read: files that cannot be decoded, masks and
    saliency maps of another size than their picture, values that are no label. Not fatal, as training goes on with it:

    - masks in which nothing is labelled; they add nothing to the loss
    - masks without a boundary, where the transform asks for boundaries
    - pictures without a class among their image-level labels, and saliency maps that are 0 all over
    - classes that no picture of the set shows
    - what was found when the set was built: pictures without saliency map, masks without picture

    Args:
        progress: called as (pictures read, pictures in all) after each picture.
    """
    problems = list(dataset.problems)
    shown = np.zeros(IGNORE + 1, np.int64)
    for index in range(len(dataset)):
        try:
            pixels = dataset.load(index)
        except DataError as error:
            problems += error.problems
        else:
            problems += _remarks(dataset, index, pixels)
            shown += _shown(dataset, pixels)
        if progress is not None:
            progress(index + 1, len(dataset))
    absent = [name for name, count in zip(dataset.classes, shown) if not count]
    if absent and len(dataset):
        source = getattr(dataset, "source", dataset.where(0))
        what = f"no picture shows {len(absent)} of {len(dataset.classes)} classes: {', '.join(absent)}"
        remedy = "they cannot be learned from this split, nor scored on it; name another, or take them out of classes"
        problems.append(Problem(source, "classes", what, remedy, fatal=False))
    return problems


def _shown(dataset: MaskPictures, pixels: Pixels) -> np.ndarray:
    """int64 (256,): how much of each of ``dataset.classes`` a picture shows."""
    if pixels.labels is not None:
        return np.pad(pixels.labels, (0, IGNORE + 1 - len(pixels.labels))).astype(np.int64)
    assert pixels.mask is not None
    return np.bincount(pixels.mask.ravel(), minlength=IGNORE + 1)


def _remarks(dataset: MaskPictures, index: int, pixels: Pixels) -> Iterator[Problem]:
    """What a picture that can be read does not teach."""
    file, id = dataset.where(index), f"image {dataset.keys[index]}"
    if pixels.labels is not None and not pixels.labels.any():
        what = f"none of the {len(dataset.classes)} classes is among its labels"
        remedy = "it teaches that nothing is there; correct the labels if that is not so"
        yield Problem(file, id, what, remedy, fatal=False)
    if pixels.saliency is not None and not pixels.saliency.any():
        remedy = "it has no shape to transfer (the distiller's empty_saliency says what is done then)"
        yield Problem(file, id, "its saliency map is 0 all over", remedy, fatal=False)
    if pixels.mask is None:
        return
    if (pixels.mask == IGNORE).all():
        remedy = "it adds nothing to the loss and to no score; label it or take it out"
        yield Problem(file, id, "all pixels of its mask are ignored", remedy, fatal=False)
        return
    asked = dataset.transform
    if isinstance(asked, MaskAugment) and asked.boundary is not None:
        mask = torch.from_numpy(pixels.mask)
        if not boundary_band(mask, 1, between=asked.boundary_between).any():
            what = f"its mask has no boundary (between {asked.boundary_between})"
            remedy = "it teaches that there is none, and FakeMix has nothing to cut out of it"
            yield Problem(file, id, what, remedy, fatal=False)
