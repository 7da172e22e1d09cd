"""A small set with image-level labels in Pascal VOC's folders, and a recipe of seconds on it."""

import json

import numpy as np
from PIL import Image

from distillkit.recipe import load
from tests.mask_folder import labels, palette, save

CLASSES = ["background", "disc", "square"]
SPLITS = (("train", 6), ("val", 3), ("test", 2))
RECIPE = """
name: weak
task: weak-segmentation
data: {kind: voc-labels, root: ROOT, test: test, saliency: saliency, size: 32, batch: 3, workers: 0}
student: {kind: cam, backbone: test_resnet, output_stride: 8, head_bias: true}
distillers:
  - {kind: local-to-global, crops: 2, share: 0.75, name: l2g}
  - {kind: local-to-global, crops: 2, share: 0.75, saliency: true, name: l2g_saliency}
cam: {scales: [1.0], flip: false, thresholds: [0.2, 0.4]}
masks: {threshold: null}
segment:
  student: {kind: deeplab, backbone: test_resnet, channels: 8, output_stride: 32}
  data: {size: 32, batch: 3, augment: {scale: [0.8, 1.2]}}
train: {epochs: 1, threads: 1, optimizer: {kind: adamw, lr: 1e-2}, schedule: {kind: poly, warmup: 0}}
evaluate: {split: test}
compare:
  - {row: plain, distillers: none}
  - {row: L2G, distillers: [l2g]}
  - {row: L2G with saliency, distillers: [l2g_saliency]}
  - {row: true masks, distillers: none, masks: "true", train: {epochs: 0}}
"""


def shapes(number, size=(40, 48), shown=None):
    """A picture uint8 (H, W, 3) and its mask: a disc, or a square, or both, each of its colour, on noise."""
    rng = np.random.default_rng(number)
    height, width = size
    mask = np.zeros(size, np.uint8)
    y, x = np.indices(size)
    shown = 1 + number % 3 if shown is None else shown
    if shown & 1:
        mask[np.hypot(y - rng.integers(10, height - 10), x - rng.integers(10, width - 10)) < 8] = 1
    if shown & 2:
        top, left = rng.integers(2, height - 14), rng.integers(2, width - 14)
        mask[top : top + 10, left : left + 10] = 2
    colours = np.array([(90, 90, 90), (40, 60, 220), (220, 60, 40)])
    return np.clip(colours[mask] + rng.normal(0, 20, (*size, 3)), 0, 255).astype(np.uint8), mask


def weak_folder(root, splits=SPLITS, size=(40, 48)):
    of = {}
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for at, (split, number) in enumerate(splits):
        names = [f"{split}{i}" for i in range(number)]
        for i, name in enumerate(names):
            picture, mask = shapes(100 * at + i, size)
            save(root / "JPEGImages" / f"{name}.png", picture)
            palette(root / "SegmentationClass" / f"{name}.png", mask)
            save(root / "saliency" / f"{name}.png", 255 * (mask > 0))
            of[name] = [CLASSES[label] for label in np.unique(mask) if label]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    labels(root, of, CLASSES)
    return root


def recipe_of(folder, *changes, text=RECIPE):
    """The recipe on the set in ``folder``, whose runs go there, too."""
    (folder / "weak.yaml").write_text(text.replace("ROOT", str(folder / "set")))
    return load(folder / "weak.yaml", [f"output={folder}", *changes])


def alone(*changes):
    """Changes that leave one row, a classifier that learns from labels alone, and what comes after it out."""
    return ["distillers=[]", "segment=null", "data.saliency=null", "compare=[student]", *changes]


def table_of(run_folder):
    return {row["row"]: row for row in json.loads((run_folder / "table.json").read_text())}


def files_in(folder):
    """Bytes of all files below a folder, by path, but for the lock."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock"}


def picture(path, number=7, size=(30, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(shapes(number, size)[0]).save(path)
    return path
