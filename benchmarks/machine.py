"""What every table says of itself, and how it is written."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


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
