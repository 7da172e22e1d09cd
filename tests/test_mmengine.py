"""Distillation inside mmengine's Runner, on a small COCO-format data set made here."""

import copy
import importlib.util
import json
import warnings

import pytest
import torch
from PIL import Image

from distillkit.core.errors import WrapError
from distillkit.data.scenes import Scenes
from distillkit.integrations import openmmlab

if any(importlib.util.find_spec(name) is None for name in ("mmdet", "mmengine", "mmcv")):
    pytest.skip("needs mmdet, mmengine and mmcv-lite", allow_module_level=True)

warnings.filterwarnings("ignore", module="mmdet|mmengine|torch.functional")

from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.registry import HOOKS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from distillkit.integrations.mmengine import DistilledDetector  # noqa: E402

PICTURES, SIZE, CLASSES = 4, 96, ("a", "b", "c")


@HOOKS.register_module()
class Remember(Hook):
    """What is logged of every step."""

    steps: list = []  # noqa: RUF012

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps.append({name: float(value.detach()) for name, value in outputs.items()})


def gfl(channels: int = 16):
    model = openmmlab.read_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py").model
    model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=channels)
    model.bbox_head.update(in_channels=channels, feat_channels=channels, stacked_convs=1, num_classes=3)
    model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 4, "requires_grad": True}
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with their COCO file, and a teacher's checkpoint."""
    root = tmp_path_factory.mktemp("coco")
    scenes = Scenes(PICTURES, SIZE)
    images, boxes = [], []
    for i in range(PICTURES):
        picture, target = scenes[0, i]
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE})
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            side = [x1, y1, x2 - x1, y2 - y1]
            boxes.append({"id": len(boxes) + 1, "image_id": i, "category_id": label % 3, "bbox": side,
                          "area": side[2] * side[3], "iscrowd": 0})  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    (root / "coco.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    torch.manual_seed(1)
    teacher = openmmlab.build(gfl(32))
    torch.nn.init.normal_(teacher.bbox_head.gfl_reg.weight, std=0.3)
    torch.save({"state_dict": teacher.state_dict(), "meta": {}}, root / "teacher.pth")
    return root


def trained(folder, work: str, distillers: list, epochs: int, resume: bool = False, hooks: tuple = ()) -> Runner:
    def loader(test: bool) -> dict:
        steps = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True},
                 {"type": "Resize", "scale": (SIZE, SIZE), "keep_ratio": True}, {"type": "PackDetInputs"}]  # fmt: skip
        if test:
            steps[-1]["meta_keys"] = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        data = {"type": "CocoDataset", "ann_file": str(folder / "coco.json"), "data_prefix": {"img": f"{folder}/"},
                    "metainfo": {"classes": CLASSES}, "pipeline": steps, "test_mode": test}  # fmt: skip
        sampler = {"type": "DefaultSampler", "shuffle": not test}
        return {"batch_size": 2, "num_workers": 0, "sampler": sampler, "dataset": data}

    Remember.steps.clear()
    runner = Runner.from_cfg(Config({
        "default_scope": "mmdet",
        "model": {"type": "DistilledDetector", "student": gfl(), "distillers": distillers,
                   "teacher": {"config": gfl(32), "checkpoint": str(folder / "teacher.pth")}},
        "work_dir": str(folder / work),
        "train_dataloader": loader(False), "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": epochs},
        "val_dataloader": loader(True), "val_cfg": {"type": "ValLoop"},
        "val_evaluator": {"type": "CocoMetric", "ann_file": str(folder / "coco.json"), "metric": "bbox"},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}},
        "custom_hooks": [{"type": "Remember"}, *hooks],
        "resume": resume, "log_level": "ERROR", "experiment_name": f"{work}-{epochs}", "randomness": {"seed": 0},
    }))  # fmt: skip
    runner.train()
    return runner


LDS = [{"type": "LD", "region": {"type": "Main"}}, {"type": "LD", "region": {"type": "Valuable", "gamma": 0.25}}]


def test_a_runner_trains_and_its_checkpoint_is_the_students(folder):
    """Also with mmengine's average of the weights, which copies the model."""
    runner = trained(folder, "ld", LDS, 1, hooks=({"type": "EMAHook", "momentum": 0.5},))
    assert isinstance(runner.model, DistilledDetector)
    names = ["loss_cls", "loss_bbox", "loss_dfl", "loss_ld_main", "loss_ld_valuable"]
    assert len(Remember.steps) == PICTURES // 2
    for step in Remember.steps:
        assert list(step) == ["loss", *names]
        assert step["loss"] == pytest.approx(sum(step[name] for name in names), rel=1e-5)
        assert step["loss_ld_main"] > 0
        assert step["loss_ld_valuable"] > 0
    saved = torch.load(folder / "ld" / "epoch_1.pth", weights_only=True)
    student = runner.model.student.state_dict()
    assert list(saved["state_dict"]) == list(student)
    assert set(saved["ema_state_dict"]) > {"module." + name for name in student}
    alone = openmmlab.build(gfl(), folder / "ld" / "epoch_1.pth")
    # what is saved under state_dict is the average, as EMAHook has it, and what it averaged under its own name
    for name, value in alone.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
    live = {n.removeprefix("module."): v for n, v in saved["ema_state_dict"].items()}
    assert all(torch.equal(live[name], value) for name, value in student.items())
    assert not torch.equal(live["bbox_head.gfl_reg.weight"], saved["state_dict"]["bbox_head.gfl_reg.weight"])


IMITATION = [
    {"type": "FeatureImitation", "weight": {"type": "Weight", "value": 1.0, "kind": "linear", "steps": 10, "end": 0.1}}
]


def test_a_run_goes_on_with_what_distillers_trained_along(folder):
    first = trained(folder, "imitation", IMITATION, 1)
    saved = torch.load(folder / "imitation" / "epoch_1.pth", weights_only=True)["state_dict"]
    extra = [name for name in saved if name.startswith("distilled.")]
    assert "distilled.step" in extra
    assert "distilled.distillers.imitation.projections.0.weight" in extra
    assert [name for name in saved if name not in extra] == list(first.model.student.state_dict())
    openmmlab.build(gfl(), folder / "imitation" / "epoch_1.pth")  # leaves them out
    second = trained(folder, "imitation", IMITATION, 1, resume=True)  # nothing left to do
    assert int(second.model.distilled.step) == PICTURES // 2
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    third = trained(folder, "imitation", IMITATION, 2, resume=True)
    assert int(third.model.distilled.step) == PICTURES


def test_weights_of_the_student_alone_load_into_the_distilled_detector():
    model = DistilledDetector(gfl(), None, [{"type": "SelfLD"}])
    student = openmmlab.build(gfl())
    model.load_state_dict(
        student.state_dict() | {n: v for n, v in model.state_dict().items() if n.startswith("distilled.")}
    )
    assert all(torch.equal(model.student.state_dict()[n], v) for n, v in student.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*distilled\.student\.backbone\.conv1"):
        model.load_state_dict({n: v for n, v in model.state_dict().items() if n != "backbone.conv1.weight"})


def test_a_copy_predicts_and_does_not_train(folder):
    teacher = {"config": gfl(32), "checkpoint": str(folder / "teacher.pth")}
    model = DistilledDetector(gfl(), teacher, LDS)
    twin = copy.deepcopy(model)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    pictures = torch.rand(1, 3, 64, 64)
    for a, b in zip(model.eval()(pictures, mode="tensor"), twin.eval()(pictures, mode="tensor"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(WrapError, match="a copy of a DistilledDetector"):
        twin(pictures, [], mode="loss")


def test_mistakes_in_the_config_are_named(folder):
    with pytest.raises(WrapError, match="'LDD'; nearest: LD"):
        DistilledDetector(gfl(), None, [{"type": "LDD"}])
    with pytest.raises(WrapError, match=r"teacher: expected dict\(config=\.\.\., checkpoint=\.\.\.\).*noise"):
        DistilledDetector(gfl(), {"config": gfl(32)}, LDS)
    with pytest.raises(WrapError, match=r"big: expected dict\(config="):
        DistilledDetector(gfl(), {"big": {"checkpoint": "x.pth"}}, LDS)


def test_a_checkpoint_that_asks_for_more_is_refused(tmp_path):
    """A Runner's file may name the methods of a log's history, and no other attribute."""

    class Asks:
        def __reduce__(self):
            return getattr, (HistoryBuffer, "register_statistics")

    torch.save({"state_dict": {}, "x": Asks()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"'register_statistics'.*only methods of a log's history"):
        torch.load(tmp_path / "bad.pth", weights_only=True)
