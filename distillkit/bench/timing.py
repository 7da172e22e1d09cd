"""How steps and forms are timed: in turns, in one process, in its CPU time.

Whatever else the machine does falls on all alike. The reference of a table runs twice; what separates the two is what
the machine cannot tell apart.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Mapping
from statistics import median

from torch import Tensor

from distillkit.bench.suite import Check, Tell, silent

Step = Callable[[], object]


def race(
    forms: dict[str, Callable[[], Tensor]], rounds: int, seldom: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What each form gives, and its median of process CPU seconds. All take turns, seldom ones every sixth time."""
    results = {name: form() for name, form in forms.items()}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds):
        for name in list(forms) if i % 2 else list(reversed(forms)):
            if name in seldom and i % 6:
                continue
            start = time.process_time()
            forms[name]()
            seconds[name].append(time.process_time() - start)
    return results, {name: median(took) for name, took in seconds.items()}


def interleaved(
    steps: Mapping[str, Step], rounds: int, times: int = 1, tell: Tell = silent, what: str = ""
) -> dict[str, list[float]]:
    """CPU seconds of every step, by name, one number a round; one unmeasured round first. ``times``: a step is so short
    that it is called so often in a turn.

    In a round the contenders take turns in an order shuffled anew, and then in that order backwards: what drifts, such
    as the processor's clock, weighs on all of them alike. A number is the mean of the two turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(0)
    for turn in range(rounds + 1):
        order = orders.sample(list(steps), len(steps))
        took = dict.fromkeys(steps, 0.0)
        for name in order + order[::-1]:
            gc.disable()
            begin = time.process_time()
            for _ in range(times):
                steps[name]()
            took[name] += (time.process_time() - begin) / 2 / times
            gc.enable()
        if turn:
            for name, value in took.items():
                seconds[name].append(value)
        tell(what, turn + 1, rounds + 1)
    return seconds


def quartiles(values: list[float]) -> tuple[float, float]:
    """Where the middle half of the values begins and ends."""
    ranked = sorted(values)
    return ranked[len(ranked) // 4], ranked[-1 - len(ranked) // 4]


def spread(again: list[float], same: float) -> float:
    """How far the middle half of what the reference says of itself reaches from ``same``: what cannot be told apart."""
    return max(abs(end - same) for end in quartiles(again))


def within(name: str, values: list[float], budget: float, again: list[float], same: float, unit: str) -> Check:
    """The median of what was timed, against a budget and 3 spreads of the reference against itself.

    Args:
        values, again: one number a round, of what is judged and of the reference run again.
        same: what ``again`` would be on a machine that nothing disturbs: 1 of a ratio, 0 of a difference.
        unit: format of a number, as in "{:.2f} us".
    """
    found, noise = median(values), spread(again, same)
    said = f"{unit.format(found)}; at most {unit.format(budget)} and 3 x {unit.format(noise)} of noise"
    return Check(name, found <= budget + 3 * noise, said)
