"""Run a function on two gloo ranks and collect what each returns."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
WAIT = timedelta(minutes=5)  # of a rank for the other: one that would hang is an error


def on_two_ranks(work: Callable[..., Any], *args: Any, start: str = "spawn") -> list[Any]:
    """``[work(rank, *args) for each rank]``, each in its own process of one gloo group; ``work`` must be importable.

    ``start``: how the processes begin; "fork" imports nothing again, and is for a process that has run no backward yet.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (work, args, folder), nprocs=RANKS, start_method=start)
        return [torch.load(Path(folder) / f"result{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=WAIT)
    try:
        torch.save(work(rank, *args), Path(folder) / f"result{rank}.pt")
    finally:
        dist.destroy_process_group()
