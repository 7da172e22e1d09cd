"""What learning masks costs: local-to-global transfer over its two networks alone, FakeMix, class activation maps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, multilabel_soft_margin_loss

import distillkit
from distillkit import LocalToGlobal
from distillkit.bench import step
from distillkit.bench.counting import Dispatched, live_bytes
from distillkit.bench.peers import GRAD_CAM
from distillkit.bench.suite import Check, Table
from distillkit.bench.timing import Step, interleaved, race
from distillkit.data.boundary import boundary_band
from distillkit.data.fakemix import FakeMix
from distillkit.evaluation.cam import SCALES, class_maps, fused
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.predict import evaluating
from distillkit.losses.local_to_global import draw_boxes
from distillkit.models.cam import CamClassifier

PARTS = 5
MOST_STEP = 1.1  # of the ideal
Part = tuple[list[Table], list[Check], dict[str, Any]]


def measured(rounds: int, tell: Callable[[str, int], None]) -> Part:
    """What is short runs more often."""
    tables, checks, data = [], [], {}
    for done, (said, saliency) in enumerate((("Attention transfer", False), ("Shape transfer", True))):
        tell(said, done)
        seconds = interleaved(steps(saliency), rounds)
        note = (
            "The ideal: the local network forward and backward on given crops, with its classification loss, and the "
            "global one on the pictures, with a trivial loss on its maps. CAM classifiers on ResNet-18 at output "
            f"stride 16, {PICTURES} pictures of {SIZE} x {SIZE}, {CROPS} crops of {CROP} x {CROP} of each."
        )
        tables.append(Table(f"{said}: a step over its ideal", step.HEAD, step.rows_of(seconds), note))
        checks.append(step.ratio_check(f"kernels, {said}: a step over its ideal", seconds, "distillkit", MOST_STEP))
        data[said] = seconds
    tell("what a transfer counts", 2)
    counts = counted()
    tables.append(
        Table("Shape transfer, counted", ["what", "count"], [[what, str(count)] for what, count in counts.items()])
    )
    checks += [Check(f"kernels, {what}", not count, f"{count}; 0") for what, count in list(counts.items())[1:]]
    tell("FakeMix", 3)
    mixed_in = mixing(5 * rounds)
    rows = [[*of.split(" ", 1), f"{1e3 * took:.1f}"] for of, took in mixed_in.items()]
    note = f"On every picture of a batch of {MIXED} of {EDGE} x {EDGE} (p = 1), 3 pastes on each. The aim: {MOST} ms."
    tables.append(Table("FakeMix", ["pictures", "bands", "median CPU ms a picture"], rows, note))
    tell("activation maps", 4)
    rows, cam = activation(rounds)
    note = (
        f"Of a picture of {SIDE} x {SIDE}, mirrored too, at {', '.join(map(str, SCALES))} times its size: a CAM "
        "classifier on ResNet-18."
    )
    head = ["classes shown", "form", "pictures a CPU second", "ratio"]
    tables.append(Table("Class activation maps", head, rows, note))
    return tables, checks, {**data, "counted": counts, "FakeMix": mixed_in, "activation maps": cam}


# ---- local-to-global transfer

CLASSES, PICTURES, CROPS = 20, 2, 4
SIZE, CROP = 112, 80  # 5/7, as 320 of 448


def networks() -> tuple[CamClassifier, CamClassifier]:
    torch.manual_seed(0)
    student = CamClassifier(CLASSES, "resnet18", output_stride=16)
    return student, copy.deepcopy(student)


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures of two classes each, with something salient in their middle."""
    labels, saliency = torch.zeros(PICTURES, CLASSES), torch.zeros(PICTURES, 1, SIZE, SIZE)
    labels[:, :2] = 1
    saliency[:, :, SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4] = 1
    return torch.randn(PICTURES, 3, SIZE, SIZE), {"labels": labels, "saliency": saliency}


def steps(saliency: bool) -> dict[str, Step]:
    student, local = networks()
    x, targets = batch()
    boxes = draw_boxes(PICTURES, CROPS, (SIZE, SIZE), (CROP, CROP)).flatten(0, 1).tolist()
    crops = torch.stack([x[i // CROPS, :, y1:y2, x1:x2] for i, (x1, y1, x2, y2) in enumerate(boxes)])
    labels = targets["labels"].repeat_interleave(CROPS, 0)
    distiller = LocalToGlobal(local, crops=CROPS, share=CROP / SIZE, saliency="targets" if saliency else None)
    model = distillkit.wrap(student, distillers=[distiller])

    def ideal() -> None:
        multilabel_soft_margin_loss(local(crops), labels).backward()
        student.fc8(student.backbone(x)[-1]).square().mean().backward()
        model.zero_grad(set_to_none=True)

    def ours() -> None:
        model(x, targets).total.backward()
        model.zero_grad(set_to_none=True)

    return {"ideal": ideal, "ideal again": ideal, "distillkit": ours}


def counted() -> dict[str, int]:
    """What does not depend on the clock: host syncs, and what is kept after a step."""
    made = steps(saliency=True)
    syncs = {}
    for name, run in made.items():
        run()
        with Dispatched() as seen:
            run()
        syncs[name] = seen.syncs.total()
    before = live_bytes()
    for _ in range(5):
        made["distillkit"]()
    return {
        "host syncs of both networks alone": syncs["ideal"],
        "host syncs added by shape transfer": syncs["distillkit"] - syncs["ideal"],
        "bytes of tensors alive after 5 more steps, less those alive before": live_bytes() - before,
    }


# ---- FakeMix

MIXED, EDGE, MOST = 8, 512, 10


def mixing(rounds: int) -> dict[str, float]:
    """CPU seconds a picture. Every call makes the same draws."""
    blobs = interpolate(torch.rand(MIXED, 1, 8, 8, generator=seeded()), size=(EDGE, EDGE), mode="bicubic")[:, 0]
    masks = (blobs > 0.6).long()
    given = {"masks": masks, "boundary": boundary_band(masks)}
    whole = torch.randint(256, (MIXED, 3, EDGE, EDGE), generator=seeded(), dtype=torch.uint8)
    mix = FakeMix(p=1.0)
    rows = {
        (said, bands): partial(mixed, mix, images, targets)
        for said, images in (("uint8", whole), ("float", whole / 255))
        for bands, targets in (("given", given), ("from the masks", masks))
    }
    _, seconds = race({" ".join(row): form for row, form in rows.items()}, rounds)
    return {row: took / MIXED for row, took in seconds.items()}


def mixed(mix: FakeMix, images: Tensor, targets: Tensor | dict[str, Tensor]) -> Tensor:
    return mix(images, targets, seeded())[0]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- class activation maps

SIDE = 96


def activation(rounds: int) -> tuple[list[list[str]], dict[str, dict[str, float]]]:
    """Rows, and CPU seconds by classes shown, beside the package grad-cam, with its backward pass for each class."""
    torch.manual_seed(0)
    model = CamClassifier(CLASSES, "resnet18").eval()
    picture = torch.rand(3, SIDE, SIDE)
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError:
        GradCAM = None
    rows, numbers = [], {}
    for shown in (1, 3):
        labels = torch.zeros(CLASSES)
        labels[:shown] = 1
        forms: dict[str, Callable[[], Tensor]] = {"distillkit: class_maps": partial(class_maps, model, picture, labels)}
        if GradCAM is not None:
            package = partial(by_gradient, GradCAM, model, picture, shown)
            forms = {GRAD_CAM.label: package, f"{GRAD_CAM.label}, again": package, **forms}
        else:
            rows.append([str(shown), GRAD_CAM.name, GRAD_CAM.absent, ""])
        _, seconds = race(forms, rounds)
        base = next(iter(seconds.values()))
        rows += [[str(shown), name, f"{1 / took:.1f}", f"{base / took:.2f}"] for name, took in seconds.items()]
        numbers[str(shown)] = seconds
    return rows, numbers


def by_gradient(package: Callable, model: nn.Module, picture: Tensor, shown: int) -> Tensor:
    """The maps of ``class_maps``, of the same views, as the package makes them: of all views of a scale at once."""
    found = []
    with evaluating(model), package(model=model, target_layers=[model.get_submodule("features")]) as made:
        for scale in SCALES:
            one = interpolate(picture[None], scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 1)
            views = normalised(model, torch.cat([one, one.flip(-1)]))
            maps = [made(views, targets=[partial(logit, label)] * 2) for label in range(shown)]
            found.append(torch.stack([torch.from_numpy(m) for m in maps], 1))
    return fused(found, (SIDE, SIDE))


def logit(label: int, logits: Tensor) -> Tensor:
    return logits[..., label]
