"""Scoring rotated boxes against plain loops with shapely, which give the same numbers; and the memory that it takes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import peak_bytes
from distillkit.bench.report import table
from distillkit.bench.timing import race
from distillkit.evaluation.rotated import RULES, rotated_metrics
from tests.plain_rotated import plain_metrics, random_data

PICTURES, OBJECTS, CLASSES = 1000, 100, 15
NAMES = [f"class {i}" for i in range(CLASSES)]


def tables(rounds: int, seed: int = 0) -> list[str]:
    """Two Markdown tables: time, with a turn in every twelve rounds, and memory."""
    return [
        f"{PICTURES} pictures of {OBJECTS} boxes, {CLASSES} classes: AP at 10 thresholds by three rules. The loops, "
        "too, compute no overlap where the upright boxes around two boxes are apart.\n\n"
        + times(max(1, rounds // 12), seed),
        "Memory on top of the boxes, at its peak.\n\n" + memory(seed),
    ]


def times(rounds: int, seed: int) -> str:
    data = random_data(PICTURES, OBJECTS, CLASSES, seed)
    usual = partial(plain, *data)
    forms: dict[str, Callable[[], Tensor]] = {
        "plain loops, shapely": usual,
        "plain loops, again": lambda: usual(),
        "distillkit": partial(ours, *data),
    }
    results, seconds = race(forms, rounds)
    (reference, *_), (base, *_) = results.values(), seconds.values()
    rows = [
        [name, f"{seconds[name]:.2f}", f"{seconds[name] / base:.3f}", f"{(result - reference).abs().max():.0e}"]
        for name, result in results.items()
    ]
    return table(["form", "median CPU s", "ratio", "largest difference of an AP"], rows)


def plain(predictions: list[dict[str, Any]], truth: list[dict[str, Any]]) -> Tensor:
    """AP and AP50 by class and rule."""
    aps = plain_metrics(predictions, truth, NAMES)
    by_threshold = torch.tensor([aps[name][rule] for name in NAMES for rule in RULES], dtype=torch.float64)
    return torch.stack([by_threshold.mean(1), by_threshold[:, 0]], 1)


def ours(predictions: list[dict[str, Any]], truth: list[dict[str, Any]]) -> Tensor:
    rows = rotated_metrics(predictions, truth, NAMES).classes
    values = [[rows[n].rules[f"{what}_{rule}"] for what in ("AP", "AP50")] for n in NAMES for rule in RULES]
    return torch.tensor(values, dtype=torch.float64)


def memory(seed: int) -> str:
    """By number of pictures, each in a process of its own."""
    sizes = (PICTURES // 4, PICTURES, 4 * PICTURES)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        used = pool.map(bytes_used, sizes, [seed] * len(sizes))
        rows = [[f"{n}", f"{n * OBJECTS:,}", f"{b / 2**20:.0f}"] for n, b in zip(sizes, used)]
    return table(["pictures", "detections", "peak MiB"], rows)


def bytes_used(pictures: int, seed: int) -> int:
    data = random_data(pictures, OBJECTS, CLASSES, seed)
    before = peak_bytes(fresh=True)
    ours(*data)
    return peak_bytes() - before
