"""One file per model family: how it is run and where its views are."""

from __future__ import annotations

from torch import nn

from distillkit.core.adapter import Adapter


def adapter_for(model: nn.Module, fallback: Adapter | None = None) -> Adapter:
    """A model's adapter: its family's where distillkit knows it, else ``fallback``, else the one for plain models."""
    from distillkit.models.gfl import GFL
    from distillkit.models.nanodet import NanoDet

    if isinstance(model, GFL):
        from distillkit.adapters.gfl import gfl

        return gfl(model)
    if isinstance(model, NanoDet):
        from distillkit.adapters.nanodet import nanodet

        return nanodet(model)
    return fallback or Adapter()
