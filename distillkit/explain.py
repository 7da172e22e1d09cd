"""What a pydantic schema finds wrong with a recipe, in a recipe's words: the key, what it expects, the nearest word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from distillkit.located import Keys, said

Wrong = tuple[Keys, str]
MISSING = "is missing"


def wrong_in(model: Any, raw: Any) -> list[Wrong]:
    """What is wrong with plain values as a block of the schema: keys, and what to say of them."""
    try:
        TypeAdapter(model).validate_python(raw)
    except ValidationError as error:
        found: dict[Keys, list[str]] = {}
        for detail in error.errors(include_url=False):
            keys, blocks = _located(detail, model, raw)
            found.setdefault(keys, []).append(_explained(detail, keys, blocks))
        return [(keys, what) for keys, whats in found.items() for what in _joined(whats)]
    return []


def _joined(whats: list[str]) -> list[str]:
    """Of a value that may be of several types, one sentence."""
    parts = [re.fullmatch("expected (.*); got (.*)", what) for what in whats]
    if len(whats) < 2 or not all(parts):
        return list(dict.fromkeys(whats))
    wanted = " or ".join(dict.fromkeys(part[1] for part in parts if part))
    return [f"expected {wanted}; got {parts[-1][2] if parts[-1] else ''}"]


def _located(detail: ErrorDetails, model: Any, raw: Any) -> tuple[Keys, list[type[BaseModel]]]:
    """Where in the file a mistake is, and which blocks of the schema may stand there.

    pydantic's own location also has the names of the members of unions, which are no keys; they are left out.
    """
    keys: Keys = ()
    blocks, value = blocks_in(model), raw
    for part in detail["loc"]:
        if isinstance(value, dict):
            here = _of_kind(blocks, value)
            fields = here[0].model_fields if len(here) == 1 else {}
            if part in fields:
                blocks = blocks_in(fields[str(part)].annotation)
            elif part not in value:
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        keys = (*keys, part)
    if detail["type"] == "extra_forbidden":
        return keys, _blocks_at(model, raw, keys[:-1])
    return ((*keys, "kind") if detail["type"] == "union_tag_invalid" else keys), blocks


def _blocks_at(model: Any, raw: Any, keys: Keys) -> list[type[BaseModel]]:
    """The blocks of the schema that stand at `keys`, those of the right kind where a kind is given."""
    blocks = _of_kind(blocks_in(model), raw)
    for key in keys:
        raw = raw[key]
        if len(blocks) == 1 and key in blocks[0].model_fields:
            blocks = blocks_in(blocks[0].model_fields[str(key)].annotation)
        blocks = _of_kind(blocks, raw)
    return blocks


def blocks_in(annotation: Any) -> list[type[BaseModel]]:
    """The schema's classes in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Literal:
        return []
    return [block for part in get_args(annotation) for block in blocks_in(part)]


def _of_kind(blocks: list[type[BaseModel]], value: Any) -> list[type[BaseModel]]:
    kind = value.get("kind") if isinstance(value, dict) else None
    return [b for b in blocks if kind in _kinds([b])] or blocks


def _kinds(blocks: Iterable[type[BaseModel]]) -> list[str]:
    fields = [block.model_fields["kind"] for block in blocks if "kind" in block.model_fields]
    return [kind for field in fields for kind in get_args(field.annotation)]


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _explained(detail: ErrorDetails, keys: Keys, blocks: list[type[BaseModel]]) -> str:
    """pydantic's finding in a recipe's words."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in _TYPES:
        return f"expected {_TYPES[kind]}; got {said(value)}"
    if kind == "missing":
        return MISSING
    if kind == "extra_forbidden":
        return f"unknown key{_nearest_key(keys[-1], blocks)}"
    if kind == "union_tag_not_found":
        return f"the key 'kind' {MISSING}; expected one of: {', '.join(_kinds(blocks))}"
    if kind == "union_tag_invalid":
        return f"unknown kind {context['tag']!r}{nearest(context['tag'], _kinds(blocks))}"
    if kind == "literal_error":
        choices = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(value), choices, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        return f"expected one of {', '.join(choices)}; got {said(value)}{guess}"
    if kind == "string_pattern_mismatch":
        return f"expected letters, digits, '.', '_' and '-', the first a letter or digit; got {said(value)}"
    if kind in ("too_short", "too_long"):
        bound = "at least" if kind == "too_short" else "at most"
        return f"expected {bound} {context.get('min_length', context.get('max_length'))} values; got {len(value)}"
    if kind == "value_error":
        return str(context["error"])
    return f"{detail['msg'].replace('Input should', 'must', 1)}; got {said(value)}"


def _nearest_key(key: Any, blocks: list[type[BaseModel]]) -> str:
    """A key of these blocks; or one of that very name in a block below, which was put a level too high."""
    fields = {name: field for block in blocks for name, field in block.model_fields.items()}
    below = [n for n, field in fields.items() if any(key in b.model_fields for b in blocks_in(field.annotation))]
    if len(below) == 1:
        return f"; did you mean '{below[0]}.{key}'?"
    return nearest(key, fields)


def nearest(word: Any, choices: Iterable[str]) -> str:
    """The end of a message: what may have been meant, or all choices where none is near."""
    known = list(choices)
    near = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of: {', '.join(known)}"
