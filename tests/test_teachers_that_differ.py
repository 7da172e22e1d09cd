"""Teachers of other classes, bins, levels, anchors and picture sizes: closed forms, and what is said otherwise."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import distillkit
from distillkit import (
    DIST,
    DKD,
    LD,
    Adapter,
    BoxTargets,
    ClassLogits,
    DenseDetections,
    FeatureImitation,
    Features,
    LogitKD,
    Main,
    MainAndValuable,
    PixelLogits,
    QueryDetections,
    Teacher,
    TokenLogits,
    Valuable,
)
from distillkit.bench.counting import Dispatched
from distillkit.boxes.distribution import integral, resample
from distillkit.boxes.fcos import FCOSMain
from distillkit.boxes.maps import Maps, Picked, Where, where_of
from distillkit.boxes.merged import Merged
from distillkit.boxes.moved import MovedEdges
from distillkit.core.alignment import Alignment, match_names
from distillkit.core.errors import ViewError, WrapError
from distillkit.core.pictures import Renormalise, Resize
from distillkit.data.scenes import Scenes
from distillkit.losses.kl import kl_divergence
from distillkit.models.gfl import GFL
from distillkit.recipe import RecipeError, load
from distillkit.training.build.models import own_classes
from distillkit.training.errors import RunError
from distillkit.training.run import run
from tests.tiny import KL, MSE, Net, batch

CPU = torch.device("cpu")
CROSS = F.cross_entropy


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(
    seed: int = 0,
    classes: int = 3,
    bins: int = 9,
    sizes: tuple[tuple[int, int], ...] = ((8, 8), (4, 4), (2, 2)),
    strides: tuple[int, ...] = (8, 16, 32),
    anchors: int = 1,
    **options: Any,
) -> DenseDetections:
    c, e = (
        tuple(random(2, anchors * n, *size, seed=seed + i) for i, size in enumerate(sizes)) for n in (classes, 4 * bins)
    )
    return DenseDetections(Maps(c, (classes,), anchors), Maps(e, (4, bins), anchors), strides, **options)


def box_targets() -> BoxTargets:
    boxes = [torch.tensor([[5.3, 7.1, 38.2, 41.7], [34.9, 12.4, 60.6, 60.3]]), torch.tensor([[20.1, 3.2, 62.7, 61.9]])]
    return BoxTargets(boxes, [torch.zeros(len(b), dtype=torch.int64) for b in boxes], [(64, 64)] * 2)


def aligned(teacher: list[str], student: list[str], missing: Any = "error", **options: Any) -> Alignment:
    return Alignment(match_names("teacher", teacher, student, missing)[0], **options)


# ---- classes by name

VIEWS = {
    "pictures": lambda x: ClassLogits(x),
    "pixels": lambda x: PixelLogits(x.T[None, :, :, None].expand(2, -1, -1, 2)),
    "tokens": lambda x: TokenLogits(x, x[:, None].expand(-1, 4, -1), (2, 2)),
    "anchors": lambda x: DenseDetections(
        Maps((x[:, :, None, None],), (x.shape[1],)), None, (8,), scores=Maps((x.sigmoid()[:, :, None, None],), (3,))
    ),
    "queries": lambda x: QueryDetections(x[:, None], torch.full((len(x), 1, 4), 0.5), exclusive=False),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_columns_come_into_the_students_order(kind: str) -> None:
    mine = random(5, 3)
    names = ["cat", "dog", "bird"]
    theirs = mine[:, [2, 0, 1]]
    student, teacher = aligned(["bird", "cat", "dog"], names).pair(VIEWS[kind](mine), VIEWS[kind](theirs), CPU, True)
    found = teacher.match(student)
    if kind == "anchors":
        pairs = [(found.classes.all(), student.classes.all()), (found.scores.all(), student.scores.all())]
    elif kind == "tokens":
        pairs = [(found.classes, student.classes), (found.tokens, student.tokens)]
    else:
        pairs = [(found.logits, student.logits)]
    for a, b in pairs:
        assert torch.equal(a, b)


def test_no_object_stays_the_last_of_a_querys_logits() -> None:
    view = QueryDetections(torch.arange(4.0).expand(1, 1, 4), torch.full((1, 1, 4), 0.5), exclusive=True)
    assert view.picked(torch.tensor([2, 0]), 3).logits.tolist() == [[[2, 0, 3]]]


def test_picked_maps_are_what_picking_each_level_gives() -> None:
    maps = dense(classes=5, anchors=2).classes
    picked, columns = Picked(maps, torch.tensor([3, 1])), [3, 1]
    assert torch.equal(picked.all(), maps.all()[..., columns])
    where, _ = where_of((random(2, sum(maps.counts)) > 0.5).float(), maps.counts, maps.sizes)
    assert torch.equal(picked.at(where), maps.at(where)[..., columns])
    assert torch.equal(picked.largest(), maps.all()[..., columns].amax(-1).flatten())
    assert torch.equal(picked.only([2]).all(), maps.only([2]).all()[..., columns])
    assert Maps(picked.levels, picked.shape, picked.anchors).all().equal(picked.all())


def test_a_teacher_whose_classes_stand_otherwise_costs_nothing() -> None:
    torch.manual_seed(0)
    student = Net(classes=3)
    student.drop = nn.Identity()
    teacher = copy.deepcopy(student)
    order = [2, 0, 1]
    with torch.no_grad():
        teacher.head.weight.copy_(teacher.head.weight[order])
        teacher.head.bias.copy_(teacher.head.bias[order])
    student.stem[1].eval()  # the same statistics on both sides
    names = ["cat", "dog", "bird"]
    model = distillkit.wrap(
        student, Teacher(teacher, classes=[names[i] for i in order]), [LogitKD()], CROSS, classes=names
    )
    student.stem[1].eval()
    assert model(*batch(classes=3))["kd"].item() == pytest.approx(0, abs=1e-6)
    model.unwrap()
    wrong = distillkit.wrap(student, teacher, [LogitKD()], CROSS)
    assert wrong(*batch(classes=3))["kd"].item() > 1e-5


def test_a_softmax_over_some_classes_is_what_the_teacher_says_given_that_it_is_one_of_them() -> None:
    mine, theirs = random(6, 2), random(6, 4, seed=1)
    student, teacher = aligned(["a", "dog", "b", "cat"], ["cat", "dog"]).pair(
        ClassLogits(mine), ClassLogits(theirs), CPU, True
    )
    p = theirs.softmax(1)[:, [3, 1]]
    torch.testing.assert_close(teacher.logits.softmax(1), p / p.sum(1, keepdim=True))
    assert student.logits is mine


@pytest.mark.parametrize("protocol", ["softmax", "sigmoid"])
def test_classes_that_the_teacher_lacks_are_left_out_on_both_sides(protocol: Any) -> None:
    student, teacher = Net(classes=3), Net(classes=2)
    student.drop = nn.Identity()
    kd = LogitKD(protocol=protocol, temperature=3)
    model = distillkit.wrap(
        student,
        Teacher(teacher, classes=["bird", "cat"], missing="ignore"),
        [kd],
        lambda out, y: 0 * out.sum(),
        classes=["cat", "dog", "bird"],
    )
    x, y = batch(classes=3)
    losses = model(x, y)
    with torch.no_grad():
        want = LogitKD(protocol=protocol, temperature=3)(
            ClassLogits(losses["output"][:, [0, 2]]), ClassLogits(teacher(x)[:, [1, 0]]), y
        )
    assert losses["kd"].item() == pytest.approx(want.item(), rel=1e-5)
    losses.total.backward()
    assert student.head.weight.grad[1].abs().max() == 0
    assert student.head.weight.grad[[0, 2]].abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (["Cat", "dog"], ["cat", "dog"], r"lacks 1 of the student's 2 classes: 'cat' \(it has 'Cat'\)"),
        (["traffic_light", "dog"], ["dog", "traffic light"], r"'traffic light' \(it has 'traffic_light'\)"),
        (["dog", "x"], ["dog", "zebra"], r"'zebra'\. Correct the names .* Teacher\(\.\.\., missing=\"ignore\"\)"),
        (["a", "b"], ["c", "d"], r"no class in common: the teacher's are 'a', 'b', the student's 'c', 'd'"),
    ],
)
def test_names_that_the_teacher_lacks_are_said(teacher: list[str], student: list[str], message: str) -> None:
    with pytest.raises(WrapError, match=message):
        distillkit.wrap(Net(classes=2), Teacher(Net(classes=2), classes=teacher), [KL()], CROSS, classes=student)


def test_names_that_stand_twice_are_taken_in_their_order() -> None:
    """As the "N/A" of COCO's 91 labels, and 80 of them to a student without."""
    coco91, coco80 = ["__background__", "cat", "N/A", "dog", "N/A", "bird"], ["cat", "dog", "bird"]
    assert match_names("t", coco91, coco91, "error") == (None, "")
    found, _ = match_names("t", coco91, coco80, "error")
    assert found is not None
    assert (found.teacher, found.student, found.drops) == ([1, 3, 5], [0, 1, 2], False)
    found, said = match_names("t", coco80, coco91, "error")
    assert found is not None
    assert (found.teacher, found.student, found.left_out) == ([0, 1, 2], [1, 3, 5], ("__background__", "N/A", "N/A"))
    assert "left out on both sides: '__background__', 'N/A', 'N/A'" in said


class Knows(Adapter):
    """A family whose models hold the names of their classes."""

    def class_names(self, model: nn.Module) -> list[str] | None:
        return getattr(model, "names", None)


def named(names: list[str]) -> Net:
    model = Net(classes=len(names))
    model.names = names
    return model


def test_models_that_know_their_names_are_matched_by_themselves(caplog: Any) -> None:
    student, teacher = named(["cat", "dog"]), named(["x", "dog", "cat"])
    model = distillkit.wrap(student, teacher, [KL(), KL(name="second")], CROSS, adapter=Knows())
    with caplog.at_level(logging.WARNING, "distillkit"):
        model(*batch(classes=2)).total.backward()
        model(*batch(classes=2))
    (record,) = caplog.records
    assert "its 3 classes are matched by name: 2 are the student's" in record.getMessage()
    model.unwrap()
    with pytest.raises(WrapError, match=r"lacks 1 of the student's 2 classes: 'bird'"):
        distillkit.wrap(named(["cat", "bird"]), teacher, [KL()], CROSS, adapter=Knows())


def test_names_do_not_matter_where_no_classes_are_compared() -> None:
    student, teacher = named(["cat", "bird"]), named(["x", "dog"])
    distillkit.wrap(student, teacher, [MSE("blocks.0")], CROSS, adapter=Knows())(*batch(classes=2))


def test_labels_of_classes_that_are_left_out_are_refused() -> None:
    teacher = Teacher(Net(classes=2), classes=["cat", "dog"], missing="ignore")
    with pytest.raises(WrapError, match=r"'dkd' reads the labels .* classes that its teacher lacks \('bird'\)"):
        distillkit.wrap(Net(classes=3), teacher, [DKD()], CROSS, classes=["cat", "dog", "bird"])
    distillkit.wrap(Net(classes=3), teacher, [DIST(beta=0)], CROSS, classes=["cat", "dog", "bird"])(*batch(classes=3))


def test_what_is_wrong_with_names_is_said() -> None:
    with pytest.raises(WrapError, match=r"the student's are not known: wrap\(\.\.\., classes=\[\.\.\.\]\)"):
        distillkit.wrap(Net(), Teacher(Net(), classes=["a"] * 5), [KL()], CROSS)
    with pytest.raises(WrapError, match="expected a list of names"):
        Teacher(Net(), classes="cat")
    with pytest.raises(WrapError, match="missing must be"):
        Teacher(Net(), missing="skip")  # type: ignore[arg-type]
    model = distillkit.wrap(Net(), Teacher(Net(), classes=["b", "a"]), [KL()], CROSS, classes=["a", "b"])
    with pytest.raises(ViewError, match=r"distiller 'kl': there are names for 2 classes, and class logits for 5"):
        model(*batch())
    unnamed = distillkit.wrap(Net(), Net(classes=4), [KL()], CROSS)
    with pytest.raises(ViewError, match=r"or their names: Teacher\(model, classes="):
        unnamed(*batch())


def test_a_background_that_comes_first_need_not_be_named() -> None:
    from distillkit.core.alignment import _by_column

    adapter = Adapter()
    assert _by_column(("cat",), adapter) == ("cat",)
    adapter.first_class = 1  # type: ignore[attr-defined]
    assert _by_column(("cat",), adapter) == ("__background__", "cat")
    assert _by_column(("__background__", "cat"), adapter) == ("__background__", "cat")


def test_families_read_the_names_of_their_models() -> None:
    from distillkit.adapters.mmdet import MMDet
    from distillkit.adapters.transformers import TransformersModel
    from distillkit.adapters.ultralytics import Ultralytics

    def model(**options: Any) -> Any:
        return SimpleNamespace(**options)

    read = TransformersModel().class_names
    assert read(model(config=SimpleNamespace(id2label={1: "dog", 0: "cat"}))) == ["cat", "dog"]
    assert read(model(config=SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"}))) is None
    assert Ultralytics().class_names(model(names={0: "cat", 1: "dog"})) == ["cat", "dog"]
    assert Ultralytics().class_names(model(names={0: "0", 1: "1"})) is None
    assert MMDet().class_names(model(dataset_meta={"classes": ("cat", "dog")})) == ("cat", "dog")
    assert MMDet().class_names(model()) is None


# ---- bins


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), step=st.floats(0.3, 2), start=st.floats(-3, 0), temperature=st.floats(1, 10))
def test_other_bins_keep_the_mean_and_all_mass(seed: int, step: float, start: float, temperature: float) -> None:
    support = torch.tensor([0.0, 1, 2, 3, 5, 7]).double()
    to = torch.arange(start, 9 + step, step).double()
    logits = random(4, 6, seed=seed).double()
    told = resample(logits, support, to, temperature=temperature)
    torch.testing.assert_close((told / temperature).exp().sum(-1), torch.ones(4).double())
    torch.testing.assert_close(integral(told / temperature, to), integral(logits / temperature, support))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=5, max_size=5))
def test_bins_within_other_bins_stay_as_they_are(values: list[float]) -> None:
    """Told in twice as many bins and back."""
    logits = torch.tensor([values]).double()
    fine = torch.arange(0, 4.5, 0.5).double()
    there = resample(logits, None, fine)
    torch.testing.assert_close(there.exp()[:, ::2], logits.softmax(-1))
    torch.testing.assert_close(resample(there, fine, torch.arange(5.0).double()), logits.log_softmax(-1))


def test_what_is_beyond_the_bins_goes_to_the_last() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    told = resample(p.log(), torch.tensor([-1.0, 0, 2, 4]), torch.tensor([0.0, 1, 2]))
    torch.testing.assert_close(told.exp(), torch.tensor([[0.3, 0.0, 0.7]]))


def test_distributions_are_softened_before_they_are_told_anew() -> None:
    """A teacher with twice as many bins: half of what is between two of the student's goes to each, at any T."""
    teacher, t = random(1, 5), 4.0
    soft = (teacher / t).softmax(-1)[0]
    want = torch.stack([soft[0] + soft[1] / 2, soft[1] / 2 + soft[2] + soft[3] / 2, soft[3] / 2 + soft[4]])
    edges = MovedEdges.of(
        Maps((teacher.repeat(1, 4)[..., None, None],), (4, 5)), torch.arange(5.0) / 2, torch.arange(3.0)
    )
    assert edges.shape == (4, 3)
    for rows in (edges.tempered(t).at(Where(None)), edges.tempered(t).all()[0]):
        torch.testing.assert_close((rows / t).softmax(-1)[0], want.expand(4, -1))
    student = random(1, 4, 3, seed=2)
    rows = kl_divergence(student, edges.tempered(t).at(Where(None)), t, "sum")
    by_hand = t**2 * (want * (want.log() - (student / t).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(rows, by_hand)


@pytest.mark.parametrize("dense_path", [False, True])
def test_a_teacher_with_bins_twice_as_fine_costs_nothing_where_it_uses_the_students(dense_path: bool) -> None:
    student = dense(bins=9)
    finer = []
    for m in student.edges.levels:
        between = torch.full((2, 4, 17, *m.shape[2:]), -1e4)
        between[:, :, ::2] = m.unflatten(1, (4, 9))
        finer.append(between.flatten(1, 2))
    teacher = dense(seed=1)
    teacher = dataclasses.replace(teacher, edges=Maps(tuple(finer), (4, 17)), support=torch.arange(17.0) / 2)
    distiller = LD(MainAndValuable(), dense=dense_path)
    assert distiller(student, teacher.match(student), box_targets()).item() == pytest.approx(0, abs=1e-5)
    assert distiller(student, dense(seed=1).match(student), box_targets()).item() > 0.1
    assert teacher.unmatched(student) == ["17 bins from 0 to 8 are told in the student's 9 from 0 to 8"]


def test_the_end_bin_is_said() -> None:
    (note,) = dense(bins=17).unmatched(dense(bins=9))
    assert note.endswith("in the student's 9 from 0 to 8; what is beyond them goes to the bin at the end")


@pytest.mark.parametrize("bins", [9, 17])
def test_bins_are_looked_at_once_and_then_nothing_waits(bins: int) -> None:
    student, t = dense(support=torch.arange(9.0)), box_targets()
    teacher = dense(seed=1, bins=bins, support=torch.arange(float(bins)))
    distiller = LD(Main(), dense=True)
    first = distiller(student, teacher.match(student), t)
    with Dispatched() as counted:
        again = distiller(student, teacher.match(student), t)
    assert not counted.syncs
    assert first == again


def test_nothing_is_moved_where_nothing_differs() -> None:
    student, teacher = dense(), dense(seed=1)
    with Dispatched() as counted:
        found = teacher.match(student)
    assert not counted.operations
    assert all(a is b for a, b in zip(found.edges.levels, teacher.edges.levels, strict=True))
    assert type(found.edges) is Maps


def test_bins_and_points_that_differ_are_moved_together() -> None:
    p = torch.zeros(1, 4, 5)
    p[..., 3] = 1  # each edge is three strides from the corner of its cell
    logits = (p + 1e-12).log().reshape(1, 20, 1, 1)
    teacher = dataclasses.replace(
        dense(sizes=((1, 1),), strides=(8,)),
        edges=Maps((logits,), (4, 5)),
        classes=Maps((torch.zeros(1, 2, 1, 1),), (2,)),
    )
    student = DenseDetections(
        Maps((torch.zeros(1, 2, 1, 1),), (2,)), Maps((torch.zeros(1, 36, 1, 1),), (4, 9)), (8,), centre=0.5
    )
    found = teacher.match(student)
    distances = integral(found.edges.all()[0], found.support)
    torch.testing.assert_close(distances, torch.tensor([[3.5, 3.5, 2.5, 2.5]]), rtol=0, atol=1e-4)


def test_edges_that_mean_other_things_are_refused_where_they_are_read() -> None:
    student, t = dense(), box_targets()
    boxes = dense(seed=1, unit="anchors", bins=17).match(student)
    LogitKD(Main())(student, boxes, t)
    with pytest.raises(ValueError, match=r"distances in strides, of 1 anchor\(s\) a cell, .*changes of an anchor box"):
        LD()(student, boxes, t)
    turned = dense(seed=1, bins=17, turned=True)
    with pytest.raises(ValueError, match=r"the student has 9 bins an edge, the teacher 17"):
        LD()(student, dataclasses.replace(turned, turned=False, edges=turned.edges), t)


# ---- levels and anchors


def two_levels(seed: int = 1) -> DenseDetections:
    return dense(seed, sizes=((8, 8), (4, 4)), strides=(8, 16))


@pytest.mark.parametrize("dense_path", [False, True])
@pytest.mark.parametrize("region", [Main(), Valuable(), MainAndValuable(), Merged(), FCOSMain()], ids=lambda r: r.name)
def test_shared_levels_teach_what_they_would_among_all(region: Any, dense_path: bool) -> None:
    """As a teacher that says of the third level what the student says already: anchors are assigned among all."""
    student, teacher, t = dense(), two_levels(), box_targets()
    whole = dataclasses.replace(
        student,
        edges=Maps((*teacher.edges.levels, student.edges.levels[2]), (4, 9)),
    )
    cut = student.shared_with(teacher)
    assert cut.strides == (8, 16)
    distiller = LD(region, dense=dense_path)
    want = distiller(student, whole, t)
    assert want > 0
    torch.testing.assert_close(distiller(cut, teacher.match(cut), t), want)


def test_other_anchors_are_chosen_where_a_level_is_forgotten() -> None:
    """What the last test would not see if ATSS looked at the shared levels alone."""
    student, t = dense(), box_targets()
    cut = student.shared_with(two_levels())
    alone = dataclasses.replace(cut, whole=None)
    region = Main()
    assert not torch.equal(region.overlaps(cut, t), region.overlaps(alone, box_targets()))


def test_a_level_that_the_teacher_lacks_names_the_knob() -> None:
    student, teacher = dense(), two_levels()
    with pytest.raises(
        ValueError, match=r"level of stride 32 has no partner .*\(8, 16\); with Teacher\(\.\.\., levels="
    ):
        teacher.match(student)
    notes = teacher.unmatched(student.shared_with(teacher))
    assert notes == ["has no level of stride 32: there the student learns nothing from it"]
    with pytest.raises(ValueError, match=r"no level is shared: the teacher's strides are \(4,\), the student's are"):
        student.shared_with(dense(sizes=((8, 8),), strides=(4,)))
    with pytest.raises(WrapError, match="levels must be"):
        Teacher(Net(), levels="both")  # type: ignore[arg-type]


def test_of_nine_anchors_the_surest_speaks_for_the_cell() -> None:
    student, teacher, t = dense(), dense(seed=1, anchors=9), box_targets()
    found = teacher.match(student)
    assert found.classes.anchors == 1
    every = teacher.classes.all().unflatten(1, (-1, 9)).amax(2)
    assert torch.equal(found.classes.all(), every)
    assert any("9 anchors a cell are seen as one" in note for note in teacher.unmatched(student))
    assert LogitKD(Main(), protocol="sigmoid")(student, found, t) > 0
    with pytest.raises(ValueError, match=r"of 1 anchor\(s\) a cell, the teacher's .*of 9 anchor\(s\) a cell.*LogitKD"):
        LD()(student, found, t)
    with pytest.raises(ValueError, match=r"the student has 9 anchors a cell, the teacher 1"):
        LogitKD(FCOSMain())(teacher, student.match(teacher), t)


# ---- another resolution


def test_levels_are_matched_by_stride_over_scale() -> None:
    student = dense()
    teacher = dense(seed=1, strides=(16, 32, 64)).at_scale(2.0)
    found = teacher.match(student)
    assert found.strides == (8, 16, 32)
    assert all(a is b for a, b in zip(found.edges.levels, teacher.edges.levels, strict=True))
    four = dense(seed=1, sizes=((16, 16), (8, 8), (4, 4), (2, 2)), strides=(8, 16, 32, 64)).at_scale(2.0)
    assert torch.equal(four.match(student).edges.levels[0], four.edges.levels[1])
    assert four.unmatched(student) == ["level of stride 8 is left out: the student has none"]
    with pytest.raises(ValueError, match=r"at scale=1.5 mean 5.33333, 10.6667, 21.3333 \(choose a scale="):
        dense(seed=1).at_scale(1.5).match(student)
    with pytest.raises(ValueError, match=r"give Teacher\(\.\.\., scale=\) instead of size="):
        teacher.at_scale(None).match(student)


def test_what_is_padded_otherwise_is_cut_off_or_filled_up() -> None:
    student = dense()
    larger = dense(seed=1, sizes=((16, 16), (8, 8), (4, 4), (2, 2), (1, 1)), strides=(8, 16, 32, 64, 128))
    found = larger.match(student)
    for a, b, (h, w) in zip(found.edges.levels, larger.edges.levels, student.classes.sizes, strict=False):
        assert torch.equal(a, b[..., :h, :w])
    smaller = dense(seed=1, sizes=((7, 8), (4, 4), (2, 2)))
    rows = smaller.match(student).classes.levels[0]
    assert torch.equal(rows[:, :, :7], smaller.classes.levels[0])
    assert torch.equal(rows[:, :, 7], smaller.classes.levels[0][:, :, 6])
    with pytest.raises(ValueError, match=r"by more than padding explains; .*Teacher\(\.\.\., scale=\)"):
        dense(seed=1, sizes=((16, 16), (8, 8), (4, 4))).match(student)


def test_feature_maps_are_matched_by_position() -> None:
    """Maps that hold each cell's place in the picture: from any scale they come out as the student's own."""

    def places(cells: int, stride: float) -> Tensor:
        return ((torch.arange(cells) + 0.5) * stride).expand(1, 1, cells, -1)

    student = Features((places(16, 8.0),))
    for cells, stride, scale in ((32, 8, 2.0), (16, 16, 2.0), (24, 8, 1.5), (64, 4, 2.0), (8, 8, 0.5)):
        seen = Features((places(cells, stride / scale),)).at_scale(scale).match(student).maps[0]
        torch.testing.assert_close(seen[..., 1:-1], student.maps[0][..., 1:-1])
    padded = Features((places(14, 16 / 2),)).at_scale(2.0).match(student).maps[0]
    torch.testing.assert_close(padded[..., :14, :14], student.maps[0][..., :14, :14])
    assert padded.shape == student.maps[0].shape
    with pytest.raises(ValueError, match=r"the teacher has 9 tokens, the student 4"):
        Features((torch.zeros(1, 9, 2),)).at_scale(2.0).match(Features((torch.zeros(1, 4, 2),)))


def test_a_teacher_that_halves_what_it_sees_at_twice_the_size_sees_the_student() -> None:
    """On pictures of one colour each, where resizing is exact."""
    student = Net()
    student.eval().drop = nn.Identity()

    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(student)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2:] == (32, 32)
            return self.inner(F.avg_pool2d(x, 2))

    teacher = Teacher(Halving(), scale=2.0)
    distillers = [MSE("blocks.0", teacher_at="inner.blocks.0"), KL()]
    model = distillkit.wrap(student, teacher, distillers, CROSS)
    model.train()
    student.stem[1].eval()
    colours = random(4, 3, 1, 1).expand(-1, -1, 16, 16)
    losses = model(colours, batch()[1])
    assert losses["mse"].item() == pytest.approx(0, abs=1e-10)
    assert losses["kl"].item() == pytest.approx(0, abs=1e-6)


def test_pictures_are_resized_in_lists_and_batches() -> None:
    twice, half, fixed = Resize(scale=2.0), Resize(scale=0.5), Resize(size=(8, 12))
    g = [random(3, 10, 16), random(3, 7, 9)]
    assert [tuple(p.shape) for p in twice(g)] == [(3, 20, 32), (3, 14, 18)]
    assert [tuple(p.shape) for p in half(tuple(g))] == [(3, 5, 8), (3, 4, 4)]
    assert twice(g[0][None]).shape == (1, 3, 20, 32)
    assert twice.scale_of(g) == 2.0
    assert fixed.scale_of(random(2, 3, 4, 6)) == 2.0
    assert fixed.scale_of(g) is None
    assert fixed(same := random(1, 3, 8, 12)) is same
    torch.testing.assert_close(half(torch.ones(1, 3, 8, 8)), torch.ones(1, 3, 4, 4))
    checks = torch.tensor([0.0, 1]).repeat(8)[None, None].expand(1, 3, 16, 16)
    assert (half(checks)[..., 1:-1] - 0.5).abs().max() < 0.01  # low-passed: every second column would be 0 or 1
    for bad in (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {"img": 1}, torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"floating pictures, .*feed="):
            twice(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": 2.0, "size": (8, 8)}, "not both"), ({"scale": 0.0}, "above 0"), ({"size": (8,)}, r"\(height, width\)")],
)
def test_scales_that_are_none_are_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WrapError, match=message):
        Teacher(Net(), **options)


def test_detectors_that_resize_by_themselves_are_refused_a_scale() -> None:
    from torchvision.models.detection import FCOS

    backbone = nn.Conv2d(3, 32, 3, stride=8, padding=1)
    backbone.out_channels = 32
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    model = FCOS(backbone, 2, anchor_generator=anchors)
    with pytest.raises(WrapError, match=r"teacher 'teacher' resizes pictures itself, to min_size="):
        distillkit.wrap(copy.deepcopy(model), Teacher(model, scale=2.0), [LogitKD(Main())])


# ---- other normalisation


def test_lists_and_turned_channels_are_renormalised_picture_by_picture() -> None:
    given, wanted = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((1.0, 2.0, 3.0), (0.5, 0.5, 0.5))
    colours = [random(3, 4, 6), random(3, 5, 2)]

    def normalised(x: Tensor, norm: Any) -> Tensor:
        return (x - torch.tensor(norm[0]).view(3, 1, 1)) / torch.tensor(norm[1]).view(3, 1, 1)

    for turned in (False, True):
        seen = Renormalise(given, wanted, turned)([normalised(c, given) for c in colours])
        for a, colour in zip(seen, colours, strict=True):
            torch.testing.assert_close(a, normalised(colour.flip(0) if turned else colour, wanted))


def test_pictures_of_integers_are_turned_and_never_renormalised() -> None:
    pictures = torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1)
    as_loaded = ((0.0,) * 3, (1.0,) * 3)
    turned = Renormalise(as_loaded, as_loaded, turned=True)(pictures)
    assert turned.dtype == torch.uint8
    assert turned.flatten().tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"torch.uint8: give the model floating pictures"):
        Renormalise(as_loaded, ((0.5,) * 3, (0.5,) * 3))(pictures)


# ---- end to end


def detector(classes: int, backbone: str, strides: tuple[int, ...], bins: int, seed: int) -> GFL:
    torch.manual_seed(seed)
    model = GFL(classes, backbone, strides=strides, channels=16, convs=1, groups=4, bins=bins)
    nn.init.zeros_(model.head.gfl_cls.bias)
    return model


def test_two_detectors_that_differ_in_everything() -> None:
    """Classes in another order and number, 17 bins and 9, five levels and three, pictures at twice the size."""
    data = Scenes(8, 64, seed=0, digits=(1, 3))
    items = [data[(0, i)] for i in range(2)]
    images = [image for image, _ in items]
    targets = [{"boxes": t["boxes"], "labels": t["labels"] % 2} for _, t in items]
    student = detector(2, "test_resnet", (8, 16, 32), 9, seed=0)
    keys = list(student.state_dict())
    teacher = detector(4, "test_resnet", (8, 16, 32, 64, 128), 17, seed=1)
    options = {"classes": ["x", "one", "y", "zero"], "scale": 2.0}
    model = distillkit.wrap(
        student,
        Teacher(teacher, **options),
        [
            LD(Main()),
            LD(Valuable()),
            LogitKD(Main(), protocol="sigmoid", weight=10),
            FeatureImitation(student_at=[f"neck[{i}]" for i in range(3)], teacher_at=[f"neck[{i}]" for i in (1, 2, 3)]),
        ],
        classes=["zero", "one"],
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    names, history = ("ld_main", "ld_valuable", "kd_main", "imitation"), []
    for _ in range(20):
        losses = model(images, targets)
        sum(losses[name] for name in names).backward()
        history.append({name: losses[name].item() for name in names})
        optimizer.step()
        optimizer.zero_grad()
    for name in names:
        assert history[-1][name] < 0.8 * history[0][name], (name, history[0][name], history[-1][name])
    assert all(p.grad is None for p in teacher.parameters())
    assert model.unwrap() is student
    assert list(student.state_dict()) == keys


def test_a_step_of_them_waits_for_no_more_than_one_of_equal_detectors() -> None:
    images = torch.rand(2, 3, 64, 64)
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 50]]), "labels": torch.tensor([1])}] * 2
    counts = []
    for teacher, names in (
        (Teacher(detector(2, "test_resnet", (8, 16, 32), 9, 1)), None),
        (
            Teacher(
                detector(3, "test_resnet", (16, 32, 64), 17, 1), classes=["b", "x", "a"], scale=2.0, levels="shared"
            ),
            ["a", "b"],
        ),
    ):
        student = detector(2, "test_resnet", (8, 16, 32), 9, 0)
        distillers = [LD(Main(), dense=True), LogitKD(Main(), protocol="sigmoid", dense=True)]
        model = distillkit.wrap(student, teacher, distillers, classes=names)
        for _ in range(2):  # proofs and what is said at the first step
            model(images, targets)
        model(images, targets)
        with Dispatched() as counted:
            model(images, targets)
        counts.append(sum(counted.syncs.values()))
        model.unwrap()
    assert counts[0] == counts[1]


def test_matching_compiles_without_a_graph_break() -> None:
    """Supports of equal values too, at which a compiled step does not look."""
    student, t = dense(support=torch.arange(9.0)), box_targets()
    teachers = [
        dense(seed=1, bins=17, centre=0.5, strides=(16, 32, 64)).at_scale(2.0),
        dense(seed=1, support=torch.arange(9.0)),
    ]
    kd = LogitKD(Main(), protocol="sigmoid", dense=True)
    ld = LD(Main(), dense=True)

    def loss(teacher: DenseDetections) -> Tensor:
        s, matched = aligned(["b", "x", "a"], ["a", "b"]).pair(student, teacher, CPU, True)
        matched = matched.match(s)
        return kd(s, matched, t) + (ld(s, matched, t) if matched.edges.anchors == 1 else 0)

    student = student.picked(torch.tensor([0, 1]), 3)
    for teacher in teachers:
        torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(teacher), loss(teacher))
        torch.compiler.reset()


# ---- in a recipe

RECIPE = """
name: differ
data: {kind: scenes, train: 8, val: 4, test: 4, size: 64, batch: 4, workers: 0}
teacher:
  {kind: gfl, backbone: lcnet_050, channels: 16, convs: 1, strides: [16, 32], bins: 13, checkpoint: teacher.safetensors,
   classes: names.txt, missing: ignore, levels: shared, scale: 2.0}
student: {kind: gfl, backbone: lcnet_050, channels: 16, convs: 1, strides: [8, 16, 32], bins: 9}
distillers:
  - {kind: ld, region: main}
  - {kind: logit-kd, region: main, protocol: sigmoid}
train: {epochs: 1}
compare: [distilled]
"""


def test_a_recipe_says_how_its_teacher_differs(tmp_path: Any, monkeypatch: Any, caplog: Any) -> None:
    """From end to end: the teacher is not scored on classes that it does not know."""
    monkeypatch.chdir(tmp_path)
    names = ["9", "x", *"876543210", "y"][:-3]  # without 0 and 1
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    teacher = GFL(len(names), "lcnet_050", strides=(16, 32), channels=16, convs=1, groups=16, bins=13)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    said = io.StringIO()
    with caplog.at_level(logging.WARNING, "distillkit"):
        folder = run(load("r.yaml"), console=Console(file=said, width=200))
    assert "teacher: its classes are not those of the data, so that it is not scored" in said.getvalue()
    assert f"its {len(names)} classes are matched by name: 8 are the student's; left out on both sides: '0', '1'" in (
        caplog.text
    )
    assert [row["row"] for row in json.loads((folder / "table.json").read_text())] == ["distilled"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("classes: [a, b], train: {}", "a teacher that is trained here learns the classes of the data"),
        ("classes: [], checkpoint: t.safetensors", "classes"),
        ("missing: skip, checkpoint: t.safetensors", "expected one of error, ignore"),
        ("scale: 0, checkpoint: t.safetensors", "greater than 0"),
    ],
)
def test_what_is_wrong_with_a_teachers_block_is_said(tmp_path: Any, written: str, message: str) -> None:
    start, end = RECIPE.index("teacher:\n"), RECIPE.index("student:")
    text = RECIPE[:start] + f"teacher: {{kind: gfl, {written}}}\n" + RECIPE[end:]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "r.yaml")


def test_a_file_of_names_that_is_none_is_said(tmp_path: Any) -> None:
    block = SimpleNamespace(classes=str(tmp_path / "names.txt"))
    with pytest.raises(RunError, match=r"names.txt: expected a text file with a name a line"):
        own_classes(block)  # type: ignore[arg-type]
    (tmp_path / "names.txt").write_text("\n \n")
    with pytest.raises(RunError, match="holds no names"):
        own_classes(block)  # type: ignore[arg-type]
    (tmp_path / "names.txt").write_text("traffic light\n\n dog \n")
    assert own_classes(block) == ["traffic light", "dog"]  # type: ignore[arg-type]
