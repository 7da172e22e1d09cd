"""What can be wrong with a data set, said once: `distillkit check` lists it, building the data set raises it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one input.

    Args:
        file: the file that is wrong.
        id: the entry inside it ("image 12", "annotation 7"), or None for the file as a whole.
        what: what is wrong, with the offending value.
        remedy: what to do about it.
        fatal: True: nothing can be trained or evaluated with it, so building the data set raises it. False: the data
            set can be built, and ``remedy`` says what is done with the entry.
    """

    file: str
    id: str | None
    what: str
    remedy: str
    fatal: bool = True

    def __str__(self) -> str:
        at = f"{self.file}: {self.id}" if self.id is not None else self.file
        return f"{at}: {self.what}; {self.remedy}"


@dataclass
class Findings:
    """The problems of one file, as they are found."""

    file: str
    problems: list[Problem] = field(default_factory=list)

    def add(self, id: str | None, what: str, remedy: str, fatal: bool = True) -> None:
        self.problems.append(Problem(self.file, id, what, remedy, fatal))


class DataError(ValueError):
    """A data set that cannot be used. ``problems`` has all of them, the message the first 20."""

    def __init__(self, problems: Sequence[Problem] | str):
        # a DataLoader makes the error of its worker anew from the text alone
        self.problems = [] if isinstance(problems, str) else list(problems)
        super().__init__(problems if isinstance(problems, str) else listing(problems))

    def __reduce__(self) -> tuple[type[DataError], tuple[list[Problem]]]:
        return type(self), (self.problems,)


def listing(problems: Sequence[Problem], shown: int = SHOWN) -> str:
    """One line per problem, the first ``shown`` of them, and how many more there are."""
    lines = [str(p) for p in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"... and {len(problems) - shown} more; `distillkit check` lists all")
    return "\n".join(lines)
