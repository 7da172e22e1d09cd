"""Search: evolution of genomes under budgets (``engine``), and AutoSpace, which evolves the space (``autospace``).

found = evolve(space, fitness, Evolution(population=32), [Budget("multiply-adds", madds, most=300e6)], log="s.jsonl")
found.best.genome
"""

from distillkit.search.engine import Budget, Candidate, Evolution, Found, SearchError, Space, evolve
from distillkit.search.evaluators import Evaluator, InProcess, OverProcesses, OverRay

__all__ = [
    "Budget",
    "Candidate",
    "Evaluator",
    "Evolution",
    "Found",
    "InProcess",
    "OverProcesses",
    "OverRay",
    "SearchError",
    "Space",
    "evolve",
]
