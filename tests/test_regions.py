"""boxes/regions.py: golden weights, both paths, what is shared, odd pictures."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distillkit.bench.counting import Dispatched
from distillkit.boxes import assign, regions
from distillkit.boxes.assign import atss
from distillkit.boxes.maps import Maps
from distillkit.boxes.regions import Main, MainAndValuable, Valuable, matched, valuable_weight
from distillkit.core.views import BoxTargets, DenseDetections
from distillkit.losses.kl import kl_divergence

GOLDEN = np.load(Path(__file__).parent / "golden" / "ld_assign_a.npz")
STRIDES = (8, 16, 32)
SIZES = ((16, 20), (8, 10), (4, 5))
BOXES = torch.tensor([[10.0, 12.0, 70.0, 90.0], [60.0, 30.0, 150.0, 120.0], [100.0, 5.0, 118.0, 22.0]])
EVERY_REGION = [
    Main(),
    Valuable(),
    Valuable(measure="release"),
    Valuable(gamma=0.0, measure="iou"),
    MainAndValuable(),
]


def view(images: int, seed: int = 0, **options) -> DenseDetections:
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.randn(images, 3, h, w, generator=generator).requires_grad_() for h, w in SIZES]
    edges = [torch.randn(images, 4 * 8, h, w, generator=generator).requires_grad_() for h, w in SIZES]
    return DenseDetections(Maps(tuple(classes), (3,)), Maps(tuple(edges), (4, 8)), STRIDES, **options)


def targets(*boxes: Tensor, size: tuple[int, int] = (128, 160)) -> BoxTargets:
    return BoxTargets(list(boxes), [torch.zeros(len(b), dtype=torch.int64) for b in boxes], [size] * len(boxes))


def everywhere(region, seen: DenseDetections, truth: BoxTargets, weight=None) -> Tensor:
    """(B, N) weights."""
    return region(seen, truth, weight, dense=True)[1].view(len(truth.boxes), -1)


# ---- the valuable region


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize(
    ("key", "measure", "gamma"),
    [
        ("vlr", "release", 0.25),
        ("vlr_truediou", "diou", 0.25),
        ("vlr_g000", "release", 0.0),
        ("vlr_g050", "release", 0.5),
        ("vlr_g075", "release", 0.75),
        ("vlr_g100", "release", 1.0),
    ],
)
def test_valuable_weights_match_the_release(i: int, key: str, measure, gamma: float) -> None:
    anchors, gt = torch.from_numpy(GOLDEN[f"im{i}_anchors"]), torch.from_numpy(GOLDEN[f"im{i}_gt"])
    threshold = atss(anchors, GOLDEN[f"im{i}_num_level"].tolist(), gt).threshold
    got, want = valuable_weight(anchors, gt, threshold, gamma, measure), torch.from_numpy(GOLDEN[f"im{i}_{key}"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (got > 0).sum() == (want > 0).sum()


def test_a_smaller_gamma_only_adds_anchors_and_one_leaves_none() -> None:
    seen, truth = view(1), targets(BOXES)
    sets = [everywhere(Valuable(gamma=g), seen, truth, "one") > 0 for g in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for larger, smaller in pairwise(sets):
        assert (larger | ~smaller).all()
        assert larger.sum() > smaller.sum()
    assert not sets[-1].any()


def test_with_gamma_one_both_regions_are_the_main_region() -> None:
    seen, truth = view(1), targets(BOXES)
    both = everywhere(MainAndValuable(valuable=Valuable(gamma=1.0)), seen, truth)
    assert both.equal(everywhere(Main(), seen, truth))


# ---- weights


def test_weights_of_an_anchor() -> None:
    seen, truth = view(2), targets(BOXES, BOXES[:1])
    score = seen.classes.all().sigmoid().amax(-1)
    positive = torch.stack([m.assignment.gt_index >= 0 for m in matched(seen, truth)])
    torch.testing.assert_close(everywhere(Main(), seen, truth), score.detach() * positive)
    torch.testing.assert_close(everywhere(Main(), seen, truth, "one"), positive.float())
    overlaps = torch.stack([m.iou.amax(0) for m in matched(seen, truth)])
    valuable = everywhere(Valuable(measure="iou"), seen, truth)
    assert valuable.any()
    torch.testing.assert_close(valuable[0, valuable[0] > 0].amax(), overlaps[0, valuable[0] > 0].amax())
    both = everywhere(MainAndValuable(), seen, truth)
    torch.testing.assert_close(
        both, everywhere(Main(), seen, truth) + everywhere(Valuable(), seen, truth) / 4, rtol=1e-6, atol=0
    )
    assert not both.requires_grad


def test_scores_that_are_probabilities_are_read_as_such() -> None:
    scores = Maps(tuple(torch.full((1, 3, h, w), 0.125) for h, w in SIZES), (3,))
    weights = Main()(view(1, scores=scores), targets(BOXES), dense=False)[1]
    assert len(weights) > 0
    assert (weights == 0.125).all()


# ---- the two paths


@pytest.mark.parametrize("region", EVERY_REGION, ids=repr)
@pytest.mark.parametrize("weight", ["score", "iou", "one", None])
def test_both_paths_give_the_same_loss(region, weight) -> None:
    truth = targets(BOXES, BOXES[:0], BOXES[1:], size=(100, 130))
    teacher = view(3, seed=1)
    found = []
    for dense in (False, True):
        student = view(3)
        where, weights = region(student, truth, weight, dense)
        assert where.dense == dense
        rows = kl_divergence(student.edges.at(where), teacher.edges.at(where), 10.0).mean(-1)
        loss = (weights * rows).sum()
        loss.backward()
        found.append((loss, [level.grad for level in student.edges.levels]))
    (gathered, its_grads), (all_of_them, their_grads) = found
    assert gathered > 0
    torch.testing.assert_close(gathered, all_of_them, rtol=1e-6, atol=0)
    for mine, theirs in zip(its_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_the_gathering_path_is_the_default_on_the_cpu() -> None:
    where, _ = Main()(view(1), targets(BOXES))
    assert not where.dense


@pytest.mark.parametrize("region", EVERY_REGION, ids=repr)
def test_the_dense_path_never_waits_for_the_device(region) -> None:
    counts = {}
    for dense in (False, True):
        student, teacher = view(2), view(2, seed=1)
        with Dispatched() as counted:
            where, weights = region(student, targets(BOXES, BOXES[:0]), dense=dense)
            rows = kl_divergence(student.edges.at(where), teacher.edges.at(where), 10.0).mean(-1)
            (weights * rows).sum().backward()
        counts[dense] = counted.syncs.total()
    assert counts[False] > 0
    assert counts[True] == 0


def test_the_dense_path_has_no_graph_break() -> None:
    region = MainAndValuable()

    def loss(student: DenseDetections, teacher: DenseDetections, truth: BoxTargets) -> Tensor:
        where, weights = region(student, truth, dense=True)
        return (weights * kl_divergence(student.edges.at(where), teacher.edges.at(where), 10.0).mean(-1)).sum()

    student, teacher, truth = view(2), view(2, seed=1), targets(BOXES, BOXES[:2])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher, truth)
    torch.testing.assert_close(compiled, loss(student, teacher, targets(BOXES, BOXES[:2])))


# ---- odd pictures


@pytest.mark.parametrize("region", EVERY_REGION, ids=repr)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("objects", [0, 1], ids=["no objects", "objects in the padding"])
def test_a_batch_with_nothing_to_learn_from_gives_zero_with_a_live_graph(region, dense: bool, objects: int) -> None:
    far = torch.tensor([[900.0, 900.0, 990.0, 990.0]])[:objects]
    student = view(2)
    where, weights = region(student, targets(far, far), dense=dense)
    loss = (weights * kl_divergence(student.edges.at(where), student.edges.at(where).detach() + 1).mean(-1)).sum()
    loss.backward()
    assert loss == 0
    assert all(level.grad is not None and (level.grad == 0).all() for level in student.edges.levels)


def test_anchors_in_the_padding_take_no_part() -> None:
    seen, truth = view(1), targets(BOXES, size=(64, 80))
    for region in EVERY_REGION:
        outside = ~matched(seen, truth)[0].valid
        assert outside.any()
        assert not everywhere(region, seen, truth, "one")[0, outside].any()


def test_one_level_is_enough() -> None:
    seen = view(1)
    single = DenseDetections(Maps(seen.classes.levels[:1], (3,)), Maps(seen.edges.levels[:1], (4, 8)), (8,))
    for region in (Main(), Valuable()):
        assert everywhere(region, single, targets(BOXES)).any()


def test_repeating_a_picture_repeats_its_region() -> None:
    once = everywhere(MainAndValuable(), view(1), targets(BOXES))
    seen = view(1)
    maps = (Maps(tuple(x.repeat(4, 1, 1, 1) for x in m.levels), m.shape) for m in (seen.classes, seen.edges))
    assert everywhere(MainAndValuable(), DenseDetections(*maps, STRIDES), targets(*[BOXES] * 4)).equal(
        once.repeat(4, 1)
    )


# ---- sharing and refusing


def test_the_assignment_is_made_once_a_step(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(assign, "atss", lambda *a, **k: calls.append(1) or atss(*a, **k))
    truth = targets(BOXES, BOXES[:1])
    for region in EVERY_REGION:
        region(view(2), truth)
    assert len(calls) == 2  # pictures
    Main(topk=5)(view(2), truth)
    assert len(calls) == 4


def test_anchors_of_a_view_are_used() -> None:
    seen = view(1)
    same = view(1, anchors=regions.grid_anchors(SIZES, STRIDES, 0.0, 8.0, "cpu"))
    assert everywhere(Valuable(), same, targets(BOXES)).equal(everywhere(Valuable(), seen, targets(BOXES)))
    halved = view(1, anchors=regions.grid_anchors(SIZES, STRIDES, 0.0, 4.0, "cpu"))
    assert not everywhere(Valuable(), halved, targets(BOXES)).equal(everywhere(Valuable(), seen, targets(BOXES)))


def test_regions_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="the head saw 2 pictures, the targets describe 1"):
        Main()(view(2), targets(BOXES))
    several = DenseDetections(Maps(view(1).classes.levels, (1,), 3), None, STRIDES)
    with pytest.raises(ValueError, match=r"3 anchors a cell.*give anchors="):
        Main()(several, targets(BOXES))
    with pytest.raises(ValueError, match="anchors= has 5 boxes, its maps have 420"):
        Main()(view(1, anchors=torch.zeros(5, 4)), targets(BOXES))
    with pytest.raises(ValueError, match=r"gamma must be in .*, got 2"):
        Valuable(gamma=2)
    with pytest.raises(ValueError, match="'giou'"):
        Valuable(measure="giou")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'scores'"):
        Main()(view(1), targets(BOXES), "scores")  # type: ignore[arg-type]
