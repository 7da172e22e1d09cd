"""Released TensorFlow checkpoints of LV-BERT, saved as arrays in an .npz file by the names of their variables.

With TensorFlow, once:

    reader = tf.train.load_checkpoint("lv-bert_small")
    numpy.savez("lv-bert_small.npz", **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})

Here TensorFlow is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillkit.models.lvbert.model import (
    LVBertForMaskedLM,
    LVBertForPreTraining,
    LVBertForSequenceClassification,
    LVBertModel,
)
from distillkit.models.lvbert.order import ATTENTION, CONVOLUTION

NORM = {"weight": "gamma", "bias": "beta"}
DENSE = {"weight": "kernel", "bias": "bias"}


class ConversionError(ValueError):
    """Arrays that are not those of the model."""


def load_tensorflow(model: nn.Module, source: str | Path | Mapping[str, np.ndarray], task: str | None = None) -> None:
    """Fill a model with a checkpoint's arrays.

    Args:
        model: an encoder, a discriminator (``LVBertForPreTraining``), a generator (``LVBertForMaskedLM``) or a
            classifier.
        source: an .npz file, or the arrays by the names of the checkpoint's variables.
        task: of a classifier, the name that its head has there; None: it is not there, and keeps its weights.

    Optimizer slots (``/adam_m``, ``/adam_v``), ``global_step``, and what belongs to another model of the same
    checkpoint are left out.

    Raises:
        ConversionError: a variable is missing, has another shape, or belongs to this model and has no place in it.
    """
    where = source if isinstance(source, str | Path) else "the arrays"
    arrays = dict(np.load(source, allow_pickle=False)) if isinstance(source, str | Path) else dict(source)
    names = tensorflow_names(model, task)
    own, read = model.state_dict(), {}
    for name, variable in names.items():
        if variable not in arrays:
            near = [v for v in arrays if v.split("/")[-2:] == variable.split("/")[-2:]][:2]
            hint = f"; it has {', '.join(near)}" if near else ""
            raise ConversionError(f"{where}: no variable {variable!r}, which {name} is read from{hint}")
        value = _as_torch(torch.from_numpy(np.asarray(arrays[variable])), name, own[name].dim())
        if value.shape != own[name].shape:
            raise ConversionError(
                f"{where}: {variable} becomes {tuple(value.shape)}, and {name} is {tuple(own[name].shape)}: build the "
                "model with the checkpoint's sizes and layer order"
            )
        read[name] = value
    prefixes = {variable.split("/")[0] for variable in names.values()} - {"task_specific"}
    left = [v for v in arrays if v.split("/")[0] in prefixes and v not in names.values() and not _is_slot(v)]
    left = [v for v in left if not (isinstance(model, LVBertForMaskedLM) and v.startswith("electra/"))]
    if left:
        raise ConversionError(f"{where}: {left[0]!r} has no place in the model: build it with the checkpoint's order")
    with torch.no_grad():
        for name, value in read.items():
            own[name].copy_(value)


def tensorflow_names(model: nn.Module, task: str | None = None) -> dict[str, str]:
    """The released code's variable of each parameter of a model, by the parameter's name."""
    if isinstance(model, LVBertModel):
        return _encoder(model, "electra", "")
    if not isinstance(model, LVBertForMaskedLM | LVBertForPreTraining | LVBertForSequenceClassification):
        raise ConversionError(f"released checkpoints hold nothing of a {type(model).__name__}")
    scope = "generator" if isinstance(model, LVBertForMaskedLM) else "electra"
    names = _encoder(model.lvbert, scope, "lvbert.")
    if isinstance(model, LVBertForMaskedLM):
        names |= _of("predictions.dense", "generator_predictions/dense", DENSE)
        names |= _of("predictions.norm", "generator_predictions/LayerNorm", NORM)
        names["predictions.bias"] = "generator_predictions/output_bias"
    elif isinstance(model, LVBertForPreTraining):
        names |= _of("dense", "discriminator_predictions/dense", DENSE)
        names |= _of("replaced", "discriminator_predictions/dense_1", DENSE)
    elif task is not None:
        names |= _of("classifier", f"task_specific/{task}/dense", DENSE)
    return names


def _encoder(model: LVBertModel, scope: str, prefix: str) -> dict[str, str]:
    """Embeddings are the discriminator's in every model."""
    names = {f"{prefix}embeddings.{table}.weight": f"electra/embeddings/{table}" for table in _TABLES}
    names |= _of(f"{prefix}embeddings.norm", "electra/embeddings/LayerNorm", NORM)
    if hasattr(model, "embeddings_project"):
        names |= _of(f"{prefix}embeddings_project", f"{scope}/embeddings_project", DENSE)
    for i, kind in enumerate(model.config.layer_order):
        half = "first" if i % 2 == 0 else "second"
        names |= _layer(kind, f"{prefix}layers.{i}.", f"{scope}/encoder/layer_{i // 2}/{half}_submodule/")
    return names


_TABLES = ("word_embeddings", "token_type_embeddings", "position_embeddings")


def _layer(kind: int, ours: str, theirs: str) -> dict[str, str]:
    if kind == CONVOLUTION:
        theirs += "dynamic_convolution_layer/"
        inside = f"{theirs}convolution/"
        names = {
            f"{ours}depthwise.weight": f"{inside}conv_attn_key/depthwise_kernel",
            f"{ours}pointwise.weight": f"{inside}conv_attn_key/pointwise_kernel",
            f"{ours}pointwise.bias": f"{inside}conv_attn_key/bias",
        }
        for mine, their in (("values", "glu_l"), ("gate", "glu_g"), ("kernels", "conv_attn_kernel")):
            names |= _of(ours + mine, inside + their, DENSE)
    elif kind == ATTENTION:
        theirs += "attention/"
        names = {}
        for part in ("query", "key", "value"):
            names |= _of(f"{ours}attention.{part}", f"{theirs}self/{part}", DENSE)
    else:
        names = _of(f"{ours}intermediate", f"{theirs}intermediate/dense", DENSE)
    names |= _of(f"{ours}output", f"{theirs}output/dense", DENSE)
    return names | _of(f"{ours}norm", f"{theirs}output/LayerNorm", NORM)


def _of(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{mine}": f"{theirs}/{their}" for mine, their in parts.items()}


def _as_torch(value: Tensor, name: str, dims: int) -> Any:
    """Dense kernels are (in, out) there, depthwise ones (K, D, 1), pointwise ones (1, in, out)."""
    if name.endswith("depthwise.weight") and value.dim() == 3:
        return value.permute(1, 2, 0)
    if name.endswith("pointwise.weight") and value.dim() == 3:
        return value[0].T
    return value.T if dims == 2 and "_embeddings." not in name else value


def _is_slot(variable: str) -> bool:
    return variable.endswith(("/adam_m", "/adam_v"))
