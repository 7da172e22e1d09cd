"""The embedded scenes: exact truth, nothing shared between splits, the same scene everywhere."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distillkit.data import scenes as module
from distillkit.data.sampler import collate, epoch_batches
from distillkit.data.scenes import BRIGHTNESS, SPLITS, Scenes
from distillkit.data.transforms import Augment, Resize


def some(split: str = "train", n: int = 40, **options):
    data = Scenes(n, split=split, **options)
    return [data.scene(i) for i in range(n)]


def test_boxes_are_tight_around_the_masks():
    for scene in some():
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_rotated_boxes_hold_every_pixel_and_no_more():
    """Oracle: move every pixel's four corners into the box's frame; all lie inside and every side is touched."""
    for scene in some():
        for (cx, cy, w, h, angle), mask in zip(scene.rotated_boxes.astype(np.float64), scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            x = np.concatenate([columns, columns + 1, columns, columns + 1]) - cx
            y = np.concatenate([rows, rows, rows + 1, rows + 1]) - cy
            turn = complex(math.cos(-angle), math.sin(-angle))
            inside = (x + 1j * y) * turn
            for values, side in ((inside.real, w), (inside.imag, h)):
                assert values.min() == pytest.approx(-side / 2, abs=1e-4)
                assert values.max() == pytest.approx(side / 2, abs=1e-4)
            assert abs(angle) <= module.TURN


def test_angle_is_the_digits_own_and_clockwise():
    """A one, as a bar: its main axis in the mask must lie along the box's long side."""
    checked = 0
    for scene in some(n=250):
        for (_, _, w, h, angle), mask, label in zip(scene.rotated_boxes, scene.masks, scene.labels, strict=True):
            if label != 1 or h < 2.2 * w:
                continue
            rows, columns = np.nonzero(mask)
            values, axes = np.linalg.eigh(np.cov(columns, rows))
            x, y = axes[:, values.argmax()]
            down = (-math.sin(angle), math.cos(angle))  # the side h in image coordinates
            assert abs(x * down[0] + y * down[1]) > math.cos(math.radians(15))
            checked += abs(angle) > math.radians(10)  # turned the wrong way it would be off by more than 15
    assert checked > 3


def test_masks_do_not_overlap_and_boxes_hardly():
    for scene in some():
        assert scene.masks.sum(0).max() <= 1
        for i, a in enumerate(scene.boxes):
            for b in scene.boxes[:i]:
                side = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
                areas = np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])
                assert side.min() <= 0 or side.prod() <= module.OVERLAP * min(areas)


def test_digits_stand_out():
    """Mean brightness inside a mask against a rim of 3 pixels around it."""
    contrasts = []
    for scene in some():
        bright = scene.image / 255 @ BRIGHTNESS
        drawn = scene.masks.any(0)
        for mask in scene.masks:
            grown = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), 9, 1, 4)[0].numpy() > 0
            rim = grown & ~drawn
            contrasts.append(abs(bright[mask].mean() - bright[rim].mean()))
    assert np.median(contrasts) > 0.25
    assert np.quantile(contrasts, 0.05) > 0.1


def test_number_of_digits_and_labels():
    counts = [len(s.labels) for s in some(n=100)]
    assert set(counts) <= set(range(1, 7))
    assert np.mean(counts) > 2.5
    assert all(len(s.labels) <= 2 for s in some(digits=(0, 2)))
    seen = np.concatenate([s.labels for s in some(n=100)])
    assert set(seen) == set(range(10))
    scene = some(n=1)[0]
    assert set(np.flatnonzero(scene.image_labels)) == set(scene.labels)


def test_splits_share_no_digit_and_no_column():
    digits = [set(pool) for pool, _ in SPLITS.values()]
    assert sum(map(len, digits)) == len(set.union(*digits)) == 1797
    columns = sorted(columns for _, columns in SPLITS.values())
    assert all(left[1] <= right[0] for left, right in pairwise(columns))


@pytest.mark.parametrize("split", list(SPLITS))
def test_crops_stay_in_the_columns_of_their_split(split, monkeypatch):
    parts = []

    class Recorder:
        def __init__(self, picture):
            self.picture, self.width, self.height = picture, picture.width, picture.height

        def resize(self, size, resample, box):
            parts.append((box[0] / self.width, box[2] / self.width))
            return self.picture.resize(size, resample, box=box)

    recorders = [Recorder(p) for p in module._photographs()]
    monkeypatch.setattr(module, "_photographs", lambda: recorders)
    some(split)
    left, right = SPLITS[split][1]
    assert len(parts) == 40
    assert all(left - 1e-9 <= a < b <= right + 1e-9 for a, b in parts)


def test_every_digit_can_be_drawn_at_the_smallest_size():
    glyphs, labels = module._glyphs()
    assert len(glyphs) == len(labels) == 1797
    for glyph in glyphs:
        assert (module._turned(glyph, 32 * module.SIDES[0], 0.5) >= 0.5).any()


def test_same_scene_with_any_workers_and_from_the_middle():
    data = Scenes(12, 64, seed=4, transform=Augment(64, mosaic=0.5, color=0.2))
    order = list(epoch_batches(12, 4, seed=4, epoch=3))
    alone = [collate([data[key] for key in batch]) for batch in order]
    loader = DataLoader(data, batch_sampler=order[1:], num_workers=2, collate_fn=collate)
    for (xs, ss), (ys, ts) in zip(alone[1:], loader, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
        assert all(torch.equal(s["boxes"], t["boxes"]) for s, t in zip(ss, ts, strict=True))


def test_training_scenes_change_with_the_epoch_and_held_out_ones_do_not():
    train, val = Scenes(2, 64), Scenes(2, 64, split="val")
    assert not torch.equal(train[(0, 0)][0], train[(1, 0)][0])
    assert torch.equal(val[(0, 0)][0], val[(1, 0)][0])
    assert not torch.equal(Scenes(2, 64, seed=1)[(0, 0)][0], train[(0, 0)][0])


def test_item_has_the_format_of_a_detection_set():
    image, target = Scenes(3, (48, 64), extras=True)[(0, 1)]
    k = len(target["labels"])
    assert (image.shape, image.dtype) == ((3, 48, 64), torch.float32)
    assert target["boxes"].shape == (k, 4)
    assert target["rotated_boxes"].shape == (k, 5)
    assert target["masks"].shape == (k, 48, 64)
    assert (target["image_id"], target["size"], target["scale"]) == (2, (48, 64), (1, 1))
    assert Scenes(3, 64, transform=Resize(32))[(0, 0)][1]["scale"] == (0.5, 0.5)


def test_scene_without_digits():
    image, target = Scenes(1, 64, digits=(0, 0), extras=True)[(0, 0)]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 64, 64)
    assert image.std() > 0


def test_coco_json_agrees_with_the_items():
    data = Scenes(5, 64, split="test")
    truth = data.to_coco_json()
    for index in range(5):
        _, target = data[(0, index)]
        rows = [a for a in truth["annotations"] if a["image_id"] == target["image_id"]]
        boxes = torch.tensor([a["bbox"] for a in rows])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, target["boxes"])
        assert [data.category_ids.index(a["category_id"]) for a in rows] == target["labels"].tolist()
        assert [a["area"] for a in rows] == data.scene(index).masks.sum((1, 2)).tolist()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"split": "dev"}, "split"),
        ({"n": 0}, "n >= 1"),
        ({"size": 16}, "size"),
        ({"digits": (3, 1)}, "digits"),
        ({"extras": True, "transform": Resize(32)}, "extras"),
    ],
)
def test_impossible_scenes_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Scenes(**{"n": 1, **options})


def test_rotated_items_are_the_scenes_own_boxes():
    data = Scenes(6, 96, split="val", rotated=True)
    for index, truth in enumerate(data.truth()):
        scene = data.scene(index)
        _, target = data[(0, index)]
        assert target["boxes"].shape == (len(scene.labels), 5)
        torch.testing.assert_close(target["boxes"], torch.from_numpy(scene.rotated_boxes), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(truth["boxes"], torch.from_numpy(scene.rotated_boxes).double())
        assert (truth["image_id"], truth["labels"].tolist()) == (index + 1, target["labels"].tolist())
        assert truth["difficult"].tolist() == [False] * len(scene.labels)


def test_rotated_boxes_move_with_the_pixels():
    """A scene mirrored and doubled: every box must still hold its digit's mask, treated alike."""
    data = Scenes(8, 96, split="val", rotated=True, transform=Augment(192, flip=0.0, flip_vertical=1.0))
    for index in range(8):
        _, target = data[(0, index)]
        for (cx, cy, w, h, angle), mask in zip(target["boxes"].double().numpy(), data.scene(index).masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y = 2 * (columns + 0.5) - cx, 2 * (96 - rows - 0.5) - cy
            inside = (x + 1j * y) * complex(math.cos(-angle), math.sin(-angle))
            assert np.abs(inside.real).max() < w / 2
            assert np.abs(inside.imag).max() < h / 2


def test_digits_are_turned_as_far_as_asked():
    upright = some(n=20, turn=0)
    assert all((scene.rotated_boxes[:, 4] == 0).all() for scene in upright)
    turned = np.concatenate([scene.rotated_boxes[:, 4] for scene in some(n=100, turn=60)])
    assert math.radians(50) < np.abs(turned).max() <= math.radians(60)
    with pytest.raises(ValueError, match="turn: expected degrees"):
        Scenes(1, turn=90)


def test_sides_say_how_large_digits_are():
    for sides in ((0.25, 0.3), (0.65, 0.7)):
        scenes = Scenes(12, 64, digits=(1, 1), sides=sides, extras=True, turn=0)
        heights = np.array([scenes[0, i][1]["rotated_boxes"][0, 2:4].max() for i in range(12)])
        assert (heights <= sides[1] * 64 + 2).all()  # of a field of 8 cells, of which a digit may fill 7
        assert (heights >= sides[0] * 64 * 5 / 8).all()
    with pytest.raises(ValueError, match=r"least <= greatest <= 0\.7, got \(0\.6, 0\.9\)"):
        Scenes(1, 64, sides=(0.6, 0.9))
