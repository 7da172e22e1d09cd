"""Recipes of segmentation, and every verb of the command line on small runs of them."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from benchmarks import seeds
from distillkit import plugins, schema
from distillkit.cli import app
from distillkit.data.boundary import boundary_band
from distillkit.data.problems import DataError
from distillkit.data.segmentation import VOC_MASK_CLASSES
from distillkit.evaluation.segmentation import pixel_metrics, segment_dataset
from distillkit.recipe import RecipeError, load, resolved
from distillkit.training import build, loop
from distillkit.training.batches import batches
from distillkit.training.check import check
from distillkit.training.errors import RunError
from distillkit.training.evaluate import evaluate
from distillkit.training.export import export
from distillkit.training.mask_figures import overlay
from distillkit.training.metrics import read
from distillkit.training.optim import learning_rate_factor
from distillkit.training.predict import predict
from distillkit.training.run import Jobs, run
from distillkit.training.tasks import Task, task_of

DATA = os.environ.get("DISTILLKIT_DATA", "")
CLASSES = ["background", "disc", "square"]
RECIPE = """
name: shapes
task: segmentation
data:
  kind: voc-masks
  root: ROOT
  classes: [background, disc, square]
  test: test
  size: 32
  batch: 4
  workers: 0
  augment: {scale: [0.8, 1.2], color: 0.1}
teacher: {kind: deeplab, backbone: resnet10t, channels: 16, output_stride: 32, train: {epochs: 1}}
student: {kind: deeplab, backbone: test_resnet, channels: 8, output_stride: 32}
distillers:
  - {kind: channel-kd}
  - {kind: channel-kd, name: features, student_at: head.refine, teacher_at: head.refine, weight: 0.1}
  - {kind: pixel-kd, region: valuable}
  - {kind: pairwise-kd, student_at: head.low, teacher_at: head.low}
  - {kind: feature-imitation, student_at: head.low, teacher_at: head.low}
  - {kind: attention-transfer, student_at: head.low, teacher_at: head.low, weight: 0.1}
train: {epochs: 1, threads: 1, optimizer: {kind: adamw, lr: 1e-3, backbone_lr: 0.1}, schedule: {kind: poly, warmup: 0}}
evaluate: {split: test}
"""
FAKEMIX = {"thickness": 3, "max_shift": 0.3, "p": 1.0}
FANET = "{kind: fanet, backbone: lcnet_035, channels: 8, output_stride: 32}"


def shapes(number, size=(40, 48)):
    """A picture uint8 (H, W, 3) and its mask: a disc and a square, each of its colour, on noise."""
    rng = np.random.default_rng(number)
    height, width = size
    mask = np.zeros(size, np.uint8)
    y, x = np.indices(size)
    mask[np.hypot(y - rng.integers(10, height - 10), x - rng.integers(10, width - 10)) < 8] = 1
    top, left = rng.integers(2, height - 14), rng.integers(2, width - 14)
    mask[top : top + 10, left : left + 10] = 2
    colours = np.array([(90, 90, 90), (40, 60, 220), (220, 60, 40)])
    return np.clip(colours[mask] + rng.normal(0, 20, (*size, 3)), 0, 255).astype(np.uint8), mask


def folder_of_shapes(root, numbers=(("train", 8), ("val", 4), ("test", 3)), size=(40, 48)):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for at, (split, number) in enumerate(numbers):
        names = [f"{split}{i}" for i in range(number)]
        for i, name in enumerate(names):
            picture, mask = shapes(100 * at + i, size)
            Image.fromarray(picture).save(root / "JPEGImages" / f"{name}.png")
            Image.fromarray(mask, "L").save(root / "SegmentationClass" / f"{name}.png")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
    return root


def recipe_of(folder, *changes, text=RECIPE):
    (folder / "shapes.yaml").write_text(text.replace("ROOT", str(folder / "set")))
    return load(folder / "shapes.yaml", [f"output={folder}", *changes])


def alone(*changes):
    """Changes that leave one row, which learns from masks alone."""
    return ["distillers=[]", "teacher=null", "compare=[student]", *changes]


@pytest.fixture(autouse=True)
def _only_this_tests_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {"model": {}, "distiller": {}, "data": {}})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    folder_of_shapes(folder / "set")
    recipe = recipe_of(folder)
    return SimpleNamespace(recipe=recipe, folder=run(recipe, console=Console(quiet=True)), file=folder / "shapes.yaml")


@pytest.fixture
def there(tmp_path):
    folder_of_shapes(tmp_path / "set")
    return tmp_path


# ---- every verb


def test_a_run_leaves_a_table_a_report_and_the_iou_of_every_class(done):
    rows = {row["row"]: row for row in json.loads((done.folder / "table.json").read_text())}
    assert list(rows) == ["teacher", "student", "distilled"]
    assert set(rows["student"]) == {"row", "miou", "boundary_iou", "pixel_accuracy", "parameters", "minutes"}
    scores = json.loads((done.folder / "distilled" / "scores-test.json").read_text())
    assert list(scores["classes"]) == CLASSES
    known = [row["iou"] for row in scores["classes"].values() if row["iou"] >= 0]
    assert scores["miou"] == pytest.approx(np.mean(known)) == rows["distilled"]["miou"]
    assert np.array(scores["confusion"]).sum() == 3 * 40 * 48  # in pixels of the files, not of the network's input
    page = (done.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "IoU of each class" in page
    losses = read(done.folder / "distilled" / "metrics.jsonl")[0]["losses"]
    named = {"channel_kd", "features", "pixel_kd", "pairwise_kd", "feature_imitation", "attention_transfer"}
    assert set(losses) == {"ce", *named}
    assert min(losses.values()) > 0


def test_the_backbone_learns_at_its_own_rate(done):
    step = read(done.folder / "student" / "metrics.jsonl")[1]
    assert step["lr"] == pytest.approx(1e-4 * (1 - 1 / 2) ** 0.9)  # the first group's is the backbone's


def test_check_finds_nothing_wrong_and_says_what_a_step_gives(done):
    findings = list(check(done.recipe))
    assert [f.what for f in findings if f.level != "ok"] == []
    assert any("ce " in f.what and "channel_kd" in f.what for f in findings)


def test_eval_prints_every_class(done):
    printed = CliRunner().invoke(app, ["eval", str(done.file), f"output={done.file.parent}", "--model", "distilled"])
    assert printed.exit_code == 0, printed.output
    for word in ("boundary_iou", "square", "miou", "pixel_accuracy"):
        assert word in printed.output


def test_predict_writes_masks_drawn_pictures_and_saliency(done, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(shapes(5, (30, 50))[0]).save(folder / "one.png")
    Image.fromarray(shapes(6, (44, 36))[0]).save(folder / "two.jpg")
    where = ["--out", str(tmp_path / "found"), "--set", f"output={done.file.parent}"]
    words = ["predict", str(done.file), str(folder), "--weights", "distilled", "--saliency", *where]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0, printed.output
    rows = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["one.png", "two.jpg"]
    mask = Image.open(tmp_path / "found" / "masks" / "one.png")
    assert (mask.mode, mask.size) == ("P", (50, 30))
    labels = np.array(mask)
    shares = {entry["class"]: entry["share"] for entry in rows[0]["classes"]}
    assert shares == {CLASSES[label]: (labels == label).mean() for label in np.unique(labels)}
    assert Image.open(tmp_path / "found" / "overlays" / "two.png").size == (36, 44)
    salient = Image.open(tmp_path / "found" / "saliency" / "two.png")
    assert (salient.mode, salient.size) == ("L", (36, 44))


def test_saliency_is_what_is_not_of_the_first_class(there):
    """A model whose logits are the picture's red, green and blue."""

    class Channels(nn.Module):
        pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, pictures):
            return pictures * self.factor

    plugins.register_model("channels", lambda classes: Channels())
    recipe = recipe_of(there, *alone("student={kind: custom, name: channels}", "data.resize=false"))
    picture = np.zeros((6, 7, 3), np.uint8)
    picture[:3] = (255, 0, 0)
    picture[3:] = (0, 0, 255)
    Image.fromarray(picture).save(there / "halves.png")
    predict(recipe, None, [there / "halves.png"], there / "out", saliency=True)
    saliency = np.array(Image.open(there / "out" / "saliency" / "halves.png"))
    first = np.exp(1) / (np.exp(1) + 2)
    assert (saliency[:3] == round(255 * (1 - first))).all()
    assert (saliency[3:] == round(255 * (1 - 1 / (np.exp(1) + 2)))).all()
    assert np.unique(np.array(Image.open(there / "out" / "masks" / "halves.png"))[3:]).tolist() == [2]


def test_saliency_of_another_task_is_refused(tmp_path):
    with pytest.raises(RunError, match="saliency maps are for segmentation, and the task of 'quickstart' is detection"):
        predict(load("quickstart"), None, [], tmp_path, saliency=True)


def test_export_agrees(done, tmp_path):
    differences = export(done.recipe, "student", tmp_path, ["safetensors", "torch-export", "onnx"], Console(quiet=True))
    assert max(differences.values()) < 1e-3
    decoding = json.loads((tmp_path / "decode.json").read_text())
    assert (decoding["classes"], decoding["height"], decoding["width"]) == (CLASSES, 32, 32)


def test_list_and_schema_know_the_task():
    printed = CliRunner().invoke(app, ["list"]).output
    for word in ("channel-kd", "deeplab", "fanet", "voc-masks", "trans10k", "quickstart_segmentation"):
        assert word in printed
    blocks = schema.json_schema()["$defs"]
    assert {"DeepLabModel", "FakeMix", "PixelKD", "PolySchedule", "MaskLoss"} <= set(blocks)


def test_a_resolved_recipe_is_the_same_recipe(done, tmp_path):
    (tmp_path / "again.yaml").write_text(resolved(done.recipe))
    assert load(tmp_path / "again.yaml") == done.recipe


# ---- going on after an interruption


def test_a_run_with_fakemix_goes_on_as_if_it_had_not_been_stopped(there, monkeypatch):
    text = RECIPE.replace("epochs: 1, threads", "epochs: 3, save_every: 2, threads")
    changes = alone(f"student={FANET}", f"data.fakemix={json.dumps(FAKEMIX)}")
    straight = run(recipe_of(there, *changes, "name=straight", text=text), console=Console(quiet=True))
    steps, step = [], loop.Run.step

    def stopped_twice(self, window):
        if len(steps) in (3, 5):  # a step after a checkpoint, and one in the second try
            steps.append("stop")
            raise KeyboardInterrupt
        steps.append("step")
        step(self, window)

    monkeypatch.setattr(loop.Run, "step", stopped_twice)
    recipe = recipe_of(there, *changes, "name=broken", text=text)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(recipe, console=Console(quiet=True))
    broken = run(recipe, console=Console(quiet=True))
    a, b = (load_file(folder / "student" / "final.safetensors") for folder in (straight, broken))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    rows, again = (read(folder / "student" / "metrics.jsonl") for folder in (straight, broken))
    assert rows == again
    assert {"ce", "boundary"} == set(rows[0]["losses"])
    assert len(steps) > 2 * 3 + 2  # some were done again


# ---- batches and data


def batch_of(recipe, student, number=4):
    how = batches(recipe, student, 3)
    data = build.build_data(recipe, "train", augmented=True)
    items = [data[0, i] for i in range(number)]
    return how["collate"](items), how["prepare"]


def test_fakemix_changes_pictures_and_no_label(there):
    recipe = recipe_of(there, *alone(f"data.fakemix={json.dumps(FAKEMIX)}"))
    student = build.build_model(recipe.student, 3, recipe.evaluate)
    (pictures, targets), prepare = batch_of(recipe, student)
    before = {name: value.clone() for name, value in targets.items()}
    torch.manual_seed(1)
    mixed, after = prepare(pictures, targets)
    torch.manual_seed(1)
    assert torch.equal(mixed, prepare(pictures, targets)[0])
    assert not torch.equal(mixed, prepare(pictures, targets)[0])
    assert all(torch.equal(before[name], after[name]) for name in before)
    mean, std = (torch.tensor(student.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    changed = ((mixed * std + mean - pictures).abs() > 1e-5).any(1)
    assert 0 < changed.float().mean() < 0.7
    plain = recipe_of(there, *alone())
    (pictures, targets), prepare = batch_of(plain, student)
    torch.testing.assert_close(prepare(pictures, targets)[0], (pictures - mean) / std)


def test_what_fakemix_pastes_does_not_depend_on_the_thickness_of_boundary_maps(there):
    def mixed(*changes):
        recipe = recipe_of(there, *alone(f"data.fakemix={json.dumps(FAKEMIX)}", *changes))
        (pictures, targets), prepare = batch_of(recipe, build.build_model(recipe.student, 3, recipe.evaluate))
        torch.manual_seed(0)
        return prepare(pictures, targets)[0]

    assert torch.equal(mixed(), mixed("data.boundary=9"))
    assert not torch.equal(mixed(), mixed("data.fakemix.thickness=9"))


def test_boundary_maps_are_made_where_a_model_wants_them(there):
    def of(*changes):
        _, target = build.build_data(recipe_of(there, *alone(*changes)), "train", augmented=True)[0, 0]
        return target

    assert "boundary" not in of()
    eight = of(f"student={FANET}")
    assert torch.equal(eight["boundary"], boundary_band(eight["mask"], 8 / 512))
    three = of("data.boundary=3")
    assert torch.equal(three["boundary"], boundary_band(three["mask"], 3))
    between = of("data.boundary=2", "data.boundary_between=classes")
    assert torch.equal(between["boundary"], boundary_band(between["mask"], 2, between="classes"))
    assert "boundary" in of(f"compare=[student, {{row: other, distillers: none, student: {FANET}}}]")
    taught = recipe_of(there, f"teacher={FANET[:-1]}, train: {{epochs: 1}}}}")
    assert "boundary" in build.build_data(taught, "train", augmented=True)[0, 0][1]


def test_pictures_may_keep_their_own_size(there):
    recipe = recipe_of(there, *alone("data.resize=false", "data.augment.scale=null", "data.size=24"))
    image, target = build.build_data(recipe, "train", augmented=True)[0, 0]
    assert (image.shape, target["mask"].shape) == ((3, 24, 24), (24, 24))
    image, target = build.build_data(recipe, "val", augmented=False)[0, 0]
    assert (image.shape, target["mask"].shape) == ((3, 40, 48), (40, 48))
    with pytest.raises(RecipeError, match=r"resize: false leaves pictures as large as they are, and keep_ratio: true"):
        recipe_of(there, "data.resize=false", "data.keep_ratio=true")
    with pytest.raises(RecipeError, match=r"crop: false shows all of the picture at size, so that scale must be null"):
        recipe_of(there, "data.augment.crop=false")


def test_scales_and_flips_are_those_of_the_recipe(there):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 5, padding=2)
    plugins.register_model("layer", lambda classes: model)
    student = "student={kind: custom, name: layer}"
    recipe = recipe_of(there, *alone(student, "evaluate.scales=[1.0, 1.5]", "evaluate.flip=true"))
    data = build.build_data(recipe, "val", augmented=False)
    mine = evaluate(recipe, None, "val").numbers
    theirs, plain = (
        pixel_metrics(segment_dataset(model, data, **how), CLASSES).numbers
        for how in ({"scales": (1.0, 1.5), "flip": True}, {})
    )
    assert mine == theirs != plain


def test_the_numbers_of_trans10k_stand_beside_the_others(there):
    recipe = recipe_of(there, *alone("evaluate.metrics=trans10k"))
    folder = run(recipe, console=Console(quiet=True))
    (row,) = json.loads((folder / "table.json").read_text())
    of_trans = {"trans10k_miou", "trans10k_accuracy", "trans10k_mae", "trans10k_mber"}
    assert set(row) == {"row", "parameters", "minutes", "miou", "boundary_iou", "pixel_accuracy", *of_trans}
    assert 0 <= row["trans10k_mber"] <= 1
    assert (folder / "report.html").exists()


def test_registered_data_and_models_may_be_used(there):
    class Two(torch.utils.data.Dataset):
        classes = ("left", "right")

        def __init__(self, transform):
            self.transform = transform

        def __len__(self):
            return 4

        def __getitem__(self, place):
            mask = torch.zeros(20, 20, dtype=torch.uint8)
            mask[:, 10:] = 1
            view = self.transform(255 * mask.expand(3, 20, 20), mask, None, torch.Generator().manual_seed(place[1]))
            return view.image, {"mask": view.mask, "key": str(place[1])}

    plugins.register_data("two", lambda split, transform, seed: Two(transform))
    plugins.register_model("one-layer", lambda classes: nn.Conv2d(3, classes, 1))
    data = "{kind: custom, name: two, size: 16, batch: 2, workers: 0, augment: {scale: null, crop: false}}"
    changes = alone(f"data={data}", "student={kind: custom, name: one-layer}", "evaluate.split=val")
    recipe = recipe_of(there, *changes, "train.optimizer.backbone_lr=1", "train.epochs=20", "train.optimizer.lr=0.3")
    assert [f.what for f in check(recipe) if f.level == "error"] == []
    (row,) = json.loads((run(recipe, console=Console(quiet=True)) / "table.json").read_text())
    assert row["miou"] > 0.9


def test_classes_are_known_without_pictures(tmp_path):
    recipe = recipe_of(tmp_path)
    assert build.build_classes(recipe).classes == CLASSES
    assert build.build_classes(recipe_of(tmp_path, "data.classes=null")).classes == VOC_MASK_CLASSES
    trans = "{kind: trans10k, root: nowhere}"
    assert build.build_classes(recipe_of(tmp_path, f"data={trans}")).classes == ["background", "things", "stuff"]
    coco = "{kind: coco-semantic, root: nowhere, others: background, test: test}"
    names = build.build_classes(recipe_of(tmp_path, f"data={coco}")).classes
    assert (names[0], len(names)) == ("background", 134)


@pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder of the small real data sets")
@pytest.mark.parametrize(
    ("data", "classes"),
    [
        ("{kind: voc-masks, root: camvid}", 11),
        ("{kind: coco-semantic, root: coco_mini}", 133),
        ("{kind: trans10k, root: trans_coco, val: test}", 3),
    ],
)
def test_real_sets_are_read(tmp_path, data, classes):
    data = data.replace("root: ", f"root: {DATA}/")
    recipe = recipe_of(tmp_path, *alone(f"data={data}", "data.size=32", "evaluate.split=val"))
    train = build.build_data(recipe, "train", augmented=True)
    assert len(train.classes) == classes
    image, target = train[1, 2]
    assert (image.shape, target["mask"].shape) == ((3, 32, 32), (32, 32))
    val = build.build_data(recipe, "val", augmented=False)
    assert val.classes == train.classes
    assert val[0, 0][0].shape == (3, 32, 32)


# ---- what is wrong is named


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distillers.1.teacher_at=null", "give student_at and teacher_at, to compare features, or neither"),
        ("distillers.2.width=1.5", "expected a share below 1 or a whole number of pixels, got 1.5"),
        ("distillers.2.region=whole", None),
        ("distillers.4.region=boxes", "is for detectors; of a segmentation model's maps the whole is imitated"),
        ("distillers.4.student_at=null", "student_at is missing: name the maps"),
        ("distillers.0.kind=ld", "unknown kind 'ld'"),
        ("student.kind=gfl", "unknown kind 'gfl'"),
        ("student.version=v2", "channels is for version: v3plus"),
        ("student.output_stride=4", "output_stride"),
        ("data.kind=voc", "unknown kind 'voc'"),
        ("data.augment.rotate90=4", "rotate90"),
        ("data.fakemix={variant: nothing}", "expected one of boundary, zeros, mean, other; got the text 'nothing'"),
        ("data.test=null", "is test, but data.test is not given"),
        ("teacher.train=null", "has no trained weights"),
        ("train.schedule.power=0", "power"),
        ("loss.boundary=2", "unknown key; did you mean 'boundary_weight'"),
        ("evaluate.metrics=coco", "expected one of pixels, trans10k"),
        ("smoothing=0.1", "unknown key"),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    if words is None:
        recipe_of(tmp_path, change)
        return
    with pytest.raises(RecipeError, match=words):
        recipe_of(tmp_path, change)


def findings(recipe, level):
    return [f"{f.where}: {f.what}" for f in check(recipe) if f.level == level]


def test_check_lists_all_that_is_wrong_with_masks(there):
    masks = there / "set" / "SegmentationClass"
    Image.new("L", (48, 39)).save(masks / "train1.png")
    Image.fromarray(np.full((40, 48), 3, np.uint8)).save(masks / "train2.png")
    (there / "set" / "JPEGImages" / "train3.png").write_bytes(b"no picture")
    said = findings(recipe_of(there, *alone()), "error")
    assert len(said) == 3
    assert any("train1.png" in text and "the mask is 48 x 39 pixels" in text and "48 x 40" in text for text in said)
    assert any("train2.png: mask: 3 (1920 pixels): no label, expected 0..2" in text for text in said)
    assert any("train3.png" in text and "cannot be decoded" in text for text in said)
    (masks / "val0.png").unlink()
    assert any(text.startswith("data.val: ") and "val0.png" in text for text in findings(recipe_of(there), "error"))
    with pytest.raises(ValueError, match=r"val0\.png"):
        run(recipe_of(there), console=Console(quiet=True))


@pytest.mark.filterwarnings("ignore:FakeMix on a batch of one picture")
def test_check_warns_of_what_is_right_and_seldom_meant(there):
    Image.new("L", (48, 40)).save(there / "set" / "SegmentationClass" / "train1.png")
    fakemix = f"data.fakemix={json.dumps(FAKEMIX)}"
    said = findings(recipe_of(there, *alone(fakemix, "data.boundary=8")), "warning")
    assert len(said) == 1
    assert "train1.png" in said[0]
    assert "its mask has no boundary" in said[0]
    assert findings(recipe_of(there, *alone()), "warning") == []
    plugins.register_model("layer", lambda classes: nn.Conv2d(3, classes, 1))
    student = ["student={kind: custom, name: layer}", "train.optimizer.backbone_lr=1"]
    said = findings(recipe_of(there, *alone(fakemix, "data.batch=1", *student)), "warning")
    assert any("a picture gets none but its own" in text for text in said)


def test_check_makes_its_step_with_no_more_pictures_than_a_batch(there):
    """ASPP pools each picture to one place: of one picture there are no statistics."""
    (said,) = findings(recipe_of(there, *alone("data.batch=1")), "error")
    assert "compare.0" in said
    assert "more than 1 value per channel" in said


def test_a_model_with_a_boundary_stream_needs_boundary_maps(there):
    class Streams(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.out, self.boundary = nn.Conv2d(3, classes, 1), nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return {"out": self.out(x), "boundary": self.boundary(x)} if self.training else self.out(x)

    plugins.register_model("streams", Streams)
    changes = alone("student={kind: custom, name: streams}", "train.optimizer.backbone_lr=1")
    (said,) = findings(recipe_of(there, *changes), "error")
    assert "'boundary'" in said
    assert findings(recipe_of(there, *changes, "data.boundary=8"), "error") == []


def test_splits_of_other_classes_are_refused(there):
    shutil.copytree(there / "set", there / "other")
    plugins.register_data("either", lambda split, transform, seed: _either(there, split, transform))
    data = "{kind: custom, name: either, size: 32, workers: 0}"
    with pytest.raises(RunError, match=r"data\.train has the classes background, disc, box; data\.val has"):
        run(recipe_of(there, *alone(f"data={data}", "evaluate.split=val")), console=Console(quiet=True))


def _either(folder, split, transform):
    from distillkit.data.segmentation import VocMasks

    names = ["background", "disc", "box"] if split == "train" else CLASSES
    return VocMasks(folder / "set", split, names, transform=transform)


# ---- parts


def test_poly_falls_to_0_with_the_power_of_what_is_left():
    def factors(total, **keys):
        config = schema.PolySchedule(kind="poly", **keys)
        return [learning_rate_factor(step, total, 1, config) for step in range(total)]

    assert factors(10, warmup=0) == pytest.approx([(1 - t / 10) ** 0.9 for t in range(10)])
    assert factors(4, warmup=0, power=2.0) == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16])
    warm = factors(12, warmup=2, power=1.0, warmup_factor=0.5)
    assert warm[:3] == pytest.approx([0.5, 0.75, 1.0])
    assert warm[2:] == pytest.approx([1 - t / 10 for t in range(10)])
    with pytest.raises(RunError, match=r"train\.schedule\.warmup is 5 steps, but the whole run has 4"):
        factors(4, warmup=5)


def test_a_poly_schedule_may_be_written_without_a_warm_up():
    read_back = load("quickstart", ["train.schedule={kind: poly, warmup: 0}"]).train.schedule
    assert (read_back.kind, read_back.power) == ("poly", 0.9)


def test_an_overlay_leaves_ignored_pixels_as_they_are():
    picture = Image.new("RGB", (2, 1), (100, 100, 100))
    drawn = np.array(overlay(picture, torch.tensor([[1, 255]])))
    assert drawn.tolist() == [[[117, 40, 40], [100, 100, 100]]]


@pytest.mark.parametrize("task", schema.TASKS)
def test_every_task_has_all_that_the_verbs_ask_of_one(task):
    module = task_of(SimpleNamespace(task=task))
    wanted = [name for name in vars(Task) if not name.startswith("_")] + list(Task.__annotations__)
    assert [name for name in wanted if not hasattr(module, name)] == []


def test_a_table_of_seeds(tmp_path):
    recipe = load("quickstart_segmentation", [])
    made_with = {"commit": "c", "torch": "2", "machine": "m", "date": "2026-01-02", "parameters": 1, "minutes": 1.0}
    lines = []
    for row, values in zip(recipe.compare, ((0.5, 0.6), (0.6, 0.8)), strict=True):
        for seed, value in enumerate(values):
            scores = {"miou": value, "boundary_iou": value / 2, "pixel_accuracy": 0.9}
            classes = {"classes": {"a": value, "b": -1.0}, "boundaries": {"a": value / 2, "b": -1.0}}
            key = {"cell": seeds.cell(recipe, row, seed), "row": row.row, "seed": seed}
            lines.append(made_with | key | scores | classes)
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seeds.Bench(recipe, path, "the command").write_table()
    text = path.with_suffix(".md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
    assert ["distilled", "2", "70.0 ± 14.1", "35.0 ± 7.1", "90.0 ± 0.0", "+15.0 ± 7.1", "+7.5 ± 3.5"] in rows
    assert ["distilled", "35.0 ± 7.1", "-"] in rows
    changed = load("quickstart_segmentation", ["loss.boundary_weight=5"])
    assert seeds.cell(changed, changed.compare[0], 0) != lines[0]["cell"]


def test_the_quickstart_is_right(tmp_path):
    recipe = load("quickstart_segmentation")
    assert yaml.safe_load(resolved(recipe))["task"] == "segmentation"
    few = ["data.train=16", "data.val=2", "data.test=2", "data.workers=0", "train.schedule.warmup=0"]
    assert findings(load("quickstart_segmentation", few), "error") == []


def test_data_of_a_row_are_looked_at_before_anything_is_trained(there):
    def jobs(data):
        rows = f"compare=[student, {{row: other, distillers: none, data: {data}}}]"
        return Jobs(recipe_of(there, *alone(rows)), there / "x", Console(quiet=True), "")

    with pytest.raises(DataError, match="Nowhere: no such folder"):
        jobs("{train_masks: Nowhere}").check()
    with pytest.raises(RunError, match=r"compare\.1 \(other\): its data have the classes a, b, c; data\.train has"):
        jobs("{classes: [a, b, c]}").check()
    jobs("{augment: {flip: 0}}").check()


def test_channels_last_changes_nothing_but_rounding(there):
    ends = []
    for channels_last in ("false", "true"):
        name = f"name=last-{channels_last}"
        recipe = recipe_of(there, *alone(name, f"train.channels_last={channels_last}", "train.optimizer.lr=1e-4"))
        folder = run(recipe, console=Console(quiet=True))
        ends.append(load_file(folder / "student" / "final.safetensors"))
    a, b = ends
    assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-3) for key in a)
