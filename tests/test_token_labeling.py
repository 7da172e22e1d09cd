"""Token logits of any classifier, the TokenLabeling distiller, and MixToken inside a student."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from torch import nn

import distillkit
from distillkit import LogitKD, TokenLabeling
from distillkit.adapters.classifier import TokenClassifier, layout_of, mix_place
from distillkit.core.errors import AdapterError, ViewError, WrapError
from distillkit.core.views import TokenLogits
from distillkit.data.label_map import LabelMap
from distillkit.losses.mix_token import mix, realised
from distillkit.losses.token_labels import smoothed, soft_targets, token_label_loss

LINEAR = ["resnet10t", "regnetx_002", "tf_efficientnet_lite0", "mobilenetv3_small_050", "densenet121"]
TOKENS = {
    "test_vit": {"img_size": 64, "patch_size": 16},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "mixer_s32_224": {"img_size": 64},
}


def vit(classes=5, **options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=classes, **options
    )


def volo(classes):
    torch.manual_seed(0)
    return timm.create_model("volo_d1_224", img_size=64, num_classes=classes)


def batch(count=4, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 64, 64, generator=g), torch.randint(classes, (count,), generator=g)


@pytest.mark.parametrize("name", LINEAR)
def test_where_the_head_is_linear_tokens_average_to_the_picture(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    pictures = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        cells = TokenClassifier(model)(pictures)
        assert cells.shape == (2, 7, 3, 2)
        if "mobilenet" not in name:  # it has an activation behind the pooling
            torch.testing.assert_close(cells.mean((2, 3)), model(pictures), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TOKENS)
def test_every_kind_of_classifier_has_tokens(name):
    torch.manual_seed(0)
    options = dict(TOKENS[name])
    model = timm.create_model(name, num_classes=7, **options).eval()
    before = sorted(model.state_dict())
    pictures = torch.randn(2, 3, 64, 64) if "img_size" in options else torch.randn(2, 3, 224, 224)
    cells = TokenClassifier(model)(pictures)
    assert cells.shape[:2] == (2, 7)
    assert cells.shape[2] == cells.shape[3] == layout_of(model).grid[0]
    assert sorted(model.state_dict()) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_of_a_vit_are_its_head_on_each_of_them():
    model = vit().eval()
    pictures, _ = batch()
    with torch.no_grad():
        tokens = model.head(model.forward_features(pictures)[:, 1:])
        cells = TokenClassifier(model)(pictures)
    torch.testing.assert_close(cells.flatten(2).transpose(1, 2), tokens)


def test_an_aux_head_is_used_where_there_is_one():
    model = volo(7).eval()
    pictures, _ = batch()
    with torch.no_grad():
        wanted = model.aux_head(model.forward_features(pictures)[:, 1:])
        got = TokenClassifier(model)(pictures)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), wanted)


def test_what_is_no_such_classifier_is_named():
    with pytest.raises(AdapterError, match="models built like timm's"):
        TokenClassifier(nn.Linear(3, 3))


def test_a_size_that_a_model_does_not_tell_can_be_said():
    message = (
        r"LevitDistilled cannot run on pictures of 224 x 224 .*pretrained_cfg_overlay=\{\"input_size\": \(3, 64, 64\)"
    )
    with pytest.raises(AdapterError, match=message):
        layout_of(timm.create_model("levit_128s", img_size=64))
    said = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
    assert layout_of(timm.create_model("levit_128s", img_size=64, **said)).grid == (1, 1)


def test_pictures_that_are_not_square_need_a_model_of_their_size():
    model = vit(dynamic_img_size=True).eval()
    with pytest.raises(AdapterError, match=r"24 tokens are no square grid.*build the model with img_size=\(h, w\)"):
        TokenClassifier(model)(torch.zeros(1, 3, 64, 96))
    torch.manual_seed(0)
    built = timm.create_model("test_vit", img_size=(64, 96), num_classes=5)
    assert TokenClassifier(built)(torch.zeros(1, 3, 64, 96)).shape == (1, 5, 4, 6)


# ---- the distiller


def plain_loss(model, annotator, pictures, labels, weight=0.5, smoothing=0.1):
    """What the loss should be without MixToken, from the models' own parts."""
    features = model.forward_features(pictures)
    with torch.no_grad():
        cells = TokenClassifier(annotator)(pictures)
    soft = soft_targets(cells.mean((2, 3)), cells, labels, smoothing)
    rows = model.head(features[:, 1:])
    return token_label_loss(model(pictures), rows, soft.image, soft.tokens, dense_weight=weight).total


def test_the_loss_of_an_online_annotator():
    student, annotator = vit(), vit().eval()
    annotator.head.weight.data.mul_(30)
    pictures, labels = batch()
    model = distillkit.wrap(student, annotator, [TokenLabeling(mix_token=False)])
    losses = model(pictures, labels)
    assert list(losses)[:1] == ["token_labeling"]
    torch.testing.assert_close(losses["token_labeling"], plain_loss(student, annotator, pictures, labels))
    losses.total.backward()
    assert student.patch_embed.proj.weight.grad.abs().max() > 0


def test_an_annotator_of_another_grid_is_pooled_to_the_students_tokens():
    student = vit()
    torch.manual_seed(1)
    annotator = timm.create_model("resnet10t", num_classes=5).eval()
    pictures, labels = batch()
    model = distillkit.wrap(student, annotator, [TokenLabeling(mix_token=False)])
    assert model(pictures, labels).total > 0


def test_mix_token_swaps_tokens_of_pictures_and_swaps_their_predictions_back():
    torch.manual_seed(3)
    student = vit()
    pictures, labels = batch()
    distiller = TokenLabeling("labels")
    seen = {}
    mixed = distiller._mixed

    def watched(tokens, place):
        seen["before"] = tokens.detach()
        seen["after"] = out = mixed(tokens, place)
        seen["box"] = distiller._box
        return out

    distiller._mixed = watched
    model = distillkit.wrap(student, distillers=[distiller])
    while "box" not in seen or realised(seen["box"], (4, 4)) == 1:
        loss = model(pictures, labels)["token_labeling"]
    box = seen["box"]
    lam = realised(box, (4, 4))
    torch.testing.assert_close(mix(seen["after"], box, "bnc", (4, 4)), seen["before"])
    truth = smoothed(labels, 5, 0.1)
    handle = student.patch_embed.register_forward_hook(lambda m, a, out: mix(out, box, "bnc", (4, 4)))
    features = student.forward_features(pictures)
    handle.remove()
    rows = mix(student.head(features[:, 1:]), box, "bnc", (4, 4))
    classes = student.head(features[:, 0])
    wanted = token_label_loss(classes, rows, truth, lam=lam).total
    torch.testing.assert_close(loss, wanted)
    assert distiller._box is None


def test_mix_token_is_in_training_steps_alone_and_leaves_with_the_wrapper():
    student = vit()
    before = copy.deepcopy(student).eval()
    pictures, labels = batch()
    model = distillkit.wrap(student, distillers=[TokenLabeling("labels")])
    model(pictures, labels)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), before(pictures))
    student.train()
    student.eval()
    copied = pickle.loads(pickle.dumps(student))
    assert not copied.patch_embed._forward_hooks
    assert not copy.deepcopy(student).patch_embed._forward_hooks
    assert model.unwrap() is student
    assert not student.patch_embed._forward_hooks
    assert type(student.patch_embed._forward_hooks) is type(nn.Linear(1, 1)._forward_hooks)


def test_volos_first_tokens_are_mixed_in_boxes_of_its_last_ones():
    student = volo(5)
    place = mix_place(student, "patch_embed")
    assert (place.layout, place.scale, place.grid) == ("bchw", 2, (8, 8))
    pictures, labels = batch()
    losses = distillkit.wrap(student, distillers=[TokenLabeling("labels")])(pictures, labels)
    losses.total.backward()
    assert student.aux_head.weight.grad.abs().max() > 0
    assert student.head.weight.grad.abs().max() > 0


def test_stored_maps_that_hold_what_an_annotator_says_teach_the_same():
    student, annotator = vit(), vit().eval()
    annotator.head.weight.data.mul_(30)
    pictures, labels = batch()
    with torch.no_grad():
        scores, indices = TokenClassifier(annotator)(pictures).topk(5, 1)
    maps = [LabelMap.from_stored(s, i, (64, 64)) for s, i in zip(scores, indices, strict=True)]
    model = distillkit.wrap(student, distillers=[TokenLabeling("maps", mix_token=False)])
    loss = model(pictures, {"labels": labels, "label_map": maps})["token_labeling"]
    torch.testing.assert_close(loss, plain_loss(student, annotator, pictures, labels), rtol=1e-4, atol=1e-5)


def test_a_map_follows_its_picture():
    """The best class of each cell is its place: a student that says so of a mirrored picture has a small loss."""
    cells = torch.arange(16).view(4, 4)
    stored = LabelMap.from_stored(torch.full((1, 4, 4), 20.0), cells[None], (64, 64))
    from torchvision.transforms.v2 import functional as F

    distiller = TokenLabeling("maps", mix_token=False, smoothing=0.0, fill="zero")
    truth = nn.functional.one_hot(cells.flip(1).flatten(), 16).float()[None] * 20
    right = TokenLogits(torch.zeros(1, 16), truth, (4, 4))
    wrong = TokenLogits(torch.zeros(1, 16), nn.functional.one_hot(cells.flatten(), 16).float()[None] * 20, (4, 4))
    targets = {"labels": torch.zeros(1, dtype=torch.int64), "label_map": [F.horizontal_flip(stored)]}
    losses = [float(distiller(view, None, targets)) for view in (right, wrong)]
    assert losses[0] < losses[1] - 5


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: distillkit.wrap(vit(), vit(), [TokenLabeling(), LogitKD()]), WrapError, "leave one out"),
        (
            lambda: distillkit.wrap(vit(), distillers=[TokenLabeling("labels")], criterion=nn.CrossEntropyLoss()),
            WrapError,
            "leave out criterion=",
        ),
        (
            lambda: distillkit.wrap(vit(), distillers=[TokenLabeling("labels", mix_at="stem")]),
            ValueError,
            "runs no such",
        ),
        (
            lambda: distillkit.wrap(timm.create_model("resnet10t"), distillers=[TokenLabeling("labels")]),
            ValueError,
            "ResNet runs no such module: set mix_token=False, or mix_at to one of layer4",
        ),
        (lambda: TokenLabeling("map"), ValueError, "source must be"),
        (lambda: TokenLabeling(smoothing=1.0), ValueError, "smoothing must be"),
        (
            lambda: distillkit.wrap(vit(), distillers=[TokenLabeling("labels")])(*batch()[:1]),
            TypeError,
            "and then the targets",
        ),
        (
            lambda: distillkit.wrap(vit(), distillers=[TokenLabeling("maps")])(*batch()),
            ViewError,
            'source="maps" reads label maps',
        ),
        (
            lambda: distillkit.wrap(vit(), distillers=[TokenLabeling("labels")])(batch()[0], torch.rand(4, 5)),
            ViewError,
            "needs the class of every picture",
        ),
        (lambda: distillkit.wrap(vit(), vit(6), [TokenLabeling()])(*batch()), ViewError, "6 classes, the student 5"),
    ],
)
def test_what_cannot_be_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_criterion_may_stand_beside_it_without_mix_token():
    model = distillkit.wrap(vit(), vit(), [TokenLabeling(mix_token=False), LogitKD()], nn.CrossEntropyLoss())
    assert {"task", "token_labeling", "kd"} <= set(model(*batch()))


def test_the_release_convention():
    """Of rows that sum to 1 + s / C, and dense weight 1; golden values are those of ``token_label_loss``."""
    distiller = TokenLabeling("teacher", mix_token=False, convention="release")
    assert (distiller.dense_weight, distiller.fill) == (1.0, "zero")
    assert TokenLabeling(convention="release", dense_weight=0.5).dense_weight == 0.5
    g = torch.Generator().manual_seed(0)
    student = TokenLogits(torch.randn(2, 5, generator=g), torch.randn(2, 4, 5, generator=g), (2, 2))
    teacher = TokenLogits(None, torch.randn(2, 4, 5, generator=g), (2, 2))
    labels = torch.tensor([1, 2])
    cells = teacher.tokens.transpose(1, 2).unflatten(2, (2, 2))
    soft = soft_targets(cells.mean((2, 3)), cells, labels, 0.1, normalized=False)
    wanted = token_label_loss(student.classes, student.tokens, soft.image, soft.tokens, dense_weight=1.0).total
    torch.testing.assert_close(distiller(student, teacher, labels), wanted)
    assert np.isclose(float(soft.tokens.sum(-1)[0, 0]), 1.02)
