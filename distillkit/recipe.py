"""Recipes: what a run does, in one YAML file. Reading, merging and checking them; imports no torch.

A recipe is data. No tag, no expression and no import path in it is ever run; `custom` kinds are names that a package,
named on the command line, has registered (`distillkit.plugins`). Its blocks are in `distillkit.schema`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from distillkit.explain import MISSING, Wrong, nearest, wrong_in
from distillkit.located import Keys, Mistakes, Node, dump, expanded, merged, override, read, said
from distillkit.schema import TASKS, Recipe, Row, Train, block, recipe_type
from distillkit.schema.search import wrong_search

# -- a recipe with the changes of a row -------------------------------------------------------------------------------


def train_of(recipe: Recipe, changes: dict[str, Any]) -> Train:
    """The recipe's `train` with the changes of a row or of a teacher that is trained first."""
    return TypeAdapter(Train).validate_python(merged(recipe.train.model_dump(), changes))


def slug(row: str) -> str:
    """The folder of a row inside the run folder: `from scratch` -> `from-scratch`."""
    return re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-.") or "row"


def student_of(recipe: Recipe, changes: dict[str, Any]) -> Any:
    """The recipe's `student` with the changes of a row."""
    return TypeAdapter(block(recipe, "student")).validate_python(merged(recipe.student.model_dump(), changes))


def taught_by(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with the changes of a row in its `data`: what the row is trained on."""
    if not changes:
        return recipe
    data = TypeAdapter(block(recipe, "data")).validate_python(merged(recipe.data.model_dump(), changes))
    return recipe.model_copy(update={"data": data})


# -- reading ----------------------------------------------------------------------------------------------------------


class RecipeError(ValueError):
    """All that is wrong with a recipe, in one report.

    Args:
        mistakes: texts `file:line: key.path: what is wrong`, or `override 'a.b=c': ...` for those of the command line.
    """

    def __init__(self, mistakes: Sequence[str]):
        self.mistakes = list(mistakes)
        count = "1 mistake" if len(self.mistakes) == 1 else f"{len(self.mistakes)} mistakes"
        super().__init__("\n".join([f"{count} in the recipe:", *self.mistakes]))


def bundled() -> list[Path]:
    """The recipes that come with the package (in a checkout: those of its `recipes` folder)."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "recipes", here.parent / "recipes") if f.is_dir()), None)
    return sorted(folder.glob("*.yaml")) if folder else []


def find(path: str | Path) -> Path:
    """A recipe's file: an existing path, or the name of a bundled recipe (`quickstart`, `recipes/quickstart.yaml`).

    Raises:
        RecipeError: neither.
    """
    wanted, known = Path(path), {p.stem: p for p in bundled()}
    if wanted.is_file():
        return wanted
    if wanted.parent.name in ("", "recipes") and wanted.suffix in ("", ".yaml") and wanted.stem in known:
        return known[wanted.stem]
    raise RecipeError([f"{path}: no such file, nor a recipe that comes with distillkit{nearest(wanted.stem, known)}"])


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: its file, those it extends, the overrides, the environment; and check it.

    Args:
        path: a file, or the name of a bundled recipe.
        overrides: `key.path=value`, e.g. `train.epochs=3` or `distillers.0.weight=0.5`; the last one for a key counts.

    Raises:
        RecipeError: with every mistake found, each with its place.
    """
    file, mistakes = find(path), Mistakes()
    root = read(file, mistakes)
    for text in overrides:
        root = override(root, text, mistakes)
    root = _with_names(expanded(root, (), mistakes), file.stem)
    raw = _with_defaults(root.plain())
    wrong = [*_wrong_task(raw), *wrong_in(recipe_type(raw), raw), *_wrong_changes(raw), *_wrong_together(raw)]
    for keys, what in wrong:
        if not (mistakes.incomplete and what.startswith(MISSING)):
            mistakes.add(root.place_of(keys), keys, what)
    if texts := mistakes.texts():
        raise RecipeError(texts)
    return TypeAdapter(recipe_type(raw)).validate_python(raw)  # type: ignore[return-value]


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load` of it gives an equal recipe."""
    return dump(_kind_first(recipe.model_dump(mode="json")))


def _kind_first(value: Any) -> Any:
    """As people write it; pydantic puts the keys that kinds share before it."""
    if isinstance(value, list):
        return [_kind_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = sorted(value, key=lambda key: key != "kind")
    return {key: _kind_first(value[key]) for key in keys}


def _with_names(root: Node, stem: str) -> Node:
    """The recipe is called like its file; a distiller like its kind, and its region where several are of one kind."""
    value = {"name": Node(stem, root.place), **root.value}
    node = root.child("distillers")
    if node is not None and isinstance(node.value, list):
        unnamed = [n for n in node.value if _is_unnamed_distiller(n)]
        kinds = [n.value["kind"].value for n in unnamed]
        named = [_named(n, kinds) if n in unnamed else n for n in node.value]
        value["distillers"] = replace(node, value=named)
    return replace(root, value=value)


def _is_unnamed_distiller(node: Node) -> bool:
    if not isinstance(node.value, dict) or node.plain().get("name") is not None:
        return False
    return isinstance(node.plain().get("kind"), str) and node.plain()["kind"] != "custom"


def _named(node: Node, kinds: list[str]) -> Node:
    kind = node.value["kind"].value
    default = "whole" if kind in ("feature-imitation", "pixel-kd") else "main"
    name = f"{kind}-{node.plain().get('region', default)}" if kinds.count(kind) > 1 else kind
    name = name.replace("-", "_").replace("+", "_and_")
    return replace(node, value={**node.value, "name": Node(name, node.place)})


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """So that `train: {optimizer: {lr: 0.02}}` needs no kind, and without distillers there is no distilled row."""
    raw = {**raw, "train": merged(Train().model_dump(), raw.get("train", {}))}
    return raw if raw.get("distillers") else {"compare": ["student"], **raw}


# -- what the schema cannot say ---------------------------------------------------------------------------------------


#: kinds of data whose test split may be left out
FROM_FILES = (
    "coco",
    "voc",
    "dota",
    "hrsc",
    "image-folder",
    "webdataset",
    "voc-masks",
    "coco-semantic",
    "voc-labels",
    "tsv",
    "glue",
)


def _wrong_task(raw: dict[str, Any]) -> Iterator[Wrong]:
    """A task that there is not; the recipe is then judged as one of detection."""
    if raw.get("task", "detection") not in TASKS:
        task = raw.pop("task")
        yield ("task",), f"unknown task {said(task)}{nearest(task, TASKS)}"


def _wrong_changes(raw: dict[str, Any]) -> Iterator[Wrong]:
    """In what rows and teachers change of `train`, `student` and `data`: what is wrong with the changed block only."""
    student, models = raw.get("student"), block(recipe_type(raw), "student")
    for i, row in _mappings(raw.get("compare")):
        yield from _wrong_change(
            block(recipe_type(raw), "data"), raw.get("data"), row.get("data"), ("compare", i, "data")
        )
        yield from _wrong_change(Train, raw["train"], row.get("train"), ("compare", i, "train"))
        yield from _wrong_change(models, student, row.get("student"), ("compare", i, "student"))
    for keys, teacher in _teachers(raw):
        yield from _wrong_change(Train, raw["train"], teacher.get("train"), (*keys, "train"))


def _wrong_change(model: Any, block: Any, changes: Any, at: Keys) -> Iterator[Wrong]:
    if isinstance(block, dict) and isinstance(changes, dict):
        before, after = wrong_in(model, block), wrong_in(model, merged(block, changes))
        yield from ((at + keys, what) for keys, what in after if (keys, what) not in before)


def _wrong_together(raw: dict[str, Any]) -> Iterator[Wrong]:
    """Blocks that are right by themselves and do not fit each other."""
    if raw.get("teacher") is not None and raw.get("teachers"):
        yield ("teachers",), "give either teacher, or several under teachers"
    for keys, teacher in _teachers(raw):
        if is_untrained(teacher) and teacher.get("train") is None:
            yield keys, "has no trained weights: give `checkpoint: FILE`, or `train: {}` to train it first"
        if teacher.get("checkpoint") is not None and teacher.get("train") is not None:
            yield (*keys, "train"), "is for a teacher to be trained first, and this one has a checkpoint; leave one out"
    yield from _wrong_distillers(raw)
    yield from _wrong_rows(raw)
    if _at(raw, "evaluate", "submission") and _at(raw, "data", "kind") != "dota":
        yield ("evaluate", "submission"), "names pictures as DOTA does, and is for data of kind dota; leave it out"
    if of_task := WRONG_IN_TASK.get(raw.get("task", "")):
        yield from of_task(raw)
    if raw.get("task", "detection") != "rotated-detection":
        for i, distiller in _mappings(raw.get("distillers")):
            if distiller.get("overlap", "rotated") != "rotated":
                yield ("distillers", i, "overlap"), "is for rotated objects (task: rotated-detection); leave it out"
    from_files = _at(raw, "data", "kind") in FROM_FILES
    if from_files and _at(raw, "evaluate", "split") == "test" and _at(raw, "data", "test") is None:
        yield ("evaluate", "split"), "is test, but data.test is not given"


def _wrong_classifying(raw: dict[str, Any]) -> Iterator[Wrong]:
    augment = _at(raw, "data", "augment") or {}
    mixed = [key for key in ("mixup", "cutmix") if augment.get(key)]
    conventions = {
        distiller.get("convention", "default")
        for _, distiller in _mappings(raw.get("distillers"))
        if distiller.get("kind") == "token-labeling" and distiller.get("source") == "maps"
    }
    if len(conventions) > 1:
        yield ("data", "label_maps"), "are read in one way in a run: give all token-labeling the same convention"
    for i, distiller in _mappings(raw.get("distillers")):
        kind = distiller.get("kind")
        if kind == "feature-imitation" and distiller.get("region", "whole") != "whole":
            yield ("distillers", i, "region"), "is for detectors; of a classifier's maps the whole is imitated"
        if mixed and kind in ("token-labeling", "dkd"):
            why = "mixes tokens instead" if kind == "token-labeling" else "needs the one true class of a picture"
            yield ("data", "augment", mixed[0]), f"mixes pictures, and {kind} {why}; leave {mixed[0]} out"
    if raw.get("search") is not None:
        yield from wrong_search(raw)


def _wrong_segmenting(raw: dict[str, Any]) -> Iterator[Wrong]:
    for i, distiller in _mappings(raw.get("distillers")):
        if distiller.get("kind") != "feature-imitation":
            continue
        if distiller.get("region", "whole") != "whole":
            yield ("distillers", i, "region"), "is for detectors; of a segmentation model's maps the whole is imitated"
        for side in ("student_at", "teacher_at"):
            if distiller.get(side) is None:
                yield ("distillers", i), f"{side} {MISSING}: name the maps, as in backbone.layer4"


def _wrong_weakly(raw: dict[str, Any]) -> Iterator[Wrong]:
    salient = _at(raw, "data", "saliency") is not None or _at(raw, "data", "kind") == "custom"
    for i, distiller in _mappings(raw.get("distillers")):
        if distiller.get("saliency") and not salient:
            yield ("distillers", i, "saliency"), "is true, and data.saliency names no folder of maps"
        if distiller.get("kind") == "logit-kd" and distiller.get("protocol", "softmax") == "softmax":
            yield ("distillers", i, "protocol"), "is softmax, of one class a picture; labels here are several: sigmoid"
    if _at(raw, "masks", "rule") == "saliency" and not salient:
        yield ("masks", "rule"), "is saliency, and data.saliency names no folder of maps"
    if raw.get("segment") is not None and _at(raw, "data", "kind") == "custom":
        yield ("segment",), "needs data of kind voc-labels: masks are files beside its pictures; leave segment out"
    if isinstance(raw.get("segment"), dict):
        yield from _wrong_change(Train, raw["train"], raw["segment"].get("train"), ("segment", "train"))
    for i, row in _mappings(raw.get("compare")):
        if row.get("masks") == "true" and raw.get("segment") is None:
            yield ("compare", i, "masks"), "is true, and no segmentation model is trained; add the key segment"


def _wrong_texts(raw: dict[str, Any]) -> Iterator[Wrong]:
    learned = not isinstance(_at(raw, "data", "vocabulary"), str)
    for i, row in _mappings(raw.get("compare")):
        changed = row.get("data")
        if not isinstance(changed, dict):
            continue
        if "vocabulary" in changed:
            yield ("compare", i, "data", "vocabulary"), "is one for all rows, and their teachers; leave it out"
        if learned and "train" in changed:
            yield ("compare", i, "data", "train"), "is another text, and the vocabulary is learned from it; give a file"


#: what is wrong in recipes of one task alone
WRONG_IN_TASK = {
    "classification": _wrong_classifying,
    "segmentation": _wrong_segmenting,
    "weak-segmentation": _wrong_weakly,
    "text": _wrong_texts,
}


def _wrong_distillers(raw: dict[str, Any]) -> Iterator[Wrong]:
    several = list(raw["teachers"]) if isinstance(raw.get("teachers"), dict) else []
    names: set[str] = set()
    for i, distiller in _mappings(raw.get("distillers")):
        name = str(distiller.get("name", ""))
        if name and name in names:
            yield ("distillers", i, "name"), f"two distillers are called {name!r}; give each its own name"
        names.add(name)
        if distiller.get("kind") in ("self-ld", "local-to-global"):
            continue
        if distiller.get("source") in ("maps", "labels"):
            yield from _wrong_untaught(raw, i, distiller)
            continue
        teacher = distiller.get("teacher")
        if teacher is not None and teacher not in several:
            known = nearest(teacher, several) if several else "; the only teacher needs no name"
            yield ("distillers", i, "teacher"), f"no teacher is called {teacher!r}{known}"
        elif teacher is None and len(several) > 1:
            yield ("distillers", i), f"which of the teachers {', '.join(several)}? give `teacher: NAME`"
        elif not several and raw.get("teacher") is None and distiller.get("kind") != "custom":
            yield ("distillers", i), "learns from a teacher, and the recipe has none; add the key teacher"


def _wrong_untaught(raw: dict[str, Any], i: int, distiller: dict[str, Any]) -> Iterator[Wrong]:
    """Of a distiller that learns from no teacher."""
    if distiller["source"] == "maps" and _at(raw, "data", "label_maps") is None:
        yield ("distillers", i, "source"), "is maps: give data.label_maps, a folder that `distillkit label` wrote"
    if distiller.get("teacher") is not None:
        yield ("distillers", i, "teacher"), f"is not asked where source is {distiller['source']}; leave one out"


def _wrong_rows(raw: dict[str, Any]) -> Iterator[Wrong]:
    known = [str(d["name"]) for _, d in _mappings(raw.get("distillers")) if "name" in d]
    folders = {"teacher", *(f"teacher-{slug(str(name))}" for name in raw.get("teachers") or ())}
    for i, row in enumerate(raw["compare"] if isinstance(raw.get("compare"), list) else []):
        name = row.get("row") if isinstance(row, dict) else row
        if slug(str(name)) in folders:
            yield ("compare", i), f"another row, or a teacher, is called {name!r} too; give each row its own name"
        folders.add(slug(str(name)))
        wanted = row.get("distillers", "all") if isinstance(row, dict) else Row.WORDS.get(str(row))
        if wanted == "all" and not known:
            yield ("compare", i), f"{name!r} is trained with all distillers, and the recipe has none"
        for missing in [w for w in wanted if w not in known] if isinstance(wanted, list) else []:
            yield ("compare", i, "distillers"), f"no distiller is called {missing!r}{nearest(missing, known)}"


#: torchvision's names of detectors and segmentation models begin so
WITH_BACKBONES = (
    "fcos_",
    "retinanet_",
    "fasterrcnn_",
    "maskrcnn_",
    "keypointrcnn_",
    "ssd",
    "deeplabv3_",
    "fcn_",
    "lraspp_",
)


def is_untrained(model: dict[str, Any]) -> bool:
    """Whether a block of a model, as it is written, comes with random weights. Of a custom one that cannot be told."""
    built = model.get("kind") in ("gfl", "rotated-gfl", "rotated-retina", "deeplab", "fanet", "cam")
    # of these pretrained is the backbone's alone
    of_backbone = model.get("kind") == "torchvision" and str(model.get("model")).startswith(WITH_BACKBONES)
    built = built or model.get("kind") in ("mmdet", "mmrotate") or of_backbone
    built = built or (model.get("kind") in ("timm", "torchvision", "transformers") and not model.get("pretrained"))
    return (built or model.get("weights") in ("new-head", "none")) and model.get("checkpoint") is None


def _teachers(raw: dict[str, Any]) -> Iterator[tuple[Keys, dict[str, Any]]]:
    if isinstance(raw.get("teacher"), dict):
        yield ("teacher",), raw["teacher"]
    if isinstance(raw.get("teachers"), dict):
        yield from ((("teachers", name), t) for name, t in raw["teachers"].items() if isinstance(t, dict))


def _at(raw: Any, *keys: str) -> Any:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def _mappings(items: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(i, item) for i, item in enumerate(items) if isinstance(item, dict)] if isinstance(items, list) else []
