"""`distillkit predict`: pictures in; drawn pictures and predictions.json out, of a classifier the latter alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import clip_boxes_to_image

from distillkit import schema
from distillkit.boxes.rotated import corners, upright
from distillkit.data.class_transforms import Middle
from distillkit.data.large import open_windows, overview, size_of
from distillkit.data.problems import DataError
from distillkit.data.transforms import Resize, sample_of
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.draw import draw_boxes
from distillkit.evaluation.rotated import to_original
from distillkit.evaluation.submission import Task, check_writable, write_submission
from distillkit.evaluation.whole import predict_whole
from distillkit.schema import BoxRecipe, Recipe, RotatedRecipe, Tiles
from distillkit.training import build, checkpoint
from distillkit.training.errors import RunError
from distillkit.training.named import named_model
from distillkit.training.processes import processes
from distillkit.training.tiles import Progress

#: larger pictures are drawn smaller, so that neither side has more pixels
DRAWN = 4096
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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


def predict(
    recipe: Recipe,
    weights: str | Path | None,
    images: list[Path],
    folder: Path,
    submission: Task | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Find objects in pictures with a recipe's student. Boxes below the recipe's ``evaluate.score`` are left out.

    Where the recipe cuts its pictures into tiles, so are these, whatever their size.

    Args:
        weights: what ``named_model`` takes: a row's name, or a file; None: the student as the recipe has it.
        images: pictures, or folders of them.
        folder: gets each picture with its boxes, NAME.png (a very large one made smaller), and predictions.json.
        submission: the files of this task of DOTA are written too, to a folder of its name in ``folder``.
        progress: called with a picture's name, or "pictures", and how many of its windows, or of them, are done of how
            many.

    Returns:
        what predictions.json holds, one row a box in COCO's result format: file, image_id (from 1, in the order of the
        pictures), category_id, category, bbox (x, y, width, height in pixels of the picture), score. Of a rotated box
        bbox is the upright one around it, and there is rotated_bbox (cx, cy, width, height, angle in radians, clockwise
        as seen) and its corners as polygon (x1, y1, ..., x4, y4).

    Raises:
        RunError: no pictures, one that cannot be read, or two of one name; a model without trained weights; a
            submission of upright boxes. SubmissionError: see ``write_submission``.
    """
    if submission is not None and not isinstance(recipe, RotatedRecipe):
        raise RunError(f"a submission is for rotated boxes, and the task of {recipe.name!r} is {recipe.task}")
    data = build.build_classes(recipe)
    model = named_model(recipe, weights, len(data.classes))
    model.to(processes().device).eval()
    if isinstance(recipe, schema.ClassificationRecipe):
        return _classified(recipe, model, images, folder, data.classes, progress)
    rows: list[dict[str, Any]] = []
    submitted: list[dict[str, Any]] = []
    named = _named(images, folder)
    _check_headers(path for path, _ in named)
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


def _classified(
    recipe: schema.ClassificationRecipe,
    model: nn.Module,
    images: list[Path],
    folder: Path,
    classes: list[str],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """The five likeliest classes of every picture, and their probabilities."""
    view = Middle((recipe.data.size[0], recipe.data.size[1]), recipe.data.crop_pct)
    named = _named(images, folder)
    rows: list[dict[str, Any]] = []
    for number, (path, _) in enumerate(named, 1):
        pixels = torch.from_numpy(np.array(_read(path))).permute(2, 0, 1).contiguous()
        image = view(tv_tensors.Image(pixels), None, torch.Generator()).image[None].to(processes().device)
        with torch.inference_mode():
            probabilities, labels = model(normalised(model, image)).softmax(1)[0].sort(descending=True, stable=True)
        best = zip(probabilities[:5].tolist(), labels[:5].tolist(), strict=True)
        rows.append({"file": str(path), "classes": [{"class": classes[i], "probability": p} for p, i in best]})
        if progress is not None:
            progress("pictures", number, len(named))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "predictions.json", rows)
    return rows


def _found(recipe: BoxRecipe, model: nn.Module, path: Path, progress: Progress | None) -> Found:
    tiles = getattr(recipe.data, "tiles", None)
    if tiles is not None:
        return _found_in_windows(recipe, tiles, model, path, progress)
    picture = _read(path)
    image, target = _prepared(picture, build.build_resize(recipe.data))
    with torch.inference_mode():
        (output,) = model([image.to(processes().device)])
    boxes, scores, labels = (output[key].cpu() for key in ("boxes", "scores", "labels"))
    scale = torch.tensor(target["scale"])
    if boxes.shape[1] == 5:
        return Found(picture, 1, to_original(boxes, scale), scores, labels)
    boxes = clip_boxes_to_image(boxes / scale.repeat(2), (picture.height, picture.width))  # none in what data.pad added
    return Found(picture, 1, boxes, scores, labels)


def _found_in_windows(
    recipe: BoxRecipe, tiles: Tiles, model: nn.Module, path: Path, progress: Progress | None
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


def _named(images: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Each picture and the file it is drawn to."""
    paths = [p for path in images for p in (_inside(path) if path.is_dir() else [path])]
    if not paths:
        raise RunError(f"no picture in {', '.join(map(str, images))} (looked for {', '.join(SUFFIXES)})")
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise RunError(f"{path} and {other} would both be drawn to {path.stem}.png: rename one, or call twice")
    return [(path, folder / f"{path.stem}.png") for path in paths]


def _check_headers(paths: Iterable[Path]) -> None:
    """Raises RunError with all files that are no pictures, before hours are spent on the others."""
    broken = []
    for path in paths:
        try:
            size_of(path)
        except DataError as error:
            broken += error.problems
    if broken:
        raise RunError(str(DataError(broken)))


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
