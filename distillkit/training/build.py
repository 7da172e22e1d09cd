"""From the blocks of a recipe to objects: data, models, teachers, distillers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distillkit import plugins, schema
from distillkit import recipe as recipes
from distillkit.adapters import with_adapter
from distillkit.api import wrap
from distillkit.boxes.regions import Main, MainAndValuable, Region, Valuable
from distillkit.core.adapter import Adapter
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.teacher import Teacher
from distillkit.core.wrap import DistilledModel
from distillkit.data.coco import CocoDetection, read_coco
from distillkit.data.problems import DataError
from distillkit.data.scenes import Scenes
from distillkit.data.transforms import Augment, Resize, Transform
from distillkit.data.voc import VOC_CLASSES, VocDetection
from distillkit.distillers.feature_imitation import FeatureImitation
from distillkit.distillers.ld import LD
from distillkit.distillers.logit_kd import LogitKD
from distillkit.distillers.self_ld import SelfLD
from distillkit.models.backbones import explain_mismatch, read_weights
from distillkit.models.gfl import GFL, load_openmmlab
from distillkit.models.nanodet import NanoDet, nanodet
from distillkit.schema import Recipe
from distillkit.training import checkpoint
from distillkit.training.errors import RunError


class DetectionData(Protocol):
    """What a run asks of a detection set; see ``distillkit.data``."""

    classes: list[str]
    category_ids: list[int]

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]: ...
    def to_coco_json(self) -> dict[str, Any]: ...


def build_data(recipe: Recipe, split: Literal["train", "val", "test"], augmented: bool) -> Any:
    """The data of a split: a ``DetectionData``, augmented as the recipe says or only resized.

    Raises:
        RunError: the recipe has no such split. DataError: annotations that cannot be used.
    """
    data = recipe.data
    transform = _transform(data, augmented)
    source: Any = getattr(data, split, None)
    if source is None and not isinstance(data, schema.CustomData):
        raise RunError(f"data.{split} is not set in the recipe {recipe.name!r}: name the {split} split, or use another")
    if isinstance(data, schema.CocoData):
        return CocoDetection(data.root, source, data.images.format(split=split), transform, recipe.seed)
    if isinstance(data, schema.VocData):
        return VocDetection(data.root, source, data.classes, transform, recipe.seed)
    if isinstance(data, schema.SceneData):
        return Scenes(source, _pair(data.size), recipe.seed, split, _pair(data.digits), transform)
    return plugins.build("data", data.name, split=split, transform=transform, seed=recipe.seed, **data.options)


class Classes(NamedTuple):
    """classes: names by label. category_ids: the data's own number of each."""

    classes: list[str]
    category_ids: list[int]


def build_classes(recipe: Recipe) -> Classes:
    """The classes of a recipe's data, from the annotations of its val split alone: no picture need be there.

    Raises:
        DataError: annotations that name no class.
    """
    data = recipe.data
    if isinstance(data, schema.CocoData):
        there = read_coco(data.root, data.val, data.images.format(split="val"))
        if not there.classes:
            raise DataError(there.problems)
        return Classes(there.classes, there.category_ids)
    if isinstance(data, schema.VocData):
        names = data.classes or VOC_CLASSES
        return Classes(list(names), list(range(1, len(names) + 1)))
    built = build_data(recipe, "val", augmented=False)
    return Classes(built.classes, built.category_ids)


def build_resize(data: schema.Data) -> Resize:
    """How pictures become the network's input wherever nothing is drawn at random: evaluation and prediction."""
    return Resize(_pair(data.size), data.keep_ratio, data.pad)


def _transform(data: schema.Data, augmented: bool) -> Transform:
    if not augmented:
        return build_resize(data)
    a = data.augment
    return Augment(
        _pair(data.size),
        data.keep_ratio,
        data.pad,
        flip=a.flip,
        crop=a.crop.min_scale if a.crop else None,
        multi_scale=_pair(a.multi_scale) if a.multi_scale else None,
        mosaic=a.mosaic,
        color=a.color,
    )


def build_model(config: schema.Model | schema.TeacherModel, classes: int, evaluate: schema.Evaluate) -> nn.Module:
    """A detector for ``classes`` classes, with the weights of its ``checkpoint`` where there is one, in train mode.

    Raises:
        RunError: a detector that cannot have this number of classes; a registered builder that returns something else
            than a model, or a model and its adapter.
        CheckpointError, ValueError, FileNotFoundError: its weights cannot be read, or do not fit.
    """
    if isinstance(config, schema.GFLModel):
        model: nn.Module = GFL(
            classes,
            config.backbone,
            config.pretrained,
            strides=config.strides,
            channels=config.channels,
            convs=config.convs,
            groups=math.gcd(config.channels, 32),
            bins=config.bins,
            frozen_stages=config.frozen_stages,
        )
    elif isinstance(config, schema.NanoDetModel):
        model = _nanodet(config, classes)
    else:
        model = _custom(config, classes)
    if config.checkpoint:
        load_checkpoint(model, Path(config.checkpoint))
    if isinstance(model, GFL | NanoDet):
        model.inference = replace(model.inference, score=evaluate.score, iou=evaluate.iou, most=evaluate.most)
    return model.train()


def _nanodet(config: schema.NanoDetModel, classes: int) -> nn.Module:
    model = nanodet(config.variant, config.folder, config.convention)
    if config.weights == "none":
        return model.reset().new_head(classes)
    if config.weights == "new-head":
        return model.new_head(classes)
    if classes != model.num_classes:
        raise RunError(
            f"{config.variant} was trained for {model.num_classes} classes, the data have {classes}: "
            "set weights: new-head, or weights: none"
        )
    return model


def _custom(config: schema.CustomModel, classes: int) -> nn.Module:
    built = plugins.build("model", config.name, classes=classes, **config.options)
    match built:
        case nn.Module():
            return built
        case (nn.Module() as model, Adapter() as adapter):
            return with_adapter(model, adapter)
    got = f"({', '.join(type(part).__name__ for part in built)})" if isinstance(built, tuple) else type(built).__name__
    raise RunError(f"the builder of model {config.name!r}: expected it to return model or (model, adapter), got {got}")


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights of the whole model: ours (safetensors), OpenMMLab's of a GFL, or a state dict saved by torch."""
    if path.suffix == ".safetensors":
        checkpoint.load_into(model, path)
    elif isinstance(model, GFL):
        load_openmmlab(model, path)
    else:
        weights = read_weights(path)
        explain_mismatch(path, model.state_dict(), weights)
        model.load_state_dict(weights)


def build_distillers(
    recipe: Recipe, names: Literal["all", "none"] | list[str], classes: int, train: schema.Train
) -> list[Distiller]:
    """The distillers of a row that is trained as ``train`` says. Schedules of their weights count training calls, of
    which an optimizer step makes ``train.accumulate``."""
    if names == "none":
        return []
    chosen = [config for config in recipe.distillers if names == "all" or config.name in names]
    return [_distiller(config, recipe, classes, train.accumulate) for config in chosen]


def _distiller(config: schema.Distiller, recipe: Recipe, classes: int, calls: int) -> Distiller:
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
    if isinstance(config, schema.LogitKD):
        return LogitKD(
            region=_region(config),
            temperature=config.temperature,
            weight=weight,
            protocol=config.protocol,
            convention=config.convention,
            teacher=config.teacher,
            name=config.name,
        )
    if isinstance(config, schema.FeatureImitation):
        return FeatureImitation(
            region=config.region,
            weight=weight,
            convention=config.convention,
            student_at=config.student_at,
            teacher_at=config.teacher_at,
            teacher=config.teacher,
            name=config.name,
        )
    built = plugins.build("distiller", config.name, **config.options)
    built.name, built.weight, built.teacher = config.name, weight, config.teacher
    return built


def _region(config: schema.LD | schema.SelfLD | schema.LogitKD) -> Region:
    valuable = Valuable(config.gamma, config.measure)
    if config.region == "main":
        return Main()
    return valuable if config.region == "valuable" else MainAndValuable(Main(), valuable)


def _earlier_student(config: schema.SelfLD, recipe: Recipe, classes: int) -> nn.Module | None:
    if config.source == "ema":
        return None
    student = recipe.student.model_copy(update={"checkpoint": config.checkpoint})
    return build_model(student, classes, recipe.evaluate)


def build_wrapped(
    recipe: Recipe, student: nn.Module, teachers: Mapping[str, nn.Module], distillers: Iterable[Distiller]
) -> DistilledModel:
    """The student with its distillers and those teachers that they learn from."""
    distillers = list(distillers)
    named = {d.teacher for d in distillers if d.own_teacher() is None}  # None: the only one there is
    chosen = {
        name: Teacher(teachers[name], dtype=_dtype(config.dtype), fold_bn=config.fold_bn)
        for name, config in teacher_configs(recipe).items()
        if name in named or None in named
    }
    return wrap(student, chosen, distillers)


def teacher_configs(recipe: Recipe) -> dict[str, schema.TeacherModel]:
    """The recipe's teachers by name; a single one is called "teacher"."""
    return dict(recipe.teachers) if recipe.teachers else {"teacher": recipe.teacher} if recipe.teacher else {}


def teacher_folder(name: str) -> str:
    """Where a run keeps what belongs to a teacher."""
    return name if name == "teacher" else f"teacher-{recipes.slug(name)}"


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def _pair(values: list[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second
