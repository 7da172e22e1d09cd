"""The figures of a report, each a matplotlib Figure: curves, pictures with boxes, regions, box distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from PIL.Image import Image
from PIL.Image import new as new_picture
from torch import Tensor, nn
from torchvision.ops import nms

from distillkit.adapters import adapter_for
from distillkit.boxes.anchors import grid_points
from distillkit.boxes.distribution import encode
from distillkit.boxes.overlap import contains
from distillkit.boxes.regions import Main, Valuable
from distillkit.boxes.rotated import corners
from distillkit.boxes.rotated_nms import rotated_nms
from distillkit.core.errors import ViewError
from distillkit.core.side import Reading, Side
from distillkit.core.views import BoxTargets, DenseDetections
from distillkit.evaluation.draw import beside, draw_boxes
from distillkit.evaluation.predict import detect

#: readable on white, and apart for most colour-blind readers (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAIN, VALUABLE, TRUTH, TEACHER = "#D55E00", "#0072B2", "#222222", "#888888"
EDGES = ("left edge", "top edge", "right edge", "bottom edge")
DELTAS = ("x", "y", "width", "height")
SAME = 0.5  # IoU above which two boxes are about one object
Sample = tuple[Tensor, dict[str, Any]]


def curves(rows: Mapping[str, list[dict[str, Any]]], score: str = "AP") -> Figure:
    """One panel for each loss, over optimizer steps, and one for a score; one line for each job.

    Args:
        rows: of each job's metrics.jsonl.
    """
    train = {job: [r for r in rs if r["kind"] == "train"] for job, rs in rows.items()}
    scored = {job: [r for r in rs if r["kind"] == "evaluation"] for job, rs in rows.items()}
    losses = list(dict.fromkeys(name for rs in train.values() for r in rs[:1] for name in r["losses"]))
    axes = _grid(len(losses) + 1, width=4.2, height=2.9)
    for axis, title in zip(axes, [f"{score} on val", *losses], strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
    for colour, job in zip(_cycle(len(rows)), rows, strict=True):
        x = [r["step"] for r in scored[job]]
        axes[0].plot(x, [100 * r[score] for r in scored[job]], "o-", ms=3, color=colour, label=job)
        for axis, name in zip(axes[1:], losses, strict=True):
            rows_with = [r for r in train[job] if r["losses"].get(name) is not None]
            values = _smooth(np.array([r["losses"][name] for r in rows_with]))
            axis.plot([r["step"] for r in rows_with], values, color=colour, label=job, lw=1.2)
    axes[0].set(xlim=(0, None), ylim=(0, None))  # a job evaluated once is one point
    axes[0].legend(fontsize=8, loc="lower left")
    for axis in axes:
        axis.set_xlabel("optimizer step", fontsize=8)
    return axes[0].figure  # type: ignore[return-value]


def pictures(samples: Sequence[Sample], models: Mapping[str, nn.Module], classes: Sequence[str], above: float) -> Image:
    """A row for each picture: the truth, then what each model finds with a score of at least ``above``.

    Of boxes that overlap by more than ``SAME``, of whatever class, only the best is drawn: a model in doubt between
    classes would bury the object under its boxes.
    """
    rows: list[Image] = []
    for image, target in samples:
        row = [draw_boxes(image, target["boxes"], target["labels"], None, classes, title="truth")]
        for name, model in models.items():
            boxes, labels, scores = _predict(model, image)
            row.append(draw_boxes(image, boxes, labels, scores, classes, above, name))
        rows.append(beside(row))
    sheet = new_picture("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for line in rows:
        sheet.paste(line, (0, top))
        top += line.height
    return sheet


def regions(sample: Sample, student: nn.Module, valuable: Valuable) -> Figure:
    """Over one picture, level by level, the points of the anchors of the main and of the valuable region."""
    image, _ = sample
    view, targets = dense_views([student], sample)[0], _targets(sample, student)
    inside = {"main": Main().overlaps(view, targets)[0], "valuable": valuable.overlaps(view, targets)[0]}
    points = _points(view).split(list(view.classes.counts))
    axes = _grid(len(view.strides), width=3.4, height=3.6)
    for level, (axis, stride) in enumerate(zip(axes, view.strides, strict=True)):
        _picture(axis, image, fade=0.6)
        counts = []
        for (name, overlaps), colour, size in zip(inside.items(), (MAIN, VALUABLE), (30, 12), strict=True):
            on = overlaps.cpu().split(list(view.classes.counts))[level] > 0
            x, y = points[level][on].unbind(1)
            axis.scatter(x.numpy(), y.numpy(), s=size, color=colour, label=name, linewidths=0)
            counts.append(f"{int(on.sum())} {name}")
        _outlines(axis, sample[1]["boxes"])
        axis.set_title(f"stride {stride}: {', '.join(counts)}", fontsize=9)
    axes[0].legend(fontsize=8, loc="upper right")
    return axes[0].figure  # type: ignore[return-value]


@dataclass(frozen=True)
class Edge:
    """One anchor of one picture, and what each model says of its edges.

    Args:
        sample: the picture it is in.
        point: (2,) x, y of the anchor's point, in pixels.
        box: (4,) or (5,), its object.
        names: of the E edges.
        units: of each edge's bins.
        bins: (E, K) in these units.
        truth: (E,) the object's edges, in these units; None where a head says them in units of its own.
        probabilities: (E, K) by the name of the model.
    """

    sample: Sample
    point: Tensor
    box: Tensor
    names: tuple[str, ...]
    units: tuple[str, ...]
    bins: Tensor
    truth: Tensor | None
    probabilities: dict[str, Tensor]


def most_disputed(samples: Sequence[Sample], models: Mapping[str, nn.Module]) -> Edge | None:
    """Of every object's best anchor, the one where the first model (the teacher) and the second (the student alone)
    differ most about the edges, by KL divergence; None where no anchor is in the main region."""
    best: Edge | None = None
    furthest = -1.0
    teacher, alone, *_ = models
    for sample in samples:
        student = models[alone]
        views = dict(zip(models, dense_views(list(models.values()), sample), strict=True))
        mine, targets = views[alone], _targets(sample, student)
        overlaps = Main().overlaps(mine, targets)[0].cpu()
        said = {name: _probabilities(view if name == alone else view.match(mine)) for name, view in views.items()}
        points = _points(mine)
        for box in sample[1]["boxes"]:
            middle = contains(box, points)
            at = int((overlaps * middle).argmax())
            if overlaps[at] * middle[at] <= 0:
                continue
            t, s = said[teacher][at], said[alone][at]
            distance = float((t * (t.clamp(min=1e-9).log() - s.clamp(min=1e-9).log())).sum())
            if distance > furthest:
                furthest = distance
                best = _edge(sample, mine, points[at], box, at, {n: p[at] for n, p in said.items()})
    return best


def _edge(
    sample: Sample, view: DenseDetections, point: Tensor, box: Tensor, at: int, probabilities: dict[str, Tensor]
) -> Edge:
    """``at``: the anchor's place among those of its picture."""
    bins = view.bins.cpu().expand(next(iter(probabilities.values())).shape)
    ends = torch.tensor(view.classes.counts).cumsum(0)
    stride = view.strides[int((at >= ends).sum())]
    strides = f"distance from the point, in strides of {stride} px"
    if len(bins) == 4:
        truth = encode(point[None], box[None])[0] / stride
        return Edge(sample, point, box, EDGES, (strides,) * 4, bins, truth, probabilities)
    bins = torch.cat([bins[:4], bins[4:].rad2deg()])
    names, unit = (EDGES, strides) if view.anchors is None else (DELTAS, "of the anchor's own, as encoded")
    return Edge(sample, point, box, (*names, "angle"), (*(unit,) * 4, "degrees"), bins, None, probabilities)


def distributions(edge: Edge) -> Figure:
    """The picture with the object and the anchor's point, and beside it what each model says of the edges."""
    figure = Figure(figsize=(3 * (len(edge.names) + 1), 3.1), layout="constrained")
    axes = figure.subplots(1, len(edge.names) + 1)
    _picture(axes[0], edge.sample[0])
    _outlines(axes[0], edge.box[None], colour=MAIN)
    axes[0].plot(*edge.point.tolist(), "+", color=MAIN, ms=12, mew=2)
    colours = (TEACHER, *_cycle(len(edge.probabilities))[1:])
    for i, (axis, name) in enumerate(zip(axes[1:], edge.names, strict=True)):
        bins = edge.bins[i]
        width = 0.8 * float(bins[1] - bins[0])
        for (model, rows), colour in zip(edge.probabilities.items(), colours, strict=True):
            if model == next(iter(edge.probabilities)):
                axis.bar(bins.numpy(), rows[i].numpy(), color=colour, alpha=0.45, width=width, label=model)
            else:
                axis.plot(bins.numpy(), rows[i].numpy(), "o-", color=colour, ms=3, lw=1.2, label=model)
        if edge.truth is not None:
            axis.axvline(float(edge.truth[i]), color=TRUTH, ls="--", lw=1, label="truth")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(edge.units[i], fontsize=8)
    axes[1].set_ylabel("probability", fontsize=8)
    axes[-1].legend(fontsize=8)
    return figure


@torch.no_grad()
def dense_views(models: Sequence[nn.Module], sample: Sample) -> list[DenseDetections]:
    """What each detector's head says of one picture. Raises ViewError for a model whose head is not known."""
    views = []
    for model in models:
        adapter = adapter_for(model)
        side = Side("model", model.eval(), adapter, [Reading(DenseDetections, None)])
        try:
            _, read = side.run(*adapter.call(model, [sample[0].to(_device(model))]), exit_early=False)
        finally:
            side.taps.remove()
        (view,) = read.values()
        assert isinstance(view, DenseDetections)
        views.append(view)
    return views


def _points(view: DenseDetections) -> Tensor:
    """(N, 2) x, y of every anchor's point, in pixels."""
    maps = view.classes
    rows = [
        grid_points([size], [stride], view.centre, "cpu").repeat_interleave(anchors, 0)
        for size, stride, anchors in zip(maps.sizes, view.strides, maps.per_cell, strict=True)
    ]
    return torch.cat(rows)


def _probabilities(view: DenseDetections) -> Tensor:
    """(N, E, K) of the only picture."""
    if view.edges is None:
        raise ViewError("a model here has no distributions over the edges of boxes")
    return view.edges.all()[0].float().softmax(-1).cpu()


def _targets(sample: Sample, model: nn.Module) -> BoxTargets:
    image, target = sample
    device = _device(model)
    size = (image.shape[-2], image.shape[-1])
    return BoxTargets([target["boxes"].to(device)], [target["labels"].to(device)], [size])


@torch.no_grad()
def _predict(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (k, 4) or (k, 5), labels (k,) and scores (k,), the best of every place."""
    (found,) = detect(model.eval(), [image.to(_device(model))])
    boxes, labels, scores = (found[name].cpu() for name in ("boxes", "labels", "scores"))
    best = nms(boxes, scores, SAME) if boxes.shape[1] == 4 else rotated_nms(boxes, scores, None, SAME)
    return boxes[best], labels[best], scores[best]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _picture(axis: Axes, image: Tensor, fade: float = 0.0) -> None:
    """Draw a picture (3, H, W), lightened by ``fade``."""
    axis.imshow((image * (1 - fade) + fade).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[2] - 0.5), ylim=(image.shape[1] - 0.5, -0.5))


def _outlines(axis: Axes, boxes: Tensor, colour: str = TRUTH) -> None:
    for outline in _corners(boxes):
        axis.add_patch(Polygon((outline - 0.5).numpy(), fill=False, edgecolor=colour, lw=1.4))


def _corners(boxes: Tensor) -> Tensor:
    """(k, 4) or (k, 5) -> (k, 4, 2)."""
    if boxes.shape[1] == 5:
        return corners(boxes)
    return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2)


def _grid(panels: int, width: float, height: float) -> list[Axes]:
    """At most four panels in a row."""
    columns = min(panels, 4)
    lines = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return axes[:panels]


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of 1/20 of the run, so that the trend shows."""
    width = max(len(values) // 20, 1)
    ends = np.concatenate([[0.0], np.cumsum(values)])
    right = np.arange(1, len(values) + 1)
    left = np.maximum(right - width, 0)
    return (ends[right] - ends[left]) / (right - left)
