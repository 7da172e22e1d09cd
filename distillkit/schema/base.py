"""What the blocks of a recipe are made of: their base, the types of numbers, and keys that all data have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from distillkit.located import said


class Strict(BaseModel):
    """Base of every block: unknown keys are mistakes, and nothing is converted behind the reader's back."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


Split = Literal["train", "val", "test"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _square(value: Any) -> Any:
    if not isinstance(value, int | list):
        raise ValueError(f"expected one number or [height, width], got {said(value)}")
    return [value, value] if isinstance(value, int) else value


def ordered(value: list[Any]) -> list[Any]:
    if value[0] > value[1]:
        raise ValueError(f"expected [low, high], got {value}")
    return value


Size = Annotated[
    list[Count],
    Field(min_length=2, max_length=2),
    BeforeValidator(_square, json_schema_input_type=Count | list[Count]),
]


class DataBlock(Strict):
    """Keys that data of all tasks have."""

    size: Size = [320, 320]
    """Network input in pixels: [height, width], or one number for both."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes; 0 loads in the training process."""
    batch: Count = 8
    """Pictures a process and step."""
