"""Pictures of a search: fitness by generation, and fitness against a cost with its Pareto front."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distillkit.models.autospace_cells import NONE
from distillkit.search.engine import Found
from distillkit.search.log import read


def plot_fitness(found: Found, path: str | Path) -> None:
    """Every candidate by its generation, the best so far and the mean of each population, as a PNG (or what the
    name's suffix says)."""
    figure, axes = _figure("generation", "fitness")
    axes.plot([c.generation for c in found.candidates], [c.fitness for c in found.candidates], ".", color="0.75")
    generations = [g["generation"] for g in found.generations]
    axes.plot(generations, [g["fitness"] for g in found.generations], "o-", label="best so far")
    axes.plot(generations, [g["mean"] for g in found.generations], "s--", label="mean of the population")
    _saved(figure, axes, path)


def plot_front(found: Found, cost: str, path: str | Path) -> None:
    """Fitness against a cost of the search's budgets; what none beats is joined by steps."""
    figure, axes = _figure(cost, "fitness")
    axes.plot([c.costs[cost] for c in found.candidates], [c.fitness for c in found.candidates], ".", color="0.75")
    front = found.front(cost)
    axes.step([c.costs[cost] for c in front], [c.fitness for c in front], "o-", where="post", label="Pareto front")
    best = found.best
    axes.plot([best.costs[cost]], [best.fitness], "*", markersize=14, label="fittest")
    _saved(figure, axes, path)


def plot_space(log: str | Path, path: str | Path) -> None:
    """Of AutoSpace's space.jsonl: the losses by round, and the share of skip edges (0->2, 1->3) that each layer's best
    cell has."""
    rounds = [line for line in read(log) if line["kind"] == "round"]
    figure, axes = _figure("round", "loss")
    for name, style in (("loss", "-"), ("held_out", "--")):
        there = [(line["round"], line[name]) for line in rounds if name in line]
        axes.plot(*zip(*there, strict=True) if there else ([], []), style, label=name.replace("_", " "))
    right = axes.twinx()
    skips = [[op for ops, *_ in line["best"] for op in (ops[1], ops[3])] for line in rounds]
    shares = [sum(op != NONE for op in ops) / len(ops) for ops in skips]
    right.plot([line["round"] for line in rounds], shares, color="tab:green", linewidth=1)
    right.set(ylabel="skip edges of the best cells (green)", ylim=(0, 1))
    _saved(figure, axes, path)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _saved(figure: Figure, axes: Axes, path: str | Path) -> None:
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
