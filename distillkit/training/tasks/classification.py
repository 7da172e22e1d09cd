"""Classification: what a run asks of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from distillkit import schema
from distillkit.core.adapter import AS_LOADED
from distillkit.core.teacher import Renormalise
from distillkit.data.class_transforms import Middle
from distillkit.data.classes import collate
from distillkit.data.problems import Problem
from distillkit.evaluation.classes import (
    ClassificationResult,
    class_logits,
    class_metrics,
    classify_dataset,
    moments,
)
from distillkit.evaluation.predict import Progress
from distillkit.schema import ClassificationRecipe
from distillkit.training import checkpoint, class_figures
from distillkit.training.build import Classes
from distillkit.training.export import Logits
from distillkit.training.pictures import named_pictures, read_picture
from distillkit.training.processes import processes
from distillkit.training.tasks import Asked, Exported, Section, Trained

DRY = 4  # relations between pictures need three
DROP_LAST = True  # classifiers need the statistics of a batch


def batches(recipe: ClassificationRecipe, student: nn.Module, classes: int) -> dict[str, Any]:
    return {"collate": collate, "prepare": Prepared(recipe.data.augment, student, classes)}


class Prepared:
    """Normalised as the student wants it, mixed by mixup or CutMix; labels alone where there are no label maps.

    What is drawn comes from torch's global generator, which checkpoints hold.
    """

    def __init__(self, augment: schema.ClassAugment, student: nn.Module, classes: int):
        self.normalise = Renormalise(AS_LOADED, moments(student))
        kinds = ((augment.mixup, v2.MixUp), (augment.cutmix, v2.CutMix))
        self.mixing = [kind(alpha=alpha, num_classes=classes) for alpha, kind in kinds if alpha]

    def __call__(self, pictures: Tensor, targets: dict[str, Any]) -> tuple[Tensor, Any]:
        labels = targets["labels"]
        if self.mixing:
            chosen = self.mixing[int(torch.randint(len(self.mixing), ()))]
            pictures, labels = chosen(pictures, labels)
        pictures = self.normalise(pictures)
        return pictures, {**targets, "labels": labels} if "label_map" in targets else labels


def find(
    recipe: ClassificationRecipe,
    model: nn.Module,
    data: Any,
    batch: int,
    device: torch.device | str,
    progress: Progress | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    return classify_dataset(model, data, batch, device, progress, workers)


def whole(recipe: ClassificationRecipe, found: Sequence[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    return list(found)


def judge(recipe: ClassificationRecipe, found: Sequence[dict[str, Any]], data: Any) -> ClassificationResult:
    return class_metrics(found, data.classes)


def check_taught(split: str, data: Any) -> None:
    """Every picture has a class."""


def check_judged(split: str, data: Any) -> None:
    """Every picture has a class."""


def read_files(recipe: ClassificationRecipe, split: Any, progress: Progress | None = None) -> Iterator[Problem]:
    """What can be wrong is said where the set is built."""
    yield from ()


def doubts(recipe: ClassificationRecipe) -> Iterator[tuple[str, str]]:
    yield from ()


def further(jobs: Any, row: Any, model: nn.Module) -> dict[str, Any]:
    """Nothing."""
    return {}


def figures(recipe: ClassificationRecipe, trained: Trained) -> Iterator[Section]:
    split, data = recipe.evaluate.split, trained.data
    scores = {job: checkpoint.read_json(path / f"scores-{split}.json") for job, path in trained.jobs.items()}
    yield Section(
        "Confusion",
        f"Which class each class of the {split} split is taken for: rows are the true classes, and add up to 1.",
        "confusion",
        class_figures.confusion({job: s["confusion"] for job, s in scores.items()}, data.classes),
    )
    samples = [data[0, i] for i in range(min(class_figures.SHOWN, len(data)))]
    yield Section(
        "What each place is taken for",
        f"Pictures of the {split} split, and how likely each model finds the picture's class in each of its tokens.",
        "tokens",
        class_figures.tokens(samples, trained.models, data.classes),
    )


def predict(recipe: ClassificationRecipe, model: nn.Module, data: Classes, asked: Asked) -> list[dict[str, Any]]:
    """Writes predictions.json alone: the five likeliest classes of every picture, and their probabilities."""
    view = Middle((recipe.data.size[0], recipe.data.size[1]), recipe.data.crop_pct)
    named = named_pictures(asked.images, asked.folder)
    rows: list[dict[str, Any]] = []
    for number, (path, _) in enumerate(named, 1):
        pixels = torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1).contiguous()
        image = view(tv_tensors.Image(pixels), None, torch.Generator()).image[None].to(processes().device)
        with torch.inference_mode():
            probabilities, labels = class_logits(model, image).softmax(1)[0].sort(descending=True, stable=True)
        best = zip(probabilities[:5].tolist(), labels[:5].tolist(), strict=True)
        rows.append({"file": str(path), "classes": [{"class": data.classes[i], "probability": p} for p, i in best]})
        if asked.progress is not None:
            asked.progress("pictures", number, len(named))
    asked.folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(asked.folder / "predictions.json", rows)
    return rows


def exported(recipe: ClassificationRecipe, student: nn.Module, data: Classes) -> Exported:
    pictures = torch.rand(2, 3, *recipe.data.size, generator=torch.Generator().manual_seed(0))
    return Exported(Logits(student).eval(), pictures, ["logits"], _labelling(data, pictures))


def _labelling(data: Classes, pictures: Tensor) -> dict[str, Any]:
    return {
        "input": "pictures: (batch, 3, height, width), float32, red green blue, 0..1, not normalised",
        "height": pictures.shape[2],
        "width": pictures.shape[3],
        "outputs": "logits (batch, classes)",
        "scores": "softmax(logits)",
        "classes": list(data.classes),
    }
