"""What a segmentation model finds in pictures: masks, drawn pictures and, where asked for, saliency maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distillkit.evaluation.cam_drawing import mask_picture
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.segmentation import predicted_classes, seen_at
from distillkit.losses.segmentation import IGNORE
from distillkit.models.segmentation import resized
from distillkit.schema import SegmentationRecipe
from distillkit.training import checkpoint
from distillkit.training.build import Classes
from distillkit.training.build.mask_data import build_resize
from distillkit.training.mask_figures import overlay
from distillkit.training.pictures import check_headers, named_pictures, read_picture
from distillkit.training.processes import processes
from distillkit.training.tasks import Asked


def predict_masks(recipe: SegmentationRecipe, model: nn.Module, data: Classes, asked: Asked) -> list[dict[str, Any]]:
    """The folder gets, of each picture, at its size: masks/NAME.png, its labels in the palette of Pascal VOC;
    overlays/NAME.png, these colours over the picture; with ``saliency`` also saliency/NAME.png, grey, 255 times the
    probability that a pixel is not of class 0; and predictions.json.

    Returns:
        what predictions.json holds, one row a picture: file; mask, its path; and under classes the share of the
        picture's pixels that each class has, of those that were found, the largest first.
    """
    named = named_pictures(asked.images, asked.folder / "masks")
    check_headers(path for path, _ in named)
    rows: list[dict[str, Any]] = []
    for number, (path, target) in enumerate(named, 1):
        picture = read_picture(path)
        logits = _logits(recipe, model, picture)
        mask = predicted_classes(logits)
        _write(target, mask_picture(mask))
        _write(asked.folder / "overlays" / target.name, overlay(picture, mask))
        if asked.saliency:
            _write(asked.folder / "saliency" / target.name, _saliency(logits))
        rows.append({"file": str(path), "mask": str(target), "classes": shares_of(mask, data.classes)})
        if asked.progress is not None:
            asked.progress("pictures", number, len(named))
    checkpoint.write_json(asked.folder / "predictions.json", rows)
    return rows


@torch.inference_mode()
def _logits(recipe: SegmentationRecipe, model: nn.Module, picture: Image.Image) -> Tensor:
    """(C, H, W) of every pixel of the picture, seen as where the model was scored."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    image = build_resize(recipe.data)(pixels, None, None, torch.Generator()).image[None].to(processes().device)
    how = recipe.evaluate
    logits = seen_at(model, normalised(model, image), how.scales, how.flip)
    return resized(logits, (picture.height, picture.width))[0]


def _saliency(logits: Tensor) -> Image.Image:
    salient = 1 - logits.softmax(0)[0]
    return Image.fromarray((255 * salient).round().to(torch.uint8).cpu().numpy(), "L")


def shares_of(mask: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """Of a mask's pixels, by class: class and share, the largest first; those of classes that are there alone."""
    counts = mask.flatten().bincount(minlength=IGNORE + 1)[: len(classes)]
    order = [int(i) for i in counts.argsort(descending=True, stable=True) if counts[i]]
    return [{"class": classes[i], "share": int(counts[i]) / mask.numel()} for i in order]


def _write(path: Path, picture: Image.Image) -> None:
    checkpoint.atomically(path, lambda part: picture.save(part, format="png"))
