"""The command line: what is imported when, exit codes, messages; and every verb on a recipe of seconds."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import distillkit
from distillkit import cli, plugins
from distillkit.core.errors import NonFiniteLossError
from distillkit.recipe import load, train_of
from distillkit.training import build, metrics
from distillkit.training import run as training_run
from distillkit.training.check import Finding
from distillkit.training.export import _largest, _safetensors

TINY = """\
data: {kind: scenes, train: 4, val: 2, test: 2, size: 96, batch: 2, workers: 0}
teacher: {kind: gfl, backbone: lcnet_035, channels: 16, convs: 1, strides: [8, 16, 32], bins: 9, train: {}}
student: {kind: gfl, backbone: lcnet_035, channels: 16, convs: 1, strides: [8, 16, 32], bins: 9}
distillers:
  - {kind: ld, region: main+valuable}
train: {epochs: 1, optimizer: {kind: sgd, lr: 1e-3}, schedule: {kind: constant, warmup: 0}}
"""
VERBS = ["run", "check", "list", "show", "eval", "predict", "export", "cam"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return "tiny.yaml"


@pytest.fixture(autouse=True)
def _only_this_tests_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", {"model": {}, "distiller": {}, "data": {}})
    monkeypatch.setattr(sys, "path", list(sys.path))


def call(*words: str):
    return CliRunner().invoke(cli.app, list(words))


def in_a_fresh_python(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command; afterwards prints whether torch was imported."""
    code = (
        "import sys; from distillkit.cli import main; sys.argv = ['distillkit', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print('TORCH' if 'torch' in sys.modules else 'NO TORCH', file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(distillkit.__file__).parents[1])}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["show", "quickstart"], 0),
        (["show", "--schema"], 0),
        (["list"], 0),
        (["check", "quickstart", "seed=x"], 1),
    ],
)
def test_help_and_the_checks_of_a_recipe_import_no_torch(words, code):
    done = in_a_fresh_python(*words)
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith("NO TORCH\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb):
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"distillkit {verb}" in result.output


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "distillkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == distillkit.__version__


def test_output_that_is_no_terminal_has_no_colour_and_lines_of_any_length(tiny):
    done = in_a_fresh_python("check", tiny, "train.epohcs=3", "student.backbonee=" + "x" * 200)
    assert "\x1b" not in done.stdout + done.stderr
    assert "override 'train.epohcs=3': train.epohcs: unknown key; did you mean 'epochs'?\n" in done.stderr
    assert "x" * 200 in done.stderr


def test_check_names_all_mistakes_and_exits_1(tiny):
    result = call("check", tiny, "train.epohcs=3", "seed=x")
    assert result.exit_code == 1
    assert "2 mistakes in the recipe" in result.stderr
    assert "override 'seed=x': seed: expected a whole number" in result.stderr


@pytest.mark.parametrize("verb", ["run", "eval", "export"])
def test_a_users_mistake_is_a_message_and_exit_2(tiny, verb):
    result = call(verb, tiny, "seed=x")
    assert result.exit_code == 2
    assert "override 'seed=x': seed: expected a whole number" in result.stderr
    assert "Traceback" not in result.output


def test_unknown_options_and_missing_arguments_exit_2(tiny):
    assert call("run").exit_code == 2
    assert call("run", tiny, "--fast").exit_code == 2
    assert call("eval", tiny, "--split", "all").exit_code == 2
    assert call("show").exit_code == 2


def raiser(error: BaseException):
    def run(*args: object, **kwargs: object) -> None:
        raise error

    return run


def test_ctrl_c_exits_130_and_says_how_to_go_on(tiny, monkeypatch):
    monkeypatch.setattr(training_run, "run", raiser(KeyboardInterrupt()))
    result = call("run", tiny, "name=a b", "--out", "there", "--fresh")
    assert result.exit_code == 2  # a name with a blank
    result = call("run", tiny, "train.epochs=3", "--out", "there", "--fresh")
    assert result.exit_code == 130
    assert "go on with: distillkit run tiny.yaml train.epochs=3 --out there\n" in result.stderr  # and not --fresh


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NonFiniteLossError("ld became nan"), 1, "ld became nan\n"),
        (FileNotFoundError("no such file: x"), 2, "no such file: x\n"),
        (KeyError("boxes"), 1, "KeyError: 'boxes' (--debug shows where)\n"),
    ],
)
def test_errors_are_messages_unless_debugged(tiny, monkeypatch, error, code, said):
    monkeypatch.setattr(training_run, "run", raiser(error))
    result = call("run", tiny)
    assert (result.exit_code, result.stderr) == (code, said)
    assert call("run", tiny, "--debug").exception is error


def test_show_prints_what_loads_again(tiny):
    Path("again.yaml").write_text(call("show", tiny, "train.epochs=7").stdout)
    assert call("show", "again.yaml").stdout == Path("again.yaml").read_text()
    assert "epochs: 7" in Path("again.yaml").read_text()
    assert json.loads(call("show", "--schema").stdout)["type"] == "object"


def test_list_names_kinds_recipes_adapters_and_what_is_registered(tiny):
    Path("my_listed.py").write_text("import distillkit\ndistillkit.register_model('my-net', lambda classes: None)\n")
    text = call("list", "--import", "my_listed").stdout
    for name in ("ld", "logit-kd", "feature-imitation", "self-ld", "gfl", "nanodet", "coco", "quickstart", "my-net"):
        assert name in text.split()
    assert "my-net" not in call("list", "distillers").stdout


def test_imported_packages(tiny):
    assert "--import gone: no such package" in call("run", tiny, "--import", "gone").stderr
    Path("my_broken.py").write_text("1 / 0\n")
    assert "--import my_broken: fails with ZeroDivisionError" in call("run", tiny, "--import", "my_broken").stderr
    Path("my_needy.py").write_text("import not_installed_at_all\n")
    assert "--import my_needy: it needs 'not_installed_at_all'" in call("run", tiny, "--import", "my_needy").stderr
    assert call("run", tiny, "--import", "gone").exit_code == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_imports_packages(tiny, verb):
    words = {"list": [], "predict": [tiny, "white.png"]}.get(verb, [tiny])
    sys.modules.pop("my_package", None)  # another test's, of the same name
    Path("my_package.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    call(verb, *words, "--import", "my_package", "--import", "gone")
    assert Path("imported").exists()
    result = call(verb, *words, "--import", "gone")
    assert (result.exit_code, result.stderr) == (
        2,
        "--import gone: no such package here or among the installed\n",
    )
    result = call(verb, *words, "--import", "my_package.py")
    assert result.stderr == "--import my_package.py: name the module, not its file: --import my_package\n"
    sys.modules.pop("my_package")


def test_builders_are_found_by_name():
    plugins.register_model("net", lambda classes, width=1: (classes, width))
    assert plugins.build("model", "net", classes=3, width=2) == (3, 2)
    with pytest.raises(plugins.PluginError, match=r"no model is called 'nt'; did you mean 'net'\?"):
        plugins.build("model", "nt", classes=3)
    with pytest.raises(plugins.PluginError, match="no data is called 'net'; none is registered"):
        plugins.build("data", "net")
    with pytest.raises(plugins.PluginError, match=r"model 'net' cannot be called with classes, depth: .*'depth'"):
        plugins.build("model", "net", classes=3, depth=2)
    with pytest.raises(plugins.PluginError, match=f"registered already, by {__name__}; choose another name"):
        plugins.register_model("net", print)
    with pytest.raises(plugins.PluginError, match="expected a function or class"):
        plugins.register_data("set", 3)


def test_entry_points(tmp_path, monkeypatch):
    package = tmp_path / "their_package-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[distillkit.models]\ntheirs = their_package:build\nlost = their_package:no"
    )
    (tmp_path / "their_package.py").write_text("def build(classes):\n    return 'built for', classes\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.names("model") == ["lost", "theirs"]
    assert plugins.build("model", "theirs", classes=4) == ("built for", 4)
    with pytest.raises(plugins.PluginError, match=r"the entry point 'their_package:no' of distillkit\.models fails"):
        plugins.build("model", "lost", classes=4)


def test_check_goes_on_to_data_and_models(tiny):
    result = call("check", tiny)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1] == "ok data.train: 4 pictures, 10 classes"
    assert any(line.startswith("ok compare.1 (distilled): GFL") and "ld " in line for line in lines)


def test_check_goes_on_after_an_error(tiny):
    Path("their.py").write_text(
        "import distillkit\n"
        "def build(classes, broken):\n"
        "    raise RuntimeError(broken)\n"
        "distillkit.register_model('theirs', build)\n"
    )
    student = "student={kind: custom, name: theirs, options: {broken: 'out of order'}}"
    result = call("check", tiny, student, "teacher.backbone=lcnet_03", "--import", "their")
    assert result.exit_code == 1
    assert "error teacher: backbone 'lcnet_03' is not a timm model" in result.stdout
    result = call("check", tiny, student, "--import", "their")
    assert "error compare.0 (student): RuntimeError: out of order" in result.stdout


BUILDER = """\
import distillkit
from distillkit.models.gfl import GFL
def build(classes):
    model = GFL(classes, "lcnet_035", strides=(8, 16, 32), channels=16, convs=1, groups=8, bins=9)
    return RESULT
distillkit.register_model("theirs", build)
"""


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("__import__('torch').nn.Sequential(model)", "let its registered builder return (model, adapter)"),
        ("model, 3", "the builder of model 'theirs': expected it to return model or (model, adapter), got (GFL, int)"),
        ("classes", "expected it to return model or (model, adapter), got int"),
    ],
)
def test_a_detector_without_an_adapter_is_told_how_to_bring_it(tiny, monkeypatch, result, said):
    monkeypatch.delitem(sys.modules, "their_detector", raising=False)
    Path("their_detector.py").write_text(BUILDER.replace("RESULT", result))
    result = call("check", tiny, "student={kind: custom, name: theirs}", "--import", "their_detector")
    assert result.exit_code == 1
    assert said in result.stdout


def test_check_names_broken_data(tiny):
    Path("set/images").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save("set/images/a.png")
    picture = {"id": 1, "file_name": "a.png", "height": 32, "width": 32}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 20], "area": 400, "iscrowd": 0}
    categories = [{"id": 1, "name": "cell"}]
    train = {"images": [picture], "annotations": [box], "categories": categories}
    gone = {"images": [{**picture, "id": 2, "file_name": "gone.png"}], "annotations": [], "categories": categories}
    Path("set/train.json").write_text(json.dumps(train))
    Path("set/val.json").write_text(json.dumps(gone))
    result = call("check", tiny, "data={kind: coco, root: set, train: train.json, val: val.json, size: 64, workers: 0}")
    assert result.exit_code == 1
    assert "ok data.train: 1 pictures, 1 classes" in result.stdout
    assert "error data.val: " in result.stdout
    assert "gone.png" in result.stdout


def test_check_exits_0_with_warnings_and_1_with_errors(tiny, monkeypatch):
    import distillkit.training.check as module

    for level, code in (("warning", 0), ("error", 1)):
        monkeypatch.setattr(module, "check", lambda *_, level=level: iter([Finding(level, "data.[x]", "[b]odd[/b]")]))
        result = call("check", tiny)
        assert (result.exit_code, result.stdout.splitlines()[1]) == (code, f"{level} data.[x]: [b]odd[/b]")


def test_from_a_run_to_its_exports(tiny):
    Path(tiny).write_text(TINY + "compare: [student, distilled, {row: wide, student: {channels: 24}}]\n")
    result = call("run", tiny, "--out", "there")
    assert result.exit_code == 0, result.output
    weights = "there/tiny/distilled/final.safetensors"
    for row in ("student", "distilled", "wide"):
        losses = [r["losses"] for r in metrics.read(Path("there/tiny") / row / "metrics.jsonl") if r["kind"] == "train"]
        assert all(step["loss_bbox"] > 0 for step in losses)
    assert json.loads(Path("there/tiny/table.json").read_text())[0]["row"] == "teacher"

    again = call("run", tiny, "--out", "there")
    assert (again.exit_code, "done already" in again.stdout) == (0, True)
    assert call("run", tiny, "seed=1", "--out", "there").exit_code == 2  # another recipe in the same folder

    scores = call("eval", tiny, "--model", weights, "--split", "test")
    assert scores.exit_code == 0, scores.output
    lines = [line.split() for line in scores.stdout.splitlines() if line.strip()]
    assert " ".join(line[0] for line in lines[-12:]) == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
    assert lines[0] == ["class", "AP", "AP50", "AP75", "boxes"]
    assert call("eval", tiny, "--model", "gone.safetensors").exit_code == 2
    assert call("eval", tiny, "output=there", "--model", "distilled", "--split", "test").stdout == scores.stdout
    for row in ("student", "distilled", "wide"):
        assert call("eval", tiny, "output=there", "--model", row).exit_code == 0

    Image.new("RGB", (50, 40), "white").save("white.png")
    found = call("predict", tiny, "white.png", "--weights", weights, "--out", "found", "--set", "evaluate.score=0")
    assert found.exit_code == 0, found.output
    rows = json.loads(Path("found/predictions.json").read_text())
    assert rows
    assert {row["file"] for row in rows} == {"white.png"}

    written = call("export", tiny, "--weights", weights, "--out", "files", "--format", "safetensors")
    assert written.exit_code == 0, written.output
    assert "safetensors: largest difference to the student 0" in written.stdout
    wide = call("export", tiny, "output=there", "--weights", "wide", "--out", "wide")
    assert wide.exit_code == 0, wide.output
    there = load_file("there/tiny/wide/final.safetensors")
    assert all(torch.equal(there[name], value) for name, value in load_file("wide/student.safetensors").items())
    refused = call("eval", tiny, "output=there", "train.epochs=2")  # nothing named: random weights
    assert refused.exit_code == 2
    assert weights in refused.stderr
    assert call("export", tiny, "--format", "pickle").exit_code == 2


@pytest.mark.parametrize("words", [["eval"], ["predict", "white.png"], ["export"]])
@pytest.mark.parametrize("name", [[], ["student"], ["gone"]])
def test_random_weights_are_not_taken_for_a_model(tiny, words, name):
    """Nothing is named; a row that was not trained; neither a row nor a file."""
    Image.new("RGB", (50, 40), "white").save("white.png")
    verb, *rest = words
    option = [f"--{'model' if verb == 'eval' else 'weights'}", *name] if name else []
    result = call(verb, tiny, *rest, *option)
    assert result.exit_code == 2
    wanted = {
        "": "the student of 'tiny' comes with random weights: name a row of the recipe ('student', 'distilled')",
        "student": "runs/tiny/student/final.safetensors does not exist",
        "gone": "gone: neither a file with weights of the student, nor one of teacher, student, distilled",
    }
    assert wanted["".join(name)] in result.stderr


def test_the_classes_of_coco_need_no_picture(tiny):
    """predict and export on a machine that has the annotations only."""
    Path("set").mkdir()
    picture = {"id": 1, "file_name": "gone.png", "height": 32, "width": 32}
    categories = [{"id": 9, "name": "cell"}, {"id": 4, "name": "blob"}]
    Path("set/val.json").write_text(json.dumps({"images": [picture], "annotations": [], "categories": categories}))
    data = "data={kind: coco, root: set, train: train.json, val: val.json, size: 64, workers: 0}"
    recipe = load(tiny, [data])
    assert build.build_classes(recipe) == (["blob", "cell"], [4, 9])
    save_file(build.build_model(recipe.student, 2, recipe.evaluate).state_dict(), "student.safetensors")
    Image.new("RGB", (50, 40), "white").save("white.png")
    shown = ["--weights", "student.safetensors", "--set", data, "--set", "evaluate.score=0"]
    assert call("predict", tiny, "white.png", *shown).exit_code == 0
    assert {row["category"] for row in json.loads(Path("predictions/predictions.json").read_text())} <= {"blob", "cell"}
    assert call("export", tiny, data, "--weights", "student.safetensors").exit_code == 0
    Path("set/val.json").unlink()
    result = call("export", tiny, data, "--weights", "student.safetensors")
    assert (result.exit_code, "set/val.json: no such file" in result.stderr) == (2, True)


def test_a_change_of_the_recipe_among_the_pictures(tiny):
    result = call("predict", tiny, "white.png", "evaluate.score=0.3")
    assert result.exit_code == 2
    assert "evaluate.score=0.3: no such picture; to change the recipe, write --set evaluate.score=0.3" in result.stderr


@pytest.mark.parametrize("place", [0, 1])
def test_not_a_number_in_an_export_is_the_largest_difference(tmp_path, place):
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    got = [bad if i == place else good for i in range(2)]
    assert math.isnan(_largest(got, [good, good]))
    student = torch.nn.BatchNorm1d(3)
    list(student.parameters())[place].data[1] = float("nan")
    assert math.isnan(_safetensors(student, tmp_path / "s.safetensors"))


def test_schedules_of_a_row_count_the_training_calls_of_that_row(tiny):
    recipe = load(tiny, ["distillers.0.weight={value: 1, kind: warmup, steps: 10}"])
    train = train_of(recipe, {"accumulate": 4})
    (distiller,) = build.build_distillers(recipe, "all", 10, train)
    assert distiller.weight.steps == 40
