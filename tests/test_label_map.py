"""Label maps lie where their pictures lie. Oracles: pictures whose pixels say where they were, torchvision's RoIAlign,
scipy and arrays of the published implementation."""

import copy
import json
import math
import pickle
import random
import weakref
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from scipy.ndimage import affine_transform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, default_collate
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import _utils

from distillkit.data import label_map as module
from distillkit.data.label_map import LabelMap, pooled, released
from distillkit.losses.token_labels import dense_logits, mixed, soft_targets

GOLDEN = np.load(Path(__file__).parent / "golden" / "dense_tl_labelmap_a.npz")
META = json.loads(str(GOLDEN["meta"]))
HEIGHT, WIDTH = 61, 90  # of the picture
ROWS, COLUMNS = 9, 13  # of the map
BILINEAR = F.InterpolationMode.BILINEAR


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


def places(height: int = HEIGHT, width: int = WIDTH) -> tv_tensors.Image:
    """A picture that says of every pixel where its centre is, x / width and y / height, and 1: that it is picture."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return tv_tensors.Image(torch.stack([x / width, y / height, torch.ones_like(x)]).double())


def cell_map(rows: int = ROWS, columns: int = COLUMNS, size=(HEIGHT, WIDTH), **options) -> LabelMap:
    """Every cell has one class, its number, with score 1: pooled with zeros elsewhere it says what cells were read."""
    numbers = torch.arange(rows * columns).reshape(1, rows, columns)
    return LabelMap.from_stored(torch.ones(1, rows, columns), numbers, size, **options)


def linear_map(rows: int = ROWS, columns: int = COLUMNS, size=(HEIGHT, WIDTH)) -> LabelMap:
    """Class 0 scores how far to the right a place is and class 1 how far down, in cells."""
    down, right = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    order = torch.tensor([0, 1])[:, None, None].expand(2, rows, columns)
    return LabelMap.from_stored(torch.stack([right, down]), order, size)


def random_map(classes: int, rows: int, columns: int, size=(200, 300), seed: int = 0) -> LabelMap:
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(classes, rows, columns, generator=g).argsort(0)[:5]
    return LabelMap.from_stored(torch.randn(5, rows, columns, generator=g) * 4 + 5, order, size)


def plain(labels: LabelMap) -> Tensor:
    return labels.as_subclass(Tensor)


# ---- every functional against pictures

CORNERS = [[0, 0], [89, 0], [89, 60], [0, 60]]
ELSEWHERE = [[10, 5], [80, 12], [70, 50], [3, 58]]
EXACT = {
    "horizontal_flip": F.horizontal_flip,
    "vertical_flip": F.vertical_flip,
    "crop": lambda i: F.crop(i, 5, 7, 30, 40),
    "crop, over the border": lambda i: F.crop(i, -5, -7, 80, 40),
    "center_crop": lambda i: F.center_crop(i, [30, 41]),
    "center_crop, larger": lambda i: F.center_crop(i, [100, 133]),
    "center_crop, larger by odd numbers": lambda i: F.center_crop(i, [62, 91]),
    "center_crop, higher and narrower": lambda i: F.center_crop(i, [102, 33]),
    "center_crop, one number": lambda i: F.center_crop(i, 33),
    "pad": lambda i: F.pad(i, [1, 2, 3, 4]),
    "pad, two numbers": lambda i: F.pad(i, [2, 5]),
    "pad, one number": lambda i: F.pad(i, 3),
    "five_crop": lambda i: F.five_crop(i, [20, 30]),
    "ten_crop": lambda i: F.ten_crop(i, [20, 30]),
    "ten_crop, vertical": lambda i: F.ten_crop(i, 25, vertical_flip=True),
    "affine": lambda i: F.affine(i, 20, [7, -5], 1.2, [10, -15], BILINEAR),
    "affine, centre": lambda i: F.affine(i, -20, [7, -5], 0.7, [10, 10], BILINEAR, center=[10, 40]),
    "affine, one shear": lambda i: F.affine(i, 5, [7, -5], 0.7, 12, BILINEAR),
    "affine, a list of one shear": lambda i: F.affine(i, 5, [7, -5], 0.7, [12], BILINEAR),
    **{f"rotate {a}": lambda i, a=a: F.rotate(i, a, BILINEAR) for a in (17, -33, 91, 180, 200)},
    **{f"rotate {a}, expand": lambda i, a=a: F.rotate(i, a, BILINEAR, expand=True) for a in (17, -33, 90, 180, 270)},
    "rotate, centre": lambda i: F.rotate(i, 25, BILINEAR, center=[20, 13]),
    "rotate, centre, expand": lambda i: F.rotate(i, 25, BILINEAR, expand=True, center=[20, 13]),
    "perspective": lambda i: F.perspective(i, CORNERS, ELSEWHERE),
    "perspective, inside out": lambda i: F.perspective(i, ELSEWHERE, CORNERS),
    "perspective, coefficients": lambda i: F.perspective(
        i, None, None, coefficients=[1.2, 0.1, -3, 0.05, 0.9, 4, 0.002, -0.001]
    ),
    "perspective, beyond the horizon": lambda i: F.perspective(
        i, None, None, coefficients=[1.2, 0.1, -3, 0.05, 0.9, 4, -0.015, -0.001]
    ),
    "crop, then turned": lambda i: F.rotate(F.crop(F.hflip(i), 4, 9, 40, 60), 20, BILINEAR),
    "padded, turned, sheared, turned": lambda i: F.rotate(
        F.affine(F.rotate(F.pad(i, [3, 9]), 20, BILINEAR), 0, [0, 0], 1.1, [9, 0], BILINEAR), -31, BILINEAR, expand=True
    ),
}
BLURRED = {  # resizing blurs, and so is off near the border
    "resize": lambda i: F.resize(i, [40, 200]),
    "resize, shorter side": lambda i: F.resize(i, [45]),
    "resize, longest side": lambda i: F.resize(i, [45], max_size=50),
    "resized_crop": lambda i: F.resized_crop(i, 5, 7, 30, 40, [50, 60]),
    "resized_crop, over the border": lambda i: F.resized_crop(i, -5, 7, 80, 40, [50, 60]),
}


def assert_follows(labels: LabelMap, picture: Tensor, rim: int) -> float:
    """The place of every pixel according to the map is what the pixel says; returns the largest error in pixels."""
    height, width = picture.shape[-2:]
    assert labels.canvas == (height, width)
    assert F.get_size(labels) == [height, width]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    here = torch.stack([x, y, torch.ones_like(x)]).double().flatten(1)
    u, v, w = labels.place @ here
    seen = ((labels.seen @ here) >= 0).all(0).reshape(height, width)
    there = torch.stack([u / w, v / w]).reshape(2, height, width)
    known = seen & (there >= 0).all(0) & (there <= 1).all(0)
    shown = picture[2]
    sure = (shown < 1e-3) | (shown > 1 - 1e-3)
    sure[[0, -1]] = sure[:, [0, -1]] = False  # a picture that touches the border exactly is rounded either way
    assert (known == (shown > 0.5))[sure].all()
    whole = shown > 1 - 1e-6
    for _ in range(rim):
        whole = -torch.nn.functional.max_pool2d(-whole[None].double(), 3, 1, 1)[0] > 0
    if rim:
        whole[: rim + 1] = whole[-rim - 1 :] = whole[:, : rim + 1] = whole[:, -rim - 1 :] = False
    assert whole.any()
    off = (there - picture[:2]).abs() * torch.tensor([WIDTH, HEIGHT])[:, None, None]
    return float(off[:, whole].max())


def tuples(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", EXACT)
def test_maps_follow_pictures_exactly(name):
    move = EXACT[name]
    for labels, picture in zip(tuples(move(cell_map())), tuples(move(places())), strict=True):
        assert isinstance(labels, LabelMap)
        assert torch.equal(plain(labels), plain(cell_map())), "values are never resampled"
        assert assert_follows(labels, picture, rim=0) < 1e-3


@pytest.mark.parametrize("name", BLURRED)
def test_maps_follow_resized_pictures(name):
    assert (
        assert_follows(BLURRED[name](cell_map()), BLURRED[name](places()), rim=4) < 0.1
    )  # antialiasing weighs whole pixels


@pytest.mark.parametrize("name", [*EXACT, *BLURRED])
def test_maps_follow_pil_pictures(name):
    """Kernels for PIL pictures are others; a picture of floats each for x, y and 1."""
    move = (EXACT | BLURRED)[name]
    moved = [tuples(move(PIL.Image.fromarray(channel.float().numpy()))) for channel in places()]
    for labels, *channels in zip(tuples(move(cell_map())), *moved, strict=True):
        picture = torch.stack([torch.from_numpy(np.array(c)).double() for c in channels])
        assert assert_follows(labels, picture, rim=4 if name in BLURRED else 1) < 0.1


def test_expanded_sizes_are_those_of_pictures():
    rng = random.Random(0)
    for _ in range(300):
        size = rng.randint(5, 90), rng.randint(5, 90)
        angle = rng.choice([rng.uniform(-400, 400), rng.randint(-30, 30) * 15])
        center = rng.choice([None, [rng.uniform(0, 90), rng.uniform(0, 90)]])
        turned = F.rotate(torch.zeros(1, *size), angle, expand=True, center=center)
        labels = LabelMap.from_stored(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), size)
        assert F.rotate(labels, angle, expand=True, center=center).canvas == tuple(turned.shape[-2:])


# ---- nothing passes through unseen


def test_every_functional_is_known():
    """A functional that a later torchvision adds must be sorted: moved, photometric or refused. It is refused until
    then, where torchvision would hand the map on as it is."""
    dispatched = set(_utils._KERNEL_REGISTRY)
    assert set(module.dispatching()) == dispatched
    photometric = {getattr(F, name) for name in module.PHOTOMETRIC if hasattr(F, name)}
    refused = {F.elastic, F.uniform_temporal_subsample}
    # of these torchvision has no kernel for masks either, and no transform calls them with one
    asks = {F.get_size, F.get_dimensions, F.get_num_channels, F.get_num_frames}
    assert dispatched == {*module.MOVED, *photometric, *refused, *asks}
    assert all(LabelMap in kernels for kernels in _utils._KERNEL_REGISTRY.values())
    # and all public functions are dispatchers, one type's kernels, or no transforms of a picture
    kernels = {f"{f.__name__}_{kind}" for f in dispatched for kind in KINDS}
    others = {name for name, f in vars(F).items() if callable(f) and f not in dispatched and name not in kernels}
    assert others <= NO_TRANSFORMS, "sort these into label_map.py or into this list"


KINDS = ("image", "video", "mask", "bounding_boxes", "keypoints")
NO_TRANSFORMS = {
    *("InterpolationMode", "is_pure_tensor", "register_kernel", "get_image_size", "get_size_bounding_boxes"),
    *("clamp_bounding_boxes", "clamp_keypoints", "convert_bounding_box_format", "convert_image_dtype"),
    *("sanitize_bounding_boxes", "sanitize_keypoints", "to_tensor", "to_image", "to_pil_image", "pil_to_tensor"),
    "to_grayscale",
}


def test_photometric_functionals_leave_maps_alone():
    labels = F.hflip(cell_map())
    for name in module.PHOTOMETRIC:
        if functional := getattr(F, name, None):
            kernel = _utils._get_kernel(functional, LabelMap)
            assert kernel(labels, 0.5, anything=1) is labels
    assert F.normalize(labels, [0.5] * 3, [0.5] * 3) is labels
    assert F.to_dtype(labels, torch.uint8) is labels


def test_refused_functionals_say_why():
    displacement = torch.zeros(1, HEIGHT, WIDTH, 2)
    with pytest.raises(TypeError, match="cannot follow elastic: no homography describes it"):
        F.elastic(cell_map(), displacement)
    with pytest.raises(TypeError, match="cannot follow uniform_temporal_subsample: nothing is known"):
        F.uniform_temporal_subsample(cell_map(), 3)


@pytest.mark.parametrize(
    "transform", [v2.ElasticTransform(), v2.RandAugment(), v2.AutoAugment(), v2.TrivialAugmentWide(), v2.AugMix()]
)
def test_transforms_that_would_leave_the_map_behind_are_refused(transform):
    image = tv_tensors.Image((places() * 255).to(torch.uint8))
    with pytest.raises(TypeError, match=r"cannot follow elastic|LabelMap are not supported"):
        transform({"image": image, "map": cell_map()})


def test_a_map_of_another_size_than_its_picture_is_refused():
    for transform in (v2.RandomAffine(20), v2.RandomPerspective(p=1), v2.RandomResizedCrop(32), v2.RandomCrop(20)):
        with pytest.raises(ValueError, match="multiple HxW"):
            transform({"image": places(), "map": F.resize(cell_map(), [33, 44])})


# ---- what it carries


def assert_same(a: LabelMap, b: LabelMap) -> None:
    assert type(a) is LabelMap
    assert torch.equal(plain(a), plain(b))
    assert a.canvas == b.canvas
    assert torch.equal(a.place, b.place)
    assert torch.equal(a.seen, b.seen)


@pytest.fixture
def moved() -> LabelMap:
    return F.rotate(F.crop(cell_map(), 3, 4, 50, 60), 20)


def test_copies_keep_the_place(moved):
    like = tv_tensors.wrap(plain(moved), like=moved)
    for same in (moved.clone(), moved.detach(), moved.to("cpu"), moved.to(torch.float32), like, copy.copy(moved)):
        assert_same(same, moved)
    assert_same(pickle.loads(pickle.dumps(moved)), moved)
    deep = copy.deepcopy(moved)
    assert_same(deep, moved)
    deep.place[0, 0] += 1
    deep.seen[0, 0] += 1
    plain(deep)[0] += 1
    assert_same(moved, F.rotate(F.crop(cell_map(), 3, 4, 50, 60), 20))
    assert "canvas=(50, 60)" in repr(moved)
    assert tv_tensors.wrap(plain(moved), like=moved, canvas=(1, 2)).canvas == (1, 2)


def test_other_operations_give_plain_tensors(moved):
    assert {type(x) for x in (moved + 1, moved[0], torch.stack([moved, moved]), moved.half())} == {Tensor}
    assert (moved.scores.shape, moved.indices.shape) == ((1, ROWS, COLUMNS), (1, ROWS, COLUMNS))
    assert moved.indices.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_another_type_of_number_is_refused(moved, dtype):
    with pytest.raises(TypeError, match="round class indices"):
        moved.to(dtype)


def test_a_batch_is_a_list_of_maps(moved):
    batch = default_collate([{"map": moved, "x": torch.zeros(2)}, {"map": cell_map(), "x": torch.ones(2)}])
    assert batch["x"].shape == (2, 2)
    assert_same(batch["map"][0], moved)
    assert_same(batch["map"][1], cell_map())


class Maps:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return torch.full((3,), index), F.crop(cell_map(), index, 0, 20, 20)


def test_workers_hand_maps_over():
    batches = list(DataLoader(Maps(), batch_size=2, num_workers=1))
    for index, labels in enumerate(m for _, maps in batches for m in maps):
        assert_same(labels, F.crop(cell_map(), index, 0, 20, 20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_and_moved_to_an_accelerator(moved):
    batch = next(iter(DataLoader(Maps(), batch_size=2, pin_memory=True)))
    assert batch[1][1].is_pinned()
    assert_same(batch[1][1], F.crop(cell_map(), 1, 0, 20, 20))
    there = moved.to("cuda", non_blocking=True)
    assert there.device.type == "cuda"
    assert_same(there.to("cpu"), moved)
    assert_same(pickle.loads(pickle.dumps(moved)), moved)
    maps = [F.rotate(random_map(30, 7, 7, seed=i), 9.0 * i) for i in range(5)]
    for convention, kept in (("default", maps), ("release", [random_map(30, 7, 7, seed=i) for i in range(5)])):
        here = pooled(kept, 30, (4, 4), convention=convention)
        for options in ({"device": "cuda"}, {}):
            found = pooled(kept if options else [m.to("cuda") for m in kept], 30, (4, 4), "auto", convention, **options)
            for a, b in zip(found, here, strict=True):
                torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)


def test_large_class_indices_survive():
    numbers = torch.tensor([2049, 65000, 2**24 - 1]).reshape(3, 1, 1)
    stored = LabelMap.from_stored(torch.zeros(3, 1, 1, dtype=torch.float16), numbers, (10, 10))
    for same in (stored, F.hflip(stored), pickle.loads(pickle.dumps(stored)), copy.deepcopy(stored)):
        assert same.indices.flatten().tolist() == [2049, 65000, 2**24 - 1]
    found = pooled([LabelMap.from_stored(torch.ones(1, 1, 1), torch.full((1, 1, 1), 65000), (10, 10))], 65001, (1, 1))
    assert found.tokens.flatten().nonzero().tolist() == [[65000]]
    uint16 = LabelMap.from_stored(torch.ones(1, 1, 1), torch.tensor([[[65000]]], dtype=torch.uint16), (10, 10))
    assert uint16.indices.item() == 65000


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        (torch.tensor([2**24]), "16777216 is too large"),
        (torch.tensor([2**24 + 1]), "16777217 is too large"),
        (torch.tensor([-1]), "whole numbers from 0, got -1"),
        (torch.tensor([1.5]), "whole numbers from 0"),
        (torch.tensor([float("nan")]), "whole numbers from 0"),
        (torch.tensor([2050.0]).half(), "2050 was stored as torch.float16, which skips numbers"),
    ],
)
def test_wrong_indices_are_refused(indices, said):
    with pytest.raises(ValueError, match=said):
        LabelMap.from_stored(torch.ones(1, 1, 1), indices.reshape(1, 1, 1), (10, 10))


def test_wrong_maps_are_refused():
    for data in (
        torch.zeros(3, 1, 2, 2),
        torch.zeros(2, 2, 2),
        torch.zeros(2, 1, 2, 2).double(),
        torch.zeros(2, 0, 2, 2),
    ):
        with pytest.raises(ValueError, match="float32 \\(2, k, H, W\\)"):
            LabelMap(data, canvas=(10, 10))
    with pytest.raises(ValueError, match="must both be"):
        LabelMap.from_stored(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3), (10, 10))
    with pytest.raises(ValueError, match="'centre'"):
        LabelMap.from_stored(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), (10, 10), "centre")
    with pytest.raises(TypeError, match="expected label maps"):
        pooled([torch.zeros(2, 1, 3, 3)], 5, (2, 2))
    with pytest.raises(TypeError, match="expected label maps"):
        pooled([], 5, (2, 2))
    with pytest.raises(ValueError, match="names class 116, the student has 100"):
        pooled([cell_map()], 100, (2, 2))
    with pytest.raises(ValueError, match="'released'"):
        pooled([cell_map()], 200, (2, 2), convention="released")


# ---- what tokens are told


def told(picture: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a picture says of its tokens: mean place (2, h, w) in parts of the picture, and how much is picture."""
    sums = torch.nn.functional.adaptive_avg_pool2d(picture.as_subclass(Tensor), grid)
    return sums[:2] / sums[2:].clamp(min=1e-9), sums[2]


def views(kind: str, rng: random.Random):
    """A random view of 140 x 140 pixels, as a function of a picture or a map."""
    high, wide = rng.randint(25, HEIGHT), rng.randint(30, WIDTH)
    top, left = rng.randint(0, HEIGHT - high), rng.randint(0, WIDTH - wide)
    flips = [f for f in (F.hflip, F.vflip) if rng.random() < 0.5]
    angle, shift, zoom, shear = rng.uniform(-40, 40), rng.uniform(-20, 20), rng.uniform(0.8, 1.3), rng.uniform(-15, 15)
    ends = [[x + rng.uniform(-20, 20), y + rng.uniform(-20, 20)] for x, y in ((0, 0), (140, 0), (140, 140), (0, 140))]

    def view(i):
        i = F.resized_crop(i, top, left, high, wide, [140, 140])
        for flip in flips:
            i = flip(i)
        if kind == "rotated":
            i = F.rotate(i, angle, BILINEAR)
        elif kind == "affine":
            i = F.affine(i, angle, [shift, -shift], zoom, [shear, 0], BILINEAR)
        elif kind == "perspective":
            i = F.perspective(i, [[0, 0], [140, 0], [140, 140], [0, 140]], ends)
        elif kind == "all":
            i = F.rotate(F.pad(F.affine(i, angle, [shift, 0], zoom, [0, shear], BILINEAR), [3, 4]), -angle, BILINEAR)
            i = F.resize(F.perspective(i, [[0, 0], [140, 0], [140, 140], [0, 140]], ends), [140, 140])
        return i

    return view


@pytest.mark.parametrize("kind", ["crop", "rotated", "affine", "perspective", "all"])
@pytest.mark.parametrize("grid", [(14, 14), (7, 10)])
def test_tokens_are_told_what_the_picture_says_of_its_place(kind, grid):
    """Errors in cells of the map, over random compositions: of a map that is linear in the place, and of the mean place
    of the cells that a token was told."""
    rng = random.Random(0)
    centre = torch.stack([torch.arange(COLUMNS).repeat(ROWS), torch.arange(ROWS).repeat_interleave(COLUMNS)]) + 0.5
    cells = torch.tensor([COLUMNS, ROWS])[:, None, None]
    off_linear, off_cells, off_known, wrong = [], [], [], []
    for _ in range(12):
        view = views(kind, rng)
        place, part = told(view(places()), grid)
        place = place * cells
        linear = pooled([view(linear_map())], 2, grid, "zero")
        coded = pooled([view(cell_map())], ROWS * COLUMNS, grid, "zero")
        shares = coded.tokens[0]
        whole = (part > 1 - 1e-6) & (linear.known[0] == 1)
        inner = whole & (place > 1.5).all(0) & (place < cells - 1.5).all(0)  # the map is flat beyond its outer centres
        off_linear.append((linear.tokens[0] - place).abs()[:, inner])
        off_cells.append((torch.einsum("nc,chw->nhw", centre, shares) - place).abs()[:, inner])
        best = centre[:, shares.argmax(0)]
        wrong.append((best - place).abs()[:, whole])
        off_known.append((linear.known[0] - part).abs().flatten())
        assert torch.equal(linear.known, coded.known)
        told_something = coded.known[0] > 0
        torch.testing.assert_close(shares.sum(0), told_something.float(), atol=1e-5, rtol=0)
    numbers = [torch.cat([x.flatten() for x in xs]) for xs in (off_linear, off_cells, wrong, off_known)]
    assert all(len(x) > 50 for x in numbers)
    linear_max, cells_max, wrong_max, known_mean = (*(float(x.max()) for x in numbers[:3]), float(numbers[3].mean()))
    assert linear_max < 0.02
    assert cells_max < 0.02
    assert wrong_max < 0.7  # a token's middle is within half a cell of its own cell's, and places are half a cell apart
    assert known_mean < 0.035


@pytest.mark.parametrize(("rows", "columns", "grid"), [(18, 18, (14, 14)), (7, 12, (5, 9)), (9, 6, (1, 1))])
@pytest.mark.parametrize("fill", ["zero", "min"])
def test_crops_flips_and_resizes_are_roi_align(rows, columns, grid, fill):
    rng = random.Random(1)
    maps, boxes, flips = [], [], []
    for seed in range(30):
        # 199 and 299 are prime: no box is a whole number of cells, where torchvision rounds up or down by chance
        labels = random_map(30, rows, columns, (199, 299), seed)
        high, wide = rng.randint(5, 198), rng.randint(5, 298)
        top, left = rng.randint(0, 199 - high), rng.randint(0, 299 - wide)
        labels = F.resized_crop(labels, top, left, high, wide, [224, 224])
        flip = [f for f in (F.hflip, F.vflip) if rng.random() < 0.5]
        for f in flip:
            labels = f(labels)
        maps.append(labels)
        flips.append(flip)
        box = torch.tensor([[left / 299, top / 199, (left + wide) / 299, (top + high) / 199]], dtype=torch.float64)
        boxes.append((box * torch.tensor([columns, rows, columns, rows])).float())
    dense = dense_logits(torch.stack([m.scores for m in maps]), torch.stack([m.indices for m in maps]), 30, fill)
    found = pooled(maps, 30, grid, fill)
    for parts, got in ((grid, found.tokens), ((1, 1), found.image[..., None, None])):
        want = roi_align(dense, boxes, parts, aligned=True)
        for row, flip in zip(want, flips, strict=True):
            for f in flip:
                row.copy_(f(row))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert (found.known == 1).all()


def test_a_crop_of_a_map_of_columns_is_its_columns():
    labels = cell_map(6, 12, (60, 120))
    cut = F.resized_crop(labels, 10, 30, 40, 50, [224, 224])  # rows 1 to 4, columns 3 to 7
    found = pooled([cut], 72, (4, 5), "zero").tokens[0].argmax(0)
    assert found.tolist() == [[12 * r + c for c in range(3, 8)] for r in range(1, 5)]
    exact = pooled([cut], 72, (4, 5), "zero").tokens[0].amax(0)
    torch.testing.assert_close(exact, torch.ones(4, 5))


def test_a_flip_and_a_crop_are_the_mirrored_crop_and_a_flip():
    labels = random_map(20, 9, 9, (100, 160))
    one = F.resize(F.crop(F.hflip(labels), 10, 20, 50, 60), [64, 64])
    two = F.hflip(F.resize(F.crop(labels, 10, 160 - 20 - 60, 50, 60), [64, 64]))
    torch.testing.assert_close(one.place, two.place)
    for a, b in zip(pooled([one], 20, (7, 7)), pooled([two], 20, (7, 7)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_uniform_map_gives_uniform_tokens():
    scores = torch.tensor([3.0, 1.0, -2.0])[:, None, None].expand(3, 9, 13)
    order = torch.tensor([4, 2, 7])[:, None, None].expand(3, 9, 13)
    labels = LabelMap.from_stored(scores, order, (HEIGHT, WIDTH))
    for fill, rest in (("zero", 0.0), ("min", -2.0)):
        want = torch.full((10,), rest)
        want[[4, 2, 7]] = torch.tensor([3.0, 1.0, -2.0])
        for view in (labels, F.rotate(labels, 30), F.crop(labels, 3, 4, 20, 30)):
            found = pooled([view], 10, (5, 6), fill)
            some = found.known[0] > 0
            torch.testing.assert_close(found.tokens[0].permute(1, 2, 0)[some], want.expand(int(some.sum()), 10))
            torch.testing.assert_close(found.image[0], want)


def test_what_lies_outside_has_no_label():
    labels = cell_map(8, 8, (80, 80))
    padded = pooled([F.pad(labels, [80, 0, 0, 80])], 64, (4, 4), "min")
    assert padded.known[0].tolist() == [[0, 0, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2
    assert (padded.tokens[0][:, padded.known[0] == 0] == 0).all()
    uniform = soft_targets(padded.image, padded.tokens, torch.tensor([3]), smoothing=0.0).tokens[0]
    torch.testing.assert_close(uniform[0], torch.full((64,), 1 / 64))
    torch.testing.assert_close(padded.image, pooled([labels], 64, (4, 4), "min").image)
    # a quarter of a token: only that part is averaged
    part = pooled([F.pad(labels, 10)], 64, (1, 1), "zero")
    assert float(part.known) == pytest.approx(0.64, abs=0.02)
    assert float(part.tokens.sum()) == pytest.approx(1, abs=1e-5)
    # what was cut away is not known again when the view is widened
    cut = pooled([F.pad(F.crop(labels, 0, 0, 40, 40), [0, 0, 40, 40])], 64, (4, 4), "zero")
    assert cut.known[0].tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 0, 0]] * 2
    nothing = pooled([F.crop(labels, 100, 100, 20, 20)], 64, (2, 2))
    assert all((x == 0).all() for x in nothing)


def test_regions():
    """The middle square of a wide picture: what lies left and right of it has no label."""
    middle = cell_map(4, 4, (40, 80), region="center_square")
    found = pooled([middle], 16, (4, 8), "zero")
    assert found.known[0].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 4
    assert found.tokens[0].argmax(0)[:, 2:6].tolist() == torch.arange(16).reshape(4, 4).tolist()
    high = pooled([cell_map(4, 4, (80, 40), region="center_square")], 16, (8, 4), "zero")
    assert high.known[0][:, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    given = cell_map(4, 4, (40, 80), region=(20, 0, 60, 40))
    torch.testing.assert_close(given.place, middle.place)
    with_full = pooled([cell_map(4, 4, (40, 80))], 16, (4, 8), "zero")
    assert (with_full.known == 1).all()


def test_batches_of_one_and_of_several_shapes():
    maps = [random_map(20, 9, 9), F.rotate(random_map(20, 5, 7, seed=1), 10), F.hflip(random_map(20, 9, 9, seed=2))]
    together = pooled(maps, 20, (3, 4))
    assert (together.image.shape, together.tokens.shape, together.known.shape) == ((3, 20), (3, 20, 3, 4), (3, 3, 4))
    for i, labels in enumerate(maps):
        for row, one in zip(together, pooled([labels], 20, (3, 4)), strict=True):
            torch.testing.assert_close(row[i], one[0], atol=1e-5, rtol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    maps = [F.rotate(random_map(20, 9, 9, seed=i), 7.0 * i) for i in range(6)]
    for convention, kept in (("default", maps), ("release", [random_map(20, 9, 9, seed=i) for i in range(6)])):
        whole = pooled(kept, 20, (3, 4), convention=convention)
        with monkeypatch.context() as patch:
            patch.setattr(module, "CHUNK_BYTES", 1)
            for a, b in zip(whole, pooled(kept, 20, (3, 4), convention=convention), strict=True):
                torch.testing.assert_close(a, b)


class Peak(TorchDispatchMode):
    """The most bytes that results of operations held at one time, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.most = 0

    def _drop(self, key: int) -> None:
        self.live[key][1] -= 1
        if not self.live[key][1]:
            del self.live[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                entry = self.live.setdefault(storage.data_ptr(), [storage.nbytes(), 0])
                entry[1] += 1
                weakref.finalize(x, self._drop, storage.data_ptr())
        self.most = max(self.most, sum(size for size, _ in self.live.values()))
        return out


@pytest.mark.parametrize("turned", [False, True])
def test_memory_is_bounded(turned):
    """64 pictures of 1000 classes on 14 x 14 tokens: the results are 50 MB, and 64 MiB may be used besides."""
    maps = [random_map(1000, 18, 18, seed=i) for i in range(64)]
    maps = [F.rotate(m, 3.0 * i) for i, m in enumerate(maps)] if turned else maps
    with Peak() as peak:
        found = pooled(maps, 1000, (14, 14))
    results = sum(x.untyped_storage().nbytes() for x in found)
    assert results == pytest.approx(50.5e6, rel=0.02)
    assert peak.most > results
    assert peak.most < results + module.CHUNK_BYTES + 8 * 2**20


# ---- as released

TOPK = golden("topk")


def released_views() -> list[LabelMap]:
    views = []
    for stored, (width, height), (top, left, high, wide) in zip(
        TOPK, GOLDEN["image_wh"].tolist(), GOLDEN["boxes_tlhw"].tolist(), strict=True
    ):
        labels = LabelMap.from_stored(stored[0], stored[1], (height, width))
        views.append(F.resized_crop(labels, top, left, high, wide, [224, 224]))
    return views


def test_places_are_the_fractions_that_the_release_records():
    for labels, plane in zip(released_views(), golden("maps_with_coords")[:, 2, 0, 0, :4], strict=True):
        view = labels.place @ torch.diag(torch.tensor([224, 224, 1.0], dtype=torch.float64))
        top, left, high, wide = plane.double()
        want = torch.stack([wide, left, high, top])
        torch.testing.assert_close(view[[0, 0, 1, 1], [0, 2, 1, 2]], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("convention", ["default", "release"])
def test_targets_match_the_release(convention):
    labels = golden("gt_class")
    found = pooled(released_views(), META["C"], (6, 6), "zero", convention)

    def target(smoothing: float) -> Tensor:
        soft = soft_targets(found.image, found.tokens, labels, smoothing, normalized=False)
        return torch.cat([soft.ground_truth[:, None], soft.image[:, None], soft.tokens], 1).transpose(1, 2)

    if convention == "default":
        torch.testing.assert_close(target(0.0)[..., 1:], golden("tokens_xyfixed"), atol=1e-5, rtol=0)
        return
    torch.testing.assert_close(target(0.0), golden("target_plain_released"), atol=1e-5, rtol=0)
    torch.testing.assert_close(target(0.1), golden("target_smooth_released"), atol=1e-5, rtol=0)
    for lam in ("1", "0.3"):
        got = mixed(target(0.1), float(lam))
        torch.testing.assert_close(got, golden(f"mixup_lam{lam}_released"), atol=1e-5, rtol=0)


def test_one_token_matches_the_release():
    """Re-label mode: a grid of one token, which is the image label."""
    found = pooled(released_views(), META["C"], (1, 1), "zero", "release")
    assert torch.equal(found.image, found.tokens.flatten(1))
    want = golden("target_size1_released")
    torch.testing.assert_close(found.image.softmax(-1), want[..., 1], atol=1e-5, rtol=0)


def test_dense_logits_match_the_release():
    assert torch.equal(dense_logits(TOPK[:, 0], TOPK[:, 1].long(), META["C"], "zero"), golden("dense"))


@pytest.mark.parametrize(("name", "flip"), [("hflip", F.hflip), ("vflip", F.vflip)])
def test_flips_match_the_release(name, flip):
    """A flipped map pooled, and the map whose values the release flipped."""
    ours = flip(LabelMap.from_stored(*TOPK[0], (80, 120)))
    theirs = LabelMap.from_stored(*golden(name), (80, 120))
    for convention in ("default", "release"):
        crops = [F.resized_crop(m, 20, 10, 50, 60, [96, 96]) for m in (ours, theirs)]
        a, b = (pooled([m], META["C"], (6, 6), convention=convention) for m in crops)
        torch.testing.assert_close(a.tokens, b.tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.image, b.image, atol=1e-5, rtol=0)


OPERATIONS = dict(zip(("shear_x", "shear_y", "translate_x", "translate_y", "rotate"), module.RELEASED, strict=True))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_match_the_release(name):
    labels = LabelMap.from_stored(*TOPK[0], (80, 120))
    moved = released(labels, OPERATIONS[name], META["affine_args"][name])
    assert torch.equal(plain(moved), golden(f"affine/{name}").float())


def test_released_operations_are_scipy_s():
    rng = np.random.default_rng(0)
    labels = random_map(30, 9, 9)
    for _ in range(20):
        amount = float(rng.uniform(-0.45, 0.45))
        turn = math.radians(60 * amount)
        cos, sin = round(math.cos(turn), 15), round(math.sin(turn), 15)
        turned = np.array([[cos, sin], [-sin, cos]])
        forms = {
            "ShearX": (amount, [[1, 0], [amount, 1]], [0, 0]),
            "ShearY": (amount, [[1, amount], [0, 1]], [0, 0]),
            "TranslateXRel": (amount, np.eye(2), [0, amount * 9]),
            "TranslateYRel": (amount, np.eye(2), [amount * 9, 0]),
            "Rotate": (60 * amount, turned, np.full(2, 4.5) - turned @ np.full(2, 4.5)),
        }
        for name, (argument, matrix, offset) in forms.items():
            moved = plain(released(labels, name, argument)).numpy()
            for plane, mode in enumerate(("constant", "nearest")):
                for got, values in zip(moved[plane], plain(labels)[plane].numpy(), strict=True):
                    want = affine_transform(values, np.array(matrix), offset, order=0, mode=mode)
                    assert (got == want).all()


def test_released_operations_know_the_published_order():
    labels = random_map(30, 9, 9)
    flipped = LabelMap.from_stored(labels.scores.flip(-1), labels.indices.flip(-1), labels.canvas)
    assert torch.equal(plain(released(F.hflip(labels), "ShearX", 0.2)), plain(released(flipped, "ShearX", 0.2)))
    for wrong in (F.crop(labels, 0, 0, 20, 20), random_map(30, 9, 8)):
        with pytest.raises(ValueError, match="square maps of whole pictures"):
            released(wrong, "ShearX", 0.2)
    with pytest.raises(ValueError, match="operation must be one of"):
        released(labels, "Solarize", 1)
    for wrong in (F.rotate(labels, 10), F.pad(labels, 3)):
        with pytest.raises(ValueError, match="knows flips, crops and resizes"):
            pooled([wrong], 30, (3, 3), convention="release")
    with pytest.raises(ValueError, match="knows square maps"):
        pooled([random_map(30, 9, 8)], 30, (3, 3), convention="release")


def test_the_release_exchanges_x_and_y():
    """Its label of a crop is ours of the crop with rows and columns exchanged."""
    labels = random_map(30, 18, 18, (100, 100))
    swapped = pooled([F.crop(labels, 10, 30, 60, 40)], 30, (7, 7), convention="release")
    right = pooled([F.crop(labels, 30, 10, 40, 60)], 30, (7, 7))
    torch.testing.assert_close(swapped.tokens, right.tokens, atol=1e-4, rtol=0)
