"""What would stop a run hours later is found by `check`, and, where that is cheap, at the run's start."""

import json
import re

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from distillkit import plugins
from distillkit.data.scenes import Scenes
from distillkit.recipe import load
from distillkit.training.check import check
from distillkit.training.errors import RunError
from distillkit.training.run import run

RECIPE = """
name: checked
data: {kind: scenes, train: 8, val: 3, test: 2, digits: [2, 4], size: 64, batch: 4, workers: 0}
teacher: {kind: gfl, backbone: lcnet_035, channels: 16, convs: 1, strides: [8, 16, 32], bins: 9, train: {}}
student: {kind: gfl, backbone: lcnet_035, channels: 16, convs: 1, strides: [8, 16, 32], bins: 9}
distillers: [{kind: ld, region: main+valuable}]
train: {epochs: 1}
"""


@pytest.fixture(autouse=True)
def _only_this_tests_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {"model": {}, "distiller": {}, "data": {}})


@pytest.fixture
def loaded(tmp_path):
    (tmp_path / "checked.yaml").write_text(RECIPE)
    return lambda *overrides: load(tmp_path / "checked.yaml", [f"output={tmp_path / 'runs'}", *overrides])


def found(recipe, level):
    return [f"{f.where}: {f.what}" for f in check(recipe) if f.level == level]


class Plain(nn.Module):
    """The least that can be trained and scored."""

    keys = ("boxes", "scores", "labels")

    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 1, 1)

    def forward(self, images, targets=None):
        if self.training:
            return {"loss": sum(self.trunk(image).square().mean() for image in images)}
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
        return [{key: nothing[key] for key in self.keys} for _ in images]


class Scoreless(Plain):
    keys = ("boxes", "labels")


PLAIN = "student={kind: custom, name: plain}"
LATE = "compare=[student, {row: late, distillers: none, train: {%s}}]"


def test_a_recipe_without_a_written_warmup_is_possible_and_learns_from_its_boxes(loaded):
    recipe = loaded()
    assert recipe.train.schedule.warmup is None
    assert found(recipe, "error") == found(recipe, "warning") == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([LATE % "schedule: {warmup: 500}"], r"compare\.1 \(late\): train\.schedule\.warmup is 500 .* whole run has 2"),
        (["teacher.train.schedule.warmup=9"], r"teacher: train\.schedule\.warmup is 9 steps"),
        ([LATE % "amp: fp16"], r"compare\.1 \(late\): train\.amp is fp16"),
        (
            [PLAIN, LATE % "optimizer: {backbone_lr: 0.1}"],
            r"compare\.1 \(late\): .*backbone_lr is 0\.1",
        ),
    ],
)
def test_what_no_training_can_do_is_found_by_check_and_before_a_run_trains_or_deletes(
    loaded, tmp_path, overrides, words
):
    if "fp16" in overrides[0] and torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    plugins.register_model("plain", lambda classes: Plain())
    recipe = loaded("distillers=[]", *overrides)
    (error,) = found(recipe, "error")
    assert re.search(words, error)
    earlier = tmp_path / "runs" / "checked" / "student" / "result.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    (tmp_path / "runs" / "checked" / "recipe.yaml").write_text("name: checked")
    with pytest.raises(RunError, match=words):
        run(recipe, fresh=True, console=Console(quiet=True))
    assert earlier.exists()
    assert (tmp_path / "runs" / "checked" / "recipe.yaml").read_text() == "name: checked"


def test_models_and_data_that_cannot_be_scored_are_found(loaded):
    plugins.register_model("plain", lambda classes: Scoreless())
    (error,) = found(loaded("distillers=[]", "compare=[student]", "teacher=null", PLAIN), "error")
    assert error == "compare.0 (student): cannot be scored on pictures of data.val: KeyError: 'scores'"

    class Scaleless(Scenes):
        def __getitem__(self, key):
            image, target = super().__getitem__(key)
            return image, {k: v for k, v in target.items() if k != "scale"}

    plugins.register_data("own", lambda split, transform, seed: Scaleless(3, 64, seed, split, transform=transform))
    (error,) = found(loaded("distillers=[]", "teacher=null", "data={kind: custom, name: own}"), "error")
    assert re.search(r"compare\.0 \(student\): cannot be scored.* has no scale", error)


def coco(folder, train, val):
    """A set of one picture a split, with these boxes."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "images" / "a.png")
    for split, boxes in (("train", train), ("val", val)):
        annotations = [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0} for i, box in enumerate(boxes, 1)
        ]
        picture = {"id": 1, "file_name": "a.png", "height": 64, "width": 64}
        content = {"images": [picture], "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return f"data={{kind: coco, root: {folder}, train: train.json, val: val.json, size: 64, workers: 0}}"


GOOD, FLAT = [8, 8, 30, 30], [8, 8, 0, 30]


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ([FLAT], [GOOD], "data.train has no box that can be learned"),
        ([GOOD], [FLAT], "data.val is what models are judged on, and has no box"),
        ([GOOD], [], "data.val is what models are judged on, and has no box"),
    ],
)
def test_training_on_nothing_and_judging_by_nothing_are_errors(loaded, tmp_path, train, val, words):
    recipe = loaded(coco(tmp_path / "set", train, val))
    assert any(words in error for error in found(recipe, "error"))
    with pytest.raises(RunError, match=words):
        run(recipe, console=Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_learns_nothing_from_boxes_is_a_warning(loaded):
    coarse = loaded("student.strides=[32, 64]", "distillers=[]", "teacher=null", "compare=[student]")
    (warning,) = found(coarse, "warning")
    assert re.search(r"compare\.0 \(student\): exactly 0 on 2 pictures with \d boxes: loss_bbox, loss_dfl", warning)


def test_broken_boxes_are_said_once(loaded, tmp_path, capfd):
    recipe = loaded(coco(tmp_path / "set", [GOOD, FLAT], [GOOD]))
    (warning,) = found(recipe, "warning")
    assert re.search(r"train\.json: annotation 2: .* has no area; it is left out of training, but evaluation", warning)
    assert capfd.readouterr().err == ""
