"""Which networks a learned space holds: for every block a cell of its layer, a kernel and a width inside. No torch.

A genome has an entry for each searched block: ``(cell, kernel, expand)`` with the number of the cell in its layer, or
``()`` where the block is left out. Candidates are those of the published network (arXiv:2103.11833, as its file shows):
the cells of the layer, kernels 3, 5, 7 for the depthwise convolution on the cell's first edge, expansions 3 and 6, and
nothing at all. Two genomes are two networks: a kernel is 3 where the first edge has no convolution, and blocks are left
out from the end of a stage only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from distillkit.models.autospace_cells import CONV3, KERNELS, Cell, Shape, block_costs, canonical
from distillkit.models.autospace_network import Block, Macro, Network, Place

Choice = tuple[int, ...]
Genome = tuple[Choice, ...]
_BY_SIDE = {side: op for op, side in KERNELS.items()}


@dataclass
class NetworkSpace:
    """What the engine asks of a space (``distillkit.search.Space``), and the networks themselves.

    Args:
        cells: of each layer; of those that compute the same one is kept.
        kernels, expands: which may be chosen.
        side: of the pictures, in pixels; what multiply-adds are counted on.

    Raises:
        ValueError: as many layers as the macro network has are expected.
    """

    macro: Macro
    cells: Sequence[Sequence[Cell]]
    kernels: Sequence[int]
    expands: Sequence[int]
    classes: int
    side: int
    places: list[Place] = field(init=False)
    _table: dict[tuple[int, Choice], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.cells) != self.macro.layers:
            raise ValueError(
                f"the space has {len(self.cells)} layers, the network {self.macro.layers}: one for the first block of "
                "each stage, and one for the others where there are some"
            )
        self.cells = [list(dict.fromkeys(map(canonical, cells))) for cells in self.cells]
        self.places = self.macro.places()
        self._choices = [self._choices_of(place) for place in self.places]
        sides = self._sides()
        self._table = {
            (i, choice): block_costs(self.cell(i, choice), self.shape(i, choice), sides[i])[1]
            for i, choices in enumerate(self._choices)
            for choice in choices
        }
        self._around = self._madds_around(sides)

    # ---- the engine's side

    def random(self, rng: Random) -> Genome:
        """Lean and rich networks alike: how likely blocks are left out, and are narrow, is drawn first. Drawn block by
        block, nearly all networks would be of medium cost."""
        lean = rng.random()
        genome: list[Choice] = []
        for i, place in enumerate(self.places):
            stopped = not place.first and (not genome[-1] or rng.random() < lean)
            genome.append(() if stopped else self._drawn(i, rng, lean))
        return tuple(genome)

    def mutate(self, genome: Genome, rng: Random) -> Genome:
        """Another choice for one block, or one block more or fewer at the end of a stage."""
        i = rng.randrange(len(genome))
        changed = list(genome)
        if genome[i] and (self.places[i].first or rng.random() < 0.75):
            changed[i] = rng.choice([choice for choice in self._choices[i] if choice != genome[i]])
        elif genome[i]:
            changed[i] = ()
        else:
            changed[i] = self._drawn(i, rng, 0.5)
        return self._packed(changed)

    def crossover(self, a: Genome, b: Genome, rng: Random) -> Genome:
        """Each block from one of the two."""
        return self._packed([rng.choice(pair) for pair in zip(a, b, strict=True)])

    def check(self, genome: Any) -> None:
        if not isinstance(genome, tuple) or len(genome) != len(self.places):
            raise ValueError(f"expected a choice for each of {len(self.places)} blocks")
        for i, choice in enumerate(genome):
            if not choice:
                if self.places[i].first:
                    raise ValueError(f"block {i} is the first of its stage and cannot be left out")
            elif choice not in self._choices[i]:
                raise ValueError(
                    f"block {i} is {choice!r}; expected (cell, kernel, expand) of layer {self.places[i].layer}"
                )
        if self._packed(list(genome)) != genome:
            raise ValueError("blocks are left out from the end of a stage only")

    # ---- what genomes mean

    def cell(self, i: int, choice: Choice) -> Cell:
        """The cell of block i, with the chosen kernel on its first edge."""
        number, kernel, _ = choice
        cell = self.cells[self.places[i].layer][number]
        return cell._replace(ops=(_BY_SIDE[kernel], *cell.ops[1:])) if cell.ops[0] == CONV3 else cell

    def shape(self, i: int, choice: Choice) -> Shape:
        return self.places[i].shape._replace(expand=choice[2])

    def network(self, genome: Genome) -> Network:
        blocks = [
            Block(self.shape(i, choice), self.cell(i, choice)) if choice else Block(self.places[i].shape, None)
            for i, choice in enumerate(genome)
        ]
        return self.macro.network(blocks, self.classes)

    def madds(self, genome: Genome) -> int:
        """Multiply-adds, from a table."""
        return self._around + sum(self._table[i, choice] for i, choice in enumerate(genome) if choice)

    def smallest(self) -> Genome:
        """Of the fewest multiply-adds; of equals the first."""
        return tuple(self._extreme(i, min) if place.first else () for i, place in enumerate(self.places))

    def largest(self) -> Genome:
        return tuple(self._extreme(i, max) for i in range(len(self.places)))

    def choices(self, i: int) -> list[Choice]:
        """What block i may be, beside nothing."""
        return self._choices[i]

    # ---- inside

    def _choices_of(self, place: Place) -> list[Choice]:
        return [
            (number, kernel, expand)
            for number, cell in enumerate(self.cells[place.layer])
            for kernel in (self.kernels if cell.ops[0] == CONV3 else (3,))
            for expand in self.expands
        ]

    def _drawn(self, i: int, rng: Random, lean: float) -> Choice:
        number, kernel, _ = rng.choice(self._choices[i])
        narrow = rng.random() < lean
        return number, kernel, min(self.expands) if narrow else rng.choice(list(self.expands))

    def _packed(self, genome: list[Choice]) -> Genome:
        """Blocks that are left out behind those of their stage that are not. These keep their order."""
        packed: list[Choice] = []
        for i, place in enumerate(self.places):
            if place.first:
                end = next((j for j in range(i + 1, len(genome)) if self.places[j].first), len(genome))
                stage = genome[i + 1 : end]
                there = [choice for choice in stage if choice]
                packed += [genome[i], *there, *[()] * (len(stage) - len(there))]
        return tuple(packed)

    def _extreme(self, i: int, of: Callable[..., Choice]) -> Choice:
        return of(self._choices[i], key=lambda choice: self._table[i, choice])

    def _sides(self) -> list[int]:
        sides, place = [], -(-self.side // self.macro.stem_stride)
        for block in self.places:
            sides.append(place)
            place = -(-place // block.shape.stride)
        return [*sides, place]

    def _madds_around(self, sides: Sequence[int]) -> int:
        """Of all that is not searched."""
        smallest = self.smallest()
        inside = sum(self._table[i, choice] for i, choice in enumerate(smallest) if choice)
        return self.network(smallest).costs(self.side)[1] - inside
