"""Pseudo masks: the three rules, agreement with the published arg-max, scores of a set against counts, pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.adapters import with_adapter
from distillkit.adapters.cam import CamAdapter
from distillkit.evaluation.cam_drawing import draw_class_map, draw_class_maps, draw_mask, mask_picture, voc_palette
from distillkit.evaluation.pseudo_masks import (
    average_precision,
    cam_dataset,
    cam_metrics,
    crf_mask,
    pseudo_mask,
    saliency_mask,
    threshold_mask,
)

GOLDEN = Path(__file__).parent / "golden"


def maps(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


# ---- one picture


def test_masks_agree_with_the_published_ones():
    golden = np.load(GOLDEN / "dense_l2g_msf_a.npz")
    found = torch.zeros(20, 23, 31)
    for label in golden["label"][0].nonzero()[0].tolist():
        found[label] = torch.from_numpy(golden[f"cam255/{label}"]) / 255
    assert torch.equal(threshold_mask(found, 0.25), torch.from_numpy(golden["pred"]).long())
    assert len(threshold_mask(found, 0.25).unique()) == 3


def test_the_threshold_is_one_more_class():
    strengths = maps(4, 9, 8)
    for threshold in (0.0, 0.7, 0.9, 1.0):
        expected = torch.cat([torch.full((1, 9, 8), threshold), strengths]).argmax(0)
        assert torch.equal(threshold_mask(strengths, threshold), expected)
    assert not threshold_mask(torch.full((2, 1, 1), 0.25), 0.25).any()  # of equals the background


def test_saliency_is_the_background_and_decides_alone():
    strengths, saliency = maps(3, 9, 8) * 0.1, maps(1, 9, 8)
    strengths[:, 0, 0], saliency[0, 0, 0], saliency[0, 0, 1] = 0, 1, 0.5
    mask = saliency_mask(strengths, saliency, 0.5)
    assert torch.equal(mask == 0, (saliency[0] < 0.5) | (strengths.amax(0) == 0))
    assert mask[0, 0] == 0  # salient, and no class to give it
    assert mask[0, 1] > 0
    shown = mask > 0
    assert torch.equal(mask[shown], strengths.argmax(0)[shown] + 1)
    assert torch.equal(saliency_mask(strengths, saliency[0]), mask)


def test_crf_moves_a_mask_to_the_edges_of_the_picture():
    truth = torch.zeros(40, 48, dtype=torch.long)
    truth[10:30, 12:36] = 3
    picture = torch.where(truth > 0, 200, 40).expand(3, 40, 48).to(torch.uint8)
    strengths = torch.zeros(4, 40, 48)
    strengths[2] = F.avg_pool2d((truth > 0).float()[None], 17, 1, 8, count_include_pad=False)[0]
    before, after = threshold_mask(strengths), crf_mask(strengths, picture, backend="local")
    assert (before == truth).double().mean() < 0.9
    assert (after == truth).double().mean() > 0.95
    assert set(after.unique().tolist()) == {0, 3}
    assert not crf_mask(torch.zeros(4, 40, 48), picture).any()


def test_rules_by_name():
    strengths, saliency = maps(3, 9, 8), maps(9, 8)
    picture = (maps(3, 9, 8) * 255).to(torch.uint8)
    assert torch.equal(pseudo_mask(strengths, threshold=0.8), threshold_mask(strengths, 0.8))
    found = pseudo_mask(strengths, "saliency", 0.8, saliency=saliency)
    assert torch.equal(found, saliency_mask(strengths, saliency, 0.8))
    assert torch.equal(pseudo_mask(strengths), threshold_mask(strengths, 0.25))
    assert torch.equal(pseudo_mask(strengths, "saliency", saliency=saliency), saliency_mask(strengths, saliency, 0.5))
    found = pseudo_mask(strengths, "crf", 0.8, picture=picture, backend="local")
    assert torch.equal(found, crf_mask(strengths, picture, 0.8, backend="local"))
    for message, arguments in {
        "rule 'saliency' needs the picture's saliency map": {"rule": "saliency"},
        "rule 'crf' needs the picture": {"rule": "crf"},
        "rule must be 'threshold', 'saliency' or 'crf', got 'otsu'": {"rule": "otsu"},
        r"saliency map is \(8, 9\) and the class maps are \(9, 8\)": {"rule": "saliency", "saliency": saliency.t()},
    }.items():
        with pytest.raises(ValueError, match=message):
            pseudo_mask(strengths, **arguments)
    with pytest.raises(
        ValueError, match=r"class maps must be float \(C, H, W\) in 0\.\.1, got torch\.uint8 \(3, 9, 8\)"
    ):
        threshold_mask(picture)


# ---- a set

CLASSES = ["red", "green", "blue"]


class Colours(nn.Module):
    """A classifier whose maps are the picture's colours: what it should find is what is there."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        self.maps = nn.Conv2d(3, 3, 1, bias=False)
        self.maps.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x):
        return self.maps(x).mean((2, 3))


class Pictures:
    """Pictures and masks of 16 x 16, with an ignored corner; without what is ``left_out`` of the targets."""

    def __init__(self, items, **left_out):
        self.items, self.left_out = items, left_out

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        image, labels, mask = self.items[place[1]]
        target = {"labels": torch.tensor(labels), "mask": mask, "key": f"p{place[1]}"}
        return image, {k: v for k, v in target.items() if k not in self.left_out}


def plain(label: int, strength: float = 1.0) -> tuple[Tensor, list[float], Tensor]:
    """The class fills the left half; the right half is ``strength`` of it, and background by the mask."""
    image = torch.zeros(3, 16, 16)
    image[label, :, :8] = 0.9
    image[label, :, 8:] = 0.9 * strength
    mask = torch.zeros(16, 16, dtype=torch.long)
    mask[:, :8] = label + 1
    mask[:2, :2] = 255
    return image, [float(i == label) for i in range(3)], mask


def colours() -> nn.Module:
    return with_adapter(Colours(), CamAdapter("maps"))


def test_scores_of_a_set():
    """Of green the right half is at 0.2 of its strength: wrong at thresholds below, right above."""
    data = Pictures([plain(0, 0.0), plain(1, 0.2)])
    done = []
    found = cam_dataset(
        colours(), data, progress=lambda n, of: done.append((n, of)), scales=(1,), thresholds=(0.1, 0.3)
    )
    result = cam_metrics(found, CLASSES)
    assert done == [(1, 2), (2, 2)]
    assert [f["key"] for f in found] == ["p0", "p1"]
    assert list(result.classes) == ["background", *CLASSES]
    assert result.numbers["threshold"] == 0.3
    assert result.numbers["miou"] == result.numbers["miou@0.3"] == 1
    # 256 - 4 pixels a picture; at 0.1 the second's background is all green
    background, red, green = 128 / 256, 1.0, 124 / 252
    assert result.numbers["miou@0.1"] == pytest.approx((background + red + green) / 3)
    assert result.classes["blue"].iou == -1
    assert result.classes["blue"].average_precision == -1
    assert [row.pictures for row in result.classes.values()] == [2, 1, 1, 0]
    assert result.numbers["mAP"] == 1
    assert result.confusion.sum() == 2 * (256 - 4)


def test_counts_do_not_depend_on_the_order_and_add_up():
    items = [plain(0, 0.0), plain(1, 0.2), plain(2, 0.5)]
    whole = cam_dataset(colours(), Pictures(items), scales=(1,))
    parts = [row for item in reversed(items) for row in cam_dataset(colours(), Pictures([item]), scales=(1,))]
    assert cam_metrics(whole, CLASSES).numbers == cam_metrics(parts, CLASSES).numbers
    assert set(cam_metrics(whole, CLASSES).numbers) == {
        "miou", "threshold", "mAP", *(f"miou@{t}" for t in (0.1, 0.15, 0.2, 0.25, 0.3)),
    }  # fmt: skip


def test_average_precision_by_hand():
    logits, shown = torch.tensor([4.0, 3, 2, 1]), torch.tensor([True, False, True, False])
    assert average_precision(logits, shown) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert average_precision(torch.tensor([1.0, 1]), torch.tensor([True, False])) == pytest.approx(0.5)  # equals
    assert average_precision(torch.tensor([torch.nan, 0]), torch.tensor([True, False])) == pytest.approx(0.5)
    assert average_precision(logits, torch.ones(4, dtype=torch.bool)) == -1


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="picture p0: it has no mask"):
        cam_dataset(colours(), Pictures([plain(0)], mask=None))
    image, labels, mask = plain(1)
    with pytest.raises(ValueError, match="picture p1: labels are of 2 classes"):
        cam_dataset(colours(), Pictures([plain(0), (image, labels[:2], mask)]), scales=(1,))
    mask[5, 5] = 4
    with pytest.raises(ValueError, match=r"picture p0: the mask has label 4; expected 0\.\.3"):
        cam_dataset(colours(), Pictures([(image, labels, mask)]), scales=(1,))
    with pytest.raises(ValueError, match="there is no prediction"):
        cam_metrics([], CLASSES)
    with pytest.raises(ValueError, match="4 classes apart, the data have 3"):
        cam_metrics(cam_dataset(colours(), Pictures([plain(0)]), scales=(1,)), CLASSES[:2])


def test_real_pictures_with_true_labels():
    """Untrained maps say nothing, and true labels alone already more than nothing: the scores must be between."""
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with coco_crops")
    from distillkit.data.weak import VocLabels

    data = VocLabels(Path(os.environ["DISTILLKIT_DATA"]) / "coco_crops", "val", masks="SegmentationClass")
    few = [data[(0, i)] for i in range(3)]
    items = [(F.avg_pool2d(image, 8), target["labels"].tolist(), target["mask"]) for image, target in few]
    model = nn.Sequential(nn.Conv2d(3, 9, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = with_adapter(model, CamAdapter("0"))
    result = cam_metrics(cam_dataset(model, Pictures(items), scales=(1,), flip=False), data.classes)
    assert 0 < result.numbers["miou"] < 0.7
    assert result.confusion.sum() == sum(int((mask != 255).sum()) for _, _, mask in items)


# ---- pictures


def test_palette_is_vocs():
    palette = voc_palette()
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {label: tuple(palette[label].tolist()) for label in expected} == expected
    assert len(np.unique(palette, axis=0)) == 256


def test_a_saved_mask_holds_its_labels(tmp_path):
    mask = torch.arange(256).view(16, 16)
    mask_picture(mask).save(tmp_path / "mask.png")
    from PIL import Image

    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), mask.numpy())
        assert picture.convert("RGB").getpixel((1, 0)) == (128, 0, 0)
    with pytest.raises(ValueError, match=r"whole numbers 0\.\.255"):
        mask_picture(mask + 1)


def test_overlays():
    image = torch.full((3, 10, 20), 0.5)
    mask = torch.zeros(5, 10, dtype=torch.long)
    mask[:, 5:] = 1
    drawn = draw_mask(image, mask, alpha=0.5)
    assert drawn.size == (20, 10)
    assert drawn.getpixel((0, 0)) == (128, 128, 128)
    assert drawn.getpixel((19, 0)) == (128, 64, 64)
    heat = np.asarray(draw_class_map(image, torch.tensor([[0.0, 1.0]]), alpha=1.0)).astype(int)
    assert heat[0, 0, 2] > heat[0, 0, 0]  # from blue
    assert heat[0, -1, 0] > heat[0, -1, 2]  # to red
    assert np.array_equal(np.asarray(draw_class_map(image, torch.rand(4, 4), alpha=0.0))[0, 0], [128, 128, 128])
    assert draw_class_map(image, torch.rand(4, 4), "cat").height > 10
    strengths = maps(3, 10, 20)
    strengths[1] = 0
    row = draw_class_maps(image, strengths, CLASSES)
    assert row.width == 3 * 20 + 2 * 8  # the picture and two classes
    with pytest.raises(ValueError, match="3 class maps and 2 names"):
        draw_class_maps(image, strengths, CLASSES[:2])
    with pytest.raises(ValueError, match=r"must be \(H, W\), got \(3, 10, 20\)"):
        draw_class_map(image, strengths)
