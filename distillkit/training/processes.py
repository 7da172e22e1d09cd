"""This process among those that train together."""

import os

import torch
from accelerate.state import PartialState


def processes() -> PartialState:
    """Accelerate's state: rank, number of processes, device.

    Accelerate joins processes that run on the CPU only where it is told so; left alone, each of them would take itself
    for the only one and write the same files.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return PartialState(cpu=asked or not torch.accelerator.is_available())
