"""This process among those that train together."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate.state import PartialState


def processes(wait: timedelta | None = None) -> PartialState:
    """Accelerate's state: rank, number of processes, device.

    Args:
        wait: how long processes wait for each other, if this is the first call; None: torch's 10 minutes on GPUs, 30 on
            CPUs.

    Accelerate joins processes that run on the CPU only where it is told so; left alone, each of them would take itself
    for the only one and write the same files.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    options: dict[str, Any] = {} if wait is None else {"timeout": wait}
    return PartialState(cpu=asked or not torch.accelerator.is_available(), **options)
