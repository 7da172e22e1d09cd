"""The recipe of each task: which blocks it has, how it is scored, and the rows that it compares."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from distillkit.explain import blocks_in, nearest
from distillkit.schema.base import Count, NotNegative, Positive, Share, Split, Strict
from distillkit.schema.data import (
    CifarData,
    ClassData,
    CocoData,
    CustomClassData,
    CustomData,
    Data,
    DigitData,
    DotaData,
    FolderData,
    HrscData,
    RotatedData,
    SceneData,
    TarData,
    VocData,
)
from distillkit.schema.distillers import ClassDistiller, Distiller, MaskDistiller, WeakDistiller
from distillkit.schema.mask_data import MaskData
from distillkit.schema.models import (
    ClassModel,
    ClassTeacherModel,
    CustomModel,
    CustomTeacher,
    DeepLabModel,
    DeepLabTeacher,
    FANetModel,
    FANetTeacher,
    GFLModel,
    GFLTeacher,
    MaskModel,
    MaskTeacherModel,
    MMDetModel,
    MMDetTeacher,
    MMRotateModel,
    MMRotateTeacher,
    Model,
    NanoDetModel,
    NanoDetTeacher,
    RotatedGFLModel,
    RotatedGFLTeacher,
    RotatedModel,
    RotatedRetinaModel,
    RotatedRetinaTeacher,
    RotatedTeacherModel,
    TeacherModel,
    TimmModel,
    TimmTeacher,
    TorchvisionModel,
    TorchvisionTeacher,
    TransformersModel,
    TransformersTeacher,
    UltralyticsModel,
    UltralyticsTeacher,
)
from distillkit.schema.search import Search
from distillkit.schema.text import EvaluateTexts, GlueData, TextData, TextDistiller, TextModel, TextTeacherModel
from distillkit.schema.train import Train
from distillkit.schema.weak import (
    Cam,
    CamModel,
    CamTeacher,
    EvaluateLabels,
    LabelData,
    Masks,
    Segment,
    WeakModel,
    WeakTeacherModel,
)


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
    data: dict[str, Any] = {}
    """Keys of `data` that are different in what this row is trained on; it is judged like the others."""
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


class EvaluateClasses(Strict):
    """Where a classifier is scored."""

    split: Split = "val"


class EvaluateMasks(Strict):
    """How a segmentation model is scored, in pixels of the masks' files."""

    split: Split = "val"
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """Probabilities are averaged over the picture at these times its size."""
    flip: bool = False
    """And over its mirror image."""
    metrics: Literal["pixels", "trans10k"] = "pixels"
    """trans10k: beside the numbers of all classes those of Trans10K, of what is no background, at the network's size:
    IoU, accuracy, mean absolute error and balanced error rate."""


class MaskLoss(Strict):
    """What a segmentation model learns from the masks: cross entropy, and the losses of its other outputs."""

    boundary_weight: NotNegative = 1.0
    """Weight of the boundary stream's loss (FANet; 5 in TransLab)."""
    aux_weight: NotNegative = 0.4
    """Weight of an auxiliary head's cross entropy."""
    boundary_activation: Literal["sigmoid", "none"] = "sigmoid"
    """none: on raw logits, as the releases of FANet and TransLab have it."""


class _Recipe(Strict):
    """What runs of all tasks have; the blocks that are Any here are the task's own."""

    SCORES: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75")
    """What models are judged by; the first chooses the best checkpoint."""

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
    distillers: Any = []
    train: Train = Train()
    evaluate: Any
    compare: list[Annotated[Row, BeforeValidator(_worded, json_schema_input_type=str | Row)]] = [
        Row(row="student", distillers="none"),
        Row(row="distilled"),
    ]
    """Rows of the final table: `student`, `distilled`, or a row with its own settings."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Columns of the table: ``SCORES``, and what else the recipe asks for."""
        return self.SCORES


class DetectionRecipe(_Recipe):
    """A run for object detection."""

    task: Literal["detection"] = "detection"
    data: Data
    teacher: TeacherModel | None = None
    teachers: dict[str, TeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: Model
    distillers: list[Distiller] = []
    evaluate: Evaluate = Evaluate()


class RotatedRecipe(_Recipe):
    """A run for the detection of rotated objects."""

    task: Literal["rotated-detection"]
    data: RotatedData
    teacher: RotatedTeacherModel | None = None
    teachers: dict[str, RotatedTeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: RotatedModel
    distillers: list[Distiller] = []
    evaluate: RotatedEvaluate = RotatedEvaluate()


class ClassificationRecipe(_Recipe):
    """A run for the classification of pictures."""

    SCORES: ClassVar[tuple[str, ...]] = ("top1", "top5")

    task: Literal["classification"]
    data: ClassData
    teacher: ClassTeacherModel | None = None
    teachers: dict[str, ClassTeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: ClassModel
    distillers: list[ClassDistiller] = []
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the labels, in the cross entropy that a student learns from."""
    search: Search | None = None
    """What `distillkit search` does before the student, then `model: autospace`, can be trained."""
    evaluate: EvaluateClasses = EvaluateClasses()


class SegmentationRecipe(_Recipe):
    """A run for semantic segmentation."""

    SCORES: ClassVar[tuple[str, ...]] = ("miou", "boundary_iou", "pixel_accuracy")

    task: Literal["segmentation"]
    data: MaskData
    teacher: MaskTeacherModel | None = None
    teachers: dict[str, MaskTeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: MaskModel
    distillers: list[MaskDistiller] = []
    loss: MaskLoss = MaskLoss()
    evaluate: EvaluateMasks = EvaluateMasks()

    @property
    def scores(self) -> tuple[str, ...]:
        more = ("trans10k_miou", "trans10k_accuracy", "trans10k_mae", "trans10k_mber")
        return (*self.SCORES, *(more if self.evaluate.metrics == "trans10k" else ()))


class WeakRow(Row):
    """One training run, and one row of the final table."""

    masks: Literal["pseudo", "true"] = "pseudo"
    """true: the segmentation model learns from the true masks, as an upper bound; the row needs no classifier then:
    train: {epochs: 0}."""


_WeakRows = list[Annotated[WeakRow, BeforeValidator(_worded, json_schema_input_type=str | WeakRow)]]


class WeakRecipe(_Recipe):
    """A run for segmentation from image-level labels: activation maps, pseudo masks, a segmentation model."""

    SCORES: ClassVar[tuple[str, ...]] = ("cam_miou", "mask_miou", "miou")

    task: Literal["weak-segmentation"]
    data: LabelData
    teacher: WeakTeacherModel | None = None
    teachers: dict[str, WeakTeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: WeakModel
    """The classifier whose activation maps are used."""
    distillers: list[WeakDistiller] = []
    cam: Cam = Cam()
    masks: Masks = Masks()
    segment: Segment | None = None
    """null: a run ends with the activation maps."""
    evaluate: EvaluateLabels = EvaluateLabels()
    compare: _WeakRows = [  # type: ignore[assignment]  # nothing adds to a recipe's rows, so theirs may be others
        WeakRow(row="student", distillers="none"),
        WeakRow(row="distilled"),
    ]
    """Rows of the final table: `student`, `distilled`, or a row with its own settings."""


class TextRecipe(_Recipe):
    """A run for the classification of sentences and pairs of them, or a regression on them."""

    SCORES: ClassVar[tuple[str, ...]] = ("score",)

    task: Literal["text"]
    data: TextData
    teacher: TextTeacherModel | None = None
    teachers: dict[str, TextTeacherModel] = {}
    """Several teachers by name, instead of `teacher`."""
    student: TextModel
    distillers: list[TextDistiller] = []
    evaluate: EvaluateTexts = EvaluateTexts()

    @property
    def scores(self) -> tuple[str, ...]:
        """Those of the task, and their mean where there are several; GLUE's are known behind the schema."""
        if isinstance(self.data, GlueData):
            both, related = ("accuracy", "f1"), ("pearson", "spearman")
            of_task = {"cola": ("matthews",), "stsb": related, "mrpc": both, "qqp": both}
            names = of_task.get(self.data.task, ("accuracy",))
        else:
            names = tuple(self.data.metrics)
        return names if len(names) == 1 else ("score", *names)


#: One more task is one more class here.
TASKS: dict[str, type[_Recipe]] = {
    "detection": DetectionRecipe,
    "rotated-detection": RotatedRecipe,
    "classification": ClassificationRecipe,
    "segmentation": SegmentationRecipe,
    "weak-segmentation": WeakRecipe,
    "text": TextRecipe,
}
BoxRecipe = DetectionRecipe | RotatedRecipe
Recipe = BoxRecipe | ClassificationRecipe | SegmentationRecipe | WeakRecipe | TextRecipe


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


#: of any task
AnyModel = (
    GFLModel
    | NanoDetModel
    | RotatedGFLModel
    | RotatedRetinaModel
    | TimmModel
    | DeepLabModel
    | FANetModel
    | CamModel
    | MMDetModel
    | MMRotateModel
    | TorchvisionModel
    | TransformersModel
    | UltralyticsModel
    | CustomModel
)
AnyTeacher = (
    GFLTeacher
    | NanoDetTeacher
    | RotatedGFLTeacher
    | RotatedRetinaTeacher
    | TimmTeacher
    | DeepLabTeacher
    | FANetTeacher
    | CamTeacher
    | MMDetTeacher
    | MMRotateTeacher
    | TorchvisionTeacher
    | TransformersTeacher
    | UltralyticsTeacher
    | CustomTeacher
)
AnyDistiller = Distiller | ClassDistiller | MaskDistiller | WeakDistiller | TextDistiller
AnyEvaluate = Evaluate | EvaluateClasses | EvaluateMasks | EvaluateLabels | EvaluateTexts
AnyClassData = FolderData | CifarData | TarData | DigitData | CustomClassData
BoxData = CocoData | VocData | SceneData | DotaData | HrscData | CustomData
