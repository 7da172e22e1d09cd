"""Boundary bands and FakeMix, against arrays of the published implementation, plain loops and properties."""

import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from distillkit.data.boundary import boundary_band, class_boundaries, in_pixels, overlap
from distillkit.data.fakemix import FakeMix, FakeMixed, Paste, moved, paste
from distillkit.losses.segmentation import IGNORE

GOLDEN = np.load(Path(__file__).parent / "golden" / "dense_fakemix_a.npz")
VARIANTS = {"fakemix": "boundary", "zeros": "zeros", "means": "mean", "images": "other"}


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(number=4, size=(24, 32)):
    """Noise, and masks of a rectangle of two classes each."""
    images = torch.randint(1, 256, (number, 3, *size), generator=seeded(3), dtype=torch.uint8)
    masks = torch.zeros(number, *size, dtype=torch.int64)
    for i in range(number):
        masks[i, 5 + i : 17 + i, 6:20] = 1
        masks[i, 5 + i : 17 + i, 14:20] = 2
    return images, masks


# ---- bands


def within(points, radius, size):
    """Pixels whose centre is within ``radius`` of a point, by distances."""
    yy, xx = np.mgrid[: size[0], : size[1]]
    near = np.zeros(size, bool)
    for y, x in points:
        near |= (yy - y) ** 2 + (xx - x) ** 2 <= radius**2
    return near


def neighbours(y, x):
    return [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]


def plain_band(mask, thickness):
    def background(y, x):
        inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
        return not inside or mask[y, x] == 0

    points = [
        (y, x)
        for y, x in np.ndindex(*mask.shape)
        if 0 < mask[y, x] != IGNORE and any(background(*n) for n in neighbours(y, x))
    ]
    return within(points, thickness / 2, mask.shape)


def plain_class_boundaries(mask, thickness):
    def other(y, x, label):
        inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
        return inside and mask[y, x] not in (label, IGNORE)

    points = [
        (y, x)
        for y, x in np.ndindex(*mask.shape)
        if mask[y, x] != IGNORE and any(other(*n, mask[y, x]) for n in neighbours(y, x))
    ]
    return within(points, (thickness - 1) / 2, mask.shape)


def patches(seed, size=(20, 26)):
    """Blobs of four classes, one of them the background, and some ignored pixels."""
    coarse = torch.tensor([0, 0, 1, 2, 3, IGNORE])[torch.randint(6, (5, 6), generator=seeded(seed))]
    return coarse.repeat_interleave(4, 0).repeat_interleave(5, 1)[: size[0], : size[1]]


@pytest.mark.parametrize("thickness", [1, 2, 3, 5, 8, 60])
def test_bands_are_what_distances_say(thickness):
    for seed in range(3):
        mask = patches(seed)
        band = boundary_band(mask, thickness)
        assert band.dtype == torch.uint8
        assert (band.bool().numpy() == plain_band(mask.numpy(), thickness)).all()
        found = class_boundaries(mask, thickness)
        assert (found.bool().numpy() == plain_class_boundaries(mask.numpy(), thickness)).all()
        assert (boundary_band(mask, thickness, between="classes") == found).all()


def test_bands_of_straight_edges():
    mask = torch.zeros(60, 60, dtype=torch.int64)
    mask[20:40, 20:30], mask[20:40, 30:40] = 1, 2
    band = boundary_band(mask)
    assert band[30].nonzero().flatten().tolist() == [*range(16, 25), *range(35, 44)]  # nothing between 1 and 2
    between = class_boundaries(mask)
    assert between[30].nonzero().flatten().tolist() == [*range(16, 24), *range(26, 34), *range(36, 44)]
    hole = torch.ones(60, 60, dtype=torch.int64)
    hole[20:40, 20:40] = 0
    assert boundary_band(hole)[30].nonzero().flatten().tolist() == [
        *range(5),
        *range(15, 24),
        *range(36, 45),
        *range(55, 60),
    ]
    assert class_boundaries(hole)[30].nonzero().flatten().tolist() == [*range(16, 24), *range(36, 44)]  # not the frame


def test_bands_of_nothing():
    for mask in (torch.zeros(9, 9, dtype=torch.int64), torch.full((9, 9), IGNORE)):
        assert not boundary_band(mask).any()
        assert not class_boundaries(mask).any()
    assert not class_boundaries(torch.full((1, 9), 4)).any()


def test_ignored_pixels_make_no_boundary():
    mask = torch.zeros(20, 20, dtype=torch.int64)
    mask[5:15, 5:15] = IGNORE
    mask[7:13, 7:13] = 1  # with a rim of ignored pixels
    assert not boundary_band(mask, 4).any()
    assert not class_boundaries(mask, 4).any()
    assert boundary_band(mask, 4, ignore=77).any()


def test_bands_of_a_batch_are_those_of_its_masks():
    masks = torch.stack([patches(i) for i in range(3)])
    assert (boundary_band(masks) == torch.stack([boundary_band(m) for m in masks])).all()
    assert (class_boundaries(masks) == torch.stack([class_boundaries(m) for m in masks])).all()


def test_thickness_as_a_share_of_the_side():
    assert [in_pixels(t, (512, 700)) for t in (8, 8 / 512, 0.016, 1e-6)] == [8, 8, 8, 1]
    mask = patches(0)
    assert (boundary_band(mask, 0.2) == boundary_band(mask, 4)).all()
    for wrong in (0, -1, 1.5, 0.0, True, float("nan")):
        with pytest.raises(ValueError, match="thickness: expected whole pixels"):
            in_pixels(wrong, (512, 512))


def test_what_is_wrong_with_masks_is_said():
    with pytest.raises(ValueError, match=r"expected integers \(\.\.\., H, W\), got torch\.float32 \(4, 4\)"):
        boundary_band(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"got torch\.int64 \(4,\)"):
        class_boundaries(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"'foreground' or 'classes'.*got 'edges'"):
        boundary_band(patches(0), between="edges")
    with pytest.raises(ValueError, match="use between='foreground'"):
        boundary_band(patches(0), between="classes", convention="release")


def test_the_release_draws_with_opencv_and_says_so_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        boundary_band(patches(0), convention="release")


def test_bands_are_nearly_the_releases():
    ours, theirs = boundary_band(golden("mask")).bool(), golden("fakemix/boundary").bool()
    both = (ours & theirs).flatten(1).sum(1) / (ours | theirs).flatten(1).sum(1)
    assert both.min() > 0.94


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="OpenCV is not installed")
def test_bands_are_the_releases_with_opencv():
    assert (boundary_band(golden("mask"), convention="release") == golden("fakemix/boundary")).all()
    yy, xx = torch.meshgrid(torch.arange(200), torch.arange(260), indexing="ij")
    mask = ((yy - 80) ** 2 / 60**2 + (xx - 120) ** 2 / 40**2 < 1).long()
    mask[70:90, 100:130] = 0
    mask[150:, 150:220] = 2
    for thickness in (4, 8, 12):
        ours, theirs = boundary_band(mask, thickness), boundary_band(mask, thickness, convention="release")
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.94, thickness


# ---- moving


@pytest.mark.parametrize("shift", range(-7, 8))
def test_a_row_is_moved_without_wrapping(shift):
    row = torch.arange(1, 6)
    to, of = overlap(shift, 5)
    out = torch.zeros(5, dtype=torch.int64)
    out[to] = row[of]
    assert out.tolist() == [int(row[i - shift]) if 0 <= i - shift < 5 else 0 for i in range(5)]


def test_a_map_is_moved_right_and_down():
    found = moved(torch.tensor([[1, 2, 3], [4, 5, 6]]), (1, -1))
    assert found.tolist() == [[0, 4, 5], [0, 0, 0]]


# ---- against the release


def pastes_of(draws, shifts, count=3):
    """What the release's sequence of draws means: of each picture a coin and, for 1, ``count`` sources."""
    pastes, rest = [], iter(draws)
    for into in range(len(shifts)):
        for source in [next(rest) for _ in range(count)] if next(rest) else []:
            pastes.append(Paste(into, source, tuple(shifts[source][:2]), tuple(shifts[source][-2:])))
    assert next(rest, None) is None
    return pastes


@pytest.mark.parametrize("name", VARIANTS)
def test_mixed_pictures_are_the_releases(name):
    images, bands = golden("image").permute(0, 3, 1, 2), golden(f"{name}/boundary")
    shifts = golden(f"{name}/shift").tolist()
    for i, shift in enumerate(shifts):
        assert (moved(bands[i], shift[:2]) == golden(f"{name}/boundary_move")[i]).all()
    for mix in range(2):
        pastes = pastes_of(golden(f"{name}/draws{mix}").tolist(), shifts)
        expected = golden(f"{name}/mixed{mix}").permute(0, 3, 1, 2)
        before = images.clone()
        found = paste(images, bands, pastes, VARIANTS[name])
        assert found.dtype == torch.uint8
        assert (found == expected).all()
        assert (images == before).all()
        assert not (found == images).all()
        as_float = paste(images / 255, bands, pastes, VARIANTS[name])
        assert ((as_float * 255).round() == expected).all()


@pytest.mark.parametrize("name", ["fakemix", "images"])
def test_moved_contents_are_the_releases(name):
    images, bands = golden("image").permute(0, 3, 1, 2), golden(f"{name}/boundary")
    for i, shift in enumerate(golden(f"{name}/shift").tolist()):
        content = moved(images[i], shift[-2:]) * moved(bands[i], shift[:2])
        assert (content == golden(f"{name}/content_move")[i].permute(2, 0, 1)).all()


# ---- properties


def test_labels_stay_and_pictures_are_new():
    images, masks = batch()
    before, labels = images.clone(), masks.clone()
    mixed, given = FakeMix(p=1.0)(images, masks, seeded())
    assert given is masks
    assert (masks == labels).all()
    assert (images == before).all()
    assert not (mixed == images).all()
    targets = {"masks": masks, "boundary": boundary_band(masks), "key": list("abcd")}
    again, given = FakeMix(p=1.0)(images, targets, seeded())
    assert given is targets
    assert list(targets) == ["masks", "boundary", "key"]
    assert (again == mixed).all()
    only, _ = FakeMix(p=1.0)(images, {"masks": masks}, seeded())
    assert (only == mixed).all()


def test_given_bands_are_used():
    images, masks = batch()
    none = {"masks": masks, "boundary": torch.zeros_like(masks)}
    assert (FakeMix(p=1.0)(images, none, seeded())[0] == images).all()


def test_nothing_changes_without_a_paste():
    images, masks = batch()
    assert (FakeMix(p=0.0)(images, masks, seeded())[0] == images).all()
    bands = boundary_band(masks)
    assert (paste(images, bands, []) == images).all()
    themselves = [Paste(i, i, (0, 0), (0, 0)) for i in range(4)]
    assert (paste(images, bands, themselves) == images).all()
    gone = [Paste(0, 1, (32, 0), (0, 0)), Paste(1, 2, (0, -24), (0, 0)), Paste(2, 1, (-99, 99), (0, 0))]
    assert (paste(images, bands, gone) == images).all()


@pytest.mark.parametrize("variant", ["boundary", "zeros", "mean", "other"])
@pytest.mark.parametrize("per_paste_shift", [False, True])
def test_only_what_lies_under_moved_bands_changes(variant, per_paste_shift):
    images, masks = batch()
    fakemix = FakeMix(4, p=1.0, variant=variant, per_paste_shift=per_paste_shift)
    bands, pastes = fakemix.bands(masks), fakemix.draw(4, (24, 32), seeded(5))
    mixed, _ = fakemix(images, masks, seeded(5))
    for i in range(4):
        union = torch.zeros(24, 32, dtype=torch.uint8)
        for one in pastes:
            if one.into == i:
                union |= moved(bands[one.source], one.shift)
        changed = (mixed[i] != images[i]).any(0)
        assert changed.any()
        assert not (changed & (union == 0)).any()
    if variant in ("zeros", "mean"):
        colour = torch.tensor([0, 0, 0] if variant == "zeros" else [123, 116, 103], dtype=torch.uint8)
        assert (mixed.movedim(1, -1)[(mixed != images).any(1)] == colour).all()


def test_what_was_mixed_is_no_source():
    images, masks = batch(2)
    bands = boundary_band(masks, 4)
    twice = [Paste(0, 1, (3, 2), (3, 2)), Paste(1, 0, (1, 1), (1, 1))]
    mixed = paste(images, bands, twice)
    assert (mixed[1] == paste(images, bands, twice[1:])[1]).all()


def test_a_later_paste_lies_on_top():
    images, masks = batch(3)
    bands = torch.ones_like(masks, dtype=torch.uint8)
    mixed = paste(images, bands, [Paste(0, 1, (0, 0), (0, 0)), Paste(0, 2, (0, 12), (0, 12))])
    assert (mixed[0, :, 12:] == images[2, :, :12]).all()
    assert (mixed[0, :, :12] == images[1, :, :12]).all()


def test_draws_are_what_is_published():
    fakemix = FakeMix(max_shift=0.5, count=3, p=0.5)
    generator = seeded(1)
    draws = [fakemix.draw(4, (10, 21), generator) for _ in range(600)]
    pasted = [len({one.into for one in pastes}) for pastes in draws]
    assert sum(pasted) / 2400 == pytest.approx(0.5, abs=0.05)
    everything = [one for pastes in draws for one in pastes]
    assert len(everything) == 3 * sum(pasted)
    sources = torch.tensor([one.source for one in everything]).bincount() / len(everything)
    assert sources.tolist() == pytest.approx([0.25] * 4, abs=0.05)
    assert {one.shift[0] for one in everything} == set(range(-10, 11))  # dx: half of the width, both ends included
    assert {one.shift[1] for one in everything} == set(range(-5, 6))
    for pastes in draws:  # a batch moves each band once
        assert len({(one.source, one.shift) for one in pastes}) == len({one.source for one in pastes})
        assert all(one.content == one.shift for one in pastes)
    again = FakeMix(p=1.0, per_paste_shift=True).draw(4, (1000, 1000), seeded())
    assert len({one.shift for one in again}) == 12
    other = FakeMix(p=1.0, variant="other").draw(4, (1000, 1000), seeded())
    assert all(one.content != one.shift for one in other)


def test_draws_follow_their_generator():
    images, masks = batch()
    fakemix = FakeMix(4)
    first, second = (fakemix(images, masks, seeded(7))[0] for _ in range(2))
    assert (first == second).all()
    assert not all((fakemix(images, masks, seeded(i))[0] == first).all() for i in range(8, 12))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = torch.get_rng_state()
        fakemix(images, masks, seeded(1))
        assert (torch.get_rng_state() == state).all()
        assert (fakemix(images, masks)[0] == first).all()
        assert not (torch.get_rng_state() == state).all()
    generators = [seeded(3), seeded(3)]  # equally many draws, whatever comes out
    FakeMix(p=0.0).draw(4, (24, 32), generators[0])
    FakeMix(p=1.0, variant="other").draw(4, (24, 32), generators[1])
    assert (generators[0].get_state() == generators[1].get_state()).all()


def test_classes_have_boundaries_where_they_are_asked_for():
    _, masks = batch()
    assert (FakeMix(4, between="classes").bands(masks) == class_boundaries(masks, 4)).all()
    assert (FakeMix(4, ignore=2).bands(masks) == boundary_band(masks, 4, ignore=2)).all()


def test_it_works_in_a_collate_function():
    images, masks = batch()
    items = [(image, {"masks": mask, "boundary": boundary_band(mask)}) for image, mask in zip(images, masks)]
    fakemix = FakeMix(p=1.0)
    mixed, targets = fakemix(*default_collate(items), generator=seeded())
    assert (mixed == fakemix(images, masks, seeded())[0]).all()
    assert (targets["masks"] == masks).all()


def test_a_batch_of_one_is_warned_of_once():
    images, masks = batch(1)
    fakemix = FakeMix()
    with pytest.warns(UserWarning, match="batch of one picture can paste only its own bands"):
        fakemix(images, masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fakemix(images, masks)


def test_what_is_wrong_is_said():
    images, masks = batch()
    with pytest.raises(ValueError, match=r"same pixels, got \(4, 3, 24, 32\) and \(4, 24, 31\)"):
        FakeMix()(images, masks[..., :-1])
    with pytest.raises(ValueError, match=r"must have 'masks' or 'boundary', got \['labels'\]"):
        FakeMix()(images, {"labels": masks})
    with pytest.raises(ValueError, match="one of boundary, zeros, mean, other, got 'black'"):
        FakeMix(variant="black")
    for options in ({"p": 1.5}, {"count": 0}, {"max_shift": 2.0}):
        with pytest.raises(ValueError, match=r"expected max_shift and p in 0\.\.1 and count >= 1"):
            FakeMix(**options)
    with pytest.raises(ValueError, match="thickness: expected whole pixels"):
        FakeMix(2.5)


# ---- over a set


class Squares:
    """Pictures of one colour each, with a square object; another size for every picture that is asked to be."""

    classes = ("background", "square")

    def __init__(self, n=6, sizes=None):
        self.n, self.sizes = n, sizes or {}

    def __len__(self):
        return self.n

    def __getitem__(self, place):
        index = place[1]
        side = self.sizes.get(index, 32)
        mask = torch.zeros(side, side, dtype=torch.int64)
        mask[8:20, 8:20] = 1
        return torch.full((3, side, side), (index + 1) / 10), {"mask": mask, "key": str(index)}


def test_a_set_is_mixed_by_seed_epoch_and_index_alone():
    mixed = FakeMixed(Squares(), FakeMix(thickness=3, count=2, p=1.0, max_shift=0.25))
    first = [mixed[0, i][0] for i in range(6)]
    assert all(torch.equal(a, mixed[0, i][0]) for i, a in enumerate(first))
    torch.manual_seed(1)
    assert torch.equal(mixed[0, 3][0], first[3])
    assert any(not torch.equal(mixed[1, i][0], a) for i, a in enumerate(first))
    plain = Squares()
    for i, image in enumerate(first):
        assert torch.equal(mixed[0, i][1]["mask"], plain[0, i][1]["mask"])
        colours = {round(v, 2) for v in image.unique().tolist()}
        assert colours <= {round((k + 1) / 10, 2) for k in range(6)}
        assert round((i + 1) / 10, 2) in colours
    assert any(len(image.unique()) > 1 for image in first)


def test_a_set_with_p_0_is_as_it_was_and_p_is_the_share_that_is_mixed():
    never = FakeMixed(Squares(), FakeMix(p=0.0, thickness=3))
    assert all(torch.equal(never[0, i][0], Squares()[0, i][0]) for i in range(6))
    often = FakeMixed(Squares(), FakeMix(p=0.5, thickness=3, count=4))
    changed = sum(len(often[epoch, i][0].unique()) > 1 for epoch in range(40) for i in range(6))
    assert 80 < changed < 140  # 120, less those that paste their own colour or nothing


def test_pictures_of_two_sizes_are_named():
    with pytest.raises(ValueError, match=r"pictures \d and \d are .*: FakeMix needs one size"):
        [FakeMixed(Squares(2, {1: 40}), FakeMix(p=1.0, thickness=3))[0, i] for i in range(2)]
