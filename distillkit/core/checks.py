"""What is refused, before a first step and in it, rather than training nothing in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distillkit.core.distiller import Distiller
from distillkit.core.errors import UnreachedStudentError, WrapError
from distillkit.core.taps import is_tapped
from distillkit.core.teacher import EMATeacher, OnlineTeacher, Teacher

# ---- before a first step


def refuse(student: nn.Module, teachers: Mapping[str, Teacher | EMATeacher | OnlineTeacher]) -> None:
    """Raise WrapError for a student whose taps would be ignored, or would be another wrapper's."""
    if isinstance(student, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise WrapError(
            f"the student is a {type(student).__name__}: wrap the bare model, then make the wrapped model distributed "
            "(with DistributedDataParallel)"
        )
    for name, module in student.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise WrapError(
                f"the student is compiled ({name or 'itself'}): hooks set after compilation are ignored without a "
                "word. Wrap first, then compile the wrapped model"
            )
        if is_tapped(module):
            raise WrapError(
                f"the student ({name or 'itself'}) is read by another wrapper already: unwrap() that one, give its "
                "distillers to one wrap(), or wrap a copy (copy.deepcopy)"
            )
    for name, teacher in teachers.items():
        if isinstance(teacher, Teacher | OnlineTeacher) and teacher.model is student:
            raise WrapError(
                f"teacher {name!r} is the student itself: give a copy of it (copy.deepcopy), or EMATeacher() for its "
                "running average"
            )
        if isinstance(teacher, OnlineTeacher) and teacher.model is not None:
            _refuse_shared(student, name, teacher.model)


def _refuse_shared(student: nn.Module, name: str, teacher: nn.Module) -> None:
    """Raise WrapError where a teacher that is trained, too, holds weights of the student."""
    shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    if shared:
        which = next(path for path, p in teacher.named_parameters() if id(p) in shared)
        raise WrapError(
            f"teacher {name!r} is trained in the same step and shares weights with the student ({which}): their losses "
            "would mix; give it weights of its own (copy.deepcopy)"
        )


def key_of(name: str) -> str:
    """A name as a key of a ModuleDict, which takes no dots."""
    return name.replace(".", "_")


def check_distinct(what: str, names: Iterable[str]) -> None:
    """Raise WrapError where two names would be one key."""
    seen: set[str] = set()
    for name in names:
        if key_of(name) in seen:
            raise WrapError(f"two {what} would be called {name!r}: give one another name, as in name='second'")
        seen.add(key_of(name))


def teachers_by_distiller(
    distillers: Sequence[Distiller], teachers: Mapping[str, object], default: str | None
) -> dict[str, str | None]:
    """Which teacher each distiller learns from, names of both; None: the targets. WrapError if that is not clear."""
    there = ", ".join(teachers) or "none"
    uses: dict[str, str | None] = {}
    for distiller in distillers:
        if distiller.taught_by_targets:
            uses[distiller.name] = None
            continue
        teacher = distiller.teacher or default
        if teacher is None:
            raise WrapError(
                f"distiller {distiller.name!r} does not say which teacher it learns from (teacher=); there are: {there}"
            )
        if teacher not in teachers:
            raise WrapError(f"distiller {distiller.name!r} wants the teacher {teacher!r}; there are: {there}")
        uses[distiller.name] = teacher
    for name in teachers:
        if name not in uses.values():
            raise WrapError(
                f"no distiller uses the teacher {name!r}: name it, as in LD(teacher={name!r}), or leave it out"
            )
    return uses


def check_alone(distillers: Sequence[Distiller], changing: Mapping[str, object], criterion: object) -> None:
    """Raise WrapError where one distiller changes what the student sees (``changing``: by name) and others look on."""
    if not changing:
        return
    (name, *others), names = changing, [d.name for d in distillers]
    beside = others or [other for other in names if other != name]
    if beside:
        raise WrapError(
            f"distiller {name!r} mixes pictures inside the student (mix_token), so that {beside[0]!r} would compare a "
            "mixture with a teacher's view of the pictures: leave one out, or set mix_token=False"
        )
    if criterion is not None:
        raise WrapError(
            f"distiller {name!r} mixes pictures inside the student (mix_token) and has the task's loss for mixtures: "
            "leave out criterion=, or set mix_token=False"
        )


def check_lasts(distillers: Sequence[Distiller], criterion: object) -> None:
    """Raise WrapError where the student's only task loss is that of distillers whose weight ends at 0."""
    tasks = [d for d in distillers if d.is_task]
    if criterion is None and tasks and all(d.weight.is_over(2**62) for d in tasks):
        raise WrapError(
            f"distiller {tasks[0].name!r} has the student's only task loss, and its weight ends at 0, after which it "
            "would learn nothing: let the weight stay, or pass criterion="
        )


# ---- in a step


def scalar_loss(name: str, loss: Any) -> Tensor:
    """A task loss as a 0-dim tensor; WrapError for what is no tensor of one element."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss if loss.dim() == 0 else loss.sum()  # no view of it: FSDP2 warns of outputs that are views
    raise WrapError(
        f"the task loss {name!r} must be a tensor of one element, got {_described(loss)}: a mean or a sum over the "
        'batch (not reduction="none"), and no .item(); leave metrics out'
    )


def no_task_loss(output: Any) -> WrapError:
    """The error for a student that got targets and returned no loss."""
    return WrapError(
        f"the student was called with targets and returned no task loss but {_described(output)}. If it computes none, "
        "pass criterion= to wrap(); if it computes them in another form, an adapter whose losses(output) finds them; "
        "if its second argument is no targets, give that by name"
    )


def refuse_sharded_averages(model: nn.Module) -> None:
    """Raise WrapError where FSDP2 shards: the average is updated inside the forward, on gathered copies that it drops.

    An average would stay where it began, without a word.
    """
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise WrapError(
            "an EMA teacher (EMATeacher, SelfLD without checkpoint=) cannot follow a student that FSDP2 shards "
            "(fully_shard): use DistributedDataParallel, or a frozen teacher, as in SelfLD(checkpoint=earlier)"
        )


def check_reaches(name: str, loss: Any, distiller: Distiller, others: Iterable[Tensor]) -> None:
    """Once: a loss whose graph ends at no parameter of the student would train nothing, without a word.

    The distiller's own parameters do not count, nor ``others``: what of the call requires a gradient, and teachers that
    are trained too. What else the graph ends at is the student's: under FSDP2 not the parameters themselves, so they
    cannot be looked for.
    """
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise UnreachedStudentError(f"distiller {name!r} must return a scalar tensor, got {_described(loss)}")
    ignored = {id(tensor) for tensor in (*distiller.parameters(), *others)}
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in ignored:
            return
        todo += [following for following, _ in node.next_functions]
    raise UnreachedStudentError(
        f"the loss of distiller {name!r} reaches no parameter of the student: it would train nothing. The student's "
        "tapped layer is frozen, detached, computed under no_grad, or inside a reentrant activation checkpoint (use "
        "use_reentrant=False)"
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
