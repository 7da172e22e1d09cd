"""Cells of AutoSpace (Zhou et al., arXiv:2103.11833): how they are written, which there are, what they cost. No torch.

A cell is a graph of 4 nodes, node 0 its input and node 3 its output, one operation on each edge. It runs between a
1x1 convolution that widens and one that narrows; a shortcut lies outside of it. The published files of the paper write
it as a 4 x 4 list, which ``from_graph`` and ``graph`` read and write:

    [[0, 0, 0, d], [o01, 0, 0, [m2, m3]], [o02, o12, 0, 0], [o03, o13, o23, 0]]

No code was ever released, so what follows is this file's reading. On the published 340M network it gives 4.51 M
parameters and 336 M multiply-adds (reported: 4.3 and 340):

    id       operation
    1        no edge; always on 0->3, never on 0->1, 1->2, 2->3, so that the chain 0-1-2-3 is connected
    2        identity; with a stride the mean of 2x2
    3        mean of 3x3 (the file names another cheap operation, without saying which; this one is our choice)
    5, 7, 9  depthwise convolution of 3x3, 5x5, 7x7, then BatchNorm and ReLU6; 7 and 9 on 0->1 of found networks only

``mix`` says how node 2 and node 3 put their two inputs together: 0 their sum, 1 the larger of the two, entry by entry
(our choice). Where there is one input it says nothing. ``dim_conv`` (d) is, by its name, the node at which the width
changes; what it does is not public. It is read, written and compared, and changes nothing here: ``canonical`` gives the
one cell of all those that compute the same. A stride lies on the edges that leave node 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

NONE, IDENTITY, POOL, CONV3, CONV5, CONV7 = 1, 2, 3, 5, 7, 9
#: side of the depthwise convolutions, by id
KERNELS = {CONV3: 3, CONV5: 5, CONV7: 7}
EDGES = ("01", "02", "12", "13", "23")
CHAIN = (IDENTITY, POOL, CONV3)
#: what may stand on each edge in a learned space
ALLOWED: dict[str, tuple[int, ...]] = {
    "01": CHAIN,
    "02": (NONE, *CHAIN),
    "12": CHAIN,
    "13": (NONE, *CHAIN),
    "23": CHAIN,
}
#: in a network; the larger kernels are chosen after the space
IN_NETWORK = {**ALLOWED, "01": (*CHAIN, CONV5, CONV7)}


class Cell(NamedTuple):
    """A cell; equal and hashed as the plain tuple that it is.

    Args:
        ops: ids on the edges 0->1, 0->2, 1->2, 1->3, 2->3.
        mix: how node 2 and node 3 put their inputs together.
        dim_conv: 0, 1 or 2; opaque.
    """

    ops: tuple[int, int, int, int, int]
    mix: tuple[int, int] = (0, 0)
    dim_conv: int = 2


#: chains of three, two and one depthwise convolutions; the last is the inverted residual of MobileNetV2
REFERENCES = (
    Cell((CONV3, NONE, CONV3, NONE, CONV3)),
    Cell((CONV3, NONE, CONV3, NONE, IDENTITY)),
    Cell((CONV3, NONE, IDENTITY, NONE, IDENTITY)),
)
INVERTED_RESIDUAL = REFERENCES[2]


def check(cell: Any, allowed: dict[str, tuple[int, ...]] = ALLOWED) -> None:
    """Raises ValueError, naming the edge or entry, where ``cell`` is none.

    Idle bits of ``mix`` may be 1: some cells of the published space have such.
    """
    try:
        ops, mix, dim_conv = cell
        edges = dict(zip(EDGES, ops, strict=True))
        m2, m3 = mix
    except (TypeError, ValueError):
        raise ValueError(f"expected (5 operations, 2 mix bits, dim_conv), got {cell!r}") from None
    for edge, op in edges.items():
        if op not in allowed[edge]:
            what = "no edge" if op == NONE else f"operation {op!r}"
            raise ValueError(f"edge {edge[0]}->{edge[1]} is {what}; expected one of {_listed(allowed[edge])}")
    for node, bit in ((2, m2), (3, m3)):
        if bit not in (0, 1):
            raise ValueError(f"mix of node {node} is {bit!r}; expected 0 or 1")
    if dim_conv not in (0, 1, 2):
        raise ValueError(f"dim_conv is {dim_conv!r}; expected 0, 1 or 2")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def from_graph(graph: Any, allowed: dict[str, tuple[int, ...]] = ALLOWED) -> Cell:
    """The cell of a 4 x 4 list as the published files have it. ValueError where it is none."""
    wrong = ValueError(
        "expected [[0, 0, 0, d], [o01, 0, 0, [m2, m3]], [o02, o12, 0, 0], [o03, o13, o23, 0]], got " + repr(graph)[:120]
    )
    try:
        (*z0, d), (o01, *z1, mix), (o02, o12, *z2), (o03, o13, o23, *z3) = graph
        m2, m3 = mix
    except (TypeError, ValueError):
        raise wrong from None
    if (z0, z1, z2, z3) != ([0] * 3, [0] * 2, [0] * 2, [0]):
        raise wrong
    if o03 != NONE:
        raise ValueError(f"edge 0->3 is operation {o03!r}; expected 1: there is none, the shortcut lies outside")
    cell = Cell((o01, o02, o12, o13, o23), (m2, m3), d)
    check(cell, allowed)
    return cell


def graph(cell: Cell) -> list[list[Any]]:
    o01, o02, o12, o13, o23 = cell.ops
    return [[0, 0, 0, cell.dim_conv], [o01, 0, 0, list(cell.mix)], [o02, o12, 0, 0], [NONE, o13, o23, 0]]


def encodings() -> Iterator[Cell]:
    """All that can be written: 3^3 * 4^2 operations, 4 mixes, 3 places of ``dim_conv``; 5184."""
    for ops in itertools.product(*(ALLOWED[edge] for edge in EDGES)):
        for mix in itertools.product((0, 1), repeat=2):
            for dim_conv in range(3):
                yield Cell(ops, mix, dim_conv)  # type: ignore[arg-type]


def canonical(cell: Cell) -> Cell:
    """The one among the cells that compute the same: idle bits of ``mix`` 0, ``dim_conv`` as in the references."""
    _, o02, _, o13, _ = cell.ops
    return Cell(cell.ops, (cell.mix[0] if o02 != NONE else 0, cell.mix[1] if o13 != NONE else 0))


def distance(a: Cell, b: Cell) -> int:
    """In how many operations and working mix bits two cells differ."""
    a, b = canonical(a), canonical(b)
    return sum(x != y for x, y in zip((*a.ops, *a.mix), (*b.ops, *b.mix), strict=True))


class CellSpace:
    """Canonical cells, as the engine asks for them (``distillkit.search.Space``)."""

    def random(self, rng: Random) -> Cell:
        ops = tuple(rng.choice(ALLOWED[edge]) for edge in EDGES)
        return canonical(Cell(ops, (rng.randrange(2), rng.randrange(2))))  # type: ignore[arg-type]

    def mutate(self, cell: Cell, rng: Random) -> Cell:
        """Another operation on one edge, or the other mix at one node that has two inputs; each as likely.

        The paper's local mutation may also move ``dim_conv``, which would make the same cell again here. An edge that
        vanishes takes its node's mix bit along.
        """
        bits = [node for node, op in enumerate((cell.ops[1], cell.ops[3])) if op != NONE]
        place = rng.randrange(len(EDGES) + len(bits))
        ops, mix = list(cell.ops), list(cell.mix)
        if place < len(EDGES):
            ops[place] = rng.choice([op for op in ALLOWED[EDGES[place]] if op != ops[place]])
        else:
            mix[bits[place - len(EDGES)]] ^= 1
        return canonical(Cell(tuple(ops), tuple(mix)))  # type: ignore[arg-type]

    def crossover(self, a: Cell, b: Cell, rng: Random) -> Cell:
        """Each entry from one of the two."""
        ops = tuple(rng.choice(pair) for pair in zip(a.ops, b.ops, strict=True))
        mix = tuple(rng.choice(pair) for pair in zip(a.mix, b.mix, strict=True))
        return canonical(Cell(ops, mix))  # type: ignore[arg-type]

    def check(self, cell: Cell) -> None:
        check(cell)


# -- what a block costs -----------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a block must do: channels in and out, stride; and how wide it is inside, in its input's channels."""

    inside: int
    out: int
    stride: int
    expand: int

    @property
    def wide(self) -> int:
        return self.inside * self.expand


def block_costs(cell: Cell, shape: Shape, side: int) -> tuple[int, int, int]:
    """(parameters, multiply-adds, side of the output) of a block on a square map of ``side``; norms are counted among
    the parameters and not among the multiply-adds."""
    wide, after = shape.wide, -(-side // shape.stride)
    parameters, madds = 0, 0
    if shape.expand > 1:
        parameters, madds = shape.inside * wide + 2 * wide, shape.inside * wide * side**2
    for op in cell.ops:
        if op in KERNELS:  # those that leave node 0 have the stride: all see maps of the output's size
            parameters += wide * (KERNELS[op] ** 2 + 2)
            madds += wide * KERNELS[op] ** 2 * after**2
    return parameters + wide * shape.out + 2 * shape.out, madds + wide * shape.out * after**2, after
