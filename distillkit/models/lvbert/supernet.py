"""One network of all orders: a layer of each type at every position, of which a text goes through one.

Embeddings are shared by all orders. Guo et al., arXiv:1904.00420 (single path); Yu et al., arXiv:2106.11740.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from distillkit.models.lvbert.config import LVBertConfig
from distillkit.models.lvbert.model import LVBertModel, layer_of
from distillkit.models.lvbert.order import TYPES, LayerOrderError, check_order


class LVBertSupernet(LVBertModel):
    """An encoder with a layer of each type at each of ``len(config.layer_order)`` positions.

    ``order`` says which of them a call goes through, that of the config at first. No weight is copied to change it, so
    that an order costs what its forward pass costs.
    """

    order: tuple[int, ...]

    def build_layers(self, config: LVBertConfig) -> None:
        self.layers = nn.ModuleList(nn.ModuleList(layer_of(kind, config) for kind in TYPES) for _ in config.layer_order)
        self.order = tuple(config.layer_order)

    def path(self) -> Iterable[nn.Module]:
        return (choices[kind] for choices, kind in zip(self.layers, self.order, strict=True))  # type: ignore[index]

    def choose(self, order: Sequence[int]) -> None:
        """Go through ``order`` from now on. Raises LayerOrderError: it is none, or not of as many layers."""
        checked = check_order(order, "order")
        if len(checked) != len(self.layers):
            raise LayerOrderError(f"order has {len(checked)} layers, the supernet {len(self.layers)} positions")
        self.order = checked

    def inherited(self, order: Sequence[int]) -> LVBertModel:
        """The network of one order, with the weights that it has here."""
        checked = check_order(order, "order")
        single = LVBertModel(
            LVBertConfig(**{**self.config.to_dict(), "layer_order": checked, "num_hidden_layers": None})
        )
        here = self.state_dict()
        single.load_state_dict({name: here[_chosen(name, checked)] for name in single.state_dict()})
        return single.train(self.training)


def _chosen(name: str, order: Sequence[int]) -> str:
    """What a parameter of a single network is called in the supernet."""
    part, *rest = name.split(".")
    return ".".join([part, rest[0], str(order[int(rest[0])]), *rest[1:]]) if part == "layers" else name
