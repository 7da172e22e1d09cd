"""Evolution of whatever can be written down: cells of a network, orders of layers, choices of widths.

A **genome** is a hashable plain value: text, numbers, or tuples of genomes. A ``Space`` draws, changes and crosses
them; ``fitness(genome)`` says how good one is; ``Budget`` says what it costs. ``evolve`` keeps the ``population`` best
of all that were evaluated:

    first generation: what is given as ``start``, then random genomes
    each further one: ``population`` children; a parent is the fittest of ``tournament`` members drawn at random; a
                      child comes from two parents by crossover, or from one by mutation
    what stays:       the ``population`` fittest of members and children, the earlier one where two are equal

No genome is evaluated twice, and none that is outside of a budget is evaluated at all. Children are made before any of
them is evaluated, so what comes out does not depend on how many workers evaluate them (``search.evaluators``).

The log is a file of JSON lines. A search that was killed anywhere and is started again runs its own steps anew, takes
what the log knows (fitness and costs, measured ones too) from there, and goes on where the log ends: the same best
candidate and the same file, byte for byte, as if it had not been killed. No torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from distillkit.search.evaluators import Evaluator, InProcess
from distillkit.search.log import Log, SearchError, as_genome

__all__ = ["Budget", "Candidate", "Evolution", "Found", "SearchError", "Space", "evolve", "tournament"]

#: how often a space is asked for one more genome that is new and within the budgets, before it counts as exhausted
TRIES = 200

Genome = Hashable
#: fitness alone, or under the key "fitness" together with other numbers, which go into the log
Fitness = Callable[[Any], "float | Mapping[str, float]"]
#: called as (evaluated, to be evaluated at most, generation, best fitness)
Progress = Callable[[int, int, int, float], None]


class Space(Protocol):
    """What genomes there are. Every function draws from ``rng`` alone."""

    def random(self, rng: Random) -> Any: ...
    def mutate(self, genome: Any, rng: Random) -> Any: ...
    def crossover(self, a: Any, b: Any, rng: Random) -> Any: ...
    def check(self, genome: Any) -> None:
        """Raises ValueError, saying why, for what is no genome of this space."""


@dataclass(frozen=True)
class Budget:
    """A cost that every candidate must keep to: ``least <= cost(genome) <= most``.

    Args:
        name: of the cost, as in "parameters"; two budgets have two names.
        cost: of a genome; called once for each, however often it is proposed.
        most, least: the limits; without them the cost is only written down, as for a Pareto front.
    """

    name: str
    cost: Callable[[Any], float]
    most: float = math.inf
    least: float = -math.inf

    def allows(self, cost: float) -> bool:
        return self.least <= cost <= self.most


@dataclass(frozen=True)
class Evolution:
    """How a search is done.

    Args:
        population: members, and children a generation.
        generations: after the first one.
        tournament: members drawn for each parent; 1: any, ``population``: nearly always the fittest.
        crossover: share of children that come from two parents.
        seed: what is drawn is a function of it alone.
    """

    population: int = 50
    generations: int = 20
    tournament: int = 8
    crossover: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 1 or self.generations < 0 or self.tournament < 1:
            raise SearchError(
                "population and tournament must be at least 1 and generations at least 0, got "
                f"{self.population}, {self.tournament} and {self.generations}"
            )
        if not 0 <= self.crossover <= 1:
            raise SearchError(f"crossover must be a share between 0 and 1, got {self.crossover}")


@dataclass(frozen=True)
class Candidate:
    """One evaluated genome.

    Args:
        index: how many were evaluated before it.
        generation: in which, the first is 0.
        origin: ``start``, ``random``, ``mutation`` or ``crossover``.
        parents: their indices.
        scores: what ``fitness`` gave beside the fitness.
    """

    index: int
    generation: int
    genome: Any
    fitness: float
    costs: dict[str, float] = field(default_factory=dict)
    origin: str = "random"
    parents: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        candidates: all that were evaluated, in that order.
        population: the fittest of them, fittest first.
        generations: one a generation: best and mean fitness of its population, evaluated so far.
    """

    candidates: list[Candidate]
    population: list[Candidate]
    generations: list[dict[str, Any]]

    @property
    def best(self) -> Candidate:
        return self.population[0]

    def front(self, cost: str) -> list[Candidate]:
        """The candidates that none beats: whatever costs less, or as much, is less fit. Cheapest first."""
        front: list[Candidate] = []
        for one in sorted(self.candidates, key=lambda c: (c.costs[cost], -c.fitness, c.index)):
            if not front or one.fitness > front[-1].fitness:
                front.append(one)
        return front


def tournament(
    members: Sequence[Any], size: int, rng: Random, key: Callable[[Any], float] = lambda member: member.fitness
) -> Any:
    """The best, by ``key``, of ``size`` members drawn with replacement; the first drawn of equals."""
    return max((members[rng.randrange(len(members))] for _ in range(size)), key=key)


def evolve(
    space: Space,
    fitness: Fitness,
    how: Evolution | None = None,
    budgets: Sequence[Budget] = (),
    start: Sequence[Any] = (),
    log: str | Path | None = None,
    evaluator: Evaluator | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search ``space`` for the fittest genome within the budgets.

    Args:
        fitness: higher is better; a function of the genome alone. With several workers it must be picklable.
        start: genomes to begin with; the rest of the first generation is random.
        log: JSON lines of the search; one that is there already is gone on with. None: none is kept.
        evaluator: where fitness is computed: in this process unless given, see ``search.evaluators``.

    Returns:
        All candidates and the last population; fewer than asked for where the space has no more.

    Raises:
        SearchError: no genome is within the budgets; the log is of another search; a fitness is not a finite number;
            the space makes genomes that it refuses itself.
    """
    evaluator = evaluator or InProcess()
    if not evaluator.leads:
        return evaluator.follow(fitness)
    try:
        found = _Search(space, fitness, how or Evolution(), budgets, start, log, evaluator, progress).run()
    except BaseException as error:
        evaluator.tell(error)
        raise
    evaluator.tell(found)
    return found


@dataclass(frozen=True)
class _Proposal:
    genome: Any
    origin: str
    parents: tuple[int, ...] = ()


class _Search:
    """The state of one search. All that it does is a function of its arguments and of what fitness and costs say."""

    def __init__(
        self,
        space: Space,
        fitness: Fitness,
        how: Evolution,
        budgets: Sequence[Budget],
        start: Sequence[Any],
        log: str | Path | None,
        evaluator: Evaluator,
        progress: Progress | None,
    ):
        names = [budget.name for budget in budgets]
        if len(set(names)) < len(names):
            raise SearchError(f"budgets: expected names that differ, got {', '.join(names)}")
        self.space, self.fitness, self.how, self.budgets, self.start = space, fitness, how, budgets, list(start)
        self.evaluator, self.progress = evaluator, progress
        self.rng = Random(how.seed)
        self.log = Log(Path(log) if log else None)
        self.costs: dict[Any, dict[str, float]] = {}
        self.known: dict[Any, dict[str, float]] = {}  # fitness and other scores, from the log
        for record in self.log.records:
            if record["kind"] == "costs":
                self.costs[as_genome(record["genome"])] = record["costs"]
            if record["kind"] == "candidate":
                self.known[as_genome(record["genome"])] = {"fitness": record["fitness"], **record["scores"]}
        self.candidates: list[Candidate] = []
        self.seen: set[Any] = set()
        self.refused: dict[Any, dict[str, float]] = {}

    def run(self) -> Found:
        how = self.how
        said = {key: value for key, value in asdict(how).items() if key != "generations"}  # more may be asked for later
        limits = {b.name: [b.least, b.most] for b in self.budgets}
        self.log.write({"kind": "search", **said, "budgets": limits, "start": self.start})
        population = self._evaluated(self._first(), 0)
        if not population:
            raise SearchError(self._nothing())
        generations = [self._summary(0, population)]
        for generation in range(1, how.generations + 1):
            children = self._evaluated(self._children(population), generation)
            if not children:
                break
            population = sorted([*population, *children], key=lambda c: (-c.fitness, c.index))[: how.population]
            generations.append(self._summary(generation, population))
        self.log.close()
        return Found(self.candidates, sorted(population, key=lambda c: (-c.fitness, c.index)), generations)

    # ---- proposals

    def _first(self) -> list[_Proposal]:
        for genome in self.start:
            self._check(genome, "start")
            if not self._is_new(genome):
                costs = self.refused.get(genome)
                why = f"is outside of the budgets: {self._limits(costs)}" if costs else "is given twice"
                raise SearchError(f"start: {genome!r} {why}")
            self.seen.add(genome)
        first = [_Proposal(genome, "start") for genome in self.start]
        while len(first) < self.how.population and (proposal := self._random()):
            first.append(proposal)
        return first

    def _children(self, population: Sequence[Candidate]) -> list[_Proposal]:
        children: list[_Proposal] = []
        while len(children) < self.how.population and (child := self._child(population) or self._random()):
            children.append(child)
        return children

    def _random(self) -> _Proposal | None:
        return self._new(lambda: _Proposal(self.space.random(self.rng), "random"))

    def _child(self, population: Sequence[Candidate]) -> _Proposal | None:
        def make() -> _Proposal:
            a = tournament(population, self.how.tournament, self.rng)
            if self.rng.random() < self.how.crossover:
                b = tournament(population, self.how.tournament, self.rng)
                return _Proposal(self.space.crossover(a.genome, b.genome, self.rng), "crossover", (a.index, b.index))
            return _Proposal(self.space.mutate(a.genome, self.rng), "mutation", (a.index,))

        return self._new(make)

    def _new(self, make: Callable[[], _Proposal]) -> _Proposal | None:
        """The first of ``TRIES`` proposals that is new and within the budgets."""
        for _ in range(TRIES):
            proposal = make()
            if proposal.genome not in self.seen and proposal.genome not in self.refused:
                self._check(proposal.genome, proposal.origin)
                if self._is_new(proposal.genome):
                    self.seen.add(proposal.genome)
                    return proposal
        return None

    def _is_new(self, genome: Any) -> bool:
        if genome in self.seen or genome in self.refused:
            return False
        if genome not in self.costs:
            self.costs[genome] = {budget.name: float(budget.cost(genome)) for budget in self.budgets}
        costs = self.costs[genome]
        within = all(budget.allows(costs[budget.name]) for budget in self.budgets)
        if costs:  # before anything is evaluated: measured ones must not be measured again
            self.log.write({"kind": "costs", "genome": genome, "costs": costs, "within": within})
        if not within:
            self.refused[genome] = costs
        return within

    def _check(self, genome: Any, origin: str) -> None:
        try:
            self.space.check(genome)
        except ValueError as error:
            raise SearchError(f"{origin}: {genome!r} is no genome of {type(self.space).__name__}: {error}") from error

    # ---- evaluation

    def _evaluated(self, proposals: Sequence[_Proposal], generation: int) -> list[Candidate]:
        done: list[Candidate] = []
        most = self.how.population * (self.how.generations + 1)
        for proposal, scores in zip(proposals, self._scores(proposals), strict=True):
            scores = dict(scores)
            fitness = scores.pop("fitness")
            one = Candidate(
                index=len(self.candidates),
                generation=generation,
                genome=proposal.genome,
                fitness=fitness,
                costs=self.costs[proposal.genome],
                origin=proposal.origin,
                parents=proposal.parents,
                scores=scores,
            )
            self.log.write({"kind": "candidate", **{key: getattr(one, key) for key in one.__dataclass_fields__}})
            self.candidates.append(one)
            done.append(one)
            if self.progress:
                self.progress(len(self.candidates), most, generation, max(c.fitness for c in done))
        return done

    def _scores(self, proposals: Sequence[_Proposal]) -> Iterator[Mapping[str, float]]:
        """What the log knows, then what the evaluator says, in the order of the proposals."""
        genomes = [proposal.genome for proposal in proposals]
        unknown = self.evaluator(self.fitness, [genome for genome in genomes if genome not in self.known])
        for genome in genomes:
            yield self.known[genome] if genome in self.known else _finite(genome, next(unknown))

    def _summary(self, generation: int, population: Sequence[Candidate]) -> dict[str, Any]:
        best = max(population, key=lambda c: (c.fitness, -c.index))
        record = {
            "kind": "generation",
            "generation": generation,
            "best": best.index,
            "fitness": best.fitness,
            "mean": math.fsum(c.fitness for c in population) / len(population),
            "evaluated": len(self.candidates),
            "refused": len(self.refused),
            "population": sorted(c.index for c in population),
        }
        self.log.write(record)
        self.log.sync()
        return record

    # ---- messages

    def _limits(self, costs: Mapping[str, float]) -> str:
        wrong = [b for b in self.budgets if not b.allows(costs[b.name])]
        return "; ".join(
            f"{b.name} {costs[b.name]:g}, expected "
            + (f"at most {b.most:g}" if costs[b.name] > b.most else f"at least {b.least:g}")
            for b in wrong
        )

    def _nothing(self) -> str:
        if not self.refused:
            return f"{type(self.space).__name__}.random gave no genome"
        nearest = min(
            self.refused.values(), key=lambda costs: sum(self._excess(b, costs[b.name]) for b in self.budgets)
        )
        return (
            f"none of {len(self.refused)} random genomes is within the budgets; the nearest has "
            f"{self._limits(nearest)}. Widen the budget, or give genomes that keep to it as start"
        )

    @staticmethod
    def _excess(budget: Budget, cost: float) -> float:
        """By how much of itself a cost is outside."""
        return max(0.0, cost - budget.most, budget.least - cost) / (abs(cost) or 1.0)


def _finite(genome: Any, scores: float | Mapping[str, float]) -> dict[str, float]:
    """Of whatever ``fitness`` returned: plain numbers by name."""
    named = dict(scores) if isinstance(scores, Mapping) else {"fitness": scores}
    if "fitness" not in named:
        raise SearchError(f"fitness of {genome!r}: expected a number, or a mapping with 'fitness', got {sorted(named)}")
    try:
        plain = {name: float(value) for name, value in named.items()}
    except (TypeError, ValueError) as error:
        raise SearchError(f"fitness of {genome!r}: expected numbers, got {named!r}") from error
    wrong = [f"{name} is {value}" for name, value in plain.items() if not math.isfinite(value)]
    if wrong:
        raise SearchError(f"fitness of {genome!r}: {wrong[0]}; expected a finite number")
    return plain
