"""RandAugment of a picture with its label map. Oracles: timm, and pictures whose pixels say where they were."""

import inspect
import math
import random
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import auto_augment as timm_ra
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from distillkit.data.label_map import LabelMap, pooled, released
from distillkit.data.randaugment import GEOMETRIC, OPERATIONS, PHOTOMETRIC, Operation, RandAugment, amount_of, back_of

CONFIG = "rand-m9-mstd0.5-inc1"
HEIGHT, WIDTH = 61, 90


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """uint8 (3, H, W), smooth."""
    small = torch.rand(3, 6, 8, generator=generator())
    return (F.resize(small, [HEIGHT, WIDTH]) * 255).to(torch.uint8)


def timm_ops(sign: int) -> dict:
    """timm's operations at magnitude 10, always done, one way."""
    policy = timm_ra.rand_augment_transform(CONFIG, {"img_mean": (128,) * 3, "interpolation": PIL.Image.BILINEAR})
    return {op.name: op for op in policy.ops}


def labels_of_place() -> LabelMap:
    down, right = torch.meshgrid(torch.arange(9) + 0.5, torch.arange(13) + 0.5, indexing="ij")
    order = torch.tensor([0, 1])[:, None, None].expand(2, 9, 13)
    return LabelMap.from_stored(torch.stack([right, down]), order, (HEIGHT, WIDTH))


def places() -> tv_tensors.Image:
    """Where every pixel is, in cells of the map, and 1: a float picture."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    return tv_tensors.Image(torch.stack([x / WIDTH * 13, y / HEIGHT * 9, torch.ones_like(x)]))


# ---- against timm


def test_the_policy_is_timm_s():
    theirs = timm_ra.rand_augment_transform(CONFIG, {})
    ours = RandAugment.from_config(CONFIG)
    assert [op.name for op in theirs.ops] == list(OPERATIONS)
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in theirs.ops} == {(9, 0.5, 0.5)}
    assert (ours.magnitude, ours.std, ours.probability, ours.layers) == (9, 0.5, 0.5, theirs.num_layers)
    assert theirs.choice_weights is None  # with repetition, each as likely
    assert ours == RandAugment()
    assert set(PHOTOMETRIC) | set(GEOMETRIC) == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_timm_s_to_the_pixel(name, sign, picture, monkeypatch):
    """On PIL pictures exactly; on tensors up to rounding, and but for the rim of a moved picture."""
    monkeypatch.setattr(timm_ra, "_randomly_negate", lambda value: sign * value)
    op = timm_ops(sign)[name]
    pil = F.to_pil_image(picture)
    for level in (0.0, 0.05, 0.33, 0.5, 0.9, 0.97, 1.0):
        args = op.level_fn(10 * level, op.hparams) if op.level_fn else ()
        amount = amount_of(name, level, sign)
        if (name, level) == ("PosterizeIncreasing", 1.0):
            assert (args, amount) == ((0,), 1)  # a black picture, which Pillow refuses
            continue
        assert args == () or args[0] == pytest.approx(amount, abs=1e-12)
        want = np.asarray(op.aug_fn(pil, *args, **dict(op.kwargs))).astype(int)
        found = RandAugment().apply(Operation(name, amount), pil)
        assert (np.asarray(found) == want).all()
        tensor = RandAugment().apply(Operation(name, amount), picture)
        assert (tensor.dtype, tensor.shape) == (picture.dtype, picture.shape)
        off = np.abs(tensor.permute(1, 2, 0).numpy().astype(int) - want).max(-1)
        assert (off > 1).mean() < (0.03 if name in GEOMETRIC else 1e-9)
        wrapped = RandAugment().apply(Operation(name, amount), tv_tensors.Image(picture))
        assert isinstance(wrapped, tv_tensors.Image)
        assert torch.equal(wrapped.as_subclass(torch.Tensor), tensor)


def test_bicubic_is_timm_s_too(picture):
    pil = F.to_pil_image(picture)
    for name in GEOMETRIC:
        op = timm_ops(1)[name]
        kwargs = dict(op.kwargs) | {"resample": PIL.Image.BICUBIC}
        want = np.asarray(op.aug_fn(pil, 0.2, **kwargs))
        found = RandAugment().apply(Operation(name, 0.2, F.InterpolationMode.BICUBIC), pil)
        assert (np.asarray(found) == want).all()


def drawn_by_timm(seed: int, times: int) -> list[list[tuple[str, float]]]:
    """What timm carries out: names and arguments."""
    np.random.seed(seed)
    random.seed(seed)
    seen: list[list[tuple[str, float]]] = []
    policy = timm_ra.rand_augment_transform(CONFIG, {})
    for op in policy.ops:
        op.aug_fn = lambda image, *args, name=op.name, **_: seen[-1].append((name, args[0] if args else 0.0))
    for _ in range(times):
        seen.append([])
        policy(None)
    return seen


def test_draws_are_distributed_as_timm_s():
    times = 3000
    theirs = drawn_by_timm(0, times)
    g = generator()
    ours = [[(o.name, o.amount) for o in RandAugment().draw(g)] for _ in range(times)]
    for drawn in (ours, theirs):
        assert np.mean([len(d) for d in drawn]) == pytest.approx(1, abs=0.05)  # 2 layers, half of the time
        names = Counter(name for d in drawn for name, _ in d)
        assert set(names) == set(OPERATIONS)
        assert all(count == pytest.approx(times / 15, rel=0.3) for count in names.values())
    for name in OPERATIONS:
        a, b = (np.array([v for d in drawn for n, v in d if n == name]) for drawn in (ours, theirs))
        spread = max(float(np.abs(b).max()), 1e-6)
        assert np.abs(a).mean() == pytest.approx(np.abs(b).mean(), abs=0.1 * spread)
        assert a.mean() == pytest.approx(b.mean(), abs=0.2 * spread)
        assert np.abs(a).max() <= spread * 1.2
        both_ways = inspect.getsource(timm_ops(1)[name].level_fn).count("negate") if timm_ops(1)[name].level_fn else 0
        if both_ways:
            middle = 1.0 if name.endswith("Increasing") else 0.0
            assert {bool(v > middle) for v in a} == {True, False}


# ---- picture and map together


def test_nothing_but_the_generator_is_random(picture):
    labels = labels_of_place()
    policy = RandAugment(layers=4, probability=1.0)
    torch.manual_seed(0)
    one = policy(tv_tensors.Image(picture), labels, generator(3))
    torch.manual_seed(1)
    two = policy(tv_tensors.Image(picture), labels, generator(3))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1].place, two[1].place)
    alone, none = policy(tv_tensors.Image(picture), None, generator(3))
    assert none is None
    assert torch.equal(alone, one[0])
    # what is drawn takes the same numbers from the generator, whatever it is
    g = generator(7)
    RandAugment(probability=0.0).draw(g)
    h = generator(7)
    RandAugment(magnitude=3, probability=1.0).draw(h)
    assert torch.equal(g.get_state(), h.get_state())


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_photometric_operations_leave_the_map_alone(name, picture):
    labels = labels_of_place()
    assert RandAugment().apply(Operation(name, amount_of(name, 0.9, 1)), labels) is labels


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_map_goes_where_the_picture_goes(name, sign):
    """The place of every pixel by the map, and what the pixel says: less than a hundredth of a cell apart."""
    policy = RandAugment(fill=0)
    operation = Operation(name, amount_of(name, 0.9, sign))
    image, labels = policy.apply(operation, places()), policy.apply(operation, labels_of_place())
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    u, v, w = (labels.place @ torch.stack([x, y, torch.ones_like(x)]).double().flatten(1)).reshape(3, HEIGHT, WIDTH)
    whole = image[2] > 1 - 1e-5
    assert 0.4 < whole.float().mean() < 1
    off = (torch.stack([u / w * 13, v / w * 9]) - image[:2]).abs()[:, whole]
    assert off.max() < 0.01


def test_tokens_of_whole_draws_agree_with_the_picture():
    """All geometric operations of a draw; a token's place by the picture and by the map, in cells."""
    policy = RandAugment(layers=6, probability=1.0, fill=0)
    worst, some = 0.0, 0
    for seed in range(20):
        image, labels = places(), labels_of_place()
        for operation in policy.draw(generator(seed)):
            if operation.name in GEOMETRIC:
                image, labels = policy.apply(operation, image), policy.apply(operation, labels)
        image, labels = (F.resized_crop(i, 5, 10, 50, 70, [70, 70]) for i in (image, labels))
        sums = torch.nn.functional.avg_pool2d(image.as_subclass(torch.Tensor), 10)
        found = pooled([labels], 2, (7, 7), "zero")
        inner = (found.known[0] == 1) & (sums[2] > 1 - 1e-5)
        inner &= (sums[:2] > 1.5).all(0) & (sums[0] < 11.5) & (sums[1] < 7.5)
        if inner.any():
            worst = max(worst, float((found.tokens[0] - sums[:2]).abs()[:, inner].max()))
            some += int(inner.sum())
    assert some > 100
    assert worst < 0.05


def test_the_release_moves_the_values_of_the_map():
    labels = LabelMap.from_stored(torch.rand(3, 9, 9), torch.arange(3)[:, None, None].expand(3, 9, 9), (40, 40))
    policy = RandAugment(layers=5, probability=1.0, convention="release")
    _, moved = policy(torch.zeros(3, 40, 40, dtype=torch.uint8), labels, generator(2))
    want = labels
    for operation in policy.draw(generator(2)):
        want = released(want, operation.name, operation.amount) if operation.name in GEOMETRIC else want
    assert torch.equal(moved.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))
    assert not torch.equal(moved.scores, labels.scores)
    assert torch.equal(moved.place, labels.place)


def test_both_conventions_move_a_map_the_same_way():
    """Nearest cells and the exact place: within a cell and a half, cells' indices being half a cell from centres."""
    order = torch.tensor([0, 1])[:, None, None].expand(2, 18, 18)
    down, right = torch.meshgrid(torch.arange(18) + 0.5, torch.arange(18) + 0.5, indexing="ij")
    labels = LabelMap.from_stored(torch.stack([right, down]), order, (180, 180))
    for name in GEOMETRIC:
        operation = Operation(name, amount_of(name, 0.9, 1))
        ours = pooled([RandAugment().apply(operation, labels)], 2, (18, 18), "zero")
        theirs = released(labels, name, operation.amount).scores
        sure = (ours.known[0] == 1) & (theirs > 0).all(0)
        assert sure.float().mean() > 0.4
        assert (ours.tokens[0] - theirs).abs()[:, sure].max() < 1.5


def test_turning_is_around_the_middle():
    a, b, c, d, e, f = back_of("Rotate", 30.0, (60, 100))
    assert (a * 50 + b * 30 + c, d * 50 + e * 30 + f) == pytest.approx((50, 30))
    assert (a, e) == pytest.approx((math.cos(math.pi / 6),) * 2)


# ---- options


def test_configs():
    assert RandAugment.from_config("rand-m7-n3-mstd1-p0.3-inc1", fill=(1, 2, 3)) == RandAugment(
        7, 1.0, 3, 0.3, (1, 2, 3)
    )
    assert RandAugment.from_config("rand-inc1") == RandAugment(10, 0.0)  # timm's defaults
    for config, said in (
        ("rand-m9-mstd0.5", "only 'rand-...-inc1'"),
        ("augmix-m5-inc1", "only 'rand-...-inc1'"),
        ("rand-m9-inc1-tweights", "'tweights' is not understood"),
        ("rand-m9-mmax12-inc1", "'mmax12' is not understood"),
        ("rand-m-inc1", "'m' is not understood"),
    ):
        with pytest.raises(ValueError, match=said):
            RandAugment.from_config(config)


@pytest.mark.parametrize(
    "options",
    [
        {"magnitude": 11},
        {"std": -1},
        {"layers": -1},
        {"probability": 1.1},
        {"interpolation": "nearest"},
        {"convention": "published"},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RandAugment(**options)


def test_tensors_are_moved_bilinearly(picture):
    with pytest.raises(ValueError, match="needs PIL pictures"):
        RandAugment(interpolation="random")(picture, None, generator())
    pil = F.to_pil_image(picture)
    modes = {
        operation.interpolation
        for seed in range(9)
        for operation in RandAugment(interpolation="random").draw(generator(seed))
    }
    assert len(modes) == 2
    image, _ = RandAugment(layers=5, probability=1.0, interpolation="random")(pil, None, generator())
    assert image.size == pil.size


def test_the_fill_shows_outside(picture):
    for fill in (7, (1, 2, 3)):
        moved = RandAugment(fill=fill).apply(Operation("TranslateXRel", 0.4), picture)
        want = torch.tensor([7, 7, 7] if fill == 7 else fill, dtype=torch.uint8)
        assert torch.equal(moved[:, 10, -1], want)
