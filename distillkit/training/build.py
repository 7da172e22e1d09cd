"""From the blocks of a recipe to objects: data, models, teachers, distillers."""

from __future__ import annotations

import hashlib
import json
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
from distillkit.boxes.merged import Merged
from distillkit.boxes.regions import Main, MainAndValuable, Region, Valuable
from distillkit.core.adapter import Adapter
from distillkit.core.distiller import Distiller
from distillkit.core.schedule import Weight
from distillkit.core.teacher import Teacher
from distillkit.core.wrap import DistilledModel
from distillkit.data.coco import CocoDetection, read_coco
from distillkit.data.coco_rotated import CocoRotated
from distillkit.data.dota import DOTA_CLASSES, DotaDetection
from distillkit.data.hrsc import HRSC_CLASSES, HrscDetection
from distillkit.data.problems import DataError
from distillkit.data.scenes import Scenes
from distillkit.data.tiled import TiledDota
from distillkit.data.transforms import Augment, Resize, Transform
from distillkit.data.voc import VOC_CLASSES, VocDetection
from distillkit.distillers.feature_imitation import FeatureImitation
from distillkit.distillers.ld import LD
from distillkit.distillers.logit_kd import LogitKD
from distillkit.distillers.self_ld import SelfLD
from distillkit.models.backbones import explain_mismatch, read_weights
from distillkit.models.gfl import GFL, load_openmmlab
from distillkit.models.nanodet import NanoDet, nanodet
from distillkit.models.pyramid import PyramidDetector
from distillkit.models.rotated_gfl import RotatedGFL
from distillkit.models.rotated_retina import RotatedRetina
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
    if isinstance(data, schema.DotaData | schema.HrscData | schema.CocoRotatedData):
        return _rotated(recipe, data, split, transform, augmented)
    if isinstance(data, schema.CocoData):
        return CocoDetection(data.root, source, data.images.format(split=split), transform, recipe.seed)
    if isinstance(data, schema.VocData):
        return VocDetection(data.root, source, data.classes, transform, recipe.seed)
    if isinstance(data, schema.SceneData):
        turned: dict[str, Any] = (
            {"rotated": True, "turn": data.turn} if isinstance(data, schema.RotatedSceneData) else {}
        )
        return Scenes(source, _pair(data.size), recipe.seed, split, _pair(data.digits), transform, **turned)
    return plugins.build("data", data.name, split=split, transform=transform, seed=recipe.seed, **data.options)


def _rotated(
    recipe: Recipe,
    data: schema.DotaData | schema.HrscData | schema.CocoRotatedData,
    split: str,
    transform: Transform,
    augmented: bool,
) -> Any:
    """A set of rotated boxes in files. What is left out of training alone is left in where models are judged."""
    source = getattr(data, split)
    how: dict[str, Any] = {
        "transform": transform,
        "seed": recipe.seed,
        "teach_difficult": data.teach_difficult,
        "skip_empty": data.skip_empty and augmented,
    }
    if isinstance(data, schema.HrscData):
        return HrscDetection(data.root, source, **how)
    if isinstance(data, schema.CocoRotatedData):
        return CocoRotated(data.root, source, data.images.format(split=split), **how)
    if data.tiles is None:
        return DotaDetection(data.root, source, data.classes, **how)
    return TiledDota(tiles_folder(recipe, data, data.tiles), data.root, source, data.classes, **how)


def tiles_folder(recipe: Recipe, data: schema.DotaData, tiles: schema.Tiles) -> Path:
    """Where the tiles of a recipe's data are; runs that cut the same data in the same way share them."""
    if tiles.folder is not None:
        return Path(tiles.folder)
    root, scales = Path(data.root).resolve(), "-".join(f"{scale:g}" for scale in tiles.scales)
    source = hashlib.sha256(json.dumps([str(root), data.classes]).encode()).hexdigest()[:8]
    return Path(recipe.output) / "tiles" / f"{root.name}-{tiles.size}-{tiles.overlap}-{scales}-{source}"


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
    if isinstance(data, schema.DotaData):
        names = DOTA_CLASSES[data.classes] if isinstance(data.classes, str) else data.classes
        return Classes(list(names), list(range(1, len(names) + 1)))
    if isinstance(data, schema.CocoData):
        there = read_coco(data.root, data.val, data.images.format(split="val"))
        if not there.classes:
            raise DataError(there.problems)
        return Classes(there.classes, there.category_ids)
    if isinstance(data, schema.HrscData):
        return Classes(HRSC_CLASSES, [1])
    if isinstance(data, schema.VocData):
        names = data.classes or VOC_CLASSES
        return Classes(list(names), list(range(1, len(names) + 1)))
    built = build_data(recipe, "val", augmented=False)
    return Classes(built.classes, built.category_ids)


def build_resize(data: schema.AnyData) -> Resize:
    """How pictures become the network's input wherever nothing is drawn at random: evaluation and prediction."""
    return Resize(_pair(data.size), data.keep_ratio, data.pad)


def _transform(data: schema.AnyData, augmented: bool) -> Transform:
    if not augmented:
        return build_resize(data)
    a = data.augment
    return Augment(
        _pair(data.size),
        data.keep_ratio,
        data.pad,
        flip=a.flip,
        flip_vertical=a.flip_vertical,
        flip_diagonal=a.flip_diagonal,
        crop=a.crop.min_scale if a.crop else None,
        multi_scale=_pair(a.multi_scale) if a.multi_scale else None,
        mosaic=a.mosaic,
        color=a.color,
    )


def build_model(config: schema.AnyModel, classes: int, evaluate: schema.Evaluate) -> nn.Module:
    """A detector for ``classes`` classes, with the weights of its ``checkpoint`` where there is one, in train mode.

    Raises:
        RunError: a detector that cannot have this number of classes; a registered builder that returns something else
            than a model, or a model and its adapter.
        CheckpointError, ValueError, FileNotFoundError: its weights cannot be read, or do not fit.
    """
    model: nn.Module
    if isinstance(config, schema.GFLModel):
        model = GFL(classes, groups=math.gcd(config.channels, 32), **_pyramid(config))
    elif isinstance(config, schema.RotatedGFLModel):
        model = RotatedGFL(classes, groups=math.gcd(config.channels, 32), loss=config.loss, **_pyramid(config))
    elif isinstance(config, schema.RotatedRetinaModel):
        model = RotatedRetina(
            classes, loss=config.loss, angle=config.angle, convention=config.convention, **_pyramid(config)
        )
    elif isinstance(config, schema.NanoDetModel):
        model = _nanodet(config, classes)
    else:
        model = _custom(config, classes)
    if config.checkpoint:
        load_checkpoint(model, Path(config.checkpoint))
    if isinstance(model, PyramidDetector | NanoDet):
        model.inference = replace(model.inference, score=evaluate.score, iou=evaluate.iou, most=evaluate.most)
    return model.train()


def _pyramid(config: schema.GFLModel | schema.RotatedGFLModel | schema.RotatedRetinaModel) -> dict[str, Any]:
    """What all detectors on a feature pyramid are given."""
    return config.model_dump(include=set(schema.GFLModel.model_fields) - {"kind", "checkpoint"})


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
            anchor_weight=config.anchor_weight,
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


def teacher_configs(recipe: Recipe) -> dict[str, schema.AnyTeacher]:
    """The recipe's teachers by name; a single one is called "teacher"."""
    if recipe.teachers:
        return {**recipe.teachers}
    return {"teacher": recipe.teacher} if recipe.teacher else {}


def teacher_folder(name: str) -> str:
    """Where a run keeps what belongs to a teacher."""
    return name if name == "teacher" else f"teacher-{recipes.slug(name)}"


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def _pair(values: list[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second
