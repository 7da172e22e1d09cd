"""What stands behind ``distillkit bench``: runs suites, says how far they are, and makes the report."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distillkit.bench import machine
from distillkit.bench.peers import PEERS
from distillkit.bench.report import check_place, markdown, write_between
from distillkit.bench.suite import SUITES, Run, Tell

#: rounds of what is timed, unless said: of the quick selection, and else
ROUNDS = {True: 5, False: 12}
#: what each suite takes of the whole, roughly, for the time left
SHARES = {"step": 30, "kernels": 12, "invariance": 8, "syncs": 8, "behaviour": 15, "accuracy": 40}
THREADS = 1


def bench(
    suites: Sequence[str], quick: bool, rounds: int | None, command: str, console: Console, write: Path | None = None
) -> dict[str, Any]:
    """Runs the suites (all where none is named), in the order of `SUITES`; the report is as JSON has it.

    Args:
        rounds: of what is timed; None: `ROUNDS`.
        command: what was typed, for the report.
        console: where to say how far it is.
        write: a file that the report will be written into, looked at before anything runs.

    Raises ValueError for a suite that is not there, a number of rounds below 2, or such a file without a place.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"no suite {', '.join(map(repr, unknown))}; there are: {', '.join(SUITES)}")
    if rounds is not None and rounds < 2:
        raise ValueError(f"--rounds: at least 2, to see how they differ; got {rounds}")
    if write is not None:
        check_place(write)
    chosen = [name for name in SUITES if name in (suites or SUITES)]
    rounds = rounds or ROUNDS[quick]
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    report: dict[str, Any] = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine.machine(),
        "threads": THREADS,
        "versions": machine.versions(),
        "peers": [{"name": peer.name, "version": peer.version, "absent": peer.absent} for peer in PEERS],
        "quick": quick,
        "rounds": rounds,
        "seed": 0,
        "suites": {},
    }
    try:
        with _told(chosen, console) as told:
            for name in chosen:
                began = time.monotonic()
                result = suite(name)(quick, rounds, told(name))
                report["suites"][name] = {**asdict(result), "seconds": round(time.monotonic() - began, 1)}
                _say(console, f"{name}: {time.monotonic() - began:.0f} s")
    finally:
        torch.set_num_threads(threads)
    return json.loads(json.dumps(report))


def suite(name: str) -> Run:
    """Its module is imported when it runs: what one needs the others may lack."""
    return import_module(f"distillkit.bench.{name}").run


def failed(report: dict[str, Any]) -> list[str]:
    """What is to be said of every check that failed."""
    return [
        f"{check['name']}: {check['said']}"
        for suite in report["suites"].values()
        for check in suite["checks"]
        if not check["ok"]
    ]


def keep(report: dict[str, Any], into_json: Path | None, into: Path | None) -> None:
    """Writes the report to a JSON file, and as Markdown between the marks of another."""
    if into_json is not None:
        into_json.parent.mkdir(parents=True, exist_ok=True)
        new = into_json.with_name(into_json.name + ".new")
        new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        new.replace(into_json)
    if into is not None:
        write_between(into, markdown(report))


@contextmanager
def _told(chosen: Sequence[str], console: Console) -> Iterator[Any]:
    """A bar over all suites on a terminal; elsewhere a line a suite, which `bench` says itself."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(SHARES[name] for name in chosen))

        def told(name: str) -> Tell:
            before = sum(SHARES[earlier] for earlier in chosen[: chosen.index(name)])
            bar.update(task, completed=before, description=name)

            def tell(what: str, done: int, total: int) -> None:
                bar.update(task, description=f"{name}: {what}, {done} of {total}")

            return tell

        yield told


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
