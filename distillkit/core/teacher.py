"""Teachers: frozen models that are run without gradient, outside the module tree of what is trained; the student's own
running average; and models that are trained in the same step, inside it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distillkit.core.adapter import AS_LOADED, Adapter, Norm, said_by
from distillkit.core.errors import TeacherModeError, WrapError
from distillkit.core.pictures import Renormalise, Resize

log = logging.getLogger("distillkit")

Feed = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class Teacher:
    """A frozen teacher: eval, no gradient, never in ``parameters()`` or ``state_dict()`` of the wrapped model.

    Args:
        model: the trained model. It is put in eval; with ``dtype`` or ``fold_bn`` a changed copy is used instead.
        adapter: how it is run and where its views are; found from the model's class unless given.
        dtype: its own precision, e.g. ``torch.bfloat16``; None: its weights as they are, under the loop's autocast.
        fold_bn: fold every BatchNorm into the convolution before it (that the two do run one after the other is
            checked at the first step).
        mean, std: what its input is normalised with, where it is not known from the model (timm models know theirs).
            If the student's differ, the batch is re-normalised for the teacher.
        feed: what it is fed, a function of the student's call ``(args, kwargs) -> (args, kwargs)``; the same batch
            unless given. Pictures were re-normalised and resized before.
        classes: the names of its classes, one a column of its class logits in their order, where the model does not
            know them itself; its columns are then put into the order of the student's (``wrap(..., classes=)``), and
            those of other classes left out. A softmax is then that over the classes that are left: what the teacher
            says given that it is one of these.
        missing: what to do about classes of the student that the teacher lacks: ``error``, or ``ignore``: distillers
            that read classes leave them out on both sides.
        levels: of dense detectors: ``all``, each level of the student needs a partner; ``shared``: distillers act on
            the levels that both have.
        scale: it sees the student's pictures with sides so many times as long. Levels of a detector are then matched
            by their strides over this, feature maps and pixel logits by position.
        size: instead, (height, width) of what it sees.

    Raises:
        WrapError: unknown words; classes that are no list of names; scale and size, or one that is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter | None = None,
        dtype: torch.dtype | None = None,
        fold_bn: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        feed: Feed | None = None,
        classes: Sequence[str] | None = None,
        missing: Literal["error", "ignore"] = "error",
        levels: Literal["all", "shared"] = "all",
        scale: float | None = None,
        size: tuple[int, int] | None = None,
    ):
        if missing not in ("error", "ignore"):
            raise WrapError(f"missing must be 'error' or 'ignore', got {missing!r}")
        if levels not in ("all", "shared"):
            raise WrapError(f"levels must be 'all' or 'shared', got {levels!r}")
        self.classes = check_names(classes)
        self.missing, self.levels = missing, levels
        try:
            self.resize = None if scale is None and size is None else Resize(scale, size)
        except ValueError as error:
            raise WrapError(f"Teacher: {error}") from None
        self.original = model if fold_bn else None
        self.model = model.eval()
        self.adapter = adapter
        self.dtype = dtype
        self.norm: Norm | None = (tuple(mean), tuple(std)) if mean is not None and std is not None else None
        self.feed = feed
        if dtype is not None or fold_bn:
            self.model = copy.deepcopy(model).eval()
        self._folded = fold_batchnorm(self.model) if fold_bn else []
        if dtype is not None:
            self.model.to(dtype)
        self._modules = [module for module in self.model.modules() if not _has_one_mode(module)]

    def check_mode(self) -> None:
        """Raises TeacherModeError if any module of the teacher is in train mode."""
        for module in self._modules:
            if module.training:
                raise TeacherModeError(
                    f"a frozen teacher is in train mode ({type(module).__name__}): its BatchNorm would drift and its "
                    "dropout would add noise. Do not call .train() on the teacher; wrap() has put it in eval"
                )

    def to(self, device: torch.device) -> None:
        """Move it; with ``fold_bn`` also the model that the folding is still to be proven on."""
        for model in (self.model, self.original):
            if model is not None:
                model.to(device)

    @torch.no_grad()
    def prove_folding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Once, on the unfolded model: every folded BatchNorm reads exactly what its convolution returned.

        Raises:
            WrapError: names the first pair that does not.
        """
        if self.original is None:
            return
        original, self.original = self.original, None
        returned: dict[str, Tensor] = {}
        unfit: list[str] = []
        hooks = []
        for conv, norm in self._folded:
            hooks.append(
                original.get_submodule(conv).register_forward_hook(lambda m, a, out, c=conv: returned.update({c: out}))
            )

            def check(module: nn.Module, inputs: Any, c: str = conv, n: str = norm) -> None:
                if returned.pop(c, None) is not inputs[0]:
                    unfit.append(f"{n!r} does not read what {c!r} returns")

            hooks.append(original.get_submodule(norm).register_forward_pre_hook(check))
        try:
            original(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        unfit += [f"{norm!r} did not run after {conv!r}" for conv, norm in self._folded if conv in returned]
        if unfit:
            raise WrapError(
                f"fold_bn: {unfit[0]}, though it is registered right after it; use fold_bn=False for this teacher"
            )

    def cast(self, value: Any) -> Any:
        """Floating tensors of a call, also inside lists and dicts, in the teacher's dtype."""
        if self.dtype is None:
            return value
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.is_floating_point() else value
        if isinstance(value, list | tuple):
            return type(value)(self.cast(v) for v in value)
        if isinstance(value, dict):
            return {k: self.cast(v) for k, v in value.items()}
        return value


def _has_one_mode(module: nn.Module) -> bool:
    """An activation does the same in train mode, and models may share one (all of ultralytics' share their SiLU)."""
    kind = type(module)
    return kind.__module__ == "torch.nn.modules.activation" and kind not in (nn.RReLU, nn.MultiheadAttention)


def check_names(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of classes as a tuple; WrapError for one string, or for what is no string."""
    if classes is None:
        return None
    if isinstance(classes, str) or not classes or not all(isinstance(name, str) for name in classes):
        raise WrapError(f"classes: expected a list of names, one a class, as in ['cat', 'dog'], got {classes!r}")
    return tuple(classes)


class EMATeacher:
    """A running average of the student as teacher: ``average = decay * average + (1 - decay) * student``, every step.

    It is saved in the training checkpoint and never in the student's. BatchNorm statistics are taken over as they are.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise WrapError(f"decay of an EMA teacher must be in [0, 1), got {decay}")
        self.decay = decay


class OnlineTeacher:
    """A teacher that learns in the same step as the student: a registered child of the wrapped model, so that it is
    optimised, reduced over ranks and saved with it, and never part of the student.

    Distillers get its views with their graph: one that is not to change the teacher detaches them.

    Args:
        model: the network; it is put in train mode with the wrapper. None: a copy of the student as it is wrapped.
        criterion: ``criterion(its output, targets) -> loss``, what it learns from; the loss bears the teacher's name.
        feed: what it is fed, a function of the student's call as in ``Teacher``. Where the model says that it wants
            another normalisation than the student, what comes of it is re-normalised.
        targets: what its criterion gets, a function of the call's targets; these themselves unless given.
        adapter: as in ``Teacher``.
    """

    def __init__(
        self,
        model: nn.Module | None,
        criterion: Callable[[Any, Any], Tensor],
        feed: Feed | None = None,
        targets: Callable[[Any], Any] | None = None,
        adapter: Adapter | None = None,
    ):
        self.model, self.criterion, self.adapter = model, criterion, adapter
        self.feed: Feed = feed or (lambda args, kwargs: (args, kwargs))
        self.targets = targets or (lambda targets: targets)


@torch.no_grad()
def update_average(average: nn.Module, student: nn.Module, decay: float) -> None:
    """One step of the running average, in place; buffers are copied."""
    for mine, theirs in zip(average.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)
    for a, b in zip(average.buffers(), student.buffers(), strict=True):
        a.copy_(b)


@torch.no_grad()
def fold_batchnorm(model: nn.Module) -> list[tuple[str, str]]:
    """Fold, in place, each BatchNorm2d into the Conv2d registered just before it in the same module.

    That convolution may also be the last layer of a Sequential there. Its weight becomes ``w * g / sqrt(var + eps)``,
    its bias ``b' + (b - mean) * g / sqrt(var + eps)``; of timm's BatchNorm with activation the activation stays.

    Returns:
        The names of each pair.

    Raises:
        WrapError: no such pair in the model.
    """
    pairs = []
    for path, parent in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        children = list(parent.named_children())
        for (before, conv), (name, norm) in pairwise(children):
            while isinstance(conv, nn.Sequential) and len(conv):  # a deep stem: its last convolution
                before, conv = f"{before}.{len(conv) - 1}", conv[-1]
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            if norm.num_features != conv.out_channels or norm.running_var is None or norm.running_mean is None:
                continue
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale + (0 if norm.bias is None else norm.bias)
            bias = torch.zeros_like(shift) if conv.bias is None else conv.bias
            conv.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
            conv.bias = nn.Parameter(bias * scale + shift, requires_grad=False)
            # timm's BatchNormAct2d: drop and act come after the normalisation
            rest = [layer for layer in (getattr(norm, "drop", None), getattr(norm, "act", None)) if layer is not None]
            setattr(parent, name, (nn.Sequential(*rest) if rest else nn.Identity()).eval())
            pairs.append((prefix + before, prefix + name))
    if not pairs:
        raise WrapError(f"fold_bn: {type(model).__name__} has no BatchNorm2d right after a Conv2d of the same width")
    return pairs


def renormalisation(
    adapter: Adapter, student: nn.Module, name: str, teacher: Teacher | OnlineTeacher
) -> Renormalise | None:
    """What the student's input has to go through for a teacher that was trained on another; None: nothing.

    Raises WrapError for a teacher that was given mean and std where the student's are not known.
    """
    if teacher.model is None:  # a copy of the student
        return None
    given = adapter.normalisation(student)
    theirs, own = teacher.adapter or adapter, teacher.norm if isinstance(teacher, Teacher) else None
    # an adapter that is the student's too speaks of the student's input: what the teacher's model says goes first
    wanted = own or (said_by(teacher.model) if theirs is adapter else None)
    wanted = wanted or theirs.normalisation(teacher.model)
    if own and not given:
        raise WrapError(
            f"teacher {name!r} was given mean and std, but what the student's input is normalised with is not known: "
            "pass adapter=Adapter(mean=..., std=...)"
        )
    turned = {adapter.channels(student), theirs.channels(teacher.model)} == {"rgb", "bgr"}
    if turned:
        log.warning("teacher %r: channels turned round, as student and teacher are fed RGB and BGR", name)
    if not wanted or not given:
        return Renormalise(AS_LOADED, AS_LOADED, turned) if turned else None
    if wanted == given and not turned:
        return None
    log.warning("teacher %r: input re-normalised from mean %s std %s to mean %s std %s", name, *given, *wanted)
    return Renormalise(given, wanted, turned)
