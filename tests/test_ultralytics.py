"""ultralytics' detection models as it installs them: read, distilled, handed back; and inside its own trainer."""

import copy
import io
import logging
import os
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torchvision.io import write_png

import distillkit
from distillkit import LD, FeatureImitation, LogitKD, Main, Teacher, Valuable
from distillkit.adapters import adapter_for
from distillkit.adapters.ultralytics import Ultralytics, UltralyticsHead
from distillkit.adapters.ultralytics_batch import batch_of, box_targets
from distillkit.boxes.maps import Maps
from distillkit.core.errors import AdapterError, ViewError, WrapError
from distillkit.core.schedule import Weight
from distillkit.core.views import ClassLogits, DenseDetections
from distillkit.data.coco import CocoDetection
from distillkit.data.scenes import Scenes
from distillkit.data.transforms import Resize
from distillkit.integrations.ultralytics import REST, Distillation, distilled, pictures
from distillkit.models.gfl import GFL
from distillkit.recipe import RecipeError, load
from distillkit.training import build
from distillkit.training.build import ultralytics_models
from distillkit.training.errors import RunError

pytest.importorskip("ultralytics", reason="pip install ultralytics (AGPL)")

from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, SegmentationModel
from ultralytics.utils.nms import non_max_suppression

logging.getLogger("ultralytics").setLevel(logging.ERROR)

DATA = os.environ.get("DISTILLKIT_DATA", "")
SIDE = 64
#: where the maps of YOLOv8n have half as many channels as those of YOLO11n, so that there is a projection
AT = {"student_at": "model.4", "teacher_at": "model.4"}


def yolo(name: str, seed: int = 0, sure: bool = False, classes: int = 3) -> DetectionModel:
    """As the package builds it from one of its yaml files. sure: last layers that say something of every cell."""
    torch.manual_seed(seed)
    model = DetectionModel(f"{name}.yaml", nc=classes, verbose=False)
    model.args = get_cfg()
    head = model.model[-1]
    for branch in ("cv2", "cv3", "one2one_cv2", "one2one_cv3") if sure else ():
        for layers in getattr(head, branch, None) or ():
            nn.init.normal_(layers[-1].weight, std=0.3)
    if sure:
        averages = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in averages:
            module.momentum = 1.0  # without averages its maps in eval mode are next to 0
        with torch.no_grad():
            model.train()(torch.stack(shown()[0]))
        for module in averages:
            module.momentum = 0.03
    return model


def even(model: DetectionModel) -> DetectionModel:
    """Of every class as sure as not: untrained, it is so sure of nothing that its assigner asks for next to nothing."""
    head = model.model[-1]
    for layers in head.cv3:
        nn.init.zeros_(layers[-1].bias)
    for layers in [*head.cv2, *head.cv3]:
        nn.init.normal_(layers[-1].weight, std=0.1)
    return model


def shown(real: bool = False, count: int = 2, side: int = SIDE) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures and targets as distillkit's data give them, of photographs with digits or of COCO."""
    data = Scenes(count, side)
    if real:
        data = CocoDetection(f"{DATA}/coco_mini", "annotations/train.json", transform=Resize((SIDE, SIDE)))
    items = [data[0, i] for i in range(count)]
    return [x for x, _ in items], [{"boxes": t["boxes"], "labels": t["labels"] % 3} for _, t in items]


def batch(real: bool = False, count: int = 2) -> dict[str, Tensor]:
    return batch_of(*shown(real, count), 32)


def raw(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the head returns in train mode."""
    with torch.no_grad():
        output = copy.deepcopy(model).train()(images)
    return output.get("one2many", output)


# ---- one step


def everything() -> list:
    return [LD(Main()), LD(Valuable()), LogitKD(Main()), FeatureImitation(weight=0.1)]


PAIRS = {
    "yolov8-yolo11": ("yolov8n", "yolo11n", everything, "dfl_loss"),
    "yolo11-yolov8, wider": ("yolo11s", "yolov8n", everything, "dfl_loss"),
    "yolov10": ("yolov10n", "yolov10n", lambda: [LD(Main()), LogitKD(Main())], "dfl_loss"),
    "yolo26": ("yolo26n", "yolo26n", lambda: [LogitKD(Main()), FeatureImitation()], "l1_loss"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_one_step_of_unmodified_models(pair):
    teacher, student, distillers, third = PAIRS[pair]
    student, teacher = yolo(student, sure=True), yolo(teacher, seed=1, sure=True)
    keys = list(student.state_dict())
    model = distillkit.wrap(student, teacher, distillers()).train()
    losses = model(batch())
    names = ["box_loss", "cls_loss", third, *(d.name for d in model.distillers.values())]
    assert list(losses) == [*names, "output"]
    assert all(losses[name] > 0 for name in names)
    sum(losses[d.name] for d in model.distillers.values()).backward()
    assert student.model[0].conv.weight.grad.abs().max() > 0
    assert not model._student_side.unproven
    assert not any(side.unproven for side in model._teacher_sides.values())
    assert list(model.unwrap().state_dict()) == keys == list(yolo(PAIRS[pair][1]).state_dict())


def steps(model: nn.Module, data: dict, count: int, names: list[str]) -> list[dict[str, float]]:
    """What the losses are in ``count`` steps down the sum of those called ``names``; []: of all."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(count):
        losses = model(data)
        optimizer.zero_grad()
        (sum(losses[name] for name in names) if names else losses.total).backward()
        optimizer.step()
        seen.append({name: loss.item() for name, loss in losses.items() if name != "output"})
    return seen


def test_losses_fall_and_the_student_is_handed_back():
    """On photographs of COCO where DISTILLKIT_DATA is set, else on photographs with digits."""
    student, teacher, data = even(yolo("yolo11n")), even(yolo("yolov8n", seed=1)), batch(bool(DATA))
    model = distillkit.wrap(student, teacher, [LD(Main()), LogitKD(Main())]).train()
    first, *_, last = steps(model, data, 20, [])
    assert sum(last.values()) < 0.7 * sum(first.values())
    assert last["kd_main"] < first["kd_main"]
    student.eval()
    with torch.no_grad():
        before = model.eval()(data["img"])[0]
        after = model.unwrap()(data["img"])[0]
    assert torch.equal(before, after)
    assert not any(module._forward_hooks for module in student.modules())


def test_it_learns_what_the_teacher_says_of_edges_and_classes():
    student, teacher = yolo("yolo11n", sure=True), yolo("yolov8n", seed=1, sure=True)
    model = distillkit.wrap(student, teacher, [LD(Main(), anchor_weight="one"), LogitKD(Main())]).train()
    first, *_, last = steps(model, batch(), 12, ["ld_main", "kd_main"])
    assert last["ld_main"] < 0.7 * first["ld_main"], (first, last)
    assert last["kd_main"] < 0.7 * first["kd_main"], (first, last)


def test_ld_is_the_closed_form_on_the_raw_maps():
    """T^2 / K * KL of each edge, times the student's best class probability, over 4 edges; 3 / images of their sum."""
    student, teacher, data = yolo("yolo11n", sure=True), yolo("yolov8n", seed=1, sure=True), batch()
    mine = raw(student, data["img"])
    with torch.no_grad():
        theirs = copy.deepcopy(teacher).eval()(data["img"])[1]
    scores = mine["scores"].sigmoid().amax(1)  # (B, N)
    split = [(8, 8), (4, 4), (2, 2)]
    levels = tuple(m.unflatten(2, s) for m, s in zip(mine["scores"].split([64, 16, 4], 2), split, strict=True))
    view = DenseDetections(Maps(levels, (3,)), None, (8, 16, 32), centre=0.5)
    where, _ = Main()(view, box_targets(data))
    rows = view.classes.positions(where)
    p, q = (
        (m["boxes"].unflatten(1, (4, 16)).permute(0, 3, 1, 2).flatten(0, 1)[rows] / 10).softmax(-1).double()
        for m in (theirs, mine)
    )
    edges = 100 / 16 * (p * (p / q).log()).sum(-1)
    expected = 0.25 * (scores.flatten()[rows] * edges.mean(1)).sum() * 3 / 2
    assert len(rows) > 3
    losses = distillkit.wrap(student, teacher, [LD(Main(), temperature=10)]).train()(data)
    torch.testing.assert_close(losses["ld_main"].double(), expected, rtol=1e-4, atol=0)


def test_losses_are_those_of_one_picture():
    """ultralytics multiplies its own by the pictures of a batch."""
    student, data = yolo("yolo11n"), batch()
    losses = distillkit.wrap(student, None, []).train()(data)
    summed, items = losses["output"]
    for i, (name, value) in enumerate(items.items()):
        torch.testing.assert_close(losses[name].detach(), value)
        torch.testing.assert_close(2 * losses[name], summed[i])


def test_it_is_found_without_being_imported_and_errors_say_what_to_do():
    assert isinstance(adapter_for(yolo("yolo11n")), UltralyticsHead)
    bare = DetectionModel("yolo11n.yaml", nc=3, verbose=False)
    with pytest.raises(ViewError, match=r"model\.args = ultralytics\.cfg\.get_cfg"):
        distillkit.wrap(bare, yolo("yolo11n"), [LD(Main())])
    student = yolo("yolo26n")
    with pytest.raises(ViewError, match=r"the student has a head with reg_max: 1.*to_distribution.*reg_max: 16"):
        distillkit.wrap(student, yolo("yolo26n"), [LD(Main())]).train()(batch())
    with pytest.raises(ViewError, match=r"which anchors, as in LogitKD\(Main"):
        distillkit.wrap(yolo("yolo11n"), yolo("yolo11n"), [LogitKD()])
    masks = SegmentationModel("yolo11n-seg.yaml", nc=3, verbose=False)
    masks.args = get_cfg()
    with pytest.raises(ViewError, match=r"has the head Segment.*Distil its features"):
        distillkit.wrap(masks, yolo("yolo11n"), [LD(Main())])


def test_models_with_other_heads_have_features_and_classifiers_their_logits():
    adapter = adapter_for(masks := SegmentationModel("yolo11n-seg.yaml", nc=3, verbose=False))
    assert type(adapter) is Ultralytics
    assert adapter.grows_with_batch
    assert adapter.widths(masks, distillkit.Features, None) == [64, 128, 256]
    student, teacher = (ClassificationModel("yolo11n-cls.yaml", nc=3, verbose=False).train() for _ in range(2))
    student.args = get_cfg()
    model = distillkit.wrap(student, teacher, [LogitKD()]).train()
    data = {"img": torch.rand(2, 3, SIDE, SIDE), "cls": torch.tensor([0, 2])}
    losses = model(data)
    assert list(losses) == ["task", "kd", "output"]
    torch.testing.assert_close(losses["task"], losses["output"][0])
    with torch.no_grad():
        probabilities, logits = teacher(data["img"])
    places = model._teacher_sides["teacher"]
    (view,) = places.run((data["img"],), {}, exit_early=False)[1].values()
    assert isinstance(view, ClassLogits)
    torch.testing.assert_close(view.logits, logits)
    assert not torch.allclose(view.logits, probabilities)


# ---- what is read


def test_a_teacher_runs_no_further_than_it_is_read():
    def ran(distillers: list) -> set[str]:
        teacher, seen = yolo("yolov8n"), set()
        head = teacher.model[-1]
        for name, module in {"dfl": head.dfl, "cv2": head.cv2[0], "head": head, "last": teacher.model[21]}.items():
            module.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        model = distillkit.wrap(yolo("yolo11n"), teacher, distillers).train()
        model(batch())  # with the proof
        seen.clear()
        model(batch())
        return seen

    assert ran([LD(Main())]) == {"last", "head", "cv2"}
    assert ran([FeatureImitation()]) == {"last"}


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n", "yolov10n"])
def test_what_is_tapped_is_held_against_what_the_model_predicts(name):
    for without_nms in (False, True):
        student = yolo(name, sure=True)
        student.end2end = without_nms
        wrong = UltralyticsHead(student)
        wrong.centre = 0.0
        model = distillkit.wrap(student, yolo("yolov8n"), [LogitKD(Main())], adapter=wrong).train()
        with pytest.raises(AdapterError, match=r"student: .*model\.23\.cv2.* do not explain the model's own boxes"):
            model(batch())
        model = distillkit.wrap(student, yolo("yolov8n"), [LogitKD(Main())]).train()
        model(batch())
        assert not model._student_side.unproven


def test_without_nms_the_branch_that_is_read_is_the_one_that_the_head_returns():
    student = yolo("yolo26n", sure=True)
    student.end2end = True
    model = distillkit.wrap(student, yolo("yolov8n"), [LogitKD(Main())]).train()
    forward = student.model[-1].forward_head
    student.model[-1].forward_head = lambda x, **heads: {
        k: v if k == "feats" else v * 2 for k, v in forward(x, **heads).items()
    }
    with pytest.raises(AdapterError, match="are not those that the head returns as one2many"):
        model(batch())


def test_a_fused_teacher_is_read_at_the_branch_that_it_has_left():
    teacher = yolo("yolo26n", sure=True)
    teacher.end2end = True
    teacher.eval().fuse(verbose=False)
    model = distillkit.wrap(yolo("yolo11n"), teacher, [LogitKD(Main())]).train()
    assert model(batch())["kd_main"] > 0
    assert not model._teacher_sides["teacher"].unproven


def test_widths_are_those_of_the_maps_and_leave_the_model_as_it_is():
    model = yolo("yolo11n")
    adapter, state = adapter_for(model), copy.deepcopy(model.state_dict())
    assert adapter.widths(model, distillkit.Features, ("model.4", "model.0.conv", "model.9")) == [128, 16, 256]
    with torch.no_grad():
        x = torch.rand(1, 3, SIDE, SIDE)
        assert model.model[0:5](x).shape[1] == 128
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(t.device.type == "cpu" for t in [*state.values(), model.model[-1].anchors])


def test_targets_are_those_of_the_batch():
    images, rows = shown(count=3)
    rows[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    images[2] = images[2][:, :40]
    data = batch_of(images, rows, 32)
    assert data["img"].shape == (3, 3, SIDE, SIDE)
    torch.testing.assert_close(data["img"][2, :, 40:], torch.full((3, 24, SIDE), 114 / 255))
    mixed = torch.randperm(len(data["cls"]), generator=torch.Generator().manual_seed(0)).sort(descending=True).indices
    for order in (torch.arange(len(mixed)), mixed):
        found = box_targets({**data, **{name: data[name][order] for name in ("cls", "bboxes", "batch_idx")}})
        assert found.sizes == [(SIDE, SIDE)] * 3
        for row, boxes, labels in zip(rows, found.boxes, found.labels, strict=True):
            assert sorted(labels.tolist()) == sorted(row["labels"].tolist())
            torch.testing.assert_close(boxes.sort(0).values, row["boxes"].sort(0).values, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"target 0: box 0 is .* expected finite x1, y1, x2, y2"):
        box_targets({**data, "bboxes": data["bboxes"] * torch.tensor([1, 1, 0, 1])})


def test_classes_are_matched_by_the_names_that_models_hold():
    student, teacher = yolo("yolo11n", sure=True), yolo("yolo11n", sure=True)
    assert adapter_for(student).class_names(student) is None  # numbers, until a trainer has set them
    student.names, teacher.names = {0: "cat", 1: "dog", 2: "car"}, {0: "car", 1: "cat", 2: "dog"}
    with torch.no_grad():
        for layers in teacher.model[-1].cv3:
            layers[-1].weight.copy_(layers[-1].weight[[2, 0, 1]])
            layers[-1].bias.copy_(layers[-1].bias[[2, 0, 1]])
    teacher.eval()
    student_as_teacher = copy.deepcopy(student).eval()
    data = batch()
    found = [
        distillkit.wrap(copy.deepcopy(student), t, [LogitKD(Main())]).train()(data)["kd_main"].item()
        for t in (teacher, student_as_teacher)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# ---- other families


def test_a_gfl_teaches_it_and_is_taught_by_it(caplog):
    """17 bins at the corner of their cells on 8 to 128, and 16 in the middle on 8 to 32."""
    torch.manual_seed(0)
    gfl = GFL(3, backbone="resnet10t", channels=16, convs=1, groups=1)
    data = batch_of(*shown(side=128), 32)  # a GFL fills pictures up to whole cells of its coarsest level
    with caplog.at_level("WARNING", "distillkit"):
        model = distillkit.wrap(yolo("yolo11n", sure=True), Teacher(gfl, feed=pictures), [LD(Main()), LogitKD(Main())])
        losses = model.train()(data)
    assert "moved by 0.5 strides" in caplog.text
    assert losses["ld_main"] > 0
    model.unwrap()
    student = GFL(3, backbone="resnet10t", channels=16, convs=1, groups=1, strides=(8, 16, 32))
    model = distillkit.wrap(student, yolo("yolov8n", sure=True), [LD(Main()), LogitKD(Main())]).train()
    images, rows = shown()
    losses = model(images, rows)
    assert losses["ld_main"] > 0
    losses.total.backward()


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_predictions_are_those_of_its_own_nms(name):
    model = even(yolo(name, sure=True)).eval()
    for layers in model.model[-1].cv3:
        nn.init.normal_(layers[-1].weight, std=0.01)  # no two scores are 1
    adapter, (images, _) = adapter_for(model), shown()
    args, kwargs = adapter.call(model, images)
    with torch.no_grad():
        output = model(*args, **kwargs)
        found = adapter.detections(model, output, images)
        expected = non_max_suppression(output[0].clone(), 0.001, 0.7, multi_label=True, max_det=300)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine["boxes"]) == len(theirs) > 30
        torch.testing.assert_close(mine["scores"], theirs[:, 4], rtol=0, atol=1e-5)
        rows = torch.cat([mine["boxes"], mine["scores"][:, None], mine["labels"][:, None]], 1)
        clipped = torch.cat([theirs[:, :4].clamp(0, SIDE), theirs[:, 4:]], 1)
        assert (torch.cdist(rows, clipped, p=float("inf")).amin(1) < 1e-3).all()  # equal scores stand in any order
    model.end2end = True
    if model.end2end:  # YOLO26
        with torch.no_grad():
            output = model(*args, **kwargs)
        for mine, row in zip(adapter.detections(model, output, images), output[0], strict=True):
            assert len(mine["scores"]) == (row[:, 4] > 0.001).sum() > 30
            assert torch.equal(mine["labels"], row[: len(mine["labels"]), 5].long())


# ---- inside its trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight pictures for training and four for validation, in its layout."""
    root = tmp_path_factory.mktemp("yolo")
    for split, count in (("train", 8), ("val", 4)):
        images, rows = shown(bool(DATA), count)
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i, (image, row) in enumerate(zip(images, rows, strict=True)):
            write_png((image * 255).to(torch.uint8), str(root / "images" / split / f"{i}.png"))
            sides = batch_of([image], [row], 32)
            lines = [
                " ".join(map(str, [int(label), *box]))
                for label, box in zip(sides["cls"].flatten(), sides["bboxes"].tolist(), strict=True)
            ]
            (root / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n")
    return root


def options(folder: Path, project: Path, **others) -> dict:
    return {
        "data": str(folder / "data.yaml"), "imgsz": SIDE, "batch": 4, "device": "cpu", "plots": False, "amp": False,
        "pretrained": False, "project": str(project), "name": "run", "exist_ok": True, "verbose": False, **others,
    }  # fmt: skip


class StoppedError(Exception):
    pass


def test_its_trainer_distils_stops_goes_on_and_saves_the_plain_student(folder, tmp_path):
    teacher = yolo("yolov8n", seed=1)

    def trainer() -> type:
        twice = LogitKD(Main(), weight=Weight(2.0, kind="until", steps=100))
        return distilled(DetectionTrainer, teacher, [LD(Main()), twice, FeatureImitation(weight=0.1, **AT)])

    def stop(running) -> None:
        if running.epoch == 1:
            raise StoppedError

    model = YOLO("yolo11n.yaml")
    model.add_callback("on_train_epoch_start", stop)
    with pytest.raises(StoppedError):
        model.train(trainer=trainer(), epochs=2, **options(folder, tmp_path))
    assert type(model.trainer.model) is DetectionModel  # the student, and no hook on it or on the teacher
    assert not any(m._forward_hooks for m in [*model.trainer.model.modules(), *teacher.modules()])
    last = tmp_path / "run" / "weights" / "last.pt"
    left = torch.load(last.with_name(REST), weights_only=True)
    assert left["step"] == 2
    assert {name for name in left if name != "step"} == {
        f"distillers.imitation.projections.0.{part}" for part in ("weight", "bias")
    }

    again = YOLO(last)
    seen = []
    again.add_callback(
        "on_train_start", lambda running: seen.append(copy.deepcopy(running.model.distilled.state_dict()))
    )
    again.train(trainer=trainer(), resume=True)
    (started,) = seen
    for name, value in left.items():
        assert torch.equal(started[name], value), name
    assert torch.load(last.with_name(REST), weights_only=True)["step"] == 4

    header, *rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    columns = header.split(",")
    losses = ["box_loss", "cls_loss", "dfl_loss", "ld_main", "kd_main", "imitation"]
    assert [c for c in columns if c.startswith("train/")] == [f"train/{name}" for name in losses]
    assert [c for c in columns if c.startswith("val/")] == [f"val/{name}" for name in losses[:3]]
    assert len(rows) == 2
    assert all(float(row.split(",")[columns.index("train/ld_main")]) > 0 for row in rows)

    best = last.with_name("best.pt")
    assert not any(b"distillkit" in zipfile.ZipFile(best).read(name) for name in zipfile.ZipFile(best).namelist())
    plain = YOLO(best)
    assert list(plain.model.state_dict()) == list(yolo("yolo11n").state_dict())
    assert plain.model.names == {0: "a", 1: "b", 2: "c"}
    plain.predict(torch.rand(1, 3, SIDE, SIDE), imgsz=SIDE, verbose=False)

    last.with_name(REST).unlink()
    torch.save({"step": torch.tensor(1), "distillers.other.weight": torch.zeros(1)}, last.with_name(REST))
    student = yolo("yolo11n")
    with pytest.raises(WrapError, match=r"is of other distillers: .*distillers\.other\.weight"):
        Distillation(student, teacher, [LD(Main())]).load_rest(last.with_name(REST))
    with pytest.raises(WrapError, match="is missing: it is written beside"):
        Distillation(yolo("yolo11n"), teacher, [LD(Main())]).load_rest(tmp_path / REST)


def test_what_it_trains_is_the_student_to_everything_but_a_batch():
    student, data = yolo("yolo11n", sure=True), batch()
    module = Distillation(student, yolo("yolov8n", sure=True), [LD(Main()), FeatureImitation(weight=0.1, **AT)]).train()
    total, shown_ = module(data)
    losses = copy.deepcopy(student.criterion)
    assert list(shown_) == ["box_loss", "cls_loss", "dfl_loss", "ld_main", "imitation"]
    torch.testing.assert_close(total.detach(), 2 * sum(shown_.values()))  # as its losses: times the pictures
    assert type(losses).__name__ == "v8DetectionLoss"
    assert list(module.state_dict()) == list(student.state_dict())
    assert type(copy.deepcopy(module)) is DetectionModel
    assert any("projections" in name for name, _ in module.named_parameters())
    module.names = {0: "x", 1: "y", 2: "z"}
    assert student.names == module.names
    assert module.model is student.model
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(module), buffer)
    assert b"distillkit" not in buffer.getvalue()
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(data["img"])[0], student(data["img"])[0])


def test_losses_and_gradients_are_the_same_under_ddp(tmp_path):
    def built() -> Distillation:
        teacher = yolo("yolov8n", sure=True)
        torch.manual_seed(0)
        return Distillation(
            yolo("yolo11n", sure=True), teacher, [LD(Main()), FeatureImitation(weight=0.1, **AT)]
        ).train()

    data, alone = batch(), built()
    alone(data)[0].backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(built(), find_unused_parameters=True)
        ddp(data)[0].backward()
    finally:
        dist.destroy_process_group()
    for (name, p), q in zip(alone.named_parameters(), ddp.module.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_what_its_trainer_cannot_do_with_distillers_is_refused(folder, tmp_path):
    with pytest.raises(WrapError, match=r"teacher='yolo11m\.pt': expected a model, as in YOLO\('yolo11m\.pt'\)"):
        distilled(DetectionTrainer, "yolo11m.pt", [LD(Main())])
    trainer = distilled(DetectionTrainer, YOLO("yolov8n.yaml"), [LD(Main())])
    assert trainer.__name__ == "DistilledDetectionTrainer"
    assert type(trainer.teacher) is DetectionModel
    for name, value in (("compile", True), ("quantize", 8)):
        with pytest.raises(WrapError, match=f"{name}={value}"):
            trainer(overrides={**options(folder, tmp_path), "model": "yolo11n.yaml", name: value})


def test_the_class_can_be_sent_to_the_processes_that_its_trainer_starts():
    """For several GPUs it writes the class to a file by cloudpickle, and starts processes that read it."""
    cloudpickle = pytest.importorskip("cloudpickle")
    trainer = distilled(DetectionTrainer, yolo("yolov8n"), [LD(Main())])
    there = cloudpickle.loads(cloudpickle.dumps(trainer))
    assert issubclass(there, DetectionTrainer)
    assert there.distillers[0].name == "ld_main"
    assert list(there.teacher.state_dict()) == list(trainer.teacher.state_dict())


# ---- in recipes


def recipe(folder: Path, **student):
    raw = {"name": "mine", "student": {"kind": "ultralytics", **student}}
    raw["data"] = {"kind": "scenes", "train": 8, "val": 4, "test": 2, "digits": [2, 4], "size": SIDE, "batch": 4}
    (folder / "mine.yaml").write_text(yaml.safe_dump(raw))
    return load(folder / "mine.yaml", [f"output={folder / 'runs'}"])


def test_models_of_recipes_are_the_packages_own(tmp_path, monkeypatch):
    def said(name: str) -> str:
        (tmp_path / name).write_text("nc: 3\nactivation: exit('code of a yaml was run')\n")  # beside the recipe
        found = recipe(tmp_path, model=name)
        with pytest.raises(RunError) as error:
            build.build_model(found.student, 3, found.evaluate)
        return str(error.value)

    names = {name: list(yolo(name).state_dict()) for name in ("yolo11n", "yolov9t", "yolov8n-p2")}
    monkeypatch.chdir(tmp_path)
    assert "ultralytics has no 'yolo13n.yaml'; nearest: yolov10n.yaml" in said("yolo13n.yaml")
    assert "expected a name as yolo11n.yaml" in said("mine-n.yaml")
    assert "has the head Segment" in said("yolo11n-seg.yaml")
    assert "comes at several scales: say which, yolo11n.yaml, yolo11s.yaml" in said("yolo11.yaml")
    for name in ("/tmp/yolo11n.yaml", "../yolo11n.yaml", "yolo11n.pt", "a/yolo11n.yaml", "https://there/yolo11n.yaml"):
        with pytest.raises(RecipeError, match="expected a name of ultralytics' own"):
            recipe(tmp_path, model=name)
    (tmp_path / "yolo11n.yaml").write_text("nc: 3\nactivation: exit('code of a yaml was run')\n")
    for name, keys in names.items():
        found = recipe(tmp_path, model=f"{name}.yaml")
        model = build.build_model(found.student, ["a", "b", "c"], found.evaluate)
        assert list(model.state_dict()) == keys
        assert model.names == {0: "a", 1: "b", 2: "c"}
        assert adapter_for(model).inference.iou == found.evaluate.iou
    monkeypatch.setattr(ultralytics_models, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ultralytics is not installed: pip install .*AGPL"):
        build.build_model(found.student, 3, found.evaluate)


def test_weights_of_recipes_run_no_code(tmp_path):
    model = yolo("yolo11n", seed=3)
    torch.save({"model": model}, tmp_path / "published.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = recipe(tmp_path, model="yolo11n.yaml", checkpoint=str(tmp_path / "published.pt"))
    with pytest.raises(RunError, match=r"published\.pt: a .pt of ultralytics holds code.*'published\.pth'"):
        build.build_model(found.student, 3, found.evaluate)
    found = recipe(tmp_path, model="yolo11n.yaml", checkpoint=str(tmp_path / "weights.pth"))
    for name, value in build.build_model(found.student, 3, found.evaluate).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
