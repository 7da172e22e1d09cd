"""FANet: segmentation of transparent objects by their boundaries. Cao et al., FakeMix Augmentation Improves Transparent
Object Detection, arXiv:2103.13279.

Two streams, segmentation and boundary, over the four maps of a backbone. At every map an ``AdaptiveASPP`` feeds both,
the boundary features strengthen the segmentation features where they fire, and each stream is fused from the coarsest
map to the finest. Train it with ``FakeMix``, which pastes boundaries where there are none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from distillkit.models.aspp import ASPP, AdaptiveASPP, SeparableConv, scaled_rates
from distillkit.models.segmentation import SegmentationModel, resized

PUBLISHED_STRIDES = (4, 8, 16, 16)  # of the four maps, at output stride 16
ADAPTIVE_RATES = (6, 12, 18, 24, 36)  # at each of these
PLAIN_RATES = (6, 12, 18)


class FANet(SegmentationModel):
    """FANet on any timm backbone with maps at strides 4, 8, 16 and 32.

    Args:
        num_classes, backbone, pretrained, freeze_bn: see ``SegmentationModel``.
        context: "adaptive", or "aspp" for the ablation: a plain ASPP at each map, whose one output feeds both streams.
        output_stride: 16 as published, 8 or 32. Dilations at a map whose stride changes with it are scaled.
        channels: width of everything behind the backbone.

    Raises:
        ValueError: another context, a backbone with fewer maps; and as ``SegmentationModel``.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path = False,
        context: Literal["adaptive", "aspp"] = "adaptive",
        output_stride: int = 16,
        *,
        channels: int = 256,
        freeze_bn: bool = False,
    ):
        if context not in ("adaptive", "aspp"):
            raise ValueError(f"context is {context!r}, expected 'adaptive' or 'aspp'")
        super().__init__(num_classes, backbone, pretrained, output_stride, freeze_bn)
        if len(self.strides) != len(PUBLISHED_STRIDES):
            raise ValueError(f"backbone {backbone!r} has maps at strides {self.strides}, and FANet needs four")
        stages = list(zip(self.widths, self.strides, PUBLISHED_STRIDES))
        self.contexts = nn.ModuleList(
            AdaptiveASPP(width, channels, scaled_rates(ADAPTIVE_RATES, stride, published))
            if context == "adaptive"
            else ASPP(width, channels, scaled_rates(PLAIN_RATES, stride, published))
            for width, stride, published in stages
        )
        self.masks = nn.ModuleList(SeparableConv(channels, channels, last_relu=False) for _ in stages)
        self.fuse_segmentation, self.fuse_boundary = TopDown(len(stages), channels), TopDown(len(stages), channels)
        self.segment, self.bound = _head(channels, num_classes), _head(channels, 1)
        self.train()

    def forward(self, pictures: Tensor) -> Tensor | dict[str, Tensor]:
        """Logits of every pixel.

        Args:
            pictures: (B, 3, H, W), normalised as ``pretrained_cfg`` says, of any size.

        Returns:
            eval mode: (B, C, H, W) logits. Train mode: {"out": these, "boundary": (B, 1, H, W) logits}.
        """
        padded, size = self.padded(pictures), pictures.shape[2:]
        segmentation, boundary = self.streams(self.features(padded))
        out = self.at_pixels(self.segment(self.fuse_segmentation(segmentation)), padded, size, align_corners=True)
        if not self.training:
            return out
        edges = self.at_pixels(self.bound(self.fuse_boundary(boundary)), padded, size, align_corners=True)
        return {"out": out, "boundary": edges}

    def streams(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The backbone's maps -> for each the segmentation and the boundary features, the former multiplied by 1..2
        where the latter find a boundary."""
        segmentation, boundary = [], []
        for context, mask, m in zip(self.contexts, self.masks, maps, strict=True):
            found = context(m)
            seg, bound = (found, found) if isinstance(found, Tensor) else found
            segmentation.append(seg + seg * mask(bound).sigmoid())
            boundary.append(bound)
        return segmentation, boundary


class TopDown(nn.Module):
    """Maps of one width, finest first -> one map at the size of the first: each through a convolution, with the result
    of the next coarser one added to it before."""

    def __init__(self, levels: int, channels: int):
        super().__init__()
        self.convs = nn.ModuleList(SeparableConv(channels, channels) for _ in range(levels))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, last = zip(self.convs, maps, strict=True)
        conv, m = last
        fused = conv(m)
        for conv, m in reversed(finer):
            fused = conv(m + resized(fused, m.shape[2:], align_corners=True))
        return fused


def _head(channels: int, out: int) -> nn.Sequential:
    blocks = SeparableConv(channels, channels), SeparableConv(channels, channels)
    return nn.Sequential(*blocks, nn.Conv2d(channels, out, 1))
