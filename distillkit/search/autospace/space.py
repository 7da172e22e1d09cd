"""Learning the space: rounds of drawing cells, training them side by side, and writing their scores back.

    every round, every layer: K members, drawn by tournaments and mutated (``population``)
    n steps:                  the weights learn from a batch of one part of the pictures, the scores from a batch of the
                              other, so that a cell which merely learns by heart gains nothing
    then:                     the population gets the scores
    in the end:               of each layer the best cells and the references

In the first rounds (``warmup``) only weights learn: scores of untrained weights say little. All of this is our choice
within what the paper's figure shows. After every round the state is on the disk; what a round does depends on the seed
and its number alone, so a search that was killed ends as if it had not been, with the same log (on the CPU with the
same number of threads).
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from distillkit.core.adapter import AS_LOADED
from distillkit.core.errors import NonFiniteLossError
from distillkit.core.teacher import Renormalise
from distillkit.data.classes import collate
from distillkit.data.sampler import epoch_batches
from distillkit.models.autospace_cells import INVERTED_RESIDUAL, Cell, block_costs
from distillkit.models.autospace_network import LearnedSpace, Macro
from distillkit.search.autospace.population import Member, Population
from distillkit.search.autospace.scoring import ScoringNet, layer_shapes, layer_sides, trained
from distillkit.search.log import SearchError, as_genome
from distillkit.training import checkpoint
from distillkit.training.optim import build_optimizer, learning_rate_factor
from distillkit.training.progress import Progress

if TYPE_CHECKING:
    from distillkit.schema import SpaceSearch

NORMALISATION = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@dataclass(frozen=True)
class Learning:
    """What is learned, on what, and where it is kept.

    Args:
        data: the training pictures, ``data[(epoch, index)]`` -> (image in 0..1, target).
        side: of the pictures, square, in pixels.
        how: the recipe's ``search.space``.
        folder: gets last.pt and space.jsonl.
    """

    macro: Macro
    data: Any
    classes: int
    side: int
    batch: int
    workers: int
    seed: int
    how: SpaceSearch
    folder: Path


def learn_space(learning: Learning, console: Console) -> LearnedSpace:
    """Learn to the end, from the last finished round where there is one.

    Raises:
        SearchError: fewer pictures than two batches. CheckpointError: last.pt cannot be read.
    """
    rounds, steps = learning.how.rounds, learning.how.steps
    state = _State(learning)
    with Progress("space", rounds * steps, state.round * steps, rounds, console, "round") as progress:
        if state.round:
            progress.say(f"goes on after round {state.round}")
        while state.round < rounds:
            state.run_round(progress)
            state.save()
    state.write_log()
    return [population.learned(learning.how.learned) for population in state.populations]


class _State:
    """All that a round reads and changes."""

    def __init__(self, learning: Learning):
        self.learning, how = learning, learning.how
        checkpoint.seed_everything(learning.seed)
        self.device = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        )
        self.net = ScoringNet(learning.macro, learning.classes, how.expand).to(self.device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # on CPUs half of the time
        self.optimizer = build_optimizer(self.net, how.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.normalise = Renormalise(AS_LOADED, NORMALISATION)
        self.parts = _parts(len(learning.data), learning.batch, learning.seed)
        self.round, self.lines = 0, [self._header()]
        rng = random.Random(f"{learning.seed}/begin")
        self.populations = [
            Population.begin(how.population, rng, cost, how.cost_weight, how.most_cost) for cost in self._costs()
        ]
        if (learning.folder / "last.pt").exists():
            self._restore()

    def run_round(self, progress: Progress) -> None:
        how = self.learning.how
        rng = random.Random(f"{self.learning.seed}/{self.round}")
        active = [p.draw(how.active, how.tournament, how.mutate, rng) for p in self.populations]
        cells = [[member.cell for member in members] for members in active]
        alphas = torch.tensor(
            [[m.score for m in members] for members in active], device=self.device, requires_grad=True
        )
        scores = torch.optim.Adam([alphas], lr=how.score_lr, betas=(0.5, 0.999))
        scoring = self.round >= how.warmup
        losses: dict[str, list[Tensor]] = {"loss": [], "held_out": []}
        for i, (learned, held_out) in enumerate(self._batches(scoring)):
            step = self.round * how.steps + i
            losses["loss"].append(self._weight_step(learned, cells, alphas, step))
            if held_out is not None:
                losses["held_out"].append(self._score_step(held_out, cells, alphas, scores))
            if (i + 1) % 10 == 0 or i + 1 == how.steps:
                progress.show(step + 1, self.round, {name: float(v[-1]) for name, v in losses.items() if v})
        mean = {name: float(torch.stack(v).mean()) for name, v in losses.items() if v}
        if any(value != value for value in mean.values()):
            raise NonFiniteLossError(f"round {self.round + 1}: the loss is not finite; lower search.space.optimizer.lr")
        for members, row in zip(active, alphas.tolist(), strict=True):
            for member, score in zip(members, row, strict=True):
                member.score = score
        self.lines.append(self._line(mean, active))
        self.round += 1

    def _weight_step(self, batch: Any, cells: Sequence[Sequence[Cell]], alphas: Tensor, step: int) -> Tensor:
        how = self.learning.how
        factor = learning_rate_factor(step, how.rounds * how.steps, how.rounds, how.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self._loss(batch, cells, alphas.detach())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), how.clip)
        self.optimizer.step()
        return loss.detach()

    def _score_step(self, batch: Any, cells: Any, alphas: Tensor, scores: torch.optim.Optimizer) -> Tensor:
        trained(self.net.parameters(), False)
        loss = self._loss(batch, cells, alphas)
        scores.zero_grad()
        loss.backward()
        scores.step()
        trained(self.net.parameters(), True)
        return loss.detach()

    def _loss(self, batch: tuple[Tensor, dict[str, Any]], cells: Sequence[Sequence[Cell]], alphas: Tensor) -> Tensor:
        pictures, targets = batch
        given = self.normalise(pictures.to(self.device)).contiguous(memory_format=torch.channels_last)
        logits = self.net(given, cells, alphas)
        return cross_entropy(logits, targets["labels"].to(self.device))

    def _batches(self, scoring: bool) -> Iterator[tuple[Any, Any]]:
        """Of this round: one to learn weights from and, where scores are learned, one for these."""
        steps, batch, seed = self.learning.how.steps, self.learning.batch, self.learning.seed
        streams = [_stream(part, batch, seed, self.round * steps, steps) for part in self.parts[: 1 + scoring]]
        keys = [key for together in zip(*streams, strict=True) for key in together]
        loader: DataLoader = DataLoader(
            self.learning.data,
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=self.learning.workers,
            collate_fn=collate,
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator(),
        )
        batches = iter(loader)
        for learned in batches:
            yield learned, next(batches) if scoring else None

    def _costs(self) -> list[Any]:
        """Of each layer: multiply-adds of a cell, in those of the inverted residual there."""
        macro, how = self.learning.macro, self.learning.how
        sides = layer_sides(macro, self.learning.side)

        def ratio(shape: Any, side: int) -> Any:
            whole = block_costs(INVERTED_RESIDUAL, shape, side)[1]
            return lambda cell: block_costs(cell, shape, side)[1] / whole

        return [ratio(shape, side) for shape, side in zip(layer_shapes(macro, how.expand), sides, strict=True)]

    # ---- what is kept

    def _header(self) -> dict[str, Any]:
        how = self.learning.how.model_dump(mode="json", exclude={"file"})
        return {"kind": "space", "seed": self.learning.seed, "layers": self.learning.macro.layers, **how}

    def _line(self, losses: dict[str, float], active: Sequence[Sequence[Member]]) -> dict[str, Any]:
        ranked = [max(p.members, key=p.rank) for p in self.populations]
        return {
            "kind": "round",
            "round": self.round,
            **losses,
            "active": [[m.cell for m in members] for members in active],
            "scores": [[m.score for m in members] for members in active],
            "best": [m.cell for m in ranked],
            "best_scores": [m.score for m in ranked],
        }

    def save(self) -> None:
        state = {
            "round": self.round,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "members": json.dumps([[(m.cell, m.score) for m in p.members] for p in self.populations]),
            "lines": json.dumps(self.lines),
        }
        checkpoint.save(self.learning.folder / "last.pt", state)
        self.write_log()

    def write_log(self) -> None:
        """The log is a function of the state: a kill between the two leaves nothing that differs."""
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        checkpoint.write_text(self.learning.folder / "space.jsonl", text)

    def _restore(self) -> None:
        path = self.learning.folder / "last.pt"
        state = checkpoint.load(path)
        lines, header = json.loads(state["lines"]), json.loads(json.dumps(self._header()))
        changed = [key for key in header if lines[0].get(key) != header[key] and key != "rounds"]
        if changed or state["round"] > self.learning.how.rounds:
            key = changed[0] if changed else "rounds"
            raise SearchError(
                f"{path}: was begun with another search.space.{key} ({lines[0].get(key)!r}, now {header[key]!r}); "
                "start over with --fresh, or give this search another name, as in name=second"
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.round, self.lines = state["round"], [header, *lines[1:]]
        for population, members in zip(self.populations, json.loads(state["members"]), strict=True):
            population.members = [Member(Cell(*as_genome(cell)), score) for cell, score in members]


def _parts(length: int, batch: int, seed: int) -> tuple[list[int], list[int]]:
    """Half of the pictures each, for weights and for scores."""
    order = list(range(length))
    random.Random(f"{seed}/parts").shuffle(order)
    if length // 2 < batch:
        raise SearchError(f"data: {length} training pictures are less than two batches of {batch}; lower data.batch")
    return order[: length // 2], order[length // 2 :]


def _stream(part: Sequence[int], batch: int, seed: int, first: int, steps: int) -> list[list[tuple[int, int]]]:
    """Batches ``first`` to ``first + steps`` of endless epochs over ``part``: keys (epoch, index)."""
    each = len(part) // batch
    epochs = {
        epoch: _keys(len(part), batch, seed, epoch) for epoch in range(first // each, (first + steps - 1) // each + 1)
    }
    return [
        [(epoch, part[index]) for epoch, index in epochs[step // each][step % each]]
        for step in range(first, first + steps)
    ]


def _keys(length: int, batch: int, seed: int, epoch: int) -> list[list[tuple[int, int]]]:
    batches: Any = epoch_batches(length, batch, seed, epoch, drop_last=True)  # torch's stubs know int keys only
    return list(batches)


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches the whole group of processes; that which trains stops the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
