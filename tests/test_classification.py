"""Classification sets, their views and scores, and whole runs."""

import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torchvision import tv_tensors
from typer.testing import CliRunner

from distillkit.cli import app
from distillkit.data.class_transforms import Middle, Random, erased, window
from distillkit.data.classes import Cifar, DigitPictures, PictureFolder, TarPictures
from distillkit.data.label_store import LabelMapError
from distillkit.data.problems import DataError
from distillkit.data.randaugment import RandAugment
from distillkit.evaluation.classes import class_metrics, classify_dataset
from distillkit.models.backbones import classifier
from distillkit.recipe import RecipeError, load
from distillkit.schema import SGD, TimmModel
from distillkit.training import build
from distillkit.training.check import check
from distillkit.training.errors import RunError
from distillkit.training.export import export
from distillkit.training.label import label
from distillkit.training.optim import build_optimizer
from distillkit.training.predict import predict
from distillkit.training.run import run

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}


def folder_of_colours(root, number=8, size=(40, 48)):
    """Pictures that are of one colour but for noise, a folder for each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(np.array(colour) + rng.normal(0, 30, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.v1.png")
    return root


# ---- sets


def test_a_folder_of_pictures(tmp_path):
    root = folder_of_colours(tmp_path, 2)
    data = PictureFolder(root, "train", transform=Middle((32, 32)))
    assert (data.classes, len(data)) == (["blue", "green", "red"], 6)
    assert data.keys[2] == "green/0.v1.png"
    image, target = data[0, 2]
    assert (image.shape, image.dtype, target) == ((3, 32, 32), torch.float32, {"label": 1, "key": "green/0.v1.png"})
    assert image[1].mean() > 0.7 > 0.3 > image[0].mean()


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    root = folder_of_colours(tmp_path, 1)
    with pytest.raises(DataError, match="there are no class folders in it"):
        PictureFolder(root, "trian")
    (root / "val" / "yellow").mkdir()
    with pytest.raises(DataError, match=r"yellow.*is no class of the training split"):
        PictureFolder(root, "val", ["blue", "green", "red"])
    (root / "train" / "red" / "0.v1.png").rename(root / "train" / "0.png")
    with pytest.raises(DataError, match=r"0\.png.*is in no class folder"):
        PictureFolder(root, "train")
    (root / "train" / "0.png").unlink()
    with pytest.raises(DataError, match=r"red.*holds no picture"):
        PictureFolder(root, "train")
    (root / "train" / "blue" / "0.v1.png").write_bytes(b"x")
    (root / "train" / "red").rmdir()
    with pytest.raises(DataError, match=r"blue/0\.v1\.png.*cannot be decoded"):
        PictureFolder(root, "train")[0, 0]


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes):
    rng = np.random.default_rng(0)
    files = {f"data_batch_{i}.bin": 1200 for i in range(1, 6)} | {"test_batch.bin": 20}
    if classes == 100:
        files = {"train.bin": 6000, "test.bin": 20}
        (tmp_path / "fine_label_names.txt").write_text("\n".join(f"name{i}" for i in range(100)))
    rows = {}
    for name, count in files.items():
        rows[name] = rng.integers(0, classes, (count, 3073 if classes == 10 else 3074)).astype(np.uint8)
        (tmp_path / name).write_bytes(rows[name].tobytes())
    train, val, test = (Cifar(tmp_path, s, classes, transform=Middle((32, 32), 1.0)) for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test), len(test.classes)) == (1000, 5000, 20, classes)
    last = rows["test_batch.bin" if classes == 10 else "test.bin"][7]
    image, target = test[0, 7]
    assert target["label"] == last[-3073]
    assert torch.equal((image * 255).round().to(torch.uint8).flatten(), torch.from_numpy(last[-3072:]))
    with pytest.raises(DataError, match="no such file"):
        Cifar(tmp_path / "other", "test", classes)
    (tmp_path / ("test_batch.bin" if classes == 10 else "test.bin")).write_bytes(b"12")
    with pytest.raises(DataError, match="2 bytes are no whole number"):
        Cifar(tmp_path, "test", classes)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(colour):
    out = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(out, "PNG")
    return out.getvalue()


def test_tar_files(tmp_path):
    write_tar(tmp_path / "train-0.tar", {"a/1.png": png("red"), "a/1.cls": b"2\n", "a/1.json": b"{}"})
    write_tar(tmp_path / "train-1.tar", {"./b.v2.png": png("blue"), "./b.v2.cls": b"0"})
    data = TarPictures(tmp_path, "train-*.tar", ["x", "y", "z"], transform=Middle((20, 20), 1.0))
    assert (data.keys, data.labels) == (["a/1.png", "b.v2.png"], [2, 0])
    assert TarPictures(tmp_path, "train-{0..1}.tar", ["x", "y", "z"]).keys == data.keys
    assert data[0, 0][0][:, 0, 0].tolist() == [1, 0, 0]
    write_tar(tmp_path / "bad-0.tar", {"a.png": png("red"), "b.png": png("red"), "b.cls": b"3"})
    with pytest.raises(DataError, match=r"it has no label(.|\n)*'3'.*expected a number from 0 to 2"):
        TarPictures(tmp_path, "bad-*.tar", ["x", "y", "z"])
    (tmp_path / "worse-0.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match="not a readable tar file"):
        TarPictures(tmp_path, "worse-*.tar", ["x"])
    with pytest.raises(DataError, match="none is there"):
        TarPictures(tmp_path, "val-*.tar", ["x"])


def test_digits_differ_by_epoch_in_training_alone():
    train, val = (DigitPictures(4, (48, 48), split, transform=Middle((48, 48), 1.0)) for split in ("train", "val"))
    assert not torch.equal(train[0, 1][0], train[1, 1][0])
    assert torch.equal(val[0, 1][0], val[1, 1][0])
    assert val[0, 1][1]["label"] == val.load(1)[1]


# ---- views


def ramp(height, width):
    """Red says x, green y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return tv_tensors.Image(torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8))


def test_the_middle_is_the_middle():
    image = Middle((40, 40), 0.8)(ramp(100, 200), None, torch.Generator()).image * 255
    # resized to 50 x 100, of which 40 x 40 pixels are 80 x 80 of the picture, around its middle
    assert image[0, 20, 0] == pytest.approx(60.5, abs=1)
    assert image[0, 20, -1] == pytest.approx(138.5, abs=1)
    assert image[1, 0, 20] == pytest.approx(10.5, abs=1)


def test_random_windows_fit_and_have_the_area_and_shape_asked_for():
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        top, left, high, wide = window((90, 130), (0.08, 1.0), (3 / 4, 4 / 3), g)
        assert 0 <= top <= 90 - high
        assert 0 <= left <= 130 - wide
        assert 0.07 < high * wide / (90 * 130) <= 1
        assert 0.7 < wide / high < 1.42
    assert window((10, 100), (1.0, 1.0), (3 / 4, 4 / 3), g) == (0, 43, 10, 13)


def test_views_are_functions_of_their_generator():
    view = Random((24, 24), color=0.2, rand_augment=RandAugment(), erase=0.5)

    def drawn(seed):
        return view(ramp(60, 60), None, torch.Generator().manual_seed(seed)).image

    torch.rand(3)
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_the_crop_may_come_last():
    """A flip before the crop mirrors the window in the picture; after it, the view."""
    picture = ramp(60, 60)
    for flip in (0.0, 1.0):
        views = [
            Random((30, 30), scale=(0.25, 0.25), ratio=(1.0, 1.0), flip=flip, crop_last=last)(
                picture, None, torch.Generator().manual_seed(3)
            ).image
            for last in (False, True)
        ]
        assert torch.equal(*views) == (flip == 0.0)
        step = views[1][0, 15, 20] - views[1][0, 15, 10]
        assert (step < 0) == (flip == 1.0)


def test_erasing_leaves_the_rest_as_it_was():
    picture = torch.full((3, 40, 40), 0.25)
    shares = []
    for seed in range(40):
        changed = (erased(picture, torch.Generator().manual_seed(seed)) != picture).any(0)
        rows, columns = changed.any(1), changed.any(0)
        assert changed.sum() == rows.sum() * columns.sum()  # one rectangle
        shares.append(float(changed.float().mean()))
    assert 0.015 < min(shares) < 0.1
    assert 0.2 < max(shares) < 0.35
    assert picture.eq(0.25).all()


# ---- scores


def test_scores_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5], [1, 1, 0, 0, 0, 0], [float("nan"), 9, 0, 0, 0, 0]])
    found = [{"logits": row, "label": label} for row, label in zip(logits, [0, 0, 1, 1], strict=True)]
    result = class_metrics(found, list("abcdef"))
    assert result.numbers["top1"] == 0.25  # of equal logits the first counts, and NaN is no answer
    assert result.numbers["top5"] == 0.5
    assert result.confusion.sum() == 4
    assert result.confusion[0].tolist() == [1, 0, 0, 0, 0, 1]
    assert result.classes["a"].recall == 0.5
    assert result.classes["a"].precision == 0.5
    assert (result.classes["c"].recall, result.classes["b"].pictures) == (-1, 2)
    with pytest.raises(ValueError, match="6 classes apart, the data have 5"):
        class_metrics(found, list("abcde"))


def test_pictures_are_normalised_as_the_model_says():
    class Said(torch.nn.Module):
        pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

        def forward(self, pictures):
            return pictures.flatten(1)[:, :2]

    item = (torch.full((3, 4, 4), 0.75), {"label": 1})
    (found,) = classify_dataset(Said(), _One(item))
    assert found["logits"].tolist() == [0.5, 0.5]


class _One(torch.utils.data.Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 1

    def __getitem__(self, key):
        return self.item


# ---- the optimizer


def test_layer_decay_and_what_a_model_keeps_from_decay():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2)
    optimizer = build_optimizer(model, SGD(kind="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5))
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rate[id(model.head.weight)] == (1.0, 0.1)
    assert rate[id(model.blocks[2].mlp.fc1.weight)] == (0.5, 0.1)
    assert rate[id(model.blocks[0].mlp.fc1.weight)] == (0.125, 0.1)
    assert rate[id(model.patch_embed.proj.weight)] == (0.0625, 0.1)
    assert rate[id(model.pos_embed)][1] == 0
    assert len(rate) == len(list(model.parameters()))
    with pytest.raises(RunError, match="does not tell its layers"):
        build_optimizer(torch.nn.Linear(2, 2), SGD(kind="sgd", layer_decay=0.5))


# ---- whole runs

RECIPE = """
name: colours
task: classification
data:
  kind: image-folder
  root: ROOT
  test: test
  size: 32
  crop_pct: 1.0
  batch: 4
  workers: 0
  augment: {scale: [0.5, 1.0], rand_augment: {layers: 1}, erase: 0.2}
teacher: {kind: timm, model: resnet10t, train: {epochs: 1}}
student: {kind: timm, model: deepvit_16b, options: {img_size: 32, depth: 2, embed_dim: 36, num_heads: 3}}
distillers:
  - {kind: logit-kd}
  - {kind: dkd}
  - {kind: dist}
  - {kind: hard-token}
  - {kind: attention-transfer, student_at: patch_embed, teacher_at: layer3, weight: 0.1}
  - {kind: relational-kd, student_at: norm, teacher_at: layer4, weight: 0.01, name: relations}
  - {kind: token-labeling, mix_token: false}
  - {kind: token-labeling, source: labels, name: mixed}
train: {epochs: 1, threads: 1, optimizer: {kind: adamw, lr: 1e-3}, schedule: {kind: cosine, warmup: 1}}
evaluate: {split: test}
compare:
  - {row: alone, distillers: none}
  - {row: class, distillers: [logit_kd, dkd, dist, hard_token, attention_transfer]}
  - {row: tokens, distillers: [token_labeling]}
  - {row: mixed, distillers: [mixed]}
"""


def recipe_of(folder, *changes, text=RECIPE):
    (folder / "colours.yaml").write_text(text.replace("ROOT", str(folder / "set")))
    return load(folder / "colours.yaml", [f"output={folder}", *changes])


def changed(**blocks):
    """The recipe without its teacher, and with these blocks."""
    kept = {key: value for key, value in yaml.safe_load(RECIPE).items() if key != "teacher"}
    return yaml.safe_dump(kept | blocks)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    folder_of_colours(folder / "set")
    recipe = recipe_of(folder)
    return SimpleNamespace(recipe=recipe, folder=run(recipe, console=Console(quiet=True)), file=folder / "colours.yaml")


def test_a_run_leaves_a_table_a_report_and_a_confusion_matrix(done):
    rows = {row["row"]: row for row in json.loads((done.folder / "table.json").read_text())}
    assert list(rows) == ["teacher", "alone", "class", "tokens", "mixed"]
    assert all(0 <= row["top1"] <= row["top5"] == 1 for row in rows.values())
    scores = json.loads((done.folder / "tokens" / "scores-test.json").read_text())
    assert np.array(scores["confusion"]).sum() == 24
    assert (done.folder / "report.html").read_text().count("data:image/png;base64,") == 3
    losses = [json.loads(line) for line in (done.folder / "class" / "metrics.jsonl").read_text().splitlines()]
    assert {"task", "logit_kd", "dkd", "dist", "hard_token", "attention_transfer"} == set(losses[0]["losses"])
    losses = [json.loads(line) for line in (done.folder / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert set(losses[0]["losses"]) == {"mixed"}


def test_check_finds_nothing_wrong_and_says_what_a_step_gives(done):
    findings = list(check(done.recipe))
    assert [f for f in findings if f.level == "error"] == []
    assert any("token_labeling" in f.what for f in findings)


def test_eval_prints_every_class(done):
    printed = CliRunner().invoke(app, ["eval", str(done.file), f"output={done.file.parent}", "--model", "tokens"])
    assert printed.exit_code == 0, printed.output
    assert "recall" in printed.output
    assert "top1" in printed.output


def test_predict_gives_the_likeliest_classes(done, tmp_path):
    rows = predict(done.recipe, "tokens", [done.file.parent / "set" / "test" / "red"], tmp_path)
    assert len(rows) == 8
    assert rows == json.loads((tmp_path / "predictions.json").read_text())
    assert sum(c["probability"] for c in rows[0]["classes"]) == pytest.approx(1, abs=1e-5)


def test_export_agrees(done, tmp_path):
    differences = export(done.recipe, "alone", tmp_path, ["safetensors", "torch-export", "onnx"], Console(quiet=True))
    assert max(differences.values()) < 1e-3
    assert json.loads((tmp_path / "decode.json").read_text())["classes"] == ["blue", "green", "red"]


def test_a_run_on_stored_label_maps(tmp_path):
    """From `distillkit label` to a student: its annotator is the teacher that a run trained, saved as a file."""
    root = folder_of_colours(tmp_path / "set", 4)
    teacher = recipe_of(tmp_path, "compare=[]", "distillers=[]", "name=first")
    run(teacher, console=Console(quiet=True))
    weights = tmp_path / "first" / "teacher" / "final.safetensors"
    label("resnet10t", root / "train", tmp_path / "maps", k=3, size=64, pretrained=str(weights), threads=1, workers=0)
    text = changed(distillers=[{"kind": "token-labeling", "source": "maps"}], compare=["distilled"])
    recipe = recipe_of(tmp_path, f"data.label_maps={tmp_path / 'maps'}", text=text)
    assert [f for f in check(recipe) if f.level == "error"] == []
    folder = run(recipe, console=Console(quiet=True))
    assert json.loads((folder / "table.json").read_text())[0]["row"] == "distilled"
    (root / "train" / "red" / "new.png").write_bytes(png("red"))
    with pytest.raises(ValueError, match=r"red/new\.png"):
        build.build_data(recipe, "train", augmented=True)


def test_label_maps_of_other_classes_or_by_another_annotator_are_refused(tmp_path):
    root = folder_of_colours(tmp_path / "set", 4)
    torch.manual_seed(0)
    for classes in (2, 3):
        weights = tmp_path / f"{classes}.pt"
        torch.save(timm.create_model("resnet10t", num_classes=classes).state_dict(), weights)
        label(
            "resnet10t", root / "train", tmp_path / f"maps{classes}", k=2, size=64, pretrained=str(weights), workers=0
        )
    text = changed(distillers=[{"kind": "token-labeling", "source": "maps", "mix_token": False}], compare=["distilled"])

    def data(classes, *changes):
        recipe = recipe_of(tmp_path, f"data.label_maps={tmp_path / f'maps{classes}'}", *changes, text=text)
        return build.build_data(recipe, "train", augmented=True), recipe

    with pytest.raises(RunError, match=r"its label maps are of 2 classes \(resnet10t\), the data have 3: let a"):
        data(2)
    data(3, "data.annotator=resnet10t")
    with pytest.raises(LabelMapError, match=r"maps of resnet10t .* expected those of resnet18"):
        data(3, "data.annotator=resnet18")

    _, recipe = data(3)
    run(recipe, console=Console(quiet=True))
    assert any(f.where == "data.label_maps" and "12 maps of 2 x 2 cells by resnet10t" in f.what for f in check(recipe))
    shard = next((tmp_path / "maps3").glob("*.bin"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert any(f.level == "error" and "the checksum is not that of" in f.what for f in check(recipe))
    (tmp_path / "maps3").rename(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    again = str(tmp_path / "3.pt")
    label("resnet10t", root / "train", tmp_path / "maps3", k=3, size=64, pretrained=again, workers=0)
    with pytest.raises(RunError, match="was begun with other label maps than those that"):
        run(recipe, console=Console(quiet=True))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    folder_of_colours(tmp_path / "set", 4)
    weights = tmp_path / "five.pt"
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), weights)
    text = yaml.safe_dump(yaml.safe_load(RECIPE) | {"distillers": [{"kind": "logit-kd"}], "compare": ["distilled"]})
    recipe = recipe_of(tmp_path, f"teacher={{kind: timm, model: resnet10t, pretrained: {weights}}}", text=text)
    words = "teacher: the pretrained weights of resnet10t are of 5 classes, the data have 3: it would teach with a"
    assert any(words in f.what for f in check(recipe))
    with pytest.raises(RunError, match=words):
        run(recipe, console=Console(quiet=True))
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), weights)
    run(recipe, console=Console(quiet=True))


def test_the_labels_teach_one_head_of_deit_and_the_teacher_the_other(tmp_path):
    folder_of_colours(tmp_path / "set", 4)
    student = {
        "kind": "timm",
        "model": "deit_tiny_distilled_patch16_224",
        "options": {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2},
    }
    text = changed(
        distillers=[{"kind": "hard-token", "student_at": "head_dist"}], student=student, compare=["distilled"]
    )
    recipe = recipe_of(tmp_path, text=text + "teacher: {kind: timm, model: resnet10t, train: {epochs: 1}}\n")
    model = build.build_model(recipe.student, 3, recipe.evaluate)
    teachers = {"teacher": build.build_model(recipe.teacher, 3, recipe.evaluate)}
    distillers = build.build_distillers(recipe, "all", 3, recipe.train)
    wrapped = build.build_wrapped(recipe, model, teachers, distillers).train()
    losses = wrapped(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    losses["task"].backward(retain_graph=True)
    assert model.head_dist.weight.grad is None or not model.head_dist.weight.grad.any()
    losses["hard_token"].backward()
    assert model.head_dist.weight.grad.any()


def test_released_label_maps_are_read_in_the_released_order(tmp_path):
    root = folder_of_colours(tmp_path / "set", 4)
    weights = tmp_path / "w.pt"
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), weights)
    label("resnet10t", root / "train", tmp_path / "maps", k=2, size=96, pretrained=str(weights), workers=0)
    distiller = {"kind": "token-labeling", "source": "maps", "mix_token": False, "convention": "release"}
    text = changed(distillers=[distiller], compare=["distilled"])
    how = [f"data.label_maps={tmp_path / 'maps'}", "data.augment.rand_augment=rand-m9-n3-mstd0.5-inc1"]
    recipe = recipe_of(tmp_path, *how, text=text)
    view = build.build_data(recipe, "train", augmented=True).transform
    assert (view.crop_last, view.rand_augment.convention, view.rand_augment.layers) == (True, "release", 3)
    assert view.rand_augment.fill == [124, 116, 104]
    run(recipe, console=Console(quiet=True))
    mixed = changed(distillers=[distiller, distiller | {"convention": "default", "name": "b"}], compare=["distilled"])
    with pytest.raises(RecipeError, match="give all token-labeling the same convention"):
        recipe_of(tmp_path, *how, text=mixed)


def test_token_labels_are_smoothed_as_the_recipe_says(tmp_path):
    folder_of_colours(tmp_path / "set", 4)
    recipe = recipe_of(tmp_path, "smoothing=0.2", "distillers.7.smoothing=0.05")
    built = {d.name: d for d in build.build_distillers(recipe, "all", 3, recipe.train)}
    assert (built["token_labeling"].smoothing, built["mixed"].smoothing) == (0.2, 0.05)


def test_check_lists_every_problem_of_the_data(tmp_path):
    root = folder_of_colours(tmp_path / "set", 4)
    for i in range(25):
        (root / "train" / f"empty{i}").mkdir()
    whats = [f.what for f in check(recipe_of(tmp_path)) if f.where == "data.train"]
    assert sum("holds no picture" in what for what in whats) == 25


@pytest.mark.parametrize(("convention", "region"), [("default", "center_square"), ("release", "full")])
def test_published_label_maps_are_read_by_a_recipe(tmp_path, convention, region):
    root = folder_of_colours(tmp_path / "set", 4)
    stored = torch.stack([torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])])[:, :, None, None].expand(2, 2, 3, 3)
    for picture in (root / "train").glob("*/*"):
        path = tmp_path / "maps" / picture.parent.name / (picture.name.partition(".")[0] + ".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored.half(), path)
    distiller = {"kind": "token-labeling", "source": "maps", "mix_token": False, "convention": convention}
    text = changed(distillers=[distiller], compare=["distilled"])
    recipe = recipe_of(tmp_path, f"data.label_maps={tmp_path / 'maps'}", "data.augment.rand_augment=null", text=text)
    data = build.build_data(recipe, "train", augmented=True)
    assert (data.region or data.maps.region) == region
    assert data[0, 0][1]["label_map"].indices[:, 0, 0].tolist() == [1, 0]
    run(recipe, console=Console(quiet=True))
    path.unlink()
    with pytest.raises(LabelMapError, match=r"1 pictures have no map"):
        build.build_data(recipe, "train", augmented=True)


def test_mixup_and_cutmix_mix_pictures_and_labels(tmp_path):
    folder_of_colours(tmp_path / "set", 4)
    text = changed(distillers=[], compare=["student"])
    recipe = recipe_of(tmp_path, "data.augment.mixup=0.8", "data.augment.cutmix=1.0", text=text)
    from distillkit.training.batches import batches

    student = build.build_model(recipe.student, 3, recipe.evaluate)
    how = batches(recipe, student, 3)
    data = build.build_data(recipe, "train", augmented=True)
    pictures, targets = how["collate"]([data[0, i] for i in range(6)])
    torch.manual_seed(0)
    mixed, labels = how["prepare"](pictures, targets)
    assert labels.shape == (6, 3)
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    assert (labels > 0).sum() > 6
    assert mixed.shape == pictures.shape
    run(recipe, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.augment.mixup=0.8", "mixes pictures, and dkd needs the one true class"),
        ("distillers.6.source=maps", "give data.label_maps"),
        ("distillers.6.teacher=x", "no teacher is called 'x'"),
        ("student.options.checkpoint_path=x", "cannot be given here"),
        ("student.model=hf-hub:a/b", "expected the name of a timm model"),
        ("distillers.0.kind=ld", "kind"),
        ("data.kind=coco", "kind"),
        ("teacher.train=null", "has no trained weights"),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    with pytest.raises(RecipeError, match=words):
        recipe_of(tmp_path, change)


def test_a_classifier_of_other_classes_is_not_taken_for_a_trained_one(tmp_path):
    save_file(classifier("test_resnet", 5).state_dict(), tmp_path / "five.safetensors")
    config = TimmModel(kind="timm", model="test_resnet", pretrained=str(tmp_path / "five.safetensors"))
    assert build.other_head(config, 3) == 5
    assert build.other_head(config, 5) is None
    assert build.other_head(config.model_copy(update={"pretrained": False}), 3) is None
    assert build.other_head(config.model_copy(update={"checkpoint": "x"}), 3) is None
