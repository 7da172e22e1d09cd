"""DeepLab: sizes, dilation, the parts against direct computation, several sizes at once, and which errors say what."""

import pytest
import timm
import torch
import torch.nn.functional as F

from distillkit.core.adapter import said_by
from distillkit.models.deeplab import DeepLab, V2Head
from distillkit.models.segmentation import dilated_backbone
from distillkit.schema import SGD
from distillkit.training.optim import build_optimizer

TINY = ("resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto")
VERSIONS = ({}, {"separable": False}, {"version": "v2"}, {"version": "v2", "multi_scale": True})


def small(backbone: str = "mobilenetv3_small_050", **options) -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(3, backbone, **{"channels": 16, **options})


def pictures(batch: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_numbers_of_parameters():
    """v2: torchvision's ResNet-101 without its classifier, and four classifiers. v3+: summed by hand."""
    separable = lambda inside, out: 9 * inside + 2 * inside + inside * out + 2 * out  # noqa: E731
    pointwise = lambda inside, out: inside * out + 2 * out  # noqa: E731
    with torch.device("meta"):
        v2, v3plus = DeepLab(21, "resnet101", version="v2"), DeepLab(21)
    assert count(v2) == 42_500_160 + 4 * (2048 * 21 * 9 + 21)
    aspp = 2 * pointwise(2048, 256) + 3 * separable(2048, 256) + pointwise(5 * 256, 256)
    decoder = pointwise(256, 48) + separable(304, 256) + separable(256, 256) + 256 * 21 + 21
    assert count(v3plus) == 23_508_032 + aspp + decoder


@pytest.mark.parametrize(("backbone", "stride"), [*((b, 16) for b in TINY), (TINY[0], 8), (TINY[0], 32)])
def test_logits_have_the_size_of_any_picture(backbone, stride):
    model = small(backbone, output_stride=stride).eval()
    with torch.no_grad():
        for height, width in ((64, 96), (50, 71)):
            assert model(pictures(2, height, width)).shape == (2, 3, height, width)
    assert model.strides == [4, 8, min(stride, 16), stride]


def test_dilation_finds_at_every_other_cell_what_striding_finds():
    """The algorithme a trous: the same weights, computed between the cells as well."""
    torch.manual_seed(0)
    dilated = dilated_backbone("resnet18", 8).eval()
    strided = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    strided.load_state_dict(dilated.state_dict())
    with torch.no_grad():
        fine, coarse = dilated(pictures()), strided(pictures())
    torch.testing.assert_close(fine[2][:, :, ::2, ::2], coarse[2])
    torch.testing.assert_close(fine[3][:, :, ::4, ::4], coarse[3])


def test_a_file_of_weights_goes_into_the_dilated_backbone(tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model("resnet10t").state_dict()
    torch.save(whole, tmp_path / "resnet10t.pth")
    model = small("resnet10t", pretrained=tmp_path / "resnet10t.pth")
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_dilations_are_published_for_one_output_stride_and_scaled_to_others():
    rates = lambda convs: [conv.dilation[0] for conv in convs]  # noqa: E731
    for stride, wanted in ((16, [6, 12, 18]), (8, [12, 24, 36]), (32, [3, 6, 9])):
        with torch.device("meta"):
            branches = small(output_stride=stride).head.aspp.branches[2:]
        assert rates(branch.depthwise for branch in branches) == wanted
    for stride, wanted in ((None, [6, 12, 18, 24]), (16, [3, 6, 9, 12])):
        with torch.device("meta"):
            model = small(version="v2", output_stride=stride)
        assert rates(model.head.classify) == wanted
        assert model.output_stride == (stride or 8)
    assert small().output_stride == 16


def test_the_head_of_v2_is_a_sum_of_dilated_classifiers():
    torch.manual_seed(0)
    head, m = V2Head([4, 8], 3, (1, 2)), torch.randn(2, 8, 6, 7)
    for conv in head.classify:
        conv.bias.data.normal_()
    weights = [(conv.weight, conv.bias, rate) for conv, rate in zip(head.classify, (1, 2))]
    wanted = sum(F.conv2d(m, w, b, padding=rate, dilation=rate) for w, b, rate in weights)
    torch.testing.assert_close(head([torch.zeros(0), m]), wanted)


def test_a_picture_is_as_one_padded_with_the_mean_colour():
    for options in VERSIONS:
        model = small(**options).eval()
        with torch.no_grad():
            odd = pictures(1, 50, 71)
            padded = F.pad(odd, (0, -71 % model.output_stride, 0, -50 % model.output_stride))
            torch.testing.assert_close(model(odd), model(padded)[..., :50, :71])


@pytest.mark.parametrize("version", ["v2", "v3plus"])
def test_at_several_sizes_the_greatest_logit_counts(version):
    model = small(version=version, output_stride=8, multi_scale=True, freeze_bn=True)
    for module in model.modules():  # of dropout and batch statistics
        module.eval()
    model.training = True
    plain = small(version=version, output_stride=8).eval()
    with torch.no_grad():
        found = model(pictures())
        model.training = False
        alone = model(pictures())
    cells = 8 if version == "v2" else 4
    assert [s.shape for s in found["scales"]] == [
        (2, 3, round(64 * r / 8) * 8 // cells, round(96 * r / 8) * 8 // cells) for r in (1, 0.75, 0.5)
    ]
    at_first = [
        F.interpolate(s, found["scales"][0].shape[2:], mode="bilinear", align_corners=False) for s in found["scales"]
    ]
    greatest = torch.maximum(torch.maximum(at_first[0], at_first[1]), at_first[2])
    assert (greatest > at_first[0]).any()
    wanted = F.interpolate(greatest, (64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found["out"], wanted)
    torch.testing.assert_close(alone, wanted)
    with torch.no_grad():  # each is what the model says of the smaller picture
        smaller = F.interpolate(pictures(), (32, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(
            F.interpolate(found["scales"][2], (32, 48), mode="bilinear", align_corners=False), plain(smaller)
        )


def test_the_scales_cover_the_picture_without_its_padding():
    model = small(version="v2", multi_scale=True, freeze_bn=True)
    with torch.no_grad():
        odd, even = pictures(1, 50, 71), F.pad(pictures(1, 50, 71), (0, 1, 0, 6))
        found, padded = model(odd)["scales"], model(even)["scales"]
    for ours, s in zip(found, padded, strict=True):
        wanted = F.interpolate(s, (56, 72), mode="bilinear", align_corners=False)[..., :50, :71]
        torch.testing.assert_close(ours, wanted)


def test_v2_trains_on_one_picture_and_v3plus_says_why_it_cannot():
    assert small(version="v2")(pictures(1)).shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        small()(pictures(1))


@pytest.mark.parametrize(
    ("backbone", "options"), [(b, VERSIONS[0]) for b in TINY] + [(TINY[2], v) for v in VERSIONS[1:]]
)
def test_every_parameter_gets_a_gradient(backbone, options):
    model = small(backbone, **options)
    found = model(pictures(4))
    outputs = [found] if isinstance(found, torch.Tensor) else [found["out"], *found["scales"]]
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(p.grad.any() for p in model.head.parameters())  # a fresh ResNet multiplies its blocks by 0


def test_frozen_statistics_stay_and_their_weights_train():
    model = small(freeze_bn=True).eval().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(pictures()).sum().backward()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not [name for name in moved if name.startswith("backbone.")]
    assert model.backbone.bn1.weight.grad is not None
    free = small()
    free(pictures())
    assert not torch.equal(free.backbone.bn1.running_mean, before["backbone.bn1.running_mean"])


def test_it_says_how_pictures_are_to_be_normalised():
    assert said_by(small("tf_efficientnet_lite0")) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    cfg = small("resnet10t").pretrained_cfg
    assert cfg == {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "input_size": (3, 176, 176)}


def test_the_backbone_has_a_learning_rate_of_its_own():
    model = small()
    groups = build_optimizer(model, SGD(kind="sgd", lr=0.1, backbone_lr=0.1)).param_groups
    slow = {id(p) for group in groups if group["lr"] == pytest.approx(0.01) for p in group["params"]}
    assert slow == {id(p) for p in model.backbone.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("options", VERSIONS)
def test_half_precision_is_finite_and_a_state_dict_restores_it(options):
    model, other = small(**options).eval(), DeepLab(3, "mobilenetv3_small_050", **{"channels": 16, **options}).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model(pictures())
        assert torch.equal(other(pictures()), found)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(pictures()).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"version": "v2", "multi_scale": True}])
def test_it_can_be_exported(options):
    model = small("resnet10t", **options).eval()
    exported = torch.export.export(model, (pictures(1, 50, 71),)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(pictures(1, 50, 71)), model(pictures(1, 50, 71)))


@pytest.mark.parametrize("backbone", ["edgenext_xx_small", "dla46_c"])  # one does not know the option, one asserts
def test_a_backbone_that_cannot_be_dilated_is_used_as_it_is_or_refused(backbone):
    with pytest.raises(ValueError, match=rf"'{backbone}': timm cannot dilate.*output_stride=16. Set output_stride=32"):
        small(backbone)
    assert small(backbone, output_stride=32).eval()(pictures(1, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v3"}, "version is 'v3', expected 'v3plus' or 'v2'"),
        ({"output_stride": 4}, r"output_stride is 4, expected one of \(8, 16, 32\)"),
        ({"output_stride": 0}, "output_stride is 0, expected one of"),
        ({"version": "v2", "output_stride": 32}, r"dilations \(6, 12, 18, 24\).*choose a smaller output_stride"),
        ({"backbone": "resnet10tt"}, "'resnet10tt' is not a timm model"),
        ({"num_classes": 1}, "num_classes is 1, expected 2 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeepLab(**{"num_classes": 3, "backbone": "resnet10t", **options})
