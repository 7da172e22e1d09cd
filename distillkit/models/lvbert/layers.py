"""The three types of layers of LV-BERT: dynamic convolution, self-attention, feed-forward.

Each is post-norm, x <- LayerNorm(x + Dropout(f(x))), from (B, T, D) to (B, T, D), and is called with ``keep``,
(B, T, 1) of ones and zeros, 0 at padding, or None where there is none. They need torch alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distillkit.models.lvbert.order import ATTENTION, CONVOLUTION, FEED_FORWARD

#: added to the scores of padding; what is left of its weight after the softmax is 0 in float32
MASKED = -10000.0


class LVBertLayer(nn.Module):
    """The frame of all types: ``output`` back to D, which a type makes last, dropout, the sum, LayerNorm."""

    output: nn.Linear

    def __init__(self, config: Any):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def inner(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, width)."""
        raise NotImplementedError

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.norm(x + self.dropout(self.output(self.inner(x, keep))))


class LVBertConvolution(LVBertLayer):
    """Dynamic convolution: every position and head has a kernel of its own.

        v = (x W_l + b_l) * sigmoid(x W_g + b_g)
        w = softmax over taps of (pointwise(depthwise(v)) W_k + b_k)         (B, T, heads, K)
        o[t] = sum over i of w[t, i] * v[t + i - K // 2]                     a head's channels share its kernel

    The depthwise and the pointwise convolution have nothing between them. A kernel is made of the K gated values around
    its position, the same that it then weighs, and not of that position alone as in the original dynamic convolution
    (Wu et al., arXiv:1901.10430).

    Padding: v is zero there, as it is beyond the ends; ``convention="release"`` of the config leaves what it is.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        hidden, kernel, heads = config.hidden_size, config.kernel_size, config.num_attention_heads
        self.heads, self.taps, self.leaks = heads, kernel, config.convention == "release"
        self.values = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, hidden)
        self.depthwise = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.pointwise = nn.Linear(hidden, hidden)
        self.kernels = nn.Linear(hidden, heads * kernel)
        self.output = nn.Linear(hidden, hidden)

    def inner(self, x: Tensor, keep: Tensor | None) -> Tensor:
        v = self.values(x) * self.gate(x).sigmoid()
        if keep is not None and not self.leaks:
            v = v * keep
        return convolve(v, self.weights(v))

    def weights(self, v: Tensor) -> Tensor:
        """The kernels (B, T, heads, K) of gated values (B, T, D); each adds up to 1."""
        seen = self.pointwise(self.depthwise(v.transpose(1, 2)).transpose(1, 2))
        return self.kernels(seen).unflatten(-1, (self.heads, self.taps)).softmax(-1)


def convolve(v: Tensor, w: Tensor) -> Tensor:
    """(B, T, D) values and (B, T, heads, K) kernels -> (B, T, D); zeros beyond the ends."""
    heads, taps = w.shape[2:]
    w = w.to(v.dtype)
    windows = F.pad(v, (0, 0, taps // 2, taps // 2)).unflatten(2, (heads, v.shape[2] // heads))
    if torch.is_grad_enabled() and (v.requires_grad or w.requires_grad):
        return _Convolved.apply(windows, w).flatten(2)  # type: ignore[no-untyped-call]
    return _convolved(windows, w).flatten(2)


def _convolved(windows: Tensor, w: Tensor) -> Tensor:
    """(B, T + K - 1, heads, D / heads), (B, T, heads, K) -> (B, T, heads, D / heads), tap by tap."""
    length, taps = w.shape[1], w.shape[3]
    out = windows[:, :length] * w[..., 0, None]
    for i in range(1, taps):
        out = out.addcmul(windows[:, i : i + length], w[..., i, None])
    return out


class _Convolved(torch.autograd.Function):
    """``_convolved`` without keeping K copies of its input for the way back: 3 to 5 times faster on a CPU."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(windows, w)
        return _convolved(windows, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        windows, w = ctx.saved_tensors
        length, taps = w.shape[1], w.shape[3]
        of_windows, of_w = torch.zeros_like(windows), torch.empty_like(w)
        for i in range(taps):
            of_windows[:, i : i + length].addcmul_(grad, w[..., i, None])
            of_w[..., i] = (grad * windows[:, i : i + length]).sum(-1)
        return of_windows, of_w


class LVBertAttention(nn.Module):
    """Scaled dot products of all heads: (B, T, D) -> (B, T, D) and the weights (B, heads, T, T), computed where
    ``attn_implementation`` is "eager", else None."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.heads, self.drop = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        bias = None if keep is None else (1.0 - keep).mul(MASKED)[:, None, None, :, 0]
        drop = self.drop if self.training else 0.0
        weights = None
        if getattr(self.config, "_attn_implementation", None) == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        else:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            weights = (scores if bias is None else scores + bias).softmax(-1)
            out = F.dropout(weights, drop) @ v
        return out.transpose(1, 2).flatten(2), weights


class LVBertSelfAttention(LVBertLayer):
    """Multi-head self-attention, of module ``attention``."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.attention = LVBertAttention(config)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def inner(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return self.attention(x, keep)[0]


class LVBertFeedForward(LVBertLayer):
    """Linear(D, inner), exact GELU, Linear(inner, D)."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)

    def inner(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return F.gelu(self.intermediate(x))


LAYERS = {CONVOLUTION: LVBertConvolution, ATTENTION: LVBertSelfAttention, FEED_FORWARD: LVBertFeedForward}
