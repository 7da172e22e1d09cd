"""Faults of teachers and of wiring, provoked in the same way in every contender."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.bench.behaviour import rows
from distillkit.bench.behaviour.kit import (
    CLASSES,
    Kit,
    Net,
    Running,
    kit_deterministic,
    listening,
    loss_of,
    pictures,
    raised,
)
from distillkit.bench.behaviour.rows import Outcome
from distillkit.bench.counting import kept_tensors
from distillkit.bench.suite import worst

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


# ---- the teacher


def teacher_mode(kit: Kit) -> Outcome:
    running = kit.start()
    means = {n: b.clone() for n, b in running.teacher.named_buffers() if n.endswith("running_mean")}
    noisy: set[str] = set()

    def look(module: nn.Module, args: Any) -> None:
        if module.training:
            noisy.add(type(module).__name__)

    for module in running.teacher.modules():
        if isinstance(module, NORMS):
            module.register_forward_pre_hook(look)
    for _ in range(3):
        running.train()
        running.forward(*kit.batch(4))[0].backward()
    after = dict(running.teacher.named_buffers())
    drift = worst(float((after[n] - mean).abs().max()) for n, mean in means.items())
    saw = f"BatchNorm's mean moved by {drift:.2g}" if drift else "BatchNorm's mean did not move"
    return Outcome(not drift and not noisy, saw + (f"; {', '.join(sorted(noisy))} in train mode" if noisy else ""))


def teacher_switched(kit: Kit) -> Outcome:
    running = kit.start()
    for _ in range(2):
        running.train()
        running.forward(*kit.batch(4))
    means = {n: b.clone() for n, b in running.teacher.named_buffers() if n.endswith("running_mean")}
    running.teacher.train()
    error = raised(lambda: running.forward(*kit.batch(4)))
    if error is not None:
        return rows.named(error, ["mode"])
    after = dict(running.teacher.named_buffers())
    drift = worst(float((after[n] - mean).abs().max()) for n, mean in means.items())
    return Outcome(
        not drift, f"BatchNorm's mean moved by {drift:.2g}, no word" if drift else "BatchNorm's mean did not move"
    )


def teacher_hidden(kit: Kit) -> Outcome:
    running = kit.start()
    theirs = {id(t) for t in (*running.teacher.parameters(), *running.teacher.buffers())}
    places = {t.data_ptr() for t in (*running.teacher.parameters(), *running.teacher.buffers())}
    saved = running.trained.state_dict() if running.saved is None else running.saved()
    found = {
        "parameters": sum(id(p) in theirs for p in running.trained.parameters()),
        "buffers": sum(id(b) in theirs for b in running.trained.buffers()),
        "entries of the checkpoint": sum(t.data_ptr() in places for t in saved.values() if isinstance(t, Tensor)),
    }
    seen = ", ".join(f"{count} {what}" for what, count in found.items() if count)
    return Outcome(not seen, f"{seen} are the teacher's" if seen else "none of its tensors in either")


def teacher_gradient(kit: Kit) -> Outcome:
    running = kit.start()
    running.train()
    total, _ = running.forward(*kit.batch(4))
    theirs = {id(p) for p in running.teacher.parameters()}
    reached = len(theirs & {id(leaf) for leaf in leaves(total)})
    total.backward()
    got = sum(p.grad is not None for p in running.teacher.parameters())
    saw = f"{got} of its parameters have a gradient, {reached} are in the graph"
    return Outcome(not got and not reached, saw if got or reached else "none, and none of it in the graph")


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The parameters in a loss's graph."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [following for following, _ in node.next_functions]


class Provoked(RuntimeError):  # noqa: N818 - asked for, not an error
    """The exception in the student's forward."""


def after_exception(kit: Kit) -> Outcome:
    running = kit.start()
    running.train()
    batch = kit.batch(4)

    def good() -> None:
        running.forward(*batch)[0].backward()
        running.trained.zero_grad()

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise Provoked

    def bad() -> None:
        with suppress(Provoked):
            running.forward(*batch)
            raise AssertionError("the exception did not come through")

    good()  # what is made once
    kept = {"a step": kept_bytes(running, good)}
    running.student.get_submodule(kit.last).register_forward_hook(fail)
    kept["an exception"] = kept_bytes(running, bad)
    saw = ", ".join(f"{count} bytes after {what}" for what, count in kept.items() if count)
    return Outcome(not saw, saw or "nothing after either")


def kept_bytes(running: Running, step: Callable[[], None]) -> int:
    """Of what the modules of both models returned in a step and is still alive after it."""
    kept = kept_tensors(nn.ModuleList([running.student, running.teacher]), step)
    storages = [t.untyped_storage() for t in kept]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def teacher_nan(kit: Kit) -> Outcome:
    running = kit.start()
    with torch.no_grad():
        for parameter in running.teacher.parameters():
            parameter.fill_(float("nan"))
    optimizer = torch.optim.SGD([p for p in running.trained.parameters() if p.requires_grad], lr=1e-3)
    batch = kit.batch(2)

    def train() -> None:
        for _ in range(60):
            running.train()
            running.forward(*batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    with listening() as heard:
        error = raised(train)
    theirs = {id(p) for p in running.teacher.parameters()}  # which some students hold
    own = [p for p in running.student.parameters() if id(p) not in theirs]
    lost = sum(not bool(p.isfinite().all()) for p in own)
    silent = f"60 steps without a word; {lost} of the student's parameters are NaN"
    messages = [*heard, *([] if error is None else [f"{type(error).__name__}: {error}"])]
    return rows.said(messages, ("nan", "finite"), (*running.loss_names, "teacher"), silent)


# ---- wiring


def trains_nothing(kit: Kit, running: Running, frozen: Callable[[str], bool]) -> Outcome:
    """``frozen``: which parameters, by name; what the loss reads comes from these alone."""
    for name, parameter in running.student.named_parameters():
        parameter.requires_grad_(not frozen(name))
    optimizer = torch.optim.SGD([p for p in running.trained.parameters() if p.requires_grad], lr=1e-3)
    reach: list[int] = []

    def train() -> None:
        for _ in range(3):
            running.train()
            total, kd = running.forward(*kit.batch(2))
            free = [p for p in running.student.parameters() if p.requires_grad]
            grads = torch.autograd.grad(kd, free, retain_graph=True, allow_unused=True) if kd.requires_grad else []
            reach.append(sum(g is not None and bool(g.any()) for g in grads))
            total.backward()
            optimizer.step()
            optimizer.zero_grad()

    with listening() as heard:
        error = raised(train)
    if any(reach):
        return Outcome(False, f"{max(reach)} parameters were reached: nothing was provoked", broken=True)
    messages = [*heard, *([] if error is None else [f"{type(error).__name__}: {error}"])]
    about = ("student", "gradient", "reaches", "frozen")
    return rows.said(messages, about, running.loss_names, "3 steps without a word, no gradient")


def class_counts(kit: Kit) -> Outcome:
    def run() -> None:
        kit.start(teacher=Net(1, classes=7)).forward(*kit.batch(4))

    return rows.named(raised(run), [str(CLASSES), "7", "class"])


def two_wrappers(kit: Kit) -> Outcome:
    first = kit.start(**kit_deterministic(kit))
    kind = type(first.student)
    before = loss_of(kit, first, kit.batch(4))
    second = kit.start(**kit_deterministic(kit))
    second.train()
    second.forward(*kit.batch(2))[0].backward()
    if type(first.student) is not kind:
        return Outcome(False, f"the first student is a {type(first.student).__name__} now")
    return rows.equal({"before": before, "after": loss_of(kit, first, kit.batch(4))}, 1e-6, "the first one's loss")


def compiled_before(kit: Kit, start: Callable[[nn.Module], Running]) -> Outcome:
    """``start`` hooks a layer of a student that has been compiled, and called once."""
    plain = Net(dropout=0.0)
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    compiled(pictures(4)[0])
    plain(pictures(4)[0])
    losses: dict[str, float] = {}

    def run(name: str, student: Any) -> None:
        losses[name] = loss_of(kit, start(student), pictures(4))

    run("plain", plain)
    error = raised(lambda: run("compiled", compiled))
    if error is not None:
        return rows.named(error, ["compile"])
    return rows.equal(losses, 1e-5, "loss of the plain and the compiled student")


def repeated_images(kit: Kit) -> Outcome:
    running = kit.start(**kit_deterministic(kit))
    return rows.equal({str(n): loss_of(kit, running, kit.repeat(n)) for n in (1, 2, 4, 8)}, 1e-4, "1, 2, 4, 8 copies")
