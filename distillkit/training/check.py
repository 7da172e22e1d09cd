"""What stands behind `distillkit check` once the recipe itself is right: data, models, one step of every row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from distillkit.core.distiller import Distiller
from distillkit.core.result import OUTPUT
from distillkit.data.label_store import LabelMapError, LabelStore
from distillkit.data.problems import DataError
from distillkit.data.sampler import collate
from distillkit.schema import Recipe
from distillkit.training import build, checkpoint
from distillkit.training.batches import batches, drop_last
from distillkit.training.errors import RunError
from distillkit.training.evaluate import Share, check_submission
from distillkit.training.loop import as_they_are, check_settings
from distillkit.training.possible import (
    Planned,
    check_optimizer,
    check_teacher,
    planned,
    teacher_place,
)
from distillkit.training.tasks import task_of
from distillkit.training.tiles import cut_tiles

#: (what is being read, how many of it are done, how many there are)
Progress = Callable[[str, int, int], None]

SPLITS = ("train", "val", "test")


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
    """Read all data, build all models, make one training step of every row and score it on two pictures.

    Findings are given as they are made, and nothing is written but the tiles that the run needs too. Adapters compare
    what they tap with the detectors' own predictions in the step, as in training.
    """
    with _quiet_data():
        data: dict[str, build.DetectionData] = {}
        usable: Sequence[str] = []
        for split in SPLITS:
            if (yield from _read(recipe, split, progress)):
                usable = [*usable, split]
        if getattr(recipe.data, "tiles", None) is not None:
            usable = yield from _tiles(recipe, usable, progress)
        for split in usable:
            yield from _data(recipe, split, data)
        yield from (Finding("warning", where, what) for where, what in task_of(recipe).doubts(recipe))
        if "train" in data:
            yield from _together(recipe, data)
            yield from _models(recipe, data)


@contextmanager
def _quiet_data() -> Iterator[None]:
    """What data sets warn of is listed as findings."""
    log = logging.getLogger("distillkit.data")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _read(recipe: Recipe, split: Any, progress: Progress | None) -> Generator[Finding, None, bool]:
    """All problems of a split's files; whether it can be used."""
    where = f"data.{split}"
    usable = True
    seen = (lambda done, total: progress(where, done, total)) if progress else None
    for problem in task_of(recipe).read_files(recipe, split, seen):
        usable = usable and not problem.fatal
        yield Finding("error" if problem.fatal else "warning", where, str(problem))
    return usable


def _tiles(recipe: Recipe, usable: Sequence[str], progress: Progress | None) -> Generator[Finding, None, Sequence[str]]:
    """Cut what a run cuts; the splits whose tiles are there then. None of a split that cannot be used: it was said."""
    needed = [split for split in SPLITS if split in ("train", "val", recipe.evaluate.split)]
    if not set(needed) <= set(usable):
        return []
    try:
        for split, cut in cut_tiles(recipe, needed, progress).items():
            what = f"{split}: {cut.tiles} tiles of {cut.pictures} pictures, with {cut.objects} objects"
            yield Finding("ok", "data.tiles", what)
    except Exception as error:
        yield _failed("data.tiles", error)
        return []
    return needed


def _data(recipe: Recipe, split: Any, built: dict[str, build.DetectionData]) -> Iterator[Finding]:
    """It goes into ``built`` if it can be read."""
    where = f"data.{split}"
    if getattr(recipe.data, split, "custom") is None:
        return
    try:
        dataset = build.build_data(recipe, split, augmented=split == "train")
        if not len(dataset):
            raise RunError("no picture has an object that is to be learned, and skip_empty leaves out all others")
        dataset[0, 0]
    except DataError as error:
        yield from (Finding("error", where, str(problem)) for problem in error.problems)
        return
    except Exception as error:
        yield _failed(where, error)
        return
    built[split] = dataset
    yield Finding("ok", where, f"{len(dataset)} pictures, {len(dataset.classes)} classes")
    if isinstance(maps := getattr(dataset, "maps", None), LabelStore):
        yield _checked_maps(maps)


def _checked_maps(maps: LabelStore) -> Finding:
    """Stored label maps, all of which are read."""
    try:
        maps.check(checksums=True)
    except LabelMapError as error:
        return _failed("data.label_maps", error)
    by = maps.info.annotator
    cells = " x ".join(map(str, maps.grid))
    what = f"{len(maps)} maps of {cells} cells by {by.name} (weights {by.sha256[:12]}), no byte changed"
    return Finding("ok", "data.label_maps", what)


def _together(recipe: Recipe, data: Mapping[str, build.DetectionData]) -> Iterator[Finding]:
    """Splits that are right by themselves, and cannot be used for this run."""
    first = data["train"].classes
    for split, dataset in data.items():
        if dataset.classes != first:
            what = f"its classes are {dataset.classes}, those of data.train are {first}"
            yield Finding("error", f"data.{split}", what)
    trained = any(step.train.epochs for step in planned(recipe))
    task = task_of(recipe)
    for right, split, wanted in (
        (task.check_taught, "train", trained),
        (task.check_judged, recipe.evaluate.split, True),
    ):
        if wanted and split in data:
            try:
                right(split, data[split])
            except Exception as error:
                yield _failed(f"data.{split}", error)
    if recipe.evaluate.split in data:
        try:
            check_submission(recipe, data[recipe.evaluate.split])  # type: ignore[arg-type]
        except Exception as error:
            yield _failed("evaluate.submission", error)


def _models(recipe: Recipe, data: Mapping[str, build.DetectionData]) -> Iterator[Finding]:
    names = data["train"].classes
    trained = {step.where for step in planned(recipe)}
    teachers: dict[str, nn.Module] = {}
    for name, config in build.teacher_configs(recipe).items():
        where = teacher_place(name)
        try:
            check_teacher(where, config, names)
            teachers[name] = build.build_model(config, names, recipe.evaluate, recipe.data.size)
            if where not in trained:
                if build.own_classes(config) in (None, names):
                    _score(recipe, teachers[name], data)
                said = build.said_of_classes(config, len(names))
                yield Finding("ok", where, _described(teachers[name]) + said)
        except Exception as error:
            yield _failed(where, error)
    if len(teachers) < len(build.teacher_configs(recipe)):
        return
    for step in planned(recipe):
        try:
            yield from _rehearsed(recipe, step, teachers, data)
        except Exception as error:
            yield _failed(step.where, error)


def _rehearsed(
    recipe: Recipe, step: Planned, teachers: Mapping[str, nn.Module], data: Mapping[str, build.DetectionData]
) -> Iterator[Finding]:
    """Build the model and make one step forward and back, as training does, from the same first weights; score it."""
    taught = step.recipe
    train = data["train"] if taught is recipe else build.build_data(taught, "train", augmented=True)
    if taught.task != recipe.task:  # what learns from this recipe's masks
        data = {"val": build.build_data(taught, "val", augmented=False)}
    check_settings(step.train, len(train), taught.data.batch, drop_last(taught))
    classes = len(train.classes)
    checkpoint.seed_everything(recipe.seed)
    if step.train.epochs:
        build.check_start(step.model)
    model = build.build_model(step.model, train.classes, taught.evaluate, taught.data.size)
    distillers = build.build_distillers(taught, step.distillers, classes, step.train)
    items = [train[0, i] for i in range(min(task_of(taught).DRY, taught.data.batch, len(train)))]
    wrapped = build.build_wrapped(taught, model, teachers, distillers, train.classes)
    try:
        check_optimizer(step, wrapped)
        wrapped.train()
        how = batches(taught, model, classes)
        pictures, targets = how.get("collate", collate)(items)
        if prepare := how.get("prepare"):
            pictures, targets = prepare(pictures, targets)
        args, kwargs = how.get("call", as_they_are)(pictures, targets)
        losses = wrapped(*args, **kwargs)
        losses.total.backward()
        wrapped.check_finite()
    finally:
        wrapped.unwrap()
    values = {name: value.item() for name, value in losses.items() if name != OUTPUT}
    _score(taught, model, data)
    said = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    where = build.said_of_classes(step.model, classes)
    yield Finding("ok", step.where, f"{_described(model)}{where}; one step: {said}")
    boxes = sum(len(target.get("boxes", ())) for _, target in items)
    idle = [name for name, value in values.items() if value == 0 and name not in _zero_at_first(distillers)]
    if boxes and idle:
        what = (
            f"exactly 0 on {len(items)} pictures with {boxes} boxes: {', '.join(idle)}. If that goes on, nothing is "
            "learned from it: compare the model's strides and anchors with the size of the boxes, and the regions of "
            "the distillers with what they should cover"
        )
        yield Finding("warning", step.where, what)


def _zero_at_first(distillers: Iterable[Distiller]) -> set[str]:
    """Distillers whose first loss is rightly 0: their weight rises from 0, or they learn from the student's average."""
    start = torch.zeros((), dtype=torch.int64)
    return {d.name for d in distillers if float(d.weight.at(start)) == 0 or d.own_teacher() is not None}


def _score(recipe: Recipe, model: nn.Module, data: Mapping[str, build.DetectionData]) -> None:
    """Score a model on the first and the last picture of val, where val can be read."""
    if "val" not in data:
        return
    val = data["val"]
    try:
        task, few = task_of(recipe), Share(val, 0, max(1, len(val) - 1))
        found = task.find(recipe, model, few, batch=len(few), device="cpu")
        task.judge(recipe, task.whole(recipe, found, val), val)
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise RunError(f"cannot be scored on pictures of data.val: {kind}{error}") from error


def _described(model: nn.Module) -> str:
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def _failed(where: str, error: Exception) -> Finding:
    """Any exception ends one check and not the others; those that no one foresaw are told by their type."""
    foreseen = isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("distillkit")
    return Finding("error", where, str(error) if foreseen else f"{type(error).__name__}: {error}")
