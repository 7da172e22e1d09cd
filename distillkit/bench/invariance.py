"""A loss does not depend on how often a batch holds the same pictures, nor on how many processes share it.

In float64, but for the models of other packages, and with BatchNorm frozen: what differs is a loss that counts wrongly
and no rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distillkit
from distillkit import (
    DIST,
    DKD,
    LD,
    AttentionTransfer,
    ChannelKD,
    FeatureImitation,
    LogitKD,
    Main,
    PairwiseKD,
    PixelKD,
    QueryKD,
    Teacher,
    Valuable,
)
from distillkit.bench import detectors
from distillkit.bench.contenders import quietly
from distillkit.bench.peers import MMDET, TRANSFORMERS
from distillkit.bench.ranks import RANKS, on_two_ranks
from distillkit.bench.suite import Check, Result, Table, Tell, silent, worst
from distillkit.boxes.merged import Merged
from distillkit.core.result import OUTPUT
from distillkit.models.gfl import GFL
from distillkit.models.rotated_gfl import RotatedGFL

COPIES = (1, 2, 4, 8)
EQUAL = 1e-5  # relative
PICTURES = 4  # of two ranks together


@dataclass(frozen=True)
class Case:
    """``make``: a wrapped model. ``call``: its losses, of the pictures of these numbers. ``base``: what is copied.
    ``gradient``: whether the model's own losses, too, are divided by what the ranks count together."""

    make: Callable[[], nn.Module]
    call: Callable[[Any, Sequence[int]], dict[str, Tensor]]
    base: tuple[int, ...] = (0,)
    gradient: bool = True


def run(quick: bool, rounds: int, tell: Tell = silent) -> Result:
    """The same in quick form: it takes half a minute."""
    rows, checks, data = [], [], {}
    for done, (kind, case) in enumerate(CASES.items()):
        tell(kind, done, len(CASES) + 2)
        for name, values in of_copies(case).items():
            rows.append([f"{kind}: {name}", *shown(values)])
            checks.append(equal(f"invariance, {kind}: {name}", values))
            data[f"{kind}: {name}"] = values
    if TRANSFORMERS.absent:
        rows.append([f"DETR of transformers: query_kd ({TRANSFORMERS.absent})", *[""] * (len(COPIES) + 1)])
    tell("mmdet", len(CASES), len(CASES) + 2)
    theirs, more, numbers = against_mmdet()
    tell("two processes", len(CASES) + 1, len(CASES) + 2)
    of_ranks, checks_of_ranks, numbers_of_ranks = on_ranks()
    copies = Table(
        "The same pictures n times in a batch",
        ["loss", "n = 1", *(f"n = {n}" for n in COPIES[1:]), "largest relative difference"],
        [*rows, *theirs],
        "The loss at n = 1, then its ratio to that. Of classifiers and segmentation models four pictures are repeated, "
        "of detectors one. What compares the pictures of a batch with each other, copies among them, is left out: "
        "RelationalKD, and DIST's second term.",
    )
    return Result(
        "Does a loss stay as strong as it is when the same pictures stand in the batch several times, or when two "
        "processes share the batch?",
        [copies, of_ranks],
        [*checks, *more, *checks_of_ranks],
        {"copies": {**data, **numbers}, "ranks": numbers_of_ranks},
    )


def of_copies(case: Case) -> dict[str, list[float]]:
    """Each distiller's loss at each number of copies."""
    found: dict[str, list[float]] = {}
    for n in COPIES:
        with quietly():
            model = case.make()
            losses = case.call(model, case.base * n)
        for distiller in model.distillers.values():  # type: ignore[union-attr, operator]
            found.setdefault(distiller.name, []).append(losses[distiller.name].item())
    return found


def largest(values: Sequence[float]) -> float:
    """Relative to the first."""
    return worst(abs(value / values[0] - 1) for value in values)


def shown(values: Sequence[float]) -> list[str]:
    return [f"{values[0]:.4g}", *(f"{value / values[0]:.6f}" for value in values[1:]), f"{largest(values):.0e}"]


def equal(name: str, values: Sequence[float]) -> Check:
    """A loss that is 0 says nothing of how it is counted."""
    ok = values[0] > 0 and largest(values) <= EQUAL
    return Check(name, ok, f"{values[0]:.4g}, relative difference {largest(values):.0e}; above 0, at most {EQUAL:.0e}")


# ---- the models


REGIONS: tuple[Literal["whole", "boxes", "fine-grained", "gi"], ...] = ("whole", "boxes", "fine-grained", "gi")
SMALL: dict[str, Any] = {"channels": 16, "convs": 1, "groups": 4, "strides": (8, 16, 32)}


def picture(index: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def target(index: int) -> dict[str, Tensor]:
    """One to four objects, other numbers on either rank."""
    g = torch.Generator().manual_seed(index)
    count = (3, 1, 4, 2)[index]
    corner, side = torch.rand(count, 2, generator=g) * 30, torch.rand(count, 2, generator=g) * 20 + 12
    return {"boxes": torch.cat([corner, corner + side], 1).double(), "labels": torch.arange(count) % 3}


def rotated_target(index: int) -> dict[str, Tensor]:
    upright = target(index)
    low, high = upright["boxes"].split(2, 1)
    angle = torch.linspace(-0.7, 0.9, len(low), dtype=torch.float64)[:, None]
    return {**upright, "boxes": torch.cat([(low + high) / 2, high - low, angle], 1)}


def prepared(model: Any) -> nn.Module:
    """A head that is sure of some classes, and of some edges."""
    nn.init.zeros_(model.head.gfl_cls.bias)
    nn.init.normal_(model.head.gfl_cls.weight, std=0.1)
    nn.init.normal_(model.head.gfl_reg.weight, std=0.3)
    return model


def gfl() -> nn.Module:
    torch.manual_seed(0)
    student = GFL(3, "test_resnet", bins=8, freeze_bn=True, **SMALL)
    teacher = prepared(GFL(3, "test_resnet", bins=8, **SMALL))
    imitations = [FeatureImitation(region, name=f"imitation_{region}") for region in REGIONS]
    distillers = [LD(Main()), LD(Valuable()), LogitKD(Main()), *imitations]
    return distillkit.wrap(student, Teacher(teacher, dtype=torch.float64), distillers).double()


def rotated() -> nn.Module:
    torch.manual_seed(0)
    student = RotatedGFL(3, "test_resnet", freeze_bn=True, **SMALL)
    teacher = prepared(RotatedGFL(3, "test_resnet", **SMALL))
    distillers = [LD(Main()), LD(Valuable()), LD(Merged(), name="ld_merged"), LogitKD(Main())]
    return distillkit.wrap(student, Teacher(teacher, dtype=torch.float64), distillers).double()


def detected(targets: Callable[[int], dict[str, Tensor]]) -> Callable[[Any, Sequence[int]], dict[str, Tensor]]:
    return lambda model, indices: model([picture(i) for i in indices], [targets(i) for i in indices])


class Convolutions(nn.Module):
    """Two of them, and a classifier of the picture or of every place."""

    def __init__(self, width: int, classes: int = 5, places: bool = False):
        super().__init__()
        self.stem, self.maps = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.classifier = nn.Conv2d(width, classes, 1)
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(self.maps(self.stem(x).relu()).relu())
        return logits if self.places else logits.mean((2, 3))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    distillers = [
        LogitKD(temperature=4.0),
        DKD(),
        DIST(gamma=0.0),
        AttentionTransfer(student_at="maps", teacher_at="maps"),
        FeatureImitation(student_at="maps", teacher_at="maps"),
    ]
    teacher = Teacher(Convolutions(12), dtype=torch.float64)
    return distillkit.wrap(Convolutions(8), teacher, distillers, criterion=cross_entropy).double()


def classified(model: Any, indices: Sequence[int]) -> dict[str, Tensor]:
    return model(torch.stack([picture(i) for i in indices]), torch.tensor(indices))


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    distillers = [
        PixelKD(),
        PixelKD("main", width=0.1, name="pixel_kd_main"),
        ChannelKD(),
        PairwiseKD(student_at="maps", teacher_at="maps", pool_scale=0.25),
    ]
    teacher = Teacher(Convolutions(12, places=True), dtype=torch.float64)
    return distillkit.wrap(
        Convolutions(8, places=True), teacher, distillers, criterion=cross_entropy, adapter=distillkit.Segmenter()
    ).double()


def segmented(model: Any, indices: Sequence[int]) -> dict[str, Tensor]:
    side = torch.arange(16)
    masks = [(side[:, None] > 7 + i) + 2 * (side > 9) for i in indices]
    return model(torch.stack([picture(i) for i in indices]), torch.stack(masks))


LAYERS = {"layers": 1, "ffn_dim": 32, "attention_heads": 4}


def queries() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    def detr(count: int) -> nn.Module:
        stages: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1] * 4}
        stages.update(layer_type="basic", out_features=["stage4"])
        layers: dict[str, Any] = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in LAYERS.items()}
        backbone = ResNetConfig(**stages)
        more: dict[str, Any] = {"use_timm_backbone": False, "num_labels": 3, "num_queries": count, "dropout": 0.0}
        return DetrForObjectDetection(DetrConfig(backbone_config=backbone, d_model=32, **more, **layers))

    torch.manual_seed(0)
    return distillkit.wrap(detr(8), detr(12).eval(), [QueryKD()])


def queried(model: Any, indices: Sequence[int]) -> dict[str, Tensor]:
    labels = []
    for i in indices:
        low, high = target(i)["boxes"].split(2, 1)
        boxes = torch.cat([(low + high) / 2, high - low], 1) / 64
        labels.append({"class_labels": target(i)["labels"], "boxes": boxes.float()})
    return model(pixel_values=torch.stack([picture(i) for i in indices]).float(), labels=labels)


FOUR = tuple(range(PICTURES))
CASES = {
    "GFL": Case(gfl, detected(target)),
    "rotated GFL": Case(rotated, detected(rotated_target)),
    "classifier": Case(classifier, classified, FOUR),
    "segmentation": Case(segmenter, segmented, FOUR),
}
if not TRANSFORMERS.absent:
    CASES["DETR of transformers"] = Case(queries, queried, gradient=False)


# ---- mmdet's LDHead


def against_mmdet() -> tuple[list[list[str]], list[Check], dict[str, list[float]]]:
    """The same loss on mmdet's models, by its own LDHead and by distillkit. mmdet's is in float32."""
    names = (f"{MMDET.label}: loss_ld of its LDHead", "distillkit on mmdet's GFL: ld_main")
    why = detectors.absent()
    if why:
        return [[f"{name} ({why})", *[""] * (len(COPIES) + 1)] for name in names], [], {}
    pair = detectors.MMPair(64, 1, narrow=True)
    model = detectors.their_detector(pair)
    taught = detectors.ours(pair).whole
    found: dict[str, list[float]] = {name: [] for name in names}
    for n in COPIES:
        call = pair.pictures.repeat(n, 1, 1, 1), pair.samples * n
        with torch.no_grad():
            found[names[0]].append(sum(model.loss(*call)["loss_ld"]).item())
        found[names[1]].append(taught(*call, mode="loss")["ld_main"].item())
    rows = [[name, *shown(values)] for name, values in found.items()]
    return rows, [equal(f"invariance, {names[1]}", found[names[1]])], found


# ---- two processes


def of_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    """Losses and gradients of every case, of this rank's half of the pictures."""
    share = FOUR[rank * PICTURES // RANKS :][: PICTURES // RANKS]
    return {kind: losses_and_gradients(case, share, parallel=True) for kind, case in CASES.items()}


def losses_and_gradients(case: Case, indices: Sequence[int], parallel: bool = False) -> dict[str, Tensor]:
    with quietly():
        model = case.make()
        called = nn.parallel.DistributedDataParallel(model) if parallel else model
        losses = case.call(called, indices)
    sum(loss for name, loss in losses.items() if name != OUTPUT).backward()  # type: ignore[union-attr]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    names = [distiller.name for distiller in model.distillers.values()]  # type: ignore[union-attr, operator]
    return {**{name: losses[name].detach() for name in names}, "gradient": gradient}


def on_ranks() -> tuple[Table, list[Check], dict[str, Any]]:
    """The mean over two gloo ranks with two pictures each, against one process with all four."""
    with quietly():
        ranks = on_two_ranks(of_rank)
    rows, checks, data = [], [], {}
    for kind, case in CASES.items():
        alone = losses_and_gradients(case, FOUR)
        gradient = alone.pop("gradient")
        apart = worst(float((rank[kind]["gradient"] - gradient).abs().max() / gradient.abs().max()) for rank in ranks)
        losses = {}
        for name, value in alone.items():
            shared = sum(float(rank[kind][name]) for rank in ranks) / RANKS
            losses[name] = [value.item(), shared]
            rows.append([f"{kind}: {name}", *shown(losses[name])])
            checks.append(equal(f"invariance, {kind}: {name} on two processes", losses[name]))
        data[kind] = {"losses": losses, "gradient": apart}
        if not case.gradient:
            continue
        rows.append([f"{kind}: gradient of all losses", "", "", f"{apart:.0e}"])
        said = f"relative difference {apart:.0e}; at most {EQUAL:.0e}"
        checks.append(Check(f"invariance, {kind}: gradient on two processes", apart <= EQUAL, said))
    table = Table(
        "Four pictures on one process, and two on each of two (gloo, DistributedDataParallel)",
        ["loss", "one process", "mean of two, as a ratio", "largest relative difference"],
        rows,
        "A rank's loss is divided by what the ranks count together, so that the mean is that of one process.",
    )
    return table, checks, data
