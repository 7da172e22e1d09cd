"""Models by name: what a file of weights may look like, and which errors say what."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from distillkit.models.backbones import backbone, classifier
from distillkit.models.weights import read_weights

SIZES = {"embed_dim": 16, "num_heads": 4, "depth": 2}


def weights(name: str, seed: int, **options) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name, **options).state_dict()


def loads_by_timm_too(name: str, path: Path, classes: int, expected: dict[str, Tensor], **options) -> None:
    ours = classifier(name, classes, path, **options)
    overlay = {"file": str(path), "num_classes": classes}
    theirs = timm.create_model(name, True, num_classes=classes, pretrained_cfg_overlay=overlay, **options)
    for model in (ours, theirs):
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["resnet10t", "vip_s7", "lvvit_t"])
@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
def test_averaged_weights_come_first_and_wrappers_are_taken_off(tmp_path, name, averaged):
    options = {"resnet10t": {}, "lvvit_t": SIZES}.get(name, {"embed_dims": (32, 64, 64, 64), "layers": (1, 1, 1, 1)})
    plain, wanted = (weights(name, seed, num_classes=5, **options) for seed in (0, 1))
    prefixed = [{f"module.{k}": v for k, v in d.items()} for d in (plain, wanted)]
    torch.save({"state_dict": prefixed[0], averaged: prefixed[1], "epoch": 3}, tmp_path / "both.pth")
    loads_by_timm_too(name, tmp_path / "both.pth", 5, wanted, **options)
    torch.save({"model": prefixed[0]}, tmp_path / "one.pth")
    assert read_weights(tmp_path / "one.pth").keys() == plain.keys()


@pytest.mark.parametrize("name", ["lvvit_t", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("size", [None, 64])
def test_a_file_of_another_picture_size_loads_as_the_model_resizes_it(tmp_path, name, size):
    found = weights(name, 1, num_classes=5, img_size=96, **SIZES)
    torch.save(found, tmp_path / "larger.pth")
    options = SIZES if size is None else {**SIZES, "img_size": size}
    model = classifier(name, 5, tmp_path / "larger.pth", **options)
    patches = ((size or 224) // 16) ** 2
    assert model.pos_embed.shape == (1, 1 + patches, 16)
    assert torch.equal(model.head.weight, found["head.weight"])
    assert torch.equal(model.blocks[1].norm1.weight, found["blocks.1.norm1.weight"])


def test_a_file_of_another_size_is_a_backbone_too(tmp_path):
    found = weights("vit_tiny_patch16_224", 1, num_classes=5, img_size=96)
    torch.save(found, tmp_path / "larger.pth")
    features = backbone("vit_tiny_patch16_224", [16], tmp_path / "larger.pth")
    assert torch.equal(features.model.blocks[0].attn.qkv.weight, found["blocks.0.attn.qkv.weight"])


def test_a_file_of_another_model_is_named(tmp_path):
    torch.save(weights("resnet10t", 0), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet\.pth does not fit the model: missing \(\d+\): cls_token"):
        classifier("vit_tiny_patch16_224", 5, tmp_path / "resnet.pth")
    one = weights("resnet10t", 0, in_chans=1)
    torch.save(one, tmp_path / "grey.pth")
    with pytest.raises(ValueError, match="other shape"):
        classifier("resnet10t", 5, tmp_path / "grey.pth")


def test_weights_of_colours_are_taken_for_one_channel(tmp_path):
    torch.save(weights("resnet10t", 0, num_classes=5), tmp_path / "colour.pth")
    model = classifier("resnet10t", 5, tmp_path / "colour.pth", in_chans=1)
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels == 1


def test_what_a_file_overlays_stands_beside_what_is_given(tmp_path):
    torch.save(weights("resnet10t", 0, num_classes=5), tmp_path / "five.pth")
    given = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
    model = classifier("resnet10t", None, tmp_path / "five.pth", **given)
    assert (model.num_classes, model.pretrained_cfg["input_size"]) == (5, (3, 64, 64))


def test_an_option_that_a_model_does_not_take_is_named(tmp_path):
    torch.save(weights("lvvit_t", 0, num_classes=5), tmp_path / "five.pth")
    for pretrained in (False, tmp_path / "five.pth"):
        with pytest.raises(ValueError, match="unexpected keyword argument 'foo'") as found:
            classifier("lvvit_t", 5, pretrained, foo=1)
        assert "num_classes" not in str(found.value)


@pytest.mark.parametrize("name", ["lvvit_t", "distillkit/deepvit_16b", "vit_tiny_patch16_224"])
def test_of_several_maps_at_a_stride_a_backbone_gives_the_last(name):
    features = backbone(name, [16])
    depth = len(timm.create_model(name.removeprefix("distillkit/")).blocks)
    assert features.feature_info.module_name() == [f"blocks.{depth - 1}"]
    with pytest.raises(ValueError, match=r"has maps at strides \[16\], wanted \[8, 16\]"):
        backbone(name, [8, 16])


def test_strides_go_from_fine_to_coarse():
    with pytest.raises(ValueError, match=r"wanted \[16, 8\], finest first"):
        backbone("resnet10t", [16, 8])
