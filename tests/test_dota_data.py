"""Rotated data sets in files: DOTA's text, HRSC's XML, COCO's polygons; items, truth, and every mistake named."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from distillkit.boxes.rotated import corners
from distillkit.data import check as checking
from distillkit.data import detection, large
from distillkit.data.check import check_dataset
from distillkit.data.coco_rotated import CocoRotated, read_coco_rotated
from distillkit.data.dota import DOTA_CLASSES, DotaDetection, read_dota
from distillkit.data.hrsc import HrscDetection, read_hrsc
from distillkit.data.problems import DataError
from distillkit.data.sampler import collate, epoch_batches
from distillkit.data.transforms import Augment, Resize

CLASSES = ["plane", "ship"]
HEADER = "imagesource:GoogleEarth\ngsd:0.146\n"
SQUARE = "10 5 20 5 20 15 10 15"
DIAMOND = "30 10 40 20 30 30 20 20"


def dota(root: Path, labels: dict[str, str], split: str = "train") -> Path:
    """Pictures of 60 x 40, one for each label text."""
    for folder in ("images", "labelTxt"):
        (root / split / folder).mkdir(parents=True, exist_ok=True)
    for i, (stem, text) in enumerate(labels.items()):
        Image.new("RGB", (60, 40), (40 * i, 9, 9)).save(root / split / "images" / f"{stem}.png")
        (root / split / "labelTxt" / f"{stem}.txt").write_text(text)
    return root


def found(root: Path, **options) -> list[str]:
    return [str(p) for p in check_dataset(read_dota(root, "train", **{"classes": CLASSES, **options}))]


def test_dota_items_and_truth(tmp_path):
    text = f"{HEADER}{SQUARE} plane 0\n\n{DIAMOND} ship 1\n{DIAMOND} ship\n"
    data = DotaDetection(dota(tmp_path, {"b": "", "a": text}), "train", CLASSES)
    assert found(tmp_path) == []
    image, target = data[(0, 0)]
    assert (image.shape, image.dtype) == ((3, 40, 60), torch.float32)
    assert target["labels"].tolist() == [0, 1]  # the difficult one is no target
    assert target["boxes"].dtype == torch.float32
    torch.testing.assert_close(target["boxes"][0], torch.tensor([15.0, 10, 10, 10, 0]))
    torch.testing.assert_close(target["boxes"][1, :4], torch.tensor([30, 20, *[200**0.5] * 2]))
    assert (target["image_id"], target["size"], target["scale"]) == (1, (40, 60), (1, 1))
    assert (data[(0, 1)][1]["boxes"].shape, data.records[1].path.stem) == ((0, 5), "b")
    assert (data.classes, data.category_ids, data.usable_boxes) == (CLASSES, [1, 2], 2)
    truth = data.truth()
    assert [t["image_id"] for t in truth] == [1, 2]
    assert truth[0]["difficult"].tolist() == [False, True, False]
    assert truth[0]["labels"].tolist() == [0, 1, 1]
    assert (truth[0]["boxes"].dtype, truth[1]["boxes"].shape) == (torch.float64, (0, 5))
    assert truth[0]["boxes"][1].tolist() == truth[0]["boxes"][2].tolist()


def test_difficult_objects_may_be_taught_and_empty_pictures_left_out(tmp_path):
    root = dota(tmp_path, {"a": f"{SQUARE} plane 1\n", "b": f"{SQUARE} ship 2\n{DIAMOND} ship 0\n", "c": ""})
    plain = DotaDetection(root, "train", CLASSES)
    taught = DotaDetection(root, "train", CLASSES, teach_difficult=True)
    assert [len(plain[(0, i)][1]["labels"]) for i in range(3)] == [0, 1, 0]
    assert [len(taught[(0, i)][1]["labels"]) for i in range(3)] == [1, 2, 0]
    assert [r.path.stem for r in DotaDetection(root, "train", CLASSES, skip_empty=True).records] == ["b"]
    both = DotaDetection(root, "train", CLASSES, teach_difficult=True, skip_empty=True)
    assert [r.path.stem for r in both.records] == ["a", "b"]
    assert [t["difficult"].tolist() for t in taught.truth()] == [[True], [True, False], []]


def test_class_lists_of_the_versions():
    assert [len(DOTA_CLASSES[v]) for v in ("v1.0", "v1.5", "v2.0")] == [15, 16, 18]
    assert DOTA_CLASSES["v2.0"][15:] == ("container-crane", "airport", "helipad")
    with pytest.raises(ValueError, match=r"classes: expected one of v1\.0, v1\.5, v2\.0, or a list of names; got 'v3'"):
        read_dota("nowhere", "train", "v3")


@pytest.mark.parametrize(
    "place", ["labelTxt-v1.5/DOTA-v1.5_train", "labelTxt-v1.5/labelTxt", "labelTxt-v1.5", "labelTxt"]
)
def test_labels_of_a_version_are_found_where_dota_unpacks_them(tmp_path, place):
    root = dota(tmp_path, {"P0001": f"{SQUARE} plane 0\n"})
    (root / "train" / place).mkdir(parents=True, exist_ok=True)
    (root / "train" / place / "P0001.txt").write_text(f"{SQUARE} container-crane 0\n")
    split = read_dota(root, "train", "v1.5")
    assert split.records[0].labels.tolist() == [15]
    assert split.problems == []
    if place != "labelTxt":
        assert read_dota(root, "train", "v1.0").records[0].labels.tolist() == [0]


FATAL = {
    "7 coordinates": ("10 5 20 5 20 15 10 plane 0", r"line 3: 7 coordinates stand before 'plane 0'; write eight"),
    "nothing behind": ("10 5 20 5", r"line 3: 4 coordinates stand before 'the end'"),
    "no class": (SQUARE, r"line 3: 8 words, expected 9 or 10"),
    "unknown class": (f"{SQUARE} shipp 0", r"line 3: class 'shipp' is unknown \(did you mean 'ship'\?\)"),
    "far class": (f"{SQUARE} Xylophone 0", r"line 3: class 'Xylophone' is unknown \(known are plane, ship\)"),
    "9 coordinates": (f"{SQUARE} 15 plane", r"line 3: class '15' is unknown"),
    "two words": (f"{SQUARE} big ship 0", r"line 3: 11 words, expected 9 or 10"),
    "flag": (f"{SQUARE} ship 3", r"line 3: the difficult flag is '3'; write 0, 1 or 2"),
    "not a number": ("x 5 20 5 20 15 10 15 ship 0", r"line 3: 0 coordinates stand before 'x 5 20"),
    "NaN": ("nan 5 20 5 20 15 10 15 ship 0", r"line 3: quad \[nan 5 20 .* is not finite"),
    "infinite": ("10 5 20 inf 20 15 10 15 ship 0", r"line 3: quad .* is not finite"),
}


@pytest.mark.parametrize("case", FATAL)
def test_bad_lines_are_named_and_raised(case, tmp_path):
    line, words = FATAL[case]
    dota(tmp_path, {"a": f"{HEADER}{line}\n{DIAMOND} ship 0\n"})
    (problem,) = found(tmp_path)
    assert re.search(r"labelTxt/a\.txt: " + words, problem)
    with pytest.raises(DataError) as raised:
        DotaDetection(tmp_path, "train", CLASSES)
    assert problem in str(raised.value)


LEFT_OUT = {
    "crossing": ("10 5 20 15 20 5 10 15", r"line 3: quad \[10 5 20 15 20 5 10 15\] crosses itself"),
    "no area": ("10 5 20 15 30 25 20 15", r"line 3: quad .* has no area"),
    "a point": ("10 5 10 5 10 5 10 5", r"line 3: quad .* has no area"),
    "outside": ("61 5 70 5 70 15 61 15", r"line 3: quad .* lies outside the picture of 60 x 40"),
    "outside at a corner": ("55 46 66 35 70 50 60 50", r"line 3: quad .* lies outside the picture of 60 x 40"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_objects_that_teach_nothing_are_warned_of_and_stay_in_the_truth(case, tmp_path, caplog):
    quad, words = LEFT_OUT[case]
    dota(tmp_path, {"a": f"{HEADER}{quad} ship 0\n{DIAMOND} ship 0\n"})
    (problem,) = found(tmp_path)
    assert re.search(r"a\.txt: " + words + r".*; it is left out of training", problem)
    data = DotaDetection(tmp_path, "train", CLASSES)
    assert caplog.messages == [problem]
    assert (len(data[(0, 0)][1]["boxes"]), data.usable_boxes, len(data.truth()[0]["boxes"])) == (1, 1, 2)


def test_a_box_that_reaches_over_the_border_is_no_problem(tmp_path):
    dota(tmp_path, {"a": "50 5 70 5 70 15 50 15 ship 0\n-5 20 5 10 15 20 5 30 ship 0\n10 5 20 5 20 5 10 15 ship 0\n"})
    assert found(tmp_path) == []
    assert DotaDetection(tmp_path, "train", CLASSES).usable_boxes == 3


def test_all_mistakes_of_a_folder_are_listed_at_once(tmp_path):
    root = dota(tmp_path, {"a": "1 2 3\n", "b": f"{SQUARE} ship 7\n{SQUARE} boat 0\n", "c": f"{SQUARE} ship 0\n"})
    (root / "train/images/d.png").write_bytes((root / "train/images/a.png").read_bytes())
    (root / "train/labelTxt/e.txt").write_text("")
    (root / "train/images/c.jpg").write_bytes(b"")
    (root / "train/images/f.png").write_text("no picture")
    (root / "train/labelTxt/f.txt").write_bytes(b"\xff\xfe\x00")
    (root / "train/labelTxt/g.txt").write_bytes(b"\xff\xfe\x00")
    Image.new("RGB", (60, 40)).save(root / "train/images/g.png")
    lines = found(tmp_path)
    for words in (
        r"a\.txt: line 1: 3 coordinates",
        r"b\.txt: line 1: the difficult flag is '7'",
        r"b\.txt: line 2: class 'boat'",
        r"images: image c: there are two pictures of this name, c\.jpg and c\.png",
        r"d\.txt: no such file, but there is a picture d\.png; add its labels \(an empty file",
        r"e\.txt: there is no picture of this name",
        r"f\.png: the picture cannot be decoded",
        r"g\.txt: cannot be read",
    ):
        assert sum(bool(re.search(words, line)) for line in lines) == 1, words
    assert len(lines) == 8


def test_labels_of_a_version_that_are_packed_still_are_no_others(tmp_path):
    root = dota(tmp_path, {"a": f"{SQUARE} ship 0\n"})
    (root / "train" / "labelTxt-v1.5").mkdir()
    (root / "train" / "labelTxt-v1.5" / "DOTA-v1.5_train.zip").write_bytes(b"")
    problem, *_ = read_dota(root, "train", "v1.5").problems
    assert problem.fatal
    assert "labelTxt-v1.5: there is no label file (.txt) in it" in str(problem)
    assert not read_dota(root, "train", "v1.0").problems


def test_missing_folders_and_empty_splits_are_named(tmp_path):
    assert re.search("train/images: no such folder", found(tmp_path)[0])
    (tmp_path / "train/images").mkdir(parents=True)
    assert any("the split is empty" in line for line in found(tmp_path))
    assert any("labelTxt: no such folder" in line for line in found(tmp_path))
    (line,) = found(dota(tmp_path, {"a": HEADER}))
    assert "no image has an object" in line


def test_a_split_without_labels(tmp_path):
    root = dota(tmp_path, {"a": "", "b": ""})
    for path in [*(root / "train/labelTxt").iterdir()]:
        path.unlink()
    (root / "train/labelTxt").rmdir()
    assert found(tmp_path, labelled=False) == []
    assert [len(r.quads) for r in read_dota(root, "train", CLASSES, labelled=False).records] == [0, 0]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), "the picture cannot be decoded"),
        (lambda p: Image.new("RGB", (20, 30)).save(p), "the picture is 20 x 30 pixels, the annotations say 60 x 40"),
        (lambda p: p.unlink(), "no such file"),
    ],
)
def test_a_picture_that_breaks_after_its_header_was_read_is_found(break_it, words, tmp_path):
    split = read_dota(dota(tmp_path, {"a": "", "b": ""}), "train", CLASSES)
    data = DotaDetection(tmp_path, "train", CLASSES)
    break_it(tmp_path / "train/images/b.png")
    problems = [p for p in check_dataset(split) if p.fatal]
    assert [(p.file, p.id) for p in problems] == [(str(tmp_path / "train/images/b.png"), "image 2")]
    assert words in problems[0].what
    with pytest.raises(DataError, match=r"b\.png: image 2"):
        data[(0, 1)]


def test_a_picture_that_is_too_large_to_be_read_whole_is_checked_in_parts(tmp_path, monkeypatch):
    pytest.importorskip("pyvips")
    split = read_dota(dota(tmp_path, {"a": ""}), "train", CLASSES)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for module in (checking, large):
        monkeypatch.setattr(module, "SMALL", 500)
    monkeypatch.setattr(large, "_PillowWindows", None)  # nothing decodes it whole
    assert [p for p in check_dataset(split) if p.fatal] == []
    with pytest.raises(DataError, match=r"too large to be read whole .* cut it into tiles \(distillkit tile\)"):
        detection.read_picture(split.records[0])


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path):
    labels = {f"{i}": f"{SQUARE} plane 0\n{DIAMOND} ship 0\n" for i in range(6)}
    transform = Augment(
        48, flip=0.25, flip_vertical=0.25, flip_diagonal=0.25, crop=0.5, multi_scale=(0.7, 1.3), mosaic=0.5, color=0.3
    )
    data = DotaDetection(dota(tmp_path, labels), "train", CLASSES, transform, seed=1)
    order = list(epoch_batches(6, 2, seed=5, epoch=1))
    alone = [collate([data[key] for key in batch]) for batch in order]
    torch.rand(7)  # the global state has no say
    loader = DataLoader(data, batch_sampler=order[1:], num_workers=2, collate_fn=collate)
    for (xs, ss), (ys, ts) in zip(alone[1:], loader, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
        assert all(torch.equal(s["boxes"], t["boxes"]) for s, t in zip(ss, ts, strict=True))
    assert not torch.equal(data[(1, 0)][0], data[(2, 0)][0])


@pytest.mark.parametrize(
    ("name", "classes", "counts"),
    [
        ("hit_uav", ["car", "bicycle", "person", "other-vehicle"], {"train": (260, 2051, 94), "val": (60, 450, 7)}),
        ("icdar15", ["text"], {"train": (175, 1198, 461), "test": (64, 531, 258)}),
    ],
)
def test_real_sets_have_their_published_counts_and_no_problem(name, classes, counts):
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with hit_uav and icdar15")
    for split, (pictures, objects, difficult) in counts.items():
        data = DotaDetection(Path(os.environ["DISTILLKIT_DATA"]) / name, split, classes, Resize(128))
        truth = data.truth()
        assert len(data) == pictures
        assert sum(len(t["labels"]) for t in truth) == objects
        assert sum(int(t["difficult"].sum()) for t in truth) == difficult
        assert read_dota(Path(os.environ["DISTILLKIT_DATA"]) / name, split, classes).problems == []
        assert data[(0, 0)][0].shape == (3, 128, 128)


def test_hit_uavs_rectangles_come_back_as_they_are():
    """Its labels are corners of rectangles, to one decimal: the box around them must have those corners again."""
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with hit_uav")
    classes = ["car", "bicycle", "person", "other-vehicle"]
    data = DotaDetection(Path(os.environ["DISTILLKIT_DATA"]) / "hit_uav", "val", classes)
    for record, truth in zip(data.records, data.truth(), strict=True):
        between = torch.cdist(corners(truth["boxes"]), torch.from_numpy(record.quads))
        assert between.amin(2).max() < 0.3


HRSC = """<HRSC_Image><Img_FileName>{stem}</Img_FileName><Img_FileFmt>bmp</Img_FileFmt>
<Img_SizeWidth>60</Img_SizeWidth><HRSC_Objects>{objects}</HRSC_Objects></HRSC_Image>"""
SHIP = """<HRSC_Object><Class_ID>100000013</Class_ID><difficult>{difficult}</difficult>
<box_xmin>1</box_xmin><mbox_cx>{cx}</mbox_cx><mbox_cy>20</mbox_cy><mbox_w>30</mbox_w><mbox_h>8</mbox_h>
<mbox_ang>{angle}</mbox_ang></HRSC_Object>"""


def hrsc(root: Path, objects: str, stems: str = "a\n") -> Path:
    for folder in ("ImageSets", "FullDataSet/AllImages", "FullDataSet/Annotations"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/trainval.txt").write_text(stems)
    Image.new("RGB", (60, 40)).save(root / "FullDataSet/AllImages/a.bmp")
    (root / "FullDataSet/Annotations/a.xml").write_text(HRSC.format(stem="a", objects=objects))
    return root


def test_hrsc_items(tmp_path):
    ships = SHIP.format(cx=30, angle=-0.5, difficult=0) + SHIP.format(cx=25, angle=1.2, difficult=1)
    data = HrscDetection(hrsc(tmp_path, ships), "trainval")
    assert list(check_dataset(read_hrsc(tmp_path, "trainval"))) == []
    image, target = data[(0, 0)]
    assert image.shape == (3, 40, 60)
    torch.testing.assert_close(target["boxes"], torch.tensor([[30, 20, 30, 8, -0.5]]))
    assert data.classes == ["ship"]
    assert data.truth()[0]["difficult"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"objects": SHIP.format(cx="wide", angle=0, difficult=0)}, r"a\.xml: object 1: mbox_cx, .* are \[None, 20\.0"),
        ({"objects": SHIP.format(cx=30, angle="nan", difficult=0)}, r"a\.xml: object 1: quad .* is not finite"),
        ({"objects": "<HRSC_Object>"}, r"a\.xml: image a: line 2: not XML"),
        ({"objects": "", "stems": "a\nb\n"}, r"b\.xml: image b: no such file"),
        ({"objects": "", "stems": "a\na\n"}, r"trainval\.txt: image a: this image is listed twice"),
    ],
)
def test_broken_hrsc_is_named(arguments, words, tmp_path):
    (problem,) = check_dataset(read_hrsc(hrsc(tmp_path, **arguments), "trainval"))
    assert re.search(words, str(problem))
    with pytest.raises(DataError, match=words):
        HrscDetection(tmp_path, "trainval")


def test_hrsc_odd_ships_lists_and_pictures(tmp_path):
    hrsc(tmp_path, SHIP.format(cx=300, angle=0, difficult=0))
    (problem,) = read_hrsc(tmp_path, "trainval").problems
    assert "object 1: quad [285 16 315 16 315 24 285 24] lies outside the picture of 60 x 40" in str(problem)
    (problem,) = read_hrsc(tmp_path, "test").problems
    assert re.search(r"test\.txt: no such file; correct root, or name a list in ImageSets$", str(problem))
    (tmp_path / "FullDataSet/AllImages/a.bmp").write_text("nothing")
    assert any("a.bmp: the picture cannot be decoded" in str(p) for p in read_hrsc(tmp_path, "trainval").problems)
    (tmp_path / "FullDataSet/AllImages/a.bmp").unlink()
    assert any("a.bmp: image 1: no such file" in str(p) for p in read_hrsc(tmp_path, "trainval").problems)


def coco(root: Path, *annotations: dict) -> Path:
    (root / "images").mkdir(exist_ok=True)
    Image.new("RGB", (60, 40)).save(root / "images/1.png")
    content = {
        "images": [{"id": 7, "file_name": "1.png", "width": 60, "height": 40}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 5, **a} for i, a in enumerate(annotations, 1)],
        "categories": [{"id": 9, "name": "b"}, {"id": 5, "name": "a"}],
    }
    (root / "train.json").write_text(json.dumps(content))
    return root


def test_coco_polygons_become_smallest_boxes(tmp_path):
    turned = corners(torch.tensor([[30.0, 20, 24, 10, 0.6]]).double())[0]
    middle = (turned[0] + turned[1]) / 2
    five = torch.cat([turned[:1], middle[None], turned[1:]])  # a point more on a side, and one inside
    parts = [five[[0, 1, 4]].flatten().tolist(), five[[1, 2, 3]].flatten().tolist()]
    root = coco(
        tmp_path,
        {"segmentation": [turned.flatten().tolist()]},
        {"segmentation": [five.flatten().tolist()]},
        {"segmentation": parts, "category_id": 9},
        {"segmentation": {"counts": "x", "size": [40, 60]}, "iscrowd": 1, "bbox": [5, 6, 10, 20]},
    )
    data = CocoRotated(root, "train.json")
    _, target = data[(0, 0)]
    assert target["labels"].tolist() == [0, 0, 1]
    assert (data.classes, data.category_ids, target["image_id"]) == (["a", "b"], [5, 9], 7)
    for found_, expected in zip(corners(target["boxes"]), [turned] * 3, strict=True):
        assert torch.cdist(found_.double(), expected).amin(1).max() < 1e-4
    truth = data.truth()[0]
    assert truth["difficult"].tolist() == [False, False, False, True]
    assert truth["boxes"][3].tolist() == [10, 16, 10, 20, 0]
    assert list(check_dataset(read_coco_rotated(root, "train.json"))) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segmentation": {"counts": [1, 2], "size": [40, 60]}}, r"segmentation is a run-length mask \(RLE\)"),
        ({"bbox": [1, 2, 3, 4]}, "there is no segmentation; write a list of polygons, or read the file as a set of up"),
        ({"segmentation": []}, "there is no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "segmentation has a polygon that is no list of three or more points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "segmentation has a polygon that is no list of three or more"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "segmentation .* is not finite"),
        ({"segmentation": [["x"] * 6]}, "segmentation has a polygon"),
        ({"segmentation": [[1, 2, 3, 9, 5, 6]], "category_id": 4}, "category 4 is unknown"),
        ({"segmentation": [[1, 2, 3, 9, 5, 6]], "image_id": 4}, "belongs to image 4, which is not listed"),
        ({"iscrowd": 1}, "it is a crowd, and bbox is None"),
    ],
)
def test_broken_polygons_are_named(changes, words, tmp_path):
    (problem,) = read_coco_rotated(coco(tmp_path, changes), "train.json").problems
    assert re.search(rf"train\.json: annotation 1: {words}", str(problem))
    assert problem.fatal


def test_odd_polygons_are_warned_of(tmp_path):
    line = {"segmentation": [[1, 2, 3, 4, 5, 6]]}
    bow = {"segmentation": [[1, 2, 11, 12, 11, 2, 1, 12]]}
    away = {"segmentation": [[100, 2, 110, 2, 110, 12]]}
    problems = read_coco_rotated(coco(tmp_path, line, bow, away), "train.json").problems
    assert [p.what.split("] ")[1][:12] for p in problems] == ["has no area", "crosses itse", "lies outside"]
    assert not any(p.fatal for p in problems)
    assert math.isfinite(CocoRotated(tmp_path, "train.json").truth()[0]["boxes"].sum())
