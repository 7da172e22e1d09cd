"""Views: the typed, named tensors a distiller reads. A distiller sees views only, never a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distillkit.boxes.distribution import shift_bins
from distillkit.boxes.maps import Maps, Where
from distillkit.boxes.precision import at_least_float32
from distillkit.boxes.rotated_distribution import opposite_frames
from distillkit.losses.queries import partners


class View:
    """Base of all views. A view lives for one step; nothing keeps it."""

    def match(self, student: Self) -> Self:
        """This teacher view, expressed so that it can be compared with ``student`` entry by entry.

        Raises ValueError, naming the knob that resolves it, where the two cannot be matched.
        """
        return self

    def unmatched(self, student: Self) -> list[str]:
        """What of this teacher view has no partner in the student's, in words; said once, at the first step."""
        return []


@dataclass(frozen=True)
class ClassLogits(View):
    """logits: (B, C), before softmax or sigmoid."""

    logits: Tensor

    def match(self, student: ClassLogits) -> ClassLogits:
        if self.logits.shape != student.logits.shape:
            raise ValueError(
                f"class logits differ: teacher {tuple(self.logits.shape)}, student {tuple(student.logits.shape)}; "
                "teacher and student need the same classes in the same order"
            )
        return self


@dataclass(frozen=True)
class Features(View):
    """maps: feature maps (B, C, H, W), or token sequences (B, N, C)."""

    maps: tuple[Tensor, ...]

    def match(self, student: Features) -> Features:
        if len(self.maps) != len(student.maps):
            raise ValueError(
                f"teacher gives {len(self.maps)} feature maps, student {len(student.maps)}; "
                "name the same number of paths on both sides"
            )
        return self


@dataclass(frozen=True)
class TokenLogits(View):
    """What a classifier says of a picture, and of each of its tokens.

    Args:
        classes: (B, C) of the whole picture; None where it was not computed (a teacher that is read for its tokens).
        tokens: (B, N, C), row by row.
        grid: (height, width) with height * width == N.
    """

    classes: Tensor | None
    tokens: Tensor
    grid: tuple[int, int]

    def match(self, student: TokenLogits) -> TokenLogits:
        if self.tokens.shape[-1] != student.tokens.shape[-1]:
            raise ValueError(
                f"the teacher has {self.tokens.shape[-1]} classes, the student {student.tokens.shape[-1]}; both need "
                "the same classes in the same order"
            )
        return self


@dataclass(frozen=True)
class PixelLogits(View):
    """logits: (B, C, h, w), of every pixel, or of every cell of a coarser map, before the softmax."""

    logits: Tensor

    def match(self, student: PixelLogits) -> PixelLogits:
        """The teacher's at the student's size: interpolated (bilinear, corners not aligned) where they differ."""
        if self.logits.shape[1] != student.logits.shape[1]:
            raise ValueError(
                f"the teacher has {self.logits.shape[1]} classes, the student {student.logits.shape[1]}; both need "
                "the same classes in the same order"
            )
        size = student.logits.shape[2:]
        if self.logits.shape[2:] == size:
            return self
        return PixelLogits(interpolate(self.logits, size=size, mode="bilinear", align_corners=False))


@dataclass(frozen=True)
class ActivationMaps(View):
    """Class logits of every cell of a classifier's last map: class activation maps before the ReLU.

    Args:
        maps: (B, K, h, w): the C foreground classes and, where ``background``, one more channel, the last.
        background: whether the last channel is the background's.
    """

    maps: Tensor
    background: bool

    @property
    def classes(self) -> int:
        """C, without the background."""
        return self.maps.shape[1] - self.background


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
    """

    classes: Maps
    edges: Maps | None
    strides: tuple[int, ...]
    centre: float = 0.0
    support: Tensor | None = None
    octave: float = 8.0
    anchors: Tensor | None = None
    scores: Maps | None = None
    turned: bool = False

    @property
    def bins(self) -> Tensor:
        """``support``, or what it is unless given: (K,) bin values in strides."""
        assert self.edges is not None
        return (
            self.support
            if self.support is not None
            else torch.arange(self.edges.shape[-1], device=self.edges.levels[0].device, dtype=torch.float32)
        )

    def unmatched(self, student: DenseDetections) -> list[str]:
        left = [stride for stride in self.strides if stride not in student.strides]
        notes = [f"level of stride {stride} is left out: the student has none" for stride in left]
        if self.centre != student.centre and self.edges:
            notes.append(
                f"points stand at {self.centre} of a cell, the student's at {student.centre}: its distributions are "
                f"moved by {abs(self.centre - student.centre):g} strides"
            )
        return notes

    def match(self, student: DenseDetections) -> DenseDetections:
        """The teacher's levels that the student has, its distributions seen from the student's points.

        Where the points of the two stand at different places of a cell, left and top distances grow by the difference
        and right and bottom ones shrink; each distribution is resampled by that part of a bin when it is gathered.
        """
        keep = []
        for stride in student.strides:
            if stride not in self.strides:
                raise ValueError(
                    f"the student's level of stride {stride} "
                    f"has no partner among the teacher's strides {self.strides}; "
                    "leave the level out of the student's adapter (strides=, classes=, edges=)"
                )
            keep.append(self.strides.index(stride))
        classes, edges = self.classes.only(keep), self.edges and self.edges.only(keep)
        if classes.sizes != student.classes.sizes:
            raise ValueError(
                f"the level maps differ: teacher {classes.sizes}, student {student.classes.sizes} (height, width); "
                "feed both the same picture size"
            )
        offset = student.centre - self.centre
        if offset and edges:
            if edges.shape[0] != 4:
                raise ValueError(
                    f"points stand at {self.centre} and {student.centre} of a cell, "
                    f"and only 4 edges can be moved, not {edges.shape[0]}"
                )
            edges = ShiftedEdges(edges.levels, edges.shape, edges.anchors, support=self.support, offset=offset)
        if self.turned and edges and student.edges:
            edges = FacingEdges(edges.levels, edges.shape, edges.anchors, angle=_angles(student.edges))
        return replace(
            self,
            classes=classes,
            edges=edges,
            strides=student.strides,
            centre=student.centre,
            scores=self.scores and self.scores.only(keep),
        )


@dataclass(frozen=True)
class ShiftedEdges(Maps):
    """Edge distributions as a point ``offset`` cells further right and down would see them; moved after gathering."""

    support: Tensor | None = None
    offset: float = 0.0

    def at(self, where: Where) -> Tensor:
        rows = super().at(where)
        return rows if where.dense else self._moved(rows)  # of all they are moved already

    def all(self) -> Tensor:
        return self._moved(super().all())

    def _moved(self, logits: Tensor) -> Tensor:
        left_top, right_bottom = logits.split(2, -2)
        parts = (shift_bins(left_top, self.support, self.offset), shift_bins(right_bottom, self.support, -self.offset))
        return torch.cat(parts, -2)


@dataclass(frozen=True)
class FacingEdges(Maps):
    """The teacher's distributions in that one of its boxes' two frames which is nearer to the student's.

    A box is the same after half a turn, and its left is then called right, its top bottom. Beside the seam of the angle
    a teacher at 89 degrees and a student at -89 mean nearly one box, and each other's opposite distances. The angle's
    own distribution is the same in both frames.

    angle: the student's, ``shape == (1, K)``.
    """

    angle: Maps | None = None

    def at(self, where: Where) -> Tensor:
        assert self.angle is not None
        rows = super().at(where)
        return rows if where.dense else _facing(rows, self.angle.at(where))  # of all they are turned already

    def all(self) -> Tensor:
        assert self.angle is not None
        return _facing(super().all(), self.angle.all())


def _angles(edges: Maps) -> Maps:
    """The fifth of five distributions an anchor, without gradient."""
    levels = tuple(
        m.detach().unflatten(1, (anchors, *edges.shape))[:, :, 4:].flatten(1, 3)
        for m, anchors in zip(edges.levels, edges.per_cell, strict=True)
    )
    return Maps(levels, (1, edges.shape[-1]), edges.anchors)


def _facing(teacher: Tensor, angle: Tensor) -> Tensor:
    """Distributions (..., 5, K), and the student's angle (..., 1, K)."""
    opposite = opposite_frames(angle[..., 0, :], teacher[..., 4, :].detach())
    renamed = torch.cat([teacher[..., :4, :].roll(2, -2), teacher[..., 4:, :]], -2)
    return torch.where(opposite[..., None, None], renamed, teacher)


@dataclass(frozen=True)
class QueryDetections(View):
    """What a detector with queries (DETR and its like) says of every query, after its last decoder layer.

    Args:
        logits: (B, Q, C); where ``exclusive`` (B, Q, C + 1), the last of "no object".
        boxes: (B, Q, 4) cx, cy, w, h in shares of the picture.
        exclusive: classes exclude each other, as under a softmax (DETR); else each is its own yes or no (RT-DETR).
        edges: logits (B, Q, 4, K) of where each edge is, one tensor a decoder layer, the last the last layer's; None
            for heads without distributions (D-FINE has them).
        reference: (B, Q, 4) the boxes that the edges are told from; with ``edges``.
        support: (K,) what each bin means, in sides of the reference box, outwards; with ``edges``.
        paired: (B, Q) bool, of a teacher's that was matched: which of the student's queries it has something to say to;
            None: all.
        memo: what several distillers need of the same step (who belongs to whom), computed once.
    """

    logits: Tensor
    boxes: Tensor
    exclusive: bool
    edges: tuple[Tensor, ...] | None = None
    reference: Tensor | None = None
    support: Tensor | None = None
    paired: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def scores(self) -> Tensor:
        """(B, Q, C) probability of each class, at least in float32."""
        logits = at_least_float32(self.logits)
        return logits.softmax(-1)[..., :-1] if self.exclusive else logits.sigmoid()

    @property
    def confidence(self) -> Tensor:
        """(B, Q) probability of the most probable class, without gradient; 0 for queries that are not ``paired``."""
        best = self.scores.detach().amax(-1)
        return best if self.paired is None else best * self.paired

    def match(self, student: QueryDetections) -> QueryDetections:
        """The teacher's queries in the order of the student's that they belong to, see ``losses.queries.partners``."""
        mine, theirs = student.scores, self.scores
        if mine.shape[-1] != theirs.shape[-1]:
            raise ValueError(
                f"the teacher has {theirs.shape[-1]} classes, the student {mine.shape[-1]}; both need the same classes "
                "in the same order"
            )
        if id(student) not in self.memo:
            self.memo[id(student)] = partners(mine, student.boxes, theirs, self.boxes)
        index = self.memo[id(student)]
        at = index.clamp(min=0)
        return replace(
            self,
            logits=_rows(self.logits, at),
            boxes=_rows(self.boxes, at),
            edges=self.edges and tuple(_rows(layer, at) for layer in self.edges),
            reference=None if self.reference is None else _rows(self.reference, at),
            paired=index >= 0,
        )


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows (B, Q) of a (B, R, ...) tensor: (B, Q, ...)."""
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], index]


@dataclass
class BoxTargets:
    """Ground truth of a batch of pictures, in pixels of the network's input.

    Args:
        boxes: per image (k, 4) x1, y1, x2, y2, or rotated (k, 5) cx, cy, w, h, angle (radians, clockwise as seen).
        labels: per image (k,) int64, 0..C-1.
        sizes: per image (height, width) before padding to the batch's size: anchors outside it take no part.
        memo: what several distillers need of the same step (anchors, the assignment), computed once.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    sizes: list[tuple[int, int]]
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.boxes)
