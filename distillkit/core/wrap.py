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
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distillkit.core.adapter import Adapter
from distillkit.core.alignment import Names, alignments
from distillkit.core.checks import (
    check_alone,
    check_distinct,
    check_lasts,
    check_reaches,
    key_of,
    no_task_loss,
    refuse,
    refuse_sharded_averages,
    scalar_loss,
    teachers_by_distiller,
    tensors_in,
)
from distillkit.core.distiller import Distiller
from distillkit.core.errors import NonFiniteLossError, StudentModeError, ViewError, WrapError
from distillkit.core.finite import FirstBad
from distillkit.core.result import OUTPUT, Losses
from distillkit.core.side import Reading, Side, prepare, readings
from distillkit.core.taps import Changes, Taps
from distillkit.core.teacher import EMATeacher, OnlineTeacher, Teacher, renormalisation, update_average
from distillkit.core.views import View
from distillkit.losses.reduce import mean_over_ranks

log = logging.getLogger("distillkit")

CHECK_EVERY = 50  # steps between two looks at the device's flags of non-finite losses

# which wrapper each student has; both are free to go
_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistilledModel]] = weakref.WeakKeyDictionary()


class DistilledModel(nn.Module):
    """A student with its distillers; made by ``distillkit.wrap``, which says what the arguments are.

    The unit for an optimizer, DDP, FSDP2 and ``torch.compile``: parameters are the student's and the distillers' own.
    """

    step: Tensor

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, Teacher | EMATeacher | OnlineTeacher],
        distillers: Sequence[Distiller],
        criterion: Callable[[Any, Any], Any] | None,
        adapter: Adapter,
        default_teacher: str | None,
        classes: Names | None = None,
    ):
        super().__init__()
        _claim(student)
        refuse(student, teachers)
        online = [name for name, t in teachers.items() if isinstance(t, OnlineTeacher)]
        check_distinct("losses", [OUTPUT, *online, *(d.name for d in distillers)])
        check_distinct("teachers", teachers)
        self._named = [(d.name, d) for d in distillers]
        self._uses = teachers_by_distiller(distillers, teachers, default_teacher)
        self._adapter = adapter
        # else the wrapper is called with the targets last, and keeps them from the student
        self.student_takes_targets = criterion is None and not any(d.is_task for d in distillers)
        self._decays = {name: t.decay for name, t in teachers.items() if isinstance(t, EMATeacher)}
        self._online = {name: t for name, t in teachers.items() if isinstance(t, OnlineTeacher)}
        # frozen teachers stand outside the module tree: parameters, state_dict, DDP and checkpoints never see them
        self._frozen = {name: t for name, t in teachers.items() if isinstance(t, Teacher)}
        normalising: dict[str, Teacher | OnlineTeacher] = {**self._frozen, **self._online}
        self._renormalise = {
            name: change
            for name, t in normalising.items()
            if (change := renormalisation(adapter, student, name, t)) is not None
        }
        self._aligned = alignments(student, adapter, self._frozen, classes, distillers, self._uses)
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self.student = student
        self.distillers = nn.ModuleDict({key_of(name): d for name, d in self._named})
        self.criterion = criterion
        self.averages = nn.ModuleDict(
            {key_of(name): copy.deepcopy(student).requires_grad_(False).eval() for name in self._decays}
        )
        self.online = nn.ModuleDict(
            {key_of(name): copy.deepcopy(student) if t.model is None else t.model for name, t in self._online.items()}
        )
        if device.type != "meta":
            self.online.to(device)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self._tap()
        self.distillers.to(device)  # their projections exist from here on
        if device.type != "meta":
            for frozen in self._frozen.values():
                frozen.to(device)
        self._calls = 0
        self._tried = False
        self._checked = False
        self._unwrapped = False
        self._told: set[tuple[str, str]] = set()
        # the step as far as the host knows, compiled ones left out; None: to be read from the device, once
        self._host_step: int | None = None
        self.register_load_state_dict_post_hook(_follow_loaded_step)
        self._bad = FirstBad(CHECK_EVERY)
        _wrappers[student] = weakref.ref(self)
        sides = (self._student_side, *self._teacher_sides.values())
        hooked: list[Changes | Taps] = [self._changes, *(side.taps for side in sides)]
        self._untap = weakref.finalize(self, _remove, hooked)  # also when it is thrown away
        self._untap.atexit = False

    def _tap(self) -> None:
        """Put the taps on all models and let the distillers prepare for what they read; a failure leaves no tap."""
        with ExitStack() as undo:
            changing = {name: made for name, d in self._named if (made := d.changes(self.student))}
            check_alone([d for _, d in self._named], changing, self.criterion)
            check_lasts([d for _, d in self._named], self.criterion)
            self._changes = Changes(self.student, {path: f for made in changing.values() for path, f in made.items()})
            undo.callback(self._changes.remove)
            self._readings = {
                n: list(zip(readings(d, "student"), readings(d, "teacher"), strict=True)) for n, d in self._named
            }
            read = [mine for both in self._readings.values() for mine, _ in both]
            self._student_side = Side("student", self.student, self._adapter, read)
            undo.callback(self._student_side.taps.remove)
            self._teacher_sides: dict[str, Side] = {}
            for name, model, its_adapter in self._teacher_models():
                read = [its for n, both in self._readings.items() if self._uses[n] == name for _, its in both]
                self._teacher_sides[name] = side = Side(name, model, its_adapter, read, teacher=True)
                undo.callback(side.taps.remove)
            for name, distiller in self._named:
                prepare(distiller, self._student_side, self._teacher_sides.get(self._uses[name] or ""))
            undo.pop_all()

    def _teacher_models(self) -> list[tuple[str, nn.Module, Adapter]]:
        frozen = [(name, t.model, t.adapter or self._adapter) for name, t in self._frozen.items()]
        averages = [(name, self.averages[key_of(name)], self._adapter) for name in self._decays]
        online = [(name, self.online[key_of(name)], t.adapter or self._adapter) for name, t in self._online.items()]
        return [*frozen, *averages, *online]

    # ---- the call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In train mode the losses (``Losses``); in eval mode whatever the student returns."""
        if not self.training:
            return self.student(*args, **kwargs)
        if self._unwrapped:
            raise WrapError("this wrapper was unwrapped: wrap the student again to distil further")
        self._check_modes()
        if not torch.compiler.is_compiling():
            self._before_a_step(args, kwargs)
        if self._decays:
            self._update_averages()
        losses = self._losses(args, kwargs) if torch.compiler.is_compiling() else self._eager_losses(args, kwargs)
        self._flag({name: loss for name, loss in losses.items() if name != OUTPUT})
        # a new tensor, not an update in place: compiled backward passes recompute weights from the tensor they got
        self._buffers["step"] = self.step + 1  # past nn.Module's __setattr__, which costs more than the sum
        if not torch.compiler.is_compiling():
            self._after_a_step()
        return losses

    def _eager_losses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Losses:
        try:
            return self._losses(args, kwargs)
        except BaseException:
            for _, distiller in self._named:
                distiller.forget()
            raise

    def _losses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Losses:
        """Teachers, student, distillers."""
        call = args, kwargs
        args, kwargs, given = self._split_targets(args, kwargs)
        acting = self._acting()
        # before the student, whose activations would otherwise be kept alive beside those of the teachers
        taught: dict[str, dict[Reading, View]] = {}
        online: dict[str, Any] = {}  # outputs of teachers that are trained too
        for name, side in self._teacher_sides.items():
            if not any(self._uses[distiller] == name for distiller in acting):
                continue
            if name in self._online:
                online[name], taught[name] = self._run_online(name, side, args, kwargs)
            else:
                taught[name] = self._run_teacher(name, side, args, kwargs)
        with self._changes.on():
            output, views = self._student_side.run(args, kwargs, exit_early=False)
        targets = self._adapter.targets(args, kwargs, given)
        losses = self._task_losses(output, (args, kwargs), given, targets)
        for name, teacher in self._online.items():
            losses[name] = self._online_loss(name, teacher, online, targets)
        with self._full_precision():  # small differences need float32
            pairs: dict[Any, tuple[View, View | None]] = {}  # of views that match, for all distillers that read them
            for name, distiller in self._named:
                if name in acting:
                    losses[name] = self._distill(name, distiller, views, taught, pairs, targets, call)
                else:
                    losses[name] = self._nothing_from(distiller)
        if not losses:
            raise WrapError(
                "there is no loss: the student computes none by itself; pass criterion= or distillers= to wrap()"
            )
        return Losses({**losses, OUTPUT: output})

    def _before_a_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What an eager step checks, the first one above all."""
        if not self._tried:
            self._tried = True
        if not self._checked and self._decays:
            refuse_sharded_averages(self)
        if self._host_step is None:
            self._host_step = int(self.step)
        if self._calls & (self._calls + 1) == 0:  # before call 1, 2, 4, 8, ...
            self._prove_sides(*self._split_targets(args, kwargs)[:2])

    def _after_a_step(self) -> None:
        if not self._checked:
            self._checked = True
        mine = self.__dict__  # nn.Module's way of setting an attribute costs more than the sum
        mine["_calls"] += 1
        mine["_host_step"] += 1
        if self._calls % CHECK_EVERY == 0:
            self.check_finite()

    @property
    def failed(self) -> bool:
        """It was called and no call has ended well: its paths are wrong, say, and the student may be wrapped anew."""
        return self._tried and not self._checked

    def _split_targets(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Unless the student takes them itself, targets are the last argument of the call."""
        if self.student_takes_targets:
            return args, kwargs, None
        if "targets" in kwargs:
            return args, {k: v for k, v in kwargs.items() if k != "targets"}, kwargs["targets"]
        if len(args) < 2:
            raise TypeError(
                "a wrapped model whose student computes no loss is called with the student's arguments and then the "
                "targets: model(x, targets)"
            )
        return args[:-1], kwargs, args[-1]

    def _task_losses(self, output: Any, call: tuple[Any, Any], given: Any, targets: Any) -> dict[str, Tensor]:
        """By name. given: the targets that the criterion gets; targets: those of the call, whoever gets them."""
        if self.student_takes_targets:
            losses = self._adapter.task_losses(output, *call)
            if not losses and targets is not None:
                raise no_task_loss(output)
        elif self.criterion is None:
            losses = {}  # a distiller has the task's loss
        else:
            loss = self.criterion(output, given)
            losses = dict(loss) if isinstance(loss, Mapping) else {"task": loss}
        taken = losses.keys() & {OUTPUT, *self._uses, *self._online}
        if taken:
            raise WrapError(
                f"a task loss is called {min(taken)!r}, which is taken: rename it, or the distiller of that name"
            )
        return {name: scalar_loss(name, loss) for name, loss in losses.items()}

    def _run_teacher(self, name: str, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Reading, View]:
        resize = self._frozen[name].resize if name in self._frozen else None
        scale = 1.0 if resize is None else resize.scale_of(self._adapter.pictures(args, kwargs))
        args, kwargs = self._without_targets(side, *self._fed(name, args, kwargs))
        with torch.no_grad(), self._precision(name):
            views = side.run(args, kwargs, exit_early=side.exits_early)[1]
        return views if resize is None else {reading: view.at_scale(scale) for reading, view in views.items()}

    def _run_online(
        self, name: str, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[Reading, View]]:
        """A teacher that is trained too: its output, and its views, with their graph."""
        # what feeds it sees the student's pictures; what comes of that is re-normalised
        args, kwargs = self._renormalised(name, *self._online[name].feed(args, kwargs))
        args, kwargs = self._without_targets(side, args, kwargs)
        return side.run(args, kwargs, exit_early=False)

    def _online_loss(self, name: str, teacher: OnlineTeacher, outputs: Mapping[str, Any], targets: Any) -> Tensor:
        """What a teacher that is trained too learns from; 0 where it did not run, as nobody reads it any more."""
        if name not in outputs:
            return self._nothing_from(self.online[key_of(name)])
        return scalar_loss(name, teacher.criterion(outputs[name], teacher.targets(targets)))

    def _without_targets(
        self, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A model's call in eval mode; where the student takes no targets they are gone already."""
        return side.adapter.without_targets(args, kwargs) if self.student_takes_targets else (args, kwargs)

    def _precision(self, name: str) -> AbstractContextManager[Any]:
        """A teacher that has its own dtype runs outside of the loop's autocast."""
        teacher = self._frozen.get(name)
        if teacher is None or teacher.dtype is None:
            return nullcontext()
        return self._full_precision()

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Outside of the loop's autocast; nothing where there is none, as entering it costs a tenth of a small step."""
        device = self.step.device.type
        if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, enabled=False)

    def _fed(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], cast: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The student's call as a teacher gets it: re-normalised, resized, cropped, in its dtype, as it asks for."""
        teacher = self._frozen.get(name)
        if teacher is None:
            return args, kwargs
        args, kwargs = self._renormalised(name, args, kwargs)
        if teacher.resize is not None:
            args, kwargs = self._adapter.with_pictures(args, kwargs, teacher.resize)
        if teacher.feed is not None:
            args, kwargs = teacher.feed(args, kwargs)
        return (teacher.cast(args), teacher.cast(kwargs)) if cast else (args, kwargs)

    def _renormalised(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        change = self._renormalise.get(name)
        return (args, kwargs) if change is None else self._adapter.with_pictures(args, kwargs, change)

    def _acting(self) -> set[str]:
        """The distillers whose weight is not 0 from now on; all of them in a compiled step, as the host then does not
        know which step it is."""
        if torch.compiler.is_compiling():
            return set(self._uses)
        assert self._host_step is not None
        return {name for name, distiller in self._named if not distiller.weight.is_over(self._host_step)}

    def _distill(
        self,
        name: str,
        distiller: Distiller,
        views: dict[Reading, View],
        taught: dict[str, dict[Reading, View]],
        pairs: dict[Any, tuple[View, View | None]],
        targets: Any,
        call: Any,
    ) -> Tensor:
        """The weighted loss of one distiller."""
        check = not (self._checked or torch.compiler.is_compiling())
        try:
            read = [self._pair(name, distiller, *both, views, taught, pairs, check) for both in self._readings[name]]
            if isinstance(distiller.reads, tuple):
                teacher = tuple(t for _, t in read) if self._uses[name] is not None else None
                loss = distiller(tuple(s for s, _ in read), teacher, targets)
            else:
                loss = distiller(*read[0], targets)
        except ValueError as error:
            raise ViewError(f"distiller {name!r}: {error}") from error
        except AttributeError as error:
            if targets is not None or "NoneType" not in str(error):
                raise
            raise ViewError(
                f"distiller {name!r} needs targets and the call has none ({error}): call model(inputs, targets)"
            ) from error
        if check:
            check_reaches(name, loss, distiller, [*tensors_in(call), *self.online.parameters()])
        return distiller.weight.applied(loss, self.step)

    def _pair(
        self,
        name: str,
        distiller: Distiller,
        mine: Reading,
        its: Reading,
        views: dict[Reading, View],
        taught: dict[str, dict[Reading, View]],
        pairs: dict[Any, tuple[View, View | None]],
        check: bool,
    ) -> tuple[View, View | None]:
        """One view of the student and the teacher's, matched: once a step, for all distillers that read the two."""
        uses = self._uses[name]
        if uses is None:
            return views[mine], None
        aligned = self._aligned.get(uses)
        key = (uses, mine, its, aligned is not None and distiller.reads_classes)
        if key not in pairs:
            student, teacher = views[mine], taught[uses][its]
            if aligned is not None:
                student, teacher = aligned.pair(student, teacher, self.step.device, distiller.reads_classes)
            if check:
                self._tell(uses, [*(aligned.notes(distiller) if aligned else []), *teacher.unmatched(student)])
            pairs[key] = student, teacher.match(student)
        return pairs[key]

    def _tell(self, name: str, notes: Iterable[str]) -> None:
        """What of a teacher's views has no partner in the student's, once."""
        for note in notes:
            if (name, note) not in self._told:
                log.warning("teacher %r: %s", name, note)
            self._told.add((name, note))

    def _nothing_from(self, module: nn.Module) -> Tensor:
        """0, hung on the parameters of a distiller or a teacher: DDP waits for a gradient of each. Those that FSDP2
        shards (they have a full_tensor) it does not wait for, and they do not mix with others."""
        return sum(
            (p.flatten()[:0].sum() for p in module.parameters() if not hasattr(p, "full_tensor")),
            start=torch.zeros((), device=self.step.device),
        )

    @torch.no_grad()
    def _update_averages(self) -> None:
        for name, decay in self._decays.items():
            update_average(self.averages[key_of(name)], self.student, decay)

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
                teacher.prove_folding(*self._without_targets(self._teacher_sides[name], *fed))
        if self._student_side.unproven:
            self._prove(self._student_side, args, kwargs)
        for name, side in self._teacher_sides.items():
            if side.unproven:
                with self._precision(name):
                    self._prove(side, *self._fed(name, args, kwargs))

    def _prove(self, side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._without_targets(side, args, kwargs)
        failed = self.step.new_full((), float(not side.prove(*call)), dtype=torch.float32)
        # a sharded model waits for the other ranks when it runs: all look again, or none
        side.unproven = bool(mean_over_ranks(failed))

    def _flag(self, losses: dict[str, Tensor]) -> None:
        """Remember on the device at which step each loss was first not finite."""
        if torch.compiler.is_compiling():
            if not self._bad.fits(losses):
                self.check_finite()
            self._bad.see_compiled(losses, self.step)
            return
        if self._bad.full or not self._bad.fits(losses):
            self.check_finite()  # the losses until now
        self._bad.see(losses)

    def check_finite(self) -> None:
        """Look whether a loss was infinite or NaN (waits for the device).

        Called by itself every 50 eager steps; a compiled loop calls it where it synchronises anyway.

        Raises:
            NonFiniteLossError: names each loss that was infinite or NaN since the last look, and the step it began at.
        """
        bad = [f"{name!r} since step {step}" for name, step in self._bad.look(self.step).items()]
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
        self._untap()
        _wrappers.pop(self.student, None)
        self._unwrapped = True
        return self.student

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("a wrapped model cannot be copied: copy its student (model.student), or wrap the copies")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a wrapped model cannot be pickled: save model.state_dict(), or the student (model.student)")


def _claim(student: nn.Module) -> None:
    """Raise WrapError if the student is a wrapper, or another's; a wrapper whose first step failed gives it up."""
    if any(isinstance(module, DistilledModel) for module in student.modules()):
        raise WrapError(
            "the student is a wrapped model: wrap its student (model.unwrap()), with all distillers in one wrap()"
        )
    wrapper = _wrappers[student]() if student in _wrappers else None
    if wrapper is None:
        return
    if not wrapper.failed:
        raise WrapError(
            "this student is wrapped already: call unwrap() on the first wrapper, or give both distillers to one wrap()"
        )
    wrapper.unwrap()


def _remove(hooked: Iterable[Changes | Taps]) -> None:
    for hooks in hooked:
        hooks.remove()


def _follow_loaded_step(model: DistilledModel, incompatible: object) -> None:
    model._host_step = None
