"""What dense detectors put behind a backbone: convolutions under OpenMMLab's names, and the feature pyramid."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """A convolution as OpenMMLab nests and names it: ``conv``, then ``gn`` where groups are given, then ReLU if asked.

    It has a bias where nothing normalises after it.
    """

    def __init__(
        self, inside: int, out: int, kernel: int, stride: int = 1, groups: int | None = None, relu: bool = False
    ):
        super().__init__()
        self.conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=groups is None)
        self.gn = nn.GroupNorm(groups, out) if groups else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.gn is None else self.gn(x)
        return F.relu(x) if self.relu else x


def tower(channels: int, convs: int, groups: int | None = None) -> nn.Sequential:
    """``convs`` 3x3 convolutions of one width with ReLU, normalised where ``groups`` are given."""
    return nn.Sequential(*(Conv(channels, channels, 3, groups=groups, relu=True) for _ in range(convs)))


class FPN(nn.Module):
    """Feature pyramid network, arXiv:1612.03144; coarser levels by stride-2 convolutions.

    Args:
        widths: channels of the backbone's maps, finest first.
        channels: of every output.
        levels: number of outputs, at least ``len(widths)``.
        extra: what the first coarser level is made from: the pyramid's last ``output``, or the backbone's last map, the
            ``input``. The others are each made from the one before.
    """

    def __init__(self, widths: Sequence[int], channels: int, levels: int, extra: Literal["output", "input"] = "output"):
        super().__init__()
        self.extra = extra
        self.lateral_convs = nn.ModuleList(Conv(w, channels, 1) for w in widths)
        first = widths[-1] if extra == "input" else channels
        self.fpn_convs = nn.ModuleList(
            Conv(first if i == len(widths) else channels, channels, 3, 1 if i < len(widths) else 2)
            for i in range(levels)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [lateral(m) for lateral, m in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], merged[i - 1].shape[-2:], mode="nearest")
        out = [conv(m) for conv, m in zip(self.fpn_convs, merged)]
        last = maps[-1] if self.extra == "input" else out[-1]
        for conv in list(self.fpn_convs)[len(merged) :]:
            last = conv(last)
            out.append(last)
        return out
