"""What a training step does beside computing: it makes the host wait, holds memory, runs modules, breaks graphs.

Counted, not timed, without an accelerator: operations that wait for one are seen at the dispatcher.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillkit import LD, FeatureImitation, LogitKD, Main, Valuable
from distillkit.bench import contenders, detectors
from distillkit.bench.contenders import Contender, Entry, quietly
from distillkit.bench.counting import Dispatched, modules_run, without_cpu_checks
from distillkit.bench.peers import MMDET
from distillkit.bench.suite import Check, Result, Table, Tell, silent
from distillkit.bench.timing import Step

HEAD = ["step", "host syncs", "bytes held", "bytes held after an error", "teacher's modules run", "graph breaks"]
NONE = "-"


@dataclass(frozen=True)
class Counts:
    """Of one step. ``ran``, ``of``: the teacher's modules without children, those that ran and all. None: not counted.

    graph breaks: of a compiled model's forward, with hooks as they are.
    """

    syncs: int
    held: int
    held_after_error: int
    ran: int
    of: int
    breaks: int | str | None

    def cells(self) -> list[str]:
        breaks = NONE if self.breaks is None else str(self.breaks)
        return [str(self.syncs), str(self.held), str(self.held_after_error), f"{self.ran} of {self.of}", breaks]


def run(quick: bool, rounds: int, tell: Tell = silent) -> Result:
    """The same in quick form."""
    parts = []
    for done, (what, part) in enumerate((("logits", logits), ("four layers", four_layers), ("mmdet", of_mmdet))):
        tell(what, done, 3)
        parts.append(part())
    return Result(
        "What does a step do beside computing? Host syncs: operations that would make the host wait for an "
        "accelerator. Bytes held: of the activations of both models, when the step is over, and when the student's "
        "last layer has raised an error. Teacher's modules: those without children. Graph breaks: of the model that a "
        "toolkit lets one compile, which is the forward of the whole step with distillkit and timm.task, and the "
        "student with the others.",
        [table for table, _, _ in parts],
        [check for _, checks, _ in parts for check in checks],
        {table.title: data for table, _, data in parts},
    )


Part = tuple[Table, list[Check], dict[str, Any]]


def logits() -> Part:
    entries = {k: v for k, v in contenders.LOGITS.items() if k != "ideal again"}
    found, missing = of_classifiers(entries)
    ours = found["distillkit"]
    checks = [
        none("logits: host syncs", ours.syncs),
        none("logits: bytes held between steps", ours.held),
        none("logits: bytes held after an error", ours.held_after_error),
        none("logits: graph breaks", ours.breaks),
    ]
    return table_of("Logits: ResNet-50 teaches ResNet-18", found, missing), checks, data_of(found)


def four_layers() -> Part:
    entries = {k: v for k, v in contenders.FOUR_LAYERS.items() if k != "ideal again"}
    found, missing = of_classifiers(entries)
    ours = found["distillkit"]
    checks = [
        none("four layers: host syncs", ours.syncs),
        none("four layers: bytes held between steps", ours.held),
        none("four layers: bytes held after an error", ours.held_after_error),
        none("four layers: graph breaks", ours.breaks),
        Check(
            "syncs, four layers: the teacher stops at its last layer that is read",
            ours.ran == ours.of - HEAD_OF_RESNET,
            f"{ours.ran} of {ours.of} modules; all but the {HEAD_OF_RESNET} of its head",
        ),
    ]
    return table_of("Features of four layers", found, missing), checks, data_of(found)


#: timm's ResNet after layer4: pooling, flattening, the classifier
HEAD_OF_RESNET = 3


def of_classifiers(entries: dict[str, Entry]) -> tuple[dict[str, Counts], dict[str, str]]:
    pair = contenders.pair_of_resnets(2, 64)
    there, missing = contenders.made(entries, pair)
    found = {}
    for name, contender in there.items():
        with quietly():
            found[name] = counts(contender, leaves(pair.teacher), pair.student)
    return found, missing


def counts(contender: Contender, of: int, student: nn.Module, compiled: bool = True) -> Counts:
    contender.step()
    with without_cpu_checks(), Dispatched() as seen:
        contender.step()
    with modules_run(contender.teacher) as ran:
        contender.step()
    inside = {name for name, module in contender.teacher.named_modules() if not list(module.children())}
    return Counts(
        seen.syncs.total(),
        held(contender, contender.step),
        held(contender, lambda: failing(contender)),
        len(inside & set(ran)),
        of,
        graph_breaks(contender) if compiled else None,
    )


def leaves(model: nn.Module) -> int:
    return sum(not list(module.children()) for module in model.modules())


def held(contender: Contender, step: Step) -> int:
    """Bytes of the activations that are still alive when ``step`` has returned."""
    refs: list[weakref.ref[Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, list | tuple) else [output]
        refs.extend(weakref.ref(part) for part in parts if isinstance(part, Tensor))

    modules = {module for model in (contender.student, contender.teacher) for module in model.modules()}
    hooks = [module.register_forward_hook(remember) for module in modules]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    gc.collect()
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for r in refs if (t := r()) is not None}
    assert refs, "no module ran"
    return sum(alive.values())


class Broken(Exception):  # noqa: N818 - no error of ours
    """What the student's last module raises."""


def failing(contender: Contender) -> None:
    """A step in which the student raises an error at its end, when all it is read for has been read."""
    last = [module for module in contender.student.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    with breaking(last_run(contender, last)), suppress(Broken):
        contender.loss()
        raise AssertionError("the error did not come through")


def last_run(contender: Contender, modules: list[nn.Module]) -> nn.Module:
    """Which of the student's modules runs last."""
    order: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda module, args, output: order.append(module)) for m in modules]
    contender.loss()
    for hook in hooks:
        hook.remove()
    return order[-1]


@contextmanager
def breaking(module: nn.Module) -> Iterator[None]:
    def fail(module: nn.Module, args: Any) -> None:
        raise Broken

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def graph_breaks(contender: Contender) -> int | str:
    """Of the compiled forward of what a user would compile; the error where it does not compile."""
    torch.compiler.reset()
    try:
        return torch._dynamo.explain(contender.whole)(*contender.args).graph_break_count
    except Exception as error:  # whatever it is, it is what the table says
        return f"fails: {type(error).__name__}"
    finally:
        torch.compiler.reset()


# ---- detectors


def of_mmdet() -> Part:
    title = "mmdet's GFL teaches its own kind"
    names = {
        "ideal": detectors.ideal,
        f"{MMDET.label}: LDHead, its own LD": detectors.theirs,
        "distillkit: LD main": detectors.ours,
        "distillkit: LD main + LD valuable + class KD": detectors.ours_all,
        "distillkit: feature imitation": detectors.ours_features,
    }
    why = detectors.absent()
    if why:
        return Table(title, HEAD, [[name, why, "", "", "", ""] for name in names]), [], {"absent": why}
    pair = detectors.MMPair(64, 2, narrow=True)
    of, found = leaves(pair.teacher), {}
    for name, make in dense(names).items():
        with quietly():
            found[name] = counts(make(pair), of, pair.student, compiled=False)
    ideal = found["ideal"]
    checks = []
    for name in list(names)[2:]:
        ours = found[name]
        checks += [
            Check(
                f"syncs, mmdet, {name}: host syncs beside the detector's own",
                ours.syncs <= ideal.syncs,
                f"{ours.syncs - ideal.syncs} beside {ideal.syncs}; 0",
            ),
            none(f"mmdet, {name}: bytes held between steps", ours.held),
            none(f"mmdet, {name}: bytes held after an error", ours.held_after_error),
        ]
    features = found["distillkit: feature imitation"]
    head = leaves(pair.teacher.bbox_head)
    checks.append(
        Check(
            "syncs, mmdet: the teacher stops at its neck for features",
            features.ran <= of - head,
            f"{features.ran} of {of} modules ran, {head} of which are the head's; at most {of - head}",
        )
    )
    return table_of(title, found, {}), checks, data_of(found)


def dense(makers: dict[str, Any]) -> dict[str, Any]:
    """As on an accelerator, where a distiller gathers nothing."""
    made = dict(makers)
    made["distillkit: LD main"] = lambda pair: detectors.ours(pair, LD(Main(), dense=True))
    made["distillkit: LD main + LD valuable + class KD"] = lambda pair: detectors.ours(
        pair, LD(Main(), dense=True), LD(Valuable(), dense=True), LogitKD(Main(), dense=True)
    )
    made["distillkit: feature imitation"] = lambda pair: detectors.ours(pair, FeatureImitation("whole", weight=0.1))
    return made


# ---- tables and checks


def none(what: str, count: int | str | None) -> Check:
    return Check(f"syncs, {what}", count == 0, f"{count}; 0")


def table_of(title: str, found: dict[str, Counts], missing: dict[str, str]) -> Table:
    rows = [[name, *of.cells()] for name, of in found.items()]
    return Table(title, HEAD, rows + [[name, why, "", "", "", ""] for name, why in missing.items()])


def data_of(found: dict[str, Counts]) -> dict[str, Any]:
    return {name: vars(of) for name, of in found.items()}
