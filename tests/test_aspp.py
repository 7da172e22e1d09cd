"""ASPP and AdaptiveASPP: agreement with the published one, gates, dilations, and the error of a single picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillkit.models.aspp import ASPP, AdaptiveASPP, Gates, SeparableConv, scaled_rates

GOLDEN = Path(__file__).parent / "golden" / "dense_adaptive_aspp_a.npz"
OURS = {  # of the published names
    "image_pooling": "branches.0",
    "aspp0": "branches.1",
    **{f"aspp{i}.block": f"branches.{i + 1}" for i in range(1, 6)},
    "D_fc_s.fc0": "segmentation.gates.hidden",
    "D_fc_s.fc1": "segmentation.gates.score",
    "D_fc_b.fc0": "boundary.gates.hidden",
    "D_fc_b.fc1": "boundary.gates.score",
    "D_conv_s": "segmentation.project",
    "D_conv_b": "boundary.project",
}


def ours(name: str) -> str:
    published = next(p for p in OURS if name.startswith(f"{p}."))
    return OURS[published] + name.removeprefix(published)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    arrays = np.load(GOLDEN)
    found = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def published(golden) -> AdaptiveASPP:
    aspp = AdaptiveASPP(6, 4)
    aspp.load_state_dict({ours(k[6:]): v for k, v in golden.items() if k.startswith("state/")})
    return aspp.eval()


def gates_of(aspp: AdaptiveASPP) -> list[torch.Tensor]:
    """Filled by each forward: scores for segmentation, then for boundaries."""
    scores: list[torch.Tensor] = []
    for mix in (aspp.segmentation, aspp.boundary):
        mix.gates.register_forward_hook(lambda module, args, out: scores.append(out))
    return scores


def close(ours, wanted, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


def test_agrees_with_the_published_one_in_values_and_gradients(golden):
    aspp, x = published(golden), golden["x"].clone().requires_grad_()
    scores = gates_of(aspp)
    segmentation, boundary = aspp(x)
    close(segmentation, golden["seg_out"])
    close(boundary, golden["bod_out"])
    close(scores[0], golden["seg_scores"])
    close(scores[1], golden["bod_scores"])
    ((segmentation * golden["w_seg"]).sum() + (boundary * golden["w_bod"]).sum()).backward()
    close(x.grad, golden["grad_x"], 1e-4)
    for name in ("D_fc_s.fc0.weight", "D_fc_b.fc1.weight"):
        close(aspp.get_parameter(ours(name)).grad, golden[f"grad_{name}"], 1e-4)


def test_gates_stay_in_float32_under_autocast_and_in_half_precision(golden):
    aspp, x = published(golden), golden["x"]
    scores = gates_of(aspp)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = aspp(x)
    assert mixed[0].dtype == torch.bfloat16
    assert scores[0].dtype == torch.float32
    close(scores[0], golden["seg_scores"], 0.05)
    close(mixed[0].float(), golden["seg_out"], 0.05 * golden["seg_out"].abs().max().item())
    half = aspp.half()
    for part in (*half(x.half()), *half(torch.zeros_like(x).half())):
        assert part.dtype == torch.float16
        assert part.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_the_best_branch_counts_twice_and_the_worst_once(seed, branches):
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(branches)
    for parameter in gates.parameters():
        parameter.data.normal_(generator=generator)
    means = torch.rand(5, branches, generator=generator)
    with torch.no_grad():
        found = gates(means)
        hidden = (means @ gates.hidden.weight.T + gates.hidden.bias).clamp(min=0)
        scores = (hidden @ gates.score.weight.T + gates.score.bias).tanh().clamp(min=0)
    for gate, score in zip(found, scores):
        if score.max() == score.min():
            assert not gate.any()
        else:
            assert (gate.min(), gate.max()) == (0, 1)
            close(gate * (score.max() - score.min()), score - score.min(), 1e-6)


def test_without_a_positive_score_it_is_a_plain_one_and_trains_on():
    gates = Gates(7)
    torch.nn.init.constant_(gates.score.bias, -100.0)
    means = torch.rand(3, 7, requires_grad=True)
    found = gates(means)
    assert not found.any()
    (found * torch.randn(3, 7)).sum().backward()
    assert not means.grad.any()  # and no NaN of 0/0


def test_branches_are_weighed_as_if_a_weighted_copy_went_through_the_convolution():
    torch.manual_seed(0)
    mix = AdaptiveASPP(6, 4, rates=(1, 2)).segmentation.double().eval()
    branches, means = torch.randn(3, 4 * 4, 5, 6, dtype=torch.float64), torch.rand(3, 4)
    weights = 1 + mix.gates(means).double()
    weighted = (branches.unflatten(1, (4, 4)) * weights[:, :, None, None, None]).flatten(1, 2)
    torch.testing.assert_close(mix(branches, means), mix.project(weighted))


@pytest.mark.parametrize(
    ("width", "parameters"), [(256, 1_395_168), (512, 1_868_000), (1024, 2_813_664), (2048, 4_704_992)]
)
def test_published_numbers_of_parameters(width, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in AdaptiveASPP(width).parameters()) == parameters


@pytest.mark.parametrize("rate", [1, 3])
def test_a_separable_convolution_reads_cells_a_dilation_apart(rate):
    conv = SeparableConv(2, 3, rate).eval()
    x = torch.randn(1, 2, 9, 9, requires_grad=True)
    conv.pointwise(conv.depthwise(x))[0, :, 4, 4].sum().backward()
    rows, columns = x.grad[0, 0].nonzero(as_tuple=True)
    assert set(rows.tolist()) == set(columns.tolist()) == {4 - rate, 4, 4 + rate}
    assert len(rows) == 9


def test_a_separable_convolution_may_end_before_its_last_relu():
    torch.manual_seed(0)
    x, with_relu = torch.randn(2, 3, 5, 5), SeparableConv(3, 4)
    without = SeparableConv(3, 4, last_relu=False)
    without.load_state_dict(with_relu.state_dict())
    assert without(x).min() < 0
    close(without(x).relu(), with_relu(x))


@pytest.mark.parametrize("separable", [True, False])
def test_a_plain_one_has_a_branch_a_rate_and_two_more(separable):
    aspp = ASPP(8, 16, (1, 2, 3), separable)
    assert aspp(torch.randn(2, 8, 7, 5)).shape == (2, 16, 7, 5)
    three = 3 * (8 * 9 + 2 * 8 + 8 * 16 + 2 * 16) if separable else 3 * (8 * 16 * 9 + 2 * 16)
    others = 2 * (8 * 16 + 2 * 16) + 5 * 16 * 16 + 2 * 16
    assert sum(p.numel() for p in aspp.parameters()) == three + others


def test_image_pooling_says_the_same_of_every_cell_whatever_their_order():
    torch.manual_seed(0)
    pooling, x = ASPP(8, 4).branches[0], torch.randn(3, 8, 4, 6)
    found = pooling(x)
    close(found, found[..., :1, :1].expand_as(found))
    close(found, pooling(x.flip(2, 3)))


@pytest.mark.parametrize("make", [ASPP, AdaptiveASPP])
def test_one_picture_is_refused_in_training_only(make):
    aspp, x = make(6, 4), torch.randn(1, 6, 5, 5)
    with pytest.raises(ValueError, match=r"at least 2 pictures.*drop_last=True.*convert_sync_batchnorm.*eval mode"):
        aspp(x)
    aspp.eval()(x)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    for make in (ASPP, AdaptiveASPP):
        aspp = make(6, 16).double()
        found = aspp(torch.randn(4, 6, 40, 40, dtype=torch.float64))
        parts = [found] if isinstance(found, torch.Tensor) else found
        sum((p * torch.randn_like(p)).sum() for p in parts).backward()
        assert [name for name, p in aspp.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dilations_reach_as_far_at_another_stride():
    assert scaled_rates((6, 12, 18), 8, 16) == [12, 24, 36]
    assert scaled_rates((6, 12, 18, 24, 36), 32, 16) == [3, 6, 9, 12, 18]
    with pytest.raises(ValueError, match=r"\(6, 12, 18, 24\), made for 8 pixels a cell, are no whole.*at 32; choose"):
        scaled_rates((6, 12, 18, 24), 32, 8)
