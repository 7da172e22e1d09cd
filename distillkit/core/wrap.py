"""The wrapper: a student and its teachers, called exactly as the student is called.

One training step: the student runs, taps read; every teacher that is read runs (eval, no gradient, no further than its last
tap); the views go to the distillers; the result holds one weighted loss per name. In eval mode the call is the student's.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distillkit.core.adapter import Adapter
from distillkit.core.distiller import Distiller
from distillkit.core.errors import AdapterError, NonFiniteLossError, UnreachedStudentError, ViewError, WrapError
from distillkit.core.result import OUTPUT, Losses
from distillkit.core.taps import AllTapsFired, Place, Taps
from distillkit.core.teacher import EMATeacher, Renormalise, Teacher, update_average
from distillkit.core.views import View

log = logging.getLogger("distillkit")

CHECK_EVERY = 50  # steps between two looks at the device's flags of non-finite losses

_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()

Paths = tuple[str, ...] | None


@dataclass(frozen=True)
class Reading:
    """One view of one model: what kind, and where unless the adapter knows."""

    kind: type[View]
    at: Paths


class Side:
    """A model as it is read: its adapter, its taps, and the views that distillers want of it."""

    def __init__(self, role: str, model: nn.Module, adapter: Adapter, readings: Sequence[Reading]):
        self.role, self.model, self.adapter = role, model, adapter
        self.places: dict[Reading, tuple[Place, ...]] = {
            reading: adapter.places(model, reading.kind, reading.at) for reading in dict.fromkeys(readings)
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
    def prove(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the adapter compare what is tapped with what the model itself predicts; modes are left as found."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            output, views = self.run(*self.adapter.without_targets(args, kwargs), exit_early=False)
        finally:
            for module, mode in modes:
                module.training = mode
        proven = [
            self.adapter.proof(view, output, args, kwargs)
            for reading, view in views.items()
            if self.adapter.needs_proof(reading.kind)
        ]
        self.unproven = not all(proven)


class DistilledModel(nn.Module):
    """A student with its distillers; made by ``distillkit.wrap``, which says what the arguments are.

    The unit for an optimizer, DDP, FSDP2 and ``torch.compile``: parameters are the student's and the distillers' own.
    """

    step: Tensor

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, Teacher | EMATeacher],
        distillers: Sequence[Distiller],
        criterion: Callable[[Any, Any], Any] | None,
        adapter: Adapter,
    ):
        super().__init__()
        _refuse(student)
        named = _by_name(distillers)
        _check_teachers(named, teachers)
        averages = {
            name: copy.deepcopy(student).requires_grad_(False).eval()
            for name, t in teachers.items()
            if isinstance(t, EMATeacher)
        }
        self.student = student
        self.distillers = nn.ModuleDict({name.replace(".", "_"): d for name, d in named.items()})
        self.criterion = criterion
        self.averages = nn.ModuleDict(averages)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._named = list(named.items())
        self._adapter = adapter
        self._decays = {name: t.decay for name, t in teachers.items() if isinstance(t, EMATeacher)}
        # frozen teachers stand outside the module tree: parameters, state_dict, DDP and checkpoints never see them
        self._frozen = {name: t for name, t in teachers.items() if isinstance(t, Teacher)}
        self._renormalise = {
            name: change
            for name, t in self._frozen.items()
            if (change := _renormalisation(adapter, student, name, t)) is not None
        }
        only = next(iter(teachers), "")
        self._uses: dict[str, str] = {name: d.teacher or only for name, d in self._named}
        self._student_side = Side(
            "student", student, adapter, [r for _, d in self._named for r in _readings(d, "student")]
        )
        try:
            self._teacher_sides = self._make_teacher_sides(adapter)
        except BaseException:
            self._student_side.taps.remove()
            raise
        for name, distiller in self._named:
            _prepare(distiller, self._student_side, self._teacher_sides[self._uses[name]])
        self._calls = 0
        self._checked = False
        self._unwrapped = False
        self._loss_names: tuple[str, ...] = ()
        self._first_bad: list[Tensor] = []  # one tensor, in a list to stand outside the module tree
        _wrapped.add(student)

    def _make_teacher_sides(self, adapter: Adapter) -> dict[str, Side]:
        sides: dict[str, Side] = {}
        try:
            for teacher, model, its_adapter in self._teacher_models(adapter):
                readings = [
                    r for name, d in self._named if self._uses[name] == teacher for r in _readings(d, "teacher")
                ]
                if not readings:
                    raise WrapError(
                        f"no distiller uses the teacher {teacher!r}: name it, as in LD(teacher={teacher!r}), or leave it out"
                    )
                sides[teacher] = Side(teacher, model, its_adapter, readings)
        except BaseException:
            for side in sides.values():
                side.taps.remove()
            raise
        return sides

    def _teacher_models(self, adapter: Adapter) -> list[tuple[str, nn.Module, Adapter]]:
        frozen = [(name, t.model, t.adapter or adapter) for name, t in self._frozen.items()]
        return frozen + [(name, model, adapter) for name, model in self.averages.items()]

    # ---- the call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In train mode the losses (``Losses``); in eval mode whatever the student returns."""
        if not self.training:
            return self.student(*args, **kwargs)
        if self._unwrapped:
            raise WrapError("this wrapper was unwrapped: wrap the student again to distil further")
        eager = not torch.compiler.is_compiling()
        for teacher in self._frozen.values():
            teacher.check_mode()
        self._update_averages()
        args, kwargs, targets = self._split_targets(args, kwargs)
        if eager:
            self._prove_sides(args, kwargs)
        output, views = self._student_side.run(args, kwargs, exit_early=False)
        losses = self._task_losses(output, targets)
        targets = self._adapter.targets(args, kwargs, targets)
        taught = {name: self._run_teacher(name, side, args, kwargs) for name, side in self._teacher_sides.items()}
        losses.update(self._distill(views, taught, targets, _device_of(views)))
        if not losses:
            raise WrapError(
                "there is no loss: the student computes none by itself; pass criterion= or distillers= to wrap()"
            )
        self._flag(losses)
        # a new tensor, not an update in place: compiled backward passes recompute weights from the tensor they were given
        self.step = self.step + 1
        if eager:
            self._calls += 1
            if self._calls % CHECK_EVERY == 0:
                self.check_finite()
        return Losses({**losses, OUTPUT: output})

    def _split_targets(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """With a criterion the student takes no targets: they are the last argument of the call."""
        if self.criterion is None:
            return args, kwargs, None
        if "targets" in kwargs:
            return args, {k: v for k, v in kwargs.items() if k != "targets"}, kwargs["targets"]
        if len(args) < 2:
            raise TypeError(
                "a wrapped model with a criterion is called with the student's arguments and then the targets: model(x, targets)"
            )
        return args[:-1], kwargs, args[-1]

    def _task_losses(self, output: Any, targets: Any) -> dict[str, Tensor]:
        if self.criterion is None:
            return self._adapter.losses(output)
        loss = self.criterion(output, targets)
        return dict(loss) if isinstance(loss, Mapping) else {"task": loss}

    def _run_teacher(self, name: str, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Reading, View]:
        args, kwargs = side.adapter.without_targets(*self._fed(name, args, kwargs))
        teacher = self._frozen.get(name)
        own_precision = teacher is not None and teacher.dtype is not None
        no_autocast = torch.autocast(self.step.device.type, enabled=False) if own_precision else nullcontext()
        with torch.no_grad(), no_autocast:
            return side.run(args, kwargs, exit_early=side.exits_early)[1]

    def _fed(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], cast: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The student's call as a teacher gets it: re-normalised, cropped, in its dtype, as it asks for."""
        teacher = self._frozen.get(name)
        if teacher is None:
            return args, kwargs
        if name in self._renormalise:
            args = (self._renormalise[name](args[0]), *args[1:])
        if teacher.feed is not None:
            args, kwargs = teacher.feed(args, kwargs)
        return (teacher.cast(args), teacher.cast(kwargs)) if cast else (args, kwargs)

    def _distill(
        self, views: dict[Reading, View], taught: dict[str, dict[Reading, View]], targets: Any, device: torch.device
    ) -> dict[str, Tensor]:
        losses = {}
        with torch.autocast(device.type, enabled=False):  # temperatures and small differences need float32
            for name, distiller in self._named:
                student = [views[r] for r in _readings(distiller, "student")]
                teacher_views = taught[self._uses[name]]
                teacher = [
                    self._matched(name, teacher_views[r], s)
                    for r, s in zip(_readings(distiller, "teacher"), student, strict=True)
                ]
                if isinstance(distiller.reads, tuple):
                    loss = distiller(tuple(student), tuple(teacher), targets)
                else:
                    loss = distiller(student[0], teacher[0], targets)
                if not self._checked and not torch.compiler.is_compiling():
                    _check_reaches(name, loss, distiller)
                losses[name] = distiller.weight.at(self.step) * loss
        self._checked = True
        return losses

    def _matched(self, name: str, teacher: View, student: View) -> View:
        if not self._checked and not torch.compiler.is_compiling():
            for note in teacher.unmatched(student):
                log.info("%s: the teacher's %s", name, note)
        try:
            return teacher.match(student)
        except ValueError as error:
            raise ViewError(f"distiller {name!r}: {error}") from None

    @torch.no_grad()
    def _update_averages(self) -> None:
        for name, average in self.averages.items():
            update_average(average, self.student, self._decays[name])

    # ---- checks

    def _prove_sides(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first steps (1, 2, 4, 8, ...) until every model has predicted something its adapter could be held against."""
        sides = [self._student_side, *self._teacher_sides.values()]
        if not self._calls:
            for name, teacher in self._frozen.items():
                teacher.prove_folding(
                    *self._teacher_sides[name].adapter.without_targets(*self._fed(name, args, kwargs, cast=False))
                )
        call = self._calls + 1
        if call & (call - 1) or not any(side.unproven for side in sides):
            return
        for side in sides:
            if side.unproven:
                try:
                    side.prove(*self._fed(side.role, args, kwargs))
                except AdapterError as error:
                    raise AdapterError(f"{side.role}: {error}") from None

    def _flag(self, losses: dict[str, Tensor]) -> None:
        """Remember on the device at which step each loss was first not finite."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        if not self._first_bad or self._loss_names != tuple(losses):
            self._loss_names = tuple(losses)
            self._first_bad = [torch.full((len(losses),), -1, dtype=torch.int64, device=values.device)]
        first = self._first_bad[0]
        self._first_bad = [torch.where((first < 0) & ~values.isfinite(), self.step, first)]

    def check_finite(self) -> None:
        """Read the device's flags (one host sync). Called by itself every 50 eager steps; a compiled loop calls it where it
        synchronises anyway.

        Raises:
            NonFiniteLossError: names every loss that was infinite or NaN since the last look, and the step it began at.
        """
        if not self._first_bad:
            return
        first = self._first_bad[0].tolist()
        self._first_bad = []
        bad = [f"{name!r} since step {step}" for name, step in zip(self._loss_names, first, strict=True) if step >= 0]
        if bad:
            raise NonFiniteLossError(
                f"not finite: {', '.join(bad)} (steps count from 0). Lower the learning rate or clip gradients; "
                "under fp16 use bf16 or a loss scaler"
            )

    # ---- the module around it

    def train(self, mode: bool = True) -> DistilledModel:
        super().train(mode)
        self.averages.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistilledModel:
        """Device moves reach the frozen teachers, changes of dtype do not."""
        super()._apply(fn, recurse)
        for teacher in self._frozen.values():
            teacher.model.to(self.step.device)
        return self

    def unwrap(self) -> nn.Module:
        """The student itself, the same object in the mode it is in, with no hook left. The wrapper trains no more."""
        for side in (self._student_side, *self._teacher_sides.values()):
            side.taps.remove()
        _wrapped.discard(self.student)
        self._unwrapped = True
        return self.student

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("a wrapped model cannot be copied: copy its student (model.student), or wrap the copies")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a wrapped model cannot be pickled: save model.state_dict(), or the student (model.student)")


def _refuse(student: nn.Module) -> None:
    if student in _wrapped:
        raise WrapError(
            "this student is wrapped already: call unwrap() on the first wrapper, or give both distillers to one wrap()"
        )
    if isinstance(student, nn.parallel.DistributedDataParallel):
        raise WrapError(
            "the student is a DistributedDataParallel: wrap the bare model, then make the wrapped model distributed"
        )
    for name, module in student.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise WrapError(
                f"the student is compiled ({name or 'itself'}): hooks set after compilation are ignored without a word. "
                "Wrap first, then compile the wrapped model"
            )


def _by_name(distillers: Sequence[Distiller]) -> dict[str, Distiller]:
    named: dict[str, Distiller] = {}
    for distiller in distillers:
        if distiller.name in named or distiller.name == OUTPUT:
            raise WrapError(
                f"two losses would be called {distiller.name!r}: give one another name, as in name='second'"
            )
        named[distiller.name] = distiller
    return named


def _check_teachers(named: dict[str, Distiller], teachers: Mapping[str, object]) -> None:
    for name, distiller in named.items():
        if distiller.teacher is None and len(teachers) != 1:
            raise WrapError(
                f"distiller {name!r} does not say which teacher it learns from: one of {', '.join(teachers) or 'none given'}"
            )
        if distiller.teacher is not None and distiller.teacher not in teachers:
            raise WrapError(
                f"distiller {name!r} wants the teacher {distiller.teacher!r}; there are: {', '.join(teachers) or 'none'}"
            )


def _paths(at: str | Sequence[str] | None) -> Paths:
    return at if at is None else (at,) if isinstance(at, str) else tuple(at)


def _readings(distiller: Distiller, role: str) -> list[Reading]:
    at = _paths(distiller.student_at if role == "student" else distiller.teacher_at)
    kinds = distiller.reads if isinstance(distiller.reads, tuple) else (distiller.reads,)
    # a path says where the first view is; what else a distiller reads is where the adapter knows
    return [Reading(kind, at if i == 0 else None) for i, kind in enumerate(kinds)]


def _prepare(distiller: Distiller, student: Side, teacher: Side) -> None:
    def widths(side: Side, role: str) -> list[int] | None:
        first = _readings(distiller, role)[0]
        return side.adapter.widths(side.model, first.kind, first.at)

    distiller.prepare(widths(student, "student"), widths(teacher, "teacher"))


def _renormalisation(adapter: Adapter, student: nn.Module, name: str, teacher: Teacher) -> Renormalise | None:
    wanted = teacher.norm or (teacher.adapter or adapter).normalisation(teacher.model)
    given = adapter.normalisation(student)
    if teacher.norm and not given:
        raise WrapError(
            f"teacher {name!r} was given mean and std, but what the student's input is normalised with is not known: "
            "pass adapter=Adapter(mean=..., std=...)"
        )
    if not wanted or not given or wanted == given:
        return None
    log.info("teacher %r: input re-normalised from mean %s std %s to mean %s std %s", name, *given, *wanted)
    return Renormalise(given, wanted)


def _device_of(views: dict[Reading, View]) -> torch.device:
    return next((t.device for view in views.values() for t in view.tensors()), torch.device("cpu"))


def _check_reaches(name: str, loss: Any, distiller: Distiller) -> None:
    """Once: a loss whose graph ends at no parameter but the distiller's own would train nothing, without a word."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise UnreachedStudentError(
            f"distiller {name!r} must return a scalar tensor, got {getattr(loss, 'shape', type(loss).__name__)}"
        )
    own = {id(p) for p in distiller.parameters()}
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return
        todo += [following for following, _ in node.next_functions]
    raise UnreachedStudentError(
        f"the loss of distiller {name!r} reaches no parameter of the student: it would train nothing. The student's tapped layer is "
        "frozen, detached, computed under no_grad, or inside a reentrant activation checkpoint (use use_reentrant=False)"
    )
