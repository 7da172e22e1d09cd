"""Rotated GFL: a one-stage, anchor-free detector whose rotated boxes are distributions.

The head of GFL (Li et al., arXiv:2006.04388, ``models.gfl``) with five distributions a point instead of four: the
distances to the left, top, right and bottom edge in the box's own frame, K bins of 0..K-1 strides, and the angle of
that frame, K bins around half a turn, the last and the first of which are neighbours (``boxes.rotated_distribution``).
Points stand in the middle of their cells and K is even by default, so that a picture turned by a quarter has the same
points and the same bins.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack, get_args

from torch import Tensor

from distillkit.boxes.anchors import grid_points, grid_strides
from distillkit.boxes.distribution import integral
from distillkit.boxes.maps import Maps
from distillkit.boxes.rotated import Convention
from distillkit.boxes.rotated_distribution import decode_turned, mean_angle
from distillkit.losses.gfl import gfl_losses
from distillkit.losses.rotated_gfl import RotatedLoss, rotated_losses
from distillkit.models.dense import Sizes
from distillkit.models.gfl import GFLHead
from distillkit.models.pyramid import PyramidDetector, PyramidOptions
from distillkit.models.rotated import AS_PUBLISHED, predict_rotated


class RotatedGFL(PyramidDetector):
    """The detector; called as torchvision's are (see ``PyramidDetector``), with boxes (k, 5): cx, cy, w, h in pixels,
    angle in radians, clockwise as seen.

    Positives are those of ATSS by the overlap of upright squares with the object itself, their points inside it. The
    quality that class scores learn is the rotated IoU.

    Args:
        num_classes: C; labels are 0..C-1.
        backbone, pretrained, strides: as in ``PyramidDetector``.
        channels, convs, groups: width of pyramid and towers, depth of the towers, groups of their normalisation.
        bins: K; an edge can be at most K-1 strides away from its point, and angles are K to half a turn.
        loss: of the boxes: "iou", 1 - rotated IoU; or between Gaussians "gwd", "kld" or "probiou". The default is what
            is measured in the end, it turns squares too, which have no direction as Gaussians, and its usual weakness,
            no gradient between boxes apart, does not arise: both boxes hold the point. RTMDet-R (arXiv:2212.07784)
            chose the same.
        freeze_bn, frozen_stages, mean, std: as in ``PyramidDetector``.

    Attributes:
        strides, bins, num_classes, loss.
        angle: "le90", how predicted boxes are written: w >= h, the angle in [-pi/2, pi/2).
        centre: 0.5, points stand in the middle of their cell. octave: 8, side of the anchor box in strides.
        inference: an ``Inference``, replace it for other thresholds.
    """

    columns = 5
    centre = 0.5
    octave = 8.0
    angle: Convention = "le90"
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
        bins: int = 16,
        loss: RotatedLoss = "iou",
        **options: Unpack[PyramidOptions],
    ):
        if loss not in get_args(RotatedLoss):
            raise ValueError(f"loss must be one of {', '.join(map(repr, get_args(RotatedLoss)))}, got {loss!r}")
        if bins < 3:
            raise ValueError(f"bins={bins}: an angle needs at least 3 bins to half a turn")
        super().__init__(num_classes, backbone, pretrained, strides=strides, channels=channels, **options)
        self.bins, self.loss = bins, loss
        self.inference = AS_PUBLISHED
        self.head = GFLHead(num_classes, len(self.strides), channels, convs, bins, groups, edges=5)

    def losses(
        self,
        classes: Sequence[Tensor],
        edges: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes: Sizes,
    ) -> dict[str, Tensor]:
        """loss_cls, loss_bbox, loss_dfl: see ``gfl_losses`` and ``rotated_losses``."""
        return gfl_losses(
            Maps(tuple(classes), (self.num_classes,)),
            Maps(tuple(edges), (5, self.bins)),
            boxes,
            labels,
            sizes,
            strides=self.strides,
            centre=self.centre,
            octave=self.octave,
            box_losses=partial(rotated_losses, loss=self.loss),
        )

    def predict(self, classes: Sequence[Tensor], edges: Sequence[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """The head's maps -> per picture boxes (k, 5) in its pixels, scores (k,) falling, labels (k,)."""
        scores = Maps(tuple(c.sigmoid() for c in classes), (self.num_classes,))
        points = grid_points(scores.sizes, self.strides, self.centre, classes[0].device)
        strides = grid_strides(scores.sizes, self.strides, classes[0].device)

        def decode(at: Tensor, logits: Tensor) -> Tensor:
            return decoded(logits, points[at], strides[at])

        maps = Maps(tuple(edges), (5, self.bins))
        return predict_rotated(scores, maps, sizes, points, decode, self.inference, self.angle)


def decoded(logits: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Edge logits (..., N, 5, K), points (N, 2) and strides (N,) in pixels -> boxes (..., N, 5)."""
    distances = integral(logits[..., :4, :]) * strides[:, None]
    return decode_turned(points.expand(*distances.shape[:-1], 2), distances, mean_angle(logits[..., 4, :]))


def rotated_gfl_r18(num_classes: int = 15, pretrained: bool | str | Path = False, **options: Any) -> RotatedGFL:
    """Rotated GFL with ResNet-18: 19,298,724 parameters at 15 classes."""
    return RotatedGFL.preset(num_classes, "resnet18", pretrained, options)


def rotated_gfl_r34(num_classes: int = 15, pretrained: bool | str | Path = False, **options: Any) -> RotatedGFL:
    """Rotated GFL with ResNet-34: 29,406,884 parameters at 15 classes."""
    return RotatedGFL.preset(num_classes, "resnet34", pretrained, options)


def rotated_gfl_r50(num_classes: int = 15, pretrained: bool | str | Path = False, **options: Any) -> RotatedGFL:
    """Rotated GFL with ResNet-50: 32,318,372 parameters at 15 classes."""
    return RotatedGFL.preset(num_classes, "resnet50", pretrained, options)
