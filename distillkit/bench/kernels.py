"""What the localization distillation loss and its region cost, against the forms they are usually written in.

Two pictures of 800 x 1333 through a pyramid of strides 8 to 128: 44,600 anchors of 4 edges of 17 bins, 5 % of them in
the region.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.bench import masks
from distillkit.bench.suite import Check, Result, Table, Tell, silent
from distillkit.bench.timing import race
from distillkit.boxes.anchors import grid_anchors
from distillkit.boxes.assign import atss
from distillkit.boxes.iou import centre_distance, enclosing_diagonal, pairwise_iou
from distillkit.boxes.maps import Maps, where_of
from distillkit.boxes.regions import valuable_weight
from distillkit.losses.kl import kl_divergence

IMAGES, HEIGHT, WIDTH = 2, 800, 1333
STRIDES = (8, 16, 32, 64, 128)
SIZES = tuple((math.ceil(HEIGHT / s), math.ceil(WIDTH / s)) for s in STRIDES)
COUNTS = tuple(h * w for h, w in SIZES)
BINS, TEMPERATURE, BOXES, GAMMA = 17, 10.0, 20, 0.25


#: of the usual form's time
MOST_LOSS, MOST_REGION = 0.45, 0.5
LARGEST = 1e-6  # relative difference of what the forms give


def run(quick: bool, rounds: int, tell: Tell = silent) -> Result:
    """All forms of a row take turns, and the usual one runs twice."""
    checks, data, rows = [], {}, []
    kinds = (
        ("LD loss, forward and backward", loss_forms(0), MOST_LOSS, "distillkit: gathered first"),
        (f"valuable region, {BOXES} boxes a picture", region_forms(0), MOST_REGION, "distillkit: by threshold"),
    )
    for done, (what, forms, most, ours) in enumerate(kinds):
        tell(what, done, 2 + masks.PARTS)
        found = timed(forms, 3 * rounds)
        usual = next(iter(found))
        data[what] = found
        rows += [
            [what, name, f"{1e3 * row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['difference']:.0e}"]
            for name, row in found.items()
        ]
        noise = abs(found[f"{usual.split(':')[0]}, again"]["ratio"] - 1)
        row = found[ours]
        checks += [
            Check(
                f"kernels, {what}: time over the usual form",
                row["ratio"] <= most + 3 * noise,
                f"{row['ratio']:.2f}; at most {most:.2f} and 3 x {noise:.2f} of noise",
            ),
            Check(
                f"kernels, {what}: the same result",
                row["difference"] <= LARGEST,
                f"relative difference {row['difference']:.0e}; at most {LARGEST:.0e}",
            ),
        ]
    ours_and_usual = Table(
        "Localization distillation and its region",
        ["what", "form", "median CPU ms", "ratio", "largest difference (relative)"],
        rows,
        f"{IMAGES} pictures of {HEIGHT} x {WIDTH}, {IMAGES * sum(COUNTS):,} anchors, 5 % of them in the region.",
    )
    tables, more, numbers = masks.measured(
        max(2, rounds // 2) if quick else rounds, lambda what, done: tell(what, 2 + done, 2 + masks.PARTS)
    )
    return Result(
        "What do the localization distillation loss and its region cost against the forms they are usually written in, "
        "and what does learning masks cost over its networks alone? One thread, process CPU time, medians.",
        [ours_and_usual, *tables],
        checks + more,
        {**data, **numbers},
    )


def timed(forms: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    """Of each form: CPU seconds, over the first form's, and how far what it gives is from what the first one gives."""
    results, medians = race(forms, rounds)
    reference, base = next(iter(results.values())), next(iter(medians.values()))
    return {
        name: {
            "seconds": took,
            "ratio": took / base,
            "difference": float((results[name] - reference).abs().max() / reference.abs().max()),
        }
        for name, took in medians.items()
    }


def loss_forms(seed: int) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ([torch.randn(IMAGES, 4 * BINS, h, w, generator=generator) for h, w in SIZES] for _ in range(2))
    for level in student:
        level.requires_grad_()
    weight = torch.rand(IMAGES, sum(COUNTS), generator=generator)
    weight = weight * (torch.rand(weight.shape, generator=generator) < 0.05)

    def run(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            for level in student:
                level.grad = None
            value = loss()
            value.backward()
            return value.detach()

        return step

    usual = run(lambda: loss_per_level(student, teacher, weight))
    return {
        "usual: each level permuted, then masked": usual,
        "usual, again": lambda: usual(),
        "distillkit: gathered first": run(lambda: loss_gathered(student, teacher, weight)),
    }


def loss_per_level(student: list[Tensor], teacher: list[Tensor], weight: Tensor) -> Tensor:
    total = torch.zeros(())
    for s, t, w in zip(student, teacher, weight.split(list(COUNTS), 1)):
        s = s.permute(0, 2, 3, 1).reshape(-1, 4 * BINS)
        t = t.permute(0, 2, 3, 1).reshape(-1, 4 * BINS)
        w = w.reshape(-1)
        mask = w > 0
        s, t = s[mask].reshape(-1, BINS), t[mask].reshape(-1, BINS)
        target = F.softmax(t / TEMPERATURE, 1)
        rows = F.kl_div(F.log_softmax(s / TEMPERATURE, 1), target, reduction="none").mean(1) * TEMPERATURE**2
        total = total + (rows * w[mask].repeat_interleave(4)).sum() / 4
    return total


def loss_gathered(student: list[Tensor], teacher: list[Tensor], weight: Tensor) -> Tensor:
    where, w = where_of(weight, COUNTS, SIZES)
    s, t = Maps(tuple(student), (4, BINS)).at(where), Maps(tuple(teacher), (4, BINS)).at(where)
    return (w * kl_divergence(s, t, TEMPERATURE).mean(-1)).sum()


def region_forms(seed: int) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pictures = [random_boxes(generator) for _ in range(IMAGES)]
    anchors = grid_anchors(SIZES, STRIDES, 0.0, 8.0, "cpu")

    def of_batch(region: Callable[..., Tensor], *options: Any) -> Callable[[], Tensor]:
        return lambda: torch.stack([region(anchors, boxes, *options) for boxes in pictures])

    return {
        "usual: every anchor sorted by distance": of_batch(region_sorted),
        "usual, again": of_batch(region_sorted),
        "usual, on distillkit's overlaps": of_batch(region_sorted, fast_overlaps),
        "distillkit: by threshold": of_batch(region_by_threshold),
    }


def random_boxes(generator: torch.Generator) -> Tensor:
    corner = torch.rand(BOXES, 2, generator=generator) * torch.tensor([WIDTH * 0.7, HEIGHT * 0.7])
    return torch.cat([corner, corner + torch.rand(BOXES, 2, generator=generator) * 250 + 16], 1)


def region_by_threshold(anchors: Tensor, boxes: Tensor) -> Tensor:
    iou = pairwise_iou(boxes, anchors)
    threshold = atss(anchors, COUNTS, boxes, iou=iou).threshold
    return valuable_weight(anchors, boxes, threshold, GAMMA, iou=iou)


def region_sorted(anchors: Tensor, boxes: Tensor, overlaps: Callable | None = None) -> Tensor:
    """Candidates of two kinds by the same routine: the 9 nearest anchors of a level, and all of them."""
    iou, diou, distance = (overlaps or usual_overlaps)(anchors, boxes)
    few, every, start = [], [], 0
    for level in distance.split(list(COUNTS)):
        few.append(level.topk(min(9, len(level)), dim=0, largest=False).indices + start)
        every.append(level.topk(len(level), dim=0, largest=False).indices + start)
        start += len(level)
    candidates = iou.gather(0, torch.cat(few))
    threshold = candidates.mean(0) + candidates.std(0)
    index = torch.cat(every)
    measure = diou.gather(0, index)
    selected = (measure >= GAMMA * threshold) & (measure < threshold)
    weight = torch.zeros_like(iou).scatter(0, index, torch.where(selected, iou.gather(0, index), 0.0))
    return weight.amax(1)


def usual_overlaps(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, DIoU and distance of the centres, (N, k), with corners kept as pairs."""
    a, b = anchors[:, None], boxes[None]
    inter = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    iou = inter / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter)
    apart = ((a[..., :2] + a[..., 2:]) / 2 - (b[..., :2] + b[..., 2:]) / 2).square().sum(-1)
    around = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).square().sum(-1)
    return iou, iou - apart / around, apart.sqrt()


def fast_overlaps(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = anchors[:, None], boxes[None]
    iou, apart = pairwise_iou(anchors, boxes), centre_distance(a, b)
    return iou, iou - apart / enclosing_diagonal(a, b), apart.sqrt()
