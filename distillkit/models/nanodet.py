"""NanoDet and NanoDet-Plus (RangiLyu/nanodet, Apache-2.0): small COCO detectors with distribution heads.

They are read from ncnn's pair of files: NAME.param, a text graph with one layer a line, and NAME.bin, the weights of
the convolutions in the order of the graph, 16- or 32-bit floats, batch norm folded in. The graph up to the output
convolutions becomes a module whose convolutions keep the file's names (``convs.conv_77``); what comes after only
reshapes and is left out. Each level is one convolution: C class logits, then 4 edges (left, top, right, bottom) of 8
bins, 0..7 strides.

Where a cell's point stands differs: NanoDet-Plus at i * stride, NanoDet at (i + 0.5) * stride.
"""

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.boxes.maps import Maps
from distillkit.losses.gfl import gfl_losses
from distillkit.models.dense import Images, Inference, Sizes, Targets, predict, split_targets, to_batch

BINS = 8
COCO_CLASSES = 80
MAGIC = "7767517"  # the first line of every .param file
HALF, FULL = 0x01306B47, 0  # the tags before 16- and 32-bit weights in a .bin file
NONE, RELU, LEAKY = 0, 1, 2  # activations that ncnn fuses into a convolution
KINDS = {"Input", "Convolution", "ConvolutionDepthWise", "Pooling", "Split", "Concat", "ShuffleChannel", "Slice"}
KINDS |= {"BinaryOp", "Interp", "Sigmoid", "Reshape", "Permute"}
MODES = {"Pooling": 0, "BinaryOp": 0, "Interp": 2}  # maximum, sum, bilinear: the only ones a NanoDet has
PRIOR = 0.01  # the class probability that a fresh head says of every cell
BACKBONE_STRIDE = 32  # pictures are padded to multiples of it, as published; the level of stride 64 rounds up

Convention = Literal["default", "release"]


@dataclass(frozen=True)
class Variant:
    """What a NanoDet's files do not say.

    Args:
        input_size: (height, width) it was trained at.
        keep_ratio: its pictures kept their aspect and were padded right and below with black; else they were stretched.
        strides: finest first.
        centre: where in its cell a point stands, in cells.
    """

    input_size: tuple[int, int]
    keep_ratio: bool
    strides: tuple[int, ...]
    centre: float


VARIANTS = {
    "nanodet-m": Variant((320, 320), True, (8, 16, 32), 0.5),
    "nanodet-plus-m_320": Variant((320, 320), False, (8, 16, 32, 64), 0.0),
    "nanodet-plus-m_416": Variant((416, 416), False, (8, 16, 32, 64), 0.0),
}


@dataclass(frozen=True)
class Layer:
    """One line of a .param file. The keys of ``values`` mean what ncnn's documentation of ``kind`` says."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[int, Any]

    def number(self, key: int, default: int = 0) -> int:
        return int(self.values.get(key, default))

    @property
    def is_conv(self) -> bool:
        return self.kind in ("Convolution", "ConvolutionDepthWise")


class NanoDet(nn.Module):
    """The detector; called as torchvision's are (see ``distillkit.models.dense``). There are no BatchNorm layers.

    Args:
        layers: the graph, as ``read_graph`` gives it. Weights are random until ``load_ncnn``.
        variant: the rest.

    Attributes:
        strides, centre, input_size, keep_ratio: of the variant.
        bins, num_classes, octave (5: side of the anchor box in strides, as NanoDet was trained).
        head_paths: module path of each level's output convolution (num_classes + 4*8 channels), finest first.
        inference: an ``Inference``, replace it for other thresholds.
        convention: of the boxes that it predicts, as in ``nanodet``.
    """

    bins = BINS
    octave = 5.0
    mean: Tensor
    std: Tensor
    black: Tensor

    def __init__(self, layers: list[Layer], variant: Variant):
        super().__init__()
        self.strides, self.centre = variant.strides, variant.centre
        self.input_size, self.keep_ratio = variant.input_size, variant.keep_ratio
        self.num_classes = COCO_CLASSES
        self.inference = Inference()
        self.convention: Convention = "default"
        self.layers = _up_to(_output_convs(layers), layers)
        self.convs = nn.ModuleDict({layer.name: _conv(layer) for layer in self.layers if layer.is_conv})
        self._heads = self._by_stride(_output_convs(layers))
        self.head_paths = tuple(f"convs.{head.name}" for head in self._heads)
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255, persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255, persistent=False)
        self.register_buffer("black", torch.zeros(3, 1, 1), persistent=False)

    def forward(self, images: Images, targets: Targets | None = None) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Train mode: ``images, targets`` -> loss_cls, loss_bbox, loss_dfl (GFL's). Eval mode: boxes of each picture.

        Args:
            images: pictures (3, H, W) of any sizes, red, green, blue, 0..1; or one tensor (B, 3, H, W).
            targets: per picture boxes (k, 4), x1, y1, x2, y2 in its pixels, and labels (k,) int64; k may be 0.

        Raises:
            ValueError: what is wrong with which image or target.
        """
        batch, sizes = self.batch(images)
        if not self.training:
            classes, edges = self.forward_raw(batch)
            return self.predict(classes, edges, sizes)
        boxes, labels = split_targets(targets, len(sizes), self.num_classes)
        classes, edges = self.forward_raw(batch)
        return gfl_losses(
            Maps(tuple(classes), (self.num_classes,)),
            Maps(tuple(edges), (4, self.bins)),
            boxes,
            labels,
            sizes,
            strides=self.strides,
            centre=self.centre,
            octave=self.octave,
        )

    def batch(self, images: Images) -> tuple[Tensor, Sizes]:
        """Pictures as one batch (B, 3, H, W), padded with black, and their (height, width) before that."""
        return to_batch(images, BACKBONE_STRIDE, self.black)

    def forward_raw(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One batch -> the head's maps; plain tensors in and out, the form for ``torch.export``.

        Args:
            batch: (B, 3, H, W), red, green, blue, 0..1, sides multiples of 32.

        Returns:
            per level class logits (B, C, h, w) and edge logits (B, 4*8, h, w), h = ceil(H / stride).
        """
        dtype = self._conv(self._heads[0]).weight.dtype
        blobs = self._blobs(((batch - self.mean) / self.std).flip(1).to(dtype))
        split = [blobs[head.outputs[0]].split([self.num_classes, 4 * self.bins], 1) for head in self._heads]
        return [classes for classes, _ in split], [edges for _, edges in split]

    def predict(self, classes: list[Tensor], edges: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """The head's maps -> per picture boxes (k, 4) in its pixels, scores (k,) falling, labels (k,)."""
        strides = self.strides if self.convention == "default" else self._shares_of_the_width(classes)
        return predict([c.sigmoid() for c in classes], edges, sizes, strides, self.centre, self.inference)

    def _shares_of_the_width(self, maps: list[Tensor]) -> list[float]:
        """The batch's width over each level's cells; batches are padded so that the finest stride divides it."""
        width = maps[0].shape[-1] * self.strides[0]
        return [width / level.shape[-1] for level in maps]

    def new_head(self, num_classes: int) -> "NanoDet":
        """Put freshly initialised output convolutions for other classes in place of the trained ones. Returns self."""
        self.num_classes = num_classes
        for head in self._heads:
            old = self._conv(head)
            new = nn.Conv2d(old.in_channels, num_classes + 4 * self.bins, 1)
            self.convs[head.name] = new.to(old.weight)
        self._reset_heads()
        return self

    def reset(self) -> "NanoDet":
        """Initialise every weight afresh, for training from scratch. Returns self."""
        for layer in self.layers:
            if layer.is_conv:
                conv = self._conv(layer)
                gain = nn.init.calculate_gain("leaky_relu", 0.1) if layer.number(9) else 1.0
                nn.init.normal_(conv.weight, std=gain / math.sqrt(conv.weight[0].numel()))
                nn.init.zeros_(cast(Tensor, conv.bias))
        self._reset_heads()
        return self

    def _reset_heads(self) -> None:
        for head in self._heads:
            conv = self._conv(head)
            nn.init.normal_(conv.weight, std=0.01)
            with torch.no_grad():
                cast(Tensor, conv.bias).zero_()[: self.num_classes] = math.log(PRIOR / (1 - PRIOR))

    def _conv(self, layer: Layer) -> nn.Conv2d:
        return cast(nn.Conv2d, self.convs[layer.name])

    def _by_stride(self, heads: list[Layer]) -> list[Layer]:
        """The output convolutions, finest first; a trial run of the graph shows which is which."""
        side = 2 * max(self.strides)
        with torch.no_grad():
            blobs = self._blobs(torch.zeros(1, 3, side, side))
        strides = {side // blobs[head.outputs[0]].shape[-1]: head for head in heads}
        if sorted(strides) != sorted(self.strides) or len(heads) != len(strides):
            raise ValueError(f"its outputs have strides {sorted(strides)}, expected {list(self.strides)}")
        return [strides[s] for s in self.strides]

    def _blobs(self, blue_first: Tensor) -> dict[str, Tensor]:
        """Run the graph on a normalised batch; every intermediate result by its name in the graph."""
        blobs: dict[str, Tensor] = {}
        for layer in self.layers:
            inputs = [blobs[name] for name in layer.inputs] or [blue_first]
            blobs.update(zip(layer.outputs, self._run(layer, inputs)))
        return blobs

    def _run(self, layer: Layer, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """One layer of the graph: its inputs -> its outputs."""
        x = inputs[0]
        if layer.is_conv:
            return (_activate(layer, self.convs[layer.name](x)),)
        if layer.kind == "Input":
            return (x,)
        if layer.kind == "Split":
            return (x,) * len(layer.outputs)
        if layer.kind == "Pooling":
            return (F.max_pool2d(x, layer.number(1), layer.number(2, 1), layer.number(3)),)
        if layer.kind == "Concat":
            return (torch.cat(inputs, 1),)
        if layer.kind == "BinaryOp":
            return (inputs[0] + inputs[1],)
        if layer.kind == "ShuffleChannel":
            return (x.unflatten(1, (layer.number(0), -1)).transpose(1, 2).flatten(1, 2),)
        if layer.kind == "Slice":
            return x.split(_slices(layer, x.shape[1]), 1)
        return (F.interpolate(x, scale_factor=[layer.values[1], layer.values[2]], mode="bilinear"),)


def nanodet(variant: str, folder: str | Path | None = None, convention: Convention = "default") -> NanoDet:
    """A trained NanoDet, in train mode.

    Args:
        variant: "nanodet-m", "nanodet-plus-m_320" or "nanodet-plus-m_416".
        folder: where VARIANT.param and VARIANT.bin are; $DISTILLKIT_DATA/weights_nanodet unless given.
        convention: how head maps become boxes in eval mode. ``default``: by the strides 8, 16, 32 and 64 that the model
            was trained with. ``release``: on both axes by the batch's width over a level's cells, as the program does
            that measured the AP published beside these files; only to measure the same. The two differ where a level's
            cells do not divide the width: at 416, level 64 has 7 cells and ``release`` takes 59.43. Training always
            takes the true strides, and ``wrap`` refuses a model in ``release``.

    Raises:
        ValueError: no such variant or convention, or a file that is damaged or not an ncnn file of a NanoDet; the
            message names it.
        FileNotFoundError: no folder, or a file is missing in it.
    """
    if variant not in VARIANTS:
        raise ValueError(f"nanodet variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if convention not in ("default", "release"):
        raise ValueError(f"nanodet convention {convention!r} is neither 'default' nor 'release'")
    folder = Path(folder) if folder is not None else _default_folder()
    model = load_ncnn(folder / f"{variant}.param", folder / f"{variant}.bin", VARIANTS[variant])
    model.convention = convention
    return model


def load_ncnn(param: Path, weights: Path, variant: Variant) -> NanoDet:
    """Build the detector of a pair of ncnn files. Raises as ``nanodet`` does."""
    for path in (param, weights):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: a NanoDet is a pair of ncnn files, NAME.param and NAME.bin"
            )
    layers = read_graph(param)
    try:
        model = NanoDet(layers, variant)
    except (KeyError, IndexError, AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(f"{param} is not the graph of a NanoDet: {error}") from error
    read_weights(weights, model)
    return model


def read_graph(path: Path) -> list[Layer]:
    """The layers of a .param file, in the order in which they run.

    Raises:
        ValueError: not an ncnn graph, an unreadable line, or fewer layers than it declares; names path and line.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(lines) < 2 or lines[0].strip() != MAGIC:
        raise ValueError(f"{path} is not an ncnn graph: its first line should be {MAGIC}")
    declared = lines[1].split()[0] if lines[1].split() else ""
    layers = []
    for number, line in enumerate(lines[2:], 3):
        if line.strip():
            try:
                layers.append(_layer(line.split()))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}:{number}: not a line of an ncnn graph: {error}") from error
    if declared != str(len(layers)):
        raise ValueError(
            f"{path} declares {declared or 'no number of'} layers but holds {len(layers)}: is it truncated?"
        )
    return layers


def read_weights(path: Path, model: NanoDet) -> None:
    """Copy a .bin file's weights into the model's convolutions.

    Raises:
        ValueError: the file ends early, has bytes left over, or an unknown weight tag; names the layer and the sizes.
    """
    raw = path.read_bytes()
    at = 0
    for layer in (layer for layer in model.layers if layer.is_conv):
        conv = cast(nn.Conv2d, model.convs[layer.name])
        if at + 4 > len(raw):
            raise ValueError(
                f"{path} has {len(raw)} bytes and ends before the weights of {layer.name}: is it truncated?"
            )
        tag = int.from_bytes(raw[at : at + 4], "little")
        if tag not in (HALF, FULL):
            raise ValueError(
                f"{path}: weights of {layer.name} at byte {at} have the tag {tag:#x}, expected {HALF:#x} (16 bit) "
                "or 0 (32 bit): the file belongs to another graph or is no ncnn file"
            )
        count, item = conv.weight.numel(), np.dtype("<f2" if tag == HALF else "<f4")
        padded = -(-count * item.itemsize // 4) * 4  # 16-bit weights are padded to a multiple of 4 bytes
        start, end = at + 4, at + 4 + padded + 4 * conv.out_channels
        if end > len(raw):
            raise ValueError(
                f"{path} has {len(raw)} bytes but the weights of {layer.name} end at byte {end}: is it truncated?"
            )
        with torch.no_grad():
            weight = np.frombuffer(raw, item, count, start).astype(np.float32)
            bias = np.frombuffer(raw, "<f4", conv.out_channels, start + padded).astype(np.float32)
            conv.weight.copy_(torch.from_numpy(weight).view_as(conv.weight))
            cast(Tensor, conv.bias).copy_(torch.from_numpy(bias))
        at = end
    if at != len(raw):
        raise ValueError(f"{path} has {len(raw)} bytes but its graph needs {at}: the file belongs to another graph")


def _default_folder() -> Path:
    data = os.environ.get("DISTILLKIT_DATA")
    if not data:
        raise FileNotFoundError("say where NanoDet's .param and .bin files are: folder=..., or set DISTILLKIT_DATA")
    return Path(data) / "weights_nanodet"


def _layer(words: list[str]) -> Layer:
    kind, name, inputs, outputs = words[0], words[1], int(words[2]), int(words[3])
    if kind not in KINDS:
        raise ValueError(f"layer {name!r} is of kind {kind!r}, which no NanoDet has")
    blobs, pairs = words[4 : 4 + inputs + outputs], words[4 + inputs + outputs :]
    if len(blobs) < inputs + outputs:
        raise ValueError(f"layer {name!r} should name {inputs} inputs and {outputs} outputs")
    layer = Layer(kind, name, tuple(blobs[:inputs]), tuple(blobs[inputs:]), dict(map(_value, pairs)))
    if kind in MODES and layer.number(0) != MODES[kind]:
        raise ValueError(f"layer {name!r} ({kind}) works in mode {layer.number(0)}, a NanoDet's in {MODES[kind]}")
    return layer


def _value(pair: str) -> tuple[int, Any]:
    """``6=648`` is number 6; ``-23310=1,0.1`` is number 10, a list that starts with its length."""
    key, text = pair.split("=")
    if int(key) > -23300:
        return int(key), _number(text)
    return -int(key) - 23300, [_number(t) for t in text.split(",")[1:]]


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _output_convs(layers: list[Layer]) -> list[Layer]:
    """The convolutions whose channels are cut into class and edge logits, in the order of the graph."""
    channels = COCO_CLASSES + 4 * BINS
    cut = {layer.inputs[0] for layer in layers if layer.kind == "Slice"}
    heads = [x for x in layers if x.is_conv and x.number(0) == channels and x.outputs[0] in cut]
    if not heads:
        raise ValueError(
            f"no convolution of {channels} channels ({COCO_CLASSES} classes, 4 edges of {BINS} bins) is an output"
        )
    return heads


def _up_to(heads: list[Layer], layers: list[Layer]) -> list[Layer]:
    """The layers that the heads need, in order; every convolution is among them, or it is not a NanoDet."""
    wanted = {head.outputs[0] for head in heads}
    needed: list[Layer] = []
    for layer in reversed(layers):
        if wanted & set(layer.outputs):
            wanted |= set(layer.inputs)
            needed.insert(0, layer)
        elif layer.is_conv:
            raise ValueError(f"no output depends on {layer.name}")
    return needed


def _conv(layer: Layer) -> nn.Conv2d:
    out, width, groups = layer.number(0), layer.number(1), layer.number(7, 1)
    height = layer.number(11, width)
    weights = layer.number(6)
    if not out or weights % (width * height * out):
        raise ValueError(f"{layer.name}: {weights} weights do not make {out} filters of {height} x {width}")
    if layer.number(5) != 1 or layer.number(9) not in (NONE, RELU, LEAKY):
        raise ValueError(f"{layer.name}: expected a bias, and ReLU, leaky ReLU or no activation")
    inside = weights // (width * height * out) * groups
    return nn.Conv2d(inside, out, (height, width), layer.number(3, 1), layer.number(4), layer.number(2, 1), groups)


def _activate(layer: Layer, x: Tensor) -> Tensor:
    kind = layer.number(9)
    if kind == NONE:
        return x
    return F.relu(x) if kind == RELU else F.leaky_relu(x, layer.values[10][0])


def _slices(layer: Layer, channels: int) -> list[int]:
    """Channels of each output of a Slice; -233 stands for an equal share of the rest."""
    sizes: list[int] = layer.values[0]
    rest = channels - sum(s for s in sizes if s != -233)
    return [rest // Counter(sizes)[-233] if s == -233 else s for s in sizes]
