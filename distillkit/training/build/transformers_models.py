"""`kind: transformers`: models of Hugging Face's transformers, from their configs, as data.

What transformers could do with a config beside building its own classes is closed here: ``auto_map`` names code to
import, an attention or experts implementation with a slash is code on the hub, backbones may be other people's models
with their files and arguments. Weights are read as safetensors alone.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from distillkit import schema
from distillkit.adapters import with_adapter
from distillkit.training.build.offline import offline
from distillkit.training.errors import RunError

INSTALL = 'pip install "distillkit[transformers]"'
#: of a task, the transformers' table of its models
_TABLES = {
    "detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
    "text": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
}
#: keys of a file that say nothing of what is built
_SAID = ("architectures", "transformers_version", "_name_or_path", "id2label", "label2id", "num_labels", "_commit_hash")
#: keys that would have other people's code or files read
_FORBIDDEN = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "quantization_config",
    "model_args",
    "checkpoint_path",
)
#: how attention may be computed: what transformers and torch have themselves
_ATTENTION = ("eager", "sdpa")
#: what a timm backbone may be given
_BACKBONE = ("out_indices", "output_stride", "features_only", "in_chans", "drop_path_rate", "drop_rate")
_WORD = re.compile(r"[\w.+ -]*")


def transformers_model(
    config: schema.TransformersModel,
    classes: int | Sequence[str],
    evaluate: schema.AnyEvaluate,
    size: Sequence[int] | None,
) -> nn.Module:
    """The model of a block for these classes of the data, by name where their names are given; ``size`` (height, width)
    is that of its pictures.

    Raises:
        ImportError: transformers is not installed. RunError: what the block or its config says cannot be built.
    """
    _check_installed()
    task = _task(evaluate)
    with offline(unless=config.pretrained):
        described = _described(config, size)
        said = described.pop("_labels", None)
        built = _config(described, classes, config.options)
        kind = _class_of(built, task)
        _check_order(config, said, classes)
        try:
            model = _weighted(config, kind, built, said) if config.pretrained else kind(built)
        except (ValueError, TypeError, AttributeError, OSError, KeyError, RuntimeError) as error:
            raise RunError(f"transformers cannot build this {kind.__name__}: {error}") from error
    return with_adapter(model, _adapter(config, model, evaluate))


def other_head(config: schema.TransformersModel, classes: int | Sequence[str]) -> int | None:
    """How many classes the pretrained weights tell apart where these are others, by number, name or order."""
    if config.pretrained is None or config.checkpoint is not None:
        return None
    _check_installed()
    with offline(unless=True):
        labels = _described(config, None).get("_labels")
    if config.labels == "ordered":
        classes = classes if isinstance(classes, int) else len(classes)
    return None if labels is None or _same(labels, classes) else len(labels)


def _check_installed() -> None:
    if find_spec("transformers") is None:
        raise ImportError(f"transformers is not installed: {INSTALL}")


def _task(evaluate: schema.AnyEvaluate) -> str:
    if isinstance(evaluate, schema.Evaluate):
        return "detection"
    if isinstance(evaluate, schema.EvaluateTexts):
        return "text"
    return "segmentation" if isinstance(evaluate, schema.EvaluateMasks) else "classification"


# -- the config -------------------------------------------------------------------------------------------------------


def _described(config: schema.TransformersModel, size: Sequence[int] | None) -> dict[str, Any]:
    """The keys of its config, options included; under ``_labels`` the names that its weights tell apart."""
    if config.model_type is not None:
        found: dict[str, Any] = {"model_type": config.model_type}
    elif config.config is not None:
        found = _read(Path(config.config))
    else:
        found = _of_weights(str(config.pretrained))
    labels = _labels(found)
    found = {key: value for key, value in found.items() if key not in _SAID and value is not None}
    _merge(found, config.options)
    _check(found)
    if config.model_type is not None and size is not None and "image_size" not in config.options:
        found["image_size"] = size[0] if size[0] == size[1] else list(size)
    return {**found, "_labels": labels}


def _merge(found: dict[str, Any], options: dict[str, Any]) -> None:
    """Mappings key by key, as in a recipe."""
    for key, value in options.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            _merge(found[key], value)
        else:
            found[key] = value


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"config {path}: expected a config.json, or a folder with one: {error}") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise RunError(f"config {path}: it has no model_type, as save_pretrained writes it")
    return found


def _of_weights(name: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    if Path(name).is_dir():
        return _read(Path(name))
    try:
        found, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise RunError(f"pretrained: {name} is neither a folder nor to be had from the hub: {error}") from error
    return dict(found)


def _labels(found: dict[str, Any]) -> list[str] | None:
    names = found.get("id2label")
    if not isinstance(names, dict):
        return None if "num_labels" not in found else [f"LABEL_{i}" for i in range(found["num_labels"])]
    return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]


def _config(described: dict[str, Any], classes: int | Sequence[str], chosen: dict[str, Any]) -> Any:
    """The config of its class; ``chosen``: the keys that the recipe gives, which must be known."""
    from transformers import CONFIG_MAPPING

    import distillkit.models.lvbert.auto  # noqa: F401  (it registers the type)

    kind = described["model_type"]
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3, cutoff=0.4)
        raise RunError(f"model_type: transformers has no {kind!r}; nearest: {', '.join(near) or 'none'}")
    names = [f"LABEL_{i}" for i in range(classes)] if isinstance(classes, int) else list(classes)
    known = CONFIG_MAPPING[kind]
    options = {key: value for key, value in described.items() if key != "model_type"}
    fresh = known()
    for key in chosen:
        if key not in _ALSO and not hasattr(fresh, key):
            own = [name for name in vars(fresh) if not name.startswith("_")]
            near = difflib.get_close_matches(key, own, n=3, cutoff=0.4)
            raise RunError(f"options: {kind} has no key {key!r}; nearest: {', '.join(near) or ', '.join(own)}")
    try:
        # a copy: nested configs are changed in place
        return known.from_dict(
            json.loads(json.dumps(options)),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise RunError(f"transformers has no config of {kind} with these options: {error}") from error


#: keys that a fresh config need not have, which ones that are written by other versions and older ones may
_ALSO = (
    *("backbone", "backbone_config", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone", "image_size"),
    *("attn_implementation", "_attn_implementation", "num_channels", "torch_dtype", "dtype", "is_hybrid"),
)


def _class_of(config: Any, task: str) -> Any:
    import transformers

    table = getattr(transformers, _TABLES[task])
    if type(config) in table:
        kind = table[type(config)]
        return kind[0] if isinstance(kind, tuple | list) else kind
    known = sorted({str(known.model_type) for known in table})
    near = difflib.get_close_matches(str(config.model_type), known, n=3, cutoff=0.3)
    raise RunError(
        f"model_type: transformers has no {config.model_type} for {task}; "
        f"{'nearest' if near else 'there are'}: {', '.join(near or known)}"
    )


def _weighted(config: schema.TransformersModel, kind: Any, built: Any, said: list[str] | None) -> nn.Module:
    """With the weights of ``pretrained``; the last layers of the classes drawn anew where those are others.

    Raises RunError where more than those would be random, as transformers lets it be with a word in its log.
    """
    model, found = kind.from_pretrained(
        config.pretrained, config=built, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    body, fewer = f"{model.base_model_prefix}.", (2 if said is None else len(said)) - built.num_labels
    wrong = [f"{name} is missing" for name in found["missing_keys"] if name.startswith(body) and "pooler" not in name]
    for name, there, here in found["mismatched_keys"]:
        if any(a != b and a - b != fewer for a, b in zip(there, here, strict=False)) or len(there) != len(here):
            wrong.append(f"{name} is {tuple(there)}, expected {tuple(here)}")
    if wrong:
        raise RunError(
            f"pretrained: the weights of {config.pretrained} are not those of this {kind.__name__}, {len(wrong)} of "
            f"which would stay random: {'; '.join(sorted(wrong)[:3])}; leave out the options that change its layers, "
            "or say config: in place of pretrained: for random weights"
        )
    return model


def _check_order(config: schema.TransformersModel, said: list[str] | None, classes: int | Sequence[str]) -> None:
    """Raises RunError for weights of as many classes that mean others, whose last layer would be taken over."""
    if config.pretrained is None or said is None or isinstance(classes, int) or len(said) != len(classes):
        return
    if config.labels == "named" and not _same(said, classes):
        raise RunError(
            f"pretrained: the weights of {config.pretrained} tell as many classes apart as the data have, and call "
            f"them otherwise, or have them in another order: {', '.join(said[:5])}, ... against "
            f"{', '.join(classes[:5])}, ...; if they mean the same in the same order, say "
            "labels: ordered; else say config: in place of pretrained:"
        )


def _same(labels: list[str], classes: int | Sequence[str]) -> bool:
    """Whether weights tell apart just these classes, in their order; labels without names can only be counted."""
    if isinstance(classes, int) or all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        return len(labels) == (classes if isinstance(classes, int) else len(classes))
    return [label.lower() for label in labels] == [name.lower() for name in classes]


# -- how pictures are given -------------------------------------------------------------------------------------------


def _adapter(config: schema.TransformersModel, model: nn.Module, evaluate: schema.AnyEvaluate) -> Any:
    from distillkit.adapters.transformers import transformers_model as adapter_of

    adapter = adapter_of(model)
    adapter.norm = _processor_norm(config)
    if isinstance(evaluate, schema.Evaluate):
        adapter.norm = adapter.norm or adapter.detector_norm(model)
        adapter.score, adapter.most = evaluate.score, evaluate.most
    return adapter


def _processor_norm(config: schema.TransformersModel) -> Any:
    """(mean, std) of the image processor that lies beside a config or weights; None: there is none."""
    source = config.pretrained or config.config
    if source is None:
        return None
    path = Path(source) if Path(source).is_dir() else Path(source).parent
    file: Path | None = path / "preprocessor_config.json"
    if config.pretrained and not Path(config.pretrained).is_dir():
        from transformers.utils import cached_file

        found = cached_file(config.pretrained, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        file = Path(found) if found else None
    if file is None or not file.is_file():
        return None
    said = json.loads(file.read_text(encoding="utf-8"))
    if not said.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if "image_mean" not in said or "image_std" not in said:
        return None
    return tuple(said["image_mean"]), tuple(said["image_std"])


# -- what must not be there -------------------------------------------------------------------------------------------


def _check(part: Any, where: str = "") -> None:
    """Raises RunError for what could make transformers import, read or fetch something."""
    if isinstance(part, dict):
        for key, value in part.items():
            at = f"{where}.{key}".strip(".")
            if key in _FORBIDDEN:
                raise RunError(f"config: {at} would have code or files of others read: take it out; {_WAY}")
            if key == "use_pretrained_backbone" and value:
                raise RunError(
                    f"config: {at} would download weights: say pretrained: NAME for the whole model, or false"
                )
            if key == "backbone_kwargs" and isinstance(value, dict) and (wrong := value.keys() - set(_BACKBONE)):
                raise RunError(f"config: {at}.{min(wrong)}: expected one of {', '.join(_BACKBONE)}")
            if "implementation" in str(key) and value not in _ATTENTION:
                raise RunError(f"config: {at}: expected one of {', '.join(_ATTENTION)}, got {value!r}")
            _check(value, at)
    elif isinstance(part, list | tuple):
        for item in part:
            _check(item, where)
    elif isinstance(part, str) and not _WORD.fullmatch(part):
        raise RunError(f"config: {where}: {part!r} is more than a word, and may name code or files of others; {_WAY}")


_WAY = "build such a model in a package of yours (distillkit.register_model), with kind: custom"
