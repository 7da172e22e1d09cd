"""FANet: sizes, both streams against direct computation, what trains, and which errors say what."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from distillkit.core.adapter import said_by
from distillkit.models.fanet import FANet, TopDown
from distillkit.schema import SGD
from distillkit.training.optim import build_optimizer

TINY = ("resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050")
CONTEXTS = ("adaptive", "aspp")


def small(backbone: str = "mobilenetv3_small_050", **options) -> FANet:
    torch.manual_seed(1)  # with some others a gate has no positive score at the start
    return FANet(3, backbone, **{"channels": 16, **options})


def pictures(batch: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def up(x: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def test_published_numbers_of_parameters():
    """25.6 M of the encoder are those of the ResNet-50 with its classifier of 1000 classes, which is not used."""
    with torch.device("meta"):
        model = FANet(3)
    decoder = count(model) - count(model.backbone)
    assert [round(count(c) / 1e6, 2) for c in model.contexts] == [1.40, 1.87, 2.81, 4.70]
    assert round(decoder / 1e6, 1) == 11.9
    assert round((decoder + count(model.backbone) + 2048 * 1000 + 1000) / 1e6, 1) == 37.4


def test_the_backbone_of_mirrors_and_glass_has_the_name_that_timm_gave_it_then():
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm maps the name to the present one
        model = FANet(2, "gluon_resnext101_32x4d")
    assert model.widths == [256, 512, 1024, 2048]
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("backbone", TINY)
@pytest.mark.parametrize("context", CONTEXTS)
def test_logits_have_the_size_of_any_picture(backbone, context):
    model = small(backbone, context=context)
    for height, width in ((64, 96), (50, 71)):
        found = model.train()(pictures(2, height, width))
        assert set(found) == {"out", "boundary"}
        assert found["out"].shape == (2, 3, height, width)
        assert found["boundary"].shape == (2, 1, height, width)
        with torch.no_grad():
            assert model.eval()(pictures(1, height, width)).shape == (1, 3, height, width)


def test_dilations_reach_as_far_at_every_output_stride():
    for stride, strides, factors in (
        (16, [4, 8, 16, 16], [1, 1, 1, 1]),
        (8, [4, 8, 8, 8], [1, 1, 2, 2]),
        (32, [4, 8, 16, 32], [1, 1, 1, 0.5]),
    ):
        with torch.device("meta"):
            model, plain = small(output_stride=stride), small(output_stride=stride, context="aspp")
        assert model.strides == strides
        for context, factor in zip(model.contexts, factors):
            rates = [branch.depthwise.dilation[0] for branch in context.branches[2:]]
            assert rates == [rate * factor for rate in (6, 12, 18, 24, 36)]
        rates = [branch.depthwise.dilation[0] for branch in plain.contexts[3].branches[2:]]
        assert rates == [rate * factors[3] for rate in (6, 12, 18)]


def test_boundary_features_strengthen_the_segmentation_and_not_the_reverse():
    model = small().eval()
    with torch.no_grad():
        maps = model.features(pictures())
        segmentation, boundary = model.streams(maps)
        for i, m in enumerate(maps):
            seg, bound = model.contexts[i](m)
            torch.testing.assert_close(boundary[i], bound)
            torch.testing.assert_close(segmentation[i], seg * (1 + torch.sigmoid(model.masks[i](bound))))


def test_a_plain_aspp_feeds_both_streams():
    model = small(context="aspp").eval()
    with torch.no_grad():
        segmentation, boundary = model.streams(model.features(pictures()))
        for s, b, mask in zip(segmentation, boundary, model.masks):
            torch.testing.assert_close(s, b + b * mask(b).sigmoid())


def test_fusion_goes_from_the_coarsest_map_to_the_finest():
    torch.manual_seed(0)
    fusion = TopDown(3, 4).eval()
    fine, middle, coarse = torch.randn(2, 4, 12, 10), torch.randn(2, 4, 6, 5), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        found = fusion([fine, middle, coarse])
        first, second, third = fusion.convs
        wanted = first(fine + up(second(middle + up(third(coarse), (6, 5))), (12, 10)))
    torch.testing.assert_close(found, wanted)


def test_outputs_are_the_heads_of_the_fused_streams():
    model = small().eval()
    with torch.no_grad():
        segmentation, boundary = model.streams(model.features(pictures()))
        model.training = True  # only of the model itself: no dropout, no batch statistics
        found = model(pictures())
        torch.testing.assert_close(found["out"], up(model.segment(model.fuse_segmentation(segmentation)), (64, 96)))
        torch.testing.assert_close(found["boundary"], up(model.bound(model.fuse_boundary(boundary)), (64, 96)))
        model.training = False
        torch.testing.assert_close(model(pictures()), found["out"])


def test_inference_leaves_out_the_boundary_map():
    model, calls = small(), []
    for module in (model.fuse_boundary, model.bound):
        module.register_forward_hook(lambda module, args, out: calls.append(module))
    with torch.no_grad():
        model.eval()(pictures())
        assert not calls
        model.train()(pictures())
    assert len(calls) == 2


def test_a_picture_is_as_one_padded_with_the_mean_colour():
    model, odd = small().eval(), pictures(1, 50, 71)
    with torch.no_grad():
        torch.testing.assert_close(model(odd), model(F.pad(odd, (0, 9, 0, 14)))[..., :50, :71])


@pytest.mark.parametrize("backbone", TINY)
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_parameter_gets_a_gradient(backbone, context):
    model = small(backbone, context=context)
    sum((o * torch.randn_like(o)).sum() for o in model(pictures(4)).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert [name for name in still if not name.startswith("backbone.")] == []  # a fresh ResNet has blocks times 0


def test_the_segmentation_loss_trains_the_boundary_features_through_the_masks():
    model = small()
    model(pictures(4))["out"].sum().backward()
    assert all(p.grad.any() for p in model.contexts[0].boundary.project.parameters())
    assert all(p.grad is None for p in model.fuse_boundary.parameters())


def test_one_picture_is_refused_in_training_only():
    model = small()
    with pytest.raises(ValueError, match="at least 2 pictures"):
        model(pictures(1))
    assert model.eval()(pictures(1)).shape == (1, 3, 64, 96)


def test_the_backbone_has_a_learning_rate_of_its_own_and_statistics_that_can_be_frozen():
    model = small(freeze_bn=True)
    groups = build_optimizer(model, SGD(kind="sgd", lr=0.1, backbone_lr=0.1)).param_groups
    slow = {id(p) for group in groups if group["lr"] == pytest.approx(0.01) for p in group["params"]}
    assert slow == {id(p) for p in model.backbone.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    before = model.backbone.bn1.running_mean.clone()
    model(pictures())
    assert torch.equal(model.backbone.bn1.running_mean, before)
    assert said_by(model) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("context", CONTEXTS)
def test_half_precision_is_finite_and_a_state_dict_restores_it(context):
    model, other = small(context=context), FANet(3, "mobilenetv3_small_050", context=context, channels=16).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(pictures(4))
        assert all(o.isfinite().all() for o in found.values())
    sum(o.float().square().mean() for o in found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    other.load_state_dict(model.eval().state_dict())
    with torch.no_grad():
        assert torch.equal(other(pictures()), model(pictures()))


def test_it_can_be_exported():
    model = small("resnet10t").eval()
    exported = torch.export.export(model, (pictures(1, 50, 71),)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(pictures(1, 50, 71)), model(pictures(1, 50, 71)))


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="context is 'asp', expected 'adaptive' or 'aspp'"):
        small(context="asp")
    with pytest.raises(ValueError, match=r"timm cannot dilate.*output_stride=16. Set output_stride=32"):
        small("edgenext_xx_small")
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' has maps at strides \[16\], wanted \[4, 8, 16, 32\]"):
        small("vit_tiny_patch16_224")
