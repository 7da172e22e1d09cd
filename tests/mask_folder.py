"""Small sets of masks and labels in Pascal VOC's folders."""

import json

import numpy as np
from PIL import Image


def save(path, values):
    """A grey PNG, or a picture, of an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def palette(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values, np.uint8), "P")
    picture.putpalette([(37 * i) % 256 for i in range(768)])  # of other colours than the labels
    picture.save(path)


def picture_of(mask):
    """Its red says the mask's label, its green and blue the pixel's row and column."""
    rows, columns = np.indices(mask.shape)
    return np.stack([mask, rows, columns], 2).astype(np.uint8)


def masks_for(names, size=(12, 20), classes=3):
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, classes, size).astype(np.uint8) for name in names}


def voc_folder(root, names=("a", "b", "c"), split="train", classes=("background", "cat", "dog"), **options):
    """Lossless pictures with random masks. Returns the masks by name."""
    masks = masks_for(names, classes=len(classes), **options)
    for name, mask in masks.items():
        save(root / "JPEGImages" / f"{name}.png", picture_of(mask))
        palette(root / "SegmentationClass" / f"{name}.png", mask)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    if classes is not None:
        labels(root, {name: [] for name in names}, classes)
    return masks


def labels(root, of, classes, file="image_labels.json"):
    (root / file).write_text(json.dumps({"classes": list(classes), "labels": of}))
