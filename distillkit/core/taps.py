"""Taps: read-only forward hooks on module paths; and the few hooks that change what the student computes.

A path is a dotted module name with optional parts:
``layer4``; ``head.scales.*`` (``*`` stands for one name, the modules in natural order); ``conv_77[80:]`` (channels of a
map, dimension 1); ``head[1]`` (an element of a tuple or list), ``backbone[pool]`` (an entry of a dict), in any
sequence, as in ``head[1][:80]``; ``backbone[*]`` (all elements or entries, in their order).
``module.`` and ``_orig_mod.`` in names are ignored.
"""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from distillkit.core.errors import TapError


@dataclass(frozen=True)
class Place:
    """Where a view is read: module paths, and how often each module runs in one forward pass.

    A head shared by L pyramid levels runs L times; one path per level runs once each.

    reads: ``tensors``, picked from outputs as the paths say; ``output``: what the module returned as it is, of any
    type; ``input``: the tuple of what it was called with.
    """

    paths: tuple[str, ...]
    fires: int = 1
    reads: Literal["tensors", "output", "input"] = "tensors"


class AllTapsFired(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a teacher's forward as soon as everything that is read has been recorded."""


class TappedHooks(OrderedDict[int, Callable[..., Any]]):
    """A module's forward hooks while it is tapped. Its copies and pickles are the hooks without the tap.

    It stays after the last tap where the user has registered hooks since: their handles know this dict.
    """

    def __init__(self, hooks: dict[int, Callable[..., Any]]):
        super().__init__((key, _Forwarded(hooks, key)) for key in hooks)
        self.untapped = hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[int, Callable[..., Any]]:
        return deepcopy(OrderedDict(self.users()), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (self.users(),)

    def users(self) -> list[tuple[int, Callable[..., Any]]]:
        """The user's own hooks: those from before the module was tapped, and those added since."""
        since = [(key, hook) for key, hook in self.items() if not isinstance(hook, _Hook | _Change | _Forwarded)]
        return [*self.untapped.items(), *since]


class _Forwarded:
    """A hook that the user registered before the module was tapped, and may still remove by its handle."""

    def __init__(self, hooks: dict[int, Callable[..., Any]], key: int):
        self.hooks, self.key = hooks, key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.hooks.get(self.key)
        return None if hook is None else hook(*args, **kwargs)


class _Hook:
    def __init__(self, taps: Taps, name: str):
        self.taps, self.name = taps, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.taps.take(self.name, args, output)


class _Change:
    def __init__(self, changes: Changes, function: Change):
        self.changes, self.function = changes, function

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.function(output) if self.changes.active else None


Change = Callable[[Tensor], Tensor]


class _Hooked:
    """Hooks of ours on some modules of a model, one a module."""

    def _put(self, modules: Mapping[str, nn.Module], hooks: Mapping[str, _Hook | _Change]) -> None:
        self._modules = dict(modules)
        for name, module in self._modules.items():
            there = module._forward_hooks
            if not isinstance(there, TappedHooks):
                there = module._forward_hooks = TappedHooks(there)
            there[id(self)] = hooks[name]

    def remove(self) -> None:
        for module in self._modules.values():
            hooks = module._forward_hooks
            if not isinstance(hooks, TappedHooks):
                continue
            hooks.pop(id(self), None)
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Forwarded) and k not in hooks.untapped]:
                del hooks[key]  # the user removed what it forwarded to
            if all(isinstance(hook, _Forwarded) for hook in hooks.values()):
                module._forward_hooks = hooks.untapped
        self._modules = {}


class Changes(_Hooked):
    """What distillers do to the outputs of a student's modules, while ``active``: MixToken.

    Made before the taps, which then read what the student reads.

    Args:
        model: the student.
        functions: by module path.

    Raises:
        TapError: a path that names no module.
    """

    def __init__(self, model: nn.Module, functions: Mapping[str, Change]):
        self.active = False
        names = {_plain(name): module for name, module in model.named_modules()}
        found = {path: _resolve(path, names, "student")[0] for path in functions}
        modules = {name: names[name] for name in found.values()}
        self._put(modules, {found[path]: _Change(self, function) for path, function in functions.items()})

    @contextmanager
    def on(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False


class Taps(_Hooked):
    """All taps on one model.

    Args:
        model: the model; never changed but for the hooks, which ``remove`` takes away.
        places: what is read.
        role: "student" or the teacher's name, for messages.

    Raises:
        TapError: a path that names no module (the nearest existing names are listed), or two places that expect the
            same module to run a different number of times.
    """

    def __init__(self, model: nn.Module, places: Iterable[Place], role: str):
        self.model, self.role = model, role
        self.recording = False
        self.exit_early = False
        self.caught: dict[str, list[Any]] = {}
        self.left = 0
        self.expected: dict[str, int] = {}
        self.inputs: set[str] = set()  # modules whose inputs are read, too
        modules: dict[str, nn.Module] = {}
        names = {_plain(name): module for name, module in model.named_modules()}
        for place in places:
            for path in place.paths:
                for name in _resolve(path, names, role):
                    if self.expected.setdefault(name, place.fires) != place.fires:
                        raise TapError(
                            f"{role}: two views expect {name!r} to run {self.expected[name]} and {place.fires} times "
                            "in one forward"
                        )
                    modules[name] = names[name]
                    if place.reads == "input":
                        self.inputs.add(name)
        self.total = sum(self.expected.values())
        self._put(modules, {name: _Hook(self, name) for name in modules})

    def start(self, exit_early: bool = False) -> None:
        """Record from now on; with ``exit_early`` raise ``AllTapsFired`` once all have fired as often as declared."""
        self.caught = {name: [] for name in self.expected}
        self.left, self.exit_early, self.recording = self.total, exit_early, True

    def take(self, name: str, args: Any, output: Any) -> None:
        if not self.recording:
            return
        self.caught[name].append((args if name in self.inputs else None, output))
        self.left -= 1
        if self.exit_early and self.left == 0:
            raise AllTapsFired

    def stop(self) -> dict[str, list[Any]]:
        """Stop recording and hand over what was caught; nothing stays behind."""
        caught, self.caught, self.recording = self.caught, {}, False
        return caught

    def read(self, caught: dict[str, list[Any]], place: Place) -> list[Any]:
        """The tensors of a place (or what else it ``reads``): paths in their order, modules of a ``*`` in natural
        order, firings in theirs."""
        found: list[Any] = []
        for path in place.paths:
            pick = _picker(path, self.role)
            for name in _resolve(path, self._modules, self.role):
                fired = caught[name]
                if len(fired) != place.fires:
                    raise TapError(_miscount(self.role, name, len(fired), place.fires))
                for args, output in fired:
                    whole = {"input": args, "output": output}
                    found += [whole[place.reads]] if place.reads in whole else pick(output, name)
        return found


def is_tapped(module: nn.Module) -> bool:
    return any(isinstance(hook, _Hook) for hook in module._forward_hooks.values())


def _miscount(role: str, name: str, fired: int, declared: int) -> str:
    if fired == 0:
        return (
            f"{role}: the tap on {name!r} never fired: this module does not run in the {role}'s forward in train mode "
            "(or runs through a method other than forward); tap a module that does"
        )
    return (
        f"{role}: the tap on {name!r} fired {fired} times in one forward, declared {declared}; "
        "declare how often it runs (a head shared by several levels runs once per level)"
    )


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def module_name(path: str) -> str:
    """A path less its brackets."""
    return _plain(path.split("[", 1)[0])


def channel_ranges(path: str) -> list[slice]:
    """The channel ranges in a path's brackets, in order."""
    found = re.findall(r"\[(-?\d*):(-?\d*)\]", path)
    return [slice(*(int(end) if end else None for end in ends)) for ends in found]


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _resolve(path: str, names: dict[str, nn.Module], role: str) -> list[str]:
    wanted = module_name(path)
    if "*" not in wanted:
        found = [wanted] if wanted in names else []
    else:
        pattern = re.compile(re.escape(wanted).replace(r"\*", "[^.]+"))
        found = sorted((name for name in names if pattern.fullmatch(name)), key=_natural)
    if not found:
        near = difflib.get_close_matches(wanted.replace("*", "0"), names, n=5, cutoff=0.3)
        raise TapError(
            f"{role}: no module is called {wanted!r}; nearest: {', '.join(map(repr, near)) or 'none'}. "
            "model.named_modules() lists them all"
        )
    return found


def _picker(path: str, role: str) -> Callable[[Any, str], list[Tensor]]:
    """What the brackets of a path ask for, as a function of a module's output."""
    steps = re.findall(r"\[([^\]]*)\]", path)
    for step in steps:
        if not re.fullmatch(r"-?\d+|(-?\d*):(-?\d*)|\*|[\w.-]+", step):
            raise TapError(f"{role}: {path!r}: expected [index], [name], [first:last] or [*], got [{step}]")

    def pick(output: Any, name: str) -> list[Tensor]:
        found = [output]
        for step in steps:
            found = [part for whole in found for part in _parts(whole, step, path, role)]
        for part in found:
            if not isinstance(part, Tensor):
                raise TapError(
                    f"{role}: {name!r} returns a {type(part).__name__}, not a tensor; "
                    f"say which part is meant, as in {path}[0]"
                )
        return found

    return pick


def _parts(whole: Any, step: str, path: str, role: str) -> list[Any]:
    """What one pair of brackets means of an output, or of a part of it."""
    if step == "*":
        if isinstance(whole, Tensor):
            return [whole]
        return list(whole.values()) if isinstance(whole, Mapping) else list(whole)
    if ":" in step:
        first, last = (int(end) if end else None for end in step.split(":"))
        return [whole[:, first:last]]
    if isinstance(whole, Mapping):
        by_name = {str(key): value for key, value in whole.items()}
        # transformers' outputs are indexed, too; where names are numbers, a number is a name
        number = re.fullmatch(r"-?\d+", step) and not any(name.isdigit() for name in by_name)
        if number and -len(whole) <= int(step) < len(whole):
            return [list(whole.values())[int(step)]]
        if step not in by_name:
            raise TapError(f"{role}: {path!r}: there is no entry {step!r}, only {', '.join(map(repr, by_name))}")
        return [by_name[step]]
    if not re.fullmatch(r"-?\d+", step):
        raise TapError(
            f"{role}: {path!r}: expected [index] or [first:last] of a {type(whole).__name__}, got [{step}], which "
            "names an entry of a dict"
        )
    return [whole[int(step)]]
