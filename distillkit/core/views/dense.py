"""The view of dense detectors: class logits and edge distributions of every anchor, level by level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from distillkit.boxes.maps import Maps, Picked
from distillkit.boxes.moved import FacingEdges, MovedEdges, angles_of
from distillkit.core.views.base import View, check_names

#: how far the strides of two levels may be apart, as a share, when pictures were resized to whole pixels
NEARLY = 0.02


@dataclass(frozen=True)
class DenseDetections(View):
    """What a dense detector says of every anchor, kept per level as the head made it.

    Args:
        classes: logits, ``shape == (C,)``.
        edges: logits of the E edges' distributions of K bins, ``shape == (E, K)``; None for heads without them.
        strides: pixels per cell of each level.
        centre: where in its cell an anchor's point stands: 0 = the corner (GFL), 0.5 = the middle (FCOS, YOLO).
        support: (K,) the value of each bin in strides, or (E, K), a row an edge where they differ, each in the unit
            that the head decodes it in; 0..K-1 unless given.
        octave: side of the square anchor box in strides (8 in GFL and ATSS); used by assigners and regions.
        anchors: (N, 4) x1, y1, x2, y2 pixels of one picture's anchors, in the order level, y, x, anchor, for heads
            whose anchors are not one square a cell (RetinaNet); None: squares of side ``octave`` around the points.
        scores: class probabilities, same layout as ``classes``, where they are not ``sigmoid(classes)`` (GFLv2).
        turned: the first four distances are measured in the frame that the fifth distribution, of an angle around half
            a turn, turns (rotated GFL).
        unit: what edges are: distances from the point in strides, or changes of an anchor box (RetinaNet).
        scale: of a teacher's pictures, sides in those of the student's; None: not one number for the batch.
        whole: of a student's view of which levels were left out, the view with all levels: regions are found there.
        kept: which of the levels of ``whole`` these are.
    """

    #: what an error says of a view whose ``edges`` are None, after "the student" or "the teacher"
    without_edges: ClassVar[str] = (
        "has no edge distributions: name them with the adapter's edges=, make some of a plain regressor's numbers "
        "(distillkit.to_distribution(detector)), or leave this distiller out"
    )

    classes: Maps
    edges: Maps | None
    strides: tuple[int, ...]
    centre: float = 0.0
    support: Tensor | None = None
    octave: float = 8.0
    anchors: Tensor | None = None
    scores: Maps | None = None
    turned: bool = False
    unit: Literal["strides", "anchors"] = "strides"
    scale: float | None = 1.0
    whole: DenseDetections | None = None
    kept: tuple[int, ...] = ()

    @property
    def bins(self) -> Tensor:
        """``support``, or what it is unless given: (K,) bin values in strides."""
        assert self.edges is not None
        return (
            self.support
            if self.support is not None
            else torch.arange(self.edges.shape[-1], device=self.edges.levels[0].device, dtype=torch.float32)
        )

    # ---- levels

    def partner(self, stride: int) -> int | None:
        """The number of this teacher's level whose cells are those of a student's level."""
        scale = self.scale or 1.0
        off = [abs(mine / scale / stride - 1) for mine in self.strides]
        nearest = min(range(len(off)), key=off.__getitem__)
        return nearest if off[nearest] <= (0 if scale == 1 else NEARLY) else None

    def only(self, keep: Sequence[int]) -> Self:
        """The levels of these numbers."""
        parts = None if self.anchors is None else self.anchors.split(list(self.classes.counts))
        return replace(
            self,
            classes=self.classes.only(keep),
            edges=self.edges and self.edges.only(keep),
            strides=tuple(self.strides[i] for i in keep),
            anchors=None if parts is None else torch.cat([parts[i] for i in keep]),
            scores=self.scores and self.scores.only(keep),
        )

    def shared_with(self, teacher: Any) -> Self:
        """The levels that the teacher has, too. Which anchors are whose is still decided among all."""
        keep = tuple(i for i, stride in enumerate(self.strides) if teacher.partner(stride) is not None)
        if not keep:
            raise ValueError(f"no level is shared: {teacher._strides_in_words()}, the student's are {self.strides}")
        return self if len(keep) == len(self.strides) else replace(self.only(keep), whole=self, kept=keep)

    def _strides_in_words(self) -> str:
        seen = "" if self.scale == 1 else f", {_numbers([s / (self.scale or 1) for s in self.strides])} at its scale"
        return f"the teacher's strides are {self.strides}{seen}"

    # ---- of a teacher

    def at_scale(self, scale: float | None) -> Self:
        return replace(self, scale=scale)

    def picked(self, columns: Tensor, names: int) -> Self:
        """Of a proposal network, which says of an anchor whether there is any object, it stays as it is."""
        if self.classes.shape == (1,) and names > 1:
            return self
        check_names(self.classes.shape[0], names)
        return replace(self, classes=Picked(self.classes, columns), scores=self.scores and Picked(self.scores, columns))

    def unmatched(self, student: DenseDetections) -> list[str]:
        partners = [self.partner(stride) for stride in student.strides]
        left = [stride for i, stride in enumerate(self.strides) if i not in partners]
        notes = [f"level of stride {stride} is left out: the student has none" for stride in left]
        if student.whole is not None:
            alone = [s for i, s in enumerate(student.whole.strides) if i not in student.kept]
            notes.append(f"has no level of stride {_numbers(alone)}: there the student learns nothing from it")
        if self._is_pooled(student):
            notes.append(f"{self.classes.anchors} anchors a cell are seen as one: the greatest logit of each class")
        if not self._edges_can_move(student):
            return notes
        if self.centre != student.centre:
            notes.append(
                f"points stand at {self.centre} of a cell, the student's at {student.centre}: its distributions are "
                f"moved by {abs(self.centre - student.centre):g} strides"
            )
        if self._bins_differ(student):
            (least, most), (from_, to) = _ends(self.bins), _ends(student.bins)
            beyond = least < from_ or most > to
            notes.append(
                f"{len(self.bins)} bins from {least:g} to {most:g} are told in the student's {len(student.bins)} from "
                f"{from_:g} to {to:g}" + ("; what is beyond them goes to the bin at the end" if beyond else "")
            )
        return notes

    def match(self, student: DenseDetections) -> DenseDetections:
        """The teacher's levels that the student has, its distributions told from the student's points in its bins.

        Levels are matched by stride, at the teacher's ``scale``. Where the points of the two stand at different places
        of a cell, left and top distances grow by the difference and right and bottom ones shrink. Of several anchors a
        cell, to a student that has one, each class has the greatest logit. Distributions over other bins, or of another
        point, are resampled as they are gathered (``boxes.moved``).
        """
        found = self.only(self._levels_of(student))
        if found._is_pooled(student):
            found = replace(found, classes=_pooled(found.classes), scores=found.scores and _pooled(found.scores))
        if found.classes.sizes != student.classes.sizes:
            found = found._fitted(student, max(self.strides) / (self.scale or 1))
        edges = found._edges_for(student)
        moved = isinstance(edges, MovedEdges)
        return replace(
            found,
            edges=edges,
            support=student.support if moved else self.support,
            strides=student.strides,
            centre=student.centre,
            scale=1.0,
        )

    def _levels_of(self, student: DenseDetections) -> list[int]:
        if self.scale is None:
            raise ValueError(
                "the teacher's pictures are not all scaled by one number, the same in height and width, so that its "
                "cells are not the student's: give Teacher(..., scale=) instead of size="
            )
        keep = []
        for stride in student.strides:
            partner = self.partner(stride)
            if partner is None:
                at = ""
                if self.scale != 1:
                    seen = _numbers([s / self.scale for s in self.strides])
                    at = f", which at scale={self.scale:g} mean {seen} (choose a scale= at which levels are the same)"
                raise ValueError(
                    f"the student's level of stride {stride} "
                    f"has no partner among the teacher's strides {self.strides}{at}; "
                    'with Teacher(..., levels="shared") the student learns from it on the levels that both have; '
                    "or leave the level out of the student's adapter (strides=, classes=, edges=)"
                )
            keep.append(partner)
        return keep

    def _fitted(self, student: DenseDetections, padding: float) -> DenseDetections:
        """Maps at the student's sizes. The two may pad a picture by other amounts, to the right and below: cells beyond
        the student's are left out, those that it lacks are outside of the picture and are filled up with the last.

        padding: to multiples of how many of the student's pixels the teacher may pad.
        """
        mine, theirs = self.classes.sizes, student.classes.sizes
        pads, slack = max((student.whole or student).strides), 0 if self.scale == 1 else student.strides[0]
        for a, b in zip(mine[0], theirs[0], strict=True):
            height, its = a * student.strides[0], b * student.strides[0]
            if height > _multiple(its, padding) + slack or its > _multiple(height, pads) + slack:
                raise ValueError(
                    f"the level maps differ: teacher {mine}, student {theirs} (height, width), by more than padding "
                    "explains; feed both the same picture size, or say how much larger the teacher's is: "
                    "Teacher(..., scale=)"
                )
        return replace(
            self,
            classes=_at_sizes(self.classes, theirs),
            edges=self.edges and _at_sizes(self.edges, theirs),
            scores=self.scores and _at_sizes(self.scores, theirs),
        )

    def _is_pooled(self, student: DenseDetections) -> bool:
        return student.classes.anchors == 1 and self.classes.anchors != 1

    # ---- edges

    def _edges_can_move(self, student: DenseDetections) -> bool:
        """Whether both have four distributions told in one unit, of as many anchors; else ``check_edges`` of the
        distillers that read them says what differs."""
        if not self.edges or not student.edges or self.turned or student.turned:
            return False
        one_row = all(view.support is None or view.support.dim() == 1 for view in (self, student))
        same = self.unit == student.unit and self.edges.anchors == student.edges.anchors
        return same and one_row and self.edges.shape[0] == student.edges.shape[0] == 4

    def _bins_differ(self, student: DenseDetections) -> bool:
        assert self.edges is not None
        assert student.edges is not None
        if self.edges.shape != student.edges.shape:
            return True
        if self.support is student.support:
            return False
        # a look at the values would break a compiled graph: bins that do not differ stay as they are when told anew
        return torch.compiler.is_compiling() or _values_differ(self.support, student.support, self.edges.shape[-1])

    def _edges_for(self, student: DenseDetections) -> Maps | None:
        edges, offset = self.edges, student.centre - self.centre
        if offset and edges and edges.shape[0] != 4:
            raise ValueError(
                f"points stand at {self.centre} and {student.centre} of a cell, "
                f"and only 4 edges can be moved, not {edges.shape[0]}"
            )
        if edges and self.turned and student.edges:
            return FacingEdges(edges.levels, edges.shape, edges.anchors, angle=angles_of(student.edges))
        if edges and self._edges_can_move(student) and (offset or self._bins_differ(student)):
            return MovedEdges.of(edges, self.bins, student.bins, offset)
        return edges


@lru_cache(maxsize=8)  # one look at the values, which waits for the device, and not one a step
def _values_differ(teacher: Tensor | None, student: Tensor | None, bins: int) -> bool:
    mine, theirs = (torch.arange(bins) if v is None else v.detach().cpu() for v in (teacher, student))
    return bool(((mine - theirs).abs() > 1e-4).any())


def _ends(bins: Tensor) -> tuple[float, float]:
    least, most = bins[[0, -1]].tolist()
    return least, most


def _multiple(length: float, of: float) -> float:
    """The next multiple."""
    return math.ceil(length / of) * of


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _each(maps: Maps, change: Any, shape: tuple[int, ...], anchors: int | tuple[int, ...]) -> Maps:
    """Each level (B, A, C, H, W) changed, as maps of other anchors and numbers."""
    levels = (
        change(m.unflatten(1, (count, -1)), i).flatten(1, 2)
        for i, (m, count) in enumerate(zip(maps.levels, maps.per_cell, strict=True))
    )
    return Maps(tuple(levels), shape, anchors)


def _pooled(maps: Maps) -> Maps:
    return _each(maps, lambda m, _: m.amax(1, keepdim=True), maps.shape, 1)


def _at_sizes(maps: Maps, sizes: Sequence[tuple[int, int]]) -> Maps:
    """Cut off at the right and below, or filled up there with the last cells."""

    def fit(m: Tensor, i: int) -> Tensor:
        height, width = sizes[i]
        m = m[..., :height, :width]
        missing = (0, width - m.shape[-1], 0, height - m.shape[-2])
        return pad(m.flatten(1, 2), missing, mode="replicate").unflatten(1, m.shape[1:3]) if any(missing) else m

    return _each(maps, fit, maps.shape, maps.anchors)
