"""GFL: a one-stage detector whose boxes are distributions. Li et al., Generalized Focal Loss, arXiv:2006.04388.

Any timm backbone, a feature pyramid, and one head for all levels. At every cell the head says C class logits and, for
each of the four edges (left, top, right, bottom), a distribution over how many strides away the edge is: K bins of
0..K-1 strides. Cells' points stand at (i * stride, j * stride). With ``quality=True`` the head is that of GFLv2
(arXiv:2011.12885): the shape of the distributions says how good a box is, and multiplies its class scores.

Modules are named as in OpenMMLab's detectors (``backbone``, ``neck``, and ``head`` for ``bbox_head``), so that their
checkpoints load: ``load_openmmlab``.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from distillkit.boxes.maps import Maps
from distillkit.losses.gfl import gfl_losses
from distillkit.models.dense import Sizes, predict
from distillkit.models.neck import tower
from distillkit.models.pyramid import PyramidDetector, PyramidOptions
from distillkit.models.weights import explain_mismatch, read_weights

PRIOR = 0.01  # the class probability that a fresh head says of every cell


class Scale(nn.Module):
    """One learned factor. A module, so that its output, the edge logits of one level, can be tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # of one dimension: FSDP2 shards no scalars

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """OpenMMLab's checkpoints hold scalars here."""
        name = prefix + "scale"
        if name in state_dict and state_dict[name].dim() == 0:
            state_dict[name] = state_dict[name].view(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GFLHead(nn.Module):
    """The head, shared by all levels but for one scale each.

    Args:
        num_classes: C. With ``quality`` there is one more class channel, which is never a target (as in the release).
        levels: number of feature maps.
        channels, convs, groups: width and depth of the two towers, groups of their normalisation.
        bins: K.
        quality: the GFLv2 branch, for 4 edges.
        edges: E, distributions an anchor.
    """

    def __init__(
        self,
        num_classes: int,
        levels: int,
        channels: int,
        convs: int,
        bins: int,
        groups: int,
        quality: bool = False,
        edges: int = 4,
    ):
        super().__init__()
        if channels % groups:
            raise ValueError(f"channels={channels} cannot be split into groups={groups}")
        self.num_classes, self.bins, self.quality = num_classes, bins, quality
        self.cls_convs = tower(channels, convs, groups)
        self.reg_convs = tower(channels, convs, groups)
        self.gfl_cls = nn.Conv2d(channels, num_classes + quality, 3, padding=1)
        self.gfl_reg = nn.Conv2d(channels, edges * bins, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(levels))
        if quality:
            self.reg_conf = nn.Sequential(nn.Conv2d(20, 64, 1), nn.ReLU(), nn.Conv2d(64, 1, 1), nn.Sigmoid())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(cast(Tensor, self.gfl_cls.bias), math.log(PRIOR / (1 - PRIOR)))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level (B, channels, H, W) -> class logits (B, C, H, W) and edge logits (B, E*K, H, W)."""
        classes = [self.gfl_cls(self.cls_convs(x)) for x in feats]
        edges = [scale(self.gfl_reg(self.reg_convs(x))) for scale, x in zip(self.scales, feats, strict=True)]
        return classes, edges

    def scores(self, classes: Sequence[Tensor], edges: Sequence[Tensor]) -> list[Tensor]:
        """Class probabilities per level, in the layout of ``classes``: the sigmoid, times the quality in GFLv2."""
        if not self.quality:
            return [c.sigmoid() for c in classes]
        return [c.sigmoid() * self._quality(e) for c, e in zip(classes, edges, strict=True)]

    def _quality(self, edges: Tensor) -> Tensor:
        """(B, 4*K, H, W) edge logits -> (B, 1, H, W) in 0..1, from each edge's 4 largest bins and their mean."""
        batch, _, height, width = edges.shape
        largest = edges.view(batch, 4, self.bins, height, width).softmax(2).topk(4, 2).values
        sharpness = torch.cat([largest, largest.mean(2, keepdim=True)], 2)
        return self.reg_conf(sharpness.flatten(1, 2))


class GFL(PyramidDetector):
    """The detector; called as torchvision's are (see ``PyramidDetector``).

    Args:
        num_classes: C; labels are 0..C-1.
        backbone: a timm model with ``features_only``.
        pretrained: the backbone's weights; see ``distillkit.models.backbones.backbone``.
        strides: pixels per cell of the levels, finest first, each twice the one before; levels coarser than the
            backbone's coarsest map are made by stride-2 convolutions.
        channels, convs, groups: width of pyramid and towers, depth of the towers, groups of their normalisation.
        bins: K; an edge can be at most K-1 strides away from its point.
        quality: the head of GFLv2.
        freeze_bn, frozen_stages, mean, std: as in ``PyramidDetector``.

    Attributes:
        strides, bins, num_classes.
        centre: 0, points stand at their cell's corner. octave: 8, side of the anchor box in strides.
        inference: an ``Inference``, replace it for other thresholds.
    """

    centre = 0.0
    octave = 8.0
    head: GFLHead

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet18",
        pretrained: bool | str | Path = False,
        *,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        channels: int = 256,
        convs: int = 4,
        groups: int = 32,
        bins: int = 17,
        quality: bool = False,
        **options: Unpack[PyramidOptions],
    ):
        super().__init__(num_classes, backbone, pretrained, strides=strides, channels=channels, **options)
        self.bins = bins
        self.head = GFLHead(num_classes, len(self.strides), channels, convs, bins, groups, quality)

    def losses(
        self,
        classes: Sequence[Tensor],
        edges: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes: Sizes,
    ) -> dict[str, Tensor]:
        """loss_cls, loss_bbox, loss_dfl: see ``gfl_losses``."""
        width = classes[0].shape[1]
        return gfl_losses(
            Maps(tuple(classes), (width,)),
            Maps(tuple(edges), (4, self.bins)),
            boxes,
            labels,
            sizes,
            strides=self.strides,
            centre=self.centre,
            octave=self.octave,
            scores=Maps(tuple(self.head.scores(classes, edges)), (width,)) if self.head.quality else None,
        )

    def predict(self, classes: Sequence[Tensor], edges: Sequence[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """The head's maps -> per picture boxes (k, 4) in its pixels, scores (k,) falling, labels (k,)."""
        scores = [s[:, : self.num_classes] for s in self.head.scores(classes, edges)]
        return predict(scores, edges, sizes, self.strides, self.centre, self.inference)


def gfl_r18(num_classes: int = 80, pretrained: bool | str | Path = False, **options: Any) -> GFL:
    """GFL with ResNet-18, as published: 19,420,889 parameters at 80 classes."""
    return GFL.preset(num_classes, "resnet18", pretrained, options)


def gfl_r34(num_classes: int = 80, pretrained: bool | str | Path = False, **options: Any) -> GFL:
    """GFL with ResNet-34, as published: 29,529,049 parameters at 80 classes."""
    return GFL.preset(num_classes, "resnet34", pretrained, options)


def gfl_r50(num_classes: int = 80, pretrained: bool | str | Path = False, **options: Any) -> GFL:
    """GFL with ResNet-50, as published: 32,440,537 parameters at 80 classes."""
    return GFL.preset(num_classes, "resnet50", pretrained, options)


def gfl_r101(num_classes: int = 80, pretrained: bool | str | Path = False, **options: Any) -> GFL:
    """GFL with ResNet-101, as published: 51,432,665 parameters at 80 classes."""
    return GFL.preset(num_classes, "resnet101", pretrained, options)


def load_openmmlab(model: GFL, path: str | Path) -> GFL:
    """Load a checkpoint of OpenMMLab's GFL (or GFLv2, in the release of LD) into a model of the same sizes.

    Published files and those a runner wrote both load, without running any code they name. Returns the model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, or one whose tensors do not fit: all missing, unexpected and misshapen names.
    """
    renamed = {}
    for key, value in read_weights(path).items():
        if key == "bbox_head.integral.project":  # the bins' values, which are 0..K-1 here by construction
            continue
        renamed["head." + key.removeprefix("bbox_head.") if key.startswith("bbox_head.") else key] = value
    explain_mismatch(path, model.state_dict(), renamed)
    model.load_state_dict(renamed)
    return model
