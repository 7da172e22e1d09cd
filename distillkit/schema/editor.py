"""The JSON schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from distillkit.schema.tasks import TASKS


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: of a file as it is written, before ``load`` fills in what is left out.

    The name is the file's; kinds and other keys of a block may come from a default or from the recipe that it extends.
    """
    tasks = {task: _as_written(TypeAdapter(recipe).json_schema()) for task, recipe in TASKS.items()}
    blocks: dict[str, Any] = {}
    for schema in tasks.values():
        blocks |= schema.pop("$defs")
    detection = tasks.pop("detection")
    of_another = [{"if": _says_task(task), "then": schema} for task, schema in tasks.items()]
    otherwise = {"if": {"not": {"anyOf": [_says_task(task) for task in tasks]}}, "then": detection}
    about = "A recipe of distillkit: what a run does."
    return {
        "title": "Recipe",
        "description": about,
        "type": "object",
        "$defs": blocks,
        "allOf": [otherwise, *of_another],
    }


def _says_task(task: str) -> dict[str, Any]:
    return {"properties": {"task": {"const": task}}, "required": ["task"]}


def _as_written(whole: dict[str, Any]) -> dict[str, Any]:
    """The schema of one task's recipes, with what ``load`` fills in not asked for."""
    keys, blocks = whole["properties"], whole["$defs"]
    train = blocks["Train"]["properties"]
    teachers = [keys["teacher"]["anyOf"][0], keys["teachers"]["additionalProperties"]]
    for choice in (keys["data"], keys["student"], *teachers, train["optimizer"], train["schedule"]):
        choice["anyOf"] = choice.pop("oneOf")  # a block without its kind may be right as several
        for path in choice["discriminator"]["mapping"].values():
            blocks[path.removeprefix("#/$defs/")].pop("required", None)
    keys["extends"] = {"type": "string", "description": "A recipe to start from; its path is relative to this file."}
    del whole["required"]
    of_a_kind = {"required": ["kind"]}
    whole["if"] = {"required": ["extends"]}
    whole["else"] = {"required": ["data", "student"], "properties": {"data": of_a_kind, "student": of_a_kind}}
    return whole
