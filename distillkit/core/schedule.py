"""Weights of distillers over the steps of a run.

A schedule is computed on the device from the step counter, a tensor, so that it neither waits for the device nor makes
``torch.compile`` compile again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """A weight over the steps: ``value`` times a factor that depends on ``kind``.

    Args:
        value: the weight at full strength.
        kind: ``constant``; ``warmup``: from 0 to ``value`` over ``steps``, then constant; ``linear``: from ``value`` to
            ``end`` over ``steps``; ``cosine``: the same along half a cosine; ``until``: ``value`` before step
            ``steps``, then 0.
        steps: length in training steps; unused by ``constant``.
        end: the last value of ``linear`` and ``cosine``.
    """

    value: float
    kind: str = "constant"
    steps: int = 0
    end: float = 0.0

    KINDS = ("constant", "warmup", "linear", "cosine", "until")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"unknown weight schedule {self.kind!r}: one of {', '.join(self.KINDS)}")
        if self.kind != "constant" and self.steps < 1:
            raise ValueError(f"weight schedule {self.kind!r} needs steps >= 1, got {self.steps}")
        if not all(map(math.isfinite, (self.value, self.end))):
            raise ValueError(f"a weight must be a finite number, got {self.value}, {self.end}")

    def at(self, step: Tensor) -> Tensor | float:
        """The weight at ``step``, a 0-dim integer tensor that counts training steps from 0."""
        if self.kind == "constant":
            return self.value
        t = (step / self.steps).clamp(max=1.0)
        if self.kind == "warmup":
            return self.value * t
        if self.kind == "linear":
            return self.value + (self.end - self.value) * t
        if self.kind == "cosine":
            return self.end + (self.value - self.end) * 0.5 * (1 + torch.cos(math.pi * t))
        return self.value * (step < self.steps)

    def is_over(self, step: int) -> bool:
        """Whether the weight is 0 at ``step`` and at every later one."""
        if self.kind == "constant":
            return self.value == 0
        last = {"warmup": self.value, "linear": self.end, "cosine": self.end, "until": 0.0}[self.kind]
        return last == 0 and step >= self.steps

    def applied(self, loss: Tensor, step: Tensor) -> Tensor:
        """The loss times the weight at ``step``; exactly 0 where the weight is, also of a loss that is not finite."""
        weight = self.at(step)
        if isinstance(weight, Tensor):
            return torch.where(weight == 0, torch.zeros_like(loss), weight * loss)
        if weight == 1:
            return loss
        return weight * loss if weight else torch.zeros_like(loss)


def weight_of(weight: float | Weight) -> Weight:
    return weight if isinstance(weight, Weight) else Weight(float(weight))
