"""Two gloo ranks give the losses and gradients of one process."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import distillkit
from distillkit import FeatureImitation, LogitKD
from distillkit.core.wrap import DistilledModel
from tests.ranks import RANKS, on_two_ranks
from tests.tiny import Net, batch

IMAGES = 8


def make() -> DistilledModel:
    torch.manual_seed(0)
    student, teacher = Net(width=8), Net(width=12)
    student.drop = nn.Identity()
    student.stem[1].eval().requires_grad_(True)
    model = distillkit.wrap(
        student,
        teacher,
        [LogitKD(temperature=2.0), FeatureImitation(student_at="blocks.1", teacher_at="blocks.1")],
        criterion=cross_entropy,
    )
    model.train()
    student.stem[1].eval()  # BatchNorm frozen: its statistics are the images' of one rank only
    return model


def results(model: nn.Module, losses: dict, full=lambda t: t) -> dict:
    return {
        "losses": {k: v.detach() for k, v in losses.items() if k != "output"},
        "grads": {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def one_process() -> dict:
    model = make()
    losses = model(*batch(IMAGES))
    losses.total.backward()
    return results(model, losses)


def mine(rank: int) -> tuple:
    x, y = batch(IMAGES)
    return x.chunk(RANKS)[rank], y.chunk(RANKS)[rank]


def ddp(rank: int) -> dict:
    model = make()
    parallel = nn.parallel.DistributedDataParallel(model)
    losses = parallel(*mine(rank))
    assert isinstance(losses, distillkit.Losses)
    losses.total.backward()
    return results(model, losses)


def fsdp(rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.student.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = model(*mine(rank))
    losses.total.backward()
    return results(model, losses, full=lambda t: t.full_tensor())


def check_same(ranks: list[dict], alone: dict) -> None:
    for name, loss in alone["losses"].items():
        torch.testing.assert_close(sum(r["losses"][name] for r in ranks) / RANKS, loss, rtol=1e-5, atol=1e-7, msg=name)
    for r in ranks:
        assert r["grads"].keys() == alone["grads"].keys()
        for name, grad in alone["grads"].items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(r["grads"][name], grad, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_ddp():
    check_same(on_two_ranks(ddp), one_process())


def test_fsdp2():
    check_same(on_two_ranks(fsdp), one_process())
