"""Assigners and regions of heads other than GFL: against the definitions, anchor by anchor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distillkit.boxes.anchors import grid_points
from distillkit.boxes.fcos import FCOSMain, FCOSValuable
from distillkit.boxes.fcos import assign as fcos_assign
from distillkit.boxes.iou import pairwise_iou
from distillkit.boxes.maps import Maps
from distillkit.boxes.max_iou import MaxIoUMain, MaxIoUValuable
from distillkit.boxes.max_iou import assign as max_iou_assign
from distillkit.boxes.merged import Merged
from distillkit.boxes.regions import Valuable, matched
from distillkit.boxes.shapes import shaped_anchors
from distillkit.core.views import BoxTargets, DenseDetections

SIZES, STRIDES, PICTURE = ((16, 20), (8, 10), (4, 5)), (8, 16, 32), (128, 160)
COUNTS = tuple(h * w for h, w in SIZES)


def objects(seed: int, k: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(k, 2, generator=g) * torch.tensor([110.0, 80.0])
    return torch.cat([corner, corner + torch.rand(k, 2, generator=g) * 100 + 8], 1)


def head(anchors: int = 1, given: bool = False) -> DenseDetections:
    g = torch.Generator().manual_seed(0)
    classes = Maps(tuple(torch.randn(2, 3 * anchors, h, w, generator=g) for h, w in SIZES), (3,), anchors)
    shapes = shaped_anchors(SIZES, STRIDES, scales=1, ratios=(0.5, 1.0, 2.0)) if given else None
    return DenseDetections(classes, None, STRIDES, centre=0.5, anchors=shapes)


def targets(*boxes: Tensor) -> BoxTargets:
    return BoxTargets(list(boxes), [torch.zeros(len(b), dtype=torch.int64) for b in boxes], [PICTURE] * len(boxes))


@pytest.mark.parametrize("seed", range(4))
def test_fcos_assigns_as_defined(seed: int) -> None:
    gt, points = objects(seed, 6), grid_points(SIZES, STRIDES, 0.5, "cpu")
    index, inside = fcos_assign(points, STRIDES, COUNTS, gt)
    ranges = {8: (-1.0, 64.0), 16: (64.0, 128.0), 32: (128.0, math.inf)}
    strides = [s for s, n in zip(STRIDES, COUNTS, strict=True) for _ in range(n)]
    for (x, y), stride, got, got_inside in zip(points.tolist(), strides, index.tolist(), inside.tolist(), strict=True):
        found, any_inside = [], False
        for j, (x1, y1, x2, y2) in enumerate(gt.tolist()):
            distances = (x - x1, y - y1, x2 - x, y2 - y)
            centre = ((x1 + x2) / 2, (y1 + y2) / 2)
            near = abs(x - centre[0]) < 1.5 * stride and abs(y - centre[1]) < 1.5 * stride
            any_inside |= min(distances) > 0
            if min(distances) > 0 and near and ranges[stride][0] <= max(distances) <= ranges[stride][1]:
                found.append(((x2 - x1) * (y2 - y1), j))
        assert got == (min(found)[1] if found else -1)
        assert got_inside == any_inside
    assert (index >= 0).any()


def test_fcos_regions_are_apart_and_inside() -> None:
    view, t = head(), targets(objects(0, 5), torch.zeros(0, 4))
    main, valuable = (region(view, t, "one", True)[1].view(2, -1) > 0 for region in (FCOSMain(), FCOSValuable()))
    index, inside = fcos_assign(grid_points(SIZES, STRIDES, 0.5, "cpu"), STRIDES, COUNTS, t.boxes[0])
    assert torch.equal(main[0], index >= 0)
    assert torch.equal(valuable[0], inside & (index < 0))
    assert not main[1].any()
    assert not valuable[1].any()


@pytest.mark.parametrize("seed", range(4))
def test_max_iou_assigns_as_defined(seed: int) -> None:
    anchors, gt = shaped_anchors(SIZES, STRIDES), objects(seed, 5)
    iou = pairwise_iou(gt, anchors)
    valid = (anchors[:, :2] + anchors[:, 2:]).amax(1) / 2 < 120
    got = max_iou_assign(iou, valid)
    for i in range(len(anchors)):
        if not valid[i]:
            assert got[i] == -2
            continue
        best = iou[:, i].max()
        expected = int(iou[:, i].argmax()) if best >= 0.5 else -1 if best < 0.4 else -2
        for j in range(len(gt)):
            if iou[j, i] == iou[j][valid].max():
                expected = j
        assert got[i] == expected
    assert set(got.tolist()) >= set(range(5)), "every object has an anchor"


def test_max_iou_without_objects_is_background() -> None:
    assert max_iou_assign(torch.zeros(0, 3), torch.tensor([True, False, True])).tolist() == [-1, -2, -1]


def test_max_iou_regions_share_no_anchor() -> None:
    view, t = head(3, given=True), targets(objects(1, 5), torch.zeros(0, 4))
    _, main = MaxIoUMain()(view, t, "iou", True)
    _, valuable = MaxIoUValuable()(view, t, "iou", True)
    _, all_valuable = Valuable()(view, t, "iou", True)
    assert ((main > 0) & (all_valuable > 0)).any(), "else this scene shows nothing"
    assert torch.equal(valuable, all_valuable * (main == 0))
    assert not main.view(2, -1)[1].any()


@pytest.mark.parametrize("region", [MaxIoUMain(), MaxIoUValuable(), Merged()])
@pytest.mark.parametrize("weight", ["score", "iou", "one", None])
def test_both_paths_choose_the_same_of_several_anchors_a_cell(region: Any, weight: Any) -> None:
    view, t = head(3, given=True), targets(objects(1, 5), objects(2, 3))
    where, gathered = region(view, t, weight, False)
    _, dense = region(view, t, weight, True)
    assert len(gathered) == (dense > 0).sum() > 0
    torch.testing.assert_close(dense[view.classes.positions(where)], gathered)


def test_merged_has_a_lower_bound_only() -> None:
    view, t = head(3, given=True), targets(objects(1, 5), torch.zeros(0, 4))
    (m, _), (_, weight) = matched(view, t), Merged(gamma=0.25)(view, t, dense=True)
    bound = 0.25 * m.assignment.threshold
    expected = [max((u for u, b in zip(column, bound, strict=True) if u >= b), default=0) for column in m.iou.T]
    torch.testing.assert_close(weight.view(2, -1)[0], torch.tensor([float(e) for e in expected]))
    assert not weight.view(2, -1)[1].any()


def test_shaped_anchors_stand_around_their_point_with_one_area_a_scale() -> None:
    anchors = shaped_anchors(((2, 3),), (16,), centre=0.5)
    assert anchors.shape == (2 * 3 * 9, 4)
    centre, size = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(centre[::9], grid_points(((2, 3),), (16,), 0.5, "cpu"))
    torch.testing.assert_close(centre[9:18], centre[9].expand(9, 2))
    sides = torch.tensor([64 * 2 ** (i / 3) for i in range(3)])
    torch.testing.assert_close(size.prod(1)[:9], sides.square().repeat(3))
    torch.testing.assert_close((size[:, 1] / size[:, 0])[:9], torch.tensor([0.5, 1.0, 2.0]).repeat_interleave(3))


def test_several_anchors_a_cell_without_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"3 anchors a cell.*anchors="):
        Valuable()(head(3), targets(objects(0, 2), objects(1, 2)))
    with pytest.raises(ValueError, match="one point a cell"):
        FCOSMain()(head(3, given=True), targets(objects(0, 2), objects(1, 2)))
