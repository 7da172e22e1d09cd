"""Two ranks, and Accelerate: the same in every contender."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from multiprocessing import get_all_start_methods
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.bench.behaviour import rows
from distillkit.bench.behaviour.kit import Kit, Running, raised
from distillkit.bench.behaviour.rows import Outcome
from distillkit.bench.ranks import RANKS, on_two_ranks
from distillkit.bench.suite import worst


def gradient(kit: Kit, running: Running, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Of the distillation loss, by name; the rest counts nothing and still takes part, as DDP wants of parameters."""
    running.train()
    for module in running.student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # its statistics are of one rank's pictures alone
    total, kd = running.forward(*batch)
    (kd + 0 * total).backward()
    return {name: p.grad.clone() for name, p in running.trained.named_parameters() if p.grad is not None}


def on_rank(rank: int, contender: str, kit_name: str, projection: bool) -> dict[str, Any]:
    """What one of two ranks does: the gradient of its half of the pictures."""
    module = import_module(f"distillkit.bench.behaviour.{contender}")
    module.load()
    kit: Kit = getattr(module, kit_name)
    torch.manual_seed(0)
    try:
        running = kit.distributed(projection)
        batch = share(kit.batch(2 * RANKS), rank)
        return {"gradient": gradient(kit, running, batch), "error": ""}
    except Exception as error:
        return {"gradient": {}, "error": f"{type(error).__name__}: {error}"}


def share(batch: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """A rank's half."""
    half = slice(2 * rank, 2 * rank + 2)
    return tuple({k: v[half] for k, v in part.items()} if isinstance(part, dict) else part[half] for part in batch)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest, relative to the largest entry of ``a``; of the names that both have."""
    scale = worst(float(g.abs().max()) for g in a.values())
    return worst(float((a[name] - b[name]).abs().max()) for name in a.keys() & b.keys()) / max(scale, 1e-12)


def half_each(contender: str, kit_name: str, projection: bool) -> list[dict[str, Any]]:
    start = "fork" if "fork" in get_all_start_methods() else "spawn"
    return on_two_ranks(on_rank, contender, kit_name, projection, start=start)


def two_ranks(contender: str, kits: dict[str, tuple[Kit, dict[str, Any]]]) -> Outcome:
    """``kits``: by their name in the contender's file, with the options of ``start`` that ``distributed`` gives."""
    halves = {name: half_each(contender, name, False) for name in kits}  # before anything runs backward here
    return rows.both(*(_as_one(halves[name], kit, options) for name, (kit, options) in kits.items()))


def _as_one(halves: list[dict[str, Any]], kit: Kit, options: dict[str, Any]) -> Outcome:
    for rank in halves:
        if rank["error"]:
            return Outcome(False, rows.short(rank["error"]))
    first, second = (rank["gradient"] for rank in halves)
    apart = difference(first, second)
    if apart > 1e-6:
        return Outcome(False, f"the ranks' gradients differ by {apart:.0%} of the largest: not reduced")
    torch.manual_seed(0)  # of projections
    alone = gradient(kit, kit.start(**options), kit.batch(2 * RANKS))
    if only := first.keys() ^ alone.keys():
        return Outcome(False, rows.short(f"gradients on one side alone: {', '.join(sorted(only))}"))
    off = difference(alone, first)
    if off <= 1e-4:
        return Outcome(True, f"equal on both, and to {off:.0e} those of one process")
    return Outcome(False, f"equal on both, but {off:.0%} off one process's ({ratio(alone, first):.2f} times as long)")


def ratio(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Length of b over that of a."""
    names = a.keys() & b.keys()
    return float(sum(b[n].pow(2).sum() for n in names) / sum(a[n].pow(2).sum() for n in names)) ** 0.5


def loss_parameters(contender: str, projection: str) -> Outcome:
    """``projection``: part of the name of its parameters."""
    first, second = half_each(contender, "KIT", True)
    for rank in (first, second):
        if rank["error"]:
            return Outcome(False, rows.cut_around(rank["error"], ["twice", "Error"]))
    own = {name: g for name, g in first["gradient"].items() if projection in name}
    if not own:
        return Outcome(False, "the projection is not among what is optimised")
    if not any(bool(g.any()) for g in own.values()):
        return Outcome(False, "the projection has no gradient")
    apart = difference(own, second["gradient"])
    return Outcome(apart <= 1e-6, f"{len(own)} tensors, apart by {apart:.0e} between the ranks")


def accelerate(start: Callable[[Any], Running], kit: Kit) -> Outcome:
    """``start``: gets the Accelerator, and prepares what it documents."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)

    def run() -> None:
        running = start(accelerator)
        optimizer = torch.optim.SGD([p for p in running.trained.parameters() if p.requires_grad], lr=0.1)
        _, optimizer = accelerator.prepare(running.trained, optimizer)
        running.train()
        before = {n: p.clone() for n, p in running.student.named_parameters()}
        accelerator.backward(running.forward(*kit.batch(4))[0])
        optimizer.step()
        if all(torch.equal(p, before[n]) for n, p in running.student.named_parameters()):
            raise AssertionError("the student did not change")

    error = raised(run)
    return Outcome(error is None, "one step" if error is None else f"{type(error).__name__}: {rows.short(str(error))}")
