"""The same training step of a classifier in every toolkit: one student, one teacher, one batch, SGD.

Every contender has modules of its own around the very same tensors: of two equal copies of a model one is a few per
cent faster, for as long as they live, and some toolkits change the class of what they are given.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

import distillkit
from distillkit.bench.peers import MODELOPT, TIMM, TORCHDISTILL, Peer
from distillkit.bench.timing import Step
from distillkit.core.views import Features

T, TASK, SOFT = 4.0, 0.5, 0.5  # temperature; weights of cross-entropy and of the divergence
LR = 1e-6  # the weights stay what they are, and SGD does its work
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """``step``: a whole training step. ``loss``: its forward half alone. ``student``, ``teacher``: what runs in it.
    ``whole``: what a compiler is given, and called with ``args``."""

    step: Step
    loss: Loss
    student: nn.Module
    teacher: nn.Module
    whole: nn.Module
    args: tuple[Any, ...] = field(default=())


@dataclass(frozen=True)
class Pair:
    """What all contenders share."""

    student: nn.Module
    teacher: nn.Module
    x: Tensor
    y: Tensor


Make = Callable[[Pair], Contender]


def twin(model: nn.Module) -> nn.Module:
    """Modules of their own around the same parameters and buffers."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=tensors)


def pair_of_resnets(batch: int, size: int, seed: int = 0) -> Pair:
    """ResNet-50 and ResNet-18 of timm, 100 classes, untrained."""
    import timm

    torch.manual_seed(seed)
    student, teacher = timm.create_model("resnet18", num_classes=100), timm.create_model("resnet50", num_classes=100)
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, 100, (batch,))
    return Pair(student.train(), teacher.eval().requires_grad_(False), x, y)


class Small(nn.Module):
    """So small that little but the toolkits' own work is left."""

    num_classes, in_chans = 10, 1

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "input_size": (1, 4, 4)}  # asked for by timm.task
        self.layer1, self.layer2, self.fc = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x).relu()).relu())


def pair_of_small(seed: int = 0) -> Pair:
    """A perceptron of three layers teaches another, 4 vectors a batch."""
    torch.manual_seed(seed)
    student, teacher = Small(), Small()
    x, y = torch.randn(4, 16), torch.randint(0, 10, (4,))
    return Pair(student.train(), teacher.eval().requires_grad_(False), x, y)


def stepping(loss: Loss, parameters: Sequence[nn.Parameter] | Iterator[nn.Parameter]) -> Step:
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- logits


def ideal(pair: Pair) -> Contender:
    """Student forward and backward, teacher forward, the two losses, SGD, and nothing else."""
    student, teacher = twin(pair.student), twin(pair.teacher)

    def loss() -> Tensor:
        with torch.no_grad():
            soft = (teacher(pair.x) / T).log_softmax(-1)
        logits = student(pair.x)
        divergence = kl_div((logits / T).log_softmax(-1), soft, reduction="batchmean", log_target=True)
        return TASK * cross_entropy(logits, pair.y) + SOFT * T**2 * divergence

    return Contender(stepping(loss, student.parameters()), loss, student, teacher, student, (pair.x,))


def alone(pair: Pair) -> Contender:
    """No teacher."""
    student = twin(pair.student)

    def loss() -> Tensor:
        return cross_entropy(student(pair.x), pair.y)

    return Contender(stepping(loss, student.parameters()), loss, student, student, student, (pair.x,))


def task_loss(logits: Tensor, y: Tensor) -> Tensor:
    return TASK * cross_entropy(logits, y)


def wrapped(
    pair: Pair, distillers: Sequence[distillkit.Distiller], teacher: nn.Module | distillkit.Teacher | None = None
) -> Contender:
    student = twin(pair.student)
    taught_by = twin(pair.teacher) if teacher is None else teacher
    model = distillkit.wrap(student, taught_by, list(distillers), criterion=task_loss).train()

    def loss() -> Tensor:
        return model(pair.x, pair.y).total

    of_teacher = taught_by.model if isinstance(taught_by, distillkit.Teacher) else taught_by
    return Contender(stepping(loss, model.parameters()), loss, student, of_teacher, model, (pair.x, pair.y))


def ours(pair: Pair) -> Contender:
    return wrapped(pair, [distillkit.LogitKD(temperature=T, weight=SOFT)])


def ours_cheap(pair: Pair) -> Contender:
    """The teacher in bfloat16, its BatchNorm folded into its convolutions."""
    teacher = distillkit.Teacher(copy.deepcopy(pair.teacher), dtype=torch.bfloat16, fold_bn=True)
    return wrapped(pair, [distillkit.LogitKD(temperature=T, weight=SOFT)], teacher)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the toolkits log and warn of while they are set up."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def torchdistill(pair: Pair) -> Contender:
    return _box(pair, {"kd": _torchdistill_kd()})


def modelopt(pair: Pair) -> Contender:
    with quietly():
        import modelopt.torch.distill as mtd

        criterion = mtd.LogitsDistillationLoss(temperature=T, reduction="batchmean")
        return _modelopt(pair, criterion, mtd.StaticLossBalancer(SOFT))


def timm_task(pair: Pair) -> Contender:
    from timm.task import LogitDistillationTask

    student, teacher = twin(pair.student), twin(pair.teacher)
    task = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), task_loss_weight=TASK, temperature=T, verbose=False
    )
    trained: Any = task.get_trainable_module()
    trained.train()

    def loss() -> Tensor:
        return task(pair.x, pair.y)["loss"]

    return Contender(stepping(loss, trained.parameters()), loss, student, teacher, task, (pair.x, pair.y))


# ---- four layers


LAYERS = ("layer1", "layer2", "layer3", "layer4")
OF_A_LAYER = SOFT / len(LAYERS)  # weights of all losses add up to 1, as modelopt wants it


def projections(pair: Pair, layers: Sequence[str] = LAYERS) -> nn.ModuleDict:
    """1 x 1 convolutions from the student's widths to the teacher's; the same weights for every contender."""
    torch.manual_seed(1)
    with torch.no_grad():
        widths = [[_width(model, layer, pair.x) for layer in layers] for model in (pair.student, pair.teacher)]
    return nn.ModuleDict({layer: nn.Conv2d(s, t, 1) for layer, s, t in zip(layers, *widths, strict=True)})


def _width(model: nn.Module, layer: str, x: Tensor) -> int:
    last = [m for m in model.get_submodule(layer).modules() if isinstance(m, nn.Conv2d)]
    return max(last[-1].out_channels, last[-2].out_channels)


class Imitate(distillkit.Distiller):
    """Mean squared difference of one map, the student's projected by a 1 x 1 convolution, or as it is without one."""

    reads = Features
    short_name = "imitate"

    def __init__(self, at: str, projection: nn.Module | None = None, **options: Any):
        super().__init__(**options)
        self.student_at = self.teacher_at = at
        self.projection = projection or nn.Identity()

    def forward(self, student: Features, teacher: Features, targets: object) -> Tensor:
        return mse_loss(self.projection(student.maps[0]), teacher.maps[0])


def ideal_layers(pair: Pair, layers: Sequence[str] = LAYERS, project: bool = True) -> Contender:
    """By hand: hooks that keep what the layers return until the loss is made."""
    student, teacher = twin(pair.student), twin(pair.teacher)
    projected = projections(pair, layers) if project else nn.ModuleDict({name: nn.Identity() for name in layers})
    kept: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for model, into in zip((student, teacher), kept, strict=True):
        for layer in layers:
            model.get_submodule(layer).register_forward_hook(
                lambda module, args, out, into=into, layer=layer: into.__setitem__(layer, out)
            )

    def loss() -> Tensor:
        with torch.no_grad():
            teacher(pair.x)
        total = TASK * cross_entropy(student(pair.x), pair.y)
        for layer in layers:
            total = total + OF_A_LAYER * mse_loss(projected[layer](kept[0].pop(layer)), kept[1].pop(layer))
        return total

    parameters = [*student.parameters(), *projected.parameters()]
    return Contender(stepping(loss, parameters), loss, student, teacher, student, (pair.x,))


def ours_layers(pair: Pair) -> Contender:
    projected = projections(pair)
    return wrapped(pair, [imitate(layer, projected[layer]) for layer in LAYERS])


def imitate(layer: str, projection: nn.Module | None = None) -> Imitate:
    return Imitate(layer, projection, name=f"imitate_{layer}", weight=OF_A_LAYER)


class _Projected(nn.modules.loss._Loss):
    """What modelopt takes as the loss of a layer."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return mse_loss(self.projection(student), teacher)


def modelopt_layers(pair: Pair) -> Contender:
    with quietly():
        import modelopt.torch.distill as mtd

        projected = projections(pair)
        losses = {(layer, layer): _Projected(projected[layer]) for layer in LAYERS}
        return _modelopt(pair, losses, mtd.StaticLossBalancer([OF_A_LAYER] * len(LAYERS)))


def torchdistill_layers(pair: Pair) -> Contender:
    with quietly():
        from torchdistill.losses import registry

        projected = projections(pair)
        pair.student.projected = projected  # its optimizer takes the student's parameters

        class BenchImitate(nn.Module):
            def __init__(self, layer: str, **options: Any):
                super().__init__()
                self.layer = layer

            def forward(self, student: Any, teacher: Any, *args: Any, **options: Any) -> Tensor:
                found = (outputs[self.layer]["output"] for outputs in (student, teacher))
                return mse_loss(projected[self.layer](next(found)), next(found))

        registry.register_mid_level_loss(BenchImitate)
    terms: dict[str, Any] = {
        layer: {"criterion": {"key": "BenchImitate", "kwargs": {"layer": layer}}, "weight": OF_A_LAYER}
        for layer in LAYERS
    }
    takes = {"input": {"is_from_teacher": False, "module_path": ".", "io": "output"}, "target": {"uses_label": True}}
    terms["task"] = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": takes},
        "weight": TASK,
    }
    try:
        return _box(pair, terms, LAYERS)
    finally:
        del pair.student.projected


# ---- how the peers are set up


def _torchdistill_kd() -> dict[str, Any]:
    at = {"module_path": ".", "module_io": "output"}
    options = {f"{side}_{key}": value for side in ("student", "teacher") for key, value in at.items()}
    return {"criterion": {"key": "KDLoss", "kwargs": {**options, "temperature": T, "alpha": TASK}}, "weight": 1.0}


class _Nothing(torch.utils.data.Dataset):
    """torchdistill wants a data set; the batch is given to it by hand."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1), 0


def _box(pair: Pair, terms: dict[str, Any], layers: Sequence[str] = ()) -> Contender:
    student, teacher = twin(pair.student), twin(pair.teacher)
    of_model: dict[str, Any] = {"forward_proc": "forward_batch_only", "sequential": [], "wrapper": None}
    if layers:
        of_model["forward_hook"] = {"input": [], "output": list(layers)}
    loader = {"dataset_id": "none", "sampler": {"class_or_func": torch.utils.data.SequentialSampler}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {**loader, "kwargs": {"batch_size": 2}},
        "teacher": {**of_model, "requires_grad": False},
        "student": {**of_model, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": LR, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    with quietly():
        from torchdistill.core.distillation import get_distillation_box

        box = get_distillation_box(teacher, student, {"none": _Nothing()}, config, torch.device("cpu"), None, False, 1)
    box.student_model.train()
    box.teacher_model.eval()  # torchdistill leaves its mode alone

    def loss() -> Tensor:
        return box.forward_process(pair.x, pair.y, None)

    def step() -> None:
        box.post_forward_process(loss=loss())

    return Contender(step, loss, box.student_model, box.teacher_model, box.student_model, (pair.x,))


def _modelopt(pair: Pair, criterion: Any, balancer: Any) -> Contender:
    import modelopt.torch.distill as mtd

    student, teacher = twin(pair.student), twin(pair.teacher)
    options = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer}
    model = mtd.convert(student, mode=[("kd_loss", options)])
    model.train()

    def loss() -> Tensor:
        return model.compute_kd_loss(student_loss=cross_entropy(model(pair.x), pair.y))

    parameters = [p for p in model.parameters() if p.requires_grad]
    return Contender(stepping(loss, parameters), loss, model, teacher, model, (pair.x,))


@dataclass(frozen=True)
class Entry:
    """A row of a table: distillkit's and the ideal's have no peer."""

    make: Make
    peer: Peer | None = None


LOGITS: dict[str, Entry] = {
    "ideal": Entry(ideal),
    "ideal again": Entry(ideal),
    "distillkit": Entry(ours),
    "torchdistill": Entry(torchdistill, TORCHDISTILL),
    "nvidia-modelopt": Entry(modelopt, MODELOPT),
    "timm.task": Entry(timm_task, TIMM),
}
FOUR_LAYERS: dict[str, Entry] = {
    "ideal": Entry(ideal_layers),
    "ideal again": Entry(ideal_layers),
    "distillkit": Entry(ours_layers),
    "torchdistill": Entry(torchdistill_layers, TORCHDISTILL),
    "nvidia-modelopt": Entry(modelopt_layers, MODELOPT),
}


def made(entries: dict[str, Entry], pair: Pair) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that are there, after a first step, by what a table calls them; and why the others are not.

    A peer that is installed and fails is named with its error; distillkit that fails is an error.
    """
    there: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for name, entry in entries.items():
        if entry.peer is None:
            there[name] = contender = entry.make(pair)
            contender.step()
            continue
        if entry.peer.absent:
            missing[name] = entry.peer.absent
            continue
        try:
            with quietly():
                contender = entry.make(pair)
                contender.step()
            there[entry.peer.label] = contender
        except Exception as error:  # whatever it is, it is what the table says of this peer
            missing[entry.peer.label] = f"fails: {type(error).__name__}: {error}"[:160]
    return there, missing
