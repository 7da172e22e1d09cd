"""Detection data: items, geometry of the transforms, order of samples."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from distillkit import plugins
from distillkit.data.coco import CocoDetection
from distillkit.data.problems import DataError
from distillkit.data.sampler import EpochSampler, collate, epoch_batches
from distillkit.data.transforms import Augment, Resize, cropped, fitted, generator_for, sample_of
from distillkit.data.voc import VocDetection
from distillkit.recipe import RecipeError, load
from distillkit.training.build import build_data, build_resize
from distillkit.training.predict import predict


def coco_folder(root: Path, pictures: int = 6) -> Path:
    """Pictures of 60 x 40 with a white rectangle each at a known place, one crowd, category ids with gaps."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(pictures):
        pixels = np.full((40, 60, 3), 20 * i, np.uint8)
        x, y, w, h = 5 + 3 * i, 4 + i, 20, 12
        pixels[y : y + h, x : x + w] = 255
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 60, "height": 40})
        annotations.append({"id": i + 1, "image_id": 100 + i, "category_id": (7, 3)[i % 2], "bbox": [x, y, w, h]})
    annotations.append({"id": 99, "image_id": 100, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    (root / "train.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


def white_box(image: torch.Tensor) -> list[int]:
    """The rectangle of white pixels, found in the picture itself."""
    rows, columns = (image.amin(0) > 0.99).nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def one_box(boxes: list[list[float]], height: int = 40, width: int = 60):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    return sample_of(image, torch.tensor(boxes).view(-1, 4), torch.arange(len(boxes)))


def test_coco_item(tmp_path):
    data = CocoDetection(coco_folder(tmp_path), "train.json")
    image, target = data[(0, 0)]
    assert data.classes == ["three", "seven"]
    assert data.category_ids == [3, 7]
    assert image.shape == (3, 40, 60)
    assert image.dtype == torch.float32
    assert target["boxes"].tolist() == [white_box(image)] == [[5, 4, 25, 16]]  # the crowd is no target
    assert target["labels"].tolist() == [1]
    assert (target["image_id"], target["size"], target["scale"]) == (100, (40, 60), (1, 1))


def test_crowds_stay_in_the_ground_truth(tmp_path):
    truth = CocoDetection(coco_folder(tmp_path), "train.json").to_coco_json()
    assert [a["iscrowd"] for a in truth["annotations"] if a["image_id"] == 100] == [0, 1]
    assert truth["annotations"][0]["area"] == 240
    assert CocoDetection(tmp_path, "train.json").usable_boxes == 6


def test_exif_rotation_is_not_applied(tmp_path):
    coco_folder(tmp_path)
    path = tmp_path / "images" / "0.png"
    picture = Image.open(path)
    exif = picture.getexif()
    exif[0x0112] = 6  # "turn right to show"
    picture.save(path, exif=exif)
    assert ImageOps.exif_transpose(Image.open(path)).size == (40, 60)
    assert CocoDetection(tmp_path, "train.json")[(0, 0)][0].shape == (3, 40, 60)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", [None, 0.7])
def test_boxes_move_with_the_pixels(tmp_path, flip, crop):
    """Oracle: the white rectangle itself, searched in the transformed picture."""
    data = CocoDetection(coco_folder(tmp_path), "train.json", transform=Augment(None, flip=flip, crop=crop))
    for epoch in range(4):
        for index in range(len(data)):
            image, target = data[(epoch, index)]
            if len(target["boxes"]):
                assert target["boxes"].tolist() == [white_box(image)]


def test_resized_boxes_follow_the_pixels(tmp_path):
    data = CocoDetection(coco_folder(tmp_path), "train.json", transform=Augment((80, 180), flip=0.5))
    image, target = data[(0, 3)]
    assert image.shape == (3, 80, 180)
    assert np.abs(target["boxes"].numpy() - white_box(image)).max() <= 1  # the border is blurred over a pixel


@pytest.mark.parametrize(
    ("picture", "bound", "keep", "pad", "expected"),
    [
        ((40, 60), (80, 90), False, False, (80, 90)),
        ((40, 60), (80, 90), True, False, (60, 90)),
        ((60, 40), (80, 90), True, False, (90, 60)),  # bounds of the long and the short side
        ((60, 40), (80, 90), True, True, (80, 53)),  # has to fit as it stands
        ((40, 60), (64, 64), True, True, (43, 64)),
    ],
)
def test_fitted_size(picture, bound, keep, pad, expected):
    assert fitted(picture, bound, keep, pad) == expected


def test_padding_is_right_and_below(tmp_path):
    data = CocoDetection(coco_folder(tmp_path), "train.json", transform=Resize(64, keep_ratio=True, pad=True))
    image, target = data[(0, 2)]
    assert image.shape == (3, 64, 64)
    assert image[:, 43:].abs().max() == 0
    assert image[:, 42].min() > 0
    assert target["scale"] == (64 / 60, 43 / 40)
    torch.testing.assert_close(
        target["boxes"] / torch.tensor([*target["scale"]] * 2), torch.tensor([[11.0, 6, 31, 18]])
    )


PADDED = """
data: {{kind: coco, root: {root}, train: train.json, val: train.json, size: 96, keep_ratio: true, pad: true}}
student: {{kind: custom, name: whole-picture}}
"""


def padded_recipe(folder: Path):
    root = coco_folder(folder / "coco")
    (folder / "r.yaml").write_text(PADDED.format(root=root))
    return load(folder / "r.yaml")


@pytest.mark.parametrize("augmented", [False, True])
def test_a_recipe_pads_in_training_and_evaluation_alike(tmp_path, augmented):
    image, target = build_data(padded_recipe(tmp_path), "train", augmented)[(0, 1)]
    assert image.shape == (3, 96, 96)
    assert image[:, :64].min() > 0  # 60 x 40 becomes 96 x 64
    assert image[:, 64:].max() == 0
    assert np.abs(target["boxes"].numpy() - white_box(image)).max() <= 2  # the border is blurred


class WholePicture(torch.nn.Module):
    """Finds one object, as big as what it is given."""

    def forward(self, images):
        boxes = [torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]]) for image in images]
        return [{"boxes": b, "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.int64)} for b in boxes]


def test_predicted_boxes_end_at_the_picture_not_at_the_padding(tmp_path, monkeypatch):
    monkeypatch.setitem(plugins._registered["model"], "whole-picture", lambda classes: WholePicture())
    recipe = padded_recipe(tmp_path)
    (row,) = predict(recipe, None, [tmp_path / "coco" / "images" / "0.png"], tmp_path / "found")
    assert row["bbox"] == pytest.approx([0, 0, 60, 40], abs=1e-4)
    assert build_resize(recipe.data) == Resize((96, 96), keep_ratio=True, pad=True)


def test_padding_a_stretched_picture_is_a_mistake(tmp_path):
    padded_recipe(tmp_path)
    with pytest.raises(RecipeError, match="pad: true needs keep_ratio: true"):
        load(tmp_path / "r.yaml", ["data.keep_ratio=false"])


def test_a_crop_cuts_boxes_and_drops_what_is_left_of_none():
    sample = one_box([[10, 10, 30, 30], [0, 0, 10.4, 10.4], [40, 30, 50, 35], [20.0, 20.0, 20.5, 20.5]])
    part = cropped(sample, 10, 10, 15, 20)
    assert part.boxes.tolist() == [[0, 0, 20, 15], [10, 10, 10.5, 10.5]]
    assert part.labels.tolist() == [0, 3]  # a box that the border does not touch stays, however small
    assert part.size == (15, 20)


def test_mosaic_is_made_of_parts_of_the_right_size():
    """Every picture is all one box of its own grey: where it ends up must be where its box says."""
    samples = []
    for grey in (50, 100, 150, 200):
        image = torch.full((3, 30, 70), grey, dtype=torch.uint8)
        samples.append(sample_of(image, torch.tensor([[0.0, 0, 70, 30]]), torch.tensor([grey])))
    image, target = Augment(64, flip=0.0, mosaic=1.0)(samples, generator_for(0, 0, 0))
    assert image.shape == (3, 64, 64)
    assert target["labels"].tolist() == [50, 100, 150, 200]
    seen = torch.zeros(64, 64)
    for box, label in zip(target["boxes"].int().tolist(), target["labels"].tolist()):
        x1, y1, x2, y2 = box
        assert (image[:, y1:y2, x1:x2] * 255).round().unique().tolist() == [label]
        seen[y1:y2, x1:x2] += 1
    assert seen.eq(1).all()


def test_mosaic_draws_its_own_picture_and_three_others(tmp_path):
    transform = Augment(64, mosaic=0.5)
    drawn = [transform.indices(4, 100, generator_for(0, 0, i)) for i in range(200)]
    assert {len(d) for d in drawn} == {1, 4}
    assert all(d[0] == 4 for d in drawn)
    assert 60 < sum(len(d) == 4 for d in drawn) < 140


def test_color_changes_pixels_and_no_box():
    sample = sample_of(
        (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8),
        torch.tensor([[1.0, 1, 5, 5]]),
        torch.tensor([0]),
    )
    plain, _ = Augment(None, flip=0.0)([sample], generator_for(0, 0, 0))
    changed, target = Augment(None, flip=0.0, color=0.5)([sample], generator_for(0, 0, 0))
    assert (plain - changed).abs().max() > 0.02
    assert target["boxes"].tolist() == [[1, 1, 5, 5]]


def test_multi_scale_stays_in_its_range(tmp_path):
    data = CocoDetection(coco_folder(tmp_path), "train.json", transform=Augment(100, multi_scale=(0.5, 1.5)))
    sides = {data[(epoch, 0)][0].shape[-1] for epoch in range(12)}
    assert len(sides) > 3
    assert all(50 <= s <= 150 for s in sides)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"flip": 1.5}, "flip"),
        ({"crop": 0.0}, "crop"),
        ({"multi_scale": (1.2, 0.8)}, "multi_scale"),
        ({"size": None, "mosaic": 0.5}, "mosaic"),
        ({"size": (0, 10)}, "size"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Augment(**{"size": 64, **options})


def batches_of(data, workers: int, start: int = 0, epoch: int = 1):
    order = epoch_batches(len(data), 2, seed=5, epoch=epoch, start=start)
    return list(DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=collate))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s["boxes"], t["boxes"]) and s["image_id"] == t["image_id"]
        for (xs, ss), (ys, ts) in zip(a, b)
        for x, y, s, t in zip(xs, ys, ss, ts, strict=True)
    )


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path):
    transform = Augment(48, crop=0.5, multi_scale=(0.7, 1.3), mosaic=0.5, color=0.3)
    data = CocoDetection(coco_folder(tmp_path), "train.json", transform=transform, seed=1)
    alone = batches_of(data, 0)
    torch.rand(7)  # the global state has no say
    assert same(alone, batches_of(data, 2))
    assert same(alone[1:], batches_of(data, 2, start=1))  # going on in mid-epoch
    assert not same(alone, batches_of(data, 0, epoch=2))
    other = CocoDetection(tmp_path, "train.json", transform=transform, seed=2)
    assert not same(alone, batches_of(other, 0))


def test_transforms_leave_the_global_state_alone(tmp_path):
    data = CocoDetection(coco_folder(tmp_path), "train.json", transform=Augment(48, crop=0.5, mosaic=1.0, color=0.3))
    before = torch.get_rng_state()
    data[(0, 0)]
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_is_a_permutation_and_starts_anywhere():
    whole = list(EpochSampler(11, seed=3, epoch=2))
    assert sorted(whole) == [(2, i) for i in range(11)]
    assert list(EpochSampler(11, seed=3, epoch=2, start=4)) == whole[4:]
    assert whole != [(2, i) for i in range(11)]
    assert [i for _, i in EpochSampler(11, seed=3, epoch=3)] != [i for _, i in whole]
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(("length", "world", "batch"), [(11, 2, 2), (12, 3, 2), (3, 4, 2), (2, 5, 1)])
def test_ranks_share_the_work_equally(length, world, batch):
    shares = [list(epoch_batches(length, batch, seed=1, rank=r, world=world)) for r in range(world)]
    assert len({tuple(len(b) for b in share) for share in shares}) == 1
    assert {i for share in shares for b in share for _, i in b} == set(range(length))
    single = list(epoch_batches(length, batch * world, seed=1))
    full = length // (batch * world)
    for i in range(full):
        assert sorted(k for share in shares for k in share[i]) == sorted(single[i])
    later = [list(epoch_batches(length, batch, seed=1, start=1, rank=r, world=world)) for r in range(world)]
    assert later == [share[1:] for share in shares]


def test_last_batch_may_be_dropped():
    assert [len(b) for b in epoch_batches(5, 2)] == [2, 2, 1]
    assert [len(b) for b in epoch_batches(5, 2, drop_last=True)] == [2, 2]
    assert [len(b) for b in epoch_batches(5, 8, drop_last=True)] == [5]


@pytest.mark.parametrize(
    ("options", "word"), [({"length": 0}, "length"), ({"rank": 2, "world": 2}, "rank"), ({"start": 6}, "start")]
)
def test_impossible_orders_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        EpochSampler(**{"length": 5, **options})


def voc_folder(root: Path) -> Path:
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(root / "JPEGImages" / "a.jpg")
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    box = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    person = f"<part><name>head</name>{box.format(2, 2, 3, 3)}</part>"
    (root / "Annotations/a.xml").write_text(
        "<annotation><filename>stale.jpg</filename><size><width>30</width><height>20</height></size>"
        f"<object><name>person</name>{person}<difficult>0</difficult>{box.format(1, 1, 10, 20)}</object>"
        f"<object><name>cat</name><difficult>1</difficult>{box.format(11, 5, 30, 8)}</object></annotation>"
    )
    return root


def test_voc_pixels_are_counted_from_one(tmp_path):
    data = VocDetection(voc_folder(tmp_path), "train")
    image, target = data[(0, 0)]
    assert image.shape == (3, 20, 30)
    assert target["boxes"].tolist() == [[0, 0, 10, 20]]  # the difficult one is no target
    assert data.classes[target["labels"][0]] == "person"
    boxes = [(a["bbox"], a["iscrowd"]) for a in data.to_coco_json()["annotations"]]
    assert boxes == [([0, 0, 10, 20], 0), ([10, 4, 20, 4], 1)]


def test_voc_own_classes(tmp_path):
    data = VocDetection(voc_folder(tmp_path), "train", classes=["cat", "person"])
    assert data.category_ids == [1, 2]
    assert data[(0, 0)][1]["labels"].tolist() == [1]


def real_data() -> Path:
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with bccd, raccoon and coco_mini")
    return Path(os.environ["DISTILLKIT_DATA"])


@pytest.mark.parametrize(
    ("name", "split", "images", "boxes", "classes"),
    [
        ("bccd", "val", 29, 408, 3),
        ("raccoon", "train", 94, 108, 1),
        ("coco_mini", "val", 85, 587, 80),
    ],
)
def test_real_sets_have_their_published_counts(name, split, images, boxes, classes):
    data = CocoDetection(real_data() / name, f"annotations/{split}.json", transform=Resize(128))
    assert (len(data), len(data.to_coco_json()["annotations"]), len(data.classes)) == (images, boxes, classes)
    image, target = data[(0, len(data) - 1)]
    assert image.shape == (3, 128, 128)
    assert target["boxes"].max() <= 128


def test_a_truncated_picture_is_named_when_it_is_read(tmp_path):
    coco_folder(tmp_path)
    path = tmp_path / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:-30])
    data = CocoDetection(tmp_path, "train.json")
    with pytest.raises(DataError, match=r"2\.png: image 102: the picture cannot be decoded"):
        data[(0, 2)]
    loader = DataLoader(data, batch_sampler=[[(0, 2)]], num_workers=1, collate_fn=collate)
    with pytest.raises(DataError, match="image 102"):
        list(loader)
