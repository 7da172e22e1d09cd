"""kind: mmdet, mmrotate, torchvision and transformers: recipes with other packages' models, which run no code."""

import importlib.util
import json
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from rich.console import Console

from distillkit import schema
from distillkit.adapters import adapter_for
from distillkit.data.scenes import Scenes
from distillkit.evaluation.coco import coco_metrics
from distillkit.evaluation.predict import detect, predict_dataset
from distillkit.integrations import openmmlab
from distillkit.recipe import RecipeError, load
from distillkit.training import build, checkpoint
from distillkit.training.build import mmdet_models
from distillkit.training.build.torchvision_models import torchvision_model
from distillkit.training.check import check
from distillkit.training.errors import Interrupted, RunError
from distillkit.training.export import export
from distillkit.training.loop import Run
from distillkit.training.predict import predict
from distillkit.training.run import run


def there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


needs_mmdet = pytest.mark.skipif(not all(map(there, ("mmdet", "mmengine", "mmcv"))), reason="needs mmdet")
needs_mmrotate = pytest.mark.skipif(not all(map(there, ("mmrotate", "mmdet"))), reason="needs mmrotate")
needs_transformers = pytest.mark.skipif(not there("transformers"), reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

DATA = {"kind": "scenes", "train": 8, "val": 4, "test": 2, "digits": [2, 4], "size": 64, "batch": 4, "workers": 0}
NARROW = {
    "backbone.depth": 18, "backbone.base_channels": 8, "backbone.frozen_stages": -1, "backbone.norm_eval": False,
    "neck.in_channels": [8, 16, 32, 64], "neck.out_channels": 64, "bbox_head.in_channels": 64,
    "bbox_head.feat_channels": 64, "bbox_head.stacked_convs": 1,
}  # fmt: skip
GFL = {"kind": "mmdet", "config": "mmdet::gfl/gfl_r50_fpn_1x_coco.py", "set": NARROW}
RETINA = "mmrotate::rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py"
ROTATED = {"kind": "mmrotate", "config": RETINA, "set": NARROW}
FCOS = {"kind": "torchvision", "model": "fcos_resnet50_fpn", "backbone": "resnet18"}
SSD = {"kind": "torchvision", "model": "ssdlite320_mobilenet_v3_large"}
RT_DETR = {
    "kind": "transformers",
    "model_type": "rt_detr",
    "options": {
        "num_queries": 20, "decoder_layers": 2, "d_model": 32, "encoder_hidden_dim": 32, "num_denoising": 10,
        "decoder_in_channels": [32, 32, 32], "encoder_in_channels": [16, 32, 64], "decoder_attention_heads": 4,
        "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "backbone_config": {
            "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64],
            "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
        },
    },
}  # fmt: skip
VIT = {
    "kind": "transformers",
    "model_type": "vit",
    "options": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
}


@pytest.fixture
def written(tmp_path):
    """Write a recipe and load it."""

    def write(student, teacher=None, distillers=(), overrides=(), **more):
        raw = {"name": "mine", "data": DATA, "student": student, "train": {"epochs": 1}, **more}
        if teacher is not None:
            raw |= {"teacher": {**teacher, "train": {}}, "distillers": list(distillers)}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(raw))))
        return load(tmp_path / "mine.yaml", [f"output={tmp_path / 'runs'}", *overrides])

    return write


def errors(recipe) -> list[str]:
    return [f"{f.where}: {f.what}" for f in check(recipe) if f.level == "error"]


def built(recipe, classes: int = 10, seed: int = 0):
    torch.manual_seed(seed)
    return build.build_model(recipe.student, classes, recipe.evaluate, recipe.data.size)


def block(of, /, **keys):
    return of.model_validate(keys)


# -- a run of each kind -----------------------------------------------------------------------------------------------

PAIRS = {
    "mmdet": (GFL, [{"kind": "ld", "region": "main"}, {"kind": "logit-kd"}, {"kind": "feature-imitation"}]),
    "torchvision": (FCOS, [{"kind": "logit-kd", "protocol": "sigmoid"}, {"kind": "feature-imitation"}]),
    "transformers": (RT_DETR, [{"kind": "query-kd"}]),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("mmdet", marks=[needs_mmdet, pytest.mark.integration]),
        pytest.param("torchvision", marks=pytest.mark.integration),
        pytest.param("transformers", marks=needs_transformers),
    ],
)
def test_a_run_from_the_first_check_to_predictions(kind, written, tmp_path):
    model, distillers = PAIRS[kind]
    recipe = written(model, model, distillers)
    findings = list(check(recipe))
    assert [f for f in findings if f.level == "error"] == []
    if kind == "mmdet":
        assert all("num_classes set to 10 in bbox_head" in f.what for f in findings[3:])
    folder = run(recipe, console=Console(quiet=True))
    assert "Not drawn" in (folder / "report.html").read_text() or kind == "mmdet"
    rows = json.loads((folder / "table.json").read_text())
    assert [row["row"] for row in rows] == ["teacher", "student", "distilled"]
    picture = tmp_path / "picture.png"
    _save(Scenes(1, 64, split="test")[0, 0][0], picture)
    found = predict(recipe, "distilled", [picture], tmp_path / "found")
    assert all(row["category"] in "0123456789" and row["score"] >= recipe.evaluate.score for row in found)
    # the names of the untouched model's weights
    own = build.build_model(recipe.student, 10, recipe.evaluate, recipe.data.size).state_dict()
    assert checkpoint.load_weights(folder / "distilled" / "final.safetensors").keys() == own.keys()
    with pytest.raises(RunError, match=r"(GFL|FCOS|RTDetr\w+) is (mmdet|torchvision|transformers)'s: .* safetensors"):
        export(recipe, "distilled", tmp_path / "out", ["onnx"], Console(quiet=True))


def _save(picture, path: Path) -> None:
    from torchvision.io import write_png

    write_png((picture * 255).round().byte(), str(path))


@needs_mmrotate
def test_rotated_detectors_of_mmrotate(written):
    distillers = [{"kind": "logit-kd", "protocol": "sigmoid", "overlap": "enclosing"}]
    recipe = written(ROTATED, ROTATED, distillers, task="rotated-detection")
    findings = list(check(recipe))
    assert [f for f in findings if f.level == "error"] == []
    model = built(recipe).eval()
    model.bbox_head.retina_cls.bias.data.zero_()
    data = Scenes(1, 64, rotated=True)
    with torch.no_grad():
        (found,) = detect(model, [data[0, 0][0]])
    assert found["boxes"].shape[1] == 5
    assert len(found["boxes"]) > 0


@needs_transformers
@pytest.mark.parametrize("student", [VIT, {"kind": "torchvision", "model": "shufflenet_v2_x0_5"}])
def test_classifiers_learn_across_packages(student, written):
    task = {"task": "classification", "data": {"kind": "single-digit", "train": 16, "val": 4, "test": 4, "size": 32}}
    task["data"] |= {"batch": 8, "workers": 0}
    recipe = written(student, {"kind": "timm", "model": "test_resnet"}, [{"kind": "logit-kd"}], **task)
    assert errors(recipe) == []
    model = build.build_model(recipe.student, [str(i) for i in range(10)], recipe.evaluate, recipe.data.size)
    if student is VIT:
        assert model.config.id2label == {i: str(i) for i in range(10)}
        assert model.config.image_size == 32
    folder = run(recipe, console=Console(quiet=True))
    assert json.loads((folder / "table.json").read_text())[2]["top5"] > 0


@needs_transformers
def test_segmentation_models_learn_across_packages(written):
    student = {
        "kind": "transformers",
        "model_type": "segformer",
        "options": {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]},
    }
    student["options"]["decoder_hidden_size"] = 16
    data = {"kind": "mask-scenes", "train": 8, "val": 2, "test": 2, "size": 64, "batch": 4, "workers": 0}
    teacher = {"kind": "torchvision", "model": "lraspp_mobilenet_v3_large"}
    recipe = written(student, teacher, [{"kind": "pixel-kd"}], task="segmentation", data=data)
    assert errors(recipe) == []
    other = written(teacher, None, task="segmentation", data=data)
    assert errors(other) == []


# -- predictions are the packages' own --------------------------------------------------------------------------------


def _as_coco(data, found, first: int = 0):
    """What a package predicted, as our evaluation takes it."""
    rows = []
    for i, (boxes, scores, labels) in enumerate(found):
        _, target = data[0, i]
        keys = {key: target[key] for key in ("image_id", "size", "scale")}
        rows.append({"boxes": boxes, "scores": scores, "labels": labels - first, **keys})
    return coco_metrics(rows, data).numbers


def taught(recipe, model, data, steps: int):
    """A few steps on the pictures of a data set, so that something is found."""
    adapter, optimizer = adapter_for(model), torch.optim.AdamW(model.train().parameters(), 2e-3)
    for _ in range(steps):
        items = [data[0, i] for i in range(len(data))]
        args, kwargs = adapter.call(model, [image for image, _ in items], [target for _, target in items])
        losses = adapter.losses(model(*args, **kwargs))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.integration
@pytest.mark.parametrize("name", ["fcos", "ssd"])
def test_ap_is_that_of_torchvisions_own_predictions(name, written):
    recipe = written({"fcos": FCOS, "ssd": SSD}[name], overrides=["evaluate.score=0.01"])
    data = Scenes(4, 64, digits=(1, 1))
    model = taught(recipe, built(recipe), data, 20 if name == "fcos" else 15)
    ours = coco_metrics(predict_dataset(model, data, batch=4), data).numbers
    with torch.no_grad():
        rows = model([data[0, i][0] for i in range(4)])  # by hand
    assert model.score_thresh == 0.01
    theirs = _as_coco(data, [(r["boxes"], r["scores"], r["labels"]) for r in rows], first=int(name == "ssd"))
    assert ours == theirs
    assert name == "ssd" or ours["AP50"] > 0


@needs_mmdet
def test_ap_is_that_of_mmdets_own_predictions(written):
    openmmlab.prepare()
    from mmdet.structures import DetDataSample

    recipe = written(GFL, overrides=["evaluate.score=0.01", "evaluate.iou=0.5", "evaluate.most=30"])
    data = Scenes(4, 64, digits=(1, 1))
    model = taught(recipe, built(recipe), data, 30)
    assert (model.bbox_head.test_cfg.score_thr, model.bbox_head.test_cfg.max_per_img) == (0.01, 30)
    assert model.bbox_head.test_cfg.nms.iou_threshold == 0.5
    ours = coco_metrics(predict_dataset(model, data, batch=4), data).numbers
    inputs, samples = [], []
    for i in range(4):  # as mmdet's loader reads pictures: BGR in 0..255
        inputs.append((data[0, i][0] * 255).flip(0))
        meta = {"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)}
        samples.append(DetDataSample(metainfo=meta))
    with torch.no_grad():
        rows = [s.pred_instances for s in model.test_step({"inputs": inputs, "data_samples": samples})]
    theirs = _as_coco(data, [(r.bboxes, r.scores, r.labels) for r in rows])
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert ours["AP50"] > 0


@needs_transformers
def test_detections_are_those_of_transformers_own_post_processing(written):
    from transformers import RTDetrImageProcessor

    recipe = written(RT_DETR, overrides=["evaluate.score=0.0", "evaluate.most=15"])
    model = built(recipe).eval()
    pictures = [Scenes(2, 64)[0, i][0] for i in range(2)]
    with torch.no_grad():
        found = detect(model, pictures)
        output = model(pixel_values=torch.stack(pictures))
    size = torch.tensor([[64, 64]] * 2)
    theirs = RTDetrImageProcessor().post_process_object_detection(output, threshold=0.0, target_sizes=size)
    for mine, its in zip(found, theirs, strict=True):
        assert len(mine["boxes"]) == 15
        torch.testing.assert_close(mine["scores"], its["scores"][:15])
        torch.testing.assert_close(mine["boxes"], its["boxes"][:15].clamp(0, 64))
        assert torch.equal(mine["labels"], its["labels"][:15])


@needs_transformers
def test_pictures_of_several_sizes_are_padded_and_boxes_stay_theirs(written):
    """RT-DETR's boxes are shares of the padded picture, DETR's of the picture itself."""
    from tests.hugging_models import detr, rt_detr

    pictures = [torch.rand(3, 64, 40), torch.rand(3, 32, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 8, 24, 40]]), "labels": torch.tensor([3])} for _ in pictures]
    for model, shares in ((rt_detr(), [(64, 64), (64, 64)]), (detr(), [(64, 40), (32, 64)])):
        _, call = adapter_for(model).call(model, pictures, targets)
        assert call["pixel_values"].shape == (2, 3, 64, 64)
        assert call["pixel_mask"].sum((1, 2)).tolist() == [64 * 40, 32 * 64]
        for label, (height, width) in zip(call["labels"], shares, strict=True):
            wanted = torch.tensor([[14 / width, 24 / height, 20 / width, 32 / height]])
            torch.testing.assert_close(label["boxes"], wanted)
            assert label["class_labels"].tolist() == [3]


def test_the_background_is_torchvisions_first_class(written):
    model = built(written(SSD))
    adapter = adapter_for(model)
    targets = [{"boxes": torch.tensor([[4.0, 8, 24, 40]]), "labels": torch.tensor([0]), "image_id": 7}]
    args, _ = adapter.call(model, [torch.rand(3, 64, 64)], targets)
    assert args[1][0]["labels"].tolist() == [1]
    found = [{"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.tensor([10])}]
    assert adapter.detections(model, found, args[0])[0]["labels"].tolist() == [9]


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_killed_run_of_torchvision_goes_on_to_the_same_weights(written, monkeypatch, tmp_path):
    recipe = written(FCOS, overrides=["train.save_every=1", "data.train=12", "train.threads=1"])
    whole = run(recipe, console=Console(quiet=True))
    wanted = checkpoint.load_weights(whole / "student" / "final.safetensors")

    step = Run.step

    def dies(self, window):
        step(self, window)
        if self.at.step == 2:
            raise KeyboardInterrupt  # before anything of this step is saved

    other = recipe.model_copy(update={"output": str(tmp_path / "killed")})
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", dies)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            run(other, console=Console(quiet=True))
    assert not (tmp_path / "killed" / "mine" / "student" / "final.safetensors").exists()
    folder = run(other, console=Console(quiet=True))
    got = checkpoint.load_weights(folder / "student" / "final.safetensors")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# -- what is not known, or cannot be ----------------------------------------------------------------------------------


@needs_mmdet
def test_what_mmdet_does_not_know_is_named_with_what_is_near(written):
    def said(changes, **keys):
        student = {**GFL, "set": {**NARROW, **changes}, **keys}
        (what,) = {text.partition(": ")[2] for text in errors(written(student))}
        return what

    near = "mmdet has no 'gfl/gfl_r55_fpn_1x_coco.py'; did you mean 'gfl/gfl_r50_fpn_1x_coco.py'"
    assert near in said({}, config="mmdet::gfl/gfl_r55_fpn_1x_coco.py")
    assert "backbone has no key 'dept'; did you mean 'depth'" in said({"backbone.dept": 18})
    assert "the model has no key 'nek'; did you mean 'neck'" in said({"nek.out_channels": 18})
    assert "neck.in_channels is a list of 4; expected a number from 0, got 'x'" in said({"neck.in_channels.x": 18})
    assert "nothing is registered as 'ResNett'; did you mean 'ResNet'" in said({"backbone.type": "ResNett"})
    assert "frozen_stages: 1), which would stay random: set pretrained: true" in said({"backbone.frozen_stages": 1})
    for config in ("ld/ld_r18-gflv1-r101_fpn_1x_coco.py",):
        student = {**GFL, "config": f"mmdet::{config}", "set": {}}
        assert "brings a teacher of its own" in errors(written(student))[0]


@needs_mmdet
def test_a_distiller_that_a_head_cannot_serve(written):
    atss = {**GFL, "config": "mmdet::atss/atss_r50_fpn_1x_coco.py"}
    (wrong,) = errors(written(atss, atss, [{"kind": "ld", "region": "main"}]))
    assert "distilled" in wrong
    assert "distributions" in wrong
    (wrong,) = errors(written(GFL, GFL, [{"kind": "query-kd"}]))
    assert "QueryDetections" in wrong


@needs_transformers
def test_teacher_and_student_are_called_alike(written):
    (wrong,) = errors(written(FCOS, RT_DETR, [{"kind": "feature-imitation"}]))
    assert (
        "(kind: transformers) is called model(pixel_values=..., labels=...), the student (kind: torchvision)" in wrong
    )


def test_what_torchvision_does_not_know_is_named_with_what_is_near(written):
    def said(**keys):
        return errors(written({**FCOS, **keys}))[0]

    assert "torchvision has no model 'fcos_resnet51_fpn' for detection; nearest: fcos_resnet50_fpn" in said(
        model="fcos_resnet51_fpn"
    )
    assert "model: resnet18 is for classification, and the recipe's task is detection" in said(model="resnet18")
    assert "has no ResNet 'resnet19'; nearest: resnet1" in said(backbone="resnet19")
    assert "ssd300_vgg16 has its own; it can be another one in fcos_resnet50_fpn" in said(model="ssd300_vgg16")
    assert "takes no 'min_sise'; nearest: min_size" in said(options={"min_sise": 3})
    segmenter = block(schema.TorchvisionModel, kind="torchvision", model="fcn_resnet50", options={"aux_los": True})
    with pytest.raises(RunError, match="takes no 'aux_los'; nearest: aux_loss"):
        build.build_model(segmenter, 3, schema.EvaluateMasks())
    assert "learns masks, and the data have boxes" in said(model="maskrcnn_resnet50_fpn")


@needs_transformers
def test_what_transformers_does_not_know_is_named_with_what_is_near(written, tmp_path):
    def said(student):
        return errors(written(student))[0]

    assert "transformers has no 'rt_det'; nearest: rt_detr" in said({**RT_DETR, "model_type": "rt_det"})
    assert "transformers has no vit for detection" in said({"kind": "transformers", "model_type": "vit"})
    assert "rt_detr has no key 'num_querie'; nearest: num_queries" in said(
        {"kind": "transformers", "model_type": "rt_detr", "options": {"num_querie": 3}}
    )
    assert "expected a config.json, or a folder with one" in said({"kind": "transformers", "config": str(tmp_path)})


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        pytest.param(GFL, 'mmengine is not installed: pip install "distillkit[mmdet]"', marks=needs_mmdet),
        (RT_DETR, 'transformers is not installed: pip install "distillkit[transformers]"'),
    ],
)
def test_a_package_that_is_not_installed(kind, line, written, monkeypatch):
    from distillkit.integrations import openmmlab
    from distillkit.training.build import transformers_models

    monkeypatch.setattr(openmmlab, "_prepared", set())
    monkeypatch.setattr(openmmlab, "find_spec", lambda name: None)
    monkeypatch.setattr(transformers_models, "find_spec", lambda name: None)
    assert line in errors(written(kind))[0]


# -- a recipe runs no code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        "mine.py", "/tmp/mine.py", "mmdet::/tmp/mine.py", "mmdet::../../../mine.py", "mmdet::gfl/../../mine.py",
        "mmdet::gfl\\..\\mine.py", "os::path.py", "mmrotate::a/b.py", "mine.pkl", "http://there/mine.py",
    ],
)  # fmt: skip
def test_a_config_that_is_code_is_refused_when_the_recipe_is_read(config):
    with pytest.raises(ValidationError, match="config"):
        block(schema.MMDetModel, kind="mmdet", config=config)


def test_the_remedy_for_a_config_of_python_is_said(written):
    with pytest.raises(RecipeError, match=r"dump\('mine.json'\)\"; or build the model .*register_model"):
        written({"kind": "mmdet", "config": "mine.py"})


CALL = "__import__('pathlib').Path('ran').touch()"


@pytest.mark.parametrize(
    "student",
    [
        {"kind": "mmdet", "config": "mmdet::a/b.py", "set": {"test_cfg.nms.type": CALL}},
        {"kind": "mmdet", "config": "mmdet::a/b.py", "set": {"backbone": {"type": CALL}}},
        {"kind": "torchvision", "model": "os.system"},
        {"kind": "torchvision", "model": "resnet18", "options": {"weights": "DEFAULT"}},
        {"kind": "torchvision", "model": "fcos_resnet50_fpn", "options": {"weights_backbone": "DEFAULT"}},
        {"kind": "transformers", "model_type": "user/repo"},
        {"kind": "transformers", "model_type": "vit", "options": {"attn_implementation": "user/kernel"}},
        {"kind": "transformers", "model_type": "vit", "options": {"num_labels": 3}},
        {"kind": "transformers", "model_type": "vit", "config": "there"},
        {"kind": "transformers"},
    ],
)
def test_options_are_plain_when_the_recipe_is_read(student, written):
    task = "classification" if student.get("model") == "resnet18" or student.get("model_type") == "vit" else "detection"
    with pytest.raises(RecipeError):
        written(student, task=task)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A folder in which lies a package and a config that would tell that they were run; a function asks whether."""
    ran = tmp_path / "ran"
    text = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("evil", "evil/registry", "evil/models"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").write_text(text + "def build(**kwargs): pass\n")
    (tmp_path / "evil_config.py").write_text(text + "model = dict(type='GFL')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield ran.exists
    for name in [name for name in sys.modules if name.split(".")[0] in ("evil", "evil_config")]:
        del sys.modules[name]


def _plain_gfl() -> dict:
    return build.models.mmdet_config(block(schema.MMDetModel, **GFL), 3)


#: where in a config something is put, and what
ATTACKS = {
    "a module to import": ("backbone.type", "evil.build"),
    "a module alone": ("backbone.type", "evil"),
    "a scope": ("backbone._scope_", "evil"),
    "a function of the standard library": ("backbone.type", "subprocess.getoutput"),
    "a function of mmengine": ("backbone.type", "mmengine.load"),
    "a class of mmengine": ("backbone.type", "mmengine.Config"),
    "a config of a teacher": ("teacher_config", "evil_config.py"),
    "a config of a teacher as data": ("teacher_config", "evil.json"),
    "an expression of mmcv's": ("test_cfg.nms.type", CALL),
    "an expression of a tracker's": ("train_cfg.assigner", {"type": "CameraMotionCompensation", "warp_mode": CALL}),
    "another function for mmcv's": ("test_cfg.nms.type", "torch.save"),
    "an expression of words": ("test_cfg.nms.type", "lambda x: torch"),
    "a tracker": ("train_cfg.assigner", {"type": "CameraMotionCompensation", "warp_mode": "cv2.MOTION_EUCLIDEAN"}),
    "a hook": ("backbone.init_cfg", {"type": "evil.build"}),
    "a language model": ("backbone", {"type": "BertModel", "name": "there"}),
}


@needs_mmdet
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_config_of_data_runs_nothing(attack, trap, tmp_path):
    described = _plain_gfl()
    path, value = ATTACKS[attack]
    *above, last = path.split(".")
    at = described
    for key in above:
        at = at[key]
    at[last] = value
    for name in ("mine.json", "mine.yaml"):
        write = json.dumps if name.endswith("json") else yaml.safe_dump
        (tmp_path / name).write_text(write({"model": described}))
        config = block(schema.MMDetModel, kind="mmdet", config=name)
        with pytest.raises(RunError, match=r"type: |_scope_|teacher|more than a word"):
            build.build_model(config, 3, schema.Evaluate())
        assert not trap()


@needs_mmdet
@pytest.mark.parametrize(
    "around",
    [
        {"custom_imports": {"imports": ["evil"], "allow_failed_imports": False}},
        {"_base_": "evil_config.py"},
        {"_base_": ["./evil_config.py"]},
    ],
)
def test_what_else_a_file_of_data_says_imports_nothing(around, trap, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"model": _plain_gfl(), **around}))
    with pytest.raises(RunError, match=f"{next(iter(around))} names code or other files"):
        build.build_model(block(schema.MMDetModel, kind="mmdet", config="mine.json"), 3, schema.Evaluate())
    assert not trap()


@needs_mmdet
def test_what_mmengine_would_do_with_such_configs(trap):
    """The traps work: without our guard, a type imports what it names."""
    from mmdet.registry import MODELS

    MODELS.get("evil.build")
    assert trap()


@needs_mmdet
def test_a_config_of_data_without_malice_is_built(trap, tmp_path):
    described = {"default_scope": "evil", "hooks": "{{evil}}", "model": _plain_gfl()}
    for name, write in (("mine.json", json.dumps), ("mine.yaml", yaml.safe_dump)):
        (tmp_path / name).write_text(write(described))
        config = block(schema.MMDetModel, kind="mmdet", config=name)
        assert type(build.build_model(config, 3, schema.Evaluate())).__name__ == "GFL"
    (tmp_path / "mine.yaml").write_text("model: !!python/object/apply:evil.build []\n")
    with pytest.raises(RunError, match="not readable as yaml"):
        build.build_model(block(schema.MMDetModel, kind="mmdet", config="mine.yaml"), 3, schema.Evaluate())
    assert not trap()


@needs_mmdet
def test_nothing_is_downloaded_unless_it_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: asked.append(a))
    plain = block(schema.MMDetModel, **{**GFL, "set": {"backbone.frozen_stages": -1}})
    described = build.models.mmdet_config(plain, 3)
    assert described["backbone"]["init_cfg"] is None
    there = build.models.mmdet_config(plain.model_copy(update={"pretrained": True}), 3)
    assert there["backbone"]["init_cfg"]["checkpoint"] == "torchvision://resnet50"
    assert asked == []


class Opened:
    """Pickled, it opens a file when it is read."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@needs_mmdet
@pytest.mark.parametrize("address", [True, False])
def test_weights_that_an_init_cfg_names_run_nothing(address, trap, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.save({"state_dict": {}, "more": Opened(tmp_path / "ran")}, tmp_path / "evil.pth")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_address[1]}" if address else str(tmp_path)
    described = _plain_gfl()
    described["backbone"]["init_cfg"] = {"type": "Pretrained", "checkpoint": f"{where}/evil.pth"}
    (tmp_path / "mine.json").write_text(json.dumps(described))
    config = block(schema.MMDetModel, kind="mmdet", config="mine.json", pretrained=True)
    try:
        with pytest.raises(RunError, match="hold more than tensors"):
            build.build_model(config, 3, schema.Evaluate())
    finally:
        server.shutdown()
        server.server_close()
    assert not trap()


@needs_mmdet
def test_weights_that_an_init_cfg_names_must_fill_their_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    described = _plain_gfl()
    described["backbone"]["init_cfg"] = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")}
    (tmp_path / "mine.json").write_text(json.dumps(described))
    config = block(schema.MMDetModel, kind="mmdet", config="mine.json")
    backbone = build.build_model(config, 3, schema.Evaluate()).backbone
    whole = {name: value + 1 for name, value in backbone.state_dict().items()}
    config = config.model_copy(update={"pretrained": True})
    torch.save({"state_dict": {**whole, "fc.weight": torch.ones(2)}}, tmp_path / "weights.pth")
    built = build.build_model(config, 3, schema.Evaluate()).backbone.state_dict()
    assert all(torch.equal(built[name], value) for name, value in whole.items())
    for name in (next(iter(whole)), "a shape"):
        cut = {k: v[:1] if name == "a shape" and v.dim() > 1 else v for k, v in whole.items() if k != name}
        torch.save({"state_dict": cut}, tmp_path / "weights.pth")
        with pytest.raises(RunError, match=r"mine\.json: .*init_cfg.checkpoint"):
            build.build_model(config, 3, schema.Evaluate())


HUGGING = {
    "code in a map": {"auto_map": {"AutoModelForObjectDetection": "evil.Model"}},
    "code on the hub": {"auto_map": {"AutoConfig": "user/repo--evil.Config"}},
    "a kernel": {"attn_implementation": "user/kernel"},
    "a kernel as files have it": {"_attn_implementation": "user/kernel"},
    "a kernel of the hub's": {"_attn_implementation": "flash_attention_2"},
    "a timm model's file": {"backbone": "resnet18", "backbone_kwargs": {"checkpoint_path": "evil.pth"}},
    "a timm model of the hub": {"backbone": "hf-hub:user/repo"},
    "a backbone's weights": {"backbone_config": {"model_type": "timm_backbone", "use_pretrained_backbone": True}},
    "another repository": {"backbone": "user/repo"},
    "arguments of timm": {"model_args": {"checkpoint_path": "evil"}},
}


@needs_transformers
@pytest.mark.parametrize("attack", HUGGING)
def test_a_config_of_transformers_runs_and_fetches_nothing(attack, trap, tmp_path):
    described = {"model_type": "rt_detr", **RT_DETR["options"], **HUGGING[attack]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = block(schema.TransformersModel, kind="transformers", config=str(tmp_path))
    with pytest.raises(RunError, match="config: "):
        build.build_model(config, 3, schema.Evaluate())
    assert not trap()


@needs_transformers
@pytest.mark.parametrize(("kind", "said"), [("detr", "Unknown model"), ("rt_detr", "offline mode is enabled")])
def test_the_hub_is_asked_for_nothing(kind, said, monkeypatch):
    """A word may be a repository's name: the hub is not to be asked whether it is."""
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda *to: asked.append(to))
    config = block(schema.TransformersModel, kind="transformers", model_type=kind, options={"backbone": "gpt2"})
    with pytest.raises(RunError, match=said):
        build.build_model(config, 3, schema.Evaluate())
    assert asked == []


@needs_transformers
def test_weights_are_safetensors_of_the_same_classes(tmp_path, written):
    names = ["cat", "dog", "owl"]
    evaluate = schema.EvaluateClasses()
    model = build.build_model(block(schema.TransformersModel, **VIT), names, evaluate, (32, 32))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}'
    )
    config = block(schema.TransformersModel, kind="transformers", pretrained=str(tmp_path / "saved"))
    again = build.build_model(config, names, evaluate, (32, 32))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert adapter_for(again).norm == ((0.5, 0.5, 0.5), (1, 1, 1))
    assert build.other_head(config, names) is None
    assert build.other_head(config, ["cat", "dog"]) == 3
    with pytest.raises(RunError, match="tell as many classes apart as the data have, and call them otherwise"):
        build.build_model(config, ["dog", "cat", "owl"], evaluate, (32, 32))
    ordered = config.model_copy(update={"labels": "ordered"})
    assert build.other_head(ordered, ["dog", "cat", "owl"]) is None
    build.build_model(ordered, ["dog", "cat", "owl"], evaluate, (32, 32))
    fewer = build.build_model(config, ["cat", "dog"], evaluate, (32, 32))
    assert fewer.classifier.weight.shape[0] == 2
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="safetensors"):
        build.build_model(config, names, evaluate, (32, 32))


@needs_transformers
def test_weights_that_would_leave_the_body_random_are_refused(tmp_path):
    names, evaluate = ["cat", "dog", "owl"], schema.EvaluateClasses()
    model = build.build_model(block(schema.TransformersModel, **VIT), names, evaluate, (32, 32))
    model.save_pretrained(tmp_path)

    def again(classes=names, **options):
        config = block(schema.TransformersModel, kind="transformers", pretrained=str(tmp_path), options=options)
        return build.build_model(config, classes, evaluate, (32, 32))

    with pytest.raises(RunError, match=r"are not those of this ViT.*stay random: .*is \(.*32\), expected \(.*16\)"):
        again(hidden_size=16)
    with pytest.raises(RunError, match=r"stay random: vit.layers.1.*is missing"):
        again(num_hidden_layers=2)
    assert torch.equal(again(["cat", "dog"]).vit.layernorm.weight, model.vit.layernorm.weight)


def test_a_detector_with_its_backbones_weights_alone_is_no_teacher(written):
    (teacher,) = ({**FCOS, "pretrained": True},)
    with pytest.raises(RecipeError, match="has no trained weights"):
        load_teacher(teacher, written)


def load_teacher(teacher, written):
    return written(FCOS, overrides=[f"teacher={json.dumps(teacher)}"], distillers=[{"kind": "feature-imitation"}])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_classifier_with_further_logits_names_the_option(name):
    config = schema.TorchvisionModel(kind="torchvision", model=name)
    with pytest.raises(RunError, match="aux_logits: false"):
        torchvision_model(config, 10, schema.EvaluateClasses(), None)
    torchvision_model(config.model_copy(update={"options": {"aux_logits": False}}), 10, schema.EvaluateClasses(), None)


def test_weights_of_a_part_are_weights_that_are_downloaded():
    override = {"type": "Normal", "std": 0.1, "override": [{"type": "Pretrained", "name": "fc", "checkpoint": "a.pth"}]}
    part = {"backbone": {"init_cfg": override}}
    mmdet_models._forget_weights(part)
    assert part == {"backbone": {"init_cfg": None}}
