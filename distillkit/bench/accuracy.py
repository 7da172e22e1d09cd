"""Does a student learn more with a distiller than alone? Small, seeded, on generated scenes, in minutes.

A teacher of each task is trained once; then every row from the same weights and batches of a seed, as often as there
are seeds. A row with its seed is one job, in a process of its own: no number depends on how many run at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import distillkit
from distillkit import DIST, DKD, LD, AttentionTransfer, FeatureImitation, LogitKD, Main, RelationalKD, Valuable
from distillkit.bench.contenders import quietly
from distillkit.bench.suite import Result, Table, Tell, silent
from distillkit.data.scenes import Scenes
from distillkit.evaluation.coco import coco_metrics
from distillkit.models.gfl import GFL

SEEDS = {True: 3, False: 5}  # in quick form, and else
PROCESSES = min(2, os.cpu_count() or 1)
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
Distillers = Callable[[], list[distillkit.Distiller]]


@dataclass(frozen=True)
class Task:
    """``score`` is a share, 0..1, called ``name``. ``steps``: of the teacher and of a row, in quick form."""

    about: str
    name: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    score: Callable[[nn.Module], float]
    pictures: Callable[[str, int], Batch]
    rows: dict[str, Distillers]
    train: int
    steps: tuple[int, int]
    batch: int
    lr: float


def run(quick: bool, rounds: int, tell: Tell = silent) -> Result:
    seeds = SEEDS[quick]
    jobs = [(task, row, seed) for task, of in TASKS.items() for seed in range(seeds) for row in ("alone", *of.rows)]
    scores: dict[tuple[str, str], dict[int, float]] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(PROCESSES, context) as pool:
        tell("teachers", 0, len(jobs))
        teachers = dict(zip(TASKS, pool.map(taught_once, TASKS, [folder] * 2, [quick] * 2), strict=True))
        running = {pool.submit(trained, *job, folder, quick): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(running)):
                task, row, seed = running[future]
                scores.setdefault((task, row), {})[seed] = future.result()
                tell(row, done + 1, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = {name: [scores[name][seed] for seed in range(seeds)] for name in sorted(scores)}
    return Result(
        "Does a student learn more with a distiller than alone? Mean and deviation of the scores over the seeds, in "
        "per cent; the gain over the student alone, seed by seed; and how much of the gap from it to the teacher that "
        "is. Pictures are generated, networks tiny, trainings short, and weights untuned: the table shows what teaches "
        "at all under these conditions, not which distiller to choose.",
        [table(name, teachers[name], found, seeds) for name in TASKS],
        [],
        {
            name: {
                "teacher": teachers[name],
                **{row: found[name, row] for row in ("alone", *TASKS[name].rows)},
            }
            for name in TASKS
        },
    )


def table(name: str, teacher: float, found: dict[tuple[str, str], list[float]], seeds: int) -> Table:
    task, alone = TASKS[name], found[name, "alone"]
    rows = [["teacher", f"{100 * teacher:.1f}", "", ""], ["student alone", spread(alone), "", ""]]
    for row in task.rows:
        gains = [ours - without for ours, without in zip(found[name, row], alone, strict=True)]
        closed = mean(gains) / (teacher - mean(alone))
        rows.append([row, spread(found[name, row]), spread(gains, "+.1f"), f"{100 * closed:.0f} %"])
    head = ["student", task.name, "gain, same seed", "gap to the teacher closed"]
    return Table(name, head, rows, f"{task.about} Seeds 0 to {seeds - 1}.")


def spread(values: Sequence[float], form: str = ".1f") -> str:
    return f"{100 * mean(values):{form}} ± {100 * stdev(values):.1f}"


# ---- jobs


def taught_once(name: str, folder: str, quick: bool) -> float:
    """Trains a teacher and leaves it in the folder; its score."""
    torch.set_num_threads(1)
    task = TASKS[name]
    torch.manual_seed(0)
    teacher = task.teacher()
    fit(task, teacher, own_loss(task, teacher), 0, task.steps[0] * (1 if quick else 2))
    torch.save(teacher.state_dict(), Path(folder) / name)
    return task.score(teacher.eval())


def trained(name: str, row: str, seed: int, folder: str, quick: bool) -> float:
    """The score of a student of one row and seed."""
    torch.set_num_threads(1)
    task = TASKS[name]
    torch.manual_seed(seed)
    student = task.student()
    with quietly():
        if row == "alone":
            fit(task, student, own_loss(task, student), seed, task.steps[1] * (1 if quick else 2))
        else:
            teacher = task.teacher()
            teacher.load_state_dict(torch.load(Path(folder) / name, weights_only=True))
            criterion = cross_entropy if name == CLASSES else None
            model = distillkit.wrap(student, teacher.eval(), task.rows[row](), criterion=criterion).train()
            loss = lambda call: model(*call).total  # noqa: E731
            fit(task, model, loss, seed, task.steps[1] * (1 if quick else 2))
    return task.score(student.eval())


def own_loss(task: Task, model: nn.Module) -> Callable[[Any], Tensor]:
    if task is TASKS[CLASSES]:
        return lambda call: cross_entropy(model(call[0]), call[1])
    return lambda call: torch.stack(list(model(*call).values())).sum()


def fit(task: Task, model: nn.Module, loss: Callable[[Any], Tensor], seed: int, steps: int) -> None:
    pictures, targets = task.pictures("train", task.train)
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), task.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (task.batch,), generator=drawn).tolist()
        call: Any = [pictures[i] for i in chosen], [targets[i] for i in chosen]
        if task is TASKS[CLASSES]:
            call = torch.stack(call[0]), torch.stack([target["labels"][0] for target in call[1]])
        loss(call).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 20)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


# ---- detection

SMALL: dict[str, Any] = {"channels": 32, "convs": 1, "groups": 8, "strides": (4, 8, 16), "bins": 9}
TESTED = 100


@lru_cache
def scenes(split: str, count: int) -> Batch:
    """Of one class: a digit, whichever."""
    items = [Scenes(count, 64, split=split, digits=(1, 3))[0, i] for i in range(count)]
    return [x for x, _ in items], [{"boxes": t["boxes"], "labels": torch.zeros_like(t["labels"])} for _, t in items]


@torch.no_grad()
def average_precision(model: nn.Module) -> float:
    pictures, _ = scenes("test", TESTED)
    truth = Scenes(TESTED, 64, split="test", digits=(1, 3)).to_coco_json()
    for row in truth["annotations"]:
        row["category_id"] = 1
    truth["categories"] = [{"id": 1, "name": "digit"}]
    rows = [
        {"image_id": start + i + 1, "category_id": 1, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for start in range(0, TESTED, 25)
        for i, found in enumerate(model(pictures[start : start + 25]))
        for (x1, y1, x2, y2), score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True)
    ]
    return coco_metrics(rows, truth).ap


# ---- classification


class Net(nn.Sequential):
    """Three strided convolutions, BatchNorm, mean over places, a linear layer."""

    def __init__(self, width: int):
        widths = (3, width, 2 * width, 4 * width)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


@lru_cache
def digits(split: str, count: int) -> Batch:
    """The pictures of the digits of scenes: what is in their boxes, at 24 x 24."""
    pictures, targets = [], []
    scenes = Scenes(count, 64, split=split, digits=(1, 3))
    for i in range(count):
        image, target = scenes[0, i]
        for (x1, y1, x2, y2), label in zip(target["boxes"].long().tolist(), target["labels"], strict=True):
            crop = image[None, :, y1:y2, x1:x2]
            pictures.append(interpolate(crop, (24, 24), mode="bilinear", antialias=True)[0] - 0.5)
            targets.append({"labels": label[None]})
    return pictures, targets


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    pictures, targets = digits("test", 500)
    labels = torch.stack([target["labels"][0] for target in targets])
    return (model(torch.stack(pictures)).argmax(1) == labels).double().mean().item()


DETECTION, CLASSES = "Detection", "Classification"
TASKS = {
    DETECTION: Task(
        "Finding digits on photographs, 64 x 64; GFL on timm's resnet10t teaches GFL on its test_resnet.",
        "AP",
        lambda: GFL(1, "resnet10t", **SMALL),
        lambda: GFL(1, "test_resnet", **SMALL),
        average_precision,
        scenes,
        {
            "LD main + valuable": lambda: [LD(Main()), LD(Valuable())],
            "LD main + valuable, class KD": lambda: [
                LD(Main()),
                LD(Valuable()),
                LogitKD(Main(), protocol="sigmoid", temperature=2.0, weight=5.0),
            ],
            "feature imitation, fine-grained": lambda: [FeatureImitation("fine-grained")],
        },
        train=512,
        steps=(220, 110),
        batch=8,
        lr=4e-3,
    ),
    CLASSES: Task(
        "Which digit is on a piece of a photograph, 24 x 24; a small convolutional network, taught by a wider one.",
        "accuracy",
        lambda: Net(32),
        lambda: Net(8),
        accuracy,
        digits,
        {
            "class KD": lambda: [LogitKD(temperature=4.0)],
            "DKD": lambda: [DKD()],
            "DIST": lambda: [DIST()],
            "feature imitation": lambda: [FeatureImitation(student_at="2", teacher_at="2")],
            "attention transfer": lambda: [AttentionTransfer(student_at="2", teacher_at="2")],
            "relational KD": lambda: [RelationalKD(student_at="4", teacher_at="4")],
        },
        train=512,
        steps=(600, 500),
        batch=32,
        lr=4e-3,
    ),
}
