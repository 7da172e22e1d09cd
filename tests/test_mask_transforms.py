"""Pictures, masks and saliency maps are moved together, by what one generator draws."""

from collections import Counter

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from distillkit.data.boundary import boundary_band, class_boundaries
from distillkit.data.mask_transforms import MEAN_COLOUR, MaskAugment, MaskResize
from distillkit.data.transforms import generator_for

STILL = {"scale": None, "flip": 0.0}
ANY = torch.Generator()  # where nothing is drawn


def numbered(height=12, width=20):
    """A mask whose every pixel has a number of its own, and a picture and saliency map that say the same number."""
    mask = torch.arange(height * width).reshape(height, width).to(torch.uint8)
    assert height * width <= 255
    return mask.expand(3, -1, -1).contiguous(), mask, mask.float()


def levels(view):
    return (view.image * 255).round().long()


def apply(transform, parts, seed=0):
    return transform(*parts, generator_for(seed, 0, 0))


# ---- geometry


@pytest.mark.parametrize("crop", [(12, 20), (5, 7), (16, 24), (8, 24), (16, 9)])
def test_every_pixel_keeps_its_mask_and_its_saliency(crop):
    """No pixel is interpolated here, so that the three must say the same number everywhere in the picture."""
    transform = MaskAugment(crop=crop, scale=None, flip=0.5, rotate90=3)
    parts = numbered()
    seen = set()
    for seed in range(40):
        view = apply(transform, parts, seed)
        inside = view.mask != 255
        assert view.image.shape == (3, *crop)
        assert view.mask.shape == crop
        assert torch.equal(levels(view)[0][inside], view.mask[inside])
        assert torch.allclose(view.saliency[0][inside], view.mask[inside] / view.mask[inside].max())
        assert (view.saliency[0][~inside] == 0).all()
        assert (levels(view)[:, ~inside] == torch.tensor(MEAN_COLOUR)[:, None]).all()
        seen.add(tuple(view.mask.flatten().tolist()))
    assert len(seen) > 5


def test_what_is_filled_up_is_no_more_than_the_window_exceeds_the_picture():
    for seed in range(20):
        view = apply(MaskAugment(crop=(16, 24), **STILL, fill=(9, 8, 7)), numbered(), seed)
        inside = view.mask != 255
        assert inside.sum() == 12 * 20
        assert view.mask[inside].tolist() == list(range(240))  # all of it, in order
        assert set(levels(view)[0][~inside].tolist()) == {9}


def test_crops_are_uniform_over_all_places_with_both_ends():
    """A tall picture: with the slacks of the axes exchanged, windows would leave it, and miss its lower part."""
    parts = numbered(9, 5)
    transform = MaskAugment(crop=(4, 3), **STILL)
    first = Counter(int(apply(transform, parts, seed).mask[0, 0]) for seed in range(1800))
    places = {5 * top + left for top in range(6) for left in range(3)}
    assert set(first) == places
    assert all(60 < count < 145 for count in first.values())  # 100 expected, standard deviation 10
    assert not any((apply(transform, parts, seed).mask == 255).any() for seed in range(50))


def test_small_pictures_are_uniform_over_all_places_in_the_window():
    transform = MaskAugment(crop=(5, 4), **STILL)
    places = Counter()
    for seed in range(1200):
        row, column = (apply(transform, numbered(3, 2), seed).mask == 0).nonzero()[0].tolist()
        places[row, column] += 1
    assert set(places) == {(row, column) for row in range(3) for column in range(3)}
    assert all(90 < count < 180 for count in places.values())  # 133 expected


def test_one_side_longer_and_one_shorter_than_the_window():
    view = apply(MaskAugment(crop=(6, 26), **STILL), numbered())
    shown = view.mask != 255
    assert shown.sum() == 6 * 20
    assert shown.any(0).sum() == 20


def test_quarter_turns_are_drawn_from_none_to_the_most():
    parts = numbered(4, 4)
    turns = {turn: tuple(torch.rot90(parts[1], turn).flatten().tolist()) for turn in range(4)}
    transform = MaskAugment(crop=4, **STILL, rotate90=2)
    drawn = Counter(tuple(apply(transform, parts, seed).mask.flatten().tolist()) for seed in range(300))
    assert set(drawn) == {turns[0], turns[1], turns[2]}
    assert min(drawn.values()) > 70


def test_flips_as_often_as_asked():
    parts = numbered(4, 4)
    flipped = sum(
        int(apply(MaskAugment(crop=4, scale=None, flip=0.25), parts, seed).mask[0, 0]) == 3 for seed in range(400)
    )
    assert 70 < flipped < 130


@pytest.mark.parametrize(("old", "new"), [(97, 64), (64, 23), (50, 77)])
def test_resized_masks_stay_on_their_pictures(old, new):
    """The middle of a square in the mask against that in the picture, over many places of the square: no drift."""
    shifts = []
    for start in range(old // 3):
        mask = torch.zeros(old, old, dtype=torch.uint8)
        mask[start : start + old // 2, start : start + old // 2] = 1
        view = MaskAugment(new, scale=None, crop=False, flip=0.0)(mask.expand(3, -1, -1) * 200, mask, None, ANY)
        weights = view.image[0]
        place = torch.arange(new).float()
        shifts.append(
            float((view.mask.sum(0) * place).sum() / view.mask.sum() - (weights.sum(0) * place).sum() / weights.sum())
        )
    assert abs(sum(shifts) / len(shifts)) < 0.05


def test_stretched_and_labels_never_mixed():
    image, mask, saliency = numbered()
    mask = (mask % 2) * 7
    view = apply(MaskAugment((30, 31), crop=False, **STILL), (image, mask, saliency))
    assert view.image.shape == (3, 30, 31)
    assert set(view.mask.unique().tolist()) == {0, 7}


def test_keep_ratio_without_crop_shows_all_of_the_picture():
    for shape in ((12, 20), (20, 12)):
        image, mask, _ = numbered(*shape)
        view = apply(MaskAugment((40, 48), crop=False, keep_ratio=True, **STILL), (image, mask, None))
        shown = view.mask != 255
        high, wide = int(shown.any(1).sum()), int(shown.any(0).sum())
        assert (high, wide) == ((29, 48) if shape == (12, 20) else (40, 24))
        assert set(view.mask[shown].tolist()) == set(range(240))


def test_scale_is_of_the_size_that_evaluation_has():
    """A picture of any size is first brought to size, so that a factor of 1 is what MaskResize shows."""
    mask = torch.zeros(50, 30, dtype=torch.uint8)
    image = mask.expand(3, -1, -1)
    extents = []
    for seed in range(200):
        view = apply(MaskAugment((40, 40), scale=(0.5, 2.0), crop=(100, 100), flip=0.0), (image, mask, None), seed)
        shown = view.mask != 255
        high, wide = int(shown.any(1).sum()), int(shown.any(0).sum())
        assert high == wide
        extents.append(high)
    assert min(extents) in (20, 21, 22)
    assert max(extents) in (78, 79, 80)
    assert abs(sum(extents) / 200 - 50) < 4  # the mean of a uniform factor, 1.25


def test_own_size_where_none_is_given():
    view = apply(MaskAugment(None, scale=(0.5, 0.5), crop=(12, 20), flip=0.0), numbered())
    assert (view.mask != 255).sum() == 6 * 10


def test_short_side_keeps_the_aspect_whichever_way_the_picture_stands():
    for shape, whole in (((8, 16), (16, 32)), ((16, 8), (32, 16))):
        view = apply(MaskAugment(short_side=16, crop=(40, 40), **STILL), numbered(*shape))
        shown = view.mask != 255
        assert (int(shown.any(1).sum()), int(shown.any(0).sum())) == whole


def test_short_side_may_be_drawn():
    sides = Counter()
    for seed in range(120):
        view = apply(MaskAugment(short_side=(8, 10), crop=(20, 20), **STILL), numbered(8, 8), seed)
        sides[int((view.mask != 255).any(0).sum())] += 1
    assert set(sides) == {8, 9, 10}


def test_l2g_shows_the_right_part_of_pictures():
    """The release draws x from the height's slack: of a wide picture it never shows columns beyond 64 + 448."""
    mask = torch.arange(68)[None].expand(51, -1).to(torch.uint8)
    rightmost = [
        int(apply(MaskAugment(short_side=51, crop=45, **STILL), (mask.expand(3, -1, -1), mask, None), seed).mask.max())
        for seed in range(60)
    ]
    assert max(rightmost) == 67
    assert min(rightmost) == 44


# ---- colour


def test_colour_changes_the_picture_alone_and_not_what_is_filled_up():
    parts = numbered()
    plain = apply(MaskAugment(crop=(16, 24), **STILL), parts)
    view = apply(MaskAugment(crop=(16, 24), **STILL, color=0.4, hue=0.1), parts)
    assert torch.equal(view.mask, plain.mask)
    assert torch.equal(view.saliency, plain.saliency)
    outside = plain.mask == 255
    assert torch.equal(view.image[:, outside], plain.image[:, outside])
    assert not torch.allclose(view.image[:, ~outside], plain.image[:, ~outside], atol=0.02)


def test_brightness_is_in_its_range():
    image = torch.full((3, 6, 6), 100, dtype=torch.uint8)  # no contrast, no saturation: brightness is all
    seen = [
        float(levels(apply(MaskAugment(6, color=0.3, **STILL), (image, None, None), s))[0, 0, 0]) for s in range(200)
    ]
    assert 67 <= min(seen) < 75  # grey levels are cut to whole ones on the way
    assert 125 < max(seen) <= 131


def test_hue_turns_colours_and_leaves_grey():
    grey, red = torch.full((3, 4, 4), 90, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 200
    transform = MaskAugment(4, hue=0.5, **STILL)
    assert torch.equal(levels(apply(transform, (grey, None, None))), grey.long())
    assert len({tuple(levels(apply(transform, (red, None, None), s))[:, 0, 0].tolist()) for s in range(10)}) > 5


# ---- saliency, boundary, evaluation


def test_saliency_is_divided_by_its_maximum_in_the_view():
    image, mask, _ = numbered()
    saliency = torch.zeros(12, 20)
    saliency[2, 3], saliency[9, 15] = 128, 64
    view = apply(MaskAugment(crop=(12, 20), **STILL), (image, mask, saliency))
    assert view.saliency.shape == (1, 12, 20)
    assert view.saliency[0, 2, 3] == 1
    assert view.saliency[0, 9, 15] == 0.5
    nothing = apply(MaskAugment(crop=(12, 20), **STILL), (image, mask, torch.zeros(12, 20, dtype=torch.uint8)))
    assert (nothing.saliency == 0).all()


@pytest.mark.parametrize(("between", "band"), [("foreground", boundary_band), ("classes", class_boundaries)])
def test_boundaries_are_those_of_the_view(between, band):
    mask = torch.zeros(30, 30, dtype=torch.uint8)
    mask[5:20, 5:20], mask[5:20, 12:20] = 1, 2
    transform = MaskAugment((24, 24), scale=(0.8, 1.2), boundary=3, boundary_between=between)
    view = apply(transform, (mask.expand(3, -1, -1) * 9, mask, None))
    assert view.boundary.dtype == torch.uint8
    assert torch.equal(view.boundary, band(view.mask, 3))
    assert 0 < view.boundary.sum() < 24 * 24 / 2
    assert apply(transform, (mask.expand(3, -1, -1), None, None)).boundary is None


def test_evaluation_leaves_the_mask_as_it_is():
    image, mask, saliency = numbered()
    view = MaskResize((30, 10))(image, mask, saliency, ANY)
    assert view.image.shape == (3, 30, 10)
    assert view.saliency.shape == (1, 30, 10)
    assert view.mask.dtype == torch.int64
    assert torch.equal(view.mask, mask.long())
    assert MaskResize(40, keep_ratio=True)(image, mask, None, ANY).image.shape == (3, 24, 40)
    assert torch.equal(levels(MaskResize()(image, mask, None, ANY)), image.long())


def test_evaluation_resizes_before_rounding():
    image = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8).expand(3, -1, -1)
    view = MaskResize(5)(image, None, None, ANY)
    assert view.mask is None
    assert len(view.image.unique()) > 2
    exact = F.resize(image.float(), [5, 5], antialias=True) / 255
    assert torch.allclose(view.image, exact, atol=1e-7)


def test_bicubic_differs_from_bilinear():
    image = numbered()[0]
    views = [MaskResize(7, interpolation=name)(image, None, None, ANY).image for name in ("bilinear", "bicubic")]
    assert not torch.allclose(*views, atol=1e-3)


def test_bicubic_stays_in_range():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, 2:5] = 255
    resized = MaskResize(30, interpolation="bicubic")(image, None, None, ANY).image
    assert (resized.min(), resized.max()) == (0, 1)


# ---- what is random


def test_the_generator_is_all_that_decides():
    transform = MaskAugment(10, color=0.3, hue=0.1, rotate90=3, boundary=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = apply(transform, numbered(), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for a, b in zip(one, apply(transform, numbered(), 5), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.image, apply(transform, numbered(), 6).image)


def test_input_is_left_as_it_was():
    parts = numbered()
    copies = [part.clone() for part in parts]
    apply(MaskAugment(crop=(12, 20), **STILL), parts).image.zero_()
    apply(MaskAugment(crop=(12, 20), **STILL), parts).mask.zero_()
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 0}, "size: expected positive"),
        ({"size": 8, "flip": 1.5}, "flip: expected a number in 0..1, got 1.5"),
        ({"size": 8, "hue": 0.7}, r"hue: expected a number in 0..0.5, got 0.7"),
        ({"size": 8, "rotate90": 4}, "rotate90: expected the most quarter turns, 0..3, got 4"),
        ({"size": 8, "scale": (2.0, 0.5)}, "scale: expected 0 < lo <= hi"),
        ({"size": 8, "short_side": (9, 3)}, "short_side: expected 0 < lo <= hi"),
        ({"size": 8, "boundary": 0}, "thickness: expected whole pixels"),
        ({"size": 8, "boundary_between": "edges"}, "boundary_between: expected 'foreground' or 'classes'"),
        ({"size": 8, "fill": (1, 2, 300)}, "fill: expected red, green and blue"),
        ({"size": 8, "interpolation": "nearest"}, "interpolation: expected 'bilinear' or 'bicubic'"),
        ({"size": None}, "give size, or crop"),
        ({"size": 8, "crop": False}, "scale and short_side must be None"),
        ({"size": 8, "crop": 0}, "crop: expected positive"),
    ],
)
def test_settings_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        MaskAugment(**options)
