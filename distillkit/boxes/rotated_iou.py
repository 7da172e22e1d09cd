"""Overlaps of rotated boxes (cx, cy, w, h, angle): one formula for every device, differentiable, at every angle.

Seen from the centre and along the axes of box B, B is the strip ``|x| <= w/2`` of the strip ``|y| <= h/2``. By Green's
theorem the area that it shares with box A is the integral, once around A, of ``clamp(y, -h/2, h/2) dx`` over the parts
of A's sides where ``|x| <= w/2``. On each side that is the length of such a part along x times the mean of the clamped
y, both in closed form. No corner is looked for, no case distinguished: the area is continuous in all ten numbers, also
where sides coincide, and the gradient is finite everywhere.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillkit.boxes.precision import at_least_float32

Over = Literal["union", "first"]
NO_AREA = 1e-18  # square pixels, up to which nothing is divided by an area: float32 would overflow
# pairs at once, each with some 400 bytes of intermediate results
PAIRS_IN_CACHE = 1 << 13
PAIRS_ON_ACCELERATOR = 1 << 18
PAIRS_TO_FILTER = 1 << 19  # of which the near ones are found: one byte each
FEW_PAIRS = 1 << 12  # up to which computing all takes less time than finding the near ones


def pairwise_rotated_iou(a: Tensor, b: Tensor, over: Over = "union", dense: bool | None = None) -> Tensor:
    """Overlap of every box with every other: (N, 5), (M, 5) -> (N, M) in 0..1, float32 or wider.

    Differentiable in both; the backward pass computes the overlaps again, part by part, rather than keep what they
    were made of. In float32 the error is below 1e-4 as long as no side of a pair is more than 1000 times another;
    centres may be anywhere.

    Args:
        a, b: pixels and radians, any angle, finite, sides >= 0 and, in float32, below 1e18. A box without area overlaps
            nothing: 0.
        over: "union": intersection over union; "first": intersection over the area of a.
        dense: compute every pair, without host sync, or only those whose upright boxes overlap; by default the first on
            accelerators, under ``torch.compile`` and for a few pairs. A call takes 0.2 ms or more on a CPU: give it the
            boxes of a picture, not two.

    Raises:
        ValueError: other shapes, another ``over``.
    """
    _check(a, b, over)
    columns, others = columns_of(a), columns_of(b)
    if dense is None:
        dense = a.device.type != "cpu" or torch.compiler.is_compiling() or len(a) * len(b) <= FEW_PAIRS
    return (_all_pairs if dense else _near_pairs)(columns, others, over)


def aligned_rotated_iou(a: Tensor, b: Tensor, over: Over = "union") -> Tensor:
    """Overlap of box i with box i: (N, 5), (N, 5) -> (N,); for the rest see ``pairwise_rotated_iou``.

    Chosen pairs of many pictures are fastest in one call.
    """
    _check(a, b, over)
    if len(a) != len(b):
        raise ValueError(f"expected as many boxes in a as in b, got {len(a)} and {len(b)}")
    part = _pairs_at_once(a)
    parts = zip(columns_of(a).split(part, 1), columns_of(b).split(part, 1), strict=True)
    return torch.cat([_overlap(x, y, over) for x, y in parts])


def _check(a: Tensor, b: Tensor, over: str) -> None:
    for name, boxes in (("a", a), ("b", b)):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(f"{name}: expected rotated boxes (N, 5) as cx, cy, w, h, angle, got {tuple(boxes.shape)}")
    if over not in ("union", "first"):
        raise ValueError(f"over must be 'union' or 'first', got {over!r}")


def columns_of(boxes: Tensor) -> Tensor:
    """What is computed once a box: centre x, y, half width, half height, cosine, sine: (N, 5) -> (6, N)."""
    x, y, w, h, angle = at_least_float32(boxes).unbind(1)
    return torch.stack([x, y, w / 2, h / 2, angle.cos(), angle.sin()])


def _all_pairs(a: Tensor, b: Tensor, over: Over) -> Tensor:
    """(6, N), (6, M) -> (N, M), without host sync."""
    parts = a.split(max(1, PAIRS_ON_ACCELERATOR // max(1, b.shape[1])), 1)
    return torch.cat([_remembering_little(_overlap, part[:, :, None], b[:, None], over) for part in parts])


def _near_pairs(a: Tensor, b: Tensor, over: Over) -> Tensor:
    """(6, N), (6, M) -> (N, M): computed where upright boxes overlap, 0 elsewhere."""
    m, parts = b.shape[1], []
    for rows, i, j in near(a, b):
        values = overlap_at(a, b, i, j, over)
        place = (i - rows.start) * m + j
        parts.append(values.new_zeros(len(rows) * m).scatter(0, place, values).view(len(rows), m))
    return torch.cat(parts)


def overlap_at(a: Tensor, b: Tensor, i: Tensor, j: Tensor, over: Over = "union") -> Tensor:
    """Of column i of a with column j of b: (6, N), (6, M), (k,), (k,) -> (k,)."""
    part = _pairs_at_once(a)
    parts = zip(i.split(part), j.split(part), strict=True)
    return torch.cat([_remembering_little(_overlap_at, a, b, *some, over) for some in parts])


def _overlap_at(a: Tensor, b: Tensor, i: Tensor, j: Tensor, over: Over) -> Tensor:
    return _overlap(a.index_select(1, i), b.index_select(1, j), over)


def _pairs_at_once(x: Tensor) -> int:
    return PAIRS_IN_CACHE if x.device.type == "cpu" else PAIRS_ON_ACCELERATOR


def _remembering_little(function: Callable[..., Tensor], a: Tensor, b: Tensor, *others: Tensor | Over) -> Tensor:
    """``function(a, b, *others)``, of which only these are kept for the backward pass."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return checkpoint(function, a, b, *others, use_reentrant=False, preserve_rng_state=False)
    return function(a, b, *others)


@torch.no_grad()
def near(a: Tensor, b: Tensor, kinds: tuple[Tensor, Tensor] | None = None) -> Iterator[tuple[range, Tensor, Tensor]]:
    """The pairs whose upright boxes overlap, for some boxes of a at a time.

    Args:
        a, b: (6, N) and (6, M) columns.
        kinds: (N,) and (M,); only pairs of one kind, then.

    Yields:
        A range of boxes of a, and its pairs: (k,) indices into a and (k,) into b.
    """
    # NumPy compares, and looks through booleans, several times as fast as torch does on a CPU
    sides, (left, top, right, bottom) = _sides(a), _sides(b)
    labels = None if kinds is None else [kind.cpu().numpy() for kind in kinds]
    count, m = a.shape[1], b.shape[1]
    step = max(1, PAIRS_TO_FILTER // max(1, m))
    for start in range(0, max(1, count), step):
        rows = range(start, min(start + step, count))
        a_left, a_top, a_right, a_bottom = (side[rows.start : rows.stop, None] for side in sides)
        overlap = a_left < right
        overlap &= a_right > left
        overlap &= a_top < bottom
        overlap &= a_bottom > top
        if labels is not None:
            overlap &= labels[0][rows.start : rows.stop, None] == labels[1]
        i, j = np.divmod(np.flatnonzero(overlap), max(1, m))
        yield rows, torch.from_numpy(i + start).to(a.device), torch.from_numpy(j).to(a.device)


def _sides(columns: Tensor) -> list[np.ndarray]:
    """Left, top, right, bottom of the upright box around each."""
    x, y, w, h, cos, sin = columns
    reach_x, reach_y = w * cos.abs() + h * sin.abs(), w * sin.abs() + h * cos.abs()
    return [side.cpu().numpy() for side in (x - reach_x, y - reach_y, x + reach_x, y + reach_y)]


def _overlap(a: Tensor, b: Tensor, over: Over) -> Tensor:
    """Two sets of columns that broadcast, (6, ...) each -> (...)."""
    area, other = 4 * a[2] * a[3], 4 * b[2] * b[3]
    # where one box lies in the other the area shared is its own; so is the gradient, then
    shared = torch.minimum(_intersection(a, b), torch.minimum(area, other)).clamp(min=0)
    whole = area + other - shared if over == "union" else area.expand_as(shared)
    empty = whole <= NO_AREA
    return torch.where(empty, 0, shared / torch.where(empty, 1, whole))


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area shared, up to rounding: two sets of columns that broadcast, (6, ...) each -> (...)."""
    a_x, a_y, a_width, a_height, a_cos, a_sin = a
    b_x, b_y, width, height, b_cos, b_sin = b
    # A as B sees it: the centres are subtracted first, so it does not matter how far from 0 both stand
    apart_x, apart_y = a_x - b_x, a_y - b_y
    x, y = apart_x * b_cos + apart_y * b_sin, apart_y * b_cos - apart_x * b_sin
    cos, sin = a_cos * b_cos + a_sin * b_sin, a_sin * b_cos - a_cos * b_sin
    # half the sides of A: along its width and along its height
    px, py, qx, qy = a_width * cos, a_width * sin, -a_height * sin, a_height * cos

    # the four sides in turn: middle, half the way along it, both ends
    along_x, along_y = torch.stack([px, qx, -px, -qx]), torch.stack([py, qy, -py, -qy])
    middle_x, middle_y = x + torch.stack([-qx, px, qx, -px]), y + torch.stack([-qy, py, qy, -py])
    start_x, end_x = middle_x - along_x, middle_x + along_x
    from_x, to_x = start_x.clamp(-width, width), end_x.clamp(-width, width)
    # the ends slide along their side until |x| <= width; where none of it is there, what comes out is multiplied by 0
    dx, dy = 2 * along_x, 2 * along_y
    reach, run = dx.abs(), _divisor(dx)
    from_y = middle_y - along_y + (from_x - start_x).clamp(-reach, reach) / run * dy
    to_y = middle_y + along_y + (to_x - end_x).clamp(-reach, reach) / run * dy

    # the mean of clamp(y) between two ends: their own mean, but the end that sticks out further has more weight
    from_in, to_in = from_y.clamp(-height, height), to_y.clamp(-height, height)
    out = (from_y - from_in).abs() - (to_y - to_in).abs()
    twice_mean = from_in + to_in + (from_in - to_in) * (out / _divisor((from_y - to_y).abs()))
    return (twice_mean * (from_x - to_x)).sum(0) / 2


def _divisor(x: Tensor) -> Tensor:
    """x, and 1 where x is too small to divide by; what it divides is no larger."""
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, 1, x)
