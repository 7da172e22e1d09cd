"""Where candidates are evaluated: in this process, over the processes of Accelerate, or on a Ray cluster.

An evaluator is called as ``evaluator(fitness, genomes)`` and gives what ``fitness`` says of each, in their order and as
soon as it is known. The search itself runs in one process, the one that leads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distillkit.search.log import SearchError

Fitness = Callable[[Any], Any]


class Evaluator:
    """Base of the three."""

    #: whether this process runs the search; the others call ``follow``
    leads = True

    def __call__(self, fitness: Fitness, genomes: Sequence[Any]) -> Iterator[Any]:
        raise NotImplementedError

    def follow(self, fitness: Fitness) -> Any:
        """Evaluate what the leading process sends, until it is done; returns what it found."""
        raise NotImplementedError(f"{type(self).__name__} has no processes that follow")

    def tell(self, found: Any) -> None:
        """The leading process is done: what it found, or the error that it ended with, for those that follow."""


class InProcess(Evaluator):
    """One after the other, here."""

    def __call__(self, fitness: Fitness, genomes: Sequence[Any]) -> Iterator[Any]:
        return map(fitness, genomes)


class OverProcesses(Evaluator):
    """Over the processes that ``accelerate launch`` (or torchrun) started, one genome each at a time.

    All of them call ``evolve`` with the same fitness; process 0 leads, and all get what it found. Only numbers and
    genomes travel, so processes may share GPUs, or have one each.
    """

    def __init__(self) -> None:
        from accelerate.state import PartialState

        from distillkit.training.processes import processes

        self.state: PartialState = processes()
        self.leads = self.state.is_main_process

    def __call__(self, fitness: Fitness, genomes: Sequence[Any]) -> Iterator[Any]:
        world = self.state.num_processes
        for i in range(0, len(genomes), world):
            part = list(genomes[i : i + world])
            self._sent(("evaluate", part))
            yield from self._gathered(fitness, part)

    def follow(self, fitness: Fitness) -> Any:
        while True:
            what, value = self._sent(None)
            if what == "found":
                return value
            if what == "failed":
                raise SearchError(f"the search ended in its leading process: {value}")
            self._gathered(fitness, value)

    def tell(self, found: Any) -> None:
        failed = isinstance(found, BaseException)
        self._sent(("failed", f"{type(found).__name__}: {found}") if failed else ("found", found))

    def _sent(self, message: Any) -> Any:
        """What the leading process says, in all of them."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([message])[0]

    def _gathered(self, fitness: Fitness, part: Sequence[Any]) -> list[Any]:
        """The results of one round, or the first error, in all processes."""
        from accelerate.utils import gather_object

        rank = self.state.process_index
        mine: list[tuple[int, Any, str]] = []
        if rank < len(part):
            try:
                mine = [(rank, fitness(part[rank]), "")]
            except Exception as error:  # the others wait for this process: they must hear of it
                mine = [(rank, None, f"{type(error).__name__}: {error}")]
        results = sorted(gather_object(mine), key=lambda result: result[0])
        failed = [(part[place], error) for place, _, error in results if error]
        if failed and self.leads:
            raise SearchError(f"fitness of {failed[0][0]!r} failed: {failed[0][1]}")
        return [value for _, value, _ in results]


class OverRay(Evaluator):
    """On a Ray cluster, or on this machine where none is running.

    Args:
        workers: candidates evaluated at a time; None: one for each CPU of the cluster.
        cpus, gpus: of each worker; a share of a GPU lets several use it.
        address: of a running cluster; None: what ``ray.init`` finds, else a local one of ``workers`` CPUs.

    ``fitness`` goes to the cluster once a generation. Ray tries a candidate again whose node was lost; an error of
    ``fitness`` itself ends the search.

    Raises:
        SearchError: Ray is not installed.
    """

    def __init__(
        self, workers: int | None = None, cpus: float = 1.0, gpus: float = 0.0, address: str | None = None
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise SearchError('Ray is not installed: pip install "distillkit[ray]"') from error
        self.ray: Any = ray
        if not ray.is_initialized():
            found = address or os.environ.get("RAY_ADDRESS")
            local = {} if found else {"num_cpus": workers, "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, logging_level="error", **local)
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1) // (cpus or 1)))
        self._evaluate = ray.remote(num_cpus=cpus, num_gpus=gpus)(_call)

    def __call__(self, fitness: Fitness, genomes: Sequence[Any]) -> Iterator[Any]:
        if not genomes:
            return
        shared, waiting, left = self.ray.put(fitness), deque[tuple[Any, Any]](), deque(genomes)
        while waiting or left:
            while left and len(waiting) < self.workers:
                genome = left.popleft()
                waiting.append((genome, self._evaluate.remote(shared, genome)))
            genome, reference = waiting.popleft()
            try:
                yield self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                raise SearchError(f"fitness of {genome!r} failed: {error.cause!r}") from error


def _call(fitness: Fitness, genome: Any) -> Any:
    return fitness(genome)
