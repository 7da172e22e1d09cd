"""What the distillers of dense detectors share: checks that two heads can be compared, and averages over anchors."""

from functools import lru_cache

import torch
from torch import Tensor

from distillkit.boxes.maps import Maps, Where
from distillkit.core.views import DenseDetections
from distillkit.losses.reduce import mean_over_ranks


def check_grids(student: DenseDetections, teacher: DenseDetections) -> None:
    """Raise ValueError unless both views hold the same anchors."""
    s, t = student.classes, teacher.classes
    if s.anchors != t.anchors:
        raise ValueError(
            f"the student has {s.anchors} anchors a cell, the teacher {t.anchors}; both need the same anchors="
        )
    if s.sizes != t.sizes:
        raise ValueError(
            f"the student's levels have {_sizes(s)} cells, the teacher's {_sizes(t)}; feed both pictures of one size "
            "and name levels of the same strides="
        )


def check_edges(student: DenseDetections, teacher: DenseDetections) -> tuple[Maps, Maps]:
    """The edge distributions of both; ValueError unless they can be compared bin by bin."""
    for role, view in (("student", student), ("teacher", teacher)):
        if view.edges is None:
            raise ValueError(f"the {role} {view.without_edges}")
    s, t = student.edges, teacher.edges
    assert s is not None
    assert t is not None
    if student.unit != teacher.unit or s.anchors != t.anchors:
        raise ValueError(
            f"the student's edges are {_told(student)}, the teacher's {_told(teacher)}, and cannot be told as those: "
            "distil the teacher's classes (LogitKD) or features, or give both the same kind of head"
        )
    if s.shape[-1] != t.shape[-1]:
        raise ValueError(
            f"the student has {s.shape[-1]} bins an edge, the teacher {t.shape[-1]}; build both heads with "
            "the same bins= (reg_max + 1)"
        )
    if s.shape[0] != t.shape[0]:
        raise ValueError(
            f"the student has {s.shape[0]} edges a box, the teacher {t.shape[0]}; name the same edges= on both sides"
        )
    if student.support is not teacher.support and not torch.compiler.is_compiling():
        _check_support(student.support, teacher.support, s.shape[-1])
    check_grids(student, teacher)
    return s, t


def _told(view: DenseDetections) -> str:
    assert view.edges is not None
    how = "distances in strides" if view.unit == "strides" else "changes of an anchor box"
    return f"{how}, of {view.edges.anchors} anchor(s) a cell"


@lru_cache(maxsize=8)  # one look at the values, which waits for the device, and not one a step
def _check_support(student: Tensor | None, teacher: Tensor | None, bins: int) -> None:
    """Raise ValueError unless the bins of both have the same values; None: 0..K-1."""
    mine, theirs = (torch.arange(bins) if v is None else v.detach().cpu() for v in (student, teacher))
    rows = torch.broadcast_shapes(mine.shape, theirs.shape)
    differ = ((mine - theirs).abs() > 1e-4).any(-1)
    if bool(differ.any()):
        edge = int(differ.view(-1).nonzero()[0])
        mine, theirs = (values.expand(rows).reshape(-1, bins)[edge] for values in (mine, theirs))
        of, unit = (f" of edge {edge}", "") if len(rows) > 1 else ("", " strides")
        raise ValueError(
            f"the student's bins{of} stand at {_values(mine)}{unit}, the teacher's at {_values(theirs)}; build both "
            "heads with the same bins"
        )


def _values(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:g}" for v in values.tolist()) + "]"


def mean_count(selected: Tensor) -> Tensor:
    """Number of True entries, mean over ranks: what a loss averaged over them divides by; never 0, so that 0/0 is 0."""
    return mean_over_ranks(selected.sum().float()).clamp(min=1e-6)


def sum_of_level_means(rows: Tensor, weight: Tensor, where: Where, maps: Maps) -> Tensor:
    """The release's average: sum(weight * rows) / (anchors of non-zero weight) of every level, summed over levels.

    rows, weight: (M,) in the order of ``maps.at(where)``. A level without any anchor adds 0.
    """
    parts = zip(_by_level(weight * rows, where, maps), _by_level(weight > 0, where, maps), strict=True)
    means = [summed.sum() / chosen.sum().clamp(min=1) for summed, chosen in parts]
    return sum(means[1:], means[0])


def _by_level(rows: Tensor, where: Where, maps: Maps) -> tuple[Tensor, ...]:
    if where.index is None:
        return rows.unflatten(0, (maps.images, -1)).split(list(maps.counts), 1)
    return rows.split([len(image) for image, _, _ in where.index])


def _sizes(maps: Maps) -> str:
    return ", ".join(f"{h} x {w}" for h, w in maps.sizes)
