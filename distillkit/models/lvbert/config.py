"""The config of LV-BERT, and its published sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from distillkit.models.lvbert.order import SEARCHED, check_order

#: hidden size, embedding size, share of the hidden size that a generator has
SIZES = {
    "small": (256, 128, 1 / 4),
    "medium": (384, 128, 1 / 3),
    "base": (768, 768, 1 / 3),
    "large": (1024, 1024, 1 / 4),
}
HEAD = 64  # width of a head, in all sizes


class LVBertConfig(PreTrainedConfig):
    """What an LV-BERT is made of.

    Args:
        layer_order: the type of each layer: 0 dynamic convolution, 1 self-attention, 2 feed-forward; an even number.
        hidden_size: D; embedding_size: E; a projection follows the embeddings where they differ.
        num_attention_heads: of attention and convolution layers; None: a head of width 64 each, as published.
        intermediate_size: of feed-forward layers; None: 4 D.
        kernel_size: taps of the convolutions, an odd number.
        convention: ``default``: convolutions see zeros in place of padding, so that what an encoder says of a text does
            not depend on what it is padded with; ``release``: padding leaks into up to (kernel_size - 1) neighbours a
            layer, as in the published code.
        The others are as in BERT. ``num_hidden_layers`` is the number of layers, not that of pairs as in the release.

    Raises:
        LayerOrderError: an order of odd length, or an unknown type. ValueError: sizes that do not fit each other.
    """

    model_type = "lvbert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 256,
        embedding_size: int = 128,
        layer_order: Sequence[int] = SEARCHED,
        num_attention_heads: int | None = None,
        intermediate_size: int | None = None,
        kernel_size: int = 9,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int = 0,
        convention: str = "default",
        num_hidden_layers: int | None = None,
        **kwargs: Any,
    ):
        self.layer_order = list(check_order(list(layer_order)))
        if num_hidden_layers not in (None, len(self.layer_order)):
            raise ValueError(f"num_hidden_layers is {num_hidden_layers}, and layer_order has {len(self.layer_order)}")
        self.num_hidden_layers = len(self.layer_order)
        self.num_attention_heads = max(1, hidden_size // HEAD) if num_attention_heads is None else num_attention_heads
        if hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} cannot be cut into {self.num_attention_heads} heads")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, as a kernel has a middle; got {kernel_size}")
        if convention not in ("default", "release"):
            raise ValueError(f"convention must be 'default' or 'release', got {convention!r}")
        self.vocab_size, self.hidden_size, self.embedding_size = vocab_size, hidden_size, embedding_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.kernel_size, self.convention = kernel_size, convention
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.max_position_embeddings, self.type_vocab_size = max_position_embeddings, type_vocab_size
        self.initializer_range, self.layer_norm_eps = initializer_range, layer_norm_eps
        super().__init__(pad_token_id=pad_token_id, **kwargs)


def lvbert_config(size: str = "small", **changes: Any) -> LVBertConfig:
    """The config of a published size, small, medium, base or large, with ``changes``."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    hidden, embedding, _ = SIZES[size]
    return LVBertConfig(**{"hidden_size": hidden, "embedding_size": embedding, **changes})


def generator_config(config: LVBertConfig, share: float = 1 / 4) -> LVBertConfig:
    """Of the generator that a discriminator is pre-trained with: of ``share`` of its hidden size, else like it.

    Where the share leaves a width that its heads do not divide, it has as many heads as do.
    """
    hidden = round(config.hidden_size * share)
    heads = max(1, hidden * config.num_attention_heads // config.hidden_size)
    while hidden % heads:
        heads -= 1
    changes = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": hidden * config.intermediate_size // config.hidden_size,
    }
    return LVBertConfig(**{**config.to_dict(), **changes})
