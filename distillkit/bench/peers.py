"""The toolkits that distillkit is measured against: which are installed, and how those that are not would be."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


@dataclass(frozen=True)
class Peer:
    """``module``: what is imported; ``package``: what is installed; ``install``: by what command."""

    name: str
    module: str
    package: str
    install: str

    @property
    def version(self) -> str | None:
        """None where it is not installed."""
        try:
            return version(self.package) if find_spec(self.module) else None
        except (PackageNotFoundError, ModuleNotFoundError):
            return None

    @property
    def label(self) -> str:
        """As in a table: the name and the version."""
        return f"{self.name} {self.version}" if self.version else self.name

    @property
    def absent(self) -> str:
        """What stands in a table in place of numbers; "" where the peer is installed."""
        return "" if self.version else f"absent: {self.install}"


BENCH = 'pip install "distillkit[bench]"'
TORCHDISTILL = Peer("torchdistill", "torchdistill", "torchdistill", BENCH)
MODELOPT = Peer("nvidia-modelopt", "modelopt", "nvidia-modelopt", BENCH)
TIMM = Peer("timm.task", "timm.task", "timm", 'pip install "timm>=1.0.24"')
MMDET = Peer("mmdet", "mmdet", "mmdet", 'pip install "distillkit[mmdet]"')
ULTRALYTICS = Peer("ultralytics", "ultralytics", "ultralytics", "pip install ultralytics")
TRANSFORMERS = Peer("transformers", "transformers", "transformers", 'pip install "distillkit[transformers]"')
GRAD_CAM = Peer("grad-cam", "pytorch_grad_cam", "grad-cam", 'pip install "distillkit[cam]"')
PEERS = (TORCHDISTILL, MODELOPT, TIMM, MMDET, ULTRALYTICS, GRAD_CAM)
