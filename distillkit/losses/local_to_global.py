"""Local-to-global attention transfer: crops, targets from their activation maps, and the loss. Jiang et al.,
arXiv:2204.03206.

A local network sees crops of a picture and activates more of each object than one that sees the whole. What it finds on
the crops becomes the target of a global network on the same places of the whole picture. Activation maps here are
logits of every cell, before any ReLU; the background, where there is one, is their last channel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import roi_align

from distillkit.boxes.precision import at_least_float32

#: of a channel's maximum, which it is divided by
EPS = 1e-8


# ---- crops


def draw_boxes(
    pictures: int,
    crops: int,
    size: tuple[int, int],
    crop: tuple[int, int],
    corners: bool = False,
    convention: Literal["default", "release"] = "default",
    device: torch.device | str | None = None,
) -> Tensor:
    """Where the crops of every picture lie: int64 (B, N, 4), x1, y1, x2, y2 in pixels, uniform over all places.

    Args:
        pictures, crops: B and N.
        size, crop: (height, width) of a picture and of a crop.
        corners: the first four crops are the picture's corners, as in the published training on VOC.
        convention: ``release``: the last place, at the right and lower border, is never drawn.

    Drawn from torch's global generator, on ``device``.

    Raises ValueError for crops larger than the picture, or fewer than four with ``corners``.
    """
    room = [whole - part for whole, part in zip(size, crop, strict=True)]
    if min(room) < 0:
        raise ValueError(f"crops of {crop} (height, width) do not fit into pictures of {size}")
    if corners and crops < 4:
        raise ValueError(f"corners=True takes four crops, crops is {crops}")
    places = 0 if convention == "release" else 1
    y, x = (torch.randint(max(1, most + places), (pictures, crops), device=device) for most in room)
    return placed_boxes(y, x, size, crop, corners)


def placed_boxes(y: Tensor, x: Tensor, size: tuple[int, int], crop: tuple[int, int], corners: bool) -> Tensor:
    """Boxes (B, N, 4) from their upper left corners, (B, N) each; ``corners``: the first four are moved there."""
    if corners:
        down, right = (whole - part for whole, part in zip(size, crop, strict=True))
        y, x = y.clone(), x.clone()
        y[:, :4], x[:, :4] = y.new_tensor([0, down, 0, down]), x.new_tensor([0, 0, right, right])
    return torch.stack([x, y, x + crop[1], y + crop[0]], 2)


def cut(pictures: Tensor, boxes: Tensor, crop: tuple[int, int]) -> Tensor:
    """The crops of a batch, exact copies: (B, K, H, W), boxes (B, N, 4) of size ``crop`` -> (B * N, K, *crop).

    Indices are tensors, so that no accelerator waits and a compiled step is compiled once for all places. Crops of
    pictures that are channels last are so, too, and no others: a network is far slower, or faster, on one than on the
    other, and which is the user's to say.
    """
    (batch, count), (channels, _, width) = boxes.shape[:2], pictures.shape[1:]
    y = boxes[..., 1, None] + torch.arange(crop[0], device=boxes.device)
    x = boxes[..., 0, None] + torch.arange(crop[1], device=boxes.device)
    cells = (y[..., :, None] * width + x[..., None, :]).view(batch, count, 1, -1).expand(-1, -1, channels, -1)
    crops = pictures.flatten(2)[:, None].expand(-1, count, -1, -1).gather(3, cells)  # 4 times as fast as indexing
    crops = crops.view(batch * count, channels, *crop)
    if pictures.is_contiguous() or not pictures.is_contiguous(memory_format=torch.channels_last):
        return crops
    return crops.contiguous(memory_format=torch.channels_last)


# ---- the target


def local_targets(
    maps: Tensor,
    labels: Tensor,
    background: bool = True,
    saliency: Tensor | None = None,
    threshold: float = 0.1,
    soft_background: bool = False,
    empty_saliency: Literal["attention", "zero"] = "attention",
    has_saliency: Tensor | None = None,
) -> Tensor:
    """What the local network's maps of M crops tell the global one: (M, C + 1, h, w) in 0..1, without gradient.

    Each channel is cut off at 0 and divided by its maximum in the crop; classes that the picture does not have are left
    out; of each cell the strongest channel alone stays. Without saliency that is the target (attention transfer). With
    saliency S (shape transfer) the channels are binary, a foreground channel is multiplied by S, the background by
    1 - S: where both say no, the target of a cell is all 0.

    Args:
        maps: (M, C + background, h, w) logits.
        labels: (M, C): more than 0 where the picture has the class.
        background: whether the last channel is the background's. Else the background's target is 0 everywhere, or
            1 - S with saliency: 1 less the strongest class was tried, and teaches a student that all is background
            while the local network knows nothing yet; where its softmax saturates, no gradient leads back.
        saliency: (M, 1, H, W) in 0..1, of any resolution; the nearest pixel counts.
        threshold: above which a channel is on, with saliency. The paper says "small, e.g. 0.1"; the released scripts
            have 0.001 (VOC) and 0.1 (COCO).
        soft_background: with saliency the background keeps its values, as in the released COCO script.
        empty_saliency: crops without any saliency: ``attention``: their target is that of attention transfer, as in the
            paper; ``zero``: their foreground is 0, as in the release.
        has_saliency: bool (M,): crops of pictures without a map get the target of attention transfer in either case.

    All in float32 at least: the smallest constant vanishes in half precision.
    """
    maps = at_least_float32(maps.detach())
    classes = maps.shape[1] - background
    if labels.shape != (len(maps), classes):
        raise ValueError(
            f"expected labels ({len(maps)}, {classes}) for {len(maps)} crops of {classes} classes, got "
            f"{tuple(labels.shape)}"
        )
    there = (labels > 0).to(maps.dtype)[:, :, None, None]
    maps = maps.relu()
    maps = maps / (maps.amax((2, 3), keepdim=True) + EPS)
    foreground = maps[:, :classes] * there
    ground = maps[:, classes:] if background else torch.zeros_like(maps[:, :1])
    attention = torch.cat([foreground, ground], 1)
    winner = torch.zeros_like(attention).scatter_(1, attention.argmax(1, keepdim=True), 1)
    attention = attention * winner
    if saliency is None:
        return attention
    s = interpolate(saliency.to(maps.dtype), size=maps.shape[2:], mode="nearest")
    on = (attention > threshold).to(maps.dtype)
    behind = (attention if soft_background else on)[:, classes:] if background else torch.ones_like(s)
    shape = torch.cat([on[:, :classes] * s, behind * (1 - s)], 1)
    shaped = torch.ones_like(saliency[:, 0, 0, 0], dtype=torch.bool) if has_saliency is None else has_saliency
    if empty_saliency == "attention":
        shaped = shaped & (saliency.amax((1, 2, 3)) > 0)
    return torch.where(shaped[:, None, None, None], shape, attention)


# ---- the loss


def at_boxes(
    maps: Tensor, boxes: Tensor, picture: tuple[int, int], size: tuple[int, int], aligned: bool = True
) -> Tensor:
    """The global network's maps at the places of the crops: (B, K, H', W') -> (B * N, K, *size).

    Args:
        boxes: (B, N, 4) in pixels of pictures of ``picture`` = (height, width).
        size: (h, w) of a crop's maps.
        aligned: True: cells are where they are; of boxes on whole cells they are exact copies. False: half a cell to
            the right and down, as in the release.

    Raises ValueError where the cells are no squares.
    """
    down, right = (cells / pixels for cells, pixels in zip(maps.shape[2:], picture, strict=True))
    if abs(down - right) > 1e-6:
        raise ValueError(
            f"maps of {tuple(maps.shape[2:])} cells on pictures of {picture} pixels are not square: use pictures whose "
            "sides are multiples of the stride"
        )
    rois = [of_picture.to(maps.dtype) for of_picture in boxes.unbind()]
    return roi_align(maps, rois, size, spatial_scale=down, sampling_ratio=1 if aligned else -1, aligned=aligned)


def transfer_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference between the softmax over C + 1 channels and the target, over all elements.

    Args:
        logits: (M, C + 1, h, w); or (M, C, h, w) of a network without a background channel, whose background then has
            the logit 0.
        target: as ``local_targets`` gives it.
    """
    logits = with_background(at_least_float32(logits), target.shape[1] - 1)
    if logits.shape != target.shape:
        raise ValueError(f"maps are {tuple(logits.shape)}, their target {tuple(target.shape)}")
    return (logits.softmax(1) - target).square().mean()


def with_background(logits: Tensor, classes: int) -> Tensor:
    """(M, C + 1, h, w) of C classes, with a background whose logit is 0 where there was none."""
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1) if logits.shape[1] == classes else logits
