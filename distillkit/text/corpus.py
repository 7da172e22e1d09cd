"""Texts to pretrain on: files of lines, read once as a stream into a file of token numbers, from which samples are cut.

The token file is read through memory mapping, so a corpus may be larger than memory. It is written piece by piece: a
reading that was killed goes on with the first file that it had not finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillkit.data.transforms import generator_for
from distillkit.text.vocabulary import TextError, Vocabulary

LINES = 2000  # that are tokenized at a time
KIND = np.uint32


def lines_of(path: str | Path) -> Iterator[str]:
    """The lines of a text file that hold anything. Raises TextError: no such file, not UTF-8, or no text in it."""
    any_text, number = False, 0
    try:
        with Path(path).open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if text := line.strip():
                    any_text = True
                    yield text
    except OSError as error:
        raise TextError(f"{path}: expected a text file: {error}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}:{number + 1}: not UTF-8: {error.reason}") from error
    if not any_text:
        raise TextError(f"{path}: the file is empty: there is no text to learn from; leave it out")


def write_tokens(files: Sequence[str | Path], vocabulary: Vocabulary, folder: str | Path) -> Path:
    """Write the token numbers of text files, [SEP] after each line, one file of numbers each; the index is returned.

    Files that the folder has already, of the same text and vocabulary, are left as they are.

    Raises TextError: no file, one that is empty or no text, or two of them in one place.
    """
    if not files:
        raise TextError("no text file is given")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = hashlib.sha256("\n".join(vocabulary.pieces).encode()).hexdigest()[:16]
    index = []
    for i, source in enumerate(map(Path, files)):
        if not source.is_file():
            raise TextError(f"{source}: no such file")
        text = hashlib.sha256()
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                text.update(block)
        name = f"{i:03d}-{text.hexdigest()[:16]}-{pieces}.tokens"
        if not (folder / name).exists():
            part = folder / f".{name}.part"
            with part.open("wb") as out:
                for batch in _in_batches(lines_of(source)):
                    for numbers in vocabulary.encode(batch):
                        out.write(np.asarray([*numbers, vocabulary.end], KIND).tobytes())
            part.replace(folder / name)
        index.append(name)
    path = folder / "index.json"
    path.write_text(json.dumps({"files": index, "pieces": len(vocabulary)}, indent=1) + "\n", encoding="utf-8")
    return path


def _in_batches(lines: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == LINES:
            yield batch
            batch = []
    if batch:
        yield batch


class Corpus:
    """Samples of one length out of token files: [CLS], ``length`` - 2 tokens in a row, [SEP].

    ``corpus[(epoch, index)]`` -> (int64 (length,), {}), a function of (seed, epoch, index) alone: every epoch cuts the
    row of tokens at other places, so that no token is always at the border of a sample. Texts follow each other with
    [SEP] between them, in one segment.

    Args:
        index: what ``write_tokens`` gave.
        shift: False: every epoch cuts at the same places, as for judging.

    Raises TextError: fewer tokens than one sample has.
    """

    def __init__(self, index: str | Path, vocabulary: Vocabulary, length: int = 128, seed: int = 0, shift: bool = True):
        said = json.loads(Path(index).read_text(encoding="utf-8"))
        if said["pieces"] != len(vocabulary):
            raise TextError(f"{index}: written with {said['pieces']} pieces, the vocabulary has {len(vocabulary)}")
        self.paths = [Path(index).parent / name for name in said["files"]]
        self.starts = np.cumsum([0, *(path.stat().st_size // KIND().itemsize for path in self.paths)]).tolist()
        self.vocabulary, self.length, self.seed = vocabulary, length, seed
        self.inside, self.shifts = length - 2, shift
        self._maps: list[Any] | None = None
        if self.inside < 1 or len(self) < 1:
            raise TextError(
                f"{index}: {self.starts[-1]} tokens are not enough for a sample of {length}; give more text, or "
                "shorter samples"
            )

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    def __len__(self) -> int:
        """One less than would fit where samples are shifted, so that the last one has room to."""
        return self.tokens // self.inside - (self.tokens >= 2 * self.inside) * self.shifts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}  # each process maps the files itself

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = key
        shift = 0
        if self.shifts and self.tokens >= 2 * self.inside:
            shift = int(torch.randint(self.inside, (), generator=generator_for(self.seed, epoch, -2)))
        inside = self._between(index * self.inside + shift, self.inside)
        return torch.tensor([self.vocabulary.start, *inside, self.vocabulary.end]), {}

    def _between(self, start: int, count: int) -> list[int]:
        """``count`` tokens from ``start`` on, out of as many files as they lie in."""
        if self._maps is None:
            self._maps = [np.memmap(path, KIND, "r") for path in self.paths]
        found: list[int] = []
        for tokens, first in zip(self._maps, self.starts, strict=False):
            a, b = max(start - first, 0), min(start + count - first, len(tokens))
            if a < b:
                found += tokens[a:b].tolist()
        return found


def stacked(items: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
    """Samples of a corpus as a batch."""
    return torch.stack([numbers for numbers, _ in items]), {}
