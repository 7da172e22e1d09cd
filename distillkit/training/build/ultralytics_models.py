"""`kind: ultralytics`: detection models from the yaml files that come with the installed package, and from no others.

What reads a yaml of ultralytics evaluates text in it, so that one of the user's is code, which a recipe never runs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from torch import nn

from distillkit import schema
from distillkit.adapters import with_adapter
from distillkit.adapters.ultralytics import HEADS, UltralyticsHead
from distillkit.training.errors import RunError

#: yolo11n.yaml is the yolo11.yaml of the package at scale n
NAME = re.compile(r"(?P<family>yolov?\d+)(?P<scale>[a-z]?)(?P<kind>(-\w+)?)\.yaml")


def ultralytics_model(
    config: schema.UltralyticsModel, classes: int | Sequence[str], evaluate: schema.AnyEvaluate
) -> nn.Module:
    """The detection model of a block for these classes, their number or names.

    Raises:
        ImportError: ultralytics is not installed.
        RunError: no such model, one that does not detect upright boxes, or a name without a scale.
    """
    described = model_yaml(config.model)
    with _pillow_as_it_is():
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.tasks import DetectionModel

    count = classes if isinstance(classes, int) else len(classes)
    model: Any = DetectionModel({**described, "nc": count}, verbose=False)
    model.args = get_cfg()  # the gains of its losses
    if not isinstance(classes, int):
        model.names = dict(enumerate(classes))
    adapter = UltralyticsHead(model)
    if isinstance(evaluate, schema.Evaluate):
        adapter.inference = replace(adapter.inference, score=evaluate.score, iou=evaluate.iou, most=evaluate.most)
    return with_adapter(model, adapter)


@contextmanager
def _pillow_as_it_is() -> Iterator[None]:
    """ultralytics puts its own function in the place of Pillow's ``open`` when it is imported. Of a broken picture that
    says that another package is missing, and no longer that the file is no picture."""
    opens = Image.open
    try:
        yield
    finally:
        Image.open = opens


def model_yaml(name: str) -> dict[str, Any]:
    """The content of one of the package's own files, with the scale that the name says."""
    folder = _folder()
    known = {path.name: path for path in sorted(folder.rglob("*.yaml"))}
    match = NAME.fullmatch(name)
    if match is None:
        raise RunError(f"model: expected a name as yolo11n.yaml, got {name!r}")
    unscaled = f"{match['family']}{match['kind']}.yaml"
    path = known.get(name, known.get(unscaled))
    if path is None:
        raise RunError(f"model: ultralytics has no {name!r}{_near(name, known)}")
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    head = described["head"][-1][2]
    if head not in HEADS:
        raise RunError(f"model: {name} has the head {head}; distillkit reads {' and '.join(HEADS)}, as of yolo11n.yaml")
    scales = described.get("scales") or {}
    if scales and match["scale"] not in scales:
        names = ", ".join(f"{match['family']}{scale}{match['kind']}.yaml" for scale in scales)
        raise RunError(f"model: {name} comes at several scales: say which, {names}")
    return {**described, "scale": match["scale"], "yaml_file": name}


def _folder() -> Path:
    spec = find_spec("ultralytics")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('ultralytics is not installed: pip install "ultralytics>=8.4" (it is under the AGPL-3.0)')
    return Path(spec.submodule_search_locations[0]) / "cfg" / "models"


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"; nearest: {', '.join(near)}" if near else ""
