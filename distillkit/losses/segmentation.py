"""The task losses of semantic segmentation: of every pixel's class, of auxiliary heads and scales, of the boundary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.losses.boundary import Activation, dice_loss
from distillkit.losses.reduce import mean_over_ranks

#: the label of pixels that are not labelled: they take part in no loss and no metric
IGNORE = 255


def pixel_cross_entropy(
    logits: Tensor, masks: Tensor, weights: Sequence[float] | None = None, ignore: int = IGNORE
) -> Tensor:
    """Cross entropy, the mean over the labelled pixels of the batch and of all ranks.

    A batch without a labelled pixel costs 0, and can be differentiated.

    Args:
        logits: (B, C, H, W).
        masks: int64 (B, H, W), classes 0..C-1 or ``ignore``.
        weights: of each class; the mean is then a weighted one.
        ignore: the label of pixels that take no part.

    Returns:
        () float32 or wider.

    Raises:
        ValueError: shapes that do not belong together; on the CPU also a label that is no class (on a GPU, looking
            would wait for the device; torch then stops with a device-side assertion).
    """
    _check(logits, masks, weights, ignore)
    logits = at_least_float32(logits)
    per_class = None if weights is None else logits.new_tensor(weights)
    total = F.cross_entropy(logits, masks, per_class, ignore_index=ignore, reduction="sum")
    labelled = masks != ignore
    count = labelled.sum() if per_class is None else (per_class[masks.where(labelled, 0)] * labelled).sum()
    count = mean_over_ranks(count.to(logits.dtype))
    return total / count.where(count > 0, 1)


@dataclass(frozen=True)
class SegmentationLoss:
    """The criterion of a segmentation model: ``criterion(output, targets)`` gives its losses by name.

    Args:
        boundary_weight: of the boundary loss (FakeMix 1, TransLab 5).
        aux_weight: of the auxiliary head's cross entropy (PSPNet, arXiv:1612.01105).
        boundary_activation: "sigmoid", the default, or "none", as the releases of FakeMix and TransLab have it; see
            ``losses.boundary.dice_loss``.
        weights: of the classes, in every cross entropy.
        ignore: the label of pixels that take no part.

    Reads:
        output: logits (B, C, H, W); or a dict of "out", those, and optionally
            "aux": (B, C, h, w) logits of an auxiliary head, brought to the masks' size (bilinear, corners not aligned);
            "scales": list of (B, C, h, w), the logits of each scale that the picture was seen at, where "out" is their
            maximum (DeepLab-v2, arXiv:1606.00915). Each is held to the masks in its own size, nearest neighbour;
            "boundary": (B, 1, H, W) logits of the boundary map.
        targets: "masks" int64 (B, H, W) and, for "boundary", "boundary" (B, H, W) in {0, 1}.

    Returns "ce" and those of "aux", "scales" (the sum over the scales) and "boundary" that the output has, weights
    included: their sum is the loss. Ignored pixels take no part in any of them.

    Raises ValueError where something is missing, or shapes or labels do not belong together.
    """

    boundary_weight: float = 1.0
    aux_weight: float = 0.4
    boundary_activation: Activation = "sigmoid"
    weights: tuple[float, ...] | None = None
    ignore: int = IGNORE

    def __call__(self, output: Tensor | Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Tensor]:
        found = {"out": output} if isinstance(output, Tensor) else output
        masks = _of(targets, "masks", "the targets")
        losses = {"ce": self._ce(_of(found, "out", "the model's output"), masks)}
        if "aux" in found:
            size = masks.shape[-2:]
            aux = F.interpolate(at_least_float32(found["aux"]), size, mode="bilinear", align_corners=False)
            losses["aux"] = self.aux_weight * self._ce(aux, masks)
        if "scales" in found:
            terms = [self._ce(logits, nearest(masks, logits.shape[-2:])) for logits in found["scales"]]
            losses["scales"] = torch.stack(terms).sum()
        if "boundary" in found:
            boundary = _of(targets, "boundary", "the targets of a model that predicts boundaries")
            dice = dice_loss(found["boundary"], boundary, self.boundary_activation, masks != self.ignore)
            losses["boundary"] = self.boundary_weight * dice
        return losses

    def _ce(self, logits: Tensor, masks: Tensor) -> Tensor:
        return pixel_cross_entropy(logits, masks, self.weights, self.ignore)


def nearest(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (B, H, W) of another size: each pixel has the label at its centre; of two as near, the right or lower."""
    if masks.shape[-2:] == tuple(size):
        return masks
    rows, columns = (_centres(old, new, masks.device) for old, new in zip(masks.shape[-2:], size))
    return masks[:, rows[:, None], columns]


def _centres(old: int, new: int, device: torch.device) -> Tensor:
    """int64 (new,): where the centre of each of ``new`` cells falls among ``old``; in integers, so that it is exact."""
    return (2 * torch.arange(new, device=device) + 1) * old // (2 * new)


def _of(entries: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in entries:
        raise ValueError(f"{where} must have {name!r}, got {sorted(entries)}")
    return entries[name]


def _check(logits: Tensor, masks: Tensor, weights: Sequence[float] | None, ignore: int) -> None:
    if logits.dim() != 4 or masks.dim() != 3 or logits.shape[0] != len(masks) or logits.shape[2:] != masks.shape[1:]:
        raise ValueError(
            f"expected logits (B, C, H, W) and masks (B, H, W) of the same pixels, got {tuple(logits.shape)} and "
            f"{tuple(masks.shape)}"
        )
    if masks.dtype != torch.int64:
        raise ValueError(f"masks: expected int64, got {masks.dtype}")
    classes = logits.shape[1]
    if weights is not None and len(weights) != classes:
        raise ValueError(f"weights: expected one for each of the {classes} classes, got {len(weights)}")
    if masks.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = masks[(masks != ignore) & ((masks < 0) | (masks >= classes))]
        if len(wrong):
            raise ValueError(
                f"the masks have label {int(wrong[0])}; expected 0..{classes - 1}, or {ignore} for ignored"
            )
