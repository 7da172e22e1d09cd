"""NanoDet from ncnn files: a small graph written here, and the published models where DISTILLKIT_DATA names them."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distillkit
from distillkit import recipe as recipes
from distillkit import schema
from distillkit.core.errors import AdapterError
from distillkit.models.nanodet import HALF, VARIANTS, NanoDet, Variant, load_ncnn, nanodet
from distillkit.training import build
from distillkit.training.errors import RunError
from distillkit.training.evaluate import evaluate

SMALL = Variant((64, 64), False, (8, 16), 0.5)
GRAPH = """7767517
13 14
Input                 data 0 1 data
Convolution           stem 1 1 data a 0=4 1=3 3=2 4=1 5=1 6=108 9=1
Pooling               pool 1 1 a b 0=0 1=3 2=2 3=1
Convolution           down 1 1 b c 0=4 1=3 3=2 4=1 5=1 6=144 9=2 -23310=1,1.000000e-01
Split                 two 1 3 c c0 c1 c2
ConvolutionDepthWise  deep 1 1 c1 d 0=4 1=3 3=2 4=1 5=1 6=36 7=4
Interp                up 1 1 d e 0=2 1=2.0 2=2.0
BinaryOp              add 2 1 c0 e f 0=0
Convolution           out16 1 1 d g 0=112 1=1 5=1 6=448
Slice                 cut16 1 2 g g0 g1 -23300=2,80,-233
Convolution           out8 1 1 f h 0=112 1=1 5=1 6=448
Slice                 cut8 1 2 h h0 h1 -23300=2,80,-233
Sigmoid               squash 1 1 h0 cls
"""
CONVS = {
    "stem": (4, 3, 3, 3),
    "down": (4, 4, 3, 3),
    "deep": (4, 1, 3, 3),
    "out16": (112, 4, 1, 1),
    "out8": (112, 4, 1, 1),
}
NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def write(folder: Path, graph: str = GRAPH, half: bool = True) -> tuple[Path, Path, dict]:
    """The pair of files, and the weights as they are read back."""
    generator = np.random.default_rng(0)
    raw, weights = b"", {}
    for name, shape in CONVS.items():
        kind = np.float16 if half else np.float32
        weight = (generator.normal(size=shape) * 0.3).astype(kind)
        bias = generator.normal(size=shape[0]).astype(np.float32)
        block = weight.tobytes()
        raw += struct.pack("<I", HALF if half else 0) + block + b"\0" * (-len(block) % 4) + bias.tobytes()
        weights[name] = torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias)
    (folder / "n.param").write_text(graph)
    (folder / "n.bin").write_bytes(raw)
    return folder / "n.param", folder / "n.bin", weights


@pytest.fixture
def model(tmp_path) -> NanoDet:
    return load_ncnn(*write(tmp_path)[:2], SMALL)


@pytest.mark.parametrize("half", [True, False])
def test_the_graph_is_what_it_says(tmp_path, half):
    *paths, weights = write(tmp_path, half=half)
    model = load_ncnn(*paths, SMALL)
    picture = torch.rand(2, 3, 64, 96)
    mean, std = torch.tensor([103.53, 116.28, 123.675]), torch.tensor([57.375, 57.12, 58.395])  # blue, green, red
    x = (picture[:, [2, 1, 0]] * 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = F.max_pool2d(F.relu(F.conv2d(x, *weights["stem"], 2, 1)), 3, 2, 1)
    x = F.leaky_relu(F.conv2d(x, *weights["down"], 2, 1), 0.1)
    deep = F.conv2d(x, *weights["deep"], 2, 1, groups=4)
    fine = x + F.interpolate(deep, scale_factor=2, mode="bilinear")
    with torch.no_grad():
        classes, edges = model.forward_raw(picture)
    for level, out in enumerate((F.conv2d(fine, *weights["out8"]), F.conv2d(deep, *weights["out16"]))):
        torch.testing.assert_close(classes[level], out[:, :80], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(edges[level], out[:, 80:], rtol=1e-4, atol=1e-5)
    assert model.head_paths == ("convs.out8", "convs.out16")


def test_boxes_stand_where_their_points_do(model):
    """All bins alike but one a side: every edge is 2 strides from its point, (i + 0.5) * stride."""
    with torch.no_grad():
        for path in model.head_paths:
            conv = model.get_submodule(path)
            conv.weight.zero_()
            conv.bias.fill_(-20.0)
            conv.bias[80:].view(4, 8)[:, 2] = 20.0
        model.get_submodule(model.head_paths[0]).bias[7] = 20.0
    (found,) = model.eval()([torch.zeros(3, 40, 64)])
    x, y = (torch.arange(8) + 0.5) * 8, (torch.arange(5) + 0.5) * 8
    expected = {
        (max(a - 16, 0.0), max(b - 16, 0.0), min(a + 16, 64.0), min(b + 16, 40.0))
        for a in x.tolist()
        for b in y.tolist()
    }
    assert {tuple(box) for box in found["boxes"].tolist()} <= expected
    assert len(found["boxes"]) > 2
    assert set(found["labels"].tolist()) == {7}


@pytest.mark.parametrize(("convention", "stride"), [("default", 64), ("release", 48)])
def test_the_release_takes_the_width_over_its_cells_for_a_stride(model, convention, stride):
    """A picture 96 wide and 160 high: the level of stride 64 has 2 x 3 cells, and 96 / 2 = 48 on both axes."""
    model.strides, model.convention = (8, 64), convention
    classes = [torch.full((1, 80, 20, 12), -20.0), torch.full((1, 80, 3, 2), -20.0)]
    classes[1][0, 4, 1, 0] = 5.0  # the cell of row 1, column 0
    edges = [torch.full((1, 32, *level.shape[-2:]), -20.0) for level in classes]
    edges[1][:, [1, 9, 17, 25]] = 20.0  # every edge at 1 stride
    (found,) = model.predict(classes, edges, [(160, 96)])
    x, y = 0.5 * stride, 1.5 * stride
    expected = [0.0, y - stride, min(x + stride, 96.0), min(y + stride, 160.0)]
    torch.testing.assert_close(found["boxes"], torch.tensor([expected]))
    assert found["labels"].tolist() == [4]


def test_the_release_cannot_be_trained_with(model):
    model.convention = "release"
    with pytest.raises(AdapterError, match="convention='release', which is for evaluation only"):
        distillkit.wrap(model, None, [])


def test_one_picture_repeated_gives_the_same_losses(model):
    image = torch.rand(3, 50, 64, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[5.0, 9.0, 50.0, 44.0]]), "labels": torch.tensor([2])}
    once = model([image], [target])
    assert once.keys() == {"loss_cls", "loss_bbox", "loss_dfl"}
    for times in (2, 4, 8):
        for name, value in model([image] * times, [target] * times).items():
            torch.testing.assert_close(value, once[name], rtol=1e-5, atol=0)


def test_pictures_without_objects_leave_a_live_graph(model):
    losses = model([torch.rand(3, 64, 64)], [NO_OBJECTS])
    assert losses["loss_bbox"] == 0
    assert losses["loss_dfl"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_new_head_starts_afresh_and_trains_for_its_classes(model):
    stem = model.convs["stem"].weight.clone()
    model.new_head(5)
    classes, edges = model.forward_raw(torch.rand(1, 3, 64, 64))
    assert [c.shape[1] for c in classes] == [5, 5]
    assert [e.shape[1] for e in edges] == [32, 32]
    assert classes[0].sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(model.convs["stem"].weight, stem)
    target = {"boxes": torch.tensor([[5.0, 9.0, 50.0, 44.0]]), "labels": torch.tensor([4])}
    sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_reset_forgets_and_keeps_the_scale_of_the_maps(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset()
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == len(before)
    with torch.no_grad():
        spread = model._blobs(torch.randn(4, 3, 64, 64))["f"].std()
    assert 0.2 < spread < 5


def test_small_pictures_are_padded_with_black(model):
    batch, sizes = model.batch([torch.ones(3, 20, 33)])
    assert batch.shape == (1, 3, 32, 64)
    assert sizes == [(20, 33)]
    assert batch.sum() == 3 * 20 * 33


# ---- files that are not what they should be


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("7767517", "7767518", r"n\.param is not an ncnn graph: its first line should be 7767517"),
        ("Sigmoid               squash 1 1 h0 cls\n", "", "declares 13 layers but holds 12: is it truncated"),
        ("Sigmoid ", "GELU ", r"n\.param:15: .*'squash' is of kind 'GELU'"),
        ("squash 1 1 h0 cls", "squash 1 1 h0", r"n\.param:15: .*'squash' should name 1 inputs and 1 outputs"),
        ("squash 1 1 h0 cls", "squash x 1 h0 cls", r"n\.param:15: not a line of an ncnn graph"),
        ("3=2 4=1 5=1 6=108", "3=2 4=1 5=1 6=107", r"n\.param is not the graph of a NanoDet: stem: 107 weights"),
        ("BinaryOp              add 2 1 c0 e f 0=0", "BinaryOp add 2 1 c0 e f 0=2", r"n\.param:10: .*'add' .* mode 2"),
        ("add 2 1 c0 e f", "add 2 1 c0 missing f", "not the graph of a NanoDet: .*missing"),
        ("Slice                 cut8 1 2 h", "Slice                 cut8 1 2 g", "not the graph of a NanoDet: .*out8"),
    ],
)
def test_a_foreign_graph_is_named(tmp_path, old, new, message):
    graph = GRAPH
    assert old in graph
    with pytest.raises(ValueError, match=message):
        load_ncnn(*write(tmp_path, graph.replace(old, new))[:2], SMALL)


def test_a_graph_with_other_strides_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"n\.param .*strides \[8, 16\], expected \[8, 16, 32\]"):
        load_ncnn(*write(tmp_path)[:2], Variant((64, 64), False, (8, 16, 32), 0.5))


def test_damaged_weights_are_named(tmp_path):
    param, weights, _ = write(tmp_path)
    whole = weights.read_bytes()
    for content, message in [
        (whole[:-4], r"n\.bin has \d+ bytes but the weights of out8 end at byte \d+: is it truncated"),
        (whole[:2], r"n\.bin has 2 bytes and ends before the weights of stem"),
        (whole + b"1234", r"n\.bin has \d+ bytes but its graph needs \d+"),
        (b"\1\2\3\4" + whole[4:], r"n\.bin: weights of stem at byte 0 have the tag 0x4030201"),
    ]:
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_ncnn(param, weights, SMALL)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"n\.bin does not exist: a NanoDet is a pair"):
        load_ncnn(param, weights, SMALL)


def test_unknown_variants_and_an_unset_folder_are_named(monkeypatch):
    with pytest.raises(ValueError, match="'nanodet-xl' is not one of nanodet-m, "):
        nanodet("nanodet-xl")
    with pytest.raises(ValueError, match="'published' is neither 'default' nor 'release'"):
        nanodet("nanodet-m", convention="published")
    monkeypatch.delenv("DISTILLKIT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set DISTILLKIT_DATA"):
        nanodet("nanodet-m")


# ---- the published models


@pytest.fixture(params=list(VARIANTS))
def published(request) -> NanoDet:
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with weights_nanodet/ to test the published models")
    return nanodet(request.param).eval()


def test_published_models_have_their_sizes(published):
    plus = len(published.strides) == 4
    assert sum(p.numel() for p in published.parameters()) == (1_186_346 if plus else 941_818)
    assert all(published.get_submodule(path).out_channels == 112 for path in published.head_paths)
    with torch.no_grad():
        classes, _ = published.forward_raw(torch.rand(1, 3, 96, 160))
    assert [c.shape[-2:] for c in classes] == [(-(-96 // s), -(-160 // s)) for s in published.strides]


def test_published_models_answer_alike_twice_and_can_be_exported(published):
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    (first,), (second,) = published([image]), published([image])
    for key, value in first.items():
        assert torch.equal(value, second[key])

    class Raw(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = published

        def forward(self, batch):
            return self.model.forward_raw(batch)

    exported = torch.export.export(Raw(), (image[None],)).module()(image[None])
    for ours, theirs in zip(published.forward_raw(image[None]), exported):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


# ---- in a recipe


def need_data() -> None:
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with weights_nanodet/ and coco_mini/")


def built(classes: int = 80, **keys: str) -> NanoDet:
    """A recipe's nanodet-m."""
    folder = str(Path(os.environ["DISTILLKIT_DATA"]) / "weights_nanodet")
    config = schema.NanoDetModel(kind="nanodet", variant="nanodet-m", folder=folder, **keys)
    return build.build_model(config, classes, schema.Evaluate())


def test_what_a_recipe_keeps_of_the_trained_weights():
    need_data()
    trained, head, none = (built(weights=w).state_dict() for w in ("trained", "new-head", "none"))
    heads = {f"{path}.{part}" for path in built().head_paths for part in ("weight", "bias")}
    assert {name for name in trained if not torch.equal(trained[name], head[name])} == heads
    assert {name for name in trained if not torch.equal(trained[name], none[name])} == set(trained)


def test_other_classes_need_a_new_head():
    need_data()
    with pytest.raises(RunError, match="trained for 80 classes, the data have 3: set weights: new-head"):
        built(3)
    assert built(3, weights="new-head").num_classes == built(3, weights="none").num_classes == 3


@pytest.mark.parametrize("weights", ["new-head", "none"])
def test_a_teacher_without_trained_weights_is_a_mistake(tmp_path, weights):
    file = tmp_path / "r.yaml"
    file.write_text(
        "data: {kind: scenes}\n"
        f"teacher: {{kind: nanodet, variant: nanodet-m, folder: f, weights: {weights}}}\n"
        "student: {kind: gfl}\n"
    )
    with pytest.raises(recipes.RecipeError, match=r"r\.yaml:2: teacher: has no trained weights"):
        recipes.load(file)


AS_TRAINED = ["data.size=320", "data.keep_ratio=true", "data.pad=true"]  # nanodet-m saw pictures padded to 320 x 320


@pytest.mark.integration
@pytest.mark.parametrize(
    ("model", "overrides", "split", "published"),
    [
        ("teacher", ["teacher.convention=release"], "val", 36.1),
        ("teacher", ["teacher.convention=release"], "test", 38.0),
        ("student", AS_TRAINED, "val", 24.2),
        ("student", AS_TRAINED, "test", 29.9),
    ],
)
def test_published_ap_on_coco_mini(model, overrides, split, published):
    need_data()
    recipe = recipes.load("ld_coco_mini", [*overrides, "data.workers=0"])
    assert 100 * evaluate(recipe, model, split).numbers["AP"] == pytest.approx(published, abs=0.3)
