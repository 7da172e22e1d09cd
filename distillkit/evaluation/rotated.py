"""Metrics of rotated detection: average precision as on DOTA (VOC's two rules) and in COCO's manner.

All three rules rank the detections of a class over all pictures by falling score, decide which are right, and read an
average precision off precision and recall. They differ in how a detection finds its object and in how the curve is
read:

========  ==========================================  =======================================================
rule      a detection is compared with                average precision
========  ==========================================  =======================================================
VOC07     the object it overlaps most, taken or not;  mean of the best precision at recall >= 0, 0.1, ..., 1
VOC12     right where IoU > threshold                 area under the falling envelope of the curve
COCO      of the objects that are still free, the     mean of the envelope at recall 0, 0.01, ..., 1
          one it overlaps most; IoU >= threshold
========  ==========================================  =======================================================

VOC07 at IoU 0.5 is what DOTA's development kit and its server print (Xia et al., arXiv:1711.10398). Its points are the
kit's ``arange(0, 1.1, 0.1)``, where 3 of 10 objects found do not reach the recall 0.30000000000000004. COCO's rule is
that of cocodataset.org, but on objects of all sizes and with any number of detections a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distillkit.boxes.rotated import corners, from_corners, upright
from distillkit.boxes.rotated_iou import aligned_rotated_iou

THRESHOLDS = np.linspace(0.5, 0.95, 10).round(2)
RULES = ("VOC07", "VOC12", "COCO")
#: of ``RotatedResult.numbers``: the headline, then every rule in full
NAMES = ("AP", "AP50", "AP75", *(f"{name}_{rule}" for rule in RULES for name in ("AP", "AP50", "AP75")))

FALSE, RIGHT, IGNORED = 0, 1, 2
CHUNK = 1 << 17  # pairs of boxes that are looked at at once; bounds the memory
DECIMALS = 9  # overlaps are rounded to these, so that one that is a threshold exactly does not hang on rounding errors


@dataclass(frozen=True)
class RotatedClass:
    """ap, ap50, ap75: the headline numbers of one class, in 0..1, -1 where it has no object. boxes: how many are to be
    found (none that is difficult). rules: each rule's three numbers, ``NAMES`` without the headline."""

    ap: float
    ap50: float
    ap75: float
    boxes: int
    rules: dict[str, float]


@dataclass(frozen=True)
class RotatedResult:
    """numbers: by ``NAMES``, in 0..1, means over the classes that have objects to be found (-1 where none has).

    - "AP50", "AP75": at IoU 0.5 and 0.75 by VOC07's rule, the one DOTA's kit and most papers use.
    - "AP": mean over IoU 0.5, 0.55, ..., 0.95 by COCO's rule.
    - "AP_VOC07", ..., "AP75_COCO": all three numbers by each rule.

    classes: one row per class, in the order of ``classes``.
    """

    numbers: dict[str, float]
    classes: dict[str, RotatedClass]

    @property
    def ap(self) -> float:
        return self.numbers["AP"]


class Boxes(NamedTuple):
    """n boxes of many pictures: boxes float64 (n, 5) in pixels of the original, picture (n,) its place in the truth,
    label (n,)."""

    boxes: Tensor
    picture: np.ndarray
    label: np.ndarray


class Pairs(NamedTuple):
    """Detections and objects that overlap: their indices and IoU, each (m,), by rising detection."""

    detection: np.ndarray
    object: np.ndarray
    iou: np.ndarray


def rotated_metrics(
    predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> RotatedResult:
    """Score rotated detections.

    Args:
        predictions: what ``predict_dataset`` returns: per picture image_id, boxes (k, 5) cx, cy, w, h in pixels of the
            network's input and angle in radians, scores (k,), labels (k,) and scale (sx, sy), input over original.
            Pictures may stand in any order, and those without detections may be missing.
        truth: every picture, also those without objects: image_id, boxes (k, 5) in pixels of the original, labels (k,)
            and difficult bool (k,).
        classes: names by label.

    A detection that finds a difficult object counts neither as right nor as wrong, and a difficult object need not be
    found. By VOC's rules that is a detection whose most overlapped object is difficult; by COCO's one that finds no
    free object but overlaps a difficult one enough. A second detection of one object is wrong, and so is every
    detection in a picture without objects of its class. Of equal scores the one in the picture that stands first in
    ``truth`` ranks first, and within a picture the one that stands first in its prediction.

    Memory grows with the number of boxes, not of pairs of boxes.

    Raises ValueError naming the picture for a prediction on a picture that is unknown or comes twice, boxes that are
    not (k, 5), values that are not finite, and labels that are no class; and for pictures of the truth with one number.
    """
    objects, difficult = _objects(truth, len(classes))
    detections = _ranked(predictions, [picture["image_id"] for picture in truth], len(classes))
    pairs = overlapping(detections, objects, THRESHOLDS[0])
    by_kit, by_coco = verdicts_of_kit(pairs, detections, difficult), verdicts_of_coco(pairs, detections, difficult)
    ends = np.searchsorted(detections.label, np.arange(len(classes) + 1))
    rows = {}
    for label, (name, (i, j)) in enumerate(zip(classes, pairwise(ends.tolist()), strict=True)):
        count = int(((objects.label == label) & ~difficult).sum())
        rows[name] = _row(by_kit[:, i:j], by_coco[:, i:j], count)
    return RotatedResult(_means(list(rows.values())), rows)


def to_original(boxes: Tensor, scale: Tensor) -> Tensor:
    """Boxes of a network's input in pixels of the original picture: (k, 5) -> float64 (k, 5).

    Args:
        scale: (2,) or (k, 2) sx, sy: input over original.

    Where sx and sy differ a rectangle becomes a parallelogram; the smallest rectangle around it is returned.
    """
    boxes, scale = boxes.double(), scale.double().expand(len(boxes), 2)
    mapped = torch.cat([boxes[:, :2] / scale, boxes[:, 2:4] / scale[:, :1], boxes[:, 4:]], 1)
    uneven = scale[:, 0] != scale[:, 1]
    if bool(uneven.any()):
        mapped[uneven] = from_corners(corners(boxes[uneven]) / scale[uneven, None])
    return mapped


def overlapping(detections: Boxes, objects: Boxes, least: float) -> Pairs:
    """All pairs of a detection and an object of its picture and class with IoU >= ``least`` > 0.

    The upright boxes around both bound the IoU from above, so that few pairs come to the true one.
    """
    a, b = upright(detections.boxes).numpy(), upright(objects.boxes).numpy()
    found: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for i, j in _neighbours(a, b, detections, objects):
        near = _bound(a[i], b[j], _area(detections, i), _area(objects, j)) > least - 1e-6
        i, j = i[near], j[near]
        iou = aligned_rotated_iou(detections.boxes[i], objects.boxes[j]).numpy().round(DECIMALS)
        kept = iou >= least
        found.append((i[kept], j[kept], iou[kept]))
    return Pairs(*(np.concatenate(column) for column in zip(*found)))


def _neighbours(
    a: np.ndarray, b: np.ndarray, detections: Boxes, objects: Boxes
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (detections, objects) of one picture and class that may overlap in x, in chunks, by rising detection.

    Objects are sorted by group and left side; those that may reach a detection stand in one stretch of that order.
    Sides are compared by their rank, an integer, so that group and side make one exact key.
    """
    most = 1 + max(detections.label.max(initial=0), objects.label.max(initial=0))
    groups, group = np.unique(
        np.concatenate([s.picture * most + s.label for s in (detections, objects)]), return_inverse=True
    )
    mine, theirs = group[: len(a)], group[len(a) :]
    widest = np.zeros(len(groups))
    np.maximum.at(widest, theirs, b[:, 2] - b[:, 0])
    sides, ranks = np.sort(b[:, 0]), len(b) + 1
    order = np.lexsort((b[:, 0], theirs))
    keys = theirs[order] * ranks + np.searchsorted(sides, b[order, 0])
    first = np.searchsorted(keys, mine * ranks + np.searchsorted(sides, a[:, 0] - widest[mine]))
    last = np.searchsorted(keys, mine * ranks + np.searchsorted(sides, a[:, 2], "right"))
    counts = last - first
    total = np.cumsum(counts)
    cuts = np.searchsorted(total, np.arange(0, total[-1] if len(total) else 0, CHUNK))
    for start, stop in pairwise([*cuts.tolist(), len(a)]):
        n = counts[start:stop]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        yield np.repeat(np.arange(start, stop), n), order[np.repeat(first[start:stop], n) + within]


def _bound(a: np.ndarray, b: np.ndarray, area_a: np.ndarray, area_b: np.ndarray) -> np.ndarray:
    """At least the IoU of boxes of these areas, given the upright boxes around them: (n, 4) x (n, 4) -> (n,)."""
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    shared = np.minimum(width.clip(0) * height.clip(0), np.minimum(area_a, area_b))
    return shared / np.maximum(area_a + area_b - shared, np.finfo(float).tiny)


def _area(side: Boxes, index: np.ndarray) -> np.ndarray:
    width, height = side.boxes[index, 2].numpy(), side.boxes[index, 3].numpy()
    return width * height


def verdicts_of_kit(pairs: Pairs, detections: Boxes, difficult: np.ndarray) -> np.ndarray:
    """FALSE, RIGHT or IGNORED, (thresholds, detections), by VOC's rule: each detection answers for the one object that
    it overlaps most (of equal overlaps the first)."""
    verdicts = np.full((len(THRESHOLDS), len(detections.label)), FALSE, np.int8)
    order = np.lexsort((pairs.object, -pairs.iou, pairs.detection))
    detection, best = np.unique(pairs.detection[order], return_index=True)
    object, iou = pairs.object[order][best], pairs.iou[order][best]
    for verdict, threshold in zip(verdicts, THRESHOLDS):
        hit, hard = iou > threshold, difficult[object]
        verdict[detection[hit & hard]] = IGNORED
        # detections stand in their order of rank, so the first of an object is the one that takes it
        _, first = np.unique(object[hit & ~hard], return_index=True)
        verdict[detection[hit & ~hard][first]] = RIGHT
    return verdicts


def verdicts_of_coco(pairs: Pairs, detections: Boxes, difficult: np.ndarray) -> np.ndarray:
    """FALSE, RIGHT or IGNORED, (thresholds, detections), by COCO's rule: in order of rank each detection takes the free
    object that it overlaps most (of equal overlaps the last, as COCO's own code does)."""
    verdicts = np.full((len(THRESHOLDS), len(detections.label)), FALSE, np.int8)
    hard = difficult[pairs.object]
    order = np.lexsort((-pairs.object, -pairs.iou, pairs.detection))
    order = order[~hard[order]]
    detection, object, iou = (column[order] for column in pairs)
    for verdict, threshold in zip(verdicts, THRESHOLDS):
        verdict[pairs.detection[hard & (pairs.iou >= threshold)]] = IGNORED
        near = iou >= threshold
        verdict[_takers(detection[near], object[near])] = RIGHT
    return verdicts


def _takers(detection: np.ndarray, object: np.ndarray) -> np.ndarray:
    """The detections that get an object when they choose one after the other, by rising index, each the first of its
    pairs whose object is still free. Pairs stand by rising detection, then by falling preference.

    Computed for all at once as a stable matching (Gale and Shapley, 1962): everyone asks for the first choice, each
    object keeps the one of best rank that asked, the others go on to their next choice. As all objects prefer the same
    ranks, the outcome is that of choosing in turn.
    """
    if not len(detection):
        return detection
    who, at = np.unique(detection, return_index=True)
    end = np.append(at[1:], len(detection))
    holder = np.empty(object.max() + 1, np.int64)
    while True:
        asking = np.flatnonzero(at < end)
        asked = object[at[asking]]
        holder[asked[::-1]] = asking[::-1]  # of several that ask, the one written last stays: that of best rank
        lost = asking[holder[asked] != asking]
        if not len(lost):
            return who[asking]
        at[lost] += 1


def _row(by_kit: np.ndarray, by_coco: np.ndarray, count: int) -> RotatedClass:
    """All numbers of one class from the verdicts (thresholds, n) on its n detections in order of rank."""
    aps = np.full((len(RULES), len(THRESHOLDS)), -1.0)
    if count:
        for i, (kit, coco) in enumerate(zip(by_kit, by_coco)):
            recall, precision = _curve(kit, count)
            aps[0, i] = _at_points(recall, precision, np.arange(0, 1.1, 0.1))
            aps[1, i] = (np.diff(recall, prepend=0) * precision).sum()
            aps[2, i] = _at_points(*_curve(coco, count), np.linspace(0, 1, 101))
    rules: dict[str, float] = {}
    for rule, values in zip(RULES, aps):
        rules |= {
            f"AP_{rule}": float(values.mean()),
            f"AP50_{rule}": float(values[0]),
            f"AP75_{rule}": float(values[5]),
        }
    return RotatedClass(rules["AP_COCO"], rules["AP50_VOC07"], rules["AP75_VOC07"], count, rules)


def _curve(verdicts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall after each of n detections, and the best precision from there on: both (n,)."""
    right, wrong = (np.cumsum(verdicts == verdict) for verdict in (RIGHT, FALSE))
    precision = right / np.maximum(right + wrong, 1)
    return right / count, np.maximum.accumulate(precision[::-1])[::-1]


def _at_points(recall: np.ndarray, precision: np.ndarray, points: np.ndarray) -> float:
    """Mean over points of recall of the precision there, 0 where recall does not get so far."""
    return float(np.append(precision, 0)[np.searchsorted(recall, points)].mean())


def _means(rows: Sequence[RotatedClass]) -> dict[str, float]:
    known = [{"AP": row.ap, "AP50": row.ap50, "AP75": row.ap75, **row.rules} for row in rows if row.boxes]
    return {name: float(np.mean([row[name] for row in known])) if known else -1.0 for name in NAMES}


def _objects(truth: Sequence[Mapping[str, Any]], classes: int) -> tuple[Boxes, np.ndarray]:
    """All objects, and which of them are difficult."""
    for picture in truth:
        _check(picture, torch.as_tensor(picture["boxes"]), torch.as_tensor(picture["labels"]), classes, "truth")
    boxes = [torch.as_tensor(picture["boxes"]).double() for picture in truth]
    difficult = [np.asarray(picture["difficult"], bool) for picture in truth]
    labels = [np.asarray(picture["labels"], np.int64) for picture in truth]
    pictures = np.repeat(np.arange(len(truth)), [len(b) for b in boxes])
    objects = Boxes(torch.cat([torch.zeros(0, 5, dtype=torch.float64), *boxes]), pictures, _joined(labels, np.int64))
    return objects, _joined(difficult, bool)


def _ranked(predictions: Sequence[Mapping[str, Any]], ids: Sequence[int], classes: int) -> Boxes:
    """All detections in pixels of the originals, by class, then by rank: falling score, picture, place."""
    places = {id: place for place, id in enumerate(ids)}
    if len(places) < len(ids):
        raise ValueError("two pictures of the truth have one image_id; number them differently")
    placed: dict[int, Mapping[str, Any]] = {}
    for prediction in predictions:
        id = prediction["image_id"]
        if id not in places:
            raise ValueError(f"image {id} is predicted, but not in the truth; predict and score on the same data set")
        if places[id] in placed:
            raise ValueError(f"image {id} is predicted twice; give one prediction a picture")
        _check(prediction, prediction["boxes"], prediction["labels"], classes, "prediction")
        placed[places[id]] = prediction
    found = [placed[place] for place in sorted(placed)]
    boxes = torch.cat([torch.zeros(0, 5), *(p["boxes"].detach().cpu() for p in found)])
    counts = [len(p["boxes"]) for p in found]
    scale = torch.tensor([p["scale"] for p in found], dtype=torch.float64).reshape(-1, 2)
    boxes = to_original(boxes, scale.repeat_interleave(torch.tensor(counts, dtype=torch.int64), 0))
    pictures = np.repeat(np.array(sorted(placed), np.int64), counts)
    labels = _joined([p["labels"].cpu().numpy() for p in found], np.int64)
    scores = _joined([p["scores"].detach().cpu().double().numpy() for p in found], np.float64)
    order = np.lexsort((-scores, labels))
    if not np.isfinite(scores).all():
        bad = ids[pictures[~np.isfinite(scores)][0]]
        raise ValueError(f"image {bad}: a predicted score is not finite; the model that gave it has diverged")
    return Boxes(boxes[order], pictures[order], labels[order])


def _check(picture: Mapping[str, Any], boxes: Tensor, labels: Tensor, classes: int, side: str) -> None:
    where = f"{side} of image {picture['image_id']}"
    if boxes.shape[1:] != (5,):
        raise ValueError(f"{where}: boxes are {tuple(boxes.shape)}; expected (k, 5): cx, cy, w, h, angle")
    if not bool(boxes.isfinite().all()):
        raise ValueError(f"{where}: box {boxes[~boxes.isfinite().all(1)][0].tolist()} is not finite")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{where}: labels are {int(labels.min())}..{int(labels.max())}, there are {classes} classes; "
            "the model was built for other classes"
        )


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])
