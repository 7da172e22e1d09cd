"""What a weakly supervised run does with a row's classifier: pseudo masks, and a segmentation model taught by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from distillkit import recipe as recipes
from distillkit import schema
from distillkit.data.segmentation import BACKGROUND
from distillkit.evaluation.cam import class_maps
from distillkit.evaluation.cam_drawing import draw_class_map, draw_mask
from distillkit.evaluation.draw import beside
from distillkit.evaluation.segmentation import class_ious, mean_known
from distillkit.losses.segmentation import IGNORE
from distillkit.schema import Recipe, SegmentationRecipe, WeakRecipe, WeakRow
from distillkit.training import build, checkpoint, mask_figures
from distillkit.training.cams import (
    check_classifier,
    masked,
    masks_against_truth,
    masks_of,
    source_of_split,
    write_cams,
)
from distillkit.training.errors import RunError
from distillkit.training.evaluate import evaluate as score_named
from distillkit.training.named import FINAL, folder_of, named_model
from distillkit.training.processes import processes
from distillkit.training.progress import scoring
from distillkit.training.tasks import Result, Section, Trained

if TYPE_CHECKING:
    from distillkit.training.run import Jobs

#: folders below a row's
MASKS, SEGMENT = "pseudo", "segment"
#: pictures of a report
SHOWN = 4


def further(jobs: Jobs, row: WeakRow, model: nn.Module) -> dict[str, Any]:
    """Where the recipe says so, make pseudo masks of the training pictures, and train the segmentation model on them.

    The row's folder gets pseudo/, see ``write_cams``; segment/, the training; and segment.yaml, a recipe of it by which
    the other verbs can name its model.

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
    segmenting = segmentation_recipe(recipe, folder, masks)
    if processes().is_main_process:
        checkpoint.write_text(folder / f"{SEGMENT}.yaml", recipes.resolved(segmenting))
    inner = type(jobs)(segmenting, folder, jobs.console, jobs.command)
    inner.row(segmenting.compare[0], {})
    (of_masks,) = inner.table
    minutes = [m for m in (jobs.table[-1]["minutes"], of_masks["minutes"]) if m is not None]
    return {**known, "miou": of_masks["miou"], "minutes": sum(minutes)}


def _pseudo_masks(jobs: Jobs, row: WeakRow, model: nn.Module, folder: Path) -> float:
    recipe: WeakRecipe = jobs.recipe  # type: ignore[assignment]
    data = build.build_data(recipe, "train", augmented=False)
    with scoring(f"{row.row}: pseudo masks", len(data), jobs.console) as progress:
        how = recipe.cam, masks_of(recipe, jobs.folders[row.row]), source_of_split(recipe, "train")
        write_cams(model, data, data.classes, folder, *how, workers=recipe.data.workers, progress=progress)
    path = folder / "scores.json"
    confusion = None if path.exists() else masks_against_truth(folder, data, data.classes)
    if processes().is_main_process and not path.exists():
        ious = np.array([]) if confusion is None else class_ious(confusion)
        checkpoint.write_json(path, {"miou": mean_known(ious), "iou": ious.tolist()})
    processes().wait_for_everyone()
    return checkpoint.read_json(path)["miou"]


def segmentation_recipe(recipe: WeakRecipe, folder: Path, masks: Path | None) -> SegmentationRecipe:
    """The run of a row's segmentation model.

    Args:
        folder: the row's.
        masks: folder that pseudo masks were written to; None: it learns from the true ones.

    Raises RunError for data that it cannot be trained on.
    """
    data, segment = recipe.data, recipe.segment
    assert segment is not None
    if not isinstance(data, schema.VocLabelData):
        raise RunError("segment needs data of kind voc-labels: masks are files beside its pictures; leave segment out")
    names = build.build_classes(recipe).classes
    return SegmentationRecipe(
        name=folder.name,
        task="segmentation",
        seed=recipe.seed,
        output=str(folder.parent),
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
        train=recipes.train_of(recipe, segment.train),
        evaluate=schema.EvaluateMasks(split=recipe.evaluate.split, scales=segment.scales, flip=segment.flip),
        compare=[schema.Row(row=SEGMENT, distillers="none")],
    )


# -- scores -----------------------------------------------------------------------------------------------------------


def evaluate(
    recipe: Recipe, name: str | None, split: Literal["train", "val", "test"], part: Literal["cam", "segment"] = "cam"
) -> Result:
    """`distillkit eval` of a weakly supervised recipe.

    Args:
        name: what ``named_model`` takes; of the segmentation model, a row, or a file with weights of it.
        part: the activation maps of the classifier, or the segmentation model that a row's masks have taught.

    Raises:
        RunError: a recipe of another task; no such model. CheckpointError: weights that do not fit.
    """
    if not isinstance(recipe, WeakRecipe):
        raise RunError(
            f"what is scored can be chosen of recipes of the task weak-segmentation, and the task of {recipe.name!r} "
            f"is {recipe.task}: leave --task out"
        )
    if part == "cam":
        check_classifier(recipe, name)
        result: Any = score_named(recipe, name, split)
        # what a run finds out later
        return replace(result, numbers={key: n for key, n in result.numbers.items() if key.startswith("cam_")})
    if recipe.segment is None:
        raise RunError(f"{recipe.name!r} trains no segmentation model: add the key segment, or score its maps (cam)")
    rows = [row.row for row in recipe.compare]
    folder = folder_of(recipe, name) if name in rows else None
    if folder is not None:
        return score_named(segmentation_recipe(recipe, folder, None), SEGMENT, split)
    if name is not None and Path(name).is_file():
        return score_named(segmentation_recipe(recipe, Path(recipe.output) / recipe.name, None), name, split)
    known = ", ".join(map(repr, rows))
    raise RunError(
        f"{name or 'no model'}: name a row whose segmentation model the run has trained ({known}), or a file with "
        "weights of segment.student"
    )


# -- report -----------------------------------------------------------------------------------------------------------


def figures(recipe: WeakRecipe, trained: Trained) -> Iterator[Section]:
    """Activation maps and pseudo masks of each classifier, and what each row's segmentation model finds."""
    split, data = recipe.evaluate.split, trained.data
    samples = [data[0, i] for i in range(min(SHOWN, len(data)))]
    yield Section(
        "Class activation maps",
        f"The first pictures of the {split} split, and where each classifier sees the class that they show most of; "
        "beside it the pseudo mask.",
        "cams",
        _cams(recipe, samples, trained),
    )
    if recipe.segment is None:
        return
    runs = {row.row: segmentation_recipe(recipe, trained.jobs[row.row], None) for row in recipe.compare}
    seen = build.build_data(next(iter(runs.values())), split, augmented=False)
    yield Section(
        "Segmentation",
        "The truth, and what the segmentation model finds that each row's masks have taught.",
        "segmentation",
        mask_figures.pictures(
            [seen[0, i] for i in range(len(samples))],
            {row: _segmenter(run, trained.jobs[row]) for row, run in runs.items()},
            seen.classes,
        ),
    )


def _segmenter(run: SegmentationRecipe, folder: Path) -> nn.Module:
    """A row's segmentation model as it was trained."""
    return named_model(run, folder / SEGMENT / FINAL, build.build_classes(run).classes).to(processes().device)


def _cams(recipe: WeakRecipe, samples: list[mask_figures.Sample], trained: Trained) -> Image.Image:
    """A line for each picture: itself, its true mask, and for each classifier the map of its largest class and its
    pseudo mask."""
    without = {row.row for row in recipe.compare if row.masks == "true"}
    models = {name: model for name, model in trained.models.items() if name not in without}
    how = {name: _masks_of(recipe, trained.jobs[name]) for name in models}
    lines = []
    for image, target in samples:
        truth, labels = target["mask"], target["labels"]
        size = (truth.shape[0], truth.shape[1])
        picture = (255 * F.resize(image, list(size), antialias=True).clamp(0, 1)).round().byte()
        main = _largest(truth, labels)
        shown = mask_figures.enlarged(F.to_pil_image(picture))
        panels = [draw_mask(shown, truth, "truth")]
        for name, model in models.items():
            device = next(model.parameters()).device
            cam = recipe.cam.scales, recipe.cam.flip, recipe.cam.method, size, recipe.cam.target_layer
            maps = class_maps(model, image.to(device), labels, *cam).cpu()
            panels.append(draw_class_map(shown, maps[main], f"{name}: {trained.data.classes[main]}"))
            if how[name].rule != "saliency" or target.get("has_saliency"):
                panels.append(draw_mask(shown, masked(maps, how[name], picture, target), "its mask"))
        lines.append(beside(panels))
    return mask_figures.sheet(lines)


def _masks_of(recipe: WeakRecipe, folder: Path) -> schema.Masks:
    """Of a model of the run; of a teacher that came trained no threshold is known to be the best."""
    return masks_of(recipe, folder) if (folder / "result.json").exists() else recipe.masks


def _largest(truth: Tensor, labels: Tensor) -> int:
    """Of the classes that a picture is labelled with, the one with the most pixels; the first where none is."""
    counts = truth[truth != IGNORE].flatten().bincount(minlength=len(labels) + 1)[1 : len(labels) + 1]
    return int(torch.where(labels > 0, counts, -1).argmax())
