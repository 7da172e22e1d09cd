"""A distribution head for a plain box regressor, so that localization distillation works on it.

A regressor's last layer says one number y of every edge. ``to_distribution`` puts a layer in its place that says a
distribution over K values b_k and returns its mean. It begins as a Gaussian around y,

    softmax_k(y b_k / s^2 - b_k^2 / (2 s^2)),        y = W x + b_0,

which is a convolution again, with weights W b_k / s^2 and biases b_0 b_k / s^2 - b_k^2 / (2 s^2): the first prediction
is that of the old layer, to 1e-3 of the distance of two bins, wherever y is at least 3 bins inside the support.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.boxes.distribution import integral
from distillkit.core.adapter import comes_from

#: s^2 in squared distances of two bins: below it the mean is bent between the bins, above it the tails are cut off
VARIANCE = 0.75
#: bins that the support of a regressor needs, 3 on either side and one that is exact
LEAST = 7
#: an FCOS is trained on distances of up to so many strides (of any length on its last level)
FCOS_REACH = 8
FCOS_BINS = tuple(float(b) for b in range(-4, 17))
DELTA_BINS = tuple(b / 4 for b in range(-12, 13))


def to_distribution(detector: nn.Module, bins: Sequence[float] | None = None, layer: str | None = None) -> nn.Module:
    """A copy of a detector whose last regression layer is a ``DistributionLayer``: what ``LD`` needs.

    Everything else stays as it is: the same class, ``forward``, losses and predictions. The price is in the
    ``state_dict``: ``<layer>.weight`` and ``.bias`` become ``<layer>.logits.weight``, ``.logits.bias`` and
    ``<layer>.bins``.

    Args:
        detector: torchvision's FCOS or RetinaNet, mmdet's RetinaNet or mmrotate's rotated one, or a subclass; any other
            with ``layer``. With its trained weights.
        bins: the values, increasing and evenly apart, in what the layer regresses: strides of a level in FCOS; the
            deltas of an anchor in RetinaNet. None: -4 to 16 by 1, and -3 to 3 by 1/4.
        layer: path of the last regression layer of any other detector: a convolution of which every output channel is
            an edge's distance (of several anchors a cell, channel ``anchor * 4 + edge``). Its distributions are then
            read by ``DistributionHead(edges=f"{layer}.logits", bins=bins, ...)``.

    FCOS cuts what is below 0 off, so that only the upper end of its bins is a limit, and the lower must be 0 or less.

    Raises:
        ValueError: no layer is known for the detector, or the path leads to no convolution; bins that are too few, not
            evenly apart, or cannot hold what FCOS is trained on.
    """
    path, known, floor = _layer_of(detector) if layer is None else (layer, None, None)
    if bins is None and known is None:
        raise ValueError(f"bins= must say which values {path!r} of {type(detector).__name__} regresses")
    values = _checked(known if bins is None else bins)
    if floor is not None and (values[0] > floor or values[-1] < FCOS_REACH):
        raise ValueError(
            f"bins go from {values[0]:g} to {values[-1]:g}, and FCOS is trained on distances of 0 to {FCOS_REACH} "
            "strides and more: they must begin at 0 or below (3 bins below for equal predictions), and reach beyond "
            f"{FCOS_REACH}, as in bins=range(-4, 17)"
        )
    made = copy.deepcopy(detector)
    parent, _, name = path.rpartition(".")
    try:
        conv = made.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"layer={path!r}: {type(detector).__name__} has no such module ({error})") from None
    if isinstance(conv, DistributionLayer):
        raise ValueError(f"{path!r} of {type(detector).__name__} is a distribution head already")
    if not isinstance(conv, nn.Conv2d) or (known is None and conv.out_channels % 4):
        raise ValueError(
            f"{path!r} of {type(detector).__name__} is no convolution of 4 channels an anchor: {conv}. Name the last "
            "regression layer, layer='path.of.it'"
        )
    setattr(made.get_submodule(parent), name, DistributionLayer(conv, values, floor))
    return made


class DistributionLayer(nn.Module):
    """Means of distributions over ``bins``, one for every channel of the layer that it takes the place of.

    Args:
        conv: that layer, with its weights.
        bins: (K,) increasing, evenly apart.
        floor: what is below is cut off by the head, so that the lower end is no limit; None: nothing is.

    (B, N, H, W) -> (B, M, H, W) as ``conv``, in float32 at least. ``logits`` returns (B, M * K, H, W), the bins of a
    channel next to each other. Both run outside of autocast: half precision has too few digits for a sharp
    distribution.

    While its weights are as they were made, the old layer's numbers can be told from its logits; numbers beyond the
    bins are an error that names them. On the CPU every call is looked at; elsewhere the extremes are kept on the
    device and read at calls 1, 2, 4, 8, ..., so that training waits for nothing. A compiled call is not looked at.

    Raises:
        ValueError: a number outside of the bins.
    """

    bins: Tensor

    def __init__(self, conv: nn.Conv2d, bins: Tensor, floor: float | None = None):
        super().__init__()
        self.floor = floor
        bins = bins.to(conv.weight)
        step, middle = bins[1] - bins[0], (bins[0] + bins[-1]) / 2
        # around the middle: the same softmax, and logits that are no larger than they need to be
        offsets, variance = bins - middle, VARIANCE * step**2
        count, width = len(bins), conv.out_channels
        self.logits = nn.Conv2d(
            conv.in_channels,
            width * count,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            padding_mode=conv.padding_mode,  # type: ignore[arg-type]
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        slope = (offsets / variance).repeat(width)
        with torch.no_grad():
            start = conv.weight.new_zeros(width) if conv.bias is None else conv.bias
            centred = (start - middle).repeat_interleave(count)
            self.logits.weight.copy_(conv.weight.repeat_interleave(count, 0) * slope.view(-1, 1, 1, 1))
            assert self.logits.bias is not None
            self.logits.bias.copy_(centred * slope - (offsets**2 / (2 * variance)).repeat(width))
        self.logits.weight.requires_grad_(conv.weight.requires_grad)
        self.logits.bias.requires_grad_(conv.weight.requires_grad)
        self.register_buffer("bins", bins)
        self._middle = float(middle)
        self._per_logit = VARIANCE * float(step) ** 2 / float(bins[-1] - bins[0])
        self._looks, self._calls = True, 0
        self._seen: list[Tensor] = []  # on the device, since the last look

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x.to(self.logits.weight.dtype))
            spread = logits.unflatten(1, (-1, len(self.bins)))  # (B, M, K, H, W)
            if self._looks and not torch.compiler.is_compiling():
                self._look(spread.detach())
            return integral(spread.movedim(2, -1), self.bins)

    def check_reach(self, least: float, greatest: float, what: str) -> None:
        """Raise ValueError where ``what`` has numbers from ``least`` to ``greatest`` and the bins do not hold them."""
        low, high = float(self.bins[0]), float(self.bins[-1])
        if (self.floor is None and least < low) or greatest > high:
            raise ValueError(
                f"{what}: the regression's numbers go from {least:.3g} to {greatest:.3g}, and its distributions only "
                f"from {low:g} to {high:g}: give to_distribution bins= that hold them, and 3 more on either side"
            )

    @torch.no_grad()
    def _look(self, spread: Tensor) -> None:
        """Keep the extremes of the old layer's numbers, and read them where that costs nothing, or at times.

        Nothing is looked at any more once the weights are no longer those that were made.
        """
        # the logits of the two ends are straight lines of the number, with opposite slopes
        numbers = self._middle + (spread[:, :, -1] - spread[:, :, 0]) * self._per_logit
        ends = self.logits.weight.unflatten(0, (-1, len(self.bins)))[:, :: len(self.bins) - 1]
        as_made = ends.sum(1).abs().amax() <= 1e-4 * ends.abs().amax()
        least, greatest = (end.where(as_made, self._middle) for end in (numbers.amin(), numbers.amax()))
        seen = torch.stack([least, -greatest, as_made]).float()
        for earlier in self._seen:
            seen = torch.minimum(seen, earlier.to(seen.device))
        self._seen = [seen]
        self._calls += 1
        if self._due(spread.device):
            lowest, highest, still = self._seen.pop().tolist()
            self.check_reach(lowest, -highest, "a picture")
            self._looks = bool(still)

    def _due(self, device: torch.device) -> bool:
        return device.type == "cpu" or not self._calls & (self._calls - 1)


def _layer_of(detector: nn.Module) -> tuple[str, Sequence[float], float | None]:
    """Of known detectors: path of the last regression layer, bins that fit it, and what is cut off below."""
    if comes_from(detector, "torchvision.models.detection."):
        from torchvision.models.detection import FCOS, RetinaNet

        if isinstance(detector, FCOS):
            return "head.regression_head.bbox_reg", FCOS_BINS, 0.0
        if isinstance(detector, RetinaNet):
            return "head.regression_head.bbox_reg", DELTA_BINS, None
    if comes_from(detector, "mmdet.models.detectors."):
        from distillkit.adapters.mmdet import REGRESSION, known_head

        if known_head(getattr(detector, "bbox_head", None)) == "RetinaHead":
            return REGRESSION, DELTA_BINS, None
    raise ValueError(
        f"{type(detector).__name__}: its last regression layer is not known. Of torchvision's detectors FCOS and "
        "RetinaNet have one convolution there, and so have RetinaNets of mmdet and mmrotate; for your own, "
        "layer='path.of.it' (a convolution of 4 channels an anchor)"
    )


def _checked(bins: Any) -> Tensor:
    values = torch.as_tensor(list(bins), dtype=torch.float32)
    steps = values.diff()
    if values.dim() != 1 or len(values) < LEAST or not bool((steps > 0).all()):
        raise ValueError(f"bins must be at least {LEAST} increasing values, got {list(bins)}")
    if float((steps - steps.mean()).abs().max()) > 1e-4 * float(steps.mean()):
        raise ValueError(f"bins must be evenly apart, got {list(bins)}")
    return values
