"""Recipes: every mistake with its place, all in one report, and never a line of code run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from distillkit import recipe as recipes
from distillkit import schema as schemas
from distillkit.located import Mistakes, Place, dump, parse
from distillkit.recipe import RecipeError, load, resolved

GOOD = """\
data: {kind: scenes, size: 64}
teacher: {kind: gfl, checkpoint: t.pth}
student:
  kind: gfl
  backbone: resnet18
distillers:
  - {kind: ld, region: main}
  - {kind: ld, region: valuable}
train:
  epochs: 2
  optimizer: {kind: sgd, lr: 0.1}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a recipe into the current folder, so that places in messages are short."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "r.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def mistakes(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    return caught.value.mistakes


def with_line(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_values_defaults_and_names(write):
    recipe = load(write(GOOD, "my.yaml"))
    assert (recipe.name, recipe.data.size, recipe.train.optimizer.lr) == ("my", [64, 64], 0.1)
    assert recipe.train.optimizer.momentum == 0.9
    assert [d.name for d in recipe.distillers] == ["ld_main", "ld_valuable"]
    assert [(row.row, row.distillers) for row in recipe.compare] == [("student", "none"), ("distilled", "all")]


def test_without_distillers_there_is_no_distilled_row(write):
    text = re.sub(r"distillers:\n(  - .*\n)*", "", GOOD)
    assert [row.row for row in load(write(text)).compare] == ["student"]


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("epochs: 2", "epohcs: 2", "r.yaml:10: train.epohcs: unknown key; did you mean 'epochs'?"),
        ("epochs: 2", "lr: 2", "r.yaml:10: train.lr: unknown key; did you mean 'optimizer.lr'?"),
        ("epochs: 2", "epochs: two", "r.yaml:10: train.epochs: expected a whole number; got the text 'two'"),
        ("epochs: 2", "epochs: true", "r.yaml:10: train.epochs: expected a whole number; got true"),
        ("epochs: 2", "epochs:", "r.yaml:10: train.epochs: expected a whole number; got nothing"),
        ("epochs: 2", "epochs: -1", "r.yaml:10: train.epochs: must be greater than or equal to 0; got the number -1"),
        ("kind: scenes,", "kind: scnes,", "r.yaml:1: data.kind: unknown kind 'scnes'; did you mean 'scenes'?"),
        ("kind: scenes, ", "", "r.yaml:1: data: the key 'kind' is missing; expected one of: coco, voc, scenes, custom"),
        ("kind: scenes,", "kind: coco,", "r.yaml:1: data.root: is missing"),
        (
            "  kind: gfl\n",
            "  kind: yolo\n",
            "r.yaml:4: student.kind: unknown kind 'yolo'; expected one of: gfl, nanodet, mmdet, torchvision, "
            "transformers, ultralytics, custom",
        ),
        (
            "region: valuable",
            "region: valuble",
            "r.yaml:8: distillers.1.region: expected one of main, valuable, main+valuable, merged; "
            "got the text 'valuble'; did you mean 'valuable'?",
        ),
        ("size: 64", "size: [64, 64, 3]", "r.yaml:1: data.size: expected at most 2 values; got 3"),
        ("size: 64", "size: big", "r.yaml:1: data.size: expected one number or [height, width], got the text 'big'"),
        (
            "backbone: resnet18",
            "pretrained: 3",
            "r.yaml:5: student.pretrained: expected true or false or text; got the number 3",
        ),
        ("lr: 0.1", "lr: .nan", "r.yaml:11: train.optimizer.lr: must be a finite number; got the number nan"),
        (
            "kind: sgd",
            "kind: adamw, momentum: 0.9",
            "r.yaml:11: train.optimizer.momentum: unknown key; "
            "expected one of: lr, weight_decay, backbone_lr, no_decay_norm, layer_decay, kind, eps, bias_correction",
        ),
        (
            "region: valuable",
            "region: main",
            "r.yaml:8: distillers.1.name: two distillers are called 'ld_main'; give each its own name",
        ),
        (
            "region: valuable",
            "region: valuable, teacher: big",
            "r.yaml:8: distillers.1.teacher: no teacher is called 'big'; the only teacher needs no name",
        ),
        (
            ", checkpoint: t.pth",
            "",
            "r.yaml:2: teacher: has no trained weights: give `checkpoint: FILE`, or `train: {}` to train it first",
        ),
        (
            "checkpoint: t.pth",
            "train: {epocs: 3}",
            "r.yaml:2: teacher.train.epocs: unknown key; did you mean 'epochs'?",
        ),
        (
            "train:\n",
            "compare: [studnt]\ntrain:\n",
            "r.yaml:9: compare.0: unknown row 'studnt'; did you mean 'student'?; one of your own is {row: studnt, ...}",
        ),
        (
            "train:\n",
            "compare: [{row: a, distillers: [ld_man]}]\ntrain:\n",
            "r.yaml:9: compare.0.distillers: no distiller is called 'ld_man'; did you mean 'ld_main'?",
        ),
        (
            "train:\n",
            "compare: [{row: a, student: {convs: 0}}]\ntrain:\n",
            "r.yaml:9: compare.0.student.convs: must be greater than or equal to 1; got the number 0",
        ),
        (
            "train:\n",
            "compare: [student, {row: Student}]\ntrain:\n",
            "r.yaml:9: compare.1: another row, or a teacher, is called 'Student' too; give each row its own name",
        ),
        (
            "region: main",
            "region: main, gamma: 0.5",
            "r.yaml:7: distillers.0: gamma and measure bound the valuable region, and region: main has none; "
            "leave them out",
        ),
        (
            "{kind: ld, region: main",
            "{kind: self-ld, source: checkpoint, checkpoint: s.safetensors, decay: 0.9, region: main",
            "r.yaml:7: distillers.0: decay is for source: ema; an earlier checkpoint does not change: leave decay out",
        ),
        (
            "region: main",
            "region: main, weight: {value: 1, steps: 100}",
            "r.yaml:7: distillers.0.weight: steps and end are for a weight that changes: "
            "give its kind: warmup, linear, cosine or until",
        ),
    ],
)
def test_each_mistake_has_its_line_and_the_nearest_word(write, old, new, mistake):
    assert mistakes(write(with_line(old, new))) == [mistake]


def test_all_mistakes_in_one_report_in_the_order_of_the_lines(write):
    text = with_line("epochs: 2", "epohcs: 2").replace("size: 64", "size: x").replace("region: main", "regoin: main")
    found = mistakes(write(text + "seed: 1.5\nseed: 2.5\n"), "studnet=3", "train.amp=fp17")
    assert [": ".join(m.split(": ")[:2]) for m in found] == [
        "r.yaml:1: data.size",
        "r.yaml:7: distillers.0.regoin",
        "r.yaml:10: train.epohcs",
        "r.yaml:13: seed",
        "r.yaml:13: seed",
        "override 'train.amp=fp17': train.amp",
        "override 'studnet=3': studnet",
    ]
    assert "given twice; first at r.yaml:12" in "\n".join(found)


def test_mistakes_name_the_file_they_come_from_through_extends(write):
    write(with_line("epochs: 2", "epohcs: 2"), "base.yaml")
    child = write("extends: base.yaml\nstudent:\n  convs: many\n", "child.yaml")
    assert mistakes(child) == [
        "child.yaml:3: student.convs: expected a whole number; got the text 'many'",
        "base.yaml:10: train.epohcs: unknown key; did you mean 'epochs'?",
    ]


def test_extends_merges_mappings_and_replaces_lists_and_other_kinds(write):
    write(GOOD, "base.yaml")
    child = write(
        "extends: base.yaml\ntrain: {epochs: 5, optimizer: {kind: adamw}}\ndistillers: [{kind: logit-kd}]\n",
        "child.yaml",
    )
    recipe = load(child)
    assert (recipe.train.epochs, recipe.train.optimizer.kind, recipe.train.optimizer.lr) == (5, "adamw", 0.01)
    assert [d.name for d in recipe.distillers] == ["logit_kd"]
    assert (recipe.student.backbone, recipe.name) == ("resnet18", "child")


def test_extends_in_a_circle_and_of_nothing(write):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert mistakes("a.yaml") == [
        "b.yaml:1: extends: recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml"
    ]
    lost = write("name: x\nextends: gone.yaml\ntrain: {epohcs: 1}\n", "lost.yaml")
    assert mistakes(lost) == [  # and not that data and student are missing: they may stand in the file that is
        "lost.yaml:2: extends: no such file: gone.yaml (paths are relative to the file that extends)",
        "lost.yaml:3: train.epohcs: unknown key; did you mean 'epochs'?",
    ]


def test_overrides(write):
    recipe = load(
        write(GOOD), ["train.epochs=3", "distillers.0.weight=0.5", "train.schedule.warmup=7", "teacher.dtype=bfloat16"]
    )
    assert (recipe.train.epochs, recipe.distillers[0].weight.value) == (3, 0.5)
    assert (recipe.train.schedule.warmup, recipe.teacher.dtype) == (7, "bfloat16")
    assert load("r.yaml", ["student={kind: gfl, backbone: resnet34}"]).student.backbone == "resnet34"


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("train.epohcs=3", "override 'train.epohcs=3': train.epohcs: unknown key; did you mean 'epochs'?"),
        ("train.epochs", "override 'train.epochs': expected key.path=value, as in train.epochs=3"),
        (
            "distillers.2.weight=1",
            "override 'distillers.2.weight=1': distillers: is a list; expected a number below its length 2, got 2",
        ),
        ("train.epochs.x=1", "override 'train.epochs.x=1': train.epochs: is the number 2, which holds no key 'x'"),
        ("data.size=[3", "override 'data.size=[3': data.size: not YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "name=!!python/name:os.system",
            "override 'name=!!python/name:os.system': name: the tag !!python/name:os.system "
            "is refused: a recipe is data and never runs code",
        ),
        (
            "name=../../etc",
            "override 'name=../../etc': name: expected letters, digits, '.', '_' and '-', "
            "the first a letter or digit; got the text '../../etc'",
        ),
    ],
)
def test_an_overrides_mistake_names_the_override(write, override, mistake):
    assert mistakes(write(GOOD), override) == [mistake]


def test_environment(write, monkeypatch):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    monkeypatch.setenv("ROOT", "/somewhere")
    path = write(
        with_line("{kind: scenes, size: 64}", "\n  kind: coco\n  root: ${ROOT}/data\n  val: ${NOT_SET_HERE}/val.json")
    )
    what = "the environment variable NOT_SET_HERE is not set; set it, or write the value itself"
    assert mistakes(path) == [f"r.yaml:4: data.val: {what}"]
    assert load(path, ["data.val=v.json"]).data.root == "/somewhere/data"


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch owned]", "!!python/name:os.system", "!include x.yaml"]
)
def test_tags_run_nothing(write, tag):
    found = mistakes(write(with_line("backbone: resnet18", f"backbone: {tag}")))
    assert found == [
        f"r.yaml:5: student.backbone: the tag {tag.split()[0]} is refused: a recipe is data and never runs code"
    ]
    assert not Path("owned").exists()


def test_aliases_are_refused_so_that_a_short_file_stays_small(write):
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert mistakes(write(bomb)) == ["r.yaml:2: *a stands for another value; write the value out, or use extends"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("data: [1, 2\nstudent: x\n", "r.yaml:2: not YAML: "),
        ("- a\n", "r.yaml:1: expected a mapping of keys such as data, student and train; got a list"),
        ("", "r.yaml:1: expected a mapping of keys such as data, student and train; got nothing"),
        ("a: b: c", "r.yaml:1: not YAML: mapping values are not allowed here"),
        ("[" * 5000 + "]" * 5000, "r.yaml:1: nested deeper than"),
    ],
)
def test_files_that_are_no_recipe(write, text, mistake):
    (found,) = mistakes(write(text))
    assert found.startswith(mistake)


def test_not_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert mistakes(str(path)) == [f"{path}:1: cannot be read: not UTF-8 text"]


def test_unknown_recipe_names_the_nearest_bundled_one():
    (found,) = mistakes("quikstart")
    assert found == "quikstart: no such file, nor a recipe that comes with distillkit; did you mean 'quickstart'?"


def test_words_of_yaml_1_1_mean_themselves(write):
    recipe = load(write(GOOD), ["train.amp=no", "train.optimizer.weight_decay=1e-4", "student.backbone='1e-4'"])
    assert (recipe.train.amp, recipe.train.optimizer.weight_decay, recipe.student.backbone) == ("no", 1e-4, "1e-4")
    write(resolved(recipe), "again.yaml")
    assert load("again.yaml") == recipe


def test_several_teachers(write):
    text = GOOD.replace(
        "teacher: {kind: gfl, checkpoint: t.pth}", "teachers: {a: {kind: gfl, train: {}}, b: {kind: gfl}}"
    )
    assert mistakes(write(text)) == [
        "r.yaml:2: teachers.b: has no trained weights: give `checkpoint: FILE`, or `train: {}` to train it first",
        "r.yaml:7: distillers.0: which of the teachers a, b? give `teacher: NAME`",
        "r.yaml:8: distillers.1: which of the teachers a, b? give `teacher: NAME`",
    ]
    recipe = load("r.yaml", ["teachers.b.checkpoint=b.pth", "distillers.0.teacher=a", "distillers.1.teacher=b"])
    assert [d.teacher for d in recipe.distillers] == ["a", "b"]


def test_rows_change_the_student_and_its_training(write):
    recipe = load(write(GOOD + "compare: [{row: wide, student: {channels: 64}, train: {optimizer: {lr: 0.5}}}]\n"))
    (row,) = recipe.compare
    assert recipes.student_of(recipe, row.student).channels == 64
    assert recipes.student_of(recipe, row.student).backbone == "resnet18"
    train = recipes.train_of(recipe, row.train)
    assert (train.optimizer.lr, train.epochs) == (0.5, 2)


def test_custom_kinds_are_names_only(write):
    recipe = load(
        write(with_line("  kind: gfl\n  backbone: resnet18\n", "  kind: custom\n  name: mine\n  options: {a: [1]}\n"))
    )
    assert (recipe.student.name, recipe.student.options) == ("mine", {"a": [1]})
    (found,) = mistakes(write(with_line("  kind: gfl\n  backbone: resnet18\n", "  kind: mine\n")))
    kinds = "gfl, nanodet, mmdet, torchvision, transformers, ultralytics, custom"
    assert found == f"r.yaml:4: student.kind: unknown kind 'mine'; expected one of: {kinds}"


@pytest.mark.parametrize("path", recipes.bundled(), ids=lambda path: path.stem)
def test_bundled_recipes_are_right_and_survive_being_written_out(path, monkeypatch, tmp_path):
    for name in re.findall(r"\$\{(\w+)\}", path.read_text()):
        monkeypatch.setenv(name, "/somewhere")
    recipe = load(path.stem)
    (tmp_path / "again.yaml").write_text(resolved(recipe))
    assert load(tmp_path / "again.yaml") == recipe


def test_the_promised_recipes_are_there():
    assert {"quickstart", "ld_coco", "ld_coco_mini", "ld_bccd"} <= {path.stem for path in recipes.bundled()}


def test_schema_has_every_kind_and_the_short_forms():
    schema = schemas.json_schema()
    detection, rotated, classes, *_ = (case["then"]["properties"] for case in schema["allOf"])
    assert set(detection) == set(rotated) == {"extends", *schemas.DetectionRecipe.model_fields}
    assert set(classes) == {"extends", *schemas.ClassificationRecipe.model_fields}
    assert set(detection["data"]["discriminator"]["mapping"]) == {"coco", "voc", "scenes", "custom"}
    assert set(rotated["data"]["discriminator"]["mapping"]) == {"dota", "hrsc", "coco", "scenes", "custom"}
    assert {"type": "number"} in schema["$defs"]["LD"]["properties"]["weight"]["anyOf"]
    assert schema["$defs"]["GFLModel"]["additionalProperties"] is False


DOCUMENTED = re.findall(
    r"```yaml\n(.*?)```", (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL
)
EDITOR = Draft202012Validator(schemas.json_schema())


def written(text):
    """A file's values as an editor reads them: YAML 1.2, nothing merged or filled in."""
    return parse(text, lambda line: Place("x", line), (), Mistakes()).plain()


@pytest.mark.parametrize("text", [path.read_text() for path in recipes.bundled()] + DOCUMENTED)
def test_an_editor_marks_nothing_in_a_good_recipe(text):
    assert [error.message for error in EDITOR.iter_errors(written(text))] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epochs: 2", "epohcs: 2"),
        ("kind: scenes", "kind: scnes"),
        ("kind: scenes, ", ""),
        ("data:", "dta:"),
        ("region: valuable", "region: valuble"),
        ("kind: sgd", "kind: adamw, momentum: 0.9"),
        ("backbone: resnet18", "backbone: 18"),
        ("{kind: ld, region: main}", "{region: main}"),
    ],
)
def test_an_editor_marks_mistakes(old, new):
    assert EDITOR.is_valid(written(GOOD))
    assert not EDITOR.is_valid(written(with_line(old, new)))


def test_no_kind_is_called_like_a_key():
    """A mistake's place is found by leaving the kinds out of pydantic's path, so the two must differ."""
    definitions = schemas.json_schema()["$defs"].values()
    keys = {key for definition in definitions for key in definition.get("properties", {})}
    kinds = {
        d["properties"]["kind"]["const"] for d in definitions if "const" in d.get("properties", {}).get("kind", {})
    }
    assert not keys & kinds


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["C"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_dumped_reads_back_equal(value):
    mistakes = Mistakes()
    node = parse(dump(value), lambda line: Place("x", line), (), mistakes)
    assert (node.plain(), mistakes.texts()) == (value, [])


def test_no_torch_is_imported():
    code = (
        "import sys, distillkit.recipe as r, distillkit.plugins, distillkit.schema as s\n"
        "r.load('quickstart'); s.json_schema(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recipes_of_the_documentation_are_right(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLS", "/somewhere")
    (tmp_path / "mine.yaml").write_text(DOCUMENTED[0])
    for i, block in enumerate(DOCUMENTED):
        (tmp_path / f"{i}.yaml").write_text(block)
        load(tmp_path / f"{i}.yaml")
    assert len(DOCUMENTED) == 13
