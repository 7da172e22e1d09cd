"""Saliency maps from any segmentation model: how likely each pixel is to be something else than background."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distillkit.adapters import adapter_for
from distillkit.core.adapter import Adapter
from distillkit.core.views import PixelLogits
from distillkit.evaluation.predict import evaluating


class SaliencyModel:
    """A function of pictures, from a model: (B, 3, H, W) -> (B, 1, H, W) in 0..1.

    The model sees the pictures as the student does, normalised in the same way; it runs in eval mode and without
    gradient, and is no part of what is trained.

    Args:
        model: returns logits (B, C, h, w) of pixels, in any of the forms that ``adapters.segmenter.Segmenter`` reads.
            Of several channels the first is the background; one channel is the foreground itself.
        adapter: how the logits are found, where the model is not known.
    """

    def __init__(self, model: nn.Module, adapter: Adapter | None = None):
        self.model = model
        self.adapter = adapter or adapter_for(model)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        self.model.to(pictures.device)
        with evaluating(self.model):
            view = self.adapter.view(self.model, PixelLogits, [], self.model(pictures))
        assert isinstance(view, PixelLogits)
        logits = view.logits.float()
        share = logits.sigmoid() if logits.shape[1] == 1 else 1 - logits.softmax(1)[:, :1]
        return interpolate(share, size=pictures.shape[2:], mode="bilinear", align_corners=False)
