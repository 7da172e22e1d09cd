"""metrics.jsonl and TensorBoard of one job: one row per optimizer step, one per evaluation, none twice, none lost."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from distillkit.training.errors import CheckpointError


class Metrics:
    """Rows of a job, appended to ``folder/metrics.jsonl``.

    A checkpoint stores ``sync()``, the length of the file it belongs to; a resumed job cuts the file back to it, so
    that steps done after the checkpoint, and done again now, are not written twice.

    Args:
        folder: of the job.
        length: bytes of the file to keep, 0 for a new job.
        step: optimizer steps done; TensorBoard drops what it has from there on.

    Raises:
        CheckpointError: the file is shorter than the checkpoint says.
    """

    def __init__(self, folder: Path, length: int, step: int):
        path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")
        if self.file.tell() < length:
            raise CheckpointError(
                f"{path}: {self.file.tell()} bytes, but the checkpoint beside it counts {length}: rows are lost; put "
                " the file back, or start again with --fresh"
            )
        self.file.truncate(length)
        self.file.seek(length)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, row: dict[str, Any]) -> None:
        """Write one row: ``kind``, ``step``, ``epoch`` (from 1), then its values.

        What JSON cannot hold (NaN) becomes null.
        """
        row = {key: _plain(value) for key, value in row.items()}
        self.file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        for key, value in (row | row.get("losses", {})).items():
            if isinstance(value, float):
                self.board.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def sync(self) -> int:
        """Bring all rows to the disk and return the file's length in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.sync()
        self.file.close()
        self.board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
