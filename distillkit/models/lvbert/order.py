"""Layer types and orders of LV-BERT, and how many parameters an order has. Nothing is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: the types of layers, by the release's numbers
CONVOLUTION, ATTENTION, FEED_FORWARD = 0, 1, 2
TYPES = {CONVOLUTION: "dynamic convolution", ATTENTION: "self-attention", FEED_FORWARD: "feed-forward"}

#: the published order of all sizes: eight layers of each type
SEARCHED = (0, 0, 1, 2, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2, 0, 2, 1, 0, 2, 0, 1, 1, 2, 1)
#: that of BERT and ELECTRA
BERT = (1, 2) * 12


class LayerOrderError(ValueError):
    """An order of layers that no network can have."""


def check_order(order: Sequence[Any], what: str = "layer_order") -> tuple[int, ...]:
    """The order as a tuple of numbers.

    Raises LayerOrderError: nothing in it, an unknown type, an odd number of layers. Layers come in pairs: released
    checkpoints name them so, and learning rates fall from pair to pair in fine-tuning.
    """
    if isinstance(order, str) or not isinstance(order, Sequence) or not order:
        raise LayerOrderError(f"{what}: expected a list of layer types, as in [1, 2, 0, 2], got {order!r}")
    for i, kind in enumerate(order):
        if isinstance(kind, bool) or kind not in TYPES:
            known = ", ".join(f"{number} ({name})" for number, name in TYPES.items())
            raise LayerOrderError(f"{what}[{i}] is {kind!r}, and types of layers are {known}")
    if len(order) % 2:
        raise LayerOrderError(f"{what} has {len(order)} layers; give an even number, as layers come in pairs")
    return tuple(int(kind) for kind in order)


def interleaved(layers: int = 24, types: Sequence[int] = (CONVOLUTION, ATTENTION, FEED_FORWARD)) -> tuple[int, ...]:
    """``types`` over and over again: (0, 1, 2, 0, 1, 2, ...)."""
    return check_order([types[i % len(types)] for i in range(layers)])


def layer_parameters(kind: int, hidden: int, heads: int, inner: int, kernel: int) -> int:
    """Of one layer, its LayerNorm included."""
    linear, norm = hidden * hidden + hidden, 2 * hidden
    if kind == CONVOLUTION:
        separable = kernel * hidden + linear
        return 2 * linear + separable + (hidden + 1) * heads * kernel + linear + norm
    if kind == ATTENTION:
        return 4 * linear + norm
    return 2 * hidden * inner + inner + hidden + norm


def encoder_parameters(config: Any, order: Sequence[int] | None = None) -> int:
    """Of an encoder without any head: embeddings, their projection, layers.

    Args:
        config: an ``LVBertConfig``.
        order: instead of the one that the config has.
    """
    sizes = config.hidden_size, config.num_attention_heads, config.intermediate_size, config.kernel_size
    rows = config.vocab_size + config.type_vocab_size + config.max_position_embeddings
    embeddings = (rows + 2) * config.embedding_size
    if config.embedding_size != config.hidden_size:
        embeddings += (config.embedding_size + 1) * config.hidden_size
    chosen = config.layer_order if order is None else order
    return embeddings + sum(layer_parameters(kind, *sizes) for kind in chosen)
