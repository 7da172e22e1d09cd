"""What the distillers of dense predictions compare: divergences of places and of channels, similarities, borders."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from distillkit.boxes.precision import at_least_float32
from distillkit.losses.kl import kl_divergence
from distillkit.losses.segmentation import IGNORE


def pixel_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * KL(softmax(teacher/T) || softmax(student/T))`` over the classes of every place.

    Args:
        student: logits (B, C, H, W).
        teacher: logits (B, C, H, W); no gradient flows into them.
        temperature: T >= 1.

    Returns:
        (B, H, W) in float32 or wider.

    Raises:
        ValueError: shapes that differ, a temperature below 1.
    """
    return kl_divergence(student.movedim(1, -1), teacher.movedim(1, -1), temperature, "sum")


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * KL(softmax(teacher/T) || softmax(student/T))`` over the places of every channel.

    Shu et al., arXiv:2011.13256, equations 3 and 4, before the mean over channels.

    Args:
        student: maps (B, C, H, W).
        teacher: maps (B, C, H, W); no gradient flows into them.
        temperature: T >= 1.

    Returns:
        (B, C) in float32 or wider.

    Raises:
        ValueError: shapes that differ, a temperature below 1.
    """
    return kl_divergence(student.flatten(2), teacher.flatten(2), temperature, "sum")


def similarities(nodes: Tensor, constant_lengths: bool = False) -> Tensor:
    """The cosine of every two columns: (B, C, N) -> (B, N, N) in -1..1, in float32 or wider.

    Args:
        nodes: the features of N places.
        constant_lengths: let no gradient through the lengths that columns are divided by, and add 1e-8 to them, as the
            release of arXiv:1903.04197 does.

    A column of zeros has no direction: its cosines are 0.
    """
    nodes = at_least_float32(nodes)
    length = vector_norm(nodes, dim=1, keepdim=True)
    # 0 / 1, and no gradient that 1 / 0 would blow up
    length = length.detach() + 1e-8 if constant_lengths else torch.where(length > 0, length, 1.0)
    unit = nodes / length
    return unit.mT @ unit


def near_borders(masks: Tensor, reach: Sequence[int], ignore: int = IGNORE) -> Tensor:
    """Labelled pixels that have a labelled pixel of another class within ``reach``.

    A border between a class and ignored pixels is none, and one that is drawn with ignored pixels, as in PASCAL VOC, is
    one if it is narrower than the reach. Waits for no device.

    Args:
        masks: (B, H, W) integers, classes or ``ignore``.
        reach: how many rows, and how many columns, away; at least 1. (1, 1): the pixels that touch another class, also
            by a corner.
        ignore: the label of pixels that are not labelled.

    Returns:
        (B, H, W) bool.
    """
    labelled = masks != ignore
    labels = masks.float()
    highest = _highest_around(labels.where(labelled, -math.inf), reach)
    lowest = -_highest_around((-labels).where(labelled, -math.inf), reach)
    return labelled & (highest > lowest)


def _highest_around(x: Tensor, reach: Sequence[int]) -> Tensor:
    """(B, H, W): the maximum over a window around every pixel; rows and columns apart, which is far fewer reads."""
    rows, columns = reach
    x = F.max_pool2d(x, (2 * rows + 1, 1), 1, (rows, 0))
    return F.max_pool2d(x, (1, 2 * columns + 1), 1, (0, columns))
