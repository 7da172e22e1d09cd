"""The table of a run: table.json, table.md, on the console and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from distillkit.training import checkpoint

#: one row: row (its name), its scores (0..1; AP, AP50, AP75, or those of its task), parameters, minutes of training
#: (None: it was not trained)
Row = dict[str, Any]


def write_table(folder: Path, rows: list[Row]) -> None:
    """table.json with the numbers, table.md as it is printed."""
    head, *body = cells(rows)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    checkpoint.write_text(folder / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    checkpoint.write_json(folder / "table.json", rows)


def cells(rows: list[Row]) -> list[list[str]]:
    """Header and rows as texts: scores in per cent, "-" for the training minutes of a model that was not trained."""
    scores = [key for row in rows[:1] for key in row if key not in ("row", "parameters", "minutes")]
    body = [
        [
            row["row"],
            *(percent(row[key]) for key in scores),
            f"{row['parameters'] / 1e6:.2f} M",
            "-" if row["minutes"] is None else f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]
    return [["row", *scores, "parameters", "minutes"], *body]


def percent(score: float) -> str:
    """A score of 0..1 as it is printed everywhere; "-" for COCO's -1, where there is nothing to find."""
    return "-" if score < 0 else f"{100 * score:.1f}"


def rich_table(rows: list[Row]) -> Table:
    head, *body = cells(rows)
    table = Table(*head)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in body:
        table.add_row(*line)
    return table
