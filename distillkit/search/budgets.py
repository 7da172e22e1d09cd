"""What a model costs: parameters, multiply-adds, measured latency. Each is the ``cost`` of a ``Budget`` once it knows
how a genome becomes a model: ``Budget("latency", Latency(build, (x,)), most=0.02)``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def parameters(model: nn.Module) -> int:
    """Numbers that are trained; those that several modules share count once."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Of the convolutions and linear layers that run on ``inputs``, for one sample of the batch.

    Products of activations with each other, as in attention, are not counted, nor norms.
    """
    total = 0

    def count(module: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        else:
            total += output.numel() * module.weight[0].numel()

    counted = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    hooks = [m.register_forward_hook(count) for m in counted]
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return total // len(inputs[0])


class Latency:
    """Seconds of a forward pass of ``build(genome)`` in eval mode: the median of ``repeats``, after ``warmup`` more.

    A search asks once for each genome and writes the number down, so a search that goes on measures nothing again.
    Nothing else should run on the device meanwhile.
    """

    def __init__(self, build: Callable[[Any], nn.Module], inputs: Sequence[Tensor], repeats: int = 10, warmup: int = 3):
        self.build, self.inputs, self.repeats, self.warmup = build, inputs, repeats, warmup

    @torch.inference_mode()
    def __call__(self, genome: Any) -> float:
        model = self.build(genome).eval().to(self.inputs[0].device)
        taken = [self._seconds(model) for _ in range(self.warmup + self.repeats)]
        return statistics.median(taken[self.warmup :])

    def _seconds(self, model: nn.Module) -> float:
        self._wait()
        began = time.perf_counter()
        model(*self.inputs)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.inputs[0].device.type != "cpu":
            torch.accelerator.synchronize(self.inputs[0].device)
