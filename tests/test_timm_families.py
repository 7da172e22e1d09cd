"""A small classifier of every family that timm lists learns from another, one step.

``pytest -m integration tests/test_timm_families.py`` walks all of them, the quick suite a few.
"""

import copy
import re
from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn
from torch.nn.functional import cross_entropy

import distillkit
from distillkit import LogitKD

QUICK = ("byobnet", "convnext", "deit", "efficientnet", "levit", "mobilenetv3", "resnet", "vision_transformer", "xcit")
#: what the names of small models have in them, the smallest first
SMALL = (
    *("test_", "atto", "femto", "pico", "nano", "xxtiny", "xxs", "xx_small", "tiny", "_ti", "_t0", "_t8", "s050"),
    *(
        "_s0",
        "128s",
        "_xs",
        "_b0",
        "_m0",
        "_m1",
        "h1",
        "46x",
        "050",
        "_002",
        "lite0",
        "_18",
        "18",
        "11",
        "small",
        "_s",
        "_t",
        "_base",
    ),
)
#: smaller still, where a family's models take it
OPTIONS: tuple[dict[str, Any], ...] = ({"img_size": 64, "depth": 2}, {"depth": 2}, {"img_size": 64}, {})
#: sides of pictures, of which a model gets the first that it can run on
SIDES = (64, 56, 96, 224, 240, 256)


@cache
def families() -> dict[str, list[str]]:
    """Names of models by the module of timm that makes them."""
    found = defaultdict(list)
    for name in set(timm.list_models()) - {"autospace"}:  # distillkit's, which is built from a file
        found[_model_to_module[name]].append(name)
    return dict(found)


def small_name(names: list[str]) -> str:
    def size(name: str) -> tuple[int, int, str]:
        large = bool(re.search("large|huge|giant|enormous|_xl|so400m", name))
        return (
            large * len(SMALL) + next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)),
            len(name),
            name,
        )

    return min(names, key=size)


def small_model(family: str) -> tuple[nn.Module, torch.Tensor]:
    """A model, and pictures that it runs on."""
    name = small_name(families()[family])
    for options in OPTIONS:
        try:
            model = timm.create_model(name, num_classes=10, **options).train()
        except (TypeError, AssertionError, ValueError, RuntimeError, IndexError):
            continue
        if (pictures := pictures_for(model)) is not None:
            return model, pictures
    raise AssertionError(f"{name} runs on pictures of none of the sides {SIDES}")


@torch.no_grad()
def pictures_for(model: nn.Module) -> torch.Tensor | None:
    for side in SIDES:
        pictures = torch.rand(2, 3, side, side)
        try:
            model(pictures)
        except Exception:  # whatever a model raises for a size that is not its own
            continue
        return pictures
    return None


def distil_one_step(family: str) -> None:
    torch.manual_seed(0)
    student, pictures = small_model(family)
    untouched = list(student.state_dict())
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.2)
    model = distillkit.wrap(student, teacher, [LogitKD()], criterion=cross_entropy)
    losses = model.train()(pictures, torch.tensor([1, 2]))
    losses.total.backward()
    assert losses["kd"].isfinite()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert any(g.any() for g in gradients)
    assert all(p.grad is None for p in teacher.parameters())
    before = model.eval()(pictures)
    assert torch.equal(model.unwrap()(pictures), before)
    assert list(student.state_dict()) == untouched


@pytest.mark.parametrize("family", QUICK)
def test_a_classifier_of_timm_distils_one_step(family):
    distil_one_step(family)


@pytest.mark.integration
@pytest.mark.parametrize("family", sorted(families()))
def test_one_classifier_of_each_family_of_timm_distils_one_step(family):
    distil_one_step(family)
