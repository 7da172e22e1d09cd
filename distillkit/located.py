"""YAML whose values know where they were written, so that a mistake can be named by file and line.

Reading, `extends:`, overrides of the command line and `${VAR}`; no schema. Nothing in a file is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file (from 1), or an override (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Mistakes:
    """Collects what is wrong; each mistake is told once."""

    def __init__(self) -> None:
        self.incomplete = False
        """A file could not be read: what is missing may stand there."""
        self._found: dict[str, Place] = {}
        self._unreadable: list[Keys] = []

    def add(self, place: Place, path: Keys, what: str) -> None:
        if not any(path[: len(keys)] == keys for keys in self._unreadable):
            dotted = ".".join(map(str, path))
            self._found.setdefault(f"{place}: {dotted}: {what}" if dotted else f"{place}: {what}", place)

    def add_unreadable(self, place: Place, path: Keys, what: str) -> None:
        """A mistake that leaves no value to judge: nothing more is said about `path` and what is below it."""
        self.add(place, path, what)
        if path:
            self._unreadable.append(path)

    def texts(self) -> list[str]:
        """In the order of the lines; files in the order in which they were met; overrides last."""
        sources = list(dict.fromkeys(place.source for place in self._found.values()))

        def order(item: tuple[str, Place]) -> tuple[bool, int, int]:
            return not item[1].line, sources.index(item[1].source), item[1].line

        return [text for text, _ in sorted(self._found.items(), key=order)]


@dataclass(frozen=True)
class Node:
    """A value and the place of its key. Mappings and lists hold nodes."""

    value: Any
    place: Place

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def child(self, key: str | int) -> Node | None:
        if isinstance(self.value, dict):
            return self.value.get(key)
        inside = isinstance(self.value, list) and isinstance(key, int) and key < len(self.value)
        return self.value[key] if inside else None

    def place_of(self, path: Iterable[str | int]) -> Place:
        """The place of the deepest key of `path` that was written."""
        node = self
        for key in path:
            below = node.child(key)
            if below is None:
                break
            node = below
        return node.place


# -- one document -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: `no` and `on` are words, `1e-4` is a number, `1:30` and dates are text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]  # not those of YAML 1.1


_NUMBER = "-+.0123456789"
_FLOAT = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(?:0|[1-9][0-9]*)", [*_NUMBER]),
    ("float", _FLOAT, [*_NUMBER]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT})$"), [*_NUMBER])

_SCALARS = {f"tag:yaml.org,2002:{t}" for t in ("str", "bool", "null", "int", "float")}
_DEEPEST = 50


def dump(value: Any) -> str:
    """Plain values as YAML that reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True)
class _Parser:
    """Turns the nodes of one YAML document into ours. `place` gives the place of a line (from 1)."""

    loader: _Loader
    place: Callable[[int], Place]
    mistakes: Mistakes

    def convert(self, node: yaml.Node, path: Keys, place: Place) -> Node:
        if len(path) > _DEEPEST:
            self.mistakes.add_unreadable(place, path[:5], f"nested deeper than {_DEEPEST} levels")
            return Node(None, place)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return Node(self.mapping(node, path), place)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            items = [self.convert(item, (*path, i), self.place_of(item)) for i, item in enumerate(node.value)]
            return Node(items, place)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self.scalar(node, path, place)
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        refused = f"the tag {tag} is refused: a recipe is data and never runs code"
        self.mistakes.add_unreadable(self.place_of(node), path, refused)
        return Node(None, place)

    def scalar(self, node: yaml.ScalarNode, path: Keys, place: Place) -> Node:
        try:
            return Node(self.loader.construct_object(node), place)
        except (ValueError, KeyError):  # `!!int x`; or a number of more digits than Python converts
            tag = node.tag.rpartition(":")[2]
            self.mistakes.add_unreadable(place, path, f"{node.value[:40]!r} cannot be read as {tag}")
            return Node(None, place)

    def mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self.place_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.add(place, path, "a key must be a word")
                continue
            key = key_node.value
            if key in found:
                self.mistakes.add(place, (*path, key), f"given twice; first at {found[key].place}")
            found[key] = self.convert(value_node, (*path, key), place)
        return found

    def place_of(self, node: yaml.Node) -> Place:
        return self.place(_line(node.start_mark))


def parse(text: str, place: Callable[[int], Place], path: Keys, mistakes: Mistakes) -> Node | None:
    """One YAML document as nodes, None if it is not YAML. `path` is where it stands in the whole."""
    try:
        if _has_alias(text, place, path, mistakes):
            return None
        loader = _Loader(text)
        root = loader.get_single_node()
        return _Parser(loader, place, mistakes).convert(root, path, place(1)) if root else Node(None, place(1))
    except yaml.MarkedYAMLError as error:
        line = _line(error.problem_mark or error.context_mark)
        mistakes.add_unreadable(place(line), path, f"not YAML: {error.problem or error.context}")
    except yaml.YAMLError as error:
        mistakes.add_unreadable(place(1), path, f"not YAML: {' '.join(str(error).split())}")
    except RecursionError:
        mistakes.add_unreadable(place(1), path, f"nested deeper than {_DEEPEST} levels")
    return None


def _line(mark: Any) -> int:
    return mark.line + 1 if mark else 1


def _has_alias(text: str, place: Callable[[int], Place], path: Keys, mistakes: Mistakes) -> bool:
    """Aliases are refused: a few lines of them can stand for gigabytes, and `extends` does what they are used for."""
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            what = f"*{event.anchor} stands for another value; write the value out, or use extends"
            mistakes.add_unreadable(place(_line(event.start_mark)), path, what)
            return True
    return False


# -- files that extend each other -------------------------------------------------------------------------------------


def read(path: Path, mistakes: Mistakes, chain: tuple[Path, ...] = ()) -> Node:
    """A file's nodes laid over those of the file that it extends; always a mapping."""
    start = Place(str(path), 1)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        mistakes.add(start, (), f"cannot be read: {error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}")
        mistakes.incomplete = True
        return Node({}, start)
    node = parse(text, lambda line: Place(str(path), line), (), mistakes)
    if node is not None and not isinstance(node.value, dict):
        mistakes.add(start, (), f"expected a mapping of keys such as data, student and train; got {said(node.value)}")
    if node is None or not isinstance(node.value, dict):
        mistakes.incomplete = True
        return Node({}, start)
    return _extended(path, node, mistakes, (*chain, path.resolve()))


def _extended(path: Path, node: Node, mistakes: Mistakes, chain: tuple[Path, ...]) -> Node:
    below = node.value.get("extends")
    own = replace(node, value={key: n for key, n in node.value.items() if key != "extends"})
    if below is None:
        return own
    base = path.parent / below.value if isinstance(below.value, str) else None
    if base is None:
        what = f"expected the path of one recipe, got {said(below.plain())}"
    elif base.resolve() in chain:
        what = f"recipes extend each other in a circle: {' -> '.join(p.name for p in (*chain, base))}"
    elif not base.is_file():
        what = f"no such file: {base} (paths are relative to the file that extends)"
    else:
        return _laid_over(read(base, mistakes, chain), own)
    mistakes.add(below.place, ("extends",), what)
    mistakes.incomplete = True
    return own


def merged(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings key by key; anything else replaces, also a mapping of another `kind`."""
    if not (isinstance(below, dict) and isinstance(above, dict)) or _another_kind(below.get("kind"), above.get("kind")):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}


def _another_kind(below: Any, above: Any) -> bool:
    return below is not None and above is not None and below != above


def _laid_over(below: Node | None, above: Node) -> Node:
    """`merged` for nodes."""
    if below is None or not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    kinds = [getattr(node.child("kind"), "value", None) for node in (below, above)]
    if _another_kind(*kinds):
        return above
    inside = {key: _laid_over(below.child(key), node) for key, node in above.value.items()}
    return replace(above, value={**below.value, **inside})


# -- overrides and the environment ------------------------------------------------------------------------------------


def override(root: Node, text: str, mistakes: Mistakes) -> Node:
    """`root` with one `a.b=c` set. The value, read as YAML, replaces what is there."""
    place = Place(f"override {text!r}")
    dotted, equals, value = text.partition("=")
    keys: Keys = tuple(int(key) if key.isdecimal() else key for key in dotted.strip().split("."))
    if not equals or "" in keys:
        mistakes.add(place, (), "expected key.path=value, as in train.epochs=3")
        return root
    leaf = parse(value, lambda _: place, keys, mistakes)
    return root if leaf is None else _put(root, keys, leaf, (), mistakes)


def _put(node: Node, keys: Keys, leaf: Node, path: Keys, mistakes: Mistakes) -> Node:
    if not keys:
        return leaf
    key, value = keys[0], node.value
    if isinstance(value, list):
        if not isinstance(key, int) or key >= len(value):
            mistakes.add(leaf.place, path, f"is a list; expected a number below its length {len(value)}, got {key!r}")
            return node
        items = [_put(n, keys[1:], leaf, (*path, key), mistakes) if i == key else n for i, n in enumerate(value)]
        return replace(node, value=items)
    if value is not None and not isinstance(value, dict):
        mistakes.add(leaf.place, path, f"is {said(value)}, which holds no key {key!r}")
        return node
    inside = value or {}
    below = inside.get(str(key), Node(None, leaf.place))
    return replace(node, value={**inside, str(key): _put(below, keys[1:], leaf, (*path, key), mistakes)})


_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def expanded(node: Node, path: Keys, mistakes: Mistakes) -> Node:
    """`${VAR}` in texts, from the environment."""
    if isinstance(node.value, dict):
        return replace(node, value={key: expanded(n, (*path, key), mistakes) for key, n in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[expanded(n, (*path, i), mistakes) for i, n in enumerate(node.value)])
    if not isinstance(node.value, str):
        return node
    unset = [name for name in _VARIABLE.findall(node.value) if name not in os.environ]
    if unset:
        what = f"the environment variable {', '.join(unset)} is not set; set it, or write the value itself"
        mistakes.add_unreadable(node.place, path, what)
        return node
    return replace(node, value=_VARIABLE.sub(lambda match: os.environ[match[1]], node.value))


def said(value: Any) -> str:
    """A value in the words of a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:80]!r}"
    return "a list" if isinstance(value, Sequence) else "a mapping"
