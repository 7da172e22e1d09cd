"""Averages over the ranks of a distributed run, for losses divided by a count."""

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(x: Tensor) -> Tensor:
    """``x`` averaged over all ranks, detached; ``x`` itself, detached, in a run of one process.

    A loss divided by a count has to divide by the mean count of the ranks: gradients are averaged over ranks, so the
    result is that of one process holding every image.

    Args:
        x: any shape, the same on every rank.
    """
    x = x.detach()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
