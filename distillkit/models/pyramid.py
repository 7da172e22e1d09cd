"""What the detectors on a feature pyramid share: everything but the head, its losses and its decoding."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distillkit.models.backbones import backbone as make_backbone
from distillkit.models.backbones import parameters_up_to
from distillkit.models.dense import Images, Inference, Sizes, Targets, split_targets, to_batch
from distillkit.models.neck import FPN


class PyramidOptions(TypedDict, total=False):
    """What every family hands on; see ``PyramidDetector``."""

    freeze_bn: bool
    frozen_stages: int
    mean: Sequence[float] | None
    std: Sequence[float] | None


class PyramidDetector(nn.Module, ABC):
    """A timm backbone, a feature pyramid and a head, called as torchvision's detectors are.

    A family sets ``head`` (maps of the pyramid -> class logits and edge logits, a list a level each) and says what its
    losses are and how its maps become boxes.

    Args:
        num_classes: C; labels are 0..C-1.
        backbone: a timm model with ``features_only``.
        pretrained: the backbone's weights; see ``distillkit.models.backbones.backbone``.
        strides: pixels per cell of the levels, finest first, each twice the one before; levels coarser than the
            backbone's coarsest map are made by stride-2 convolutions.
        channels: width of the pyramid.
        extra: see ``FPN``.
        freeze_bn: the backbone's BatchNorm statistics stay as they are (their weights train).
        frozen_stages: the backbone does not train up to the end of this stage, 0 = all of it trains. In the published
            settings 1, a ResNet's stem and first stage. Stages are counted as timm counts feature maps, from 0.
        mean, std: of the input, 0..1, red, green, blue; those of the backbone's own pretraining unless given.

    Attributes:
        num_classes, strides.
        columns: of a box: 4 (x1, y1, x2, y2) or 5 (cx, cy, w, h, angle).
        inference: an ``Inference``, replace it for other thresholds.
    """

    columns = 4
    head: nn.Module
    inference: Inference
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int,
        backbone: str,
        pretrained: bool | str | Path,
        *,
        strides: Sequence[int],
        channels: int,
        extra: Literal["output", "input"] = "output",
        freeze_bn: bool = False,
        frozen_stages: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(f"strides {tuple(strides)}: each must be twice the one before")
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.freeze_bn = freeze_bn
        self.inference = Inference()
        self.backbone = make_backbone(backbone, self.strides, pretrained)
        self.neck = FPN(self.backbone.feature_info.channels(), channels, len(self.strides), extra)
        for name, given in (("mean", mean), ("std", std)):
            value = torch.tensor(given or timm.get_pretrained_cfg_value(backbone, name))
            self.register_buffer(name, value.view(3, 1, 1), persistent=False)
        if frozen_stages:
            frozen = set(parameters_up_to(self.backbone, frozen_stages))
            for name, parameter in self.backbone.named_parameters():
                parameter.requires_grad_(name not in frozen)
        self.train()

    @abstractmethod
    def losses(
        self,
        classes: Sequence[Tensor],
        edges: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes: Sizes,
    ) -> dict[str, Tensor]:
        """The head's maps and, per picture, boxes (k, columns), labels (k,) and (height, width) -> scalars by name."""

    @abstractmethod
    def predict(self, classes: Sequence[Tensor], edges: Sequence[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """The head's maps -> per picture boxes (k, columns) in its pixels, scores (k,) falling, labels (k,)."""

    @classmethod
    def preset(cls, num_classes: int, backbone: str, pretrained: bool | str | Path, options: dict[str, Any]) -> Self:
        """As published: the first stage and all statistics are frozen, which makes sense only for trained weights."""
        trained = bool(pretrained)
        frozen = {"freeze_bn": trained, "frozen_stages": int(trained)}
        return cls(num_classes, backbone, pretrained, **{**frozen, **options})

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm) and (self.freeze_bn or not module.weight.requires_grad):
                module.eval()
        return self

    def forward(self, images: Images, targets: Targets | None = None) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Train mode: ``images, targets`` -> losses by name. Eval mode: ``images`` -> boxes of each.

        Args:
            images: pictures (3, H, W) of any sizes, red, green, blue, 0..1; or one tensor (B, 3, H, W).
            targets: per picture boxes (k, 4), x1, y1, x2, y2, or for a rotated detector (k, 5), cx, cy, w, h, angle
                (radians, clockwise as seen), in its pixels, and labels (k,) int64; k may be 0.

        Raises:
            ValueError: what is wrong with which image or target.
        """
        batch, sizes = self.batch(images)
        if not self.training:
            return self.predict(*self.forward_raw(batch), sizes)
        boxes, labels = split_targets(targets, len(sizes), self.num_classes, self.columns)
        return self.losses(*self.forward_raw(batch), boxes, labels, sizes)

    def batch(self, images: Images) -> tuple[Tensor, Sizes]:
        """Pictures as one batch (B, 3, H, W), padded with the mean colour, and their (height, width) before that."""
        return to_batch(images, max(self.strides), self.mean)

    def features(self, images: Images) -> list[Tensor]:
        """Pictures -> the pyramid's maps (B, channels, H/stride, W/stride), finest first; the head does not run."""
        return self._features(self.batch(images)[0])

    def forward_raw(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One batch -> the head's maps; plain tensors in and out, the form for ``torch.export``.

        Args:
            batch: (B, 3, H, W), red, green, blue, 0..1, sides multiples of the largest stride.

        Returns:
            per level class logits (B, A*C, h, w) and edge logits (B, A*E*K, h, w), with A anchors a cell and E edges of
            K bins.
        """
        return self.head(self._features(batch))

    def _features(self, batch: Tensor) -> list[Tensor]:
        batch = ((batch - self.mean) / self.std).to(next(self.neck.parameters()).dtype)
        maps = self.backbone(batch)
        if getattr(self.backbone, "output_fmt", None) == "NHWC":  # Swin and its kin
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return self.neck(maps)
