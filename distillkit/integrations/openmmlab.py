"""OpenMMLab's packages (mmdet, mmrotate) on current torch, with nothing compiled: ready to import, build and load.

from distillkit.integrations import openmmlab

openmmlab.prepare()          # before the first import of mmdet
teacher = openmmlab.build("mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py", "gfl_r101.pth")
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillkit.integrations.mmcv_ops import OPS, StandIn
from distillkit.models.weights import explain_mismatch, read_weights

log = logging.getLogger("distillkit")

#: the newest mmcv that mmdet 3.3 and mmrotate 1.x say they work with; those after it they refuse when imported
NEWEST_ACCEPTED = "2.1.0"

_prepared: set[str] = set()


def prepare(*packages: str) -> bool:
    """Make OpenMMLab's packages importable: stand in for mmcv's compiled operators where there are none, said once.

    A compiled ``mmcv._ext`` (mmcv, onedl-mmcv) that is installed is used. mmcv 2.2 and later, which mmdet 3.3 and
    mmrotate 1.x refuse by their number alone, are let pass. Files that mmengine's Runner wrote load on current torch,
    whose ``torch.load`` refuses their logs: the classes these need are allowed, and no others. Call it before such a
    package is imported; a second call for the same package does nothing.

    Args:
        packages: what is imported, "mmdet" unless given.

    Returns:
        Whether the stand-in is in place.

    Raises:
        ImportError: a package is missing, OpenCV lacks a system library, or compiled operators do not fit this torch;
            with the line to type.
    """
    packages = packages or ("mmdet",)
    if _prepared.issuperset(packages):
        return isinstance(sys.modules.get("mmcv._ext"), StandIn)
    check_opencv()
    for package in ("mmengine", "mmcv", *packages):
        if find_spec(package) is None:
            raise ImportError(f"{package} is not installed: {_install(package)}")
    stands_in = _stand_in()
    _allow_logs_of_runners()
    import mmcv

    if stands_in:
        mmcv._ext = sys.modules["mmcv._ext"]
    if missing := [package for package in packages if package not in sys.modules]:
        with _accepted_version(mmcv):
            for package in missing:
                import_module(package)
    _prepared.update(packages)
    return stands_in


def _install(package: str) -> str:
    """The line that brings a package."""
    return f'pip install "distillkit[{"mmrotate" if package == "mmrotate" else "mmdet"}]"'


def check_opencv() -> None:
    """Raises ImportError, naming what is missing and how to get it, where ``cv2`` cannot be imported."""
    try:
        import_module("cv2")
    except ModuleNotFoundError as error:
        raise ImportError(f"OpenCV is not installed ({error}): {_install('mmdet')}") from error
    except ImportError as error:
        raise ImportError(
            f"OpenCV lacks a system library: {error}. The build without windows needs none: "
            "pip uninstall -y opencv-python && pip install opencv-python-headless"
        ) from error


def build(config: str | Path | Mapping[str, Any], checkpoint: str | Path | None = None) -> nn.Module:
    """A model of OpenMMLab with its weights.

    Args:
        config: as in ``made``.
        checkpoint: a file of weights, see ``load``. None: the weights are initialised as the Runner does it, from
            ``init_cfg``, which in configs of the packages names pretrained weights to download.

    Returns:
        The model, on the CPU, in train mode.

    Raises:
        ImportError: see ``prepare``. FileNotFoundError: no such file. ValueError: the weights do not fit the model.
    """
    model = made(config)
    return load(model, checkpoint) if checkpoint is not None else initialised(model)


def initialised(model: nn.Module) -> nn.Module:
    """A model with its weights initialised as the Runner does it, from ``init_cfg``. Returns the model."""
    with _quiet():
        model.init_weights()  # type: ignore[operator]
    return model


def made(config: str | Path | Mapping[str, Any]) -> nn.Module:
    """A model from its config, its weights not yet initialised.

    Args:
        config: a file; one that comes with a package, as in "mmdet::gfl/gfl_r50_fpn_1x_coco.py"; a ``Config``; or the
            ``model`` dict itself.
    """
    described: Any = read_config(config) if isinstance(config, str | Path) else config
    prepare()
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    running = DefaultScope.get_current_instance()
    scope = described.get("default_scope") or (running.scope_name if running is not None else "mmdet")
    prepare(scope)
    import_module(f"{scope}.models")
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(ConfigDict(described.get("model", described)))


def read_config(path: str | Path) -> Any:
    """A ``Config`` from its file; "package::path" is one of those that are installed with a package.

    Raises:
        ImportError: see ``prepare``. FileNotFoundError: no such file.
    """
    prepare()
    from mmengine.config import Config

    package, _, inside = str(path).rpartition("::")
    if package:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"{path}: the package {package} is not installed: {_install(package)}")
        path = Path(spec.origin).parent / ".mim" / "configs" / inside
    if not Path(path).is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    return Config.fromfile(path)


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a file of weights, published or written by a Runner, without running any code it names. Returns the model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, or one whose tensors do not fit: all missing, unexpected and misshapen names.
    """
    weights, wanted = read_weights(path), model.state_dict()
    # a runner that normalises on the device saved what it normalises by; what distillers trained along is not the model
    found = {
        name: value
        for name, value in weights.items()
        if not name.startswith(("data_preprocessor.", "distilled.")) or name in wanted
    }
    explain_mismatch(path, wanted, found)
    model.load_state_dict(found)
    return model


def _stand_in() -> bool:
    """Put the stand-in into ``sys.modules``, unless there is the real one."""
    there = sys.modules.get("mmcv._ext")
    if there is not None:
        return isinstance(there, StandIn)
    if find_spec("mmcv._ext") is not None:
        try:
            import_module("mmcv._ext")
        except ImportError as error:
            raise ImportError(
                f"the compiled operators of the installed mmcv do not fit torch {torch.__version__}: {error}. "
                "Do without them: pip uninstall -y mmcv && pip install mmcv-lite"
            ) from error
        return False
    sys.modules["mmcv._ext"] = StandIn()
    log.warning(
        "mmcv has no compiled operators here: distillkit stands in for %d of them with torchvision's and its own; "
        "any other raises an error when it is called",
        len(OPS),
    )
    return True


@contextmanager
def _accepted_version(mmcv: Any) -> Iterator[None]:
    """mmdet looks at mmcv's number when it is imported, and at nothing else of it."""
    from mmengine.utils import digit_version

    own = mmcv.__version__
    if digit_version(own) > digit_version(NEWEST_ACCEPTED):
        log.warning("mmcv %s is newer than mmdet and mmrotate accept (%s): let pass", own, NEWEST_ACCEPTED)
        mmcv.__version__ = NEWEST_ACCEPTED
    try:
        yield
    finally:
        mmcv.__version__ = own


@contextmanager
def _quiet() -> Iterator[None]:
    """Without mmengine's lines on how every single parameter was initialised."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _allow_logs_of_runners() -> None:
    """What a Runner's file holds beyond tensors: numbers of NumPy and their history, with its four methods."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    def attribute(of: Any, name: str) -> Any:
        if of is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
            raise ValueError(f"a checkpoint asks for {name!r} of {of!r}: only methods of a log's history are allowed")
        return getattr(of, name)

    multiarray = import_module("numpy._core.multiarray" if find_spec("numpy._core") else "numpy.core.multiarray")
    plain = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    named: list[Any] = [(attribute, "builtins.getattr")]
    for where in ("numpy._core.multiarray", "numpy.core.multiarray"):  # of NumPy 2, of NumPy 1
        named += [(multiarray._reconstruct, f"{where}._reconstruct"), (multiarray.scalar, f"{where}.scalar")]
    torch.serialization.add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, *plain, *named])
