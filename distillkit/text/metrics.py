"""The metrics of GLUE's tasks. Values are shares, or correlations from -1 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from distillkit.evaluation.classes import ClassRow, class_metrics
from distillkit.text.sentences import TextTask


@dataclass(frozen=True)
class TextResult:
    """numbers: score, the mean of the task's metrics, these by name, and loss. classes: of each class by name; none of
    a regression. confusion: (C, C), rows of class row that were called column."""

    numbers: dict[str, float]
    classes: dict[str, ClassRow]
    confusion: np.ndarray | None


def text_metrics(found: Sequence[dict[str, Any]], task: TextTask) -> TextResult:
    """How right predictions are.

    Args:
        found: of each row "logits" (C,), of a regression (1,), and "label".

    Raises ValueError where there is no prediction, or another number of classes.
    """
    if task.classes is None:
        if not found:
            raise ValueError("there is no prediction to score")
        said = np.array([float(f["logits"][0]) for f in found])
        wanted = np.array([float(f["label"]) for f in found])
        values = {name: METRICS[name](said, wanted) for name in task.metrics}
        loss = float(np.square(said - wanted).mean())
        return TextResult({"score": _mean(values), **values, "loss": loss}, {}, None)
    result = class_metrics(found, task.names)
    labels = np.array([f["label"] for f in found])
    logits = torch.stack([f["logits"] for f in found])
    said = np.where(logits.isfinite().all(1), logits.nan_to_num(-torch.inf).argmax(1), (labels + 1) % len(task.names))
    values = {name: METRICS[name](said, labels) for name in task.metrics}
    numbers = {"score": _mean(values), **values, "loss": result.numbers["loss"]}
    return TextResult(numbers, result.classes, result.confusion)


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def accuracy(said: np.ndarray, wanted: np.ndarray) -> float:
    return float((said == wanted).mean())


def f1(said: np.ndarray, wanted: np.ndarray) -> float:
    """Of class 1; 0 where nobody names it."""
    hits = float(((said == 1) & (wanted == 1)).sum())
    total = float((said == 1).sum() + (wanted == 1).sum())
    return 2 * hits / total if total else 0.0


def matthews(said: np.ndarray, wanted: np.ndarray) -> float:
    """Correlation of two classes; 0 where one of them is never named."""
    return pearson((said == 1).astype(float), (wanted == 1).astype(float))


def pearson(said: np.ndarray, wanted: np.ndarray) -> float:
    """0 where one side is the same everywhere, of which there is no correlation."""
    return float(np.corrcoef(said, wanted)[0, 1]) if np.ptp(said) and np.ptp(wanted) else 0.0


def spearman(said: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's of the ranks; equal values share theirs."""
    return pearson(stats.rankdata(said), stats.rankdata(wanted))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}
