"""Class activation maps of whole pictures: several scales, mirrored too, fused into one map a class.

Each map is brought to one size, the mirrored ones are turned back, their mean goes through a ReLU and is divided by its
largest value. L2G (arXiv:2204.03206) and many before it make their pseudo masks of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.adapters.cam import activation_maps
from distillkit.adapters.classifier import is_classifier, layout_of
from distillkit.boxes.precision import at_least_float32
from distillkit.evaluation.classes import normalised
from distillkit.evaluation.grad_cam import METHODS, gradient_maps
from distillkit.evaluation.predict import evaluating

SCALES = (0.5, 1.0, 1.5, 2.0)
EPSILON = 1e-8


def class_maps(
    model: nn.Module,
    picture: Tensor,
    labels: Tensor,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    method: str = "cam",
    size: tuple[int, int] | None = None,
    target_layer: str | None = None,
) -> Tensor:
    """One map for each class that a picture is said to show.

    Args:
        model: what ``activation_maps`` reads; for other methods any classifier with logits (B, C). It runs in eval mode
            on the device where it is, and is left as it was.
        picture: float (3, H, W), RGB in 0..1. It is normalised as the model says.
        labels: (C,), above 0 for the classes of the picture.
        scales: the picture is run at each of these times its size (bicubic, with antialiasing, clipped to 0..1). A
            model that cuts it into patches gets the nearest size of whole patches.
        flip: it is run mirrored as well, in the same batch.
        method: "cam", or one of ``grad_cam.METHODS``, which need the package ``grad-cam`` and a backward pass a class.
        size: (height, width) of the maps; the picture's unless given.
        target_layer: for these methods, the module path of the layer that is looked at; unless given, the one that
            makes the last map.

    Returns:
        float32 (C, height, width) in 0..1 on the picture's device; 0 for the classes that it does not show. The largest
        value of each of the others is 1, or 0 where the model sees it nowhere.

    Raises:
        ValueError: arguments that do not fit; another number of classes than the model has; a size that it cannot run
            at.
        ImportError: the package that a method needs is missing.
    """
    _check(picture, labels, scales, method, target_layer)
    shown = labels.nonzero().flatten().tolist()
    size = size or (picture.shape[1], picture.shape[2])
    maps = torch.zeros(len(labels), *size, device=picture.device)
    if not shown:
        return maps
    device = next(model.parameters()).device
    with evaluating(model):
        found = []
        for scale in scales:
            batch = _at_scale(model, picture.to(device), scale)
            batch = normalised(model, torch.cat([batch, batch.flip(-1)]) if flip else batch)
            try:
                found.append(_maps(model, batch, shown, len(labels), method, target_layer))
            except torch.OutOfMemoryError:
                raise
            except (AssertionError, RuntimeError) as error:  # what a model raises for a size that it is not made for
                raise ValueError(
                    f"{type(model).__name__} cannot run at {batch.shape[2]} x {batch.shape[3]} pixels, {scale:g} times "
                    f"the picture ({error}). If it is built for one size, resize the picture to it and set "
                    "scales=(1,), or build it for any (timm: dynamic_img_size=True, or strict_img_size=False)"
                ) from error
    maps[shown] = fused(found, size).to(maps)
    return maps


def fused(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps of one picture at several scales -> one map a class.

    Args:
        maps: one a scale, (1, K, h, w) or, with that of the mirrored picture behind it, (2, K, h, w), before the ReLU.
        size: (height, width) of the result.

    Returns float32 (K, height, width) in 0..1.
    """
    upright = []
    for scale in maps:
        resized = F.interpolate(at_least_float32(scale), size=size, mode="bicubic", align_corners=False)
        upright += [resized[0], *resized[1:].flip(-1)]
    mean = torch.stack(upright).mean(0).relu()
    return mean / (mean.amax((1, 2), keepdim=True) + EPSILON)


def _maps(model: nn.Module, batch: Tensor, shown: list[int], classes: int, method: str, layer: str | None) -> Tensor:
    """(B, k, h, w) of the k classes in ``shown``."""
    if method != "cam":
        return gradient_maps(model, batch, shown, classes, method, layer)
    with torch.inference_mode():
        maps = activation_maps(model, batch)
    if maps.shape[1] != classes:
        raise ValueError(f"labels are of {classes} classes, and {type(model).__name__} has {maps.shape[1]}")
    return maps[:, shown]


def _at_scale(model: nn.Module, picture: Tensor, scale: float) -> Tensor:
    """(3, H, W) -> (1, 3, scale * H, scale * W)."""
    patch = _patch(model)
    height, width = (max(round(side * scale / p), 1) * p for side, p in zip(picture.shape[1:], patch))
    if (height, width) == tuple(picture.shape[1:]):
        return picture[None]
    resized = F.interpolate(picture[None], size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 1)


def _patch(model: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels of what a model of token sequences cuts a picture into; 1, 1 for all others."""
    if not is_classifier(model):
        return 1, 1
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None or layout_of(model).channels == 1:
        return 1, 1
    return (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])


def _check(picture: Tensor, labels: Tensor, scales: Sequence[float], method: str, layer: str | None) -> None:
    if picture.dim() != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
        raise ValueError(f"picture must be float (3, H, W) in 0..1, got {picture.dtype} {tuple(picture.shape)}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be (C,), one number a class, got {tuple(labels.shape)}")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be numbers above 0, one at least, got {tuple(scales)}")
    if method != "cam" and method not in METHODS:
        raise ValueError(f"method must be 'cam' or one of {', '.join(METHODS)}, got {method!r}")
    if method == "cam" and layer is not None:
        raise ValueError(
            f"target_layer={layer!r} is for methods that look at a layer ({', '.join(METHODS)}); 'cam' reads the "
            "model's last map"
        )
