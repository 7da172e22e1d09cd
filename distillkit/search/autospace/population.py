"""The cells of one layer with their scores: tournament, local mutation, and what is left in the end. No torch.

Our choices where the paper is silent (arXiv:2103.11833; the caption of its figure has K = 4 and a random beginning,
which the reference graph changes): 64 cells a layer, the references and random local mutations of them; tournaments
of 8; half of the drawn cells mutated; a child starts from its parent's score. No two cells of a layer compute the
same, and the K that run side by side differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from distillkit.models.autospace_cells import REFERENCES, Cell, CellSpace, canonical
from distillkit.search.engine import TRIES, tournament


@dataclass
class Member:
    cell: Cell
    score: float = 0.0


class Population:
    """Members of one layer.

    Args:
        cost: of a cell, in multiply-adds of the inverted residual at its place.
        cost_weight: what the cost counts for in ``rank``, the budget term.
        most: cells that cost more are never made.
    """

    def __init__(
        self, members: list[Member], cost: Callable[[Cell], float], cost_weight: float = 0.0, most: float = float("inf")
    ):
        self.members, self.cost, self.cost_weight, self.most = members, cost, cost_weight, most
        self.space = CellSpace()

    @classmethod
    def begin(
        cls, size: int, rng: random.Random, cost: Callable[[Cell], float], cost_weight: float, most: float
    ) -> Population:
        """The reference cells, then mutations of members drawn at random, so that distances to the references grow."""
        allowed = [Member(cell) for cell in REFERENCES if cost(cell) <= most]
        population = cls(allowed[:size], cost, cost_weight, most)
        while len(population.members) < size:
            parent = rng.choice(population.members)
            child = population._child(parent, rng)
            if child is None:
                break
            population.members.append(child)
        return population

    def rank(self, member: Member) -> float:
        """score - cost_weight * cost: what tournaments and the last sorting go by."""
        return member.score - (self.cost_weight * self.cost(member.cell) if self.cost_weight else 0.0)

    def draw(self, k: int, size: int, mutate: float, rng: random.Random) -> list[Member]:
        """K members to run side by side; each won a tournament, and is with probability ``mutate`` replaced by a child
        of it. Children join the population, and as many of the worst that are not drawn leave."""
        active: list[Member] = []
        for _ in range(k):
            left = [member for member in self.members if not any(member is one for one in active)]
            winner = tournament(left, size, rng, self.rank)
            if rng.random() < mutate and (child := self._child(winner, rng)):
                self._replace_worst(child, [*active, winner])
                winner = child
            active.append(winner)
        return active

    def learned(self, count: int) -> list[Cell]:
        """The ``count`` best, without the references, and then these, as the published space has them."""
        best = sorted(self.members, key=lambda member: -self.rank(member))
        return [*[m.cell for m in best if m.cell not in REFERENCES][:count], *REFERENCES]

    def _child(self, parent: Member, rng: random.Random) -> Member | None:
        there = {member.cell for member in self.members}
        for _ in range(TRIES):
            cell = canonical(self.space.mutate(parent.cell, rng))
            if cell not in there and self.cost(cell) <= self.most:
                return Member(cell, parent.score)
        return None

    def _replace_worst(self, child: Member, kept: list[Member]) -> None:
        leaving = [member for member in self.members if not any(member is one for one in kept)]
        if leaving:
            worst = min(leaving, key=self.rank)
            self.members = [member for member in self.members if member is not worst]
        self.members.append(child)
