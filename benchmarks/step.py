"""A training step against the ideal: student forward and backward, teacher forward, and nothing else.

Both run the same model, in the same memory: of two equal copies one is a few per cent faster, for as long as they live.
The ideal calls the student past its wrapper, where the taps record nothing.
"""

from __future__ import annotations

import copy
import gc
import random
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from torch.nn.functional import cross_entropy

import distillkit
from benchmarks.machine import table
from distillkit import LD, FeatureImitation, LogitKD, Main, Teacher, Valuable
from distillkit.models.dense import Inference
from distillkit.models.gfl import GFL
from tests.counting import Dispatched, live_bytes, without_cpu_checks

Step = Callable[[], None]


def classifiers() -> dict[str, Step]:
    """ResNet-50 teaches ResNet-18 by logits, 16 pictures of 96 x 96."""
    torch.manual_seed(0)
    student, teacher = timm.create_model("resnet18", num_classes=100), timm.create_model("resnet50", num_classes=100)
    teacher.eval()
    x, y = torch.randn(16, 3, 96, 96), torch.randint(0, 100, (16,))
    cheap = Teacher(copy.deepcopy(teacher), dtype=torch.bfloat16, fold_bn=True)

    def ideal() -> None:
        with torch.no_grad():
            teacher(x)
        cross_entropy(student(x), y).backward()
        student.zero_grad(set_to_none=True)

    def ours(student: torch.nn.Module, teacher: torch.nn.Module | Teacher) -> Step:
        model = distillkit.wrap(student, teacher, [LogitKD(temperature=4)], criterion=cross_entropy)

        def step() -> None:
            model(x, y).total.backward()
            model.zero_grad(set_to_none=True)

        return step

    return {
        "ideal": ideal,
        "ideal again": ideal,
        "distillkit, teacher in bf16, BatchNorm folded": ours(copy.deepcopy(student), cheap),
        "distillkit": ours(student, teacher),
    }


def detectors(size: int = 320, batch: int = 2) -> dict[str, Step]:
    """GFL-R50 teaches GFL-R18, 80 classes, 2 pictures of 320 x 320 with 10 objects each."""
    torch.manual_seed(0)
    student, teacher = GFL(80, "resnet18"), GFL(80, "resnet50").eval()
    for model in (student, teacher):
        model.inference = Inference(score=0.0)  # so that they predict something, and are proven at call 1
    images = [torch.rand(3, size, size) for _ in range(batch)]
    corner, side = torch.rand(batch, 10, 2) * size * 0.7, torch.rand(batch, 10, 2) * size * 0.25 + 8
    targets = [{"boxes": torch.cat([c, c + s], 1), "labels": torch.randint(0, 80, (10,))} for c, s in zip(corner, side)]

    def ideal(student: GFL, teacher_forward: Callable[[], object]) -> Step:
        def step() -> None:
            with torch.no_grad():
                teacher_forward()
            sum(student(images, targets).values()).backward()
            student.zero_grad(set_to_none=True)

        return step

    def ours(student: GFL, distillers: list[distillkit.Distiller]) -> Step:
        model = distillkit.wrap(student, teacher, distillers)

        def step() -> None:
            model(images, targets).total.backward()
            model.zero_grad(set_to_none=True)

        return step

    whole, neck = lambda: teacher.head(teacher.features(images)), lambda: teacher.features(images)
    other = copy.deepcopy(student)
    return {
        "ideal": ideal(student, whole),
        "ideal again": ideal(student, whole),
        "distillkit: LD main + LD valuable + class KD": ours(
            student, [LD(Main()), LD(Valuable()), LogitKD(Main(), weight=10.0)]
        ),
        "ideal, teacher's features only": ideal(other, neck),
        "distillkit: feature imitation": ours(other, [FeatureImitation("whole")]),
    }


#: what each contender is held against, where that is not "ideal"
AGAINST = {"distillkit: feature imitation": "ideal, teacher's features only"}


HEAD = ["step", "median CPU ms", "over", "ratio", "middle half of the rounds"]


def race(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of this process for every step, by name, one number a round; one unmeasured round first.

    In a round the contenders take turns in an order shuffled anew, and then in that order backwards: what drifts, such
    as the processor's clock, weighs on all of them alike. A number is the mean of the two.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(0)
    for turn in range(rounds + 1):
        order = orders.sample(list(steps), len(steps))
        took = dict.fromkeys(steps, 0.0)
        for name in order + order[::-1]:
            gc.disable()
            begin = time.process_time()
            steps[name]()
            took[name] += (time.process_time() - begin) / 2
            gc.enable()
        if turn:
            for name, value in took.items():
                seconds[name].append(value)
    return seconds


def rows_of(seconds: dict[str, list[float]]) -> list[list[str]]:
    rows = []
    for name, took in seconds.items():
        against = AGAINST.get(name, "ideal")
        ratios = sorted(a / b for a, b in zip(took, seconds[against], strict=True))
        spread = f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}"
        rows.append([name, f"{1000 * median(took):.0f}", against, f"{median(ratios):.3f}", spread])
    return rows


def counted() -> list[list[str]]:
    """What does not depend on the clock: host syncs on the accelerator path, and what is kept after a step."""
    torch.manual_seed(0)
    options = {"channels": 32, "convs": 1, "groups": 8, "strides": (8, 16, 32)}
    student, teacher = GFL(5, "resnet10t", **options), GFL(5, "resnet10t", **options)
    images = [torch.rand(3, 96, 96)]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}]
    with without_cpu_checks(), Dispatched() as alone:
        sum(student(images, targets).values()).backward()
    model = distillkit.wrap(
        student, teacher, [LD(Main(), dense=True), LD(Valuable(), dense=True), LogitKD(Main(), dense=True)]
    )

    def step() -> None:
        model(images, targets).total.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(2):  # at calls 1 and 2 an adapter looks at what the model predicts, which waits
        step()
    with without_cpu_checks(), Dispatched() as ours:
        step()
    before = live_bytes()
    for _ in range(10):
        step()
    return [
        ["host syncs of the student alone", str(alone.syncs.total())],
        [
            "host syncs added by LD main + LD valuable + class KD (accelerator path)",
            str(ours.syncs.total() - alone.syncs.total()),
        ],
        ["bytes of tensors alive after 10 more steps, less those alive before", str(live_bytes() - before)],
    ]


def tables(rounds: int) -> list[str]:
    """A Markdown table of each pair, and one of what is counted. The classifiers' steps are short: more rounds."""
    races = [
        f"{make.__doc__}\n\n{table(HEAD, rows_of(race(make(), turns)))}"
        for make, turns in ((classifiers, 3 * rounds), (detectors, rounds))
    ]
    return [*races, "Counted, not timed:\n\n" + table(["what", "count"], counted())]
