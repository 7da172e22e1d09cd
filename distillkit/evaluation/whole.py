"""Rotated boxes on pictures larger than a detector's input: window by window, and merged.

An object on the border of a window is seen in part there, and whole in a neighbour if it is smaller than the overlap.
The part must go: where its score is the better one, suppression would keep it instead of the whole. So a box that
touches a border, and that a neighbour has whole, is left to the neighbour; the others go through one suppression over
all windows and scales.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distillkit.boxes.rotated import upright
from distillkit.boxes.rotated_nms import rotated_nms
from distillkit.evaluation.predict import Progress, detect, evaluating
from distillkit.evaluation.rotated import to_original

#: a box touches a border when it comes as near, and a neighbour has it whole when it is as far inside, in pixels of the
#: network's input; the second is larger, so that no object falls between two windows that see it a little differently
TOUCH, INSIDE = 4.0, 16.0


class Picture(Protocol):
    """A picture that is read in parts, such as ``distillkit.data.large.open_windows`` gives."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The pixels of a window inside the picture, uint8 (height, width, 3) RGB."""


class Place(Protocol):
    """Where a tile was cut: the name of the picture, the scale it was resized by, and the tile's left upper corner in
    pixels of the resized picture."""

    @property
    def name(self) -> str: ...

    @property
    def scale(self) -> float: ...

    @property
    def x(self) -> int: ...

    @property
    def y(self) -> int: ...


class Span(NamedTuple):
    """One side of a window: where it starts and ends, where the window before ends and where the one after starts
    (infinitely far off where there is none)."""

    start: float
    end: float
    before: float = -math.inf
    after: float = math.inf


class Found(NamedTuple):
    """What was found in one or many windows, in pixels of the whole picture: boxes (k, 5), scores (k,), labels (k,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def predict_whole(
    model: nn.Module,
    picture: Picture,
    window: int = 1024,
    overlap: int = 200,
    scales: Sequence[float] = (1.0,),
    batch: int = 4,
    device: torch.device | str = "cpu",
    iou: float = 0.1,
    most: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a rotated detector over a picture of any size.

    Args:
        model: called as ``model(images)`` with a list of float32 (3, h, w) in 0..1 on ``device``, where it must be;
            returns one dict of boxes (k, 5), scores (k,), labels (k,) per image.
        picture: read window by window.
        window, overlap: side of a window and what neighbours share, in pixels of the network's input. Objects larger
            than the overlap may be seen in parts only; a smaller scale shows them whole. At the right and lower border
            the last window is moved back into the picture; a picture smaller than a window is one window.
        scales: the picture is looked at in each of these sizes, 0.5: at half its size.
        iou: of two boxes of a class that overlap more, the one of lower score is dropped.
        most: boxes to be kept, the best; None: all.
        progress: called as (windows done, windows in all) after each batch.

    Returns boxes float32 (k, 5) in pixels of the picture, centred in it, scores (k,) falling, labels (k,), on the CPU,
    and size and scale (1, 1) of the picture: with an image_id, what ``rotated_metrics`` takes. The picture is never
    held as a whole: memory is that of one batch and of the boxes found.

    Raises ValueError for a window that is not larger than the overlap, scales that are not positive, and a model that
    returns another number of results or no rotated boxes.
    """
    if not 0 <= overlap < window or not scales or min(scales) <= 0:
        raise ValueError(f"expected 0 <= overlap < window and scales > 0, got {overlap}, {window} and {list(scales)}")
    windows = [w for scale in scales for w in _windows(picture.size, window, overlap, scale)]
    found: list[Found] = []
    with evaluating(model):
        for i in range(0, len(windows), batch):
            found += _of_windows(model, picture, windows[i : i + batch], device)
            if progress is not None:
                progress(len(found), len(windows))
    return within(_merged(found, iou, most), picture.size) | {"size": picture.size, "scale": (1.0, 1.0)}


def within(prediction: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """A prediction without the boxes whose centre is outside the picture (height, width): those in a tile's padding."""
    x, y = prediction["boxes"][:, 0], prediction["boxes"][:, 1]
    there = (x >= 0) & (y >= 0) & (x <= size[1]) & (y <= size[0])
    return {**prediction, **{key: prediction[key][there] for key in ("boxes", "scores", "labels")}}


def merge_tiles(
    predictions: Sequence[Mapping[str, Any]],
    places: Mapping[int, Place],
    iou: float = 0.1,
    most: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Predictions on a tiled data set, joined to predictions on the pictures it was cut from.

    Args:
        predictions: what ``predict_dataset`` returns, one a tile.
        places: of the tiles, by image_id; ``distillkit.data.tile.Tile.parse`` reads them from the tiles' names.
        iou, most: as in ``predict_whole``.

    Returns by name of the picture, in the order in which they first occur: boxes float32 (k, 5) in its pixels, scores
    (k,) falling, labels (k,) and scale (1, 1).

    Raises ValueError for a prediction without a place.
    """
    sizes: dict[tuple[str, float], dict[tuple[int, int], tuple[int, int]]] = {}
    for prediction in predictions:
        place = _place(prediction, places)
        sizes.setdefault((place.name, place.scale), {})[place.x, place.y] = prediction["size"]
    grids = {key: Grid(tiles) for key, tiles in sizes.items()}
    found: dict[str, list[Found]] = {}
    for prediction in predictions:
        place = _place(prediction, places)
        x, y = grids[place.name, place.scale].spans(place.x, place.y)
        boxes = to_original(prediction["boxes"].detach().cpu(), torch.tensor(prediction["scale"]))
        boxes = boxes + torch.tensor([place.x, place.y, 0, 0, 0])
        inside = Found(boxes, prediction["scores"].detach().cpu(), prediction["labels"].cpu())
        whole = _left_to_neighbours(inside, x, y, 1 / max(prediction["scale"]))
        resized = torch.tensor([place.scale, place.scale])
        found.setdefault(place.name, []).append(whole._replace(boxes=to_original(whole.boxes, resized)))
    return {name: _merged(parts, iou, most) | {"scale": (1.0, 1.0)} for name, parts in found.items()}


class Grid:
    """The tiles of one picture at one scale, some of which may be missing.

    Args:
        tiles: (height, width) by left upper corner (x, y).
    """

    def __init__(self, tiles: Mapping[tuple[int, int], tuple[int, int]]):
        self.tiles = tiles
        self.columns: dict[int, list[int]] = {}
        self.rows: dict[int, list[int]] = {}
        for x, y in sorted(tiles):
            self.columns.setdefault(x, []).append(y)
            self.rows.setdefault(y, []).append(x)

    def spans(self, x: int, y: int) -> tuple[Span, Span]:
        """Both sides of the tile at (x, y)."""
        return (
            _span(x, self.rows[y], lambda other: self.tiles[other, y][1]),
            _span(y, self.columns[x], lambda other: self.tiles[x, other][0]),
        )


def _span(start: int, starts: Sequence[int], length: Callable[[int], int]) -> Span:
    """The side that starts at ``start``, one of the rising ``starts`` of a row."""
    at = bisect_left(starts, start)
    before = starts[at - 1] + length(starts[at - 1]) if at else -math.inf
    after = starts[at + 1] if at + 1 < len(starts) else math.inf
    return Span(start, start + length(start), before, after)


def _place(prediction: Mapping[str, Any], places: Mapping[int, Place]) -> Place:
    if prediction["image_id"] not in places:
        raise ValueError(
            f"image {prediction['image_id']} is predicted, but its place in the whole picture is not given"
        )
    return places[prediction["image_id"]]


class Window(NamedTuple):
    """Its sides in pixels of the picture, and the network's pixels per pixel of the picture."""

    x: Span
    y: Span
    scale: float


def _windows(size: tuple[int, int], window: int, overlap: int, scale: float) -> Iterator[Window]:
    """Row by row, as files are stored."""
    length = max(1, round(window / scale))
    step = max(1, round((window - overlap) / scale))
    rows, columns = (_side(whole, length, step) for whole in size)
    yield from (Window(x, y, scale) for y in rows for x in columns)


def _side(whole: int, length: int, step: int) -> list[Span]:
    length = min(length, whole)
    starts = [*range(0, whole - length, step), whole - length]
    return [_span(start, starts, lambda _: length) for start in starts]


def _of_windows(
    model: nn.Module, picture: Picture, windows: Sequence[Window], device: torch.device | str
) -> list[Found]:
    images = [_read(picture, window, device) for window in windows]
    with torch.inference_mode():
        outputs = detect(model, images)
    if len(outputs) != len(images):
        raise ValueError(f"the model returned {len(outputs)} results for {len(images)} images")
    found = []
    for output, image, (x, y, scale) in zip(outputs, images, windows):
        boxes, scores, labels = (output[key].cpu() for key in ("boxes", "scores", "labels"))
        if boxes.shape[1:] != (5,):
            raise ValueError(f"the model returned boxes {tuple(boxes.shape)}; expected (k, 5): cx, cy, w, h, angle")
        ratio = torch.tensor([image.shape[2] / (x.end - x.start), image.shape[1] / (y.end - y.start)])
        boxes = to_original(boxes, ratio) + torch.tensor([x.start, y.start, 0, 0, 0])
        found.append(_left_to_neighbours(Found(boxes, scores, labels), x, y, 1 / scale))
    return found


def _read(picture: Picture, window: Window, device: torch.device | str) -> Tensor:
    """A window as the network is fed it: float32 (3, h, w) in 0..1."""
    x, y, scale = window
    width, height = int(x.end - x.start), int(y.end - y.start)
    pixels = torch.tensor(picture.read(int(x.start), int(y.start), width, height), device=device)
    image = pixels.permute(2, 0, 1).float() / 255
    new = (max(1, round(height * scale)), max(1, round(width * scale)))
    if new == (height, width):
        return image.contiguous()
    return interpolate(image[None], new, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _left_to_neighbours(found: Found, x: Span, y: Span, pixel: float) -> Found:
    """Without the boxes that touch a border of their window and that a neighbour has whole.

    Args:
        pixel: of the network's input, in the units of boxes and spans.
    """
    x1, y1, x2, y2 = upright(found.boxes).unbind(1)
    left = _elsewhere(x1, x2, x, pixel) | _elsewhere(y1, y2, y, pixel)
    return Found(*(column[~left] for column in found))


def _elsewhere(low: Tensor, high: Tensor, side: Span, pixel: float) -> Tensor:
    touch, inside = TOUCH * pixel, INSIDE * pixel
    before = (low < side.start + touch) & (high < side.before - inside)
    after = (high > side.end - touch) & (low > side.after + inside)
    return before | after


def _merged(found: Sequence[Found], iou: float, most: int | None) -> dict[str, Any]:
    boxes, scores, labels = (torch.cat(column) for column in zip(*found))
    kept = rotated_nms(boxes, scores, labels, iou, most)
    return {"boxes": boxes[kept].float(), "scores": scores[kept], "labels": labels[kept]}
