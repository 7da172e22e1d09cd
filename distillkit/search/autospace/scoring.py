"""Cells that run side by side, each with a score that the loss trains (arXiv:2103.11833, equations 3 to 5).

    y_l = sum_k a_k * c_k(x_l),   a = softmax(alpha)
    d L / d a_k = < d L / d y_l , c_k(x_l) >

The softmax is our choice; whether the paper has one could not be read. Weights are one set for each (layer, edge,
operation), and one pair of 1x1 convolutions a layer, so that a mutated cell starts with what its parent has learned;
this, too, is a choice. What several cells of a layer have in common, such as the first edge, is computed once: the sum
is the same. BatchNorm uses the statistics of the batch, always: running ones would be of no cell in particular.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.models.autospace import convolution, initialise, run_cell, stride_of, without_weights
from distillkit.models.autospace_cells import CONV3, EDGES, INVERTED_RESIDUAL, KERNELS, Cell, Shape
from distillkit.models.autospace_network import Macro

BatchNorm = partial(nn.BatchNorm2d, track_running_stats=False)


class ScoredLayer(nn.Module):
    """One layer with the weights of every cell: (B, shape.inside, H, W) -> (B, shape.out, h, w)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        wide = shape.wide
        self.expand = convolution(shape.inside, wide, 1, 1, 1, BatchNorm, True) if shape.expand > 1 else nn.Identity()
        self.edges = nn.ModuleDict(
            {
                edge: convolution(wide, wide, KERNELS[CONV3], stride_of(edge, shape), wide, BatchNorm, True)
                for edge in EDGES
            }
        )
        self.project = convolution(wide, shape.out, 1, 1, 1, BatchNorm, False)

    def forward(self, x: Tensor, cells: Sequence[Cell], weights: Tensor) -> Tensor:
        """weights: a, one a cell. The shortcut lies outside of the sum, as outside of a cell."""
        y = sum(weight * out for weight, out in zip(weights, self.outputs(x, cells), strict=True))
        return x + y if self.shape.inside == self.shape.out and self.shape.stride == 1 else y

    def outputs(self, x: Tensor, cells: Sequence[Cell]) -> list[Tensor]:
        """c_k(x) of each cell."""
        wide = self.expand(x)
        done: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}  # the input is kept: ids are of living objects

        def edge(name: str, op: int, given: Tensor) -> Tensor:
            key = (name, op, id(given))
            if key not in done:
                made = (
                    self.edges[name](given)
                    if op in KERNELS
                    else without_weights(op, given, stride_of(name, self.shape))
                )
                done[key] = made, given
            return done[key][0]

        return [self.project(run_cell(cell, wide, edge)) for cell in cells]


class ScoringNet(nn.Module):
    """A network with one ``ScoredLayer`` for each space of the macro network.

    Blocks of a stage that share a space are one block here: it is cells that are judged, and depth only makes the
    judgement dearer (our choice).
    """

    def __init__(self, macro: Macro, classes: int, expand: int):
        super().__init__()
        self.stem = convolution(3, macro.stem, 3, macro.stem_stride, 1, BatchNorm, True)
        self.first = ScoredLayer(Shape(macro.stem, macro.first, 1, 1))
        self.layers = nn.ModuleList(ScoredLayer(shape) for shape in layer_shapes(macro, expand))
        self.features = convolution(macro.stages[-1].width, macro.features, 1, 1, 1, BatchNorm, True)
        self.head = nn.Linear(macro.features, classes)
        self.apply(initialise)

    def forward(self, x: Tensor, active: Sequence[Sequence[Cell]], alphas: Tensor) -> Tensor:
        """Pictures, the K active cells of each layer, and their scores (layers, K) -> logits."""
        x = self.stem(x)
        x = self.first(x, [INVERTED_RESIDUAL], x.new_ones(1))
        weights = torch.softmax(alphas, -1)
        for layer, cells, a in zip(self.layers, active, weights, strict=True):
            x = layer(x, cells, a)
        return self.head(self.features(x).mean((2, 3)))


def layer_shapes(macro: Macro, expand: int) -> list[Shape]:
    """Of the first block of each layer."""
    shapes: dict[int, Shape] = {}
    for place in macro.places():
        shapes.setdefault(place.layer, place.shape._replace(expand=expand))
    return list(shapes.values())


def layer_sides(macro: Macro, side: int) -> list[int]:
    """Side of each layer's input, for square pictures of ``side``."""
    sides, place = [], -(-side // macro.stem_stride)
    for shape in layer_shapes(macro, 1):
        sides.append(place)
        place = -(-place // shape.stride)
    return sides


def trained(parameters: Any, wanted: bool) -> None:
    """Whether a backward pass reaches these."""
    for parameter in parameters:
        parameter.requires_grad_(wanted)
