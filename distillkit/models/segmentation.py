"""What the segmentation models share: a timm backbone whose last stages are dilated, and what its input should be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distillkit.models.backbones import backbone as make_backbone
from distillkit.models.backbones import dilated

STRIDES = (4, 8, 16, 32)  # pixels per cell of a backbone's maps before any of its stages is dilated
OUTPUT_STRIDES = (8, 16, 32)


class SegmentationModel(nn.Module):
    """Base of the segmentation models: a timm backbone and its maps. A model adds what makes logits of them.

    Args:
        num_classes: C, the background counted where it is a class.
        backbone: a timm model with ``features_only``.
        pretrained: the backbone's weights; see ``distillkit.models.backbones.backbone``.
        output_stride: pixels per cell of the coarsest map, 8, 16 or 32. Stages that would be coarser are dilated
            instead, which changes no weight; not every family of timm can.
        freeze_bn: the backbone's BatchNorm statistics stay as they are (their weights train).

    Attributes:
        num_classes, output_stride.
        pretrained_cfg: "mean" and "std" that pictures are to be normalised with, and "input_size" (3, H, W), of the
            backbone's own pretraining.

    Raises:
        ValueError: fewer than two classes, an output stride that there is not, or that the backbone cannot have.
    """

    def __init__(
        self, num_classes: int, backbone: str, pretrained: bool | str | Path, output_stride: int, freeze_bn: bool
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected 2 or more: count the background as a class")
        self.num_classes, self.output_stride, self.freeze_bn = num_classes, output_stride, freeze_bn
        self.backbone = dilated_backbone(backbone, output_stride, pretrained)
        said = self.backbone.pretrained_cfg  # found by timm's old names too, unlike by timm.get_pretrained_cfg
        self.pretrained_cfg = {key: said[key] for key in ("mean", "std", "input_size")}

    @property
    def strides(self) -> list[int]:
        """Pixels per cell of each of the backbone's maps, e.g. [4, 8, 16, 16]."""
        return self.backbone.feature_info.reduction()

    @property
    def widths(self) -> list[int]:
        """Channels of each of the backbone's maps."""
        return self.backbone.feature_info.channels()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.backbone.modules() if self.freeze_bn else ():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def padded(self, pictures: Tensor) -> Tensor:
        """Pictures with zeros, the mean colour, to the right and below, so that their sides are multiples of the output
        stride: every cell then covers as many pixels, as in training, and none is cut off."""
        height, width = pictures.shape[2:]
        return F.pad(pictures, (0, -width % self.output_stride, 0, -height % self.output_stride))

    def at_pixels(self, logits: Tensor, padded: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
        """Logits (B, C, h, w) of ``padded`` pictures -> (B, C, height, width), where ``size`` was theirs before."""
        height, width = size
        return resized(logits, padded.shape[2:], align_corners)[..., :height, :width]

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Padded pictures (B, 3, H, W) -> the backbone's maps (B, c, H/stride, W/stride), finest first."""
        maps = self.backbone(pictures)
        if getattr(self.backbone, "output_fmt", None) == "NHWC":  # Swin and its kin
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return maps


def dilated_backbone(name: str, output_stride: int, pretrained: bool | str | Path = False) -> Any:
    """A timm model that returns its maps of strides 4, 8, 16 and 32, none of them coarser than ``output_stride``.

    Returns:
        an nn.Module: (B, 3, H, W) -> list of maps; its ``feature_info`` holds their channels and strides, the latter
        e.g. 4, 8, 16, 16.

    Raises:
        ValueError: an output stride that there is not, or that this backbone cannot have; and as ``backbone``.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride is {output_stride}, expected one of {OUTPUT_STRIDES}")
    plain = make_backbone(name, STRIDES, pretrained)
    coarsest = plain.feature_info.reduction()[-1]
    if coarsest == output_stride:
        return plain
    if coarsest < output_stride:
        raise ValueError(f"backbone {name!r} is never coarser than {coarsest} pixels a cell: output_stride={coarsest}")
    return dilated(name, plain, output_stride)


def resized(maps: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Maps (B, C, h, w) at (height, width), bilinear."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=align_corners)
