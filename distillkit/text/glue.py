"""The files of GLUE's tasks. Wang et al., arXiv:1804.07461."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distillkit.text.sentences import Sentence, TextTask, read_rows
from distillkit.text.vocabulary import TextError


@dataclass(frozen=True)
class GlueTask:
    """Where labels and texts of a task are, and what is asked.

    Args:
        doubled: the order of a pair says nothing: in training each comes in both.
        header: the files begin with the names of the columns.
        dev: the file of the val split.
    """

    task: TextTask
    label: int | str
    texts: tuple[int | str, ...]
    header: bool = True
    doubled: bool = False
    dev: str = "dev.tsv"


_YES = ("not_entailment", "entailment")
_NLI = ("contradiction", "entailment", "neutral")
_NO_YES = ("0", "1")
GLUE = {
    "cola": GlueTask(TextTask(_NO_YES, ("matthews",)), 1, (3,), header=False),
    "sst2": GlueTask(TextTask(_NO_YES), "label", ("sentence",)),
    "mrpc": GlueTask(TextTask(_NO_YES, ("accuracy", "f1")), "Quality", ("#1 String", "#2 String"), doubled=True),
    "stsb": GlueTask(TextTask(None, ("pearson", "spearman")), "score", ("sentence1", "sentence2"), doubled=True),
    "qqp": GlueTask(TextTask(_NO_YES, ("accuracy", "f1")), "is_duplicate", ("question1", "question2")),
    "mnli": GlueTask(TextTask(_NLI), "gold_label", ("sentence1", "sentence2"), dev="dev_matched.tsv"),
    "qnli": GlueTask(TextTask(_YES), "label", ("question", "sentence")),
    "rte": GlueTask(TextTask(_YES), "label", ("sentence1", "sentence2")),
    "wnli": GlueTask(TextTask(_NO_YES), "label", ("sentence1", "sentence2")),
}


def glue_rows(task: str, root: str | Path, split: str) -> list[Sentence]:
    """Rows of the train or val split of a task, from a folder with train.tsv and dev.tsv (mnli: dev_matched.tsv), or of
    any other .tsv in it that has labels, by its name.

    Raises TextError: no such task, or files that cannot be read.
    """
    if task not in GLUE:
        raise TextError(f"GLUE has no task {task!r}; there are {', '.join(GLUE)}")
    how = GLUE[task]
    file = {"train": "train.tsv", "val": how.dev}.get(split, split)
    return read_rows(Path(root) / file, how.label, how.texts, how.header)


def both_ways(rows: Sequence[Sentence]) -> list[Sentence]:
    """Each pair, and each with its texts the other way round."""
    return [*rows, *(replace(row, texts=row.texts[::-1]) for row in rows)]
