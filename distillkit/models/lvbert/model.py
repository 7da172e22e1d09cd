"""LV-BERT as models of transformers: the encoder, and the heads that it is trained and used with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from distillkit.models.lvbert.config import LVBertConfig
from distillkit.models.lvbert.layers import LAYERS, LVBertConvolution

IGNORED = -100  # label of tokens that have none


class LVBertEmbeddings(nn.Module):
    """Words, segments and positions, added up: LayerNorm, dropout. (B, T) -> (B, T, E)."""

    def __init__(self, config: LVBertConfig):
        super().__init__()
        width = config.embedding_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor | None, segments: Tensor | None, embedded: Tensor | None = None) -> Tensor:
        words = self.word_embeddings(ids) if embedded is None else embedded
        length, most = words.shape[1], self.position_embeddings.num_embeddings
        if length > most:
            raise ValueError(f"a text has {length} tokens, and the model has {most} positions: cut it, or split it up")
        if segments is None:
            segments = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        positions = self.position_embeddings.weight[:length]
        return self.dropout(self.norm(words + self.token_type_embeddings(segments) + positions))


class LVBertPreTrainedModel(PreTrainedModel):
    """What all have in common: initial weights, and how deep a parameter lies."""

    config_class = LVBertConfig
    base_model_prefix = "lvbert"
    _supports_sdpa = True
    #: heads that an encoder was pretrained with
    _keys_to_ignore_on_load_unexpected = (r"^predictions\.", r"^dense\.", r"^replaced\.")  # type: ignore[assignment]
    _no_split_modules = ("LVBertConvolution", "LVBertSelfAttention", "LVBertFeedForward")  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal of deviation 0.02 and, of a depthwise kernel, 1 / taps; Glorot's uniform where the release
        leaves TensorFlow's default: the embeddings' projection, what makes kernels, the last unit of a discriminator,
        classifiers."""
        std = self.config.initializer_range
        if isinstance(module, nn.Conv1d):
            std = 1 / module.kernel_size[0]
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
            if getattr(module, "glorot", False):
                init.xavier_uniform_(module.weight)
            else:
                init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LVBertMaskedLMHead):
            init.zeros_(module.bias)

    def layer_depths(self) -> dict[str, int]:
        """How deep each parameter lies, for a learning rate that falls with the depth, as the release counts: the
        embeddings 0, the layers of pair i i + 1, of n pairs; what is behind the encoder n + 2."""
        pairs = len(self.config.layer_order) // 2
        return {name: _depth(name.split("."), pairs) for name, _ in self.named_parameters()}


def _depth(path: list[str], pairs: int) -> int:
    if "embeddings" in path or "embeddings_project" in path:
        return 0
    return int(path[path.index("layers") + 1]) // 2 + 1 if "layers" in path else pairs + 2


class LVBertModel(LVBertPreTrainedModel):
    """The encoder: token numbers (B, T) -> ``last_hidden_state`` (B, T, D).

    ``hidden_states`` are the embeddings and the output of every layer, one more than there are layers; ``attentions``
    those of attention layers alone, in their order, which need ``attn_implementation="eager"``.
    """

    def __init__(self, config: LVBertConfig):
        super().__init__(config)
        self.embeddings = LVBertEmbeddings(config)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = glorot(nn.Linear(config.embedding_size, config.hidden_size))
        self.build_layers(config)
        self.post_init()

    def build_layers(self, config: LVBertConfig) -> None:
        self.layers = nn.ModuleList(layer_of(kind, config) for kind in config.layer_order)

    def path(self) -> Iterable[nn.Module]:
        """The layers that a text goes through."""
        return self.layers

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """attention_mask: (B, T), 0 at padding; None: there is none."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        if hasattr(self, "embeddings_project"):
            x = self.embeddings_project(x)
        keep = None if attention_mask is None else attention_mask[..., None].to(x.dtype)
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_weights = self.config.output_attentions if output_attentions is None else output_attentions
        states, weights = [x], _Weights(self, bool(want_weights))
        with weights:
            for layer in self.path():
                x = layer(x, keep)
                if want_states:
                    states.append(x)
        out = BaseModelOutput(
            last_hidden_state=x,  # type: ignore[arg-type]
            hidden_states=tuple(states) if want_states else None,  # type: ignore[arg-type]
            attentions=tuple(weights.seen) if want_weights else None,  # type: ignore[arg-type]
        )
        return out if _as_dict(self, return_dict) else out.to_tuple()


class _Weights:
    """Collects what attention modules return beside their output, while a call asks for it."""

    def __init__(self, model: LVBertModel, wanted: bool):
        self.model, self.wanted, self.seen, self.hooks = model, wanted, [], []  # type: ignore[var-annotated]
        if wanted and model.config._attn_implementation != "eager":
            raise ValueError(
                'output_attentions needs attn_implementation="eager", which computes the weights: load the model so, '
                'or call model.set_attn_implementation("eager")'
            )

    def __enter__(self) -> None:
        if self.wanted:
            attention: list[Any] = [layer.attention for layer in self.model.path() if hasattr(layer, "attention")]
            self.hooks = [m.register_forward_hook(lambda _, __, out: self.seen.append(out[1])) for m in attention]

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


class LVBertMaskedLMHead(nn.Module):
    """Linear(D, E), GELU, LayerNorm, then the product with every word's embedding, and a bias a word."""

    def __init__(self, config: LVBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """x (..., D), words (V, E) -> (..., V)."""
        return F.linear(self.norm(F.gelu(self.dense(x))), words, self.bias)


class LVBertForMaskedLM(LVBertPreTrainedModel):
    """A generator: which word stands at each position. labels: (B, T), -100 where it is not asked."""

    def __init__(self, config: LVBertConfig):
        super().__init__(config)
        self.lvbert = LVBertModel(config)
        self.predictions = LVBertMaskedLMHead(config)
        self.post_init()

    def words(self, x: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits of words (..., V)."""
        return self.predictions(x, self.lvbert.embeddings.word_embeddings.weight)

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **call: Any) -> Any:
        as_dict, encoded = _encoded(self, input_ids, call)
        logits = self.words(encoded[0])
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return _output(MaskedLMOutput, as_dict, encoded, loss, logits)


class LVBertForPreTraining(LVBertPreTrainedModel):
    """A discriminator: logits (B, T), above 0 where a token was replaced. labels: (B, T), 1 replaced, 0 not; averaged
    over the tokens that ``attention_mask`` keeps."""

    def __init__(self, config: LVBertConfig):
        super().__init__(config)
        self.lvbert = LVBertModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.replaced = glorot(nn.Linear(config.hidden_size, 1))
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **call: Any) -> Any:
        keep = call.get("attention_mask")
        as_dict, encoded = _encoded(self, input_ids, call)
        logits = self.replaced(F.gelu(self.dense(encoded[0]))).squeeze(-1)
        loss = None
        if labels is not None:
            each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
            kept = torch.ones_like(each) if keep is None else keep.to(each.dtype)
            loss = (each * kept).sum() / kept.sum().clamp(min=1e-6)
        return _output(TokenClassifierOutput, as_dict, encoded, loss, logits)


class LVBertForSequenceClassification(LVBertPreTrainedModel):
    """One linear layer on the last hidden state of the first token; there is no pooler. With one label a regression:
    squared error."""

    def __init__(self, config: LVBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lvbert = LVBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = glorot(nn.Linear(config.hidden_size, config.num_labels))
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **call: Any) -> Any:
        as_dict, encoded = _encoded(self, input_ids, call)
        logits = self.classifier(self.dropout(encoded[0][:, 0]))
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return _output(SequenceClassifierOutput, as_dict, encoded, loss, logits)


class LVBertForTokenClassification(LVBertPreTrainedModel):
    """One linear layer on every last hidden state. labels: (B, T), -100 where there is none."""

    def __init__(self, config: LVBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lvbert = LVBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = glorot(nn.Linear(config.hidden_size, config.num_labels))
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **call: Any) -> Any:
        as_dict, encoded = _encoded(self, input_ids, call)
        logits = self.classifier(self.dropout(encoded[0]))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return _output(TokenClassifierOutput, as_dict, encoded, loss, logits)


def layer_of(kind: int, config: LVBertConfig) -> nn.Module:
    layer = LAYERS[kind](config)
    if isinstance(layer, LVBertConvolution):
        glorot(layer.kernels)
    return layer


def glorot(layer: nn.Linear) -> nn.Linear:
    """The same layer; it begins as TensorFlow's default has it."""
    layer.glorot = True  # type: ignore[assignment]
    return layer


def _classifier_dropout(config: LVBertConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _as_dict(model: PreTrainedModel, asked: bool | None) -> bool:
    return bool(getattr(model.config, "return_dict", True) if asked is None else asked)


def _encoded(model: Any, input_ids: Tensor | None, call: dict[str, Any]) -> tuple[bool, Any]:
    """Whether the caller wants a dict, and what the encoder says."""
    as_dict = _as_dict(model, call.pop("return_dict", None))
    return as_dict, model.lvbert(input_ids, **call, return_dict=True)


def _output(kind: Any, as_dict: bool, encoded: Any, loss: Tensor | None, logits: Tensor) -> Any:
    out = kind(loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
    return out if as_dict else out.to_tuple()
