"""Importing this makes transformers' Auto classes know LV-BERT: ``AutoModel.from_pretrained(...)`` and the like."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from distillkit.models.lvbert.config import LVBertConfig
from distillkit.models.lvbert.model import (
    LVBertForMaskedLM,
    LVBertForPreTraining,
    LVBertForSequenceClassification,
    LVBertForTokenClassification,
    LVBertModel,
)

AutoConfig.register(LVBertConfig.model_type, LVBertConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, LVBertModel),
    (AutoModelForMaskedLM, LVBertForMaskedLM),
    (AutoModelForPreTraining, LVBertForPreTraining),
    (AutoModelForSequenceClassification, LVBertForSequenceClassification),
    (AutoModelForTokenClassification, LVBertForTokenClassification),
):
    _auto.register(LVBertConfig, _model, exist_ok=True)
