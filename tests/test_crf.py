"""Dense CRF: both backends move blurred, noisy masks to the picture's edges; fixed points, an exact oracle, errors."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.evaluation import crf
from distillkit.evaluation.crf import DenseCRF, crf_backend, dense_crf

THERE = importlib.util.find_spec("pydensecrf") is not None
backends = pytest.mark.parametrize(
    "backend",
    ["local", pytest.param("pydensecrf", marks=pytest.mark.skipif(not THERE, reason="pydensecrf2 is not installed"))],
)


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, Tensor, Tensor]:
    """A picture of three flat colours with little noise, its mask, and what a coarse, noisy model says of it."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(48, 64, dtype=torch.long)
    truth[12:36, 16:48] = 1
    truth[24:, 40:60] = 2
    colours = torch.tensor([[50, 60, 70], [180, 60, 40], [60, 160, 200]])
    noise = torch.randn(3, 48, 64, generator=generator) * 2
    picture = (colours[truth].permute(2, 0, 1) + noise).clamp(0, 255).to(torch.uint8)
    coarse = F.avg_pool2d(F.one_hot(truth, 3).permute(2, 0, 1).float(), 13, 1, 6, count_include_pad=False)
    logits = coarse.clamp_min(0.02).log() + torch.randn(3, 48, 64, generator=generator)
    return picture, truth, logits.softmax(0)


@backends
def test_noise_and_blur_move_to_the_edges_of_the_picture(scene, backend):
    picture, truth, start = scene
    before = (start.argmax(0) == truth).double().mean()
    after = (dense_crf(start, picture, backend=backend).argmax(0) == truth).double().mean()
    assert before < 0.9
    assert after > 0.99


@pytest.mark.skipif(not THERE, reason="pydensecrf2 is not installed")
def test_the_approximation_agrees_with_the_original(scene):
    picture, _, start = scene
    original, ours = (dense_crf(start, picture, backend=b) for b in ("pydensecrf", "local"))
    assert (original.argmax(0) == ours.argmax(0)).double().mean() > 0.99
    assert (original - ours).abs().mean() < 0.03


@backends
def test_each_pixel_sums_to_one_and_inputs_stay(scene, backend):
    picture, _, start = scene
    copies = picture.clone(), start.clone()
    found = dense_crf(3 * start, picture, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), torch.ones(48, 64))
    torch.testing.assert_close(found, dense_crf(start, picture, backend=backend))  # the scale of the input is nothing
    assert torch.equal(picture, copies[0])
    assert torch.equal(start, copies[1])


@backends
def test_fixed_points(scene, backend):
    picture, truth, _ = scene
    even = dense_crf(torch.ones(3, 48, 64), picture, backend=backend)
    torch.testing.assert_close(even, torch.full((3, 48, 64), 1 / 3), rtol=0, atol=1e-3)
    sure = F.one_hot(truth, 3).permute(2, 0, 1).float()
    assert torch.equal(dense_crf(sure, picture, backend=backend).argmax(0), truth)


@backends
def test_classes_are_alike(scene, backend):
    picture, _, start = scene
    found = dense_crf(start, picture, backend=backend)
    swapped = dense_crf(start[[2, 0, 1]], picture, backend=backend)
    torch.testing.assert_close(swapped, found[[2, 0, 1]], rtol=1e-3, atol=1e-4)


def test_local_equals_the_mean_field_of_all_pairs_where_it_reads_all():
    """On a picture of 4 x 3 all pixels are at distances 0..3 along both axes, so that the sampled sum is the whole."""
    generator = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 12, (3, 4, 3), generator=generator, dtype=torch.uint8)
    start = torch.rand(2, 4, 3, generator=generator)
    settings = DenseCRF(iterations=3, position_xy=1.6, colour_xy=2.0, colour_rgb=5.0)
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0))
    colours = picture.flatten(1).t().float()

    def normalised(kernel: Tensor) -> Tensor:
        sums = kernel.sum(1)
        return kernel / (sums[:, None] * sums[None]).sqrt()

    apart = torch.cdist(places, places).square()
    near = (-apart / (2 * 1.6**2)).exp()
    alike = (-apart / (2 * 2.0**2) - torch.cdist(colours, colours).square() / (2 * 5.0**2)).exp()
    kernel = 3.0 * normalised(near) + 4.0 * normalised(alike)
    q = unary = start.flatten(1) / start.flatten(1).sum(0)
    for _ in range(3):
        q = (unary.log() + q @ kernel).softmax(0)
    torch.testing.assert_close(dense_crf(start, picture, settings, "local").flatten(1), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 5, 40, 300])
@pytest.mark.parametrize("xy", [0.2, 1.0, 67.0])
def test_sampled_distances_cover_what_is_around_a_pixel(xy, side):
    distances = crf._distances(xy, side)
    assert distances[0] == 1
    assert all(distances[d] == distances[-d] for d in distances)
    assert max(distances) <= side - 1
    steps = sorted(d for d in distances if d > 0)
    end = 0.5
    for step in steps:  # each stands for the stretch between the middles to its neighbours
        assert end < step < end + distances[step]
        end += distances[step]


def test_one_pixel_and_one_class():
    picture = torch.zeros(3, 1, 1, dtype=torch.uint8)
    assert torch.equal(dense_crf(torch.ones(1, 1, 1), picture, backend="local"), torch.ones(1, 1, 1))


def test_which_backend_runs(monkeypatch, scene):
    assert crf_backend() == ("pydensecrf" if THERE else "local")
    assert crf_backend("local") == "local"
    monkeypatch.setattr(crf.importlib.util, "find_spec", lambda name: None)
    assert crf_backend() == "local"
    picture, _, start = scene
    with pytest.warns(UserWarning, match="an approximation of the dense CRF runs"):
        found = dense_crf(start, picture, DenseCRF(iterations=1))
    assert torch.equal(found, dense_crf(start, picture, DenseCRF(iterations=1), "local"))
    with pytest.raises(ImportError, match="pip install pydensecrf2"):
        crf_backend("pydensecrf")
    with pytest.raises(ValueError, match="backend must be 'auto', 'pydensecrf' or 'local', got 'fast'"):
        crf_backend("fast")


def test_what_does_not_fit_is_named(scene):
    picture, _, start = scene
    with pytest.raises(ValueError, match=r"got \(3, 48, 64\) and torch\.float32 \(3, 48, 64\)"):
        dense_crf(start, picture.float())
    with pytest.raises(ValueError, match=r"uint8 \(3, 48, 63\)"):
        dense_crf(start, picture[..., 1:])
    with pytest.raises(ValueError, match="not logits: apply softmax"):
        dense_crf(start.log(), picture)
