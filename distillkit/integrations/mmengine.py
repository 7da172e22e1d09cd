"""Distillation inside mmengine's own Runner: a model for its config.

    custom_imports = dict(imports=["distillkit.integrations.mmengine"])
    model = dict(
        type="DistilledDetector",
        student=dict(type="GFL", ...),                       # the model block of the config you train now
        teacher=dict(config="mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py", checkpoint="gfl_r101.pth"),
        distillers=[dict(type="LD", region=dict(type="Main")), dict(type="LD", region=dict(type="Valuable"))],
    )

Everything else of the config stays as it is. Checkpoints hold the student under its own names, so that they load into
its own config, for tests and deployment: nothing needs to be cut out of them.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

import distillkit
from distillkit.api import wrap
from distillkit.core.errors import WrapError
from distillkit.core.result import OUTPUT
from distillkit.core.teacher import Teacher
from distillkit.core.wrap import DistilledModel
from distillkit.integrations import openmmlab

# custom_imports come before anything that needs mmdet
openmmlab.prepare("mmdet", *(package for package in ("mmrotate",) if find_spec(package)))

from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

#: what the wrapper is called here, and begins with in checkpoints: what distillers train along, step, averages
OURS = "distilled."
STUDENT = OURS + "student."
#: in log and total; mmengine adds up what has "loss" in its name, and nothing else
LOSS = "loss_"


@MODELS.register_module()
class DistilledDetector(BaseModel):
    """A student with its distillers, trained by a Runner.

    Args:
        student: its ``model`` block, a config file, or "mmdet::..." for one that comes with the package.
        teacher: ``dict(config=..., checkpoint=...)`` with further options of ``distillkit.Teacher``, or several by
            name; None where every distiller brings its own.
        distillers: ``dict(type="LD", ...)`` with the arguments of ``distillkit.LD``; regions and weights likewise, as
            in ``region=dict(type="Valuable", gamma=0.25)``.
        data_preprocessor: the student's own unless given.

    The losses of the distillers are logged as ``loss_ld_main`` and so on.

    Raises:
        WrapError: a teacher without a checkpoint, a distiller that does not exist. Else as ``openmmlab.build`` and
            ``distillkit.wrap``.
    """

    def __init__(
        self,
        student: Any,
        teacher: Mapping[str, Any] | None = None,
        distillers: Sequence[Any] = (),
        data_preprocessor: Any = None,
        init_cfg: Any = None,
    ):
        model = student if isinstance(student, nn.Module) else openmmlab.made(student)
        super().__init__(data_preprocessor or model.data_preprocessor, init_cfg)
        self.distilled: nn.Module = wrap(model, _teachers(teacher), [_built(described) for described in distillers])
        self._register_state_dict_hook(_with_students_names)
        self.register_load_state_dict_pre_hook(_with_our_names)

    @property
    def student(self) -> nn.Module:
        return self.distilled.student  # type: ignore[return-value]

    def init_weights(self) -> None:
        """The student's; teachers have theirs from their files."""
        self.student.init_weights()  # type: ignore[operator]
        self._is_init = True

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """In mode "loss" all losses, by name; in every other one the student's own answer."""
        if mode != "loss":
            return self.student(inputs, data_samples, mode=mode)
        if not isinstance(self.distilled, DistilledModel):
            raise WrapError("this is a copy of a DistilledDetector, as averages of weights are: it predicts, only")
        if not self.training:
            return self.student(inputs, data_samples, mode=mode)
        losses = self.distilled(inputs, data_samples, mode=mode)
        return {name if "loss" in name else LOSS + name: value for name, value in losses.items() if name != OUTPUT}

    def __deepcopy__(self, memo: Any) -> DistilledDetector:
        """A model of the same parameters and names that only predicts, for hooks that average weights."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        wrapper = self.distilled
        still = nn.Module()  # the wrapper's parameters, in their order, without teachers, taps and losses
        for name, buffer in wrapper._buffers.items():
            still.register_buffer(name, copy.deepcopy(buffer, memo))
        for name, child in wrapper._modules.items():
            still.add_module(name, copy.deepcopy(child, memo))
        memo[id(wrapper)] = still
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin


def _teachers(described: Mapping[str, Any] | None) -> Any:
    """One teacher, or several by name."""
    if not described:
        return None
    if "config" in described:
        return _teacher("teacher", **described)
    return {name: _teacher(name, **one) for name, one in described.items()}


def _teacher(name: str, config: Any = None, checkpoint: Any = None, **options: Any) -> Teacher:
    if config is None or checkpoint is None:
        raise WrapError(
            f"{name}: expected dict(config=..., checkpoint=...), the file that it was trained by and its weights; a "
            "teacher without weights teaches noise"
        )
    return Teacher(openmmlab.build(config, checkpoint), **options)


def _built(described: Any) -> Any:
    """An object from ``dict(type=..., **arguments)``, in which such dicts may stand; anything else as it is."""
    if not isinstance(described, Mapping) or "type" not in described:
        return described
    arguments = {name: _built(value) for name, value in described.items()}
    kind = arguments.pop("type")
    if isinstance(kind, str):
        if kind not in distillkit.__all__:
            near = difflib.get_close_matches(kind, distillkit.__all__, n=3, cutoff=0.3)
            raise WrapError(f"distillkit has no {kind!r}; nearest: {', '.join(near) or 'none'}")
        kind = getattr(distillkit, kind)
    return kind(**arguments)


def _with_students_names(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Names as they are saved: the student's as its own; ours as they are, where there are any but the step, or where
    a schedule needs the step."""
    ours = [name for name in state if name.startswith(prefix + OURS) and not name.startswith(prefix + STUDENT)]
    scheduled = any(distiller.weight.kind != "constant" for distiller in model.distilled.distillers.values())  # type: ignore[union-attr, operator]
    kept = len(ours) > 1 or scheduled
    for name in [name for name in state if name.startswith(prefix + OURS)]:
        value = state.pop(name)
        if name.startswith(prefix + STUDENT):
            state[prefix + name.removeprefix(prefix + STUDENT)] = value
        elif kept:
            state[name] = value


def _with_our_names(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The reverse: names without ours in front are the student's."""
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(prefix + OURS)]:
        state[prefix + STUDENT + name.removeprefix(prefix)] = state.pop(name)
    state.setdefault(prefix + OURS + "step", model.distilled.step)  # type: ignore[union-attr]
