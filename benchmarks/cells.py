"""How right an annotator is in its cells, beside how right it is about whole pictures.

    DISTILLKIT_DATA=/data python -m benchmarks.seeds benchmarks/sign_digits.yaml --seeds 5
    DISTILLKIT_DATA=/data python -m benchmarks.cells benchmarks/sign_digits.yaml

The first command trains the teacher, the second reads its weights from below runs/: what it says of a cell is what
token labels teach.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.machine import heading, write
from benchmarks.seeds import teacher_cell
from distillkit.adapters.classifier import TokenClassifier
from distillkit.bench.report import table
from distillkit.evaluation.classes import normalised
from distillkit.recipe import load
from distillkit.schema import Recipe
from distillkit.training import build, checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--write", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load(args.recipe, [])
    text = [
        heading(f"{recipe.name}: the annotator's cells", f"python -m benchmarks.cells {args.recipe}", seed=recipe.seed),
        "Share of pictures, and of the cells of the annotator's last map, whose best class is the picture's, and the "
        "mean probability of that class in a cell; whole pictures, not augmented.",
        table(
            ["split", "pictures", "cells", "pictures right", "cells right", "probability in a cell"],
            [row(recipe, split) for split in ("train", recipe.evaluate.split)],
        ),
    ]
    write("\n\n".join(text), args.write)


@torch.inference_mode()
def row(recipe: Recipe, split: str) -> list[str]:
    data = build.build_data(recipe, split, augmented=False)
    ((name, config),) = build.teacher_configs(recipe).items()
    teacher = build.build_model(config, len(data.classes), recipe.evaluate).eval()
    folder = Path(recipe.output) / recipe.name / teacher_cell(recipe) / build.teacher_folder(name)
    checkpoint.load_into(teacher, folder / "final.safetensors")
    annotator = TokenClassifier(teacher)
    sums, cells = torch.zeros(3, dtype=torch.float64), (0, 0)
    for start in range(0, len(data), 64):
        items = [data[0, i] for i in range(start, min(start + 64, len(data)))]
        pictures = normalised(teacher, torch.stack([image for image, _ in items]))
        labels = torch.tensor([target["label"] for _, target in items])
        dense = annotator(pictures)
        cells = (dense.shape[2], dense.shape[3])
        of = labels[:, None, None]
        right = (dense.argmax(1) == of).double().mean((1, 2))
        sure = dense.softmax(1).gather(1, of[:, None].expand(-1, 1, *cells)).double().mean((1, 2, 3))
        sums += torch.stack([(teacher(pictures).argmax(1) == labels).double(), right, sure]).sum(1)
    shares = [f"{100 * float(x) / len(data):.1f}" for x in sums]
    return [split, str(len(data)), f"{cells[0]} x {cells[1]}", *shares]


if __name__ == "__main__":
    main()
