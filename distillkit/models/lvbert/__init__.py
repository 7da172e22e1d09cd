"""LV-BERT: an encoder of text whose layers are of three types, in any order. Yu et al., arXiv:2106.11740.

`order` says what orders and layer types are, and needs torch alone; the models need transformers, and are imported when
they are first used.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "ATTENTION": "order",
    "CONVOLUTION": "order",
    "FEED_FORWARD": "order",
    "SEARCHED": "order",
    "LayerOrderError": "order",
    "check_order": "order",
    "encoder_parameters": "order",
    "interleaved": "order",
    "LVBertConfig": "config",
    "lvbert_config": "config",
    "LVBertModel": "model",
    "LVBertForMaskedLM": "model",
    "LVBertForPreTraining": "model",
    "LVBertForSequenceClassification": "model",
    "LVBertForTokenClassification": "model",
    "LVBertSupernet": "supernet",
    "load_tensorflow": "convert",
    "tensorflow_names": "convert",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
