"""What learning masks costs: local-to-global transfer over its two networks alone, FakeMix, class activation maps.

    python -m benchmarks.masks --write benchmarks/results/masks.md

All contenders of a table take turns in one process, on one thread, in process CPU time. The reference of a table runs
twice; how far the ratio of "again" is from 1 is what the machine cannot tell apart.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import multilabel_soft_margin_loss

import distillkit
from benchmarks import machine, step
from benchmarks.machine import heading, table, write
from distillkit import LocalToGlobal
from distillkit.data.boundary import boundary_band
from distillkit.data.fakemix import FakeMix
from distillkit.evaluation.cam import SCALES, class_maps, fused
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.predict import evaluating
from distillkit.losses.local_to_global import draw_boxes
from distillkit.models.cam import CamClassifier
from tests.counting import Dispatched, live_bytes

CLASSES, PICTURES, CROPS = 20, 2, 4
SIZE, CROP = 112, 80  # 5/7, as 320 of 448


# ---- local-to-global transfer


def networks() -> tuple[CamClassifier, CamClassifier]:
    torch.manual_seed(0)
    student = CamClassifier(CLASSES, "resnet18", output_stride=16)
    return student, copy.deepcopy(student)


def pictures() -> tuple[Tensor, dict[str, Tensor]]:
    labels = torch.zeros(PICTURES, CLASSES)
    labels[:, :2] = 1
    saliency = torch.zeros(PICTURES, 1, SIZE, SIZE)
    saliency[:, :, SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4] = 1
    return torch.randn(PICTURES, 3, SIZE, SIZE), {"labels": labels, "saliency": saliency}


def both_alone(student: CamClassifier, local: CamClassifier, x: Tensor, labels: Tensor) -> step.Step:
    """The local network learns from given crops, the global one runs forward and backward, and nothing else."""
    boxes = draw_boxes(PICTURES, CROPS, (SIZE, SIZE), (CROP, CROP)).flatten(0, 1).tolist()
    crops = torch.stack([x[i // CROPS, :, y1:y2, x1:x2] for i, (x1, y1, x2, y2) in enumerate(boxes)])
    of_crops = labels.repeat_interleave(CROPS, 0)

    def run() -> None:
        multilabel_soft_margin_loss(local(crops), of_crops).backward()
        student.fc8(student.features(student.backbone(x)[-1])).square().mean().backward()
        for model in (student, local):
            model.zero_grad(set_to_none=True)

    return run


def transfer(saliency: bool, student: CamClassifier, local: CamClassifier, x: Tensor, targets: dict) -> step.Step:
    distiller = LocalToGlobal(local, crops=CROPS, share=CROP / SIZE, saliency="targets" if saliency else None)
    model = distillkit.wrap(student, distillers=[distiller])

    def run() -> None:
        model(x, targets).total.backward()
        model.zero_grad(set_to_none=True)

    return run


def steps() -> dict[str, step.Step]:
    student, local = networks()
    x, targets = pictures()
    ideal = both_alone(student, local, x, targets["labels"])
    other_student, other_local = copy.deepcopy(student), copy.deepcopy(local)
    return {
        "ideal": ideal,
        "ideal again": ideal,
        "distillkit: attention transfer": transfer(False, student, local, x, targets),
        OTHERS: both_alone(other_student, other_local, x, targets["labels"]),
        "distillkit: shape transfer": transfer(True, other_student, other_local, x, targets),
    }


#: a student has one wrapper, so the second form runs on a copy, and is held against the ideal on that copy
OTHERS = "ideal, on copies of both networks"
step.AGAINST["distillkit: shape transfer"] = OTHERS


def counted() -> list[list[str]]:
    """What does not depend on the clock: host syncs, and what is kept after a step."""
    student, local = networks()
    x, targets = pictures()
    with Dispatched() as alone:
        both_alone(student, local, x, targets["labels"])
        alone.syncs.clear()  # of cutting the crops
        both_alone(student, local, x, targets["labels"])()
    run = transfer(True, student, local, x, targets)
    run()
    with Dispatched() as ours:
        run()
    before = live_bytes()
    for _ in range(5):
        run()
    return [
        ["host syncs of both networks alone", str(alone.syncs.total())],
        ["host syncs added by shape transfer", str(ours.syncs.total() - alone.syncs.total())],
        ["bytes of tensors alive after 5 more steps, less those alive before", str(live_bytes() - before)],
    ]
