"""losses/gaussian.py: closed forms, what the distances do not see, matrices as an oracle, gradients, hard boxes."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from distillkit.boxes.rotated_iou import aligned_rotated_iou
from distillkit.losses.gaussian import gwd_loss, kld_loss, probiou_loss

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: tuple[Loss, ...] = (gwd_loss, kld_loss, probiou_loss)
FLOOR: dict[Loss, float] = {gwd_loss: 0.0, kld_loss: 1 - 1 / (1 + math.log1p(1e-6)), probiou_loss: 0.0}


def some_boxes(number: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor([40, 40, 50, 50, 6.0])
    return (torch.rand(number, 5, generator=g) * scale + torch.tensor([0, 0, 4, 4, -3])).double()


def box(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


# ---- values


def test_gwd_by_hand() -> None:
    """Axis by axis: W^2 is the squared distance of the centres and of the half sides."""
    a, b = box(1, 2, 8, 4, 0), box(4, 6, 2, 16, 0)
    squared = 3**2 + 4**2 + (4 - 1) ** 2 + (2 - 8) ** 2
    norm = 2 * (4 * 2 * 1 * 8) ** 0.25
    assert gwd_loss(a, b).item() == pytest.approx(math.log1p(math.sqrt(squared) / norm))


def test_kld_by_hand() -> None:
    a, b = box(1, 2, 8, 4, 0), box(4, 6, 2, 16, 0)
    twice = (3 / 1) ** 2 + (4 / 8) ** 2 + (4 / 1) ** 2 + (2 / 8) ** 2 + 2 * math.log(1 * 8 / (4 * 2)) - 2
    assert kld_loss(a, b).item() == pytest.approx(1 - 1 / (1 + math.log1p(twice)))
    assert kld_loss(b, a).item() != pytest.approx(kld_loss(a, b).item())


def test_probiou_by_hand() -> None:
    a, b = box(1, 2, 8, 4, 0), box(4, 6, 2, 16, 0)
    x, y = (8**2 + 2**2) / 12, (4**2 + 16**2) / 12
    distance = (3**2 / x + 4**2 / y) / 4 + math.log(x * y / 4 / (8 * 4 * 2 * 16 / 144)) / 2
    assert probiou_loss(a, b).item() == pytest.approx(math.sqrt(1 - math.exp(-distance)))


def gaussian(boxes: Tensor, share: float) -> tuple[Tensor, Tensor]:
    cos, sin = boxes[:, 4].cos(), boxes[:, 4].sin()
    turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    return boxes[:, :2], turn @ torch.diag_embed(boxes[:, 2:4].square() / share) @ turn.mT


def matrix_root(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT


def by_matrices(loss: Loss, a: Tensor, b: Tensor) -> Tensor:
    """The definitions, with roots and inverses of matrices."""
    (p, P), (t, T) = (gaussian(boxes, 12 if loss is probiou_loss else 4) for boxes in (a, b))
    apart = (p - t)[:, :, None]

    def trace(m: Tensor) -> Tensor:
        return m.diagonal(dim1=1, dim2=2).sum(1)

    if loss is gwd_loss:
        root = matrix_root(P)
        squared = apart.square().sum((1, 2)) + trace(P + T - 2 * matrix_root(root @ T @ root))
        return torch.log1p(squared.sqrt() / (2 * (P.det() * T.det()) ** 0.125))
    if loss is kld_loss:
        inverse = torch.linalg.inv(T)
        distance = (apart.mT @ inverse @ apart)[:, 0, 0] + trace(inverse @ P) + (T.det() / P.det()).log() - 2
        return 1 - 1 / (1 + distance.log1p())
    both = P + T
    distance = (apart.mT @ torch.linalg.inv(both) @ apart)[:, 0, 0] / 4
    distance = distance + ((both / 2).det() / (P.det() * T.det()).sqrt()).log() / 2
    return (1 - (-distance).exp()).sqrt()


@pytest.mark.parametrize("loss", LOSSES)
def test_against_matrices(loss: Loss) -> None:
    a, b = some_boxes(500), some_boxes(500, seed=1)
    torch.testing.assert_close(loss(a, b), by_matrices(loss, a, b), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss(a.float(), b.float()).double(), loss(a, b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_boxes(loss: Loss) -> None:
    """Also written in other ways, and in float32."""
    a = some_boxes(300)
    half = a + box(0, 0, 0, 0, math.pi)
    quarter = torch.cat([a[:, :2], a[:, 2:4].flip(1), a[:, 4:] - math.pi / 2], 1)
    for b in (a, half, quarter):
        torch.testing.assert_close(loss(a, b), torch.full((300,), FLOOR[loss]).double(), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(loss(a.float(), b.float()), torch.full((300,), FLOOR[loss]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_invariances(loss: Loss) -> None:
    a, b = some_boxes(300), some_boxes(300, seed=1)
    want = loss(a, b)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    angle = math.atan2(0.8, 0.6)
    others = {
        "half turn": (a + box(0, 0, 0, 0, math.pi), b),
        "swapped": (torch.cat([a[:, :2], a[:, 2:4].flip(1), a[:, 4:] + math.pi / 2], 1), b),
        "swapped target": (a, torch.cat([b[:, :2], b[:, 2:4].flip(1), b[:, 4:] - math.pi / 2], 1)),
        "moved": tuple(x + torch.tensor([100, -20, 0, 0, 0]) for x in (a, b)),
        "scaled": tuple(x * torch.tensor([3, 3, 3, 3, 1]) for x in (a, b)),
        "turned": tuple(torch.cat([x[:, :2] @ turn, x[:, 2:4], x[:, 4:] + angle], 1) for x in (a, b)),
    }
    for name, (x, y) in others.items():
        assert loss(x, y).tolist() == pytest.approx(want.tolist(), rel=1e-9, abs=1e-12), name
    if loss is not kld_loss:
        torch.testing.assert_close(loss(b, a), want)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_square_has_no_angle(loss: Loss) -> None:
    square, other = box(0, 0, 9, 9, 0.3).requires_grad_(), box(3, 1, 12, 5, 1.2)
    torch.testing.assert_close(loss(square, other), loss(square + box(0, 0, 0, 0, 0.5), other))
    (gradient,) = torch.autograd.grad(loss(square, other).sum(), square)
    assert gradient[0, 4].abs() < 1e-12


# ---- gradients


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_against_finite_differences(loss: Loss) -> None:
    a, b = some_boxes(12).requires_grad_(), some_boxes(12, seed=1).requires_grad_()
    assert gradcheck(loss, (a, b))
    # sides in swapped order, a quarter turn apart, one a square
    pair = torch.cat([box(0, 0, 9, 4, 0), box(0, 0, 6, 6, 0.2)]), torch.cat([box(1, 1, 4, 8, math.pi / 2)] * 2)
    assert gradcheck(loss, tuple(x.requires_grad_() for x in pair))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_at_equal_boxes(loss: Loss) -> None:
    a = some_boxes(50)
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    for gradient in torch.autograd.grad(loss(x, y).sum(), (x, y)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_finds_the_box(loss: Loss) -> None:
    target, found = box(50, 50, 40, 12, 0.6), box(20, 60, 20, 20, 0.5).requires_grad_()
    optimizer = torch.optim.Adam([found], 0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss(found, target).sum().backward()
        optimizer.step()
        schedule.step()
    assert aligned_rotated_iou(found, target).item() > 0.99  # whichever of its sides it calls w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_always_finite(loss: Loss, dtype: torch.dtype) -> None:
    sides, angles = (0, 1e-30, 1e-9, 1e-4, 1, 50, 1e4, 1e6), (0, 1e-20, 1e-8, math.pi / 4, math.pi / 2, -2 * math.pi)
    centres = ((0, 0), (1e-6, 0), (25, 25), (1e6, -1e6))
    boxes = torch.tensor([(*c, w, h, t) for c, w, h, t in itertools.product(centres, sides, sides, angles)])
    boxes = boxes.to(dtype)
    g = torch.Generator().manual_seed(0)
    i = torch.arange(len(boxes)).repeat(20)
    near_by = (i + torch.randint(-30, 30, i.shape, generator=g)).clamp(0, len(boxes) - 1)
    for j in (i, near_by, torch.randint(0, len(boxes), i.shape, generator=g)):
        a, b = boxes[i].requires_grad_(), boxes[j].requires_grad_()
        value = loss(a, b)
        assert (value >= 0).all()
        assert value.isfinite().all()
        for gradient in torch.autograd.grad(value.sum(), (a, b)):
            assert gradient.isfinite().all()


# ---- shapes


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_and_precision(loss: Loss) -> None:
    assert loss(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)
    boxes = some_boxes(4)
    assert loss(boxes.bfloat16(), boxes.bfloat16()).dtype is torch.float32
    with pytest.raises(ValueError, match=r"expected two times \(M, 5\), got \(4, 5\) and \(3, 5\)"):
        loss(boxes, boxes[:3])
