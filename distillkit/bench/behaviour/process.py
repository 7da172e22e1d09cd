"""Probes in processes of their own: one a contender, which imports it once, and in it one a probe.

Some faults change a class or hang; none can reach another probe, and none holds up the table for more than ``LIMIT``.

    python -m distillkit.bench.behaviour.process CONTENDER ROW...     prints a line of JSON for each row
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from typing import IO

from distillkit.bench.behaviour.common import COMMON
from distillkit.bench.behaviour.rows import Outcome, short

#: seconds that one probe may take
LIMIT = 300


def probed(contender: str, keys: Sequence[str], seen: Callable[[str, Outcome], None], limit: int = LIMIT) -> None:
    """Run a contender's probes and hand over each outcome as it comes.

    Args:
        contender: a module of this package, by its name.
        keys: of rows.
        seen: called with the key and the outcome.
        limit: seconds of a probe.
    """
    command = [sys.executable, "-m", __name__, contender, str(limit), *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    left = list(keys)
    with tempfile.TemporaryFile("w+") as noise:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                key, outcome = json.loads(line)
                left.remove(key)
                seen(key, Outcome(**outcome))
        noise.seek(0)
        why = noise.read().strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
    for key in left:
        seen(key, Outcome(False, f"its process ended: {short(why[0])}", broken=True))


def probe(contender: str, key: str) -> Callable[[], Outcome]:
    """A contender's own for a row, else the one that all are asked."""
    module = import_module(f"distillkit.bench.behaviour.{contender}")
    return getattr(module, key) if hasattr(module, key) else partial(COMMON[key], module.KIT)


def run_probe(contender: str, key: str) -> Outcome:
    """One probe, here and now. What escapes from it is the probe's own fault: whatever a contender raises where it is
    asked to is caught and judged in the probe."""
    try:
        return probe(contender, key)()
    except Exception as error:
        return Outcome(False, f"the probe failed: {type(error).__name__}: {short(str(error))}", broken=True)


def _probe(contender: str, key: str, answer: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    answer.send(run_probe(contender, key))


def _main(contender: str, limit: int, keys: Sequence[str], report: IO[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    import_module(f"distillkit.bench.behaviour.{contender}").load()
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    for key in keys:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_probe, args=(contender, key, theirs))  # type: ignore[attr-defined]
        child.start()
        theirs.close()
        try:
            late = Outcome(False, f"no answer within {limit} seconds", broken=True)
            outcome = ours.recv() if ours.poll(limit) else late
        except EOFError:
            child.join()
            outcome = Outcome(False, f"its process ended with status {child.exitcode}", broken=True)
        child.join(5)
        if child.is_alive():
            child.kill()
        print(json.dumps([key, asdict(outcome)]), file=report, flush=True)


if __name__ == "__main__":
    # what packages print goes elsewhere
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(2, 1)
        _main(sys.argv[1], int(sys.argv[2]), sys.argv[3:], report)
