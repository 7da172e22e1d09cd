"""What stands behind `distillkit check` once the recipe itself is right: data, models, one step of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from distillkit import recipe as schema
from distillkit.core.result import OUTPUT
from distillkit.data.check import check_dataset
from distillkit.data.coco import read_coco
from distillkit.data.detection import Split
from distillkit.data.voc import read_voc
from distillkit.recipe import Recipe
from distillkit.training import build, checkpoint

#: (what is being read, how many of it are done, how many there are)
Progress = Callable[[str, int, int], None]

#: pictures of a dry step
PICTURES = 2


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Args:
        level: ok; warning: a run goes on and does what is said; error: a run would stop.
        where: the part of the recipe, e.g. "data.train".
        what: what was found.
    """

    level: Literal["ok", "warning", "error"]
    where: str
    what: str


def check(recipe: Recipe, progress: Progress | None = None) -> Iterator[Finding]:
    """Read all data, build all models and make one training step of every row; findings as they are made.

    Nothing is written. Adapters compare what they tap with the detectors' own predictions in the step, as in training.
    """
    classes: dict[str, list[str]] = {}
    for split in ("train", "val", "test"):
        yield from _data(recipe, split, classes, progress)
    first = next(iter(classes.values()), None)
    for split, names in classes.items():
        if names != first:
            yield Finding("error", f"data.{split}", f"its classes are {names}, those of another split are {first}")
    if first is not None and "train" in classes:
        yield from _models(recipe, len(first))


def _data(recipe: Recipe, split: Any, classes: dict[str, list[str]], progress: Progress | None) -> Iterator[Finding]:
    """All of a split's problems; its class names go into ``classes`` if it can be used."""
    where, data = f"data.{split}", recipe.data
    if getattr(data, split, "custom") is None:
        return
    usable = True
    if isinstance(data, schema.CocoData | schema.VocData):
        annotations = _annotations(data, split)
        seen = (lambda done, total: progress(where, done, total)) if progress else None
        for problem in check_dataset(annotations, seen):
            usable = usable and not problem.fatal
            yield Finding("error" if problem.fatal else "warning", where, str(problem))
    if not usable:
        return
    try:
        dataset = build.build_data(recipe, split, augmented=split == "train")
        dataset[(0, 0)]
    except Exception as error:
        yield _failed(where, error)
        return
    classes[split] = list(dataset.classes)
    yield Finding("ok", where, f"{len(dataset)} pictures, {len(dataset.classes)} classes")


def _annotations(data: schema.CocoData | schema.VocData, split: Any) -> Split:
    if isinstance(data, schema.CocoData):
        return read_coco(data.root, getattr(data, split), data.images.format(split=split))
    return read_voc(data.root, getattr(data, split), data.classes)


def _models(recipe: Recipe, classes: int) -> Iterator[Finding]:
    teachers: dict[str, nn.Module] = {}
    for name, config in build.teacher_configs(recipe).items():
        where = name if name == "teacher" else f"teachers.{name}"
        try:
            teachers[name] = build.build_model(config, classes, recipe.evaluate)
        except Exception as error:
            yield _failed(where, error)
        else:
            yield Finding("ok", where, _described(teachers[name]))
    if len(teachers) < len(build.teacher_configs(recipe)):
        return
    for i, row in enumerate(recipe.compare):
        where = f"compare.{i} ({row.row})"
        try:
            yield Finding("ok", where, _step(recipe, row, classes, teachers))
        except Exception as error:
            yield _failed(where, error)


def _step(recipe: Recipe, row: schema.Row, classes: int, teachers: Mapping[str, nn.Module]) -> str:
    """Build the row's student and make one step forward and back, as training does, from the same first weights."""
    checkpoint.seed_everything(recipe.seed)
    student = build.build_model(schema.student_of(recipe, row.student), classes, recipe.evaluate)
    distillers = build.build_distillers(recipe, row.distillers, classes)
    wrapped = build.build_wrapped(recipe, student, teachers, distillers)
    try:
        data = build.build_data(recipe, "train", augmented=True)
        items = [data[(0, i)] for i in range(min(PICTURES, len(data)))]
        wrapped.train()
        losses = wrapped([image for image, _ in items], [target for _, target in items])
        losses.total.backward()
        wrapped.check_finite()
    finally:
        wrapped.unwrap()
    said = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items() if name != OUTPUT)
    return f"{_described(student)}; one step: {said}"


def _described(model: nn.Module) -> str:
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def _failed(where: str, error: Exception) -> Finding:
    """Any exception ends one check and not the others; those that no one foresaw are told by their type."""
    foreseen = isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("distillkit")
    return Finding("error", where, str(error) if foreseen else f"{type(error).__name__}: {error}")
