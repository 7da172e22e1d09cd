"""Adapters: how one model family is run and where its views are. This one serves plain models; families subclass it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillkit.core.errors import ViewError
from distillkit.core.taps import Place, channel_ranges, module_name
from distillkit.core.views import ActivationMaps, ClassLogits, Features, View

Norm = tuple[tuple[float, ...], tuple[float, ...]]
AS_LOADED: Norm = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and deviation of pictures as they were read
TARGETS = ("targets", "labels")  # what targets are called where they are given by name


class Adapter:
    """A classifier, or any model whose features are read by module path.

    Args:
        mean, std: what the model's input is normalised with, where the loop normalises it (timm models know theirs).
    """

    #: how a detector is called: those of one form take each other's batches
    form = "model(images, targets)"

    def __init__(self, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None):
        self.norm: Norm | None = (tuple(mean), tuple(std)) if mean is not None and std is not None else None

    def normalisation(self, model: nn.Module) -> Norm | None:
        """(mean, std) that the model's input is expected to be normalised with; None: unknown, or done inside."""
        return self.norm or said_by(model)

    def channels(self, model: nn.Module) -> Literal["rgb", "bgr"] | None:
        """The order of its input's channels, where a family has models of both; a teacher of the other order gets the
        student's pictures with their channels turned round. None: not known, and taken as equal."""
        return None

    def class_names(self, model: nn.Module) -> Sequence[str] | None:
        """The names of its classes, one a column of its class logits, where the model holds them itself; None: unknown.
        Columns that are no class may be called "N/A", a background's "__background__"."""
        return None

    def pictures(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pictures of the student's call."""
        found: list[Any] = []

        def look(pictures: Any) -> Any:
            found.append(pictures)
            return pictures

        self.with_pictures(args, kwargs, look)
        return found[0]

    def own_size(self, model: nn.Module) -> str | None:
        """To what a model resizes pictures by itself, in words; None: it does not."""
        return None

    def with_pictures(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The student's call with its pictures changed for a teacher, which are its first argument.

        change: of a batch (B, C, H, W) or a list of pictures (C, H, W).
        """
        if args:
            return (change(args[0]), *args[1:]), kwargs
        key = input_name(kwargs)
        return args, {**kwargs, key: change(kwargs[key])}

    def check(self, model: nn.Module) -> None:
        """Raises AdapterError for a model that predicts, and can be neither a student nor a teacher."""

    def places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        """Where a view is tapped; (): it is read from what the model returns.

        Raises ViewError for a kind of view that this family does not have.
        """
        if kind is ClassLogits:
            return (Place(at),) if at else ()
        if kind in (Features, ActivationMaps) and at:
            return (Place(at),)
        if kind is Features:
            raise ViewError(
                f"{type(model).__name__}: say where its features are read, as in student_at='layer4' for "
                "the student, or teacher_at='layer4' for a teacher"
            )
        if kind is ActivationMaps:
            raise ViewError(
                f"{type(model).__name__}: say which module returns its class activation maps (B, classes, h, w), as in "
                "student_at='maps' (for the local network local_at=)"
            )
        raise ViewError(
            f"{type(self).__name__} finds no {kind.__name__} in {type(model).__name__}; pass adapter=, "
            "e.g. distillkit.DistributionHead(...) for a dense detector, or distillkit.Segmenter() for a segmentation "
            "model (a model of kind: custom in a recipe: let its "
            "registered builder return (model, adapter))"
        )

    def teacher_places(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> tuple[Place, ...]:
        """Of a teacher: ``places``, unless less is enough than of a student. It runs no further than its places."""
        return self.places(model, kind, at)

    def view(self, model: nn.Module, kind: type[View], tensors: list[Tensor], output: Any) -> View:
        """The view, from the tapped tensors in the order of the places' paths, or from the model's output."""
        if kind is Features:
            return Features(tuple(tensors))
        if kind is ActivationMaps and output is None:
            raise ViewError(
                f"{type(model).__name__}: it runs no further than its maps, so that it is not known how many are "
                "classes: pass adapter=distillkit.adapters.cam.CamAdapter(path, background=...)"
            )
        if kind is ActivationMaps:
            return activation_maps_in(tensors[0], logits_in(output, type(model).__name__))
        return ClassLogits(tensors[0] if tensors else logits_in(output, type(model).__name__))

    def losses(self, output: Any) -> dict[str, Tensor]:
        """The task losses that the student computed by itself; {} where it computes none.

        They are looked for in a 0-dim tensor; an entry or attribute ``loss``; the entries of a dict, where lists are
        summed up, as OpenMMLab's heads give them; and the first element of a tuple. An entry is a loss if it is a
        tensor of one element that takes gradient (metrics do not), or has "loss" in its name: what that holds is
        handed on as it is, for ``wrap`` to refuse if it is no scalar.
        """
        if isinstance(output, Tensor):
            return {"task": output} if output.dim() == 0 else {}
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is not None:
            found = _losses({"loss": loss})
            return {"task": found["loss"]} if found else {}
        if isinstance(output, Mapping):
            return _losses(output)
        return self.losses(output[0]) if isinstance(output, tuple | list) and output else {}

    def task_losses(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """``losses`` of a call; a family whose losses grow with the batch divides them by it."""
        return self.losses(output)

    def targets(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> Any:
        """What the distillers get as targets.

        Args:
            args, kwargs: the student's call.
            given: the targets of a student that takes none (they went to the criterion); else None.
        """
        if given is not None:
            return given
        return kwargs.get("targets", kwargs.get("labels", args[1] if len(args) > 1 else None))

    def without_targets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call of a student that takes targets itself, as a model in eval mode takes it.

        A call that a criterion has taken the targets from stays as it is.
        """
        return args[:1], {k: v for k, v in kwargs.items() if k not in TARGETS}

    def widths(self, model: nn.Module, kind: type[View], at: tuple[str, ...] | None) -> list[int] | None:
        """Channels of each map of a Features view, where they can be told without running the model."""
        if kind is not Features or at is None:
            return None
        modules = dict(model.named_modules())
        widths = [_width(modules[name], path) if (name := module_name(path)) in modules else None for path in at]
        known = [w for w in widths if w is not None]
        return known if len(known) == len(at) else None

    def call(self, model: nn.Module, pictures: Any, targets: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A batch as distillkit's data give it, as this family is called: (args, kwargs).

        Args:
            pictures: of a detector a list of float32 (3, h, w) in 0..1 on its device, which may differ in size.
            targets: of a training step, one dict of boxes (k, 4) or (k, 5) in pixels of its picture and labels (k,) a
                picture; None: what the model predicts is asked.
        """
        return ((pictures,), {}) if targets is None else ((pictures, targets), {})

    def detections(self, model: nn.Module, output: Any, pictures: Sequence[Tensor]) -> Any:
        """What a detector predicted for ``call(model, pictures)``, in eval mode: one dict a picture of boxes in its
        pixels, scores (k,) and labels (k,), those of the data."""
        return output

    def proof(self, view: View, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Check that ``view`` explains the model's own prediction ``output`` for the same call.

        False: nothing was predicted. Raises AdapterError where the two disagree. A plain model has nothing to prove.
        """
        return True

    def needs_proof(self, kind: type[View]) -> bool:
        return False


def activation_maps_in(maps: Tensor, logits: Tensor) -> ActivationMaps:
    """Maps (B, K, h, w) of a classifier with logits (B, C): K is C, or C + 1 with a background channel at the end.

    Raises ViewError for anything else.
    """
    classes = logits.shape[1]
    if maps.dim() != 4 or maps.shape[1] not in (classes, classes + 1):
        raise ViewError(
            f"expected class activation maps (B, {classes}, h, w), or {classes + 1} channels with the background last, "
            f"got {tuple(maps.shape)}: name the layer that has a channel for each class"
        )
    return ActivationMaps(maps, background=maps.shape[1] > classes)


def _losses(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those entries of a student's output that are losses."""
    losses = {}
    for name, value in entries.items():
        if isinstance(value, list | tuple) and value and all(_is_one_number(v) for v in value):
            value = torch.stack([v.reshape(()) for v in value]).sum()
        if isinstance(value, Tensor) and torch.is_grad_enabled() and not value.requires_grad:
            continue
        if _is_one_number(value) or ("loss" in name and value is not None):
            losses[name] = value
    return losses


def _is_one_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() <= 1 and value.numel() == 1


def said_by(model: nn.Module) -> Norm | None:
    """(mean, std) of its input, where a model says so itself, as timm's do."""
    cfg = getattr(model, "pretrained_cfg", None)
    return (tuple(cfg["mean"]), tuple(cfg["std"])) if isinstance(cfg, Mapping) and "mean" in cfg else None


def comes_from(model: nn.Module, module: str) -> bool:
    """Whether a model's class, or one that it is derived from, is of a module whose name begins so; nothing is
    imported."""
    return any(c.__module__.startswith(module) for c in type(model).__mro__)


def input_name(kwargs: Mapping[str, Any]) -> str:
    """Which argument is the input of a call that gives all of them by name: the first that is no target."""
    return next(name for name in kwargs if name not in TARGETS)


def logits_in(output: Any, model: str) -> Tensor:
    """Class logits (B, C) of a classifier's output: a tensor, a mapping's or an object's "logits", a tuple's first.

    Raises ViewError, which names the ``model``, where there are none.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output[0] if isinstance(output, tuple | list) else None)
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ViewError(
            f"{model}: expected class logits (B, C) in its output, got {shape}; name the layer, as in student_at='fc'"
        )
    return output


def _width(module: nn.Module, path: str) -> int | None:
    """Channels that a path to a module means: those of the last layer in it that says so, less what ``path`` cuts."""
    for layer in reversed(list(module.modules())):
        for attribute in ("out_channels", "num_features", "out_features"):
            if isinstance(width := getattr(layer, attribute, None), int):
                for cut in channel_ranges(path):
                    width = len(range(width)[cut])
                return width
    return None
