"""Sets of masks: what is read, and what is said of everything that is wrong with them."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distillkit.data.coco_semantic import PANOPTIC, CocoSemantic
from distillkit.data.mask_check import check_masks
from distillkit.data.mask_scenes import LabelScenes, MaskScenes
from distillkit.data.mask_transforms import MaskAugment, MaskResize
from distillkit.data.problems import DataError
from distillkit.data.segmentation import VOC_MASK_CLASSES, VocMasks, collate_masks
from distillkit.data.trans10k import TransMasks
from distillkit.losses.segmentation import IGNORE
from tests.mask_folder import labels, masks_for, palette, picture_of, save, voc_folder


def told(build):
    """What DataError says when a set is built, or read."""
    with pytest.raises(DataError) as error:
        build()
    return error.value.problems


# ---- VOC's folders


def test_items(tmp_path):
    masks = voc_folder(tmp_path)
    data = VocMasks(tmp_path, "train", transform=MaskResize((6, 10)))
    assert (data.classes, data.keys, len(data)) == (["background", "cat", "dog"], ["a", "b", "c"], 3)
    image, target = data[0, 1]
    assert (image.dtype, image.shape) == (torch.float32, (3, 6, 10))
    assert 0 <= image.min() <= image.max() <= 1
    assert target["key"] == "b"
    assert target["mask"].dtype == torch.int64
    assert torch.equal(target["mask"], torch.from_numpy(masks["b"]).long())
    assert set(target) == {"key", "mask"}


def test_pictures_come_with_their_own_mask(tmp_path):
    """Every picture says its mask's labels in red, wherever the crop is."""
    voc_folder(tmp_path)
    data = VocMasks(tmp_path, "train", transform=MaskAugment(crop=(9, 9), scale=None, boundary=1))
    for epoch in range(5):
        for index in range(3):
            image, target = data[epoch, index]
            assert torch.equal((image[0] * 255).round().long(), target["mask"])
            assert target["boundary"].shape == (9, 9)


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path):
    voc_folder(tmp_path)

    def sample(seed, epoch, index, read_before=False):
        data = VocMasks(tmp_path, "train", transform=MaskAugment(8, color=0.3), seed=seed)
        if read_before:
            data[0, 0], data[3, 2]
        return data[epoch, index][0]

    assert torch.equal(sample(0, 1, 2), sample(0, 1, 2, read_before=True))
    assert not torch.equal(sample(0, 1, 2), sample(0, 2, 2))
    assert not torch.equal(sample(0, 1, 2), sample(1, 1, 2))


def test_classes_are_those_given_or_the_files_or_vocs(tmp_path):
    voc_folder(tmp_path)
    assert VocMasks(tmp_path, "train", ["sky", "road", "tree"]).classes == ["sky", "road", "tree"]
    (tmp_path / "image_labels.json").unlink()
    assert VocMasks(tmp_path, "train").classes == VOC_MASK_CLASSES
    assert len(VOC_MASK_CLASSES) == 21
    assert (VOC_MASK_CLASSES[0], VOC_MASK_CLASSES[20]) == ("background", "tvmonitor")


def test_pseudo_masks_from_another_folder(tmp_path):
    voc_folder(tmp_path / "set")
    other = masks_for("abc")["c"]
    for folder in (tmp_path / "elsewhere", tmp_path / "set" / "made"):
        for name in "abc":
            save(folder / f"{name}.png", other)
    for masks in (tmp_path / "elsewhere", "made"):
        data = VocMasks(tmp_path / "set", "train", masks=masks)
        assert torch.equal(data[0, 0][1]["mask"], torch.from_numpy(other).long())


def grey_png(path, values, depth):
    """A grey PNG with this many bits a pixel, which Pillow cannot write."""
    rows = b""
    for row in values:
        bits = "".join(format(value, f"0{depth}b") for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(png)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_levels_of_any_depth_are_labels_as_stored(tmp_path, depth):
    """Pillow gives 17 for a stored 1 of 4 bits: VOC's horse would become a sofa."""
    voc_folder(tmp_path, ["a"], classes=VOC_MASK_CLASSES)
    values = np.arange(240).reshape(12, 20) % min(2**depth, 21)
    grey_png(tmp_path / "SegmentationClass" / "a.png", values, depth)
    mask = VocMasks(tmp_path, "train")[0, 0][1]["mask"]
    assert torch.equal(mask, torch.from_numpy(values))


def test_all_that_is_wrong_with_a_list_is_told_at_once(tmp_path):
    voc_folder(tmp_path)
    path = tmp_path / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("a\nb\nb\nghost\n../c\n")
    (tmp_path / "SegmentationClass" / "a.png").unlink()
    text = "\n".join(map(str, told(lambda: VocMasks(tmp_path, "train"))))
    assert f"{path}: image b: this image is listed twice" in text
    assert f"{tmp_path / 'JPEGImages' / 'ghost.jpg'}: image ghost: no such file, nor with .jpeg, .png" in text
    assert f"{tmp_path / 'SegmentationClass' / 'ghost.png'}: image ghost: no such file" in text
    assert f"{tmp_path / 'SegmentationClass' / 'a.png'}: image a: no such file; copy it there, or take" in text
    assert "image '../c': the name leads out of the folder" in text


def test_lists_and_folders_that_are_not_there(tmp_path):
    voc_folder(tmp_path)
    (only,) = told(lambda: VocMasks(tmp_path, "trian"))
    assert str(only).startswith(f"{tmp_path / 'ImageSets/Segmentation/trian.txt'}: no such file")
    (only,) = told(lambda: VocMasks(tmp_path, "train", masks="made"))
    assert str(only) == f"{tmp_path / 'made'}: no such folder; correct the path; it is looked for below root"
    (tmp_path / "ImageSets" / "Segmentation" / "none.txt").write_text("\n")
    assert "the split is empty" in str(told(lambda: VocMasks(tmp_path, "none"))[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list, expected an object"),
        ('{"classes": 3}', '"classes" is 3, expected a list of names'),
        ('{"classes": ["a", "b", "a"]}', "named twice: a"),
        (json.dumps({"classes": [str(i) for i in range(256)]}), "256 classes, at most 255"),
    ],
)
def test_class_files_that_cannot_be_used(tmp_path, content, said):
    voc_folder(tmp_path)
    (tmp_path / "image_labels.json").write_text(content)
    assert any(said in str(problem) for problem in told(lambda: VocMasks(tmp_path, "train")))


def test_values_that_are_no_label_are_named_and_counted(tmp_path):
    masks = voc_folder(tmp_path)
    mask = masks["b"].copy()
    mask[0, :5], mask[1, 0], mask[2] = 3, 77, IGNORE
    palette(tmp_path / "SegmentationClass" / "b.png", mask)
    data = VocMasks(tmp_path, "train")
    (problem,) = told(lambda: data[0, 1])
    assert problem.file == str(tmp_path / "SegmentationClass" / "b.png")
    assert problem.what == "3 (5 pixels), 77 (1 pixels): no label, expected 0..2 (3 classes) or 255 (not labelled)"
    assert (data[0, 0][1]["mask"] < 3).all()


def test_sizes_that_differ_are_both_named(tmp_path):
    masks = voc_folder(tmp_path)
    palette(tmp_path / "SegmentationClass" / "b.png", masks["b"].T)
    (problem,) = told(lambda: VocMasks(tmp_path, "train")[0, 1])
    picture = tmp_path / "JPEGImages" / "b.png"
    assert problem.what == f"the mask is 12 x 20 pixels, its picture {picture} is 20 x 12"


def test_check_reads_every_file_and_tells_all_of_it(tmp_path):
    masks = voc_folder(tmp_path, ["fine", "small", "void", "broken", "colour", "wrong", "flat"])
    shapes = tmp_path / "SegmentationClass"
    palette(shapes / "small.png", masks["small"][:5])
    palette(shapes / "void.png", np.full((12, 20), IGNORE))
    palette(shapes / "flat.png", np.full((12, 20), 1))
    palette(shapes / "wrong.png", np.full((12, 20), 9))
    save(shapes / "colour.png", picture_of(masks["colour"]))
    for folder in ("JPEGImages", "SegmentationClass"):
        path = tmp_path / folder / "broken.png"
        path.write_bytes(path.read_bytes()[:40])
    data = VocMasks(tmp_path, "train", transform=MaskAugment(8, boundary=2, boundary_between="classes"))
    seen = []
    problems = check_masks(data, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 7) for i in range(1, 8)]
    by_file = {Path(p.file).parent.name + "/" + Path(p.file).stem: p for p in problems}
    assert len(problems) == len(by_file) == 7
    assert by_file["SegmentationClass/small"].fatal
    assert "9 (240 pixels)" in by_file["SegmentationClass/wrong"].what
    assert "a colour picture, expected one channel" in by_file["SegmentationClass/colour"].what
    assert "the picture cannot be decoded" in by_file["JPEGImages/broken"].what
    assert "the mask cannot be decoded" in by_file["SegmentationClass/broken"].what
    void, flat = by_file["SegmentationClass/void"], by_file["SegmentationClass/flat"]
    assert (void.fatal, void.what) == (False, "all pixels of its mask are ignored")
    assert (flat.fatal, flat.what) == (False, "its mask has no boundary (between classes)")
    data.transform = MaskResize(8)  # which asks for no boundary
    assert not any("flat" in p.file for p in check_masks(data))


def test_check_names_classes_that_no_picture_shows(tmp_path):
    voc_folder(tmp_path)
    labels(tmp_path, {}, ["background", "cat", "dog", "elk", "newt"])
    (problem,) = check_masks(VocMasks(tmp_path, "train"))
    assert problem.file.endswith("train.txt")
    assert not problem.fatal
    assert problem.what == "no picture shows 2 of 5 classes: elk, newt"


# ---- COCO's category ids


def coco_folder(root, masks, split="train"):
    for name, mask in masks.items():
        save(root / "images" / f"{name}.jpg", np.zeros((*mask.shape, 3)))
        palette(root / "semantic" / f"{name}.png", mask)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"semantic_{split}.txt").write_text("\n".join(masks))
    return root


IDS = np.array([[0, 0, 1, 3], [200, 3, 1, 255]], np.uint8)


def test_category_ids_become_labels(tmp_path):
    data = CocoSemantic(coco_folder(tmp_path, {"a": IDS}), "train")
    assert len(data.classes) == 133
    places = {id: label for label, id in enumerate(PANOPTIC)}
    assert data[0, 0][1]["mask"].tolist() == [
        [255, 255, places[1], places[3]],
        [places[200], places[3], places[1], 255],
    ]
    assert (data.classes[places[3]], data.category_ids[places[200]]) == ("car", 200)


@pytest.mark.parametrize(
    ("others", "classes", "labels"),
    [
        ("ignore", ["car", "person"], [[255, 255, 1, 0], [255, 0, 1, 255]]),
        ("background", ["background", "car", "person"], [[255, 255, 2, 1], [0, 1, 2, 255]]),
    ],
)
def test_other_ids_are_what_is_said(tmp_path, others, classes, labels):
    root = coco_folder(tmp_path, {"a": IDS})
    data = CocoSemantic(root, "train", categories={3: "car", 1: "person"}, others=others)
    assert data.classes == classes
    assert data.category_ids == [3, 1]
    assert data[0, 0][1]["mask"].tolist() == labels


def test_other_ids_are_an_error_where_nothing_is_said(tmp_path):
    root = coco_folder(tmp_path, {"a": IDS})
    entries = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    (root / "annotations" / "train.json").write_text(json.dumps({"categories": entries}))
    data = CocoSemantic(root, "train", categories="annotations/{split}.json")
    assert data.classes == ["person", "car"]
    (problem,) = told(lambda: data[0, 0])
    assert "200 (1 pixels): no label, expected the ids of 2 categories" in problem.what
    assert "others=" in problem.remedy


def test_every_mask_of_a_folder_where_there_is_no_list(tmp_path):
    root = coco_folder(tmp_path, {"b": IDS, "a": IDS})
    assert CocoSemantic(root, "x", names=None).keys == ["a", "b"]


@pytest.mark.parametrize(
    ("categories", "said"),
    [
        ("gone.json", "no such file"),
        ({0: "thing"}, "expected an id in 1..65535 and a name"),
        ({}, "none are there"),
        ({1: "a", 2: "a"}, "named twice: a"),
    ],
)
def test_categories_that_cannot_be_used(tmp_path, categories, said):
    root = coco_folder(tmp_path, {"a": IDS})
    assert any(said in str(p) for p in told(lambda: CocoSemantic(root, "train", categories=categories)))


# ---- Trans10K


def test_transparent_things_and_stuff(tmp_path):
    mask = np.array([[0, 1, 2, 255]] * 3, np.uint8)
    save(tmp_path / "train" / "images" / "7.jpg", np.zeros((3, 4, 3)))
    palette(tmp_path / "train" / "masks" / "7.png", mask)
    data = TransMasks(tmp_path, "train")
    assert (data.classes, data.keys) == (["background", "things", "stuff"], ["7"])
    assert torch.equal(data[0, 0][1]["mask"], torch.from_numpy(mask).long())


def test_trans10ks_own_folders_and_colours(tmp_path):
    colours = np.array([[[0, 0, 0], [255, 0, 0], [255, 255, 255], [85, 85, 85]]] * 3, np.uint8)
    for part in ("easy", "hard"):
        save(tmp_path / "test" / part / "images" / "1.jpg", np.zeros((3, 4, 3)))
        save(tmp_path / "test" / part / "masks" / "1_mask.png", colours)
    data = TransMasks(tmp_path, "test")
    assert data.keys == ["easy/1", "hard/1"]
    assert data[0, 1][1]["mask"].tolist() == [[0, 1, 2, 1]] * 3
    assert TransMasks(tmp_path, "test/hard").keys == ["1"]
    colours[0, 0] = (10, 20, 31)
    save(tmp_path / "test" / "hard" / "masks" / "1_mask.png", colours)
    (problem,) = told(lambda: data[0, 1])
    assert problem.what.startswith("61 (1 pixels): no label, expected colours with red + green + blue")


def test_pictures_and_masks_without_each_other(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "train" / "images" / f"{name}.jpg", np.zeros((3, 4, 3)))
    for name in ("b", "c"):
        palette(tmp_path / "train" / "masks" / f"{name}.png", np.zeros((3, 4)))
    (problem,) = told(lambda: TransMasks(tmp_path, "train"))
    assert problem.id == "image a"
    assert "it has no mask a.png or a_mask.png" in problem.what
    (tmp_path / "train" / "images" / "a.jpg").unlink()
    data = TransMasks(tmp_path, "train")
    assert data.keys == ["b"]
    (unused,) = data.problems
    assert (Path(unused.file).name, unused.fatal) == ("c.png", False)
    assert "no such folder" in str(told(lambda: TransMasks(tmp_path, "val"))[0])


# ---- scenes


def test_scenes_have_exact_masks():
    data = MaskScenes(4, 48, seed=3)
    assert (len(data), data.classes[:2], data.classes[-1], len(data.classes)) == (4, ["background", "0"], "9", 11)
    for index in range(4):
        scene = data.scenes.scene(index, 1)
        image, target = data[1, index]
        expected = torch.zeros(48, 48, dtype=torch.int64)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            expected[torch.from_numpy(mask)] = int(label) + 1
        assert torch.equal(target["mask"], expected)
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(scene.image).permute(2, 0, 1))
    assert not torch.equal(data[0, 0][0], data[1, 0][0])
    assert torch.equal(data[0, 0][0], MaskScenes(9, 48, seed=3)[0, 0][0])


def test_scenes_with_labels_alone():
    data = LabelScenes(5, 48, saliency=True, masks=True, split="val")
    assert data.classes == [str(digit) for digit in range(10)]
    for index in range(5):
        target = data[0, index][1]
        assert set((target["mask"].unique() - 1).tolist()) - {-1} == set(target["labels"].nonzero().flatten().tolist())
        assert torch.equal(target["saliency"][0] > 0, target["mask"] > 0)
        assert target["has_saliency"]
    assert set(LabelScenes(1, 48)[0, 0][1]) == {"key", "labels"}


def test_scenes_can_be_checked():
    assert [p.what[:15] for p in check_masks(MaskScenes(2, 48))] == ["no picture show"]
    assert check_masks(LabelScenes(40, 32, saliency=True, masks=True)) == []


# ---- batches


def test_batches(tmp_path):
    voc_folder(tmp_path)
    data = VocMasks(tmp_path, "train", transform=MaskAugment(8, boundary=1))
    items = [data[0, i] for i in range(3)]
    images, targets = collate_masks(items)
    assert images.shape == (3, 3, 8, 8)
    assert {name: tuple(t.shape) for name, t in targets.items()} == {"masks": (3, 8, 8), "boundary": (3, 8, 8)}
    assert torch.equal(targets["masks"][2], items[2][1]["mask"])
    data.transform = MaskAugment(8)
    assert set(collate_masks([data[0, 0]])[1]) == {"masks"}


def test_batches_of_several_sizes_are_refused(tmp_path):
    masks = voc_folder(tmp_path)
    palette(tmp_path / "SegmentationClass" / "b.png", masks["b"].T)
    save(tmp_path / "JPEGImages" / "b.png", picture_of(masks["b"].T))
    data = VocMasks(tmp_path, "train", transform=MaskResize(8))
    with pytest.raises(ValueError, match=r"masks: b is \(20, 12\), a \(12, 20\); a batch needs one size"):
        collate_masks([data[0, 0], data[0, 1]])


# ---- real sets


def real(name):
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip(f"set DISTILLKIT_DATA to the folder with {name}")
    return Path(os.environ["DISTILLKIT_DATA"]) / name


@pytest.mark.parametrize(
    ("kind", "name", "classes", "counts"),
    [
        (VocMasks, "coco_crops", 10, {"train": 633, "val": 155, "test": 201}),
        (VocMasks, "camvid", 11, {"train": 367, "val": 101, "test": 184}),
        (TransMasks, "trans_coco", 3, {"train": 26, "test": 6}),
        (CocoSemantic, "coco_mini", 133, {"train": 82, "val": 41, "test": 36}),
    ],
)
def test_real_sets_have_their_published_counts(kind, name, classes, counts):
    root = real(name)
    for split, number in counts.items():
        data = kind(root, split, transform=MaskAugment(32))
        assert (len(data), len(data.classes)) == (number, classes)
        assert data[0, number - 1][0].shape == (3, 32, 32)
    if name == "trans_coco":
        assert "no such folder" in str(told(lambda: TransMasks(root, "val"))[0])


@pytest.mark.parametrize(("name", "split"), [("camvid", "val"), ("coco_crops", "val")])
def test_real_sets_have_no_problem(name, split):
    assert check_masks(VocMasks(real(name), split)) == []


def test_camvids_labels_agree_with_what_its_file_says():
    """Without a background: label i is the i-th class, from 0."""
    root = real("camvid")
    data = VocMasks(root, "val")
    said = json.loads((root / "image_labels.json").read_text())["labels"]
    for index in range(0, len(data), 10):
        shown = set(np.unique(data.load(index).mask).tolist()) - {IGNORE}
        assert {data.classes[label] for label in shown} >= set(said[data.keys[index]])


def test_grey_jpegs_become_three_channels(tmp_path):
    voc_folder(tmp_path, ["a"])
    (tmp_path / "JPEGImages" / "a.png").unlink()
    Image.new("L", (20, 12), 50).save(tmp_path / "JPEGImages" / "a.jpg")
    image = VocMasks(tmp_path, "train")[0, 0][0]
    assert torch.allclose(image, torch.full((3, 12, 20), 50 / 255))
