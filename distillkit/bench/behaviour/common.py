"""The rows that contenders are asked in one way. A function of a row's name in a contender's own file comes before."""

from __future__ import annotations

from collections.abc import Callable

from distillkit.bench.behaviour import product, provoke
from distillkit.bench.behaviour.kit import Kit
from distillkit.bench.behaviour.rows import Outcome

COMMON: dict[str, Callable[[Kit], Outcome]] = {
    "teacher_mode": provoke.teacher_mode,
    "teacher_switched": provoke.teacher_switched,
    "teacher_hidden": provoke.teacher_hidden,
    "teacher_gradient": provoke.teacher_gradient,
    "teacher_nan": provoke.teacher_nan,
    "after_exception": provoke.after_exception,
    "class_counts": provoke.class_counts,
    "two_wrappers": provoke.two_wrappers,
    "repeated_images": provoke.repeated_images,
    "unwrap": product.unwrap,
    "copies": product.copies,
    "bf16": product.bf16,
    "normalisation": product.normalisation_of_classifiers,
    "weight": product.weight,
}
