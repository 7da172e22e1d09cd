"""How much of each class lies in the boundary band that FakeMix cuts out of pictures and pastes into others.

    DISTILLKIT_DATA=/data python -m benchmarks.bands benchmarks/camvid.yaml

FakeMix (arXiv:2103.13279) is for objects that are much wider than the band along their boundary: what it pastes keeps
no label, and teaches that a boundary alone is no object. An object thinner than the band is pasted whole. Writes
benchmarks/results/NAME_bands.md for the training split of recipe NAME, as its boundaries are made there.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.machine import heading
from benchmarks.seeds import RESULTS
from distillkit.bench.report import table
from distillkit.losses.segmentation import IGNORE
from distillkit.recipe import load
from distillkit.schema import SegmentationRecipe
from distillkit.training import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of segmentation, with data.boundary")
    args = parser.parse_args()
    recipe = load(args.recipe, [])
    if not isinstance(recipe, SegmentationRecipe) or recipe.data.boundary is None:
        parser.error(f"{args.recipe} needs task: segmentation and data.boundary")
    data = build.build_data(recipe, "train", augmented=True)
    inside, total = counted(data)
    whole = inside.sum() / total.sum()
    rows = [[name, 100 * (i / t).item()] for name, i, t in zip(data.classes, inside, total, strict=True) if t]
    parts = [
        heading(f"{recipe.name}: the boundary band", f"python -m benchmarks.bands {args.recipe}", recipe.seed),
        f"Share of the pixels that lie in the band, in per cent, {len(data)} pictures of the training split; of all "
        f"labelled pixels {100 * whole:.1f}.",
        table(["class", "in the band"], [[name, f"{share:.0f}"] for name, share in rows]),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    (RESULTS / f"{recipe.name}_bands.md").write_text(text, encoding="utf-8")


def counted(data: torch.utils.data.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of each class in the band, and in all: (C,) each."""
    classes = len(data.classes)
    inside, total = torch.zeros(classes), torch.zeros(classes)
    for index in range(len(data)):
        _, target = data[0, index]
        mask, band = target["mask"].flatten(), target["boundary"].flatten() > 0
        known = mask != IGNORE
        inside += torch.bincount(mask[known & band], minlength=classes)
        total += torch.bincount(mask[known], minlength=classes)
    return inside, total


if __name__ == "__main__":
    main()
