"""How forms are measured, what every table says of itself, and how it is written."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import median

import torch
from torch import Tensor


def race(
    forms: dict[str, Callable[[], Tensor]], rounds: int, seldom: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What each form gives, and its median of process CPU seconds. All take turns, seldom ones every sixth time."""
    results = {name: form() for name, form in forms.items()}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds):
        for name in list(forms) if i % 2 else list(reversed(forms)):
            if name in seldom and i % 6:
                continue
            start = time.process_time()
            forms[name]()
            seconds[name].append(time.process_time() - start)
    return results, {name: median(took) for name, took in seconds.items()}


def peak_bytes(fresh: bool = False) -> int:
    """The most memory this process has held; fresh: forget what it held before (Linux)."""
    if fresh:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not be seen
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def heading(title: str, command: str, seed: int | str) -> str:
    """A title, the command that made the table, seed, machine and date."""
    accelerator = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return (
        f"# {title}\n\n`{command}`\n\n"
        f"Seed {seed}. {processor()}, {os.cpu_count()} cores{accelerator}; Python {platform.python_version()}, "
        f"torch {torch.__version__}. {datetime.date.today().isoformat()}."
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers right."""
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write(text: str, path: Path | None) -> None:
    """Print, and write to ``path`` if there is one."""
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
