"""``distillkit.wrap``: the one call that turns a training loop into a distilling one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from distillkit.adapters import adapter_for
from distillkit.core.adapter import Adapter
from distillkit.core.distiller import Distiller
from distillkit.core.errors import WrapError
from distillkit.core.teacher import EMATeacher, OnlineTeacher, Teacher, check_names
from distillkit.core.wrap import DistilledModel

TeacherLike = nn.Module | Teacher | EMATeacher | OnlineTeacher


def wrap(
    student: nn.Module,
    teacher: TeacherLike | Mapping[str, TeacherLike] | None = None,
    distillers: Sequence[Distiller] = (),
    criterion: Callable[[Any, Any], Any] | None = None,
    adapter: Adapter | None = None,
    classes: Sequence[str] | None = None,
) -> DistilledModel:
    """Wrap a student so that calling it in train mode returns its losses and those of the distillers.

    Args:
        student: any model. Its class, forward and ``state_dict`` stay as they are.
        teacher: a trained model, a ``Teacher`` with options, an ``EMATeacher``, an ``OnlineTeacher``, or several by
            name; None if every distiller brings its own (``SelfLD``, ``LocalToGlobal``).
        distillers: what to learn, e.g. ``[LogitKD(temperature=4)]``. Each learns from the teacher it names, or the only
            one.
        criterion: ``criterion(student output, targets) -> loss or dict of losses``, for a student that takes no targets
            (a classifier). The wrapped model is then called with the student's arguments and the targets last.
        adapter: where the student's views are, for models that are not known; and those of a teacher that is not known
            either and has no adapter of its own.
        classes: the names of the student's classes, in the order of its class logits, where the model does not know
            them itself: a teacher of other classes, or in another order, is matched by name (``Teacher(classes=)``).

    Returns:
        The wrapped model: ``model(images, targets)`` in train mode gives ``Losses``; in eval mode it is the student's
        call; ``model.unwrap()`` gives the student back.

    Raises:
        WrapError, TapError, ViewError: the student or a teacher cannot be wrapped so; the message says what to do.

    That taps fire, that they explain a detector's own boxes and that each loss reaches the student is checked in the
    first eager step. A loop that is compiled from its first step on has none of these checks: make one eager step
    before.
    """
    if not isinstance(student, nn.Module):
        raise WrapError(f"student: expected a torch.nn.Module, got {type(student).__name__}")
    if not isinstance(distillers, Sequence):
        raise WrapError(f"distillers: expected a list, as in [LogitKD()], got {type(distillers).__name__}")
    given = dict(teacher) if isinstance(teacher, Mapping) else {} if teacher is None else {"teacher": teacher}
    brought: dict[str, TeacherLike] = {}
    for distiller in distillers:
        if not isinstance(distiller, Distiller):
            raise WrapError(f"distillers: expected Distiller objects, got {type(distiller).__name__}")
        own = distiller.own_teacher()
        if own is not None:
            distiller.teacher = distiller.teacher or distiller.name
            if distiller.teacher in {**given, **brought}:
                raise WrapError(f"two teachers would be called {distiller.teacher!r}: give the distiller another name=")
            brought[distiller.teacher] = own
    teachers = {name: _as_teacher(name, t, adapter) for name, t in {**given, **brought}.items()}
    choice = list(given or brought)
    return DistilledModel(
        student=student,
        teachers=teachers,
        distillers=distillers,
        criterion=criterion,
        adapter=adapter or adapter_for(student),
        default_teacher=choice[0] if len(choice) == 1 else None,
        classes=check_names(classes),
    )


def _as_teacher(name: str, teacher: TeacherLike, fallback: Adapter | None) -> Teacher | EMATeacher | OnlineTeacher:
    """A teacher that has its adapter: its own, its family's, or ``fallback``."""
    if isinstance(teacher, nn.Module):
        teacher = Teacher(teacher)
    if not isinstance(teacher, Teacher | EMATeacher | OnlineTeacher):
        raise WrapError(f"teacher {name!r}: expected a torch.nn.Module or a Teacher, got {type(teacher).__name__}")
    if (
        isinstance(teacher, Teacher | OnlineTeacher)
        and teacher.adapter is None
        and (model := teacher.model) is not None
    ):
        teacher = copy.copy(teacher)  # the caller's may teach another student, with another adapter
        teacher.adapter = adapter_for(model, fallback)
    return teacher
