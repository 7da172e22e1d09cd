"""`kind: torchvision`: torchvision's own detectors, classifiers and segmentation models, by their names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import detection, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from distillkit import schema
from distillkit.adapters import with_adapter
from distillkit.core.adapter import Adapter
from distillkit.training.errors import RunError

#: the module that the models of a task are in
_MODULES: dict[str, Any] = {"detection": detection, "classification": models, "segmentation": segmentation}
#: detectors whose ResNet may be another one: their class, and what their pyramid is built of
_PYRAMIDS: dict[str, tuple[Callable[..., nn.Module], list[int]]] = {
    "fcos_resnet50_fpn": (detection.FCOS, [2, 3, 4]),
    "retinanet_resnet50_fpn": (detection.RetinaNet, [2, 3, 4]),
    "fasterrcnn_resnet50_fpn": (detection.FasterRCNN, [1, 2, 3, 4]),
}
#: the class of a detector, by how its name begins
_KINDS: dict[str, Callable[..., nn.Module]] = {
    "fcos": detection.FCOS,
    "retinanet": detection.RetinaNet,
    "fasterrcnn": detection.FasterRCNN,
    "ssd": SSD,
}
#: detectors that learn more of an object than its box, which the data do not say
_MORE = {"maskrcnn": "masks", "keypointrcnn": "key points"}


def torchvision_model(
    config: schema.TorchvisionModel, classes: int, evaluate: schema.AnyEvaluate, size: Iterable[int] | None
) -> nn.Module:
    """The model of a block for so many classes of the data; ``size`` (height, width) is that of its pictures.

    Raises:
        RunError: no such model for this task, or one that does not take these options.
    """
    if isinstance(evaluate, schema.Evaluate):
        return _detector(config, classes, evaluate, size)
    task = "segmentation" if isinstance(evaluate, schema.EvaluateMasks) else "classification"
    _check_name(config.model, task)
    if config.backbone is not None:
        raise RunError(f"backbone is for detectors; {config.model} has its own: leave it out")
    if task == "classification":
        return _classifier(config, classes)
    _check_options(config, models.get_model_builder(config.model))
    start = "DEFAULT" if config.pretrained else None
    return _built(
        config, lambda **o: models.get_model(config.model, weights=None, weights_backbone=start, **o), classes
    )


def other_head(config: schema.TorchvisionModel, classes: int) -> int | None:
    """How many classes the pretrained weights of a classifier tell apart where these are others."""
    if not config.pretrained or config.model not in models.list_models(models):
        return None
    known = len(_weights(config.model).meta["categories"])
    return None if known == classes else known


def _detector(
    config: schema.TorchvisionModel, classes: int, evaluate: schema.Evaluate, size: Iterable[int] | None
) -> nn.Module:
    _check_name(config.model, "detection")
    for name, what in _MORE.items():
        if config.model.startswith(name):
            raise RunError(f"{config.model} learns {what}, and the data have boxes: use fasterrcnn_resnet50_fpn")
    kind = next(kind for start, kind in _KINDS.items() if config.model.startswith(start))
    _check_options(config, models.get_model_builder(config.model), kind, GeneralizedRCNNTransform)
    sizes: dict[str, Any] = {}
    if size is not None and "ssd" not in config.model:
        sizes = {"min_size": min(size), "max_size": max(size)}
    # 0 is the background's label, but in the detectors whose classes are sigmoids
    outputs = classes + (not config.model.startswith(("fcos", "retinanet")))
    build = _with_backbone(config) if config.backbone is not None else _whole(config)
    model: Any = _built(config, lambda **options: build(**{**sizes, **options}), outputs)
    said = getattr(model, "roi_heads", model)
    said.score_thresh, said.nms_thresh, said.detections_per_img = evaluate.score, evaluate.iou, evaluate.most
    return model


def _whole(config: schema.TorchvisionModel) -> Callable[..., nn.Module]:
    start = "DEFAULT" if config.pretrained else None
    return lambda **options: models.get_model(config.model, weights=None, weights_backbone=start, **options)


def _with_backbone(config: schema.TorchvisionModel) -> Callable[..., nn.Module]:
    """The detector with another ResNet, and all else as torchvision builds it."""
    if config.model not in _PYRAMIDS:
        raise RunError(f"backbone: {config.model} has its own; it can be another one in {', '.join(_PYRAMIDS)}")
    resnets = [name for name in models.list_models(models) if "resne" in name]
    if config.backbone not in resnets:
        raise RunError(f"backbone: torchvision has no ResNet {config.backbone!r}{_near(config.backbone, resnets)}")
    kind, levels = _PYRAMIDS[config.model]

    def build(**options: Any) -> nn.Module:
        norm: Any = {} if config.pretrained else {"norm_layer": nn.BatchNorm2d}
        trained = options.pop("trainable_backbone_layers", 3 if config.pretrained else 5)
        if kind is detection.RetinaNet:
            norm["extra_blocks"] = LastLevelP6P7(_width(config.backbone), 256)
        elif kind is detection.FCOS:
            norm["extra_blocks"] = LastLevelP6P7(256, 256)
        pyramid = resnet_fpn_backbone(
            backbone_name=config.backbone,  # type: ignore[arg-type]
            weights="DEFAULT" if config.pretrained else None,  # type: ignore[arg-type]
            trainable_layers=trained,
            returned_layers=levels,
            **norm,
        )
        return kind(pyramid, **options)

    return build


def _width(resnet: str | None) -> int:
    """Channels of its last map."""
    return 512 if resnet in ("resnet18", "resnet34") else 2048


def _classifier(config: schema.TorchvisionModel, classes: int) -> nn.Module:
    model = _built(config, lambda **options: models.get_model(config.model, weights=None, **options), classes)
    if getattr(model, "aux_logits", False):
        raise RunError(
            f"{config.model} returns further logits in train mode, which no criterion here takes: options: "
            "{aux_logits: false}"
        )
    if not config.pretrained:
        return model
    weights = _weights(config.model)
    found, own = weights.get_state_dict(progress=True, check_hash=True), model.state_dict()
    fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict({**own, **fitting})
    shown = weights.transforms()
    return with_adapter(model, Adapter(tuple(shown.mean), tuple(shown.std)))


def _weights(name: str) -> Any:
    return models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]


def _built(config: schema.TorchvisionModel, build: Callable[..., nn.Module], classes: int) -> nn.Module:
    try:
        return build(num_classes=classes, **config.options)
    except (TypeError, ValueError) as error:
        raise RunError(f"{config.model} cannot be built with these options: {error}") from error


def _check_options(config: schema.TorchvisionModel, *parts: Callable[..., Any]) -> None:
    """Raises RunError for an option that none of its parts takes: torchvision would swallow it."""
    named = dict.fromkeys(name for part in parts for name in inspect.signature(part).parameters)
    known = [name for name in named if name not in ("weights", "weights_backbone", "progress", "kwargs", "num_classes")]
    for key in config.options:
        if key not in known:
            raise RunError(f"options: {config.model} takes no {key!r}{_near(key, known)}")


def _check_name(name: str, task: str) -> None:
    known = models.list_models(_MODULES[task])
    if name in known:
        return
    other = [t for t, module in _MODULES.items() if name in models.list_models(module)]
    if other:
        raise RunError(f"model: {name} is for {other[0]}, and the recipe's task is {task}")
    raise RunError(f"model: torchvision has no model {name!r} for {task}{_near(name, known)}")


def _near(word: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), list(known), n=3, cutoff=0.3)
    return f"; nearest: {', '.join(near)}" if near else f"; there are {', '.join(known)}"
