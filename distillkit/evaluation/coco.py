"""COCO's detection metrics (cocodataset.org, "Detection evaluation"): the 12 numbers, and a table of classes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

#: in the order in which COCO prints them
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Truth(Protocol):
    """A data set with ground truth: ``CocoDetection``, ``VocDetection``, ``Scenes`` or your own."""

    @property
    def category_ids(self) -> Sequence[int]:
        """The COCO category of each label."""

    def to_coco_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ClassResult:
    """ap, ap50, ap75: of one class, in 0..1, -1 where it has no box. boxes: how many are to be found (no crowds)."""

    ap: float
    ap50: float
    ap75: float
    boxes: int


@dataclass(frozen=True)
class CocoResult:
    """numbers: the 12 of COCO by ``NAMES``, in 0..1; -1, as in COCO, for sizes of which there is no box.
    classes: one row per class name, in the order of the categories."""

    numbers: dict[str, float]
    classes: dict[str, ClassResult]

    @property
    def ap(self) -> float:
        return self.numbers["AP"]


def coco_metrics(
    predictions: Sequence[Mapping[str, Any]], ground_truth: Mapping[str, Any] | Truth, backend: str | None = None
) -> CocoResult:
    """Score detections.

    Args:
        predictions: with a data set, what ``predict_dataset`` returns; with a COCO dict, COCO result rows (image_id,
            category_id, bbox x, y, width, height in pixels of the original picture, score). May be empty.
        ground_truth: a data set, or a COCO dict (images, annotations, categories).
        backend: "faster-coco-eval" or "pycocotools"; None: the first that is installed. Their numbers are the same.

    Raises ValueError for a prediction that names an unknown image or category, or an unknown backend.
    """
    rows = predictions if isinstance(ground_truth, Mapping) else to_results(ground_truth, predictions)
    truth = _completed(ground_truth if isinstance(ground_truth, Mapping) else ground_truth.to_coco_json())
    _check_known(rows, truth)
    evaluator = _evaluated(truth, _detections(rows, truth), backend or _installed())
    names = [category["name"] for category in truth["categories"]]
    boxes = {category["id"]: 0 for category in truth["categories"]}
    for annotation in truth["annotations"]:
        boxes[annotation["category_id"]] += not annotation["iscrowd"]
    # thresholds 0.5:0.05:0.95, recalls, classes by id, areas (0: all), most detections (-1: 100)
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    classes = {
        name: ClassResult(_mean(precision[:, :, k]), _mean(precision[0, :, k]), _mean(precision[5, :, k]), count)
        for k, (name, count) in enumerate(zip(names, boxes.values(), strict=True))
    }
    return CocoResult(dict(zip(NAMES, (float(n) for n in evaluator.stats[:12]))), classes)


def to_results(dataset: Truth, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """COCO result rows of predictions on a data set.

    Args:
        dataset: gives the category of each label.
        predictions: per picture: boxes (k, 4) x1, y1, x2, y2 in pixels of the network's input, scores (k,), labels
            (k,), image_id, size (H0, W0) of the original and scale (sx, sy), input over original.

    Returns rows whose boxes are in pixels of the original picture, cut at its border. Raises ValueError for a label the
    data set has no category for.
    """
    rows = []
    for prediction in predictions:
        height, width = prediction["size"]
        boxes = prediction["boxes"].double().cpu() / torch.tensor([*prediction["scale"]] * 2, dtype=torch.float64)
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(boxes.tolist(), prediction["scores"].tolist(), prediction["labels"].tolist()):
            if not 0 <= label < len(dataset.category_ids):
                raise ValueError(
                    f"image {prediction['image_id']}: predicted label {label}, the data set has "
                    f"{len(dataset.category_ids)} classes; the model was built for other classes"
                )
            category = dataset.category_ids[label]
            rows.append({"image_id": prediction["image_id"], "category_id": category, "bbox": box, "score": score})
    return rows


def _completed(truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with what COCO's evaluator needs: areas, crowd flags, categories by id, annotation ids from 1 (it takes a
    match with id 0 for no match)."""
    annotations = [
        {
            "id": number,
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "area": a.get("area", a["bbox"][2] * a["bbox"][3]),
            "iscrowd": a.get("iscrowd", 0),
        }
        for number, a in enumerate(truth["annotations"], 1)
    ]
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    return {"images": truth["images"], "annotations": annotations, "categories": categories}


def _check_known(rows: Sequence[Mapping[str, Any]], truth: Mapping[str, Any]) -> None:
    for key, known in (("image_id", truth["images"]), ("category_id", truth["categories"])):
        strange = {row[key] for row in rows} - {entry["id"] for entry in known}
        if strange:
            raise ValueError(
                f"predictions name {key} {sorted(strange)[:5]}, which the ground truth does not have; "
                "predict and score on the same data set"
            )


def _detections(rows: Sequence[Mapping[str, Any]], truth: Mapping[str, Any]) -> dict[str, Any]:
    """Result rows as a COCO dict. ``COCO.loadRes`` does the same, but not for an empty list."""
    annotations = [
        {**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for number, row in enumerate(rows, 1)
    ]
    return {"images": truth["images"], "annotations": annotations, "categories": truth["categories"]}


def _installed() -> str:
    return "faster-coco-eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"


def _evaluated(truth: dict[str, Any], detections: dict[str, Any], backend: str) -> Any:
    """The evaluator after its run; what it prints is dropped."""
    if backend == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    elif backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        raise ValueError(f"backend: expected 'faster-coco-eval' or 'pycocotools', got {backend!r}")
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for content in (truth, detections):
            side = COCO()
            side.dataset = content
            side.createIndex()
            sides.append(side)
        evaluator = COCOeval(*sides, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0
