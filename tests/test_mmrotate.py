"""mmrotate's rotated detectors as it installs them: read, distilled, handed back; its angles and its anchors against
ours."""

import copy
import importlib.util
import math
import os
import warnings

import pytest
import torch
from PIL import Image
from torch import nn

import distillkit
from distillkit import LD, FeatureImitation, LogitKD, Main, Valuable, to_distribution
from distillkit.adapters import adapter_for
from distillkit.adapters.mmrotate import MMRotate, MMRotateHead, from_mmrotate, to_mmrotate
from distillkit.boxes.rotated import corners, normalize
from distillkit.boxes.rotated_iou import aligned_rotated_iou
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.views import DenseDetections
from distillkit.data.dota import DotaDetection
from distillkit.data.scenes import Scenes
from distillkit.data.transforms import Resize
from distillkit.integrations import openmmlab
from tests.openmmlab_batches import as_loaded, learns_and_is_handed_back, predicted

if any(importlib.util.find_spec(name) is None for name in ("mmrotate", "mmdet", "mmengine", "mmcv")):
    pytest.skip("needs mmrotate, mmdet, mmengine and mmcv-lite", allow_module_level=True)

warnings.filterwarnings("ignore", module="mmrotate|mmdet|mmengine|torch.functional")
openmmlab.prepare("mmrotate")

from mmdet.models.task_modules import AnchorGenerator  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmrotate.structures import RotatedBoxes  # noqa: E402

DATA = os.environ.get("DISTILLKIT_DATA", "")
CONFIGS = {
    "retina": "rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py",
    "retina-le135": "rotated_retinanet/rotated-retinanet-rbox-le135_r50_fpn_1x_dota.py",
    "retina-upright-oc": "rotated_retinanet/rotated-retinanet-hbox-oc_r50_fpn_1x_dota.py",
    "fcos": "rotated_fcos/rotated-fcos-le90_r50_fpn_1x_dota.py",
    "fcos-csl": "rotated_fcos/rotated-fcos-hbox-le90_r50_fpn_csl-gaussian_1x_dota.py",
    "fcos-psc": "psc/rotated-fcos-hbox-le90_r50_fpn_psc-dual_1x_dota.py",
    "atss": "rotated_atss/rotated-atss-le90_r50_fpn_1x_dota.py",
    "rtmdet": "rotated_rtmdet/rotated_rtmdet_tiny-3x-dota.py",
    "rcnn": "oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py",
    "retina-csl": "csl/rotated-retinanet-rbox-le90_r50_fpn_csl-gaussian_amp-1x_dota.py",
}
#: last layers that are drawn so that a fresh model predicts something, and something that is no anchor
CLASSES = ("atss_cls", "conv_cls", "retina_cls", "rtm_cls.0", "rtm_cls.1", "rtm_cls.2")
NUMBERS = ("retina_reg", "atss_reg", "conv_reg", "conv_angle", "rtm_reg.0", "rtm_reg.1", "rtm_ang.0", "rtm_ang.1")


def config(name: str, channels: int = 16, width: int = 8):
    """A config of mmrotate whose model is narrow and has three classes; nothing is downloaded."""
    made = openmmlab.read_config(f"mmrotate::{CONFIGS[name]}")
    model = made.model
    model.backbone.init_cfg = None
    if name == "rtmdet":
        plain = {"norm_cfg": {"type": "BN"}}  # theirs waits for other ranks
        model.backbone.update(deepen_factor=0.1, widen_factor=width / 64, **plain)
        model.neck.update(
            in_channels=[4 * width, 8 * width, 16 * width], out_channels=channels, num_csp_blocks=1, **plain
        )
        model.bbox_head.update(plain)
    else:
        model.backbone.update(depth=18, base_channels=width)
        model.neck.update(in_channels=[width, 2 * width, 4 * width, 8 * width], out_channels=channels)
    if name == "rcnn":
        model.rpn_head.update(in_channels=channels, feat_channels=channels)
        model.roi_head.bbox_roi_extractor.out_channels = channels
        model.roi_head.bbox_head.update(in_channels=channels, fc_out_channels=channels, num_classes=3)
    else:
        model.bbox_head.update(in_channels=channels, feat_channels=channels, stacked_convs=1, num_classes=3)
    if name.startswith(("atss", "fcos")):
        model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 4, "requires_grad": True}
    return made


def detector(name: str, sure: bool = False, seed: int = 0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    model = openmmlab.build(config(name, **sizes))
    for path, module in model.bbox_head.named_modules() if sure else ():
        if path.endswith(CLASSES):
            nn.init.normal_(module.bias, -1.0, 0.5)
            nn.init.normal_(module.weight, std=0.1)
        if path.endswith(NUMBERS):
            nn.init.normal_(module.weight, std=0.05)
    return model


def pictures(real: bool = False) -> list:
    """(picture, rotated boxes, labels), of photographs with digits, or from the air."""
    if real:
        data = DotaDetection(f"{DATA}/hit_uav", "val", ["car", "bicycle", "person", "other-vehicle"], Resize(128))
        items = [data[0, i] for i in (48, 54)]
    else:
        data = Scenes(4, 96, rotated=True)
        items = [data[0, i] for i in range(2)]
    return [(picture, target["boxes"].float(), target["labels"] % 3) for picture, target in items]


def batch(model: nn.Module, shown: list | None = None) -> tuple:
    return as_loaded(model, pictures() if shown is None else shown, RotatedBoxes)


ONE_STAGE = [name for name in CONFIGS if name not in ("rcnn", "retina-csl")]


@pytest.mark.parametrize("name", ONE_STAGE)
def test_a_step_with_a_proven_teacher(name):
    """The boxes and scores that mmrotate predicts are those decoded from what is tapped, in every angle version."""
    student, teacher = detector(name, sure=True), detector(name, sure=True, seed=1, channels=32)
    model = distillkit.wrap(student, teacher, [LogitKD(Main()), LogitKD(Valuable()), FeatureImitation(weight=0.1)])
    model.train()
    call = batch(student)
    losses = model(*call, mode="loss")
    assert isinstance(model._adapter, MMRotateHead)
    assert not model._student_side.unproven
    assert not model._teacher_sides["teacher"].unproven
    assert all(losses[d] > 0 for d in model._uses)
    losses.total.backward()
    assert "pred_instances" not in call[1][0]
    alone, _ = student.parse_losses(student(*batch(student), mode="loss"))
    torch.testing.assert_close(losses.total - sum(losses[d] for d in model._uses), alone)


KD = lambda: [LogitKD(Main()), LogitKD(Valuable()), FeatureImitation(weight=0.1)]  # noqa: E731


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder with hit_uav"))])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize(
    ("name", "distillers"),
    [
        ("retina", KD), ("fcos", KD), ("atss", KD), ("rtmdet", KD),
        ("rcnn", lambda: [FeatureImitation(weight=0.1)]),
    ],
)  # fmt: skip
def test_an_unmodified_pair_learns_and_is_handed_back(name, distillers, real):
    sure = name != "rcnn"
    student, teacher = detector(name, sure), detector(name, sure, seed=1, channels=32)
    assert list(student.state_dict()) == list(detector(name).state_dict())
    shown = pictures(real)
    learns_and_is_handed_back(student, teacher, distillers(), lambda: batch(student, shown), 0.85)


# ---- distributions


@pytest.mark.parametrize("name", ["retina", "retina-upright-oc"])
def test_ld_on_rotated_retinanets_that_had_no_distributions(name):
    plain = [detector(name, sure=True), detector(name, sure=True, seed=1, channels=32)]
    student, teacher = (to_distribution(model) for model in plain)
    call = batch(student)
    for old, new in zip(plain, (student, teacher), strict=True):
        numbers = [m.eval()(call[0], mode="tensor")[1] for m in (old, new)]
        assert max(a.abs().max() for a in numbers[0]) > 0.1
        for a, b in zip(*numbers, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3 / 4)
    model = distillkit.wrap(student, teacher, [LD(Main()), LD(Valuable()), LogitKD(Main())]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    lds = []
    for _ in range(10):
        losses = model(*batch(student), mode="loss")
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        lds.append((losses["ld_main"] + losses["ld_valuable"]).item())
    assert not model._student_side.unproven
    assert not model._teacher_sides["teacher"].unproven
    assert lds[-1] < 0.9 * lds[0]
    assert student.bbox_head.retina_reg.logits.weight.grad.abs().sum() > 0
    keys = [k for k in student.state_dict() if "retina_reg" in k]
    assert keys == [f"bbox_head.retina_reg.{k}" for k in ("bins", "logits.weight", "logits.bias")]


def test_distributions_are_told_apart_by_anchor_and_number():
    """Channels (anchor, number, bin): the means of what is read are what the head returns, by its own order."""
    model = to_distribution(detector("retina", sure=True)).train()
    x, head = model.extract_feat(batch(model)[0]), model.bbox_head
    classes, numbers = head(x)
    edges = [head.retina_reg.logits(head.reg_convs[0](level)) for level in x]
    view = adapter_for(model).view(model, DenseDetections, [*classes, *edges], None)
    assert view.edges.shape == (5, 25)
    found = (view.edges.all().softmax(-1) * head.retina_reg.bins).sum(-1)
    expected = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 5) for level in numbers], 1)
    torch.testing.assert_close(found, expected)


def test_objects_and_heads_that_distributions_cannot_say():
    student = to_distribution(detector("retina"), bins=[b / 4 for b in range(-4, 5)])
    model = distillkit.wrap(student, copy.deepcopy(student), [LD(Main())]).train()
    picture = pictures()[0][0]
    long = torch.tensor([[48.0, 48, 80, 2, 0.4]])  # e^-1 of the smallest anchor's shorter side is about 8
    with pytest.raises(ValueError, match=r"boxes of target 0.*bins="):
        model(*batch(student, [(picture, long, torch.tensor([0]))]), mode="loss")
    other = to_distribution(detector("retina-le135", sure=True))
    model = distillkit.wrap(to_distribution(detector("retina", sure=True)), other, [LD(Main())]).train()
    with pytest.raises(ViewError, match=r"mean different things.*angle_version=le135, the student's le90; build both"):
        model(*batch(other), mode="loss")


@pytest.mark.parametrize("name", ["fcos", "fcos-csl"])
def test_a_head_without_distributions_says_so(name):
    student, teacher = detector(name, sure=True), detector(name, sure=True, seed=1)
    model = distillkit.wrap(student, teacher, [LD(Main())]).train()
    with pytest.raises(ViewError, match="has no edge distributions"):
        model(*batch(student), mode="loss")
    with pytest.raises(ValueError, match="its last regression layer is not known"):
        to_distribution(model.unwrap())


# ---- what is read


def test_regions_follow_the_detectors_own_anchors():
    seen = {}
    for name in ("retina", "retina-upright-oc", "atss", "fcos", "rtmdet"):
        model = detector(name).train()
        out = model(batch(model)[0], mode="tensor")
        seen[name] = adapter_for(model).view(model, DenseDetections, [t for part in out for t in part], None)
    assert (seen["atss"].centre, seen["atss"].octave, seen["atss"].anchors) == (0.0, 4.0, None)
    assert (seen["fcos"].centre, seen["fcos"].octave, seen["fcos"].anchors) == (0.5, 8.0, None)
    assert (seen["rtmdet"].centre, seen["rtmdet"].strides) == (0.0, (8, 16, 32))
    # mmrotate writes the same upright anchors with a turn of a quarter, some in le90 and all in oc
    sizes = seen["retina"].classes.sizes
    upright = AnchorGenerator(
        strides=[8, 16, 32, 64, 128], ratios=[1.0, 0.5, 2.0], octave_base_scale=4, scales_per_octave=3
    )
    expected = torch.cat(upright.grid_priors(sizes, device="cpu"))
    for name in ("retina", "retina-upright-oc"):
        written = detector(name).bbox_head.prior_generator.grid_priors(sizes, device="cpu")
        assert torch.cat([level.tensor for level in written])[:, 4].min() < -1.5
        torch.testing.assert_close(seen[name].anchors, expected, rtol=0, atol=1e-3)
        assert seen[name].edges is None


def test_targets_are_written_as_the_detector_writes_them():
    shown = [(pictures()[0][0], torch.tensor([[40.0, 40, 20, 50, 0.3], [60, 60, 30, 10, -0.5]]), torch.tensor([0, 1]))]
    for name, version in (("retina", "le90"), ("retina-le135", "le135"), ("retina-upright-oc", "oc"), ("rcnn", "le90")):
        model = detector(name)
        adapter = adapter_for(model)
        assert adapter.version == version
        targets = adapter.targets(batch(model, shown), {"mode": "loss"}, None)
        assert targets.sizes == [(96, 96)]
        theirs = RotatedBoxes(shown[0][1]).regularize_boxes(version)
        torch.testing.assert_close(targets.boxes[0], theirs)


def test_a_batch_of_distillkits_own_data_is_called_as_mmrotates():
    model = detector("fcos", sure=True).train()
    adapter, shown = adapter_for(model), pictures()
    args, kwargs = adapter.call(model, [p for p, _, _ in shown], [{"boxes": b, "labels": n} for _, b, n in shown])
    losses, expected = model(*args, **kwargs), model(*batch(model), mode="loss")
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=2e-2, atol=0)  # theirs were rounded to 8 bits
    args, kwargs = adapter.call(model.eval(), [p for p, _, _ in shown])
    found = adapter.detections(model, model(*args, **kwargs), [p for p, _, _ in shown])
    assert [row["boxes"].shape for row in found] == [(len(row["scores"]), 5) for row in found]
    assert sum(len(row["scores"]) for row in found) > 0


@pytest.mark.parametrize("name", ["rcnn", "retina-csl"])
def test_a_detector_of_another_kind_has_features(name):
    student, teacher = detector(name), detector(name, channels=32, seed=1)
    assert type(adapter_for(student)) is MMRotate
    model = distillkit.wrap(student, teacher, [FeatureImitation(weight=0.1)]).train()
    losses = model(*batch(student), mode="loss")
    assert losses["imitation"] > 0
    losses.total.backward()
    with pytest.raises(ViewError, match=r"has the head .*reads no detections; of RetinaHead, RotatedATSSHead"):
        distillkit.wrap(model.unwrap(), teacher, [LogitKD(Main())])


def test_a_head_that_returns_something_else_than_it_decodes_is_found_out():
    student, teacher = detector("fcos"), detector("fcos", sure=True)
    decode = teacher.bbox_head.angle_coder.decode
    adapter_for(teacher)
    wrapped = distillkit.wrap(student, teacher, [LogitKD(Main())]).train()
    adapter = wrapped._teacher_sides["teacher"].adapter
    adapter.angle_coder = copy.copy(adapter.angle_coder)
    adapter.angle_coder.decode = lambda angles, keepdim: decode(angles, keepdim=keepdim) + 0.1
    with pytest.raises(AdapterError, match="teacher: what RotatedFCOSHead returns does not explain"):
        wrapped(*batch(student), mode="loss")


# ---- inside mmengine's Runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with labels as DOTA's, and a teacher's checkpoint."""
    root = tmp_path_factory.mktemp("dota")
    scenes = Scenes(4, 96, rotated=True)
    for i in range(4):
        picture, target = scenes[0, i]
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(root / f"{i}.png")
        rows = zip(corners(target["boxes"]).flatten(1).tolist(), target["labels"].tolist(), strict=True)
        lines = [" ".join(f"{v:.2f}" for v in quad) + f" {'abc'[label % 3]} 0" for quad, label in rows]
        (root / f"{i}.txt").write_text("\n".join(lines))
    teacher = detector("fcos", sure=True, seed=1, channels=32)
    torch.save({"state_dict": teacher.state_dict(), "meta": {}}, root / "teacher.pth")
    return root


def test_a_runner_trains_a_config_of_mmrotate(folder, monkeypatch):
    # the scope that a Runner opens stays open
    monkeypatch.setattr(DefaultScope, "_instance_dict", DefaultScope._instance_dict.copy())
    from mmrotate.utils import register_all_modules

    import distillkit.integrations.mmengine  # noqa: F401  what custom_imports does

    register_all_modules(init_default_scope=False)
    steps = [
        {"type": "mmdet.LoadImageFromFile"},
        {"type": "mmdet.LoadAnnotations", "with_bbox": True, "box_type": "qbox"},
        {"type": "ConvertBoxType", "box_type_mapping": {"gt_bboxes": "rbox"}},
        {"type": "mmdet.Resize", "scale": (96, 96), "keep_ratio": True},
        {"type": "mmdet.PackDetInputs"},
    ]
    data = {
        "type": "DOTADataset",
        "data_root": str(folder),
        "ann_file": f"{folder}/",
        "data_prefix": {"img_path": ""},
        "metainfo": {"classes": ("a", "b", "c")},
        "pipeline": steps,
    }
    sampler = {"type": "DefaultSampler", "shuffle": True}
    kd = [{"type": "LogitKD", "region": {"type": name}} for name in ("Main", "Valuable")]
    runner = Runner.from_cfg(
        Config(
            {
                "default_scope": "mmrotate",
                "model": {
                    "type": "DistilledDetector",
                    "student": config("fcos").model,
                    "teacher": {"config": config("fcos", 32).model, "checkpoint": str(folder / "teacher.pth")},
                    "distillers": [*kd, {"type": "FeatureImitation", "weight": 0.1}],
                },
                "work_dir": str(folder / "work"),
                "train_dataloader": {"batch_size": 2, "num_workers": 0, "sampler": sampler, "dataset": data},
                "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 1},
                "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}},
                "log_level": "ERROR",
                "experiment_name": "rotated",
                "randomness": {"seed": 0},
            }
        )
    )
    model, logged = runner.model, []
    step = model.train_step
    model.train_step = lambda *a, **k: (logged.append(step(*a, **k)), logged[-1])[1]
    runner.train()
    assert type(adapter_for(model.student)) is MMRotateHead
    assert len(logged) == 2
    for losses in logged:
        names = ["loss_cls", "loss_bbox", "loss_centerness", "loss_kd_main", "loss_kd_valuable", "loss_imitation"]
        assert list(losses) == ["loss", *names]
        assert losses["loss"].item() == pytest.approx(sum(losses[n].item() for n in names), rel=1e-5)
        assert all(losses[n] > 0 for n in names[3:])
    saved = torch.load(folder / "work" / "epoch_1.pth", weights_only=True)["state_dict"]
    own = [name for name in saved if not name.startswith("distilled.")]
    assert own == list(model.student.state_dict())
    alone = openmmlab.build(config("fcos"), folder / "work" / "epoch_1.pth")
    call = batch(alone)
    with torch.no_grad():
        through = model.eval()(call[0], copy.deepcopy(call[1]), mode="predict")
    for row, expected in zip(through, predicted(alone, call), strict=True):
        torch.testing.assert_close(row.pred_instances.scores, expected[:, 5], rtol=0, atol=0)


# ---- angles


def some_boxes() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    random = torch.rand(200, 5, generator=g, dtype=torch.float64)
    boxes = random * torch.tensor([90, 90, 40, 40, 6.0]) + torch.tensor([0, 0, 5, 5, -3.0])
    special = [[40, 40, 30, 10, angle] for angle in (0, math.pi / 2, -math.pi / 2, math.pi / 4, -math.pi / 4, math.pi)]
    return torch.cat([boxes, torch.tensor(special, dtype=torch.float64)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("version", "low", "span"),
    [("le90", -math.pi / 2, math.pi), ("le135", -math.pi / 4, math.pi), ("oc", -math.pi / 2, math.pi / 2)],
)
def test_angles_are_mapped_onto_mmrotates_and_back(version, low, span, dtype):
    boxes = some_boxes().to(dtype)
    theirs = to_mmrotate(boxes, version)
    regular = RotatedBoxes(boxes.clone()).regularize_boxes(version)
    away = ((regular[:, 4] - low) > 1e-5) & (low + span - regular[:, 4] > 1e-5)  # at the ends rounding may choose
    assert away.sum() > 190
    torch.testing.assert_close(theirs[away], regular[away], rtol=1e-5, atol=1e-4)
    ends = torch.tensor([low, low + span], dtype=dtype)
    assert ((theirs[:, 4] >= ends[0]) & (theirs[:, 4] < ends[1])).all()
    for there in (theirs, from_mmrotate(regular, version), from_mmrotate(theirs, version)):
        assert aligned_rotated_iou(boxes, there).min() > 0.999
    back = from_mmrotate(theirs, version)[away]
    torch.testing.assert_close(back, normalize(boxes, version)[away], rtol=1e-5, atol=1e-4)
    assert torch.equal(to_mmrotate(boxes, "r360"), boxes)


def test_both_turn_clockwise_as_seen():
    boxes = some_boxes()[:20]
    theirs = RotatedBoxes(boxes).convert_to("qbox").tensor.view(-1, 4, 2)
    assert torch.cdist(corners(boxes), theirs).amin(2).max() < 1e-4
    with pytest.raises(ValueError, match="'le90', 'le135' or 'oc', got 'le180'"):
        to_mmrotate(boxes, "le180")
