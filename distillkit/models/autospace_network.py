"""Networks of AutoSpace's cells as they are written: the published JSON form of networks and spaces. No torch.

Reading names the file, and the block or layer and cell, that is wrong. What is written reads back equal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from distillkit.models.autospace_cells import (
    CONV3,
    IDENTITY,
    IN_NETWORK,
    KERNELS,
    NONE,
    Cell,
    Shape,
    block_costs,
    from_graph,
    graph,
)

#: a space: for every layer its cells
LearnedSpace = list[list[Cell]]


class Block(NamedTuple):
    """One block of a network.

    Args:
        shape: channels, stride and width inside.
        cell: what it computes; None: nothing, the block is its shortcut.
        plain: it is written as MBInvertedConvLayer, whose cell is a chain of one depthwise convolution.
    """

    shape: Shape
    cell: Cell | None
    plain: bool = False

    @property
    def shortcut(self) -> bool:
        """Where it can be: the output has the shape of the input, and something is left out by it."""
        return self.shape.inside == self.shape.out and self.shape.stride == 1


@dataclass(frozen=True)
class Network:
    """A network of cells, as ``timm.create_model("autospace", network=FILE)`` builds it.

    Args:
        stem: channels of the first convolution, 3x3. in_chans: of pictures.
        stem_stride: its stride.
        features: channels of the 1x1 convolution before the mean over places.
        classes: outputs of the linear layer behind it.
        bn_momentum, bn_eps: of every BatchNorm.
    """

    stem: int
    blocks: tuple[Block, ...]
    features: int
    classes: int
    stem_stride: int = 2
    in_chans: int = 3
    bn_momentum: float = 0.1
    bn_eps: float = 1e-3

    def costs(self, side: int = 224) -> tuple[int, int]:
        """(parameters, multiply-adds) on square pictures, as modules of torch count them."""
        place = -(-side // self.stem_stride)
        weights = 9 * self.in_chans * self.stem
        parameters, madds = weights + 2 * self.stem, weights * place**2
        width = self.stem
        for block in self.blocks:
            if block.cell is not None:
                more, work, place = block_costs(block.cell, block.shape, place)
                parameters, madds, width = parameters + more, madds + work, block.shape.out
        last = width * self.features
        parameters += last + 2 * self.features + (self.features + 1) * self.classes
        return parameters, madds + last * place**2 + self.features * self.classes

    def with_classes(self, classes: int, in_chans: int = 3) -> Network:
        return replace(self, classes=classes, in_chans=in_chans)


# -- networks ---------------------------------------------------------------------------------------------------------


def read_network(path: str | Path) -> Network:
    """Read a network in the published form (learned_net/net_340M.config of zhoudaquan/AutoSpace).

    Raises:
        ValueError: not such a file, or a block that is none; names the file and the block.
        FileNotFoundError: none is there.
    """
    raw = _json(path)
    try:
        stem, last, head, bn = raw["first_conv"], raw["feature_mix_layer"], raw["classifier"], raw["bn"]
        blocks, width = [], stem["out_channels"]
        for i, block in enumerate(raw["blocks"]):
            blocks.append(_block(block, width, f"{path}: block {i}"))
            width = blocks[-1].shape.out
        return Network(
            stem=stem["out_channels"],
            blocks=tuple(blocks),
            features=last["out_channels"],
            classes=head["out_features"],
            stem_stride=stem["stride"],
            in_chans=stem["in_channels"],
            bn_momentum=bn["momentum"],
            bn_eps=bn["eps"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a network of AutoSpace in the published form: {error!r}") from error


def _block(raw: dict[str, Any], width: int, where: str) -> Block:
    inside = raw["mobile_inverted_conv"]
    kind = inside["name"]
    if kind == "ZeroLayer":
        if raw["shortcut"] is None or inside.get("stride", 1) != 1:
            raise ValueError(f"{where}: ZeroLayer without a shortcut would be nothing at all; expected IdentityLayer")
        return Block(Shape(width, width, 1, 1), None)
    shape = Shape(inside["in_channels"], inside["out_channels"], inside["stride"], inside["expand_ratio"])
    if shape.inside != width:
        raise ValueError(f"{where}: in_channels is {shape.inside}, the block before gives {width}")
    if kind == "MBInvertedConvLayer":
        block = Block(shape, Cell((_of_side(inside["kernel_size"], where), NONE, IDENTITY, NONE, IDENTITY)), True)
    elif kind == "Motif":
        text = inside["build_graph"]
        try:
            block = Block(shape, from_graph(json.loads(text) if isinstance(text, str) else text, IN_NETWORK))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    else:
        raise ValueError(f"{where}: unknown layer {kind!r}; expected Motif, MBInvertedConvLayer or ZeroLayer")
    if (raw["shortcut"] is not None) != block.shortcut:
        what = "has no shortcut" if block.shortcut else "has a shortcut, and its output is of another shape"
        raise ValueError(f"{where}: {what}; blocks of equal shapes have one, and no others")
    return block


def _of_side(side: int, where: str) -> int:
    for op, kernel in KERNELS.items():
        if kernel == side:
            return op
    raise ValueError(f"{where}: kernel_size is {side!r}; expected one of {', '.join(map(str, KERNELS.values()))}")


def write_network(path: str | Path, network: Network) -> None:
    """Write the published form."""
    raw = {
        "name": "ProxylessNASNets",
        "bn": {"momentum": network.bn_momentum, "eps": network.bn_eps},
        "first_conv": _convolution(3, network.stem_stride, network.in_chans, network.stem),
        "blocks": [
            {
                "name": "MobileInvertedResidualBlock",
                "mobile_inverted_conv": _inside(block),
                "shortcut": _identity(block.shape.out) if block.shortcut else None,
            }
            for block in network.blocks
        ],
        "feature_mix_layer": _convolution(1, 1, network.blocks[-1].shape.out, network.features),
        "classifier": {
            "name": "LinearLayer",
            "in_features": network.features,
            "out_features": network.classes,
            "bias": True,
            "use_bn": False,
            "act_func": None,
            "dropout_rate": 0,
            "ops_order": "weight_bn_act",
        },
    }
    _write(path, raw)


def _convolution(kernel: int, stride: int, inside: int, out: int) -> dict[str, Any]:
    return {
        "name": "ConvLayer",
        "kernel_size": kernel,
        "stride": stride,
        "dilation": 1,
        "groups": 1,
        "bias": False,
        "has_shuffle": False,
        "in_channels": inside,
        "out_channels": out,
        "use_bn": True,
        "act_func": "relu6",
        "dropout_rate": 0,
        "ops_order": "weight_bn_act",
    }


def _identity(width: int) -> dict[str, Any]:
    return {
        "name": "IdentityLayer",
        "in_channels": width,
        "out_channels": width,
        "use_bn": False,
        "act_func": None,
        "dropout_rate": 0,
        "ops_order": "weight_bn_act",
    }


def _inside(block: Block) -> dict[str, Any]:
    if block.cell is None:
        return {"name": "ZeroLayer", "stride": 1}
    shape = {
        "in_channels": block.shape.inside,
        "out_channels": block.shape.out,
        "kernel_size": KERNELS.get(block.cell.ops[0], 3) if block.plain else 3,
        "stride": block.shape.stride,
        "expand_ratio": block.shape.expand,
    }
    if block.plain:
        return {"name": "MBInvertedConvLayer", **shape, "mid_channels": None, "has_se": False}
    return {
        "name": "Motif",
        **shape,
        "num_nodes": 4,
        "build_graph": json.dumps(graph(block.cell)),
        "dim_conv_idx": block.cell.dim_conv,
        "atten_mode": "channel",
        "feature_mix_mode_idx": list(block.cell.mix),
        "has_se": False,
    }


# -- spaces -----------------------------------------------------------------------------------------------------------


def read_space(path: str | Path) -> LearnedSpace:
    """Read a learned space in the published form (learned_space/search_space.config): for every layer its cells.

    Raises:
        ValueError: not such a file, or an invalid cell; names the file, the layer and the cell.
        FileNotFoundError: none is there.
    """
    raw = _json(path)
    layers = raw.get("blocks") if isinstance(raw, dict) else None
    if not isinstance(layers, list) or not layers or not all(isinstance(cells, list) and cells for cells in layers):
        raise ValueError(f'{path}: not a learned space: expected {{"blocks": [[cell, ...] of each layer]}}')
    space: LearnedSpace = []
    for i, cells in enumerate(layers):
        space.append([])
        for j, cell in enumerate(cells):
            try:
                space[i].append(from_graph(cell))
            except ValueError as error:
                raise ValueError(f"{path}: layer {i}, cell {j}: {error}") from None
    return space


def write_space(path: str | Path, space: Sequence[Sequence[Cell]]) -> None:
    """Write the published form."""
    _write(path, {"name": "SuperProxylessNASNets", "blocks": [[graph(cell) for cell in cells] for cells in space]})


def _json(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected what `distillkit search` wrote, or a published one")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def _write(path: str | Path, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")


# -- the macro network ------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    width: int
    blocks: int
    stride: int


class Place(NamedTuple):
    """Where a searched block stands: the layer whose cells it may have, its shape at ``expand`` 1, whether it is the
    first of its stage, which no network leaves out."""

    layer: int
    shape: Shape
    first: bool


@dataclass(frozen=True)
class Macro:
    """What is fixed while cells are searched: number and width of blocks (paper, section 3; ProxylessNAS's skeleton).

    Args:
        stem, stem_stride: the first convolution.
        first: width of the block behind it, an inverted residual that does not widen; it is not searched.
        stages: what is searched. Each has a space for its first block, and one for the others.
        features: channels before the mean over places.
    """

    stem: int = 32
    first: int = 16
    stages: tuple[Stage, ...] = (
        Stage(24, 4, 2),
        Stage(40, 4, 2),
        Stage(80, 4, 2),
        Stage(96, 4, 1),
        Stage(192, 4, 2),
        Stage(320, 1, 1),
    )
    features: int = 1280
    stem_stride: int = 2

    def places(self) -> list[Place]:
        """Of every searched block."""
        found, layer, width = [], 0, self.first
        for stage in self.stages:
            found.append(Place(layer, Shape(width, stage.width, stage.stride, 1), True))
            layer, width = layer + 1, stage.width
            found += [Place(layer, Shape(width, width, 1, 1), False)] * (stage.blocks - 1)
            layer += stage.blocks > 1
        return found

    @property
    def layers(self) -> int:
        """Number of spaces: 11 for the published one."""
        return self.places()[-1].layer + 1

    def network(self, blocks: Sequence[Block], classes: int) -> Network:
        """``blocks``: the searched ones."""
        first = Block(Shape(self.stem, self.first, 1, 1), Cell((CONV3, NONE, IDENTITY, NONE, IDENTITY)), True)
        return Network(self.stem, (first, *blocks), self.features, classes, self.stem_stride)
