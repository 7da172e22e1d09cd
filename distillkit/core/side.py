"""One model of a pair as it is read: which views, tapped where, and the proof that the taps are the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distillkit.core.adapter import Adapter
from distillkit.core.distiller import Distiller
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.taps import AllTapsFired, Place, Taps
from distillkit.core.views import View

Paths = tuple[str, ...] | None


@dataclass(frozen=True)
class Reading:
    """One view of one model: what kind, and where unless the adapter knows."""

    kind: type[View]
    at: Paths


class Side:
    """A model as it is read: its adapter, its taps, and the views that distillers want of it.

    role: what it is called in messages. teacher: it is read as one (``Adapter.teacher_places``).
    """

    def __init__(
        self, role: str, model: nn.Module, adapter: Adapter, readings: Sequence[Reading], teacher: bool = False
    ):
        self.role, self.model, self.adapter = role, model, adapter
        adapter.check(model)
        places = adapter.teacher_places if teacher else adapter.places
        self.places: dict[Reading, tuple[Place, ...]] = {
            reading: places(model, reading.kind, reading.at) for reading in dict.fromkeys(readings)
        }
        self.taps = Taps(model, [place for places in self.places.values() for place in places], role)
        self.exits_early = bool(self.places) and all(self.places.values())
        self.unproven = any(adapter.needs_proof(reading.kind) for reading in self.places)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], exit_early: bool) -> tuple[Any, dict[Reading, View]]:
        """Call the model with its taps on: its output (None after an early exit) and its views."""
        taps, output = self.taps, None
        taps.start(exit_early)
        try:
            output = self.model(*args, **kwargs)
        except AllTapsFired:
            pass
        finally:
            caught = taps.stop()
        return output, self.views(output, caught)

    def views(self, output: Any, caught: dict[str, list[Any]]) -> dict[Reading, View]:
        views = {}
        for reading, places in self.places.items():
            tensors = [tensor for place in places for tensor in self.taps.read(caught, place)]
            views[reading] = self.adapter.view(self.model, reading.kind, tensors, output)
        return views

    @torch.no_grad()
    def prove(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Let the adapter compare what is tapped with what the model itself predicts; modes are left as found.

        Args:
            args, kwargs: the model's call in eval mode, without targets.

        False: it predicted nothing to compare with. Raises AdapterError, naming the model, where the two disagree.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with _own_precision(self.model):
                output, views = self.run(args, kwargs, exit_early=False)
            proven = [
                self.adapter.proof(view, output, args, kwargs)
                for reading, view in views.items()
                if self.adapter.needs_proof(reading.kind)
            ]
        except AdapterError as error:
            raise AdapterError(f"{self.role}: {error}") from None
        finally:
            for module, mode in modes:
                module.training = mode
        return all(proven)


def readings(distiller: Distiller, role: str) -> list[Reading]:
    """What a distiller reads of the ``student`` or the ``teacher``."""
    at = _paths(distiller.student_at if role == "student" else distiller.teacher_at)
    kinds = distiller.reads if isinstance(distiller.reads, tuple) else (distiller.reads,)
    # a path says where the first view is; what else a distiller reads is where the adapter knows
    return [Reading(kind, at if i == 0 else None) for i, kind in enumerate(kinds)]


def prepare(distiller: Distiller, student: Side, teacher: Side | None) -> None:
    """Tell a distiller how wide what it reads is."""

    def widths(side: Side | None, role: str) -> list[int] | None:
        first = readings(distiller, role)[0]
        return side.adapter.widths(side.model, first.kind, first.at) if side else None

    try:
        distiller.prepare(widths(student, "student"), widths(teacher, "teacher"))
    except ValueError as error:
        raise ViewError(f"distiller {distiller.name!r}: {error}") from error


def _own_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """A model in float32 runs outside of the loop's autocast, whose rounding would hide what a proof looks for."""
    weights = list(model.parameters())
    if not weights or any(w.dtype in (torch.float16, torch.bfloat16) for w in weights):
        return nullcontext()
    return torch.autocast(weights[0].device.type, enabled=False)


def _paths(at: str | Sequence[str] | None) -> Paths:
    return at if at is None else (at,) if isinstance(at, str) else tuple(at)
