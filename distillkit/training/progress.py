"""The progress of one job: a Rich bar with losses and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

#: Optimizer steps between two plain lines.
LINE_EVERY = 50


class Progress:
    """Shows a job's steps.

    Args:
        name: of the job.
        total, done: optimizer steps in all, and those done before this start.
        epochs: of the job.
        console: where to; None shows nothing (all processes but the first).
        unit: what its epochs are called.
    """

    def __init__(self, name: str, total: int, done: int, epochs: int, console: Console | None, unit: str = "epoch"):
        self.unit = unit
        self.name, self.total, self.first, self.epochs, self.console = name, total, done, epochs, console
        self.last_line = done
        self.started = time.monotonic()
        self.bar: Bar | None = None
        if console and console.is_terminal:
            name_column, losses = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
            self.bar = Bar(
                name_column, BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), losses, console=console
            )
            self.task = self.bar.add_task(escape(name), total=total, completed=done, text="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, step: int, epoch: int, losses: dict[str, float]) -> None:
        """``step`` optimizer steps are done, the last one with these losses in epoch ``epoch`` (from 0)."""
        text = f"{self.unit} {epoch + 1}/{self.epochs}  " + "  ".join(
            f"{name} {value:.3f}" for name, value in losses.items()
        )
        if self.bar:
            self.bar.update(self.task, completed=step, text=escape(text))
        elif self.console and (step - self.last_line >= LINE_EVERY or step == self.total):
            self.last_line = step
            left = (time.monotonic() - self.started) / (step - self.first) * (self.total - step)
            self._line(f"step {step}/{self.total}  {text}  {_minutes(left)} left")

    def say(self, text: str) -> None:
        if self.console:
            self._line(text)

    def _line(self, text: str) -> None:
        assert self.console is not None
        self.console.print(f"{self.name}: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def scoring(text: str, pictures: int, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows that a model is being scored: a bar that goes away on a terminal, one line elsewhere.

    Gives what to call with (pictures done, pictures of this process).
    """
    if not console.is_terminal:
        console.print(f"{text}, {pictures} pictures", markup=False, highlight=False, soft_wrap=True)
        yield lambda done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(text), total=pictures)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def reading(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows that files are being read or cut, where there is a terminal.

    Gives what to call with (what is read, how many are done, how many there are).
    """
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
