"""A training step over its ideal: student forward and backward, teacher forward, the losses, SGD, and nothing else.

Every table is a race of contenders around the same tensors (`distillkit.bench.contenders`, `.detectors`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

import distillkit
from distillkit import LD, FeatureImitation, LogitKD, Main, Valuable
from distillkit.bench import contenders, detectors
from distillkit.bench.contenders import Contender, Entry, Pair
from distillkit.bench.machine import multiplies_bfloat16
from distillkit.bench.peers import MMDET
from distillkit.bench.suite import Check, Result, Table, Tell, silent
from distillkit.bench.timing import Step, interleaved, quartiles, within
from distillkit.models.dense import Inference
from distillkit.models.gfl import GFL

IDEAL, AGAIN = "ideal", "ideal again"
HEAD = ["step", "median CPU ms", "over", "ratio", "middle half of the rounds"]

#: of the ideal, on ResNets and detectors
MOST, MOST_LD, MOST_CHEAP = 1.03, 1.05, 0.88
#: microseconds above the ideal: of a wrapper with one loss, and of every further layer that is captured. The aim of
#: the first is 60, as lean as the leanest peers; 150 is what the checks of every step cost today, and no more.
MOST_MICRO, MOST_CAPTURE = 150.0, 20.0


def run(quick: bool, rounds: int, tell: Tell = silent) -> Result:
    parts = [
        logits(quick, rounds, tell),
        four_layers(quick, rounds, tell),
        micro(quick, rounds, tell),
        own_detectors(quick, rounds, tell),
        mmdet_detectors(quick, rounds, tell),
    ]
    return Result(
        "What does a training step cost over its ideal: student forward and backward, teacher forward, the losses and "
        "the optimizer, written by hand? All contenders work on the same weights and the same batch; they take turns "
        'in one process, on one thread, in process CPU time. The ideal runs twice: how far the ratio of "ideal again" '
        "is from 1 is what the machine cannot tell apart.",
        [table for tables, _, _ in parts for table in tables],
        [check for _, checks, _ in parts for check in checks],
        {key: value for _, _, data in parts for key, value in data.items()},
    )


Part = tuple[list[Table], list[Check], dict[str, Any]]

# ---- classifiers


def logits(quick: bool, rounds: int, tell: Tell) -> Part:
    pair = contenders.pair_of_resnets(*((8, 64) if quick else (16, 96)))
    entries = {
        **contenders.LOGITS,
        "distillkit, teacher in bfloat16, BatchNorm folded": Entry(contenders.ours_cheap),
        "student alone": Entry(contenders.alone),
    }
    title = f"Logits: ResNet-50 teaches ResNet-18, {len(pair.x)} pictures of {pair.x.shape[-1]} x {pair.x.shape[-1]}"
    table, seconds = raced(title, "Cross-entropy and KL at T = 4.", entries, pair, rounds, tell, "logits")
    checks = [ratio_check("step, logits: distillkit over the ideal", seconds, "distillkit", MOST)]
    if multiplies_bfloat16():
        name = "distillkit, teacher in bfloat16, BatchNorm folded"
        checks.append(ratio_check("step, logits: teacher in bfloat16, folded", seconds, name, MOST_CHEAP))
    return [table], checks, {"logits": seconds}


def four_layers(quick: bool, rounds: int, tell: Tell) -> Part:
    pair = contenders.pair_of_resnets(*((8, 64) if quick else (16, 96)))
    title = f"Features of four layers, {len(pair.x)} pictures of {pair.x.shape[-1]} x {pair.x.shape[-1]}"
    note = "Cross-entropy, and the mean squared difference of each of layer1 to layer4 after a 1 x 1 convolution."
    table, seconds = raced(title, note, contenders.FOUR_LAYERS, pair, rounds, tell, "four layers")
    check = ratio_check("step, four layers: distillkit over the ideal", seconds, "distillkit", MOST)
    return [table], [check], {"four layers": seconds}


def raced(
    title: str, note: str, entries: dict[str, Entry], pair: Pair, rounds: int, tell: Tell, what: str
) -> tuple[Table, dict[str, list[float]]]:
    there, missing = contenders.made(entries, pair)
    seconds = interleaved(steps_of(there), rounds, tell=tell, what=what)
    return Table(title, HEAD, [*rows_of(seconds), *missing_rows(missing)], note), seconds


def steps_of(there: Mapping[str, Contender]) -> dict[str, Step]:
    return {name: contender.step for name, contender in there.items()}


# ---- a model that does next to nothing


def micro(quick: bool, rounds: int, tell: Tell) -> Part:
    pair = contenders.pair_of_small()
    there, missing = contenders.made(contenders.LOGITS, pair)
    for layers in (("layer1",), ("layer1", "layer2")):
        there[f"{IDEAL}, {len(layers)} captured"] = contenders.ideal_layers(pair, layers, project=False)
        there[f"distillkit, {len(layers)} captured"] = contenders.wrapped(pair, [*map(contenders.imitate, layers)])
    turns, times = (3 * rounds, 50) if quick else (5 * rounds, 100)
    seconds = interleaved(steps_of(there), turns, times, tell, "a small model")
    more = {
        name: [1e6 * (a - b) for a, b in zip(seconds[name], seconds[IDEAL], strict=True)]
        for name in seconds
        if "captured" not in name
    }
    one, two = (
        [a - b for a, b in zip(seconds[f"distillkit, {n} captured"], seconds[f"{IDEAL}, {n} captured"], strict=True)]
        for n in (1, 2)
    )
    captured = [1e6 * (b - a) for a, b in zip(one, two, strict=True)]
    shown = [(name, f"{1e6 * median(seconds[name]):.0f}", over) for name, over in more.items()]
    shown.append(("distillkit, for one more layer that is distilled", "", captured))
    rows = [
        [name, cost, f"{median(over):+.0f}", "{:+.0f} to {:+.0f}".format(*quartiles(over))]
        for name, cost, over in shown
    ]
    rows += [[name, why, "", ""] for name, why in missing.items()]
    table = Table(
        "The toolkit's own work: a perceptron of three layers, 4 vectors a batch",
        ["step", "median CPU us", "us over the ideal", "middle half of the rounds"],
        rows,
        "Cross-entropy and KL at T = 4. The last row: what a second layer costs over the same by hand, with its tap on "
        "either model, its distiller, and its weight.",
    )
    unit, again = "{:.0f} us", more[AGAIN]
    checks = [
        within("step, small model: distillkit over the ideal", more["distillkit"], MOST_MICRO, again, 0.0, unit),
        within("step, small model: one more layer", captured, 2 * MOST_CAPTURE, again, 0.0, unit),
    ]
    return [table], checks, {"small model": seconds}


# ---- detectors


def own_detectors(quick: bool, rounds: int, tell: Tell) -> Part:
    """distillkit's GFL."""
    size, batch = (128, 2) if quick else (320, 2)
    seconds = interleaved(gfls(size, batch), max(3, rounds // 2), tell=tell, what="detectors")
    title = f"GFL-R50 teaches GFL-R18, 80 classes, {batch} pictures of {size} x {size} with 10 objects each"
    neck = "ideal, teacher's features only"
    held = "distillkit: LD main + LD valuable + class KD", "distillkit: feature imitation"
    checks = [
        ratio_check("step, GFL: LD main + LD valuable + class KD over the ideal", seconds, held[0], MOST_LD),
        ratio_check("step, GFL: feature imitation over the ideal of features", seconds, held[1], MOST, neck),
    ]
    return [Table(title, HEAD, rows_of(seconds, {held[1]: neck}))], checks, {"GFL": seconds}


def gfls(size: int, batch: int) -> dict[str, Step]:
    """Without an optimizer, on one model: the ideal calls the student past its wrapper, where taps record nothing."""
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

    def ours(student: nn.Module, distillers: list[distillkit.Distiller]) -> Step:
        model = distillkit.wrap(student, teacher, distillers)

        def step() -> None:
            model(images, targets).total.backward()
            model.zero_grad(set_to_none=True)

        return step

    whole, neck = lambda: teacher.head(teacher.features(images)), lambda: teacher.features(images)
    other = copy.deepcopy(student)
    return {
        IDEAL: ideal(student, whole),
        AGAIN: ideal(student, whole),
        "distillkit: LD main + LD valuable + class KD": ours(
            student, [LD(Main()), LD(Valuable()), LogitKD(Main(), weight=10.0)]
        ),
        "ideal, teacher's features only": ideal(other, neck),
        "distillkit: feature imitation": ours(other, [FeatureImitation("whole")]),
    }


def mmdet_detectors(quick: bool, rounds: int, tell: Tell) -> Part:
    """mmdet's own LD against distillkit's, on mmdet's models."""
    why = detectors.absent()
    names = (f"{MMDET.label}: LDHead, its own LD", "distillkit: LD main on mmdet's GFL")
    if why:
        rows = [[name, why, "", "", ""] for name in names]
        return [Table("mmdet's GFL-R50 teaches its GFL-R18", HEAD, rows)], [], {"mmdet": why}
    size, batch = (128, 2) if quick else (256, 2)
    pair = detectors.MMPair(size, batch)
    neck, features = "ideal, teacher's features only", "distillkit: feature imitation"
    makers = {
        IDEAL: detectors.ideal,
        AGAIN: detectors.ideal,
        names[0]: detectors.theirs,
        names[1]: detectors.ours,
        neck: detectors.ideal_to_the_neck,
        features: detectors.ours_features,
    }
    there = {name: make(pair) for name, make in makers.items()}
    for contender in there.values():
        contender.step()  # at its first step an adapter proves itself
    seconds = interleaved(steps_of(there), max(3, rounds // 2), tell=tell, what="mmdet")
    title = f"mmdet's GFL-R50 teaches its GFL-R18, 80 classes, {batch} pictures of {size} x {size} with 6 objects each"
    checks = [
        ratio_check("step, mmdet's GFL: LD main over the ideal", seconds, names[1], MOST_LD),
        ratio_check("step, mmdet's GFL: imitation over the ideal of features", seconds, features, MOST, neck),
    ]
    return [Table(title, HEAD, rows_of(seconds, {features: neck}))], checks, {"mmdet": seconds}


# ---- what tables and checks are made of


def ratios(seconds: Mapping[str, list[float]], name: str, against: str = IDEAL) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(seconds[name], seconds[against], strict=True)]


def rows_of(seconds: Mapping[str, list[float]], against: Mapping[str, str] | None = None) -> list[list[str]]:
    """``against``: what a contender is held against, where that is not the ideal."""
    rows = []
    for name, took in seconds.items():
        over = (against or {}).get(name, IDEAL)
        found = ratios(seconds, name, over)
        middle = "{:.3f} to {:.3f}".format(*quartiles(found))
        rows.append([name, f"{1000 * median(took):.0f}", over, f"{median(found):.3f}", middle])
    return rows


def missing_rows(missing: Mapping[str, str]) -> list[list[str]]:
    return [[name, why, "", "", ""] for name, why in missing.items()]


def ratio_check(what: str, seconds: Mapping[str, list[float]], name: str, budget: float, against: str = IDEAL) -> Check:
    return within(what, ratios(seconds, name, against), budget, ratios(seconds, AGAIN), 1.0, "{:.3f}")
