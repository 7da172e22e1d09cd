"""The `student`, `teacher` and `teachers` blocks of a recipe as models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import nn

from distillkit import plugins, schema
from distillkit import recipe as recipes
from distillkit.adapters import with_adapter
from distillkit.core.adapter import Adapter
from distillkit.models.backbones import classifier, explain_mismatch, pretrained_classes, read_weights
from distillkit.models.cam import CamClassifier
from distillkit.models.deeplab import DeepLab
from distillkit.models.fanet import FANet
from distillkit.models.gfl import GFL, load_openmmlab
from distillkit.models.nanodet import NanoDet, nanodet
from distillkit.models.pyramid import PyramidDetector
from distillkit.models.rotated_gfl import RotatedGFL
from distillkit.models.rotated_retina import RotatedRetina
from distillkit.schema import Recipe
from distillkit.training import checkpoint
from distillkit.training.errors import RunError


def build_model(config: schema.AnyModel, classes: int, evaluate: schema.AnyEvaluate) -> nn.Module:
    """A model for ``classes`` classes, with the weights of its ``checkpoint`` where there is one, in train mode.

    Raises:
        RunError: a model that cannot have this number of classes; a registered builder that returns something else
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
    elif isinstance(config, schema.DeepLabModel):
        model = DeepLab(classes, **config.model_dump(include=_keys(schema.DeepLabModel)))
    elif isinstance(config, schema.FANetModel):
        model = FANet(classes, **config.model_dump(include=_keys(schema.FANetModel)))
    elif isinstance(config, schema.CamModel):
        model = CamClassifier(classes, **config.model_dump(include=_keys(schema.CamModel)))
    elif isinstance(config, schema.TimmModel):
        model = classifier(config.model, classes, config.pretrained, **config.options)
    else:
        model = _custom(config, classes)
    if config.checkpoint:
        load_checkpoint(model, Path(config.checkpoint))
    if isinstance(model, PyramidDetector | NanoDet) and isinstance(evaluate, schema.Evaluate):
        model.inference = replace(model.inference, score=evaluate.score, iou=evaluate.iou, most=evaluate.most)
    return model.train()


def _pyramid(config: schema.GFLModel | schema.RotatedGFLModel | schema.RotatedRetinaModel) -> dict[str, Any]:
    """What all detectors on a feature pyramid are given."""
    return config.model_dump(include=_keys(schema.GFLModel))


def _keys(block: type[BaseModel]) -> set[str]:
    """Of a student's block, those that are arguments of its model."""
    return set(block.model_fields) - {"kind", "checkpoint"}


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


def other_head(config: schema.AnyModel, classes: int) -> int | None:
    """How many classes the pretrained weights of a timm model tell apart where these are others: its classifier is then
    drawn at random. None: that is not so."""
    if not isinstance(config, schema.TimmModel) or config.checkpoint is not None or not config.pretrained:
        return None
    known = pretrained_classes(config.model, config.pretrained, **config.options)
    return None if known == classes else known


def teacher_configs(recipe: Recipe) -> dict[str, schema.AnyTeacher]:
    """The recipe's teachers by name; a single one is called "teacher"."""
    if recipe.teachers:
        return {**recipe.teachers}
    return {"teacher": recipe.teacher} if recipe.teacher else {}


def teacher_folder(name: str) -> str:
    """Where a run keeps what belongs to a teacher."""
    return name if name == "teacher" else f"teacher-{recipes.slug(name)}"
