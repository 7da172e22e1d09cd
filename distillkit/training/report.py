"""report.html of a run: one page without scripts or outside files, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL.Image import Image

from distillkit import __version__
from distillkit.schema import Recipe
from distillkit.training import checkpoint, figures, metrics
from distillkit.training.table import cells
from distillkit.training.tasks import Section, Trained, task_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; height: auto }
p.note { color: #555 } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px }
"""


def write_report(recipe: Recipe, folder: Path, rows: list[dict[str, Any]], trained: Trained) -> None:
    """Write report.html, and its figures: curves.png, and what the task has.

    Args:
        rows: of the table.
    """
    parts = [f"<h1>{html.escape(recipe.name)}</h1>", _table(rows)]
    for section in (_curves(recipe, trained.jobs), *task_of(recipe).figures(recipe, trained)):
        title = html.escape(section.title)
        parts.append(f"<h2>{title}</h2><p class=note>{html.escape(section.note)}</p>")
        if section.figure is not None:
            png = _png(section.figure)
            path = folder / f"{section.file}.png"
            checkpoint.atomically(path, lambda part, png=png: part.write_bytes(png))  # type: ignore[misc]
            source = base64.b64encode(png).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{source}">')
    for name in ("recipe.yaml", "versions.json"):
        text = html.escape((folder / name).read_text(encoding="utf-8"))
        parts.append(f"<h2>{name}</h2><details><summary>show</summary><pre>{text}</pre></details>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(recipe.name)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}<p class=note>distillkit {__version__}</p></body></html>\n"
    )
    checkpoint.write_text(folder / "report.html", page)


def _table(rows: list[dict[str, Any]]) -> str:
    head, *body = ([html.escape(cell) for cell in line] for line in cells(rows))
    lines = ["<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in body]
    return "<table><tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>" + "".join(lines) + "</table>"


def _curves(recipe: Recipe, jobs: Mapping[str, Path]) -> Section:
    trained = {job: path / "metrics.jsonl" for job, path in jobs.items()}
    rows = {job: metrics.read(path) for job, path in trained.items() if path.exists()}
    score = recipe.SCORES[0]
    return Section(
        f"Losses and {score}",
        "Losses are weighted as they are summed, and averaged over a twentieth of the run. "
        f"{score} on the val split after each evaluation; the table above is on the {recipe.evaluate.split} split.",
        "curves",
        figures.curves(rows, score),
    )


def _png(figure: Figure | Image) -> bytes:
    out = io.BytesIO()
    if isinstance(figure, Figure):
        figure.savefig(out, format="png", dpi=110)
    else:
        figure.save(out, format="png")
    return out.getvalue()
