"""From the blocks of a recipe to objects: data, models, teachers, distillers."""

from distillkit.training.build.box_data import DetectionData, build_resize, tiles_folder
from distillkit.training.build.classes import Classes
from distillkit.training.build.data import build_classes, build_data
from distillkit.training.build.distillers import build_distillers, build_wrapped
from distillkit.training.build.models import (
    build_model,
    check_start,
    count_of,
    differs,
    load_checkpoint,
    other_head,
    own_classes,
    said_of_classes,
    teacher_configs,
    teacher_folder,
)

__all__ = [
    "Classes",
    "DetectionData",
    "build_classes",
    "build_data",
    "build_distillers",
    "build_model",
    "build_resize",
    "build_wrapped",
    "check_start",
    "count_of",
    "differs",
    "load_checkpoint",
    "other_head",
    "own_classes",
    "said_of_classes",
    "teacher_configs",
    "teacher_folder",
    "tiles_folder",
]
