"""Which samples, in which order: a function of (seed, epoch), so that a run goes on from any batch without a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler

from distillkit.data.transforms import generator_for


class EpochSampler(Sampler[tuple[int, int]]):
    """The pairs (epoch, index) that one process reads in one epoch.

    Args:
        length: number of samples in the data set, at least 1.
        seed, epoch: the order is a function of these two alone.
        start: how many of this process's samples to leave out from the front (those seen before an interruption).
        rank, world: this process among all. Every process gets the same number of samples, every ``world``-th of the
            common order; where ``length`` does not divide, the first samples of the order come once more at its end.
        shuffle: False: in the order of the data set.

    Raises ValueError where ``length``, ``rank`` or ``start`` cannot be.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ):
        if length < 1:
            raise ValueError(f"length: expected at least one sample, got {length}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0..{world - 1} for {world} processes, got {rank}")
        self.epoch = epoch
        order = torch.randperm(length, generator=generator_for(seed, epoch, -1)) if shuffle else torch.arange(length)
        share = -(-length // world)
        if not 0 <= start <= share:
            raise ValueError(f"start: expected 0..{share}, the samples of a process in an epoch, got {start}")
        everything = order.repeat(-(-share * world // length))[: share * world]
        self.order = everything[rank::world][start:].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, index) for index in self.order])


def epoch_batches(
    length: int,
    batch: int,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    shuffle: bool = True,
    drop_last: bool = False,
) -> BatchSampler:
    """The batches of one epoch for one process, as a DataLoader's ``batch_sampler``.

    ``batch`` is the number of samples a process, ``start`` the number of batches already seen. The number of batches
    and the size of each are the same on every process, and the processes together read in batch i what a single process
    with ``batch * world`` reads in it. With ``start`` at the end of the epoch there is nothing left to read.
    ``drop_last`` leaves out what is no whole batch at the end, unless there would be no batch at all.
    """
    share = -(-length // world)
    seen, drop_last = min(start * batch, share), drop_last and share >= batch
    sampler = EpochSampler(length, seed, epoch, seen, rank, world, shuffle)
    return BatchSampler(sampler, batch, drop_last)  # type: ignore[arg-type]  # torch's stubs know int keys only


def collate(items: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """(images, targets), two lists: pictures differ in size and in their number of boxes."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
