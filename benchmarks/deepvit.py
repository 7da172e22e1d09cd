"""How alike the attention maps of neighbouring blocks are, in the networks that benchmarks/deepvit.yaml trained.

    DISTILLKIT_DATA=/data python -m benchmarks.seeds benchmarks/deepvit.yaml --seeds 1
    DISTILLKIT_DATA=/data python -m benchmarks.deepvit --write benchmarks/results/deepvit_similarity.md

The first command trains, the second reads the weights it left below runs/, and draws the plot beside the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.machine import heading, write
from benchmarks.seeds import cell
from distillkit.bench.report import table
from distillkit.evaluation.attention import AttentionSimilarity, adjacent_similarity, attention_maps, plot_similarity
from distillkit.evaluation.classes import normalised
from distillkit.recipe import load, slug, student_of
from distillkit.schema import Recipe, Row
from distillkit.training import build, checkpoint

RECIPE = "benchmarks/deepvit.yaml"
HIGH = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="0 .. SEEDS-1 were trained")
    parser.add_argument("--pictures", type=int, default=64, help="of the test split")
    parser.add_argument("--write", type=Path, help="write the table to this file, too, and the plot beside it")
    args = parser.parse_args()
    recipe = load(RECIPE, [])
    found = {
        row.row: [measured(recipe, row, seed, args.pictures) for seed in range(args.seeds)] for row in recipe.compare
    }
    head = ["network", "n", "mean similarity", "of the last half", "similar pairs", "the same, untrained"]
    rows = [[name, str(args.seeds), *cells(of)] for name, of in found.items()]
    command = f"python -m benchmarks.deepvit --seeds {args.seeds}"
    text = [
        heading("Attention maps of neighbouring blocks", command, seed=", ".join(map(str, range(args.seeds)))),
        f"Of networks trained by `python -m benchmarks.seeds {RECIPE} --seeds {args.seeds}` on {args.pictures} test "
        "pictures: the cosine over the queries of what a token gives to all others, in a block and in the next "
        "(`distillkit.evaluation.attention`), its mean over tokens, heads, pictures and pairs of blocks. A pair is "
        f"similar where {HIGH:.0%} of its entries are above {HIGH}.",
        table(head, rows),
    ]
    if args.write is not None:
        figure = plot_similarity({name: of[0][0] for name, of in found.items()})
        figure.savefig(args.write.with_suffix(".png"), dpi=120)
        text.append(f"![similarity over the depth, seed 0]({args.write.with_suffix('.png').name})")
    write("\n\n".join(text), args.write)


@torch.inference_mode()
def measured(recipe: Recipe, row: Row, seed: int, pictures: int) -> tuple[AttentionSimilarity, AttentionSimilarity]:
    """Of the trained network, and of the same as it began."""
    data = build.build_data(recipe, recipe.evaluate.split, augmented=False)
    step = max(1, len(data) // pictures)  # the pictures lie class by class
    images = torch.stack([data[0, i][0] for i in range(0, step * pictures, step)])
    checkpoint.seed_everything(seed)
    model = build.build_model(student_of(recipe, row.student), len(data.classes), recipe.evaluate).eval()
    before = adjacent_similarity(attention_maps(model, normalised(model, images)), HIGH)
    weights = Path(recipe.output) / recipe.name / cell(recipe, row, seed) / slug(row.row) / "final.safetensors"
    if not weights.exists():
        raise SystemExit(
            f"{weights}: no such file; train first: python -m benchmarks.seeds {RECIPE} --seeds {seed + 1}"
        )
    checkpoint.load_into(model, weights)
    return adjacent_similarity(attention_maps(model, normalised(model, images)), HIGH), before


def cells(of: list[tuple[AttentionSimilarity, AttentionSimilarity]]) -> list[str]:
    after = [trained for trained, _ in of]
    pairs = len(after[0].mean)
    return [
        f"{fmean(float(x.mean.mean()) for x in after):.3f}",
        f"{fmean(float(x.mean[pairs // 2 :].mean()) for x in after):.3f}",
        f"{fmean(float((x.similar > HIGH).sum()) for x in after):g} of {pairs}",
        f"{fmean(float(x.mean.mean()) for _, x in of):.3f}",
    ]


if __name__ == "__main__":
    main()
