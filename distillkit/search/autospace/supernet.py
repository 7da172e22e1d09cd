"""One network that holds all of a learned space, and how it is trained: single paths, the sandwich rule, in-place
distillation (Yu and Huang, arXiv:1903.05134), through ``distillkit.wrap``.

In each step the largest network learns from the labels; the smallest and some drawn at random learn what the largest
says of the same pictures. All share their weights, so there is one student: its four outputs are tapped, and
``InPlaceKD`` compares them. (An ``OnlineTeacher`` cannot be the largest network: ``wrap`` refuses a teacher that shares
weights with its student, whose losses would mix; here they are to.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from distillkit.core.distiller import Distiller
from distillkit.core.views import Features
from distillkit.losses.kl import kl_divergence
from distillkit.models.autospace import convolution, initialise, run_cell, stride_of, without_weights
from distillkit.models.autospace_cells import EDGES, INVERTED_RESIDUAL, KERNELS, Cell, Shape
from distillkit.search.autospace.networks import Genome, NetworkSpace
from distillkit.search.autospace.scoring import BatchNorm, ScoredLayer


class PathBlock(nn.Module):
    """One block with the weights of all its choices.

    A narrower choice uses the first channels; a kernel has weights of its own (our choice). BatchNorm is one for each
    width, and uses the statistics of the batch, in evaluation too: running ones would be of no network in particular.
    """

    def __init__(self, shape: Shape, cells: Sequence[Cell], expands: Sequence[int]):
        super().__init__()
        self.shape = shape
        widest = shape.inside * max(expands)
        self.expand = nn.Conv2d(shape.inside, widest, 1, bias=False)
        self.project = nn.Conv2d(widest, shape.out, 1, bias=False)
        used = sorted({(edge, op) for cell in cells for edge, op in zip(EDGES, cell.ops, strict=True) if op in KERNELS})
        self.edges = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        for edge, op in used:
            side = KERNELS[op]
            stride = stride_of(edge, shape)
            self.edges[f"{edge}_{op}"] = nn.Conv2d(widest, widest, side, stride, side // 2, groups=widest, bias=False)
        for expand in expands:
            wide = shape.inside * expand
            self.norms[f"expand_{expand}"] = BatchNorm(wide)
            self.norms[f"project_{expand}"] = BatchNorm(shape.out)
            for edge, op in used:
                self.norms[f"{edge}_{op}_{expand}"] = BatchNorm(wide)

    def forward(self, x: Tensor, cell: Cell, expand: int) -> Tensor:
        wide = self.shape.inside * expand

        def edge(name: str, op: int, given: Tensor) -> Tensor:
            stride = stride_of(name, self.shape)
            if op not in KERNELS:
                return without_weights(op, given, stride)
            conv: Any = self.edges[f"{name}_{op}"]
            y = F.conv2d(given, conv.weight[:wide], None, conv.stride, conv.padding, groups=wide)
            return F.relu6(self.norms[f"{name}_{op}_{expand}"](y))

        inside = x
        if expand > 1:
            inside = F.relu6(self.norms[f"expand_{expand}"](F.conv2d(x, self.expand.weight[:wide])))
        y = F.conv2d(run_cell(cell, inside, edge), self.project.weight[:, :wide])
        y = self.norms[f"project_{expand}"](y)
        return x + y if self.shape.inside == self.shape.out and self.shape.stride == 1 else y


class Supernet(nn.Module):
    """``supernet(pictures, genome)`` -> logits of the network that the genome stands for."""

    def __init__(self, space: NetworkSpace):
        super().__init__()
        self.space = space
        macro = space.macro
        self.stem = convolution(3, macro.stem, 3, macro.stem_stride, 1, BatchNorm, True)
        self.first = ScoredLayer(Shape(macro.stem, macro.first, 1, 1))
        self.blocks = nn.ModuleList()
        for i, place in enumerate(space.places):
            cells = [space.cell(i, choice) for choice in space.choices(i)]
            self.blocks.append(PathBlock(place.shape, cells, space.expands))
        self.features = convolution(macro.stages[-1].width, macro.features, 1, 1, 1, BatchNorm, True)
        self.head = nn.Linear(macro.features, space.classes)
        self.apply(initialise)

    def forward(self, x: Tensor, genome: Genome) -> Tensor:
        x = self.stem(x)
        x = self.first(x, [INVERTED_RESIDUAL], x.new_ones(1))
        for i, (block, choice) in enumerate(zip(self.blocks, genome, strict=True)):
            if choice:
                x = block(x, self.space.cell(i, choice), choice[2])
        return self.head(self.features(x).mean((2, 3)))


class Sandwich(nn.Module):
    """The student: in train mode it runs the largest network, the smallest, and ``drawn`` others, whose outputs pass
    through ``paths`` in that order, and returns what the largest says; in eval mode the largest alone.

    Which are drawn is a function of the seed and the step, which is saved with the weights.
    """

    step: Tensor

    def __init__(self, supernet: Supernet, drawn: int, seed: int):
        super().__init__()
        self.supernet, self.drawn, self.seed = supernet, drawn, seed
        self.largest, self.smallest = supernet.space.largest(), supernet.space.smallest()
        self.paths = nn.ModuleList(nn.Identity() for _ in range(2 + drawn))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.pretrained_cfg = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.supernet(x, self.largest)
        rng = random.Random(f"{self.seed}/{int(self.step)}")
        self.step += 1
        drawn = [self.supernet.space.random(rng) for _ in range(self.drawn)]
        outputs = [
            path(self.supernet(x, genome))
            for path, genome in zip(self.paths, [self.largest, self.smallest, *drawn], strict=True)
        ]
        return outputs[0]


class InPlaceKD(Distiller):
    """Every other path learns what the first one says: the mean over them of KL(softmax(first) || softmax(other)),
    itself a mean over pictures. No gradient reaches the first.

    Reads:
        ``Features.maps``: the logits (B, C) of each path.
    """

    short_name = "in_place"
    reads = Features
    taught_by_targets = True  # there is no teacher beside the student

    def __init__(self, paths: int, weight: float = 1.0):
        super().__init__(weight)
        self.student_at = [f"paths.{i}" for i in range(paths)]

    def forward(self, student: Any, teacher: Any, targets: Any) -> Tensor:
        first, *others = student.maps
        return torch.stack([kl_divergence(other, first, 1.0, "sum").mean() for other in others]).mean()


class Inherited:
    """Fitness of a genome: top-1 accuracy with the supernet's weights as they are, on ``batches`` of normalised
    pictures and labels; the mean cross entropy beside it. A function of the genome alone; it can be pickled."""

    def __init__(self, supernet: Supernet, batches: Sequence[tuple[Tensor, Tensor]]):
        self.supernet, self.batches = supernet.eval(), list(batches)

    @torch.inference_mode()
    def __call__(self, genome: Genome) -> dict[str, float]:
        device = self.supernet.head.weight.device
        right, loss, pictures = 0, 0.0, 0
        for images, labels in self.batches:
            logits = self.supernet(images.to(device), genome).float()
            labels = labels.to(device)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            pictures += len(labels)
        return {"fitness": right / pictures, "loss": loss / pictures}
