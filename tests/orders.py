"""A small search: orders of layers, as text. Imports no torch, so that processes which are killed begin quickly."""

from distillkit.search import Budget, Evolution

SMALL = Evolution(population=12, generations=6, tournament=3, seed=3)


class Orders:
    """Orders of layers, as text: 12 of three types."""

    def random(self, rng):
        return "".join(rng.choice("abc") for _ in range(12))

    def mutate(self, genome, rng):
        i = rng.randrange(12)
        return genome[:i] + rng.choice("abc") + genome[i + 1 :]

    def crossover(self, a, b, rng):
        i = rng.randrange(1, 12)
        return a[:i] + b[i:]

    def check(self, genome):
        if len(genome) != 12 or set(genome) - set("abc"):
            raise ValueError("expected 12 of a, b and c")


def fitness(genome):
    """Best is "abcabc...": each position that is right, and a little for its number of a's."""
    right = sum(x == "abc"[i % 3] for i, x in enumerate(genome))
    return {"fitness": right + 0.01 * genome.count("a"), "right": right}


def of_a(genome):
    return genome.count("a")


FEW = Budget("a", of_a, most=4)
