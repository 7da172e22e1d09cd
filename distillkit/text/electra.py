"""ELECTRA: a generator fills masked tokens in, a discriminator says which are not the text's. arXiv:2003.10555."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.core.adapter import Adapter
from distillkit.models.lvbert.config import LVBertConfig, generator_config
from distillkit.models.lvbert.model import LVBertForMaskedLM, LVBertForPreTraining
from distillkit.models.lvbert.supernet import LVBertSupernet
from distillkit.text.masking import SHARE, mask_tokens, write
from distillkit.text.vocabulary import Vocabulary


class Electra(nn.Module):
    """A generator and a discriminator with one table of embeddings.

        loss = cross entropy of the masked tokens (generator)
             + 50 * binary cross entropy of "was replaced" over all real tokens (discriminator)

    A masked token is replaced by a sample of the generator's distribution, without gradient; a sample that is the
    text's own token counts as not replaced.

    Args:
        config: of the discriminator; the generator has its order of layers.
        share: of the discriminator's hidden size that the generator's is: 1/4 small and large, 1/3 medium and base.
        supernet: every order of layers at once: a training step draws a type for each position, of all types alike, for
            both networks; in eval mode they go through the order of ``choose``.
        mask: share of the tokens that are masked: 0.15, and 0.25 for large.
        convention: of masking (see ``masking``); that of the encoders is in the config.

    Called with ids (B, T): losses "mlm" and "rtd", weighted; and, without gradient, "mlm_accuracy" of masked tokens,
    "rtd_accuracy" over all real tokens, and "rtd_recall", of replaced ones alone.
    """

    def __init__(
        self,
        config: LVBertConfig,
        vocabulary: Vocabulary,
        share: float = 1 / 4,
        supernet: bool = False,
        mask: float = SHARE,
        rtd_weight: float = 50.0,
        convention: Literal["default", "release"] = "default",
    ):
        super().__init__()
        if config.vocab_size != len(vocabulary):
            raise ValueError(f"the model has {config.vocab_size} words, the vocabulary {len(vocabulary)} pieces")
        self.discriminator = LVBertForPreTraining(config)
        self.generator = LVBertForMaskedLM(generator_config(config, share))
        if supernet:
            self.discriminator.lvbert = LVBertSupernet(config)  # type: ignore[assignment]
            self.generator.lvbert = LVBertSupernet(self.generator.config)  # type: ignore[assignment]
        self.generator.lvbert.embeddings = self.discriminator.lvbert.embeddings
        self.vocabulary, self.mask, self.rtd_weight, self.convention = vocabulary, mask, rtd_weight, convention
        self.supernet = supernet

    def choose(self, order: Sequence[int]) -> None:
        """Of a supernet: the order that both networks go through from now on."""
        for network in (self.generator, self.discriminator):
            network.lvbert.choose(order)  # type: ignore[operator]

    def forward(self, ids: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if self.supernet and self.training:
            self.choose(torch.randint(3, (len(self.discriminator.config.layer_order),)).tolist())
        keep = (ids != self.vocabulary.pad).long()
        masked = mask_tokens(ids, keep, self.vocabulary, self.mask, self.convention, generator)
        words, count = ids.gather(1, masked.positions), masked.weights.sum() + 1e-6
        states = self.generator.lvbert(masked.inputs, attention_mask=keep)[0]
        at = masked.positions[..., None].expand(-1, -1, states.shape[-1])
        logits = self.generator.words(states.gather(1, at)).float()  # (B, M, V)
        each = F.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none").view_as(words)
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view_as(words)
            corrupt = write(ids, masked.positions, drawn, masked.writes)
            replaced = corrupt != ids
        out = self.discriminator(corrupt, attention_mask=keep, labels=replaced)
        with torch.no_grad():
            right = ((out.logits > 0) == replaced) & keep.bool()
            accuracy = {
                "mlm_accuracy": ((logits.argmax(-1) == words) * masked.weights).sum() / count,
                "rtd_accuracy": right.sum() / keep.sum(),
                "rtd_recall": (right & replaced).sum() / replaced.sum().clamp(min=1),
            }
        return {"mlm": (each * masked.weights).sum() / count, "rtd": self.rtd_weight * out.loss, **accuracy}


class ElectraAdapter(Adapter):
    """Its two losses; the accuracies beside them are none."""

    def losses(self, output: Any) -> dict[str, Tensor]:
        return {name: output[name] for name in ("mlm", "rtd")}


@torch.no_grad()
def judge(electra: Electra, batches: Sequence[Tensor], seed: int = 0) -> dict[str, float]:
    """Means over batches of ids (B, T) in eval mode. What is masked and drawn is a function of the seed and the
    generator's weights, so that candidates are asked the same.

    "accuracy" is the mean of "mlm_accuracy" and "rtd_accuracy": what LV-BERT's search goes by, here.
    """
    was, device = electra.training, next(electra.parameters()).device
    if was:  # walking through all modules of a supernet costs a fiftieth of its forward pass
        electra.eval()
    sums: dict[str, float] = {}
    try:
        for i, ids in enumerate(batches):
            draw = torch.Generator(device).manual_seed(seed * 1_000_003 + i)
            for name, value in electra(ids.to(device), draw).items():
                sums[name] = sums.get(name, 0.0) + float(value) / len(batches)
    finally:
        if was:
            electra.train()
    return {**sums, "accuracy": (sums["mlm_accuracy"] + sums["rtd_accuracy"]) / 2}
