"""The `distillers` block of a recipe as distillers, and the student wrapped with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distillkit import plugins, schema
from distillkit.adapters import adapter_for, own_adapter
from distillkit.adapters.classifier import Classifier, is_classifier
from distillkit.adapters.segmenter import Segmenter
from distillkit.api import wrap
from distillkit.boxes.merged import Merged
from distillkit.boxes.regions import Main, MainAndValuable, Region, Valuable
from distillkit.core.adapter import Adapter, logits_in
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.teacher import Teacher
from distillkit.core.wrap import DistilledModel
from distillkit.distillers.attention_transfer import AttentionTransfer
from distillkit.distillers.channel_kd import ChannelKD
from distillkit.distillers.dist import DIST
from distillkit.distillers.dkd import DKD
from distillkit.distillers.feature_imitation import FeatureImitation
from distillkit.distillers.hard_token import HardToken
from distillkit.distillers.ld import LD
from distillkit.distillers.local_to_global import LocalToGlobal, classification_loss
from distillkit.distillers.logit_kd import LogitKD
from distillkit.distillers.pairwise_kd import PairwiseKD
from distillkit.distillers.pixel_kd import PixelKD
from distillkit.distillers.query_kd import QueryKD, QueryLD
from distillkit.distillers.relational_kd import RelationalKD
from distillkit.distillers.self_ld import SelfLD
from distillkit.distillers.text import AttentionMaps, HiddenStates
from distillkit.distillers.token_labeling import TokenLabeling
from distillkit.evaluation.classes import moments
from distillkit.evaluation.segmentation import pixel_logits_in
from distillkit.losses.segmentation import SegmentationLoss
from distillkit.models.segmentation import resized
from distillkit.schema import Recipe
from distillkit.training.build.models import build_model, own_classes, teacher_configs
from distillkit.training.errors import RunError

#: distillers whose keys are the arguments of their class
BY_KEYS: dict[type, type[Distiller]] = {
    schema.FeatureImitation: FeatureImitation,
    schema.TokenLabeling: TokenLabeling,
    schema.ClassLogitKD: LogitKD,
    schema.DKD: DKD,
    schema.DIST: DIST,
    schema.HardToken: HardToken,
    schema.AttentionTransfer: AttentionTransfer,
    schema.RelationalKD: RelationalKD,
    schema.ChannelKD: ChannelKD,
    schema.PairwiseKD: PairwiseKD,
    schema.PixelKD: PixelKD,
    schema.HiddenStates: HiddenStates,
    schema.AttentionMaps: AttentionMaps,
    schema.QueryKD: QueryKD,
    schema.QueryLD: QueryLD,
}


def build_distillers(
    recipe: Recipe, names: Literal["all", "none"] | list[str], classes: int, train: schema.Train
) -> list[Distiller]:
    """The distillers of a row that is trained as ``train`` says. Schedules of their weights count training calls, of
    which an optimizer step makes ``train.accumulate``."""
    if names == "none":
        return []
    chosen = [config for config in recipe.distillers if names == "all" or config.name in names]
    return [_distiller(config, recipe, classes, train.accumulate) for config in chosen]


def _distiller(config: schema.AnyDistiller, recipe: Recipe, classes: int, calls: int) -> Distiller:
    """``calls``: training calls an optimizer step."""
    w = config.weight
    weight = Weight(w.value, w.kind, w.steps * calls, w.end)
    if isinstance(config, schema.LD):
        return LD(
            region=_region(config),
            temperature=config.temperature,
            weight=weight,
            anchor_weight=config.anchor_weight,
            convention=config.convention,
            teacher=config.teacher,
            bin_reduction=config.bin_reduction,
            normalize=config.normalize,
            name=config.name,
        )
    if isinstance(config, schema.SelfLD):
        return SelfLD(
            region=_region(config),
            temperature=config.temperature,
            weight=weight,
            checkpoint=_earlier_student(config, recipe, classes),
            decay=config.decay,
            anchor_weight=config.anchor_weight,
            convention=config.convention,
            bin_reduction=config.bin_reduction,
            normalize=config.normalize,
            name=config.name,
        )
    if type(config) in BY_KEYS:
        keys = config.model_dump(exclude={"kind", "weight"})
        if isinstance(recipe, schema.ClassificationRecipe) and keys.get("smoothing", 0) is None:
            keys["smoothing"] = recipe.smoothing
        return BY_KEYS[type(config)](**keys, weight=weight)
    if isinstance(config, schema.LocalToGlobal):
        keys = config.model_dump(exclude={"kind", "weight", "saliency"})
        return LocalToGlobal(saliency="targets" if config.saliency else None, **keys, weight=weight)
    if isinstance(config, schema.LogitKD):
        return LogitKD(
            region=_region(config),
            temperature=config.temperature,
            weight=weight,
            protocol=config.protocol,
            anchor_weight=config.anchor_weight,
            convention=config.convention,
            teacher=config.teacher,
            name=config.name,
        )
    assert isinstance(config, schema.CustomDistiller)
    built = plugins.build("distiller", config.name, **config.options)
    built.name, built.weight, built.teacher = config.name, weight, config.teacher
    return built


def _region(config: schema.LD | schema.SelfLD | schema.LogitKD) -> Region:
    main = Main(overlap=config.overlap)
    valuable = Valuable(config.gamma, config.measure, overlap=config.overlap)
    match config.region:
        case "main":
            return main
        case "valuable":
            return valuable
        case "main+valuable":
            return MainAndValuable(main, valuable)
        case "merged":
            return Merged(config.gamma, config.overlap)


def _earlier_student(config: schema.SelfLD, recipe: Recipe, classes: int) -> nn.Module | None:
    if config.source == "ema":
        return None
    student = recipe.student.model_copy(update={"checkpoint": config.checkpoint})
    return build_model(student, classes, recipe.evaluate, recipe.data.size)


def build_wrapped(
    recipe: Recipe,
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    distillers: Iterable[Distiller],
    names: Sequence[str] | None = None,
) -> DistilledModel:
    """The student with its distillers, those teachers that they learn from, and its task's loss, unless the student
    computes that by itself or a distiller holds it. names: those of the data's classes, by label."""
    distillers = list(distillers)
    # None: the only one there is
    named = {d.teacher for d in distillers if d.own_teacher() is None and not d.taught_by_targets}
    chosen = {
        name: _teacher(teachers[name], config)
        for name, config in teacher_configs(recipe).items()
        if name in named or None in named
    }
    if isinstance(recipe, schema.ClassificationRecipe):
        return _classifier(recipe, student, chosen, distillers, names)
    if isinstance(recipe, schema.SegmentationRecipe):
        return _segmenter(recipe, student, chosen, distillers, names)
    if isinstance(recipe, schema.WeakRecipe):
        return _weak_classifier(student, chosen, distillers, names)
    _check_forms(recipe, student, {name: teacher.model for name, teacher in chosen.items()})
    return wrap(student, chosen, distillers, classes=names)


def _teacher(model: nn.Module, config: schema.AnyTeacher) -> Teacher:
    return Teacher(
        model,
        dtype=_dtype(config.dtype),
        fold_bn=config.fold_bn,
        classes=own_classes(config),
        missing=config.missing,
        levels=config.levels,
        scale=config.scale,
    )


def _check_forms(recipe: Recipe, student: nn.Module, teachers: Mapping[str, nn.Module]) -> None:
    """Raises RunError for a detector whose teacher takes another kind of batch."""
    form = adapter_for(student).form
    for name, teacher in teachers.items():
        if (other := adapter_for(teacher).form) != form:
            kind = teacher_configs(recipe)[name].kind
            raise RunError(
                f"teacher {name!r} (kind: {kind}) is called {other}, the student (kind: {recipe.student.kind}) {form}, "
                "and a teacher sees the student's batch: take both from one package; gfl, nanodet, torchvision and "
                "custom models are called alike"
            )


def _classifier(
    recipe: schema.ClassificationRecipe,
    student: nn.Module,
    teachers: Mapping[str, Teacher],
    distillers: Sequence[Distiller],
    names: Sequence[str] | None,
) -> DistilledModel:
    if any(isinstance(d, HardToken) and d.student_at == "head_dist" for d in distillers):
        student.set_distilled_training(True)  # type: ignore[operator]  # else the labels would teach both heads
    own = any(distiller.is_task for distiller in distillers)
    criterion = None if own else CrossEntropy(recipe.smoothing)
    for teacher in teachers.values():
        teacher.adapter = _normalised(teacher.model, _of_classifier(teacher.model))
    adapter = _normalised(student, _of_classifier(student))
    return wrap(student, teachers, distillers, criterion, adapter, names)


def _of_classifier(model: nn.Module) -> Adapter:
    return own_adapter(model) or (Classifier() if is_classifier(model) else adapter_for(model))


def _normalised(model: nn.Module, adapter: Adapter) -> Adapter:
    """A model's adapter, that says what batches are normalised with for it."""
    adapter.norm = adapter.norm or moments(model)
    return adapter


def _segmenter(
    recipe: schema.SegmentationRecipe,
    student: nn.Module,
    teachers: Mapping[str, Teacher],
    distillers: Sequence[Distiller],
    names: Sequence[str] | None,
) -> DistilledModel:
    for teacher in teachers.values():
        teacher.adapter = _normalised(teacher.model, adapter_for(teacher.model, Segmenter()))
    adapter = _normalised(student, adapter_for(student, Segmenter()))
    criterion = PixelLoss(SegmentationLoss(**recipe.loss.model_dump()))
    return wrap(student, teachers, distillers, criterion, adapter, names)


def _weak_classifier(
    student: nn.Module,
    teachers: Mapping[str, Teacher],
    distillers: Sequence[Distiller],
    names: Sequence[str] | None,
) -> DistilledModel:
    own = any(distiller.is_task for distiller in distillers)
    criterion = None if own else lambda output, targets: classification_loss(output, targets["labels"])
    adapter = adapter_for(student)
    adapter.norm = adapter.norm or moments(student)  # what batches are normalised with
    return wrap(student, teachers, distillers, criterion, adapter, names)


class PixelLoss:
    """The criterion of any segmentation model: logits that are coarser than the masks are brought to their size."""

    def __init__(self, criterion: SegmentationLoss):
        self.criterion = criterion

    def __call__(self, output: Any, targets: Mapping[str, Any]) -> dict[str, Tensor]:
        found = dict(output) if isinstance(output, Mapping) else {"out": output}
        logits, size = pixel_logits_in(output), targets["masks"].shape[-2:]
        if isinstance(logits, Tensor) and logits.shape[-2:] != size:
            logits = resized(logits.float(), size)
        return self.criterion({**found, "out": logits}, targets)


class CrossEntropy:
    """Of classes (B,), or of the mixtures of them that mixup makes, (B, C)."""

    def __init__(self, smoothing: float):
        self.smoothing = smoothing

    def __call__(self, output: Any, targets: Any) -> Tensor:
        logits = logits_in(output, "the student")  # DeiT's class head, beside its distillation head
        labels = targets["labels"] if isinstance(targets, Mapping) else targets
        return cross_entropy(logits, labels, label_smoothing=self.smoothing)


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None
