"""Detection, and the detection of rotated objects: what a run asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from distillkit import schema
from distillkit.adapters import adapter_for
from distillkit.boxes.regions import Valuable
from distillkit.core.errors import DistillError
from distillkit.data.check import check_dataset
from distillkit.data.coco import read_coco
from distillkit.data.coco_rotated import read_coco_rotated
from distillkit.data.detection import Pictures, Split
from distillkit.data.dota import read_dota
from distillkit.data.hrsc import read_hrsc
from distillkit.data.problems import Problem
from distillkit.data.rotated import RotatedDetection
from distillkit.data.tiled import TiledDota
from distillkit.data.voc import read_voc
from distillkit.evaluation.coco import CocoResult, coco_metrics
from distillkit.evaluation.predict import Progress, predict_dataset
from distillkit.evaluation.rotated import RotatedResult, rotated_metrics
from distillkit.evaluation.whole import merge_tiles, within
from distillkit.schema import BoxRecipe
from distillkit.training import figures as drawn
from distillkit.training.box_export import exported_detector as exported
from distillkit.training.box_predict import predict_boxes as predict
from distillkit.training.errors import RunError
from distillkit.training.tasks import Section, Trained

__all__ = [
    "DROP_LAST",
    "DRY",
    "batches",
    "check_judged",
    "check_taught",
    "doubts",
    "exported",
    "figures",
    "find",
    "further",
    "judge",
    "predict",
    "read_files",
    "whole",
]

DRY, DROP_LAST = 2, False
#: data whose annotations are read before they are used
IN_FILES = (schema.CocoData, schema.VocData, schema.DotaData, schema.HrscData)
#: pictures of a report, and the score above which a box is drawn
SHOWN, DRAWN = 4, 0.3


def batches(recipe: BoxRecipe, student: nn.Module, classes: int) -> dict[str, Any]:
    """Lists of pictures and targets, called as the student's family is."""
    return {"call": partial(adapter_for(student).call, student)}


def find(
    recipe: BoxRecipe,
    model: nn.Module,
    data: Any,
    batch: int,
    device: torch.device | str,
    progress: Progress | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    return predict_dataset(model, data, batch, device, progress, workers)


def whole(recipe: BoxRecipe, found: Sequence[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    """Predictions on tiles as predictions on the pictures they were cut from; others as they are."""
    if not isinstance(data, TiledDota):
        return list(found)
    records = {record.path.stem: record for record in data.whole.records}
    merged = merge_tiles(found, data.places, recipe.evaluate.iou)  # evaluate.most is of a tile, and done
    return [
        {**within(prediction, records[name].size), "image_id": records[name].image_id}
        for name, prediction in merged.items()
    ]


def judge(recipe: BoxRecipe, found: Sequence[dict[str, Any]], data: Any) -> CocoResult | RotatedResult:
    if isinstance(recipe, schema.RotatedRecipe):
        return rotated_metrics(found, data.truth(), data.classes)
    return coco_metrics(found, data)


# -- data -------------------------------------------------------------------------------------------------------------


def check_taught(split: str, data: Any) -> None:
    if not _teaches(data):
        raise RunError(f"data.{split} has no box that can be learned: correct the annotations, or name another file")


def check_judged(split: str, data: Any) -> None:
    if not _judges(data):
        raise RunError(
            f"data.{split} is what models are judged on, and has no box to be found, so that there is no AP: correct "
            "the annotations, or choose another evaluate.split"
        )


def _teaches(data: Any) -> bool:
    """Whether a picture has a box to be learned; most sets show one in the first pictures."""
    if isinstance(data, Pictures):
        return data.usable_boxes > 0
    return any(len(data[0, i][1]["boxes"]) for i in range(len(data)))


def _judges(data: Any) -> bool:
    if isinstance(data, RotatedDetection) or not hasattr(data, "to_coco_json"):
        return any(bool((~picture["difficult"]).any()) for picture in data.truth())
    if isinstance(data, Pictures):
        return data.usable_boxes > 0
    boxes = (a["bbox"] for a in data.to_coco_json()["annotations"] if not a.get("iscrowd"))
    return any(width > 0 and height > 0 for _, _, width, height in boxes)


def read_files(recipe: BoxRecipe, split: Any, progress: Progress | None = None) -> Iterator[Problem]:
    if getattr(recipe.data, split, None) is not None and isinstance(recipe.data, IN_FILES):
        yield from check_dataset(_split(recipe.data, split), progress)


def _split(data: Any, split: Any) -> Split:
    source = getattr(data, split)
    match data:
        case schema.DotaData():
            return read_dota(data.root, source, data.classes)
        case schema.HrscData():
            return read_hrsc(data.root, source)
        case schema.CocoRotatedData():
            return read_coco_rotated(data.root, source, data.images.format(split=split))
        case schema.CocoData():
            return read_coco(data.root, source, data.images.format(split=split))
        case _:
            return read_voc(data.root, source, data.classes)


def doubts(recipe: BoxRecipe) -> Iterator[tuple[str, str]]:
    yield from ()


# -- report -----------------------------------------------------------------------------------------------------------


def further(jobs: Any, row: Any, model: nn.Module) -> dict[str, Any]:
    """Nothing."""
    return {}


def figures(recipe: BoxRecipe, trained: Trained) -> Iterator[Section]:
    samples = [trained.data[(0, i)] for i in range(min(SHOWN, len(trained.data)))]
    yield Section(
        "Pictures",
        f"The first pictures of the {recipe.evaluate.split} split, and boxes found with a score of at least {DRAWN}. "
        "Where boxes overlap by more than half (IoU), whatever their class, the best one is drawn.",
        "pictures",
        drawn.pictures(samples, trained.models, trained.data.classes, DRAWN),
    )
    try:
        yield from _distribution_figures(recipe, samples, trained.teachers, trained.students)
    except DistillError as error:
        yield Section("Regions and distributions", f"Not drawn: {error}", "", None)


def _distribution_figures(
    recipe: BoxRecipe, samples: list[drawn.Sample], teachers: Mapping[str, nn.Module], students: Mapping[str, nn.Module]
) -> Iterator[Section]:
    localization = [d for d in recipe.distillers if isinstance(d, schema.LD | schema.SelfLD)]
    valuable = Valuable(localization[0].gamma, localization[0].measure) if localization else Valuable()
    fullest = max(samples, key=lambda sample: len(sample[1]["boxes"]))
    yield Section(
        "Regions",
        "Points of the anchors on which localization distillation acts, at each level of the student's pyramid. Main: "
        f"the assigner's positives. Valuable: those that overlap an object less (gamma {valuable.gamma}).",
        "regions",
        drawn.regions(fullest, next(iter(students.values())), valuable),
    )
    if not teachers or len(students) < 2:
        return
    edge = drawn.most_disputed(samples, {**teachers, **students})
    yield Section(
        "Distribution of a box's edges, before and after",
        "Of the objects above, the one about whose edges the teacher and the first student differ most: how far each "
        "model says every edge is from the anchor's point. Distillation should bring a student to the teacher's bars."
        if edge
        else "Not drawn: the pictures above hold no object.",
        "distribution",
        drawn.distributions(edge) if edge else None,
    )
