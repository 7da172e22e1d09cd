"""Activation maps of each row, read as logits and as probabilities.

    DISTILLKIT_DATA=/data SALIENCY=... python -m benchmarks.cam_reading benchmarks/coco_crops.yaml --seeds 3

Reads the classifiers that `python -m benchmarks.seeds` trained, which must still be below runs/. What L2G teaches is
the softmax of the maps; its release reads the maps themselves. Writes benchmarks/results/NAME_reading.md.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import heading
from benchmarks.seeds import RESULTS, cell
from distillkit.bench.report import table
from distillkit.recipe import load, slug, student_of
from distillkit.schema import WeakRecipe, WeakRow
from distillkit.training import build, checkpoint
from distillkit.training.evaluate import score


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    recipe = load(args.recipe, [])
    if not isinstance(recipe, WeakRecipe):
        parser.error(f"{args.recipe} needs task: weak-segmentation")
    data = build.build_data(recipe, recipe.evaluate.split, augmented=False)
    rows = []
    for row in recipe.compare:
        if row.masks == "true":
            continue
        reached = [scores(recipe, row, seed, data) for seed in range(args.seeds)]
        rows.append([row.row, *(spread(values) for values in zip(*reached, strict=True))])
        print(rows[-1], flush=True)
    command = f"python -m benchmarks.cam_reading {args.recipe} --seeds {args.seeds}"
    text = "\n\n".join(
        [
            heading(f"{recipe.name}: how activation maps are read", command, f"0 to {args.seeds - 1}"),
            f"Mean IoU of the activation maps on `{recipe.evaluate.split}` at the best of the recipe's thresholds, in "
            "per cent: mean ± deviation over seeds.",
            table(["row", "as logits", "as probabilities"], rows),
        ]
    )
    (RESULTS / f"{recipe.name}_reading.md").write_text(text + "\n", encoding="utf-8")


def scores(recipe: WeakRecipe, row: WeakRow, seed: int, data: Any) -> tuple[float, float]:
    """Of the row's classifier, its maps read as logits and as probabilities."""
    folder = Path(recipe.output) / recipe.name / cell(recipe, row, seed) / slug(row.row)
    found = []
    for softmax in (False, True):
        config = student_of(recipe, {**row.student, "softmax": softmax, "pretrained": False})
        model = build.build_model(config, len(data.classes), recipe.evaluate)
        checkpoint.load_into(model, folder / "final.safetensors")
        found.append(score(recipe, model, data).numbers["cam_miou"])
    return found[0], found[1]


def spread(values: tuple[float, ...]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
