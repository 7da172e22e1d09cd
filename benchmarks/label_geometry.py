"""How well a stored label map follows a view of its picture: against pictures that show where they are, and against the
annotator run on the view itself.

    DISTILLKIT_DATA=/data python -m benchmarks.label_geometry --write benchmarks/results/label_geometry.md

Every view is drawn once and given to picture and map alike. `default` is what distillkit does; `release` repeats the
published reader, which exchanges x and y of every crop.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from benchmarks.machine import heading, write
from distillkit.bench.report import table
from distillkit.data.label_map import LabelMap, pooled
from distillkit.data.picture_list import list_pictures
from distillkit.models.backbones import LITE0_WHEEL
from distillkit.training.label import dense_logits, load_annotator

CELLS, K, VIEWED = 18, 5, 224
GRID = (14, 14)  # tokens of the view, in the first table
HEIGHT, WIDTH = 240, 320  # of the picture there
BILINEAR = F.InterpolationMode.BILINEAR
ANNOTATED = (
    "The map ({k} classes a cell) that the ImageNet annotator tf_efficientnet_lite0 makes of a whole picture of "
    "coco_mini, read for a view, beside what the annotator says of the view itself, in {pictures} pictures with a view "
    "each: share of tokens whose best class is the same, and the probability that the token's label gives to the "
    "annotator's best class. They differ where the annotator does: it sees a view larger and without what lies around, "
    "and it is not the same for a mirrored picture. `another token`: the label of a token of the same view drawn at "
    "random, which is what a map in the wrong place amounts to."
)
View = Callable[[Any], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=200, help="of each kind, in the first table")
    parser.add_argument("--pictures", type=int, default=64, help="of coco_mini, in the second")
    parser.add_argument("--write", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python -m benchmarks.label_geometry --views {args.views} --pictures {args.pictures}"
    text = [
        heading("Label maps and views", command, seed=0),
        f"A picture of {HEIGHT} x {WIDTH} pixels whose colours are the place in it, and a map of {CELLS} x {CELLS} "
        f"cells, each with a class of its own. Of each of {GRID[0]} x {GRID[1]} tokens of a view of {VIEWED} x "
        f"{VIEWED}: how far the mean place of the classes it is told is from the mean place of the pixels it shows, in "
        "cells. Tokens wholly in the picture, and a cell and a half from its border, where maps are flat.",
        table(["view", "mean", "99 %", "largest", "release: mean", "99 %", "largest"], places(args.views)),
    ]
    if "DISTILLKIT_DATA" in os.environ and importlib.util.find_spec(LITE0_WHEEL.replace("-", "_")):
        head = ["view", "same class", "probability", "release", "", "another token", ""]
        text += [ANNOTATED.format(k=K, pictures=args.pictures), table(head, agreement(args.pictures))]
    else:
        print(f"without the annotator: set DISTILLKIT_DATA, and pip install {LITE0_WHEEL}")
    write("\n\n".join(text), args.write)


def views(height: int, width: int, rng: random.Random) -> dict[str, View]:
    """One random view of each kind, of a picture of this size; all end with VIEWED x VIEWED pixels."""
    high, wide = (max(8, round(side * rng.uniform(0.3, 1))) for side in (height, width))
    top, left = rng.randint(0, height - high), rng.randint(0, width - wide)
    angle, shear, zoom = rng.uniform(-30, 30), rng.uniform(-17, 17), rng.uniform(0.9, 1.2)
    size = [VIEWED, VIEWED]

    def whole(x: Any) -> Any:
        return F.resize(x, size)

    def crop(x: Any) -> Any:
        return F.resized_crop(x, top, left, high, wide, size)

    def turned(x: Any) -> Any:
        return F.affine(x, angle, [0, 0], zoom, [shear, 0], BILINEAR)

    return {
        "resize": whole,
        "flip": lambda x: F.hflip(whole(x)),
        "crop": crop,
        "crop and flip": lambda x: F.hflip(crop(x)),
        "turned and sheared": lambda x: turned(whole(x)),
        "crop, flip, turned and sheared": lambda x: turned(F.hflip(crop(x))),
    }


def places(count: int) -> list[list[str]]:
    """Rows of the first table."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    picture = tv_tensors.Image(torch.stack([x / WIDTH, y / HEIGHT, torch.ones_like(x)]).double())
    numbers = torch.arange(CELLS * CELLS).reshape(1, CELLS, CELLS)
    label_map = LabelMap.from_stored(torch.ones(1, CELLS, CELLS), numbers, (HEIGHT, WIDTH))
    centre = torch.stack([torch.arange(CELLS).repeat(CELLS), torch.arange(CELLS).repeat_interleave(CELLS)]) + 0.5
    off: dict[tuple[str, str], list[Tensor]] = {}
    rng = random.Random(0)
    for _ in range(count):
        for name, view in views(HEIGHT, WIDTH, rng).items():
            sums = adaptive_avg_pool2d(view(picture).as_subclass(Tensor), GRID)
            true = sums[:2] / sums[2:].clamp(min=1e-9) * CELLS
            inner = (sums[2] > 1 - 1e-6) & (true > 1.5).all(0) & (true < CELLS - 1.5).all(0)
            for convention in known(name):
                found = pooled([view(label_map)], CELLS * CELLS, GRID, "zero", convention)  # type: ignore[arg-type]
                told = torch.einsum("nc,chw->nhw", centre, found.tokens[0])
                error = (told - true).square().sum(0).sqrt()
                off.setdefault((name, convention), []).append(error[inner])
    rows = []
    for name in views(HEIGHT, WIDTH, rng):
        cells = []
        for convention in ("default", "release"):
            errors = torch.cat(off[name, convention]) if (name, convention) in off else None
            cells += ["-"] * 3 if errors is None else [f"{number:.3f}" for number in spread(errors)]
        rows.append([name, *cells])
    return rows


def known(view: str) -> tuple[str, ...]:
    """The published reader moves its stored values for turned pictures, and does so before the crop."""
    return ("default",) if "turned" in view else ("default", "release")


def spread(errors: Tensor) -> tuple[float, float, float]:
    return float(errors.mean()), float(errors.sort().values[int(0.99 * (len(errors) - 1))]), float(errors.max())


@torch.inference_mode()
def agreement(count: int) -> list[list[str]]:
    """Rows of the second table."""
    annotator = load_annotator("tf_efficientnet_lite0", LITE0_WHEEL)
    mean, std = (
        torch.tensor(moment)[:, None, None] for moment in (annotator.preprocessing.mean, annotator.preprocessing.std)
    )
    pictures = list_pictures(Path(os.environ["DISTILLKIT_DATA"]) / "coco_mini/images")
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    sums: dict[tuple[str, str], Tensor] = {}
    tokens: dict[str, int] = {}

    def said(image: Tensor) -> Tensor:
        return dense_logits(annotator, ((image - mean) / std)[None].float()).cpu()[0]

    for index in range(count):
        image = tv_tensors.Image(F.to_dtype(F.to_image(pictures.read(index)), torch.float32, scale=True))
        height, width = image.shape[-2:]
        scores, indices = said(F.resize(image, [VIEWED, VIEWED])).topk(K, 0)
        label_map = LabelMap.from_stored(scores, indices, (height, width))
        for name, view in views(height, width, rng).items():
            logits = said(view(image))
            best, grid = logits.argmax(0).flatten(), tuple(logits.shape[1:])
            other = torch.randperm(len(best), generator=generator)
            for convention in known(name):
                labels = pooled([view(label_map)], len(logits), grid, convention=convention)  # type: ignore[arg-type]
                shares = labels.tokens[0].softmax(0).flatten(1)
                inside = labels.known[0].flatten() == 1
                forms = {convention: shares} | ({"another": shares[:, other]} if convention == "default" else {})
                for form, of in forms.items():
                    right = torch.stack([of.argmax(0) == best, of.gather(0, best[None])[0]])[:, inside].sum(1)
                    sums[name, form] = sums.get((name, form), 0) + right
            tokens[name] = tokens.get(name, 0) + int(inside.sum())
    return [
        [
            name,
            *(
                text
                for form in ("default", "release", "another")
                for text in (
                    [f"{float(x) / tokens[name]:.2f}" for x in sums[name, form]] if (name, form) in sums else ["-", "-"]
                )
            ),
        ]
        for name in tokens
    ]


if __name__ == "__main__":
    main()
