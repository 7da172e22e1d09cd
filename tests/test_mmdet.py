"""mmdet's detectors as it installs them: read, distilled, handed back; its LD and its GFL against ours."""

import importlib.util
import logging
import os
import warnings

import pytest
import torch
from torch import nn

import distillkit
from distillkit import LD, FeatureImitation, LogitKD, Main, Teacher, Valuable, to_distribution
from distillkit.adapters import adapter_for
from distillkit.adapters.mmdet import REMEMBERED, MMDet, MMDetHead
from distillkit.bench.counting import Dispatched
from distillkit.core.errors import AdapterError, ViewError
from distillkit.core.views import DenseDetections
from distillkit.data.coco import CocoDetection
from distillkit.data.scenes import Scenes
from distillkit.data.transforms import Resize
from distillkit.evaluation.coco import coco_metrics
from distillkit.integrations import openmmlab
from distillkit.models.gfl import GFL, load_openmmlab
from tests.openmmlab_batches import as_loaded, learns_and_is_handed_back

if any(importlib.util.find_spec(name) is None for name in ("mmdet", "mmengine", "mmcv")):
    pytest.skip("needs mmdet, mmengine and mmcv-lite", allow_module_level=True)

warnings.filterwarnings("ignore", module="mmdet|mmengine|torch.functional")
openmmlab.prepare()


DATA = os.environ.get("DISTILLKIT_DATA", "")
CONFIGS = {
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
    "ld": "ld/ld_r18-gflv1-r101_fpn_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "retina": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "fcos-normed": "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "vfnet": "vfnet/vfnet_r50_fpn_1x_coco.py",
    "faster": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "detr": "detr/detr_r50_8xb2-150e_coco.py",
}
#: the last layers that say the classes, drawn so that a fresh model predicts something
CLASSES = ("gfl_cls", "atss_cls", "conv_cls", "retina_cls", "rtm_cls.0", "rtm_cls.1", "rtm_cls.2")


def config(name: str, channels: int = 16, width: int = 8):
    """The model block of a config of mmdet, narrow and with three classes; nothing is downloaded."""
    model = openmmlab.read_config(f"mmdet::{CONFIGS[name]}").model
    model.backbone.init_cfg = None
    if name == "rtmdet":
        model.backbone.update(deepen_factor=0.1, widen_factor=width / 64)
        model.neck.update(in_channels=[4 * width, 8 * width, 16 * width], out_channels=channels, num_csp_blocks=1)
        model.data_preprocessor.batch_augments = None  # draws sizes
    else:
        widths = [width, 2 * width, 4 * width, 8 * width]
        model.backbone.update(depth=18, base_channels=width)
        model.neck.update(in_channels=widths[-1:] if name == "detr" else widths, out_channels=channels)
    if name == "detr":
        layer = {
            "self_attn_cfg": {"embed_dims": channels, "num_heads": 2},
            "ffn_cfg": {"embed_dims": channels, "feedforward_channels": 32},
        }
        model.update(num_queries=10, positional_encoding={"num_feats": channels // 2, "normalize": True})
        model.encoder = {"num_layers": 1, "layer_cfg": layer}
        cross = {"cross_attn_cfg": {"embed_dims": channels, "num_heads": 2}}
        model.decoder = {"num_layers": 1, "layer_cfg": {**layer, **cross}, "return_intermediate": True}
        model.bbox_head.update(num_classes=3, embed_dims=channels)
    elif "bbox_head" in model:
        model.bbox_head.update(in_channels=channels, feat_channels=channels, stacked_convs=1, num_classes=3)
    elif name == "faster":
        model.rpn_head.update(in_channels=channels, feat_channels=channels)
        model.roi_head.bbox_roi_extractor.out_channels = channels
        model.roi_head.bbox_head.update(in_channels=channels, fc_out_channels=channels, num_classes=3)
    if name in ("gfl", "ld", "atss", "fcos", "fcos-normed", "vfnet"):
        model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 4, "requires_grad": True}
    return model


def detector(name: str, sure: bool = False, seed: int = 0, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    model = openmmlab.build(config(name, **sizes))
    for path, module in model.bbox_head.named_modules() if sure else ():
        if path.endswith(CLASSES):
            nn.init.normal_(module.bias, -1.0, 0.5)
            nn.init.normal_(module.weight, std=0.1)
        if path == "gfl_reg":
            nn.init.normal_(module.weight, std=0.3)
    return model


def pictures(real: bool = False) -> list:
    """(picture, boxes, labels), of photographs with digits, or of COCO."""
    if not real:
        items = [Scenes(4, 96)[0, i] for i in range(2)]
        return [(items[0][0], items[0][1]["boxes"], items[0][1]["labels"] % 3),
                (items[1][0][:, :72], *lower(items[1][1], 72))]  # fmt: skip
    data = CocoDetection(f"{DATA}/coco_mini", "annotations/val.json", transform=Resize((128, 128)))
    items = [data[0, i] for i in range(2)]
    return [(picture, target["boxes"], target["labels"] % 3) for picture, target in items]


def lower(target: dict, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What of the boxes is left where the picture ends earlier."""
    boxes = target["boxes"].clone()
    boxes[:, 1::2].clamp_(max=height)
    keep = boxes[:, 3] - boxes[:, 1] > 2
    return boxes[keep], target["labels"][keep] % 3


def batch(model: nn.Module, shown: list | None = None):
    return as_loaded(model, pictures() if shown is None else shown, lambda boxes: boxes)


DISTILLERS = {
    "gfl": lambda: [LD(Main()), LD(Valuable()), LogitKD(Main())],
    "atss": lambda: [LogitKD(Main()), FeatureImitation(weight=0.1)],
    "retina": lambda: [LogitKD(Main())],
    "fcos": lambda: [LogitKD(Main())],
    "fcos-normed": lambda: [LogitKD(Main())],
    "rtmdet": lambda: [LogitKD(Main()), FeatureImitation(weight=0.1)],
}


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_step_with_a_proven_teacher(name):
    student, teacher = detector(name, sure=True), detector(name, sure=True, seed=1)
    own = [m.training for m in student.train().modules()]
    model = distillkit.wrap(student, teacher, DISTILLERS[name]())
    call = batch(student)
    losses = model(*call, mode="loss")
    assert isinstance(model._adapter, MMDetHead)
    assert not model._student_side.unproven
    assert not model._teacher_sides["teacher"].unproven
    assert all(losses[d] > 0 for d in model._uses)
    losses.total.backward()
    assert [m.training for m in student.modules()] == own
    assert "pred_instances" not in call[1][0], "the call's data samples are mmdet's and were written into"
    # what the student says itself is what mmengine would have added up
    alone, _ = student.parse_losses(student(*call, mode="loss"))
    torch.testing.assert_close(losses.total - sum(losses[d] for d in model._uses), alone)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder with coco_mini"))])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("name", ["gfl", "atss", "rtmdet"])
def test_an_unmodified_pair_learns_and_is_handed_back(name, real):
    student, teacher = detector(name, sure=True), detector(name, sure=True, seed=1, channels=32)
    shown = pictures(real)
    learns_and_is_handed_back(student, teacher, DISTILLERS[name](), lambda: batch(student, shown), 0.8)


def counted(monkeypatch, *methods: tuple[object, str]) -> list[str]:
    """Names of the methods that are called from now on."""
    called: list[str] = []
    for owner, name in methods:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (called.append(name), real(*a, **k))[1])
    return called


def test_the_teacher_runs_no_further_than_it_is_read(monkeypatch):
    student, teacher = detector("gfl"), detector("gfl", sure=True)
    head = teacher.bbox_head
    called = counted(monkeypatch, (head, "predict_by_feat"), (head, "loss_by_feat"), (head, "forward_single"))
    model = distillkit.wrap(student, teacher, [LD()]).train()
    model(*batch(student), mode="loss")  # with the proof, which predicts
    assert called.count("predict_by_feat") == 1
    called.clear()
    model(*batch(student), mode="loss")
    assert set(called) == {"forward_single"}
    model.unwrap()
    called.clear()
    distillkit.wrap(student, teacher, [FeatureImitation()]).train()(*batch(student), mode="loss")
    assert called == []


def test_ld_is_that_of_mmdet_and_keeps_its_strength_when_the_picture_is_repeated():
    """mmdet 3.3's LDHead sums over the anchors of the batch, as the release; ours in that convention equals it."""
    own = config("ld")
    own.update(teacher_config={"model": config("gfl")}, teacher_ckpt=None)
    torch.manual_seed(0)
    theirs = openmmlab.build(own)
    theirs.train()
    student, teacher = detector("gfl", sure=True), detector("gfl", sure=True, seed=1)
    theirs.load_state_dict(student.state_dict())
    theirs.teacher_model.load_state_dict(teacher.state_dict())
    theirs.teacher_model.eval()
    call = batch(student, pictures()[1:])
    many = batch(student, pictures()[1:] * 8)
    found = {}
    for convention in ("release", "default"):
        model = distillkit.wrap(student, teacher, [LD(Main(), convention=convention)]).train()
        found[convention] = [model(*c, mode="loss")["ld_main"].item() for c in (call, many)]
        model.unwrap()
    expected = [sum(theirs(*c, mode="loss")["loss_ld"]).item() for c in (call, many)]
    assert expected[0] > 1e-2
    assert found["release"] == pytest.approx(expected, rel=1e-5)
    assert expected[1] == pytest.approx(8 * expected[0], rel=1e-4)
    assert found["default"][1] == pytest.approx(found["default"][0], rel=1e-5)
    assert found["default"][0] == pytest.approx(3 * expected[0], rel=1e-5)  # the release's three images a GPU


def test_our_gfl_with_copied_weights_is_mmdets(tmp_path):
    theirs = detector("gfl", sure=True, channels=32, width=64).eval()
    torch.save({"state_dict": theirs.state_dict(), "meta": {}}, tmp_path / "gfl.pth")
    ours = load_openmmlab(GFL(3, "resnet18", channels=32, convs=1, groups=4), tmp_path / "gfl.pth").eval()
    items = [Scenes(6, 128, split="test")[0, i][0] for i in range(6)]
    shown = [(x, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)) for x in items]
    inputs, samples = batch(theirs, shown)
    with torch.no_grad():
        expected = theirs(inputs, mode="tensor")
        normalised = torch.stack([((x * 255).round() / 255 - ours.mean) / ours.std for x in items])
        found = ours.head(ours.neck(ours.backbone(normalised)))
        for mine, its in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-4)
        mine = ours([(x * 255).round() / 255 for x in items])
        for sample in samples:
            sample.set_metainfo({"scale_factor": (1.0, 1.0)})
        its = [r.pred_instances for r in theirs(inputs, samples, mode="predict")]
    # objects are what theirs found, moved: so that there is an mAP, of models that were not trained
    g = torch.Generator().manual_seed(0)
    objects, counts = [], torch.zeros(3)
    for i, row in enumerate(its):
        for box, label in zip(row.bboxes[::9], row.labels[::9].tolist(), strict=True):
            x1, y1, x2, y2 = (box + 3 * torch.randn(4, generator=g)).tolist()
            x2, y2 = max(x2, x1 + 2), max(y2, y1 + 2)
            sides = [x1, y1, x2 - x1, y2 - y1]
            counts[label] += 1
            objects.append({"id": len(objects) + 1, "image_id": i, "category_id": label, "bbox": sides,
                            "area": sides[2] * sides[3], "iscrowd": 0})  # fmt: skip
    truth = {"images": [{"id": i, "width": 128, "height": 128} for i in range(6)], "annotations": objects,
             "categories": [{"id": i, "name": str(i)} for i in range(3)]}  # fmt: skip
    scores = [
        coco_metrics(rows(p), truth)
        for p in (mine, [{"boxes": r.bboxes, "scores": r.scores, "labels": r.labels} for r in its])
    ]
    assert 0.02 < scores[1].ap < 0.98
    assert scores[0].ap == pytest.approx(scores[1].ap, abs=1e-3)


def rows(predictions: list) -> list[dict]:
    """As COCO's results."""
    return [
        {"image_id": i, "category_id": int(label), "score": float(score),
         "bbox": [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]}
        for i, row in enumerate(predictions)
        for b, score, label in zip(row["boxes"], row["scores"], row["labels"], strict=True)
    ]  # fmt: skip


# ---- what is read


def test_regions_follow_the_detectors_own_anchors():
    """RetinaNet has nine of them a cell, FCOS points in the middle."""
    seen = {}
    for name in ("gfl", "atss", "fcos", "rtmdet", "retina"):
        model = detector(name).train()
        adapter = adapter_for(model)
        call = batch(model)
        out = model(call[0], mode="tensor")
        levels = [t for part in out for t in part]
        seen[name] = adapter.view(model, DenseDetections, levels, None)
    assert (seen["gfl"].centre, seen["gfl"].octave, seen["gfl"].anchors) == (0.0, 8.0, None)
    assert (seen["atss"].centre, seen["atss"].octave, seen["atss"].anchors) == (0.0, 8.0, None)
    assert seen["fcos"].centre == 0.5
    assert (seen["rtmdet"].centre, seen["rtmdet"].strides) == (0, (8, 16, 32))
    retina = detector("retina").bbox_head
    own = torch.cat(retina.prior_generator.grid_priors(seen["retina"].classes.sizes, device="cpu"))
    assert torch.equal(seen["retina"].anchors, own)
    assert seen["retina"].classes.anchors == 9
    assert seen["gfl"].edges.shape == (4, 17)
    assert seen["atss"].scores.levels[0].max() < seen["atss"].classes.levels[0].sigmoid().max()


def test_scores_are_computed_where_they_are_read():
    """ATSS multiplies its class probabilities by a centerness: nothing is, unless an anchor is weighed by it."""
    model = detector("atss").train()
    classes, boxes, centerness = model(batch(model)[0], mode="tensor")
    adapter = adapter_for(model)
    with Dispatched() as ran:
        view = adapter.view(model, DenseDetections, [*classes, *boxes, *centerness], None)
    assert not ran.operations
    expected = torch.cat(
        [(c.sigmoid() * f.sigmoid()).flatten(2).mT for c, f in zip(classes, centerness, strict=True)], 1
    )
    torch.testing.assert_close(view.scores.all(), expected.detach())
    assert not view.scores.all().requires_grad


def test_anchors_are_made_once_for_sizes_and_a_device(monkeypatch):
    student, teacher = detector("retina"), detector("retina", sure=True)
    model = distillkit.wrap(student, teacher, [LogitKD(Main()), LogitKD(Valuable())]).train()
    adapters = (model._adapter, model._teacher_sides["teacher"].adapter)
    made = []
    for adapter in adapters:
        real = adapter.anchors_of.made
        monkeypatch.setattr(adapter.anchors_of, "made", lambda *a, real=real: (made.append(a), real(*a))[1])
    large = [(torch.rand(3, 128, 128), *shown[1:]) for shown in pictures()]
    for shown in (pictures(), pictures(), large, pictures(), large):
        model(*batch(student, shown), mode="loss")
    assert len(made) == 2 * len(adapters), "for two sizes each"
    sizes, anchors = made[0][0], adapters[0].anchors_of
    assert anchors(sizes, torch.device("meta")).device.type == "meta"
    assert anchors(sizes, torch.device("cpu")) is anchors(sizes, torch.device("cpu"))
    for width in range(1, 2 * REMEMBERED):
        anchors([(1, width)] * 5, torch.device("cpu"))
    assert len(anchors._made) <= REMEMBERED, "of a set whose pictures all have their own size"


def test_ld_on_a_retinanet_that_had_no_distributions():
    student, teacher = (to_distribution(detector("retina", sure=True, seed=seed)) for seed in (0, 1))
    model = distillkit.wrap(student, teacher, [LD(Main()), LD(Valuable())]).train()
    losses = model(*batch(student), mode="loss")
    losses.total.backward()
    assert losses["ld_main"] > 0
    assert losses["ld_valuable"] > 0
    assert student.bbox_head.retina_reg.logits.weight.grad.abs().sum() > 0
    assert not model._student_side.unproven
    assert not model._teacher_sides["teacher"].unproven


def test_targets_are_those_of_the_data_samples():
    model = detector("gfl")
    call = batch(model)
    targets = adapter_for(model).targets(call, {"mode": "loss"}, None)
    assert targets.sizes == [(96, 96), (96, 96)], "padded to the preprocessor's divisor, as its assigner sees them"
    assert torch.equal(targets.boxes[1], call[1][1].gt_instances.bboxes)
    assert torch.equal(targets.labels[0], call[1][0].gt_instances.labels)
    assert adapter_for(model).targets((call[0],), {"data_samples": call[1]}, None).images == 2


@pytest.mark.parametrize("name", ["faster", "detr"])
def test_a_detector_of_another_kind_has_features(name):
    student, teacher = detector(name), detector(name, channels=32, seed=1)
    assert type(adapter_for(student)) is MMDet
    model = distillkit.wrap(student, teacher, [FeatureImitation(weight=0.1)]).train()
    losses = model(*batch(student), mode="loss")
    assert losses["imitation"] > 0
    losses.total.backward()
    with pytest.raises(ViewError, match=r"has the head .*reads no detections; of GFLHead"):
        distillkit.wrap(model.unwrap(), teacher, [LD()])


def test_a_head_that_predicts_otherwise_is_none_of_those_that_are_known():
    """VFNet's is a subclass of ATSS's and FCOS's."""
    assert type(adapter_for(detector("vfnet"))) is MMDet


def test_a_head_that_returns_something_else_than_it_decodes_is_found_out():
    student, teacher = detector("gfl"), detector("gfl", sure=True)
    decode = teacher.bbox_head.integral.forward
    teacher.bbox_head.integral.forward = lambda x: decode(x) + 1
    model = distillkit.wrap(student, teacher, [LD()]).train()
    with pytest.raises(AdapterError, match="teacher: the tapped distributions do not explain"):
        model(*batch(student), mode="loss")


def test_a_call_in_another_mode_is_refused():
    model = distillkit.wrap(detector("gfl"), detector("gfl"), [LD()]).train()
    with pytest.raises(ViewError, match=r"mode='loss'\), got mode='tensor'"):
        model(*batch(model.student))


def test_a_teacher_of_the_other_order_of_channels_sees_its_own(caplog):
    """RTMDet wants BGR with means of its own, GFL RGB."""
    student, teacher = detector("gfl"), detector("rtmdet", sure=True)
    seen = []
    hook = teacher.backbone.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with caplog.at_level(logging.WARNING, "distillkit"):
        model = distillkit.wrap(
            student, Teacher(teacher), [FeatureImitation(student_at="neck[0]", teacher_at="neck[0]")]
        )
    assert any("channels turned round" in r.message for r in caplog.records)
    model.train()(*batch(student, pictures()[:1]), mode="loss")
    hook.remove()
    torch.testing.assert_close(seen[-1], batch(teacher, pictures()[:1])[0], atol=1e-4, rtol=0)


# ---- building and loading


def test_a_checkpoint_of_a_model_that_does_not_fit_is_named(tmp_path):
    model = detector("gfl")
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "a.pth")
    again = openmmlab.build(config("gfl"), tmp_path / "a.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"a\.pth does not fit the model: other shape"):
        openmmlab.build(config("gfl", channels=32), tmp_path / "a.pth")


def test_a_config_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"configs.gfl.nothing\.py does not exist"):
        openmmlab.made("mmdet::gfl/nothing.py")


@pytest.mark.parametrize("other", ["gfl", "retina"])
def test_a_teacher_of_other_classes_anchors_and_picture_size(other, caplog):
    """Data samples get the sizes of what the teacher sees, so that its predictions prove its taps there too."""
    student, teacher = detector("gfl", sure=True), detector(other, sure=True, seed=1)
    student.dataset_meta, teacher.dataset_meta = {"classes": ("a", "b", "c")}, {"classes": ("c", "a", "b")}
    distillers = [LogitKD(Main(), protocol="sigmoid"), *([LD(Main())] if other == "gfl" else [])]
    model = distillkit.wrap(student, Teacher(teacher, scale=2.0, levels="shared"), distillers)
    call = batch(student)
    sizes = [sample.img_shape for sample in call[1]]
    with caplog.at_level(logging.WARNING, "distillkit"):
        losses = model.train()(*call, mode="loss")
    losses.total.backward()
    assert all(losses[d] > 0 for d in model._uses)
    assert not model._teacher_sides["teacher"].unproven
    assert [sample.img_shape for sample in call[1]] == sizes
    for said in ("matched by name: 3 are the student's", "stride 8 is left out", "has no level of stride 128"):
        assert said in caplog.text
    assert ("9 anchors a cell are seen as one" in caplog.text) == (other == "retina")
