"""ultralytics' distillation, ``DistillationModel``, as its trainer makes and calls it (``distill_model=``).

Teacher and student are its YOLO26, half as wide as n, with random weights. The trainer freezes the teacher,
sums the losses, multiplies them by the number of ranks, and at the end saves the student alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.bench.behaviour import kit, parallel, product, provoke, rows
from distillkit.bench.behaviour.kit import Kit, Running, pictures, raised
from distillkit.bench.behaviour.rows import Outcome, does_not_apply
from distillkit.bench.ranks import RANKS

SIZE = 64
ITS_OWN = "chooses its layers itself"


def load() -> None:
    import ultralytics.nn.distill_model  # noqa: F401

    yolo()  # reads its settings


def yolo(seed: int = 0, classes: int = 3) -> Any:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    torch.manual_seed(seed)
    described = yaml_model_load("yolo26n.yaml")
    described["scales"]["n"] = [0.5, 0.125, 1024]
    model: Any = DetectionModel(described, nc=classes, verbose=False)
    model.args = get_cfg(overrides={"imgsz": SIZE})
    return model


def start(weight: float = 6.0, teacher: Any = None, **ddp: Any) -> Running:
    from ultralytics.nn.distill_model import DistillationModel

    student, teacher = yolo(), yolo(1) if teacher is None else teacher
    student.args.dis = weight
    torch.manual_seed(2)
    model = DistillationModel(teacher, student)
    called = nn.parallel.DistributedDataParallel(model, **ddp) if ddp else model
    times = RANKS if ddp else 1

    def forward(x: Tensor, y: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses, _ = called({"img": x, **flat(y)})
        return losses.sum() * times, losses[-1] * times

    return Running(
        student=student, teacher=teacher, forward=forward, trained=model, train=model.train,
        plain=yolo, loss_names=("dis",), unwrap=lambda: stripped(model), saved=lambda: average(model).state_dict(),
    )  # fmt: skip


def average(model: nn.Module) -> Any:
    """What its trainer saves: an average of the weights."""
    from ultralytics.utils.torch_utils import ModelEMA

    return ModelEMA(model).ema


def flat(y: dict[str, Tensor]) -> dict[str, Tensor]:
    """Boxes (n, k, 4) and classes (n, k) as its loader joins them."""
    count, each = y["cls"].shape
    index = torch.arange(count).repeat_interleave(each)
    return {"bboxes": y["bboxes"].reshape(-1, 4), "cls": y["cls"].reshape(-1, 1), "batch_idx": index.float()}


def stripped(model: nn.Module) -> nn.Module:
    """What its trainer leaves of a run: the last checkpoint, stripped."""
    from ultralytics.utils.torch_utils import strip_optimizer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "last.pt")
        torch.save({"model": model, "ema": None, "train_args": {}, "epoch": 0, "updates": 0, "optimizer": None,
                    "best_fitness": 0.0}, file)  # fmt: skip
        strip_optimizer(file)
        return torch.load(file, weights_only=False)["model"].float()


def boxes(count: int) -> dict[str, Tensor]:
    two = torch.tensor([[0.35, 0.33, 0.5, 0.45], [0.6, 0.65, 0.55, 0.5]])
    return {"bboxes": two.repeat(count, 1, 1), "cls": torch.tensor([[0.0, 2.0]]).repeat(count, 1)}


def batch(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    return pictures(count, size=SIZE)[0].sigmoid(), boxes(count)


def repeat(count: int) -> tuple[Tensor, dict[str, Tensor]]:
    return pictures(1, size=SIZE)[0].sigmoid().repeat(count, 1, 1, 1), boxes(count)


def distributed(projection: bool) -> Running:
    return start(find_unused_parameters=True)


KIT = Kit(start, batch, repeat, "model.23", distributed)


def teacher_nan() -> Outcome:
    """Its trainer looks at the loss once an epoch; the model alone is looked at here."""
    return provoke.teacher_nan(KIT)


def two_losses() -> Outcome:
    return does_not_apply(ITS_OWN)


def wrong_path() -> Outcome:
    return does_not_apply(ITS_OWN)


def never_ran() -> Outcome:
    return does_not_apply(ITS_OWN)


def misspelt_key() -> Outcome:
    from ultralytics.cfg import get_cfg

    return rows.named(raised(lambda: get_cfg(overrides={"distil_model": "yolo26s.pt"})), ["distil_model"])


def trains_nothing() -> Outcome:
    """``freeze=23``: all but the head."""
    return provoke.trains_nothing(KIT, start(), lambda name: not name.startswith("model.23."))


def class_counts() -> Outcome:
    return does_not_apply("its loss compares no classes: the teacher's scores are weights")


def compiled_before() -> Outcome:
    return does_not_apply("its trainer switches compile off when it distils, with a warning")


def accelerate() -> Outcome:
    return does_not_apply("its own trainer trains it")


def repeated_images() -> Outcome:
    """Its loss is times the batch, as all of its losses are: the mean is what is compared."""
    running = start()

    def mean(n: int) -> float:
        return kit.loss_of(KIT, running, repeat(n)) / n

    return rows.equal({str(n): mean(n) for n in (1, 2, 4, 8)}, 1e-4, "1, 2, 4, 8 copies, less its factor of the batch")


def two_ranks() -> Outcome:
    return parallel.two_ranks("ultralytics_kd", {"KIT": (KIT, {})})


def loss_parameters() -> Outcome:
    return parallel.loss_parameters("ultralytics_kd", "projector")


def runner_checkpoint() -> Outcome:
    return does_not_apply("its teacher is one of its own files")


def runs_code() -> Outcome:
    """A model file, whose activation is an expression."""
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    described = {**yaml_model_load("yolo26n.yaml"), "activation": "__import__('os').mkdir('FOLDER') or torch.nn.SiLU()"}
    described.pop("yaml_file", None)
    import yaml

    return product.runs_code(".yaml", yaml.safe_dump(described), lambda file: DetectionModel(str(file), verbose=False))


def unwrap() -> Outcome:
    return product.unwrap(KIT, tolerance=2e-2)  # saved in half precision


def normalisation() -> Outcome:
    return does_not_apply("its models all take 0..1")


def weight() -> Outcome:
    losses = {w: kit.loss_of(KIT, start(weight=w), batch(2)) for w in (6.0, 12.0)}
    times = losses[12.0] / losses[6.0]
    return Outcome(abs(times - 2) < 1e-4, f"{times:.4g} times")


def no_objects() -> Outcome:
    nothing = {"bboxes": torch.zeros(2, 0, 4), "cls": torch.zeros(2, 0)}
    return product.no_objects(KIT, (batch(2)[0], nothing))
