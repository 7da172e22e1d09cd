"""boxes/rotated_iou.py: overlaps of rotated boxes against shapely, their gradients, and both ways to compute them."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from distillkit.bench.counting import Dispatched
from distillkit.boxes import rotated_iou
from distillkit.boxes.iou import pairwise_iou
from distillkit.boxes.rotated import upright
from distillkit.boxes.rotated_iou import Over, aligned_rotated_iou, pairwise_rotated_iou
from tests.rotated_pairs import KINDS, by_shapely, some_boxes, some_pairs


def crowded(number: int, seed: int = 0) -> Tensor:
    boxes = some_boxes(number, seed)
    boxes[:, :2] /= 20
    return boxes


@pytest.mark.parametrize("kind", KINDS)
def test_against_shapely(kind: str) -> None:
    """120 000 pairs with sides of 1 to 1000 pixels; the bounds are a little above what is seen."""
    a, b = some_pairs(kind, 12_000)
    want = by_shapely(a, b)
    for got, bound in ((aligned_rotated_iou(a, b), 1e-8), (aligned_rotated_iou(a.float(), b.float()).double(), 5e-5)):
        assert got.amin() >= 0
        assert got.amax() <= 1
        assert (got - want).abs().amax() <= bound


def test_far_from_zero() -> None:
    """Centres are subtracted before anything else: where both boxes stand costs no precision but their own."""
    a, b = crowded(2000), crowded(2000, seed=1)
    for dtype, far, bound in ((torch.float32, 2.0**22, 1e-5), (torch.float64, 1e9, 1e-6)):
        near_a, near_b = (torch.cat([(boxes[:, :2]).round(), boxes[:, 2:]], 1).to(dtype) for boxes in (a, b))
        offset = torch.tensor([far, -far, 0, 0, 0], dtype=dtype)
        got, want = aligned_rotated_iou(near_a + offset, near_b + offset), aligned_rotated_iou(near_a, near_b)
        torch.testing.assert_close(got, want, rtol=0, atol=bound)


def test_same_as_upright_boxes() -> None:
    a, b = crowded(50), crowded(40, seed=1)
    a[:, 4], b[:, 4] = 0, 0
    torch.testing.assert_close(pairwise_rotated_iou(a, b), pairwise_iou(upright(a), upright(b)))


def test_invariances() -> None:
    a, b = crowded(3000), crowded(3000, seed=1)
    want = aligned_rotated_iou(a, b)
    assert (want > 0.1).sum() > 100

    def check(x: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(aligned_rotated_iou(x, y), want, rtol=0, atol=1e-9)

    angle = torch.tensor(0.7).double()
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
    check(b, a)
    check(*(torch.cat([x[:, :2] @ turn, x[:, 2:4], x[:, 4:] + angle], 1) for x in (a, b)))
    check(*(x + torch.tensor([300, -50, 0, 0, 0]) for x in (a, b)))
    check(*(x * torch.tensor([1e-4, 1e-4, 1e-4, 1e-4, 1]) for x in (a, b)))
    check(*(x * torch.tensor([1, -1, 1, 1, -1]) for x in (a, b)))  # mirrored


def test_over_the_first() -> None:
    inner, outer = torch.tensor([[5.0, 5, 2, 4, 0.3]]), torch.tensor([[5.0, 5, 8, 8, 1.0]])
    assert aligned_rotated_iou(inner, outer, over="first").item() == pytest.approx(1)
    assert aligned_rotated_iou(outer, inner, over="first").item() == pytest.approx(1 / 8)
    assert aligned_rotated_iou(outer, inner).item() == pytest.approx(1 / 8)
    a, b = crowded(40), crowded(30, seed=1)
    iou, share = pairwise_rotated_iou(a, b), pairwise_rotated_iou(a, b, over="first")
    area, other = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
    shared = share * area[:, None]
    torch.testing.assert_close(iou, shared / (area[:, None] + other - shared))


# ---- gradients


@pytest.mark.parametrize("over", ["union", "first"])
def test_gradient_against_finite_differences(over: Over) -> None:
    a, b = crowded(300, seed=4), crowded(300, seed=5)
    overlap = aligned_rotated_iou(a, b)
    some = (overlap > 0.02) & (overlap < 0.9)
    assert some.sum() > 20
    # every box stands for itself, so one sum holds all derivatives
    weight = torch.rand(300, generator=torch.Generator().manual_seed(6)).double()[some]
    a, b = a[some].requires_grad_(), b[some].requires_grad_()
    analytic = torch.autograd.grad((aligned_rotated_iou(a, b, over) * weight).sum(), (a, b))
    step = 1e-6
    for k in range(10):
        moved = step * torch.eye(10).double()[k]
        first, second = moved.split(5)
        high, low = aligned_rotated_iou(a + first, b + second, over), aligned_rotated_iou(a - first, b - second, over)
        got = analytic[k // 5][:, k % 5]
        torch.testing.assert_close(got, (high - low) / (2 * step) * weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("quarters", range(5))
def test_gradient_of_parallel_boxes(quarters: int) -> None:
    """Sides along the other box's axes are no corner of the function, unless they lie on its sides."""
    a = torch.tensor([[0.0, 0, 8, 4, 0], [0, 0, 8, 4, 0.4]]).double()
    b = torch.tensor([[3.0, 1, 8, 5, 0], [3, 1, 8, 5, 0.4]]).double()
    b[:, 4] += quarters * math.pi / 2
    assert gradcheck(aligned_rotated_iou, (a.requires_grad_(), b.requires_grad_()))


def test_gradient_of_nested_boxes() -> None:
    """The inner box gains by growing; where it lies makes no difference."""
    inner, outer = torch.tensor([[1.0, 2, 3, 2, 0.4]]).double(), torch.tensor([[0.0, 0, 12, 10, -0.2]]).double()
    inner.requires_grad_()
    (gradient,) = torch.autograd.grad(aligned_rotated_iou(inner, outer).sum(), inner)
    torch.testing.assert_close(gradient, torch.tensor([[0, 0, 2 / 120, 3 / 120, 0]]).double())


def test_gradient_ascent_finds_the_box() -> None:
    target = torch.tensor([[50.0, 50, 40, 12, 0.6]]).double()
    box = torch.tensor([[46.0, 53, 30, 18, 0.1]]).double().requires_grad_()
    optimizer = torch.optim.Adam([box], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (1 - aligned_rotated_iou(box, target)).sum().backward()
        optimizer.step()
    assert aligned_rotated_iou(box, target).item() > 0.95


def hard_boxes(dtype: torch.dtype) -> Tensor:
    sides = (0, 1e-30, 1e-9, 1e-6, 1, 50, 1e4, 1e9, 1e17)
    angles = (0, 1e-20, 1e-8, math.pi / 4, math.pi / 2, math.pi, -2 * math.pi, 1e6)
    centres = ((0, 0), (1e-6, 0), (25, 25), (1e6, -1e6), (1e18, 0))
    rows = [(*c, w, h, t) for c, w, h, t in itertools.product(centres, sides, sides, angles)]
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("over", ["union", "first"])
def test_always_finite(dtype: torch.dtype, over: Over) -> None:
    boxes = hard_boxes(dtype)
    g = torch.Generator().manual_seed(0)
    i = torch.arange(len(boxes)).repeat(12)
    near_by = (i + torch.randint(-80, 80, i.shape, generator=g)).clamp(0, len(boxes) - 1)
    for j in (i, near_by, torch.randint(0, len(boxes), i.shape, generator=g)):
        a, b = boxes[i].requires_grad_(), boxes[j].requires_grad_()
        got = aligned_rotated_iou(a, b, over)
        assert ((got >= 0) & (got <= 1)).all()
        assert (got[(a[:, 2:4].amin(1) == 0) | (b[:, 2:4].amin(1) == 0)] == 0).all()
        for gradient in torch.autograd.grad(got.sum(), (a, b)):
            assert gradient.isfinite().all()


# ---- the same on every path


def test_dense_near_and_aligned_pairs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAIRS_IN_CACHE", "PAIRS_TO_FILTER", "PAIRS_ON_ACCELERATOR"):
        monkeypatch.setattr(rotated_iou, name, 100)  # several parts
    a, b = crowded(60), crowded(45, seed=1)
    weight = torch.rand(60, 45, generator=torch.Generator().manual_seed(2)).double()
    ways = (
        partial(pairwise_rotated_iou, dense=False),
        partial(pairwise_rotated_iou, dense=True),
        lambda x, y: torch.stack([aligned_rotated_iou(box.expand(45, 5), y) for box in x]),
    )
    results = []
    for way in ways:
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        overlap = way(x, y)
        results.append((overlap, *torch.autograd.grad((overlap * weight).sum(), (x, y))))
    for other in results[1:]:
        for got, want in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert (results[0][0] == 0).any()


def test_dense_path_never_waits() -> None:
    with Dispatched() as ran:
        pairwise_rotated_iou(crowded(20), crowded(30), dense=True)
        aligned_rotated_iou(crowded(20), crowded(20))
    assert not ran.syncs
    with Dispatched() as ran:
        pairwise_rotated_iou(crowded(20), crowded(30), dense=False)
    assert ran.syncs


def test_on_an_accelerator() -> None:
    """Shapes and devices only: reading a value would raise."""
    with FakeTensorMode():
        a, b = torch.rand(7, 5, device="cuda"), torch.rand(9, 5, device="cuda")
        for got, shape in ((pairwise_rotated_iou(a, b), (7, 9)), (aligned_rotated_iou(a, b[:7]), (7,))):
            assert got.device.type == "cuda"
            assert got.shape == shape


def test_under_compile() -> None:
    a, b = crowded(20).requires_grad_(), crowded(30, seed=1)
    compiled = torch.compile(pairwise_rotated_iou, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b), pairwise_rotated_iou(a, b), rtol=0, atol=1e-9)
    got, want = (torch.autograd.grad(f(a, b).sum(), a)[0] for f in (compiled, pairwise_rotated_iou))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


class Largest(TorchDispatchMode):
    """The most bytes that one operation gave back."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dense", [False, True])
def test_memory_does_not_grow_with_the_pairs(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than the result or one part's, and the backward pass keeps no more than indices."""
    monkeypatch.setattr(rotated_iou, "PAIRS_ON_ACCELERATOR", 1 << 14)
    monkeypatch.setattr(rotated_iou, "PAIRS_TO_FILTER", 1 << 14)
    a, b = crowded(800), crowded(800, seed=1)
    with Largest() as largest:
        pairwise_rotated_iou(a, b, dense=dense)
    assert largest.bytes <= 800 * 800 * 8
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        result = pairwise_rotated_iou(a.requires_grad_(), b.requires_grad_(), dense=dense)
    assert (result > 0).float().mean() > 0.1
    assert sum(kept.values()) <= 800 * 800 * 8 * 4


def test_half_precision_is_lifted() -> None:
    a, b = crowded(20), crowded(20, seed=1)
    for dtype in (torch.float16, torch.bfloat16):
        got = pairwise_rotated_iou(a.to(dtype), b.to(dtype))
        assert got.dtype is torch.float32
        want = pairwise_rotated_iou(a.to(dtype).float(), b.to(dtype).float())
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_not_a_number_stays_one() -> None:
    boxes = crowded(2)
    boxes[0, 2] = torch.nan
    assert aligned_rotated_iou(boxes, boxes).isnan().tolist() == [True, False]


def test_nothing() -> None:
    for dense in (False, True):
        assert pairwise_rotated_iou(torch.zeros(0, 5), crowded(3), dense=dense).shape == (0, 3)
        assert pairwise_rotated_iou(crowded(3), torch.zeros(0, 5), dense=dense).shape == (3, 0)
    assert aligned_rotated_iou(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"b: expected rotated boxes \(N, 5\) as cx, cy, w, h, angle, got \(3, 4\)"):
        pairwise_rotated_iou(crowded(3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="as many boxes in a as in b, got 3 and 1"):
        aligned_rotated_iou(crowded(3), crowded(1))
    with pytest.raises(ValueError, match="'union' or 'first', got 'second'"):
        aligned_rotated_iou(crowded(3), crowded(3), over="second")  # type: ignore[arg-type]
