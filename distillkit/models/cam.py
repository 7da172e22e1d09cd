"""A classifier that is made for class activation maps. Zhou et al., arXiv:1512.04150; L2G, arXiv:2204.03206.

Backbone, one 1x1 convolution to the classes, mean over all places: the class logits are the means of their maps, which
stand open at the module path ``maps``. With pixel correlation (``pcm``, from SEAM, arXiv:2004.04581) the maps are

    fc8(x) + fc8(PCM(x, f)),    f = the small picture, and projections of two maps before the last, without gradient

with x the backbone's last map and the same fc8 twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distillkit.models.backbones import backbone as make_backbone
from distillkit.models.backbones import dilated, parameters_up_to
from distillkit.models.pixel_correlation import PixelCorrelation
from distillkit.models.resnet38 import WIDTHS, ResNet38

PROJECTED = (64, 128)  # channels of the two projections
#: what ResNet-38 takes, at the size of L2G's whole pictures
RESNET38: dict[str, Any] = {
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "input_size": (3, 448, 448),
}


class CamClassifier(nn.Module):
    """Pictures (B, 3, H, W), normalised as ``pretrained_cfg`` says -> logits (B, C), one yes or no for each class.

    Modules: ``backbone``; ``features``, through which its last map goes; ``fc8``; with ``pcm`` ``f8_3``, ``f8_4`` and
    ``pcm``; ``maps``, through which the maps (B, K, h, w) go: the C classes and, with ``background``, the background
    LAST.

    Args:
        num_classes: C, without the background.
        backbone: "resnet38" or a timm model that gives feature maps.
        pretrained: the backbone's weights: False, or for a timm model what ``distillkit.models.backbones.backbone``
            takes, for "resnet38" the path of a file.
        background: one more map, which is no class and has no part in the logits.
        pcm: pixel correlation.
        output_stride: pixels per cell of the last map, 8 or 16, where a timm model can be dilated to it; None: as the
            backbone is made.
        head_bias: fc8 has a bias.
        softmax: see ``adapters.cam.CamAdapter``: for networks that L2G has taught.
        freeze_bn: the backbone's BatchNorms do not train, neither weights nor statistics, as in L2G.
        frozen: the first layers do not train: a timm model's stem and first stage, ResNet-38's conv1a and b2*, as in
            L2G.

    Attributes:
        num_classes, background, softmax.
        pretrained_cfg: mean, std and input_size of the backbone's pretraining.

    Raises:
        ValueError: a backbone or an output stride that does not fit; what else ``backbone`` raises.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet38",
        pretrained: bool | str | Path = False,
        *,
        background: bool = True,
        pcm: bool = False,
        output_stride: int | None = None,
        head_bias: bool = False,
        freeze_bn: bool = False,
        frozen: bool = False,
        softmax: bool = False,
    ):
        super().__init__()
        self.num_classes, self.background, self.freeze_bn = num_classes, background, freeze_bn
        self.softmax = softmax
        self.backbone: Any
        if backbone == "resnet38":
            self.backbone, widths = _resnet38(pretrained, output_stride, frozen), list(WIDTHS)
            self.pretrained_cfg = dict(RESNET38)
        else:
            self.backbone = _timm(backbone, pretrained, output_stride, 3 if pcm else 1, frozen)
            widths = self.backbone.feature_info.channels()
            self.pretrained_cfg = {key: timm.get_pretrained_cfg_value(backbone, key) for key in RESNET38}
        self.features = nn.Identity()
        self.fc8 = nn.Conv2d(widths[-1], num_classes + background, 1, bias=head_bias)
        nn.init.xavier_uniform_(self.fc8.weight)
        if self.fc8.bias is not None:
            nn.init.zeros_(self.fc8.bias)
        self.pcm: PixelCorrelation | None = None
        if pcm:
            self.f8_3 = nn.Conv2d(widths[-3], PROJECTED[0], 1, bias=False)
            self.f8_4 = nn.Conv2d(widths[-2], PROJECTED[1], 1, bias=False)
            nn.init.kaiming_normal_(self.f8_3.weight)
            nn.init.kaiming_normal_(self.f8_4.weight)
            self.pcm = PixelCorrelation(3 + sum(PROJECTED))
        self.maps = nn.Identity()
        if freeze_bn:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_bn:
            for norm in self._norms():
                norm.eval()
        return self

    def forward(self, pictures: Tensor) -> Tensor:
        stages = self.backbone(pictures)
        if getattr(self.backbone, "output_fmt", None) == "NHWC":  # Swin and its kin
            stages = [m.permute(0, 3, 1, 2) for m in stages]
        x = self.features(stages[-1])
        maps = self.fc8(x)
        if self.pcm is not None:
            maps = maps + self.fc8(self.pcm(x, self._low_level(pictures, stages)))
        return self.maps(maps)[:, : self.num_classes].mean((2, 3))

    def _low_level(self, pictures: Tensor, stages: Sequence[Tensor]) -> Tensor:
        """What places are compared by, at the size of the last map: (B, 3 + 64 + 128, h, w)."""
        parts = [pictures, self.f8_3(stages[-3].detach()), self.f8_4(stages[-2].detach())]
        size = stages[-1].shape[2:]
        return torch.cat([F.interpolate(p, size=size, mode="bilinear", align_corners=True) for p in parts], 1)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.backbone.modules() if isinstance(m, _BatchNorm)]


def _resnet38(pretrained: bool | str | Path, output_stride: int | None, frozen: bool) -> ResNet38:
    if pretrained is True:
        raise ValueError("backbone 'resnet38': no weights are known by name; set pretrained to the path of a file")
    if output_stride not in (None, 8):
        raise ValueError(f"backbone 'resnet38' has output_stride 8, not {output_stride}")
    return ResNet38(pretrained or None, frozen)


def _timm(name: str, pretrained: bool | str | Path, output_stride: int | None, maps: int, frozen: bool) -> nn.Module:
    """The last so many maps of a timm model, of different strides, with the last dilated to ``output_stride``."""
    strides = _strides(name)[-maps:]
    if 0 < len(strides) < maps:
        raise ValueError(
            f"backbone {name!r} has maps at strides {strides} only, and pixel correlation reads two before the last: "
            "set pcm=False, or take a backbone with a pyramid"
        )
    features = make_backbone(name, strides or [32], pretrained)
    if output_stride is not None and output_stride != strides[-1]:
        features = dilated(name, features, output_stride)
    if frozen:
        first = set(parameters_up_to(features, 1))
        for key, parameter in features.named_parameters():
            parameter.requires_grad_(key not in first)
    return features


def _strides(name: str) -> list[int]:
    """Of a timm model's maps, each once; [] for a name that ``backbone`` will not know."""
    if not timm.is_model(name):
        return []
    with torch.device("meta"):
        made: Any = timm.create_model(name, features_only=True)
    return sorted(set(made.feature_info.reduction()))
