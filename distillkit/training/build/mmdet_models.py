"""`kind: mmdet` and `kind: mmrotate`: detectors from their packages' own configs, as data.

Nothing that a recipe or a file of data says is ever run. What mmengine does with a config runs code in several ways,
each of which is closed here: ``Config.fromfile`` runs .py files, and imports what ``custom_imports`` names, so that
files of data are read without it; ``Registry.get`` imports what it does not know by name, and ``_scope_`` a package, so
that only registered parts of detectors are found; mmcv's ``batched_nms`` and mmdet's trackers evaluate text, so that
text is words, and the first's one of a few; and what it loads from an address it unpickles with the code in it, so that
torch is told to read tensors alone.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from operator import getitem
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from torch import nn

from distillkit import schema
from distillkit.explain import nearest
from distillkit.integrations import openmmlab
from distillkit.models.weights import explain_mismatch
from distillkit.training.build.offline import offline
from distillkit.training.errors import RunError

OpenMMLabModel = schema.MMDetModel | schema.MMRotateModel

#: packages whose classes a config may name with their scope
PACKAGES = ("mmdet", "mmengine", "mmcv", "mmrotate")
#: where the parts of detectors are, of the packages that also hold other things
PARTS = (
    "torch.nn.",
    "mmcv.cnn.bricks.",
    "mmcv.cnn.resnet",
    "mmcv.cnn.vgg",
    "mmcv.ops.",
    "mmengine.model.",
    *(f"mmdet.models.{part}" for part in ("backbones.", "data_preprocessors.", "dense_heads.", "detectors.")),
    *(f"mmdet.models.{part}" for part in ("layers.", "losses.", "necks.", "roi_heads.", "seg_heads.")),
    *(f"mmdet.models.task_modules.{part}" for part in ("assigners.", "coders.", "prior_generators.", "samplers.")),
    *(f"mmrotate.models.{part}" for part in ("backbones.", "dense_heads.", "detectors.", "losses.", "necks.")),
    *(f"mmrotate.models.{part}" for part in ("layers.", "roi_heads.", "task_modules.")),
)
#: among them, what hands over to another package, whose weights are not read safely
FOREIGN = ("mmdet.models.detectors.d2_wrapper.",)
#: text in the model of a config: words, paths and addresses, and nothing that could be an expression
TEXT = re.compile(r"[\w.\-+/: ]*")
#: the operators that batched_nms may be told
NMS = ("nms", "soft_nms", "nms_rotated", "nms_quadri", "nms_match")
#: what names the weights of a part, to be downloaded
WEIGHTS = ("checkpoint", "pretrained")


def mmdet_model(config: OpenMMLabModel, classes: int, evaluate: schema.AnyEvaluate) -> nn.Module:
    """The detector of a block, with random weights, or those that its config names where ``pretrained`` says so.

    Raises:
        ImportError: mmdet is not installed. RunError: what the block or its config says cannot be built.
    """
    described = mmdet_config(config, classes)
    openmmlab.prepare(config.kind)
    with registered_parts(), offline(unless=config.pretrained), _tensors_alone():
        try:
            model = openmmlab.made({"model": described, "default_scope": config.kind})
        except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
            raise RunError(f"{config.config}: mmdet cannot build this: {type(error).__name__}: {error}") from error
        if config.checkpoint is None:
            try:
                with _whole_weights(config.config):
                    openmmlab.initialised(model)
            except UnpicklingError as error:
                raise RunError(
                    f"{config.config}: the weights that an init_cfg names hold more than tensors, which may be code: "
                    f"{error}"
                ) from error
    if isinstance(evaluate, schema.Evaluate):
        _keep(model, evaluate)
    return model


def mmdet_config(config: OpenMMLabModel, classes: int) -> dict[str, Any]:
    """The config's ``model``, with the changes of the block and the classes of the data."""
    model = _changed(config)
    _check(model)
    if not class_places(model):
        raise RunError(f"{config.config}: no head of it has num_classes: it is no detector of classes")
    for path in class_places(model):
        *above, last = path
        reduce(getitem, above, model)[last] = classes
    if not config.pretrained or config.checkpoint is not None:
        _forget_weights(model)
    if isinstance(model.get("data_preprocessor"), dict):
        model["data_preprocessor"]["batch_augments"] = None  # the recipe's data block says what is done to pictures
    return model


def class_places(model: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of every ``num_classes`` in a head; a proposal network tells objects from what is none, and no more."""
    items = model.items() if isinstance(model, dict) else enumerate(model) if isinstance(model, list) else ()
    found = []
    for key, value in items:
        if key == "num_classes" and any("head" in str(k) for k in above):
            found.append((*above, key))
        elif key not in ("rpn_head", "semantic_head", "data_preprocessor"):
            found += class_places(value, (*above, key))
    return found


def check_frozen(config: OpenMMLabModel) -> None:
    """Raises RunError where stages of the backbone would stay random: frozen, and without weights to start from."""
    if config.pretrained or config.checkpoint is not None:
        return
    model = _changed(config)
    _check(model)
    backbone = model.get("backbone")
    frozen = backbone.get("frozen_stages", -1) if isinstance(backbone, dict) else -1
    if isinstance(frozen, int) and frozen >= 0:
        raise RunError(
            f"{config.config} freezes the first stages of its backbone (frozen_stages: {frozen}), which would stay "
            "random: set pretrained: true, give a checkpoint, or set: {backbone.frozen_stages: -1, "
            "backbone.norm_eval: false}"
        )


def _changed(config: OpenMMLabModel) -> dict[str, Any]:
    """The config's ``model`` with the changes of the block."""
    model = _read(config)
    for path, value in config.set.items():
        _change(model, path, value, config.kind)
    return model


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(block: OpenMMLabModel) -> dict[str, Any]:
    """The ``model`` of a config: of one that comes with its package, or of a file of data."""
    config = block.config
    if config.startswith(f"{block.kind}::"):
        return _plain(_installed(config, block.kind).get("model"))
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"config {config} cannot be read: {error.strerror}") from error
    try:
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"config {config}: not readable as {path.suffix[1:]}: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"config {config}: expected a mapping, with the key model")
    for key in ("_base_", "custom_imports"):
        if found.get(key):
            raise RunError(
                f"config {config}: {key} names code or other files, and a config of a recipe is data alone. Dump the "
                "whole config once (mmengine's Config.fromfile(...).dump('mine.json')) and take the key out; parts "
                "that a package of yours registers are found when you name it, as in --import my_package"
            )
    model = found.get("model", found)
    if not isinstance(model, dict) or "type" not in model:
        raise RunError(f"config {config}: it has no model with a type")
    return model


def _installed(config: str, package: str) -> Any:
    """Raises RunError for one that there is not, with the nearest that there is."""
    openmmlab.prepare(package)
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    folder = (Path(spec.origin).parent / ".mim" / "configs").resolve()
    inside = config.removeprefix(f"{package}::")
    path = (folder / inside).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        known = [p.relative_to(folder).as_posix() for p in sorted(folder.glob("*/*.py")) if p.parent.name != "_base_"]
        hint = nearest(inside, known)
        few = [name for name in known if name.split("/")[0] == inside.split("/")[0]][:8]
        if "did you mean" not in hint:
            hint = f"; there are {', '.join(few)}, ..." if few else f"; they are in {folder}"
        raise RunError(f"config: {package} has no {inside!r}{hint}")
    return openmmlab.read_config(path)


def _plain(value: Any) -> Any:
    """mmengine's dicts and tuples as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# -- changes ----------------------------------------------------------------------------------------------------------


def _change(model: dict[str, Any], path: str, value: Any, package: str) -> None:
    """Set a dotted key to a value. Raises RunError for one that neither the config nor the part's class knows."""
    at: Any = model
    *above, last = path.split(".")
    where = "the model"
    for key in above:
        at = at[_known(at, key, path, where)]
        where = f"{where}.{key}" if where != "the model" else key
    at[_known(at, last, path, where, package)] = _plain(value)


def _known(at: Any, key: str, path: str, where: str, package: str | None = None) -> Any:
    """A key of a mapping, or a place in a list; with the ``package`` of its class also one that may be added."""
    if isinstance(at, list):
        if key.isdecimal() and int(key) < len(at):
            return int(key)
        raise RunError(f"set: {path}: {where} is a list of {len(at)}; expected a number from 0, got {key!r}")
    if not isinstance(at, dict):
        raise RunError(f"set: {path}: {where} is {at!r} in this config, and has no keys")
    if key in at:
        return key
    arguments = _arguments(at.get("type"), package) if package is not None else []
    if key in arguments:
        return key
    hint = nearest(key, [*at, *arguments])
    raise RunError(f"set: {path}: {where} has no key {key!r}{hint}")


def _arguments(kind: Any, package: str) -> list[str]:
    """What the class of a part is built with, by name."""
    if not isinstance(kind, str):
        return []
    openmmlab.prepare(package)
    with registered_parts():
        found = import_module(f"{package}.registry").MODELS.get(kind)
    if not isinstance(found, type):
        return []
    named = dict.fromkeys(
        name
        for base in found.__mro__
        if "__init__" in vars(base) and base not in (object, nn.Module)
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )
    return [name for name in named if name != "self"]


def _forget_weights(part: Any) -> None:
    """No part starts from weights that are downloaded."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "init_cfg" and isinstance(value, list):
                part[key] = [how for how in value if not _is_pretrained(how)] or None
            elif (key == "init_cfg" and _is_pretrained(value)) or (key in WEIGHTS and isinstance(value, str)):
                part[key] = None
            else:
                _forget_weights(value)
    elif isinstance(part, list):
        for item in part:
            _forget_weights(item)


def _is_pretrained(value: Any) -> bool:
    """Whether a way to initialise, or one for a part (``override``), reads a file of weights."""
    if isinstance(value, list):
        return any(map(_is_pretrained, value))
    if not isinstance(value, dict):
        return False
    return str(value.get("type", "")).endswith("Pretrained") or _is_pretrained(value.get("override"))


# -- what must not be there -------------------------------------------------------------------------------------------


def _check(part: Any, where: str = "model") -> None:
    """Raises RunError for what could make a part run, read or import something."""
    if isinstance(part, dict):
        for key, value in part.items():
            at = f"{where}.{key}"
            if not isinstance(key, str) or not re.fullmatch(r"[\w.\-/ ]+", key):
                raise RunError(f"{where}: a key of a config is a word, got {key!r}")
            if key == "_scope_" and value not in PACKAGES:
                raise RunError(f"{at}: expected one of {', '.join(PACKAGES)}, got {value!r}")
            if key == "type" and "nms" in where.rpartition(".")[2] and value not in NMS:
                raise RunError(f"{at}: expected one of {', '.join(NMS)}, got {value!r}")
            if key.startswith("teacher_") and isinstance(value, str):
                raise RunError(
                    f"{at}: this detector brings a teacher of its own: use the config of the plain student, and name "
                    "the teacher in the recipe"
                )
            _check(value, at)
    elif isinstance(part, list | tuple):
        for i, item in enumerate(part):
            _check(item, f"{where}.{i}")
    elif isinstance(part, str):
        if not TEXT.fullmatch(part) or part.endswith(".py"):
            raise RunError(
                f"{where}: {part!r} is more than a word: nothing that could be code is taken from the config of a "
                "recipe; build such a model in a package of yours (distillkit.register_model), with kind: custom"
            )
    elif not isinstance(part, bool | int | float | type(None)):
        raise RunError(f"{where}: expected numbers, words, lists and mappings, got {type(part).__name__}")


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Inside, torch reads no code from files of weights, also where its caller lets it, as mmengine for addresses."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _whole_weights(config: str) -> Iterator[None]:
    """Inside, weights that an ``init_cfg`` names must hold all of their part: mmengine loads what fits, and leaves the
    rest random. What they hold besides, as a classifier, is left out."""
    from mmengine.runner import checkpoint

    load = checkpoint.load_state_dict

    def load_all(part: nn.Module, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        wanted = {name: v for name, v in part.state_dict().items() if not name.endswith("num_batches_tracked")}
        found = {name: v for name, v in weights.items() if name in wanted}
        try:
            explain_mismatch(f"the weights that an init_cfg names for {type(part).__name__}", wanted, found)
        except ValueError as error:
            raise RunError(
                f"{config}: {error}. Where the part was changed, name weights that fit it in its init_cfg.checkpoint"
            ) from error
        return load(part, weights, *args, **kwargs)

    checkpoint.load_state_dict = load_all
    try:
        yield
    finally:
        checkpoint.load_state_dict = load


@contextmanager
def registered_parts() -> Iterator[None]:
    """Inside, a name in a config means a part of detectors that is registered; nothing is imported for it.

    mmengine would import whatever module a name that it does not know begins with.
    """
    openmmlab.prepare()
    from mmengine.registry import Registry
    from mmengine.registry import registry as module

    get, imported = Registry.get, module.get_object_from_string

    def found_of(self: Any, key: str) -> Any:
        scope, _, name = str(key).rpartition(".")
        if scope and scope not in PACKAGES:
            raise RunError(f"type: {key!r}: expected a name, or one with its package: {', '.join(PACKAGES)}")
        found = get(self, key)
        if found is None:
            raise RunError(f"type: nothing is registered as {name!r}{nearest(name, _registered(self))}")
        place = f"{getattr(found, '__module__', '')}."
        theirs = place.split(".")[0] in (*PACKAGES, "mmpretrain", "torch")
        if theirs and (not place.startswith(PARTS) or place.startswith(FOREIGN)):
            raise RunError(f"type: {key!r} ({place}{getattr(found, '__name__', '')}) is no part of a detector")
        return found

    Registry.get, module.get_object_from_string = found_of, lambda name: None
    try:
        yield
    finally:
        Registry.get, module.get_object_from_string = get, imported


def _registered(registry: Any) -> list[str]:
    names: list[str] = []
    while registry is not None:
        names += registry.module_dict
        registry = registry.parent
    return names


# -- predictions ------------------------------------------------------------------------------------------------------


def _keep(model: nn.Module, evaluate: schema.Evaluate) -> None:
    """What the recipe keeps of predictions, where the detector's own settings say it."""
    for module in model.modules():
        settings = getattr(module, "test_cfg", None)
        if not isinstance(settings, dict):
            continue
        kept = settings.get("rcnn", settings) if "rpn" in settings else settings
        if not isinstance(kept, dict) or "nms_post" in kept or _is_proposing(module):
            continue
        for key, value in (("score_thr", evaluate.score), ("max_per_img", evaluate.most)):
            if key in kept:
                kept[key] = value
        if isinstance(nms := kept.get("nms"), dict) and "iou_threshold" in nms:
            nms["iou_threshold"] = evaluate.iou


def _is_proposing(module: nn.Module) -> bool:
    return any(base.__name__ in ("RPNHead", "GuidedAnchorHead", "CascadeRPNHead") for base in type(module).__mro__)
