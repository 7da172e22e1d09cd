"""Reading OpenMMLab checkpoints without running any code they name."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Inert:
    """Stands in for every class and function a checkpoint names beyond tensors: it takes anything and does nothing."""

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, under "state_dict" or at its top.

    Runners of OpenMMLab save their logs beside the weights (``HistoryBuffer``, NumPy scalars, bound methods), which
    ``torch.load(weights_only=True)`` refuses. Here all of that becomes inert objects, which are then dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a torch file, or one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        loaded = _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a torch checkpoint: {type(error).__name__}: {error}") from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds no state dict: expected names and tensors at its top or under 'state_dict'")
    return dict(weights)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
        return torch.load(path, "cpu", weights_only=True)
