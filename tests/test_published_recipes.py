"""Recipes named after a paper have its numbers; those of LD and of token labels are held beside their methods."""

import pytest
import torch

from distillkit.data.boundary import boundary_band
from distillkit.data.fakemix import FakeMix
from distillkit.data.mask_transforms import MaskAugment
from distillkit.recipe import load, taught_by, train_of
from distillkit.training import build
from distillkit.training.optim import build_optimizer, learning_rate_factor
from distillkit.training.weak import segmentation_recipe
from tests.mask_folder import labels


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    monkeypatch.setenv("RESNET38", "resnet38.pth")


def rates(recipe, *changes):
    """(learning rate, decay) of each group of a model with these blocks, on a small backbone."""
    student = recipe.student.model_copy(update={"backbone": "test_resnet", "pretrained": False, **dict(changes)})
    optimizer = build_optimizer(build.build_model(student, 4, recipe.evaluate), recipe.train.optimizer)
    return optimizer, {(round(group["lr"], 9), group["weight_decay"]) for group in optimizer.param_groups}


def test_l2g_voc_is_the_published_setting():
    """Spec: the release's script for VOC; sections 3 to 8."""
    recipe = load("l2g_voc")
    data, train, student = recipe.data, recipe.train, recipe.student
    assert (data.short_side, data.size, data.batch, data.train) == (512, [448, 448], 3, "train_aug")
    augment = data.augment
    assert (augment.crop, augment.scale, augment.flip, augment.color, augment.hue) == (True, None, 0, 0.3, 0.1)
    (l2g,) = build.build_distillers(recipe, "all", 20, train)
    assert (l2g.crops, l2g.corners, round(448 * l2g.share), l2g.weight.value) == (6, True, 320, 10)
    assert (l2g.threshold, l2g.soft_background, l2g.convention, l2g.empty_saliency) == (0.001, False, "release", "zero")
    assert l2g._saliency == ("targets",)
    assert (student.backbone, student.pcm, student.background, student.head_bias) == ("resnet38", True, True, False)
    assert (student.freeze_bn, student.frozen, student.pretrained) == (True, True, "resnet38.pth")
    optimizer, found = rates(recipe)
    assert found == {(0.001, 5e-4), (0.01, 5e-4)}
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.9, True)}
    factors = [learning_rate_factor(step, 100, train.epochs, train.schedule) for step in range(100)]
    assert factors == pytest.approx([1.0] * 50 + [0.1] * 50)
    assert (train.epochs, train.accumulate) == (10, 1)
    cam = recipe.cam
    assert (cam.method, cam.scales, cam.flip, cam.size) == ("cam", [0.5, 1.0, 1.5, 2.0], True, None)
    assert cam.thresholds == [0.1, 0.15, 0.2, 0.25, 0.3]
    assert (recipe.masks.rule, recipe.masks.threshold) == ("threshold", 0.25)


def test_the_deeplab_of_l2g_voc_is_the_published_one(tmp_path):
    """Spec: section 9."""
    (tmp_path / "VOC2012").mkdir()
    labels(tmp_path / "VOC2012", {}, ["background", "cat", "dog", "newt"])
    recipe = segmentation_recipe(load("l2g_voc"), tmp_path / "row", tmp_path / "row" / "pseudo")
    data, train, student = recipe.data, recipe.train, recipe.student
    assert (student.version, student.multi_scale, student.freeze_bn) == ("v2", True, True)
    assert (student.backbone, student.output_stride) == ("resnet101.tv_in1k", None)
    assert (data.size, data.batch, data.resize) == ([321, 321], 10, False)
    assert (data.augment.scale, data.augment.crop, data.augment.flip) == ([0.5, 1.5], True, 0.5)
    assert 10582 // data.batch * train.epochs == pytest.approx(20_000, rel=0.01)
    optimizer, found = rates(recipe, ("output_stride", 8))
    assert found == {(2.5e-4, 5e-4), (2.5e-3, 5e-4), (2.5e-4, 0.0), (2.5e-3, 0.0)}
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.9, False)}
    factors = [learning_rate_factor(step, 100, train.epochs, train.schedule) for step in range(100)]
    assert factors == pytest.approx([(1 - step / 100) ** 0.9 for step in range(100)])
    assert (recipe.evaluate.scales, recipe.evaluate.flip, recipe.evaluate.split) == ([1.0], False, "val")


def test_fakemix_trans10k_is_the_published_setting():
    """Spec: sections 2.4, 4, 5 and 6."""
    recipe = load("fakemix_trans10k")
    data, train, student = recipe.data, recipe.train, recipe.student
    assert (data.size, data.batch, data.boundary, data.boundary_between) == ([512, 512], 4, 8, "foreground")
    assert data.augment.model_dump() == {
        "scale": None, "crop": False, "flip": 0.5, "color": 0.0, "hue": 0.0, "rotate90": 0,
    }  # fmt: skip
    fakemix = FakeMix(**data.fakemix.model_dump())
    assert (fakemix.thickness, fakemix.max_shift, fakemix.count, fakemix.p) == (8, 0.5, 3, 0.5)
    assert (fakemix.variant, fakemix.per_paste_shift) == ("boundary", False)
    assert (data.train, data.val, data.test, recipe.evaluate.split) == ("train", "validation", "test", "test")
    assert recipe.evaluate.metrics == "trans10k"
    assert (student.backbone, student.context, student.output_stride) == ("resnet50.tv_in1k", "adaptive", 16)
    assert (student.channels, student.freeze_bn, student.pretrained) == (256, False, True)
    assert recipe.loss.model_dump() == {"boundary_weight": 1.0, "aux_weight": 0.4, "boundary_activation": "none"}
    optimizer, found = rates(recipe, ("channels", 8))
    assert found == {(0.01, 1e-4), (0.1, 1e-4)}
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.9, False)}
    factors = [learning_rate_factor(step, 100, train.epochs, train.schedule) for step in range(100)]
    assert factors == pytest.approx([(1 - step / 100) ** 0.9 for step in range(100)])
    assert train.epochs == 400
    plain, mixed = recipe.compare
    assert taught_by(recipe, plain.data).data.fakemix is None
    assert taught_by(recipe, mixed.data).data.fakemix == data.fakemix
    assert train_of(recipe, mixed.train) == train


@pytest.mark.parametrize("name", ["fakemix_camvid", "fakemix_trans_coco"])
def test_bands_of_the_small_recipes_are_as_thick_as_published_for_their_size(name):
    data = load(name).data
    side = min(data.size)
    published = side * 8 / 512
    halves = torch.zeros(*data.size, dtype=torch.int64)
    halves[:, data.size[1] // 2 :] = 1
    for thickness in (data.boundary, data.fakemix.thickness):
        band = boundary_band(halves, thickness, between=data.boundary_between)
        wide = int(band[side // 2, data.size[1] // 4 : -data.size[1] // 4].sum())  # of the border in the middle
        assert abs(wide - published) < 1
    assert MaskAugment(tuple(data.size), None, False, boundary=data.boundary).boundary == data.boundary
