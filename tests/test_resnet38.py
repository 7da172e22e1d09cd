"""ResNet-38 and pixel correlation: agreement with the published operation, sizes, what is frozen, weights files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillkit.models import pixel_correlation, resnet38
from distillkit.models.cam import CamClassifier
from distillkit.models.pixel_correlation import PixelCorrelation, propagate
from distillkit.models.resnet38 import Block, Bottleneck, ResNet38

GOLDEN = Path(__file__).parent / "golden"


# ---- pixel correlation


def test_pixel_correlation_agrees_with_the_published_one():
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "dense_l2g_pcm_a.npz").items() if k != "meta"}
    pcm = PixelCorrelation(7, 8).double()
    pcm.f9.weight.data = golden["f9_weight"]
    x, feat = (golden[name].requires_grad_() for name in ("x", "feat"))
    out = pcm(x, feat)
    out.square().sum().backward()
    for ours, name in ((out, "out"), (x.grad, "grad_x"), (feat.grad, "grad_feat")):
        torch.testing.assert_close(ours, golden[name], rtol=1e-9, atol=1e-12)


def test_pixel_correlation_of_equal_places_is_the_mean_and_of_foreign_ones_nothing():
    x = torch.randn(1, 3, 6)
    alike = propagate(x, torch.ones(1, 4, 6))
    torch.testing.assert_close(alike, x.mean(2, keepdim=True).expand_as(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(propagate(x, torch.eye(6)[None]), x, rtol=1e-4, atol=1e-5)


def test_pixel_correlation_of_many_places_is_the_same_in_parts(monkeypatch):
    x, q = torch.randn(2, 3, 20).double(), torch.randn(2, 4, 20).double()
    whole = propagate(x, q)
    monkeypatch.setattr(pixel_correlation, "COLUMNS", 7)
    torch.testing.assert_close(propagate(x, q), whole)


def test_pixel_correlation_names_sizes_that_differ():
    with pytest.raises(ValueError, match=r"the map is \(4, 4\) and the features are \(8, 8\)"):
        PixelCorrelation(5)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 8, 8))


# ---- ResNet-38


def on_meta(**options) -> ResNet38:
    with torch.device("meta"):
        return ResNet38(**options)


def test_published_size_and_maps():
    with torch.device("meta"):
        model = CamClassifier(20, pcm=True)
        maps = model.backbone(torch.zeros(2, 3, 64, 96))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 105.4
    assert [tuple(m.shape[1:]) for m in maps] == [(512, 8, 12), (1024, 8, 12), (4096, 8, 12)]


def test_dilations_and_strides():
    model = on_meta()
    seen = {name: (m.stride[0], m.dilation[0]) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert seen["conv1a"] == (1, 1)
    for block in ("b2", "b3", "b4"):
        assert seen[f"{block}.conv_branch2a"] == (2, 1)
        assert seen[f"{block}.conv_branch1"] == (2, 1)
        assert seen[f"{block}_1.conv_branch2a"] == (1, 1)
        assert f"{block}_1.conv_branch1" not in seen
    assert [seen[f"b5{i}.conv_branch2a"][1] for i in ("", "_1", "_2")] == [1, 2, 2]
    assert [seen[f"b5{i}.conv_branch2b1"][1] for i in ("", "_1", "_2")] == [2, 2, 2]
    assert seen["b6.conv_branch2b1"] == seen["b7.conv_branch2b1"] == (1, 4)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout2d)] == [0.3, 0.5]
    assert not any(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert "b4_5" in dict(model.named_children())
    assert "b4_6" not in dict(model.named_children())


def norm_relu(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shifted = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return shifted.clamp_min(0)


def test_identity_shortcuts_take_the_raw_input_and_projections_the_activated_one():
    x = torch.randn(1, 4, 5, 5)
    kept, changed, bottleneck = Block(4, 4, 4, 1, (1, 1)), Block(4, 4, 8, 1, (1, 1)), Bottleneck(4, 8, 4, 0.3)
    for block in (kept, changed, bottleneck):
        block.eval()
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
        last = block.conv_branch2b2 if isinstance(block, Bottleneck) else block.conv_branch2b1
        nn.init.zeros_(last.weight)  # leaves the shortcut
    active = norm_relu(kept.bn_branch2a, x)
    out, seen = kept(x.clone())
    torch.testing.assert_close(out, x)
    torch.testing.assert_close(seen, active)
    for block in (changed, bottleneck):
        active = norm_relu(block.bn_branch2a, x)
        torch.testing.assert_close(block(x.clone())[0], block.conv_branch1(active))


def test_frozen_layers():
    model = on_meta(frozen=True)
    still = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"conv1a", "b2", "b2_1", "b2_2"}
    assert all(p.requires_grad for p in on_meta().parameters())


def test_weights_file_of_another_network_is_named(tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match=r"other\.pth does not fit the model: missing .*unexpected \(1\): conv1\.weight"
    ):
        on_meta(pretrained=file)


@pytest.fixture
def thin(monkeypatch):
    """Layers of a 64th of the width: the whole network would take seconds."""

    def conv(inputs: int, outputs: int, *args, **options) -> nn.Conv2d:
        return nn.Conv2d(inputs if inputs == 3 else max(inputs // 64, 1), max(outputs // 64, 1), *args, **options)

    def norm(width: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(max(width // 64, 1))

    monkeypatch.setattr(resnet38, "nn", SimpleNamespace(Conv2d=conv, BatchNorm2d=norm, Dropout2d=nn.Dropout2d))


@pytest.mark.usefixtures("thin")
def test_weights_file_without_counters_and_with_a_classifier_loads(tmp_path):
    one, file = ResNet38(), tmp_path / "weights.pth"
    for parameter in one.parameters():
        nn.init.normal_(parameter)
    state = {k: v for k, v in one.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({**state, "fc8.weight": torch.zeros(3)}, file)
    other = ResNet38(file)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


@pytest.mark.usefixtures("thin")
def test_every_parameter_gets_a_gradient():
    model = ResNet38()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 32, 32))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
