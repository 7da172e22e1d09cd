"""`distillkit predict`: pictures in; what a recipe's student finds in them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distillkit import schema
from distillkit.evaluation.submission import Task
from distillkit.schema import Recipe
from distillkit.training import build
from distillkit.training.errors import RunError
from distillkit.training.named import named_model
from distillkit.training.processes import processes
from distillkit.training.tasks import Asked, NamedProgress, task_of


def predict(
    recipe: Recipe,
    weights: str | Path | None,
    images: list[Path],
    folder: Path,
    submission: Task | None = None,
    progress: NamedProgress | None = None,
    saliency: bool = False,
) -> list[dict[str, Any]]:
    """Write what a recipe's student finds in pictures, and predictions.json.

    Args:
        weights: what ``named_model`` takes: a row's name, or a file; None: the student as the recipe has it.
        images: pictures, or folders of them.
        folder: gets what is written.
        submission: of rotated boxes, the files of this task of DOTA are written too, to a folder of its name in
            ``folder``.
        progress: called with a picture's name, or "pictures", and how many of its windows, or of them, are done of how
            many.
        saliency: of segmentation, maps of what is no background are written too, to the folder saliency in ``folder``.

    Returns:
        what predictions.json holds; ``predict`` of the modules in ``tasks`` says what that is.

    Raises:
        RunError: no pictures, one that cannot be read, or two of one name; a model without trained weights; a
            submission of upright boxes, or maps of a task that has none. SubmissionError: see ``write_submission``.
    """
    if submission is not None and not isinstance(recipe, schema.RotatedRecipe):
        raise RunError(f"a submission is for rotated boxes, and the task of {recipe.name!r} is {recipe.task}")
    if saliency and not isinstance(recipe, schema.SegmentationRecipe):
        raise RunError(f"saliency maps are for segmentation, and the task of {recipe.name!r} is {recipe.task}")
    classes = build.build_classes(recipe)
    model = named_model(recipe, weights, classes.classes)
    model.to(processes().device).eval()
    asked = Asked(images, folder, submission, saliency, progress, weights)
    return task_of(recipe).predict(recipe, model, classes, asked)
