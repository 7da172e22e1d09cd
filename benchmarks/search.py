"""What a search costs beside its candidates: evolution's own work, and evaluation over a bare forward pass.

    python -m benchmarks.search --out benchmarks/results/search.md

Evolution's own work is the time of a whole search whose fitness costs nothing, with a log, over its candidates:
drawing, checking, budgets from a table, and the log's lines. Evaluation is of AutoSpace's second stage: accuracy with
the weights of the network that holds all, over the bare forward passes of the same path on the same pictures.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import heading, write
from distillkit.bench.report import table
from distillkit.models.autospace_cells import CellSpace
from distillkit.models.autospace_network import Macro, Stage
from distillkit.search import Budget, Evolution, evolve
from distillkit.search.autospace.networks import NetworkSpace
from distillkit.search.autospace.supernet import Inherited, Supernet

ROUNDS = 5


class Orders:
    """24 layers of three types, as LV-BERT's."""

    def random(self, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randrange(3) for _ in range(24))

    def mutate(self, genome: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.randrange(3) if rng.random() < 0.1 else layer for layer in genome)

    def crossover(self, a: tuple[int, ...], b: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.choice(pair) for pair in zip(a, b, strict=True))

    def check(self, genome: tuple[int, ...]) -> None:
        if len(genome) != 24:
            raise ValueError("expected 24 layers")


def networks() -> NetworkSpace:
    rng = random.Random(0)
    macro = Macro(16, 16, (Stage(24, 3, 2), Stage(40, 3, 2), Stage(80, 3, 1)), 256, 1)
    cells = [[CellSpace().random(rng) for _ in range(9)] for _ in range(macro.layers)]
    return NetworkSpace(macro, cells, (3, 5, 7), (3, 6), 10, 32)


def evolution(space: Any, cost: Callable[[Any], float], most: float, start: Any) -> str:
    """Milliseconds a candidate, of 50 a generation and 20 generations: mean of the fastest round."""
    seconds = []
    for seed in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            how = Evolution(50, 20, seed=seed)
            budget = Budget("cost", cost, most=most)
            found = evolve(space, lambda genome: hash(genome) % 1000, how, [budget], start, log=Path(folder) / "log")
            seconds.append((time.perf_counter() - began) / len(found.candidates))
    return f"{1000 * min(seconds):.2f}"


def evaluation(space: NetworkSpace) -> str:
    """Time of an evaluation over that of its forward passes alone, medians."""
    torch.manual_seed(0)
    supernet = Supernet(space).eval()
    batches = [(torch.randn(256, 3, 32, 32), torch.randint(10, (256,))) for _ in range(2)]
    genome, fitness = space.random(random.Random(1)), Inherited(supernet, batches)
    whole, bare = [], []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        fitness(genome)
        whole.append(time.perf_counter() - began)
        began = time.perf_counter()
        with torch.inference_mode():
            for pictures, _ in batches:
                supernet(pictures, genome)
        bare.append(time.perf_counter() - began)
    return f"{statistics.median(whole[1:]) / statistics.median(bare[1:]):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    space = networks()
    rows = [
        ["orders of 24 layers", evolution(Orders(), sum, 30, [])],
        ["networks of AutoSpace's cells", evolution(space, space.madds, 20e6, [space.smallest()])],
    ]
    text = [
        heading("Search", "python -m benchmarks.search", 0),
        table(["genomes", "evolution's own work, ms a candidate (budget: 1)"], rows),
        table(["", "over its forward passes (budget: 1.05)"], [["evaluation of a candidate", evaluation(space)]]),
    ]
    write("\n\n".join(text), args.out)


if __name__ == "__main__":
    main()
