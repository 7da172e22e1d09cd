"""Tasks on sentences and pairs of them: rows of TSV files, as a set of samples for a classifier or a regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillkit.text.vocabulary import TextError, Vocabulary


@dataclass(frozen=True)
class Sentence:
    """One row. texts: one, or two that belong together. label: as it is written. where: file:line."""

    texts: tuple[str, ...]
    label: str
    where: str


@dataclass(frozen=True)
class TextTask:
    """What is asked of a row.

    Args:
        classes: names as they are written; None: a number, of ``least`` to ``most``.
        metrics: of ``distillkit.text.metrics``; the task's score is their mean.
    """

    classes: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    least: float = 0.0
    most: float = 5.0

    @property
    def names(self) -> list[str]:
        """Of a model's outputs."""
        return ["score"] if self.classes is None else list(self.classes)

    def value(self, row: Sentence) -> int | float:
        """A row's label as a number: its class; or, of a regression, between 0 and 1.

        Raises TextError for a label that the task does not have, with its file and line.
        """
        if self.classes is None:
            try:
                number = float(row.label)
            except ValueError:
                number = float("nan")
            if not self.least <= number <= self.most:
                raise TextError(
                    f"{row.where}: the label {row.label!r} is no number from {self.least:g} to {self.most:g}"
                )
            return (number - self.least) / (self.most - self.least)
        if row.label not in self.classes:
            known = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
            raise TextError(f"{row.where}: the label {row.label!r} is none of the task's: {known}")
        return self.classes.index(row.label)


class Sentences:
    """Rows of a task as samples: [CLS] first [SEP], or [CLS] first [SEP] second [SEP] in two segments.

    ``data[(epoch, index)]`` -> (int64 (T,), {"segments": int64 (T,), "label": int or float, "key": file:line}). A pair
    that is too long loses from its longer text first, a single one at its end.

    Args:
        length: most tokens.

    Raises TextError: no row, or a label that the task does not have.
    """

    def __init__(self, rows: Sequence[Sentence], task: TextTask, vocabulary: Vocabulary, length: int = 128):
        if not rows:
            raise TextError("there is no row")
        self.task, self.vocabulary, self.length = task, vocabulary, length
        self.labels = [task.value(row) for row in rows]
        self.rows = list(rows)
        self.classes = task.names
        flat = vocabulary.encode([text for row in rows for text in row.texts])
        pieces = iter(flat)
        self.pieces = [[next(pieces) for _ in row.texts] for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        _, index = key
        v, texts = self.vocabulary, [list(pieces) for pieces in self.pieces[index]]
        while sum(map(len, texts)) + 1 + len(texts) > self.length:
            max(reversed(texts), key=len).pop()
        ids, segments = [v.start], [0]
        for segment, text in enumerate(texts):
            ids += [*text, v.end]
            segments += [segment] * (len(text) + 1)
        target = {"segments": torch.tensor(segments), "label": self.labels[index], "key": self.rows[index].where}
        return torch.tensor(ids), target


def padded(items: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Samples as a batch, padded on the right with 0: ids (B, T), and what else a model of text is called with."""
    length = max(len(ids) for ids, _ in items)
    ids = torch.stack([_longer(ids, length) for ids, _ in items])
    labels = torch.tensor([target["label"] for _, target in items])
    return ids, {
        "attention_mask": torch.stack([_longer(torch.ones_like(ids), length) for ids, _ in items]),
        "token_type_ids": torch.stack([_longer(target["segments"], length) for _, target in items]),
        "labels": labels,
    }


def _longer(row: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)))


def as_call(ids: Tensor, targets: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model of transformers is called with a batch of ``padded``."""
    return (), {"input_ids": ids, **targets}


def read_rows(path: str | Path, label: int | str, texts: Sequence[int | str], header: bool) -> list[Sentence]:
    """Rows of a TSV file without quoting, as GLUE's are.

    Args:
        label, texts: columns, by number, or by the name that the header gives them.

    Raises TextError: no such file, not UTF-8, no row, or a row with too few columns; with its line.
    """
    path = Path(path)
    lines = _lines(path)
    columns: list[int] = []
    if header:
        names = next(lines)[1].split("\t")
        for wanted in (label, *texts):
            if wanted not in names:
                raise TextError(f"{path}:1: no column {wanted!r}; there are {', '.join(names)}")
            columns.append(names.index(str(wanted)))
    else:
        columns = [int(column) for column in (label, *texts)]
    rows = []
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) <= max(columns):
            raise TextError(f"{path}:{number}: {len(cells)} columns, expected at least {max(columns) + 1}, by tabs")
        rows.append(
            Sentence(tuple(cells[c].strip() for c in columns[1:]), cells[columns[0]].strip(), f"{path}:{number}")
        )
    if not rows:
        raise TextError(f"{path}: the file is empty: it has no row")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TextError(f"{path}: expected a TSV file: {error}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8: {error.reason}") from error
    if not text.strip():
        raise TextError(f"{path}: the file is empty: it has no row")
    return ((i, line) for i, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip())
