"""A user's own models, distillers and data sets, by name.

A recipe says `kind: custom, name: ...`. The code behind the name comes from a package that the person who runs the
command names with `--import my_package`, or that is installed with an entry point. In my_package:

    import distillkit
    distillkit.register_model("my-detector", build_my_detector)

or in its pyproject.toml:

    [project.entry-points."distillkit.models"]
    my-detector = "my_package:build_my_detector"

The groups are distillkit.models, distillkit.distillers and distillkit.data. What a builder is called with:

    model      builder(classes=number of classes, **options) -> nn.Module, or (nn.Module, Adapter): the adapter says
               where the views are that distillers read, e.g. distillkit.DistributionHead(...) for LD
    distiller  builder(**options) -> distillkit.Distiller
    data       builder(split="train"|"val"|"test", transform=..., seed=..., **options) -> a data set like CocoDetection
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from distillkit.explain import nearest

Kind = Literal["model", "distiller", "data"]
Builder = Callable[..., Any]

#: entry point groups
GROUPS: dict[Kind, str] = {
    "model": "distillkit.models",
    "distiller": "distillkit.distillers",
    "data": "distillkit.data",
}

_registered: dict[Kind, dict[str, Builder]] = {"model": {}, "distiller": {}, "data": {}}


class PluginError(ValueError):
    """A package or a name of it that cannot be had; the message says what there is and how to register."""


def register_model(name: str, builder: Builder) -> None:
    """Make `builder(classes=..., **options)` known as `kind: custom, name: NAME` of a recipe's models.

    The builder returns the model, or (model, adapter) where distillers read what only an adapter finds: for `LD`, say,
    `return model, distillkit.DistributionHead(...)`. It builds teachers as well as students.
    """
    _register("model", name, builder)


def register_distiller(name: str, builder: Builder) -> None:
    """Make `builder(**options) -> Distiller` known as `kind: custom, name: NAME` of a recipe's distillers."""
    _register("distiller", name, builder)


def register_data(name: str, builder: Builder) -> None:
    """Make `builder(split=..., transform=..., seed=..., **options)` known as `kind: custom, name: NAME` of the data."""
    _register("data", name, builder)


def _register(kind: Kind, name: str, builder: Builder) -> None:
    if not callable(builder):
        raise PluginError(f"{kind} {name!r}: expected a function or class that builds it, got {type(builder).__name__}")
    known = _registered[kind].setdefault(name, builder)
    if known is not builder:
        raise PluginError(f"{kind} {name!r} is registered already, by {known.__module__}; choose another name")


def import_packages(names: Iterable[str]) -> None:
    """Import what the command line names, from the installed packages or the current folder.

    Raises:
        PluginError: there is no such package, or it fails while it is imported.
    """
    for name in names:
        if "" not in sys.path:
            sys.path.append("")  # last, so that a file here never hides an installed package
        try:
            importlib.import_module(name)
        except PluginError:
            raise
        except ModuleNotFoundError as error:
            itself = error.name in (name, name.partition(".")[0])
            what = "no such package here or among the installed" if itself else f"it needs {error.name!r}: install it"
            if itself and name.endswith(".py"):
                what = f"name the module, not its file: --import {Path(name).stem}"
            raise PluginError(f"--import {name}: {what}") from error
        except Exception as error:
            raise PluginError(f"--import {name}: fails with {type(error).__name__}: {error}") from error


def names(kind: Kind) -> list[str]:
    """What is registered or installed of a kind, by name."""
    return sorted({*_registered[kind], *(point.name for point in _installed(kind))})


def build(kind: Kind, name: str, **arguments: Any) -> Any:
    """Build what is registered as `name`.

    Raises:
        PluginError: nothing is; it does not take these arguments; or its entry point cannot be loaded.
    """
    builder = _registered[kind].get(name) or _load(kind, name)
    try:
        return builder(**arguments)
    except TypeError as error:
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if inside:
            raise
        given = ", ".join(arguments)
        raise PluginError(f"{kind} {name!r} cannot be called with {given}: {error}; compare its options") from error


def _load(kind: Kind, name: str) -> Builder:
    for point in _installed(kind):
        if point.name == name:
            try:
                return point.load()
            except Exception as error:
                what = f"the entry point {point.value!r} of {GROUPS[kind]} fails with {type(error).__name__}: {error}"
                raise PluginError(f"{kind} {name!r}: {what}") from error
    known = names(kind)
    hint = nearest(name, known) if known else "; none is registered"
    how = f"distillkit.register_{kind}({name!r}, builder) in a package that --import PACKAGE names"
    raise PluginError(f"no {kind} is called {name!r}{hint}; register it: {how}, or an entry point of {GROUPS[kind]}")


def _installed(kind: Kind) -> Iterable[EntryPoint]:
    return entry_points(group=GROUPS[kind])
