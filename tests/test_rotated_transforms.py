"""Rotated boxes move as their pixels do. Oracles: pictures whose pixels say where they were, and shapely."""

import math

import numpy as np
import pytest
import torch
from shapely.geometry import MultiPoint, Polygon, box
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from distillkit.boxes.rotated import corners
from distillkit.data import quads as module
from distillkit.data.quads import Quads, area, crossing, part_inside
from distillkit.data.transforms import LEAST_INSIDE, Augment, Resize, cropped, generator_for, sample_of

HEIGHT, WIDTH = 120, 180


def places(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """A float picture that says of every pixel where its centre is: red x / width, green y / height."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x / width, y / height, torch.zeros_like(x)]).float()


def way_back(image: torch.Tensor, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(3, 2): [x, y, 1] @ it is where a place of the transformed picture was, read from its pixels away from borders,
    which resizing blurs."""
    _, high, wide = image.shape
    rows, columns = torch.meshgrid(torch.arange(6, high - 6), torch.arange(6, wide - 6), indexing="ij")
    here = torch.stack([columns.flatten() + 0.5, rows.flatten() + 0.5, torch.ones(rows.numel())], 1).double()
    there = image[:2, 6 : high - 6, 6 : wide - 6].flatten(1).T.double() * torch.tensor([width, height])
    solved = torch.linalg.lstsq(here, there)
    assert (here @ solved.solution - there).abs().max() < 0.2, "the picture was moved by something not affine"
    return solved.solution.numpy()


def some_quads(seed: int, n: int = 12) -> np.ndarray:
    """Random rectangles and, every third, any four points around a centre; some reach over the border."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform([0, 0], [WIDTH, HEIGHT], (n, 2))
    angle = np.sort(rng.uniform(0, 2 * math.pi, (n, 4)), 1)
    free = np.stack([np.cos(angle), np.sin(angle)], -1) * rng.uniform(6, 30, (n, 4, 1)) + centre[:, None]
    boxes = np.concatenate([centre, rng.uniform(5, 60, (n, 2)), rng.uniform(-4, 4, (n, 1))], 1)
    turned = corners(torch.from_numpy(boxes)).numpy()
    return np.where((np.arange(n) % 3 == 0)[:, None, None], free, turned)


def sample(quads: np.ndarray):
    return sample_of(places(), torch.from_numpy(quads), torch.arange(len(quads)))


def assert_smallest_around(found: torch.Tensor, points: np.ndarray) -> None:
    """A (5,) box must hold four points and have the area of shapely's smallest rectangle around them."""
    rectangle = Polygon(corners(found.double()).numpy())
    best = MultiPoint(points).minimum_rotated_rectangle
    assert rectangle.area == pytest.approx(best.area, rel=1e-3)
    assert rectangle.buffer(0.05).contains(MultiPoint(points))


AUGMENTS = {
    "mirrored": Augment(None, flip=1.0),
    "upside down": Augment(None, flip=0.0, flip_vertical=1.0),
    "both": Augment(None, flip=0.0, flip_diagonal=1.0),
    "cropped": Augment(None, flip=0.0, crop=0.5),
    "stretched": Augment((200, 90), flip=0.0),
    "everything": Augment((150, 260), flip=0.25, flip_vertical=0.25, flip_diagonal=0.25, crop=0.5),
    "scaled": Augment((160, 160), keep_ratio=True, flip=0.5, crop=0.6, multi_scale=(0.8, 1.3)),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_boxes_land_where_their_pixels_land(name):
    kept = 0
    for seed in range(4):
        quads = some_quads(seed)
        image, target = AUGMENTS[name]([sample(quads)], generator_for(seed, 0, 0))
        back = way_back(image)
        _, high, wide = image.shape
        shown = Polygon(np.array([[0, 0, 1], [wide, 0, 1], [wide, high, 1], [0, high, 1]]) @ back)
        parts = [Polygon(q).intersection(shown).area / Polygon(q).area for q in quads]
        if AUGMENTS[name].crop:
            sure = [i for i, part in enumerate(parts) if abs(part - LEAST_INSIDE) > 0.01]
            assert [i for i in sure if parts[i] > LEAST_INSIDE] == [i for i in target["labels"].tolist() if i in sure]
        else:
            assert target["labels"].tolist() == list(range(len(quads)))
        for found, label in zip(target["boxes"], target["labels"], strict=True):
            points = (quads[label] - back[2]) @ np.linalg.inv(back[:2])
            assert_smallest_around(found, points)
        kept += len(target["labels"])
    assert kept > 10


def test_evaluation_keeps_every_box_and_says_the_scale():
    quads = some_quads(9)
    _, target = Resize((64, 200))([sample(quads)], generator_for(0, 0, 0))
    assert target["boxes"].dtype == torch.float32
    assert target["scale"] == (200 / WIDTH, 64 / HEIGHT)
    for found, quad in zip(target["boxes"], quads, strict=True):
        assert_smallest_around(found, quad * target["scale"])


def test_a_rectangle_that_is_not_stretched_is_itself_again():
    boxes = torch.tensor([[60.0, 50, 40, 14, 0.4], [20, 20, 9, 30, -2.0]])
    whole = sample_of(places(), corners(boxes), torch.arange(2))
    _, target = Resize(None)([whole], generator_for(0, 0, 0))
    torch.testing.assert_close(target["boxes"], boxes)
    _, doubled = Resize((2 * HEIGHT, 2 * WIDTH))([whole], generator_for(0, 0, 0))
    torch.testing.assert_close(doubled["boxes"], boxes * torch.tensor([2, 2, 2, 2, 1.0]))
    _, turned = Augment(None, flip=0.0, flip_diagonal=1.0)([whole], generator_for(0, 0, 0))
    half_turn = torch.stack([WIDTH - boxes[:, 0], HEIGHT - boxes[:, 1]], 1)
    torch.testing.assert_close(turned["boxes"][:, :4], torch.cat([half_turn, boxes[:, 2:4]], 1), rtol=1e-5, atol=1e-4)


def test_boxes_over_the_border_stay_whole():
    """What torchvision's clamping does to them is the trap: it would move their corners to the border."""
    boxes = torch.tensor([[3.0, 60, 50, 20, 0.7], [178, 118, 30, 30, 0.5]])
    _, target = Resize(None)([sample_of(places(), corners(boxes), torch.arange(2))], generator_for(0, 0, 0))
    torch.testing.assert_close(target["boxes"], boxes)


def test_a_crop_keeps_boxes_whole_or_drops_them():
    across = torch.tensor([[[10.0, 10], [20, 10], [20, 20], [10, 20]], [[14, 30], [24, 30], [24, 40], [14, 40]]])
    part = cropped(sample_of(places(), across, torch.arange(2)), 0, 0, 100, 17)
    assert part.labels.tolist() == [0]  # 0.7 of it is inside, of the other 0.3
    assert part.boxes.points.tolist() == across[:1].tolist()
    assert part.size == (100, 17)


def test_mosaic_puts_boxes_where_it_puts_their_pixels():
    """Four pictures, told apart by blue; red and green say where a pixel was."""
    samples, quads = [], some_quads(3)[np.arange(12) % 3 > 0]  # rectangles: the smallest box has one centre only
    for blue in range(4):
        image = (places() * 255).round().to(torch.uint8)
        image[2] = 60 * blue
        samples.append(sample_of(image, torch.from_numpy(quads), torch.arange(8) + 8 * blue))
    checked = 0
    for index in range(6):
        image, target = Augment(128, flip=0.0, mosaic=1.0)(samples, generator_for(0, 0, index))
        zoom = max(128 / HEIGHT, 128 / WIDTH)
        for found, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
            x, y = (int(v) for v in found[:2])
            if not (0 <= x < 128 and 0 <= y < 128) or round(float(image[2, y, x] * 255)) != 60 * (label // 8):
                continue  # its centre is in another picture's quarter
            was = image[:2, y, x] * torch.tensor([WIDTH, HEIGHT])
            expected = Polygon(quads[label % 8]).minimum_rotated_rectangle
            assert math.dist(was.tolist(), (expected.centroid.x, expected.centroid.y)) < 1.6
            assert float(found[2] * found[3]) == pytest.approx(expected.area * zoom**2, rel=0.02)
            checked += 1
    assert checked > 10


def test_flips_come_as_often_as_asked():
    transform = Augment(None, flip=0.25, flip_vertical=0.25, flip_diagonal=0.25)
    seen = {(False, False): 0, (True, False): 0, (False, True): 0, (True, True): 0}
    for i in range(400):
        image, _ = transform([sample(some_quads(0, 1))], generator_for(0, 0, i))
        seen[bool(image[0, 0, 0] > 0.5), bool(image[1, 0, 0] > 0.5)] += 1
    assert all(70 < count < 130 for count in seen.values())


@pytest.mark.parametrize(
    ("options", "word"),
    [({"flip_vertical": -0.1}, "flip_vertical"), ({"flip": 0.5, "flip_vertical": 0.3, "flip_diagonal": 0.3}, "sum")],
)
def test_impossible_flips_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Augment(**options)


def test_upright_boxes_are_flipped_vertically_too():
    boxes = torch.tensor([[10.0, 20, 40, 50]])
    _, target = Augment(None, flip=0.0, flip_vertical=1.0)(
        [sample_of(places(), boxes, torch.arange(1))], generator_for(0, 0, 0)
    )
    assert target["boxes"].tolist() == [[10, HEIGHT - 50, 40, HEIGHT - 20]]


def test_a_sample_without_boxes_stays_rotated():
    nothing = sample_of(places(), torch.zeros(0, 4, 2), torch.zeros(0, dtype=torch.int64))
    _, target = Augment((50, 60), crop=0.5, flip_vertical=0.5)([nothing], generator_for(0, 0, 0))
    assert target["boxes"].shape == (0, 5)


def test_every_geometric_functional_moves_points_exactly_or_refuses():
    """torchvision falls back on its kernels for the parent class, without a word: none may be left to it unseen."""
    from torchvision.transforms.v2.functional import _utils

    named = {F.get_size, F.to_dtype}  # no geometry
    own = {functional for functional, kernels in _utils._KERNEL_REGISTRY.items() if Quads in kernels}
    for functional, kernels in _utils._KERNEL_REGISTRY.items():
        if tv_tensors.BoundingBoxes in kernels and functional not in named:
            assert functional in own or functional in module.INHERITED, functional.__name__
    assert own == {*module.REFUSED, F.resize, F.crop}


MOVES = {
    F.horizontal_flip: (lambda b: F.horizontal_flip(b), lambda p: np.array([20, 0]) + p * [-1, 1]),
    F.vertical_flip: (lambda b: F.vertical_flip(b), lambda p: np.array([0, 10]) + p * [1, -1]),
    F.pad: (lambda b: F.pad(b, [1, 2, 3, 4]), lambda p: p - [-1, -2]),
    F.crop: (lambda b: F.crop(b, 3, 4, 5, 6), lambda p: p - [4, 3]),
    F.resize: (lambda b: F.resize(b, [40, 10]), lambda p: p * [0.5, 4]),
}


@pytest.mark.parametrize("functional", MOVES, ids=lambda f: f.__name__)
def test_functionals_move_every_point_of_any_quad(functional):
    move, expected = MOVES[functional]
    points = np.random.default_rng(0).uniform(-5, 25, (30, 4, 2))
    moved = move(Quads(torch.from_numpy(points), canvas_size=(10, 20)))
    assert isinstance(moved, Quads)
    assert moved.canvas_size == move(torch.zeros(3, 10, 20)).shape[-2:]
    for found, wanted in zip(moved.points.numpy(), expected(points), strict=True):
        np.testing.assert_allclose(sorted(found.tolist()), sorted(wanted.tolist()), atol=1e-12)


def test_refused_functionals_are_errors_in_pipelines_too():
    boxes = Quads(torch.rand(2, 4, 2) * 9, canvas_size=(HEIGHT, WIDTH))
    image = tv_tensors.Image(places())
    for transform in (v2.RandomRotation(90), v2.RandomAffine(30), v2.RandomPerspective(p=1.0), v2.CenterCrop(50)):
        with pytest.raises(TypeError, match="quads move exactly with flips, resize, crop and pad"):
            transform({"image": image, "boxes": boxes})
    flipped = v2.RandomHorizontalFlip(p=1.0)({"image": image, "boxes": boxes})["boxes"]
    assert flipped.points[..., 0].max() == WIDTH - boxes.points[..., 0].min()


def test_quads_stay_quads_until_they_are_converted():
    boxes = Quads(torch.rand(2, 4, 2) * 9, canvas_size=(10, 20))
    for same in (boxes.clone(), boxes.to(torch.float64), boxes.detach()):
        assert (type(same), same.canvas_size, same.clamping_mode) == (Quads, (10, 20), None)
    converted = F.convert_bounding_box_format(boxes, new_format="CXCYWHR")
    assert (type(converted), converted.shape) == (tv_tensors.BoundingBoxes, (2, 5))


def test_part_inside_agrees_with_shapely():
    rng = np.random.default_rng(1)
    window = (3.0, 2.0, 8.0, 9.0)
    drawn = [*rng.uniform(-2, 12, (1500, 4, 2)), *rng.integers(0, 11, (1500, 4, 2)).astype(float)]
    simple = [q for q in drawn if Polygon(q).is_valid and Polygon(q).area > 0.1]
    assert any(Polygon(q).convex_hull.area > Polygon(q).area + 1 for q in simple), "concave ones belong to the test"
    expected = [Polygon(q).intersection(box(*window)).area / Polygon(q).area for q in simple]
    points = torch.from_numpy(np.array(simple))
    np.testing.assert_allclose(part_inside(points, window), expected, atol=1e-9)
    np.testing.assert_allclose(area(points), [Polygon(q).area for q in simple], atol=1e-9)


def test_part_inside_far_from_the_origin_and_of_nothing():
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    far = square.double() + 1e6
    assert part_inside(far[None], (1e6 + 0.25, 0.0, 2e6, 2e6)).tolist() == pytest.approx([0.75])
    assert part_inside(torch.zeros(1, 4, 2), (0, 0, 1, 1)).tolist() == [0]


def test_crossing_sides_are_found():
    rng = np.random.default_rng(2)
    points = rng.uniform(0, 1, (500, 4, 2))
    crossed = crossing(torch.from_numpy(points)).numpy()
    assert (crossed == [not Polygon(q).is_valid for q in points]).all()
    assert 50 < crossed.sum() < 450
    triangle = torch.tensor([[[0.0, 0], [1, 0], [1, 0], [0, 1]]])
    assert not crossing(triangle).any()
