"""Atrous spatial pyramid pooling: what parallel convolutions of several dilations see around every cell.

``ASPP`` is that of DeepLabv3 (Chen et al., arXiv:1706.05587). ``AdaptiveASPP`` is that of FANet (Cao et al., FakeMix
Augmentation Improves Transparent Object Detection, arXiv:2103.13279): two outputs, each of which weighs the branches
anew for every picture.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBNReLU(nn.Sequential):
    """A convolution without a bias that keeps the size, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()


class SeparableConv(nn.Sequential):
    """A depthwise 3x3 convolution and a pointwise one, each with BatchNorm and ReLU; the size is kept.

    Args:
        last_relu: False leaves the last ReLU out.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1, last_relu: bool = True):
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False
        )
        self.bn_depth = nn.BatchNorm2d(in_channels)
        self.relu_depth = nn.ReLU()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn_point = nn.BatchNorm2d(out_channels)
        if last_relu:
            self.relu_point = nn.ReLU()


class ImagePooling(ConvBNReLU):
    """The mean over the picture through a 1x1 convolution, at every cell again: (B, c, h, w) -> (B, out, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bn.training and len(x) == 1 and not isinstance(self.bn, nn.SyncBatchNorm):
            raise ValueError(
                "ASPP's image pooling has one value a picture, and BatchNorm in training needs more than one: give at "
                "least 2 pictures a step and process (drop_last=True drops an odd last one), convert the model with "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm on several devices, or put the ASPP into eval mode"
            )
        return super().forward(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])


class ASPP(nn.Module):
    """A 1x1 convolution, dilated 3x3 ones and image pooling, side by side, then a 1x1 convolution of them all.

    Args:
        in_channels, out_channels: of the map, and of every branch and the output.
        rates: dilation of each 3x3 branch, in cells; (6, 12, 18) is for maps of 16 pixels a cell (``scaled_rates``).
        separable: the 3x3 branches are ``SeparableConv``s (DeepLabv3+): fewer operations, about equal accuracy.
        dropout: of whole channels of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        separable: bool = True,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.branches = _branches(in_channels, out_channels, rates, separable)
        self.project = ConvBNReLU(len(self.branches) * out_channels, out_channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w).

        Raises:
            ValueError: one picture only in training, which BatchNorm cannot normalise.
        """
        return self.dropout(self.project(torch.cat([branch(x) for branch in self.branches], 1)))


class AdaptiveASPP(nn.Module):
    """Seven branches that two outputs share: one for segmentation, one for boundaries.

    Image pooling, a 1x1 convolution and five dilated separable ones. Each output multiplies the branches by weights in
    1..2 that it makes of the branches' means, picture by picture, and mixes them by a 1x1 convolution.

    Args:
        in_channels, out_channels: of the map, and of every branch and both outputs.
        rates: dilation of each separable branch, in cells; the published ones are for FANet's stages at output stride
            16 (``scaled_rates``).
        dropout: of whole channels of each output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (6, 12, 18, 24, 36),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.branches = _branches(in_channels, out_channels, rates, separable=True)
        self.segmentation = GatedMix(len(self.branches), out_channels, dropout)
        self.boundary = GatedMix(len(self.branches), out_channels, dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channels, h, w) -> two maps (B, out_channels, h, w), for segmentation and for boundaries.

        Raises:
            ValueError: one picture only in training, which BatchNorm cannot normalise.
        """
        found = [branch(x) for branch in self.branches]
        means = torch.stack([f.mean((1, 2, 3), dtype=torch.float32) for f in found], 1)
        together = torch.cat(found, 1)
        return self.segmentation(together, means), self.boundary(together, means)


class GatedMix(nn.Module):
    """One output of ``AdaptiveASPP``: (B, K * c, h, w), the K branches, and (B, K), their means -> (B, c, h, w)."""

    def __init__(self, branches: int, channels: int, dropout: float):
        super().__init__()
        self.gates = Gates(branches)
        self.project = ConvBNReLU(branches * channels, channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, together: Tensor, means: Tensor) -> Tensor:
        """The branches are multiplied by their weights within the convolution, whose kernel then differs from picture
        to picture: a weighted copy of all branches, the largest tensor of the model, is never made."""
        factors = (1 + self.gates(means)).repeat_interleave(self.project.conv.out_channels, 1)  # (B, K * c)
        kernels = (factors[:, None] * self.project.conv.weight.flatten(1)).to(together.dtype)  # (B, c, K * c)
        mixed = (kernels @ together.flatten(2)).unflatten(2, together.shape[2:])
        return self.dropout(self.project.relu(self.project.bn(mixed)))


class Gates(nn.Module):
    """Scores of K branches by their means, stretched to 0..1: (B, K) -> (B, K) float32.

    ``a = relu(tanh(W2 relu(W1 v + b1) + b2))``, ``g = (a - min a) / (max a - min a + 1e-32)``. The best branch of a
    picture gets 1 and the worst 0; where no score is positive all get 0. In float32 also under autocast and for models
    in half precision, where 1e-32 would be 0 and a picture without a positive score would get 0/0. As published, the
    scores get no gradient from a picture in which none, or only one, is positive.
    """

    def __init__(self, branches: int):
        super().__init__()
        self.hidden = nn.Linear(branches, branches)
        self.score = nn.Linear(branches, branches)

    def forward(self, means: Tensor) -> Tensor:
        with torch.autocast(means.device.type, enabled=False):
            scores = _in_float32(self.score, F.relu(_in_float32(self.hidden, means.float())))
            scores = F.relu(scores.tanh())
            least, most = scores.aminmax(dim=1, keepdim=True)
            return (scores - least) / (most - least + 1e-32)


def scaled_rates(rates: Sequence[int], stride: int, published: int) -> list[int]:
    """Dilations that reach as far at ``stride`` pixels a cell as ``rates`` do at ``published`` pixels a cell.

    Raises:
        ValueError: one of them would be no whole number of cells.
    """
    if any(rate * published % stride for rate in rates):
        raise ValueError(
            f"dilations {tuple(rates)}, made for {published} pixels a cell, are no whole numbers of cells at {stride}; "
            "choose a smaller output_stride"
        )
    return [rate * published // stride for rate in rates]


def _branches(in_channels: int, out_channels: int, rates: Sequence[int], separable: bool) -> nn.ModuleList:
    """Image pooling, the 1x1 convolution, and the dilated ones."""

    def dilated(rate: int) -> nn.Module:
        if separable:
            return SeparableConv(in_channels, out_channels, rate)
        return ConvBNReLU(in_channels, out_channels, 3, rate)

    pooling, pointwise = ImagePooling(in_channels, out_channels), ConvBNReLU(in_channels, out_channels)
    return nn.ModuleList([pooling, pointwise, *map(dilated, rates)])


def _in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())
