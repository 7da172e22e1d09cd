"""The folder of a run: whose it is, who works in it, and what it was made with."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from distillkit import __version__
from distillkit import recipe as recipes
from distillkit.data.label_store import MANIFEST
from distillkit.schema import Recipe
from distillkit.training import checkpoint
from distillkit.training.errors import RunError
from distillkit.training.processes import processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("torch", "torchvision", "timm", "numpy", "accelerate", "pydantic", "pycocotools", "faster-coco-eval")
LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No second run works in ``folder`` meanwhile. However this one ends, by ``kill -9`` too, the next one may.

    Does nothing where files cannot be locked (Windows, some network disks).

    Raises:
        RunError: another process is at it.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            # of lockf and flock the one that a loader's workers, which may outlive a killed run, do not inherit
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RunError(
                f"{folder} is being worked in by the process {file.read().strip()}: wait for it or stop it, or "
                "name another folder (of a run: name=second)"
            ) from None
        except OSError:  # a disk without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def open_folder(folder: Path, recipe: Recipe, fresh: bool) -> None:
    """Make the run folder, or check that what it holds can be gone on with.

    Keys that change no result may differ, and so may rows of ``compare`` whose training has not begun.

    Raises:
        RunError: it holds a run whose recipe differs, or files that are no run.
    """
    check_owner(folder)
    if fresh:
        for entry in _content(folder):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    record = folder / "recipe.yaml"
    if record.exists():
        _check_same(record, recipe)
        _check_maps(folder, recipe)
    else:
        checkpoint.write_json(folder / "versions.json", versions(recipe))
    if not record.exists() or record.read_text(encoding="utf-8") != recipes.resolved(recipe):
        checkpoint.write_text(record, recipes.resolved(recipe))


def check_owner(folder: Path) -> None:
    """Raises RunError for a folder of files that are no run."""
    if _content(folder) and not any((folder / name).exists() for name in ("versions.json", "recipe.yaml")):
        raise RunError(f"{folder} is not empty and holds no recipe.yaml: not a run; choose another name or output")


def _content(folder: Path) -> list[Path]:
    """What is in a folder, beside the lock: a process may hold it."""
    return [entry for entry in folder.iterdir() if entry.name != LOCK] if folder.exists() else []


def _check_same(record: Path, recipe: Recipe) -> None:
    old, new = (yaml.safe_load(text) for text in (record.read_text(encoding="utf-8"), recipes.resolved(recipe)))
    _check_rows_there(old, new, record.parent)
    there, here = _comparable(old, record.parent), _comparable(new, record.parent)
    keys = [k for k in sorted(there.keys() | here.keys()) if there.get(k) != here.get(k)]
    if keys:
        changes = "; ".join(f"{k} was {there.get(k)!r}, is {here.get(k)!r}" for k in keys[:5])
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise RunError(
            f"{record.parent} holds a run of another recipe ({changes}{more}): start over with --fresh, or give this "
            "run another name, as in name=second"
        )


def _check_rows_there(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """A row that was begun stays in the recipe: what it was made with would be forgotten with it."""
    named = {row["row"] for row in new["compare"]}
    for name in (row["row"] for row in old["compare"]):
        begun = folder / recipes.slug(name)
        if name not in named and _begun(begun):
            raise RunError(
                f"{folder} holds the row {name!r}, which is not in compare any more: put it back, or delete {begun}"
            )


def _check_maps(folder: Path, recipe: Recipe) -> None:
    """Label maps are where they were; whether they are those that they were, the recipe does not say."""
    path, now = folder / "versions.json", _label_maps(recipe)
    began = checkpoint.read_json(path).get("label_maps") if path.exists() else now
    if began != now:
        raise RunError(
            f"{folder} was begun with other label maps than those that data.label_maps holds now: put the first ones "
            "back, start over with --fresh, or give this run another name, as in name=second"
        )


def _label_maps(recipe: Recipe) -> str | None:
    """What the manifest of the recipe's label maps is known by; None: there are none, or published ones without it."""
    manifest = Path(getattr(recipe.data, "label_maps", None) or "") / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None


def _comparable(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What of a resolved recipe must stay as it is: by dotted path, rows by their names."""
    rows = {row["row"]: row for row in raw["compare"] if _begun(folder / recipes.slug(row["row"]))}
    flat = _flat({**raw, "compare": rows})
    return {key: value for key, value in flat.items() if not _is_harmless(key)}


def _is_harmless(key: str) -> bool:
    """Whether a key changes neither weights nor scores; ``compare`` itself stands for no rows at all."""
    return key in ("output", "data.workers", "compare") or key.endswith("train.save_every")


def _begun(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("last.pt", "result.json"))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping from dotted path to value."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, below in pairs for k, v in _flat(below, f"{path}.{key}" if path else str(key)).items()}
    return {path: value}


def versions(recipe: Recipe) -> dict[str, Any]:
    """What this run is made with: packages, machine, commit, seed."""
    return {
        "python": platform.python_version(),
        "packages": {"distillkit": __version__, **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": recipe.train.threads or torch.get_num_threads(),
        "processes": processes().num_processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processes().device.type,
        "commit": _commit(),
        "seed": recipe.seed,
        "label_maps": _label_maps(recipe),
        "command": _command(),
    }


def changed_versions(folder: Path, recipe: Recipe) -> list[str]:
    """In what this machine differs from the one the run was begun on, as far as results depend on it to the bit."""
    path = folder / "versions.json"
    if not path.exists():
        return []
    began, now = (
        {"torch": v["packages"]["torch"], **{key: v[key] for key in ("threads", "processes", "device")}}
        for v in (checkpoint.read_json(path), versions(recipe))
    )
    return [f"{key} was {began[key]}, is {now[key]}" for key in began if began[key] != now[key]]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _command() -> str:
    """As it was typed: `python -m distillkit` shows itself to Python as a path to __main__.py."""
    program, *words = sys.argv
    path = Path(program)
    if path.stem == "distillkit" or (path.parent.name, path.name) == ("distillkit", "__main__.py"):
        program = "distillkit"
    return shlex.join([program, *words])


def _commit() -> str | None:
    """The commit of the working folder, with "+" where files differ from it; None outside git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
