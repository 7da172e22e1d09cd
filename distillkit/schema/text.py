"""`task: text`: sentences, and pairs of them, in TSV files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distillkit.schema.base import Count, Split, Strict
from distillkit.schema.distillers import (
    DIST,
    DKD,
    ClassLogitKD,
    CustomDistiller,
    HardToken,
    Paths,
    Weight,
    WeightSchedule,
    _FromTeacher,
)
from distillkit.schema.models import CustomModel, CustomTeacher, TransformersModel, TransformersTeacher


class _TextData(Strict):
    vocabulary: str | Count = 4000
    """A file with one piece a line, as BERT's vocab.txt; or how many pieces are learned from the training split."""
    length: Annotated[int, Field(ge=8)] = 128
    """Most tokens of a sample; what is longer is cut."""
    batch: Count = 32
    """Samples a process and step."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes; 0 loads in the training process."""

    @property
    def size(self) -> None:
        """Of pictures; there are none."""
        return None


class TsvData(_TextData):
    """Files with a sample a line: its label, then a text or two, by tabs."""

    kind: Literal["tsv"]
    train: str = "train.tsv"
    val: str = "val.tsv"
    test: str | None = None
    labels: str | list[str] | None = None
    """A file with one label a line, or the labels; null: those of the training split, by the alphabet."""
    label_column: Annotated[int, Field(ge=0)] = 0
    text_columns: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=2)] = [1]
    metrics: Annotated[list[Literal["accuracy", "f1", "matthews"]], Field(min_length=1)] = ["accuracy"]
    """Their mean is the score; f1 and matthews are of two classes, the second of which is the positive one."""


class GlueData(_TextData):
    """The files of a task of GLUE, with its columns, labels and metrics."""

    kind: Literal["glue"]
    root: str
    """Folder with train.tsv and dev.tsv."""
    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    train: str = "train"
    val: str = "val"
    test: str | None = None
    """Another .tsv in the folder that has labels, as dev_mismatched.tsv."""
    doubled: bool = True
    """Pairs whose order says nothing (mrpc, stsb) are learned in both orders, as published."""


class HiddenStates(_FromTeacher):
    """The teacher's hidden states, real tokens alone, with a projection where widths differ."""

    kind: Literal["hidden-states"]
    student_at: Paths
    """Module paths of the student's layers, as lvbert.layers.3."""
    teacher_at: Paths
    weight: Weight = WeightSchedule(value=1.0)


class AttentionMaps(_FromTeacher):
    """Where the teacher's tokens look; both models need options: {attn_implementation: eager}."""

    kind: Literal["attention-maps"]
    student_at: Paths
    """Module paths of attention weights, as lvbert.layers.2.attention[1]."""
    teacher_at: Paths
    heads: Literal["mean", "each"] = "mean"
    """mean: over the heads, whose numbers may differ. each: head by head."""
    weight: Weight = WeightSchedule(value=1.0)


TextData = Annotated[TsvData | GlueData, Field(discriminator="kind")]
TextModel = Annotated[TransformersModel | CustomModel, Field(discriminator="kind")]
TextTeacherModel = Annotated[TransformersTeacher | CustomTeacher, Field(discriminator="kind")]
TextDistiller = Annotated[
    ClassLogitKD | DKD | DIST | HardToken | HiddenStates | AttentionMaps | CustomDistiller,
    Field(discriminator="kind"),
]


class EvaluateTexts(Strict):
    """Where a model of text is scored."""

    split: Split = "val"
