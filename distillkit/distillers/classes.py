"""What the distillers of class logits share: the checks of what they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distillkit.boxes.precision import at_least_float32
from distillkit.core.views import ClassLogits


def matched_logits(student: ClassLogits, teacher: ClassLogits, fewest: int = 2) -> tuple[Tensor, Tensor]:
    """Logits (B, C) of both, at least in float32, the teacher's detached; ValueError if they do not fit each other.

    fewest: how many classes there must be.
    """
    s, t = student.logits, teacher.match(student).logits
    if s.dim() != 2:
        raise ValueError(
            f"class logits must be (B, C), got {tuple(s.shape)}: name the layer that makes one row a picture"
        )
    if s.shape[1] < fewest:
        raise ValueError(f"this loss needs at least {fewest} classes, the models have {s.shape[1]}")
    return at_least_float32(s), at_least_float32(t.detach())


def hard_labels(targets: Any, logits: Tensor) -> Tensor:
    """Targets, or the ``labels`` among them, as class indices (B,); ValueError for any other kind."""
    if isinstance(targets, Mapping):
        targets = targets.get("labels")
    right = isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point()
    if right and len(targets) == len(logits):
        return targets
    got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
    raise ValueError(
        f"this loss needs the class of every picture, integers ({len(logits)},), as targets; got {got}. Mixup, cutmix "
        "and label smoothing make soft ones: turn them off (smooth in the criterion: "
        "CrossEntropyLoss(label_smoothing=0.1)), or use a distiller that reads no targets: LogitKD, DIST"
    )


def check_pictures(count: int, why: str) -> None:
    """ValueError for a batch of fewer than three pictures, of which relations say nothing."""
    if count < 3:
        raise ValueError(
            f"the batch has {count} picture(s) on this rank, and {why}: use 3 or more, and drop_last=True where the "
            "last batch may be smaller"
        )
