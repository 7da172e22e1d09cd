"""How alike attention maps of different blocks are. Zhou et al., DeepViT, arXiv:2103.11886.

In deep transformers the maps of later blocks become nearly equal, and more blocks then bring nothing. The measure
compares what one token gives to all others in two blocks p and q, head by head:

    M[h, t] = <A^p[h, :, t], A^q[h, :, t]> / (|A^p[h, :, t]| |A^q[h, :, t]|)

the cosine over the queries (rows) of the column of key t. M = 1: the token plays the same role in both blocks. The
paper calls two blocks similar where more than 90 % of M is high.

    model.eval()
    with torch.no_grad():
        similarity = adjacent_similarity(attention_maps(model, images))
    plot_similarity({"deepvit_16b": similarity}).savefig("similarity.png")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.boxes.precision import at_least_float32

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINT = "attn_map"  # the module through which an attention's map runs right before it meets the values


@dataclass(frozen=True)
class AttentionSimilarity:
    """Of L blocks, compared with their next ones.

    Args:
        values: M of each of the L - 1 pairs, (B, heads, T).
        mean: (L - 1,) of M.
        similar: (L - 1,) the share of M above the threshold.
    """

    values: list[Tensor]
    mean: Tensor
    similar: Tensor


def attention_similarity(first: Tensor, second: Tensor) -> Tensor:
    """M of two blocks: maps (B, heads, T, T), rows = queries, -> (B, heads, T) in -1..1."""
    if first.shape != second.shape or first.dim() != 4:
        raise ValueError(
            f"maps must be two of one shape (B, heads, T, T), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return F.cosine_similarity(at_least_float32(first), at_least_float32(second), dim=-2)


def adjacent_similarity(maps: Sequence[Tensor], threshold: float = 0.9) -> AttentionSimilarity:
    """Compare the map of every block with that of the next.

    Args:
        maps: of the blocks in order, each (B, heads, T, T).
        threshold: above which an entry of M counts as similar.
    """
    if len(maps) < 2:
        raise ValueError(f"neighbours need two maps at least, got {len(maps)}")
    values = [attention_similarity(a, b) for a, b in pairwise(maps)]
    return AttentionSimilarity(
        values,
        torch.stack([m.mean() for m in values]),
        torch.stack([(m > threshold).to(m.dtype).mean() for m in values]),
    )


@contextmanager
def recorded_attention(model: nn.Module, point: str = POINT) -> Iterator[list[Tensor]]:
    """Within it, every forward of ``model`` appends its maps (B, heads, T, T) to the list, block by block.

    They are those that meet the values: after the softmax, and after re-attention or refinement. Gradients flow
    through them, so that a loss may act on maps of the training forward:

        with recorded_attention(model) as maps:
            logits = model(images)
        loss = cross_entropy(logits, labels) + 0.1 * attention_cosine(maps)

    Args:
        model: not compiled.
        point: name of the modules through which the maps run, one in each block. timm's own transformers have
            "attn_drop", if they are built after ``timm.layers.set_fused_attn(False)``: fused attention makes no maps.

    Raises:
        ValueError: a model without a module of that name, or a compiled one.
    """
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is compiled, and what is compiled does not show its attention maps: measure the "
            "uncompiled model (model._orig_mod of what torch.compile returned; a copy made before model.compile())"
        )
    points = [module for name, module in model.named_modules() if name.rpartition(".")[2] == point]
    if not points:
        raise ValueError(
            f"{type(model).__name__} shows no attention maps: no module in it is named {point!r}. DeepViT and "
            f"Refiner-ViT of distillkit.models have {POINT!r}, timm's transformers 'attn_drop' (see ``point``); "
            "elsewhere, pass the map through an nn.Identity of that name"
        )
    maps: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # a backward pass runs checkpointed blocks again
        if torch._C._current_graph_task_id() == -1:
            maps.append(output)

    handles = [point.register_forward_hook(record) for point in points]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def attention_maps(model: nn.Module, images: Tensor, point: str = POINT) -> list[Tensor]:
    """The maps (B, heads, T, T) of one forward, block by block; see ``recorded_attention``.

    The model stays in its mode, and gradients as they are: for measurements put it in eval and use ``no_grad``.

    Raises:
        ValueError: as there, or no map ran through ``point``.
    """
    with recorded_attention(model, point) as maps:
        model(images)
    if not maps:
        raise ValueError(
            f"{type(model).__name__} ran no module named {point!r}: fused attention makes no maps; call "
            "timm.layers.set_fused_attn(False) before the model is built"
        )
    return list(maps)


def plot_similarity(models: Mapping[str, AttentionSimilarity], value: Literal["mean", "similar"] = "mean") -> Figure:
    """One line over the depth for each named model.

    Args:
        value: the mean of M, or the share of it above the threshold, as the paper plots.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, similarity in models.items():
        blocks = range(2, len(similarity.mean) + 2)
        heights = similarity.mean if value == "mean" else similarity.similar
        axis.plot(blocks, heights.detach().cpu().numpy(), "o-", ms=3, lw=1.2, label=name)
    axis.set_xlabel("block, counted from 1, against the one before it", fontsize=9)
    axis.set_ylabel("cosine of their attention maps" if value == "mean" else "share of similar tokens", fontsize=9)
    axis.set_ylim(top=1.02)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure
