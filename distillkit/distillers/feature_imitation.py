"""Feature imitation: FitNets (arXiv:1412.6550) on the whole map, or on the cells that matter for objects.

Inside boxes and fine-grained cells: Wang et al., arXiv:1906.03609. General instances (GI): Dai et al.,
arXiv:2103.02340.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.boxes.anchors import grid_points, grid_strides
from distillkit.boxes.distribution import decode, integral
from distillkit.boxes.iou import aligned_iou
from distillkit.boxes.maps import Maps
from distillkit.boxes.overlap import Overlap, contains
from distillkit.boxes.precision import at_least_float32
from distillkit.boxes.regions import Main, matched
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.views import BoxTargets, DenseDetections, Features
from distillkit.distillers.dense import check_edges, mean_count

#: fine-grained: a cell takes part whose anchor overlaps an object more than this share of the object's best anchor
FINE_GRAINED_SHARE = 0.5
#: general instances: how many a level keeps, and the overlap from which on two count as one
GI_KEPT, GI_IOU = 10, 0.3


class FeatureImitation(Distiller):
    """Make the student's features equal the teacher's, on the whole map or on chosen cells.

        loss = sum over maps of mean over (chosen cells, channels) of (student - teacher)^2

    Args:
        region: ``whole``: every cell or token; ``boxes``: cells whose point is inside an object; ``fine-grained``:
            cells with an anchor whose IoU with some object exceeds half of the best of that object; ``gi``: the 10
            cells of each level and picture where student and teacher disagree most about a class, no two predicted
            boxes with IoU above 0.3.
        weight: what the loss is multiplied by; the LD paper uses 2 on the outputs of an FPN.
        convention: ``default`` as above; ``release``: as the LD release, see below.
        student_at, teacher_at: module paths of the maps on either side, in the same order.
        teacher, name: as in ``Distiller``.

    Reads:
        ``Features`` of both: (B, C, H, W) maps or, for ``whole``, also (B, N, C) tokens. The other regions read
        ``DenseDetections`` too, one level a map; ``gi`` of both sides, the others the student's alone.

    Where the widths differ, a 1x1 projection of the student's features is made by ``prepare`` and trained along.

    Default and release. The release averages over the cells of one GPU; the default over those of all ranks. For ``gi``
    the release looks for the 10 cells among all pictures of the batch at once, as though they were one, so that a
    picture hides cells of another; the default looks in each picture. The release drops the levels without any ATSS
    positive. Of rotated objects the default looks at the turned boxes, Rotated-LD at their boxes with the angle left
    out; its regrouping of a cell's nine anchors, which marks wrong cells, is in neither.

    Raises:
        ValueError: unknown words; maps that differ in number, size or, without projection, width; ``whole`` with
            ``convention="release"``, which has no such form.
    """

    short_name = "imitation"

    def __init__(
        self,
        region: Literal["whole", "boxes", "fine-grained", "gi"] = "whole",
        weight: float | Weight = 1.0,
        convention: Literal["default", "release"] = "default",
        student_at: str | list[str] | None = None,
        teacher_at: str | list[str] | None = None,
        teacher: str | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, teacher, name)
        if region not in ("whole", "boxes", "fine-grained", "gi"):
            raise ValueError(f"region must be 'whole', 'boxes', 'fine-grained' or 'gi', got {region!r}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        if region == "whole" and convention == "release":
            raise ValueError(
                "the release has no whole-map form: leave out convention='release' or choose another region"
            )
        self.reads = Features if region == "whole" else (Features, DenseDetections)
        self.reads_classes = region == "gi"
        self.region = region
        self.convention = convention
        self.student_at, self.teacher_at = student_at, teacher_at
        self.projections = nn.ModuleList()

    def prepare(self, student_widths: list[int] | None, teacher_widths: list[int] | None) -> None:
        """Make a projection for every map whose width differs on the two sides."""
        if student_widths is None or teacher_widths is None:
            return
        check_numbers(len(student_widths), len(teacher_widths))
        self.projections = nn.ModuleList(
            nn.Linear(s, t) if s != t else nn.Identity() for s, t in zip(student_widths, teacher_widths, strict=True)
        )

    def forward(self, student: Any, teacher: Any, targets: Any) -> Tensor:
        if self.region == "whole":
            return sum_of(F.mse_loss(s, t) for s, t in self._pairs(student, teacher))
        (features, detections), (teacher_features, teacher_detections) = student, teacher
        cells = self._cells(detections, teacher_detections, targets)
        pairs = self._pairs(features, teacher_features)
        if len(pairs) != len(cells):
            raise ValueError(f"{len(pairs)} feature maps, but the head has {len(cells)} levels; name one map a level")
        return sum_of(self.of_level(s, t, at) for (s, t), at in zip(pairs, cells))

    def _pairs(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Student (projected) and teacher maps, at least in float32."""
        check_numbers(len(student.maps), len(teacher.maps))
        pairs = []
        for i, (s, t) in enumerate(zip(student.maps, teacher.maps)):
            s = project(s, self.projections[i]) if len(self.projections) else s
            if s.shape != t.shape:
                raise ValueError(
                    f"map {i} is {tuple(s.shape)} in the student and {tuple(t.shape)} in the teacher. "
                    "Channels are matched by a projection where their numbers are known before the first step (name "
                    "convolutions or linear layers in student_at and teacher_at); the other numbers must be equal: "
                    "choose layers of the same stride"
                )
            pairs.append((at_least_float32(s), at_least_float32(t.detach())))
        return pairs

    def _cells(self, student: DenseDetections, teacher: DenseDetections, targets: BoxTargets) -> list[Tensor]:
        """(B, H, W) bool of each level: the cells that take part."""
        release = self.convention == "release"
        overlap: Overlap = "angle-free" if release else "rotated"
        if self.region == "boxes":
            chosen = inside_boxes(student, targets, overlap)
        elif self.region == "fine-grained":
            chosen = fine_grained(student, targets, overlap)
        else:
            chosen = general_instances(student, teacher, targets, across_pictures=release)
        levels = on_cells(chosen, student.classes)
        if not release:
            return levels
        _, positive = Main(overlap=overlap)(student, targets, "one", True)
        used = on_cells(positive.view(targets.images, -1) > 0, student.classes)
        return [level & p.any() for level, p in zip(levels, used)]

    def of_level(self, student: Tensor, teacher: Tensor, cells: Tensor) -> Tensor:
        if cells.shape != (student.shape[0], *student.shape[2:]):
            raise ValueError(
                f"a feature map is {tuple(student.shape)}, its level of the head {tuple(cells.shape)} "
                "(images, height, width); name the maps that the head reads, one a level and in its order"
            )
        count = cells.sum().clamp(min=1) if self.convention == "release" else mean_count(cells)
        return ((student - teacher).square().mean(1) * cells).sum() / count


def check_numbers(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(
            f"{student} feature maps of the student, {teacher} of the teacher; name as many paths in student_at as in "
            "teacher_at"
        )


def project(x: Tensor, projection: nn.Module) -> Tensor:
    """A linear layer over the channels of a map (B, C, H, W) or of tokens (B, N, C), at least in float32."""
    if not isinstance(projection, nn.Linear):
        return x
    x, weight, bias = (at_least_float32(t) for t in (x, projection.weight, projection.bias))
    return F.conv2d(x, weight[:, :, None, None], bias) if x.dim() == 4 else F.linear(x, weight, bias)


def on_cells(chosen: Tensor, maps: Maps) -> list[Tensor]:
    """(B, N) bool of anchors -> one (B, H, W) bool a level: a cell takes part if one of its anchors does."""
    levels = chosen.split(list(maps.counts), 1)
    return [
        level.view(len(level), h, w, anchors).any(-1)
        for level, (h, w), anchors in zip(levels, maps.sizes, maps.per_cell)
    ]


def inside_boxes(view: DenseDetections, targets: BoxTargets, overlap: Overlap = "rotated") -> Tensor:
    """(B, N) bool: the anchor's centre is strictly inside an object's box."""
    rows = []
    for m in matched(view, targets, overlap=overlap):
        centre = (m.anchors[:, :2] + m.anchors[:, 2:]) / 2
        rows.append(contains(m.boxes[:, None], centre).any(0))
    return torch.stack(rows)


def fine_grained(view: DenseDetections, targets: BoxTargets, overlap: Overlap = "rotated") -> Tensor:
    """(B, N) bool: the anchor's IoU with some object exceeds half of the best that the object has with any anchor."""
    rows = []
    for m in matched(view, targets, overlap=overlap):
        iou = m.iou * m.valid  # (k, N)
        rows.append((iou > FINE_GRAINED_SHARE * iou.amax(1, keepdim=True)).any(0))
    return torch.stack(rows)


@torch.no_grad()
def general_instances(
    student: DenseDetections, teacher: DenseDetections, targets: BoxTargets, across_pictures: bool = False
) -> Tensor:
    """(B, N) bool: the anchors of each level about whose class the two disagree most, with little overlap among them.

    The score is the largest difference of class probabilities; the box is that of whichever side is surer of that
    class.

    Args:
        across_pictures: choose among all pictures of the batch as though they were one (the release).
    """
    mine, theirs = check_edges(student, teacher)
    if mine.shape[0] != 4 or mine.anchors != 1:
        raise ValueError(
            "general instances are boxes of 4 edges around a point, one a cell; this head has "
            f"{mine.shape[0]} distributions an anchor and {mine.anchors} anchor(s) a cell: choose another region"
        )
    valid = torch.stack([m.valid for m in matched(student, targets)])
    points = grid_points(mine.sizes, student.strides, student.centre, valid.device)
    strides = grid_strides(mine.sizes, student.strides, valid.device)
    p_s, p_t = probabilities(student), probabilities(teacher)  # (B, N, C)
    score, at = (p_t - p_s).abs().max(-1)
    teacher_is_surer = (p_t >= p_s).gather(-1, at[..., None])
    distances = torch.where(
        teacher_is_surer, integral(theirs.all(), teacher.support), integral(mine.all(), student.support)
    )
    boxes = decode(points, distances * strides[:, None])  # (B, N, 4)
    score = score.masked_fill(~valid, -torch.inf)
    chosen = []
    for s, b in zip(score.split(list(mine.counts), 1), boxes.split(list(mine.counts), 1)):
        rows = 1 if across_pictures else len(s)
        chosen.append(best_apart(s.reshape(rows, -1), b.reshape(rows, -1, 4)).view_as(s))
    return torch.cat(chosen, 1)


def best_apart(score: Tensor, boxes: Tensor, most: int = GI_KEPT, iou: float = GI_IOU) -> Tensor:
    """(R, N) bool: of every row the ``most`` best boxes that non-maximum suppression leaves, found without a sync.

    score: (R, N), -inf for boxes that take no part; boxes: (R, N, 4).
    """
    left, chosen = score, torch.zeros_like(score, dtype=torch.bool)
    for _ in range(min(most, score.shape[1])):
        best, at = left.max(1, keepdim=True)  # (R, 1)
        this = torch.zeros_like(chosen).scatter(1, at, best > -torch.inf)
        chosen = chosen | this
        winner = boxes.gather(1, at[..., None].expand(-1, -1, 4)).expand_as(boxes)
        overlap = aligned_iou(winner.reshape(-1, 4), boxes.reshape(-1, 4)).view_as(score)
        left = left.masked_fill(this | (overlap > iou), -torch.inf)
    return chosen


def probabilities(view: DenseDetections) -> Tensor:
    """(B, N, C) class probabilities."""
    return view.classes.all().sigmoid() if view.scores is None else view.scores.all()


def sum_of(losses: Any) -> Tensor:
    first, *rest = losses
    return sum(rest, first)
