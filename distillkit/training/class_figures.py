"""Figures of a report on classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from distillkit.adapters.classifier import TokenClassifier
from distillkit.core.errors import DistillError
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.predict import evaluating

#: pictures shown; classes up to which each has its name at the axes
SHOWN, NAMED = 6, 30
Sample = tuple[Tensor, dict[str, Any]]


def confusion(matrices: Mapping[str, Sequence[Sequence[int]]], classes: Sequence[str]) -> Figure:
    """One panel a model: rows are true classes, columns what they are taken for, as shares of the row."""
    figure = Figure(figsize=(4.2 * len(matrices), 4.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(matrices)))
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        counts = np.array(matrix, float)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set(xlabel="taken for", ylabel="true class" if axis is axes[0] else "")
        if len(classes) <= NAMED:
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
            axis.set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(drawn, ax=list(axes), shrink=0.7)
    return figure


def tokens(samples: Sequence[Sample], models: Mapping[str, nn.Module], classes: Sequence[str]) -> Figure | None:
    """A row a picture: the picture, then for each model the probability of its class in every token; None where no
    model has tokens."""
    maps = {name: found for name, model in models.items() if (found := _probabilities(samples, model)) is not None}
    if not maps or not samples:
        return None
    figure = Figure(figsize=(1.9 * (len(maps) + 1), 1.95 * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), len(maps) + 1, squeeze=False)
    for row, (image, target) in enumerate(samples):
        for axis in axes[row]:
            axis.set(xticks=[], yticks=[])
        axes[row, 0].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        axes[row, 0].set_ylabel(classes[target["label"]], fontsize=8)
        for axis, (name, of) in zip(axes[row, 1:], maps.items(), strict=True):
            drawn = axis.imshow(of[row], cmap="viridis", vmin=0, vmax=1)
            if row == 0:
                axis.set_title(name, fontsize=9)
    figure.colorbar(drawn, ax=axes.ravel().tolist(), shrink=0.5)
    return figure


@torch.inference_mode()
def _probabilities(samples: Sequence[Sample], model: nn.Module) -> np.ndarray | None:
    """(pictures, h, w) of the true classes; None for a model without tokens."""
    try:
        annotator = TokenClassifier(model)
    except DistillError:
        return None
    device = next(model.parameters()).device
    pictures = torch.stack([image for image, _ in samples]).to(device)
    with evaluating(model):
        shares = annotator(normalised(model, pictures)).float().softmax(1).cpu()
    return np.stack([share[target["label"]].numpy() for share, (_, target) in zip(shares, samples, strict=True)])
