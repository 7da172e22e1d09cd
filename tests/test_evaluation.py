"""COCO numbers, mapping back to the original picture, prediction over a data set, drawing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distillkit.data.coco import CocoDetection
from distillkit.data.scenes import Scenes
from distillkit.data.transforms import Augment, Resize
from distillkit.evaluation.coco import NAMES, coco_metrics, to_results
from distillkit.evaluation.draw import SIDE, beside, draw_boxes, side_by_side
from distillkit.evaluation.predict import predict_dataset


class Oracle(nn.Module):
    """Answers with the data set's own boxes, moved at random by up to ``noise`` pixels and with some left out."""

    def __init__(self, data, noise: float = 0.0, keep: float = 1.0):
        super().__init__()
        self.data, self.noise, self.keep, self.at = data, noise, keep, 0
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images):
        assert not any(m.training for m in self.modules())
        assert torch.is_inference_mode_enabled()
        out = []
        for image in images:
            expected, target = self.data[(0, self.at)]
            assert torch.equal(image, expected)
            self.at += 1
            draw = torch.rand(len(target["boxes"]), 6, generator=self.generator)
            kept = draw[:, 5] < self.keep
            boxes = target["boxes"] + (draw[:, :4] - 0.5) * 2 * self.noise
            out.append({"boxes": boxes[kept], "scores": draw[kept, 4], "labels": target["labels"][kept]})
        return out


def test_the_truth_itself_scores_one():
    data = Scenes(6, 64, split="val", transform=Resize((96, 128)))
    result = coco_metrics(predict_dataset(Oracle(data), data, batch=4), data)
    assert [result.numbers[name] for name in ("AP", "AP50", "APs")] == pytest.approx([1, 1, 1])
    assert list(result.numbers) == list(NAMES)
    assert result.numbers["APl"] == -1  # no box of that size
    present = [c for c in result.classes.values() if c.boxes]
    assert sum(c.boxes for c in present) == len(data.to_coco_json()["annotations"])
    assert all((c.ap, c.ap50, c.ap75) == pytest.approx((1, 1, 1)) for c in present)
    assert all(c.ap == -1 for c in result.classes.values() if not c.boxes)


def test_both_libraries_give_the_same_numbers():
    pytest.importorskip("faster_coco_eval")
    data = Scenes(30, 96, split="val")
    found = predict_dataset(Oracle(data, noise=3, keep=0.8), data)
    fast, slow = (coco_metrics(found, data, backend) for backend in ("faster-coco-eval", "pycocotools"))
    assert 0.2 < fast.ap < 0.8
    assert fast.numbers == pytest.approx(slow.numbers, abs=1e-12)
    for name in fast.classes:
        assert vars(fast.classes[name]) == pytest.approx(vars(slow.classes[name]), abs=1e-12)
    known = [c.ap for c in fast.classes.values() if c.ap > -1]
    assert np.mean(known) == pytest.approx(fast.ap)


def test_both_libraries_agree_with_crowds_on_real_pictures():
    pytest.importorskip("faster_coco_eval")
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with coco_mini")
    data = CocoDetection(
        Path(os.environ["DISTILLKIT_DATA"]) / "coco_mini", "annotations/val.json", transform=Resize(64)
    )
    found = predict_dataset(Oracle(data, noise=2, keep=0.9), data)
    fast, slow = (coco_metrics(found, data, backend) for backend in ("faster-coco-eval", "pycocotools"))
    assert fast.numbers == pytest.approx(slow.numbers, abs=1e-12)
    assert all(n > 0 for n in fast.numbers.values())


@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_no_prediction_scores_zero(backend, capsys):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    result = coco_metrics([], Scenes(4, 64).to_coco_json(), backend)
    assert result.ap == result.numbers["AR100"] == 0
    assert capsys.readouterr().out == ""


def truth(**annotation):
    return {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 9, "name": "b"}, {"id": 4, "name": "a"}],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 4, "bbox": [10, 10, 20, 20], **annotation}],
    }


def row(box, score=0.9, category=4, image=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])
def test_an_annotation_with_id_zero_can_be_matched(backend):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    result = coco_metrics([row([10, 10, 20, 20])], truth(), backend)
    assert result.ap == pytest.approx(1)
    assert list(result.classes) == ["a", "b"]  # by category id
    assert result.classes["a"].ap == result.ap


def test_precision_by_hand():
    """A false alarm above the only hit: precision 1/2 at every recall; IoU 0.81 passes the thresholds up to 0.80."""
    result = coco_metrics([row([60, 60, 20, 20], 0.9), row([10, 10, 18, 18], 0.8)], truth())
    assert result.numbers["AP50"] == pytest.approx(0.5)
    assert result.ap == pytest.approx(0.5 * 7 / 10)
    assert result.numbers["AR1"] == 0
    assert result.numbers["AR10"] == pytest.approx(0.7)


def test_what_lies_in_a_crowd_counts_neither_way():
    gt = truth()
    gt["annotations"].append({"id": 5, "image_id": 1, "category_id": 4, "bbox": [50, 50, 40, 40], "iscrowd": 1})
    result = coco_metrics([row([55, 55, 9, 9], 0.95), row([10, 10, 20, 20], 0.8)], gt)
    assert result.ap == pytest.approx(1)
    assert result.classes["a"].boxes == 1


@pytest.mark.parametrize(("strange", "word"), [({"image": 2}, "image_id"), ({"category": 5}, "category_id")])
def test_predictions_on_something_else_are_named(strange, word):
    with pytest.raises(ValueError, match=word):
        coco_metrics([row([1, 1, 5, 5], **strange)], truth())


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="mycoco"):
        coco_metrics([], truth(), "mycoco")


def test_boxes_are_mapped_back_and_cut_at_the_border():
    prediction = {
        "boxes": torch.tensor([[10.0, 30, 30, 60], [-5, 0, 500, 500]]),
        "scores": torch.tensor([0.5, 0.25]),
        "labels": torch.tensor([1, 0]),
        "image_id": 7,
        "size": (40, 50),
        "scale": (2.0, 3.0),
    }
    data = Scenes(1, 64)
    rows = to_results(data, [prediction])
    assert [r["bbox"] for r in rows] == [[5, 10, 10, 10], [0, 0, 50, 40]]
    assert [(r["image_id"], r["category_id"], r["score"]) for r in rows] == [(7, 2, 0.5), (7, 1, 0.25)]
    assert prediction["boxes"][1, 0] == -5  # the input is left as it was
    with pytest.raises(ValueError, match="image 7: predicted label 10"):
        to_results(data, [{**prediction, "labels": torch.tensor([10, 0])}])


@pytest.mark.parametrize("transform", [Resize(96), Resize((70, 150), keep_ratio=True), Resize(80, True, pad=True)])
def test_mapping_back_undoes_every_transform(transform):
    data = Scenes(3, (64, 96), split="val", transform=transform)
    rows = to_results(data, predict_dataset(Oracle(data), data))
    for row_, annotation in zip(rows, data.to_coco_json()["annotations"], strict=True):
        assert row_["bbox"] == pytest.approx(annotation["bbox"], abs=1e-4)
        assert row_["category_id"] == annotation["category_id"]


def test_prediction_restores_every_modules_mode_and_reports_progress():
    data = Scenes(5, 64)
    model = Oracle(data).train()
    model.frozen.eval()
    seen = []
    predict_dataset(model, data, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.training
    assert model.norm.training
    assert not model.frozen.training

    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        predict_dataset(broken, data)
    assert broken.training


def test_prediction_with_a_training_transform_is_refused():
    data = Scenes(2, 64, transform=Augment(64))
    with pytest.raises(ValueError, match="no scale"):
        predict_dataset(Oracle(data), data)


def test_drawing_enlarges_and_marks_the_box():
    image = torch.zeros(3, 64, 48)
    picture = draw_boxes(image, torch.tensor([[10.0, 20, 30, 40]]), torch.tensor([0]), classes=["cat"])
    factor = SIDE // 48
    assert picture.size == (48 * factor, 64 * factor)
    pixels = np.asarray(picture)
    rows, columns = np.nonzero(pixels.any(2)[20 * factor :])
    assert (columns.min(), columns.max() + 1) == (10 * factor, 30 * factor)
    assert (rows.min(), rows.max() + 1) == (0, 20 * factor)
    assert pixels[: 20 * factor].any()  # the label, above the box
    assert not pixels[25 * factor : 35 * factor, 15 * factor : 25 * factor].any()
    assert image.max() == 0


def test_drawing_takes_every_kind_of_picture_alike():
    pixels = np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for picture in (pixels, whole, whole.float() / 255, Image.fromarray(pixels)):
        assert np.array_equal(np.asarray(draw_boxes(picture, *nothing)), pixels)


def test_low_scores_are_left_out_and_classes_differ_in_colour():
    image = torch.zeros(3, 400, 400)
    boxes = torch.tensor([[10.0, 50, 90, 90], [200, 200, 300, 300]])
    scores = torch.tensor([0.2, 0.9])
    one = np.asarray(draw_boxes(image, boxes, torch.tensor([0, 1]), scores, score=0.5))
    assert not one[40:100, :100].any()
    both = np.asarray(draw_boxes(image, boxes, torch.tensor([0, 1]), scores))
    assert tuple(both[89, 50]) != tuple(both[299, 250])
    assert both[89, 50].any()


def test_truth_beside_prediction(tmp_path):
    data = Scenes(1, 64)
    image, target = data[(0, 0)]
    picture = side_by_side(image, target, {**target, "scores": torch.ones(len(target["labels"]))}, data.classes)
    assert picture.width == 2 * SIDE + 8
    picture.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == picture.size
    assert beside([picture, picture]).width == 2 * picture.width + 8
