"""What the regions' `overlap` does on real rotated objects: how many anchors it chooses, and how many of them overlap
nothing.

    DISTILLKIT_DATA=/data python -m benchmarks.rotated_regions --write benchmarks/results/rotated_regions.md

Counted on the training pictures of HIT-UAV with the anchors of both rotated detectors; no model is trained for it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.machine import heading, write
from distillkit.bench.report import table
from distillkit.boxes.merged import Merged
from distillkit.boxes.overlap import Overlap, pairwise_overlap
from distillkit.boxes.regions import Main, Region, Valuable, matched
from distillkit.core.views import BoxTargets, DenseDetections
from distillkit.recipe import load
from distillkit.training import build
from distillkit.training.figures import Sample, dense_views

#: anchors below overlap an object so little that their boxes say next to nothing of it
LITTLE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, makers in {"rotated-gfl": (Main, Valuable), "rotated-retina": (Merged,)}.items():
        recipe = load("ld_hit_uav", [f"student.kind={kind}", "student.bins=9"])
        data = build.build_data(recipe, "train", augmented=False)
        model = build.build_model(recipe.student, len(data.classes), recipe.evaluate)
        samples = [data[0, i] for i in range(len(data))]
        views = dense_views([model], samples[0])
        for maker in makers:
            for overlap in get_args(Overlap):
                region = maker(overlap=overlap)
                counted = [of_picture(region, views[0], sample) for sample in samples if len(sample[1]["boxes"])]
                rows.append([kind, region.name, overlap, *summed_up(counted)])
    head = [
        "detector",
        "region",
        "overlap",
        "anchors an object",
        f"IoU below {LITTLE}, %",
        "mean IoU",
        "objects without, %",
    ]
    text = [
        heading("Regions on rotated objects", "python -m benchmarks.rotated_regions", seed="none"),
        "Training tiles of HIT-UAV. IoU: of a chosen anchor, as it is, with the object that it overlaps most, as that "
        "is. Objects without: no chosen anchor overlaps them most.",
        table(head, rows),
    ]
    write("\n\n".join(text), args.write)


def of_picture(region: Region, view: DenseDetections, sample: Sample) -> tuple[Tensor, int, int]:
    """IoU of each chosen anchor with its nearest object, how many objects there are, and how many have none."""
    image, target = sample
    targets = BoxTargets([target["boxes"]], [target["labels"]], [(image.shape[-2], image.shape[-1])])
    where, weights = region(view, targets, "one", dense=True)
    assert where.index is None
    (m,) = matched(view, targets)
    iou, nearest = pairwise_overlap(target["boxes"], m.anchors[weights > 0]).max(0)
    return iou, len(target["boxes"]), len(target["boxes"]) - len(nearest.unique())


def summed_up(counted: list[tuple[Tensor, int, int]]) -> list[str]:
    iou = torch.cat([row[0] for row in counted])
    objects, without = sum(row[1] for row in counted), sum(row[2] for row in counted)
    little = statistics.fmean((iou < LITTLE).tolist())
    return [f"{len(iou) / objects:.1f}", f"{100 * little:.1f}", f"{iou.mean():.3f}", f"{100 * without / objects:.1f}"]


if __name__ == "__main__":
    main()
