"""nvidia-modelopt's ``modelopt.torch.distill``: ``convert`` with ``kd_loss``, as its guide says.

The converted model is trained, called and, at the end, given to ``export``. One criterion of the outputs and one of a
layer, balanced by ``StaticLossBalancer``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.modules.loss import _Loss

from distillkit.bench.behaviour import kit, parallel, provoke, rows
from distillkit.bench.behaviour.kit import Net, Running, pictures, raised
from distillkit.bench.behaviour.ours import two_losses_by_hand
from distillkit.bench.behaviour.rows import Outcome, does_not_apply


class Projected(_Loss):
    """A layer loss with parameters."""

    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.projection = nn.Conv2d(narrow, wide, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return mse_loss(self.projection(student), teacher)


def load() -> None:
    import modelopt.torch.distill  # noqa: F401


def converted(student: nn.Module, teacher: nn.Module, **config: Any) -> Any:
    import modelopt.torch.distill as mtd

    return mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, **config})])


def start(
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    weight: float = 0.4,
    logits: bool = True,
    at: str = "blocks.1",
    loss: _Loss | None = None,
    **ddp: Any,
) -> Running:
    import modelopt.torch.distill as mtd

    student, teacher = Net() if student is None else student, Net(1) if teacher is None else teacher
    criterion: dict[tuple[str, str], _Loss] = {(at, at): loss or nn.MSELoss()}
    if logits:
        criterion[("", "")] = mtd.LogitsDistillationLoss(temperature=4.0, reduction="batchmean")
    weights = [weight / len(criterion)] * len(criterion)
    model = converted(student, teacher, criterion=criterion, loss_balancer=mtd.StaticLossBalancer(weights))
    called = nn.parallel.DistributedDataParallel(model, **ddp) if ddp else model

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        task = cross_entropy(called(x), y)
        total = model.compute_kd_loss(student_loss=task)
        return total, total - (1 - sum(weights)) * task

    return Running(
        student=model, teacher=teacher, forward=forward, trained=model, train=model.train,
        unwrap=lambda: mtd.export(model), loss_names=("kd", "MSELoss", "LogitsDistillationLoss"), plain=Net,
    )  # fmt: skip


def distributed(projection: bool) -> Running:
    student, teacher = Net(dropout=0.0), Net(1, width=12 if projection else 8)
    student.spare.requires_grad_(False)
    loss = Projected(8, 12) if projection else None
    return start(student, teacher, loss=loss, find_unused_parameters=projection)


KIT = kit.classifiers(start, distributed)


def two_losses() -> Outcome:
    import modelopt.torch.distill as mtd

    student, teacher = Net(dropout=0.0), Net(1, dropout=0.0)
    criterion = {("blocks.0", at): nn.MSELoss() for at in ("blocks.0", "blocks.1")}
    model = converted(student, teacher, criterion=criterion, loss_balancer=mtd.StaticLossBalancer([0.25, 0.25]))
    x = pictures(4)[0]
    got: dict[str, Tensor] = {}

    def run() -> None:
        model(x)
        got.update(model.compute_kd_loss(skip_balancer=True))

    error = raised(run)
    if error is not None:
        return Outcome(False, f"{type(error).__name__}: {rows.short(str(error))}")
    values = {at: float(v.detach()) for at, v in zip(("blocks.0", "blocks.1"), got.values(), strict=True)}
    return two_losses_by_hand(values, Net(dropout=0.0), teacher, x)


def wrong_path() -> Outcome:
    return rows.named(raised(lambda: start(at="block.1")), ["block.1", "blocks.1"])


def never_ran() -> Outcome:
    running = start(at="spare")
    return rows.named(raised(lambda: running.forward(*pictures(4))), ["spare"])


def misspelt_key() -> Outcome:
    return rows.named(
        raised(lambda: converted(Net(), Net(1), criterion=nn.MSELoss(), loss_balancr=None)), ["loss_balancr"]
    )


def trains_nothing() -> Outcome:
    return provoke.trains_nothing(KIT, start(logits=False), lambda name: not name.startswith("head"))


def compiled_before() -> Outcome:
    return provoke.compiled_before(KIT, lambda student: start(student, logits=False))


def accelerate() -> Outcome:
    return parallel.accelerate(lambda accelerator: start(), KIT)


def two_ranks() -> Outcome:
    return parallel.two_ranks("modelopt", {"KIT": (KIT, {"student": Net(dropout=0.0)})})


def loss_parameters() -> Outcome:
    return parallel.loss_parameters("modelopt", "projection")


def runner_checkpoint() -> Outcome:
    return does_not_apply("reads no teacher's file: takes the loaded model")


def runs_code() -> Outcome:
    return does_not_apply("has no recipe: a dict in Python")


def no_objects() -> Outcome:
    return does_not_apply("classifies")
