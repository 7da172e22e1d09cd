"""Every broken input is found, and named with its file and its entry."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillkit.data.check import check_dataset
from distillkit.data.coco import CocoDetection, read_coco
from distillkit.data.problems import DataError
from distillkit.data.voc import VocDetection, read_voc


def sound() -> dict:
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 5, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0} for i in (1, 2)
        ],
        "categories": [{"id": 5, "name": "cell"}],
    }


def write(root: Path, content: dict) -> Path:
    (root / "images").mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    for i in (1, 2):
        Image.fromarray(noise).save(root / "images" / f"{i}.png")
    (root / "train.json").write_text(json.dumps(content))
    return root


def found(root: Path) -> list[str]:
    return [str(p) for p in check_dataset(read_coco(root, "train.json"))]


def test_a_sound_set_has_no_problem(tmp_path):
    assert found(write(tmp_path, sound())) == []
    assert len(CocoDetection(tmp_path, "train.json")) == 2


def annotation(**changes):
    def change(content):
        content["annotations"][1].update(changes)

    return change


def image(**changes):
    def change(content):
        content["images"][1].update(changes)

    return change


FATAL = {
    "NaN": (annotation(bbox=[2, float("nan"), 10, 8]), r"annotation 2: box .* is not finite"),
    "infinite": (annotation(bbox=[2, 3, float("inf"), 8]), r"annotation 2: box .* is not finite"),
    "three numbers": (annotation(bbox=[2, 3, 10]), r"annotation 2: bbox is \[2, 3, 10\]"),
    "text": (annotation(bbox="none"), r"annotation 2: bbox is 'none'"),
    "unknown category": (annotation(category_id=6), r"annotation 2: category 6 is unknown; the file has \[5\]"),
    "odd category": (annotation(category_id=[5]), r"annotation 2: category \[5\] is unknown"),
    "unknown image": (annotation(image_id=3), r"annotation 2: belongs to image 3, which is not listed"),
    "duplicate annotation": (annotation(id=1), r"annotation 1: this id is given twice"),
    "no annotation id": (annotation(id=None), r"train\.json: annotation .* has no integer id"),
    "duplicate image": (image(id=1), r"image 1: this id is given twice"),
    "no size": (image(width=None), r"image 2: width and height are None and 20"),
    "no name": (image(file_name=None), r"train\.json: image .* lacks an integer id or a file_name"),
    "missing picture": (image(file_name="3.png"), r"3\.png: image 2: no such file"),
    "empty split": (lambda c: c.update(images=[], annotations=[]), r"train\.json: the split is empty"),
    "no categories": (lambda c: c.update(categories=[]), r"train\.json: no category is listed"),
    "duplicate category": (lambda c: c["categories"].append({"id": 5, "name": "b"}), r"category 5: this id is given"),
    "duplicate name": (lambda c: c["categories"].append({"id": 6, "name": "cell"}), r"category 6: the name 'cell'"),
    "no list": (lambda c: c.pop("images"), r"train\.json: lacks one of the lists images"),
}


@pytest.mark.parametrize("case", FATAL)
def test_fatal_problems_are_listed_and_raised_in_the_same_words(case, tmp_path):
    change, words = FATAL[case]
    content = sound()
    change(content)
    write(tmp_path, content)
    listed = [line for line in found(tmp_path) if re.search(words, line)]
    assert len(listed) == 1
    assert str(tmp_path) in listed[0]
    with pytest.raises(DataError) as raised:
        CocoDetection(tmp_path, "train.json")
    assert listed[0] in str(raised.value)


LEFT_OUT = {
    "no area": ([2, 3, 0, 8], r"annotation 2: box .* = \[2, 3, 0, 8\] has no area; it is left out", 0),
    "negative": ([2, 3, 10, -8], r"annotation 2: box .* has no area; it is left out", 0),
    "outside": ([31, 3, 10, 8], r"annotation 2: box .* lies outside the picture of 30 x 20; it is left out", 0),
    "partly outside": ([25, 3, 10, 8], r"annotation 2: box .* reaches outside .* it is cut", 1),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_odd_boxes_are_listed_and_warned_of(case, tmp_path, caplog):
    box, words, learned = LEFT_OUT[case]
    content = sound()
    content["annotations"][1]["bbox"] = box
    write(tmp_path, content)
    (line,) = found(tmp_path)
    assert re.search(words, line)
    data = CocoDetection(tmp_path, "train.json")
    assert caplog.messages == [line]
    assert len(data[(0, 1)][1]["boxes"]) == learned
    assert len(data[(0, 0)][1]["boxes"]) == 1
    assert data.usable_boxes == 1 + learned
    assert len(data.to_coco_json()["annotations"]) == 2  # evaluation still counts it


def test_a_box_a_rounding_error_outside_is_no_problem(tmp_path):
    content = sound()
    content["annotations"][1]["bbox"] = [-0.4, 0, 30.6, 20.3]
    write(tmp_path, content)
    assert found(tmp_path) == []
    assert CocoDetection(tmp_path, "train.json")[(0, 1)][1]["boxes"].tolist()[0] == pytest.approx([0, 0, 30, 20], abs=1)


def test_no_boxes_at_all_is_said(tmp_path):
    content = sound()
    content["annotations"] = []
    write(tmp_path, content)
    (line,) = found(tmp_path)
    assert "no image has a box" in line


def test_unreadable_json_names_the_line(tmp_path):
    write(tmp_path, sound())
    (tmp_path / "train.json").write_text('{"images": [],\n "annotations": [}')
    (line,) = found(tmp_path)
    assert re.search(r"train\.json: line 2, column 18: not JSON", line)
    with pytest.raises(DataError, match="line 2"):
        CocoDetection(tmp_path, "train.json")


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    write(tmp_path, sound())
    (problem,) = read_coco(tmp_path, "vall.json").problems
    assert re.search(r"vall\.json: no such file; correct the path", str(problem))
    (tmp_path / "train.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in found(tmp_path)[0]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:900]), "the picture cannot be decoded"),
        (lambda p: p.write_text("no picture"), "the picture cannot be decoded"),
        (lambda p: Image.new("RGB", (20, 30)).save(p), "the picture is 20 x 30 pixels, the annotations say 30 x 20"),
    ],
)
def test_broken_pictures_are_found_and_the_others_read(break_it, words, tmp_path):
    write(tmp_path, sound())
    break_it(tmp_path / "images" / "1.png")
    seen = []
    problems = list(check_dataset(read_coco(tmp_path, "train.json"), lambda done, total: seen.append((done, total))))
    assert seen == [(1, 2), (2, 2)]
    (problem,) = problems
    assert str(tmp_path / "images" / "1.png") == problem.file
    assert problem.id == "image 1"
    assert words in problem.what
    assert problem.remedy


def test_a_picture_deleted_after_the_check_is_named(tmp_path):
    data = CocoDetection(write(tmp_path, sound()), "train.json")
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png: image 2: no such file"):
        data[(0, 1)]


def test_many_problems_are_counted_and_all_kept(tmp_path):
    content = sound()
    content["annotations"] = [{"id": i, "image_id": 9, "category_id": 5, "bbox": [0, 0, 1, 1]} for i in range(50)]
    write(tmp_path, content)
    with pytest.raises(DataError, match="and 30 more") as raised:
        CocoDetection(tmp_path, "train.json")
    assert len(raised.value.problems) == 50
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value)


BOX = "<bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox>"


def voc(root: Path, body: str, names: str = "a\n", size: str = "<width>30</width><height>20</height>") -> Path:
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(root / "JPEGImages" / "a.jpg")
    (root / "ImageSets/Main/train.txt").write_text(names)
    (root / "Annotations/a.xml").write_text(f"<annotation>\n<size>{size}</size>\n{body}</annotation>")
    return root


def thing(x1, x2, name: str = "cat") -> str:
    return f"<object><name>{name}</name>{BOX.format(x1, x2)}</object>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"body": thing(1, 5, "dragon")}, r"a\.xml: object 1: class 'dragon' is unknown"),
        ({"body": thing(1, 5) + thing("x", 5)}, r"a\.xml: object 2: <bndbox> is \[None, 2\.0, 5\.0, 9\.0\]"),
        ({"body": thing("nan", 5)}, r"a\.xml: object 1: box .* is not finite"),
        ({"body": "<object>"}, r"a\.xml: image a: line 3: not XML"),
        ({"body": "", "size": "<width>0</width>"}, r"a\.xml: image a: <size> lacks"),
        ({"body": "", "names": "a\na\n"}, r"train\.txt: image a: this image is listed twice"),
        ({"body": "", "names": "a\nb\n"}, r"b\.xml: image b: no such file"),
        ({"body": "", "names": "\n"}, r"train\.txt: the split is empty"),
    ],
)
def test_broken_voc_is_named(arguments, words, tmp_path):
    voc(tmp_path, **arguments)
    (line,) = [str(p) for p in check_dataset(read_voc(tmp_path, "train"))]
    assert re.search(words, line)
    with pytest.raises(DataError, match=words):
        VocDetection(tmp_path, "train")


def test_voc_odd_boxes_lists_and_pictures(tmp_path, caplog):
    voc(tmp_path, thing(9, 5) + thing(1, 5))
    data = VocDetection(tmp_path, "train")
    assert re.search("object 1: box .* has no area", caplog.text)
    assert data[(0, 0)][1]["boxes"].tolist() == [[0, 1, 5, 9]]
    (problem,) = read_voc(tmp_path, "vall").problems
    assert "vall.txt: no such file" in str(problem)
    (tmp_path / "JPEGImages/a.jpg").unlink()
    assert any("a.jpg: image 1: no such file" in str(p) for p in read_voc(tmp_path, "train").problems)


@pytest.mark.parametrize("name", ["bccd", "raccoon", "coco_mini"])
def test_real_sets_are_sound(name):
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with bccd, raccoon and coco_mini")
    split = read_coco(Path(os.environ["DISTILLKIT_DATA"]) / name, "annotations/val.json")
    assert [str(p) for p in check_dataset(split) if p.fatal] == []
