"""Recipes of weak segmentation, and every verb of the command line on small runs of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from distillkit import plugins, schema
from distillkit.adapters import with_adapter
from distillkit.adapters.cam import CamAdapter
from distillkit.cli import app
from distillkit.data.mask_scenes import LabelScenes
from distillkit.data.problems import DataError
from distillkit.evaluation.grad_cam import METHODS
from distillkit.recipe import RecipeError, load, resolved, slug
from distillkit.training import build, cams, loop, weak
from distillkit.training.check import check
from distillkit.training.errors import RunError
from distillkit.training.evaluate import evaluate
from distillkit.training.export import export
from distillkit.training.metrics import read
from distillkit.training.run import Jobs, run
from tests.mask_folder import labels, palette
from tests.weak_folder import CLASSES, alone, files_in, picture, recipe_of, table_of, weak_folder

ROWS = ["plain", "L2G", "L2G with saliency", "true masks"]
PLAIN = ["distillers=[]", "data.saliency=null", "compare=[student]"]


@pytest.fixture(autouse=True)
def _only_this_tests_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {"model": {}, "distiller": {}, "data": {}})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weak")
    weak_folder(folder / "set")
    recipe = recipe_of(folder)
    return SimpleNamespace(recipe=recipe, folder=run(recipe, console=Console(quiet=True)), file=folder / "weak.yaml")


@pytest.fixture
def there(tmp_path):
    weak_folder(tmp_path / "set")
    return tmp_path


def quiet(recipe):
    return run(recipe, console=Console(quiet=True))


def said(verb, done, *words):
    """What a verb prints on the run that is done."""
    set_output = ["--set", f"output={done.file.parent}"] if verb == "predict" else [f"output={done.file.parent}"]
    printed = CliRunner().invoke(app, [verb, str(done.file), *set_output, *words])
    return printed


# ---- every verb


def test_a_run_leaves_three_scores_of_every_row(done):
    table = table_of(done.folder)
    assert list(table) == ROWS
    assert set(table["plain"]) == {"row", "cam_miou", "mask_miou", "miou", "parameters", "minutes"}
    for row in ROWS[:3]:
        folder = done.folder / slug(row)
        scores = json.loads((folder / "scores-test.json").read_text())
        assert list(scores["classes"]) == CLASSES
        assert table[row]["cam_miou"] == scores["cam_miou"] == max(scores["cam_miou@0.2"], scores["cam_miou@0.4"])
        assert np.array(scores["confusion"]).sum() == 2 * 40 * 48  # in pixels of the files
        assert table[row]["mask_miou"] == json.loads((folder / "pseudo" / "scores.json").read_text())["miou"]
        segmented = json.loads((folder / "segment" / "scores-test.json").read_text())
        assert table[row]["miou"] == segmented["miou"]
        assert table[row]["minutes"] > json.loads((folder / "result.json").read_text())["minutes"]
    true = table["true masks"]
    assert (true["cam_miou"], true["mask_miou"]) == (-1, 1)
    assert not (done.folder / "true-masks" / "pseudo").exists()


def test_pseudo_masks_hold_the_classes_of_their_pictures_and_no_other(done):
    of = json.loads((done.file.parent / "set" / "image_labels.json").read_text())["labels"]
    folder = done.folder / "plain" / "pseudo"
    shown = set()
    for i in range(6):
        mask = Image.open(folder / "masks" / f"train{i}.png")
        assert (mask.mode, mask.size) == ("P", (48, 40))
        found = {CLASSES[label] for label in np.unique(np.array(mask))} - {"background"}
        assert found <= set(of[f"train{i}"])
        shown |= found
    assert shown == {"disc", "square"}
    manifest = json.loads((folder / "cams.json").read_text())
    best = json.loads((done.folder / "plain" / "result.json").read_text())["scores"]["cam_threshold"]
    assert (manifest["classes"], manifest["masks"]["threshold"]) == (CLASSES[1:], best)


def test_rows_learn_what_they_say(done):
    losses = [read(done.folder / row / "metrics.jsonl")[0]["losses"] for row in ("plain", "l2g", "l2g-with-saliency")]
    assert [set(of) for of in losses] == [{"task"}, {"local", "l2g"}, {"local", "l2g_saliency"}]
    assert losses[1]["l2g"] != losses[2]["l2g_saliency"]
    assert [r["kind"] for r in read(done.folder / "true-masks" / "metrics.jsonl")] == [
        "evaluation"
    ]  # nothing was learned
    segment = [load_file(done.folder / row / "segment" / "final.safetensors") for row in ("plain", "true-masks")]
    assert any(not torch.equal(segment[0][name], segment[1][name]) for name in segment[0])


def test_the_report_shows_maps_masks_and_what_was_segmented(done):
    page = (done.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    for title in ("Class activation maps", "Segmentation", "cam_miou", "mask_miou"):
        assert title in page
    maps = Image.open(done.folder / "cams.png")
    assert maps.width > 7 * 150  # the truth, and map and mask of three classifiers; the fourth row has none
    assert maps.width < 8.5 * 200


def test_check_rehearses_classifiers_and_segmentation_models(done):
    findings = list(check(done.recipe))
    assert [f.what for f in findings if f.level != "ok"] == []
    where = [f.where for f in findings]
    assert where[3:] == [*(f"compare.{i} ({row})" for i, row in enumerate(ROWS)), *SEGMENTS]
    assert findings[-1].what.startswith("DeepLab")
    assert "local " in findings[4].what


SEGMENTS = ["segment (true masks)", "segment (pseudo masks)"]


def test_eval_prints_classes_thresholds_and_the_best(done):
    printed = said("eval", done, "--model", "L2G", "--split", "test")
    assert printed.exit_code == 0, printed.output
    lines = [line.split() for line in printed.output.splitlines() if line.strip()]
    scores = json.loads((done.folder / "l2g" / "scores-test.json").read_text())
    assert lines[0] == ["class", "iou", "average_precision", "pictures"]
    assert ["at", "threshold", "0.2", "0.4"] in lines
    at = [f"{100 * scores[f'cam_miou@{threshold}']:.1f}" for threshold in (0.2, 0.4)]
    assert ["cam_miou", *at] in lines
    assert ["cam_threshold", f"{scores['cam_threshold']:g}"] in lines
    assert ["cam_miou", f"{100 * scores['cam_miou']:.1f}"] in lines
    assert "mask_miou" not in printed.output  # no run, no masks
    assert said("eval", done, "--model", "L2G", "--split", "test", "--task", "cam").output == printed.output


def test_eval_of_the_segmentation_model(done):
    printed = said("eval", done, "--model", "L2G", "--split", "test", "--task", "segment")
    assert printed.exit_code == 0, printed.output
    scores = json.loads((done.folder / "l2g" / "segment" / "scores-test.json").read_text())
    lines = [line.split() for line in printed.output.splitlines() if line.strip()]
    assert ["miou", f"{100 * scores['miou']:.1f}"] in lines
    assert lines[0] == ["class", "iou", "boundary_iou", "accuracy", "pixels"]
    weights = str(done.folder / "l2g" / "segment" / "final.safetensors")
    assert said("eval", done, "--model", weights, "--split", "test", "--task", "segment").output == printed.output


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--task", "segment"], "no model: name a row whose segmentation model the run has trained ('plain', 'L2G', "),
        (["--task", "segment", "--model", "l2g"], "l2g: name a row whose segmentation model the run has trained"),
        (["--task", "segment", "segment=null", 'compare=["student"]'], "trains no segmentation model: add the key"),
        (["--task", "segment", "--model", "L2G", "name=other"], "segment is trained by the run, which has not done it"),
        (["--model", "true masks"], "the row 'true masks' learns from true masks and trains no classifier"),
        ([], "the student of 'weak' comes with random weights"),
        (["--task", "maps"], "Invalid value for '--task'"),
    ],
)
def test_what_cannot_be_scored(done, words, wanted):
    refused = said("eval", done, *words)
    assert refused.exit_code == 2
    assert wanted in " ".join(refused.stderr.replace("│", "").split())


def test_a_task_of_other_recipes_cannot_be_chosen():
    refused = CliRunner().invoke(app, ["eval", "quickstart", "--task", "cam"])
    assert refused.exit_code == 2
    assert "and the task of 'quickstart' is detection: leave --task out" in refused.stderr


def test_predict_writes_pseudo_masks_by_what_the_classifier_finds(done, tmp_path):
    picture(tmp_path / "pictures" / "one.png")
    picture(tmp_path / "pictures" / "two.jpg", 8, (44, 36))
    where = ["--out", str(tmp_path / "found")]
    printed = said("predict", done, str(tmp_path / "pictures"), "--weights", "L2G", *where)
    assert printed.exit_code == 0, printed.output
    rows = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert [row["file"].rpartition("/")[2] for row in rows] == ["one.png", "two.jpg"]
    mask = Image.open(tmp_path / "found" / "masks" / "one.png")
    assert mask.size == (50, 30)
    values = np.array(mask)
    shares = {entry["class"]: entry["share"] for entry in rows[0]["classes"]}
    assert shares == {CLASSES[label]: (values == label).mean() for label in np.unique(values)}
    assert Image.open(tmp_path / "found" / "overlays" / "two.jpg").width > 2 * 36
    picture(tmp_path / "pictures" / "one.png", 9, (28, 26))  # another of that name is looked at anew
    assert said("predict", done, str(tmp_path / "pictures"), "--weights", "plain", *where).exit_code == 0
    assert Image.open(tmp_path / "found" / "masks" / "one.png").size == (26, 28)
    refused = said("predict", done, str(tmp_path / "pictures"), "--weights", "true masks", *where)
    assert (refused.exit_code, "trains no classifier" in refused.stderr) == (2, True)


def test_the_segmentation_model_has_a_recipe_of_its_own(done, tmp_path):
    file = done.folder / "l2g" / "segment.yaml"
    pictures = picture(tmp_path / "one.png")
    words = ["predict", str(file), str(pictures), "--weights", "segment", "--out", str(tmp_path / "found")]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0, printed.output
    assert Image.open(tmp_path / "found" / "masks" / "one.png").size == (50, 30)
    recipe = load(file)
    scores = json.loads((done.folder / "l2g" / "segment" / "scores-test.json").read_text())
    assert evaluate(recipe, "segment", "test").numbers["miou"] == scores["miou"]
    train = build.build_data(recipe, "train", augmented=False)  # judged by true masks, taught by the row's
    taught = build.build_data(recipe, "train", augmented=True)
    assert train.records[0].mask == done.file.parent / "set" / "SegmentationClass" / "train0.png"
    assert taught.records[0].mask == done.folder / "l2g" / "pseudo" / "masks" / "train0.png"


def test_export_agrees(done, tmp_path):
    differences = export(done.recipe, "L2G", tmp_path, ["safetensors", "torch-export"], Console(quiet=True))
    assert max(differences.values()) < 1e-3
    decoding = json.loads((tmp_path / "decode.json").read_text())
    assert (decoding["classes"], decoding["height"], decoding["width"]) == (CLASSES[1:], 32, 32)


def test_list_and_schema_know_the_task():
    printed = CliRunner().invoke(app, ["list"]).output
    for word in ("local-to-global", "cam", "voc-labels", "l2g_coco_crops", "l2g_voc"):
        assert word in printed.split()
    written = json.loads(CliRunner().invoke(app, ["show", "--schema"]).output)["$defs"]
    assert {"CamModel", "LocalToGlobal", "VocLabelData", "Cam", "Masks", "Segment", "WeakRow"} <= set(written)
    assert set(written["Cam"]["properties"]["method"]["enum"]) == {"cam", *METHODS}


def test_a_resolved_recipe_is_the_same_recipe(done, tmp_path):
    (tmp_path / "again.yaml").write_text(resolved(done.recipe))
    assert load(tmp_path / "again.yaml") == done.recipe


# ---- going on after an interruption


def test_a_run_stopped_at_masks_and_at_segmentation_goes_on_as_if_it_had_not_been(there, monkeypatch):
    changes = [*PLAIN, "segment.train={epochs: 2, save_every: 1}"]
    straight = quiet(recipe_of(there, *changes, "name=straight"))
    written, write = [], cams._Writer._of_one
    steps, step = [], loop.Run.step

    def two_masks(self, index, image, target):
        if len(written) == 2:
            written.append("stop")
            raise KeyboardInterrupt
        written.append(target["key"])
        return write(self, index, image, target)

    def some_steps(self, window):
        if len(steps) == 2 + 3:  # two of the classifier, three of the segmentation model
            steps.append("stop")
            raise KeyboardInterrupt
        steps.append(self.job.name)
        step(self, window)

    monkeypatch.setattr(cams._Writer, "_of_one", two_masks)
    monkeypatch.setattr(loop.Run, "step", some_steps)
    recipe = recipe_of(there, *changes, "name=broken")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quiet(recipe)
    broken = quiet(recipe)
    assert written == ["train0", "train1", "stop", "train2", "train3", "train4", "train5"]
    assert steps == ["student"] * 2 + ["segment"] * 3 + ["stop", "segment"]
    assert files_in(straight / "student" / "pseudo") == files_in(broken / "student" / "pseudo")
    for path in ("final.safetensors", "segment/final.safetensors"):
        a, b = (load_file(folder / "student" / path) for folder in (straight, broken))
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    tables = [table_of(folder)["student"] for folder in (straight, broken)]
    assert {**tables[0], "minutes": 0} == {**tables[1], "minutes": 0}
    again = quiet(recipe)  # nothing is left to do
    assert table_of(again)["student"] == tables[1]
    assert len(steps) == 2 + 3 + 2


# ---- what the data lack


def test_training_pictures_need_no_masks(there):
    for i in range(6):
        (there / "set" / "SegmentationClass" / f"train{i}.png").unlink()
    recipe = recipe_of(there, *PLAIN)
    assert [f.what for f in check(recipe) if f.level == "error"] == []
    row = table_of(quiet(recipe))["student"]
    assert row["mask_miou"] == -1
    assert row["cam_miou"] >= 0
    assert row["miou"] >= 0
    for with_true in (recipe_of(there), recipe_of(there, "name=second")):
        with pytest.raises(DataError, match=r"SegmentationClass/train0\.png: image train0: no such file"):
            Jobs(with_true, there / "x", Console(quiet=True), "").check()
        assert any("train0" in f.what for f in check(with_true) if f.level == "error")


def test_true_masks_of_some_training_pictures_are_not_used(there):
    (there / "set" / "SegmentationClass" / "train3.png").unlink()
    recipe = recipe_of(there, *PLAIN)
    assert [f.what for f in check(recipe) if f.level == "error"] == []
    assert any("5 of 6 training pictures have a true mask" in what for what in findings(recipe, "warning"))
    row = table_of(quiet(recipe))["student"]
    assert row["mask_miou"] == -1
    assert row["miou"] >= 0


def test_labels_may_be_what_the_masks_show(there):
    (there / "set" / "SegmentationClass").rename(there / "set" / "drawn")
    by_name, by_mask = (
        build.build_data(recipe_of(there, *PLAIN, "data.masks=drawn", *more), "train", augmented=True)
        for more in ([], ["data.labels=masks"])
    )
    for i in range(6):
        assert torch.equal(by_name[0, i][1]["labels"], by_mask[0, i][1]["labels"])


def findings(recipe, level):
    return [f"{f.where}: {f.what}" for f in check(recipe) if f.level == level]


def test_check_names_masks_of_another_size_and_labels_that_are_no_class(there):
    palette(there / "set" / "SegmentationClass" / "val0.png", np.zeros((30, 30)))
    palette(there / "set" / "SegmentationClass" / "test1.png", np.full((40, 48), 7))
    found = findings(recipe_of(there, *PLAIN), "error")
    assert any("val0.png" in what and "the mask is 30 x 30 pixels" in what for what in found)
    assert any("test1.png" in what and "7" in what and "0..2 (3 classes)" in what for what in found)
    palette(there / "set" / "SegmentationClass" / "train0.png", np.full((40, 48), 7))
    assert any("train0.png" in what for what in findings(recipe_of(there, *PLAIN), "error"))
    assert not any("train0.png" in what for what in findings(recipe_of(there, *alone()), "error"))  # nobody reads it


def test_check_tells_of_pictures_without_labels_and_of_unknown_ones(there):
    file = there / "set" / "image_labels.json"
    of = json.loads(file.read_text())["labels"]
    labels(there / "set", of | {"train0": []}, CLASSES)
    recipe = recipe_of(there, *PLAIN)
    (warning,) = findings(recipe, "warning")
    assert "image train0" in warning
    assert "none of the 2 classes is among its labels" in warning
    assert table_of(quiet(recipe))["student"]["mask_miou"] >= 0
    mask = np.array(Image.open(there / "weak" / "student" / "pseudo" / "masks" / "train0.png"))
    assert not mask.any()
    labels(there / "set", of | {"train0": ["disk"]}, CLASSES)
    assert any("class 'disk' is unknown" in what for what in findings(recipe, "error"))
    del of["train1"]
    labels(there / "set", of, CLASSES)
    assert any("image train1" in what and "no labels" in what for what in findings(recipe, "error"))


def test_saliency_may_be_missing_for_some_pictures_and_not_for_all(there):
    (there / "set" / "saliency" / "train0.png").unlink()
    changes = ["segment=null", "compare=[{row: L2G, distillers: [l2g_saliency]}]"]
    recipe = recipe_of(there, *changes)
    (warning,) = findings(recipe, "warning")
    assert "image train0" in warning
    assert "no saliency map of this picture" in warning
    assert table_of(quiet(recipe))["L2G"]["cam_miou"] >= 0
    ruled = recipe_of(there, *changes, "masks.rule=saliency")
    with pytest.raises(DataError, match=r"train0.*no saliency map of this picture; masks\.rule is saliency"):
        build.build_data(ruled, "train", augmented=True)
    for split, number in (("val", 3), ("test", 2)):  # where nothing is learned, none is needed
        for i in range(number):
            (there / "set" / "saliency" / f"{split}{i}.png").unlink()
    assert findings(recipe, "warning") == [warning]
    for path in (there / "set" / "saliency").iterdir():
        path.unlink()
    assert sum("saliency" in what and "no such file" in what for what in findings(recipe, "error")) == 6


def test_masks_by_saliency_are_background_where_nothing_is_salient(there):
    compare = "compare=[{row: L2G, distillers: [l2g]}]"
    folder = quiet(recipe_of(there, compare, "masks={rule: saliency, threshold: 0.5}"))
    salient = np.array(Image.open(there / "set" / "saliency" / "train3.png")) > 127
    mask = np.array(Image.open(folder / "l2g" / "pseudo" / "masks" / "train3.png"))
    assert not mask[~salient].any()
    unsaid = quiet(recipe_of(there, compare, "masks={rule: saliency, threshold: null}", "name=unsaid"))
    assert files_in(unsaid / "l2g" / "pseudo" / "masks") == files_in(folder / "l2g" / "pseudo" / "masks")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.saliency=null", "distillers.1.saliency: is true, and data.saliency names no folder of maps"),
        ("masks.rule=saliency", None),
        ("segment=null", "compare.3.masks: is true, and no segmentation model is trained; add the key segment"),
        ("cam.method=gradcam", "cam.method: expected one of cam, grad-cam"),
        ("cam.target_layer=features", "cam: target_layer is for methods that look at a layer"),
        ("data.short_side=40", "data: short_side leaves pictures larger than size: set augment.crop to true"),
        ("segment.train.epohcs=3", "segment.train.epohcs: unknown key; did you mean 'epochs'?"),
        ("distillers.0={kind: logit-kd}", "distillers.0.protocol: is softmax, of one class a picture"),
        ("data={kind: custom, name: mine}", "segment: needs data of kind voc-labels"),
        ("compare.0.masks=tru", "compare.0.masks: expected one of pseudo, true; got the text 'tru'"),
        ("train.optimizer={kind: sgd, momentum: 0, nesterov: true}", "nesterov is true, and momentum is 0"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(there, change, words):
    if words is None:
        assert recipe_of(there, change).masks.rule == "saliency"
        return
    with pytest.raises(RecipeError) as error:
        recipe_of(there, change)
    assert words in str(error.value)


def test_a_segmentation_model_that_cannot_be_made_is_found_before_the_classifier_is_trained(there):
    recipe = recipe_of(there, *PLAIN, "segment.student.backbone=test_resnt")
    with pytest.raises(ValueError, match="'test_resnt' is not a timm model"):
        quiet(recipe)
    assert not (there / "weak").exists()
    assert any(what.startswith("segment (pseudo masks): ") for what in findings(recipe, "error"))
    late = recipe_of(there, *PLAIN, "segment.train.schedule={kind: poly, warmup: 50}", "name=late")
    with pytest.raises(RunError, match=r"segment \(pseudo masks\): train\.schedule\.warmup is 50 steps"):
        quiet(late)


# ---- other classifiers


def test_a_classifier_of_timm(there):
    changes = ["student={kind: timm, model: test_resnet}", "compare=[{row: L2G, distillers: [l2g_saliency]}]"]
    recipe = recipe_of(there, *changes, "cam.scales=[0.5, 1.0]", "cam.flip=true", "masks.threshold=0.3")
    assert [f.what for f in check(recipe) if f.level == "error"] == []
    row = table_of(quiet(recipe))["L2G"]
    assert min(row["cam_miou"], row["mask_miou"], row["miou"]) >= 0
    assert json.loads((there / "weak/l2g/pseudo/cams.json").read_text())["masks"]["threshold"] == 0.3


class Own(nn.Module):
    """Class logits are the means of their maps."""

    def __init__(self, classes):
        super().__init__()
        self.classify = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, classes, 1))

    def forward(self, x):
        return self.classify(x).mean((2, 3))


def test_a_classifier_and_data_of_ones_own(tmp_path):
    plugins.register_model("own", lambda classes: with_adapter(Own(classes), CamAdapter("classify")))
    plugins.register_data(
        "digits", lambda split, transform, seed: LabelScenes(4, 48, seed, split, masks=True, transform=transform)
    )
    data = "{kind: custom, name: digits, size: 48, batch: 2, workers: 0}"
    changes = alone(f"data={data}", "student={kind: custom, name: own}", "evaluate.split=val", "train.epochs=2")
    recipe = recipe_of(tmp_path, *changes)
    assert [f.what for f in check(recipe) if f.level == "error"] == []
    row = table_of(quiet(recipe))["student"]
    assert row["cam_miou"] >= 0
    assert (row["mask_miou"], row["miou"]) == (-1, -1)  # no segment: a run ends with the maps


@pytest.mark.parametrize("method", ["grad-cam", "layer-cam"])
def test_maps_by_gradients(done, there, method):
    pytest.importorskip("pytorch_grad_cam", reason="needs distillkit[cam]")
    weights = done.folder / "plain" / "final.safetensors"
    recipe = recipe_of(there, *alone(f"cam.method={method}"))
    by_gradient, plain = (weak.evaluate(r, str(weights), "test") for r in (recipe, recipe_of(there, *alone())))
    assert by_gradient.numbers["cam_mAP"] == plain.numbers["cam_mAP"]
    assert not np.array_equal(by_gradient.confusion, plain.confusion)


def test_without_its_package_a_method_is_refused(there, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    found = findings(recipe_of(there, *alone("cam.method=grad-cam")), "error")
    assert any("pip install 'distillkit[cam]'" in what for what in found)


def test_classes_are_known_without_pictures(tmp_path):
    (tmp_path / "set").mkdir()
    labels(tmp_path / "set", {}, CLASSES)
    assert build.build_classes(recipe_of(tmp_path)).classes == CLASSES[1:]
    assert build.build_classes(recipe_of(tmp_path, "data.classes=[newt]")).classes == ["newt"]


def test_the_settings_of_rows_and_segments_do_not_mix(there):
    recipe = recipe_of(there, "segment.train={epochs: 7}")
    segmenting = weak.segmentation_recipe(recipe, there / "weak" / "l2g", None)
    assert (segmenting.train.epochs, recipe.train.epochs) == (7, 1)
    assert segmenting.train.optimizer == recipe.train.optimizer
    assert isinstance(segmenting, schema.SegmentationRecipe)
    assert segmenting.data.classes == CLASSES
