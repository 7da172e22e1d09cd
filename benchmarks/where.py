"""Which anchors the boxes of each row come from, and how good boxes and scores are there.

    DISTILLKIT_DATA=/data python -m benchmarks.where benchmarks/bccd.yaml --seeds 5

Reads the models that `python -m benchmarks.seeds` trained, which must still be below runs/, and looks at every anchor
of the main and of the valuable region of the judged split. A distiller that acts on one region changes the other, too:
the table shows how.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import heading, write
from benchmarks.seeds import RESULTS, cell, teacher_cell
from distillkit.bench.report import table
from distillkit.boxes.anchors import grid_points, grid_strides
from distillkit.boxes.assign import Matched
from distillkit.boxes.distribution import decode, integral
from distillkit.boxes.iou import pairwise_iou
from distillkit.boxes.regions import Valuable, matched, valuable_weight
from distillkit.core.views import BoxTargets
from distillkit.losses.kl import kl_divergence
from distillkit.recipe import Recipe, load, slug, student_of
from distillkit.training import build, checkpoint
from distillkit.training.build import DetectionData
from distillkit.training.figures import Sample, dense_views

HEAD = [
    "row",
    "n",
    "IoU main",
    "IoU valuable",
    "score main",
    "score valuable",
    "score ~ IoU",
    "KL to the teacher main",
    "KL valuable",
    "found from main",
]
FOUND = 0.5  # IoU from which on a box is one of the object


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load(args.recipe)
    data = build.build_data(recipe, recipe.evaluate.split, augmented=False)
    runs = Path(recipe.output) / recipe.name
    teacher = _teacher(recipe, runs, len(data.classes))
    rows = []
    for row in recipe.compare:
        measured = []
        for seed in range(args.seeds):
            weights = runs / cell(recipe, row, seed) / slug(row.row) / "final.safetensors"
            if weights.exists():
                model = build.build_model(student_of(recipe, row.student), len(data.classes), recipe.evaluate)
                checkpoint.load_into(model, weights)
                measured.append(measure(model, teacher, data))
        if measured:
            rows.append([row.row, str(len(measured)), *(_spread(list(values)) for values in zip(*measured))])
    text = [
        heading(
            f"Where the boxes of {recipe.name} come from",
            f"python -m benchmarks.where {args.recipe}",
            seed=f"0 to {args.seeds - 1}",
        ),
        f"On `{recipe.evaluate.split}`, mean ± deviation over n seeds. IoU: of an anchor's box with its object. Score: "
        "of the object's class. score ~ IoU: their rank correlation over the anchors of both regions. KL: of the "
        "edges' distributions, summed over the bins, T = 1. found from main: of the objects that are found, the share "
        "whose best-scored box comes from an anchor of the main region.",
        table(HEAD, rows),
    ]
    write("\n\n".join(text), RESULTS / f"{recipe.name}_where.md")


def _teacher(recipe: Recipe, runs: Path, classes: int) -> nn.Module:
    ((name, config),) = build.teacher_configs(recipe).items()
    model = build.build_model(config, classes, recipe.evaluate)
    checkpoint.load_into(model, runs / teacher_cell(recipe) / build.teacher_folder(name) / "final.safetensors")
    return model


def measure(student: nn.Module, teacher: nn.Module, data: DetectionData) -> list[float]:
    """The numbers of a row after its name and n."""
    pictures = [picture for i in range(len(data)) for picture in _anchors(student, teacher, data[0, i])]
    region, iou, score, kl = (torch.cat(column) for column in zip(*pictures))
    best = [row for picture in pictures for row in [_found(*picture[:3])] if row is not None]
    by_region = [[float(values[region == r].mean()) for r in (0, 1)] for values in (iou, score, kl)]
    (iou_main, iou_valuable), (score_main, score_valuable), (kl_main, kl_valuable) = by_region
    near = region < 2
    return [
        *(100 * value for value in (iou_main, iou_valuable, score_main, score_valuable)),
        100 * _rank_correlation(score[near], iou[near]),
        kl_main,
        kl_valuable,
        100 * statistics.fmean(best),
    ]


@torch.no_grad()
def _anchors(student: nn.Module, teacher: nn.Module, sample: Sample) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each object, all anchors: region (0 main, 1 valuable, 2 neither), IoU, score, KL to the teacher; each (N,)."""
    image, target = sample
    view, theirs = dense_views([student, teacher], sample)
    targets = BoxTargets([target["boxes"]], [target["labels"]], [(image.shape[-2], image.shape[-1])])
    assert view.edges is not None
    assert theirs.edges is not None
    edges, scores = view.edges.all()[0].float(), view.classes.all()[0].float().sigmoid()
    boxes = decode(
        grid_points(view.edges.sizes, view.strides, view.centre, "cpu"),
        integral(edges, view.support) * grid_strides(view.edges.sizes, view.strides, "cpu")[:, None],
    )
    kl = kl_divergence(edges, theirs.match(view).edges.all()[0].float(), bin_reduction="sum").mean(-1)  # type: ignore[union-attr]
    (m,) = matched(view, targets)
    for k, (box, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
        yield _region(m, box, k), pairwise_iou(boxes, box[None])[:, 0], scores[:, label], kl


def _region(m: Matched, box: Tensor, k: int) -> Tensor:
    valuable = Valuable()
    weight = valuable_weight(m.anchors, box[None], m.assignment.threshold[k : k + 1], valuable.gamma, valuable.measure)
    region = torch.where((weight > 0) & m.valid, 1, 2)
    return region.masked_fill(m.assignment.gt_index == k, 0)


def _found(region: Tensor, iou: Tensor, score: Tensor) -> bool | None:
    """Whether the best-scored box of an object that is found comes from its main region; None where it is not found."""
    right = iou >= FOUND
    if not bool(right.any()):
        return None
    return bool(region[int((score * right).argmax())] == 0)


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _spread(values: list[float]) -> str:
    form = ".2f" if max(values) < 2 else ".1f"
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
