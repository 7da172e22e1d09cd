"""Distillation inside ultralytics' own trainer.

    trainer = distilled(DetectionTrainer, YOLO("yolo11m.pt"), [LD(Main()), LD(Valuable()), LogitKD(Main())])
    YOLO("yolo11n.yaml").train(trainer=trainer, data="coco8.yaml")

Its average of the weights, its validation and its checkpoints are those of the plain student: ``best.pt`` loads with
``YOLO("best.pt")`` where distillkit is not installed. It imports nothing of ultralytics.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillkit.adapters import adapter_for
from distillkit.adapters.ultralytics import Ultralytics
from distillkit.api import wrap
from distillkit.core.adapter import comes_from
from distillkit.core.distiller import Distiller
from distillkit.core.errors import WrapError
from distillkit.core.result import OUTPUT
from distillkit.core.wrap import DistilledModel

#: beside ``last.pt``: what else is trained, running averages, and the step
REST = "distillkit.pt"
STUDENT = "student."
#: attributes that the trainer sets on what it trains, and copies from there to its average
SHARED = ("yaml", "nc", "args", "names", "stride", "class_weights", "criterion")


def distilled(trainer: type, teacher: Any, distillers: Sequence[Distiller]) -> Any:
    """A trainer that distils, a subclass of ``trainer``.

    Args:
        trainer: ultralytics' ``DetectionTrainer``, another of its trainers, or your own subclass of one.
        teacher: a ``YOLO(...)``, a model, a ``distillkit.Teacher`` of one, or several by name; None where every
            distiller brings its own. For a teacher of another family give ``Teacher(model, feed=pictures)``.
        distillers: as for ``distillkit.wrap``. Each run of the trainer gets copies of its own.

    Raises:
        WrapError: a teacher that is the name of a file, or an exported model.
    """
    members = {"teacher": _model(teacher), "distillers": tuple(distillers)}
    return type(f"Distilled{trainer.__name__}", (Distilled, trainer), members)


def pictures(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The ``feed`` of a teacher of another family: the batch's pictures, (B, 3, H, W) RGB in 0..1."""
    batch = args[0] if args else next(iter(kwargs.values()))
    return (batch["img"],), {}


class Distilled:
    """Mixed into a trainer; ``distilled`` makes the class.

    - Each loss of a distiller is printed, and written to ``results.csv``, beside those of the student, as a mean over
      pictures. As the trainer multiplies the student's losses by the pictures of a batch, it does theirs.
    - ``distillkit.pt`` beside ``last.pt`` holds the distillers' own parameters and the step; ``resume`` reads it.
    - Once training has ended the model that was trained is the plain student again.

    Raises:
        WrapError: options that would train a copy without distillers: compile, quantize=8, its own distill_model.
    """

    teacher: Any
    distillers: Sequence[Distiller]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        options = self.args  # type: ignore[attr-defined]
        for name, refused in (("compile", bool), ("distill_model", bool), ("quantize", lambda value: value == 8)):
            value = getattr(options, name, None)
            if refused(value):
                raise WrapError(f"{name}={value!r} cannot be used with distillkit's distillers: leave it out")

    def set_model_attributes(self) -> None:
        super().set_model_attributes()  # type: ignore[misc]
        trainer: Any = self
        # its network is built and on its device, and nothing has read its parameters yet
        trainer.model = Distillation(trainer.model, self.teacher, copy.deepcopy(list(self.distillers)))

    def _build_train_pipeline(self) -> None:
        _distillation(self.model).distilled.averages.requires_grad_(False)  # type: ignore[attr-defined]
        super()._build_train_pipeline()  # type: ignore[misc]

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """In validation the student has its own losses alone."""
        labelled = super().label_loss_items(loss_items, prefix)  # type: ignore[misc]
        if prefix != "val":
            return labelled
        ours = {f"{prefix}/{name}" for name in _distillation(self.model).added}  # type: ignore[attr-defined]
        if isinstance(labelled, Mapping):
            return {name: value for name, value in labelled.items() if name not in ours}
        return [name for name in labelled if name not in ours]

    def save_model(self) -> Any:
        trainer: Any = self
        saved = super().save_model()  # type: ignore[misc]
        torch.save(_distillation(trainer.model).rest(), trainer.wdir / REST)
        return saved

    def resume_training(self, ckpt: Any) -> None:
        super().resume_training(ckpt)  # type: ignore[misc]
        trainer: Any = self
        if ckpt is not None and trainer.resume:
            _distillation(trainer.model).load_rest(Path(trainer.args.model).with_name(REST))

    def _do_train(self) -> None:
        trainer: Any = self
        try:
            super()._do_train()  # type: ignore[misc]
        finally:
            ours = getattr(trainer.model, "module", trainer.model)
            if isinstance(ours, Distillation):
                trainer.model = ours.distilled.unwrap()


class Distillation(nn.Module):
    """What the trainer trains in the student's place: called with a batch it returns the losses of both.

    For everything else it is the student: ``state_dict``, copies and pickles are the student's, and attributes that it
    does not have are looked for there.
    """

    distilled: DistilledModel

    def __init__(self, student: nn.Module, teacher: Any, distillers: Sequence[Distiller]):
        super().__init__()
        adapter = adapter_for(student)
        if not isinstance(adapter, Ultralytics):
            raise WrapError(f"{type(student).__name__} is no model of ultralytics, which its trainer trains")
        self.distilled = wrap(student, teacher, distillers, adapter=adapter)
        self.adapter = adapter
        #: names of the losses that are not the student's
        self.added = [*(distiller.name for distiller in self.distilled.distillers.values()), *self.distilled.online]
        self.__dict__.update({name: value for name in SHARED if (value := getattr(student, name, None)) is not None})

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """In train mode (total, its parts by name) of a batch; else the student's answer."""
        if not (self.training and isinstance(x, Mapping)):
            return self.distilled.student(x, *args, **kwargs)
        losses = self.distilled(x)
        own = losses[OUTPUT][1]
        if not isinstance(own, Mapping):
            raise WrapError("this ultralytics gives its losses without names: 8.4 or later is needed")
        shown = {**own, **{name: losses[name].detach() for name in self.added}}
        return losses.total * (len(x["img"]) if self.adapter.grows_with_batch else 1), shown

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "distilled" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.distilled.student, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in SHARED:
            setattr(self.distilled.student, name, value)

    def __deepcopy__(self, memo: Any) -> nn.Module:
        """The student's, as the trainer's average is one, and what it saves."""
        return copy.deepcopy(self.distilled.student, memo)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.distilled.student.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.distilled.student.load_state_dict(*args, **kwargs)

    def rest(self) -> dict[str, Any]:
        """What is trained beside the student, averages and the step."""
        return {n: value for n, value in self.distilled.state_dict().items() if not n.startswith(STUDENT)}

    def load_rest(self, path: Path) -> None:
        """Raises WrapError where the file is missing, or of other distillers."""
        if not path.exists():
            raise WrapError(
                f"{path} is missing: it is written beside last.pt, and holds what distillers train; without it a run "
                "cannot be resumed. To start a new one from the student's weights use model=, not resume="
            )
        loaded = self.distilled.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
        missing = [name for name in loaded.missing_keys if not name.startswith(STUDENT)]
        if missing or loaded.unexpected_keys:
            raise WrapError(
                f"{path} is of other distillers: missing {missing or 'nothing'}, unexpected "
                f"{loaded.unexpected_keys or 'nothing'}; give distilled() those of the run that wrote it"
            )


def _distillation(model: Any) -> Distillation:
    """Of a trainer's model, also under DDP."""
    return model if isinstance(model, Distillation) else model.module


def _model(teacher: Any) -> Any:
    """A teacher as ``wrap`` takes it, from a ``YOLO`` too."""
    if isinstance(teacher, Mapping):
        return {name: _model(one) for name, one in teacher.items()}
    if isinstance(teacher, nn.Module) and comes_from(teacher, "ultralytics.engine."):
        teacher = teacher.model
    if isinstance(teacher, str | Path):
        raise WrapError(f"teacher={str(teacher)!r}: expected a model, as in YOLO({str(teacher)!r})")
    return teacher
