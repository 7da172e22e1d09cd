"""What a weakly supervised run does with a row's classifier: pseudo masks, and a segmentation model taught by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distillkit import schema
from distillkit.data.segmentation import BACKGROUND
from distillkit.evaluation.cam import class_maps
from distillkit.evaluation.cam_drawing import draw_class_map, draw_mask
from distillkit.evaluation.draw import beside
from distillkit.evaluation.pseudo_masks import pseudo_mask
from distillkit.evaluation.segmentation import mean_known, shares
from distillkit.located import merged
from distillkit.losses.segmentation import IGNORE
from distillkit.schema import SegmentationRecipe, WeakRecipe, WeakRow
from distillkit.training import build, checkpoint, mask_figures
from distillkit.training.cams import masks_against_truth, write_cams
from distillkit.training.errors import RunError
from distillkit.training.processes import processes
from distillkit.training.progress import scoring
from distillkit.training.tasks import Section, Trained

if TYPE_CHECKING:
    from distillkit.training.run import Jobs

#: folders below a row's
MASKS, SEGMENT = "pseudo", "segment"
#: pictures of a report
SHOWN = 4


def further(jobs: Jobs, row: WeakRow, model: nn.Module) -> dict[str, Any]:
    """Where the recipe says so, make pseudo masks of the training pictures, and train the segmentation model on them.

    Returns what becomes known by that: mask_miou, of the pseudo masks against the true ones of the training split, -1
    where there are none; miou, of the segmentation model on the recipe's split; minutes of all trainings.
    """
    recipe: WeakRecipe = jobs.recipe  # type: ignore[assignment]
    if recipe.segment is None:
        return {}
    folder = jobs.folders[row.row]
    if row.masks == "true":
        masks, known = None, {"cam_miou": -1.0, "mask_miou": 1.0}
    else:
        masks = folder / MASKS
        known = {"mask_miou": _pseudo_masks(jobs, row, model, masks)}
    segmenting = segmentation_recipe(recipe, row, folder, masks)
    inner = type(jobs)(segmenting, folder, jobs.console, jobs.command)
    inner.row(segmenting.compare[0], {})
    (of_masks,) = inner.table
    minutes = [m for m in (jobs.table[-1]["minutes"], of_masks["minutes"]) if m is not None]
    return {**known, "miou": of_masks["miou"], "minutes": sum(minutes)}


def _pseudo_masks(jobs: Jobs, row: WeakRow, model: nn.Module, folder: Path) -> float:
    recipe: WeakRecipe = jobs.recipe  # type: ignore[assignment]
    data = build.build_data(recipe, "train", augmented=False)
    with scoring(f"{row.row}: pseudo masks", len(data), jobs.console) as progress:
        how = _masks_of(recipe, jobs.folders[row.row])
        write_cams(model, data, data.classes, folder, recipe.cam, how, workers=recipe.data.workers, progress=progress)
    path = folder / "scores.json"
    if processes().is_main_process and not path.exists():
        confusion = masks_against_truth(folder, data, data.classes)
        ious = np.array([]) if confusion is None else _ious(confusion)
        checkpoint.write_json(path, {"miou": mean_known(ious), "iou": ious.tolist()})
    processes().wait_for_everyone()
    return checkpoint.read_json(path)["miou"]


def _masks_of(recipe: WeakRecipe, folder: Path) -> schema.Masks:
    """As the recipe says, with the threshold that was best on val where it names none."""
    if recipe.masks.threshold is not None:
        return recipe.masks
    best = checkpoint.read_json(folder / "result.json")["scores"]["cam_threshold"]
    return recipe.masks.model_copy(update={"threshold": best})


def _ious(confusion: np.ndarray) -> np.ndarray:
    right = np.diag(confusion)
    return shares(right, confusion.sum(0) + confusion.sum(1) - right)


def segmentation_recipe(recipe: WeakRecipe, row: WeakRow, folder: Path, masks: Path | None) -> SegmentationRecipe:
    """The run of a row's segmentation model. masks: folder of pseudo masks; None: it learns from the true ones."""
    data, segment = recipe.data, recipe.segment
    assert segment is not None
    if not isinstance(data, schema.VocLabelData):
        raise RunError("segment needs data of kind voc-labels: masks are files beside its pictures; leave segment out")
    names = build.build_classes(recipe).classes
    return SegmentationRecipe(
        name=SEGMENT,
        task="segmentation",
        seed=recipe.seed,
        output=str(folder),
        data=schema.VocMaskData(
            kind="voc-masks",
            root=data.root,
            train=data.train,
            val=data.val,
            test=data.test,
            classes=[BACKGROUND, *names],
            masks=data.masks,
            train_masks=None if masks is None else str((masks / "masks").resolve()),
            images=data.images,
            workers=data.workers,
            **segment.data.model_dump(exclude={"augment"}),
            augment=segment.data.augment,
        ),
        student=segment.student,
        train=schema.Train.model_validate(merged(recipe.train.model_dump(), segment.train)),
        evaluate=schema.EvaluateMasks(split=recipe.evaluate.split, scales=segment.scales, flip=segment.flip),
        compare=[schema.Row(row=SEGMENT, distillers="none")],
    )


# -- report -----------------------------------------------------------------------------------------------------------


def figures(recipe: WeakRecipe, trained: Trained) -> Iterator[Section]:
    """Activation maps and pseudo masks of each row's classifier, and what its segmentation model finds."""
    split, data = recipe.evaluate.split, trained.data
    samples = [data[0, i] for i in range(min(SHOWN, len(data)))]
    yield Section(
        "Class activation maps",
        f"The first pictures of the {split} split, and where each row's classifier sees their classes.",
        "cams",
        _cams(recipe, samples, trained),
    )
    if recipe.segment is None:
        return
    models = {row.row: _segmenter(recipe, row, trained.jobs[row.row]) for row in recipe.compare}
    yield Section(
        "Segmentation",
        "The truth, and what the segmentation model finds that was taught with each row's masks.",
        "segmentation",
        mask_figures.pictures(samples, models, [BACKGROUND, *data.classes]),
    )


def _segmenter(recipe: WeakRecipe, row: WeakRow, folder: Path) -> nn.Module:
    """A row's segmentation model as it was trained."""
    segmenting = segmentation_recipe(recipe, row, folder, None)
    model = build.build_model(segmenting.student, len(segmenting.data.classes or ()), segmenting.evaluate)
    checkpoint.load_into(model, folder / SEGMENT / "final.safetensors")
    return model.to(processes().device)


def _cams(recipe: WeakRecipe, samples: list[mask_figures.Sample], trained: Trained) -> Image.Image:
    """A line for each picture: itself, its true mask, and for each model the map of its largest class and its pseudo
    mask."""
    lines = []
    for image, target in samples:
        truth = target["mask"]
        size = (truth.shape[0], truth.shape[1])
        panels = [draw_mask(image, truth, "truth")]
        for name, model in trained.models.items():
            device = next(model.parameters()).device
            maps = class_maps(model, image.to(device), target["labels"], recipe.cam.scales, recipe.cam.flip, size=size)
            main = _largest(truth, target["labels"])
            panels.append(draw_class_map(image, maps[main], f"{name}: {trained.data.classes[main]}"))
            threshold = _masks_of(recipe, trained.jobs[name]).threshold
            panels.append(draw_mask(image, pseudo_mask(maps.cpu(), threshold=threshold), "its mask"))
        lines.append(beside(panels))
    return mask_figures.sheet(lines)


def _largest(truth: Tensor, labels: Tensor) -> int:
    """Of the classes that a picture is labelled with, the one with the most pixels; the first where none is."""
    counts = truth[truth != IGNORE].flatten().bincount(minlength=len(labels) + 1)[1 : len(labels) + 1]
    return int(torch.where(labels > 0, counts, -1).argmax())
