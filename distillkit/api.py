"""``distillkit.wrap``: the one call that turns a training loop into a distilling one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from distillkit.adapters import adapter_for
from distillkit.core.adapter import Adapter
from distillkit.core.distiller import Distiller
from distillkit.core.errors import WrapError
from distillkit.core.teacher import EMATeacher, Teacher
from distillkit.core.wrap import DistilledModel

TeacherLike = nn.Module | Teacher | EMATeacher


def wrap(
    student: nn.Module,
    teacher: TeacherLike | Mapping[str, TeacherLike] | None = None,
    distillers: Sequence[Distiller] = (),
    criterion: Callable[[Any, Any], Any] | None = None,
    adapter: Adapter | None = None,
) -> DistilledModel:
    """Wrap a student so that calling it in train mode returns its losses and those of the distillers.

    Args:
        student: any model. Its class, forward and ``state_dict`` stay as they are.
        teacher: a trained model, a ``Teacher`` with options, an ``EMATeacher``, or several by name; None if every distiller
            brings its own (``SelfLD``).
        distillers: what to learn, e.g. ``[LogitKD(temperature=4)]``. Each learns from the teacher it names, or the only one.
        criterion: ``criterion(student output, targets) -> loss or dict of losses``, for a student that takes no targets (a
            classifier). The wrapped model is then called with the student's arguments and the targets last.
        adapter: where the student's views are (and a teacher's that has no adapter of its own), for models that are not known.

    Returns:
        The wrapped model: ``model(images, targets)`` in train mode gives ``Losses``; in eval mode it is the student's call;
        ``model.unwrap()`` gives the student back.

    Raises:
        WrapError, TapError, ViewError: the student or a teacher cannot be wrapped so; the message says what to do.
    """
    if not isinstance(student, nn.Module):
        raise WrapError(f"student: expected a torch.nn.Module, got {type(student).__name__}")
    named = dict(teacher) if isinstance(teacher, Mapping) else {} if teacher is None else {"teacher": teacher}
    for distiller in distillers:
        if not isinstance(distiller, Distiller):
            raise WrapError(f"distillers: expected Distiller objects, got {type(distiller).__name__}")
        own = distiller.own_teacher()
        if own is not None:
            distiller.teacher = distiller.teacher or distiller.name
            named[distiller.teacher] = own
    teachers = {name: _as_teacher(name, t) for name, t in named.items()}
    for t in teachers.values():
        if isinstance(t, Teacher) and t.adapter is None:
            t.adapter = (
                adapter
                if adapter is not None and type(t.model) is type(student)
                else adapter_for(t.model, fallback=adapter)
            )
    return DistilledModel(student, teachers, distillers, criterion, adapter or adapter_for(student))


def _as_teacher(name: str, teacher: TeacherLike) -> Teacher | EMATeacher:
    if isinstance(teacher, Teacher | EMATeacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return Teacher(teacher)
    raise WrapError(f"teacher {name!r}: expected a torch.nn.Module or a Teacher, got {type(teacher).__name__}")
