"""Accuracy against multiply-adds of networks from a learned space, from random cells, and of the reference cell alone.

    DISTILLKIT_DATA=/data python -m benchmarks.autospace benchmarks/autospace.yaml --seeds 3

First the space is learned and a network found in it (`distillkit search`). Then, for every seed, number of
multiply-adds and source of cells, a network is drawn at random: its cells, kernels, widths and depth. So a line of the
table says what cells are worth on average, not what the luckiest network is; its deviation is that of drawing and of
training together. The network that the search found is trained as well, with every seed. All are trained alike, without
a teacher, by the recipe's `train`.

    learned    the six best cells of each layer, without the reference cells
    random     six cells of each layer drawn uniformly from all that can be written, anew for each seed
    reference  the inverted residual alone

Every finished training is a line in benchmarks/results/NAME.jsonl and is not done again: stop at any time, and call
again; searches and trainings go on where they were. --part search, or --part train, does one of the two alone.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.seeds import RESULTS, Bench
from distillkit.bench.report import table
from distillkit.models.autospace_cells import EDGES, INVERTED_RESIDUAL, NONE, Cell, CellSpace
from distillkit.models.autospace_network import LearnedSpace, read_network, read_space, write_network
from distillkit.recipe import load
from distillkit.schema import ClassificationRecipe, Row
from distillkit.search.autospace.networks import NetworkSpace
from distillkit.search.command import search

#: multiply-adds that networks are drawn at, and how far off they may be
TARGETS, WITHIN = (5e6, 7e6, 10e6), 0.05
SOURCES = ("learned", "random", "reference")
FOUND = "found"
RANDOM_CELLS = 6
TRIES = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3, help="0 .. SEEDS-1 are trained")
    parser.add_argument(
        "--seed", type=int, action="append", help="train this one only; calls with others may run beside"
    )
    parser.add_argument("--part", choices=["search", "train"], help="only this one")
    parser.add_argument("overrides", nargs="*", help="as for distillkit search: key.path=value")
    args = parser.parse_intermixed_args()
    recipe = load(args.recipe, args.overrides)
    command = " ".join(["python -m benchmarks.autospace", args.recipe, f"--seeds {args.seeds}", *args.overrides])
    console = Console()
    if args.part != "train":
        search(recipe, console, command=command)
    if args.part != "search":
        Comparison(recipe, command).run(args.seeds, args.seed or range(args.seeds))


class Comparison:
    """The networks, their trainings, and the table."""

    def __init__(self, recipe: Any, command: str):
        assert isinstance(recipe, ClassificationRecipe)
        assert recipe.search is not None
        self.search, self.command, self.side = recipe.search, command, recipe.data.size[0]
        self.recipe = recipe.model_copy(update={"teacher": None, "distillers": [], "search": None})
        self.folder = Path(recipe.output) / f"{recipe.name}-search"
        self.space = read_space(self.folder / "space.json")
        self.path = RESULTS / f"{recipe.name}.jsonl"

    def run(self, seeds: int, chosen: Sequence[int]) -> None:
        """Train the chosen ones of ``seeds``."""
        self.write(seeds)
        for seed in chosen:
            for name, network in self.networks(seed):
                bench, row = self._bench(name, network)
                if bench.line(row, seed) is None:
                    bench.run(row, seed)
                    self.write(seeds)

    def networks(self, seed: int) -> Iterator[tuple[str, Path]]:
        """What is trained with a seed: names of rows, and files."""
        for target in TARGETS:
            for source in SOURCES:
                yield f"{source} {target / 1e6:g}M", self._drawn(source, target, seed)
        yield FOUND, self.folder / "network.json"

    def _drawn(self, source: str, target: float, seed: int) -> Path:
        """A network of about ``target`` multiply-adds; its file is called after what is in it."""
        rng = random.Random(f"{source}/{target}/{seed}")
        nas = self.search.nas
        assert nas is not None
        macro = self.search.network.macro()
        cells = self._cells(source, rng)
        classes = read_network(self.folder / "network.json").classes
        space = NetworkSpace(macro, cells, nas.kernels, nas.expands, classes, self.side)
        near = (g for _ in range(TRIES) if abs(space.madds(g := space.random(rng)) - target) <= WITHIN * target)
        genome = next(near, None)
        if genome is None:
            raise ValueError(
                f"none of {TRIES} networks of {source} cells has about {target:g} multiply-adds; change TARGETS"
            )
        network = space.network(genome)
        digest = hashlib.sha256(repr(network).encode()).hexdigest()[:8]
        path = self.folder / "drawn" / f"{source}-{target / 1e6:g}M-{seed}-{digest}.json"
        if not path.exists():
            write_network(path, network)
        return path

    def _cells(self, source: str, rng: random.Random) -> LearnedSpace:
        if source == "learned":
            return [cells[:-3] for cells in self.space]
        if source == "random":
            return [[CellSpace().random(rng) for _ in range(RANDOM_CELLS)] for _ in self.space]
        return [[INVERTED_RESIDUAL] for _ in self.space]

    def _bench(self, name: str, network: Path) -> tuple[Bench, Row]:
        row = Row(row=name, distillers="none", student={"options": {"network": str(network)}})
        return Bench(self.recipe.model_copy(update={"compare": [row]}), self.path, self.command), row

    # ---- what is written

    def write(self, seeds: int) -> None:
        rows: dict[str, list[dict[str, Any]]] = {}
        for seed in range(seeds):
            for name, network in self.networks(seed):
                bench, row = self._bench(name, network)
                if line := bench.line(row, seed):
                    madds = read_network(network).costs(self.side)[1]
                    rows.setdefault(name, []).append({**line, "madds": madds, "seed": seed})
        text = [f"# {self.recipe.name}", f"`{self.command}`", *self._said(rows), *self._learned()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
        if rows:
            _plot(rows, self.path.with_suffix(".png"))

    def _said(self, rows: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
        if not rows:
            return
        last = next(reversed(rows.values()))[-1]
        yield (
            f"Top-1 on `{self.recipe.evaluate.split}` in per cent, mean ± deviation over n networks, each drawn and "
            f"trained with its own seed; `{FOUND}` is one network. "
            f"{last['machine']}; torch {last['torch']}. {last['date']}."
        )
        head = ["cells", "n", "multiply-adds, M", "parameters, M", "top-1", "less reference, same seed", "minutes"]
        yield table(head, [self._row(name, lines, rows) for name, lines in rows.items()])

    @staticmethod
    def _row(name: str, lines: Sequence[dict[str, Any]], rows: dict[str, list[dict[str, Any]]]) -> list[str]:
        source, _, target = name.partition(" ")
        others = {line["seed"]: line for line in rows.get(f"reference {target}", [])} if source != "reference" else {}
        gains = [100 * (line["top1"] - others[line["seed"]]["top1"]) for line in lines if line["seed"] in others]
        return [
            name,
            str(len(lines)),
            f"{statistics.fmean(line['madds'] for line in lines) / 1e6:.2f}",
            f"{statistics.fmean(line['parameters'] for line in lines) / 1e6:.2f}",
            _spread([100 * line["top1"] for line in lines], ".1f"),
            _spread(gains, "+.1f") if gains else "",
            f"{statistics.fmean(line['minutes'] for line in lines):.1f}",
        ]

    def _learned(self) -> Iterator[str]:
        """What learned cells look like, beside the published ones."""
        cells = [cell for layer in self.space for cell in layer[:-3]]
        yield (
            f"Operations on the edges of the {len(cells)} learned cells. Of the 66 published ones 0->2 is missing in 6 "
            "and 1->3 in 2; the reference cells have neither."
        )
        counts = {edge: Counter(cell.ops[i] for cell in cells) for i, edge in enumerate(EDGES)}
        head = ["edge", "none", "identity", "mean of 3x3", "depthwise 3x3"]
        edges = [[f"{e[0]}->{e[1]}", *(str(n[op]) for op in (1, 2, 3, 5))] for e, n in counts.items()]
        yield table(head, edges)
        layers = [[str(i), *_density(layer[:-3])] for i, layer in enumerate(self.space)]
        yield table(["layer", "skip edges used, of 2 a cell", "depthwise convolutions a cell"], layers)


def _density(cells: Sequence[Cell]) -> list[str]:
    skips = statistics.fmean((cell.ops[1] != NONE) + (cell.ops[3] != NONE) for cell in cells)
    return [f"{skips:.2f}", f"{statistics.fmean(cell.ops.count(5) for cell in cells):.2f}"]


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for source in (*SOURCES, FOUND):
        of = [lines for name, lines in rows.items() if name.partition(" ")[0] == source]
        if of:
            x = [statistics.fmean(line["madds"] for line in lines) / 1e6 for lines in of]
            top1 = [[100 * line["top1"] for line in lines] for lines in of]
            error = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in top1]
            axes.errorbar(x, [statistics.fmean(v) for v in top1], error, marker="o", capsize=3, label=source)
    axes.set(xlabel="multiply-adds, M", ylabel="top-1, %")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
