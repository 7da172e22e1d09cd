"""Optimizer, learning rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from distillkit.training.errors import RunError

if TYPE_CHECKING:
    from distillkit.schema import Optimizer as OptimizerConfig
    from distillkit.schema import Schedule as ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over every parameter of ``model`` that takes a gradient, in groups of one rate and decay.

    Without decay, if ``no_decay_norm``: parameters of fewer than two dimensions (norms, biases, scales), and those that
    the model's ``no_weight_decay()`` names. With the learning rate times ``backbone_lr``: parameters below a module
    called ``backbone``. With ``layer_decay``: times its power, by how many layers are behind the parameter's.

    Raises:
        RunError: nothing to train, a ``backbone_lr`` for a model without a backbone, or a ``layer_decay`` for one that
            does not tell its layers.
    """
    kept = {id(parameter) for parameter in _named_without_decay(model)}
    factors = _layer_factors(model, config.layer_decay) if config.layer_decay != 1.0 else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    backbones = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            backbone = config.backbone_lr != 1.0 and "backbone" in name.split(".")
            backbones += backbone
            plain = config.no_decay_norm and (parameter.ndim < 2 or id(parameter) in kept)
            factor = factors.get(id(parameter), 1.0) * (config.backbone_lr if backbone else 1.0)
            groups.setdefault((factor, plain), []).append(parameter)
    if not groups:
        raise RunError("the model has no parameter that takes a gradient: nothing to train")
    if config.backbone_lr != 1.0 and not backbones:
        raise RunError(
            f"train.optimizer.backbone_lr is {config.backbone_lr}, but no trained parameter lies below a module called "
            "'backbone'; remove backbone_lr"
        )
    settings = [
        {
            "params": parameters,
            "lr": config.lr * factor,
            "weight_decay": 0.0 if plain else config.weight_decay,
        }
        for (factor, plain), parameters in groups.items()
    ]
    if config.kind == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    kind = torch.optim.AdamW if config.bias_correction else UncorrectedAdamW
    return kind(settings, lr=config.lr, eps=config.eps)


class UncorrectedAdamW(torch.optim.AdamW):
    """AdamW without the correction of its averages for their start at 0, as BERT and ELECTRA are trained.

    The corrections, known at every step, are taken back out of learning rate, eps and decay while AdamW makes the step.
    """

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        own = [(group["lr"], group["eps"], group["weight_decay"]) for group in self.param_groups]
        for group in self.param_groups:
            done = next((float(self.state[p]["step"]) for p in group["params"] if p in self.state), 0.0)
            first, second = (1 - beta ** (done + 1) for beta in group["betas"])
            change = first / second**0.5
            group["lr"], group["eps"] = group["lr"] * change, group["eps"] / second**0.5
            group["weight_decay"] /= change
        try:
            return super().step(closure)
        finally:
            for group, (lr, eps, decay) in zip(self.param_groups, own, strict=True):
                group.update(lr=lr, eps=eps, weight_decay=decay)


def _named_without_decay(model: nn.Module) -> list[nn.Parameter]:
    """What timm's models say of themselves: position embeddings, class tokens."""
    found = []
    for module in model.modules():
        if callable(said := getattr(module, "no_weight_decay", None)):
            parameters = dict(module.named_parameters())
            found += [parameters[name] for name in said() if name in parameters]
    return found


def _layer_factors(model: nn.Module, decay: float) -> dict[int, float]:
    """What each parameter's learning rate is multiplied by, by ``id``."""
    student: Any = getattr(model, "student", model)
    if callable(depths := getattr(student, "layer_depths", None)):  # models of text
        layers = depths()
        return {id(p): decay ** (max(layers.values()) - layers[name]) for name, p in student.named_parameters()}
    if not callable(getattr(student, "group_matcher", None)):
        raise RunError(
            f"train.optimizer.layer_decay is {decay}, but {type(student).__name__} does not tell its layers "
            "(group_matcher, as timm's models do); remove layer_decay"
        )
    layers = group_parameters(student, student.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {id(parameter): decay ** (last - layers[name]) for name, parameter in student.named_parameters()}


def warmup_steps(total: int, config: ScheduleConfig) -> int:
    """Length of the warm-up of a run of ``total`` optimizer steps: as written, or a tenth of the run, at most 500.

    Raises:
        RunError: a warm-up that the run would not leave.
    """
    if config.warmup is None:
        return min(500, total // 10)
    if config.warmup >= total > 0:
        raise RunError(
            f"train.schedule.warmup is {config.warmup} steps, but the whole run has {total}: the learning rate would "
            "never be reached; shorten the warm-up (null: a tenth of the run) or train for more epochs"
        )
    return config.warmup


def learning_rate_factor(step: int, total: int, epochs: int, config: ScheduleConfig) -> float:
    """What the learning rates are multiplied by at optimizer step ``step`` (0 <= step < total), between 0 and 1.

    ``step``: times ``gamma`` from each milestone (an epoch) on. ``cosine``: half a cosine from 1 after the warm-up
    down to ``min_factor``, where the last ``cooldown`` epochs stay. ``poly``: ``(1 - t) ** power`` with t from 0 after
    the warm-up towards 1, as DeepLab and FANet are trained. Warm-up multiplies by a line from ``warmup_factor`` at step
    0 to 1 after ``warmup_steps``.

    Raises:
        RunError: a warm-up that the run would not leave, or a cooldown as long as what is left of it.
    """
    warmup = warmup_steps(total, config)
    factor = 1.0
    if config.kind == "step":
        factor = config.gamma ** sum(step >= milestone * total / epochs for milestone in config.milestones)
    elif config.kind == "cosine":
        falling = total - warmup - config.cooldown * total // epochs
        if falling <= 0:
            raise RunError(
                f"train.schedule.cooldown is {config.cooldown} of {epochs} epochs, for which the warm-up leaves no "
                "room: shorten one of the two"
            )
        t = min(max(step - warmup, 0) / falling, 1.0)
        factor = config.min_factor + (1 - config.min_factor) * 0.5 * (1 + math.cos(math.pi * t))
    elif config.kind == "poly":
        factor = (1 - max(step - warmup, 0) / (total - warmup)) ** config.power
    if step < warmup:
        factor *= config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    return factor


class MovingAverage:
    """Exponential moving average of a model's weights and buffers: ``average += (1 - d) * (weights - average)``.

    ``d = min(decay, (1 + n) / (10 + n))`` after n updates, so that a short run does not carry its random start along.
    Whole-number buffers (BatchNorm's counter) are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise RunError(f"train.ema must be in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Within the block ``model`` holds the average; afterwards its own weights again, bit for bit."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
