"""What the provocations need of a contender, the small models that they are made on, and how messages are heard."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Net(nn.Module):
    """A small classifier built as timm's are, so that all classifying contenders distil the same: ``stem`` with a
    BatchNorm, ``blocks.0``, ``blocks.1``, dropout, ``head``; and ``spare``, which never runs."""

    def __init__(self, seed: int = 0, width: int = 8, classes: int = CLASSES, dropout: float = 0.5):
        super().__init__()
        self.num_classes, self.in_chans, self.num_features = classes, 3, width
        self.pretrained_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 16, 16)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
            self.spare = nn.Linear(width, width)
            self.drop = nn.Dropout(dropout)
            self.head = nn.Linear(width, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).relu()
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def pictures(count: int, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


@dataclass
class Running:
    """A distillation that has been set up as the contender's documentation says.

    Args:
        student, teacher: the models in it.
        forward: one training-mode pass of a batch -> (total loss, distillation loss), both scalars.
        trained: what is given to the optimizer.
        train: what its documentation calls before training; each epoch, or once.
        loss_names: what its losses are called, for messages.
        saved: the tensors that its documentation saves in a checkpoint.
        unwrap: gives the student back; None: there is no way.
        plain: an untouched student of the same kind.
    """

    student: nn.Module
    teacher: nn.Module
    forward: Callable[..., tuple[Tensor, Tensor]]
    trained: nn.Module
    train: Callable[[], object]
    plain: Callable[[], nn.Module]
    loss_names: tuple[str, ...] = ("kd",)
    saved: Callable[[], dict[str, Any]] | None = None
    unwrap: Callable[[], nn.Module] | None = None
    predict: Callable[[nn.Module, Any], Any] = field(default=lambda model, x: model(x))


@dataclass(frozen=True)
class Kit:
    """``start``: sets up; ``batch``: n pictures as the call wants them; ``repeat``: one picture n times; ``last``: path
    of the student's last layer; ``distributed``: sets up on a rank, with a projection or without."""

    start: Callable[..., Running]
    batch: Callable[[int], tuple[Any, ...]]
    repeat: Callable[[int], tuple[Any, ...]]
    last: str
    distributed: Callable[[bool], Running]


def classifier_repeat(count: int) -> tuple[Tensor, Tensor]:
    x, y = pictures(1)
    return x.repeat(count, 1, 1, 1), y.repeat(count)


def classifiers(start: Callable[..., Running], distributed: Callable[[bool], Running]) -> Kit:
    return Kit(start, pictures, classifier_repeat, "head", distributed)


def raised(call: Callable[[], object]) -> Exception | None:
    """What a call raises."""
    try:
        call()
    except Exception as error:
        return error
    return None


@contextmanager
def listening() -> Iterator[list[str]]:
    """All that is logged (from INFO on) or warned inside."""
    heard: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    loggers = [
        logging.root,
        *(log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)),
    ]
    silent = [log for log in loggers if log is logging.root or not log.propagate]
    for log in silent:
        log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                yield heard
            finally:
                heard += [str(w.message) for w in warned]
    finally:
        logging.disable(disabled)
        for log in silent:
            log.removeHandler(handler)


def loss_of(kit: Kit, running: Running, batch: tuple[Any, ...]) -> float:
    running.train()
    return float(running.forward(*batch)[1].detach())


def kit_deterministic(kit: Kit) -> dict[str, Any]:
    """A student without dropout, where there is a choice."""
    return {"student": Net(dropout=0.0)} if kit.batch is pictures else {}
