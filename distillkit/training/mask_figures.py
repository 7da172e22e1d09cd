"""Masks as pictures: in a palette, over what they are of, and in the figures of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from distillkit.evaluation.cam_drawing import voc_palette
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.draw import GAP, SIDE, TEXT, beside, titled
from distillkit.evaluation.predict import evaluating
from distillkit.evaluation.segmentation import predicted_classes, seen_at
from distillkit.losses.segmentation import IGNORE

#: pictures of a report, and how much of a class's colour lies over them
SHOWN, STRENGTH = 4, 0.6
Sample = tuple[Tensor, dict[str, Any]]


PALETTE = voc_palette()


def overlay(picture: Image.Image, mask: Tensor) -> Image.Image:
    """The colours of the labels (H, W) over a picture of any size, at the mask's; ignored pixels show the picture."""
    labels = mask.to(torch.uint8).numpy()
    below = np.array(picture.convert("RGB").resize(labels.shape[::-1], Image.Resampling.BILINEAR), np.float32)
    mixed = (1 - STRENGTH) * below + STRENGTH * PALETTE[labels]
    return Image.fromarray(np.where((labels == IGNORE)[..., None], below, mixed).round().astype(np.uint8))


def pictures(samples: Sequence[Sample], models: Mapping[str, nn.Module], classes: Sequence[str]) -> Image.Image:
    """A row for each picture: the picture, the truth, and the classes that each model finds; the classes that are to be
    seen below."""
    rows: list[Image.Image] = []
    seen: set[int] = set()
    for image, target in samples:
        picture = Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
        masks = {"truth": target["mask"]}
        masks |= {name: _found(model, image, target["mask"]) for name, model in models.items()}
        seen.update(*(mask.unique().tolist() for mask in masks.values()))
        size = target["mask"].shape[::-1]
        panels = {"picture": picture.resize(size, Image.Resampling.BILINEAR)}
        panels |= {name: overlay(picture, mask) for name, mask in masks.items()}
        rows.append(beside([titled(enlarged(panel), name) for name, panel in panels.items()]))
    named = [(tuple(PALETTE[label].tolist()), classes[label]) for label in sorted(seen - {IGNORE})]
    rows.append(_legend(named, max(row.width for row in rows)))
    return sheet(rows)


def sheet(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other."""
    height = sum(row.height + GAP for row in rows)
    whole = Image.new("RGB", (max(row.width for row in rows), height), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height + GAP
    return whole


def by_class(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """A line for each class and a column for each model: IoU, and in small the boundaries' IoU; "-" where a class is
    neither there nor found.

    Args:
        scores: iou and boundary_iou by class by model.
    """
    models, names = list(scores), list(next(iter(scores.values())))
    values = np.array([[scores[model][name]["iou"] for model in models] for name in names])
    figure = Figure(figsize=(2.4 + 1.3 * len(models), 0.9 + 0.34 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.ma.masked_less(values, 0), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    axis.set_xticks(range(len(models)), models, fontsize=8)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), names, fontsize=8)
    for i, name in enumerate(names):
        for j, model in enumerate(models):
            of = scores[model][name]
            axis.text(j, i - 0.12, _percent(of["iou"]), ha="center", va="center", fontsize=8)
            axis.text(
                j, i + 0.28, _percent(of["boundary_iou"]), ha="center", va="center", fontsize=5.5, color="#555555"
            )
    return figure


@torch.inference_mode()
def _found(model: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """(H, W) labels at the mask's size."""
    device = next(model.parameters()).device
    with evaluating(model):
        (logits,) = seen_at(model, normalised(model, image[None].to(device)))
    return predicted_classes(logits, (mask.shape[0], mask.shape[1]))


def enlarged(picture: Image.Image) -> Image.Image:
    """Small ones by a whole factor, so that they can be seen."""
    factor = max(1, SIDE // 2 // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _legend(named: Sequence[tuple[tuple[int, int, int], str]], width: int) -> Image.Image:
    """Colours and names, in lines of ``width`` pixels."""
    font = ImageFont.load_default(TEXT)
    places = list(_places([font.getlength(name) + TEXT + 3 * GAP for _, name in named], width))
    line = TEXT + GAP
    legend = Image.new("RGB", (width, line * (places[-1][1] + 1 if places else 1)), "white")
    pen = ImageDraw.Draw(legend)
    for (shade, name), (x, row) in zip(named, places, strict=True):
        y = row * line
        pen.rectangle((x, y, x + TEXT, y + TEXT), fill=shade, outline="black")
        pen.text((x + TEXT + GAP, y), name, fill="black", font=font)
    return legend


def _places(lengths: Sequence[float], width: int) -> Iterator[tuple[float, int]]:
    """x and line of each of some words."""
    x, row = 0.0, 0
    for length in lengths:
        if x > 0 and x + length > width:
            x, row = 0.0, row + 1
        yield x, row
        x += length


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
