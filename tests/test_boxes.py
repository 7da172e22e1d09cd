"""boxes/: distributions, overlaps, anchors, maps and the ATSS assigner."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import box as polygon
from torch import Tensor
from torch.autograd import gradcheck

from distillkit.boxes.anchors import grid_anchors, grid_points, grid_strides, inside
from distillkit.boxes.assign import atss
from distillkit.boxes.distribution import decode, encode, integral, resample
from distillkit.boxes.iou import aligned_iou, pairwise_iou
from distillkit.boxes.maps import Maps, Where, where_of
from distillkit.boxes.moved import MovedEdges

GOLDEN = Path(__file__).parent / "golden"
INTEGRAL = np.load(GOLDEN / "ld_integral_a.npz")
ASSIGN = np.load(GOLDEN / "ld_assign_a.npz")
INTEGRAL_CASES = json.loads(str(INTEGRAL["meta"]))["cases"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_boxes(number: int, seed: int = 0, size: float = 100) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * size
    return torch.cat([corner, corner + torch.rand(number, 2, generator=generator) * size / 2 + 1], 1)


# ---- distributions


@pytest.mark.parametrize("case", range(len(INTEGRAL_CASES)))
def test_integral_decode_and_encode_match_the_release(case: int) -> None:
    def array(key: str) -> Tensor:
        return torch.from_numpy(INTEGRAL[f"case{case}_{key}"]).double()

    bins = INTEGRAL_CASES[case]["reg_max"] + 1
    logits = array("logits").requires_grad_()
    distances = integral(logits.view(-1, 4, bins))
    torch.testing.assert_close(distances, array("dist"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(array("points"), distances), array("boxes"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode(array("points"), array("gt"), bins - 1.1), array("gtdist"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode(array("points"), array("gt")), array("gtdist_free"), rtol=1e-5, atol=1e-5)
    (distances * array("gw")).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, array("grad"), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=4, max_size=4), st.floats(-9, 9), st.floats(-9, 9))
def test_encode_is_the_inverse_of_decode(distances: list[float], x: float, y: float) -> None:
    points, wanted = torch.tensor([[x, y]]).double(), torch.tensor([distances]).double()
    torch.testing.assert_close(encode(points, decode(points, wanted)), wanted)


def test_integral_of_any_support() -> None:
    support = torch.tensor([-3.0, 0.0, 0.5, 10.0]).double()
    sure = torch.tensor([[-1e4, -1e4, 0.0, -1e4], [0.0, -1e4, -1e4, 0.0]]).double()
    torch.testing.assert_close(integral(sure, support), torch.tensor([0.5, 3.5]).double())
    gradcheck(lambda x: integral(x, support), random(3, 4).requires_grad_())
    with pytest.raises(ValueError, match=r"support has shape \(4,\), the distribution 8 bins"):
        integral(random(2, 8), support)


def test_integral_keeps_its_precision_under_autocast() -> None:
    logits = random(100, 17).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(integral(logits), integral(logits.double()).float())
    assert integral(logits.half()).dtype is torch.float32


@settings(max_examples=25, deadline=None)
@given(offset=st.floats(-2, 2), seed=st.integers(0, 50))
def test_shifted_bins_move_the_expected_value(offset: float, seed: int) -> None:
    support = torch.tensor([0.0, 1, 2, 3, 4.5, 6, 8, 9, 10]).double()
    logits = random(5, 9, seed=seed)
    logits[:, [0, 1, 2, 6, 7, 8]] = -torch.inf  # so that no mass leaves the support
    moved = resample(logits, support, None, offset)
    torch.testing.assert_close(moved.exp().sum(-1), torch.ones(5).double())
    torch.testing.assert_close(integral(moved, support), integral(logits, support) + offset, rtol=0, atol=1e-9)


def test_shifted_bins_split_between_neighbours_and_stop_at_the_ends() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    torch.testing.assert_close(resample(logits, None, None, 0.5).exp(), torch.tensor([[0.25, 0.375, 0.375]]))
    torch.testing.assert_close(resample(logits, None, None, -7.0).exp(), torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(resample(logits, None, None, 0.0), logits)
    assert resample(logits, None, None, 2.0).isfinite().all()


# ---- overlaps


def test_iou_against_polygons() -> None:
    a, b = some_boxes(12), some_boxes(9, seed=1)
    want = [[p.intersection(q).area / p.union(q).area for q in map(_polygon, b)] for p in map(_polygon, a)]
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor(want), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(aligned_iou(a[:9], b), pairwise_iou(a[:9], b).diagonal())
    torch.testing.assert_close(pairwise_iou(a, a).diagonal(), torch.ones(12))


def test_iou_of_nothing() -> None:
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert pairwise_iou(point, point).item() == 0
    assert pairwise_iou(some_boxes(3), torch.zeros(0, 4)).shape == (3, 0)
    assert aligned_iou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def _polygon(box: Tensor):
    return polygon(*box.tolist())


# ---- anchors


def test_grid_in_the_order_level_y_x() -> None:
    points = grid_points([(2, 3), (1, 2)], (8, 16), 0.5, "cpu")
    want = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert points.tolist() == want
    assert grid_strides([(2, 3), (1, 2)], (8, 16), "cpu").tolist() == [8.0] * 6 + [16.0] * 2
    assert inside(points, (9, 21)).tolist() == [True] * 3 + [False] * 3 + [True, False]


def test_anchors_of_the_release() -> None:
    sizes = [tuple(size) for size in ASSIGN["im0_level_sizes"].tolist()]
    anchors = grid_anchors(sizes, (8, 16, 32, 64, 128), 0.0, 8.0, "cpu")
    torch.testing.assert_close(anchors, torch.from_numpy(ASSIGN["im0_anchors"]), rtol=0, atol=0)


# ---- maps


def maps(anchors: int = 1, layout: torch.memory_format = torch.contiguous_format) -> Maps:
    levels = [random(2, anchors * 12, 4, 5), random(2, anchors * 12, 2, 3, seed=1)]
    return Maps(tuple(x.to(memory_format=layout).requires_grad_() for x in levels), (4, 3), anchors)


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gathered_rows_are_rows_of_all(anchors: int, layout: torch.memory_format) -> None:
    m = maps(anchors, layout)
    weight = random(2, sum(m.counts), seed=5).relu()
    where, weights = where_of(weight, m.counts, m.sizes)
    rows = m.positions(where)
    torch.testing.assert_close(m.at(where), m.all().flatten(0, 1)[rows], rtol=0, atol=0)
    torch.testing.assert_close(weights, weight.flatten()[rows], rtol=0, atol=0)
    assert len(rows) == (weight > 0).sum()
    everywhere = Where(None)
    torch.testing.assert_close(m.at(everywhere), m.all().flatten(0, 1)[m.positions(everywhere)], rtol=0, atol=0)
    torch.testing.assert_close(m.largest(), m.all().flatten(2).amax(-1).flatten(), rtol=0, atol=0)


def test_gathering_has_the_gradient_of_indexing() -> None:
    m = maps(2)
    where, weights = where_of(random(2, sum(m.counts), seed=5).relu(), m.counts, m.sizes)
    factor = random(len(weights), 4, 3, seed=6)
    (m.at(where) * factor).sum().backward()
    got = [level.grad for level in m.levels]
    for level in m.levels:
        level.grad = None
    (m.all().flatten(0, 1)[m.positions(where)] * factor).sum().backward()
    for mine, level in zip(got, m.levels, strict=True):
        torch.testing.assert_close(mine, level.grad)


def test_gathering_nothing_keeps_the_graph() -> None:
    m = maps()
    where, weights = where_of(torch.zeros(2, sum(m.counts)), m.counts, m.sizes)
    assert weights.shape == (0,)
    m.at(where).sum().backward()
    assert all(level.grad is not None and (level.grad == 0).all() for level in m.levels)


def test_maps_name_the_level_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"level 1: expected \(B, 12, H, W\)"):
        Maps((torch.zeros(1, 12, 2, 2), torch.zeros(1, 13, 1, 1)), (4, 3))


# ---- ATSS


def image(i: int) -> tuple[Tensor, list[int], Tensor]:
    anchors, gt = torch.from_numpy(ASSIGN[f"im{i}_anchors"]), torch.from_numpy(ASSIGN[f"im{i}_gt"]).view(-1, 4)
    return anchors, ASSIGN[f"im{i}_num_level"].tolist(), gt


@pytest.mark.parametrize("i", range(4))
def test_atss_matches_the_release(i: int) -> None:
    anchors, counts, gt = image(i)
    found = atss(anchors, counts, gt)
    assert (found.gt_index + 1).tolist() == ASSIGN[f"im{i}_gt_inds"].tolist()
    positive = found.gt_index >= 0
    assert positive.any() == (i < 3)
    torch.testing.assert_close(found.iou[positive], torch.from_numpy(ASSIGN[f"im{i}_max_overlaps"])[positive])
    assert (found.iou[~positive] == 0).all()


def test_atss_of_a_picture_inside_padding_equals_that_of_the_picture() -> None:
    """Leaving anchors out by a mask is leaving them out."""
    anchors, counts, gt = image(2)
    valid = inside((anchors[:, :2] + anchors[:, 2:]) / 2, (150, 170))
    kept = [int(v.sum()) for v in valid.split(counts)]
    masked, alone = atss(anchors, counts, gt, valid=valid), atss(anchors[valid], kept, gt)
    torch.testing.assert_close(masked.gt_index[valid], alone.gt_index)
    torch.testing.assert_close(masked.threshold, alone.threshold)
    assert (masked.gt_index[~valid] == -1).all()


def test_atss_without_candidates_enough_for_a_deviation_finds_nothing() -> None:
    anchors, gt = grid_anchors([(1, 1)], (64,), 0.5, 1.0, "cpu"), torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    found = atss(anchors, [1], gt)
    assert found.gt_index.tolist() == [-1]
    assert found.threshold.tolist() == [torch.inf]
    nowhere = atss(anchors.repeat(3, 1), [3], gt, valid=torch.zeros(3, dtype=torch.bool))
    assert nowhere.gt_index.tolist() == [-1] * 3


def test_atss_on_one_level() -> None:
    anchors = grid_anchors([(8, 8)], (8,), 0.5, 4.0, "cpu")
    gt = torch.tensor([[15.0, 14.0, 45.0, 46.0]])
    found = atss(anchors, [64], gt)
    overlap = pairwise_iou(anchors, gt)[:, 0]
    nearest = ((anchors[:, :2] + anchors[:, 2:]) / 2 - torch.tensor([30.0, 30.0])).norm(dim=1).argsort()[:9]
    threshold = overlap[nearest].mean() + overlap[nearest].std()
    assert found.threshold.item() == pytest.approx(threshold.item(), rel=1e-5)
    assert set((found.gt_index == 0).nonzero()[:, 0].tolist()) == {
        i for i in nearest.tolist() if overlap[i] >= threshold
    }


def test_an_anchor_of_two_objects_goes_to_the_one_it_overlaps_more() -> None:
    anchors = grid_anchors([(16, 16)], (8,), 0.5, 8.0, "cpu")
    gt = torch.tensor([[30.0, 30.0, 98.0, 98.0], [31.0, 33.0, 95.0, 95.0]])
    both = atss(anchors, [256], gt)
    each = [atss(anchors, [256], box[None]) for box in gt]
    shared = (each[0].gt_index == 0) & (each[1].gt_index == 0)
    assert shared.any()
    torch.testing.assert_close(both.iou[shared], torch.stack([e.iou for e in each]).amax(0)[shared])


def test_moved_distributions_are_moved_once_on_either_path() -> None:
    """Gathered, and dense as on accelerators, where reading all of them has moved them already."""
    logits = torch.randn(2, 4 * 8, 4, 3, generator=torch.Generator().manual_seed(0))
    moved = MovedEdges.of(Maps((logits,), (4, 8)), torch.arange(8.0), torch.arange(8.0), 0.5)
    where, _ = where_of(torch.ones(2, 12), (12,), ((4, 3),))
    plain = Maps((logits,), (4, 8)).all()
    left_top, right_bottom = plain.split(2, -2)
    want = torch.cat([resample(left_top, None, None, 0.5), resample(right_bottom, None, None, -0.5)], -2)
    torch.testing.assert_close(moved.all(), want)
    torch.testing.assert_close(moved.at(Where(None)), want.flatten(0, 1))
    torch.testing.assert_close(moved.at(where), want.flatten(0, 1))
