"""What learning masks costs: local-to-global transfer over its two networks alone, FakeMix, class activation maps.

    python -m benchmarks.masks --write benchmarks/results/masks.md

All contenders of a table take turns in one process, on one thread, in process CPU time. The reference of a table runs
twice; how far the ratio of "again" is from 1 is what the machine cannot tell apart.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, multilabel_soft_margin_loss

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


def tables(rounds: int) -> list[str]:
    """Markdown tables. What is short runs more often."""
    return [
        *(
            f"{said}, over the ideal: the local network forward and backward on given crops, with its classification "
            "loss, and the global one on the pictures, with a trivial loss on its maps. CAM classifiers on ResNet-18 "
            f"at output stride 16, {PICTURES} pictures of {SIZE} x {SIZE}, {CROPS} crops of {CROP} x {CROP} of each.\n"
            f"\n{table(step.HEAD, step.rows_of(step.race(steps(saliency), rounds)))}"
            for said, saliency in (("Attention transfer", False), ("Shape transfer", True))
        ),
        "Counted, not timed:\n\n" + table(["what", "count"], counted()),
        f"FakeMix on every picture of a batch of {MIXED} of {EDGE} x {EDGE} (p = 1), 3 pastes on each; at most "
        f"{MOST} ms a picture.\n\n" + table(["pictures", "bands", "median CPU ms a picture"], mixing(5 * rounds)),
        f"Class activation maps of a picture of {SIDE} x {SIDE}, mirrored too, at {', '.join(map(str, SCALES))} times "
        "its size: a CAM classifier on ResNet-18.\n\n" + activation(rounds),
    ]


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


def steps(saliency: bool) -> dict[str, step.Step]:
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


def counted() -> list[list[str]]:
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
    return [
        ["host syncs of both networks alone", str(syncs["ideal"])],
        ["host syncs added by shape transfer", str(syncs["distillkit"] - syncs["ideal"])],
        ["bytes of tensors alive after 5 more steps, less those alive before", str(live_bytes() - before)],
    ]


# ---- FakeMix

MIXED, EDGE, MOST = 8, 512, 10


def mixing(rounds: int) -> list[list[str]]:
    """Every call makes the same draws."""
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
    _, seconds = machine.race({" ".join(row): form for row, form in rows.items()}, rounds)
    return [[*row, f"{seconds[' '.join(row)] / MIXED * 1e3:.1f}"] for row in rows]


def mixed(mix: FakeMix, images: Tensor, targets: Tensor | dict[str, Tensor]) -> Tensor:
    return mix(images, targets, seeded())[0]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- class activation maps

SIDE = 96


def activation(rounds: int) -> str:
    """Against the package grad-cam, which takes a backward pass for each class."""
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        return f"Not measured: the package grad-cam is not installed (pip install 'distillkit[cam]'; {error})."
    torch.manual_seed(0)
    model = CamClassifier(CLASSES, "resnet18").eval()
    picture = torch.rand(3, SIDE, SIDE)
    rows = []
    for shown in (1, 3):
        labels = torch.zeros(CLASSES)
        labels[:shown] = 1
        theirs = f"grad-cam {version('grad-cam')}: GradCAM"
        package = partial(by_gradient, GradCAM, model, picture, shown)
        forms = {
            theirs: package,
            f"{theirs}, again": package,
            "distillkit: class_maps": partial(class_maps, model, picture, labels),
        }
        _, seconds = machine.race(forms, rounds)
        base = seconds[theirs]
        rows += [[str(shown), name, f"{1 / took:.1f}", f"{base / took:.2f}"] for name, took in seconds.items()]
    return table(["classes shown", "form", "pictures a CPU second", "ratio"], rows)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of each step; what is short runs more often")
    parser.add_argument("--write", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = [heading("Masks", f"python -m benchmarks.masks --rounds {args.rounds}", seed=0), *tables(args.rounds)]
    write("\n\n".join(parts), args.write)


if __name__ == "__main__":
    main()
