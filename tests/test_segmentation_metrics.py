"""Scores of masks, against the published implementation, plain loops and closed forms; running over data sets."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillkit.evaluation.segmentation import (
    boundary_counts,
    confusion_matrix,
    pixel_counts,
    pixel_metrics,
    predicted_classes,
    seen_at,
    segment_dataset,
)
from distillkit.evaluation.transparent import (
    mirror_counts,
    mirror_metrics,
    soft_counts,
    transparent_counts,
    transparent_metrics,
)
from distillkit.losses.segmentation import IGNORE

GOLDEN = np.load(Path(__file__).parent / "golden" / "dense_fanet_loss_metric_a.npz")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def patches(seed, size=(30, 40), classes=4, ignored=True):
    """Blobs of classes, and some ignored pixels."""
    labels = [*range(classes), *[IGNORE] * ignored]
    coarse = torch.tensor(labels)[torch.randint(len(labels), (6, 6), generator=seeded(seed))]
    return coarse.repeat_interleave(5, 0).repeat_interleave(7, 1)[: size[0], : size[1]]


def logits_of(predicted, classes):
    return F.one_hot(predicted.long(), classes).permute(2, 0, 1).float()


# ---- counts


def test_confusion_counts_labelled_pixels():
    mask, predicted = patches(0), patches(1, ignored=False)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for t, p in zip(mask.flatten().tolist(), predicted.flatten().tolist()):
        if t != IGNORE:
            expected[t, p] += 1
    found = confusion_matrix(predicted.to(torch.uint8), mask, 4)
    assert found.dtype == torch.int64
    assert (found == expected).all()


def test_of_equal_logits_the_first_counts_and_what_is_no_number_is_wrong():
    logits = torch.zeros(3, 2, 2)
    logits[2, 0, 0], logits[1, 1, 1] = 1.0, math.nan
    assert predicted_classes(logits).tolist() == [[2, 0], [0, IGNORE]]
    for label in range(3):
        confusion = confusion_matrix(predicted_classes(logits), torch.full((2, 2), label), 3)
        assert confusion.diagonal().sum() == [2, 0, 1][label]
        assert confusion.sum() == 4


def test_predictions_are_made_at_the_masks_size():
    logits = torch.randn(5, 7, 9, generator=seeded())
    expected = F.interpolate(logits[None], (20, 31), mode="bilinear")[0].argmax(0)
    assert (predicted_classes(logits, (20, 31)) == expected).all()
    mask = patches(3, (20, 31))
    assert (pixel_counts(logits, mask)["confusion"].to_dense() == confusion_matrix(expected, mask, 5)).all()


def test_what_is_wrong_with_a_picture_is_said():
    with pytest.raises(ValueError, match=r"label 4; expected 0\.\.3, or 255"):
        confusion_matrix(torch.zeros(30, 40), torch.full((30, 40), 4), 4)
    with pytest.raises(ValueError, match="label -1"):
        confusion_matrix(torch.zeros(30, 40), torch.full((30, 40), -1), 4)
    with pytest.raises(ValueError, match=r"prediction is \(3, 4\), the mask \(4, 3\)"):
        confusion_matrix(torch.zeros(3, 4), torch.zeros(4, 3), 4)
    with pytest.raises(ValueError, match=r"at most 255 classes, got \(256, 2, 2\)"):
        predicted_classes(torch.zeros(256, 2, 2))


# ---- boundary IoU


def plain_bands(labels, known, classes, reach):
    """(C, H, W): of each class what erosion by a square takes away, pixel by pixel; unknown ones take nothing away."""
    height, width = labels.shape
    out = np.zeros((classes, height, width), bool)
    for y, x in np.ndindex(height, width):
        if not known[y, x]:
            continue
        for v in range(y - reach, y + reach + 1):
            for u in range(x - reach, x + reach + 1):
                inside = 0 <= v < height and 0 <= u < width
                if not inside or (known[v, u] and labels[v, u] != labels[y, x]):
                    out[labels[y, x], y, x] = True
    return out


@pytest.mark.parametrize("band", [0.02, 0.07])
def test_boundary_iou_is_what_erosion_says(band):
    mask, predicted = patches(2), patches(5, ignored=False)
    known = (mask != IGNORE).numpy()
    reach = round(band * math.hypot(30, 40))
    truth, said = (plain_bands(x.numpy(), known, 4, reach) for x in (mask, predicted))
    intersection, union = boundary_counts(predicted.to(torch.uint8), mask, 4, band)
    assert intersection.tolist() == (truth & said).sum((1, 2)).tolist()
    assert union.tolist() == (truth | said).sum((1, 2)).tolist()
    assert intersection.sum() > 0


def test_boundary_iou_of_a_moved_square():
    mask = torch.zeros(100, 100, dtype=torch.int64)
    mask[20:80, 20:80] = 1
    same = boundary_counts(mask, mask, 2, 0.02)  # 2.8 pixels: 3
    ring = 60**2 - 54**2
    assert (same[0] == same[1]).all()
    assert same[0].tolist() == [100**2 - 94**2 + 66**2 - 60**2, ring]
    moved = mask.roll(3, 1)  # upright sides no longer meet
    intersection, union = boundary_counts(moved, mask, 2, 0.02)
    assert intersection[1] == 2 * 3 * 57
    assert union[1] == 2 * ring - 2 * 3 * 57


def test_ignored_pixels_have_no_boundary():
    mask = torch.zeros(50, 50, dtype=torch.int64)
    mask[10:40, 10:40] = IGNORE
    inside = mask.clone()
    inside[10:40, 10:40] = 1  # whatever is predicted there
    for predicted in (inside, torch.zeros_like(mask)):
        intersection, union = boundary_counts(predicted, mask, 2)
        assert (intersection == union).all()
        assert union.tolist() == [50**2 - 48**2, 0]


def test_a_picture_smaller_than_its_band():
    mask = torch.tensor([[0, 1], [1, 0]])
    assert [x.tolist() for x in boundary_counts(mask, mask, 2, 9.0)] == [[2, 2], [2, 2]]


# ---- over a set


def test_scores_are_what_loops_say():
    masks, predictions = (
        [patches(i, classes=3) for i in range(3)],
        [patches(i + 9, (30, 40), 3, False) for i in range(3)],
    )
    found = [pixel_counts(logits_of(p, 5), m) for p, m in zip(predictions, masks)]
    result = pixel_metrics(found, ["a", "b", "c", "d", "e"])
    t = np.concatenate([m.flatten().numpy() for m in masks])
    p = np.concatenate([p.flatten().numpy() for p in predictions])[t != IGNORE]
    t = t[t != IGNORE]
    ious = [((t == c) & (p == c)).sum() / ((t == c) | (p == c)).sum() for c in range(3)]
    recalls = [((t == c) & (p == c)).sum() / (t == c).sum() for c in range(3)]
    assert result.numbers["miou"] == pytest.approx(np.mean(ious))
    assert result.numbers["mean_accuracy"] == pytest.approx(np.mean(recalls))
    assert result.numbers["pixel_accuracy"] == pytest.approx((t == p).mean())
    rows = list(result.classes.values())
    assert [row.iou for row in rows] == pytest.approx([*ious, -1, -1])
    assert [row.accuracy for row in rows] == pytest.approx([*recalls, -1, -1])
    assert [row.pixels for row in rows] == [(t == c).sum() for c in range(5)]
    inter, union = (sum(f[name] for f in found) for name in ("boundary_intersection", "boundary_union"))
    assert [row.boundary_iou for row in rows] == pytest.approx([*(inter[:3] / union[:3]).tolist(), -1, -1])
    assert result.numbers["boundary_iou"] == pytest.approx(float((inter[:3] / union[:3]).mean()))
    assert result.confusion.sum() == len(t)
    joined = pixel_metrics(found[2:] + found[:2], ["a", "b", "c", "d", "e"])  # as of two processes
    assert (joined.numbers, joined.classes) == (result.numbers, result.classes)


def test_scores_of_the_truth_are_one():
    masks = [patches(i) for i in range(2)]
    found = [pixel_counts(logits_of(m.where(m != IGNORE, 0), 4), m) for m in masks]
    result = pixel_metrics(found, list("abcd"))
    assert set(result.numbers.values()) == {1.0}
    assert all((row.iou, row.boundary_iou, row.accuracy) == (1, 1, 1) for row in result.classes.values())


def test_a_class_that_is_only_predicted_counts():
    mask = torch.zeros(10, 10, dtype=torch.int64)
    predicted = mask.clone()
    predicted[5:] = 1
    result = pixel_metrics([pixel_counts(logits_of(predicted, 3), mask)], list("abc"))
    assert result.numbers["miou"] == pytest.approx((0.5 + 0) / 2)
    assert result.classes["b"].iou == 0
    assert (result.classes["b"].accuracy, result.classes["c"].iou) == (-1, -1)
    assert result.numbers["mean_accuracy"] == 0.5


def test_what_cannot_be_scored_is_said():
    counts = pixel_counts(torch.zeros(3, 4, 4), torch.full((4, 4), IGNORE))
    with pytest.raises(ValueError, match="no prediction to score"):
        pixel_metrics([], ["a"])
    with pytest.raises(ValueError, match="tells 3 classes apart, the data have 2"):
        pixel_metrics([counts], ["a", "b"])
    with pytest.raises(ValueError, match="no pixel of the set is labelled"):
        pixel_metrics([counts], ["a", "b", "c"])


# ---- running a model


class Set:
    """Pictures of several sizes, each with a mask of another size."""

    classes = ("a", "b", "c")
    sizes = ((16, 24), (20, 20), (16, 24), (16, 24), (20, 20))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, place):
        epoch, i = place
        assert epoch == 0
        image = torch.rand(3, *self.sizes[i], generator=seeded(i))
        return image, {"mask": patches(i, (30 + i, 31), 3), "key": f"p{i}"}


class Net(nn.Module):
    """A convolution, which sees colours after normalisation; in a dict as torchvision's models give it."""

    def __init__(self, in_dict=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.in_dict, self.batches = nn.Conv2d(3, 3, 3, padding=1), in_dict, []
        self.pretrained_cfg = {"mean": (0.3, 0.4, 0.5), "std": (0.1, 0.2, 0.3)}

    def forward(self, x):
        assert not self.training
        self.batches.append(tuple(x.shape))
        return {"out": self.conv(x)} if self.in_dict else self.conv(x)


@pytest.mark.parametrize("in_dict", [False, True])
def test_a_model_is_run_over_a_set(in_dict):
    model, data, steps = Net(in_dict).train(), Set(), []
    found = segment_dataset(model, data, batch=3, progress=lambda done, total: steps.append((done, total)))
    assert model.training
    assert steps == [(3, 5), (5, 5)]
    assert model.batches == [(2, 3, 16, 24), (1, 3, 20, 20), (1, 3, 16, 24), (1, 3, 20, 20)]
    assert [row["key"] for row in found] == ["p0", "p1", "p2", "p3", "p4"]
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    for i, row in enumerate(found):
        image, target = data[0, i]
        with torch.no_grad():
            logits = model.conv((image - mean) / std)
        expected = pixel_counts(logits, target["mask"])
        assert (row["confusion"].to_dense() == expected["confusion"].to_dense()).all()
        assert (row["boundary_union"] == expected["boundary_union"]).all()
        assert not any(value.numel() > 9 for value in row.values() if isinstance(value, torch.Tensor))
    assert 0 < pixel_metrics(found, data.classes).numbers["miou"] < 1


def test_views_are_averaged_as_probabilities():
    model, pictures = Net().eval(), torch.rand(2, 3, 16, 24, generator=seeded())
    with torch.no_grad():
        probabilities = []
        for scale in (1.0, 0.5, 1.5):
            size = (int(16 * scale), int(24 * scale))
            view = pictures if scale == 1 else F.interpolate(pictures, size, mode="bilinear", antialias=True)
            for mirror in (False, True):
                logits = model(view.flip(-1) if mirror else view)
                logits = F.interpolate(logits, (16, 24), mode="bilinear")
                probabilities.append((logits.flip(-1) if mirror else logits).softmax(1))
        seen = seen_at(model, pictures, (1.0, 0.5, 1.5), flip=True)
        torch.testing.assert_close(seen.softmax(1), torch.stack(probabilities).mean(0))
        torch.testing.assert_close(seen.exp().sum(1), torch.ones(2, 16, 24))
        assert (seen_at(model, pictures) == model(pictures)).all()


def test_flip_makes_scores_of_mirrored_pictures_equal():
    model, pictures = Net().eval(), torch.rand(1, 3, 16, 24, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(
            seen_at(model, pictures.flip(-1), flip=True), seen_at(model, pictures, flip=True).flip(-1)
        )


def test_scales_and_flip_reach_the_model():
    model = Net()
    segment_dataset(model, Set(), batch=1, scales=(0.5, 1.0), flip=True)
    assert model.batches[:4] == [(1, 3, 8, 12), (1, 3, 16, 24)] * 2


def test_what_is_wrong_while_running_is_said():
    class Wrong(Set):
        def __getitem__(self, place):
            image, target = super().__getitem__(place)
            return image, {"mask": torch.full((3, 3), 7), "key": target["key"]}

    class Bare(Set):
        def __getitem__(self, place):
            image, target = super().__getitem__(place)
            return image, {"key": target["key"]}

    with pytest.raises(ValueError, match=r"picture p0: the mask has label 7; expected 0\.\.2"):
        segment_dataset(Net(), Wrong())
    with pytest.raises(ValueError, match="picture p0: its target has no mask"):
        segment_dataset(Net(), Bare())
    with pytest.raises(ValueError, match=r"Flatten: expected logits \(2, C, H, W\).*got \(2, 1152\)"):
        segment_dataset(nn.Flatten(), Set(), batch=3)
    for scales in ((), (0.0, 1.0)):
        with pytest.raises(ValueError, match="scales: expected one positive number or more"):
            segment_dataset(Net(), Set(), scales=scales)


# ---- Trans10K


def transparent_found(legacy=False):
    pairs = zip(torch.from_numpy(GOLDEN["m_logits"]), torch.from_numpy(GOLDEN["m_target"]))
    return [transparent_counts(logits, mask, legacy) for logits, mask in pairs]


@pytest.mark.parametrize(("legacy", "suffix"), [(False, "_exact"), (True, "")])
def test_scores_on_trans10k_are_the_releases(legacy, suffix):
    result = transparent_metrics(transparent_found(legacy), ["background", "things", "stuff"], legacy)
    for ours, theirs in (("miou", "miou"), ("accuracy", "acc"), ("mae", "mae"), ("mber", "mber")):
        assert result.numbers[ours] == pytest.approx(float(GOLDEN[theirs + suffix]), rel=1e-6), ours
    rows = list(result.classes.values())
    assert [row.iou for row in rows] == pytest.approx(GOLDEN["iou" + suffix].tolist(), rel=1e-6)
    assert [row.ber for row in rows[1:]] == pytest.approx(GOLDEN["ber" + suffix].tolist()[1:], rel=1e-6)
    assert rows[0].ber == -1
    assert [row.pixels for row in rows] == [(GOLDEN["m_target"] == c).sum() for c in range(3)]


def test_masks_are_brought_to_the_networks_size():
    logits, mask = torch.randn(3, 12, 12, generator=seeded()), torch.randint(3, (12, 12), generator=seeded(1))
    large = mask.repeat_interleave(3, 0).repeat_interleave(2, 1)
    found, expected = transparent_counts(logits, large), transparent_counts(logits, mask)
    assert (found["confusion"].to_dense() == expected["confusion"].to_dense()).all()


def test_counts_at_the_pictures_size_can_be_scored_too():
    pairs = zip(torch.from_numpy(GOLDEN["m_logits"]), torch.from_numpy(GOLDEN["m_target"]))
    found = [pixel_counts(logits, mask) for logits, mask in pairs]
    classes = ["background", "things", "stuff"]
    assert transparent_metrics(found, classes).numbers == transparent_metrics(transparent_found(), classes).numbers
    with pytest.raises(ValueError, match="legacy_truncate needs 'truncated' of every picture"):
        transparent_metrics(found, classes, legacy_truncate=True)


def test_the_truth_has_no_error():
    masks = [torch.zeros(8, 8, dtype=torch.int64), torch.ones(8, 8, dtype=torch.int64)]  # pictures of one class
    masks += [torch.randint(3, (8, 8), generator=seeded())]
    result = transparent_metrics([transparent_counts(logits_of(m, 3), m) for m in masks], list("abc"))
    assert result.numbers == {"miou": 1, "accuracy": 1, "mae": 0, "mber": 0}


def test_ignored_pixels_are_not_scored():
    mask = torch.randint(3, (8, 8), generator=seeded())
    predicted = mask.clone()
    predicted[:2] = (mask[:2] + 1) % 3
    mask[:2] = IGNORE
    result = transparent_metrics([transparent_counts(logits_of(predicted, 3), mask)], list("abc"))
    assert result.numbers == {"miou": 1, "accuracy": 1, "mae": 0, "mber": 0}


def test_the_counts_go_through_a_run():
    counts = functools.partial(transparent_counts, legacy_truncate=True)
    found = segment_dataset(Net(), Set(), counts=counts)
    assert set(found[0]) == {"confusion", "truncated", "key"}
    assert transparent_metrics(found, Set.classes, legacy_truncate=True).numbers["mber"] > 0


# ---- mirrors and glass


def plain_soft(soft, truth):
    """Every number by its definition, the curve with 256 comparisons."""
    said = soft >= 0.5
    tp, tn = (said & truth).sum(), (~said & ~truth).sum()
    span = soft.max() - soft.min()
    stretched = (soft - soft.min()) / span if span else soft * 0
    precision, recall = [], []
    for k in range(256):
        above = stretched * 255 >= k - 1e-9
        precision.append((above & truth).sum() / max(above.sum(), 1))
        recall.append((above & truth).sum() / max(truth.sum(), 1))
    return {
        "iou": tp / (said | truth).sum(),
        "accuracy": (tp + tn) / truth.size,
        "ber": 1 - (tp / truth.sum() + tn / (~truth).sum()) / 2,
        "mae": abs(soft - truth).mean(),
        "precision": np.array(precision),
        "recall": np.array(recall),
    }


def soft_pictures():
    for i in range(3):
        soft = (torch.rand(20, 30, generator=seeded(i), dtype=torch.float64) * 255).floor() / 255
        mask = (soft + torch.rand(20, 30, generator=seeded(i + 9), dtype=torch.float64) > 0.9 + 0.1 * i).long()
        yield soft, mask


def test_scores_of_soft_maps_are_what_loops_say():
    found, expected = [], []
    for soft, mask in soft_pictures():
        found.append(soft_counts(soft, mask))
        expected.append(plain_soft(soft.numpy(), mask.numpy() == 1))
        for name, value in expected[-1].items():
            np.testing.assert_allclose(found[-1][name], value, rtol=1e-9, err_msg=name)
    numbers = mirror_metrics(found)
    for name in ("iou", "accuracy", "ber", "mae"):
        assert numbers[name] == pytest.approx(np.mean([e[name] for e in expected]))
    precision, recall = (np.mean([e[name] for e in expected], axis=0) for name in ("precision", "recall"))
    best = max(1.3 * p * r / (0.3 * p + r) if p + r else 0 for p, r in zip(precision, recall))
    assert numbers["max_f_beta"] == pytest.approx(best)


def test_soft_maps_are_cut_to_8_bits_and_enlarged():
    logits = torch.randn(2, 5, 6, generator=seeded())
    mask = patches(1, (20, 30), 2)
    levels = torch.from_numpy((logits.softmax(0)[1].numpy() * 255).astype(np.uint8)).float()
    soft = F.interpolate(levels[None, None] / 255, (20, 30), mode="bilinear")[0, 0]
    found, expected = mirror_counts(logits, mask), soft_counts(soft, mask)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    whole = mask.where(mask != IGNORE, 0)
    assert mirror_counts(logits, whole)["mae"] != found["mae"]  # ignored pixels are not scored


def test_the_true_map_and_empty_ones():
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[2:5, 3:7] = 1
    right = mirror_metrics([soft_counts(mask.float(), mask)])
    assert right == {"iou": 1, "accuracy": 1, "ber": 0, "mae": 0, "max_f_beta": pytest.approx(1)}
    none = torch.zeros(8, 8)
    assert soft_counts(none, mask)["iou"] == 0
    assert soft_counts(none, mask)["ber"] == 0.5
    empty = soft_counts(none, torch.zeros_like(mask))
    assert (empty["iou"], empty["accuracy"], empty["ber"]) == (0, 1, 0)


def test_what_is_wrong_with_mirrors_is_said():
    with pytest.raises(ValueError, match=r"logits \(2, h, w\), background and foreground, got \(3, 4, 4\)"):
        mirror_counts(torch.zeros(3, 4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"0 and 1, and 255 for ignored, got labels \[0, 2\]"):
        soft_counts(torch.zeros(1, 2), torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match=r"got labels \[\]"):
        soft_counts(torch.zeros(1, 2), torch.full((1, 2), IGNORE))
    with pytest.raises(ValueError, match="no prediction to score"):
        mirror_metrics([])
