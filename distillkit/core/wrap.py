"""The wrapper: a student and its teachers, called exactly as the student is called.

One training step: the student runs, taps read; every teacher that is read runs (eval, no gradient, no further than its
last tap); the views go to the distillers; the result holds one weighted loss per name. In eval mode the call is the
student's.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distillkit.core.adapter import Adapter, input_name, said_by
from distillkit.core.distiller import Distiller
from distillkit.core.errors import (
    AdapterError,
    NonFiniteLossError,
    StudentModeError,
    UnreachedStudentError,
    ViewError,
    WrapError,
)
from distillkit.core.result import OUTPUT, Losses
from distillkit.core.taps import AllTapsFired, Place, Taps
from distillkit.core.teacher import EMATeacher, Renormalise, Teacher, update_average
from distillkit.core.views import View
from distillkit.losses.reduce import mean_over_ranks

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
    def prove(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Let the adapter compare what is tapped with what the model itself predicts; modes are left as found.

        False: it predicted nothing to compare with. Raises AdapterError, naming the model, where the two disagree.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            output, views = self.run(*self.adapter.without_targets(args, kwargs), exit_early=False)
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
        default_teacher: str | None,
    ):
        super().__init__()
        _refuse(student, teachers)
        _check_distinct("losses", [OUTPUT, *(d.name for d in distillers)])
        _check_distinct("teachers", teachers)
        self._named = [(d.name, d) for d in distillers]
        self._uses = _teachers_by_distiller(distillers, teachers, default_teacher)
        self._adapter = adapter
        self._decays = {name: t.decay for name, t in teachers.items() if isinstance(t, EMATeacher)}
        # frozen teachers stand outside the module tree: parameters, state_dict, DDP and checkpoints never see them
        self._frozen = {name: t for name, t in teachers.items() if isinstance(t, Teacher)}
        self._renormalise = {
            name: change
            for name, t in self._frozen.items()
            if (change := _renormalisation(adapter, student, name, t)) is not None
        }
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self.student = student
        self.distillers = nn.ModuleDict({_key(name): d for name, d in self._named})
        self.criterion = criterion
        self.averages = nn.ModuleDict(
            {_key(name): copy.deepcopy(student).requires_grad_(False).eval() for name in self._decays}
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self._tap()
        self.distillers.to(device)  # their projections exist from here on
        self._calls = 0
        self._checked = False
        self._unwrapped = False
        self._loss_names: tuple[str, ...] = ()
        self._first_bad: list[Tensor] = []  # one tensor, in a list to stand outside the module tree
        _wrapped.add(student)

    def _tap(self) -> None:
        """Put the taps on all models and let the distillers prepare for what they read; a failure leaves no tap."""
        with ExitStack() as undo:
            readings = [r for _, d in self._named for r in _readings(d, "student")]
            self._student_side = Side("student", self.student, self._adapter, readings)
            undo.callback(self._student_side.taps.remove)
            self._teacher_sides: dict[str, Side] = {}
            for name, model, its_adapter in self._teacher_models():
                readings = [r for n, d in self._named if self._uses[n] == name for r in _readings(d, "teacher")]
                self._teacher_sides[name] = side = Side(name, model, its_adapter, readings)
                undo.callback(side.taps.remove)
            for name, distiller in self._named:
                _prepare(distiller, self._student_side, self._teacher_sides[self._uses[name]])
            undo.pop_all()

    def _teacher_models(self) -> list[tuple[str, nn.Module, Adapter]]:
        frozen = [(name, t.model, t.adapter or self._adapter) for name, t in self._frozen.items()]
        return frozen + [(name, self.averages[_key(name)], self._adapter) for name in self._decays]

    # ---- the call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In train mode the losses (``Losses``); in eval mode whatever the student returns."""
        if not self.training:
            return self.student(*args, **kwargs)
        if self._unwrapped:
            raise WrapError("this wrapper was unwrapped: wrap the student again to distil further")
        eager = not torch.compiler.is_compiling()
        self._check_modes()
        self._update_averages()
        args, kwargs, targets = self._split_targets(args, kwargs)
        if eager:
            self._prove_sides(args, kwargs)
        output, views = self._student_side.run(args, kwargs, exit_early=False)
        losses = self._task_losses(output, targets)
        targets = self._adapter.targets(args, kwargs, targets)
        taught = {name: self._run_teacher(name, side, args, kwargs) for name, side in self._teacher_sides.items()}
        losses.update(self._distill(views, taught, targets, check=eager and not self._checked))
        if not losses:
            raise WrapError(
                "there is no loss: the student computes none by itself; pass criterion= or distillers= to wrap()"
            )
        self._flag(losses)
        # a new tensor, not an update in place: compiled backward passes recompute weights from the tensor they got
        self.step = self.step + 1
        if eager:
            self._checked = True
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
                "a wrapped model with a criterion is called with the student's arguments and then the targets: "
                "model(x, targets)"
            )
        return args[:-1], kwargs, args[-1]

    def _task_losses(self, output: Any, targets: Any) -> dict[str, Tensor]:
        if self.criterion is None:
            losses = self._adapter.losses(output)
        else:
            loss = self.criterion(output, targets)
            losses = dict(loss) if isinstance(loss, Mapping) else {"task": loss}
        taken = losses.keys() & {OUTPUT, *self._uses}
        if taken:
            raise WrapError(
                f"a task loss is called {min(taken)!r}, which is taken: rename it, or the distiller of that name"
            )
        return losses

    def _run_teacher(self, name: str, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Reading, View]:
        args, kwargs = side.adapter.without_targets(*self._fed(name, args, kwargs))
        with torch.no_grad(), self._precision(name):
            return side.run(args, kwargs, exit_early=side.exits_early)[1]

    def _precision(self, name: str) -> AbstractContextManager[Any]:
        """A teacher that has its own dtype runs outside of the loop's autocast."""
        teacher = self._frozen.get(name)
        if teacher is None or teacher.dtype is None:
            return nullcontext()
        return torch.autocast(self.step.device.type, enabled=False)

    def _fed(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], cast: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The student's call as a teacher gets it: re-normalised, cropped, in its dtype, as it asks for."""
        teacher = self._frozen.get(name)
        if teacher is None:
            return args, kwargs
        change = self._renormalise.get(name)
        if change is not None and args:
            args = (change(args[0]), *args[1:])
        elif change is not None:
            key = input_name(kwargs)
            kwargs = {**kwargs, key: change(kwargs[key])}
        if teacher.feed is not None:
            args, kwargs = teacher.feed(args, kwargs)
        return (teacher.cast(args), teacher.cast(kwargs)) if cast else (args, kwargs)

    def _distill(
        self, views: dict[Reading, View], taught: dict[str, dict[Reading, View]], targets: Any, check: bool
    ) -> dict[str, Tensor]:
        losses = {}
        with torch.autocast(self.step.device.type, enabled=False):  # small differences need float32
            for name, distiller in self._named:
                student = [views[r] for r in _readings(distiller, "student")]
                teacher = [taught[self._uses[name]][r] for r in _readings(distiller, "teacher")]
                if check:
                    _tell_unmatched(name, student, teacher)
                try:
                    teacher = [t.match(s) for t, s in zip(teacher, student, strict=True)]
                    if isinstance(distiller.reads, tuple):
                        loss = distiller(tuple(student), tuple(teacher), targets)
                    else:
                        loss = distiller(student[0], teacher[0], targets)
                except ValueError as error:
                    raise ViewError(f"distiller {name!r}: {error}") from error
                if check:
                    _check_reaches(name, loss, distiller)
                losses[name] = distiller.weight.at(self.step) * loss
        return losses

    @torch.no_grad()
    def _update_averages(self) -> None:
        for name, decay in self._decays.items():
            update_average(self.averages[_key(name)], self.student, decay)

    # ---- checks

    def _check_modes(self) -> None:
        if not self.student.training:
            raise StudentModeError(
                "the wrapped model is in train mode, its student in eval mode, where a detector returns no losses and "
                "dropout is off: call model.train(). Frozen layers inside the student may stay in eval mode"
            )
        for teacher in self._frozen.values():
            teacher.check_mode()

    def _prove_sides(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At calls 1, 2, 4, 8, ..., until every model has predicted something its adapter could be held against."""
        if not self._calls:
            for name, teacher in self._frozen.items():
                fed = self._fed(name, args, kwargs, cast=False)
                teacher.prove_folding(*self._teacher_sides[name].adapter.without_targets(*fed))
        call = self._calls + 1
        if call & (call - 1):
            return
        if self._student_side.unproven:
            self._prove(self._student_side, args, kwargs)
        for name, side in self._teacher_sides.items():
            if side.unproven:
                with self._precision(name):
                    self._prove(side, *self._fed(name, args, kwargs))

    def _prove(self, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        failed = self.step.new_full((), float(not side.prove(args, kwargs)), dtype=torch.float32)
        # a sharded model waits for the other ranks when it runs: all look again, or none
        side.unproven = bool(mean_over_ranks(failed))

    def _flag(self, losses: dict[str, Tensor]) -> None:
        """Remember on the device at which step each loss was first not finite."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        if self._loss_names != tuple(losses):
            self.check_finite()  # the flags of the losses until now
            self._loss_names = tuple(losses)
        if not self._first_bad:
            self._first_bad = [torch.full((len(losses),), -1, dtype=torch.int64, device=values.device)]
        first = self._first_bad[0]
        self._first_bad = [torch.where((first < 0) & ~values.isfinite(), self.step, first)]

    def check_finite(self) -> None:
        """Read the device's flags (one host sync).

        Called by itself every 50 eager steps; a compiled loop calls it where it synchronises anyway.

        Raises:
            NonFiniteLossError: names each loss that was infinite or NaN since the last look, and the step it began at.
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
            teacher.to(self.step.device)
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


def _refuse(student: nn.Module, teachers: Mapping[str, Teacher | EMATeacher]) -> None:
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
                f"the student is compiled ({name or 'itself'}): hooks set after compilation are ignored without a "
                "word. Wrap first, then compile the wrapped model"
            )
    for name, teacher in teachers.items():
        if isinstance(teacher, Teacher) and teacher.model is student:
            raise WrapError(
                f"teacher {name!r} is the student itself: give a copy of it (copy.deepcopy), or EMATeacher() for its "
                "running average"
            )


def _key(name: str) -> str:
    """A name as a key of a ModuleDict, which takes no dots."""
    return name.replace(".", "_")


def _check_distinct(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if _key(name) in seen:
            raise WrapError(f"two {what} would be called {name!r}: give one another name, as in name='second'")
        seen.add(_key(name))


def _teachers_by_distiller(
    distillers: Sequence[Distiller], teachers: Mapping[str, object], default: str | None
) -> dict[str, str]:
    """Which teacher each distiller learns from: names of both."""
    there = ", ".join(teachers) or "none"
    uses = {}
    for distiller in distillers:
        teacher = distiller.teacher or default
        if teacher is None:
            raise WrapError(
                f"distiller {distiller.name!r} does not say which teacher it learns from (teacher=); there are: {there}"
            )
        if teacher not in teachers:
            raise WrapError(f"distiller {distiller.name!r} wants the teacher {teacher!r}; there are: {there}")
        uses[distiller.name] = teacher
    for name in teachers:
        if name not in uses.values():
            raise WrapError(
                f"no distiller uses the teacher {name!r}: name it, as in LD(teacher={name!r}), or leave it out"
            )
    return uses


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

    try:
        distiller.prepare(widths(student, "student"), widths(teacher, "teacher"))
    except ValueError as error:
        raise ViewError(f"distiller {distiller.name!r}: {error}") from error


def _renormalisation(adapter: Adapter, student: nn.Module, name: str, teacher: Teacher) -> Renormalise | None:
    given = adapter.normalisation(student)
    theirs = teacher.adapter or adapter
    # an adapter that is the student's too speaks of the student's input: what the teacher's model says goes first
    wanted = teacher.norm or (said_by(teacher.model) if theirs is adapter else None)
    wanted = wanted or theirs.normalisation(teacher.model)
    if teacher.norm and not given:
        raise WrapError(
            f"teacher {name!r} was given mean and std, but what the student's input is normalised with is not known: "
            "pass adapter=Adapter(mean=..., std=...)"
        )
    if not wanted or not given or wanted == given:
        return None
    log.info("teacher %r: input re-normalised from mean %s std %s to mean %s std %s", name, *given, *wanted)
    return Renormalise(given, wanted)


def _tell_unmatched(name: str, student: Sequence[View], teacher: Sequence[View]) -> None:
    for s, t in zip(student, teacher, strict=True):
        for note in t.unmatched(s):
            log.info("%s: the teacher's %s", name, note)


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
        f"the loss of distiller {name!r} reaches no parameter of the student: it would train nothing. The student's "
        "tapped layer is frozen, detached, computed under no_grad, or inside a reentrant activation checkpoint (use "
        "use_reentrant=False)"
    )
