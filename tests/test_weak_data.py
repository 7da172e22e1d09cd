"""Sets with image-level labels: labels and saliency maps found by name, and what is said where they are wrong."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from distillkit.data.mask_check import check_masks
from distillkit.data.mask_transforms import MaskAugment, MaskResize
from distillkit.data.problems import DataError, Problem
from distillkit.data.voc import VOC_CLASSES
from distillkit.data.weak import VocLabels, collate_labels, label_classes, shown_classes
from distillkit.losses.segmentation import IGNORE
from tests.mask_folder import labels, palette, picture_of, save, voc_folder

CLASSES = ["background", "cat", "dog"]
OF = {"b": ["dog"], "c": [], "a": ["dog", "cat"]}


def weak_folder(root, of=None, **options):
    masks = voc_folder(root, **options)
    labels(root, of or OF, CLASSES)
    return masks


def told(build) -> list[Problem]:
    with pytest.raises(DataError) as error:
        build()
    return error.value.problems


# ---- labels


def test_labels_are_found_by_name(tmp_path):
    """The JSON has another order than the list, and more names."""
    weak_folder(tmp_path, OF | {"elsewhere": ["cat"]})
    data = VocLabels(tmp_path, "train", transform=MaskResize(8))
    assert (data.classes, data.keys) == (["cat", "dog"], ["a", "b", "c"])
    for index, expected in enumerate([[1, 1], [0, 1], [0, 0]]):
        image, target = data[0, index]
        assert image.shape == (3, 8, 8)
        assert set(target) == {"key", "labels"}
        assert target["labels"].dtype == torch.float32
        assert target["labels"].tolist() == expected


def test_masks_are_there_for_evaluation_alone(tmp_path):
    masks = weak_folder(tmp_path)
    target = VocLabels(tmp_path, "train", masks="SegmentationClass", transform=MaskResize(8))[0, 0][1]
    assert torch.equal(target["mask"], torch.from_numpy(masks["a"]).long())
    for path in (tmp_path / "SegmentationClass").iterdir():
        path.unlink()
    assert "mask" not in VocLabels(tmp_path, "train")[0, 0][1]  # they are not needed


def test_labels_of_a_file_of_ones_own(tmp_path):
    weak_folder(tmp_path)
    labels(tmp_path, {"a": ["newt"], "b": [], "c": []}, ["background", "newt"], "mine.json")
    for file in ("mine.json", tmp_path / "mine.json"):
        data = VocLabels(tmp_path, "train", labels=file)
        assert (data.classes, data[0, 0][1]["labels"].tolist()) == (["newt"], [1])


def test_classes_given_in_another_order(tmp_path):
    weak_folder(tmp_path)
    data = VocLabels(tmp_path, "train", classes=["background", "dog", "cat", "newt"])
    assert data.classes == ["dog", "cat", "newt"]
    assert data[0, 1][1]["labels"].tolist() == [1, 0, 0]
    assert label_classes(tmp_path, None, None, []) == ["cat", "dog"]


def annotated(root, of):
    (root / "Annotations").mkdir(exist_ok=True)
    for name, objects in of.items():
        inside = "".join(f"<object><name>{o}</name><difficult>1</difficult></object>" for o in objects)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{inside}</annotation>")


def test_labels_of_vocs_xml_where_there_is_no_json(tmp_path):
    weak_folder(tmp_path)
    (tmp_path / "image_labels.json").unlink()
    annotated(tmp_path, {"a": ["cat", "dog", "cat"], "b": ["sheep"], "c": []})
    data = VocLabels(tmp_path, "train")
    assert data.classes == VOC_CLASSES
    shown = [[VOC_CLASSES[i] for i in data[0, index][1]["labels"].nonzero().flatten()] for index in range(3)]
    assert shown == [["cat", "dog"], ["sheep"], []]


def test_lists_of_main_where_there_is_no_other(tmp_path):
    weak_folder(tmp_path)
    (tmp_path / "ImageSets" / "Main").mkdir()
    (tmp_path / "ImageSets" / "Main" / "train_aug.txt").write_text("c\n")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("c\n")
    assert VocLabels(tmp_path, "train_aug").keys == ["c"]
    assert VocLabels(tmp_path, "train").keys == ["a", "b", "c"]


def test_labels_of_masks_only_where_they_are_asked_for(tmp_path):
    weak_folder(tmp_path)
    palette(tmp_path / "SegmentationClass" / "b.png", np.where(np.eye(12, 20), 1, IGNORE))
    data = VocLabels(tmp_path, "train", labels="masks")
    assert data[0, 1][1]["labels"].tolist() == [1, 0]  # the JSON says dog
    assert set(data[0, 1][1]) == {"key", "labels"}
    assert "mask" in VocLabels(tmp_path, "train", labels="masks", masks="SegmentationClass")[0, 1][1]


def test_shown_classes_leave_out_background_and_ignored():
    mask = np.array([[0, 0, 3], [IGNORE, 1, 0]], np.uint8)
    assert shown_classes(mask, 4).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("wanted", [{"masks": "SegmentationClass"}, {"labels": "masks"}])
def test_a_set_without_background_gives_labels_and_no_masks(tmp_path, wanted):
    """0 in its masks is sky: pseudo masks, where 0 is background, would be compared off by one."""
    voc_folder(tmp_path, classes=("sky", "road", "tree"))
    labels(tmp_path, {"a": ["sky"], "b": ["tree"], "c": []}, ["sky", "road", "tree"])
    data = VocLabels(tmp_path, "train")
    assert data.classes == ["sky", "road", "tree"]
    assert data[0, 1][1]["labels"].tolist() == [0, 0, 1]
    (problem,) = told(lambda: VocLabels(tmp_path, "train", **wanted))
    assert problem.what == "'sky' comes first, so that 0 in masks is 'sky'; activation maps need 0 = 'background'"


# ---- saliency


def test_saliency_stays_on_its_picture(tmp_path):
    """A picture's red is its mask; so is its saliency map here, times 50."""
    masks = weak_folder(tmp_path)
    for name, mask in masks.items():
        save(tmp_path / "saliency" / f"{name}.png", mask * 50)
    data = VocLabels(tmp_path, "train", saliency="saliency", transform=MaskAugment(crop=(9, 9), scale=None))
    for epoch in range(4):
        for index in range(3):
            image, target = data[epoch, index]
            assert target["has_saliency"] is True
            assert target["saliency"].shape == (1, 9, 9)
            assert torch.allclose(target["saliency"][0] * 2, (image[0] * 255).round())


def test_pictures_without_saliency_are_told_and_trained_without(tmp_path, caplog):
    masks = weak_folder(tmp_path)
    save(tmp_path / "saliency" / "b.png", masks["b"] * 50)
    with caplog.at_level(logging.WARNING, "distillkit.data"):
        data = VocLabels(tmp_path, "train", saliency=tmp_path / "saliency", transform=MaskResize(8))
    assert "a.png: image a: no saliency map of this picture" in caplog.text
    assert [(Path(p.file).name, p.fatal) for p in data.problems] == [("a.png", False), ("c.png", False)]
    assert "attention transfer" in data.problems[0].remedy
    images, targets = collate_labels([data[0, i] for i in range(3)])
    assert images.shape == (3, 3, 8, 8)
    assert targets["labels"].tolist() == [[1, 1], [0, 1], [0, 0]]
    assert targets["has_saliency"].tolist() == [False, True, False]
    assert targets["saliency"].shape == (3, 1, 8, 8)
    assert (targets["saliency"][[0, 2]] == 0).all()
    assert targets["saliency"][1].max() == pytest.approx(1)
    assert [p for p in check_masks(data) if "saliency" in p.what] == data.problems


def test_a_batch_without_any_saliency_still_says_so(tmp_path):
    masks = weak_folder(tmp_path)
    save(tmp_path / "saliency" / "b.png", masks["b"])
    data = VocLabels(tmp_path, "train", saliency="saliency", transform=MaskResize(8))
    _, targets = collate_labels([data[0, 0], data[0, 2]])
    assert targets["has_saliency"].tolist() == [False, False]
    assert set(collate_labels([VocLabels(tmp_path, "train")[0, 0]])[1]) == {"labels"}


def test_saliency_of_no_picture_is_an_error(tmp_path):
    weak_folder(tmp_path)
    (tmp_path / "saliency").mkdir()
    assert len(told(lambda: VocLabels(tmp_path, "train", saliency="saliency"))) == 3
    (only,) = told(lambda: VocLabels(tmp_path, "train", saliency="gone"))
    assert "no such folder" in str(only)


def test_saliency_of_another_size_names_both(tmp_path):
    masks = weak_folder(tmp_path)
    for name, mask in masks.items():
        save(tmp_path / "saliency" / f"{name}.png", mask if name == "a" else mask[:7])
    save(tmp_path / "saliency" / "c.png", picture_of(masks["c"]))
    data = VocLabels(tmp_path, "train", saliency="saliency")
    (size,) = told(lambda: data[0, 1])
    assert size.file == str(tmp_path / "saliency" / "b.png")
    assert "the saliency map is 20 x 7 pixels, its picture" in size.what
    assert size.what.endswith("is 20 x 12")
    (colour,) = told(lambda: data[0, 2])
    assert "a colour picture, expected one channel" in colour.what


# ---- what is wrong


def test_labels_that_are_wrong_are_told_at_once(tmp_path):
    weak_folder(tmp_path, {"a": ["cat", "newt"], "b": "dog"})
    text = "\n".join(map(str, told(lambda: VocLabels(tmp_path, "train"))))
    assert "image a: class 'newt' is unknown; known are cat, dog" in text
    assert "image b: its labels are dog, expected a list" in text
    assert "image c: it has no labels there" in text
    assert text.count(str(tmp_path / "image_labels.json")) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nonsense", "not JSON"),
        (json.dumps({"classes": CLASSES}), '"labels" is None, expected {NAME: [class, ...]}'),
        (json.dumps({"classes": [], "labels": OF}), '"classes" is [], expected a list of names'),
    ],
)
def test_files_of_labels_that_cannot_be_used(tmp_path, content, said):
    weak_folder(tmp_path)
    (tmp_path / "image_labels.json").write_text(content)
    assert any(said in str(problem) for problem in told(lambda: VocLabels(tmp_path, "train")))


def test_numpy_files_are_not_opened(tmp_path):
    weak_folder(tmp_path)
    np.save(tmp_path / "cls_labels.npy", {"a": np.ones(2)}, allow_pickle=True)
    problems = told(lambda: VocLabels(tmp_path, "train", labels="cls_labels.npy"))
    assert len(problems) == 1
    assert "can run code" in problems[0].what
    assert "write JSON" in problems[0].remedy


def test_neither_json_nor_xml(tmp_path):
    weak_folder(tmp_path)
    (tmp_path / "image_labels.json").unlink()
    (only,) = told(lambda: VocLabels(tmp_path, "train"))
    assert "Annotations: neither it nor" in str(only)
    assert "labels: masks" in only.remedy
    annotated(tmp_path, {"a": ["unicorn"], "b": []})
    text = "\n".join(map(str, told(lambda: VocLabels(tmp_path, "train"))))
    assert "a.xml: image a: class 'unicorn' is unknown" in text
    assert "c.xml: image c: no such file" in text


def test_check_tells_of_pictures_that_teach_nothing(tmp_path):
    masks = weak_folder(tmp_path)
    for name, mask in masks.items():
        save(tmp_path / "saliency" / f"{name}.png", mask * (name != "a"))
    problems = check_masks(VocLabels(tmp_path, "train", saliency="saliency"))
    assert [(Path(p.file).name, p.id, p.fatal) for p in problems] == [
        ("a.png", "image a", False),
        ("c.png", "image c", False),
    ]
    assert problems[0].what == "its saliency map is 0 all over"
    assert problems[1].what == "none of the 2 classes is among its labels"


# ---- real sets


def real(name):
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip(f"set DISTILLKIT_DATA to the folder with {name}")
    return Path(os.environ["DISTILLKIT_DATA"]) / name


def test_coco_crops_has_its_published_counts():
    counts = {
        "train": (633, [291, 89, 94, 103, 142, 202, 82, 38, 84]),
        "val": (155, [59, 15, 6, 56, 62, 78, 14, 11, 13]),
        "test": (201, [111, 20, 14, 30, 57, 56, 14, 14, 41]),
    }
    for split, (number, of_each) in counts.items():
        data = VocLabels(real("coco_crops"), split, masks="SegmentationClass")
        assert len(data) == number
        assert data.labels.sum(0).tolist() == of_each


def test_coco_crops_labels_are_classes_of_its_masks():
    """The labels say what covers 2 % of a crop; whatever they say, the mask shows."""
    said = VocLabels(real("coco_crops"), "val")
    shown = VocLabels(real("coco_crops"), "val", labels="masks")
    for index in range(0, len(said), 5):
        assert (said.load(index).labels <= shown.load(index).labels).all()
    assert check_masks(said) == []


def test_camvid_has_no_background():
    data = VocLabels(real("camvid"), "val")
    assert (len(data), len(data.classes), data.classes[0]) == (101, 11, "sky")
    assert data.labels.sum(0).max() == 101  # there is sky, road or the like everywhere
    assert "'sky' comes first" in told(lambda: VocLabels(real("camvid"), "val", masks="SegmentationClass"))[0].what
