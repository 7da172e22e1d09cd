"""A whole run from a recipe, and the verbs on what it leaves."""

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import distillkit
from distillkit.data.scenes import Scenes
from distillkit.recipe import Row, load
from distillkit.training import build
from distillkit.training.errors import CheckpointError, RunError
from distillkit.training.evaluate import evaluate
from distillkit.training.export import export
from distillkit.training.folder import alone_in
from distillkit.training.metrics import read
from distillkit.training.predict import predict
from distillkit.training.run import run, versions
from distillkit.training.table import cells

SAVE = ("train", {"save_every": 7})
RECIPE = """
name: small
data: {kind: scenes, train: 12, val: 6, test: 4, size: 64, batch: 4, workers: 0}
teacher: {kind: gfl, backbone: lcnet_050, channels: 32, convs: 1, strides: [8, 16, 32], train: {epochs: 1}}
student: {kind: gfl, backbone: lcnet_050, channels: 16, convs: 1, strides: [8, 16, 32]}
distillers:
  - {kind: ld, region: main}
  - {kind: ld, region: valuable}
  - {kind: logit-kd, region: main, protocol: sigmoid}
  - {kind: feature-imitation}
  - {kind: self-ld, region: main}
train: {epochs: 1, ema: 0.9, schedule: {kind: cosine, warmup: 1}}
evaluate: {split: test}
compare: [student, distilled, {row: LD alone!, distillers: [ld_main], train: {epochs: 0}}]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(RECIPE)
    return load(folder / "small.yaml", [f"output={folder}"])


@pytest.fixture(scope="module")
def folder(recipe):
    return run(recipe, console=Console(quiet=True))


def test_a_run_leaves_all_its_files(folder):
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "versions.json", "table.md", "table.json", "report.html",
        "curves.png", "pictures.png", "regions.png", "distribution.png",
        "teacher", "student", "distilled", "ld-alone", ".lock",
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<script" not in page
    assert "http" not in page.split("recipe.yaml")[0]
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.split("+")[0]
    assert versions["seed"] == 0
    assert versions["packages"]["distillkit"] == distillkit.__version__


def test_the_table_has_a_row_for_each_model(folder):
    rows = json.loads((folder / "table.json").read_text())
    assert [row["row"] for row in rows] == ["teacher", "student", "distilled", "LD alone!"]
    assert rows[0]["parameters"] > rows[1]["parameters"] == rows[2]["parameters"]
    lines = (folder / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert cells([{**rows[0], "AP": 0.1234, "AP50": -1.0, "minutes": None}])[1][1:] == [
        "12.3", "-", *cells(rows)[1][3:5], "-",
    ]  # fmt: skip
    assert rows[0]["minutes"] > 0
    assert rows[3]["minutes"] is None  # epochs 0


def test_rows_start_from_the_same_weights_and_are_scored_on_the_split(folder):
    metrics = [read(folder / job / "metrics.jsonl")[0] for job in ("student", "distilled")]
    assert metrics[0]["losses"]["loss_bbox"] == metrics[1]["losses"]["loss_bbox"]  # of the first step
    names = {"ld_main", "ld_valuable", "logit_kd", "feature_imitation", "self_ld"}
    assert metrics[1]["losses"].keys() > names
    scores = json.loads((folder / "student" / "scores-test.json").read_text())
    truth = Scenes(4, 64, 0, "test").to_coco_json()
    assert sum(row["boxes"] for row in scores["classes"].values()) == len(truth["annotations"])


def test_a_second_call_trains_nothing(recipe, folder):
    def written():
        return [(folder / job / "final.safetensors").stat().st_mtime_ns for job in ("teacher", "student", "distilled")]

    before = written()
    (folder / "table.md").unlink()
    run(recipe, console=Console(quiet=True))
    assert (folder / "table.md").exists()
    assert written() == before


def test_another_recipe_is_refused_until_fresh(recipe, folder, tmp_path):
    changed = recipe.model_copy(update={"seed": 5})
    with pytest.raises(RunError, match=r"seed was 0, is 5.*--fresh"):
        run(changed, console=Console(quiet=True))
    moved = recipe.model_copy(update={"output": str(tmp_path)})
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="not a run"):
        run(moved, fresh=True, console=Console(quiet=True))
    assert (tmp_path / "small" / "thesis.tex").exists()


def test_a_run_goes_on_with_more_rows_and_other_workers(recipe, folder, tmp_path):
    copied = recipe.model_copy(update={"output": str(tmp_path)})
    shutil.copytree(folder, tmp_path / "small")
    data, train = (getattr(recipe, key).model_copy(update=new) for key, new in (("data", {"workers": 1}), SAVE))
    more = [Row(row="new", distillers="none", train={"epochs": 0}), *recipe.compare]
    printed = Console(record=True, width=200, file=io.StringIO())
    run(copied.model_copy(update={"data": data, "train": train, "compare": more}), console=printed)
    text = printed.export_text()
    assert text.count("done already") == 4
    assert "new: as it came: AP " in text
    assert "new: scoring on test, 4 pictures" in text
    assert "after epoch" not in text
    rows = json.loads((tmp_path / "small" / "table.json").read_text())
    assert [row["row"] for row in rows] == ["teacher", "new", "student", "distilled", "LD alone!"]
    assert load(tmp_path / "small" / "recipe.yaml").compare == more

    done = recipe.compare[1].model_copy(update={"distillers": ["logit_kd"]})
    with pytest.raises(RunError, match=r"compare\.distilled\.distillers was 'all'"):
        run(copied.model_copy(update={"compare": [*more[:2], done, more[3]]}), console=Console(quiet=True))
    with pytest.raises(RunError, match=r"holds the row 'student', which is not in compare.*put it back, or delete"):
        run(copied.model_copy(update={"compare": more[:1]}), console=Console(quiet=True))


def test_a_run_on_another_machine_says_so(recipe, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "small")
    began = tmp_path / "small" / "versions.json"
    changed = json.loads(began.read_text()) | {"threads": 99}
    began.write_text(json.dumps(changed))
    printed = Console(record=True, width=200, file=io.StringIO())
    run(recipe.model_copy(update={"output": str(tmp_path)}), console=printed)
    assert f"threads was 99, is {torch.get_num_threads()}; results may differ" in printed.export_text()


def test_weights_that_are_gone_are_missed(recipe, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "small")
    copied = recipe.model_copy(update={"output": str(tmp_path)})
    job = tmp_path / "small" / "student"
    (job / "final.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"delete result\.json: the training goes on from last\.pt"):
        run(copied, console=Console(quiet=True))
    (job / "result.json").unlink()
    run(copied, console=Console(quiet=True))
    there, here = (load_file(f / "student" / "final.safetensors") for f in (folder, tmp_path / "small"))
    assert all(torch.equal(value, here[name]) for name, value in there.items())


def test_two_runs_do_not_share_a_folder(recipe, folder):
    hold = (
        "import sys, time, pathlib; from distillkit.training.folder import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"worked in by the process {holder.pid}: wait"):
            run(recipe, fresh=True, console=Console(quiet=True))
        assert (folder / "table.json").exists()
    finally:
        holder.kill()
        holder.communicate()
    with alone_in(folder):
        assert (folder / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        (["/opt/bin/distillkit", "run", "a b.yaml"], "distillkit run 'a b.yaml'"),
        (["/opt/lib/distillkit/__main__.py", "run", "q"], "distillkit run q"),
        (["benchmarks/seeds.py", "q"], "benchmarks/seeds.py q"),
    ],
)
def test_the_command_is_kept_as_it_was_typed(recipe, monkeypatch, typed, command):
    monkeypatch.setattr(sys, "argv", typed)
    assert versions(recipe)["command"] == command


def test_evaluate_finds_models_by_name_and_file(recipe, folder):
    scores = json.loads((folder / "teacher" / "scores-test.json").read_text())
    assert evaluate(recipe, "teacher", "test").numbers["AP"] == scores["AP"]
    scores = json.loads((folder / "distilled" / "scores-test.json").read_text())
    assert evaluate(recipe, str(folder / "distilled" / "final.safetensors"), "test").numbers["AP"] == scores["AP"]
    with pytest.raises(RunError, match="neither a file"):
        evaluate(recipe, "techer", "test")
    with pytest.raises(RunError, match="trained by the run"):
        evaluate(recipe.model_copy(update={"name": "other"}), "teacher", "test")


def test_predict_draws_and_writes_boxes_of_the_picture(recipe, folder, tmp_path):
    sure = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"score": 0.0, "most": 5})})
    pictures = tmp_path / "in"
    pictures.mkdir()
    scene = Scenes(1, (80, 120), 0, "val").scene(0)
    Image.fromarray(scene.image).save(pictures / "scene.png")
    (pictures / "notes.txt").write_text("no picture")
    rows = predict(sure, folder / "student" / "final.safetensors", [pictures], tmp_path / "out")
    assert rows == json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(rows) == 5
    boxes = np.array([row["bbox"] for row in rows])
    assert (boxes >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 120.01
    assert (boxes[:, 1] + boxes[:, 3]).max() <= 80.01
    assert rows[0]["category"] == str(rows[0]["category_id"] - 1)
    with Image.open(tmp_path / "out" / "scene.png") as drawn:
        assert drawn.width / drawn.height == pytest.approx(120 / 80)
    with pytest.raises(RunError, match=r"notes\.txt: the picture cannot be decoded"):
        predict(recipe, "student", [pictures / "notes.txt"], tmp_path / "out")
    Image.fromarray(scene.image).save(pictures / "scene.bmp")
    with pytest.raises(RunError, match=r"both be drawn to scene\.png"):
        predict(recipe, "student", [pictures], tmp_path / "out")


def test_export_agrees_with_the_student(recipe, folder, tmp_path):
    weights = folder / "student" / "final.safetensors"
    differences = export(recipe, weights, tmp_path, ["safetensors", "torch-export", "onnx"], Console(quiet=True))
    assert differences["safetensors"] == 0
    assert differences["torch-export"] < 1e-4
    assert differences["onnx"] < 1e-3
    written = load_file(tmp_path / "student.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in load_file(weights).items())

    # decode.json alone is enough to find the student's own best box, with another batch size than was exported
    how = json.loads((tmp_path / "decode.json").read_text())
    student = build.build_model(recipe.student, 10, recipe.evaluate)
    build.load_checkpoint(student, weights)
    image = Scenes(1, 64, 0, "val")[(0, 0)][0]
    student.inference = type(student.inference)(score=0.0, most=1)
    (found,) = student.eval()([image])
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"))
    maps = session.run(None, {"pictures": image[None].numpy()})
    best = max(range(len(how["strides"])), key=lambda i: maps[i].max())
    _, label, y, x = np.unravel_index(maps[best].argmax(), maps[best].shape)
    stride = how["strides"][best]
    logits = torch.from_numpy(maps[len(how["strides"]) + best])[0, :, y, x].view(4, how["bins"])
    left, top, right, bottom = ((logits.softmax(-1) * torch.arange(how["bins"])).sum(-1) * stride).tolist()
    px, py = (x + how["centre"]) * stride, (y + how["centre"]) * stride
    box = torch.tensor([px - left, py - top, px + right, py + bottom]).clamp(0, 64)
    torch.testing.assert_close(found["boxes"][0].detach(), box.float(), atol=1e-2, rtol=1e-4)
    assert found["labels"][0] == label


def test_export_says_what_it_cannot_do(recipe, tmp_path):
    with pytest.raises(RunError, match="'tflite'"):
        export(recipe, None, tmp_path, ["tflite"])


def test_every_key_of_a_block_reaches_what_is_built(recipe, tmp_path):
    text = RECIPE.replace("strides: [8, 16, 32]}\ndist", "strides: [8, 16, 32], frozen_stages: 2}\ndist")
    text = text.replace("{kind: feature-imitation}", "{kind: feature-imitation, region: gi, convention: release}")
    (tmp_path / "r.yaml").write_text(text)
    changed = load(tmp_path / "r.yaml")
    student = build.build_model(changed.student, 10, changed.evaluate)
    frozen = {name.split(".")[1] for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_stem", "bn1", "blocks"}
    (imitation,) = build.build_distillers(changed, ["feature_imitation"], 10, changed.train)
    assert imitation.convention == "release"


class Nothing(distillkit.Distiller):
    reads = distillkit.ClassLogits
    short_name = "nothing"


def test_a_loss_of_a_custom_distiller_is_called_as_in_the_recipe(recipe, tmp_path):
    distillkit.register_distiller("theirs", Nothing)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("{kind: feature-imitation}", "{kind: custom, name: theirs}"))
    changed = load(tmp_path / "r.yaml")
    (built,) = build.build_distillers(changed, ["theirs"], 10, changed.train)
    assert built.name == "theirs"


def test_splits_with_other_classes_are_refused(recipe, tmp_path, monkeypatch):
    def data(recipe, split, augmented):
        return SimpleNamespace(classes=["cat", "dog"] if split == "train" else ["dog", "cat"])

    monkeypatch.setattr(build, "build_data", data)
    with pytest.raises(RunError, match=r"data\.train has the classes cat, dog; data\.val has dog, cat"):
        run(recipe.model_copy(update={"output": str(tmp_path)}), console=Console(quiet=True))
