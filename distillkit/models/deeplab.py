"""DeepLab: semantic segmentation on a dilated backbone.

v3+ (Chen et al., Encoder-Decoder with Atrous Separable Convolution, arXiv:1802.02611): ASPP on the coarsest map, then a
decoder that sharpens it with the map of stride 4. v2 (Chen et al., DeepLab, arXiv:1606.00915): nothing but the sum of
four dilated classifiers, trained at three sizes of the picture at once; most methods of weakly supervised segmentation,
L2G (arXiv:2204.03206) among them, train it on their pseudo masks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from distillkit.models.aspp import ASPP, ConvBNReLU, SeparableConv, scaled_rates
from distillkit.models.segmentation import SegmentationModel, resized

V3PLUS_RATES = (6, 12, 18)  # at 16 pixels a cell
V2_RATES = (6, 12, 18, 24)  # at 8 pixels a cell: the large field of view
LOW_CHANNELS = 48
SCALES = (1.0, 0.75, 0.5)  # of the picture, with ``multi_scale``


class DeepLab(SegmentationModel):
    """DeepLabv3+ or DeepLabv2 on any timm backbone.

    Args:
        num_classes, backbone, pretrained, freeze_bn: see ``SegmentationModel``.
        version: "v3plus" or "v2".
        output_stride: 8, 16 or 32; unless given 16 for v3plus and 8 for v2, as published. Dilations are scaled with it;
            v2 cannot have 32.
        multi_scale: logits are the greatest, class by class and pixel by pixel, of those for the picture at 1, 0.75 and
            0.5 of its size. Published for v2, with ``freeze_bn``: else each size counts in the statistics.
        channels: width of the ASPP and the decoder of v3plus.
        separable: their 3x3 convolutions are separable.

    Raises:
        ValueError: another version, dilations that an output stride does not allow; and as ``SegmentationModel``.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        pretrained: bool | str | Path = False,
        version: Literal["v3plus", "v2"] = "v3plus",
        output_stride: int | None = None,
        *,
        multi_scale: bool = False,
        channels: int = 256,
        separable: bool = True,
        freeze_bn: bool = False,
    ):
        if version not in ("v3plus", "v2"):
            raise ValueError(f"version is {version!r}, expected 'v3plus' or 'v2'")
        published = 16 if version == "v3plus" else 8
        stride = published if output_stride is None else output_stride
        super().__init__(num_classes, backbone, pretrained, stride, freeze_bn)
        self.version, self.multi_scale = version, multi_scale
        self.head: nn.Module
        if version == "v3plus":
            rates = scaled_rates(V3PLUS_RATES, stride, 16)
            self.head = V3PlusHead(self.widths, num_classes, rates, channels, separable)
        else:
            self.head = V2Head(self.widths, num_classes, scaled_rates(V2_RATES, stride, 8))
        self.train()

    def forward(self, pictures: Tensor) -> Tensor | dict[str, Tensor | list[Tensor]]:
        """Logits of every pixel.

        Args:
            pictures: (B, 3, H, W), normalised as ``pretrained_cfg`` says, of any size.

        Returns:
            (B, C, H, W) logits; with ``multi_scale`` in train mode {"out": these, "scales": for each of the three sizes
            (B, C, h, w) logits as the head gives them, at 4 pixels a cell for v3plus and ``output_stride`` for v2}.
            Where the sides are no multiples of ``output_stride`` these cover more than the picture; they are then
            brought to its pixels as well, so that masks of any size fit them.
        """
        padded, size = self.padded(pictures), pictures.shape[2:]
        if not self.multi_scale:
            return self.at_pixels(self.head(self.features(padded)), padded, size)
        scales = [self.head(self.features(self._scaled(padded, scale))) for scale in SCALES]
        greatest = torch.stack([resized(s, scales[0].shape[2:]) for s in scales]).amax(0)
        out = self.at_pixels(greatest, padded, size)
        if not self.training:
            return out
        fit = padded.shape == pictures.shape
        return {"out": out, "scales": scales if fit else [self.at_pixels(s, padded, size) for s in scales]}

    def _scaled(self, padded: Tensor, scale: float) -> Tensor:
        """Pictures at ``scale``, their sides rounded to multiples of the output stride."""
        cells = (max(1, round(side * scale / self.output_stride)) for side in padded.shape[2:])
        return padded if scale == 1 else resized(padded, [n * self.output_stride for n in cells])


class V3PlusHead(nn.Module):
    """The backbone's maps, finest first -> class logits at the size of the first.

    Args:
        widths: channels of the maps; the first and the last are read.
        rates: of the ASPP.
    """

    def __init__(
        self, widths: Sequence[int], num_classes: int, rates: Sequence[int], channels: int, separable: bool = True
    ):
        super().__init__()
        self.aspp = ASPP(widths[-1], channels, rates, separable)
        self.low = ConvBNReLU(widths[0], LOW_CHANNELS)
        joined = LOW_CHANNELS + channels
        if separable:
            self.refine = nn.Sequential(SeparableConv(joined, channels), SeparableConv(channels, channels))
        else:
            self.refine = nn.Sequential(ConvBNReLU(joined, channels, 3), ConvBNReLU(channels, channels, 3))
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        low = self.low(maps[0])
        context = resized(self.aspp(maps[-1]), low.shape[2:])
        return self.classify(self.refine(torch.cat([low, context], 1)))


class V2Head(nn.Module):
    """The backbone's maps -> class logits at the size of the last: dilated 3x3 classifiers of it, summed."""

    def __init__(self, widths: Sequence[int], num_classes: int, rates: Sequence[int]):
        super().__init__()
        classifiers = [nn.Conv2d(widths[-1], num_classes, 3, padding=rate, dilation=rate) for rate in rates]
        for conv in classifiers:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, conv.bias))
        self.classify = nn.ModuleList(classifiers)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.stack([classify(maps[-1]) for classify in self.classify]).sum(0)
