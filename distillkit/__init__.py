"""Knowledge distillation that hooks onto the detector, classifier or segmentation model you already have.

    model = distillkit.wrap(student, teacher, distillers=[distillkit.LogitKD(temperature=4)], criterion=cross_entropy)
    model(x, y).total.backward()

Names are imported when they are first used, so that ``import distillkit`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "wrap": "distillkit.api",
    "Teacher": "distillkit.core.teacher",
    "EMATeacher": "distillkit.core.teacher",
    "OnlineTeacher": "distillkit.core.teacher",
    "Weight": "distillkit.core.schedule",
    "Distiller": "distillkit.core.distiller",
    "Losses": "distillkit.core.result",
    "ClassLogits": "distillkit.core.views",
    "Features": "distillkit.core.views",
    "DenseDetections": "distillkit.core.views",
    "TokenLogits": "distillkit.core.views",
    "PixelLogits": "distillkit.core.views",
    "ActivationMaps": "distillkit.core.views",
    "QueryDetections": "distillkit.core.views",
    "BoxTargets": "distillkit.core.views",
    "Adapter": "distillkit.core.adapter",
    "DistributionHead": "distillkit.adapters.distribution_head",
    "Segmenter": "distillkit.adapters.segmenter",
    "to_distribution": "distillkit.adapters.to_distribution",
    "LD": "distillkit.distillers.ld",
    "LogitKD": "distillkit.distillers.logit_kd",
    "FeatureImitation": "distillkit.distillers.feature_imitation",
    "SelfLD": "distillkit.distillers.self_ld",
    "DKD": "distillkit.distillers.dkd",
    "DIST": "distillkit.distillers.dist",
    "HardToken": "distillkit.distillers.hard_token",
    "AttentionTransfer": "distillkit.distillers.attention_transfer",
    "RelationalKD": "distillkit.distillers.relational_kd",
    "TokenLabeling": "distillkit.distillers.token_labeling",
    "ChannelKD": "distillkit.distillers.channel_kd",
    "QueryKD": "distillkit.distillers.query_kd",
    "QueryLD": "distillkit.distillers.query_kd",
    "PairwiseKD": "distillkit.distillers.pairwise_kd",
    "PixelKD": "distillkit.distillers.pixel_kd",
    "LocalToGlobal": "distillkit.distillers.local_to_global",
    "HiddenStates": "distillkit.distillers.text",
    "AttentionMaps": "distillkit.distillers.text",
    "LabelMap": "distillkit.data.label_map",
    "Main": "distillkit.boxes.regions",
    "Valuable": "distillkit.boxes.regions",
    "MainAndValuable": "distillkit.boxes.regions",
    "register_model": "distillkit.plugins",
    "register_distiller": "distillkit.plugins",
    "register_data": "distillkit.plugins",
}
__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from distillkit.adapters.distribution_head import DistributionHead
    from distillkit.adapters.segmenter import Segmenter
    from distillkit.adapters.to_distribution import to_distribution
    from distillkit.api import wrap
    from distillkit.boxes.regions import Main, MainAndValuable, Valuable
    from distillkit.core.adapter import Adapter
    from distillkit.core.distiller import Distiller
    from distillkit.core.result import Losses
    from distillkit.core.schedule import Weight
    from distillkit.core.teacher import EMATeacher, OnlineTeacher, Teacher
    from distillkit.core.views import (
        ActivationMaps,
        BoxTargets,
        ClassLogits,
        DenseDetections,
        Features,
        PixelLogits,
        QueryDetections,
        TokenLogits,
    )
    from distillkit.data.label_map import LabelMap
    from distillkit.distillers.attention_transfer import AttentionTransfer
    from distillkit.distillers.channel_kd import ChannelKD
    from distillkit.distillers.dist import DIST
    from distillkit.distillers.dkd import DKD
    from distillkit.distillers.feature_imitation import FeatureImitation
    from distillkit.distillers.hard_token import HardToken
    from distillkit.distillers.ld import LD
    from distillkit.distillers.local_to_global import LocalToGlobal
    from distillkit.distillers.logit_kd import LogitKD
    from distillkit.distillers.pairwise_kd import PairwiseKD
    from distillkit.distillers.pixel_kd import PixelKD
    from distillkit.distillers.query_kd import QueryKD, QueryLD
    from distillkit.distillers.relational_kd import RelationalKD
    from distillkit.distillers.self_ld import SelfLD
    from distillkit.distillers.text import AttentionMaps, HiddenStates
    from distillkit.distillers.token_labeling import TokenLabeling
    from distillkit.plugins import register_data, register_distiller, register_model


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'distillkit' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
