"""Every row of a recipe with several seeds: mean, spread, and the paired difference to the first row.

    DISTILLKIT_DATA=/data python -m benchmarks.seeds benchmarks/bccd.yaml --seeds 5

A cell of the table is a row with a seed. Each finished cell is one JSON line in benchmarks/results/NAME.jsonl, and no
cell whose line is there is run again: stop at any time, call again, and ask for more seeds later. A cell that was
stopped in the middle goes on from its last checkpoint below runs/. Teachers are trained once, with the recipe's own
seed. Lines are kept by what made them (data, models, distillers, training, evaluation): after a change of the recipe
the cells that it touches are run anew. The Markdown table beside the lines is written after every cell, and says how
many seeds it rests on.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from torch import nn

from distillkit import schema
from distillkit.bench.machine import processor
from distillkit.bench.report import table
from distillkit.recipe import load, slug, student_of, taught_by, train_of
from distillkit.schema import Recipe
from distillkit.training import build, checkpoint, metrics
from distillkit.training.folder import alone_in, open_folder, versions
from distillkit.training.run import Jobs

RESULTS = Path(__file__).parent / "results"
#: scores whose difference to the first row is shown, by the task's first score
PAIRED = {
    "AP": ("AP", "AP75"),
    "top1": ("top1",),
    "miou": ("miou", "boundary_iou"),
    "cam_miou": ("cam_miou", "mask_miou", "miou"),
}
#: tables of each class: title, key of a line, key in the scores of a class
OF_CLASS = {
    "AP": (("AP", "classes", "ap"), ("AP50", "classes50", "ap50")),
    "top1": (("Recall", "classes", "recall"),),
    "miou": (("IoU", "classes", "iou"), ("Boundary IoU", "boundaries", "boundary_iou")),
    "cam_miou": (("IoU of the activation maps", "classes", "iou"),),
}
#: steps at the end of a training over which its losses are averaged
LAST = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="its `compare` are the rows")
    parser.add_argument("--seeds", type=int, default=5, help="0 .. SEEDS-1 are run")
    parser.add_argument("--row", action="append", help="only this row, in this call; may be given several times")
    parser.add_argument("overrides", nargs="*", help="as for distillkit run: key.path=value")
    args = parser.parse_intermixed_args()
    recipe = load(args.recipe, args.overrides)
    unknown = set(args.row or ()) - {row.row for row in recipe.compare}
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are: {', '.join(row.row for row in recipe.compare)}")
    command = " ".join(["python -m benchmarks.seeds", args.recipe, f"--seeds {args.seeds}", *args.overrides])
    bench = Bench(recipe, RESULTS / f"{recipe.name}.jsonl", command)
    bench.write_table()
    for seed in range(args.seeds):
        for row in recipe.compare:
            if row.row in (args.row or [row.row]) and bench.line(row, seed) is None:
                bench.run(row, seed)
                bench.write_table()


class Bench:
    """The lines of one recipe's table, and what makes them."""

    def __init__(self, recipe: Recipe, path: Path, command: str):
        self.recipe, self.path, self.command = recipe, path, command
        self.folder = Path(recipe.output) / recipe.name
        self.console = Console()
        self.teachers: dict[str, nn.Module] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines = {line["cell"]: line for line in map(json.loads, text.splitlines())}

    def line(self, row: schema.Row, seed: int) -> dict[str, Any] | None:
        return self.lines.get(cell(self.recipe, row, seed))

    def run(self, row: schema.Row, seed: int) -> None:
        key = cell(self.recipe, row, seed)
        self.console.rule(f"{row.row}, seed {seed}")
        recipe = self.recipe.model_copy(
            update={"seed": seed, "compare": [row], "distillers": chosen_by(self.recipe, row)}
        )
        folder = self.folder / key
        with alone_in(folder):
            open_folder(folder, recipe, fresh=False)
            jobs = Jobs(recipe, folder, self.console, self.command)
            jobs.row(row, {} if row.distillers == "none" else self._teachers())
            self._add({"cell": key, "row": row.row, "seed": seed, **measured(jobs, row.row)})

    def _teachers(self) -> dict[str, nn.Module]:
        """Trained in the first call that needs them, and read from the run folder in later ones."""
        configs = build.teacher_configs(self.recipe)
        if configs and not self.teachers:
            key = teacher_cell(self.recipe)
            recipe = self.recipe.model_copy(update={"compare": [], "distillers": []})
            open_folder(self.folder / key, recipe, fresh=False)
            jobs = Jobs(recipe, self.folder / key, self.console, self.command)
            self.teachers = {name: jobs.teacher(name, config) for name, config in configs.items()}
            for name in configs:
                if f"{key}-{name}" not in self.lines:
                    self._add({"cell": f"{key}-{name}", "row": name, "seed": self.recipe.seed, **measured(jobs, name)})
        return self.teachers

    def _add(self, line: dict[str, Any]) -> None:
        self.lines[line["cell"]] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_table(self) -> None:
        """Both tables of the cells that are there: teachers first, then the rows against the first of them."""
        rows = {row.row: self._of(row) for row in self.recipe.compare}
        first, reference = next(iter(rows.items()))
        scores, paired = self.recipe.scores, PAIRED[self.recipe.SCORES[0]]
        shown = {name: lines for name, lines in (self._teacher_lines() | rows).items() if lines}
        if not shown:
            return
        compared = {name: reference if name in rows and name != first else [] for name in shown}
        lines = [line for of_row in shown.values() for line in of_row]
        less = [f"{paired[0]} less {first}, same seed", *(f"{score} less" for score in paired[1:])]
        against = ["distillers' losses / loss_bbox"] if "AP" in scores else []
        head = ["row", "n", *scores, *less, *against]
        classes = list(lines[0]["classes"])
        text = [
            f"# {self.recipe.name}",
            f"`{self.command}`",
            f"On `{self.recipe.evaluate.split}`, in per cent: mean ± deviation over n seeds. {_made_on(lines)}",
            table(head, [[name, *_overall(of_row, compared[name], scores)] for name, of_row in shown.items()]),
        ]
        for title, key, _ in OF_CLASS[scores[0]]:
            if all(key in line for line in lines):
                by_class = [[name, *_by_class(of_row, key, classes)] for name, of_row in shown.items()]
                text += [f"{title} of each class:", table(["row", *classes], by_class)]
        self.path.with_suffix(".md").write_text("\n\n".join(text) + "\n", encoding="utf-8")

    def _teacher_lines(self) -> dict[str, list[dict[str, Any]]]:
        """One line of each teacher that is there."""
        cells = {name: f"{teacher_cell(self.recipe)}-{name}" for name in build.teacher_configs(self.recipe)}
        return {name: [self.lines[of]] for name, of in cells.items() if of in self.lines}

    def _of(self, row: schema.Row) -> list[dict[str, Any]]:
        """The lines of a row, by seed."""
        seeds = {line["seed"] for line in self.lines.values()}
        return [line for seed in sorted(seeds) if (line := self.line(row, seed))]


def cell(recipe: Recipe, row: schema.Row, seed: int) -> str:
    """The name of a cell: the row, the seed, and a digest of all that its numbers come from, except the code."""
    made_by: list[Any] = [
        *_common(taught_by(recipe, row.data)),
        _changed(student_of(recipe, row.student)),
        _changed(train_of(recipe, row.train)),
    ]
    if getattr(row, "masks", "pseudo") != "pseudo":
        made_by.append(row.masks)  # type: ignore[attr-defined]
    if chosen := chosen_by(recipe, row):
        made_by += [*map(_changed, chosen), teacher_cell(recipe)]
    return f"{slug(row.row)}-{seed}-{_digest(made_by)}"


def chosen_by(recipe: Recipe, row: schema.Row) -> list[schema.Distiller]:
    """The distillers of a row."""
    if row.distillers == "none":
        return []
    return [d for d in recipe.distillers if row.distillers == "all" or d.name in row.distillers]


def teacher_cell(recipe: Recipe) -> str:
    models = [_changed(config) for config in build.teacher_configs(recipe).values()]
    return f"teachers-{_digest([*_common(recipe), *models, _changed(recipe.train), recipe.seed])}"


def _common(recipe: Recipe) -> list[Any]:
    """What all cells of a recipe have in common."""
    smoothing = getattr(recipe, "smoothing", 0.0)
    blocks = [getattr(recipe, name, None) for name in ("loss", "cam", "masks", "segment")]
    return [
        _changed(recipe.data, {"root", "workers", "saliency"}),  # the same data elsewhere are the same
        _changed(recipe.evaluate),
        *([smoothing] if smoothing else []),
        *(changed for block in blocks if block is not None and (changed := _changed(block))),
    ]


def _changed(block: BaseModel, without: set[str] | None = None) -> dict[str, Any]:
    """What is not as by default: a key that the schema gets later must not make all lines void."""
    return block.model_dump(mode="json", exclude_defaults=True, exclude=without)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def measured(jobs: Jobs, name: str) -> dict[str, Any]:
    """What a line says of a job: scores, parameters, minutes, its last losses, and what it was made with."""
    row, folder = jobs.table[-1], jobs.folders[name]
    scores = checkpoint.read_json(folder / f"scores-{jobs.recipe.evaluate.split}.json")
    made_with, first = versions(jobs.recipe), jobs.recipe.SCORES[0]
    return {
        **{score: row[score] for score in jobs.recipe.scores},
        **{key: {of: n[score] for of, n in scores["classes"].items()} for _, key, score in OF_CLASS[first]},
        "parameters": row["parameters"],
        "minutes": row["minutes"],
        "losses": last_losses(folder),
        "commit": made_with["commit"],
        "torch": made_with["packages"]["torch"],
        "machine": f"{processor()}, {jobs.recipe.train.threads or torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
    }


def last_losses(folder: Path) -> dict[str, float]:
    """Each loss of a training, averaged over its last steps; none for a model that was not trained."""
    path = folder / "metrics.jsonl"
    steps = [row["losses"] for row in metrics.read(path) if row["kind"] == "train"][-LAST:] if path.exists() else []
    return {name: statistics.fmean(step[name] for step in steps) for name in steps[0]} if steps else {}


def _overall(lines: list[dict[str, Any]], first: list[dict[str, Any]], scores: Sequence[str]) -> list[str]:
    """The cells of a row after its name; ``first``: the lines it is compared with, seed by seed."""
    others = {line["seed"]: line for line in first}
    pairs = [(line, others[line["seed"]]) for line in lines if line["seed"] in others]
    gains = [
        _spread(known, "+.1f") if (known := [a[s] - b[s] for a, b in pairs if min(a[s], b[s]) >= 0]) else ""
        for s in PAIRED[scores[0]]
    ]
    numbers = [_known([line[score] for line in lines]) for score in scores]
    return [str(len(lines)), *numbers, *gains, *([_ratios(lines)] if "AP" in scores else [])]


def _by_class(lines: list[dict[str, Any]], key: str, classes: list[str]) -> list[str]:
    return [_known([line[key][name] for line in lines]) for name in classes]


def _known(values: list[float]) -> str:
    """Of scores; "-" where there is nothing to say of (-1)."""
    known = [value for value in values if value >= 0]
    return _spread(known) if known else "-"


def _ratios(lines: list[dict[str, Any]]) -> str:
    task = ("loss_bbox", "loss_cls", "loss_dfl")
    names = [name for name in lines[0]["losses"] if name not in task]
    means = {n: statistics.fmean(line["losses"][n] / line["losses"]["loss_bbox"] for line in lines) for n in names}
    return ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())


def _spread(values: list[float], form: str = ".1f") -> str:
    mean = f"{100 * statistics.fmean(values):{form}}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _made_on(lines: list[dict[str, Any]]) -> str:
    """Machines, versions and dates of all lines."""

    def said(key: str) -> str:
        return ", ".join(sorted({line[key] or "?" for line in lines}))

    dates = sorted(line["date"] for line in lines)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    return f"Seeds {seeds}. {said('machine')}; torch {said('torch')}; {when}."


if __name__ == "__main__":
    main()
