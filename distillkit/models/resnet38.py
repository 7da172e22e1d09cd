"""ResNet-38: a wide, pre-activated residual network of output stride 8. Wu et al., Wider or Deeper, arXiv:1611.10080.

The backbone of many methods that learn segmentation from image labels (PSA, SEAM, L2G, arXiv:2204.03206).

| block | layers | channels | stride, dilation |
|---|---|---|---|
| conv1a | 3x3 | 64 | 1, 1 |
| b2, b2_1, b2_2 | two 3x3 | 128 | 2, 1 |
| b3, b3_1, b3_2 | two 3x3 | 256 | 2, 1 |
| b4, b4_1 .. b4_5 | two 3x3 | 512 | 2, 1 |
| b5, b5_1, b5_2 | two 3x3, 512 between them | 1024 | 1, 2 (the first convolution of b5: 1) |
| b6 | 1x1, 3x3, 1x1 with 512 and 1024 between them, dropout 0.3 | 2048 | 1, 4 |
| b7 | 1x1, 3x3, 1x1 with 1024 and 2048 between them, dropout 0.5 | 4096 | 1, 4 |
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.models.weights import explain_mismatch, read_weights

WIDTHS = (512, 1024, 4096)  # of the maps that the network returns


def activated(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.relu(norm(x), inplace=True)


class Block(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3. A change of width goes through a 1x1 on the activated input.

    Returns the output and the activated input.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, dilations: tuple[int, int]):
        super().__init__()
        first, second = dilations
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, middle, 3, stride, first, first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, outputs, 3, 1, second, second, bias=False)
        same = inputs == outputs and stride == 1
        self.conv_branch1 = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = activated(self.bn_branch2a, x)
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(active)
        y = self.conv_branch2a(active)
        y = self.conv_branch2b1(activated(self.bn_branch2b1, y))
        return shortcut + y, active


class Bottleneck(nn.Module):
    """Norm, ReLU, 1x1 to a quarter of the output's width, norm, ReLU, dropout, 3x3 to half, norm, ReLU, dropout, 1x1.

    Dropout drops whole channels. Returns the output and the activated input.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, outputs // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(outputs // 4)
        self.conv_branch2b1 = nn.Conv2d(outputs // 4, outputs // 2, 3, 1, dilation, dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(outputs // 2)
        self.conv_branch2b2 = nn.Conv2d(outputs // 2, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = activated(self.bn_branch2a, x)
        y = self.conv_branch2a(active)
        y = self.conv_branch2b1(self.dropout(activated(self.bn_branch2b1, y)))
        y = self.conv_branch2b2(self.dropout(activated(self.bn_branch2b2, y)))
        return self.conv_branch1(active) + y, active


class ResNet38(nn.Module):
    """Pictures (B, 3, H, W), normalised -> maps (B, 512, h, w), (B, 1024, h, w), (B, 4096, h, w) of stride 8.

    They are the activated inputs of b5 and b6, and the activated end ("conv4", "conv5", "conv6").

    Args:
        pretrained: None, or the path of a file of weights under this module's names; a classifier in it (``fc8.*``,
            ``linear1000.*``) is left out.
        frozen: conv1a and the blocks b2, b2_1 and b2_2 do not train.

    Raises:
        FileNotFoundError, ValueError: no such file, or one of another network; names that do not fit are listed.
    """

    def __init__(self, pretrained: str | Path | None = None, frozen: bool = False):
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        inputs = 64
        for name, count, middle, outputs, stride, first, dilation in (
            ("b2", 3, 128, 128, 2, 1, 1),
            ("b3", 3, 256, 256, 2, 1, 1),
            ("b4", 6, 512, 512, 2, 1, 1),
            ("b5", 3, 512, 1024, 1, 1, 2),
        ):
            self.add_module(name, Block(inputs, middle, outputs, stride, (first, dilation)))
            for i in range(1, count):
                self.add_module(f"{name}_{i}", Block(outputs, middle, outputs, 1, (dilation, dilation)))
            inputs = outputs
        self.b6 = Bottleneck(1024, 2048, 4, 0.3)
        self.b7 = Bottleneck(2048, 4096, 4, 0.5)
        self.bn7 = nn.BatchNorm2d(4096)
        if pretrained is not None:
            self._load(pretrained)
        if frozen:
            for name, module in self.named_children():
                module.requires_grad_(not name.startswith(("conv1a", "b2")))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv1a(x)
        maps = []
        for name, block in self.named_children():
            if name not in ("conv1a", "bn7"):
                x, active = block(x)
                if name in ("b5", "b6"):
                    maps.append(active)
        return [*maps, activated(self.bn7, x)]

    def _load(self, path: str | Path) -> None:
        found = read_weights(path)
        found = {name: value for name, value in found.items() if not name.startswith(("fc8.", "linear1000."))}
        wanted = self.state_dict()
        for name, value in wanted.items():  # files older than torch 0.4.1 lack these counters
            if name.endswith("num_batches_tracked"):
                found.setdefault(name, value)
        explain_mismatch(path, wanted, found)
        self.load_state_dict(found)
