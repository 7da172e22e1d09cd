"""`search`: the space of cells that is learned, and the network that is then found in it (AutoSpace)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from distillkit.models.autospace_cells import INVERTED_RESIDUAL
from distillkit.models.autospace_network import Block, Macro, Network, read_space
from distillkit.models.autospace_network import Stage as MacroStage
from distillkit.schema.base import Count, NotNegative, Positive, Share, Strict
from distillkit.schema.train import AdamW, CosineSchedule, Optimizer, Schedule, Train


class Stage(Strict):
    """Blocks of one width."""

    width: Count
    """Channels."""
    blocks: Count
    """How many; a found network may leave out all but the first."""
    stride: Literal[1, 2] = 1
    """Of the first."""


class MacroNetwork(Strict):
    """What is fixed while cells are searched."""

    stem: Count = 32
    """Channels of the first convolution."""
    stem_stride: Literal[1, 2] = 2
    first: Count = 16
    """Channels of the block behind it, which is not searched."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    features: Count = 1280
    """Channels before the mean over places."""

    def macro(self) -> Macro:
        stages = tuple(MacroStage(stage.width, stage.blocks, stage.stride) for stage in self.stages)
        return Macro(self.stem, self.first, stages, self.features, self.stem_stride)


class SpaceSearch(Strict):
    """How the cells of each layer are evolved."""

    file: str | None = None
    """A learned space in the published form, to be used as it is; nothing is learned then."""
    population: Count = 64
    """Cells of a layer."""
    active: Annotated[int, Field(ge=2)] = 4
    """Cells of a layer that are trained side by side."""
    tournament: Count = 8
    """Cells drawn for each active one, the best of which is taken."""
    mutate: Share = 0.5
    """Share of the active cells that are replaced by a mutation of themselves."""
    rounds: Count = 100
    warmup: Annotated[int, Field(ge=0)] = 5
    """First rounds, in which weights learn and scores do not."""
    steps: Count = 100
    """Optimizer steps a round."""
    learned: Count = 6
    """Cells of a layer that are kept, beside the reference cells."""
    expand: Count = 6
    """Width inside a cell, in channels of its input, while cells are scored."""
    cost_weight: NotNegative = 0.0
    """What multiply-adds count for: rank = score - cost_weight * multiply-adds, in those of the inverted residual."""
    most_cost: Annotated[float, Field(ge=1)] = 10.0
    """Cells of more multiply-adds than this many inverted residuals are never made."""
    optimizer: Optimizer = AdamW(kind="adamw", lr=2e-3, weight_decay=0.05)
    """Of the weights."""
    schedule: Schedule = CosineSchedule(kind="cosine", min_factor=0.05)
    clip: Positive = 5.0
    """Largest norm of the weights' gradient."""
    score_lr: Positive = 0.02
    """Learning rate of the scores."""


class NetworkSearch(Strict):
    """How a network is found in the learned space."""

    madds: Count
    """Most multiply-adds of a picture of data.size."""
    kernels: Annotated[list[Literal[3, 5, 7]], Field(min_length=1)] = [3, 5, 7]
    """Sides that the first depthwise convolution of a cell may have."""
    expands: Annotated[list[Annotated[int, Field(ge=1, le=8)]], Field(min_length=1)] = [3, 6]
    """Widths inside a cell that a block may have, in channels of its input."""
    drawn: Annotated[int, Field(ge=0)] = 2
    """Networks drawn at random in each step, beside the largest and the smallest."""
    train: Train = Train(
        epochs=30,
        optimizer=AdamW(kind="adamw", lr=2e-3, weight_decay=0.05),
        schedule=CosineSchedule(kind="cosine"),
        clip=5.0,
        evaluate_every=10,
    )
    """Of the network that holds all others."""
    population: Count = 50
    generations: Annotated[int, Field(ge=0)] = 20
    tournament: Count = 8
    crossover: Share = 0.5
    """Share of children that come from two parents."""
    evaluator: Literal["process", "accelerate", "ray"] = "process"
    """Where candidates are evaluated: here, over the processes of accelerate launch, or on a Ray cluster."""
    workers: Count | None = None
    """Of Ray, at a time; null: one for each CPU of the cluster."""


class Search(Strict):
    """What `distillkit search` does before the student, then `model: autospace`, can be trained."""

    network: MacroNetwork
    space: SpaceSearch = SpaceSearch()
    nas: NetworkSearch | None = None
    """null: the search ends with the learned space."""


def smallest_network(macro: Macro, expands: list[int], classes: int) -> Network:
    """Of inverted residuals alone, which are in every space, and of the fewest blocks."""
    first = [place.shape._replace(expand=min(expands)) for place in macro.places() if place.first]
    return macro.network([Block(shape, INVERTED_RESIDUAL) for shape in first], classes)


def _wrong_space(file: Path, macro: Macro) -> Iterator[tuple[tuple[str | int, ...], str]]:
    try:
        layers = len(read_space(file))
    except (ValueError, OSError) as error:
        yield ("search", "space", "file"), str(error)
        return
    if layers != macro.layers:
        yield (
            ("search", "space", "file"),
            f"{file} has {layers} layers, search.network {macro.layers}: one for the first block of each stage, and "
            "one for the others where there are some",
        )


def wrong_search(raw: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What a recipe's `search` and its other blocks have to say to each other."""
    try:
        search = TypeAdapter(Search).validate_python(raw.get("search"))
    except ValidationError:
        return
    student = raw.get("student")
    if isinstance(student, dict) and student.get("model") != "autospace":
        yield (
            ("student", "model"),
            "is to be autospace where the recipe has the key search: what is found is of that kind",
        )
    if search.space.tournament > search.space.population or search.space.active > search.space.population:
        yield ("search", "space", "population"), "is less than the cells that are drawn from it (active, tournament)"
    if search.space.file is not None:
        yield from _wrong_space(Path(search.space.file), search.network.macro())
    data = raw.get("data")
    size = data.get("size", 32 if data.get("kind") == "cifar" else 224) if isinstance(data, dict) else 224
    sides = size if isinstance(size, list) else [size, size]
    if len(set(map(str, sides))) > 1:
        yield ("data", "size"), "is to be square for a search: cells are compared on square maps"
    elif search.nas and isinstance(sides[0], int):
        smallest = smallest_network(search.network.macro(), list(search.nas.expands), 1)
        least = smallest.costs(sides[0])[1]
        if search.nas.madds < least:
            yield (
                ("search", "nas", "madds"),
                f"is {search.nas.madds}, below the smallest network of inverted residuals, which has {least} "
                f"multiply-adds at {sides[0]}x{sides[0]}; raise it, or make search.network smaller",
            )
