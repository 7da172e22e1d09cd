"""Complete losses of the published LD heads, values and gradients, against arrays recorded from them.

What distills comes from distillkit, with ``convention="release"``. The heads' own losses are distillkit's where it has
them (GFL) and are written out here where it has not (ATSS, FCOS and RetinaNet with a distribution head).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from distillkit.adapters.rotated_retina import RotatedRetinaHead
from distillkit.boxes.anchors import grid_points
from distillkit.boxes.distribution import decode, encode, integral
from distillkit.boxes.fcos import FCOSMain, FCOSValuable
from distillkit.boxes.fcos import assign as fcos_assign
from distillkit.boxes.iou import aligned_iou
from distillkit.boxes.maps import Maps
from distillkit.boxes.max_iou import MaxIoUMain, MaxIoUValuable
from distillkit.boxes.max_iou import assign as max_iou_assign
from distillkit.boxes.merged import Merged
from distillkit.boxes.overlap import turned
from distillkit.boxes.regions import Main, Valuable, matched
from distillkit.boxes.rotated_distribution import decode_deltas
from distillkit.boxes.shapes import shaped_anchors
from distillkit.core.views import BoxTargets, DenseDetections, Features
from distillkit.distillers.feature_imitation import FeatureImitation, fine_grained
from distillkit.distillers.ld import LD
from distillkit.distillers.logit_kd import LogitKD
from distillkit.losses.focal import distribution_focal, quality_focal
from distillkit.losses.gfl import gfl_losses
from distillkit.losses.iou import giou_loss
from distillkit.losses.rotated_retina import RetinaTargets, retina_losses

GOLDEN = Path(__file__).parent / "golden"
VALUE, GRADIENT = 1e-5, 1e-4


@cache
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}


@cache
def meta(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return json.loads(str(file["meta"]))


@dataclass
class Case:
    """One recorded case: its maps as fresh leaves, and what was recorded."""

    recorded: dict[str, Tensor]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.student = {kind: self._levels("s", kind) for kind in ("cls", "box", "ctr", "feat")}
        self.teacher = {kind: self._levels("t", kind) for kind in ("cls", "box", "ctr", "feat")}
        for kind in self.student:
            self.student[kind] = [m.requires_grad_() for m in self.student[kind]]
        images = range(len(self.settings["counts"]))
        self.targets = BoxTargets(
            [self.recorded[f"gt{i}"] for i in images],
            [self.recorded[f"labels{i}"] for i in images],
            [tuple(size) for size in self.settings["pad_shapes"]],
        )
        self.strides = tuple(self.settings["strides"])

    def _levels(self, side: str, kind: str) -> list[Tensor]:
        found = [self.recorded.get(f"{side}_{kind}_l{i}") for i in range(5)]
        return [m.float() / (8 if kind == "feat" else 1) for m in found if m is not None]

    def view(self, side: str, joint: bool = False, **more: Any) -> DenseDetections:
        """joint: one distribution over all bins of all four edges, as the released RetinaNet head has it."""
        own = self.student if side == "student" else self.teacher
        anchors, bins = self.settings["naug"], self.settings["reg_max"] + 1
        return DenseDetections(
            Maps(tuple(own["cls"]), (own["cls"][0].shape[1] // anchors,), anchors),
            Maps(tuple(own["box"]), (1, 4 * bins) if joint else (4, bins), anchors),
            self.strides,
            **more,
        )

    def check(self, name: str, loss: Tensor) -> None:
        """The sum over levels and, where the gradient was recorded, the gradient of every map."""
        recorded = self.recorded[f"loss_{name}" if name != "total" else "total"].sum()
        assert loss.item() == pytest.approx(recorded.item(), rel=VALUE, abs=VALUE * 1e-2), name
        for kind in ("box", "cls"):
            if not any(key.startswith(f"g_{name}_d{kind}") for key in self.recorded):
                continue
            gradients = torch.autograd.grad(loss, self.student[kind], retain_graph=True, allow_unused=True)
            wanted = [self.recorded.get(f"g_{name}_d{kind}_l{i}") for i in range(5)]
            scale = max(w.abs().max().item() for w in wanted if w is not None)
            for level, (got, want) in enumerate(zip(gradients, wanted, strict=True)):
                want = torch.zeros_like(self.student[kind][level]) if want is None else want
                got = torch.zeros_like(want) if got is None else got
                assert (got - want).abs().max() <= GRADIENT * scale, (name, kind, level)

    def alone(self, level: int) -> Case:
        """The same case with a teacher that agrees with the student everywhere but on one level."""
        other = Case(self.recorded, self.settings)
        for kind, maps in other.teacher.items():
            same = [m.detach() for m in other.student[kind]]
            other.teacher[kind] = [maps[i] if i == level else m for i, m in enumerate(same)]
        return other

    def check_levels(self, names: tuple[str, ...], distilled: Callable[[Case], tuple[Tensor, ...]]) -> None:
        """Each level's loss: what is left where the teacher has nothing to teach on the others."""
        for level in range(len(self.strides)):
            for name, loss in zip(names, distilled(self.alone(level)), strict=True):
                recorded = self.recorded[f"loss_{name}"]
                close(loss, recorded[level] if len(recorded) > level else torch.zeros(()), VALUE, recorded.abs().max())


def case(name: str, index: int) -> Case:
    prefix = f"c{index}_"
    recorded = {key.removeprefix(prefix): value for key, value in arrays(name).items() if key.startswith(prefix)}
    return Case(recorded, meta(name)["cases"][index])


def distill(
    c: Case,
    main: Any,
    valuable: Any,
    dense: bool,
    joint: bool = False,
    kd_temperature: float = 2.0,
    valuable_weight: float = 0.25,
    main_weight: float = 0.25,
    student: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Main LD, valuable LD and main class KD, weighted."""
    s, t = c.view("student", joint, **(student or {})), c.view("teacher", joint)
    options: dict[str, Any] = {"convention": "release", "dense": dense}
    ld = LD(main, temperature=10, **options)(s, t, c.targets)
    valuable_ld = LD(valuable, temperature=10, **options)(s, t, c.targets)
    kd = LogitKD(main, temperature=kd_temperature, **options)(s, t, c.targets)
    return main_weight * ld, valuable_weight * valuable_ld, 10 * kd


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
@pytest.mark.parametrize("index", [0, 1])
def test_gfl(index: int, dense: bool) -> None:
    c = case("ld_head_gfl_a", index)
    task = gfl_task(c, dense)
    run = partial(distill, main=Main(), valuable=Valuable(measure="release"), dense=dense)
    ld, valuable, kd = run(c)
    c.check_levels(("loss_ld", "loss_ld_vlr", "loss_kd"), run)
    c.check("loss_ld", ld)
    c.check("loss_ld_vlr", valuable)
    c.check("loss_kd", kd)
    for name, loss in task.items():
        c.check(name, loss)
    c.check("total", sum(task.values()) + ld + valuable + kd)


def gfl_task(c: Case, dense: bool) -> dict[str, Tensor]:
    view = c.view("student")
    t = c.targets
    return gfl_losses(view.classes, view.edges, t.boxes, t.labels, t.sizes, strides=view.strides, dense=dense)


@pytest.mark.parametrize(("index", "region"), [(0, "fine-grained"), (1, "boxes"), (2, "gi")])
def test_gfl_with_imitation(index: int, region: str) -> None:
    c = case("ld_head_gfl_im_a", index)
    task = gfl_task(c, False)
    ld, valuable, kd = distill(c, Main(), Valuable(measure="release"), False)
    imitation = FeatureImitation(region, convention="release")
    features = [Features(tuple(side["feat"])) for side in (c.student, c.teacher)]
    im = 2.0 * imitation((features[0], c.view("student")), (features[1], c.view("teacher")), c.targets)
    for name, loss in {**task, "loss_ld": ld, "loss_ld_vlr": valuable, "loss_kd": kd, "loss_im": im}.items():
        c.check(name, loss)
    c.check("total", sum(task.values()) + ld + valuable + kd + im)

    for level, gradient in enumerate(torch.autograd.grad(im, c.student["feat"])):
        want = torch.zeros_like(gradient)
        cells = c.recorded.get(f"im_cells_l{level}")
        if cells is not None:
            image, y, x = cells.long().unbind(1)
            want[image, :, y, x] = c.recorded[f"im_dfeat_l{level}"]
        assert (gradient - want).abs().max() <= GRADIENT * max(want.abs().max().item(), 1e-6), level


def test_gflv2() -> None:
    c = case("ld_head_gflv2_a", 0)
    quality = [c.recorded[f"s_qual_l{i}"] for i in range(5)]
    view = c.view("student")
    scores = Maps(tuple(m.sigmoid() * q for m, q in zip(c.student["cls"], quality, strict=True)), view.classes.shape)
    run = partial(distill, main=Main(), valuable=Valuable(measure="release"), dense=False, student={"scores": scores})
    ld, valuable, kd = run(c)
    c.check_levels(("loss_ld", "loss_ld_vlr", "loss_kd"), run)
    c.check("loss_ld", ld)
    c.check("loss_ld_vlr", valuable)
    c.check("loss_kd", kd)

    p = positives(c, view)
    weight = scores.all().flatten(0, 1)[p.rows].amax(-1).detach()
    labels = torch.full((view.classes.images * p.anchors,), view.classes.shape[0]).scatter(0, p.rows, p.labels)
    iou = torch.zeros(len(labels)).scatter(0, p.rows, aligned_iou(p.predicted.detach(), p.goal))
    cls = quality_focal(scores.all().flatten(0, 1), labels, iou, from_probabilities=True).sum() / len(p.rows)
    box = 2 * (weight * giou_loss(p.predicted, p.goal)).sum() / weight.sum()
    dfl_target = encode(p.point, p.goal, view.edges.shape[-1] - 1.1)
    dfl = 0.25 * (weight * distribution_focal(p.logits, dfl_target).mean(-1)).sum() / weight.sum()
    for name, loss in {
        "loss_cls": cls,
        "loss_bbox": box,
        "loss_dfl": dfl,
        "total": cls + box + dfl + ld + valuable + kd,
    }.items():
        c.check(name, loss)


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
def test_atss(dense: bool) -> None:
    c = case("ld_head_atss_a", 0)
    run = partial(distill, main=Main(), valuable=Valuable(measure="release"), dense=dense, valuable_weight=0.15)
    ld, valuable, kd = run(c)
    c.check_levels(("loss_ld", "loss_ld_neg", "loss_cls_kd"), run)
    view = c.view("student")
    task = centerness_task(c, view, positives(c, view), 2.0)
    check_centerness_head(c, task, ld, valuable, kd)


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
def test_fcos(dense: bool) -> None:
    c = case("ld_head_fcos_a", 0)
    middle = {"centre": 0.5}
    run = partial(distill, main=FCOSMain(), valuable=FCOSValuable(), dense=dense, student=middle)
    ld, valuable, kd = run(c)
    c.check_levels(("loss_ld", "loss_ld_neg", "loss_cls_kd"), run)
    view = c.view("student", **middle)
    task = centerness_task(c, view, fcos_positives(c, view), 1.0)
    check_centerness_head(c, task, ld, valuable, kd)


def check_centerness_head(c: Case, task: dict[str, Tensor], ld: Tensor, valuable: Tensor, kd: Tensor) -> None:
    losses = {**task, "loss_ld": ld, "loss_ld_neg": valuable, "loss_cls_kd": kd}
    for name, loss in {**losses, "total": sum(losses.values())}.items():
        c.check(name, loss)


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
def test_retina(dense: bool) -> None:
    c = case("ld_head_retina_a", 0)
    view = c.view("student")
    anchors = shaped_anchors(view.classes.sizes, c.strides)
    run = partial(
        distill,
        main=MaxIoUMain(),
        valuable=MaxIoUValuable(Valuable(measure="release")),
        dense=dense,
        joint=True,
        kd_temperature=8,
        main_weight=5,
        valuable_weight=0.03 * 5 * 4,  # the released head divides this region by 4 where GFL's divides by 16
        student={"anchors": anchors},
    )
    ld, valuable, kd = run(c)
    c.check_levels(("loss_ld", "loss_ld_vlr", "loss_cls_kd"), run)
    view = c.view("student", anchors=anchors)
    p = max_iou_positives(c, view)
    box = 2 * giou_loss(p.predicted, p.goal).sum() / len(p.rows)
    cls = (focal(view, p) * p.counted[:, None]).sum() / len(p.rows)
    losses = {"loss_cls": cls, "loss_bbox": box, "loss_ld": ld, "loss_ld_vlr": valuable, "loss_cls_kd": kd}
    for name, loss in {**losses, "total": sum(losses.values())}.items():
        c.check(name, loss)


@dataclass
class Positives:
    """The positive anchors of a batch. rows: (M,) in ``Maps.all().flatten(0, 1)``; boxes and point in strides."""

    rows: Tensor
    labels: Tensor
    goal: Tensor
    point: Tensor
    logits: Tensor
    predicted: Tensor
    anchors: int
    counted: Tensor


def positives(c: Case, view: DenseDetections) -> Positives:
    points = grid_points(view.classes.sizes, view.strides, view.centre, "cpu")
    return read_positives(c, view, points, [m.assignment.gt_index for m in matched(view, c.targets)])


def fcos_positives(c: Case, view: DenseDetections) -> Positives:
    points = grid_points(view.classes.sizes, view.strides, view.centre, "cpu")
    index = [fcos_assign(points, view.strides, view.classes.counts, boxes)[0] for boxes in c.targets.boxes]
    return read_positives(c, view, points, index)


def max_iou_positives(c: Case, view: DenseDetections) -> Positives:
    points = (view.anchors[:, :2] + view.anchors[:, 2:]) / 2
    return read_positives(c, view, points, [max_iou_assign(m.iou, m.valid) for m in matched(view, c.targets)])


def read_positives(c: Case, view: DenseDetections, points: Tensor, index: list[Tensor]) -> Positives:
    """index: of each picture the object of every anchor, -1 background, -2 ignored."""
    rows = (torch.cat(index) >= 0).nonzero()[:, 0]
    here = rows % len(points)
    counts = zip(view.classes.counts, view.strides, strict=True)
    stride = torch.cat([torch.full((n, 1), float(s)) for n, s in counts])[here]
    goal = torch.cat([boxes[i[i >= 0]] for boxes, i in zip(c.targets.boxes, index, strict=True)]) / stride
    labels = torch.cat([labels[i[i >= 0]] for labels, i in zip(c.targets.labels, index, strict=True)])
    logits = view.edges.all().flatten(0, 1)[rows]
    point = points[here] / stride
    predicted = decode(point, integral(logits))
    return Positives(rows, labels, goal, point, logits, predicted, len(points), torch.cat(index) > -2)


def focal(view: DenseDetections, p: Positives) -> Tensor:
    """(B*N, C) focal loss of every class logit."""
    logits = view.classes.all().flatten(0, 1)
    target = torch.zeros_like(logits)
    target[p.rows, p.labels] = 1
    return sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2)


def centerness_task(c: Case, view: DenseDetections, p: Positives, box_weight: float) -> dict[str, Tensor]:
    distances = encode(p.point, p.goal)
    horizontal, vertical = distances[:, ::2], distances[:, 1::2]
    wanted = (horizontal.amin(1) / horizontal.amax(1) * vertical.amin(1) / vertical.amax(1)).sqrt()
    centerness = Maps(tuple(c.student["ctr"]), (1,)).all().flatten()[p.rows]
    return {
        "loss_cls": focal(view, p).sum() / len(p.rows),
        "loss_bbox": box_weight * (wanted * giou_loss(p.predicted, p.goal)).sum() / wanted.sum(),
        "loss_centerness": F.binary_cross_entropy_with_logits(centerness, wanted, reduction="sum") / len(p.rows),
    }


ROTATED = "ld_rotated_a"


def rotated_levels(key: str) -> list[Tensor]:
    return [arrays(ROTATED)[f"{key}_l{i}"] for i in range(3)]


def rotated_view(classes: list[Tensor], boxes: list[Tensor]) -> DenseDetections:
    """What the adapter of rotated RetinaNet makes of a head's maps."""
    strides = (16, 32, 64)
    head = RotatedRetinaHead("cls", "box", strides, 9, convention="oc")
    view = head.view(torch.nn.Identity(), DenseDetections, [*classes, *boxes], None)
    assert isinstance(view, DenseDetections)
    return view


def rotated_targets() -> BoxTargets:
    recorded, settings = arrays(ROTATED), meta(ROTATED)
    return BoxTargets(
        [recorded["gt0"], recorded["gt1"]],
        [recorded["gtlabels0"], recorded["gtlabels1"]],
        [(settings["height"], settings["width"])] * 2,
    )


def close(got: Tensor, want: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    scale = want.abs().max() if scale is None else scale
    assert (got - want).abs().max() <= tolerance * max(scale.item(), 1e-6)


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
def test_rotated_distillation(dense: bool) -> None:
    recorded, settings = arrays(ROTATED), meta(ROTATED)
    classes = [m.clone().requires_grad_() for m in rotated_levels("s_cls")]
    boxes = [m.clone().requires_grad_() for m in rotated_levels("s_box")]
    student, teacher = rotated_view(classes, boxes), rotated_view(rotated_levels("t_cls"), rotated_levels("t_box"))
    targets, merged = rotated_targets(), Merged(overlap="angle-free")

    close(turned(student.anchors), torch.cat(rotated_levels("anchors")), 1e-6)
    _, region = merged(student, targets, dense=True)
    close(region.view(2, -1), torch.cat(rotated_levels("ld_region"), 1), VALUE)
    options: dict[str, Any] = {"convention": "release", "dense": dense}
    ld = LD(merged, temperature=settings["loss_ld"]["T"], **options)(student, teacher, targets)
    kd = LogitKD(merged, temperature=settings["loss_kd"]["T"], anchor_weight="iou", **options)(
        student, teacher, targets
    )
    for name, loss, weight, maps in (("ld", ld, 10, boxes), ("kd", kd, 20, classes)):
        assert weight * loss.item() == pytest.approx(recorded[f"loss_{name}"].sum().item(), rel=VALUE)
        kind = "box" if maps is boxes else "cls"
        for got, want in zip(
            torch.autograd.grad(weight * loss, maps), rotated_levels(f"g_{name}_d{kind}"), strict=True
        ):
            close(got, want, GRADIENT)


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
def test_rotated_task_losses(dense: bool) -> None:
    recorded, settings = arrays(ROTATED), meta(ROTATED)
    boxes = [m.clone().requires_grad_() for m in rotated_levels("s_box")]
    view = rotated_view(rotated_levels("s_cls"), boxes)
    close(view.support, torch.stack([recorded["project_xywh"]] * 4 + [recorded["project_angle"]]), 1e-6)
    delta = integral(view.edges.all(), view.support)
    close(delta[0], torch.cat(rotated_levels("delta")), VALUE)
    close(decode_deltas(view.anchors, delta)[0], torch.cat(rotated_levels("rbox")), VALUE)

    target = RetinaTargets(  # the assignment is an input of the recording
        torch.cat(rotated_levels("labels"), 1).long(),
        torch.cat(rotated_levels("bbox_targets"), 1),
        torch.cat(rotated_levels("label_weights"), 1) > 0,
    )
    assert (target.labels < 3).sum() == settings["num_total_samples"]
    losses = retina_losses(view.classes, view.edges, view.anchors, target, view.support, "gwd", dense)
    for name in ("loss_cls", "loss_bbox"):
        assert losses[name].item() == pytest.approx(recorded[name].sum().item(), rel=VALUE)
    gradients = torch.autograd.grad(losses["loss_bbox"], boxes)
    for got, want in zip(gradients, rotated_levels("g_bbox_dbox"), strict=True):
        close(got, want, GRADIENT)


def test_rotated_imitation() -> None:
    """The released code regroups (cells, 9 shapes) as (9, cells) and so marks wrong cells: met on its own cells."""
    recorded, settings = arrays(ROTATED), meta(ROTATED)
    view, targets = rotated_view(rotated_levels("s_cls"), rotated_levels("s_box")), rotated_targets()
    marked = fine_grained(view, targets, "angle-free").split(list(view.classes.counts), 1)
    for level, ours in enumerate(marked):
        s, t = recorded[f"s_feat_l{level}"], recorded[f"t_feat_l{level}"]
        scrambled = ours.view(2, 9, -1).any(1).view(2, *s.shape[2:])
        if recorded["loss_im"][level] == 0:  # the release drops levels without a positive
            continue
        assert torch.equal(ours, recorded[f"im_region_l{level}"] > 0)
        loss = FeatureImitation("fine-grained", convention="release").of_level(s, t, scrambled)
        assert settings["im_weight"] * loss.item() == pytest.approx(recorded["loss_im"][level].item(), rel=VALUE)
