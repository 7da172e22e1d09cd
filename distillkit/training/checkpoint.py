"""Files of a run that are either the old one or the new one, never half of one; and the state of random generators."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillkit.training.errors import CheckpointError

FORMAT = "distillkit-checkpoint-1"


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, bring it to the disk, then give it its name in one step.

    Whatever happens meanwhile (a crash, ``kill -9``, a full disk), ``path`` holds the old file or the new one, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # that of the umask: some writers make files that nobody else may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The rename itself lives in the folder; without this a power cut may undo it. Windows cannot open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); delete it, and it is made again") from error


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a training checkpoint: tensors, numbers, strings, lists and dicts of them; no more can be read."""
    atomically(path, lambda p: torch.save({"format": FORMAT, **state}, p))


def load(path: Path) -> dict[str, Any]:
    """Read a training checkpoint to the CPU. No code in the file is run (``weights_only``).

    Raises:
        CheckpointError: the file is cut short, holds something else than plain tensors, or is not one of ours.
    """
    advice = "delete it to start this job again, or start the whole run again with --fresh"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of distillkit ({FORMAT}); {advice}")
    return state


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors. Every tensor is stored by itself, also where two of them share memory."""
    atomically(path, lambda p: save_file({k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}, p))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: no such file, or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected weights, such as final.safetensors of a run")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); name another file") from error


def load_into(model: torch.nn.Module, path: Path) -> None:
    """Load the weights in ``path`` into ``model``, which must have exactly those.

    Raises:
        CheckpointError: unreadable file, or names or shapes that differ (the first few are named).
    """
    weights, own = load_weights(path), model.state_dict()
    wrong = [f"missing {k}" for k in own.keys() - weights.keys()] + [
        f"unknown {k}" for k in weights.keys() - own.keys()
    ]
    wrong += [
        f"{k} is {tuple(weights[k].shape)}, the model has {tuple(own[k].shape)}"
        for k in own.keys() & weights.keys()
        if weights[k].shape != own[k].shape
    ]
    if wrong:
        first = "; ".join(sorted(wrong)[:3])
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {len(wrong)} tensors differ ({first}); "
            "use the recipe these weights were trained with"
        )
    model.load_state_dict(weights)


def check_moments(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """What an optimizer that was loaded from ``path`` remembers of each parameter must be of the parameter's shape.

    Raises:
        CheckpointError: it is not, as where the model was written by another version.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if name != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: the optimizer's {name} is {tuple(value.shape)} for a parameter of "
                    f"{tuple(parameter.shape)}; start this job again with --fresh, or delete the file"
                )


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global generator, as tensors, numbers and lists only."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators where ``random_state`` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
