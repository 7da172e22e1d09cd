"""timm's classifiers, and models built like them: class logits, and the logits of every token, which are their class
activation maps, too.

A classifier of timm is ``forward_head(forward_features(x))``. Its head, given one token alone, as a map of 1 x 1 cells
or a sequence of length one, pools nothing and says what that token is: so any of these models has token logits, without
a change to it (Jiang et al., arXiv:2104.10858, did the same to their annotator). A model with an ``aux_head`` (VOLO,
LV-ViT, Refiner) has a head for tokens of its own, which is used instead.
"""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillkit.core.adapter import Adapter
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.taps import Place
from distillkit.core.views import ActivationMaps, TokenLogits, View


@dataclass(frozen=True)
class Layout:
    """How a classifier's features lie, found on an example.

    features: path of the module that returns what ``forward_features`` does. channels: their dimension in it, 1 or -1.
    prefix: tokens that stand for no place (class token, registers). grid: (height, width) of the others. aux: the model
    has an ``aux_head``.
    """

    features: str
    channels: int
    prefix: int
    grid: tuple[int, int]
    aux: bool

    def tokens(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, h, w), (B, h, w, C) or (B, prefix + N, C) -> (B, N, C) and the grid."""
        if features.dim() == 4:
            last = features.movedim(1, -1) if self.channels == 1 else features
            return last.flatten(1, 2), (last.shape[1], last.shape[2])
        tokens = features[:, self.prefix :]
        return tokens, self.grid_of(tokens.shape[1])

    def grid_of(self, count: int) -> tuple[int, int]:
        """Of so many tokens; pictures may be of another size than the example."""
        return self.grid if math.prod(self.grid) == count else _square(count)


class TokenClassifier(nn.Module):
    """A classifier as an annotator: pictures (B, 3, H, W) -> logits of every cell of its last map, (B, C, h, w).

    Args:
        model: any classifier of timm, or one with ``forward_features`` and ``forward_head`` like theirs.

    Raises:
        AdapterError: the model is not built so.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.layout = layout_of(model)

    def forward(self, pictures: Tensor) -> Tensor:
        logits, grid = token_logits(self.model, self.layout, self.model.forward_features(pictures))  # type: ignore[operator]
        return logits.transpose(1, 2).unflatten(2, grid)


def token_logits(model: nn.Module, layout: Layout, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What ``model`` says of each of its tokens: features as ``forward_features`` gives them -> (B, N, C), the grid."""
    tokens, grid = layout.tokens(features)
    if layout.aux:
        return model.aux_head(tokens), grid  # type: ignore[operator]
    batch, count, width = tokens.shape
    single = tokens.reshape(batch * count, 1, width)
    if features.dim() == 3:
        # whatever of its tokens a head looks at, it is this one
        single = single.expand(-1, layout.prefix + 1, -1)
    elif layout.channels == 1:
        single = single.view(batch * count, width, 1, 1)
    else:
        single = single.view(batch * count, 1, 1, width)
    logits = model.forward_head(single)  # type: ignore[operator]
    if isinstance(logits, tuple):  # DeiT's class and distillation heads, when they are trained apart
        logits = torch.stack(logits).mean(0)
    return logits.view(batch, count, -1), grid


class Classifier(Adapter):
    """A classifier whose tokens are read as well.

    Args:
        mean, std: as ``Adapter``.
    """

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        if kind not in (TokenLogits, ActivationMaps):
            return super().places(model, kind, at)
        if kind is ActivationMaps and at:
            raise ViewError(
                f"the activation maps of {type(model).__name__} are what its own head says of every place, so no path "
                f"is needed; for a layer {at[0]!r} that returns maps (B, K, h, w) itself, pass adapter="
                f"distillkit.adapters.cam.CamAdapter({at[0]!r})"
            )
        layout = layout_of(model)
        if not layout.aux:
            return (Place((layout.features,)),)
        return (Place(("head", "aux_head") if kind is TokenLogits else ("aux_head",)),)

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        if kind not in (TokenLogits, ActivationMaps):
            return super().view(model, kind, tensors, output)
        layout = layout_of(model)
        if layout.aux:
            tokens = tensors[-1]
            grid = layout.grid_of(tokens.shape[1])
        else:
            tokens, grid = token_logits(model, layout, tensors[0])
        if kind is ActivationMaps:
            return ActivationMaps(tokens.transpose(1, 2).unflatten(2, grid), background=False)
        classes = tensors[0] if layout.aux else output
        return TokenLogits(classes if isinstance(classes, Tensor) else None, tokens, grid)


@dataclass(frozen=True)
class MixPlace:
    """Where MixToken mixes: the output of a patch embedding.

    layout: how it lies. scale: how many of its tokens go to a side of one of the student's last ones. grid: (height,
    width) of the output on pictures of the student's size.
    """

    layout: Literal["bchw", "bhwc", "bnc"]
    scale: int
    grid: tuple[int, int]

    def grid_of(self, tokens: Tensor) -> tuple[int, int]:
        if self.layout == "bnc":
            return self.grid if math.prod(self.grid) == tokens.shape[1] else _square(tokens.shape[1])
        height, width = tokens.shape[2:] if self.layout == "bchw" else tokens.shape[1:3]
        return height, width


def mix_place(model: nn.Module, path: str) -> MixPlace:
    """How the output of module ``path`` lies against the model's last grid of tokens.

    Raises:
        ValueError: there is no such module, or what it returns is no whole multiple of that grid.
    """
    grid = layout_of(model).grid
    returned: dict[str, Tensor] = {}
    _trial(model, returned)
    if path in returned and (place := _place(returned[path], grid)):
        return place
    fitting = [other for other, output in returned.items() if "." not in other and _place(output, grid)]
    name = type(model).__name__
    shape = tuple(getattr(returned.get(path), "shape", ()))
    why = f"{name} runs no such module"
    if path in returned:
        why = f"that of {name} is {shape or 'no tensor'}, no whole multiple of its {grid[0]} x {grid[1]} tokens"
    others = f", or mix_at to one of {', '.join(fitting[:5])}, the earlier the better" if fitting else ""
    raise ValueError(f"mix_token mixes what {path!r} returns, and {why}: set mix_token=False{others}")


def _place(output: Any, grid: tuple[int, int]) -> MixPlace | None:
    """How a module's output lies against ``grid``; None where it is no whole multiple of it."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else ()
    height, width = grid
    sides: dict[str, tuple[int, ...]] = {}
    if len(shape) == 4:
        sides = {"bchw": shape[2:], "bhwc": shape[1:3]}
    elif len(shape) == 3:
        scale = math.isqrt(shape[1] // (height * width))
        sides = {"bnc": (height * scale, width * scale)} if height * width * scale * scale == shape[1] else {}
    for kind, (high, wide) in sides.items():
        if high % height == 0 and high // height == wide // width and wide % width == 0 and high:
            return MixPlace(kind, high // height, (high, wide))  # type: ignore[arg-type]
    return None


def is_classifier(model: nn.Module) -> bool:
    """Whether a model is built as timm's classifiers are."""
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features"))


# ---- how a model lies, found out once

_layouts: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def layout_of(model: nn.Module) -> Layout:
    """Run a copy without numbers on a picture of the model's size, and see where its features come from.

    Raises:
        AdapterError: no module returns the features, or they are no map and no sequence of tokens on a grid.
    """
    if model not in _layouts:
        _layouts[model] = _found(model)
    return _layouts[model]


def _found(model: nn.Module) -> Layout:
    name = type(model).__name__
    if not is_classifier(model):
        raise AdapterError(
            f"{name}: token logits are read of models built like timm's (forward_features, forward_head, "
            "num_features), or through an adapter whose view() makes TokenLogits; see docs/write-an-adapter.md"
        )
    returned: dict[str, Tensor] = {}
    features = _trial(model, returned)
    places = [path for path, tensor in returned.items() if tensor is features]
    if not places:
        raise AdapterError(
            f"{name}: no module returns what forward_features does, so that it cannot be tapped; end forward_features "
            "with a module, as in self.norm(x) or nn.Identity"
        )
    aux = isinstance(getattr(model, "aux_head", None), nn.Module)
    if features.dim() == 4:
        channels = -1 if features.shape[-1] == model.num_features != features.shape[1] else 1
        height, width = features.shape[1:3] if channels == -1 else features.shape[2:]
        return Layout(places[-1], channels, 0, (height, width), aux)
    if features.dim() != 3:
        raise AdapterError(f"{name}: expected features (B, C, h, w), (B, h, w, C) or (B, N, C), got {features.shape}")
    prefix, grid = _grid(model, features.shape[1])
    return Layout(places[-1], -1, prefix, grid, aux)


def _trial(model: nn.Module, returned: dict[str, Tensor]) -> Tensor:
    """The features of two pictures without content, and by path what every module returned, in order of running."""
    tensors = [*model.parameters(), *model.buffers()]
    without_numbers = {id(t): t.detach().to("meta") for t in tensors}
    shell = copy.deepcopy(model, without_numbers).eval()
    for path, module in shell.named_modules():
        if path:
            module.register_forward_hook(lambda m, a, out, path=path: returned.update({path: out}))
    size = input_size(model)
    try:
        with torch.no_grad():
            return shell.forward_features(torch.zeros(2, *size, device="meta"))  # type: ignore[operator]
    except Exception as error:  # whatever a model raises for pictures of another size than its own
        raise AdapterError(
            f"{type(model).__name__} cannot run on pictures of {size[1]} x {size[2]} pixels with {size[0]} channels, "
            f"the size that it seems to be built for ({type(error).__name__}: {error}). If it is built for another, "
            'say so: timm.create_model(..., pretrained_cfg_overlay={"input_size": (3, 64, 64)})'
        ) from error


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the pictures that a model of timm was built for."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    sizes = (getattr(module, "img_size", None) for module in model.modules())  # its patch embedding's
    size = next(filter(None, sizes), None) or _size_of_positions(model)
    height, width = (height, width) if size is None else size if isinstance(size, tuple | list) else (size, size)
    return channels, height, width


def _size_of_positions(model: nn.Module) -> tuple[int, int] | None:
    """By a position embedding (1, h, w, C) of its last grid, as VOLO has; None: it has no such."""
    positions, stages = getattr(model, "pos_embed", None), getattr(model, "feature_info", None)
    if not isinstance(positions, Tensor) or positions.dim() != 4 or not stages:
        return None
    if positions.shape[3] != model.num_features:  # (1, C, h, w), of some other grid
        return None
    stride = stages[-1]["reduction"]
    return positions.shape[1] * stride, positions.shape[2] * stride


def _grid(model: nn.Module, length: int) -> tuple[int, tuple[int, int]]:
    """How many tokens of a sequence stand for no place, and the grid of the others."""
    said = getattr(model, "num_prefix_tokens", None)
    sides = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    for prefix in (0, 1, 2) if said is None else (said,):
        if sides is not None and math.prod(sides) == length - prefix:
            return prefix, (sides[0], sides[1])
        if math.isqrt(length - prefix) ** 2 == length - prefix:
            return prefix, _square(length - prefix)
    raise AdapterError(
        f"{type(model).__name__}: {length} tokens are on no grid that it tells of (patch_embed.grid_size)"
    )


def _square(count: int) -> tuple[int, int]:
    side = math.isqrt(count)
    if side * side != count:
        raise AdapterError(
            f"{count} tokens are no square grid, and the model was built for another number: for pictures that are not "
            "square, build the model with img_size=(h, w)"
        )
    return side, side
