"""The `student`, `teacher` and `teachers` blocks of a recipe as models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import nn

from distillkit import plugins, schema
from distillkit import recipe as recipes
from distillkit.adapters import with_adapter
from distillkit.core.adapter import Adapter, comes_from
from distillkit.integrations import openmmlab
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
from distillkit.training.build.mmdet_models import check_frozen, class_places, mmdet_config, mmdet_model
from distillkit.training.build.torchvision_models import other_head as other_torchvision_head
from distillkit.training.build.torchvision_models import torchvision_model
from distillkit.training.build.transformers_models import other_head as other_transformers_head
from distillkit.training.build.transformers_models import transformers_model
from distillkit.training.build.ultralytics_models import ultralytics_model
from distillkit.training.errors import RunError


def build_model(
    config: schema.AnyModel,
    classes: int | Sequence[str],
    evaluate: schema.AnyEvaluate,
    size: Sequence[int] | None = None,
) -> nn.Module:
    """A model for these classes, with the weights of its ``checkpoint`` where there is one, in train mode.

    Args:
        classes: their number, or their names by label, which models that know names are given.
        size: (height, width) of the data's pictures, for models that are built for a size, or resize by themselves.

    Raises:
        RunError: a model that cannot have this number of classes; a name or an option that its package does not know;
            a registered builder that returns something else than a model, or a model and its adapter.
        ImportError: the model's package is not installed.
        CheckpointError, ValueError, FileNotFoundError: its weights cannot be read, or do not fit.
    """
    model = _built(config, own_classes(config) or classes, evaluate, size)
    if config.checkpoint:
        load_checkpoint(model, Path(config.checkpoint))
    if isinstance(model, PyramidDetector | NanoDet) and isinstance(evaluate, schema.Evaluate):
        model.inference = replace(model.inference, score=evaluate.score, iou=evaluate.iou, most=evaluate.most)
    return model.train()


def _built(
    config: schema.AnyModel, named: int | Sequence[str], evaluate: schema.AnyEvaluate, size: Sequence[int] | None
) -> nn.Module:
    classes = count_of(named)
    if isinstance(config, schema.MMDetModel | schema.MMRotateModel):
        return mmdet_model(config, classes, evaluate)
    if isinstance(config, schema.TorchvisionModel):
        return torchvision_model(config, classes, evaluate, size)
    if isinstance(config, schema.TransformersModel):
        return transformers_model(config, named, evaluate, size)
    if isinstance(config, schema.UltralyticsModel):
        return ultralytics_model(config, named, evaluate)
    return _own(config, classes)


def own_classes(config: schema.AnyModel) -> list[str] | None:
    """The names that a teacher's block gives its classes; None: it has those of the data.

    Raises RunError for a file that cannot be read, or holds no names.
    """
    given = getattr(config, "classes", None)
    if given is None or isinstance(given, list):
        return given
    try:
        names = [line.strip() for line in Path(given).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"classes: {given}: expected a text file with a name a line ({error})") from None
    if not names:
        raise RunError(f"classes: {given} holds no names; expected one a line")
    return names


def differs(config: schema.AnyTeacher) -> bool:
    """Whether a teacher has classes, levels or pictures of its own: figures do not show it beside the students."""
    return config.classes is not None or config.levels != "all" or config.scale is not None


def count_of(classes: int | Sequence[str]) -> int:
    """How many classes there are, of their number or their names."""
    return classes if isinstance(classes, int) else len(classes)


def _own(config: Any, classes: int) -> nn.Module:
    """A model of distillkit's, of timm or of the user's."""
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
    return model


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
    elif comes_from(model, "mmdet."):
        openmmlab.load(model, path)
    elif comes_from(model, "ultralytics.nn.") and path.suffix == ".pt":
        raise RunError(
            f"{path}: a .pt of ultralytics holds code, which a recipe never runs. Make a state dict of it, once: "
            'python -c "import torch; from ultralytics import YOLO; '
            f"torch.save(YOLO('{path.name}').model.float().state_dict(), '{path.stem}.pth')\""
        )
    else:
        weights = read_weights(path)
        explain_mismatch(path, model.state_dict(), weights)
        model.load_state_dict(weights)


def other_head(config: schema.AnyModel, classes: int | Sequence[str]) -> int | None:
    """How many classes the pretrained weights of a model tell apart where these are others: its classifier is then
    drawn at random. None: that is not so."""
    if isinstance(config, schema.TransformersModel):
        return other_transformers_head(config, classes)
    if isinstance(config, schema.TorchvisionModel) and config.checkpoint is None:
        return other_torchvision_head(config, count_of(classes))
    if not isinstance(config, schema.TimmModel) or config.checkpoint is not None or not config.pretrained:
        return None
    known = pretrained_classes(config.model, config.pretrained, **config.options)
    return None if known == count_of(classes) else known


def check_start(config: schema.AnyModel) -> None:
    """Raises RunError for a model that is to be trained, part of which would stay random."""
    if isinstance(config, schema.MMDetModel | schema.MMRotateModel):
        check_frozen(config)


def said_of_classes(config: schema.AnyModel, classes: int) -> str:
    """Where in its config the number of classes was set, for `distillkit check`; "": it has no config."""
    if not isinstance(config, schema.MMDetModel | schema.MMRotateModel):
        return ""
    places = class_places(mmdet_config(config, classes))
    return f"; num_classes set to {classes} in {', '.join('.'.join(map(str, place[:-1])) for place in places)}"


def teacher_configs(recipe: Recipe) -> dict[str, schema.AnyTeacher]:
    """The recipe's teachers by name; a single one is called "teacher"."""
    if recipe.teachers:
        return {**recipe.teachers}
    return {"teacher": recipe.teacher} if recipe.teacher else {}


def teacher_folder(name: str) -> str:
    """Where a run keeps what belongs to a teacher."""
    return name if name == "teacher" else f"teacher-{recipes.slug(name)}"
