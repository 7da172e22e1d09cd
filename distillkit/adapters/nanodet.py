"""NanoDet, as in ``distillkit.models.nanodet``: one layer a level holds the class logits and then the edge logits."""

from typing import NoReturn

from torch import nn

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.core.adapter import Adapter
from distillkit.core.errors import AdapterError
from distillkit.models.nanodet import NanoDet


def nanodet(model: NanoDet) -> Adapter:
    if model.convention != "default":
        return OnlyPredicts()
    return DistributionHead(
        classes=[f"{path}[:{model.num_classes}]" for path in model.head_paths],
        edges=[f"{path}[{model.num_classes}:]" for path in model.head_paths],
        strides=model.strides,
        bins=model.bins,
        centre=model.centre,
        octave=model.octave,
    )


class OnlyPredicts(Adapter):
    """Of a model in the ``release`` convention: its boxes are not those it is trained by, so that it has no views."""

    def check(self, model: nn.Module) -> NoReturn:
        raise AdapterError(
            f"this NanoDet predicts boxes in convention={model.convention!r}, which is for evaluation only: neither a "
            "student nor a teacher can be wrapped in it; use convention='default'"
        )
