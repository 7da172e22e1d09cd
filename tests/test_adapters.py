"""The adapter of dense heads: it proves itself, matches unequal heads, and lets the teacher do no more than is read."""

import dataclasses
import logging
import os

import pytest
import torch
from torch import nn

import distillkit
from distillkit import LD, BoxTargets, DenseDetections, DistributionHead, FeatureImitation, LogitKD, Main, Valuable
from distillkit.adapters.gfl import gfl
from distillkit.boxes.distribution import decode, encode, integral
from distillkit.boxes.maps import Maps
from distillkit.core.errors import AdapterError, TapError, ViewError
from distillkit.models.gfl import GFL

SMALL = {"channels": 16, "convs": 1, "groups": 4, "bins": 8, "strides": (8, 16, 32)}
GFL_HEAD = {"classes": "head.gfl_cls", "edges": "head.scales.*", "strides": (8, 16, 32), "bins": 8}


def detector(classes: int = 3, sure: bool = True, **options) -> GFL:
    """A small GFL that predicts something: its class logits are not all near the prior."""
    torch.manual_seed(0)
    model = GFL(classes, "test_resnet", **{**SMALL, **options})
    if sure:
        nn.init.zeros_(model.head.gfl_cls.bias)
        nn.init.normal_(model.head.gfl_reg.weight, std=0.3)
        for i, scale in enumerate(model.head.scales):
            nn.init.constant_(scale.scale, 1.5 + i)
    return model


def scene() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 96, generator=g), torch.rand(3, 96, 64, generator=g)]
    boxes = torch.tensor([[8.0, 8, 40, 50], [30, 20, 60, 60]])
    return images, [{"boxes": boxes, "labels": torch.tensor([0, 2])}, {"boxes": boxes[:1], "labels": torch.tensor([1])}]


def test_a_detector_named_by_paths_gives_the_same_as_one_that_is_known():
    student, teacher = detector(sure=False), detector()
    known = distillkit.wrap(student, teacher, [LD(Main()), LD(Valuable()), LogitKD(Main())])
    a = known(*scene())
    assert known._teacher_sides["teacher"].unproven is False
    known.unwrap()
    named = distillkit.wrap(
        student, teacher, [LD(Main()), LD(Valuable()), LogitKD(Main())], adapter=DistributionHead(**GFL_HEAD)
    )
    b = named(*scene())
    assert list(a) == ["loss_cls", "loss_bbox", "loss_dfl", "ld_main", "ld_valuable", "kd_main", "output"]
    for name in list(a)[:-1]:
        torch.testing.assert_close(a[name], b[name])
        assert a[name] > 0


def test_a_teacher_of_a_known_family_is_read_by_its_own_adapter():
    """Student and teacher are of one class, and the adapter that is given describes the student alone."""
    student, teacher = detector(strides=(8, 16)), detector()
    model = distillkit.wrap(student, teacher, [LD()], adapter=gfl(student))
    model([torch.rand(3, 64, 64)], scene()[1][:1])
    assert model._teacher_sides["teacher"].adapter.strides == (8, 16, 32)


def test_a_teacher_of_no_known_family_is_read_as_the_student_is():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = detector()

        def forward(self, *args):
            return self.inner(*args)

    paths = {"classes": "inner.head.gfl_cls", "edges": "inner.head.scales.*"}
    model = distillkit.wrap(Mine(), Mine(), [LD()], adapter=DistributionHead(**{**GFL_HEAD, **paths}))
    assert model(*scene())["ld_main"].requires_grad
    assert model._teacher_sides["teacher"].adapter is model._student_side.adapter


def test_a_tap_before_the_scale_is_found_out():
    head = DistributionHead(**{**GFL_HEAD, "edges": "head.gfl_reg"})
    model = distillkit.wrap(
        detector(), distillkit.Teacher(detector(), adapter=DistributionHead(**GFL_HEAD)), [LD()], adapter=head
    )
    with pytest.raises(AdapterError, match=r"student: the tapped distributions do not explain.*head\.gfl_reg"):
        model(*scene())


def test_a_wrong_centre_is_found_out_and_the_right_one_named():
    head = DistributionHead(**GFL_HEAD, centre=0.5)
    model = distillkit.wrap(detector(), detector(), [LD()], adapter=head)
    with pytest.raises(AdapterError, match=r"With centre=0\.0 it would fit"):
        model(*scene())


ALL_STRIDES = (8, 16, 32, 64, 128)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("wrong", "word"), [({"edges": "head.gfl_reg"}, "gfl_reg"), ({"centre": 0.5}, "centre=0.0")])
def test_bfloat16_hides_nothing(weights, wrong, word):
    """Coarse levels have bins of 128 pixels: a tolerance in strides would let everything pass."""
    paths = {**GFL_HEAD, "strides": ALL_STRIDES}
    student = detector(strides=ALL_STRIDES).to(weights)
    for scale in student.head.scales:
        nn.init.constant_(scale.scale, 1.25)
    head = DistributionHead(**{**paths, **wrong})
    model = distillkit.wrap(student, detector(strides=ALL_STRIDES), [LD()], adapter=head)
    images = [torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(1))]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AdapterError, match=rf"student: .*boxes.*{word}"):
        model(images, scene()[1][:1])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quality", [False, True])
def test_the_proof_holds_in_bfloat16(weights, quality):
    student = detector(strides=ALL_STRIDES, quality=quality).to(weights)
    model = distillkit.wrap(student, detector(strides=ALL_STRIDES), [LD()])
    with torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 256, 256)], scene()[1][:1])
    assert not model._student_side.unproven


def test_class_logits_that_are_none_are_found_out():
    head = DistributionHead(**{**GFL_HEAD, "classes": "head.cls_convs.0.conv"})
    model = distillkit.wrap(detector(), detector(), [LD()], adapter=head)
    with pytest.raises(
        AdapterError, match=r"student: the tapped class logits do not explain.*head\.cls_convs\.0\.conv"
    ):
        model(*scene())


def test_fewer_class_channels_than_labels_are_found_out():
    head = DistributionHead(**{**GFL_HEAD, "classes": "head.gfl_cls[1:]"})
    model = distillkit.wrap(detector(), detector(), [LD()], adapter=head)
    with pytest.raises(AdapterError, match=r"label 2 in picture 0.*gfl_cls\[1:\] has 2 classes"):
        model(*scene())


def test_a_score_with_a_quality_needs_the_views_scores():
    """GFLv2 read as though it were GFL: its scores are not the sigmoid of its class logits."""
    model = distillkit.wrap(
        detector(quality=True), detector(quality=True), [LD()], adapter=DistributionHead(**GFL_HEAD)
    )
    with pytest.raises(AdapterError, match=r"do not explain the detector's own scores.*the view's scores="):
        model(*scene())


def test_a_model_that_predicts_nothing_yet_is_proven_later():
    student = detector(sure=False)
    model = distillkit.wrap(student, detector(), [LD()])
    model(*scene())
    assert model._student_side.unproven
    nn.init.constant_(student.head.gfl_cls.bias, 1.0)
    for _ in range(3):  # looked at again at calls 2, 4, 8, ...
        model(*scene())
    assert not model._student_side.unproven


def test_the_proof_leaves_modes_and_statistics_as_they_were():
    student = detector()
    student.backbone.eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    model = distillkit.wrap(student, detector(), [LD()])
    model(*scene())
    assert not student.backbone.conv1.training
    assert student.head.training
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_a_detector_that_predicts_in_another_form():
    class Raw(GFL):
        def forward(self, images, targets=None):
            return super().forward(images, targets) if self.training else super().forward(images)[0]["boxes"]

    torch.manual_seed(0)
    student = Raw(3, "test_resnet", **SMALL)
    model = distillkit.wrap(student, detector(), [LD()])
    with pytest.raises(AdapterError, match=r"in eval mode the detector returns Tensor.*dict\(boxes"):
        model(*scene())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": 9}, r"32 channels.*4 edges x 9 bins"),
        ({"strides": (8, 16)}, r"fired 3 times in one forward, declared 2"),
        ({"edges": ["head.scales.0"]}, r"1 paths for 3 strides"),
        ({"classes": "head.cls"}, r"nearest:.*'head.gfl_cls'"),
    ],
)
def test_wrong_names_and_numbers(change, message):
    with pytest.raises((ViewError, TapError), match=message):
        distillkit.wrap(detector(), detector(), [LD()], adapter=DistributionHead(**{**GFL_HEAD, **change}))(*scene())


def test_strides_are_one_a_level():
    with pytest.raises(ValueError, match=r"strides must be one number a level, .*got 8"):
        DistributionHead(**{**GFL_HEAD, "strides": 8})


def test_several_anchors_a_cell_are_refused_in_words_that_help():
    """Half as many bins look like two anchors a cell."""
    with pytest.raises(ViewError, match=r"32 channels, 2 anchors a cell of 4 edges x 4 bins.*DenseDetections\.anchors"):
        distillkit.wrap(detector(), detector(), [LD()], adapter=DistributionHead(**{**GFL_HEAD, "bins": 4}))(*scene())


def test_a_channel_range_of_features_has_its_own_width():
    paths = ("head.gfl_reg[:12]", "head.gfl_reg[4:][:-2]", "head.gfl_reg")
    assert DistributionHead(**GFL_HEAD).widths(detector(), distillkit.Features, paths) == [12, 26, 32]
    student, teacher = (nn.Sequential(nn.Conv2d(3, 8, 1)) for _ in range(2))
    imitation = FeatureImitation(student_at="0[:5]", teacher_at="0[2:]")
    model = distillkit.wrap(student, teacher, [imitation], criterion=lambda output, targets: output.mean())
    assert [p.weight.shape for p in imitation.projections] == [(6, 5)]
    model(torch.rand(1, 3, 4, 4), None).total.backward()
    assert imitation.projections[0].weight.grad.any()


def test_features_without_a_place_name_the_argument_of_either_side():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(ViewError, match=r"teacher_at='layer4' for a teacher"):
        distillkit.wrap(plain, nn.Sequential(nn.Conv2d(3, 4, 1)), [FeatureImitation(student_at="0")])


def test_different_classes_are_named():
    with pytest.raises(ViewError, match=r"^distiller 'kd_main': the student has 3 classes, the teacher 4"):
        distillkit.wrap(detector(), detector(classes=4), [LogitKD(Main())])(*scene())
    distillkit.wrap(detector(), detector(classes=4), [LD()])(*scene())  # LD does not look at classes


def test_a_level_without_partner():
    with pytest.raises(
        ViewError, match=r"distiller 'ld_main': the student's level of stride 32 has no partner.*\(8, 16\)"
    ):
        distillkit.wrap(detector(), detector(strides=(8, 16)), [LD()])(*scene())


def test_a_teachers_extra_level_is_left_out_and_named(caplog):
    model = distillkit.wrap(detector(strides=(8, 16)), detector(), [LD()])
    with caplog.at_level(logging.INFO, "distillkit"):
        model([torch.rand(3, 64, 64)], scene()[1][:1])
    assert "level of stride 32 is left out" in caplog.text


def test_pictures_and_targets_may_be_given_by_name():
    images, targets = scene()
    model = distillkit.wrap(detector(), detector(), [LD()])
    by_name = model(targets=targets, images=images)
    torch.testing.assert_close(by_name["ld_main"], model(images, targets)["ld_main"])


def test_bad_targets():
    model = distillkit.wrap(detector(), detector(), [LD()])
    with pytest.raises(ValueError, match=r"target 0: .*boxes"):
        model(scene()[0], [{"labels": torch.tensor([1])}, {}])


@pytest.mark.parametrize("box", [[8.0, 8, 8, 50], [8, 50, 40, 8], [8, 8, torch.inf, 50], [torch.nan, 8, 40, 50]])
def test_boxes_without_area_are_refused_before_any_distiller(box):
    """Also for a student that does not look at its targets."""
    rows = [{"boxes": torch.tensor([[8.0, 8, 40, 50], box]), "labels": torch.tensor([0, 1])}]
    with pytest.raises(ValueError, match=r"target 0: box 1 is \["):
        DistributionHead(**GFL_HEAD).targets((scene()[0][:1], rows), {}, None)


def test_only_features_read_the_teachers_head_does_not_run():
    teacher = detector()
    ran = []
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    model = distillkit.wrap(detector(), teacher, [FeatureImitation("whole")])
    losses = model(*scene())
    assert losses["imitation"].requires_grad
    assert "neck" in ran
    assert not any(name.startswith("head") for name in ran)


def test_features_of_another_width_get_a_projection_that_is_trained():
    student = detector()
    model = distillkit.wrap(student, detector(channels=32, groups=8), [FeatureImitation("whole")])
    losses = model(*scene())
    losses.total.backward()
    projections = [p for n, p in model.named_parameters() if "projections" in n]
    assert projections
    assert all(p.grad is not None for p in projections)
    assert list(student.state_dict()) == list(detector().state_dict())


def test_gflv2_scores_are_logit_times_quality():
    model = detector(quality=True)
    wrapped = distillkit.wrap(model, detector(quality=True), [LD()])
    wrapped(*scene())
    reading = next(iter(wrapped._student_side.places))
    _, views = wrapped._student_side.run(scene(), {}, exit_early=False)
    view = views[reading]
    classes, edges = model.forward_raw(model.batch(scene()[0])[0])
    for got, wanted in zip(view.scores.levels, model.head.scores(classes, edges), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_detector_pair_compiles_without_a_graph_break():
    images, targets = torch.rand(2, 3, 64, 64), scene()[1]
    model = distillkit.wrap(detector(), detector(bins=8), [LD(Main()), LD(Valuable()), LogitKD(Main())])
    eager = model(images, targets)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images, targets)
    for name in ("loss_cls", "loss_bbox", "loss_dfl", "ld_main", "ld_valuable", "kd_main"):
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-4, atol=1e-6)
    compiled.total.backward()


# ---- matching


def dense(centre: float, logits: torch.Tensor, strides=(8,)) -> DenseDetections:
    maps = tuple(logits for _ in strides)
    classes = tuple(torch.zeros(1, 2, *m.shape[-2:]) for m in maps)
    return DenseDetections(Maps(classes, (2,)), Maps(maps, (4, 8)), strides, centre=centre)


def test_distributions_seen_from_another_point_mean_the_same_box():
    g = torch.Generator().manual_seed(0)
    box = torch.tensor([[20.0, 17.0, 52.0, 50.0]])
    corner, middle = torch.tensor([[32.0, 32.0]]), torch.tensor([[36.0, 36.0]])
    distances = encode(corner, box)[0] / 8
    low = distances.floor()
    p = torch.zeros(4, 8)
    p[range(4), low.long()] = 1 - (distances - low)
    p[range(4), low.long() + 1] = distances - low
    logits = (p + 1e-9).log().reshape(1, 32, 1, 1) + torch.randn(1, generator=g)
    teacher, student = dense(0.0, logits), dense(0.5, torch.zeros(1, 32, 1, 1))
    seen = teacher.match(student).edges.all()[0]
    torch.testing.assert_close(decode(middle, integral(seen) * 8), box, rtol=1e-4, atol=1e-3)


# ---- somebody else's detectors

DATA = os.environ.get("DISTILLKIT_DATA")


@pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder that holds weights_nanodet and coco_mini")
def test_nanodets_are_matched_and_prove_themselves(caplog):
    from distillkit.data.coco import CocoDetection
    from distillkit.data.transforms import Resize
    from distillkit.models.nanodet import nanodet

    data = CocoDetection(f"{DATA}/coco_mini", "annotations/val.json", transform=Resize((416, 416)))
    image, target = data[(0, 0)]
    student, teacher = nanodet("nanodet-m"), nanodet("nanodet-plus-m_416")
    model = distillkit.wrap(student, teacher, [LD(Main()), LD(Valuable()), LogitKD(Main())])
    with caplog.at_level(logging.INFO, "distillkit"):
        losses = model([image], [target])
    assert not model._student_side.unproven
    assert not model._teacher_sides["teacher"].unproven
    assert "stride 64" in caplog.text
    assert "moved by 0.5 strides" in caplog.text
    losses.total.backward()

    views = {}
    student.eval()
    for side in (model._student_side, model._teacher_sides["teacher"]):
        with torch.no_grad():
            views[side.role] = next(
                iter(side.run(*side.adapter.without_targets(([image], [target]), {}), exit_early=False)[1].values())
            )
    targets = BoxTargets([target["boxes"]], [target["labels"]], [(416, 416)])
    matched = views["teacher"].match(views["student"])
    naive = dataclasses.replace(matched, edges=Maps(matched.edges.levels, matched.edges.shape))
    loss = LD(Main(), temperature=1.0, anchor_weight="one")
    assert loss(views["student"], naive, targets) > 1.3 * loss(views["student"], matched, targets)
