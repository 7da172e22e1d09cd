"""`distillkit predict`: pictures in; drawn pictures and predictions.json out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from distillkit.boxes.rotated import corners, upright
from distillkit.data.large import open_windows
from distillkit.data.transforms import Resize, sample_of
from distillkit.evaluation.draw import draw_boxes
from distillkit.evaluation.rotated import to_original
from distillkit.evaluation.whole import predict_whole
from distillkit.schema import Recipe
from distillkit.training import build, checkpoint
from distillkit.training.errors import RunError
from distillkit.training.named import named_model
from distillkit.training.processes import processes

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def predict(recipe: Recipe, weights: str | Path | None, images: list[Path], folder: Path) -> list[dict[str, Any]]:
    """Find objects in pictures with a recipe's student. Boxes below the recipe's ``evaluate.score`` are left out.

    Where the recipe cuts its pictures into tiles, so are these, whatever their size.

    Args:
        weights: what ``named_model`` takes: a row's name, or a file; None: the student as the recipe has it.
        images: pictures, or folders of them.
        folder: gets each picture with its boxes, NAME.png, and predictions.json.

    Returns:
        what predictions.json holds, one row a box in COCO's result format: file, image_id (from 1, in the order of the
        pictures), category_id, category, bbox (x, y, width, height in pixels of the picture), score. Of a rotated box
        bbox is the upright one around it, and there is rotated_bbox (cx, cy, width, height, angle in radians, clockwise
        as seen) and its corners as polygon (x1, y1, ..., x4, y4).

    Raises:
        RunError: no pictures, one that cannot be read, or two of one name; a model without trained weights.
    """
    data = build.build_classes(recipe)
    model = named_model(recipe, weights, len(data.classes))
    model.to(processes().device).eval()
    rows: list[dict[str, Any]] = []
    for number, (path, drawn) in enumerate(_named(images, folder), 1):
        picture, boxes, scores, labels = _found(recipe, model, path)
        shown = draw_boxes(picture, boxes, labels, scores, data.classes)
        checkpoint.atomically(drawn, lambda part, shown=shown: shown.save(part, format="png"))  # type: ignore[misc]
        for box, label, score in zip(boxes, labels.tolist(), scores.tolist(), strict=True):
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
    checkpoint.write_json(folder / "predictions.json", rows)
    return rows


def _found(recipe: Recipe, model: nn.Module, path: Path) -> tuple[Image.Image, Tensor, Tensor, Tensor]:
    """A picture, and boxes in its pixels, scores and labels."""
    tiles = getattr(recipe.data, "tiles", None)
    if tiles is not None:
        found = predict_whole(
            model,
            open_windows(path),
            tiles.size,
            tiles.overlap,
            tiles.scales,
            recipe.data.batch,
            processes().device,
            recipe.evaluate.iou,
            recipe.evaluate.most,
        )
        return _read(path), found["boxes"], found["scores"], found["labels"]
    picture = _read(path)
    image, target = _prepared(picture, build.build_resize(recipe.data))
    with torch.inference_mode():
        (output,) = model([image.to(processes().device)])
    boxes, scores, labels = (output[key].cpu() for key in ("boxes", "scores", "labels"))
    scale = torch.tensor(target["scale"])
    if boxes.shape[1] == 5:
        return picture, to_original(boxes, scale), scores, labels
    boxes = clip_boxes_to_image(boxes / scale.repeat(2), (picture.height, picture.width))  # none in what data.pad added
    return picture, boxes, scores, labels


def _written(box: Tensor) -> dict[str, list[float]]:
    x1, y1, x2, y2 = (box if len(box) == 4 else upright(box)).tolist()
    upright_box = {"bbox": [x1, y1, x2 - x1, y2 - y1]}
    if len(box) == 4:
        return upright_box
    return {**upright_box, "rotated_bbox": box.tolist(), "polygon": corners(box).flatten().tolist()}


def _named(images: list[Path], folder: Path) -> Iterator[tuple[Path, Path]]:
    """Each picture and the file it is drawn to."""
    paths = [p for path in images for p in (_inside(path) if path.is_dir() else [path])]
    if not paths:
        raise RunError(f"no picture in {', '.join(map(str, images))} (looked for {', '.join(SUFFIXES)})")
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise RunError(f"{path} and {other} would both be drawn to {path.stem}.png: rename one, or call twice")
    yield from ((path, folder / f"{path.stem}.png") for path in paths)


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"{path}: cannot be read as a picture ({error})") from error


def _prepared(picture: Image.Image, resize: Resize) -> tuple[Tensor, dict[str, Any]]:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    nothing = sample_of(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return resize([nothing], torch.Generator())
