"""Class maps by gradients, Grad-CAM (Selvaraju et al., arXiv:1610.02391) and its kin, of any layer of any classifier.

They are those of the package ``grad-cam`` (Jacob Gildenblat): ``pip install 'distillkit[cam]'``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillkit.adapters.cam import grid_on
from distillkit.adapters.classifier import Layout, is_classifier, layout_of
from distillkit.models.cam import CamClassifier

#: names here, and of the package's classes
METHODS = {
    "grad-cam": "GradCAM",
    "grad-cam++": "GradCAMPlusPlus",
    "hires-cam": "HiResCAM",
    "layer-cam": "LayerCAM",
    "xgrad-cam": "XGradCAM",
}


def gradient_maps(
    model: nn.Module, pictures: Tensor, shown: list[int], classes: int, method: str, layer: str | None = None
) -> Tensor:
    """Maps of the classes in ``shown``, by one of ``METHODS``.

    Args:
        model: a classifier with logits (B, C), in eval mode. Its parameters get no gradient, and keep those they have.
        pictures: (B, 3, H, W), normalised.
        classes: C, which the model must have.
        layer: module path; None: what makes the last map of a ``CamClassifier`` or a model of timm (of a transformer
            the first norm of its last block, since a class token sees the others no later than there).

    Returns float32 (B, k, H, W), each map through a ReLU and scaled to 0..1, as the package gives them.

    Raises:
        ImportError: the package is missing, or a library that it needs.
        ValueError: no such layer, or one that the logits do not depend on; another number of classes.
    """
    package = _package()
    path = layer or _last(model)
    modules = dict(model.named_modules())
    if path not in modules:
        raise ValueError(f"{type(model).__name__} has no module {path!r}: name another target_layer")
    reshape = _reshape(model, pictures) if is_classifier(model) else None
    maps = []
    with torch.inference_mode(False), torch.enable_grad(), _inputs_only(model):
        made = getattr(package, METHODS[method])(model=model, target_layers=[modules[path]], reshape_transform=reshape)
        try:
            for label in shown:
                targets = [_Logit(label, classes)] * len(pictures)
                maps.append(torch.from_numpy(made(pictures.clone().requires_grad_(), targets=targets)))
                _refuse_unseen(made, path)
        finally:
            made.activations_and_grads.release()
    return torch.stack(maps, 1).float().to(pictures.device)


class _Logit:
    """A class logit, as the package's targets are called."""

    def __init__(self, label: int, classes: int):
        self.label, self.classes = label, classes

    def __call__(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] != self.classes:
            raise ValueError(f"labels are of {self.classes} classes, and the model has {logits.shape[-1]}")
        return logits[..., self.label]


def _package() -> ModuleType:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        name = (error.name or "").split(".")[0]
        if name == "pytorch_grad_cam":
            raise ImportError("Grad-CAM needs the package grad-cam: pip install 'distillkit[cam]'") from error
        raise ImportError(
            f"the package grad-cam cannot be imported: {error}. If OpenCV lacks a library of the system (libGL, "
            "libxcb): pip uninstall -y opencv-python && pip install --force-reinstall opencv-python-headless"
        ) from error
    return pytorch_grad_cam


def _last(model: nn.Module) -> str:
    if isinstance(model, CamClassifier):
        return "features"
    if not is_classifier(model):
        raise ValueError(f"{type(model).__name__}: say which layer Grad-CAM looks at, as in target_layer='layer4'")
    blocks = getattr(model, "blocks", None)
    if layout_of(model).prefix and isinstance(blocks, nn.Sequential) and hasattr(blocks[-1], "norm1"):
        return f"blocks.{len(blocks) - 1}.norm1"
    return layout_of(model).features


def _reshape(model: nn.Module, pictures: Tensor) -> Any:
    """For the package, which wants (B, C, h, w): what turns a layer's tokens, or a map of channels last, into that."""
    layout: Layout = layout_of(model)
    grid = grid_on(model, layout, pictures.shape[2], pictures.shape[3])

    def reshape(x: Tensor) -> Tensor:
        if x.dim() == 3:
            if x.shape[1] != layout.prefix + grid[0] * grid[1]:
                raise ValueError(
                    f"the layer gives {x.shape[1]} tokens, expected {grid[0]} x {grid[1]} and {layout.prefix} before "
                    "them: name a target_layer with as many tokens as the last has"
                )
            return x[:, layout.prefix :].transpose(1, 2).unflatten(2, grid)
        return x.movedim(-1, 1) if layout.channels == -1 else x

    return reshape


@contextmanager
def _inputs_only(model: nn.Module) -> Iterator[None]:
    """Within it a backward pass makes no gradients of parameters; afterwards all are as they were."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _refuse_unseen(made: Any, path: str) -> None:
    """A layer whose gradient is 0 everywhere would give maps of 0, as if the class were not there."""
    gradients = [np.asarray(g) for g in made.activations_and_grads.gradients]
    if not any(g.any() for g in gradients):
        raise ValueError(
            f"the class logits do not depend on the places of {path!r} (as behind the last attention of a model that "
            "reads its class token): name an earlier target_layer"
        )
