"""Class activation maps: the classifier made for them, how they are read of any, fused over scales, and Grad-CAM."""

import builtins
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillkit.adapters import adapter_for, with_adapter
from distillkit.adapters.cam import CamAdapter, activation_maps
from distillkit.adapters.classifier import layout_of
from distillkit.core.errors import TapError, ViewError
from distillkit.core.side import Reading, Side
from distillkit.core.views import ActivationMaps
from distillkit.evaluation.cam import class_maps, fused
from distillkit.evaluation.grad_cam import METHODS
from distillkit.models.cam import CamClassifier

GOLDEN = Path(__file__).parent / "golden"
needs_grad_cam = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_grad_cam") is None, reason="the package grad-cam is not installed"
)
SHOWN = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])


def resnet(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=5, **options).eval()


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
        **options,
    }
    return timm.models.VisionTransformer(**options).eval()


def cam(**options) -> CamClassifier:
    torch.manual_seed(0)
    model = CamClassifier(5, "test_resnet", **options).eval()
    model.fc8.weight.data[1].abs_()  # of features >= 0: this class is seen everywhere
    return model


def picture(height: int = 40, width: int = 56) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(3))


def normal(model: nn.Module, x: Tensor) -> Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    return (x - mean) / std


# ---- the classifier


@pytest.mark.parametrize("options", [{}, {"background": False}, {"pcm": True}, {"head_bias": True}], ids=str)
def test_logits_are_the_means_of_the_classes_maps(options):
    model = cam(**options)
    pictures = torch.randn(2, 3, 64, 96)
    view = _view(model, pictures)
    assert view.maps.shape == (2, 5 + model.background, 2, 3)
    assert view.background is model.background
    assert view.classes == 5
    torch.testing.assert_close(model(pictures), view.maps[:, :5].mean((2, 3)))
    torch.testing.assert_close(activation_maps(model, pictures), view.maps[:, :5])


def _view(model: nn.Module, pictures: Tensor, at: tuple[str, ...] | None = None) -> ActivationMaps:
    side = Side("student", model, adapter_for(model), [Reading(ActivationMaps, at)])
    try:
        return side.run((pictures,), {}, exit_early=False)[1].popitem()[1]
    finally:
        side.taps.remove()


def test_maps_are_fc8_of_the_last_map_and_of_what_is_correlated():
    model, pictures = cam(pcm=True), torch.randn(2, 3, 64, 64)
    stages = model.backbone(pictures)
    low = [pictures, model.f8_3(stages[-3]), model.f8_4(stages[-2])]
    low = torch.cat([F.interpolate(x, size=(2, 2), mode="bilinear", align_corners=True) for x in low], 1)
    assert low.shape[1] == 195
    q = F.conv2d(low, model.pcm.f9.weight).flatten(2)
    q = q / (q.norm(dim=1, keepdim=True) + 1e-5)
    affinity = (q.transpose(1, 2) @ q).relu()
    spread = stages[-1].flatten(2) @ (affinity / (affinity.sum(1, keepdim=True) + 1e-5))
    expected = model.fc8(stages[-1]) + model.fc8(spread.view_as(stages[-1]))
    torch.testing.assert_close(activation_maps(model, pictures), expected[:, :5])


def test_pixel_correlation_compares_by_features_without_gradient():
    model = cam(pcm=True)
    earlier = dict(model.backbone.layer3.named_parameters())
    stages = model.backbone(torch.randn(1, 3, 64, 64))
    model._low_level(torch.randn(1, 3, 64, 64), stages).sum().backward()
    assert all(p.grad is None for p in earlier.values())
    assert model.f8_3.weight.grad is not None
    assert model.f8_4.weight.grad is not None


def test_every_parameter_learns_and_the_background_only_through_its_map():
    model = cam(pcm=True).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not model.fc8.weight.grad[5].any()
    assert model.fc8.weight.grad[:5].any()


def test_how_new_weights_begin():
    model = cam(pcm=True)
    width = model.fc8.in_channels
    assert 0.9 * (6 / (width + 6)) ** 0.5 < model.fc8.weight.abs().max() <= (6 / (width + 6)) ** 0.5
    assert model.fc8.bias is None
    bound = 4 * (6 / (195 + 192)) ** 0.5
    assert 0.9 * bound < model.pcm.f9.weight.abs().max() <= bound
    assert float(model.f8_4.weight.detach().std()) == pytest.approx((2 / model.f8_4.in_channels) ** 0.5, rel=0.1)


def test_frozen_norms_and_layers():
    model = cam(freeze_bn=True, frozen=True).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training or m.weight.requires_grad for m in norms)
    still = {name.split(".")[0] for name, p in model.backbone.named_parameters() if not p.requires_grad and p.dim() > 1}
    assert still == {"conv1", "layer1"}
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert cam().train().backbone.bn1.training


def test_output_stride_keeps_the_weights(tmp_path):
    source = resnet()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = cam(pretrained=tmp_path / "weights.pth", output_stride=8)
    assert activation_maps(model, torch.randn(1, 3, 64, 96)).shape == (1, 5, 8, 12)
    torch.testing.assert_close(model.backbone.layer4[0].conv2.weight, source.layer4[0].conv2.weight)
    assert max(m.dilation[0] for m in model.backbone.modules() if isinstance(m, nn.Conv2d)) > 1


def test_what_its_pictures_are_normalised_with():
    assert cam().pretrained_cfg["input_size"] == timm.get_pretrained_cfg("test_resnet").input_size
    with torch.device("meta"):
        assert CamClassifier(5).pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("resnet38", {"pretrained": True}, "set pretrained to the path of a file"),
        ("resnet38", {"output_stride": 16}, "output_stride 8, not 16"),
        ("resnetto", {}, "'resnetto' is not a timm model"),
        ("test_vit", {"pcm": True}, r"maps at strides \[16\] only, .* set pcm=False"),
        ("test_vit", {"output_stride": 8}, "cannot dilate this family to output_stride=8"),
        ("test_resnet", {"output_stride": 4}, "output_stride=4"),
    ],
)
def test_what_cannot_be_built_is_named(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        CamClassifier(5, backbone, **options)


# ---- maps of any classifier


def test_maps_of_a_network_of_maps_are_its_head_at_every_place():
    model, pictures = resnet(), torch.randn(2, 3, 64, 96)
    features = model.forward_features(pictures)
    by_hand = torch.einsum("kc,bchw->bkhw", model.fc.weight, features) + model.fc.bias[:, None, None]
    torch.testing.assert_close(activation_maps(model, pictures), by_hand)
    torch.testing.assert_close(_view(model, pictures).maps, by_hand)
    torch.testing.assert_close(by_hand.mean((2, 3)), model(pictures))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_maps_of_a_transformer_are_its_head_at_every_token(pool):
    model = vit(global_pool=pool, dynamic_img_size=True, class_token=pool == "token")
    pictures = torch.randn(2, 3, 32, 48)  # 4 x 6 tokens, where it was built for 4 x 4
    tokens = model.forward_features(pictures)[:, model.num_prefix_tokens :]
    by_hand = model.head(model.fc_norm(tokens)).transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(activation_maps(model, pictures), by_hand)


def test_maps_that_l2g_has_taught_are_probabilities():
    pictures = torch.randn(2, 3, 64, 64)
    for background in (True, False):
        model, read = cam(background=background), cam(background=background, softmax=True)
        logits = _view(model, pictures).maps
        rest = logits[:, 5:] if background else torch.zeros_like(logits[:, :1])
        by_hand = logits.exp()[:, :5] / (logits.exp()[:, :5].sum(1, keepdim=True) + rest.exp())
        torch.testing.assert_close(activation_maps(read, pictures), by_hand)
        torch.testing.assert_close(activation_maps(model, pictures), logits[:, :5])
        torch.testing.assert_close(_view(read, pictures).maps, logits)  # what is taught are logits
    other = with_adapter(cam(), CamAdapter(background=True, softmax=True))
    torch.testing.assert_close(activation_maps(other, pictures), activation_maps(cam(softmax=True), pictures))


def test_a_view_has_a_gradient_and_no_background():
    model = vit()
    view = _view(model, torch.randn(2, 3, 32, 32))
    assert (view.maps.shape, view.background) == ((2, 5, 4, 4), False)
    view.maps.sum().backward()
    assert model.patch_embed.proj.weight.grad.any()


def test_maps_of_a_layer_of_any_model():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 6, 1)
            self.after = nn.ReLU()

        def forward(self, x):
            return self.after(self.head(x))[:, :5].mean((2, 3))

    pictures = torch.randn(2, 3, 8, 9)
    with pytest.raises(ViewError, match=r"with_adapter\(model, .*CamAdapter"):
        activation_maps(Plain(), pictures)
    model = with_adapter(Plain(), CamAdapter("head", background=True))
    torch.testing.assert_close(activation_maps(model, pictures), model.head(pictures)[:, :5])
    assert len(model.head._forward_hooks) == 0
    torch.testing.assert_close(_view(model, pictures, ("after",)).maps, model.head(pictures).relu())
    with pytest.raises(TapError, match="no module is called 'heed'"):
        activation_maps(with_adapter(Plain(), CamAdapter("heed")), pictures)
    with pytest.raises(ViewError, match=r"expected activation maps \(B, K, h, w\) at one path, got \(2, 10\)"):
        activation_maps(with_adapter(nn.Sequential(nn.Flatten(), nn.Linear(216, 10)), CamAdapter("1")), pictures)


def test_a_path_in_a_model_of_timm_is_refused():
    with pytest.raises(ViewError, match=r"no path is needed; .*CamAdapter\('layer4'\)"):
        _view(resnet(), torch.randn(1, 3, 64, 64), ("layer4",))


# ---- of whole pictures


def test_fusion_agrees_with_the_published_one():
    golden = np.load(GOLDEN / "dense_l2g_msf_a.npz")
    shown = golden["label"][0].nonzero()[0].tolist()
    maps = [torch.from_numpy(golden[f"cam{i}"])[:, shown] for i in range(8)]
    found = fused([torch.cat(pair) for pair in zip(maps[::2], maps[1::2])], (23, 31))
    for map_, label in zip(found, shown):
        torch.testing.assert_close(map_ * 255, torch.from_numpy(golden[f"cam255/{label}"]), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("model", [resnet, cam, lambda: vit(dynamic_img_size=True)], ids=["resnet", "cam", "vit"])
def test_of_a_mirrored_picture_they_are_mirrored(model):
    model, x = model(), picture()
    maps = class_maps(model, x, SHOWN, scales=(0.7, 1.5))
    torch.testing.assert_close(
        class_maps(model, x.flip(-1), SHOWN, scales=(0.7, 1.5)), maps.flip(-1), rtol=0, atol=1e-4
    )
    assert not torch.allclose(
        class_maps(model, x, SHOWN, (1,)), class_maps(model, x, SHOWN, (1,), flip=False), atol=1e-4
    )


def test_range_and_classes():
    model, x = cam(), picture()
    maps = class_maps(model, x, SHOWN)
    assert (maps.shape, maps.dtype) == ((5, 40, 56), torch.float32)
    assert not maps[SHOWN == 0].any()
    assert maps.min() >= 0
    for largest in maps[SHOWN > 0].amax((1, 2)):
        assert largest == 0 or abs(largest - 1) < 1e-5
    assert not class_maps(model, x, torch.zeros(5)).any()
    torch.testing.assert_close(class_maps(model, x, torch.eye(5)[4])[4], maps[4])  # classes do not depend on each other


def test_a_class_that_is_seen_nowhere_is_zero():
    assert not fused([-torch.rand(2, 3, 4, 4)], (8, 8)).any()


def test_one_scale_is_the_map_by_hand():
    model, x = resnet(), picture(64, 96)
    features = model.forward_features(normal(model, x)[None])
    maps = torch.einsum("kc,bchw->bkhw", model.fc.weight, features) + model.fc.bias[:, None, None]
    maps = F.interpolate(maps, size=(30, 50), mode="bicubic")[0].clamp_min(0)
    maps = maps / (maps.amax((1, 2), keepdim=True) + 1e-8) * SHOWN[:, None, None]
    found = class_maps(model, x, SHOWN, scales=(1,), flip=False, size=(30, 50))
    torch.testing.assert_close(found, maps, rtol=1e-4, atol=1e-5)


def test_scales_and_mirrored_batches_are_what_the_model_sees():
    model, seen = cam(), []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    class_maps(model, picture(), SHOWN, scales=(0.5, 1, 2))
    assert [tuple(batch.shape) for batch in seen] == [(2, 3, 20, 28), (2, 3, 40, 56), (2, 3, 80, 112)]
    assert all(torch.equal(batch[0].flip(-1), batch[1]) for batch in seen)
    torch.testing.assert_close(seen[1][0], normal(model, picture()))


def test_patches_stay_whole():
    model, seen = vit(dynamic_img_size=True), []
    layout_of(model)  # by a trial run
    model.patch_embed.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[2:])))
    class_maps(model, picture(40, 56), SHOWN, scales=(0.5, 1, 0.01))
    assert seen == [(16, 32), (40, 56), (8, 8)]  # 20 x 28, halves to even


def test_the_model_is_left_as_it_was():
    model = cam(freeze_bn=True).train()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    class_maps(model, picture(), SHOWN, scales=(1,))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_does_not_fit_is_named():
    model, x = cam(), picture()
    for message, arguments in {
        r"labels are of 4 classes, and CamClassifier has 5": {"labels": torch.ones(4)},
        r"labels must be \(C,\), one number a class, got \(1, 5\)": {"labels": SHOWN[None]},
        r"picture must be float \(3, H, W\) in 0\.\.1, got torch\.uint8": {"picture": (x * 255).to(torch.uint8)},
        r"scales must be numbers above 0": {"scales": (1, 0)},
        r"method must be 'cam' or one of grad-cam, .*got 'gradcam'": {"method": "gradcam"},
        r"target_layer='features' is for methods that look at a layer": {"target_layer": "features"},
    }.items():
        with pytest.raises(ValueError, match=message):
            class_maps(model, **{"picture": x, "labels": SHOWN, **arguments})
    with pytest.raises(ValueError, match=r"VisionTransformer cannot run at 16 x 16 pixels, 0\.5 times .*scales=\(1,\)"):
        class_maps(vit(), picture(32, 32), SHOWN)


# ---- by gradients


@needs_grad_cam
def test_grad_cam_of_a_mean_of_maps_is_its_cam():
    """The gradient of the mean of W f is W / (h w) everywhere: Grad-CAM is the ReLU of the map, but for its scale."""
    model, x = cam(background=False), picture(64, 96)
    maps = activation_maps(model, normal(model, x)[None])[0].detach().relu().numpy()
    import cv2

    found = class_maps(model, x, SHOWN, scales=(1,), flip=False, method="grad-cam")
    for label in (1, 4):
        low = maps[label] - maps[label].min()  # the package subtracts the least
        expected = torch.from_numpy(cv2.resize(low / (1e-7 + low.max()), (96, 64)))
        torch.testing.assert_close(found[label], expected / (expected.max() + 1e-8), rtol=1e-3, atol=1e-3)


@needs_grad_cam
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "model", [resnet, lambda: cam(pcm=True), lambda: vit(dynamic_img_size=True)], ids=["resnet", "cam", "vit"]
)
def test_methods_by_gradients(method, model):
    model, x = model(), picture(32, 48)
    for parameter in list(model.parameters())[:3]:
        parameter.grad = torch.ones_like(parameter)
    maps = class_maps(model, x, SHOWN, scales=(1, 2), method=method)
    assert maps.shape == (5, 32, 48)
    assert not maps[SHOWN == 0].any()
    assert maps.min() >= 0
    assert maps.max() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(
        class_maps(model, x.flip(-1), SHOWN, (1, 2), method=method), maps.flip(-1), rtol=0, atol=1e-3
    )
    grads = [p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters()]
    assert grads == [True] * 3 + [False] * (len(grads) - 3)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@needs_grad_cam
def test_a_layer_can_be_named_and_one_without_effect_is_refused():
    model, x = vit(dynamic_img_size=True), picture(32, 48)
    default = class_maps(model, x, SHOWN, (1,), method="grad-cam")
    torch.testing.assert_close(
        class_maps(model, x, SHOWN, (1,), method="grad-cam", target_layer="blocks.1.norm1"), default
    )
    assert not torch.allclose(
        class_maps(model, x, SHOWN, (1,), method="grad-cam", target_layer="blocks.0.norm1"), default
    )
    with pytest.raises(ValueError, match="do not depend on the places of 'norm'"):
        class_maps(model, x, SHOWN, (1,), method="grad-cam", target_layer="norm")
    with pytest.raises(ValueError, match=r"has no module 'blocks\.7'"):
        class_maps(model, x, SHOWN, (1,), method="grad-cam", target_layer="blocks.7")
    with pytest.raises(ValueError, match="say which layer"):
        class_maps(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten()), x, SHOWN, method="grad-cam")
    with pytest.raises(ValueError, match="labels are of 7 classes, and the model has 5"):
        class_maps(model, x, torch.ones(7), (1,), method="grad-cam")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pytorch_grad_cam", "No module named 'pytorch_grad_cam'", r"pip install 'distillkit\[cam\]'"),
        (None, "libGL.so.1: cannot open shared object file", "libGL.so.1.*opencv-python-headless"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, name, text, message):
    original = builtins.__import__

    def fails(module, *args, **options):
        if module == "pytorch_grad_cam":
            raise ImportError(text, name=name)
        return original(module, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(ImportError, match=message):
        class_maps(cam(), picture(), SHOWN, method="grad-cam")
