"""The log of a search: JSON lines, each whole or not there, that a search started again runs along."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from distillkit.core.errors import DistillError


class SearchError(DistillError, ValueError):
    """A search cannot be done as asked, or its log is of another one."""


class Log:
    """Lines of ``path``, which need not be there yet; None: nothing is kept.

    What is written first is compared with the lines that are there already, and must be the same; what goes beyond
    them is appended, a line at a time. A last line that a kill in the middle of writing cut short is dropped.

    Args:
        path: of the file; its folder is made.

    Raises:
        SearchError: a line is not JSON, or not what this search writes there.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.lines: list[bytes] = []
        self.at = 0
        self._file: IO[bytes] | None = None
        if path is not None and path.exists():
            *self.lines, torn = path.read_bytes().split(b"\n")
            self.records = [self._read(i, line) for i, line in enumerate(self.lines)]
            if torn:
                os.truncate(path, path.stat().st_size - len(torn))

    def write(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(_plain(record), allow_nan=False).encode()
        if self.at < len(self.lines):
            if line != self.lines[self.at]:
                raise SearchError(
                    f"{self.path}:{self.at + 1}: another search wrote this log: it has {_short(self.lines[self.at])}, "
                    f"here it would be {_short(line)}; name another log, or delete it to start over"
                )
        else:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            self._file.write(line + b"\n")
        self.at += 1

    def sync(self) -> None:
        """Bring what was written to the disk, so that a power cut takes nothing of it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SearchError(
                f"{self.path}:{number + 1}: not JSON ({error}); put the log back, or delete it"
            ) from error
        if not isinstance(record, dict) or "kind" not in record:
            raise SearchError(f"{self.path}:{number + 1}: not a line of a search; name another log")
        return record


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut short is left out."""
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def as_genome(value: Any) -> Any:
    """What a genome was before JSON made lists of its tuples."""
    return tuple(map(as_genome, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """JSON has no infinity: no limit is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _short(line: bytes) -> str:
    text = line.decode(errors="replace")
    return text if len(text) <= 160 else text[:160] + "..."
