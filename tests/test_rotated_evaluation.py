"""Rotated metrics against hand-made cases, plain loops and COCO's code; submissions; whole pictures; drawing."""

import io
import math
import tracemalloc
import zipfile
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from distillkit.boxes.rotated import corners, from_corners, upright
from distillkit.boxes.rotated_iou import pairwise_rotated_iou
from distillkit.data.tile import Tile
from distillkit.evaluation import rotated, submission
from distillkit.evaluation.draw import SIDE, draw_boxes, side_by_side
from distillkit.evaluation.rotated import NAMES, RULES, rotated_metrics, to_original
from distillkit.evaluation.submission import SubmissionError, horizontal, read_submission, write_submission
from distillkit.evaluation.whole import merge_tiles, predict_whole
from tests.plain_rotated import plain_metrics, random_data

CLASSES = ["ship", "plane"]


def picture(boxes, labels=None, difficult=None, image_id=1):
    """The truth of a picture; boxes as (cx, cy, w, h, angle)."""
    k = len(boxes)
    return {
        "image_id": image_id,
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(k, 5),
        "labels": torch.tensor(labels or [0] * k, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * k),
    }


def found(boxes, scores, labels=None, image_id=1, scale=(1.0, 1.0)):
    k = len(boxes)
    return {
        "image_id": image_id,
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(k, 5),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels or [0] * k, dtype=torch.int64),
        "size": (100, 100),
        "scale": scale,
    }


A, B, C = (20.0, 20, 20, 10, 0.5), (60.0, 60, 20, 10, -0.4), (20.0, 70, 12, 12, 0.2)


def ap50(predictions, truth, classes=("ship",)):
    """AP50 of the first class by each rule."""
    rules = rotated_metrics(predictions, truth, classes).classes[classes[0]].rules
    return [rules[f"AP50_{rule}"] for rule in RULES]


# --- the rules, by hand


def test_the_truth_itself_scores_one_and_empty_classes_are_left_out_of_the_mean():
    result = rotated_metrics([found([A, B], [0.9, 0.8])], [picture([A, B])], CLASSES)
    assert list(result.numbers) == list(NAMES)
    assert all(number == pytest.approx(1) for number in result.numbers.values())
    assert result.ap == result.numbers["AP_COCO"]
    assert list(result.classes) == CLASSES
    assert (result.classes["ship"].boxes, result.classes["plane"].boxes) == (2, 0)
    assert result.classes["plane"].ap == result.classes["plane"].rules["AP50_VOC12"] == -1


def test_nothing_found_scores_zero_and_nothing_to_find_minus_one():
    assert set(rotated_metrics([], [picture([A])], CLASSES).numbers.values()) == {0.0}
    assert set(rotated_metrics([found([A], [0.5])], [picture([])], CLASSES).numbers.values()) == {-1.0}
    assert set(rotated_metrics([], [], CLASSES).numbers.values()) == {-1.0}


def test_a_second_detection_of_an_object_is_false():
    # ranks: right, false, right: precision 1 up to recall 1/2, then 2/3
    predictions, truth = [found([A, A, B], [0.9, 0.8, 0.7])], [picture([A, B])]
    voc07, voc12, coco = ap50(predictions, truth)
    assert voc07 == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert voc12 == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert coco == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)


def test_difficult_objects_count_neither_way_however_often_they_are_found():
    truth = [picture([A, B], difficult=[True, False])]
    hits = found([A, A, B, C], [0.9, 0.8, 0.7, 0.6])
    assert ap50([hits], truth) == pytest.approx([1, 1, 1])  # the false C comes after all is found
    assert ap50([found([A, C, B], [0.9, 0.8, 0.7])], truth) == pytest.approx([0.5, 0.5, 0.5])
    assert rotated_metrics([hits], truth, CLASSES).classes["ship"].boxes == 1
    only = rotated_metrics([hits], [picture([A], difficult=[True])], CLASSES)
    assert only.numbers["AP50"] == -1


def test_a_detection_in_a_picture_without_objects_is_false():
    truth = [picture([A]), picture([], image_id=2), picture([A], [1], image_id=3)]
    predictions = [found([A], [0.9], image_id=2), found([A], [0.8], image_id=3), found([A], [0.7])]
    assert ap50(predictions, truth, CLASSES) == pytest.approx([1 / 3] * 3)


def test_the_kit_asks_for_the_best_object_coco_for_the_best_free_one():
    """The second detection overlaps the first object most, which is taken, and the second one well enough, too."""
    first, second = (20.0, 20, 20, 10, 0), (24.0, 20, 20, 10, 0)
    predictions = [found([first, (21, 20, 20, 10, 0)], [0.9, 0.8])]
    voc07, voc12, coco = ap50(predictions, [picture([first, second])])
    assert voc07 == pytest.approx(6 / 11)
    assert voc12 == pytest.approx(0.5)
    assert coco == pytest.approx(1)
    # of two objects that coincide the kit sees the first only
    voc07, _, coco = ap50([found([first, first], [0.9, 0.8])], [picture([first, first])])
    assert (voc07, coco) == pytest.approx((6 / 11, 1))
    for difficult, kit in (([True, False], 0), ([False, True], 1)):
        truth = [picture([first, first], difficult=difficult)]
        assert ap50([found([first], [0.9])], truth) == pytest.approx([kit, kit, 1])
    # where the first object is difficult, the kit leaves both detections out, COCO gives the second object away
    truth = [picture([first, second], difficult=[True, False])]
    assert ap50(predictions, truth) == pytest.approx([0, 0, 1])


def test_of_equal_overlaps_coco_takes_the_last():
    """Between two objects, the first detection takes the one that the second detection does not need, or not."""
    left, right = (18.0, 20, 20, 10, 0), (22.0, 20, 20, 10, 0)
    predictions = [found([(20, 20, 20, 10, 0), left], [0.9, 0.8])]
    for objects, expected in (([left, right], 1), ([right, left], 51 / 101)):
        numbers = rotated_metrics(predictions, [picture(objects)], CLASSES).numbers
        assert numbers["AP75_COCO"] == pytest.approx(expected)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 4, 1.5, math.pi / 2])
def test_an_overlap_of_exactly_the_threshold_is_enough_for_coco_alone(angle):
    half = (20.0 - 2.5 * math.sin(-angle), 20.0 - 2.5 * math.cos(angle), 20, 5, angle)
    prediction = found([half], [0.9]) | {"boxes": torch.tensor([half], dtype=torch.float64)}
    assert ap50([prediction], [picture([(20.0, 20, 20, 10, angle)])]) == pytest.approx([0, 0, 1])


def test_equal_scores_rank_by_picture_of_the_truth_then_by_place():
    right, false = found([A], [0.5]), found([A], [0.5], image_id=2)
    truth = [picture([A]), picture([], image_id=2)]
    assert ap50([false, right], truth) == pytest.approx([1, 1, 1])
    assert ap50([false, right], truth[::-1]) == pytest.approx([0.5] * 3)
    assert ap50([found([A, C], [0.5, 0.5])], truth) == pytest.approx([1, 1, 1])
    assert ap50([found([C, A], [0.5, 0.5])], truth) == pytest.approx([0.5] * 3)


def test_recall_of_three_tenths_misses_the_kits_fourth_point():
    spread = [(100.0 * i, 50, 20, 10, 0.1 * i) for i in range(10)]
    voc07, voc12, coco = ap50([found(spread[:3], [0.9, 0.8, 0.7])], [picture(spread)])
    assert voc07 == pytest.approx(3 / 11)
    assert voc12 == pytest.approx(0.3)
    assert coco == pytest.approx(31 / 101)


def test_thresholds_are_averaged_without_a_running_sum():
    """IoU 0.81: found at the thresholds up to 0.80, so AP50 = AP75 = 1 and AP = 7/10."""
    predictions, truth = [found([(20, 20, 18, 9, 0.5)], [0.9])], [picture([A])]
    numbers = rotated_metrics(predictions, truth, ["ship"]).numbers
    assert [numbers[f"{name}_{rule}"] for name in ("AP50", "AP75") for rule in RULES] == pytest.approx([1] * 6)
    assert [numbers[f"AP_{rule}"] for rule in RULES] == pytest.approx([0.7] * 3)
    assert (numbers["AP"], numbers["AP50"], numbers["AP75"]) == pytest.approx((0.7, 1, 1))


# --- against independent code


@pytest.mark.parametrize(("pictures", "objects", "classes", "size"), [(40, 30, 4, 400), (4, 80, 1, 200)])
def test_equal_to_plain_loops_with_shapely(pictures, objects, classes, size, monkeypatch):
    names = [f"class {i}" for i in range(classes)]
    predictions, truth = random_data(pictures, objects, classes, seed=objects, size=size)
    expected = plain_metrics(predictions, truth, names, grid_size=1e-9)
    order = torch.randperm(pictures, generator=torch.Generator().manual_seed(0)).tolist()
    result = rotated_metrics([predictions[i] for i in order], truth, names)
    assert 0.05 < result.ap < 0.9
    for name in names:
        for rule in RULES:
            aps, rules = expected[name][rule], result.classes[name].rules
            got = [rules[f"{which}_{rule}"] for which in ("AP50", "AP75", "AP")]
            assert got == pytest.approx([aps[0], aps[5], np.mean(aps)], abs=1e-12)
    monkeypatch.setattr(rotated, "CHUNK", 50)
    assert rotated_metrics(predictions, truth, names) == result


def test_upright_boxes_score_as_in_pycocotools():
    predictions, truth = random_data(25, 40, 3, seed=5, size=300)
    for side in (predictions, truth):
        for one in side:
            one["boxes"][:, 4] = 0
    for one in truth:
        one["difficult"] = torch.zeros(len(one["boxes"]), dtype=torch.bool)
    names = ["a", "b", "c"]
    evaluator = coco_evaluator(predictions, truth, len(names))
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    result = rotated_metrics(predictions, truth, names)
    for label, name in enumerate(names):
        rules = result.classes[name].rules
        got = [rules["AP50_COCO"], rules["AP75_COCO"], rules["AP_COCO"]]
        expected = [precision[0, :, label].mean(), precision[5, :, label].mean(), precision[:, :, label].mean()]
        assert got == pytest.approx(expected, abs=1e-12)
    assert 0.1 < result.ap < 0.9


def coco_evaluator(predictions, truth, classes):
    def side(rows, extra):
        annotations = []
        for one in rows:
            for i, (x1, y1, x2, y2) in enumerate(upright(one["boxes"]).tolist()):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                ids = {"id": len(annotations) + 1, "image_id": one["image_id"], "category_id": int(one["labels"][i])}
                annotations.append(box | ids | extra(one, i))
        coco = COCO()
        coco.dataset = {
            "images": [{"id": one["image_id"]} for one in truth],
            "categories": [{"id": i} for i in range(classes)],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    with redirect_stdout(io.StringIO()):
        sides = side(truth, lambda *_: {}), side(predictions, lambda one, i: {"score": float(one["scores"][i])})
        evaluator = COCOeval(*sides, "bbox")
        evaluator.params.maxDets = [10_000]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turning_every_picture_changes_nothing(quarters):
    predictions, truth = random_data(10, 40, 2, seed=3, size=300)

    def turned(one):
        boxes = one["boxes"].clone()
        for _ in range(quarters):
            boxes = torch.stack([300 - boxes[:, 1], boxes[:, 0], *boxes[:, 2:4].T, boxes[:, 4] + math.pi / 2], 1)
        return one | {"boxes": boxes}

    before = rotated_metrics(predictions, truth, CLASSES)
    after = rotated_metrics([turned(one) for one in predictions], [turned(one) for one in truth], CLASSES)
    assert after == before


def test_memory_does_not_grow_with_the_pairs_of_boxes():
    """2000 boxes on 2000 of their class, side by side: an index of every pair alone would take 32 MB."""
    y = 10.0 * torch.arange(2000)
    boxes = torch.stack([y * 0 + 500, y, y * 0 + 900, y * 0 + 8, y * 0], 1)
    truth = picture(boxes.tolist())
    predictions = [found(boxes.tolist(), [0.5] * 2000)]
    tracemalloc.start()
    try:
        assert rotated_metrics(predictions, [truth], CLASSES).numbers["AP"] == pytest.approx(1)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


# --- mapping back


def test_mapping_back_divides_by_equal_scales_and_keeps_the_angle():
    boxes = torch.tensor([[10.0, 20, 8, 4, 1.3], [30, 10, 6, 6, -0.2]])
    assert torch.equal(to_original(boxes, torch.tensor([2.0, 2.0]))[:, :4], boxes[:, :4].double() / 2)
    assert torch.equal(to_original(boxes, torch.tensor([2.0, 2.0]))[:, 4], boxes[:, 4].double())


def test_mapping_back_goes_through_the_corners_where_scales_differ():
    scale = torch.tensor([2.0, 3.0])
    level = torch.tensor([[10.0, 30, 8, 6, 0.0], [10, 30, 8, 6, math.pi / 2]])
    expected = [[3, 9, 7, 11], [3.5, 26 / 3, 6.5, 34 / 3]]
    assert upright(to_original(level, scale)).tolist() == [pytest.approx(row, abs=1e-5) for row in expected]
    slanted = torch.tensor([[100.0, 90, 40, 20, 0.6]], dtype=torch.float64)
    (mapped,) = to_original(slanted, scale)
    assert torch.equal(to_original(slanted, scale[None])[0], mapped)
    # the parallelogram that the box has become, seen along the sides of the rectangle around it
    along = torch.stack([mapped[4].cos(), mapped[4].sin()])
    across = torch.stack([-along[1], along[0]])
    points = corners(slanted)[0] / scale - mapped[:2]
    for axis, side in ((along, mapped[2]), (across, mapped[3])):
        assert (points @ axis).aminmax() == (pytest.approx(-side / 2), pytest.approx(side / 2))


def test_predictions_in_the_networks_pixels_score_like_those_in_the_originals():
    predictions, truth = random_data(10, 30, 2, seed=7, size=300)
    scaled = [
        one | {"boxes": one["boxes"] * torch.tensor([s, s, s, s, 1]), "scale": (s, s)}
        for one, s in zip(predictions, [0.5, 2.0, 1.0, 4.0, 0.25] * 2)
    ]
    assert rotated_metrics(scaled, truth, CLASSES) == rotated_metrics(predictions, truth, CLASSES)


@pytest.mark.parametrize(
    ("prediction", "word"),
    [
        (found([A], [0.5], image_id=9), "image 9 is predicted, but not in the truth"),
        (found([A], [math.nan]), "image 1: a predicted score is not finite"),
        (found([(1, 2, math.inf, 4, 0)], [0.5]), r"prediction of image 1: box \[1.0, 2.0, inf"),
        (found([A], [0.5], [2]), "labels are 2..2, there are 2 classes"),
        (found([A], [0.5]) | {"boxes": torch.ones(1, 4)}, r"boxes are \(1, 4\)"),
    ],
)
def test_predictions_that_cannot_be_scored_are_named(prediction, word):
    with pytest.raises(ValueError, match=word):
        rotated_metrics([prediction], [picture([A])], CLASSES)


def test_a_picture_predicted_twice_is_named():
    with pytest.raises(ValueError, match="image 1 is predicted twice"):
        rotated_metrics([found([A], [0.5])] * 2, [picture([A])], CLASSES)
    with pytest.raises(ValueError, match="two pictures of the truth have one image_id"):
        rotated_metrics([], [picture([A])] * 2, CLASSES)
    with pytest.raises(ValueError, match="truth of image 1: labels are 3"):
        rotated_metrics([], [picture([A], [3])], CLASSES)


# --- submissions


@pytest.fixture
def data():
    predictions, truth = random_data(12, 30, 2, seed=11, size=300)
    predictions = [one | {"boxes": one["boxes"].float(), "scores": (one["scores"] / 3).float()} for one in predictions]
    return predictions, truth, {one["image_id"]: f"P{one['image_id']:04d}" for one in truth}


@pytest.mark.parametrize("task", ["Task1", "Task2"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_submission_read_back_scores_the_same(data, tmp_path, task, zipped):
    predictions, truth, names = data
    classes = [*CLASSES, "none of these"]
    archive = write_submission(tmp_path / "out", predictions, names, classes, task)
    assert archive == tmp_path / "out" / "submission.zip"
    files = [f"{task}_{name}.txt" for name in classes]
    assert sorted(p.name for p in archive.parent.iterdir()) == sorted([*files, archive.name])
    assert sorted(zipfile.ZipFile(archive).namelist()) == sorted(files)
    assert (tmp_path / "out" / files[2]).read_bytes() == b""
    (line, *_) = (tmp_path / "out" / files[0]).read_text().splitlines()
    assert line.startswith("P0001 0.")
    assert len(line.split()) == (10 if task == "Task1" else 6)
    back = read_submission(archive if zipped else archive.parent, names, classes)
    assert back.task == task
    assert all(torch.equal(p["scores"], b["scores"].float()) for p, b in zip(predictions, back.predictions))
    if task == "Task2":
        truth = horizontal([one | {"quads": corners(one["boxes"])} for one in truth])
        flat = [
            [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0]
            for one in predictions
            for x1, y1, x2, y2 in upright(one["boxes"]).tolist()
        ]
        flat = torch.tensor(flat).split([len(one["boxes"]) for one in predictions])
        predictions = [one | {"boxes": boxes} for one, boxes in zip(predictions, flat)]
    expected, got = (rotated_metrics(side, truth, classes) for side in (predictions, back.predictions))
    assert got.numbers == pytest.approx(expected.numbers, abs=1e-12)
    assert 0.1 < got.ap < 0.9


def test_the_truth_of_task2_is_around_the_points_as_annotated():
    """And not around the smallest rectangle around them, which reaches further."""
    quads = torch.tensor([[[0.0, 0], [30, 5], [40, 30], [5, 40]], [[10, 10], [50, 20], [45, 60], [20, 30]]])
    truth = [picture([A, A]) | {"quads": quads, "boxes": from_corners(quads)}]
    (one,) = horizontal(truth)
    wanted = torch.tensor([[0.0, 0, 40, 40], [10, 10, 50, 60]])
    assert torch.allclose(upright(one["boxes"]), wanted.to(one["boxes"].dtype))
    assert (upright(truth[0]["boxes"]) - wanted).abs().max() > 1


def test_a_submission_replaces_an_earlier_one_whole_and_nothing_else(data, tmp_path):
    predictions, _, names = data
    folder = tmp_path / "out"
    write_submission(folder, predictions, names, CLASSES)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = [*predictions[:-1], predictions[-1] | {"labels": predictions[-1]["labels"] + 7}]
    with pytest.raises(SubmissionError, match="image 12: predicted label"):
        write_submission(folder, broken, names, CLASSES)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    write_submission(folder, predictions, names, ["car", "bus"])
    assert sorted(p.name for p in folder.glob("*.txt")) == ["Task1_bus.txt", "Task1_car.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(SubmissionError, match=r"thesis.tex.*another folder"):
        write_submission(folder, predictions, names, CLASSES)
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_replacement_that_was_killed_half_way_is_put_right(data, tmp_path):
    predictions, _, names = data
    folder = tmp_path / "out"
    write_submission(folder, predictions, names, CLASSES)
    folder.rename(tmp_path / ".out.old")
    with pytest.raises(SubmissionError, match="has no name"):
        write_submission(folder, predictions, {}, CLASSES)
    assert len(read_submission(folder, names, CLASSES).predictions) == 12


def test_names_that_the_format_cannot_hold_are_refused(data, tmp_path):
    predictions, _, names = data
    with pytest.raises(SubmissionError, match=r"image 3.*white space"):
        write_submission(tmp_path / "out", predictions, names | {3: "P 3"}, CLASSES)
    with pytest.raises(SubmissionError, match=r"class '../plane'"):
        write_submission(tmp_path / "out", predictions, names, ["ship", "../plane"])
    assert list(tmp_path.iterdir()) == []


GOOD = "P0001 0.5 1 1 9 1 9 5 1 5\n"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GOOD + "P0001 0.5 1 1 9 1 9 5 1\n", r"Task1_plane.txt, line 2: 9 fields; expected 10"),
        (GOOD + "\n" + GOOD.replace("P0001", "P0001.png"), "line 3: picture 'P0001.png' is unknown"),
        (GOOD.replace("0.5", "nan"), "line 1: 'nan' is not a finite number"),
        (GOOD.replace(" 9 1 ", " 9 one "), "line 1: 'one' is not a finite number"),
        (GOOD.replace(" 9 1 ", " 9 1e200 "), r"line 1: a coordinate is 1e\+200"),
        (GOOD.replace(" 9 1 ", " 9 ½ ").encode("latin-1"), "line 1: not text in UTF-8"),
        (GOOD + "P0001 " * 2000, "line 2: longer than 4096 bytes"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_corrupt_lines_are_named_by_file_and_number(tmp_path, text, word, zipped):
    content = {"Task1_ship.txt": b"", "Task1_plane.txt": text if isinstance(text, bytes) else text.encode()}
    with pytest.raises(SubmissionError, match=word):
        read_submission(written(tmp_path, content, zipped), {1: "P0001"}, CLASSES)


def test_a_horizontal_box_turned_inside_out_is_named(tmp_path):
    content = {"Task2_ship.txt": b"P0001 1 5 5 2 9", "Task2_plane.txt": b""}
    with pytest.raises(SubmissionError, match=r"Task2_ship.txt, line 1: box \[5.0, 5.0, 2.0, 9.0\]"):
        read_submission(written(tmp_path, content, False), {1: "P0001"}, CLASSES)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({}, "expected Task1_ship.txt or Task2_ship.txt; it is empty"),
        ({"ship.txt": b""}, "found 'ship.txt'"),
        ({"Task1_ship.txt": b""}, "Task1_plane.txt is missing"),
        ({"Task1_ship.txt": b"", "Task1_plane.txt": b"", "Task1_bus.txt": b""}, "Task1_bus.txt is no part of Task1"),
        ({"Task1_ship.txt": b"", "Task1_plane.txt": b"", "Task2_ship.txt": b""}, "Task2_ship.txt is no part"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_submissions_with_other_files_are_named(tmp_path, content, word, zipped):
    with pytest.raises(SubmissionError, match=word):
        read_submission(written(tmp_path, content, zipped), {1: "P0001"}, CLASSES)


def written(folder, content, zipped):
    if zipped:
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name, text in content.items():
                archive.writestr(name, text)
        return folder / "a.zip"
    (folder / "a").mkdir()
    for name, text in content.items():
        (folder / "a" / name).write_bytes(text)
    return folder / "a"


def test_archives_that_are_broken_or_dangerous_are_refused(tmp_path, monkeypatch):
    good = {"Task1_ship.txt": GOOD.encode() * 50, "Task1_plane.txt": b""}
    path = written(tmp_path, good | {"../Task1_ship.txt": b""}, True)
    with pytest.raises(SubmissionError, match=r"\.\./Task1_ship.txt is no part"):
        read_submission(path, {1: "P0001"}, CLASSES)
    path = written(tmp_path, good, True)
    assert len(read_submission(path, {1: "P0001"}, CLASSES).predictions[0]["scores"]) == 50
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"P0001 0.5", b"P0001 0.6", 1))
    with pytest.raises(SubmissionError, match=r"Task1_ship.txt: cannot be read .*CRC"):
        read_submission(path, {1: "P0001"}, CLASSES)
    path.write_bytes(whole[:-30])
    with pytest.raises(SubmissionError, match="expected a folder or a zip archive"):
        read_submission(path, {1: "P0001"}, CLASSES)
    path.write_bytes(whole)
    monkeypatch.setattr(submission, "MOST_BYTES", 1000)
    with pytest.raises(SubmissionError, match="2 files of 1300 bytes; a submission has at most"):
        read_submission(path, {1: "P0001"}, CLASSES)
    with pytest.raises(SubmissionError, match="no such folder or archive"):
        read_submission(tmp_path / "b.zip", {1: "P0001"}, CLASSES)
    with pytest.raises(SubmissionError, match="two pictures have one name"):
        read_submission(path, {1: "P0001", 2: "P0001"}, CLASSES)


def test_two_files_of_one_name_in_an_archive_are_refused(tmp_path):
    path = written(tmp_path, {"Task1_ship.txt": b"", "Task1_plane.txt": b""}, True)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("Task1_ship.txt", "")
    with pytest.raises(SubmissionError, match="two files in it have one name"):
        read_submission(path, {1: "P0001"}, CLASSES)


# --- whole pictures


class Painted:
    """A picture of rectangles, each in a colour of its own, that counts what is read of it at once."""

    def __init__(self, boxes, size):
        self.boxes, self.size, self.largest = boxes, size, 0
        y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) + 0.5
        self.pixels = np.zeros((*size, 3), np.uint8)
        for number, (cx, cy, w, h, angle) in enumerate(boxes.tolist(), 1):
            u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
            v = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
            self.pixels[(abs(u) < w / 2) & (abs(v) < h / 2)] = (number, 255, 0)

    def read(self, x, y, width, height):
        assert x >= 0
        assert y >= 0
        assert x + width <= self.size[1]
        assert y + height <= self.size[0]
        self.largest = max(self.largest, width * height)
        return self.pixels[y : y + height, x : x + width]


class Finder(nn.Module):
    """Finds every colour's rectangle by its moments. What it sees cut has the better score."""

    def __init__(self, label=0):
        super().__init__()
        self.norm, self.label, self.sizes = nn.BatchNorm2d(3), label, []

    def forward(self, images):
        assert not self.training
        self.sizes += [tuple(image.shape[1:]) for image in images]
        return [self.found(image) for image in images]

    def found(self, image):
        # where a picture was resized, colours on a border are mixed with black
        numbers = torch.where(image[1] > 0.5, (image[0] / image[1] * 255).round(), 0).long()
        boxes = []
        for number in numbers.unique().tolist():
            y, x = (numbers == number).nonzero(as_tuple=True)
            if number and len(x) > 20:
                points = torch.stack([x, y], 1).double() + 0.5
                values, axes = torch.linalg.eigh(torch.cov(points.T))
                w, h = (12 * values.flip(0)).sqrt()
                angle = torch.atan2(axes[1, 1], axes[0, 1])
                boxes.append(torch.stack([*points.mean(0), w, h, angle]).float())
        boxes = torch.stack(boxes) if boxes else torch.zeros(0, 5)
        scores = 1 / (1 + boxes[:, 2] * boxes[:, 3] / 1e4)
        return {"boxes": boxes, "scores": scores, "labels": torch.full((len(boxes),), self.label)}


def scattered(count, size, seed):
    """Boxes of 40 to 60 by 16 to 26 pixels, none of which touches another, not closer to the border than they are
    long."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.zeros(0, 5)
    while len(boxes) < count:
        draw = torch.rand(5, generator=generator)
        w, h = 40 + 20 * draw[2], 16 + 10 * draw[3]
        room = torch.tensor([size[1], size[0]]) - 80
        new = torch.cat([40 + draw[:2] * room, torch.stack([w, h, math.pi * draw[4]])])[None]
        spaced = new + torch.tensor([0, 0, 8, 8, 0])
        if not (pairwise_rotated_iou(spaced, boxes) > 0).any():
            boxes = torch.cat([boxes, new])
    return boxes


def matched(found, boxes):
    """IoU of each true box with the one found at its place; every found one must have its own."""
    iou = pairwise_rotated_iou(boxes, found["boxes"])
    assert len(found["boxes"]) == len(boxes)
    assert sorted(iou.argmax(1).tolist()) == list(range(len(boxes)))
    return iou.amax(1)


@pytest.mark.parametrize("size", [(500, 700), (256, 1100), (200, 150)])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.5)])
def test_every_object_of_a_large_picture_is_found_once(size, scales):
    boxes = scattered(size[0] * size[1] // 12_000, size, seed=sum(size))
    large, model, seen = Painted(boxes, size), Finder().train(), []
    result = predict_whole(
        model, large, 256, 120, scales, batch=3, progress=lambda done, total: seen.append((done, total))
    )
    assert matched(result, boxes).min() > (0.9 if scales == (1.0,) else 0.7)
    assert (result["scores"].diff() <= 0).all()
    assert (result["size"], result["scale"]) == (size, (1.0, 1.0))
    assert model.training
    assert seen[-1] == (len(model.sizes), len(model.sizes))
    assert seen[0][1] == seen[-1][1]
    assert max(max(s) for s in model.sizes) <= 256
    assert large.largest <= (256 / min(scales)) ** 2
    truth = [{"image_id": 1, "boxes": boxes, "labels": torch.zeros(len(boxes)), "difficult": torch.zeros(len(boxes))}]
    assert rotated_metrics([result | {"image_id": 1}], truth, CLASSES).numbers["AP50"] == pytest.approx(1)


def test_objects_cut_by_windows_are_kept_where_no_window_has_them_whole():
    boxes = torch.tensor([[300.0, 100, 380, 30, 0.0]])  # longer than a window
    result = predict_whole(Finder(), Painted(boxes, (200, 600)), 256, 60)
    left, _, right, _ = upright(result["boxes"]).T
    assert left.min() == pytest.approx(110, abs=1)
    assert right.max() == pytest.approx(490, abs=1)


def test_classes_do_not_suppress_each_other_and_most_keeps_the_best():
    class Two(Finder):
        def found(self, image):
            one = super().found(image)
            twice = {key: torch.cat([value, value]) for key, value in one.items()}
            return twice | {"labels": torch.arange(2).repeat_interleave(len(one["boxes"]))}

    boxes = scattered(12, (300, 400), seed=1)
    result = predict_whole(Two(), Painted(boxes, (300, 400)), 256, 120)
    assert result["labels"].bincount().tolist() == [12, 12]
    best = predict_whole(Two(), Painted(boxes, (300, 400)), 256, 120, most=5)
    assert torch.equal(best["scores"], result["scores"][:5])


@pytest.mark.parametrize("change", [{"overlap": 256}, {"scales": ()}, {"scales": (1.0, 0.0)}, {"overlap": -1}])
def test_windows_that_cannot_be_laid_are_refused(change):
    with pytest.raises(ValueError, match="expected 0 <= overlap < window"):
        predict_whole(Finder(), Painted(torch.zeros(0, 5), (20, 20)), **{"window": 256, "overlap": 100} | change)


def test_a_detector_of_upright_boxes_is_refused():
    class Upright(nn.Module):
        def forward(self, images):
            nothing = torch.zeros(0)
            return [{"boxes": torch.zeros(0, 4), "scores": nothing, "labels": nothing.long()} for _ in images]

    with pytest.raises(ValueError, match=r"boxes \(0, 4\); expected \(k, 5\)"):
        predict_whole(Upright(), Painted(torch.zeros(0, 5), (20, 20)))


def test_predictions_on_tiles_are_merged_by_picture():
    sizes = {"one": (500, 600), "two": (256, 400), "none": (100, 100)}
    boxes = {name: scattered(h * w // 15_000, (h, w), seed=h) for name, (h, w) in sizes.items()}
    boxes["none"] = torch.zeros(0, 5)
    model, predictions, places = Finder(), [], {}
    for name, (height, width) in sizes.items():
        whole = Painted(boxes[name], (height, width)).pixels
        for scale in (0.5, 1.0):
            resized = torch.nn.functional.interpolate(
                torch.from_numpy(whole).permute(2, 0, 1)[None].float() / 255, scale_factor=scale, mode="area"
            )[0]
            for y in range(0, max(1, resized.shape[1] - 120), 136):
                for x in range(0, max(1, resized.shape[2] - 120), 136):
                    # tiles reach over the border and are filled up
                    tile = torch.zeros(3, 256, 256)
                    part = resized[:, y : y + 256, x : x + 256]
                    tile[:, : part.shape[1], : part.shape[2]] = part
                    image_id = len(places)
                    places[image_id] = Tile(name, scale, x, y)
                    (output,) = model.eval()([tile])
                    doubled = output["boxes"] * torch.tensor([2, 2, 2, 2, 1])
                    seen = {"image_id": image_id, "size": (256, 256), "scale": (2.0, 2.0)}
                    predictions.append(output | {"boxes": doubled} | seen)
    merged = merge_tiles(predictions, places)
    assert list(merged) == list(sizes)
    for name in ("one", "two"):
        assert matched(merged[name], boxes[name]).min() > 0.7
    assert merged["none"]["boxes"].shape == (0, 5)
    with pytest.raises(ValueError, match="image 99"):
        merge_tiles([predictions[0] | {"image_id": 99}], places)


def test_a_cut_box_stays_where_the_neighbouring_tile_is_missing():
    cut = found([(250, 128, 12, 30, 0.0)], [0.9], image_id=1)
    nothing = found([], [], image_id=2)
    tiles = [one | {"size": (256, 256)} for one in (cut, nothing)]
    places = {1: Tile("a", 1.0, 0, 0), 2: Tile("a", 1.0, 136, 0)}
    assert len(merge_tiles(tiles, places)["a"]["boxes"]) == 0  # the neighbour has seen the whole and said no
    assert len(merge_tiles(tiles, places | {2: Tile("a", 1.0, 136, 136)})["a"]["boxes"]) == 1
    assert len(merge_tiles(tiles, places | {2: Tile("a", 0.5, 136, 0)})["a"]["boxes"]) == 1


# --- drawing


def test_a_rotated_box_is_drawn_along_its_sides():
    box = torch.tensor([[200.0, 210, 160, 60, 0.5]])
    pixels = np.asarray(draw_boxes(torch.zeros(3, 400, 400), box, torch.tensor([0]))).any(2)
    (points,) = corners(box)
    for start, end in zip(points, points.roll(-1, 0)):
        for t in torch.linspace(0.02, 0.98, 50):
            x, y = (start + t * (end - start)).tolist()
            assert pixels[round(y - 0.5) - 1 : round(y - 0.5) + 2, round(x - 0.5) - 1 : round(x - 0.5) + 2].any()
    assert not pixels[200:220, 190:210].any()
    x1, y1, x2, y2 = upright(box)[0].round().int().tolist()
    rows, columns = pixels.nonzero()
    assert abs(columns.min() - x1) <= 2
    assert abs(columns.max() - x2) <= 2
    assert abs(rows.max() - y2) <= 2
    assert rows.min() < y1  # the label


def test_rotated_truth_beside_prediction():
    truth = {"boxes": torch.tensor([A, B]), "labels": torch.tensor([0, 1])}
    picture_ = side_by_side(torch.zeros(3, 96, 96), truth, truth | {"scores": torch.tensor([0.9, 0.2])}, CLASSES)
    assert picture_.width == 2 * SIDE + 8
    left, right = (np.asarray(picture_)[:, s].any(2).sum() for s in (slice(SIDE), slice(SIDE + 8, None)))
    assert left > right > 0  # the second box of the prediction is below the score that is shown
