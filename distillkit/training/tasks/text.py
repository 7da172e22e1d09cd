"""Sentences and pairs of them: what a run asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from distillkit.data.problems import Problem
from distillkit.evaluation.predict import Progress, evaluating, in_order
from distillkit.schema import TextRecipe
from distillkit.training import checkpoint, class_figures
from distillkit.training.build import Classes
from distillkit.training.build.text_data import task_of, vocabulary_of
from distillkit.training.errors import RunError
from distillkit.training.processes import processes
from distillkit.training.tasks import Asked, Exported, Section, Trained

DRY = 4
DROP_LAST = False
#: below a row's folder: what ``from_pretrained`` reads, and the vocabulary
PRETRAINED, VOCABULARY = "pretrained", "vocab.txt"


def batches(recipe: TextRecipe, student: nn.Module, classes: int) -> dict[str, Any]:
    from distillkit.text.sentences import as_call, padded

    _check_words(recipe, student)
    return {"collate": padded, "call": as_call}


def _check_words(recipe: TextRecipe, model: nn.Module) -> None:
    """Raises RunError for a model with fewer words than the vocabulary has pieces, or fewer positions than samples have
    tokens."""
    config: Any = getattr(model, "config", None)
    words, pieces = getattr(config, "vocab_size", None), len(vocabulary_of(recipe))
    if words is not None and words < pieces:
        raise RunError(
            f"{type(model).__name__} knows {words} words, data.vocabulary has {pieces}: give it options: "
            f"{{vocab_size: {pieces}}}, or the data the vocabulary that it was trained with"
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and most < recipe.data.length:
        raise RunError(f"{type(model).__name__} has {most} positions, and data.length is {recipe.data.length}")


def find(
    recipe: TextRecipe,
    model: nn.Module,
    data: Any,
    batch: int,
    device: torch.device | str,
    progress: Progress | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Logits (C,) and label of every sample."""
    from distillkit.text.sentences import padded

    _check_words(recipe, model)
    found: list[dict[str, Any]] = []
    with evaluating(model), torch.inference_mode():
        for items in in_order(data, batch, workers):
            ids, rest = padded(items)
            rest.pop("labels")
            call = {name: value.to(device) for name, value in rest.items()}
            logits = model(input_ids=ids.to(device), **call).logits.float().cpu()
            found += [{"logits": row, "label": target["label"]} for row, (_, target) in zip(logits, items, strict=True)]
            if progress is not None:
                progress(len(found), len(data))
    return found


def whole(recipe: TextRecipe, found: Sequence[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    return list(found)


def judge(recipe: TextRecipe, found: Sequence[dict[str, Any]], data: Any) -> Any:
    from distillkit.text.metrics import text_metrics

    return text_metrics(found, task_of(recipe))


def check_taught(split: str, data: Any) -> None:
    """Every row has a label."""


def check_judged(split: str, data: Any) -> None:
    """Every row has a label."""


def read_files(recipe: TextRecipe, split: Any, progress: Progress | None = None) -> Iterator[Problem]:
    """What can be wrong is said where the set is built."""
    yield from ()


def doubts(recipe: TextRecipe) -> Iterator[tuple[str, str]]:
    yield from ()


def further(jobs: Any, row: Any, model: Any) -> dict[str, Any]:
    """The row's model as ``from_pretrained`` reads it, with its vocabulary."""
    folder = jobs.folders[row.row] / PRETRAINED
    if processes().is_main_process and hasattr(model, "save_pretrained") and not (folder / VOCABULARY).exists():
        model.save_pretrained(folder)
        vocabulary_of(jobs.recipe).write(folder / VOCABULARY)
    return {}


def figures(recipe: TextRecipe, trained: Trained) -> Iterator[Section]:
    split, data = recipe.evaluate.split, trained.data
    scores = {job: checkpoint.read_json(path / f"scores-{split}.json") for job, path in trained.jobs.items()}
    if all("confusion" in s for s in scores.values()):
        yield Section(
            "Confusion",
            f"Which class each class of the {split} split is taken for: rows are the true classes, and add up to 1.",
            "confusion",
            class_figures.confusion({job: s["confusion"] for job, s in scores.items()}, data.classes),
        )


def predict(recipe: TextRecipe, model: nn.Module, data: Classes, asked: Asked) -> list[dict[str, Any]]:
    """Writes predictions.json alone: of each line of text files, by tabs where it is a pair, the five likeliest classes
    and their probabilities; of a regression its value."""
    from distillkit.text.corpus import lines_of
    from distillkit.text.sentences import Sentence, Sentences, TextTask, padded

    task, rows = task_of(recipe), []
    for path in asked.images:
        sentences = [
            Sentence(tuple(line.split("\t")[:2]), "0", f"{path}:{i}") for i, line in enumerate(lines_of(path), 1)
        ]
        samples = Sentences(sentences, TextTask(("0",)), vocabulary_of(recipe), recipe.data.length)
        for i, sentence in enumerate(sentences):
            ids, rest = padded([samples[0, i]])
            rest.pop("labels")
            device = processes().device
            with torch.inference_mode():
                logits = model(ids.to(device), **{name: value.to(device) for name, value in rest.items()}).logits[0]
            rows.append({"file": str(path), "text": " | ".join(sentence.texts), **_said(logits, task, data.classes)})
            if asked.progress is not None:
                asked.progress(str(path), i + 1, len(sentences))
    asked.folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(asked.folder / "predictions.json", rows)
    return rows


def _said(logits: torch.Tensor, task: Any, classes: Sequence[str]) -> dict[str, Any]:
    if task.classes is None:
        return {"score": task.least + float(logits[0]) * (task.most - task.least)}
    probabilities, labels = logits.float().softmax(0).sort(descending=True, stable=True)
    best = zip(probabilities[:5].tolist(), labels[:5].tolist(), strict=True)
    return {"classes": [{"class": classes[i], "probability": p} for p, i in best]}


def exported(recipe: TextRecipe, student: nn.Module, data: Classes) -> Exported:
    raise RunError(
        f"models of text are not exported so; a run leaves each row's in its folder {PRETRAINED}, for from_pretrained "
        "of transformers and whatever reads that"
    )
