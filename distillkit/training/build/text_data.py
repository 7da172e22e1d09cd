"""Sentences and pairs of them, in TSV files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillkit import schema
from distillkit.training.build.classes import Classes, source_of
from distillkit.training.build.transformers_models import INSTALL

if TYPE_CHECKING:
    from distillkit.text.sentences import Sentence, TextTask
    from distillkit.text.vocabulary import Vocabulary


def build(recipe: schema.TextRecipe, split: str, augmented: bool) -> Any:
    """The samples of a split. Raises TextError: files that cannot be read, or labels that the task does not have."""
    _check_installed()
    from distillkit.text.glue import GLUE, both_ways
    from distillkit.text.sentences import Sentences

    rows = _rows(recipe, split)
    if (
        augmented
        and isinstance(recipe.data, schema.GlueData)
        and recipe.data.doubled
        and GLUE[recipe.data.task].doubled
    ):
        rows = both_ways(rows)
    return Sentences(rows, task_of(recipe), vocabulary_of(recipe), recipe.data.length)


def classes_of(recipe: schema.TextRecipe) -> Classes:
    _check_installed()
    names = task_of(recipe).names
    return Classes(names, list(range(len(names))))


def task_of(recipe: schema.TextRecipe) -> TextTask:
    from distillkit.text.glue import GLUE
    from distillkit.text.sentences import TextTask
    from distillkit.text.vocabulary import TextError

    data = recipe.data
    if isinstance(data, schema.GlueData):
        return GLUE[data.task].task
    labels = data.labels
    if isinstance(labels, str):
        from distillkit.text.corpus import lines_of

        labels = list(lines_of(labels))
    elif labels is None:
        labels = sorted({row.label for row in _rows(recipe, "train")})
    if len(set(labels)) < max(2, len(labels)):
        raise TextError(f"data.labels: expected two labels or more that differ, got {', '.join(labels[:6]) or 'none'}")
    return TextTask(tuple(labels), tuple(data.metrics))


def vocabulary_of(recipe: schema.TextRecipe) -> Vocabulary:
    """From its file, or learned from the training split: the same texts give the same one."""
    from distillkit.text.vocabulary import Vocabulary

    wanted = recipe.data.vocabulary
    if isinstance(wanted, str):
        return Vocabulary.read(wanted)
    return _learned(tuple(text for row in _rows(recipe, "train") for text in row.texts), wanted)


@lru_cache(maxsize=2)
def _learned(texts: tuple[str, ...], size: int) -> Vocabulary:
    from distillkit.text.vocabulary import learn_vocabulary

    return learn_vocabulary(texts, size)


def _rows(recipe: schema.TextRecipe, split: str) -> list[Sentence]:
    from distillkit.text.glue import glue_rows
    from distillkit.text.sentences import read_rows

    data, source = recipe.data, source_of(recipe, split)
    if isinstance(data, schema.GlueData):
        return glue_rows(data.task, data.root, source)
    return read_rows(Path(source), data.label_column, data.text_columns, header=False)


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("tokenizers") is None:
        raise ImportError(f"tokenizers, which comes with transformers, is not installed: {INSTALL}")
