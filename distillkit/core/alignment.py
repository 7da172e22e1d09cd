"""How the views of a teacher that differs are brought to the student's: classes by name, shared levels."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distillkit.core.adapter import Adapter
from distillkit.core.distiller import Distiller
from distillkit.core.errors import WrapError
from distillkit.core.teacher import Teacher
from distillkit.core.views import View

Names = Sequence[str]
#: columns that are no class of their own: those that a student has and its teacher lacks are left out without asking
BACKGROUND = "__background__"
NO_CLASS = ("N/A", BACKGROUND)
NAMED = 10  # how many names an error lists


@dataclass
class ClassMap:
    """Which columns of class logits teacher and student share.

    Args:
        teacher, student: their numbers, in the student's order.
        of_teacher, of_student: how many classes each has names for.
        left_out: names of the student's classes that the teacher lacks.
    """

    teacher: list[int]
    student: list[int]
    of_teacher: int
    of_student: int
    left_out: tuple[str, ...] = ()
    _columns: tuple[Tensor, Tensor] | None = None

    @property
    def drops(self) -> bool:
        """Whether the student's own view loses columns."""
        return len(self.student) < self.of_student

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of teacher and student, on their device; copied there once."""
        if self._columns is None or self._columns[0].device != device:
            self._columns = torch.tensor(self.teacher, device=device), torch.tensor(self.student, device=device)
        return self._columns


def match_names(
    name: str, teacher: Names, student: Names, missing: Literal["error", "ignore"]
) -> tuple[ClassMap | None, str]:
    """The columns that two models share, and what was done, in words; None where they are the same already.

    Names are compared as they are. One that stands several times (the "N/A" of COCO's 91 labels) is taken in its order.

    Raises WrapError, naming the classes and those that are spelled alike: a class that the teacher lacks, unless it is
    one of ``NO_CLASS`` or ``missing`` is ``ignore``; no class in common.
    """
    mine, theirs = _numbered(student), {key: i for i, key in enumerate(_numbered(teacher))}
    if list(theirs) == mine:
        return None, ""
    absent = [key for key in mine if key not in theirs]
    wrong = [key[0] for key in absent if key[0] not in NO_CLASS]
    shared = [i for i, key in enumerate(mine) if key in theirs]
    if not any(mine[i][0] not in NO_CLASS for i in shared):
        raise WrapError(
            f"teacher {name!r} and the student have no class in common: the teacher's are {_some(teacher)}, the "
            f"student's {_some(student)}. Correct Teacher(..., classes=) or wrap(..., classes=)"
        )
    if wrong and missing == "error":
        raise WrapError(
            f"teacher {name!r} lacks {len(wrong)} of the student's {len(mine)} classes: {_with_near(wrong, teacher)}. "
            'Correct the names in classes=, or give Teacher(..., missing="ignore"): distillers that read classes then '
            "leave these out on both sides"
        )
    found = ClassMap(
        [theirs[mine[i]] for i in shared], shared, len(teacher), len(mine), tuple(key[0] for key in absent)
    )
    said = f"its {len(teacher)} classes are matched by name: {len(shared)} are the student's"
    return found, said + (f"; left out on both sides: {_some(found.left_out)}" if absent else "")


class Alignment:
    """What is done to the views of a pair before a distiller compares them.

    Args:
        classes: the columns that they share; None: all, as they are.
        shared_levels: the student's view is cut to the levels that the teacher has.
        wrong: why the classes of the two cannot be matched: an error for a distiller that reads them.
        said: what is done about classes, in words.
    """

    def __init__(
        self,
        classes: ClassMap | None = None,
        shared_levels: bool = False,
        wrong: WrapError | None = None,
        said: str = "",
    ):
        self.classes, self.shared_levels, self.wrong, self.said = classes, shared_levels, wrong, said

    def check(self, distiller: Distiller) -> None:
        """Raise WrapError for a distiller that would compare the wrong classes."""
        if not reads_classes(distiller):
            return
        if self.wrong is not None:
            raise self.wrong
        if distiller.reads_labels and self.classes is not None and self.classes.drops:
            raise WrapError(
                f"distiller {distiller.name!r} reads the labels of pictures, which may be of classes that its teacher "
                f"lacks ({_some(self.classes.left_out)}): use LogitKD or DIST, which read none, or a teacher that "
                "knows them"
            )

    def notes(self, distiller: Distiller) -> list[str]:
        """What is done about the classes that it reads."""
        return [self.said] if self.said and reads_classes(distiller) else []

    def pair(self, student: View, teacher: View, device: torch.device, reads_classes: bool) -> tuple[View, View]:
        """Both views, the teacher's not matched yet."""
        if self.classes is not None and reads_classes:
            theirs, mine = self.classes.columns(device)
            teacher = teacher.picked(theirs, self.classes.of_teacher)
            if self.classes.drops:
                student = student.picked(mine, self.classes.of_student)
        if self.shared_levels:
            student = student.shared_with(teacher)
        return student, teacher


def alignments(
    student: nn.Module,
    adapter: Adapter,
    teachers: Mapping[str, Teacher],
    classes: Names | None,
    distillers: Sequence[Distiller],
    uses: Mapping[str, str | None],
) -> dict[str, Alignment]:
    """Of each teacher that differs, by name. classes: the student's; uses: the teacher of each distiller, by name.

    Raises WrapError for what differs and cannot be matched.
    """
    names = _by_column(classes, adapter) or adapter.class_names(student)
    found = {}
    for name, teacher in teachers.items():
        its_adapter = teacher.adapter or adapter
        itself = its_adapter.own_size(teacher.model)
        if teacher.resize is not None and itself is not None:
            raise WrapError(
                f"teacher {name!r} resizes pictures itself, to {itself}, which would undo its scale= or size=: leave "
                "that out"
            )
        if (aligned := alignment(name, teacher, its_adapter, names)) is not None:
            found[name] = aligned
    for distiller in distillers:
        if (used := found.get(uses[distiller.name] or "")) is not None:
            used.check(distiller)
    return found


def reads_classes(distiller: Distiller) -> bool:
    """Whether it compares classes, and a view that has some."""
    kinds = distiller.reads if isinstance(distiller.reads, tuple) else (distiller.reads,)
    return distiller.reads_classes and any(kind.picked is not View.picked for kind in kinds)


def alignment(name: str, teacher: Teacher, adapter: Adapter, student: Names | None) -> Alignment | None:
    """What a frozen teacher's views need; None: nothing.

    Args:
        adapter: the teacher's.
        student: the names of the student's classes, where they are known.

    Raises WrapError for a teacher that was given names where the student's are not known, or do not fit.
    """
    shared = teacher.levels == "shared"
    names = _by_column(teacher.classes, adapter) or adapter.class_names(teacher.model)
    if teacher.classes and student is None:
        raise WrapError(
            f"teacher {name!r} was given the names of its classes, and the student's are not known: "
            "wrap(..., classes=[...])"
        )
    if not names or student is None:
        return Alignment(shared_levels=shared) if shared else None
    try:
        classes, said = match_names(name, names, student, teacher.missing)
    except WrapError as error:
        if teacher.classes:
            raise
        # names that the model holds: its distillers may read no classes
        return Alignment(shared_levels=shared, wrong=error)
    return Alignment(classes, shared, said=said) if classes or shared else None


def _by_column(classes: Names | None, adapter: Adapter) -> Names | None:
    """Names that were given, one a column: of a model whose first is the background's, that comes before them."""
    background_first: int = getattr(adapter, "first_class", 0)
    if classes and background_first and classes[0] != BACKGROUND:
        return (BACKGROUND, *classes)
    return classes


def _numbered(names: Names) -> list[tuple[str, int]]:
    """Each name with how often it stood before."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:NAMED])) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _with_near(names: Sequence[str], among: Names) -> str:
    """Names, each with the one among others that is spelled most alike."""
    alike = {_plain(name): name for name in among}
    found = []
    for name in names[:NAMED]:
        near = difflib.get_close_matches(_plain(name), alike, n=1, cutoff=0.75)
        found.append(f"{name!r}" + (f" (it has {alike[near[0]]!r})" if near else ""))
    return ", ".join(found) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _plain(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").split())
