"""Rotated RetinaNet and rotated GFL: sizes, boxes as distributions, assignment, losses, distillation, proof of taps."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import distillkit
from distillkit import LD, BoxTargets, DenseDetections, FeatureImitation, LogitKD, Main, Valuable
from distillkit.adapters import adapter_for
from distillkit.adapters.rotated_gfl import RotatedGFLHead, rotated_gfl
from distillkit.adapters.rotated_retina import rotated_retina
from distillkit.boxes.anchors import grid_anchors, grid_points
from distillkit.boxes.assign import atss
from distillkit.boxes.distribution import integral
from distillkit.boxes.fcos import FCOSMain
from distillkit.boxes.maps import Maps
from distillkit.boxes.max_iou import MaxIoUMain, MaxIoUValuable
from distillkit.boxes.merged import Merged
from distillkit.boxes.overlap import contains, turned
from distillkit.boxes.regions import MainAndValuable, matched
from distillkit.boxes.rotated import corners, normalize
from distillkit.boxes.rotated_distribution import (
    decode_deltas,
    decode_turned,
    delta_bins,
    encode_turned,
    mean_angle,
)
from distillkit.boxes.rotated_iou import aligned_rotated_iou
from distillkit.core.errors import AdapterError, ViewError
from distillkit.distillers.feature_imitation import inside_boxes
from distillkit.losses.focal import distribution_focal, periodic_distribution_focal
from distillkit.losses.gaussian import kld_loss
from distillkit.losses.gfl import gfl_losses
from distillkit.losses.rotated_gfl import rotated_losses
from distillkit.losses.rotated_retina import retina_losses, retina_targets
from distillkit.models import rotated_gfl as gfl_module
from distillkit.models import rotated_retina as retina_module
from distillkit.models.dense import Inference
from distillkit.models.gfl import GFL
from distillkit.models.rotated_gfl import RotatedGFL
from distillkit.models.rotated_retina import RotatedRetina, anchors_of

STRIDES = (8, 16, 32)
SMALL = {"channels": 16, "convs": 1, "strides": STRIDES}
NO_OBJECTS = {"boxes": torch.zeros(0, 5), "labels": torch.zeros(0, dtype=torch.int64)}
FAMILIES = ["gfl", "retina"]


def small(family: str, classes: int = 3, backbone: str = "test_resnet", sure: bool = False, **options):
    """sure: it predicts something, as its class logits are not all near the prior."""
    torch.manual_seed(0)
    kind, own = (RotatedGFL, {"groups": 4}) if family == "gfl" else (RotatedRetina, {})
    model = kind(classes, backbone, **{**SMALL, **own, **options})
    if sure:
        last, classifier = (
            (model.head.gfl_reg, model.head.gfl_cls)
            if family == "gfl"
            else (model.head.retina_reg, model.head.retina_cls)
        )
        nn.init.normal_(last.weight, std=0.3)
        nn.init.normal_(classifier.weight, std=0.1)
        nn.init.zeros_(classifier.bias)
        for i, scale in enumerate(getattr(model.head, "scales", ())):
            nn.init.constant_(scale.scale, 1.5 + i)
    return model


def scene() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 96, generator=g), torch.rand(3, 96, 64, generator=g)]
    boxes = torch.tensor([[33.0, 30, 40, 18, 0.6], [62.3, 33.7, 15, 27, -0.3]])
    first = {"boxes": boxes, "labels": torch.tensor([0, 2])}
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    for box, label in zip(boxes, first["labels"]):
        images[0][label, contains(box, torch.stack([x, y], -1))] += 2  # something to see
    return images, [first, {"boxes": boxes[:1], "labels": torch.tensor([1])}]


def random_boxes(count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([20.0, 20, 10, 8, -7]), torch.tensor([76.0, 44, 50, 30, 7])
    return low + (high - low) * torch.rand(count, 5, generator=g)


# ---- sizes


@pytest.mark.parametrize(
    ("module", "name", "at_15", "at_1"),
    [
        (retina_module, "rotated_retina_r18", 20_912_220, 20_621_790),
        (retina_module, "rotated_retina_r34", 31_020_380, 30_729_950),
        (retina_module, "rotated_retina_r50", 37_470_812, 37_180_382),
        (gfl_module, "rotated_gfl_r18", 19_298_724, 19_266_454),
        (gfl_module, "rotated_gfl_r34", 29_406_884, 29_374_614),
        (gfl_module, "rotated_gfl_r50", 32_318_372, 32_286_102),
    ],
)
def test_presets_have_the_stated_numbers_of_parameters(module, name, at_15, at_1):
    for classes, parameters in ((15, at_15), (1, at_1)):
        with torch.device("meta"):
            model = getattr(module, name)(classes)
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{at_15:,}" in getattr(module, name).__doc__


def test_names_of_weights_stay():
    """Those of OpenMMLab's detectors, and no buffer among them."""
    neck = [f"neck.{part}.{i}.conv" for part in ("lateral_convs", "fpn_convs") for i in range(3)]
    for family, tower, outputs in (
        ("retina", [".conv.weight", ".conv.bias"], ["retina_cls", "retina_reg"]),
        ("gfl", [".conv.weight", ".gn.weight", ".gn.bias"], ["gfl_cls", "gfl_reg"]),
    ):
        towers = [f"head.{t}_convs.0{name}" for t in ("cls", "reg") for name in tower]
        wanted = {f"{layer}.{w}" for layer in (*neck, *(f"head.{o}" for o in outputs)) for w in ("weight", "bias")}
        wanted |= set(towers) | ({f"head.scales.{i}.scale" for i in range(3)} if family == "gfl" else set())
        names = set(small(family).state_dict())
        assert {name for name in names if not name.startswith("backbone.")} == wanted


def test_coarser_levels_come_from_the_backbones_last_map():
    model = small("retina", strides=(8, 16, 32, 64, 128))
    widths = model.backbone.feature_info.channels()
    assert model.neck.fpn_convs[3].conv.in_channels == widths[-1] != 16
    assert model.neck.fpn_convs[4].conv.in_channels == 16
    assert [m.shape[-1] for m in model.features([torch.rand(3, 128, 128)])] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_parts_do_not_train(family):
    model = small(family, backbone="resnet10t", freeze_bn=True, frozen_stages=1)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items() if "running" in k}
    sum(model(*scene()).values()).backward()
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in before.items())
    frozen = {n for n, p in model.backbone.named_parameters() if p.grad is None}
    assert frozen == {n for n, _ in model.backbone.named_parameters() if n.startswith(("conv1", "bn1", "layer1"))}


# ---- rotated boxes as distributions


def test_distances_in_the_boxs_own_frame_are_undone():
    boxes, points = random_boxes(200), random_boxes(200, 1)[:, :2]
    distances = encode_turned(points, boxes)
    torch.testing.assert_close(decode_turned(points, distances, boxes[:, 4]), boxes, rtol=1e-4, atol=1e-4)
    turn = torch.tensor([0, 0, 0, 0, math.pi])
    torch.testing.assert_close(encode_turned(points, boxes + turn), distances[:, [2, 3, 0, 1]], rtol=1e-4, atol=1e-4)


def test_distances_of_a_known_box():
    box = torch.tensor([[10.0, 10, 8, 4, math.pi / 2]])  # its width runs down
    distances = encode_turned(torch.tensor([[11.0, 7.0]]), box)
    torch.testing.assert_close(distances, torch.tensor([[1.0, 1, 7, 3]]))


@pytest.mark.parametrize("bins", [3, 8, 16, 17])
def test_the_distribution_that_an_angle_is_trained_to_decodes_to_it(bins):
    angle = torch.linspace(-7, 7, 301, dtype=torch.float64)
    logits = torch.zeros(len(angle), bins, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(periodic_distribution_focal(logits, (angle / math.pi + 0.5) * bins).sum(), logits)
    goal = 1 / bins - slope.detach()  # the gradient of a cross entropy is what is said less the goal
    assert goal.min() > -1e-12
    assert bool(((goal > 1e-9).sum(1) <= 2).all())
    said = mean_angle(goal.clamp(min=1e-300).log())
    off = (said - angle + math.pi / 2).remainder(math.pi) - math.pi / 2
    assert off.abs().max() < 1e-6


def test_the_last_angle_and_the_first_are_neighbours():
    logits = torch.randn(1, 8)
    for shift in (-16.0, -8.0, 8.0):
        torch.testing.assert_close(
            periodic_distribution_focal(logits, torch.tensor([7.7])),
            periodic_distribution_focal(logits, torch.tensor([7.7 + shift])),
        )
    (slope,) = torch.autograd.grad(
        periodic_distribution_focal(x := logits.clone().requires_grad_(), torch.tensor([7.5])).sum(), x
    )
    torch.testing.assert_close(
        x.softmax(-1) - slope, torch.tensor([[0.5, 0, 0, 0, 0, 0, 0, 0.5]]), rtol=1e-5, atol=1e-6
    )


def test_periodic_focal_gradient():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.0, 3.2, 6.9, -0.4, 21.5])
    assert torch.autograd.gradcheck(lambda x: periodic_distribution_focal(x, target), logits)
    whole = torch.arange(6.0)  # on a bin both forms ask for that bin alone
    torch.testing.assert_close(
        periodic_distribution_focal(logits.detach()[0].expand(6, -1), whole),
        distribution_focal(logits.detach()[0].expand(6, -1), whole),
    )


def test_the_mean_angles_gradient():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=g, dtype=torch.float64) + 3 * torch.eye(6, 9)
    assert torch.autograd.gradcheck(mean_angle, logits.requires_grad_())
    flat = torch.zeros(1, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(mean_angle(flat).sum(), flat)
    assert slope.isfinite().all()
    assert slope.abs().max() < 1


def test_deltas_of_an_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 20], [4, 4, 8, 8]])
    deltas = torch.tensor([[0.0, 0, 0, 0, 0.3], [1, -0.5, math.log(2), 0, -1]])
    wanted = torch.tensor([[5.0, 10, 10, 20, 0.3], [10, 4, 8, 4, -1]])
    torch.testing.assert_close(decode_deltas(anchors, deltas), wanted)
    assert delta_bins()[0].tolist() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert delta_bins()[4, [0, -1]].tolist() == [-5, 2]


# ---- assignment and losses


def test_upright_boxes_written_as_rotated_ones_are_assigned_alike():
    sizes = [(12, 16), (6, 8), (3, 4)]
    anchors, counts = grid_anchors(sizes, STRIDES, 0.5, 8.0, "cpu"), [h * w for h, w in sizes]
    boxes = torch.tensor([[10.0, 20, 50, 61], [60, 10, 121, 90], [33, 34, 52, 47]])
    upright, rotated = atss(anchors, counts, boxes), atss(anchors, counts, turned(boxes))
    assert (upright.gt_index >= 0).sum() > 5
    assert torch.equal(upright.gt_index, rotated.gt_index)
    torch.testing.assert_close(upright.threshold, rotated.threshold, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(upright.iou, rotated.iou, rtol=1e-4, atol=1e-5)


def maps_of(height: int, width: int, bins: int = 16) -> tuple[list[Tensor], list[Tensor]]:
    """Random head maps of rotated GFL for one picture, in pixels high and wide."""
    g = torch.Generator().manual_seed(1)
    sizes = [(height // s, width // s) for s in STRIDES]
    return (
        [torch.randn(1, 3, h, w, generator=g) for h, w in sizes],
        [3 * torch.randn(1, 5 * bins, h, w, generator=g) for h, w in sizes],
    )


def quarter_turn(edges: Tensor) -> Tensor:
    """What a map (B, 5*K, H, W) of rotated GFL must say of the same boxes in the picture turned by 90 degrees.

    Bins of angles move by half of them. Where the angle passes the end of its range the frame is seen from behind.
    """
    rows = torch.rot90(edges.unflatten(1, (5, -1)), -1, (3, 4))
    behind = mean_angle(rows[:, 4].movedim(1, -1)) > 0
    distances = torch.where(behind[:, None, None], rows[:, [2, 3, 0, 1]], rows[:, :4])
    angles = rows[:, 4:].roll(rows.shape[2] // 2, 2)
    return torch.cat([distances, angles], 1).flatten(1, 2)


def test_a_turned_picture_has_the_same_assignment_and_losses():
    height, width = 64, 96
    boxes = torch.tensor([[33.3, 30.1, 40, 18, 0.6], [62.3, 33.7, 15, 27, -0.3], [71.7, 21.3, 30, 12, 1.5]])
    labels = torch.tensor([0, 2, 1])
    turned_boxes = torch.stack(
        [height - boxes[:, 1], boxes[:, 0], boxes[:, 2], boxes[:, 3], boxes[:, 4] + math.pi / 2], 1
    )
    classes, edges = maps_of(height, width)
    turned_classes = [torch.rot90(m, -1, (2, 3)) for m in classes]
    turned_edges = [quarter_turn(m) for m in edges]

    def assigned(maps: list[Tensor], gt: Tensor) -> list[Tensor]:
        sizes = [tuple(m.shape[2:]) for m in maps]
        counts = [h * w for h, w in sizes]
        index = atss(grid_anchors(sizes, STRIDES, 0.5, 8.0, "cpu"), counts, gt).gt_index
        return [level.view(size) for level, size in zip(index.split(counts), sizes)]

    for before, after in zip(assigned(classes, boxes), assigned(turned_classes, turned_boxes), strict=True):
        assert torch.equal(torch.rot90(before, -1, (0, 1)), after)

    model = small("gfl")
    losses = model.losses(classes, edges, [boxes], [labels], [(height, width)])
    others = model.losses(turned_classes, turned_edges, [turned_boxes], [labels], [(width, height)])
    for name, loss in losses.items():
        assert loss > 0
        torch.testing.assert_close(others[name], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_box_written_differently_gives_the_same_losses(family):
    """Half a turn more, or its sides swapped and a quarter."""
    student, teacher = small(family, freeze_bn=True), small(family, sure=True)
    model = distillkit.wrap(student, teacher, [LD(Merged()), LogitKD(Main())])
    images, targets = scene()
    once = model(images, targets)
    for change in (
        lambda b: torch.cat([b[:, :4], b[:, 4:] + math.pi], 1),
        lambda b: torch.cat([b[:, :4], b[:, 4:] - 3 * math.pi], 1),
        lambda b: torch.cat([b[:, :2], b[:, [3, 2]], b[:, 4:] - math.pi / 2], 1),
    ):
        again = model(images, [{**t, "boxes": change(t["boxes"])} for t in targets])
        for name in list(once)[:-1]:
            torch.testing.assert_close(again[name], once[name], rtol=1e-4, atol=1e-6)


def test_distances_are_asked_for_in_the_frame_that_the_head_is_nearer_to():
    """Truth -89 degrees, said 89: two degrees off, with distances that are right as they stand."""
    bins, point = 16, torch.tensor([[1.0, 0.5]])
    truth = torch.tensor([[0.0, 0, 8, 4, math.radians(-89)]])
    said = torch.tensor([[0.0, 0, 8, 4, math.radians(89)]])
    distances = encode_turned(point, said)
    logits = torch.full((1, 5, bins), -30.0)
    whole = distances.floor().long()
    share = distances - whole
    logits[:, :4].scatter_(2, whole[..., None], (1 - share)[..., None].log())
    logits[:, :4].scatter_(2, whole[..., None] + 1, share[..., None].log())
    at = (said[:, 4] / math.pi + 0.5) * bins
    logits[0, 4, int(at) % bins], logits[0, 4, (int(at) + 1) % bins] = math.log(1 - float(at % 1)), math.log(at % 1)
    box, dfl, quality = rotated_losses(logits, point, truth)
    assert quality > 0.9
    torch.testing.assert_close(box, 1 - quality)
    least = rotated_losses(logits, point, said)[1]
    assert least < dfl < least + 1
    turned_over = torch.cat([logits[:, [2, 3, 0, 1]], logits[:, 4:]], 1)
    assert rotated_losses(turned_over, point, truth)[1] > least + 5


@pytest.mark.parametrize("loss", ["iou", "gwd", "kld", "probiou"])
def test_every_loss_of_rotated_gfl_is_right_in_both_paths(loss):
    model = small("gfl", loss=loss)
    images, targets = scene()
    batch, sizes = model.batch(images)
    boxes, labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
    results = []
    for dense in (False, True):
        classes, edges = model.forward_raw(batch)
        views = Maps(tuple(classes), (3,)), Maps(tuple(edges), (5, 16))
        losses = gfl_losses(
            *views,
            boxes,
            labels,
            sizes,
            strides=STRIDES,
            centre=0.5,
            dense=dense,
            box_losses=lambda *a: rotated_losses(*a, loss=loss),
        )
        results.append((losses, torch.autograd.grad(sum(losses.values()), model.head.gfl_reg.weight)[0]))
    same(*results)


@pytest.mark.parametrize("loss", ["gwd", "kld"])
def test_every_loss_of_rotated_retina_is_right_in_both_paths(loss):
    model = small("retina", loss=loss)
    images, targets = scene()
    batch, sizes = model.batch(images)
    results = []
    for dense in (False, True):
        classes, edges = model.forward_raw(batch)
        views = Maps(tuple(classes), (3,), 9), Maps(tuple(edges), (5, 9), 9)
        anchors = anchors_of(views[0].sizes, STRIDES, 0.0)
        target = retina_targets(anchors, 3, [t["boxes"] for t in targets], [t["labels"] for t in targets], sizes)
        losses = retina_losses(*views, anchors, target, model.support, loss, dense)
        results.append((losses, torch.autograd.grad(sum(losses.values()), model.head.retina_reg.weight)[0]))
    same(*results)


def test_kld_as_released_divides_level_by_level():
    model = small("retina", loss="kld", convention="release")
    images, targets = scene()
    targets[1]["boxes"] = torch.tensor([[30.0, 45, 60, 90, 0.2]])  # an object of a coarser level
    batch, sizes = model.batch(images)
    classes, edges = model.forward_raw(batch)
    views = Maps(tuple(classes), (3,), 9), Maps(tuple(edges), (5, 9), 9)
    anchors = anchors_of(views[0].sizes, STRIDES, 0.0)
    target = retina_targets(anchors, 3, [t["boxes"] for t in targets], [t["labels"] for t in targets], sizes)
    deltas = integral(views[1].all(), model.support)
    wanted = 0.0
    levels = torch.arange(len(STRIDES)).repeat_interleave(torch.tensor(views[0].counts))
    for level in range(len(STRIDES)):
        here = (target.labels < 3) & (levels == level)
        if here.any():
            picture, anchor = here.nonzero(as_tuple=True)
            boxes = decode_deltas(anchors[anchor], deltas.view(len(images), -1, 5)[picture, anchor])
            wanted += float(kld_loss(boxes, target.boxes[here]).mean().detach())
    assert len(levels[(target.labels < 3).any(0)].unique()) > 1
    for dense in (False, True):
        losses = retina_losses(*views, anchors, target, model.support, "kld", dense, "release")
        assert float(losses["loss_bbox"].detach()) == pytest.approx(wanted, rel=1e-5)
    other = retina_losses(*views, anchors, target, model.support, "kld")["loss_bbox"]
    assert float(other.detach()) != pytest.approx(wanted, rel=1e-3)


def same(gathered: tuple[dict[str, Tensor], Tensor], dense: tuple[dict[str, Tensor], Tensor]) -> None:
    for name, value in gathered[0].items():
        assert value > 0
        torch.testing.assert_close(dense[0][name], value, rtol=1e-5, atol=1e-6)
    assert gathered[1].abs().max() > 0
    torch.testing.assert_close(dense[1], gathered[1], rtol=1e-4, atol=1e-6)


def test_every_object_has_positives_in_rotated_retina():
    boxes = torch.tensor([[20.0, 20, 60, 4, 0.8], [70, 40, 9, 5, 2], [40, 50, 30, 20, -1]])
    anchors = anchors_of([(8, 12), (4, 6), (2, 3)], STRIDES, 0.0)
    target = retina_targets(anchors, 3, [boxes, boxes[:0]], [torch.arange(3), torch.arange(0)], [(64, 96)] * 2)
    assert {tuple(b) for b in target.boxes[0][target.labels[0] < 3].tolist()} == {tuple(b) for b in boxes.tolist()}
    assert bool((target.labels[1] == 3).all())
    assert target.counted[1].sum() == target.counted.shape[1]
    assert not target.counted[0].all()  # between the thresholds


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_without_objects_leave_a_live_graph(family):
    model = small(family)
    losses = model(scene()[0], [NO_OBJECTS] * 2)
    assert losses["loss_cls"] > 0
    assert all(loss == 0 for name, loss in losses.items() if name != "loss_cls")
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_detector_learns_one_picture_and_finds_its_boxes(family):
    model = small(family, backbone="resnet10t", channels=32, freeze_bn=True)
    images, targets = scene()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if family == "gfl" else 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(images[:1], targets[:1]).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()
    model.eval()
    (found,) = model(images[:1])
    best = {int(label): box for box, label in reversed(list(zip(found["boxes"], found["labels"])))}
    assert set(best) == {0, 2}
    overlap = aligned_rotated_iou(torch.stack([best[0], best[2]]), targets[0]["boxes"])
    assert overlap.min() > 0.7
    assert bool((found["scores"].diff() <= 0).all())


# ---- predictions


@pytest.mark.parametrize(("family", "low", "high"), [("gfl", -math.pi / 2, math.pi / 2), ("retina", 0, math.pi / 2)])
def test_predictions_are_in_range_and_independent_of_the_other_pictures(family, low, high):
    model = small(family, sure=True).eval()
    model.inference = Inference(score=0.3, iou=0.1, most=30, before_nms=100)
    image, other = scene()[0][0], torch.rand(3, 64, 96)
    (alone,) = model([image])
    together = model([image, other])  # of one size: padding is seen
    assert 1 < len(alone["boxes"]) <= 30
    for key, value in alone.items():
        torch.testing.assert_close(together[0][key], value, rtol=1e-3, atol=1e-3)
    angles = alone["boxes"][:, 4]
    assert bool(((angles >= low) & (angles <= high)).all())
    assert bool((alone["boxes"][:, 2:4] > 0).all())
    same_class = alone["labels"] == alone["labels"][0]
    first = alone["boxes"][:1].expand(int(same_class.sum()) - 1, -1)
    assert bool((aligned_rotated_iou(first, alone["boxes"][same_class][1:]) <= 0.1 + 1e-4).all())


def test_released_and_other_ways_of_writing_angles_are_the_same_boxes():
    images, _ = scene()
    released, other = small("retina", sure=True).eval(), small("retina", sure=True, angle="le90").eval()
    for a, b in zip(released(images), other(images), strict=True):
        torch.testing.assert_close(normalize(a["boxes"], "le90"), b["boxes"], rtol=1e-4, atol=1e-3)
        assert not torch.equal(a["boxes"], b["boxes"])


@pytest.mark.parametrize("family", FAMILIES)
def test_export_keeps_the_outputs(family):
    model = small(family).eval()
    batch = torch.rand(1, 3, 64, 96)

    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model.forward_raw(batch)

    exported = torch.export.export(Raw(), (batch,)).module()(batch)
    for ours, theirs in zip(model.forward_raw(batch), exported):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_call_compiles_whole(family):
    """One graph means that nothing reads a value back from the device. Losses are dense while compiling."""
    model = small(family, freeze_bn=True)
    images, targets = scene()[0], [scene()[1][0], NO_OBJECTS]
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images, targets)
    for name, value in model(images, targets).items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)


# ---- regions


def view_of(family: str) -> DenseDetections:
    model = small(family, sure=True)
    images, _ = scene()
    classes, edges = model.forward_raw(model.batch(images)[0])
    adapter = adapter_for(model)
    view = adapter.view(model, DenseDetections, [*classes, *edges], None)
    assert isinstance(view, DenseDetections)
    return view


def truth(boxes: list[Tensor]) -> BoxTargets:
    return BoxTargets(boxes, [torch.zeros(len(b), dtype=torch.int64) for b in boxes], [(64, 96), (96, 64)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "region",
    [
        Main(),
        Valuable(),
        Valuable(measure="release"),
        Valuable(measure="iou"),
        MainAndValuable(),
        Merged(),
        MaxIoUMain(),
        MaxIoUValuable(),
    ],
    ids=lambda r: f"{r.name} {getattr(r, 'measure', '')}",
)
def test_regions_of_upright_objects_do_not_depend_on_their_form(family, region):
    view = view_of(family)
    upright = [torch.tensor([[10.0, 20, 50, 57], [60, 10, 91, 50]]), torch.tensor([[5.0, 6, 40, 83]])]
    _, wanted = region(view, truth(upright), dense=True)
    _, weight = region(view, truth([turned(b) for b in upright]), dense=True)
    assert wanted.sum() > 0
    torch.testing.assert_close(weight, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("region", [Main, Valuable, Merged])
def test_only_the_released_regions_depend_on_how_an_angle_is_written(region):
    view, boxes = view_of("retina"), [random_boxes(3), random_boxes(2, 1)]
    written = {c: truth([normalize(b, c) for b in boxes]) for c in ("le90", "oc")}
    for overlap in ("rotated", "enclosing"):
        a, b = (region(overlap=overlap)(view, t, dense=True)[1] for t in written.values())
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    a, b = (region(overlap="angle-free")(view, t, dense=True)[1] for t in written.values())
    assert (a - b).abs().max() > 0.05


def test_positives_stand_inside_the_turned_box():
    view, boxes = view_of("gfl"), [random_boxes(3), random_boxes(2, 1)]
    weight = Main()(view, truth(boxes), "one", True)[1].view(2, -1)
    points = grid_points(view.classes.sizes, STRIDES, 0.5, "cpu")
    for row, objects in zip(weight, boxes):
        assert row.sum() > 0
        nearest = encode_turned(points[row > 0][:, None], objects).amin(-1).amax(1)
        assert nearest.min() > 0


def test_the_main_region_by_highest_overlap_is_what_rotated_retina_trains_as_positives():
    view, boxes = view_of("retina"), [random_boxes(3), random_boxes(2, 1)]
    targets = truth(boxes)
    chosen = MaxIoUMain()(view, targets, "one", True)[1].view(2, -1)
    trained = retina_targets(view.anchors, 3, boxes, targets.labels, targets.sizes)
    assert torch.equal(chosen > 0, trained.labels < 3)


def test_objects_are_matched_once_a_step():
    view, targets = view_of("gfl"), truth([random_boxes(3), random_boxes(2, 1)])
    assert matched(view, targets) is matched(view, targets)
    assert matched(view, targets) is not matched(view, targets, overlap="angle-free")


def test_imitation_inside_turned_boxes():
    view, boxes = view_of("gfl"), [random_boxes(1), random_boxes(2, 1)]
    chosen = inside_boxes(view, truth(boxes))
    points = grid_points(view.classes.sizes, STRIDES, 0.5, "cpu")
    for row, objects in zip(chosen, boxes):
        wanted = torch.zeros_like(row)
        for quad in corners(objects):
            side = quad.roll(-1, 0) - quad
            to = points[:, None] - quad
            wanted |= (side[:, 0] * to[..., 1] - side[:, 1] * to[..., 0] > 0).all(1)
        assert wanted.any()
        assert torch.equal(row, wanted)


# ---- distillation


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_distils_for_a_step(family):
    student, teacher = small(family), small(family, sure=True)
    distillers = [
        LD(Main()),
        LD(Valuable()),
        LD(Merged(overlap="angle-free"), convention="release"),
        LogitKD(Merged(), anchor_weight="iou"),
        FeatureImitation("boxes", name="boxes"),
        FeatureImitation("fine-grained", name="cells"),
        FeatureImitation("fine-grained", convention="release", name="cells_release"),
    ]
    model = distillkit.wrap(student, teacher, distillers)
    losses = model(*scene())
    assert model._teacher_sides["teacher"].unproven is False
    assert all(losses[d.name] > 0 for d in distillers)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    kept = set(student.state_dict())
    assert model.unwrap() is student
    assert set(student.state_dict()) == kept == set(small(family).state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_the_five_distributions_is_taught(family):
    """A teacher that differs in one variable alone."""
    view, targets = view_of(family), truth([random_boxes(3), random_boxes(2, 1)])
    edges, k = view.edges, view.edges.shape[1]
    for variable in range(5):
        other = [m.clone() for m in edges.levels]
        for m in other:
            m.unflatten(1, (edges.anchors, 5, k))[:, :, variable] += torch.arange(float(k))[:, None, None]
        changed = Maps(tuple(other), edges.shape, edges.anchors)
        student = DenseDetections(view.classes, edges, STRIDES, view.centre, view.support, anchors=view.anchors)
        teacher = DenseDetections(view.classes, changed, STRIDES, view.centre, view.support, anchors=view.anchors)
        assert LD(Merged())(student, student, targets).item() == pytest.approx(0, abs=1e-5)
        assert LD(Merged())(student, teacher, targets) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_one_picture_repeated_gives_the_same_losses(family):
    student, teacher = small(family, freeze_bn=True), small(family, sure=True)
    model = distillkit.wrap(student, teacher, [LD(Merged()), LD(MainAndValuable()), LogitKD(Merged())])
    images, targets = scene()
    once = model(images[:1], targets[:1])
    assert len(once) == 3 + len(small(family)(images, targets)) + 1
    for times in (2, 4, 8):
        losses = model(images[:1] * times, targets[:1] * times)
        for name in list(once)[:-1]:
            torch.testing.assert_close(losses[name], once[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_and_dense_distillation_agree(family):
    teacher = small(family, sure=True)
    totals = []
    for dense in (False, True):
        distillers = [LD(Valuable(), dense=dense), LD(Merged(), dense=dense), LogitKD(Main(), dense=dense)]
        losses = distillkit.wrap(small(family), teacher, distillers)(*scene())
        totals.append([losses[d.name].item() for d in distillers])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


# ---- what does not fit is named


def test_the_proof_finds_a_tap_before_the_scale():
    right = rotated_gfl(small("gfl"))
    wrong = RotatedGFLHead("head.gfl_cls", "head.gfl_reg", STRIDES, 16, 0.5, convention="le90")
    teacher = distillkit.Teacher(small("gfl", sure=True), adapter=wrong)
    model = distillkit.wrap(small("gfl"), teacher, [LD()], adapter=right)
    with pytest.raises(AdapterError, match=r"the tapped distributions do not explain.*head\.gfl_reg"):
        model(*scene())


@pytest.mark.parametrize(("family", "wrong", "right"), [("gfl", 0.0, 0.5), ("retina", 0.5, 0.0)])
def test_the_proof_finds_a_wrong_centre(family, wrong, right):
    teacher = small(family, sure=True)
    adapter = (rotated_gfl if family == "gfl" else rotated_retina)(teacher)
    adapter.centre = wrong
    model = distillkit.wrap(small(family), distillkit.Teacher(teacher, adapter=adapter), [LogitKD(Main())])
    with pytest.raises(AdapterError, match=rf"With centre={right} it would fit"):
        model(*scene())


def test_the_proof_finds_other_bins():
    teacher = small("retina", sure=True)
    adapter = rotated_retina(teacher)
    adapter.support = adapter.support * 0.9
    model = distillkit.wrap(small("retina"), distillkit.Teacher(teacher, adapter=adapter), [LogitKD(Main())])
    with pytest.raises(AdapterError, match="the tapped distributions do not explain"):
        model(*scene())


@pytest.mark.parametrize(
    ("student", "teacher", "distiller", "message"),
    [
        ("gfl", lambda: small("gfl", bins=8), LD(), "16 bins an edge, the teacher 8"),
        ("retina", lambda: small("gfl", bins=9), LogitKD(Main()), "points stand at 0.5 and 0.0 of a cell"),
        ("gfl", lambda: small("gfl", 4), LogitKD(Main()), "3 classes, the teacher 4"),
        ("gfl", lambda: small("gfl"), FeatureImitation("gi"), "5 distributions an anchor"),
        ("gfl", lambda: small("gfl"), LD(FCOSMain()), "FCOS assigns upright boxes"),
        (
            "gfl",
            lambda: GFL(3, "test_resnet", groups=4, bins=16, **SMALL),
            LD(),
            "5 edges a box, the teacher 4",
        ),
    ],
    ids=["bins", "family", "classes", "gi", "fcos", "upright teacher"],
)
def test_pairs_that_do_not_fit_are_named(student, teacher, distiller, message):
    with pytest.raises(ViewError, match=message):
        distillkit.wrap(small(student), teacher(), [distiller])(*scene())


def test_other_bin_values_are_named():
    view = view_of("retina")
    other = replace(view, support=view.support * torch.tensor([1.0, 1, 1, 1, 0.5])[:, None])
    with pytest.raises(ValueError, match=r"bins of edge 4 stand at \[-5, .*\], the teacher's at \[-2\.5, "):
        LD()(view, other, truth([random_boxes(1), random_boxes(1)]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.tensor([[1.0, 2, 8, 9]]), r"target 0: expected boxes \(k, 5\).*\(1, 4\)"),
        (torch.tensor([[20.0, 20, 8, 9, 0], [20, 20, 0, 9, 0]]), "target 0: box 1 is .*w > 0 and h > 0"),
        (torch.tensor([[20.0, 20, 8, 9, math.nan]]), r"target 0: box 0 is \[20\.0.*finite"),
    ],
)
def test_bad_boxes_are_named(family, boxes, message):
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        small(family)([torch.rand(3, 64, 64)], [target])


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="loss must be one of 'iou', 'gwd', 'kld', 'probiou', got 'l1'"):
        small("gfl", loss="l1")
    with pytest.raises(ValueError, match="loss must be one of 'gwd', 'kld', got 'iou'"):
        small("retina", loss="iou")
    with pytest.raises(ValueError, match="angle must be one of 'le90', 'le135', 'oc', got 'le180'"):
        small("retina", angle="le180")
    with pytest.raises(ValueError, match="bins=2"):
        small("gfl", bins=2)


def around_a_point(boxes: Tensor, angles: Tensor, strides: Tensor, points: Tensor, bins: int) -> Tensor:
    """Sharp edge logits (N, 5, K) of boxes (N, 5) seen from points, in the frame turned by ``angles`` (N,)."""
    frames = torch.cat([boxes[:, :4], angles[:, None]], 1)
    distances = encode_turned(points, frames) / strides[:, None]
    rows = distances[..., None] - torch.arange(bins)
    apart = angles[:, None] / math.pi + 0.5 - torch.arange(bins) / bins
    turns = (apart + 0.5).remainder(1) - 0.5  # the last bin and the first are neighbours
    return torch.cat([-4 * rows**2, -4 * (turns * bins)[:, None] ** 2], 1)


@pytest.mark.parametrize("dense", [False, True], ids=["gathered", "dense"])
def test_ld_does_not_care_which_frame_a_teacher_names_a_box_in(dense):
    """A box at 89.9 degrees and itself at -89.9 are the same but for 0.2 degrees; its left is then called right."""
    bins, stride, size = 16, 8, (64, 64)
    points = grid_points([(8, 8)], [stride], 0.5, "cpu")
    box = torch.tensor([[34.0, 30.0, 44.0, 20.0, math.pi / 2]])
    boxes, strides = box.expand(64, 5), torch.full((64,), float(stride))
    nearly = math.radians(89.9)

    def view(angle, turned=True):
        logits = around_a_point(boxes, torch.full((64,), angle), strides, points, bins)
        edges = Maps((logits.flatten(1).T.reshape(1, -1, 8, 8),), (5, bins))
        classes = Maps((torch.zeros(1, 2, 8, 8),), (2,))
        return DenseDetections(classes, edges, (stride,), 0.5, turned=turned)

    targets = BoxTargets([box], [torch.tensor([1])], [size])

    def loss(student, teacher):
        return LD(Valuable(), temperature=1, dense=dense)(student, teacher.match(student), targets).item()

    same, other = loss(view(nearly), view(nearly - math.radians(0.2))), loss(view(nearly), view(-nearly))
    assert same < 1e-2
    assert other < 1e-2
    assert loss(view(nearly, False), view(-nearly, False)) > 0.5  # read as it stands, the teacher's left is not left
    assert abs(loss(view(-nearly), view(nearly)) - other) < 1e-3


def test_the_adapter_of_rotated_gfl_says_that_its_distances_are_turned():
    model = small("gfl", sure=True)
    wrapped = distillkit.wrap(model, small("gfl", sure=True), [LD(Main())])
    seen = []
    ld = next(iter(wrapped.distillers.values())) if hasattr(wrapped, "distillers") else None
    assert ld is not None
    ld.register_forward_pre_hook(lambda _, given: seen.append(given))
    images = [torch.rand(3, 64, 64)]
    wrapped(images, [{"boxes": torch.tensor([[30.0, 30, 30, 20, 0.3]]), "labels": torch.tensor([1])}])
    ((student, teacher, _),) = seen
    assert student.turned
    assert type(teacher.edges).__name__ == "FacingEdges"
