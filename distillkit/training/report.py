"""report.html of a run: one page without scripts or outside files, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL.Image import Image
from torch import nn

from distillkit import __version__, schema
from distillkit.boxes.regions import Valuable
from distillkit.core.errors import DistillError
from distillkit.schema import Recipe
from distillkit.training import checkpoint, class_figures, figures, metrics
from distillkit.training.table import cells

Drawing = Figure | Image
#: pictures shown, and the score above which a box is drawn
SHOWN, DRAWN = 4, 0.3

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100%; height: auto }
p.note { color: #555 } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px }
"""


def write_report(
    recipe: Recipe,
    folder: Path,
    rows: list[dict[str, Any]],
    data: Any,
    jobs: Mapping[str, Path],
    teachers: Mapping[str, nn.Module],
    students: Mapping[str, nn.Module],
) -> None:
    """Write report.html, and its figures: curves.png, and what the task has.

    Args:
        rows: of the table.
        data: the split whose first pictures are shown.
        jobs: folder of each training.
        teachers, students: trained, by name; students in the order of the rows, the first one to compare with.
    """
    parts = [f"<h1>{html.escape(recipe.name)}</h1>", _table(rows)]
    for title, note, name, figure in _figures(recipe, data, jobs, teachers, students):
        parts.append(f"<h2>{html.escape(title)}</h2><p class=note>{html.escape(note)}</p>")
        if figure is not None:
            png = _png(figure)
            checkpoint.atomically(folder / f"{name}.png", lambda path, png=png: path.write_bytes(png))  # type: ignore[misc]
            source = base64.b64encode(png).decode()
            parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{source}">')
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


def _figures(
    recipe: Recipe,
    data: Any,
    jobs: Mapping[str, Path],
    teachers: Mapping[str, nn.Module],
    students: Mapping[str, nn.Module],
) -> Iterator[tuple[str, str, str, Drawing | None]]:
    """Title, note, file name and figure of each section; None where there is nothing to draw, and the note says why."""
    trained = {job: path / "metrics.jsonl" for job, path in jobs.items()}
    rows = {job: metrics.read(path) for job, path in trained.items() if path.exists()}
    score = recipe.SCORES[0]
    yield (
        f"Losses and {score}",
        "Losses are weighted as they are summed, and averaged over a twentieth of the run. "
        f"{score} on the val split after each evaluation; the table above is on the {recipe.evaluate.split} split.",
        "curves",
        figures.curves(rows, score),
    )
    if isinstance(recipe, schema.ClassificationRecipe):
        yield from _class_figures(recipe, data, jobs, {**teachers, **students})
        return
    samples = [data[(0, i)] for i in range(min(SHOWN, len(data)))]
    models = {**teachers, **students}
    yield (
        "Pictures",
        f"The first pictures of the {recipe.evaluate.split} split, and boxes found with a score of at least {DRAWN}. "
        "Where boxes overlap by more than half (IoU), whatever their class, the best one is drawn.",
        "pictures",
        figures.pictures(samples, models, data.classes, DRAWN),
    )
    try:
        yield from _distribution_figures(recipe, samples, teachers, students)
    except DistillError as error:
        yield "Regions and distributions", f"Not drawn: {error}", "", None


def _class_figures(
    recipe: schema.ClassificationRecipe, data: Any, jobs: Mapping[str, Path], models: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str, str, Drawing | None]]:
    split = recipe.evaluate.split
    scores = {job: checkpoint.read_json(path / f"scores-{split}.json") for job, path in jobs.items()}
    yield (
        "Confusion",
        f"Which class each class of the {split} split is taken for: rows are the true classes, and add up to 1.",
        "confusion",
        class_figures.confusion({job: s["confusion"] for job, s in scores.items()}, data.classes),
    )
    samples = [data[0, i] for i in range(min(class_figures.SHOWN, len(data)))]
    yield (
        "What each place is taken for",
        f"Pictures of the {split} split, and how likely each model finds the picture's class in each of its tokens.",
        "tokens",
        class_figures.tokens(samples, models, data.classes),
    )


def _distribution_figures(
    recipe: Recipe, samples: list[figures.Sample], teachers: Mapping[str, nn.Module], students: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str, str, Drawing | None]]:
    localization = [d for d in recipe.distillers if isinstance(d, schema.LD | schema.SelfLD)]
    valuable = Valuable(localization[0].gamma, localization[0].measure) if localization else Valuable()
    fullest = max(samples, key=lambda sample: len(sample[1]["boxes"]))
    yield (
        "Regions",
        "Points of the anchors on which localization distillation acts, at each level of the student's pyramid. Main: "
        f"the assigner's positives. Valuable: those that overlap an object less (gamma {valuable.gamma}).",
        "regions",
        figures.regions(fullest, next(iter(students.values())), valuable),
    )
    if not teachers or len(students) < 2:
        return
    edge = figures.most_disputed(samples, {**teachers, **students})
    yield (
        "Distribution of a box's edges, before and after",
        "Of the objects above, the one about whose edges the teacher and the first student differ most: how far each "
        "model says every edge is from the anchor's point. Distillation should bring a student to the teacher's bars."
        if edge
        else "Not drawn: the pictures above hold no object.",
        "distribution",
        figures.distributions(edge) if edge else None,
    )


def _png(figure: Drawing) -> bytes:
    out = io.BytesIO()
    if isinstance(figure, Figure):
        figure.savefig(out, format="png", dpi=110)
    else:
        figure.save(out, format="png")
    return out.getvalue()
