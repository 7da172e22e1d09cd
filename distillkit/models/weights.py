"""Reading files of weights, whoever wrote them, without running any code they name."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WRAPS = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys that state dicts are saved under


class _Inert:
    """Stands in for every class and function a file names beyond tensors: it takes anything and does nothing."""

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or a torch file, however it is wrapped (see ``unwrapped``).

    Training programs save more than weights: OpenMMLab's runners save their logs (``HistoryBuffer``, NumPy scalars,
    methods), which ``torch.load(weights_only=True)`` refuses. Here all of that becomes inert objects, then dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
    except Exception as error:  # safetensors, zipfile, pickle and struct raise types of their own for a damaged file
        raise ValueError(f"{path} cannot be read as a weights file: {type(error).__name__}: {error}") from error
    weights = unwrapped(loaded) if isinstance(loaded, Mapping) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            f"{path} holds no state dict: names and tensors, at its top or under one of {', '.join(WRAPS)}"
        )
    return weights


def unwrapped(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in what a training program saved: averaged weights before others, as timm takes them, and names
    without the "module." of a model that was trained on several devices."""
    for key in WRAPS:
        if isinstance(saved.get(key), Mapping):
            saved = saved[key]
    return {str(name).removeprefix("module."): value for name, value in saved.items()}


def explain_mismatch(path: str | Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError with the names that are missing, unexpected or of another shape, if there are any.

    A single number may have no dimension in the file and one in the model.
    """
    misshapen = [
        f"{name} {tuple(found[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in wanted.items()
        if name in found and not _fits(found[name].shape, value.shape)
    ]
    groups = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "other shape": misshapen,
    }
    wrong = [
        f"{what} ({len(names)}): {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in groups.items()
        if names
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: " + "; ".join(wrong))


def _fits(found: torch.Size, wanted: torch.Size) -> bool:
    return found == wanted or (found == () and wanted == (1,))


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
        return torch.load(path, "cpu", weights_only=True)
