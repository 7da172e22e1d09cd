"""What made the numbers: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import distillkit

PACKAGES = ("torch", "torchvision", "timm", "transformers", "mmengine")


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it, as far as the system tells."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def machine() -> str:
    """The processor, its cores, the accelerator."""
    accelerator = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{processor()}, {os.cpu_count()} cores{accelerator}"


def versions() -> dict[str, str]:
    """Of Python, distillkit, and of those packages that are installed."""
    found = {"python": platform.python_version(), "distillkit": distillkit.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}  # with what it was built for
