"""The base of every distiller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from distillkit.core.schedule import Weight, weight_of
from distillkit.core.views import View


class Distiller(nn.Module):
    """One way for a student to learn from a teacher: reads a view of each and returns a loss.

    Args:
        weight: a number, or a schedule of the step (``core.schedule``): what the loss is multiplied by.
        teacher: which teacher, where there are several; None: the only one that ``wrap`` is given.
        name: the key of its loss in the result; the class's ``short_name`` unless given.

    A subclass sets ``reads`` and writes ``forward(student, teacher, targets) -> scalar Tensor``, unweighted. It never
    sees a model. A loss that has nothing to act on returns ``0 * something`` of the student's, never a plain number.
    What it raises as ValueError the user gets as ``ViewError``, with the distiller's name before it.
    """

    #: the kind of view it reads of student and teacher; a tuple: it gets a tuple of views of either, in that order
    reads: type[View] | tuple[type[View], ...]
    short_name: ClassVar[str]
    #: module paths to read on either side; None: wherever the adapter says that view is
    student_at: str | list[str] | None = None
    teacher_at: str | list[str] | None = None
    #: it learns from what comes with the targets (label maps): it has no teacher, and gets None for its view
    taught_by_targets: bool = False
    #: it compares classes: those that a teacher names otherwise are matched, or refused (a view without any is neither)
    reads_classes: bool = True
    #: it reads labels, places in the student's list of classes: the view of the student must hold all of them
    reads_labels: ClassVar[bool] = False
    #: its loss holds the student's own task: ``wrap`` asks for no criterion
    is_task: bool = False

    def __init__(self, weight: float | Weight = 1.0, teacher: str | None = None, name: str | None = None):
        super().__init__()
        self.weight = weight_of(weight)
        self.teacher = teacher
        self.name = name or self.short_name

    def own_teacher(self) -> Any:
        """The teacher that it brings along (self-distillation, local to global): a ``Teacher``, an ``EMATeacher``, an
        ``OnlineTeacher`` or None."""
        return None

    def changes(self, student: nn.Module) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What it does in a training step to the outputs of the student's modules, by path (MixToken).

        What the student predicts is then of changed inputs: ``wrap`` refuses a criterion and other distillers beside
        it."""
        return {}

    def forget(self) -> None:
        """Drop what a step that failed has left behind; nothing of a step is kept."""

    def prepare(self, student_widths: list[int] | None, teacher_widths: list[int] | None) -> None:
        """Called once by ``wrap`` with the channel numbers of the tapped places, None where they cannot be known before
        a first step. A distiller with projections makes them here, so that the optimizer sees them."""

    def forward(self, student: Any, teacher: Any, targets: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}.forward(student, teacher, targets) is missing")
