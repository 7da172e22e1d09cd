"""A detector's predictions on a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from distillkit.adapters import adapter_for
from distillkit.core.adapter import Adapter

Progress = Callable[[int, int], None]


def predict_dataset(
    model: nn.Module,
    dataset: Any,
    batch: int = 8,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Run a detector over a data set, in its order.

    Args:
        model: on ``device``; called as its adapter says, as a rule ``model(images)`` with a list of float32 (3, H, W)
            in 0..1, and returns one dict of boxes (k, 4), scores (k,), labels (k,) per image.
        dataset: ``dataset[(0, index)]`` gives (image, target) with image_id, size and scale, so with a transform for
            evaluation (``Resize``).
        progress: called as (pictures done, pictures in all) after each batch.
        workers: processes that read pictures.

    Returns per picture, on the CPU, what the model returned and image_id, size, scale: what ``coco_metrics`` and
    ``to_results`` take. The model runs in eval mode under ``inference_mode``; every module's mode is restored after.

    Raises ValueError where the data set's targets lack scale, or the model returns another number of results.
    """
    predictions: list[dict[str, Any]] = []
    adapter = adapter_for(model)
    with evaluating(model), torch.inference_mode():
        for items in in_order(dataset, batch, workers):
            outputs = detect(model, [image.to(device) for image, _ in items], adapter)
            if len(outputs) != len(items):
                raise ValueError(f"the model returned {len(outputs)} results for {len(items)} images")
            predictions += [_prediction(output, target) for output, (_, target) in zip(outputs, items)]
            if progress is not None:
                progress(len(predictions), len(dataset))
    return predictions


def detect(model: nn.Module, images: list[torch.Tensor], adapter: Adapter | None = None) -> list[dict[str, Any]]:
    """What a detector in eval mode finds in pictures (3, H, W) in 0..1 on its device: a dict of boxes in their pixels,
    scores and labels for each.

    Args:
        adapter: how the model is called; None: the one it has.
    """
    adapter = adapter or adapter_for(model)
    args, kwargs = adapter.call(model, images)
    return adapter.detections(model, model(*args, **kwargs), images)


def in_order(dataset: Any, batch: int, workers: int) -> DataLoader:
    """The samples of epoch 0, in lists of ``batch``."""
    keys = [(0, i) for i in range(len(dataset))]
    return DataLoader(
        dataset,
        batch_sampler=[keys[i : i + batch] for i in range(0, len(keys), batch)],  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # its own: starting the workers must not move the global one
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in, also where those differ (frozen norms)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _prediction(output: dict[str, torch.Tensor], target: dict[str, Any]) -> dict[str, Any]:
    if "scale" not in target:
        raise ValueError(
            f"image {target.get('image_id')}: its target has no scale, so predictions cannot be mapped back; "
            "give the data set a transform for evaluation (Resize), not one for training"
        )
    found = {key: output[key].detach().cpu() for key in ("boxes", "scores", "labels")}
    return {**found, **{key: target[key] for key in ("image_id", "size", "scale")}}
