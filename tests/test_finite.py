"""Which loss was first not finite, and when; and the divergence that a step takes the mean of."""

import math

import pytest
import torch

from distillkit.bench.counting import Dispatched
from distillkit.core.finite import FirstBad
from distillkit.losses.kl import kl_divergence, mean_kl_divergence


def seen(table: FirstBad, steps: list[tuple[float, float]], start: int = 0) -> dict[str, int]:
    for a, b in steps:
        table.see({"a": torch.tensor(a, requires_grad=True), "b": torch.tensor(b)})
    return table.look(torch.tensor(start + len(steps)))


def test_the_first_bad_step_of_each_loss_is_named_and_then_forgotten():
    table = FirstBad(8)
    bad = [(1.0, 2.0), (1.0, math.inf), (math.nan, 3.0), (1.0, -math.inf)]
    assert seen(table, bad, start=7) == {"a": 9, "b": 8}
    assert seen(table, [(1.0, 2.0)], start=11) == {}
    assert table.look(torch.tensor(12)) == {}


def test_compiled_steps_and_eager_ones_together():
    table = FirstBad(8)
    table.see_compiled({"a": torch.tensor(1.0), "b": torch.tensor(math.nan)}, torch.tensor(3))
    table.see_compiled({"a": torch.tensor(math.inf), "b": torch.tensor(math.nan)}, torch.tensor(4))
    assert seen(table, [(math.nan, 1.0)], start=5) == {"a": 4, "b": 3}


def test_a_full_table_and_other_losses_are_told():
    table = FirstBad(2)
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert not table.fits(losses)
    table.see(losses)
    assert table.fits(losses)
    assert not table.full
    table.see(losses)
    assert table.full
    assert not table.fits({"a": torch.tensor(1.0)})
    table.look(torch.tensor(2))
    assert not table.full


def test_an_eager_step_costs_one_operation_and_no_memory():
    table = FirstBad(8)
    losses = {name: torch.tensor(1.0) for name in "abc"}
    table.see(losses)
    with Dispatched() as counted:
        table.see(losses)
    assert counted.operations.total() == 1
    assert not counted.syncs


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_large_loss_is_finite_in_its_own_precision(dtype):
    table = FirstBad(2)
    table.see({"a": torch.tensor(torch.finfo(dtype).max, dtype=dtype)})
    assert table.look(torch.tensor(1)) == {}


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_the_mean_divergence_is_the_mean_of_the_rows(shape):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, generator=g, dtype=torch.float64)
    mean, rows = mean_kl_divergence(student, teacher, 3.0), kl_divergence(student, teacher, 3.0, "sum").mean()
    torch.testing.assert_close(mean, rows)
    for a, b in zip(*(torch.autograd.grad(loss, student, retain_graph=True) for loss in (mean, rows)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="same shape"):
        mean_kl_divergence(student, teacher[..., :4])
