"""Localization distillation of a detector by itself. Zheng et al., arXiv:2204.05957, "Self-LD"."""

from __future__ import annotations

from typing import Literal

from torch import nn

from distillkit.boxes.regions import AnchorWeight, Region
from distillkit.core.schedule import Weight
from distillkit.core.teacher import EMATeacher, Teacher
from distillkit.distillers.ld import LD, Normalize


class SelfLD(LD):
    """``LD`` without another model: the teacher is the student, as it was or as it has been on average.

    Args:
        checkpoint: the same detector with weights of an earlier training, which stays as it is (the paper's form: train
            once to the end, then again from the start with the first result as teacher). None: a running average of the
            student, which starts as its copy; from where the two agree, the loss starts at 0.
        decay: of the running average, in [0, 1); unused with a checkpoint.
        The others as in ``LD``. It brings its own teacher: ``wrap(student, distillers=[SelfLD(decay=0.999)])``.

    The running average departs from the paper, whose teacher is trained to the end first and frozen.
    """

    short_name = "self_ld"

    def __init__(
        self,
        region: Region | None = None,
        temperature: float = 10.0,
        weight: float | Weight = 0.25,
        checkpoint: nn.Module | None = None,
        decay: float = 0.999,
        anchor_weight: AnchorWeight | None = None,
        convention: Literal["default", "release"] = "default",
        dense: bool | None = None,
        name: str | None = None,
        bin_reduction: Literal["mean", "sum"] = "mean",
        normalize: Normalize = "images",
    ):
        super().__init__(
            region,
            temperature,
            weight,
            anchor_weight,
            convention,
            dense,
            name=name,
            bin_reduction=bin_reduction,
            normalize=normalize,
        )
        # neither is a module, so a frozen teacher is no part of what is trained or saved
        self._own_teacher = EMATeacher(decay) if checkpoint is None else Teacher(checkpoint)

    def own_teacher(self) -> EMATeacher | Teacher:
        """The teacher that ``wrap`` gives it."""
        return self._own_teacher
