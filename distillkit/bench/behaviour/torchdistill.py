"""torchdistill's ``DistillationBox``, driven by the configuration that its recipes have.

Its image-classification script is followed: box, ``pre_epoch_process``, ``forward_process``, ``post_forward_process``.
It never calls ``eval()`` on the teacher; all but the row that asks for it do so by hand.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from distillkit.bench.behaviour import kit, parallel, product, provoke, rows
from distillkit.bench.behaviour.kit import Net, Running, pictures, raised
from distillkit.bench.behaviour.ours import two_losses_by_hand
from distillkit.bench.behaviour.rows import Outcome, does_not_apply

RECIPE = """
train:
  marker: !import_call
    key: 'os.mkdir'
    init:
      args: ['FOLDER']
"""


class Nothing(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, 16, 16), 0


def load() -> None:
    import_module("torchdistill.core.distillation")
    import_module("torchdistill.common.yaml_util")
    from torchdistill.losses.registry import register_mid_level_loss

    register_mid_level_loss(Projected)


class Projected(nn.Module):
    """A layer loss with parameters, registered as torchdistill asks of one's own."""

    def __init__(self, path: str, narrow: int, wide: int, **kwargs: Any):
        super().__init__()
        self.path, self.projection = path, nn.Conv2d(narrow, wide, 1)

    def forward(self, student_io_dict: Any, teacher_io_dict: Any, *args: Any, **kwargs: Any) -> Tensor:
        student, teacher = (io[self.path]["output"] for io in (student_io_dict, teacher_io_dict))
        return mse_loss(self.projection(student), teacher)


def side(at: str, trained: bool) -> dict[str, Any]:
    return {"forward_proc": "forward_batch_only", "sequential": [], "wrapper": None, "requires_grad": trained,
            "forward_hook": {"input": [], "output": [at]}}  # fmt: skip


def reading(at: str, teacher: bool) -> dict[str, Any]:
    return {"is_from_teacher": teacher, "module_path": at, "io": "output"}


def features(at: str, teacher_at: str, weight: float) -> dict[str, Any]:
    wrapper = {"key": "SimpleLossWrapper", "kwargs": {"input": reading(at, False), "target": reading(teacher_at, True)}}
    return {"criterion": {"key": "MSELoss", "kwargs": {}}, "criterion_wrapper": wrapper, "weight": weight}


def config(at: str = "blocks.1", weight: float = 1.0, logits: bool = True) -> dict[str, Any]:
    """Cross entropy, KD of the logits, squared differences of a layer."""
    label = {"key": "SimpleLossWrapper", "kwargs": {"input": reading(".", False), "target": {"uses_label": True}}}
    kd = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".",
          "teacher_module_io": "output", "temperature": 4.0, "alpha": 0.0}  # fmt: skip
    terms = {
        "ce": {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "criterion_wrapper": label, "weight": 1.0},
        "kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": weight},
        "features": features(at, at, weight),
    }
    if not logits:
        del terms["kd"]
    sampler = {"class_or_func": torch.utils.data.SequentialSampler}
    return {
        "num_epochs": 1,
        "train_data_loader": {"dataset_id": "nothing", "sampler": sampler, "kwargs": {"batch_size": 2}},
        "teacher": side(at, False),
        "student": side(at, True),
        "optimizer": {"key": "SGD", "kwargs": {"lr": 1e-3}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }


def box_of(
    student: nn.Module, teacher: nn.Module, said: dict[str, Any], distributed: bool = False, accelerator: Any = None
) -> Any:
    from torchdistill.core.distillation import get_distillation_box

    data, device = {"nothing": Nothing()}, torch.device("cpu")
    return get_distillation_box(teacher, student, data, said, device, None, distributed, 1, accelerator)


def start(
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    weight: float = 1.0,
    logits: bool = True,
    said: dict[str, Any] | None = None,
    distributed: bool = False,
    by_hand: bool = True,
    accelerator: Any = None,
) -> Running:
    """``by_hand``: puts the teacher in eval, which torchdistill leaves to its user without a word."""
    student, teacher = Net() if student is None else student, Net(1) if teacher is None else teacher
    teacher.train(not by_hand)
    box = box_of(student, teacher, said or config(weight=weight, logits=logits), distributed, accelerator)

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen: dict[str, Tensor] = {}
        terms = box.criterion.term_dict
        ce, factor = terms["ce"]

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            seen["ce"] = ce(*args, **kwargs)
            return seen["ce"]

        terms["ce"] = (noted, factor)
        try:
            total = box.forward_process(x, y, None)
        finally:
            terms["ce"] = (ce, factor)
        return total, total - seen["ce"]

    def unwrap() -> nn.Module:
        box.clean_modules()
        return box.student_model

    return Running(
        student=box.student_model, teacher=teacher, forward=forward, trained=nn.ModuleList([box.student_model])[0],
        train=lambda: box.pre_epoch_process(epoch=0), unwrap=unwrap, loss_names=("kd", "features"), plain=Net,
    )  # fmt: skip


def distributed(projection: bool) -> Running:
    student, teacher = Net(dropout=0.0), Net(1, width=12 if projection else 8)
    student.spare.requires_grad_(False)
    said = config()
    said["student"]["wrapper"] = {
        "key": "DistributedDataParallel",
        "kwargs": {"find_unused_parameters": projection},
    }
    if projection:
        own = {"key": "Projected", "kwargs": {"path": "blocks.1", "narrow": 8, "wide": 12}}
        said["criterion"]["kwargs"]["sub_terms"]["features"] = {"criterion": own, "weight": 1.0}
    return start(student, teacher, said=said, distributed=True)


KIT = kit.classifiers(start, distributed)


def teacher_mode() -> Outcome:
    return provoke.teacher_mode(kit.classifiers(partial(start, by_hand=False), distributed))


def two_losses() -> Outcome:
    student, teacher = Net(dropout=0.0), Net(1, dropout=0.0).eval()
    said = config(at="blocks.0", logits=False)
    said["teacher"]["forward_hook"]["output"].append("blocks.1")
    terms = said["criterion"]["kwargs"]["sub_terms"]
    del terms["features"]
    terms.update({at: features("blocks.0", at, 1.0) for at in ("blocks.0", "blocks.1")})
    box = box_of(student, teacher, said)
    got: dict[str, float] = {}

    def note(name: str, criterion: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            loss = criterion(*args, **kwargs)
            got[name] = float(loss.detach())
            return loss

        return noted

    terms_of = box.criterion.term_dict
    terms_of.update({at: (note(at, terms_of[at][0]), 1.0) for at in ("blocks.0", "blocks.1")})
    x, y = pictures(4)
    error = raised(lambda: box.forward_process(x, y, None))
    if error is not None:
        return Outcome(False, f"{type(error).__name__}: {rows.short(str(error))}")
    return two_losses_by_hand(got, Net(dropout=0.0), Net(1, dropout=0.0), x)


def wrong_path() -> Outcome:
    """Its log is heard too: what it warns of a path it logs before it fails."""
    said = config(at="block.1")
    with kit.listening() as heard:
        error = raised(lambda: start(said=said))
    if error is None:
        return rows.named(None, [])
    return rows.named(type(error)("; ".join([str(error), *heard[-1:]])), ["block.1", "blocks.1"])


def never_ran() -> Outcome:
    running = start(said=config(at="spare"))
    return rows.named(raised(lambda: running.forward(*pictures(4))), ["spare"])


def misspelt_key() -> Outcome:
    said = config()
    said["optimizer"]["grad_acum_step"] = 4
    return rows.named(raised(lambda: start(said=said).forward(*pictures(4))), ["grad_acum_step"])


def trains_nothing() -> Outcome:
    return provoke.trains_nothing(KIT, start(logits=False), lambda name: not name.startswith("head"))


def two_wrappers() -> Outcome:
    """The second one has a process of its own before each epoch, as the documentation offers."""
    from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func

    calls: list[int] = []

    def my_pre_epoch(self: Any, epoch: int | None = None, **kwargs: Any) -> None:
        calls.append(1)
        self.student_model.train()

    register_pre_epoch_proc_func(my_pre_epoch)
    first = start()
    start(said={**config(), "pre_epoch_process": "my_pre_epoch"})
    first.train()
    if calls:
        return Outcome(False, "the first box runs the second one's process")
    return provoke.two_wrappers(KIT)


def compiled_before() -> Outcome:
    return provoke.compiled_before(KIT, lambda student: start(student, logits=False))


def accelerate() -> Outcome:
    return parallel.accelerate(lambda accelerator: start(accelerator=accelerator), KIT)


def two_ranks() -> Outcome:
    return parallel.two_ranks("torchdistill", {"KIT": (KIT, {"student": Net(dropout=0.0)})})


def loss_parameters() -> Outcome:
    return parallel.loss_parameters("torchdistill", "projection")


def runner_checkpoint() -> Outcome:
    from torchdistill.common.main_util import load_ckpt

    def load_weights(model: nn.Module, file: Path) -> object:
        return load_ckpt(str(file), model=model)

    return product.runner_checkpoint(load_weights)


def runs_code() -> Outcome:
    from torchdistill.common.yaml_util import load_yaml_file

    return product.runs_code(".yaml", RECIPE, lambda file: load_yaml_file(str(file)))


def no_objects() -> Outcome:
    return does_not_apply("classifies")
