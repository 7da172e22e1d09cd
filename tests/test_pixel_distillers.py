"""Distillers of segmentation models: each against its formula in plain loops, what it does not change with, what it
refuses; and the adapter that finds the logits of every pixel."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torchvision.models import segmentation

import distillkit
from distillkit import ChannelKD, Distiller, Features, LogitKD, PairwiseKD, PixelKD, PixelLogits, Segmenter
from distillkit.adapters import adapter_for
from distillkit.adapters.classifier import Classifier
from distillkit.adapters.segmenter import is_segmenter
from distillkit.bench.counting import Dispatched
from distillkit.core.errors import ViewError
from distillkit.distillers import dense
from distillkit.losses.pixels import near_borders, similarities
from distillkit.losses.segmentation import IGNORE, SegmentationLoss
from distillkit.models.deeplab import DeepLab
from distillkit.models.fanet import FANet

B, C, H, W = 3, 4, 6, 5
AT = {"student_at": "a", "teacher_at": "b"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(seed: int, grad: bool = False) -> PixelLogits:
    return PixelLogits((2 * random(B, C, H, W, seed=seed)).requires_grad_(grad))


def maps(seed: int, grad: bool = False) -> Features:
    return Features(tuple(random(B, 3, h, w, seed=seed + h).requires_grad_(grad) for h, w in ((H, W), (4, 4))))


def regions() -> Tensor:
    """(B, H, W): two classes side by side with ignored pixels in both; one class alone; nothing labelled."""
    masks = torch.zeros(B, H, W, dtype=torch.int64)
    masks[0, :, 3:] = 2
    masks[0, 0] = masks[0, 4, 3] = masks[2] = IGNORE
    return masks


TARGETS = {"masks": regions()}
#: name: (distiller, its views)
ALL: dict[str, tuple[Callable[[], Distiller], Callable[..., Any]]] = {
    "pixel whole": (lambda: PixelKD(temperature=2), logits),
    "pixel main": (lambda: PixelKD("main"), logits),
    "pixel valuable": (lambda: PixelKD("valuable", width=1, temperature=3), logits),
    "channel": (ChannelKD, logits),
    "channel features": (lambda: ChannelKD(**AT, temperature=2), maps),
    "pairwise": (lambda: PairwiseKD(**AT, pool_scale=0.3), maps),
    "pairwise max": (lambda: PairwiseKD(**AT, pool="max"), maps),
    "pairwise release": (lambda: PairwiseKD(**AT, convention="release"), maps),
}


def tensors(view: Any) -> tuple[Tensor, ...]:
    return (view.logits,) if isinstance(view, PixelLogits) else view.maps


def changed(view: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(view, PixelLogits):
        return PixelLogits(change(view.logits))
    return Features(tuple(change(m) for m in view.maps))


def loss_of(name: str, student: Any, teacher: Any, targets: Any = TARGETS) -> Tensor:
    return ALL[name][0]()(student, teacher, targets)


# ---- the formulas, in numpy and float64, with loops


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum() for z in (teacher, student))
    return float(temperature**2 * (p * np.log(p / q)).sum())


def chosen(region: str, masks: np.ndarray, rows: int, columns: int) -> list[tuple[int, int, int]]:
    found = []
    for b, y, x in np.ndindex(masks.shape):
        window = masks[b, max(0, y - rows) : y + rows + 1, max(0, x - columns) : x + columns + 1]
        others = window[window != IGNORE]
        labelled = masks[b, y, x] != IGNORE
        near = labelled and (others != masks[b, y, x]).any()
        if {"whole": True, "main": labelled, "valuable": near}[region]:
            found.append((b, y, x))
    return found


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("region", "count"), [("whole", B * H * W), ("main", 54), ("valuable", 19)])
def test_pixel_kd_is_its_formula(region: Any, count: int, temperature: float) -> None:
    s, t = (logits(seed).logits.numpy() for seed in (0, 1))
    places = chosen(region, regions().numpy(), 2, 2)
    assert len(places) == count  # by hand
    want = sum(kl(t[b, :, y, x], s[b, :, y, x], temperature) for b, y, x in places) / count
    loss = PixelKD(region, temperature, width=2)(logits(0), logits(1), TARGETS)
    assert loss.item() == pytest.approx(want, rel=1e-6)  # the count is kept in float32


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_kd_is_its_formula(temperature: float) -> None:
    s, t = (logits(seed).logits.numpy() for seed in (0, 1))
    want = sum(kl(t[b, c].ravel(), s[b, c].ravel(), temperature) for b, c in np.ndindex(B, C)) / (B * C)
    assert ChannelKD(temperature=temperature)(logits(0), logits(1), None).item() == pytest.approx(want, rel=1e-12)


def test_channel_kd_of_a_map_of_four_places_by_hand() -> None:
    """Entropy of (1/2, 1/4, 1/8, 1/8): 7/4 ln 2; against four equal places 1/4 ln 2, times T^2 = 16."""
    teacher = 4 * torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log().view(1, 1, 2, 2)
    loss = ChannelKD()(PixelLogits(torch.zeros(1, 1, 2, 2)), PixelLogits(teacher), None)
    torch.testing.assert_close(loss, torch.tensor(4 * math.log(2)))


def test_pixel_kd_of_two_classes_by_hand() -> None:
    """One pixel of four is unsure: 3/4 against 1/2."""
    teacher = torch.zeros(1, 2, 2, 2)
    teacher[0, 0, 0, 0] = math.log(3)
    student, divergence = PixelLogits(torch.zeros(1, 2, 2, 2)), 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    masks = torch.tensor([[[0, 1], [IGNORE, IGNORE]]])
    for region, share in (("whole", 4), ("main", 2), ("valuable", 2)):
        loss = PixelKD(region)(student, PixelLogits(teacher), masks)  # the masks alone, not in a mapping
        torch.testing.assert_close(loss, torch.tensor(divergence / share))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def difference_of_pairs(s: list[np.ndarray], t: list[np.ndarray]) -> float:
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s))]
    return sum((cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2 for i, j in pairs) / len(pairs)


def patches(x: np.ndarray, rows: list[slice], columns: list[slice], pool: str) -> list[np.ndarray]:
    join = np.mean if pool == "average" else np.max
    return [join(x[:, r, c].reshape(len(x), -1), axis=1) for r in rows for c in columns]


@pytest.mark.parametrize("pool", ["average", "max"])
def test_pairwise_kd_is_its_formula(pool: Any) -> None:
    """A map of 5 x 4 in nodes of half its sides: evenly, and as the release cuts it, 2 + 2 + 1 rows."""
    s, t = (random(B, c, 5, 4, seed=c).abs() for c in (2, 3))  # of other widths
    halves = [slice(0, 2), slice(2, 4)]
    cuts = {"default": [slice(0, 3), slice(2, 5)], "release": [*halves, slice(4, 5)]}
    for convention, rows in cuts.items():
        nodes = [[patches(x[b].numpy(), rows, halves, pool) for b in range(B)] for x in (s, t)]
        want = sum(difference_of_pairs(*pair) for pair in zip(*nodes, strict=True)) / B
        made = PairwiseKD(**AT, pool=pool, convention=convention)  # type: ignore[arg-type]
        loss = made(Features((s,)), Features((t,)), None)
        assert loss.item() == pytest.approx(want, rel=1e-6)  # the release adds 1e-8 to lengths
    assert PairwiseKD(**AT).pool == "average"
    assert PairwiseKD(**AT, convention="release").pool == "max"


def test_pairwise_kd_of_four_places_by_hand() -> None:
    """Student: two pairs of equal places at right angles; teacher: all equal. 8 of 16 cosines are 0 against 1."""
    student = torch.tensor([[[1.0, 1], [0, 0]], [[0, 0], [2, 2]]])[None]
    loss = PairwiseKD(**AT)(Features((student,)), Features((torch.ones(1, 7, 2, 2),)), None)
    torch.testing.assert_close(loss, torch.tensor(0.5))


def test_pairwise_kd_of_maps_of_other_sizes_compares_the_same_nodes() -> None:
    student, teacher = random(B, 3, 4, 4), random(B, 2, 2, 2, seed=1)
    larger = teacher.repeat_interleave(3, 2).repeat_interleave(3, 3)
    losses = [PairwiseKD(**AT)(Features((student,)), Features((t,)), None) for t in (teacher, larger)]
    torch.testing.assert_close(*losses)
    fine = PairwiseKD(**AT, pool_scale=0.01)(Features((student,)), Features((larger,)), None)  # a node a place
    assert fine > 0


def test_only_the_release_changes_lengths() -> None:
    """The gradient of a cosine is at right angles to its vectors."""

    def along(convention: Any) -> Tensor:
        student = random(1, 3, 2, 2).requires_grad_()
        made = PairwiseKD(**AT, pool="average", convention=convention)
        (gradient,) = torch.autograd.grad(
            made(Features((student,)), Features((random(1, 3, 2, 2, seed=1),)), None), student
        )
        return (gradient * student).sum(1).abs().max()

    assert along("default") < 1e-12
    assert along("release") > 1e-3


def test_places_of_zeros_have_finite_gradients() -> None:
    nodes = torch.zeros(1, 3, 4, requires_grad=True)
    similarities(nodes).sum().backward()
    assert not nodes.grad.any()
    one = torch.tensor([[[0.0, 3], [0, 4]]], requires_grad=True)  # columns (0, 0) and (3, 4)
    found = similarities(one)
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0], [0, 1]]]))
    found[0, 0, 1].backward()
    assert one.grad.abs().max() <= 1


# ---- the band beside borders


def test_borders_are_what_a_loop_finds() -> None:
    masks = torch.randint(0, 3, (4, 5, 4), generator=torch.Generator().manual_seed(3)).repeat_interleave(3, 2)
    masks[torch.rand(masks.shape, generator=torch.Generator().manual_seed(4)) < 0.3] = IGNORE
    for reach in ((1, 1), (2, 2), (3, 1), (1, 4)):
        want = torch.zeros(masks.shape, dtype=torch.bool)
        for place in chosen("valuable", masks.numpy(), *reach):
            want[place] = True
        assert torch.equal(near_borders(masks, reach), want)
        assert want.any()
        assert not want.all()


def test_a_straight_border_has_a_band_of_its_width_on_either_side() -> None:
    masks = torch.zeros(1, 4, 20, dtype=torch.int64)
    masks[..., 8:] = 7
    for width in (1, 3):
        band = near_borders(masks, (1, width))
        assert band.all(1).nonzero()[:, 1].tolist() == list(range(8 - width, 8 + width))
        assert torch.equal(band.any(1), band.all(1))


def test_a_border_drawn_with_ignored_pixels_is_one_where_it_is_narrower_than_the_reach() -> None:
    masks = torch.tensor([[[0, 0, IGNORE, IGNORE, 1, 1]]])
    assert not near_borders(masks, (1, 2)).any()
    assert near_borders(masks, (1, 3)).tolist() == [[[False, True, False, False, True, False]]]


def test_the_width_is_a_share_of_the_masks_diagonal_or_pixels_of_the_masks() -> None:
    """Masks of 30 x 40, diagonal 50, with a border in the middle; the student's map has a row and a column of 2."""
    masks = torch.zeros(1, 30, 40, dtype=torch.int64)
    masks[..., 20:] = 1

    def columns(width: float, stride: int) -> int:
        student = torch.zeros(1, 2, 30 // stride, 40 // stride, dtype=torch.float64, requires_grad=True)
        teacher = random(1, 2, 30 // stride, 40 // stride)
        PixelKD("valuable", width=width)(PixelLogits(student), PixelLogits(teacher), masks).backward()
        return int(student.grad.any(1).any(1).sum())

    assert columns(4, 1) == columns(0.08, 1) == 8
    assert columns(4, 2) == columns(0.08, 2) == 4
    assert columns(0.02, 1) == columns(1, 1) == 2
    assert columns(1, 10) == 2  # never less than a cell
    assert columns(19, 1) == 38


def test_masks_of_another_size_are_read_at_the_centre_of_each_cell() -> None:
    small = regions()
    large = small.repeat_interleave(3, 1).repeat_interleave(3, 2)
    odd = large.clone()
    odd[:, ::3] = 1  # no centre of any cell
    odd[:, :, 2::3] = IGNORE
    for region in ("main", "valuable"):
        made = PixelKD(region, width=3)  # of the large masks' pixels: one cell
        want = PixelKD(region, width=1)(logits(0), logits(1), {"masks": small})
        for masks in (large, odd):
            torch.testing.assert_close(made(logits(0), logits(1), {"masks": masks}), want)


def test_ignored_pixels_are_taught_by_the_teacher_alone() -> None:
    reached = {}
    for region in ("whole", "main", "valuable"):
        student = logits(0, grad=True)
        PixelKD(region, width=1)(student, logits(1), TARGETS).backward()
        reached[region] = student.logits.grad.any(1)
    assert reached["whole"].all()
    assert torch.equal(reached["main"], regions() != IGNORE)
    assert torch.equal(reached["valuable"] & reached["main"], reached["valuable"])
    assert reached["valuable"].sum() == 9  # two columns of five rows, less the ignored one


@pytest.mark.parametrize("region", ["main", "valuable"])
def test_a_region_without_a_pixel_costs_nothing_and_still_reaches_the_student(region: Any) -> None:
    student = logits(0, grad=True)
    loss = PixelKD(region)(student, logits(1), {"masks": torch.full((B, H, W), IGNORE)})
    loss.backward()
    assert loss == 0
    assert student.logits.grad is not None
    assert not student.logits.grad.any()


# ---- what holds for all of them


@pytest.mark.parametrize("name", [name for name in ALL if name != "pairwise release"])  # whose gradient is another
def test_gradients(name: str) -> None:
    distiller, views = ALL[name][0](), ALL[name][1]
    teacher, student = views(7), tensors(views(0, grad=True))

    def loss(*student: Tensor) -> Tensor:
        return distiller(PixelLogits(*student) if views is logits else Features(student), teacher, TARGETS)

    assert gradcheck(loss, student)


@pytest.mark.parametrize("name", list(ALL))
def test_equal_sides_are_the_minimum(name: str) -> None:
    student, teacher = ALL[name][1](0, grad=True), ALL[name][1](0)
    loss = loss_of(name, student, teacher)
    assert loss.abs() < 1e-12
    for gradient in torch.autograd.grad(loss, tensors(student)):
        assert gradient.abs().max() < 1e-12
    assert loss_of(name, student, ALL[name][1](7)) > 1e-3


@pytest.mark.parametrize("name", list(ALL))
def test_pictures_eight_times_over_change_nothing(name: str) -> None:
    student, teacher = (ALL[name][1](seed) for seed in (0, 7))
    more = [changed(v, lambda t: t.repeat(8, 1, 1, 1)) for v in (student, teacher)]
    masks = {"masks": regions().repeat(8, 1, 1)}
    torch.testing.assert_close(loss_of(name, *more, masks), loss_of(name, student, teacher), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["channel", "channel features"])
def test_a_constant_added_to_a_channel_changes_nothing(name: str) -> None:
    student, teacher = (ALL[name][1](seed) for seed in (0, 7))
    moved = [changed(v, lambda t: t + 3 * random(*t.shape[:2], 1, 1, seed=5)) for v in (student, teacher)]
    torch.testing.assert_close(loss_of(name, *moved), loss_of(name, student, teacher))


def test_a_constant_added_to_all_classes_of_a_pixel_changes_nothing() -> None:
    moved = [changed(logits(seed), lambda t: t + 3 * random(B, 1, H, W, seed=5)) for seed in (0, 7)]
    torch.testing.assert_close(loss_of("pixel valuable", *moved), loss_of("pixel valuable", logits(0), logits(7)))


@pytest.mark.parametrize("name", ["pairwise", "pairwise max", "pairwise release"])
def test_the_scale_of_features_changes_no_pair(name: str) -> None:
    student, teacher = maps(0), maps(7)
    scaled = loss_of(name, changed(student, lambda t: 5 * t), changed(teacher, lambda t: 0.1 * t))
    torch.testing.assert_close(scaled, loss_of(name, student, teacher), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(ALL))
def test_no_gradient_reaches_the_teacher_and_nothing_waits_for_the_device(name: str) -> None:
    student, teacher = ALL[name][1](0, grad=True), ALL[name][1](7, grad=True)
    with Dispatched() as counted:
        loss_of(name, student, teacher).backward()
    assert not counted.syncs
    assert all(t.grad is None for t in tensors(teacher))
    assert all(t.grad is not None and t.grad.any() for t in tensors(student))


@pytest.mark.parametrize("name", list(ALL))
def test_half_precision_is_computed_in_float32(name: str) -> None:
    low = [changed(ALL[name][1](seed), lambda t: t.bfloat16()) for seed in (0, 7)]
    loss = loss_of(name, *low)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(name, *(changed(v, lambda t: t.float()) for v in low)))


@pytest.mark.parametrize("name", list(ALL))
def test_they_compile_whole(name: str) -> None:
    distiller, (student, teacher) = ALL[name][0](), (ALL[name][1](seed) for seed in (0, 7))
    compiled = torch.compile(distiller, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher, TARGETS), distiller(student, teacher, TARGETS))


def test_a_teacher_of_another_resolution_is_resized() -> None:
    teacher = random(B, C, 2 * H, 2 * W, seed=1)
    mean = teacher.unflatten(3, (W, 2)).unflatten(2, (H, 2)).mean((3, 5))  # bilinear, of half the size
    for made in (ChannelKD(), PixelKD()):
        losses = [made(logits(0), PixelLogits(t), None) for t in (teacher, mean)]
        torch.testing.assert_close(*losses)
    features = [ChannelKD(**AT)(Features((logits(0).logits,)), Features((t,)), None) for t in (teacher, mean)]
    torch.testing.assert_close(*features)


def test_the_mean_of_two_ranks_is_the_loss_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first picture has all 9 valuable pixels, the others have none."""
    student, teacher = logits(0, grad=True), logits(7)
    loss = loss_of("pixel valuable", student, teacher)
    loss.backward()
    counts: list[float] = []
    monkeypatch.setattr(
        dense, "mean_over_ranks", lambda count: counts.append(count.item()) or torch.tensor((9 + 0) / 2)
    )
    parts = []
    for part in (slice(0, 1), slice(1, 3)):
        mine = PixelLogits(logits(0).logits[part].requires_grad_())
        parts.append((loss_of("pixel valuable", mine, PixelLogits(teacher.logits[part]), regions()[part]), mine.logits))
        parts[-1][0].backward()
    assert counts == [9, 0]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss)
    torch.testing.assert_close(torch.cat([of.grad for _, of in parts]) / 2, student.logits.grad)


# ---- what is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PixelKD("border"), "region must be 'whole', 'main' or 'valuable', got 'border'"),
        (lambda: PixelKD(temperature=0.5), "temperature must be at least 1, got 0.5"),
        (lambda: PixelKD(width=0), "above 0 and below 1, or a whole number of pixels, got 0"),
        (lambda: PixelKD(width=1.5), "a whole number of pixels, got 1.5"),
        (lambda: ChannelKD(temperature=0), "temperature must be at least 1, got 0"),
        (
            lambda: ChannelKD(teacher_at="layer4"),
            "student_at is None and teacher_at 'layer4': name feature maps of both",
        ),
        (lambda: PairwiseKD(**AT, pool_scale=0), "above 0 and at most 1, got 0"),
        (lambda: PairwiseKD(**AT, pool_scale=2), "above 0 and at most 1, got 2"),
        (lambda: PairwiseKD(**AT, pool="mean"), "'average', 'max' or None, got 'mean'"),
        (lambda: PairwiseKD(**AT, convention="paper"), "'default' or 'release', got 'paper'"),
    ],
)
def test_options_that_make_no_sense_are_named(build: Callable[[], Distiller], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("targets", "got"),
    [
        (None, "got NoneType. Without masks use region='whole'"),
        ({"labels": 1, "key": 2}, "got a mapping of 'labels', 'key'"),
        ({}, "got a mapping of nothing"),
        (torch.zeros(B, H, W), rf"integers \({B}, H, W\) with 255 = ignored, as targets; got torch.float32 \({B}, {H}"),
        ({"masks": torch.zeros(2, H, W, dtype=torch.int64)}, r"got torch.int64 \(2, 6, 5\)"),
        ({"masks": torch.zeros(B, 1, H, W, dtype=torch.int64)}, r"got torch.int64 \(3, 1, 6, 5\)"),
        ({"masks": torch.zeros(B, H, W, dtype=torch.bool)}, "got torch.bool"),
    ],
)
def test_targets_that_are_no_masks_are_named(targets: Any, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        PixelKD("main")(logits(0), logits(1), targets)
    assert PixelKD()(logits(0), logits(1), targets) > 0


def of(*shapes: tuple[int, ...]) -> Features:
    return Features(tuple(random(*shape) for shape in shapes))


def test_logits_that_do_not_fit_are_named() -> None:
    one, four, five = (PixelLogits(random(B, c, H, W)) for c in (1, 4, 5))
    for made in (PixelKD(), ChannelKD()):
        with pytest.raises(ValueError, match="the teacher has 5 classes, the student 4"):
            made(four, five, None)
    with pytest.raises(ValueError, match="softmax over one class is constant"):
        PixelKD()(one, one, None)
    assert ChannelKD()(one, PixelLogits(random(B, 1, H, W, seed=1)), None) > 0  # over places


def test_features_that_do_not_fit_are_named() -> None:
    channel, pairwise = ChannelKD(**AT), PairwiseKD(**AT)
    with pytest.raises(ValueError, match="2 feature maps of the student, 1 of the teacher"):
        channel(of((B, 4, 3, 3), (B, 4, 3, 3)), of((B, 4, 3, 3)), None)
    with pytest.raises(ValueError, match=r"map 0 is \(3, 4, 3, 3\) in the student and \(3, 5, 3, 3\).*projection"):
        channel(of((B, 4, 3, 3)), of((B, 5, 3, 3)), None)
    with pytest.raises(ValueError, match=r"map 0 is \(3, 9, 4\).*expected \(B, C, H, W\)"):
        channel(of((B, 9, 4)), of((B, 9, 4)), None)
    with pytest.raises(ValueError, match="map 1 has one place"):
        channel(of((B, 4, 2, 2), (B, 4, 1, 1)), of((B, 4, 2, 2), (B, 4, 2, 2)), None)
    with pytest.raises(ValueError, match="teacher gives 1 feature maps, student 2"):
        pairwise(of((B, 4, 3, 3), (B, 4, 3, 3)), of((B, 4, 3, 3)), None)
    with pytest.raises(ValueError, match=r"map 0 is \(3, 9, 4\).*of the same pictures"):
        pairwise(of((B, 9, 4)), of((B, 9, 4)), None)
    with pytest.raises(ValueError, match=r"pool_scale=0.9 they make one node, and no pair; lower it"):
        PairwiseKD(**AT, pool_scale=0.9)(of((B, 4, 3, 3)), of((B, 4, 3, 3)), None)
    with pytest.raises(ValueError, match=r"they make 3 x 3 and 2 x 2 nodes; name layers of the same stride"):
        PairwiseKD(**AT, convention="release")(of((B, 4, 5, 5)), of((B, 4, 4, 4)), None)


# ---- where models have their logits


class Net(nn.Module):
    """A segmentation model that returns what ``form`` makes of its logits."""

    def __init__(self, form: Callable[[Tensor], Any] = lambda logits: logits, width: int = 6, classes: int = C):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(self.stem(x)))


class OursLike(Net):
    """As distillkit's models: a mapping in train mode, a tensor in eval mode."""

    def forward(self, x: Tensor) -> Any:
        logits = nn.functional.interpolate(self.head(self.stem(x)), size=x.shape[2:], mode="bilinear")
        return {"out": logits, "aux": logits} if self.training else logits


class TinyForSemanticSegmentation(Net):
    pass


def batch(side: int = 16) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, side, side, generator=g), {"masks": torch.randint(0, C, (2, side, side), generator=g)}


def zero(output: Any, targets: Any) -> Tensor:
    return torch.zeros(())


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda logits: logits,
    "torchvision": lambda logits: OrderedDict(out=logits, aux=2 * logits),
    "transformers": lambda logits: {"logits": logits, "hidden": None},
    "object": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_logits_are_found_in_every_form_of_output(form: str) -> None:
    torch.manual_seed(0)
    student, teacher, (x, y) = Net(FORMS[form]), Net(), batch()
    want = PixelKD("main")(PixelLogits(raw(student, x)), PixelLogits(raw(teacher, x)), y)
    model = distillkit.wrap(student, teacher, [PixelKD("main")], criterion=zero, adapter=Segmenter())
    torch.testing.assert_close(model(x, y)["pixel_kd_main"], want)


def raw(model: Net, x: Tensor) -> Tensor:
    return model.head(model.stem(x))


def test_a_module_path_is_read_instead_of_the_output() -> None:
    torch.manual_seed(0)
    student, teacher, (x, y) = Net(lambda logits: {"masks": logits}), Net(width=9), batch()
    at = PixelKD(student_at="head", teacher_at="head")
    losses = distillkit.wrap(student, teacher, [at], criterion=zero, adapter=Segmenter())(x, y)
    want = PixelKD()(PixelLogits(raw(student, x)), PixelLogits(raw(teacher, x)), None)
    torch.testing.assert_close(losses["pixel_kd"], want)


def test_a_student_in_train_mode_and_a_teacher_in_eval_mode_return_what_they_like() -> None:
    torch.manual_seed(0)
    student, teacher = OursLike(), OursLike(width=9)
    distillers = [ChannelKD(), PixelKD("valuable"), PixelKD("whole"), ChannelKD("stem", "stem", name="stems")]
    model = distillkit.wrap(student, teacher, distillers, criterion=SegmentationLoss(), adapter=Segmenter())
    losses = model(*batch())
    assert list(losses) == ["ce", "aux", "channel_kd", "pixel_kd_valuable", "pixel_kd", "stems", "output"]
    x, y = batch()
    s, t = PixelLogits(student(x)["out"]), PixelLogits(teacher(x))
    for made in distillers[:3]:
        torch.testing.assert_close(losses[made.name], made.weight.value * made(s, t, y))
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert [tuple(p.shape) for p in distillers[3].parameters()] == [(9, 6), (9,)]  # the projection, 6 -> 9 channels


def test_the_weights_of_channel_kd_are_the_papers() -> None:
    assert ChannelKD().weight.value == 3
    assert ChannelKD(**AT).weight.value == 50
    assert ChannelKD(**AT, weight=2).weight.value == 2


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: {"masks": x, "aux": x}, r"Net: expected 'out' or 'logits'.*got 'masks', 'aux'; name the layer"),
        (lambda x: {}, "got an empty mapping"),
        (lambda x: x.mean((2, 3)), r"expected its output to be the logits of every pixel.*got \(2, 4\)"),
        (lambda x: {"out": x[0]}, r"expected 'out' of its output to be.*got \(4, 8, 8\)"),
        (lambda x: [x], "got list"),
        (lambda x: SimpleNamespace(logits=None), "got NoneType"),
    ],
)
def test_outputs_without_logits_of_pixels_are_named(form: Callable[[Tensor], Any], message: str) -> None:
    model = distillkit.wrap(Net(form), Net(), [PixelKD()], criterion=zero, adapter=Segmenter())
    with pytest.raises(ViewError, match=message):
        model(*batch())


def test_places_that_make_no_sense_are_named() -> None:
    two = PixelKD(student_at=["stem", "head"])  # type: ignore[arg-type]
    with pytest.raises(ViewError, match="read at one module path, got 2: 'stem', 'head'"):
        distillkit.wrap(Net(), Net(), [two], criterion=zero, adapter=Segmenter())
    with pytest.raises(
        ViewError, match="Net has class logits of every pixel, and none of a whole picture: use PixelKD"
    ):
        distillkit.wrap(Net(), Net(), [LogitKD()], criterion=zero, adapter=Segmenter())
    pooled = nn.Sequential(nn.Conv2d(3, C, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = distillkit.wrap(pooled, Net(), [PixelKD(student_at="2")], criterion=zero, adapter=Segmenter())
    with pytest.raises(ViewError, match=r"expected the tapped module to be.*got \(2, 4\)"):
        model(*batch())


def test_what_a_distiller_refuses_has_its_name_before_it() -> None:
    model = distillkit.wrap(Net(), Net(classes=5), [ChannelKD()], criterion=zero, adapter=Segmenter())
    with pytest.raises(ViewError, match="distiller 'channel_kd': the teacher has 5 classes, the student 4"):
        model(*batch())


# ---- models as they come


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=C)


def test_families_are_known_by_their_classes() -> None:
    lraspp = torchvision_model("lraspp_mobilenet_v3_large")

    class Mine(segmentation.LRASPP):
        pass

    assert isinstance(adapter_for(lraspp), Segmenter)
    assert isinstance(adapter_for(Mine(nn.Identity(), 1, 1, C)), Segmenter)
    assert isinstance(adapter_for(TinyForSemanticSegmentation(), fallback=Classifier()), Segmenter)
    assert not is_segmenter(Net())


@pytest.mark.parametrize("made", [lambda: DeepLab(C, "resnet10t", channels=8), lambda: FANet(C, "resnet10t")])
def test_our_own_models_are_known(made: Callable[[], nn.Module]) -> None:
    student, (x, y) = made(), batch(64)
    y["boundary"] = torch.zeros(2, 64, 64)
    teacher = DeepLab(C, "resnet10t", version="v2", multi_scale=True)
    model = distillkit.wrap(student, teacher, [ChannelKD(), PixelKD("main")], criterion=SegmentationLoss())
    losses = model(x, y)
    assert {"ce", "channel_kd", "pixel_kd_main"} < set(losses)
    losses.total.backward()


def test_wrap_train_and_unwrap_of_torchvisions_models() -> None:
    student, teacher = (torchvision_model(n) for n in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"))
    keys, hooks = list(student.state_dict()), sum(len(m._forward_hooks) for m in student.modules())
    distillers = [ChannelKD(), PixelKD("valuable"), PairwiseKD("backbone.16", "backbone.16")]
    distillers.append(ChannelKD("classifier.cbr", "classifier.0.project", name="features"))
    model = distillkit.wrap(student, teacher, distillers, criterion=SegmentationLoss())
    x, y = batch(64)
    y["masks"][:, :, 32:] = y["masks"][:, :, :32] = 1
    y["masks"][:, :, 40:] = 2
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    totals = []
    for _ in range(3):
        losses = model(x, y)
        assert list(losses) == ["ce", "channel_kd", "pixel_kd_valuable", "pairwise_kd", "features", "output"]
        assert all(losses[d.name] > 0 for d in distillers)
        totals.append(losses.total.item())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert totals[2] < totals[1] < totals[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert model.unwrap() is student
    assert list(student.state_dict()) == keys
    assert sum(len(m._forward_hooks) for m in student.modules()) == hooks
    assert set(student.eval()(x)) == {"out"}


@pytest.mark.parametrize("name", ["channel_kd", "pixel_kd", "pixel_kd_main", "pixel_kd_valuable", "pairwise_kd"])
def test_two_steps_on_its_own_loss_bring_the_student_nearer(name: str) -> None:
    torch.manual_seed(0)
    made = {
        "channel_kd": lambda: ChannelKD(weight=1.0),
        "pairwise_kd": lambda: PairwiseKD("stem", "stem", pool_scale=0.25),
    }.get(name, lambda: PixelKD(name.removeprefix("pixel_kd").removeprefix("_") or "whole"))()  # type: ignore[arg-type]
    model = distillkit.wrap(Net(), Net(width=9), [made], criterion=zero, adapter=Segmenter())
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    losses = []
    for _ in range(3):
        loss = model(*batch())[name]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
