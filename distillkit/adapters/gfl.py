"""GFL and GFLv2, as in ``distillkit.models.gfl``."""

from distillkit.adapters.distribution_head import DistributionHead
from distillkit.models.gfl import GFL


def gfl(model: GFL) -> DistributionHead:
    """The edge logits of GFL are ``scale(gfl_reg(x))``: the tap is on the scales, one a level, not on ``gfl_reg``."""
    return DistributionHead(
        classes="bbox_head.gfl_cls",
        edges="bbox_head.scales.*",
        strides=model.strides,
        bins=model.bins,
        features="neck",
    )
