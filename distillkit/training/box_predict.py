"""What a detector finds in pictures: drawn pictures, predictions.json, and the files of a task of DOTA."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from distillkit.boxes.rotated import corners, upright
from distillkit.data.large import open_windows, overview
from distillkit.data.transforms import Resize, sample_of
from distillkit.evaluation.draw import draw_boxes
from distillkit.evaluation.predict import detect
from distillkit.evaluation.rotated import to_original
from distillkit.evaluation.submission import check_writable, write_submission
from distillkit.evaluation.whole import predict_whole
from distillkit.schema import BoxRecipe, Tiles
from distillkit.training import build, checkpoint
from distillkit.training.build import Classes
from distillkit.training.pictures import check_headers, named_pictures, read_picture
from distillkit.training.processes import processes
from distillkit.training.tasks import Asked, NamedProgress

#: larger pictures are drawn smaller, so that neither side has more pixels
DRAWN = 4096


class Found(NamedTuple):
    """A picture, ``shrunk`` times smaller than its file if that is very large; boxes (k, 4) or (k, 5) in pixels of the
    file, scores (k,), labels (k,)."""

    picture: Image.Image
    shrunk: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def prediction(self) -> dict[str, Any]:
        """As metrics and submissions take it."""
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels, "scale": (1.0, 1.0)}


def predict_boxes(recipe: BoxRecipe, model: nn.Module, data: Classes, asked: Asked) -> list[dict[str, Any]]:
    """Boxes below the recipe's ``evaluate.score`` are left out. Where the recipe cuts its pictures into tiles, so are
    these, whatever their size.

    The folder gets each picture with its boxes, NAME.png (a very large one made smaller), and predictions.json.

    Returns:
        what predictions.json holds, one row a box in COCO's result format: file, image_id (from 1, in the order of the
        pictures), category_id, category, bbox (x, y, width, height in pixels of the picture), score. Of a rotated box
        bbox is the upright one around it, and there is rotated_bbox (cx, cy, width, height, angle in radians, clockwise
        as seen) and its corners as polygon (x1, y1, ..., x4, y4).
    """
    folder, submission, progress = asked.folder, asked.submission, asked.progress
    rows: list[dict[str, Any]] = []
    submitted: list[dict[str, Any]] = []
    named = named_pictures(asked.images, folder)
    check_headers(path for path, _ in named)
    names = {number: path.stem for number, (path, _) in enumerate(named, 1)}
    if submission is not None:
        check_writable(folder / submission, names, data.classes)
    for number, (path, drawn) in enumerate(named, 1):
        found = _found(recipe, model, path, progress)
        shown = _drawn(found, data.classes)
        checkpoint.atomically(drawn, lambda part, shown=shown: shown.save(part, format="png"))  # type: ignore[misc]
        for box, label, score in zip(found.boxes, found.labels.tolist(), found.scores.tolist(), strict=True):
            rows.append(
                {
                    "file": str(path),
                    "image_id": number,
                    "category_id": data.category_ids[label],
                    "category": data.classes[label],
                    **_written(box),
                    "score": score,
                }
            )
        submitted.append({"image_id": number, **found.prediction()})
        if progress is not None:
            progress("pictures", number, len(named))
    checkpoint.write_json(folder / "predictions.json", rows)
    if submission is not None:
        write_submission(folder / submission, submitted, names, data.classes, submission)
    return rows


def _found(recipe: BoxRecipe, model: nn.Module, path: Path, progress: NamedProgress | None) -> Found:
    tiles = getattr(recipe.data, "tiles", None)
    if tiles is not None:
        return _found_in_windows(recipe, tiles, model, path, progress)
    picture = read_picture(path)
    image, target = _prepared(picture, build.build_resize(recipe.data))
    with torch.inference_mode():
        (output,) = detect(model, [image.to(processes().device)])
    boxes, scores, labels = (output[key].cpu() for key in ("boxes", "scores", "labels"))
    scale = torch.tensor(target["scale"])
    if boxes.shape[1] == 5:
        return Found(picture, 1, to_original(boxes, scale), scores, labels)
    boxes = clip_boxes_to_image(boxes / scale.repeat(2), (picture.height, picture.width))  # none in what data.pad added
    return Found(picture, 1, boxes, scores, labels)


def _found_in_windows(
    recipe: BoxRecipe, tiles: Tiles, model: nn.Module, path: Path, progress: NamedProgress | None
) -> Found:
    """With windows of the size that the recipe's tiles have for the network, so that objects are as large for it."""
    data = recipe.data
    picture = open_windows(path)
    ratio = data.size[0] / tiles.size
    found = predict_whole(
        model,
        picture,
        data.size[0],
        round(tiles.overlap * ratio),
        [scale * ratio for scale in tiles.scales],
        data.batch,
        processes().device,
        recipe.evaluate.iou,
        progress=partial(progress, path.name) if progress is not None else None,
    )
    pixels, shrunk = overview(picture, DRAWN)
    return Found(Image.fromarray(pixels), shrunk, found["boxes"], found["scores"], found["labels"])


def _drawn(found: Found, classes: list[str]) -> Image.Image:
    boxes = found.boxes.clone()
    boxes[:, :4] /= found.shrunk
    return draw_boxes(found.picture, boxes, found.labels, found.scores, classes)


def _written(box: Tensor) -> dict[str, list[float]]:
    x1, y1, x2, y2 = (box if len(box) == 4 else upright(box)).tolist()
    upright_box = {"bbox": [x1, y1, x2 - x1, y2 - y1]}
    if len(box) == 4:
        return upright_box
    return {**upright_box, "rotated_bbox": box.tolist(), "polygon": corners(box).flatten().tolist()}


def _prepared(picture: Image.Image, resize: Resize) -> tuple[Tensor, dict[str, Any]]:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    nothing = sample_of(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return resize([nothing], torch.Generator())
