"""The losses of segmentation, against the published implementations, plain loops and closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillkit.losses.boundary import dice_loss
from distillkit.losses.segmentation import IGNORE, SegmentationLoss, nearest, pixel_cross_entropy

GOLDEN = np.load(Path(__file__).parent / "golden" / "dense_fanet_loss_metric_a.npz")


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_masks(batch=2, size=(6, 8), classes=3, ignored=5):
    masks = torch.randint(classes, (batch, *size), generator=torch.Generator().manual_seed(1))
    masks.view(-1)[:: masks.numel() // ignored] = IGNORE
    return masks


# ---- boundary


def test_dice_of_raw_logits_is_the_releases():
    logits = golden("dice_logits").requires_grad_()
    loss = dice_loss(logits, golden("dice_target"), "none")
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden("dice"), rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, golden("dice_grad"), rtol=1e-9, atol=1e-12)


def test_dice_of_probabilities():
    target = golden("dice_target")
    loss = dice_loss(golden("dice_logits"), target)
    torch.testing.assert_close(loss, dice_loss(golden("dice_logits").sigmoid(), target, "none"))
    assert 0 <= loss <= 1
    sure = torch.where(target > 0, 50.0, -50.0)[:, None]
    assert dice_loss(sure, target) < 1e-12
    assert dice_loss(torch.full((1, 1, 4, 4), -50.0), torch.zeros(1, 4, 4)) < 1e-12  # no boundary, none predicted
    # all ones against none: 1 - 1 / (16 + 1)
    assert dice_loss(torch.full((1, 1, 4, 4), 50.0), torch.zeros(1, 4, 4)).item() == pytest.approx(16 / 17)


def test_dice_is_a_mean_over_pictures_and_skips_what_is_not_labelled():
    logits, target = some(3, 1, 5, 6), (some(3, 5, 6, seed=1) > 0.5).to(torch.uint8)
    alone = [dice_loss(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(dice_loss(logits, target), torch.stack(alone).mean())
    torch.testing.assert_close(dice_loss(logits.repeat(2, 1, 1, 1), target.repeat(2, 1, 1)), dice_loss(logits, target))
    labelled = torch.ones(3, 5, 6, dtype=torch.bool)
    labelled[:, :, 4:] = False
    cut = dice_loss(logits[..., :4], target[..., :4])
    torch.testing.assert_close(dice_loss(logits, target, labelled=labelled), cut)
    assert not torch.isclose(dice_loss(logits, target), cut)


def test_what_is_wrong_with_boundaries_is_said():
    with pytest.raises(ValueError, match=r"same pixels, got \(1, 4, 4\) and \(1, 4, 5\)"):
        dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match=r"pred: expected .*got \(1, 2, 4, 4\)"):
        dice_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="'sigmoid' or 'none', got 'relu'"):
        dice_loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), "relu")


# ---- cross entropy of pixels


def test_cross_entropy_is_the_releases():
    logits = golden("seg_logits").requires_grad_()
    loss = pixel_cross_entropy(logits, golden("seg_target"))
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden("ce"), rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, golden("ce_grad"), rtol=1e-9, atol=1e-12)


def looped(logits, masks, weights):
    """The weighted mean, pixel by pixel."""
    total = mass = 0.0
    for b, y, x in np.ndindex(*masks.shape):
        label = int(masks[b, y, x])
        if label != IGNORE:
            row = logits[b, :, y, x].tolist()
            total += weights[label] * (math.log(sum(math.exp(v) for v in row)) - row[label])
            mass += weights[label]
    return total / mass


@pytest.mark.parametrize("weights", [None, (0.01, 0.2, 0.03)])
def test_cross_entropy_is_a_mean_over_labelled_pixels(weights):
    logits, masks = some(2, 3, 6, 8), some_masks()
    loss = pixel_cross_entropy(logits, masks, weights)
    assert loss.item() == pytest.approx(looped(logits, masks, weights or (1, 1, 1)), rel=1e-9)
    filled = logits.clone()
    filled.permute(0, 2, 3, 1)[masks == IGNORE] = 40.0
    assert pixel_cross_entropy(filled, masks, weights) == loss


def test_a_batch_without_labels_costs_nothing_and_has_gradient():
    logits = some(2, 3, 4, 4).requires_grad_()
    loss = pixel_cross_entropy(logits, torch.full((2, 4, 4), IGNORE))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_a_loss_is_the_same_however_the_labelled_pixels_are_dealt_to_ranks(monkeypatch):
    logits, masks = some(2, 3, 6, 8), some_masks()
    masks[1, 1:] = IGNORE  # the second picture has few labels
    counts = (masks != IGNORE).flatten(1).sum(1).double()
    monkeypatch.setattr("distillkit.losses.segmentation.mean_over_ranks", lambda count: counts.mean())
    ranks = [pixel_cross_entropy(logits[i : i + 1], masks[i : i + 1]) for i in range(2)]
    monkeypatch.undo()
    torch.testing.assert_close(torch.stack(ranks).mean(), pixel_cross_entropy(logits, masks))


def test_half_precision_is_lifted():
    logits, masks = some(2, 3, 6, 8).half(), some_masks()
    assert pixel_cross_entropy(logits, masks).dtype == torch.float32
    torch.testing.assert_close(pixel_cross_entropy(logits, masks), pixel_cross_entropy(logits.float(), masks))
    assert dice_loss(300 * logits[:, :1], masks == 1, "none").isfinite()  # squares and sums that half cannot hold


def test_what_is_wrong_with_masks_is_said():
    with pytest.raises(ValueError, match=r"got \(2, 3, 6, 8\) and \(2, 6, 9\)"):
        pixel_cross_entropy(some(2, 3, 6, 8), torch.zeros(2, 6, 9, dtype=torch.int64))
    masks = some_masks()
    masks[1, 2, 3] = 3
    with pytest.raises(ValueError, match=r"label 3; expected 0\.\.2, or 255"):
        pixel_cross_entropy(some(2, 3, 6, 8), masks)
    with pytest.raises(ValueError, match="each of the 3 classes, got 2"):
        pixel_cross_entropy(some(2, 3, 6, 8), some_masks(), (1.0, 2.0))
    with pytest.raises(ValueError, match=r"masks: expected int64, got torch\.uint8"):
        pixel_cross_entropy(some(2, 3, 6, 8), some_masks().to(torch.uint8))


# ---- masks of other sizes


@pytest.mark.parametrize(("size", "new"), [((6, 8), (3, 4)), ((6, 8), (5, 7)), ((5, 7), (11, 9)), ((65, 64), (9, 8))])
def test_a_label_is_that_at_the_centre(size, new):
    masks = torch.randint(9, (2, *size), generator=torch.Generator().manual_seed(2))
    found = nearest(masks, new)
    assert found.shape == (2, *new)
    for y, x in np.ndindex(*new):
        at = [math.floor((i + 0.5) * old / cells) for i, old, cells in zip((y, x), size, new)]
        assert (found[:, y, x] == masks[:, at[0], at[1]]).all()


def test_a_label_is_what_torch_takes():
    masks = torch.randint(9, (2, 30, 41), generator=torch.Generator().manual_seed(2))
    theirs = F.interpolate(masks[:, None].double(), (7, 19), mode="nearest-exact")[:, 0].long()
    assert (nearest(masks, (7, 19)) == theirs).all()


# ---- the criterion


def test_a_plain_output_has_one_loss():
    logits, masks = some(2, 3, 6, 8), some_masks()
    losses = SegmentationLoss()(logits, {"masks": masks})
    assert list(losses) == ["ce"]
    assert losses["ce"] == pixel_cross_entropy(logits, masks)


def test_every_part_of_an_output_has_its_loss():
    masks, boundary = some_masks(), (some(2, 6, 8, seed=3) > 0).to(torch.uint8)
    out = {
        "out": some(2, 3, 6, 8),
        "aux": some(2, 3, 3, 4, seed=4),
        "scales": [some(2, 3, 3, 4, seed=5), some(2, 3, 2, 2, seed=6)],
        "boundary": some(2, 1, 6, 8, seed=7),
    }
    weights = (1.0, 2.0, 0.5)
    losses = SegmentationLoss(5.0, 0.3, "none", weights)(out, {"masks": masks, "boundary": boundary})
    assert list(losses) == ["ce", "aux", "scales", "boundary"]
    torch.testing.assert_close(losses["ce"], pixel_cross_entropy(out["out"], masks, weights))
    enlarged = F.interpolate(out["aux"], (6, 8), mode="bilinear")
    torch.testing.assert_close(losses["aux"], 0.3 * pixel_cross_entropy(enlarged, masks, weights))
    scales = sum(pixel_cross_entropy(s, nearest(masks, s.shape[2:]), weights) for s in out["scales"])
    torch.testing.assert_close(losses["scales"], scales)
    labelled = masks != IGNORE
    torch.testing.assert_close(losses["boundary"], 5 * dice_loss(out["boundary"], boundary, "none", labelled))


def test_a_loss_does_not_depend_on_the_size_of_the_batch():
    masks, boundary = some_masks(), (some(2, 6, 8, seed=3) > 0).to(torch.uint8)
    out = {"out": some(2, 3, 6, 8), "aux": some(2, 3, 3, 4), "boundary": some(2, 1, 6, 8)}
    once = SegmentationLoss()(out, {"masks": masks, "boundary": boundary})
    twice = SegmentationLoss()(
        {k: v.repeat(2, 1, 1, 1) for k, v in out.items()},
        {"masks": masks.repeat(2, 1, 1), "boundary": boundary.repeat(2, 1, 1)},
    )
    for name in once:
        torch.testing.assert_close(once[name], twice[name])


def test_what_is_missing_is_said():
    masks = some_masks()
    with pytest.raises(ValueError, match=r"predicts boundaries must have 'boundary', got \['masks'\]"):
        SegmentationLoss()({"out": some(2, 3, 6, 8), "boundary": some(2, 1, 6, 8)}, {"masks": masks})
    with pytest.raises(ValueError, match=r"output must have 'out', got \['logits'\]"):
        SegmentationLoss()({"logits": some(2, 3, 6, 8)}, {"masks": masks})
    with pytest.raises(ValueError, match=r"targets must have 'masks', got \['labels'\]"):
        SegmentationLoss()(some(2, 3, 6, 8), {"labels": masks})
