"""timm.task: ``LogitDistillationTask`` and, for what features need, ``FeatureDistillationTask``.

Used as timm's train.py does: the trainable module in train mode, the checkpoint from ``get_checkpoint_state``. Both
tasks know one place, the classifier's output and its pooled features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distillkit.bench.behaviour import kit, parallel, product, provoke, rows
from distillkit.bench.behaviour.kit import Net, Running, raised
from distillkit.bench.behaviour.rows import Outcome, does_not_apply


def load() -> None:
    import timm.task  # noqa: F401


def start(
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    weight: float = 1.0,
    features: bool = False,
    **ddp: Any,
) -> Running:
    from timm.task import FeatureDistillationTask, LogitDistillationTask

    student, teacher = Net() if student is None else student, Net(1) if teacher is None else teacher
    options: dict[str, Any] = {"criterion": nn.CrossEntropyLoss(), "distill_loss_weight": weight, "verbose": False}
    task: Any = (
        FeatureDistillationTask(student, teacher, **options)
        if features
        else LogitDistillationTask(student, teacher, temperature=4.0, **options)
    )
    inside = task.get_trainable_module()
    if ddp:
        task.prepare_distributed(**ddp)

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = task(x, y)
        return result["loss"], result["loss"] - task.task_loss_weight * result["task_loss"]

    return Running(
        student=student, teacher=teacher, forward=forward, trained=inside, train=task.train,
        unwrap=lambda: student, loss_names=("kd", "distill"), plain=Net,
        saved=lambda: task.get_checkpoint_state()["state_dict"],
    )  # fmt: skip


def distributed(projection: bool) -> Running:
    student = Net(dropout=0.0)
    student.spare.requires_grad_(False)
    return start(student, Net(1, width=12), features=projection, find_unused_parameters=projection)


KIT = kit.classifiers(start, distributed)
NO_LAYERS = "names no layers: logits, or pooled features"


def two_losses() -> Outcome:
    return does_not_apply("one loss a task")


def wrong_path() -> Outcome:
    return does_not_apply(NO_LAYERS)


def never_ran() -> Outcome:
    return does_not_apply(NO_LAYERS)


def misspelt_key() -> Outcome:
    from timm.task import LogitDistillationTask

    call: Any = LogitDistillationTask
    return rows.named(raised(lambda: call(Net(), Net(1), nn.CrossEntropyLoss(), temprature=4.0)), ["temprature"])


def trains_nothing() -> Outcome:
    """Features, the student's head alone trained."""
    return provoke.trains_nothing(KIT, start(features=True), lambda name: not name.startswith("head"))


def compiled_before() -> Outcome:
    return provoke.compiled_before(KIT, start)


def accelerate() -> Outcome:
    return parallel.accelerate(lambda accelerator: start(), KIT)


def two_ranks() -> Outcome:
    return parallel.two_ranks("timm_task", {"KIT": (KIT, {"student": Net(dropout=0.0), "teacher": Net(1, width=12)})})


def loss_parameters() -> Outcome:
    return parallel.loss_parameters("timm_task", "projection")


def runner_checkpoint() -> Outcome:
    from timm.models import load_checkpoint

    def load_weights(model: nn.Module, file: Path) -> object:
        return load_checkpoint(model, str(file))

    return product.runner_checkpoint(load_weights)


def runs_code() -> Outcome:
    return does_not_apply("has no recipe: a call in Python")


def no_objects() -> Outcome:
    return does_not_apply("classifies")
