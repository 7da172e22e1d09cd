"""NanoDet, as in ``distillkit.models.nanodet``: one layer a level holds the class logits and then the edge logits."""

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.models.nanodet import NanoDet


def nanodet(model: NanoDet) -> DistributionHead:
    return DistributionHead(
        classes=[f"{path}[:{model.num_classes}]" for path in model.head_paths],
        edges=[f"{path}[{model.num_classes}:]" for path in model.head_paths],
        strides=model.strides,
        bins=model.bins,
        centre=model.centre,
        octave=model.octave,
    )
