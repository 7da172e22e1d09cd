"""Overlaps of rotated boxes and their suppression, against torchvision's op and shapely.

python -m benchmarks.rotated --write benchmarks/results/rotated.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import shapely
import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks import rotated_evaluation
from benchmarks.machine import heading, peak_bytes, write
from distillkit.bench.counting import live_bytes
from distillkit.bench.report import table
from distillkit.bench.timing import race
from distillkit.boxes.rotated import corners, from_torchvision, to_torchvision
from distillkit.boxes.rotated_iou import aligned_rotated_iou, pairwise_rotated_iou
from distillkit.boxes.rotated_nms import rotated_nms
from tests.rotated_pairs import KINDS, by_shapely, some_pairs

Form = Callable[[], Tensor]
BOXES, OBJECTS, CLASSES, IOU = 20_000, 400, 15, 0.1


def tables(rounds: int, seed: int = 0) -> list[str]:
    """Four Markdown tables: time of overlaps, their errors, suppression, memory."""
    return [
        "Overlaps forward, float32. shapely takes the pairs that its tree finds, and a turn in every six rounds.\n\n"
        + overlaps(rounds, seed),
        errors(),
        f"Suppression of {BOXES:,} boxes in {CLASSES} classes at an overlap of {IOU}. The loop takes the best box left "
        "of a class and drops those left whose overlap with it, by torchvision's op, is larger.\n\n"
        + suppression(max(2, rounds // 6), seed),
        "Memory on top of the boxes, all of which overlap.\n\n" + memory(seed),
    ]


# ---- overlaps


def overlaps(rounds: int, seed: int) -> str:
    cases = {
        "1000 x 1000, spread over 1024 pixels": (1000, 1024),
        "200 x 200, all overlap": (200, 20),
        "10 x 10, all overlap": (10, 20),
    }
    rows = []
    for what, (number, spread) in cases.items():
        a, b = random_boxes(number, spread, seed), random_boxes(number, spread, seed + 1)
        theirs = to_torchvision(a), to_torchvision(b), "cxcywhr"
        forms: dict[str, Form] = {
            "torchvision": partial(box_iou, *theirs),
            "torchvision, again": partial(box_iou, *theirs),
            "distillkit": partial(pairwise_rotated_iou, a, b),
            "shapely": partial(pairwise_by_shapely, a, b),
        }
        results, seconds = race(forms, rounds, ("shapely",))
        for name, result in results.items():
            error = (result - results["shapely"]).abs().max().item()
            took, ratio = seconds[name], seconds[name] / seconds["torchvision"]
            cost = [f"{took * 1e3:.2f}", f"{took / number**2 * 1e9:.1f}", f"{ratio:.2f}"]
            rows.append([what, name, *cost, f"{error:.0e}"])
    return table(["what", "form", "median CPU ms", "ns a pair", "ratio", "largest difference from shapely"], rows)


def random_boxes(number: int, spread: float, seed: int) -> Tensor:
    """Sides of 8 to 60 pixels, centres within ``spread`` pixels, any angle."""
    g = torch.Generator().manual_seed(seed)
    place, size = torch.rand(number, 2, generator=g) * spread, torch.rand(number, 2, generator=g) * 52 + 8
    return torch.cat([place, size, (torch.rand(number, 1, generator=g) - 0.5) * math.pi], 1)


def pairwise_by_shapely(a: Tensor, b: Tensor) -> Tensor:
    first, second = (shapely.polygons(corners(boxes.double()).numpy()) for boxes in (a, b))
    i, j = shapely.STRtree(second).query(first, predicate="intersects")
    shared = shapely.area(shapely.intersection(first[i], second[j], grid_size=1e-9))
    result = torch.zeros(len(a), len(b), dtype=torch.float64)
    result[i, j] = torch.from_numpy(shared / (shapely.area(first)[i] + shapely.area(second)[j] - shared))
    return result


def errors(number: int = 1000) -> str:
    """The largest differences from shapely by kind of pair, and what one box and itself turned come to."""
    rows = []
    for kind in KINDS:
        a, b = some_pairs(kind, number)
        want = by_shapely(a, b)
        found = [
            torchvision_pairs(a, b),
            torchvision_pairs(a.float(), b.float()),
            aligned_rotated_iou(a, b),
            aligned_rotated_iou(a.float(), b.float()),
        ]
        rows.append([kind, *(f"{(got - want).abs().max():.0e}" for got in found)])
    heads = ["torchvision, float64", "torchvision, float32", "distillkit, float64", "distillkit, float32"]
    box, turned = (torch.tensor([[100, 50, 60, 20, degrees]], dtype=torch.float64) for degrees in (0, 360))
    theirs = box_iou(box, turned, fmt="cxcywhr").item()
    mine = aligned_rotated_iou(from_torchvision(box), from_torchvision(turned)).item()
    return (
        f"Largest difference from shapely, {number:,} pairs of a kind, sides of 1 to 1000 pixels.\n\n"
        f"{table(['pair', *heads], rows)}\n\n"
        "An upright box of 60 x 20 with itself turned by 360 degrees, in float64: "
        f"torchvision {theirs:.4f}, distillkit {mine:.4f}."
    )


def torchvision_pairs(a: Tensor, b: Tensor) -> Tensor:
    parts = zip(to_torchvision(a).split(50), to_torchvision(b).split(50), strict=True)
    return torch.cat([box_iou(x, y, fmt="cxcywhr").diagonal() for x, y in parts])


# ---- suppression


def suppression(rounds: int, seed: int) -> str:
    rows = []
    for what, (boxes, scores, labels) in {
        f"{OBJECTS} heaps of {BOXES // OBJECTS}": heaps(seed),
        "spread over 4096 pixels": spread_out(seed),
    }.items():
        forms: dict[str, Form] = {
            "loop on torchvision's op": partial(greedy_loop, boxes, scores, labels),
            "loop, again": partial(greedy_loop, boxes, scores, labels),
            "distillkit": partial(rotated_nms, boxes, scores, labels, IOU),
        }
        results, seconds = race(forms, rounds)
        for name, result in results.items():
            took, ratio = seconds[name], seconds[name] / seconds["loop on torchvision's op"]
            only = len(set(result.tolist()) ^ set(results["loop on torchvision's op"].tolist()))
            rows.append([what, name, f"{took * 1e3:.0f}", f"{ratio:.3f}", f"{len(result)}", f"{only}"])
    return table(["boxes", "form", "median CPU ms", "ratio", "kept", "kept by one of both"], rows)


def heaps(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """As a detector gives them: around each object many boxes, nearly all of its class."""
    g = torch.Generator().manual_seed(seed)
    of = torch.randint(0, OBJECTS, (BOXES,), generator=g)
    boxes = random_boxes(OBJECTS, 2048, seed)[of]
    boxes = boxes + torch.randn(BOXES, 5, generator=g) * torch.tensor([2, 2, 2, 2, 0.1])
    boxes[:, 2:4] = boxes[:, 2:4].clamp(min=2)
    wrong = torch.rand(BOXES, generator=g) < 0.1
    labels = torch.where(wrong, torch.randint(0, CLASSES, (BOXES,), generator=g), of % CLASSES)
    return boxes, torch.rand(BOXES, generator=g), labels


def spread_out(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nearly all are kept, which costs most."""
    g = torch.Generator().manual_seed(seed)
    return (
        random_boxes(BOXES, 4096, seed),
        torch.rand(BOXES, generator=g),
        torch.randint(0, CLASSES, (BOXES,), generator=g),
    )


def greedy_loop(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    theirs = to_torchvision(boxes)
    kept = []
    for label in labels.unique():
        left = (labels == label).nonzero()[:, 0]
        left = left[scores[left].argsort(descending=True, stable=True)]
        while len(left):
            kept.append(left[0])
            near = box_iou(theirs[left[:1]], theirs[left[1:]], fmt="cxcywhr")[0] > IOU
            left = left[1:][~near]
    chosen = torch.stack(kept)
    return chosen[scores[chosen].argsort(descending=True, stable=True)]


# ---- memory


def memory(seed: int) -> str:
    rows = []
    for number in (500, 1000, 2000):
        a, b = random_boxes(number, 20, seed), random_boxes(number, 20, seed + 1)
        forward = measured(partial(pairwise_rotated_iou, a, b))
        both = measured(partial(forward_and_backward, a.clone().requires_grad_(), b))
        rows.append([f"{number} x {number}", f"{number**2 * 4 / 2**20:.0f}", *forward, *both])
    head = ["boxes", "result MiB", "forward, peak MiB", "kept bytes", "with backward, peak MiB", "kept bytes"]
    return table(head, rows)


def forward_and_backward(a: Tensor, b: Tensor) -> None:
    pairwise_rotated_iou(a, b).mean().backward()


def measured(run: Callable[[], object]) -> list[str]:
    """Peak MiB, and bytes of tensors alive after three more calls, their results dropped, less those alive before."""
    run()
    before, alive = peak_bytes(fresh=True), live_bytes()
    run()
    peak = peak_bytes() - before
    for _ in range(2):
        run()
    return [f"{peak / 2**20:.0f}", f"{live_bytes() - alive}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--write", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        heading("Rotated boxes, as ratios", f"python -m benchmarks.rotated --rounds {args.rounds}", seed=0),
        "One thread, process CPU time; medians over the rounds.",
        *tables(args.rounds),
        "## Evaluation",
        *rotated_evaluation.tables(args.rounds),
    ]
    write("\n\n".join(parts), args.write)


if __name__ == "__main__":
    main()
