"""boxes/rotated.py: corners, smallest boxes, conventions of the angle, torchvision's boxes."""

import math
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from distillkit.boxes.rotated import (
    Convention,
    corners,
    from_corners,
    from_torchvision,
    normalize,
    smallest,
    to_torchvision,
    upright,
)
from distillkit.boxes.rotated_iou import aligned_rotated_iou

RANGES = {
    "le90": (-math.pi / 2, math.pi / 2),
    "le135": (-math.pi / 4, 3 * math.pi / 4),
    "oc": (0, math.pi / 2),
}


def some_boxes(number: int, seed: int = 0, dtype: torch.dtype = torch.float64, turns: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    place, size = torch.rand(number, 2, generator=g) * 2000 - 500, torch.rand(number, 2, generator=g) ** 3 * 800 + 1
    return torch.cat([place, size, (torch.rand(number, 1, generator=g) - 0.5) * turns * 2 * math.pi], 1).to(dtype)


def assert_same_rectangles(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Corner by corner, whichever comes first."""
    a, b = corners(got.double()), corners(want.double())
    distance = (a[:, :, None] - b[:, None]).norm(dim=-1)
    assert distance.amin(2).amax() <= tolerance
    assert distance.amin(1).amax() <= tolerance


def test_corners_turn_clockwise_in_the_picture() -> None:
    quarter = torch.tensor([10.0, 20, 4, 2, math.pi / 2]).double()
    want = torch.tensor([[11.0, 18], [11, 22], [9, 22], [9, 18]]).double()  # its width runs down the picture
    torch.testing.assert_close(corners(quarter), want)
    flat = torch.tensor([10.0, 20, 4, 2, 0])
    assert corners(flat).tolist() == [[8, 19], [12, 19], [12, 21], [8, 21]]
    assert corners(torch.zeros(2, 3, 5)).shape == (2, 3, 4, 2)


def test_upright_box_touches_the_corners() -> None:
    boxes = some_boxes(200)
    points = corners(boxes)
    torch.testing.assert_close(upright(boxes), torch.cat([points.amin(1), points.amax(1)], 1))


# ---- the smallest box around points


def test_corners_and_back() -> None:
    boxes = some_boxes(2000, turns=1.0)
    torch.testing.assert_close(from_corners(corners(boxes)), boxes, rtol=0, atol=1e-8)
    thin = torch.tensor([[1e6, -1e6, 5000, 0.01, 1.0], [30, 40, 0.5, 700, -2.0]]).double()
    torch.testing.assert_close(from_corners(corners(thin)), thin, rtol=0, atol=1e-5)
    single = boxes.float()
    torch.testing.assert_close(from_corners(corners(single)), single, rtol=0, atol=2e-3)


@pytest.mark.parametrize("order", [(1, 2, 3, 0), (3, 2, 1, 0), (0, 2, 1, 3), (2, 0, 3, 1)])
def test_corners_in_any_order(order: tuple[int, ...]) -> None:
    boxes = some_boxes(500)
    assert_same_rectangles(from_corners(corners(boxes)[:, order]), boxes, 1e-8)


def assert_smallest(box: Tensor, points: Tensor) -> None:
    """As large as shapely's smallest rectangle, and around all points."""
    want = shapely.minimum_rotated_rectangle(shapely.multipoints(points.numpy())).area
    assert box[2:4].prod().item() == pytest.approx(want, rel=1e-9, abs=1e-9)
    around = shapely.polygons(corners(torch.cat([box[:2], box[2:4] + 1e-6, box[4:]])).numpy())
    assert shapely.covers(around, shapely.points(points.numpy())).all()


def test_smallest_box_around_any_four_points() -> None:
    g = torch.Generator().manual_seed(1)
    quads = torch.rand(300, 4, 2, generator=g).double() * 100  # convex, concave and crossing
    quads[:50, 3] = quads[:50, 0]  # triangles
    for box, quad in zip(from_corners(quads), quads, strict=True):
        assert_smallest(box, quad)


def test_equally_small_rectangles_are_told_apart_at_every_scale() -> None:
    """Three of four points alone span the smallest rectangle: along either of two sides it is as large."""
    g = torch.Generator().manual_seed(0)
    quads = torch.rand(4000, 4, 2, generator=g, dtype=torch.float64) * 100
    quads[:, 3] = quads[:, 0] + 0.4 * (quads[:, 1] - quads[:, 0]) + 0.3 * (quads[:, 2] - quads[:, 0])  # inside
    boxes = from_corners(quads)
    for scale in (4 / 3, 0.37, 5.1):
        scaled = from_corners(quads * scale)
        assert aligned_rotated_iou(boxes * boxes.new_tensor([scale, scale, scale, scale, 1]), scaled).min() > 1 - 1e-6


def test_points_on_a_line_and_in_one_place() -> None:
    line = torch.tensor([[0.0, 0], [3, 4], [6, 8], [1.5, 2]]).double()
    dot = torch.tensor([[7.0, 8]] * 4).double()
    pair = torch.tensor([[0.0, 0], [0, 0], [0, 5], [0, 5]]).double()
    got = from_corners(torch.stack([line, dot, pair]))
    torch.testing.assert_close(got[:, :2], torch.tensor([[3.0, 4], [7, 8], [0, 2.5]]).double())
    torch.testing.assert_close(got[:, 2:4].amax(1), torch.tensor([10.0, 0, 5]).double())
    torch.testing.assert_close(got[:, 2:4].amin(1), torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert_same_rectangles(torch.stack([smallest(p) for p in (line, dot, pair)]), got, 1e-9)
    assert from_corners(torch.zeros(0, 4, 2)).shape == (0, 5)


def test_smallest_box_around_a_polygon() -> None:
    g = torch.Generator().manual_seed(2)
    for number in (1, 2, 3, 4, 5, 17, 400):
        points = torch.rand(number, 2, generator=g).double() * torch.tensor([300.0, 40.0])
        if number > 2:
            assert_smallest(smallest(points), points)
    boxes = some_boxes(20)
    between = torch.linspace(0, 1, 7)[:-1, None].double()
    for box, (a, b, c, d) in zip(boxes, corners(boxes), strict=True):
        outline = torch.cat([p + between * (q - p) for p, q in ((a, b), (b, c), (c, d), (d, a))])
        assert_same_rectangles(smallest(outline)[None], box[None], 1e-8)


def test_points_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected corners \(k, 4, 2\), got \(3, 8\)"):
        from_corners(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"at least one point, \(P, 2\), got \(0, 2\)"):
        smallest(torch.zeros(0, 2))


# ---- conventions


@settings(max_examples=60, deadline=None)
@given(
    angle=st.floats(-20, 20) | st.sampled_from([k * math.pi / 4 for k in range(-12, 13)]),
    sides=st.tuples(st.floats(0, 1000), st.floats(0, 1000)) | st.floats(0, 100).map(lambda x: (x, x)),
    single=st.booleans(),
)
@pytest.mark.parametrize("convention", ["le90", "le135", "oc"])
def test_conventions_keep_the_rectangle(
    convention: Convention, angle: float, sides: tuple[float, float], single: bool
) -> None:
    box = torch.tensor([[3.0, 4.0, *sides, angle]], dtype=torch.float32 if single else torch.float64)
    got = normalize(box, convention)
    low, high = (torch.tensor(x, dtype=box.dtype) for x in RANGES[convention])
    inside = (got[0, 4] > low) & (got[0, 4] <= high) if convention == "oc" else (got[0, 4] >= low) & (got[0, 4] < high)
    assert inside
    assert convention == "oc" or got[0, 2] >= got[0, 3]
    assert_same_rectangles(got, box, 1e-2 if single else 1e-9)
    assert torch.equal(normalize(got, convention), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conventions_at_the_ends_of_their_ranges(dtype: torch.dtype) -> None:
    """The same two rectangles, 4 x 2, lying and standing, written in every way."""
    half = math.pi / 2
    lying = [(4, 2, 0), (2, 4, half), (2, 4, -half), (4, 2, 2 * half), (4, 2, -2 * half)]
    standing = [(4, 2, half), (4, 2, -half), (2, 4, 0), (2, 4, 2 * half), (4, 2, 3 * half)]
    want: dict[Convention, Any] = {
        "le90": ((4, 2, 0), (4, 2, -half)),
        "le135": ((4, 2, 0), (4, 2, half)),
        "oc": ((2, 4, half), (4, 2, half)),
    }
    tolerance = 10 * torch.finfo(dtype).eps
    for convention, rectangles in want.items():
        for written, rectangle in zip((lying, standing), rectangles, strict=True):
            boxes = torch.tensor([(0, 0, *box) for box in written], dtype=dtype)
            got, wanted = normalize(boxes, convention), torch.tensor([(0, 0, *rectangle)], dtype=dtype)
            if convention == "oc":  # the angles that rounding moved come out next to 0 rather than at pi/2
                assert_same_rectangles(got, wanted.expand_as(got), 4 * tolerance)
                got = got[:3]
            torch.testing.assert_close(got, wanted.expand_as(got), rtol=0, atol=tolerance)


def test_unknown_convention() -> None:
    with pytest.raises(ValueError, match="'le90', 'le135' or 'oc', got 'le45'"):
        normalize(torch.zeros(1, 5), "le45")  # type: ignore[arg-type]


# ---- torchvision


def test_torchvision_turns_the_other_way() -> None:
    boxes = some_boxes(50)
    theirs = BoundingBoxes(
        to_torchvision(boxes), format=BoundingBoxFormat.CXCYWHR, canvas_size=(4000, 4000), clamping_mode=None
    )
    points = convert_bounding_box_format(theirs, new_format=BoundingBoxFormat.XYXYXYXY)
    torch.testing.assert_close(points.as_subclass(Tensor).view(-1, 4, 2), corners(boxes), rtol=0, atol=1e-8)
    torch.testing.assert_close(from_torchvision(to_torchvision(boxes)), boxes)
    assert np.isclose(to_torchvision(torch.tensor([0.0, 0, 1, 1, math.pi / 6]))[4], -30)
