"""Whole runs on rotated boxes, and the verbs on what they leave: tiles, submission, scores, predictions, export."""

import json
import math
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from distillkit.boxes.merged import Merged
from distillkit.boxes.rotated import corners
from distillkit.cli import app
from distillkit.data.large import open_windows, overview
from distillkit.data.problems import DataError
from distillkit.data.scenes import Scenes
from distillkit.evaluation.submission import SubmissionError
from distillkit.recipe import RecipeError, load
from distillkit.training import build, checkpoint
from distillkit.training.check import check
from distillkit.training.errors import RunError
from distillkit.training.evaluate import evaluate, evaluate_submission, predicted
from distillkit.training.export import export
from distillkit.training.named import named_model
from distillkit.training.predict import predict
from distillkit.training.run import run
from distillkit.training.tiles import cut_tiles

MODEL = "backbone: lcnet_035, channels: 16, convs: 1, strides: [8, 16, 32]"
RECIPE = f"""
name: turned
task: rotated-detection
data:
  kind: dota
  root: ROOT
  classes: [even, odd]
  tiles: {{size: 96, overlap: 32}}
  size: 96
  batch: 4
  workers: 0
  augment: {{flip: 0.25, flip_vertical: 0.25, flip_diagonal: 0.25}}
  skip_empty: true
teacher: {{kind: KIND, {MODEL}, bins: 12, train: {{epochs: 1}}}}
student: {{kind: KIND, {MODEL}, bins: 12}}
distillers:
  - {{kind: ld, region: main}}
  - {{kind: ld, region: valuable}}
  - {{kind: logit-kd, region: main, protocol: sigmoid}}
  - {{kind: feature-imitation, region: boxes}}
train: {{epochs: 1, threads: 1, schedule: {{kind: cosine, warmup: 1}}}}
evaluate: {{score: 0.0, most: 20, submission: Task1}}
"""


def folder_of_scenes(root, pictures=3, size=(160, 200)):
    """A set in DOTA's layout: pictures larger than a tile, digits called even and odd."""
    for split in ("train", "val"):
        scenes = Scenes(pictures, size, 0, split, (2, 4), turn=60)
        for folder in ("images", "labelTxt"):
            (root / split / folder).mkdir(parents=True)
        for i in range(pictures):
            scene = scenes.scene(i)
            Image.fromarray(scene.image).save(root / split / "images" / f"P{i}.png")
            quads = corners(torch.from_numpy(scene.rotated_boxes).double()).flatten(1).tolist()
            rows = [
                f"{' '.join(f'{v:.2f}' for v in quad)} {('even', 'odd')[digit % 2]} {int(i == 1)}\n"
                for quad, digit in zip(quads, scene.labels, strict=True)
            ]
            (root / split / "labelTxt" / f"P{i}.txt").write_text("imagesource:scenes\ngsd:1\n" + "".join(rows))
    return root


@pytest.fixture(scope="module", params=["rotated-gfl", "rotated-retina"])
def done(request, tmp_path_factory):
    """A recipe, and the folder of its run."""
    folder = tmp_path_factory.mktemp(request.param)
    folder_of_scenes(folder / "set")
    text = RECIPE.replace("ROOT", str(folder / "set")).replace("KIND", request.param)
    (folder / "turned.yaml").write_text(text)
    recipe = load(folder / "turned.yaml", [f"output={folder}"])
    return SimpleNamespace(recipe=recipe, folder=run(recipe, console=Console(quiet=True)), file=folder / "turned.yaml")


def test_check_finds_nothing_wrong(done):
    assert [f for f in check(done.recipe) if f.level == "error"] == []


def test_a_run_leaves_pictures_a_table_and_submissions(done):
    assert (done.folder / "report.html").read_text().count("data:image/png;base64,") == 4
    rows = {row["row"]: row for row in json.loads((done.folder / "table.json").read_text())}
    assert list(rows) == ["teacher", "student", "distilled"]
    for row in rows:
        with zipfile.ZipFile(done.folder / row / "Task1-val" / "submission.zip") as archive:
            assert sorted(archive.namelist()) == ["Task1_even.txt", "Task1_odd.txt"]
            lines = b"".join(map(archive.read, archive.namelist())).decode().splitlines()
        assert {line.split()[0] for line in lines} == {"P0", "P1", "P2"}  # pictures, not tiles
        assert len(lines) > done.recipe.evaluate.most  # of a tile, not of a picture


def test_the_pictures_are_judged_not_their_tiles(done):
    scores = json.loads((done.folder / "student" / "scores-val.json").read_text())
    there = [len(Scenes(3, (160, 200), 0, "val", (2, 4), turn=60).scene(i).labels) for i in (0, 2)]  # P1 is difficult
    assert sum(row["boxes"] for row in scores["classes"].values()) == sum(there)


def test_a_submission_has_the_scores_of_the_run(done):
    scores = json.loads((done.folder / "student" / "scores-val.json").read_text())
    written = done.folder / "student" / "Task1-val"
    for path in (written, written / "submission.zip"):
        again = evaluate_submission(done.recipe, path, "val").numbers
        assert again == pytest.approx({name: scores[name] for name in again}, abs=1e-6)
    assert evaluate(done.recipe, "student", "val").numbers == pytest.approx(again, abs=1e-6)


def test_the_annotations_themselves_score_100_in_both_tasks(done, tmp_path):
    from distillkit.evaluation.submission import write_submission

    whole = build.build_data(done.recipe, "val", augmented=False).whole
    found = [{**row, "scores": torch.ones(len(row["boxes"])), "scale": (1.0, 1.0)} for row in whole.truth()]
    names = {record.image_id: record.path.stem for record in whole.records}
    for task in ("Task1", "Task2"):
        write_submission(tmp_path / task, found, names, whole.classes, task)
        printed = CliRunner().invoke(app, ["eval", str(done.file), "--submission", str(tmp_path / task)])
        assert printed.exit_code == 0, printed.output
        assert "AP          100.0" in printed.output.replace("AP50", "")


def test_a_submission_and_a_model_exclude_each_other(done):
    printed = CliRunner().invoke(app, ["eval", str(done.file), "--submission", "x.zip", "--model", "student"])
    assert printed.exit_code == 2
    assert "not both" in printed.output


def test_predict_writes_rotated_boxes_of_the_picture_and_a_submission(done, tmp_path):
    seen = []
    picture = done.file.parent / "set" / "val" / "images" / "P0.png"
    rows = predict(done.recipe, "student", [picture], tmp_path, "Task1", lambda *said: seen.append(said))
    assert rows == json.loads((tmp_path / "predictions.json").read_text())
    assert seen[-1] == ("pictures", 1, 1)
    assert ("P0.png", 6, 6) in seen  # tiles
    lines = [p.read_text().splitlines() for p in sorted((tmp_path / "Task1").glob("Task1_*.txt"))]
    assert 0 < sum(map(len, lines)) == len(rows)
    for row in rows:
        cx, cy, width, height, angle = row["rotated_bbox"]
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        around = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2] @ turn.T + [cx, cy]
        polygon = np.array(row["polygon"]).reshape(4, 2)
        assert np.abs(np.sort(polygon, 0) - np.sort(around, 0)).max() < 1e-2
        x, y, w, h = row["bbox"]
        assert np.allclose([x, y, x + w, y + h], [*polygon.min(0), *polygon.max(0)], atol=1e-2)
    # the same picture in the run: the same windows, the same boxes
    written = (done.folder / "student" / "Task1-val").glob("Task1_*.txt")
    of_run = sorted(line for p in written for line in p.read_text().splitlines() if line.startswith("P0 "))
    mine = sorted(line for file in lines for line in file)
    assert [line.split()[0] for line in mine] == [line.split()[0] for line in of_run]
    first, second = (np.array([line.split()[1:] for line in both], float) for both in (mine, of_run))
    assert np.abs(first[:, 0] - second[:, 0]).max() < 1e-4


def test_predict_of_upright_boxes_has_no_submission(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(RunError, match="a submission is for rotated boxes"):
        predict(load("quickstart"), None, [tmp_path / "a.png"], tmp_path / "out", "Task1")


def test_export_agrees_and_says_how_to_decode(done, tmp_path):
    differences = export(done.recipe, "student", tmp_path, ["safetensors", "torch-export", "onnx"], Console(quiet=True))
    assert max(differences.values()) < 1e-3
    how = json.loads((tmp_path / "decode.json").read_text())
    student = build.build_model(done.recipe.student, 2, done.recipe.evaluate)
    build.load_checkpoint(student, tmp_path / "student.safetensors")
    student.eval()
    image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(1))
    student.inference = type(student.inference)(score=0.0, most=1)
    (found,) = student([image])
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    maps = session.run(None, {"pictures": image[None].numpy()})
    box, label = (_decode_gfl if "anchors" not in how else _decode_retina)(maps, how)
    ours = corners(found["boxes"][0].detach().double())
    assert label == int(found["labels"][0])
    # a box has two names (half a turn apart), so corners are compared as sets
    distances = torch.cdist(corners(torch.tensor(box, dtype=torch.float64)), ours)
    assert float(distances.min(1).values.max()) < 0.05


def _best(maps, how, anchors=1):
    levels = len(how["strides"])
    level = max(range(levels), key=lambda i: maps[i].max())
    channel, y, x = np.unravel_index(maps[level][0].argmax(), maps[level][0].shape)
    anchor, label = divmod(int(channel), len(how["classes"]))
    logits = maps[levels + level][0, :, y, x].reshape(anchors, 5, how["bins"])[anchor].astype(float)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    stride = how["strides"][level]
    point = ((x + how["centre"]) * stride, (y + how["centre"]) * stride)
    return p / p.sum(-1, keepdims=True), point, stride, anchor, label


def _decode_gfl(maps, how):
    """As decode.json says it."""
    p, (px, py), stride, _, label = _best(maps, how)
    bins = np.arange(how["bins"])
    at = (bins / how["bins"] - 0.5) * math.pi
    angle = 0.5 * math.atan2((p[4] * np.sin(2 * at)).sum(), (p[4] * np.cos(2 * at)).sum())
    left, top, right, bottom = (p[:4] * bins * stride).sum(-1)
    dx, dy = (right - left) / 2, (bottom - top) / 2
    centre = (
        px + dx * math.cos(angle) - dy * math.sin(angle),
        py + dx * math.sin(angle) + dy * math.cos(angle),
    )
    return [*centre, left + right, top + bottom, angle], label


def _decode_retina(maps, how):
    """As decode.json says it."""
    p, (px, py), stride, anchor, label = _best(maps, how, len(how["anchors"]))
    dx, dy, dw, dh, angle = (p * np.array(how["support"])).sum(-1)
    width, height = np.array(how["anchors"][anchor]) * stride
    return [px + dx * width, py + dy * height, width * math.exp(dw), height * math.exp(dh), angle], label


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.size=[96,128]", r"data: size: tiles are square"),
        ("data.tiles.overlap=96", "overlap: expected less than size"),
        ("evaluate.submission=Task3", "Task1"),
        ("student.angle=le91", "angle"),
        ("student.kind=gfl", "kind"),
        ("teacher.train=null", "has no trained weights"),
        ("data.augment.flip=0.9", "flips? exclude|exclude each other"),
        ("distillers.0.overlap=turned", "overlap"),
        ("evaluate.split=test", r"data\.test is not given"),
    ],
)
def test_mistakes_of_rotated_recipes_are_named(tmp_path, change, words):
    (tmp_path / "turned.yaml").write_text(RECIPE.replace("ROOT", "x").replace("KIND", "rotated-retina"))
    with pytest.raises(RecipeError, match=words):
        load(tmp_path / "turned.yaml", [change])


def test_a_submission_needs_pictures_with_names():
    with pytest.raises(RecipeError, match="is for data of kind dota"):
        load("quickstart_rotated", ["evaluate.submission=Task1"])
    with pytest.raises(RunError, match="is scored on data of kind dota"):
        evaluate_submission(load("quickstart_rotated"), "x.zip", "val")


def test_ld_dota_is_the_published_setting():
    """Spec: Rotated-LD's GWD config; the golden file is matched with these numbers."""
    recipe = load("ld_dota", ["data.root=x"])
    ld, kd = build.build_distillers(recipe, "all", 15, recipe.train)
    assert (ld.region, kd.region) == (Merged(), Merged())
    assert (ld.temperature, ld.weight.value, ld.convention) == (5, 10, "release")
    assert (kd.temperature, kd.weight.value, kd.convention, kd.anchor_weight) == (5, 20, "release", "iou")
    data, train, teacher = recipe.data, recipe.train, recipe.teacher
    assert (data.size, data.batch, data.tiles.size, data.tiles.overlap) == ([1024, 1024], 2, 1024, 200)
    assert (data.augment.flip, data.augment.flip_vertical, data.augment.flip_diagonal) == (0.25, 0.25, 0.25)
    assert (data.teach_difficult, data.skip_empty, data.classes) == (True, True, "v1.0")
    assert (train.epochs, train.clip, train.freeze_bn) == (12, 35, True)
    optimizer = train.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.0025, 0.9, 1e-4)
    assert (train.schedule.milestones, train.schedule.warmup, train.schedule.warmup_factor) == ([8, 11], 500, 0.333)
    assert (teacher.backbone, recipe.student.backbone) == ("resnet34.tv_in1k", "resnet18.tv_in1k")
    assert teacher.train == {"epochs": 24, "schedule": {"milestones": [16, 22]}}
    for model in (teacher, recipe.student):
        assert (model.kind, model.angle, model.loss, model.bins, model.frozen_stages) == (
            "rotated-retina", "le90", "gwd", 9, 1,
        )  # fmt: skip
    assert recipe.evaluate.submission == "Task1"


def written_recipe(folder, **changes):
    """The recipe of these tests on a new set of ``folder``."""
    if not (folder / "set").exists():
        folder_of_scenes(folder / "set")
    text = RECIPE.replace("ROOT", str(folder / "set")).replace("KIND", "rotated-gfl")
    (folder / "turned.yaml").write_text(text)
    return load(folder / "turned.yaml", [f"output={folder}", *(f"{key}={value}" for key, value in changes.items())])


def test_check_reads_a_test_split_that_a_run_does_not_judge_on(tmp_path):
    recipe = written_recipe(tmp_path, **{"data.test": "val"})
    assert [f for f in check(recipe) if f.level == "error"] == []


def test_check_blames_only_the_broken_split(tmp_path):
    recipe = written_recipe(tmp_path)
    labels = tmp_path / "set" / "val" / "labelTxt" / "P0.txt"
    labels.write_text(labels.read_text() + "1 2 3 4 5 6 7 even 0\n")
    wrong = [f for f in check(recipe) if f.level == "error"]
    assert [f.where for f in wrong] == ["data.val"]
    assert "7 coordinates" in wrong[0].what


def test_check_says_when_nothing_is_left_to_learn(tmp_path):
    recipe = written_recipe(tmp_path)
    for labels in (tmp_path / "set" / "train" / "labelTxt").glob("*.txt"):
        labels.write_text(labels.read_text().replace(" 0\n", " 1\n"))
    wrong = [f.what for f in check(recipe) if f.level == "error"]
    assert len(wrong) == 1
    assert "skip_empty leaves out all others" in wrong[0]


def test_difficult_objects_are_taught_where_the_recipe_says_so(tmp_path):
    recipe = written_recipe(tmp_path, **{"data.tiles": "null", "data.teach_difficult": "true"})
    there = [len(Scenes(3, (160, 200), 0, "train", (2, 4), turn=60).scene(i).labels) for i in range(3)]
    assert build.build_data(recipe, "train", augmented=True).usable_boxes == sum(there)
    without = written_recipe(tmp_path, **{"data.tiles": "null"})
    assert build.build_data(without, "train", augmented=True).usable_boxes == there[0] + there[2]


def test_names_and_files_are_checked_before_anything_is_predicted(done, tmp_path):
    good = done.file.parent / "set" / "val" / "images" / "P0.png"
    (tmp_path / "in").mkdir()
    for name in ("A.png", "B b.png"):
        (tmp_path / "in" / name).write_bytes(good.read_bytes())
    with pytest.raises(SubmissionError, match="'B b' is empty or has white space"):
        predict(done.recipe, "student", [tmp_path / "in"], tmp_path / "out", "Task1")
    (tmp_path / "in" / "B b.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"B b\.png"):
        predict(done.recipe, "student", [tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_windows_see_objects_as_large_as_training_did(done, tmp_path):
    """Tiles of 48 pixels that the network gets at 96: a picture is looked at twice as large, in as many windows."""
    recipe = load(done.file, [f"output={tmp_path}", "data.tiles.size=48", "data.tiles.overlap=16"])
    weights = done.folder / "student" / "final.safetensors"
    seen = []
    picture = done.file.parent / "set" / "val" / "images" / "P0.png"
    rows = predict(recipe, weights, [picture], tmp_path, None, lambda *said: seen.append(said))
    cut_tiles(recipe, ["val"])
    tiles = list((build.tiles_folder(recipe, recipe.data, recipe.data.tiles) / "val" / "images").glob("P0__*"))
    assert ("P0.png", len(tiles), len(tiles)) in seen
    data = build.build_data(recipe, "val", augmented=False)
    student = build.build_model(recipe.student, 2, recipe.evaluate)
    build.load_checkpoint(student, weights)
    (of_run,) = [row for row in predicted(recipe, student, data) if row["image_id"] == data.whole.records[0].image_id]
    # pixels differ a little: these were resized by torch, those of the run by Pillow
    assert len(of_run["boxes"]) == pytest.approx(len(rows), rel=0.05)
    best = max(rows, key=lambda row: row["score"])
    assert best["score"] == pytest.approx(float(of_run["scores"][0]), abs=0.02)
    assert best["rotated_bbox"][2:4] == pytest.approx(of_run["boxes"][0, 2:4].tolist(), rel=0.1)


def test_nothing_is_found_in_the_padding_of_tiles(tmp_path):
    recipe = written_recipe(tmp_path, **{"data.tiles.size": 256, "data.size": 256})
    cut_tiles(recipe, ["train", "val"])
    data = build.build_data(recipe, "val", augmented=False)

    class Everywhere(torch.nn.Module):
        def forward(self, images):
            boxes = torch.tensor([[100.0, 80, 20, 10, 0.3], [240, 80, 20, 10, 0.3], [100, 200, 20, 10, 0.3]])
            return [{"boxes": boxes, "scores": torch.ones(3), "labels": torch.zeros(3).long()} for _ in images]

    found = predicted(recipe, Everywhere(), data)
    assert [row["boxes"].tolist() for row in found] == [[pytest.approx([100, 80, 20, 10, 0.3])]] * 3


def test_trained_weights_need_no_others(tmp_path, monkeypatch):
    import timm

    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: made(*a, **{**k, "pretrained": False}))
    recipe = written_recipe(tmp_path, **{"student.pretrained": "true"})
    student = build.build_model(recipe.student, 2, recipe.evaluate)
    checkpoint.save_weights(tmp_path / "w.safetensors", student.state_dict())

    def offline(*args, **options):
        assert not options.get("pretrained")
        return made(*args, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    named_model(recipe, str(tmp_path / "w.safetensors"), 2)


def test_the_classes_of_ships_need_no_data(tmp_path):
    hrsc = "task: rotated-detection\ndata: {kind: hrsc, root: /nowhere}\nstudent: {kind: rotated-gfl}\n"
    (tmp_path / "ships.yaml").write_text(hrsc)
    recipe = load(tmp_path / "ships.yaml")
    assert build.build_classes(recipe) == (["ship"], [1])
    assert recipe.data.keep_ratio


@pytest.mark.parametrize(("change", "words"), [("a b", "white space"), (None, "cannot be part of a file's name")])
def test_names_that_no_submission_can_hold_are_found_before_the_training(tmp_path, change, words):
    root = folder_of_scenes(tmp_path / "set", 1)
    text = RECIPE.replace("ROOT", str(root)).replace("KIND", "rotated-gfl")
    if change is None:
        text = text.replace("classes: [even, odd]", "classes: [even, odd, ship/boat]")
    else:
        for path in (root / "val").rglob("P0.*"):
            path.rename(path.with_stem(change))
    (tmp_path / "turned.yaml").write_text(text)
    recipe = load(tmp_path / "turned.yaml", [f"output={tmp_path}"])
    found = [f.what for f in check(recipe) if f.where == "evaluate.submission"]
    assert len(found) == 1
    assert words in found[0]
    with pytest.raises(SubmissionError, match=words):
        run(recipe, console=Console(quiet=True))
    assert not (tmp_path / "turned" / "teacher").exists()


def test_a_split_of_difficult_objects_alone_cannot_be_judged(tmp_path):
    root = folder_of_scenes(tmp_path / "set", 1)
    labels = root / "val" / "labelTxt" / "P0.txt"
    labels.write_text(labels.read_text().replace(" 0\n", " 1\n"))
    text = RECIPE.replace("ROOT", str(root)).replace("KIND", "rotated-gfl").replace("skip_empty", "teach_difficult")
    (tmp_path / "turned.yaml").write_text(text)
    with pytest.raises(RunError, match=r"data\.val is what models are judged on, and has no box to be found"):
        run(load(tmp_path / "turned.yaml", [f"output={tmp_path}"]), console=Console(quiet=True))


def test_tiles_of_other_pictures_or_classes_are_in_other_folders():
    def folder(*overrides):
        recipe = load("ld_dota", overrides)
        return build.tiles_folder(recipe, recipe.data, recipe.data.tiles)

    folders = [folder("data.root=/a/set"), folder("data.root=/b/set"), folder("data.root=/a/set", "data.classes=v1.5")]
    assert len(set(folders)) == 3
    assert folder("data.root=/a/set", "name=other") == folders[0]
    assert str(folder("data.root=/a/set", "data.tiles.folder=mine")) == "mine"


def test_only_what_a_run_reads_is_cut(tmp_path):
    """Labels of a split that nobody asks for need not be there."""
    root = folder_of_scenes(tmp_path / "set", 1)
    (tmp_path / "turned.yaml").write_text(RECIPE.replace("ROOT", str(root)).replace("KIND", "rotated-gfl"))
    recipe = load(tmp_path / "turned.yaml", [f"output={tmp_path}", "data.test=test"])
    assert set(cut_tiles(recipe, ["train", "val", "val"])) == {"train", "val"}
    with pytest.raises(DataError, match="test/images: no such folder"):
        cut_tiles(recipe, ["test"])


def test_two_processes_do_not_cut_into_one_folder(tmp_path):
    root = folder_of_scenes(tmp_path / "set", 1)
    (tmp_path / "turned.yaml").write_text(RECIPE.replace("ROOT", str(root)).replace("KIND", "rotated-gfl"))
    recipe = load(tmp_path / "turned.yaml", [f"output={tmp_path}", f"data.tiles.folder={tmp_path / 'tiles'}"])
    hold = (
        "import sys, time, pathlib; from distillkit.training.folder import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "tiles")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"worked in by the process {holder.pid}: wait"):
            cut_tiles(recipe, ["train"])
        verb = ["tile", str(root), "--out", str(tmp_path / "tiles"), "--classes", "even,odd"]
        assert f"process {holder.pid}" in CliRunner().invoke(app, verb).output.replace("\n", " ")
    finally:
        holder.kill()
        holder.communicate()
    assert cut_tiles(recipe, ["train"])["train"].tiles == 6


def test_the_tile_verb_cuts_and_goes_on(tmp_path):
    root = folder_of_scenes(tmp_path / "set")
    command = ["tile", str(root), "--out", str(tmp_path / "tiles"), "--classes", "even, odd", "--size", "96"]
    command += ["--overlap", "32", "--split", "val", "--scales", "0.5,1"]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    tiles = sorted((tmp_path / "tiles/val/images").iterdir())
    assert f"{len(tiles)} tiles of 3 pictures" in printed.output.replace("\n", " ")
    assert len(tiles) == 3 * (6 + 2)  # 3 x 2 windows of 96 in 200 x 160, 2 x 1 in half of it
    before = [tile.stat().st_mtime_ns for tile in tiles]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert [tile.stat().st_mtime_ns for tile in tiles] == before
    refused = CliRunner().invoke(app, [*command[:-1], "1"])
    assert refused.exit_code == 2
    assert "cut in another way" in refused.output.replace("\n", " ")
    refused = CliRunner().invoke(app, [*command[:-1], "one"])
    assert "expected numbers with commas between" in refused.output.replace("\n", " ")


def test_an_overview_is_the_picture_made_smaller(tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (300, 10, 3), dtype=np.uint8), 3, 0), 3, 1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = open_windows(tmp_path / "a.png")
    small, factor = overview(picture, 300)
    assert factor == 3
    assert np.array_equal(small, pixels[::3, ::3])
    same, factor = overview(picture, 900)
    assert factor == 1
    assert np.array_equal(same, pixels)
