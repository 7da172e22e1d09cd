"""Semantic segmentation: what a run asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.core.adapter import AS_LOADED
from distillkit.core.teacher import Renormalise
from distillkit.data.fakemix import FakeMix
from distillkit.data.mask_check import check_masks
from distillkit.data.mask_transforms import MaskAugment
from distillkit.data.problems import DataError, Problem
from distillkit.data.segmentation import MaskFiles, collate_masks
from distillkit.evaluation.classes import moments
from distillkit.evaluation.predict import Progress
from distillkit.evaluation.segmentation import PixelResult, pixel_counts, pixel_metrics, segment_dataset
from distillkit.evaluation.transparent import transparent_counts, transparent_metrics
from distillkit.schema import SegmentationRecipe
from distillkit.training import build, checkpoint, mask_figures
from distillkit.training.build import Classes
from distillkit.training.errors import RunError
from distillkit.training.export import Logits
from distillkit.training.mask_predict import predict_masks as predict
from distillkit.training.possible import planned
from distillkit.training.tasks import Exported, Section, Trained

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

DRY = 2
DROP_LAST = True  # pooled context needs the statistics of a batch


def batches(recipe: SegmentationRecipe, student: nn.Module, classes: int) -> dict[str, Any]:
    return {"collate": collate_masks, "prepare": Prepared(recipe.data, student)}


class Prepared:
    """With FakeMix's false boundaries, then normalised as the student wants it.

    What is drawn comes from torch's global generator, which checkpoints hold.
    """

    def __init__(self, data: Any, student: nn.Module):
        self.normalise = Renormalise(AS_LOADED, moments(student))
        options = data.fakemix.model_dump() if data.fakemix else None
        self.fakemix = FakeMix(**options, between=data.boundary_between) if options else None

    def __call__(self, pictures: Tensor, targets: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        if self.fakemix is not None:
            # the masks alone: the boundary maps may be of another thickness
            pictures, _ = self.fakemix(pictures, targets["masks"])
        return self.normalise(pictures), targets


def find(
    recipe: SegmentationRecipe,
    model: nn.Module,
    data: Any,
    batch: int,
    device: torch.device | str,
    progress: Progress | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """The counts of every picture."""
    how = recipe.evaluate
    counts = _both_counts if how.metrics == "trans10k" else pixel_counts
    return segment_dataset(model, data, batch, device, progress, workers, how.scales, how.flip, counts)


def _both_counts(logits: Tensor, mask: Tensor) -> dict[str, Any]:
    return {**pixel_counts(logits, mask), "trans10k": transparent_counts(logits, mask)}


def whole(recipe: SegmentationRecipe, found: Sequence[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    return list(found)


def judge(recipe: SegmentationRecipe, found: Sequence[dict[str, Any]], data: Any) -> PixelResult:
    """All in 0..1, those of Trans10K too, whose balanced error rate is published in per cent."""
    result = pixel_metrics(found, data.classes)
    if recipe.evaluate.metrics != "trans10k":
        return result
    numbers = transparent_metrics([picture["trans10k"] for picture in found], data.classes).numbers
    numbers["mber"] = numbers["mber"] / 100 if numbers["mber"] >= 0 else -1.0
    return replace(result, numbers=result.numbers | {f"trans10k_{name}": n for name, n in numbers.items()})


# -- data -------------------------------------------------------------------------------------------------------------


def check_taught(split: str, data: Any) -> None:
    if not len(data):
        raise RunError(f"data.{split} has no picture: name another list")


def check_judged(split: str, data: Any) -> None:
    check_taught(split, data)


def read_files(recipe: SegmentationRecipe, split: Any, progress: Progress | None = None) -> Iterator[Problem]:
    if getattr(recipe.data, split, None) is None:
        return
    try:
        data = build.build_data(recipe, split, augmented=split == "train")
    except DataError:  # said where the set is built
        return
    rows: list[Any] = [step.recipe.data for step in planned(recipe)]
    mixed = [row for row in rows if row.fakemix is not None]
    if split == "train" and mixed and isinstance(data.transform, MaskAugment) and data.transform.boundary is None:
        # masks without a boundary are told of where FakeMix would cut them out, too
        mixing = mixed[0]
        data.transform = replace(
            data.transform, boundary=mixing.fakemix.thickness, boundary_between=mixing.boundary_between
        )
    if isinstance(data, MaskFiles):
        yield from check_masks(data, progress)


def doubts(recipe: SegmentationRecipe) -> Iterator[tuple[str, str]]:
    for step in planned(recipe):
        if getattr(step.recipe.data, "fakemix", None) is not None and step.recipe.data.batch == 1:
            yield (
                f"{step.where}: data.fakemix",
                "pastes boundaries of other pictures of the batch, and data.batch is 1: a picture gets none but its "
                "own; make the batch larger, or leave fakemix out",
            )


# -- report and export ------------------------------------------------------------------------------------------------


def further(jobs: Any, row: Any, model: nn.Module) -> dict[str, Any]:
    """Nothing."""
    return {}


def figures(recipe: SegmentationRecipe, trained: Trained) -> Iterator[Section]:
    split, data = recipe.evaluate.split, trained.data
    samples = [data[0, i] for i in range(min(mask_figures.SHOWN, len(data)))]
    yield Section(
        "Pictures",
        f"The first pictures of the {split} split, the truth, and what each model finds; pixels that are not labelled "
        "are left as they are.",
        "pictures",
        mask_figures.pictures(samples, trained.models, data.classes),
    )
    scores = {job: checkpoint.read_json(path / f"scores-{split}.json") for job, path in trained.jobs.items()}
    yield Section(
        "IoU of each class",
        f"In per cent, on the {split} split; below it, in small, the IoU of the class's boundaries.",
        "classes",
        mask_figures.by_class({job: score["classes"] for job, score in scores.items()}),
    )


def exported(recipe: SegmentationRecipe, student: nn.Module, data: Classes) -> Exported:
    pictures = torch.rand(2, 3, *recipe.data.size, generator=torch.Generator().manual_seed(0))
    decoding = {
        "input": "pictures: (batch, 3, height, width), float32, red green blue, 0..1, not normalised",
        "height": pictures.shape[2],
        "width": pictures.shape[3],
        "outputs": "logits (batch, classes, height, width), of every pixel",
        "scores": "softmax(logits) over the classes; a pixel's class is that of the greatest logit",
        "classes": list(data.classes),
    }
    return Exported(Logits(student).eval(), pictures, ["logits"], decoding)
