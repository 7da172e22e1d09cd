"""`distillers`: the methods, with the keys of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from distillkit.located import said
from distillkit.schema.base import Count, Decay, NotNegative, Positive, Share, Strict


class WeightSchedule(Strict):
    """A loss weight over the optimizer steps; a plain number in a recipe means `constant`."""

    value: float
    kind: Literal["constant", "warmup", "linear", "cosine", "until"] = "constant"
    steps: Annotated[int, Field(ge=0)] = 0
    end: float = 0.0

    @model_validator(mode="after")
    def _needs_steps(self) -> WeightSchedule:
        if self.kind != "constant" and self.steps < 1:
            raise ValueError(f"a weight of kind {self.kind!r} needs steps >= 1")
        if self.kind == "constant" and (self.steps or self.end):
            raise ValueError(
                "steps and end are for a weight that changes: give its kind: warmup, linear, cosine or until"
            )
        return self


def _constant(value: Any) -> Any:
    if isinstance(value, int | float):
        return {"value": value}
    if not isinstance(value, dict | WeightSchedule):
        raise ValueError(f"expected a number, or a mapping with value, kind, steps and end; got {said(value)}")
    return value


Weight = Annotated[WeightSchedule, BeforeValidator(_constant, json_schema_input_type=float | WeightSchedule)]
Region = Literal["main", "valuable", "main+valuable", "merged"]
Paths = str | list[str]


class _Distiller(Strict):
    name: str | None = None
    """Key of its loss in logs and tables; null: the kind, and the region too where several are of one kind."""


class _FromTeacher(_Distiller):
    teacher: str | None = None
    """Which of `teachers` it learns from, where there are several."""


class _InRegion(_Distiller):
    region: Region = "main"
    """Which anchors take part; main are the positives of ATSS, whatever the detector itself chooses by."""
    gamma: Share = 0.25
    """Lower bound of the valuable region, as a share of the assigner's threshold."""
    measure: Literal["diou", "release", "iou"] = "diou"
    """Overlap that bounds the valuable region; `release` is the published code's."""
    overlap: Literal["rotated", "enclosing", "angle-free"] = "rotated"
    """What of a rotated object anchors are compared with: itself, the upright box around it, or its box with the angle
    left out, as the published code has it."""

    @model_validator(mode="after")
    def _main_has_no_bound(self) -> Self:
        if self.region == "main" and (self.gamma, self.measure) != (0.25, "diou"):
            raise ValueError("gamma and measure bound the valuable region, and region: main has none; leave them out")
        if self.region == "merged" and self.measure != "diou":
            raise ValueError("measure bounds the valuable region; region: merged is bounded by overlap alone")
        return self


class _LD(_InRegion):
    temperature: Annotated[float, Field(ge=1)] = 10.0
    weight: Weight = WeightSchedule(value=0.25)
    anchor_weight: Literal["score", "iou", "one"] | None = None
    """What each anchor's loss is multiplied by; null: score in the main region, IoU in the valuable one."""
    convention: Literal["default", "release"] = "default"
    """`release`: summed up as the published code does; the default keeps its strength at any batch size."""
    bin_reduction: Literal["mean", "sum"] = "mean"
    """Over the bins of an edge: `mean` as the published code, `sum` the textbook's KL, larger by the number of bins."""
    normalize: Literal["images", "weight_sum", "num_pos", "none"] = "images"
    """What the sum over anchors is divided by: a third of the images, the anchors' weights, their number, nothing."""

    @model_validator(mode="after")
    def _one_sum(self) -> Self:
        if self.convention == "release" and self.normalize != "images":
            raise ValueError(f"convention: release has its own sum; leave out normalize: {self.normalize}")
        return self


class LD(_LD, _FromTeacher):
    """Localization distillation: the teacher's distribution over the place of every box edge."""

    kind: Literal["ld"]


class LogitKD(_InRegion, _FromTeacher):
    """Class distillation on the logits."""

    kind: Literal["logit-kd"]
    protocol: Literal["softmax", "sigmoid"] = "softmax"
    anchor_weight: Literal["score", "iou", "one"] = "one"
    """What each anchor's loss is multiplied by."""
    temperature: Annotated[float, Field(ge=1)] = 2.0
    weight: Weight = WeightSchedule(value=10.0)
    convention: Literal["default", "release"] = "default"


class FeatureImitation(_FromTeacher):
    """Mean squared difference of feature maps, with a projection where widths differ."""

    kind: Literal["feature-imitation"]
    region: Literal["whole", "boxes", "gi", "fine-grained"] = "whole"
    """Which cells take part."""
    weight: Weight = WeightSchedule(value=2.0)
    convention: Literal["default", "release"] = "default"
    student_at: Paths | None = None
    """Module paths of the student's maps; null: the detector's pyramid."""
    teacher_at: Paths | None = None


class SelfLD(_LD):
    """Localization distillation from the student's own average, or from an earlier checkpoint of it."""

    kind: Literal["self-ld"]
    source: Literal["ema", "checkpoint"] = "ema"
    decay: Decay = 0.999
    checkpoint: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SelfLD:
        if (self.source == "checkpoint") != (self.checkpoint is not None):
            raise ValueError("source: checkpoint needs `checkpoint: FILE`, and only then may there be one")
        if self.source == "checkpoint" and self.decay != 0.999:
            raise ValueError("decay is for source: ema; an earlier checkpoint does not change: leave decay out")
        return self


Temperature = Annotated[float, Field(ge=1)]


class QueryKD(_FromTeacher):
    """Of detectors with queries (DETR, RT-DETR, D-FINE): the class and the box that the teacher's queries say."""

    kind: Literal["query-kd"]
    temperature: Temperature = 1.0
    weight: Weight = WeightSchedule(value=1.0)
    classes: NotNegative = 1.0
    """Weight of the classes; 0: boxes alone."""
    l1: NotNegative = 5.0
    """Weight of the distance of the boxes, in shares of the picture."""
    giou: NotNegative = 2.0
    """Weight of 1 - GIoU."""


class QueryLD(_FromTeacher):
    """Of D-FINE: the teacher's distribution over the place of every edge, in every layer of the decoder."""

    kind: Literal["query-ld"]
    temperature: Temperature = 5.0
    weight: Weight = WeightSchedule(value=1.0)


class ClassLogitKD(_FromTeacher):
    """The teacher's class probabilities (Hinton et al.)."""

    kind: Literal["logit-kd"]
    temperature: Temperature = 4.0
    weight: Weight = WeightSchedule(value=1.0)
    protocol: Literal["softmax", "sigmoid"] = "softmax"


class DKD(_FromTeacher):
    """The teacher's probability of the true class, and its distribution over the others, apart (decoupled KD)."""

    kind: Literal["dkd"]
    alpha: NotNegative = 1.0
    """Weight of the true class's part."""
    beta: NotNegative = 8.0
    """Weight of the other classes' part."""
    temperature: Temperature = 4.0
    weight: Weight = WeightSchedule(value=1.0)


class DIST(_FromTeacher):
    """The teacher's relations between classes, and between the pictures of a batch (correlations)."""

    kind: Literal["dist"]
    beta: NotNegative = 1.0
    """Weight of the relations between classes."""
    gamma: NotNegative = 1.0
    """Weight of the relations between pictures."""
    temperature: Temperature = 1.0
    weight: Weight = WeightSchedule(value=1.0)


class HardToken(_FromTeacher):
    """The class that the teacher finds most likely, as a label (DeiT's hard distillation)."""

    kind: Literal["hard-token"]
    student_at: str | None = None
    """Module path of the distillation head's logits, as head_dist; null: the student's output."""
    weight: Weight = WeightSchedule(value=1.0)


class AttentionTransfer(_FromTeacher):
    """Where the teacher's feature maps are strong."""

    kind: Literal["attention-transfer"]
    student_at: Paths
    """Module paths of the student's maps."""
    teacher_at: Paths
    p: Annotated[float, Field(ge=1)] = 2.0
    """Power of the activations."""
    weight: Weight = WeightSchedule(value=1.0)
    """1000 and more with convention: release, whose loss is that much smaller."""
    convention: Literal["default", "release"] = "default"


class RelationalKD(_FromTeacher):
    """Distances and angles between the teacher's features of the pictures of a batch."""

    kind: Literal["relational-kd"]
    student_at: str
    """Module path of the student's features."""
    teacher_at: str
    distance_weight: NotNegative = 25.0
    angle_weight: NotNegative = 50.0
    normalize: bool = False
    """Features are brought to unit length first, as in the published training of classifiers."""
    convention: Literal["default", "release"] = "default"
    weight: Weight = WeightSchedule(value=1.0)


class TokenLabeling(_FromTeacher):
    """What an annotator says of every cell, as the label of every token; with the loss of the class token."""

    kind: Literal["token-labeling"]
    source: Literal["teacher", "maps", "labels"] = "teacher"
    """teacher: it is asked on the same view. maps: data.label_maps, and no teacher runs. labels: every token gets the
    picture's class."""
    dense_weight: NotNegative | None = None
    """Weight of the tokens' loss against the class token's; null: 0.5, and 1 with convention: release."""
    mix_token: bool = True
    """Two pictures share one grid of tokens, mixed behind the patch embedding."""
    mix_at: str = "patch_embed"
    """Module of the student behind which they are mixed: in a ResNet, for example, maxpool."""
    ground_truth: bool = False
    """The class label is blended with the annotator's."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of all labels; null: the recipe's."""
    fill: Literal["auto", "zero", "min"] | None = None
    """Logit of the classes that a label map does not hold; null: auto, and zero with convention: release."""
    weight: Weight = WeightSchedule(value=1.0)
    convention: Literal["default", "release"] = "default"


class ChannelKD(_FromTeacher):
    """Where in the picture each of the teacher's channels, or classes, is strong (CWD)."""

    kind: Literal["channel-kd"]
    student_at: Paths | None = None
    """Module paths of feature maps; null: the logits."""
    teacher_at: Paths | None = None
    temperature: Temperature = 4.0
    weight: Weight = WeightSchedule(value=3.0)
    """Unless given, the paper's: 3 on logits, 50 on features."""

    @model_validator(mode="after")
    def _of_both(self) -> Self:
        if (self.student_at is None) != (self.teacher_at is None):
            raise ValueError("give student_at and teacher_at, to compare features, or neither, to compare logits")
        if self.student_at is not None and "weight" not in self.model_fields_set:
            self.weight = WeightSchedule(value=50.0)
        return self


class PixelKD(_FromTeacher):
    """The teacher's class probabilities at every pixel of a region."""

    kind: Literal["pixel-kd"]
    region: Literal["whole", "main", "valuable"] = "whole"
    """whole: every pixel. main: the labelled ones. valuable: the labelled ones near a border of classes."""
    width: Positive = 0.02
    """Of the valuable region, to either side of the border: below 1 a share of the masks' diagonal, else pixels."""
    temperature: Temperature = 1.0
    weight: Weight = WeightSchedule(value=1.0)
    student_at: str | None = None
    """Module path of the logits, where they are not the model's output."""
    teacher_at: str | None = None

    @model_validator(mode="after")
    def _valuable_has_a_width(self) -> Self:
        if self.region != "valuable" and self.width != 0.02:
            raise ValueError(f"width is for region: valuable, and region: {self.region} has none; leave it out")
        if self.width >= 1 and self.width != int(self.width):
            raise ValueError(f"width: expected a share below 1 or a whole number of pixels, got {self.width}")
        return self


class PairwiseKD(_FromTeacher):
    """How alike the places of a picture are to each other in the teacher's features (SKD)."""

    kind: Literal["pairwise-kd"]
    student_at: Paths
    """Module paths of the student's maps."""
    teacher_at: Paths
    pool_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Side of a patch, whose features are pooled, as a share of the map's."""
    pool: Literal["average", "max"] | None = None
    """Over a patch; null: average, and max with convention: release."""
    weight: Weight = WeightSchedule(value=1.0)
    convention: Literal["default", "release"] = "default"


class LocalToGlobal(_Distiller):
    """The attention of a copy of the student that sees crops of the pictures, trained in the same step (L2G)."""

    kind: Literal["local-to-global"]
    crops: Count = 4
    """Of each picture."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.7142857
    """Side of a crop as a share of the picture's; crops are not rescaled."""
    corners: bool = False
    """The first four crops are the picture's corners, as published for VOC."""
    saliency: bool = False
    """Shape transfer: targets are cut to data.saliency."""
    threshold: Share = 0.1
    """With saliency: strength above which a class is part of the target; 0.001 as published for VOC."""
    soft_background: bool = False
    """With saliency: the background keeps its strength, as published for COCO."""
    empty_saliency: Literal["attention", "zero"] | None = None
    """Crops without saliency learn attention, as in the paper, or that no class is there, as in the release; null:
    attention, and zero with convention: release."""
    weight: Weight = WeightSchedule(value=10.0)
    """30 as published for COCO, whose many channels share the mean."""
    convention: Literal["default", "release"] = "default"


class CustomDistiller(Strict):
    """A distiller that a package registered with `distillkit.register_distiller`."""

    kind: Literal["custom"]
    name: str
    """The registered name, and the key of its loss."""
    teacher: str | None = None
    weight: Weight = WeightSchedule(value=1.0)
    options: dict[str, Any] = {}


Distiller = Annotated[
    LD | LogitKD | FeatureImitation | SelfLD | QueryKD | QueryLD | CustomDistiller, Field(discriminator="kind")
]
ClassDistiller = Annotated[
    TokenLabeling
    | ClassLogitKD
    | DKD
    | DIST
    | HardToken
    | AttentionTransfer
    | RelationalKD
    | FeatureImitation
    | CustomDistiller,
    Field(discriminator="kind"),
]
WeakDistiller = Annotated[
    LocalToGlobal | ClassLogitKD | FeatureImitation | AttentionTransfer | CustomDistiller,
    Field(discriminator="kind"),
]
MaskDistiller = Annotated[
    ChannelKD | PixelKD | PairwiseKD | FeatureImitation | AttentionTransfer | CustomDistiller,
    Field(discriminator="kind"),
]
