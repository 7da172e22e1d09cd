"""Rotated average precision by plain loops and shapely, to test against and to measure against; and random data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import shapely
import torch
from shapely.geometry import Polygon
from torch import Tensor

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def plain_metrics(
    predictions: Sequence[Mapping[str, Any]],
    truth: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    grid_size: float | None = None,
) -> dict[str, dict[str, list[float]]]:
    """AP by class name and rule at each of ``THRESHOLDS``; -1 for a class without objects to be found.

    Predictions as for ``rotated_metrics``, one a picture, in the order of ``truth`` and with scale (1, 1).
    """
    objects = [[Polygon(_corners(box)) for box in picture["boxes"].tolist()] for picture in truth]
    labels = [picture["labels"].tolist() for picture in truth]
    hard = {(place, i) for place, picture in enumerate(truth) for i in np.flatnonzero(picture["difficult"]).tolist()}
    table: dict[str, dict[str, list[float]]] = {}
    for label, name in enumerate(classes):
        own = [[i for i, kind in enumerate(kinds) if kind == label] for kinds in labels]
        count = sum((place, i) not in hard for place, indices in enumerate(own) for i in indices)
        found = []
        for _, place, box in _ranked(predictions, label):
            polygon = Polygon(_corners(box))
            found.append((place, {i: _iou(polygon, objects[place][i], grid_size) for i in own[place]}))
        table[name] = {"VOC07": [], "VOC12": [], "COCO": []}
        for threshold in THRESHOLDS:
            kit, coco = _kit(found, hard, threshold), _coco(found, hard, threshold)
            table[name]["VOC07"].append(_eleven(kit, count) if count else -1.0)
            table[name]["VOC12"].append(_area(kit, count) if count else -1.0)
            table[name]["COCO"].append(_hundred_and_one(coco, count) if count else -1.0)
    return table


def _ranked(predictions: Sequence[Mapping[str, Any]], label: int) -> list[tuple[float, int, list[float]]]:
    """Score, place of the picture, and box of a class's detections, best first."""
    detections = []
    for place, prediction in enumerate(predictions):
        rows = zip(prediction["scores"].tolist(), prediction["labels"].tolist(), prediction["boxes"].tolist())
        detections += [(score, place, box) for score, kind, box in rows if kind == label]
    return sorted(detections, key=lambda row: -row[0])  # stable


def _corners(box: Sequence[float]) -> list[tuple[float, float]]:
    x, y, w, h, angle = box
    c, s = math.cos(angle), math.sin(angle)
    offsets = [(-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2)]
    return [(x + u * c - v * s, y + u * s + v * c) for u, v in offsets]


def _iou(a: Polygon, b: Polygon, grid_size: float | None) -> float:
    if a.bounds[0] > b.bounds[2] or b.bounds[0] > a.bounds[2] or a.bounds[1] > b.bounds[3] or b.bounds[1] > a.bounds[3]:
        return 0.0
    shared = shapely.intersection(a, b, grid_size=grid_size).area
    return shared / (a.area + b.area - shared)


Found = list[tuple[int, dict[int, float]]]


def _kit(found: Found, hard: set[tuple[int, int]], threshold: float) -> list[bool | None]:
    """By detection: right, wrong, or None: neither."""
    taken: set[tuple[int, int]] = set()
    verdicts: list[bool | None] = []
    for place, overlaps in found:
        best = max(overlaps, key=lambda i: overlaps[i], default=None)
        if best is None or not overlaps[best] > threshold:
            verdicts.append(False)
        elif (place, best) in hard:
            verdicts.append(None)
        else:
            verdicts.append((place, best) not in taken)
            taken.add((place, best))
    return verdicts


def _coco(found: Found, hard: set[tuple[int, int]], threshold: float) -> list[bool | None]:
    taken: set[tuple[int, int]] = set()
    verdicts: list[bool | None] = []
    for place, overlaps in found:
        near = {i: v for i, v in overlaps.items() if v >= threshold}
        free = {i: v for i, v in near.items() if (place, i) not in hard and (place, i) not in taken}
        if free:
            taken.add((place, max(free, key=lambda i: (free[i], i))))
            verdicts.append(True)
        else:
            verdicts.append(None if any((place, i) in hard for i in near) else False)
    return verdicts


def _points(verdicts: list[bool | None], count: int) -> list[tuple[float, float]]:
    """(recall, best precision from there on) after each detection that counts."""
    right, points = 0, []
    counted = [v for v in verdicts if v is not None]
    for n, v in enumerate(counted, 1):
        right += v
        points.append((right / count, right / n))
    best, envelope = 0.0, []
    for recall, precision in reversed(points):
        best = max(best, precision)
        envelope.append((recall, best))
    return envelope[::-1]


def _eleven(verdicts: list[bool | None], count: int) -> float:
    points = _points(verdicts, count)
    return sum(next((p for r, p in points if r >= 0.1 * k), 0.0) for k in range(11)) / 11


def _hundred_and_one(verdicts: list[bool | None], count: int) -> float:
    points = _points(verdicts, count)
    return sum(next((p for r, p in points if r >= 0.01 * k), 0.0) for k in range(101)) / 101


def _area(verdicts: list[bool | None], count: int) -> float:
    area, before = 0.0, 0.0
    for recall, precision in _points(verdicts, count):
        area += (recall - before) * precision
        before = recall
    return area


def random_data(
    pictures: int, objects: int, classes: int, seed: int = 0, size: int = 1024
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Predictions and truth: ``objects`` a picture in a square of ``size``, some difficult, every fifth picture without
    any; as many detections: objects moved a little, some of them twice, some of a wrong class, some of nothing. Scores
    have two digits, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    predictions, truth = [], []
    for image_id in range(1, pictures + 1):
        boxes, labels = _boxes(objects, size, generator), torch.randint(classes, (objects,), generator=generator)
        keep = torch.randint(objects, (objects,), generator=generator)  # about 63 % of them, some twice or more
        noise = torch.randn(objects, 5, generator=generator, dtype=torch.float64)
        spread = 0.1 * torch.rand(objects, 1, generator=generator, dtype=torch.float64)
        near = boxes[keep]
        near = torch.cat(
            [
                near[:, :2] + noise[:, :2] * spread * near[:, 2:4],
                near[:, 2:4] * (noise[:, 2:4] * spread).exp(),
                near[:, 4:] + noise[:, 4:] * spread,
            ],
            1,
        )
        astray = torch.rand(objects, generator=generator) < 0.2
        near[astray] = _boxes(int(astray.sum()), size, generator)
        wrong = torch.rand(objects, generator=generator) < 0.1
        found = torch.where(wrong, torch.randint(classes, (objects,), generator=generator), labels[keep])
        scores = (torch.rand(objects, generator=generator) * (1 - 5 * spread[:, 0])).round(decimals=2)
        order = scores.argsort(descending=True, stable=True)
        some = slice(0) if image_id % 5 == 0 else slice(None)
        difficult = torch.rand(objects, generator=generator) < 0.1
        truth.append(
            {"image_id": image_id, "boxes": boxes[some], "labels": labels[some], "difficult": difficult[some].numpy()}
        )
        predictions.append(
            {
                "image_id": image_id,
                "boxes": near[order],
                "scores": scores[order],
                "labels": found[order],
                "size": (size, size),
                "scale": (1.0, 1.0),
            }
        )
    return predictions, truth


def _boxes(count: int, size: int, generator: torch.Generator) -> Tensor:
    draw = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    return torch.cat([draw[:, :2] * size, 8 + draw[:, 2:4] ** 2 * size / 10, (draw[:, 4:] - 0.5) * math.pi], 1)
