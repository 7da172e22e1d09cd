"""`distillkit cam`: class activation maps and pseudo masks of many pictures, and what goes on where it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import distillkit
from distillkit import plugins
from distillkit.cli import app
from distillkit.data.mask_scenes import LabelScenes
from distillkit.evaluation.cam import class_maps
from distillkit.evaluation.pseudo_masks import crf_mask, saliency_mask, threshold_mask
from distillkit.schema import Cam, Masks
from distillkit.training import build, cams
from distillkit.training.errors import RunError
from distillkit.training.run import run
from tests.weak_folder import alone, files_in, picture, recipe_of, weak_folder

TRAIN = [f"train{i}" for i in range(6)]


@pytest.fixture(autouse=True)
def _only_this_tests_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {"model": {}, "distiller": {}, "data": {}})


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A set; weights of a classifier; the words of a command line that names both."""
    folder = tmp_path_factory.mktemp("cams")
    weak_folder(folder / "set")
    recipe = recipe_of(folder, *alone("masks.threshold=0.4"))
    torch.manual_seed(3)
    model = build.build_model(recipe.student, 2, recipe.evaluate)
    save_file(model.state_dict(), folder / "mine.safetensors")
    words = [str(folder / "weak.yaml"), *alone("masks.threshold=0.4"), f"output={folder}"]
    return SimpleNamespace(
        folder=folder, recipe=recipe, model=model, words=[*words, "--weights", str(folder / "mine.safetensors")]
    )


def cam(there, out, *words):
    return CliRunner().invoke(app, ["cam", *there.words, "--out", str(out), *words])


def made(there, out, *words):
    printed = cam(there, out, *words)
    assert printed.exit_code == 0, printed.output + printed.stderr
    return printed.output


def mask_in(folder, key):
    return torch.from_numpy(np.array(Image.open(folder / "masks" / f"{key}.png"))).long()


# ---- what is written


def test_masks_maps_and_overlays_of_a_split(there, tmp_path):
    changes = ["cam.scales=[0.5, 1.0, 1.5]", "cam.flip=true"]
    assert " 6 of them made by this call" in made(there, tmp_path / "out", *changes, "--maps", "--overlays")
    data = build.build_data(there.recipe, "train", augmented=False)
    seen = 0
    for i, key in enumerate(TRAIN):
        image, target = data[0, i]
        maps = class_maps(there.model, image, target["labels"], (0.5, 1.0, 1.5), True)
        assert torch.equal(mask_in(tmp_path / "out", key), threshold_mask(maps, 0.4))
        names = {path.stem for path in (tmp_path / "out" / "cams" / key).iterdir()}
        assert names == {name for name, label in zip(data.classes, target["labels"], strict=True) if label}
        for label in target["labels"].nonzero().flatten().tolist():
            grey = np.array(Image.open(tmp_path / "out" / "cams" / key / f"{data.classes[label]}.png"))
            assert np.abs(grey / 255 - maps[label].numpy()).max() <= 0.5 / 255 + 1e-6
            seen += grey.max() == 255
        drawn = 2 + int((maps.flatten(1).amax(1) > 0).sum())  # picture and mask, and what is not 0 all over
        assert Image.open(tmp_path / "out" / "overlays" / f"{key}.jpg").width == drawn * 48 + (drawn - 1) * 8
    assert seen > 3
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 6


def test_masks_by_saliency_and_by_crf(there, tmp_path):
    salient = ["data.saliency=saliency", "masks={rule: saliency, threshold: null}"]
    made(there, tmp_path / "saliency", *salient)
    made(there, tmp_path / "crf", "masks.rule=crf")
    recipe = recipe_of(there.folder, *alone("data.saliency=saliency"))
    data = build.build_data(recipe, "train", augmented=False)
    for i, key in enumerate(TRAIN[:3]):
        image, target = data[0, i]
        maps = class_maps(there.model, image, target["labels"], (1.0,), False)
        assert torch.equal(mask_in(tmp_path / "saliency", key), saliency_mask(maps, target["saliency"]))
        pixels = torch.from_numpy(np.array(Image.open(there.folder / "set" / "JPEGImages" / f"{key}.png")))
        assert torch.equal(mask_in(tmp_path / "crf", key), crf_mask(maps, pixels.permute(2, 0, 1), 0.4))


def test_pictures_that_are_no_split_have_the_classes_that_are_found(there, tmp_path):
    folder = tmp_path / "photos"
    one, other = picture(folder / "one.png"), picture(tmp_path / "other.jpg", 8, (44, 36))
    words = ["--images", str(folder), "--images", str(other), "cam.size=64", "--maps"]
    assert " 2 of them made by this call" in made(there, tmp_path / "out", *words)
    assert mask_in(tmp_path / "out", "one").shape == (30, 50)  # at its own size, whatever maps are made at
    assert mask_in(tmp_path / "out", "other").shape == (44, 36)
    resized = Image.open(one).resize((64, 64), Image.Resampling.BICUBIC)
    batch = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(there.model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        shares = there.model.eval()((batch - mean) / std)[0].sigmoid()
    there.model.train()
    likely = {
        name for name, share in zip(("disc", "square"), shares, strict=True) if share > 0.5 or share == max(shares)
    }
    assert {path.stem for path in (tmp_path / "out" / "cams" / "one").iterdir()} == likely


def test_a_row_has_the_threshold_that_its_run_has_chosen(tmp_path):
    weak_folder(tmp_path / "set")
    recipe = recipe_of(tmp_path, *alone())
    run(recipe, console=Console(quiet=True))
    best = json.loads((tmp_path / "weak" / "student" / "result.json").read_text())["scores"]["cam_threshold"]
    words = [str(tmp_path / "weak.yaml"), *alone(), f"output={tmp_path}", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["cam", *words, "--weights", "student", "--split", "val"])
    assert result.exit_code == 0, result.output + result.stderr
    assert json.loads((tmp_path / "out" / "cams.json").read_text())["masks"]["threshold"] == best
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3
    refused = CliRunner().invoke(app, ["cam", *words, "--weights", str(tmp_path / "weak/student/final.safetensors")])
    assert refused.exit_code == 2
    assert "masks.threshold is null, which a run chooses for each of its rows on its val split" in refused.stderr


@pytest.mark.parametrize(
    ("student", "method"),
    [
        ("{kind: timm, model: test_resnet}", "cam"),
        ("{kind: timm, model: test_vit, options: {dynamic_img_size: true}}", "cam"),
        ("{kind: timm, model: test_resnet}", "grad-cam++"),
        ("{kind: timm, model: test_vit, options: {dynamic_img_size: true}}", "grad-cam"),
    ],
)
def test_any_classifier_of_timm(there, tmp_path, student, method):
    if method != "cam":
        pytest.importorskip("pytorch_grad_cam", reason="needs distillkit[cam]")
    changes = [f"student={student}", f"cam.method={method}", "masks.threshold=0.4", "cam.size=64"]
    recipe = recipe_of(there.folder, *alone(*changes))
    model = build.build_model(recipe.student, 2, recipe.evaluate)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert cams.cam(recipe, str(tmp_path / "w.safetensors"), tmp_path / "out", "val", maps=True) == (3, 3)
    data = build.build_data(recipe, "val", augmented=False)
    image, target = data[0, 0]
    maps = class_maps(model.eval(), image, target["labels"], (1.0,), False, method, (40, 48))
    assert torch.equal(mask_in(tmp_path / "out", "val0"), threshold_mask(maps, 0.4))


def test_a_set_that_does_not_list_its_pictures(there, tmp_path):
    scenes = LabelScenes(3, 48, split="val")

    class Unlisted:
        def __len__(self):
            return 3

        def __getitem__(self, place):
            return scenes[place]

    model = build.build_model(there.recipe.student, 10, there.recipe.evaluate)
    count = cams.write_cams(model, Unlisted(), scenes.classes, tmp_path, Cam(scales=[1.0]), Masks(), {})
    assert count == 3
    assert sorted(path.name for path in (tmp_path / "masks" / "val").iterdir()) == [f"{i:05d}.png" for i in range(3)]


# ---- going on


STALLING = """\
import os, time
from pathlib import Path
import torch
from torch import nn
import distillkit
from distillkit.adapters import with_adapter
from distillkit.adapters.cam import CamAdapter

class Stalling(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.classify = nn.Conv2d(3, classes, 9, 8)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == int(os.environ.get("STALL_AT", 0)):
            Path(os.environ["STALLED"]).touch()
            time.sleep(600)
        return self.classify(x).mean((2, 3))

distillkit.register_model("stalling", lambda classes: with_adapter(Stalling(classes), CamAdapter("classify")))
"""


def test_after_kill_9_the_same_files_are_there(there, tmp_path, monkeypatch):
    (tmp_path / "stalling.py").write_text(STALLING)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = [str(there.folder / "weak.yaml"), *alone("masks.threshold=0.4", "student={kind: custom, name: stalling}")]
    words += ["--import", "stalling", "--maps", "--overlays"]
    straight, broken = (["cam", *words, "--out", str(tmp_path / name)] for name in ("straight", "broken"))
    assert CliRunner().invoke(app, straight).exit_code == 0
    stalled = tmp_path / "stalled"
    path = os.pathsep.join([str(Path(distillkit.__file__).parents[1]), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path, "STALL_AT": "4", "STALLED": str(stalled)}
    process = subprocess.Popen([sys.executable, "-m", "distillkit", *broken], env=environment)
    while not stalled.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.stem for path in (tmp_path / "broken" / "masks").iterdir()) == TRAIN[:3]
    before = files_in(tmp_path / "broken")
    again = CliRunner().invoke(app, broken)
    assert again.exit_code == 0, again.output + again.stderr
    assert "masks of 6 pictures, 3 of them made by this call" in again.output
    there_now = files_in(tmp_path / "broken")
    assert there_now == files_in(tmp_path / "straight")
    assert len(there_now) == 1 + 6 + 6 + 8  # cams.json, masks, overlays, maps: two pictures show two classes
    assert before.items() <= there_now.items()
    assert " 0 of them made by this call" in CliRunner().invoke(app, broken).output
    assert files_in(tmp_path / "broken") == there_now


def test_a_file_that_was_being_written_is_no_picture_that_is_done(there, tmp_path):
    made(there, tmp_path / "out")
    wanted = files_in(tmp_path / "out")
    mask = tmp_path / "out" / "masks" / "train2.png"
    mask.rename(mask.with_name(".train2.png.part"))
    assert " 1 of them made by this call" in made(there, tmp_path / "out")
    assert files_in(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["masks.threshold=0.3"], "masks ({'rule': 'threshold', 'threshold': 0.4}, now {'rule'"),
        (["cam.flip=true"], "cam ("),
        (["--maps"], "maps (False, now True)"),
        (["--split", "val"], "source ({'split': 'train'"),
        (["data.labels=masks"], "source ("),
    ],
)
def test_files_of_other_settings_are_not_mixed(there, tmp_path, words, what):
    made(there, tmp_path / "out")
    wanted = files_in(tmp_path / "out")
    refused = cam(there, tmp_path / "out", *words)
    assert refused.exit_code == 2
    assert f"holds maps that were made with another {what}" in refused.stderr
    assert "name another folder, or delete this one" in refused.stderr
    assert files_in(tmp_path / "out") == wanted


def test_thresholds_that_are_only_scored_do_not_matter(there, tmp_path):
    made(there, tmp_path / "out")
    assert " 0 of them made by this call" in made(there, tmp_path / "out", "cam.thresholds=[0.9]")


def test_which_crf_it_was_is_known(there, tmp_path, monkeypatch):
    made(there, tmp_path / "out", "masks.rule=crf")
    monkeypatch.setattr(cams, "crf_backend", lambda: "another")
    refused = cam(there, tmp_path / "out", "masks.rule=crf")
    assert (refused.exit_code, "another crf (" in refused.stderr) == (2, True)


def test_other_weights_are_another_model(there, tmp_path):
    made(there, tmp_path / "out")
    weights = {name: value + 1 for name, value in there.model.state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    refused = cam(there, tmp_path / "out", "--weights", str(tmp_path / "other.safetensors"))
    assert (refused.exit_code, "with another weights" in refused.stderr) == (2, True)


def test_processes_share_the_pictures(there, tmp_path, monkeypatch):
    made(there, tmp_path / "alone")
    data = build.build_data(there.recipe, "train", augmented=False)
    source = cams.source_of_split(there.recipe, "train")
    for rank, count in ((0, 2), (1, 2), (2, 2)):
        state = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0, device="cpu")
        state.wait_for_everyone = lambda: None
        monkeypatch.setattr(cams, "processes", lambda state=state: state)
        how = data.classes, tmp_path / "shared", there.recipe.cam, there.recipe.masks, source
        assert cams.write_cams(there.model, data, *how) == count
    assert files_in(tmp_path / "shared") == files_in(tmp_path / "alone")


def test_two_at_once_are_refused(there, tmp_path, monkeypatch):
    def taken(folder):
        raise RunError(f"{folder.name} is being worked in")

    monkeypatch.setattr(cams, "alone_in", taken)
    refused = cam(there, tmp_path / "out")
    assert (refused.exit_code, refused.stderr) == (2, "out is being worked in\n")


# ---- what cannot be done


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--split", "val", "--images", "x.png"], "give --split, or --images, which are of none; not both"),
        (["--images", "gone"], "gone"),
        (["--images", "PICTURE", "--images", "SAME"], "would both be drawn to one.png"),
        (["--images", "PICTURE", "masks.rule=saliency", "data.saliency=saliency"], "no split of the recipe have no"),
        (["masks.rule=saliency"], "masks.rule: is saliency, and data.saliency names no folder of maps"),
        (["--weights", "gone"], "gone: neither a file with weights of the student, nor one of student"),
        (["--weights", "student"], "student is trained by the run, which has not done it yet"),
        (["--split", "test", "data.test=null", "evaluate.split=val"], "data.test is not set in the recipe 'weak'"),
        (["cam.method=grad-cam", "cam.target_layer=nothing"], "picture train0: CamClassifier has no module 'nothing'"),
    ],
)
def test_what_is_wrong_is_named(there, tmp_path, words, what):
    if "cam.method=grad-cam" in words:
        pytest.importorskip("pytorch_grad_cam", reason="needs distillkit[cam]")
    files = {"PICTURE": picture(tmp_path / "one.png"), "SAME": picture(tmp_path / "more" / "one.png")}
    refused = cam(there, tmp_path / "out", *(str(files.get(word, word)) for word in words))
    assert refused.exit_code == 2, refused.output
    assert what in refused.stderr


def test_a_broken_picture_stops_and_is_gone_on_from(there, tmp_path):
    folder = tmp_path / "photos"
    for name in ("a", "b", "c"):
        picture(folder / f"{name}.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:-200])
    words = ["--images", str(folder)]
    refused = cam(there, tmp_path / "out", *words)
    assert refused.exit_code == 2
    assert "b.png: cannot be read as a picture" in refused.stderr
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["a.png"]
    (folder / "b.png").write_bytes(whole)
    assert " 2 of them made by this call" in made(there, tmp_path / "out", *words)


def test_a_recipe_of_another_task_is_refused():
    refused = CliRunner().invoke(app, ["cam", "quickstart_classifier", "--weights", "teacher"])
    assert refused.exit_code == 2
    assert "activation maps are made by recipes of the task weak-segmentation, and the task of" in refused.stderr


def test_a_picture_without_a_saliency_map_is_named(there, tmp_path):
    recipe = recipe_of(there.folder, *alone("data.saliency=saliency", "masks.rule=saliency"))
    data = build.build_data(recipe, "val", augmented=False)
    data.records[1] = replace(data.records[1], saliency=None)
    with pytest.raises(RunError, match=r"picture val1 has no saliency map, and masks\.rule is saliency"):
        cams.write_cams(there.model, data, data.classes, tmp_path, recipe.cam, recipe.masks, {})


def test_names_that_lead_out_of_the_folder_are_refused(there, tmp_path):
    scenes = LabelScenes(1, 48)
    scenes.keys = ["../out"]
    model = build.build_model(there.recipe.student, 10, there.recipe.evaluate)
    with pytest.raises(RunError, match=r"\.\./out\.png: leads out of"):
        cams.write_cams(model, scenes, scenes.classes, tmp_path / "a" / "b", Cam(), Masks(), {})


def test_predict_leaves_these_files_alone(there, tmp_path):
    made(there, tmp_path / "out")
    words = [there.words[0], str(picture(tmp_path / "train0.png")), *there.words[-2:], "--out", str(tmp_path / "out")]
    changes = [word for change in there.words[1:-2] for word in ("--set", change)]
    refused = CliRunner().invoke(app, ["predict", *words, *changes])
    assert refused.exit_code == 2
    assert "holds what distillkit cam wrote, and goes on with: name another folder" in refused.stderr


def test_progress_tells_what_is_there_already(there, tmp_path):
    data = build.build_data(there.recipe, "train", augmented=False)
    how = data.classes, tmp_path, there.recipe.cam, there.recipe.masks, {}
    seen = []
    cams.write_cams(there.model, data, *how, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(7)]
    (tmp_path / "masks" / "train3.png").unlink()
    seen.clear()
    cams.write_cams(there.model, data, *how, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 6), (6, 6)]
