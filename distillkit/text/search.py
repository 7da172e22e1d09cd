"""The search of LV-BERT: a supernet of all orders of layers is pretrained, evolution asks it which order is best.

    supernet = pretrain(Pretraining(config, corpus, held_out, training, supernet=True), "search/supernet")
    found = search_orders(supernet, judged_batches(...), Evolution(population=50), log="search/orders.jsonl")
    pretrain(Pretraining(with_order(config, found.best.genome), corpus, ...), "search/best")

No search code was published. What stands here of evolution is the engine's (``distillkit.search``); population and
generations are those of the usual single-path searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from distillkit.models.lvbert.config import LVBertConfig
from distillkit.models.lvbert.order import TYPES, check_order, encoder_parameters
from distillkit.search import Budget, Evolution, Found, evolve
from distillkit.text.electra import Electra, judge

Order = tuple[int, ...]


class OrderSpace:
    """Orders of ``layers`` layers, each of any type: tuples of 0, 1 and 2.

    Args:
        rate: chance of a position to be drawn anew in a mutation; one at least changes.
    """

    def __init__(self, layers: int = 24, rate: float = 0.1):
        check_order([0] * layers, "an order")
        self.layers, self.rate = layers, rate

    def random(self, rng: Random) -> Order:
        return tuple(rng.randrange(len(TYPES)) for _ in range(self.layers))

    def mutate(self, genome: Order, rng: Random) -> Order:
        sure = rng.randrange(self.layers)
        return tuple(
            rng.choice([other for other in TYPES if other != kind]) if i == sure or rng.random() < self.rate else kind
            for i, kind in enumerate(genome)
        )

    def crossover(self, a: Order, b: Order, rng: Random) -> Order:
        """At one point, or layer by layer, as often the one as the other."""
        if rng.random() < 0.5:
            cut = rng.randrange(1, self.layers)
            return (*a[:cut], *b[cut:])
        return tuple(rng.choice(pair) for pair in zip(a, b, strict=True))

    def check(self, genome: Any) -> None:
        check_order(genome, "an order")
        if len(genome) != self.layers:
            raise ValueError(f"an order has {len(genome)} layers, expected {self.layers}")


class InheritedAccuracy:
    """fitness(order): how right a pretrained supernet is on held-out text when a text goes through that order.

    "fitness" is the mean of the shares of masked tokens that the generator fills in rightly and of tokens of which the
    discriminator rightly says whether they were replaced; beside it stand both, and the losses. What is masked is the
    same for all orders. The supernet stays in eval mode.
    """

    def __init__(self, supernet: Electra, batches: Sequence[Tensor], seed: int = 0):
        if not supernet.supernet:
            raise ValueError("these networks have one order alone: pretrain with supernet=True")
        self.supernet, self.batches, self.seed = supernet.eval(), list(batches), seed

    def __call__(self, order: Order) -> dict[str, float]:
        self.supernet.choose(order)
        scores = judge(self.supernet, self.batches, self.seed)
        return {"fitness": scores.pop("accuracy"), **scores}


def parameter_budget(config: LVBertConfig, most: float, least: float = 0) -> Budget:
    """Encoders, embeddings included, of ``least`` to ``most`` parameters."""
    return Budget("parameters", Parameters(config), most=most, least=least)


class Parameters:
    """Of an encoder of some order, heads left out; by formula, no model is built."""

    def __init__(self, config: LVBertConfig):
        self.config = config

    def __call__(self, order: Order) -> int:
        return encoder_parameters(self.config, order)


def search_orders(
    supernet: Electra,
    batches: Sequence[Tensor],
    how: Evolution | None = None,
    most: float | None = None,
    least: float = 0,
    start: Sequence[Order] = (),
    log: str | Path | None = None,
    **options: Any,
) -> Found:
    """Evolve orders by inherited accuracy.

    Args:
        batches: held-out samples, see ``judged_batches``.
        how: of the evolution; 50 members, 20 generations unless given.
        most, least: parameters of the encoder; None: at most as many as BERT's order has, attention and feed-forward
            by turns.
        log, options: as in ``distillkit.search.evolve``, which also says what is raised: SearchError where no order is
            within the budget.
    """
    config: LVBertConfig = supernet.discriminator.config
    layers = len(config.layer_order)
    limit = encoder_parameters(config, (1, 2) * (layers // 2)) if most is None else most
    budgets = [parameter_budget(config, limit, least)]
    fitness = InheritedAccuracy(supernet, batches)
    return evolve(OrderSpace(layers), fitness, how, budgets, start=start, log=log, **options)


def with_order(config: LVBertConfig, order: Sequence[int]) -> LVBertConfig:
    """The same config with another order, and so maybe another number of layers."""
    return LVBertConfig(**{**config.to_dict(), "layer_order": list(order), "num_hidden_layers": None})
