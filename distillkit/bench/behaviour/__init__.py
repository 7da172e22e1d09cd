"""How distillkit and its peers behave when something goes wrong: a matrix of faults, each provoked by code that runs.

``rows`` has what is asked and how it is judged; ``provoke``, ``parallel`` and ``product`` have the faults, ``kit`` what
they are provoked with, ``process`` what keeps them apart; and every contender has a file of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec

from distillkit import __version__
from distillkit.bench.behaviour.process import probed
from distillkit.bench.behaviour.rows import BY_KEY, ROWS, Outcome
from distillkit.bench.peers import MMDET, MODELOPT, TIMM, TORCHDISTILL, ULTRALYTICS, Peer
from distillkit.bench.suite import Check, Result, Table, Tell, silent

OURS = "ours"
CONTENDERS: dict[str, Peer] = {
    "torchdistill": TORCHDISTILL,
    "modelopt": MODELOPT,
    "timm_task": TIMM,
    "mmdet_ld": MMDET,
    "ultralytics_kd": ULTRALYTICS,
}

Seen = dict[str, dict[str, Outcome]]  # by contender and row


def run(quick: bool, rounds: int, tell: Tell = silent) -> Result:
    """Nothing is timed, so that ``quick`` and ``rounds`` change nothing."""
    installed = [OURS, *(name for name, peer in CONTENDERS.items() if peer.version)]
    seen = observed(installed, list(BY_KEY), tell)
    return Result(
        "What happens when something goes wrong? Each row is a fault, provoked in distillkit and in every peer that is "
        "installed, on the same small models.",
        tables(seen),
        checks(seen),
        {contender: {key: asdict(o) for key, o in outcomes.items()} for contender, outcomes in seen.items()},
    )


def observed(contenders: list[str], keys: list[str], tell: Tell = silent) -> Seen:
    """Two contenders at a time."""
    seen: Seen = {contender: {} for contender in contenders}
    total = len(contenders) * len(keys)

    def ask(contender: str) -> None:
        def note(key: str, outcome: Outcome) -> None:
            seen[contender][key] = outcome
            tell(f"{label(contender)}: {key}", sum(map(len, seen.values())), total)

        probed(contender, keys, note)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, contenders))
    return seen


def label(contender: str) -> str:
    return f"distillkit {__version__}" if contender == OURS else CONTENDERS[contender].label


# ---- what is shown


def tables(seen: Seen) -> list[Table]:
    columns = [OURS, *CONTENDERS]
    head = ["", *map(label, columns)]
    absent = [f"{peer.name} ({peer.absent})" for name, peer in CONTENDERS.items() if name not in seen]
    note = (
        "yes: the fault is handled; **no**: it is not; -: there is nothing that it could be asked of. What was "
        "seen, and what makes a yes, stands below."
    )
    return [
        Table(
            "Faults, and who handles them",
            head,
            [[row.asks, *(verdict(seen, name, row.key) for name in columns)] for row in ROWS],
            note + (f" Not installed: {'; '.join(absent)}." if absent else ""),
        ),
        Table(
            "What was seen",
            head,
            [[row.asks, *(cell(seen, name, row.key) for name in columns)] for row in ROWS],
            "As the code of the suite observed it; of messages the part that is judged.",
            folded=True,
        ),
        Table(
            "What is asked, and what makes a yes",
            ["", "why", "yes, if"],
            [[row.asks, row.matters, row.judged] for row in ROWS],
            folded=True,
        ),
    ]


def verdict(seen: Seen, contender: str, key: str) -> str:
    if contender not in seen:
        return "absent"
    outcome = seen[contender][key]
    if outcome.broken:
        return "?"
    return "-" if outcome.ok is None else "yes" if outcome.ok else "**no**"


def cell(seen: Seen, contender: str, key: str) -> str:
    return seen[contender][key].saw if contender in seen else "absent"


# ---- what is held


def checks(seen: Seen) -> list[Check]:
    """distillkit handles every fault; every fault that peers are known for shows in one of them that is installed; and
    no probe is broken."""
    asked = [row for row in ROWS if not row.needs or find_spec(row.needs)]
    found = [
        Check(f"behaviour, distillkit: {row.asks}", seen[OURS][row.key].ok is True, seen[OURS][row.key].saw)
        for row in asked
    ]
    for row in asked:
        known = [name for name, peer in CONTENDERS.items() if name in seen and peer.name in row.fails]
        if known:
            failing = [name for name in known if seen[name][row.key].ok is False and not seen[name][row.key].broken]
            said = ", ".join(f"{label(name)}: {seen[name][row.key].saw}" for name in failing or known)
            found.append(Check(f"behaviour, the fault shows in a peer: {row.asks}", bool(failing), said))
    for contender, outcomes in seen.items():
        for key, outcome in outcomes.items():
            if outcome.broken:
                found.append(Check(f"behaviour, the probe {key} of {label(contender)} works", False, outcome.saw))
    return found
