"""The stand-in for mmcv's compiled operators: each against torchvision, a closed form, a loop or finite differences,
called through mmcv's own Python where it is installed, and told apart from the real one."""

import importlib.util
import logging
import math
import subprocess
import sys

import pytest
import shapely
import torch
import torchvision
from torch import nn
from torch.nn.functional import conv2d, grid_sample

from distillkit.boxes.rotated_iou import pairwise_rotated_iou
from distillkit.integrations import mmcv_ops as ops
from distillkit.integrations import openmmlab
from tests.rotated_pairs import KINDS, by_shapely, some_pairs

if importlib.util.find_spec("mmcv") is None or importlib.util.find_spec("mmengine") is None:
    pytest.skip("needs mmcv-lite and mmengine", allow_module_level=True)

if not openmmlab.prepare("mmcv"):
    pytest.skip("mmcv has its own compiled operators here", allow_module_level=True)
mmcv_ops = pytest.importorskip("mmcv.ops")


def boxes(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(n, 2, generator=g) * 40, torch.rand(n, 2, generator=g) * 30 + 4
    return torch.cat([corner, corner + size], 1)


def iou(a: torch.Tensor, b: torch.Tensor, offset: int = 0) -> float:
    """Of two boxes, number by number."""
    w = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])) + offset)
    h = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])) + offset)
    areas = [float((x[2] - x[0] + offset) * (x[3] - x[1] + offset)) for x in (a, b)]
    return w * h / (sum(areas) - w * h)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_no_better_box_overlaps(offset):
    there, scores = boxes(40), torch.rand(40, generator=torch.Generator().manual_seed(1))
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(there[i], there[j], offset) <= 0.3 for j in kept):
            kept.append(i)
    dets, found = mmcv_ops.nms(there, scores, 0.3, offset=offset)
    assert 5 < len(kept) < 40
    assert found.tolist() == kept
    torch.testing.assert_close(dets, torch.cat([there[kept], scores[kept, None]], 1))


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_lowers_scores(method):
    there, scores = boxes(30), torch.rand(30, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.2
    left, expected = dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=left.get)
        expected.append((best, left.pop(best)))
        for j in left:
            u = iou(there[best], there[j])
            linear = {"naive": 0.0, "linear": 1 - u}.get(method)
            left[j] *= math.exp(-u * u / 0.5) if linear is None else linear if u >= 0.3 else 1.0
        left = {j: s for j, s in left.items() if s >= 0.1}
    dets, found = mmcv_ops.soft_nms(there, scores, 0.3, 0.5, 0.1, method)
    assert found.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([s for _, s in expected]))
    torch.testing.assert_close(dets[:, :4], there[found])
    assert mmcv_ops.soft_nms(there[:0], scores[:0])[1].shape == (0,)


def rotated(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    low, span = torch.tensor([0, 0, 5, 5, -3.0]), torch.tensor([40, 40, 30, 20, 6.0])
    return torch.rand(n, 5, generator=g) * span + low


@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_rotated_overlaps_are_ours(mode):
    a, b = rotated(6, 0), rotated(4, 1)
    expected = pairwise_rotated_iou(a, b, "union" if mode == "iou" else "first")
    torch.testing.assert_close(mmcv_ops.box_iou_rotated(a, b, mode), expected)
    torch.testing.assert_close(mmcv_ops.box_iou_rotated(a[:4], b, mode, aligned=True), expected[:4].diagonal())
    square = torch.tensor([[10.0, 10, 4, 4, math.pi / 4]])  # half of an octagon's tips lie outside of the other
    upright = torch.tensor([[10.0, 10, 4, 4, 0]])
    octagon = 8 * (math.sqrt(2) - 1) * 4
    assert mmcv_ops.box_iou_rotated(square, upright, "iof").item() == pytest.approx(octagon / 16, abs=1e-4)


def test_rotated_nms_goes_by_label():
    there, scores = rotated(40, 2), torch.rand(40, generator=torch.Generator().manual_seed(3))
    overlap = pairwise_rotated_iou(there, there)
    for labels in (None, torch.arange(40) % 3):
        kept: list[int] = []
        for i in scores.argsort(descending=True).tolist():
            others = [j for j in kept if labels is None or labels[i] == labels[j]]
            if all(overlap[i, j] <= 0.2 for j in others):
                kept.append(i)
        assert mmcv_ops.nms_rotated(there, scores, 0.2, labels)[1].tolist() == kept


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_overlaps_are_shapelys(kind):
    """Also those that take gradient, but where mmcv's own search for corners of one box on sides of the other, to 1e-6
    of a side, loses some of boxes that have been turned by quarters."""
    a, b = some_pairs(kind, 200, longest=100.0)
    middle = torch.cat([a[:, :2] - 200, torch.zeros(len(a), 3)], 1)
    a, b = a - middle, b - middle
    expected = by_shapely(a.float(), b.float()).float()
    found = mmcv_ops.box_iou_rotated(a.float(), b.float(), aligned=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if not kind.startswith("quarter"):
        found = mmcv_ops.diff_iou_rotated_2d(a[None], b[None])[0]
        torch.testing.assert_close(found, by_shapely(a, b), rtol=0, atol=1e-4)


def test_the_gradient_of_rotated_overlaps():
    a, b = (boxes[:20] for boxes in some_pairs("any place", 40, longest=50.0))
    middle = torch.cat([a[:, :2], torch.zeros(len(a), 3)], 1)
    a, b = (a - middle)[None], (b - middle)[None]
    assert torch.autograd.gradcheck(lambda x: mmcv_ops.diff_iou_rotated_2d(x, b), a.clone().requires_grad_(), atol=1e-4)
    apart = a + torch.tensor([1000.0, 0, 0, 0, 0])
    a.requires_grad_()
    overlap = mmcv_ops.diff_iou_rotated_2d(a, apart)
    overlap.sum().backward()
    assert overlap.eq(0).all()
    assert a.grad.eq(0).all(), "no corner is shared: nothing, and no NaN"


def test_corners_of_a_shared_polygon_are_sorted():
    """As the docstring of mmcv's sort_indices has it: in turn, the first again, then one that is 0 and not valid."""
    vertices = torch.zeros(1, 2, 24, 2)
    vertices[0, 0, [0, 5, 9, 20]] = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    mask = torch.zeros(1, 2, 24, dtype=torch.bool)
    mask[0, 0, [0, 5, 9, 20]] = True
    index = ops.diff_iou_rotated_sort_vertices_forward(vertices, mask, mask.sum(2).int())
    assert index[0, 0, :5].tolist() == [5, 9, 0, 20, 5]
    left = [*index[0, 0, 5:].tolist(), *index[0, 1].tolist()]
    assert all(i >= 8 for i in left)
    assert not mask[0, 0, index[0, 0, 5:].long()].any()


def test_rotated_nms_keeps_what_shapely_says():
    there, scores = rotated(60, 4), torch.rand(60, generator=torch.Generator().manual_seed(5))
    first, second = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    overlap = by_shapely(there[first.flatten()], there[second.flatten()]).view(60, 60)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap[i, j] <= 0.1 for j in kept):
            kept.append(i)
    assert 3 < len(kept) < 40
    assert mmcv_ops.nms_rotated(there, scores, 0.1)[1].tolist() == kept


def test_the_smallest_rectangle_around_points_is_as_small_as_shapelys():
    """Around three corners there are several of one area."""
    points = torch.rand(20, 9, 2, generator=torch.Generator().manual_seed(0)) * 50
    found = shapely.polygons(mmcv_ops.min_area_polygons(points.flatten(1)).view(-1, 4, 2).double().numpy())
    for rectangle, inside in zip(found, shapely.multipoints(points.double().numpy()), strict=True):
        assert rectangle.area == pytest.approx(shapely.oriented_envelope(inside).area, rel=1e-5)
        assert rectangle.buffer(1e-3).covers(inside)


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_box_overlaps(mode, offset):
    from mmcv.ops.bbox import _bbox_overlaps_cpu

    a, b = boxes(7), boxes(5, 1)
    torch.testing.assert_close(
        mmcv_ops.bbox_overlaps(a, b, mode, offset=offset), _bbox_overlaps_cpu(a, b, mode, offset=offset)
    )
    aligned = mmcv_ops.bbox_overlaps(a[:5], b, mode, aligned=True, offset=offset)
    torch.testing.assert_close(aligned, _bbox_overlaps_cpu(a, b, mode, offset=offset)[:5].diagonal())


def test_focal_loss_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64).mul(3).requires_grad_()
    target = torch.tensor([0, 3, 4, 1, 4, 2])  # 4: none
    p = logits.sigmoid()
    t = nn.functional.one_hot(target, 5)[:, :4]
    expected = -(t * 0.3 * (1 - p) ** 1.5 * p.log() + (1 - t) * 0.7 * p**1.5 * (1 - p).log())
    torch.testing.assert_close(mmcv_ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, None, "none"), expected)
    assert torch.autograd.gradcheck(lambda x: mmcv_ops.sigmoid_focal_loss(x, target, 1.5, 0.3, None, "sum"), logits)
    with pytest.raises(NotImplementedError, match="weight a class"):
        mmcv_ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, torch.ones(4, dtype=torch.float64), "sum")


def test_focal_loss_of_certain_logits_is_finite():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = mmcv_ops.sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 200 + 0.25 * 200)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("aligned", "ratio"), [(True, 2), (False, 0)])
def test_roi_align_of_a_plane_is_the_plane_at_the_bins_middle(aligned, ratio):
    """Bilinear sampling reproduces a linear function, whatever it samples."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    maps = torch.stack([2 * x + 3 * y, x - y]).expand(2, -1, -1, -1).clone().double()
    rois = torch.tensor([[1.0, 8, 8, 40, 32], [0, 12, 20, 60, 44]], dtype=torch.float64)
    found = mmcv_ops.roi_align(maps, rois, (3, 4), 0.25, ratio, "avg", aligned)
    low, size = rois[:, 1:3] / 4 - 0.5 * aligned, (rois[:, 3:] - rois[:, 1:3]) / 4
    at_x = low[:, :1] + size[:, :1] * (torch.arange(4) + 0.5) / 4
    at_y = low[:, 1:] + size[:, 1:] * (torch.arange(3) + 0.5) / 3
    expected = 2 * at_x[:, None, :] + 3 * at_y[:, :, None]
    torch.testing.assert_close(found[:, 0], expected)
    maps = torch.rand(2, 1, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: mmcv_ops.roi_align(m, rois / 2, 2, 0.25, 2, "avg", aligned), maps)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        mmcv_ops.roi_align(maps, rois, 2, 0.25, 2, "max", aligned)


@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize(("aligned", "ratio"), [(True, 2), (False, 0)])
def test_rotated_roi_align_of_a_plane_is_the_plane_at_the_bins_middle(aligned, ratio, clockwise):
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij")
    maps = torch.stack([2 * x + 3 * y, x - y]).expand(2, -1, -1, -1).clone().double()
    rois = torch.tensor([[1.0, 60, 44, 40, 24, 0.4], [0, 52, 50, 32, 20, -1.3], [1, 48, 48, 30, 30, 2]]).double()
    found = mmcv_ops.roi_align_rotated(maps, rois, (3, 4), 0.25, ratio, aligned, clockwise)
    shares = [(torch.arange(n).double() + 0.5) / n - 0.5 for n in (3, 4)]
    across, along = torch.meshgrid(*shares, indexing="ij")
    for roi, bins in zip(rois, found, strict=True):
        angle = roi[5].item() if clockwise else -roi[5].item()
        u, v = along * roi[3], across * roi[4]
        at_x = (roi[1] + u * math.cos(angle) - v * math.sin(angle)) / 4 - 0.5 * aligned
        at_y = (roi[2] + u * math.sin(angle) + v * math.cos(angle)) / 4 - 0.5 * aligned
        torch.testing.assert_close(bins, torch.stack([2 * at_x + 3 * at_y, at_x - at_y]))


@pytest.mark.parametrize(("aligned", "ratio"), [(True, 2), (True, 0), (False, 3)])
def test_rotated_roi_align_of_upright_regions_is_torchvisions(aligned, ratio):
    """At the rim, too, and turned by a quarter on a map that is turned alike."""
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 16, 16, generator=g, dtype=torch.float64)
    middle = torch.tensor([[40.0, 28], [6, 60], [60, 3], [90, 90]])
    size = torch.tensor([[36.0, 20], [30, 14], [12, 48], [8, 8]])
    picture = torch.tensor([[0.0], [1], [1], [0]])
    upright = torch.cat([picture, middle - size / 2, middle + size / 2], 1).double()
    expected = torchvision.ops.roi_align(maps, upright, (3, 4), 0.25, ratio, aligned)
    rois = torch.cat([picture, middle, size, torch.zeros(4, 1)], 1).double()
    torch.testing.assert_close(mmcv_ops.roi_align_rotated(maps, rois, (3, 4), 0.25, ratio, aligned, True), expected)
    if aligned:  # (x, y) of a map that is turned clockwise is (64 - y, x)
        turned = torch.cat([picture, 64 - middle[:, 1:], middle[:, :1], size, torch.full((4, 1), math.pi / 2)], 1)
        found = mmcv_ops.roi_align_rotated(maps.rot90(-1, (2, 3)), turned.double(), (3, 4), 0.25, ratio, aligned, True)
        torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=1e-6)
    leaves = maps.requires_grad_()
    run = lambda m: mmcv_ops.roi_align_rotated(m, rois + 0.3, (3, 4), 0.25, ratio, aligned, True)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert mmcv_ops.roi_align_rotated(maps, rois[:0], (3, 4), 0.25, ratio, aligned, True).shape == (0, 3, 3, 4)


def sampled(maps: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Bilinear, zero outside: (B, C, H, W) at pixels y, x (B, h, w) -> (B, C, h, w)."""
    height, width = maps.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return grid_sample(maps, grid, padding_mode="zeros", align_corners=False)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution(modulated):
    """Sample by sample and group by group; whole offsets shift a plain convolution."""
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    maps, weight, bias = make(2, 4, 6, 7), make(6, 2, 3, 3), make(6)
    offset, mask = make(2, 2 * 2 * 9, 3, 4), make(2, 2 * 9, 3, 4).sigmoid()
    y, x = torch.meshgrid(torch.arange(3.0) * 2 - 1, torch.arange(4.0) * 2 - 1, indexing="ij")
    columns = []
    for group in range(2):
        for k in range(9):
            at = 2 * (group * 9 + k)
            part = sampled(
                maps[:, 2 * group : 2 * group + 2], y + k // 3 + offset[:, at], x + k % 3 + offset[:, at + 1]
            )
            columns.append(part * mask[:, group * 9 + k, None] if modulated else part)
    stacked = torch.stack(columns, 2).unflatten(2, (2, 9)).permute(0, 2, 1, 3, 4, 5).flatten(1, 2)  # (B, C, 9, h, w)
    expected = torch.cat(
        [torch.einsum("bckhw,ock->bohw", stacked[:, 2 * i : 2 * i + 2], weight.flatten(2)[3 * i : 3 * i + 3])
         for i in range(2)], 1
    )  # fmt: skip
    tensors = [maps, offset, *([mask] if modulated else []), weight, *([bias] if modulated else [])]
    convolve = mmcv_ops.modulated_deform_conv2d if modulated else mmcv_ops.deform_conv2d

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return convolve(*tensors, 2, 1, 1, 2, 2)

    found = run(*tensors)
    # columns of one deformable group are the channels of one weight group here
    torch.testing.assert_close(found, expected + (bias.view(1, -1, 1, 1) if modulated else 0))
    leaves = [
        t[:1].clone().requires_grad_() if t.dim() == 4 and len(t) == 2 else t.clone().requires_grad_() for t in tensors
    ]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    if not modulated:
        plain = mmcv_ops.deform_conv2d(maps, torch.zeros_like(offset), weight, 2, 1, 1, 2, 2)
        torch.testing.assert_close(plain, conv2d(maps, weight, None, 2, 1, 1, 2))


def test_multi_scale_deformable_attention():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    g = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]])
    start = torch.tensor([0, 20])
    value = torch.randn(2, 26, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(2, 5, 3, 2, 2, 2, generator=g, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()
    weights = torch.rand(2, 5, 3, 2, 2, generator=g, dtype=torch.float64).softmax(-1).requires_grad_()
    run = lambda v, p, w: MultiScaleDeformableAttnFunction.apply(v, shapes, start, p, w, 64)  # noqa: E731
    expected = multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    torch.testing.assert_close(run(value, places, weights), expected)
    assert torch.autograd.gradcheck(run, (value, places, weights), fast_mode=True)
    # one query of one head in the middle of a cell reads that cell
    only = torch.arange(6.0).view(1, 6, 1, 1)
    middle = torch.tensor([2.5 / 3, 0.5 / 2]).view(1, 1, 1, 1, 1, 2)
    read = MultiScaleDeformableAttnFunction.apply(
        only, torch.tensor([[2, 3]]), start[:1], middle, torch.ones(1, 1, 1, 1, 1), 1
    )
    assert read.item() == pytest.approx(2)


# ---- the module


def test_every_op_is_called_here_through_mmcv():
    assert set(ops.OPS) == {
        "nms", "softnms", "nms_rotated", "bbox_overlaps", "box_iou_rotated", "sigmoid_focal_loss_forward",
        "diff_iou_rotated_sort_vertices_forward", "min_area_polygons", "roi_align_rotated_forward",
        "roi_align_rotated_backward",
        "sigmoid_focal_loss_backward", "roi_align_forward", "roi_align_backward", "ms_deform_attn_forward",
        "ms_deform_attn_backward", "deform_conv_forward", "deform_conv_backward_input",
        "deform_conv_backward_parameters", "modulated_deform_conv_forward", "modulated_deform_conv_backward",
    }  # fmt: skip


def test_an_operator_that_is_not_here_says_so_when_it_is_called():
    with pytest.raises(NotImplementedError, match=r"'carafe_forward' of mmcv is not in distillkit's stand-in.*nms"):
        mmcv_ops.carafe(torch.rand(1, 4, 4, 4), torch.rand(1, 9, 8, 8), 3, 1, 2)
    assert not hasattr(sys.modules["mmcv._ext"], "__wrapped__")


def test_a_real_extension_is_left_alone(monkeypatch):
    real = type(sys)("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", real)
    assert openmmlab._stand_in() is False
    assert sys.modules["mmcv._ext"] is real


def test_an_extension_for_another_torch_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(openmmlab, "find_spec", lambda name: object())

    def fails(name: str) -> None:
        raise ImportError("_ext.so: undefined symbol: _ZN2at")

    monkeypatch.setattr(openmmlab, "import_module", fails)
    with pytest.raises(ImportError, match=r"do not fit torch .*undefined symbol.*pip install mmcv-lite"):
        openmmlab._stand_in()


def test_it_is_said_once(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    with caplog.at_level(logging.WARNING, "distillkit"):
        assert openmmlab._stand_in() is openmmlab._stand_in() is True
    assert [r.message.split(":")[0] for r in caplog.records] == ["mmcv has no compiled operators here"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ImportError("libGL.so.1: cannot open shared object file"),
            r"libGL\.so\.1.*pip install opencv-python-headless",
        ),
        (ModuleNotFoundError("No module named 'cv2'"), r"not installed.*distillkit\[mmdet\]"),
    ],
)
def test_an_opencv_that_does_not_load_is_named(monkeypatch, error, message):
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr(openmmlab, "import_module", fails)
    monkeypatch.setattr(openmmlab, "_prepared", set())
    with pytest.raises(ImportError, match=message):
        openmmlab.prepare()


def test_a_package_is_looked_at_once_in_a_process(monkeypatch):
    looked = []
    monkeypatch.setattr(openmmlab, "_prepared", set())
    monkeypatch.setattr(openmmlab, "check_opencv", lambda: looked.append("cv2"))
    for _ in range(3):
        assert openmmlab.prepare("mmcv")
    assert looked == ["cv2"]
    assert openmmlab.prepare("mmcv", "mmengine")
    assert openmmlab.prepare("mmengine")
    assert looked == ["cv2", "cv2"]
    with pytest.raises(ImportError, match="mmrotated is not installed"):
        openmmlab.prepare("mmrotated")
    with pytest.raises(ImportError, match="mmrotated is not installed"):
        openmmlab.prepare("mmrotated")  # what failed is tried again


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ImportError, match=r"mmnothing is not installed: pip install"):
        openmmlab.prepare("mmnothing")


def test_nothing_of_openmmlab_is_imported_unasked():
    code = "import sys, distillkit.integrations.openmmlab; assert not {'mmcv', 'mmengine', 'cv2'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
