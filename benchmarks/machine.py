"""What every table of these scripts says of itself, and how it is written."""

from __future__ import annotations

import ctypes
import datetime
import gc
import platform
from pathlib import Path

import torch

from distillkit.bench.machine import machine


def peak_bytes(fresh: bool = False) -> int:
    """The most memory this process has held; fresh: forget what it held before (Linux)."""
    if fresh:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not be seen
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def heading(title: str, command: str, seed: int | str) -> str:
    """A title, the command that made the table, seed, machine and date."""
    return (
        f"# {title}\n\n`{command}`\n\n"
        f"Seed {seed}. {machine()}; Python {platform.python_version()}, "
        f"torch {torch.__version__}. {datetime.date.today().isoformat()}."
    )


def write(text: str, path: Path | None) -> None:
    """Print, and write to ``path`` if there is one."""
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
