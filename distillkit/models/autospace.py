"""Networks of AutoSpace's cells (Zhou et al., arXiv:2103.11833), built from the file that a search wrote.

    model = timm.create_model("autospace", network="net_340M.config", num_classes=10)
    register("net_340M.config", "autospace_340m"); timm.create_model("autospace_340m")

What a cell computes is said in ``autospace_cells``, the file's form in ``autospace_network``. A block is

    x -> 1x1 convolution to ``expand`` times the channels, BatchNorm, ReLU6 -> cell -> 1x1 convolution, BatchNorm (+ x)

so that the chain of one depthwise convolution is MobileNetV2's inverted residual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from distillkit.models.autospace_cells import EDGES, IDENTITY, KERNELS, NONE, POOL, Cell, Shape
from distillkit.models.autospace_network import Block, Network, read_network

__all__ = ["AutoSpaceNet"]  # register_model adds the entry points

#: ``edge(name, operation, x)`` -> what the operation on that edge makes of x
Edge = Callable[[str, int, Tensor], Tensor]


def run_cell(cell: Cell, x: Tensor, edge: Edge) -> Tensor:
    """Node 3 of ``cell`` for node 0 = x."""
    o01, o02, o12, o13, o23 = cell.ops
    node1 = edge("01", o01, x)
    node2 = edge("12", o12, node1)
    if o02 != NONE:
        node2 = mixed(cell.mix[0], node2, edge("02", o02, x))
    node3 = edge("23", o23, node2)
    return node3 if o13 == NONE else mixed(cell.mix[1], node3, edge("13", o13, node1))


def mixed(mix: int, a: Tensor, b: Tensor) -> Tensor:
    """Two inputs of a node: their sum, or the larger of the two."""
    return torch.maximum(a, b) if mix else a + b


def without_weights(op: int, x: Tensor, stride: int) -> Tensor:
    """Identity, or the mean of 3x3 (of what lies inside the map); with a stride maps of ceil(side / stride)."""
    if op == IDENTITY:
        return x if stride == 1 else F.avg_pool2d(x, stride, ceil_mode=True)
    if op == POOL:
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    raise ValueError(f"operation {op} has weights, or is none")


def convolution(inside: int, out: int, kernel: int, stride: int, groups: int, norm: Any, act: bool) -> nn.Sequential:
    conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, norm(out), *([nn.ReLU6(inplace=True)] if act else []))


class CellBlock(nn.Module):
    """One block: (B, shape.inside, H, W) -> (B, shape.out, ceil(H / stride), ceil(W / stride)).

    Args:
        norm: BatchNorm of so many channels.
    """

    def __init__(self, cell: Cell, shape: Shape, shortcut: bool, norm: Any = nn.BatchNorm2d):
        super().__init__()
        self.cell, self.shape, self.shortcut = cell, shape, shortcut
        wide = shape.wide
        self.expand = convolution(shape.inside, wide, 1, 1, 1, norm, True) if shape.expand > 1 else nn.Identity()
        self.edges = nn.ModuleDict(
            {
                edge: convolution(wide, wide, KERNELS[op], stride_of(edge, shape), wide, norm, True)
                for edge, op in zip(EDGES, cell.ops, strict=True)
                if op in KERNELS
            }
        )
        self.project = convolution(wide, shape.out, 1, 1, 1, norm, False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(run_cell(self.cell, self.expand(x), self._edge))
        return x + y if self.shortcut else y

    def _edge(self, edge: str, op: int, x: Tensor) -> Tensor:
        return self.edges[edge](x) if op in KERNELS else without_weights(op, x, stride_of(edge, self.shape))


def stride_of(edge: str, shape: Shape) -> int:
    return shape.stride if edge[0] == "0" else 1


class AutoSpaceNet(nn.Module):
    """The classifier that a ``Network`` describes.

    Args:
        network: a file in the published form, or what ``read_network`` reads.
        num_classes, in_chans: other than the network's, if given; num_classes=0 leaves the head out.
        drop_rate: dropout before the head.
        global_pool: ``avg``, or an empty string for maps of features.
    """

    def __init__(
        self,
        network: str | Path | Network,
        num_classes: int | None = None,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        if not isinstance(network, Network):
            network = read_network(network)
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        self.network = network
        self.num_classes = network.classes if num_classes is None else num_classes
        self.num_features = self.head_hidden_size = network.features
        self.global_pool, self.grad_checkpointing = global_pool, False
        norm = partial(nn.BatchNorm2d, momentum=network.bn_momentum, eps=network.bn_eps)
        self.stem = convolution(in_chans, network.stem, 3, network.stem_stride, 1, norm, True)
        self.blocks = nn.Sequential(*(_module(block, norm) for block in network.blocks))
        self.features = convolution(network.blocks[-1].shape.out, network.features, 1, 1, 1, norm, True)
        self.drop = nn.Dropout(drop_rate)
        self.head = self._head()
        self.apply(initialise)

    def _head(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        weight: Any = self.features[0].weight
        self.head = self._head().apply(initialise).to(weight.device, weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures (B, in_chans, H, W) -> maps (B, features, h, w)."""
        return self.features(self.blocks(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps -> logits (B, num_classes), or with ``pre_logits`` what they are computed from."""
        x = self.drop(x.mean((2, 3)) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _module(block: Block, norm: Any) -> nn.Module:
    return nn.Identity() if block.cell is None else CellBlock(block.cell, block.shape, block.shortcut, norm)


def initialise(module: nn.Module) -> None:
    """He's normal for convolutions (by their outputs), a small normal for the classifier."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


# -- timm -------------------------------------------------------------------------------------------------------------


def _create(variant: str, network: str | Path | Network, pretrained: bool, options: dict[str, Any]) -> AutoSpaceNet:
    if not isinstance(network, Network):
        network = read_network(network)
    cfg = {
        "url": "",
        "num_classes": network.classes,
        "input_size": (3, 224, 224),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
    }
    options.setdefault("num_classes", network.classes)
    overlay = options.pop("pretrained_cfg", None)
    cfg.update(overlay if isinstance(overlay, dict) else {})
    return build_model_with_cfg(AutoSpaceNet, variant, pretrained, pretrained_cfg=cfg, network=network, **options)


@register_model
def autospace(pretrained: bool = False, *, network: str | Path | Network | None = None, **options: Any) -> AutoSpaceNet:
    """The network that a file describes, in AutoSpace's published form."""
    if network is None:
        raise ValueError("autospace: give network=FILE, as `distillkit search` wrote it (network.json)")
    return _create("autospace", network, pretrained, options)


def register(network: str | Path, name: str) -> None:
    """Let ``timm.create_model(name)`` build the network of a file, from now on in this process.

    The file is read at once. Registering the same name again replaces it.

    Raises:
        ValueError: the file is no network, or the name belongs to another model of timm.
    """
    from timm.models import _registry, is_model

    read = read_network(network)
    if is_model(name) and name not in _named:
        raise ValueError(f"{name!r} is a model of timm already; give another name, as in autospace_{name}")

    def entry(pretrained: bool = False, **options: Any) -> AutoSpaceNet:
        return _create(name, read, pretrained, options)

    entry.__name__, entry.__module__ = name, __name__
    entry.__doc__ = f"The network of {network}."
    if name in _named:
        _registry._model_entrypoints[name] = entry
    else:
        register_model(entry)
    _named.add(name)
    setattr(sys.modules[__name__], name, entry)


_named: set[str] = set()
