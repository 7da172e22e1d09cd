"""The distillers: closed forms, invariances, the two paths, what goes wrong by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from distillkit.bench.counting import Dispatched
from distillkit.bench.ranks import on_two_ranks
from distillkit.boxes.fcos import FCOSMain, FCOSValuable
from distillkit.boxes.maps import Maps
from distillkit.boxes.merged import Merged
from distillkit.boxes.regions import Main, MainAndValuable, Valuable, matched
from distillkit.core.teacher import EMATeacher, Teacher
from distillkit.core.views import BoxTargets, ClassLogits, DenseDetections, Features
from distillkit.distillers.feature_imitation import FeatureImitation, best_apart, general_instances
from distillkit.distillers.ld import LD
from distillkit.distillers.logit_kd import LogitKD
from distillkit.distillers.self_ld import SelfLD

STRIDES, SIZES, PICTURE = (8, 16, 32), ((8, 10), (4, 5), (2, 3)), (64, 80)
BOXES = [
    torch.tensor([[5.3, 7.1, 38.2, 41.7], [44.9, 12.4, 70.6, 60.3]]),
    torch.tensor([[20.1, 30.2, 52.7, 61.9]]),
    torch.zeros(0, 4),
    torch.tensor([[3.2, 2.7, 61.4, 55.8], [30.3, 33.1, 47.2, 52.4], [55.5, 5.9, 76.3, 27.7]]),
]
REGIONS: dict[str, Any] = {
    "main": Main(),
    "valuable": Valuable(),
    "released": Valuable(measure="release"),
    "both": MainAndValuable(),
    "merged": Merged(),
    "fcos": FCOSMain(),
    "fcos valuable": FCOSValuable(),
}


def detections(seed: int, images: int = 4, classes: int = 3, bins: int = 9, grad: bool = False) -> DenseDetections:
    g = torch.Generator().manual_seed(seed)
    make = [torch.randn(images, c, h, w, generator=g) for c in (classes, 4 * bins) for h, w in SIZES]
    make = [m.requires_grad_(grad) for m in make]
    return DenseDetections(Maps(tuple(make[:3]), (classes,)), Maps(tuple(make[3:]), (4, bins)), STRIDES)


def features(seed: int, images: int = 4, width: int = 6, grad: bool = False) -> Features:
    g = torch.Generator().manual_seed(seed)
    return Features(tuple(torch.randn(images, width, h, w, generator=g).requires_grad_(grad) for h, w in SIZES))


def targets(boxes: list[Tensor] = BOXES) -> BoxTargets:
    return BoxTargets(list(boxes), [torch.zeros(len(b), dtype=torch.int64) for b in boxes], [PICTURE] * len(boxes))


def both_views(seed: int, grad: bool = False) -> tuple[Features, DenseDetections]:
    return features(seed, grad=grad), detections(seed, grad=grad)


def dense_distillers(**options: Any) -> dict[str, Any]:
    made: dict[str, Any] = {f"ld {name}": LD(region, **options) for name, region in REGIONS.items()}
    made |= {f"kd {name}": LogitKD(region, **options) for name, region in REGIONS.items()}
    made["kd sigmoid"] = LogitKD(Main(), protocol="sigmoid", **options)
    default = options | {"convention": "default"}  # the release has its own sum
    made |= {f"ld by {n}": LD(Main(), normalize=n, **default) for n in ("weight_sum", "num_pos")}
    return made


def imitations(**options: Any) -> dict[str, FeatureImitation]:
    return {f"imitation {r}": FeatureImitation(r, **options) for r in ("boxes", "fine-grained", "gi")}


def views_for(distiller: Any, seed: int, grad: bool = False) -> Any:
    return both_views(seed, grad) if isinstance(distiller.reads, tuple) else detections(seed, grad=grad)


def leaves(view: Any) -> list[Tensor]:
    parts = view if isinstance(view, tuple) else (view,)
    return [t for p in parts for t in (p.maps if isinstance(p, Features) else (*p.classes.levels, *p.edges.levels))]


ALL = list(dense_distillers()) + list(imitations())


def make(name: str, **options: Any) -> Any:
    return dense_distillers(**options)[name] if name in dense_distillers() else imitations()[name]


# ---- mathematics


def test_ld_is_its_formula_written_with_loops() -> None:
    student, teacher, t = detections(0), detections(1), targets()
    temperature, total = 4.0, 0.0
    scores, s, z = student.classes.all().sigmoid(), student.edges.all(), teacher.edges.all()
    for image, m in enumerate(matched(student, t)):
        for anchor in (m.assignment.gt_index >= 0).nonzero()[:, 0].tolist():
            for edge in range(4):
                p = (z[image, anchor, edge] / temperature).softmax(0)
                q = (s[image, anchor, edge] / temperature).softmax(0)
                row = temperature**2 * sum((a * (a / b).log()).item() for a, b in zip(p, q, strict=True)) / len(p)
                total += scores[image, anchor].max().item() * row / 4
    assert LD(Main(), temperature)(student, teacher, t).item() == pytest.approx(total * 3 / 4, rel=1e-5)


@pytest.mark.parametrize("region", ["main", "valuable", "both"])
def test_ld_equals_the_release_at_its_three_images(region: str) -> None:
    student, teacher = detections(0, images=3), detections(1, images=3)
    default = LD(REGIONS[region])(student, teacher, targets(BOXES[:3]))
    release = LD(REGIONS[region], convention="release")(student, teacher, targets(BOXES[:3]))
    assert default.item() == pytest.approx(release.item(), rel=1e-6)


def test_the_sum_over_bins_is_the_mean_times_their_number() -> None:
    student, teacher = detections(0, bins=9), detections(1, bins=9)
    for convention in ("default", "release"):
        mean = LD(Main(), convention=convention)(student, teacher, targets())
        total = LD(Main(), convention=convention, bin_reduction="sum")(student, teacher, targets())
        assert total.item() == pytest.approx(9 * mean.item(), rel=1e-6)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("region", ["main", "valuable", "fcos"])
def test_each_normalization_divides_the_same_sum(region: str, dense: bool) -> None:
    student, teacher, t = detections(0), detections(1), targets()
    _, weight = REGIONS[region](student, t, dense=True)
    divisors = {"images": 4 / 3, "weight_sum": weight.sum().item(), "num_pos": (weight > 0).sum().item(), "none": 1.0}
    loss = {n: LD(REGIONS[region], normalize=n, dense=dense)(student, teacher, t).item() for n in divisors}
    for name, divisor in divisors.items():
        assert loss[name] * divisor == pytest.approx(loss["none"], rel=1e-5), name
    assert len({round(value, 6) for value in loss.values()}) == 4
    release = LD(REGIONS[region], convention="release", dense=dense)(student, teacher, t)
    assert loss["none"] == pytest.approx(release.item(), rel=1e-6)


def test_a_weighted_mean_of_equal_rows_is_one_row() -> None:
    """Every anchor has the same student and teacher, so the mean is the divergence of that one pair."""
    student, teacher = detections(0), detections(1)
    one, other = torch.randn(9, generator=torch.Generator().manual_seed(3)), torch.zeros(9)
    for view, row in ((student, one), (teacher, other)):
        for m in view.edges.levels:
            m.data = row.repeat(4)[None, :, None, None].expand_as(m).clone()
    row = 16 * F.kl_div((one / 4).log_softmax(0), (other / 4).softmax(0), reduction="sum").item()
    for normalize in ("weight_sum", "num_pos"):
        options = {"anchor_weight": "one", "bin_reduction": "sum", "normalize": normalize}
        assert LD(Main(), 4.0, **options)(student, teacher, targets()).item() == pytest.approx(row, rel=1e-5)


def test_a_region_of_ones_own_has_the_share_it_says() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine:
        share: float
        name: str = "mine"

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return Valuable()(*args, **kwargs)

    class Without:
        name = "valuable"  # a word decides nothing
        __call__ = Mine.__call__

    student, teacher = detections(0), detections(1)
    loss = {region: LD(region)(student, teacher, targets()).item() for region in (Mine(0.25), Mine(0.5), Without())}
    assert LD(Mine(0.5)).name == "ld_mine"
    quarter, half, whole = loss.values()
    assert quarter == pytest.approx(LD(Valuable())(student, teacher, targets()).item(), rel=1e-6)
    assert (half, whole) == (pytest.approx(2 * quarter, rel=1e-6), pytest.approx(4 * quarter, rel=1e-6))
    both = MainAndValuable(valuable=Valuable(share=0.5))
    apart = LD(Main())(student, teacher, targets()).item() + half
    assert LD(both)(student, teacher, targets()).item() == pytest.approx(apart, rel=1e-6)


def test_both_regions_at_once_are_their_sum() -> None:
    student, teacher = detections(0), detections(1)
    apart = sum(LD(r)(student, teacher, targets()) for r in (Main(), Valuable()))
    assert LD(MainAndValuable())(student, teacher, targets()).item() == pytest.approx(apart.item(), rel=1e-6)


def test_a_step_of_ld_moves_the_edge_where_the_teacher_has_it() -> None:
    student = detections(0, bins=9, grad=True)
    peak = torch.zeros(9)
    peak[3] = 6.0
    for m in student.edges.levels:
        m.data = peak.repeat(4)[None, :, None, None].expand_as(m).clone()
    teacher = dataclasses.replace(
        student, edges=Maps(tuple(m.detach().roll(1, 1) for m in student.edges.levels), (4, 9))
    )
    loss = LD(Main(), temperature=2)(student, teacher, targets())
    assert loss > 0
    (gradient,) = torch.autograd.grad(loss, student.edges.levels[0])
    before = student.edges.levels[0].detach()
    values = torch.arange(9.0)
    move = ((before - 0.1 * gradient).unflatten(1, (4, 9)).softmax(2) - before.unflatten(1, (4, 9)).softmax(2)).permute(
        0, 1, 3, 4, 2
    ) @ values
    touched = gradient.abs().unflatten(1, (4, 9)).sum(2) > 0
    assert touched.any()
    assert (move[touched] > 0).all()


def test_classifier_softmax_is_hintons_loss() -> None:
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(5, 7, generator=g, requires_grad=True), torch.randn(5, 7, generator=g)
    loss = LogitKD(temperature=3)(ClassLogits(s), ClassLogits(t), None)
    expected = F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean") * 9
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(gradient, 3 * ((s / 3).softmax(1) - (t / 3).softmax(1)) / 5)


def test_classifier_sigmoid_gradient_and_zero() -> None:
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(5, 1, generator=g, requires_grad=True), torch.randn(5, 1, generator=g)
    kd = LogitKD(temperature=2, protocol="sigmoid")
    (gradient,) = torch.autograd.grad(kd(ClassLogits(s), ClassLogits(t), None), s)
    torch.testing.assert_close(gradient, 2 * ((s / 2).sigmoid() - (t / 2).sigmoid()) / 5)
    assert kd(ClassLogits(t), ClassLogits(t), None).abs() < 1e-7


def test_dense_sigmoid_averages_over_classes_and_anchors() -> None:
    student, teacher = detections(0, grad=True), detections(1)
    loss = LogitKD(Main(), protocol="sigmoid", temperature=2)(student, teacher, targets())
    gradients = torch.autograd.grad(loss, student.classes.levels)
    got = Maps(gradients, (3,)).all()
    positive = torch.stack([m.assignment.gt_index >= 0 for m in matched(student, targets())])
    difference = (student.classes.all() / 2).sigmoid() - (teacher.classes.all() / 2).sigmoid()
    torch.testing.assert_close(got, 2 * difference * positive[..., None] / 3 / positive.sum())


def test_release_kd_is_the_sum_of_level_means() -> None:
    student, teacher = detections(0), detections(1)
    positive = torch.stack([m.assignment.gt_index >= 0 for m in matched(student, targets())])
    rows = F.kl_div(
        (student.classes.all() / 2).log_softmax(-1), (teacher.classes.all() / 2).softmax(-1), reduction="none"
    ).mean(-1) * 4  # fmt: skip
    levels = zip(rows.split([80, 20, 6], 1), positive.split([80, 20, 6], 1), strict=True)
    expected = sum(r[p].mean().item() for r, p in levels if p.any())
    loss = LogitKD(Main(), convention="release")(student, teacher, targets())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_whole_map_imitation_is_the_mean_square_of_each_map() -> None:
    s, t = features(0), features(1)
    expected = sum(((a - b) ** 2).mean().item() for a, b in zip(s.maps, t.maps, strict=True))
    assert FeatureImitation()(s, t, None).item() == pytest.approx(expected, rel=1e-6)


def test_box_imitation_reads_the_points_inside_boxes() -> None:
    s, t = both_views(0), both_views(1)
    expected = 0.0
    for level, (height, width) in enumerate(SIZES):
        found = []
        for image, boxes in enumerate(BOXES):
            for y in range(height):
                for x in range(width):
                    px, py = x * STRIDES[level], y * STRIDES[level]
                    if any(b[0] < px < b[2] and b[1] < py < b[3] for b in boxes.tolist()):
                        found.append(((s[0].maps[level] - t[0].maps[level])[image, :, y, x] ** 2).mean().item())
        expected += sum(found) / len(found)
    assert FeatureImitation("boxes")(s, t, targets()).item() == pytest.approx(expected, rel=1e-5)


def test_best_apart_is_the_head_of_torchvisions_nms() -> None:
    g = torch.Generator().manual_seed(0)
    corner, size = torch.rand(6, 200, 2, generator=g) * 60, torch.rand(6, 200, 2, generator=g) * 30 + 1
    boxes, score = torch.cat([corner, corner + size], -1), torch.rand(6, 200, generator=g)
    chosen = best_apart(score, boxes, 10, 0.3)
    for row in range(6):
        assert set(chosen[row].nonzero()[:, 0].tolist()) == set(nms(boxes[row], score[row], 0.3)[:10].tolist())


def test_best_apart_leaves_out_what_takes_no_part() -> None:
    boxes = torch.tensor([[[0.0, 0, 1, 1], [5, 5, 6, 6], [9, 9, 10, 10]]])
    chosen = best_apart(torch.tensor([[0.1, -torch.inf, 0.3]]), boxes)
    assert chosen.tolist() == [[True, False, True]]


def test_general_instances_of_a_picture_do_not_depend_on_the_others() -> None:
    student, teacher, t = detections(0), detections(1), targets()
    together = general_instances(student, teacher, t)
    for i in range(4):
        alone = [_images(v, slice(i, i + 1)) for v in (student, teacher)]
        assert torch.equal(general_instances(*alone, targets(BOXES[i : i + 1]))[0], together[i])
    mixed = general_instances(student, teacher, t, across_pictures=True)
    assert all(level.sum() <= 10 for level in mixed.split([80, 20, 6], 1))
    assert not torch.equal(mixed, together)


# ---- what holds for all of them


@pytest.mark.parametrize("name", ALL)
def test_repeated_images_change_nothing(name: str) -> None:
    distiller = make(name)
    once = distiller(views_for(distiller, 0), views_for(distiller, 1), targets())
    for times in (2, 4, 8):
        student, teacher = (_repeat(views_for(distiller, seed), times) for seed in (0, 1))
        again = distiller(student, teacher, targets(BOXES * times))
        assert again.item() == pytest.approx(once.item(), rel=1e-5)
    assert once > 0


def _repeat(view: Any, times: int) -> Any:
    if isinstance(view, tuple):
        return tuple(_repeat(v, times) for v in view)
    if isinstance(view, Features):
        return Features(tuple(m.repeat(times, 1, 1, 1) for m in view.maps))
    repeat = [
        Maps(tuple(m.repeat(times, 1, 1, 1) for m in maps.levels), maps.shape) for maps in (view.classes, view.edges)
    ]
    return DenseDetections(repeat[0], repeat[1], STRIDES)


@pytest.mark.parametrize("convention", ["default", "release"])
@pytest.mark.parametrize("name", list(dense_distillers()))
def test_both_paths_are_equal(name: str, convention: str) -> None:
    results = []
    for dense in (False, True):
        student = detections(0, grad=True)
        loss = make(name, dense=dense, convention=convention)(student, detections(1), targets())
        results.append([loss, *torch.autograd.grad(loss, leaves(student), allow_unused=True, materialize_grads=True)])
    for gathered, dense_form in zip(*results, strict=True):
        torch.testing.assert_close(gathered, dense_form, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name != "imitation gi"])  # which needs no objects
def test_no_object_anywhere_is_zero_with_a_live_graph(name: str, dense: bool) -> None:
    distiller = make(name, dense=dense)
    student = views_for(distiller, 0, grad=True)
    loss = distiller(student, views_for(distiller, 1), targets([torch.zeros(0, 4)] * 4))
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, leaves(student), allow_unused=True)
    assert any(g is not None for g in gradients)
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("name", ALL)
def test_equal_student_and_teacher_are_at_the_minimum(name: str) -> None:
    distiller = make(name)
    student = views_for(distiller, 0, grad=True)
    loss = distiller(student, views_for(distiller, 0), targets())
    assert loss.abs() < 1e-5  # T^2 = 100 times what the logarithms round
    for g in torch.autograd.grad(loss, leaves(student), allow_unused=True, materialize_grads=True):
        assert g.abs().max() < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    distiller = make(name)
    student, teacher = views_for(distiller, 0, grad=True), views_for(distiller, 1, grad=True)
    distiller(student, teacher, targets()).backward()
    assert all(t.grad is None for t in leaves(teacher))
    assert any(t.grad is not None and t.grad.any() for t in leaves(student))


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    distiller = make(name)
    rounded = [_cast(_cast(views_for(distiller, seed), torch.bfloat16), torch.float32) for seed in (0, 1)]
    low = [_cast(views_for(distiller, seed), torch.bfloat16) for seed in (0, 1)]
    loss = distiller(*low, targets())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distiller(*rounded, targets()), rtol=1e-3, atol=1e-6)


def _cast(view: Any, dtype: torch.dtype) -> Any:
    if isinstance(view, tuple):
        return tuple(_cast(v, dtype) for v in view)
    if isinstance(view, Features):
        return Features(tuple(m.to(dtype) for m in view.maps))
    cast = [Maps(tuple(m.to(dtype) for m in maps.levels), maps.shape) for maps in (view.classes, view.edges)]
    return DenseDetections(cast[0], cast[1], STRIDES)


@pytest.mark.parametrize("convention", ["default", "release"])
@pytest.mark.parametrize("name", ALL)
def test_the_dense_path_never_waits_for_the_device(name: str, convention: str) -> None:
    distiller = (
        imitations(convention=convention)[name]
        if name in imitations()
        else make(name, dense=True, convention=convention)
    )
    student, teacher = views_for(distiller, 0, grad=True), views_for(distiller, 1)
    with Dispatched() as counted:
        distiller(student, teacher, targets()).backward()
    assert not counted.syncs


def test_the_gathering_path_waits() -> None:
    with Dispatched() as counted:
        LD(Main(), dense=False)(detections(0, grad=True), detections(1), targets())
    assert counted.syncs


# ---- several ranks


def test_two_ranks_give_the_gradients_of_one_process() -> None:
    """The ranks hold unequal numbers of positives; the mean of their gradients is that of one process."""
    ranks = on_two_ranks(losses_and_gradients)
    for name, (loss, gradients) in losses_and_gradients().items():
        both = [rank[name] for rank in ranks]
        torch.testing.assert_close((both[0][0] + both[1][0]) / 2, loss, rtol=1e-5, atol=0)
        for first, second, want in zip(both[0][1], both[1][1], gradients, strict=True):
            mean = (first + second) / 2
            assert (mean - want).abs().max() <= 1e-5 * want.abs().max() + 1e-9, name


def losses_and_gradients(rank: int | None = None) -> dict[str, Any]:
    """Of every distiller, on all images or on those of a rank."""
    mine = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    found = {}
    for name in ALL:
        distiller = make(name)
        student = views_for(distiller, 0, grad=True)
        loss = distiller(_images(student, mine), _images(views_for(distiller, 1), mine), targets(BOXES[mine]))
        gradients = torch.autograd.grad(loss, leaves(student), allow_unused=True, materialize_grads=True)
        found[name] = loss.detach(), gradients
    return found


def _images(view: Any, which: slice) -> Any:
    if isinstance(view, tuple):
        return tuple(_images(v, which) for v in view)
    if isinstance(view, Features):
        return Features(tuple(m[which] for m in view.maps))
    parts = [Maps(tuple(m[which] for m in maps.levels), maps.shape) for maps in (view.classes, view.edges)]
    return DenseDetections(parts[0], parts[1], STRIDES)


# ---- projections


def test_a_projection_is_made_where_widths_differ() -> None:
    imitation = FeatureImitation()
    imitation.prepare([4, 6, 4], [6, 6, 6])
    s = features(0, width=4, grad=True)
    s = Features((s.maps[0], features(2).maps[1].requires_grad_(), s.maps[2]))
    imitation(s, features(1), None).backward()
    assert [isinstance(p, nn.Linear) for p in imitation.projections] == [True, False, True]
    assert all(p.grad is not None and p.grad.any() for p in imitation.parameters())
    assert all(m.grad is not None and m.grad.any() for m in s.maps)


def test_the_projection_of_a_map_is_a_linear_layer_over_channels() -> None:
    imitation = FeatureImitation()
    imitation.prepare([4], [6])
    s, t = torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)
    as_map = imitation(Features((s,)), Features((t,)), None)
    as_tokens = imitation(Features((s.flatten(2).mT,)), Features((t.flatten(2).mT,)), None)
    torch.testing.assert_close(as_map, as_tokens)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_a_projection_is_computed_in_float32(own: torch.dtype) -> None:
    """As under autocast, where maps are bfloat16, and in a model that is bfloat16 itself."""
    imitation = FeatureImitation()
    imitation.prepare([4], [6])
    imitation.to(own)
    s, t = (torch.randn(2, width, 3, 5).bfloat16() for width in (4, 6))
    low = imitation(Features((s,)), Features((t,)), None)
    exact = imitation.float()(Features((s.float(),)), Features((t.float(),)), None)
    torch.testing.assert_close(low, exact)


def test_a_projection_needs_as_many_maps_on_both_sides() -> None:
    with pytest.raises(ValueError, match="2 feature maps of the student, 1 of the teacher"):
        FeatureImitation().prepare([4, 4], [6])


# ---- self-distillation


def test_self_ld_brings_its_teacher_and_keeps_it_out_of_its_parameters() -> None:
    average = SelfLD(decay=0.9)
    assert isinstance(average.own_teacher(), EMATeacher)
    assert average.own_teacher().decay == 0.9
    earlier = nn.Linear(2, 2)
    frozen = SelfLD(checkpoint=earlier)
    assert isinstance(frozen.own_teacher(), Teacher)
    assert frozen.own_teacher().model is earlier
    assert not list(frozen.parameters())
    assert not frozen.state_dict()


# ---- errors


@pytest.mark.parametrize(
    ("distiller", "student", "teacher", "words"),
    [
        (LD(), detections(0, bins=9), detections(1, bins=17), ["9 bins", "the teacher 17", "bins="]),
        (LogitKD(Main()), detections(0, classes=3), detections(1, classes=5), ["3 classes", "teacher 5", "num_class"]),
        (LogitKD(Main()), detections(0, classes=1), detections(1, classes=1), ["one class", "protocol='sigmoid'"]),
        (
            LD(),
            detections(0),
            dataclasses.replace(detections(1), edges=None),
            ["teacher has no edge distributions", "edges="],
        ),
        (FeatureImitation(), features(0, width=4), features(1, width=6), ["(4, 4, 8, 10)", "(4, 6, 8, 10)"]),
        (FeatureImitation(), Features(features(0).maps[:2]), features(1), ["2 feature maps", "3 of the teacher"]),
    ],
)  # fmt: skip
def test_sides_that_do_not_match_are_named(distiller: Any, student: Any, teacher: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        distiller(student, teacher, targets())
    for word in words:
        assert word in str(error.value)


def test_bins_of_other_values_are_named() -> None:
    """Nine bins on both sides, but the teacher's are two strides apart: equal logits are not equal boxes."""
    student = detections(0)
    wide = dataclasses.replace(detections(1), support=torch.arange(9.0) * 2)
    for mine, theirs in ((student, wide), (wide, student)):
        with pytest.raises(ValueError, match=r"bins stand at \[0, [12], .*\] strides, the teacher.s at \[0, [12], "):
            LD()(mine, theirs, targets())
    spelled_out = dataclasses.replace(detections(1), support=torch.arange(9.0))
    assert LD()(student, spelled_out, targets()) == LD()(student, detections(1), targets())
    LD()(wide, dataclasses.replace(detections(1), support=torch.arange(0.0, 18, 2)), targets())


def test_the_values_of_bins_are_looked_at_once() -> None:
    student, teacher = (dataclasses.replace(detections(i), support=torch.arange(9.0)) for i in range(2))
    LD(dense=True)(student, teacher, targets())
    with Dispatched() as counted:
        LD(dense=True)(student, teacher, targets())
    assert not counted.syncs


def test_levels_of_other_sizes_are_named() -> None:
    teacher = detections(1)
    smaller = [Maps(tuple(m[..., 1:] for m in maps.levels), maps.shape) for maps in (teacher.classes, teacher.edges)]
    with pytest.raises(ValueError, match=r"8 x 10, .* the teacher's 8 x 9"):
        LD()(detections(0), DenseDetections(smaller[0], smaller[1], STRIDES), targets())


def test_a_map_that_is_not_its_level_is_named() -> None:
    s, t = both_views(0), both_views(1)
    with pytest.raises(ValueError, match="one a level and in its order"):
        FeatureImitation("boxes")((Features(s[0].maps[::-1]), s[1]), (Features(t[0].maps[::-1]), t[1]), targets())
    with pytest.raises(ValueError, match="2 feature maps, but the head has 3 levels"):
        FeatureImitation("boxes")((Features(s[0].maps[:2]), s[1]), (Features(t[0].maps[:2]), t[1]), targets())


def test_overlap_cannot_weigh_points_without_anchors() -> None:
    with pytest.raises(ValueError, match="no IoU"):
        LD(FCOSMain(), anchor_weight="iou")(detections(0), detections(1), targets())


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (LD, {"temperature": 0.5}, "temperature"),
        (LD, {"convention": "paper"}, "'paper'"),
        (LD, {"region": "main"}, r"region must be a region object such as Main\(\), got 'main'"),
        (LD, {"region": Main}, "region must be a region object"),
        (SelfLD, {"region": "main"}, "region must be a region object"),
        (LD, {"anchor_weight": "iuo"}, "anchor_weight must be .*'iuo'"),
        (LD, {"bin_reduction": "max"}, "'max'"),
        (LD, {"normalize": "batch"}, "'weight_sum', 'num_pos', 'none', got 'batch'"),
        (LD, {"normalize": "none", "convention": "release"}, "leave out normalize='none'"),
        (LogitKD, {"region": "main"}, "region must be a region object"),
        (LogitKD, {"region": Main}, "region must be a region object"),
        (LogitKD, {"region": Main(), "anchor_weight": "iuo"}, "'iuo'"),
        (LogitKD, {"temperature": 0.0}, "temperature"),
        (LogitKD, {"protocol": "tanh"}, "'tanh'"),
        (LogitKD, {"convention": "release"}, "give a region"),
        (FeatureImitation, {"region": "everything"}, "'everything'"),
        (FeatureImitation, {"convention": "release"}, "no whole-map form"),
        (FeatureImitation, {"region": "gi", "convention": "paper"}, "'paper'"),
    ],
)
def test_wrong_arguments_are_named_when_built(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_names_tell_the_regions_apart() -> None:
    made = [LD(), LD(Valuable()), LD(MainAndValuable()), LogitKD(), LogitKD(Main()), FeatureImitation(), SelfLD()]
    assert [d.name for d in made] == [
        "ld_main", "ld_valuable", "ld_main_valuable", "kd", "kd_main", "imitation", "self_ld_main"
    ]  # fmt: skip
