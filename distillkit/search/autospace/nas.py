"""A network from a learned space: the supernet is trained, evolution under a cap of multiply-adds finds the fittest.

The paper used a search like ProxylessNAS's in this step, of which nothing was released; ours is a single-path supernet
trained by the sandwich rule (``supernet``), and the engine's evolution with inherited weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distillkit
from distillkit.core.adapter import AS_LOADED
from distillkit.core.teacher import Renormalise
from distillkit.data.classes import collate
from distillkit.search.autospace.networks import NetworkSpace
from distillkit.search.autospace.space import NORMALISATION
from distillkit.search.autospace.supernet import Inherited, InPlaceKD, Sandwich, Supernet
from distillkit.search.engine import Budget, Evolution, Found, evolve
from distillkit.search.evaluators import Evaluator, InProcess, OverProcesses, OverRay
from distillkit.search.plots import plot_fitness, plot_front
from distillkit.training import checkpoint
from distillkit.training.loop import Job, fit
from distillkit.training.processes import processes
from distillkit.training.progress import Progress

if TYPE_CHECKING:
    from distillkit.schema import NetworkSearch

MADDS = "multiply-adds"
#: pictures that a candidate is judged on at a time; the statistics of its BatchNorm are of so many
JUDGED = 256


def train_supernet(
    space: NetworkSpace,
    how: NetworkSearch,
    data: Any,
    judged: list[tuple[Tensor, Tensor]],
    folder: Path,
    console: Console,
    *,
    seed: int,
    batch: int,
    workers: int,
    resume: str,
) -> Supernet:
    """The supernet, trained on ``data``; goes on from the folder's last.pt, and is read from it once it is done.

    Args:
        judged: what ``judged_batches`` made, for the scores that are shown.
    """
    checkpoint.seed_everything(seed)
    supernet = Supernet(space)
    sandwich = Sandwich(supernet, how.drawn, seed)
    if not (folder / "result.json").exists():
        model = distillkit.wrap(sandwich, None, [InPlaceKD(len(sandwich.paths))], criterion=cross_entropy)

        def evaluate(student: nn.Module) -> dict[str, Any]:
            fitness = Inherited(supernet, judged)
            scores = {name: fitness(getattr(student, name))["fitness"] for name in ("largest", "smallest")}
            return {"top1": scores["largest"], **scores}

        normalise = Renormalise(AS_LOADED, NORMALISATION)
        job = Job(
            name="supernet",
            folder=folder,
            model=model,
            data=data,
            evaluate=evaluate,
            train=how.train,
            seed=seed,
            batch=batch,
            workers=workers,
            score="top1",
            resume=resume,
            collate=collate,
            prepare=lambda pictures, targets: (normalise(pictures), targets["labels"]),
            drop_last=True,
        )
        fit(job, console)
        model.unwrap()
    checkpoint.load_into(sandwich, folder / "final.safetensors")
    return supernet.to(processes().device)


def judged_batches(data: Any) -> list[tuple[Tensor, Tensor]]:
    """All pictures of an evaluation set, normalised, with their labels."""
    normalise, batches = Renormalise(AS_LOADED, NORMALISATION), []
    for start in range(0, len(data), JUDGED):
        images, targets = collate([data[0, i] for i in range(start, min(start + JUDGED, len(data)))])
        batches.append((normalise(images), targets["labels"]))
    return batches


def find_network(
    space: NetworkSpace,
    how: NetworkSearch,
    supernet: Supernet,
    judged: list[tuple[Tensor, Tensor]],
    log: Path,
    console: Console | None,
    seed: int,
) -> Found:
    """The fittest genome of at most ``how.madds`` multiply-adds; the smallest network is where evolution starts.

    Raises:
        SearchError: the smallest network has more.
    """
    evolution = Evolution(how.population, how.generations, how.tournament, how.crossover, seed)
    budget = Budget(MADDS, space.madds, most=how.madds)
    most = how.population * (how.generations + 1)
    with Progress("networks", most, 0, how.generations + 1, console, "generation") as bar:
        found = evolve(
            space,
            Inherited(supernet, judged),
            evolution,
            [budget],
            start=[space.smallest()],
            log=log,
            evaluator=evaluator_of(how),
            progress=lambda done, total, generation, best: bar.show(done, generation, {"best": best}),
        )
    if processes().is_main_process:
        plot_fitness(found, log.with_name("fitness.png"))
        plot_front(found, MADDS, log.with_name("front.png"))
    return found


def evaluator_of(how: NetworkSearch) -> Evaluator:
    if how.evaluator == "ray":
        return OverRay(how.workers, gpus=1.0 if torch.cuda.is_available() else 0.0)
    return OverProcesses() if how.evaluator == "accelerate" else InProcess()
