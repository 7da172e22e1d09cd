"""The rows of the behaviour matrix: what each asks, why it matters, and by what it is judged; and what a probe returns.

A row is a fault that is provoked, by code that runs, in every contender that is installed. Judges are shared: they get
what was observed and know no contender.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distillkit.bench.suite import worst


@dataclass(frozen=True)
class Outcome:
    """What a probe saw. ``ok``: the contender handles the fault; None: it has nothing that the row could be asked of,
    and ``saw`` says why. ``broken``: the probe itself did not work, which says nothing about the contender."""

    ok: bool | None
    saw: str
    broken: bool = False


def does_not_apply(why: str) -> Outcome:
    return Outcome(None, why)


@dataclass(frozen=True)
class Row:
    """``key``: the probe's name in every contender's file. ``asks``: what ought to be so. ``judged``: what makes it a
    yes. ``fails``: peers in which the fault is known and has to show, where they are installed. ``needs``: a module
    without which nobody can be asked."""

    key: str
    asks: str
    matters: str
    judged: str
    fails: tuple[str, ...] = ()
    needs: str = ""


ROWS = (
    Row(
        "teacher_mode",
        "a teacher handed over in train mode neither drifts nor drops",
        "its BatchNorm statistics would move with every batch, its dropout would add noise to what is taught",
        "3 steps, as documented: the running means are the same bits, no BatchNorm or dropout ran in train mode",
        ("torchdistill",),
    ),
    Row(
        "teacher_switched",
        "a teacher that something else puts in train mode is found out",
        "Lightning calls train() on all that a module holds",
        "teacher.train() before the third step: an error that speaks of the mode, or the running means do not move",
        ("torchdistill", "timm.task", "ultralytics"),
    ),
    Row(
        "teacher_hidden",
        "the teacher is no part of what is optimised, reduced and saved",
        "optimizers need filters, DDP sends its buffers every step, checkpoints grow",
        "none of its tensors in parameters(), buffers() or the checkpoint of what is trained",
        ("nvidia-modelopt", "ultralytics"),
    ),
    Row(
        "teacher_gradient",
        "the teacher gets no gradient",
        "memory and time for a graph that nobody needs",
        "after backward none of its parameters has a gradient or stands in the loss's graph",
    ),
    Row(
        "after_exception",
        "no activation is kept, also of a step that fails",
        "that much less memory for the next step, or for a loop that catches out-of-memory and goes on",
        "bytes of what modules returned that are alive after a step, and after an exception in the student's last "
        "layer: 0",
        ("torchdistill", "nvidia-modelopt", "ultralytics"),
    ),
    Row(
        "teacher_nan",
        "a teacher that says NaN is found out",
        "the student is lost, and hours later nobody knows when",
        "within 60 steps an error or a warning has the words NaN or finite, and the name of a loss or of the teacher",
        ("torchdistill", "nvidia-modelopt", "timm.task", "mmdet", "ultralytics"),
    ),
    Row(
        "two_losses",
        "one layer of the student feeds two losses",
        "feature and relation losses on the same map are common",
        "both losses are numbers, and are those computed by hand",
        ("nvidia-modelopt",),
    ),
    Row(
        "wrong_path",
        "a wrong module path is named, with the nearest right one",
        "models have hundreds of paths, and a release renames them",
        "an error whose text has the wrong path and the right one that it is one letter from",
        ("torchdistill", "nvidia-modelopt"),
    ),
    Row(
        "never_ran",
        "a layer that does not run is named",
        "auxiliary heads and layers behind a switch exist as modules and have no output",
        "an error whose text has the layer's path",
        ("torchdistill", "nvidia-modelopt"),
    ),
    Row(
        "misspelt_key",
        "a misspelt key of the configuration is named",
        "a default is trained with instead, in silence",
        "an error whose text has the misspelt key",
        ("torchdistill",),
    ),
    Row(
        "trains_nothing",
        "a distillation loss that cannot change the student is said",
        "it falls or stays, and nothing is distilled",
        "all that the loss reads is frozen, something else is trained: an error or a warning with the loss's name",
        ("torchdistill", "nvidia-modelopt", "timm.task", "mmdet", "ultralytics"),
    ),
    Row(
        "class_counts",
        "a teacher of other classes is said",
        "5 classes against 7: the commonest mistake of a first run",
        "an error whose text has both numbers and speaks of classes",
        ("torchdistill", "nvidia-modelopt", "timm.task"),
    ),
    Row(
        "two_wrappers",
        "a second distillation in the process leaves the first alone",
        "comparisons, stages and tests make several",
        "the first one's losses on a batch are the same after a second was made and run, and its own hooks run",
        ("torchdistill",),
    ),
    Row(
        "compiled_before",
        "a student compiled before it is hooked is refused, or works",
        "hooks set after the first compiled call are ignored by torch without a word",
        "compiled and called in train mode, then distilled by a layer: an error that speaks of compiling, or the loss "
        "of the same student uncompiled",
        ("torchdistill", "nvidia-modelopt"),
    ),
    Row(
        "accelerate",
        "a loop of Accelerate distils",
        "it is how a loop of one's own comes to several devices and to bfloat16",
        "prepared by an Accelerator in bfloat16, one step with its backward changes the student",
        ("torchdistill",),
    ),
    Row(
        "repeated_images",
        "a batch of one picture repeated has the loss of the picture",
        "else the weight of the loss changes with the size of the batch",
        "the distillation loss at 1, 2, 4 and 8 copies is equal to 1e-4",
        ("mmdet",),
    ),
    Row(
        "two_ranks",
        "two ranks have the gradient of one process",
        "unsynchronised ranks diverge in silence; a loss per rank changes with their number",
        "4 pictures on two gloo ranks: both ranks have the same gradient of the distillation loss, and that of one "
        "process with all of them, to 1e-4",
        ("torchdistill", "mmdet"),
    ),
    Row(
        "loss_parameters",
        "a loss's own parameters train on two ranks",
        "projections between widths are parameters; find_unused_parameters is what frozen layers need",
        "a projection, two gloo ranks, find_unused_parameters=True: no error, it is among what is optimised, and has "
        "the same gradient on both ranks",
        ("torchdistill", "nvidia-modelopt"),
    ),
    Row(
        "runner_checkpoint",
        "a checkpoint with a Runner's logs loads, and runs nothing",
        "OpenMMLab's Runners save HistoryBuffer objects, which torch.load refuses since 2.6",
        "weights beside a HistoryBuffer are loaded, and a file that names os.mkdir makes no folder",
        ("torchdistill", "timm.task", "mmdet"),
        needs="mmengine",
    ),
    Row(
        "runs_code",
        "a recipe is data",
        "recipes are passed around",
        "a recipe that asks for os.mkdir makes no folder when it is read and built",
        ("torchdistill", "mmdet", "ultralytics"),
    ),
    Row(
        "unwrap",
        "the student comes back as it was",
        "it is exported, compared and loaded by code that knows its class",
        "its class, its keys and its prediction are those of the untouched model, and no hook is left",
        ("mmdet",),
    ),
    Row(
        "copies",
        "the student in training can be copied and pickled",
        "averages of weights, checkpoints of whole models and worker processes do so",
        "deepcopy and pickle work, predict the same, carry no hook and are no larger than the untouched model's",
        ("torchdistill", "nvidia-modelopt", "mmdet", "ultralytics"),
    ),
    Row(
        "bf16",
        "under bfloat16 autocast the loss is computed in float32",
        "differences of close logits vanish in 8 bits",
        "the loss is float32, and so is what every softmax and squared error in it reads (on the CPU, whose autocast "
        "leaves softmax in 16 bits; that of CUDA does not)",
        ("torchdistill", "nvidia-modelopt", "timm.task"),
    ),
    Row(
        "normalisation",
        "a teacher of another mean and std gets its own input",
        "its logits are wrong, and nothing says so",
        "what arrives at its first layer is the batch normalised with its own mean and std, to 1e-5",
        ("torchdistill", "nvidia-modelopt", "mmdet"),
    ),
    Row(
        "weight",
        "a distillation loss may weigh more than 1",
        "published recipes weigh it 2 to 50",
        "at weight 2 it is twice what it is at 1",
        ("nvidia-modelopt",),
    ),
    Row(
        "no_objects",
        "a picture without objects trains",
        "negatives are in every real set",
        "losses and gradients are finite",
    ),
)
BY_KEY = {row.key: row for row in ROWS}


# ---- judges


def short(text: str, width: int = 110) -> str:
    """A text in one line, cut; folders of temporary files are left out."""
    line = re.sub(r"/\S+/(?=[\w.]+\.(yaml|py|pth))", "", " ".join(text.split()))
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def named(error: BaseException | None, must: Sequence[str], accepted: str = "accepted without a word") -> Outcome:
    """An error whose text has every word of ``must``, in any case of letters."""
    if error is None:
        return Outcome(False, accepted)
    text = str(error)
    missing = [word for word in must if word.lower() not in text.lower()]
    saw = f"{type(error).__name__}: {cut_around(text, must)}"
    return Outcome(not missing, saw + (f" (no word of {', '.join(missing)})" if missing else ""))


def cut_around(text: str, words: Sequence[str], width: int = 110) -> str:
    """A text in one line, cut so that the first of the words that it has is in it."""
    line = short(text, len(text))
    at = min((line.lower().find(word.lower()) for word in words if word.lower() in line.lower()), default=0)
    start = line.rfind(" ", 0, max(at - width // 3, 1)) + 1 if at > width // 2 else 0
    return ("… " if start else "") + short(line[start:], width)


def said(messages: Sequence[str], must: Sequence[str], either: Sequence[str], silent: str) -> Outcome:
    """A message (of an error, a warning or a log) that has one word of ``must`` and one of ``either``."""
    for text in messages:
        lower = text.lower()
        if any(word.lower() in lower for word in must) and any(word.lower() in lower for word in either):
            return Outcome(True, cut_around(text, must))
    nearest = f"; said: {short(messages[-1], 70)}" if messages else ""
    return Outcome(False, silent + nearest)


def equal(values: dict[str, float], tolerance: float, what: str) -> Outcome:
    """All values are the first, relative to its size. One that is 0 says nothing."""
    first = next(iter(values.values()))
    if not first:
        return Outcome(False, f"{what}: the first is 0", broken=True)
    off = worst(abs(value / first - 1) for value in values.values())
    if off <= tolerance:
        return Outcome(True, f"{what} equal to {off:.0e}")
    shown = ", ".join(f"{name}: {value / first:.3g}" for name, value in values.items())
    return Outcome(False, f"{what} relative to the first: {shown}")


def both(*outcomes: Outcome) -> Outcome:
    """Of several provocations of one contender: yes if all are."""
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    return wrong[0] if wrong else Outcome(True, "; ".join(dict.fromkeys(o.saw for o in outcomes)))
