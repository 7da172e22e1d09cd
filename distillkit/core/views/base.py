"""What every view is, and what of a detector's batch the distillers get as targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor


class View:
    """Base of all views. A view lives for one step; nothing keeps it.

    A teacher's is made comparable in this order: ``at_scale`` where it saw resized pictures, ``picked`` where its
    classes are others, ``match`` with the student's.
    """

    def at_scale(self, scale: float | None) -> Self:
        """This teacher view, knowing that its pictures had ``scale`` times the sides of the student's; None: pictures
        of one batch were scaled differently."""
        return self

    def picked(self, columns: Tensor, names: int) -> Self:
        """The view with these classes alone, in this order. A view without classes is returned as it is.

        Args:
            columns: (C,) int64, where each of them stands now.
            names: how many classes there are names for.

        Raises ValueError where the view has another number of classes.
        """
        return self

    def shared_with(self, teacher: Any) -> Self:
        """This student view without the levels that the teacher lacks."""
        return self

    def match(self, student: Self) -> Self:
        """This teacher view, expressed so that it can be compared with ``student`` entry by entry.

        Raises ValueError, naming the knob that resolves it, where the two cannot be matched.
        """
        return self

    def unmatched(self, student: Self) -> list[str]:
        """What of this teacher view has no partner in the student's, in words; said once, at the first step."""
        return []


def columns_of(logits: Tensor, columns: Tensor, names: int, dim: int = -1) -> Tensor:
    """Those columns of a tensor of class logits; ValueError unless it has one for each name."""
    check_names(logits.shape[dim], names)
    return logits.index_select(dim, columns)


def check_names(columns: int, names: int) -> None:
    if columns != names:
        raise ValueError(
            f"there are names for {names} classes, and class logits for {columns}: give classes= a name for each "
            "column, in their order (call one that is no class 'N/A', and a background's '__background__', which is "
            "the first of torchvision's detectors)"
        )


def other_classes(teacher: int, student: int) -> ValueError:
    """The error for numbers of classes that differ."""
    return ValueError(
        f"the teacher has {teacher} classes, the student {student}; both need the same classes in the same order, or "
        "their names: Teacher(model, classes=[...]) and wrap(..., classes=[...])"
    )


@dataclass
class BoxTargets:
    """Ground truth of a batch of pictures, in pixels of the network's input.

    Args:
        boxes: per image (k, 4) x1, y1, x2, y2, or rotated (k, 5) cx, cy, w, h, angle (radians, clockwise as seen).
        labels: per image (k,) int64, 0..C-1.
        sizes: per image (height, width) before padding to the batch's size: anchors outside it take no part.
        memo: what several distillers need of the same step (anchors, the assignment), computed once.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    sizes: list[tuple[int, int]]
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.boxes)
