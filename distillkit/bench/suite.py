"""What a suite of ``distillkit bench`` gives: tables to read, checks that a run fails on, every number for JSON.

A suite is a module, or a package, of ``distillkit.bench`` with ``run(quick, rounds, tell)``, see `Run`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

#: the suites, in the order in which they run
SUITES = ("step", "kernels", "invariance", "syncs", "behaviour", "accuracy")


@dataclass(frozen=True)
class Table:
    """``rows`` have one cell a name of ``head``, as they are to be read. ``note``: what to know before reading.
    ``folded``: long, and shown only to who opens it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Check:
    """Something of distillkit that is counted, or timed against a budget. ``said``: what was found, and what may be."""

    name: str
    ok: bool
    said: str


@dataclass(frozen=True)
class Result:
    """``asks``: what the suite finds out, a sentence or two. ``data``: every number, in what JSON knows."""

    asks: str
    tables: list[Table]
    checks: list[Check] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def worst(values: Iterable[float]) -> float:
    """The largest; NaN if one of them is, which ``max`` may pass over: then it is within no limit."""
    found = list(values)
    return next((value for value in found if value != value), max(found))


class Tell(Protocol):
    """Called as a suite goes on: what it is doing, how much of it is done, how much there is."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


class Run(Protocol):
    """``quick``: what continuous integration runs, smaller or less of it. ``rounds``: of what is timed."""

    def __call__(self, quick: bool, rounds: int, tell: Tell = silent) -> Result: ...
