"""Rotated RetinaNet with a distribution head, the detector of Rotated-LD (Zheng et al., arXiv:2204.05957).

A pyramid whose coarser levels come from the backbone's last map, two towers of convolutions, and 9 upright anchors a
cell (3 scales, 3 shapes). Each anchor has C class logits and five distributions over K bins: of what moves it in x and
y and stretches it in w and h (-2..2 each) and of the angle that turns it (-5..2 radians).

Modules are named as in OpenMMLab's detectors (``backbone``, ``neck``, and ``head`` for ``bbox_head``).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, cast, get_args

import torch
from torch import Tensor, nn

from distillkit.boxes.distribution import integral
from distillkit.boxes.maps import Maps
from distillkit.boxes.rotated import Convention
from distillkit.boxes.rotated_distribution import decode_deltas, delta_bins
from distillkit.boxes.shapes import shaped_anchors
from distillkit.losses.rotated_retina import GaussianLoss, retina_losses, retina_targets
from distillkit.models.dense import Sizes
from distillkit.models.gfl import PRIOR
from distillkit.models.neck import tower
from distillkit.models.pyramid import PyramidDetector, PyramidOptions
from distillkit.models.rotated import AS_PUBLISHED, predict_rotated

#: anchors of a cell: sides of 4 strides and up, 3 to the octave, each in three shapes (height over width)
OCTAVE, SCALES, RATIOS = 4.0, 3, (1.0, 0.5, 2.0)
ANCHORS = SCALES * len(RATIOS)


def anchors_of(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], centre: float, device: torch.device | str = "cpu"
) -> Tensor:
    """(height, width) of each level's map -> (N, 4) x1, y1, x2, y2 pixels, in the order level, y, x, anchor."""
    return shaped_anchors(sizes, strides, centre, OCTAVE, SCALES, RATIOS, device)


class RotatedRetinaHead(nn.Module):
    """The head, shared by all levels.

    Args:
        num_classes: C.
        channels, convs: width and depth of the two towers.
        bins: K.
    """

    def __init__(self, num_classes: int, channels: int, convs: int, bins: int):
        super().__init__()
        self.cls_convs = tower(channels, convs)
        self.reg_convs = tower(channels, convs)
        self.retina_cls = nn.Conv2d(channels, ANCHORS * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(channels, ANCHORS * 5 * bins, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.constant_(cast(Tensor, self.retina_cls.bias), math.log(PRIOR / (1 - PRIOR)))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level (B, channels, H, W) -> class logits (B, 9*C, H, W) and edge logits (B, 9*5*K, H, W)."""
        classes = [self.retina_cls(self.cls_convs(x)) for x in feats]
        return classes, [self.retina_reg(self.reg_convs(x)) for x in feats]


class RotatedRetina(PyramidDetector):
    """The detector; called as torchvision's are (see ``PyramidDetector``), with boxes (k, 5): cx, cy, w, h in pixels,
    angle in radians, clockwise as seen.

    Args:
        num_classes: C; labels are 0..C-1.
        backbone, pretrained, strides: as in ``PyramidDetector``.
        channels, convs: width of pyramid and towers, depth of the towers.
        bins: K.
        loss: of the boxes, a distance of Gaussians, "gwd" or "kld"; see ``losses.rotated_retina``.
        angle: how boxes are written ("oc" as released, "le90", "le135"; see ``boxes.rotated.normalize``): those that it
            predicts, and the objects' as distillers see them. Its losses are the same in each; of the regions only
            those with ``overlap="angle-free"`` differ.
        convention: ``release``: KLD divided level by level, see ``retina_losses``.
        freeze_bn, frozen_stages, mean, std: as in ``PyramidDetector``.

    Attributes:
        strides, bins, num_classes, loss, angle.
        support: (5, K) values of the bins.
        centre: 0, anchors are centred at their cell's corner.
        inference: an ``Inference``, replace it for other thresholds.
    """

    columns = 5
    centre = 0.0
    head: RotatedRetinaHead
    support: Tensor

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet18",
        pretrained: bool | str | Path = False,
        *,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        channels: int = 256,
        convs: int = 4,
        bins: int = 9,
        loss: GaussianLoss = "gwd",
        angle: Convention = "oc",
        convention: Literal["default", "release"] = "default",
        **options: Unpack[PyramidOptions],
    ):
        words: list[tuple[str, str, Any]] = [("loss", loss, GaussianLoss), ("angle", angle, Convention)]
        for name, value, known in (*words, ("convention", convention, Literal["default", "release"])):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {value!r}")
        super().__init__(
            num_classes, backbone, pretrained, strides=strides, channels=channels, extra="input", **options
        )
        self.bins, self.loss, self.angle, self.convention = bins, loss, angle, convention
        self.inference = AS_PUBLISHED
        self.head = RotatedRetinaHead(num_classes, channels, convs, bins)
        self.register_buffer("support", delta_bins(bins), persistent=False)

    def losses(
        self,
        classes: Sequence[Tensor],
        edges: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes: Sizes,
    ) -> dict[str, Tensor]:
        """loss_cls, loss_bbox: see ``retina_losses``."""
        class_maps, edge_maps = self._maps(classes, edges)
        anchors = anchors_of(class_maps.sizes, self.strides, self.centre, classes[0].device)
        target = retina_targets(anchors, self.num_classes, boxes, labels, sizes)
        return retina_losses(
            class_maps, edge_maps, anchors, target, self.support, self.loss, convention=self.convention
        )

    def predict(self, classes: Sequence[Tensor], edges: Sequence[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """The head's maps -> per picture boxes (k, 5) in its pixels, scores (k,) falling, labels (k,)."""
        scores, maps = self._maps([c.sigmoid() for c in classes], edges)
        anchors = anchors_of(scores.sizes, self.strides, self.centre, classes[0].device)

        def decode(at: Tensor, logits: Tensor) -> Tensor:
            return decode_deltas(anchors[at], integral(logits, self.support))

        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        return predict_rotated(scores, maps, sizes, centres, decode, self.inference, self.angle)

    def _maps(self, classes: Sequence[Tensor], edges: Sequence[Tensor]) -> tuple[Maps, Maps]:
        return Maps(tuple(classes), (self.num_classes,), ANCHORS), Maps(tuple(edges), (5, self.bins), ANCHORS)


def rotated_retina_r18(num_classes: int = 15, pretrained: bool | str | Path = False, **options: Any) -> RotatedRetina:
    """Rotated RetinaNet with ResNet-18, as published: 20,912,220 parameters at 15 classes."""
    return RotatedRetina.preset(num_classes, "resnet18", pretrained, options)


def rotated_retina_r34(num_classes: int = 15, pretrained: bool | str | Path = False, **options: Any) -> RotatedRetina:
    """Rotated RetinaNet with ResNet-34, as published: 31,020,380 parameters at 15 classes."""
    return RotatedRetina.preset(num_classes, "resnet34", pretrained, options)


def rotated_retina_r50(num_classes: int = 15, pretrained: bool | str | Path = False, **options: Any) -> RotatedRetina:
    """Rotated RetinaNet with ResNet-50, as published: 37,470,812 parameters at 15 classes."""
    return RotatedRetina.preset(num_classes, "resnet50", pretrained, options)
