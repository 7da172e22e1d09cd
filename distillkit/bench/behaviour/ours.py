"""distillkit under the same provocations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distillkit
from distillkit import LD, FeatureImitation, LogitKD, Main, Valuable
from distillkit.bench.behaviour import kit, parallel, product, provoke, rows
from distillkit.bench.behaviour.kit import Kit, Net, Running, pictures, raised
from distillkit.bench.behaviour.rows import Outcome
from distillkit.bench.suite import worst

RECIPE = """
task: classification
data: {kind: single-digit, train: 8, val: 8, test: 8, size: 64}
teacher: {kind: timm, model: resnet18, train: {epochs: 1}}
student: {kind: timm, model: resnet10t}
distillers: [{kind: logit-kd, temperature: 4}]
train: {epochs: 1, optimizer: {kind: adamw}}
"""


def load() -> None:
    logging.getLogger("distillkit").setLevel(logging.ERROR)
    start(), detect()  # imports what the probes use
    recipe(RECIPE)


def start(
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    weight: float = 1.0,
    logits: bool = True,
    at: str = "blocks.1",
) -> Running:
    """Logits, and the features of a layer."""
    student, teacher = Net() if student is None else student, Net(1) if teacher is None else teacher
    distillers = [LogitKD(temperature=4.0, weight=weight)] if logits else []
    features = FeatureImitation(weight=weight, student_at=at, teacher_at=at)
    return running_of(
        distillkit.wrap(student, teacher, [*distillers, features], criterion=cross_entropy), student, teacher
    )


def running_of(
    model: Any, student: nn.Module, teacher: nn.Module, plain: Callable[[], nn.Module] = Net, parallel: Any = None
) -> Running:
    def forward(x: Any, y: Any) -> tuple[Tensor, Tensor]:
        losses = (parallel or model)(x, y)
        kd = [losses[name] for name in losses if name in names]
        return losses.total, torch.stack(kd).sum()

    names = {name for name, _ in model._named}
    return Running(
        student=student, teacher=teacher, forward=forward, trained=model, train=model.train,
        unwrap=model.unwrap, loss_names=tuple(names), plain=plain,
    )  # fmt: skip


def distributed(projection: bool) -> Running:
    running = start(Net(dropout=0.0), Net(1, width=12))
    running.student.spare.requires_grad_(False)
    return in_parallel(running, find_unused_parameters=projection)


def in_parallel(running: Running, **options: Any) -> Running:
    """The same in DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(running.trained, **options)
    return running_of(running.trained, running.student, running.teacher, running.plain, model)


KIT = kit.classifiers(start, distributed)


# ---- a detector


def gfl(seed: int = 0) -> nn.Module:
    from distillkit.models.gfl import GFL

    torch.manual_seed(seed)
    return GFL(3, "test_resnet", strides=(4, 8, 16), channels=16, convs=1, groups=4, bins=9)


def detect() -> Running:
    student, teacher = gfl(), gfl(1)
    return running_of(distillkit.wrap(student, teacher, [LD(Main()), LD(Valuable())]), student, teacher, gfl)


def scene(count: int, size: int = 64) -> tuple[Tensor, list[dict[str, Tensor]]]:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 36.0], [20.0, 24.0, 60.0, 58.0]])
    shown = pictures(count, size=size)[0].sigmoid()
    return shown, [{"boxes": boxes + i, "labels": torch.tensor([0, 2])} for i in range(count)]


def scenes(count: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    x, y = scene(1)
    return x.repeat(count, 1, 1, 1), y * count


DETECTOR = Kit(detect, scene, scenes, "head", lambda projection: in_parallel(detect()))


# ---- probes


def two_losses() -> Outcome:
    student, teacher = Net(dropout=0.0), Net(1, dropout=0.0)
    losses = [FeatureImitation(student_at="blocks.0", teacher_at=at, name=at) for at in ("blocks.0", "blocks.1")]
    x, y = pictures(4)
    got = distillkit.wrap(student, teacher, losses, criterion=cross_entropy)(x, y)
    return two_losses_by_hand({at: float(got[at].detach()) for at in ("blocks.0", "blocks.1")}, student, teacher, x)


def two_losses_by_hand(got: dict[str, float], student: nn.Module, teacher: nn.Module, x: Tensor) -> Outcome:
    maps: dict[str, Tensor] = {}
    for name, module in {"s": student.get_submodule("blocks.0"), "blocks.0": teacher.get_submodule("blocks.0"),
                         "blocks.1": teacher.get_submodule("blocks.1")}.items():  # fmt: skip
        module.register_forward_hook(lambda m, a, out, name=name: maps.update({name: out}))
    with torch.no_grad():
        student(x), teacher.eval()(x)
    wanted = {at: float((maps["s"] - maps[at]).pow(2).mean()) for at in got}
    off = worst(abs(got[at] - wanted[at]) / wanted[at] for at in got)
    return Outcome(off < 1e-5, f"both, to {off:.0e}" if off < 1e-5 else f"got {got}, by hand {wanted}")


def wrong_path() -> Outcome:
    return rows.named(raised(lambda: start(at="block.1")), ["'block.1'", "'blocks.1'"])


def never_ran() -> Outcome:
    running = start(at="spare")
    return rows.named(raised(lambda: running.forward(*pictures(4))), ["'spare'"])


def misspelt_key() -> Outcome:
    return rows.named(raised(lambda: recipe(RECIPE.replace("temperature", "temprature"))), ["temprature"])


def recipe(text: str) -> object:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(text)
        return read(file)


def read(file: Path) -> object:
    from distillkit.recipe import load

    return load(file)


def trains_nothing() -> Outcome:
    return provoke.trains_nothing(KIT, start(logits=False), lambda name: not name.startswith("head"))


def compiled_before() -> Outcome:
    return provoke.compiled_before(KIT, lambda student: start(student, logits=False))


def accelerate() -> Outcome:
    return parallel.accelerate(lambda accelerator: start(), KIT)


def repeated_images() -> Outcome:
    return rows.both(provoke.repeated_images(KIT), provoke.repeated_images(DETECTOR))


def two_ranks() -> Outcome:
    options = {"student": Net(dropout=0.0), "teacher": Net(1, width=12)}
    return parallel.two_ranks("ours", {"KIT": (KIT, options), "DETECTOR": (DETECTOR, {})})


def loss_parameters() -> Outcome:
    return parallel.loss_parameters("ours", "projections")


def runner_checkpoint() -> Outcome:
    from distillkit.integrations.openmmlab import load as load_weights

    return product.runner_checkpoint(load_weights)


def runs_code() -> Outcome:
    return product.runs_code(".yaml", RECIPE + 'name: !!python/object/apply:os.mkdir ["FOLDER"]\n', read)


def bf16() -> Outcome:
    return rows.both(product.bf16(KIT), product.bf16(DETECTOR))


def no_objects() -> Outcome:
    x, _ = scene(2)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    return product.no_objects(DETECTOR, (x, [nothing, nothing]))
