"""Token labels and MixToken: arrays of the published implementation, closed forms, gradients, invariances."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from distillkit.losses.mix_token import draw_box, mix, mix_box, realised
from distillkit.losses.token_labels import (
    blended,
    dense_logits,
    mixed,
    pool,
    smoothed,
    soft_cross_entropy,
    soft_targets,
    token_label_loss,
)

GOLDEN = Path(__file__).parent / "golden"
LOSS = np.load(GOLDEN / "dense_tl_loss_a.npz")
CASES = json.loads(str(LOSS["meta"]))["cases"]
BOXES = np.load(GOLDEN / "dense_tl_rand_bbox_a.npz")
MAPS = np.load(GOLDEN / "dense_tl_labelmap_a.npz")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def golden(name: str) -> Tensor:
    return torch.from_numpy(LOSS[name])


# ---- the loss


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_loss_matches_the_release(case):
    name, grid = case["name"], tuple(case["grid"])
    output, aux = golden(f"{name}/output").requires_grad_(), golden(f"{name}/aux").requires_grad_()
    target, lam = golden(f"{name}/target"), realised(golden(f"{name}/bbox"), grid)
    weights = {"dense_weight": case["dense_weight"], "class_weight": case["cls_weight"]}
    if case["target"] == "2d":
        options = {"class_target": target}
    else:
        options = {"class_target": target[..., 1], "token_target": target[..., 2:].transpose(1, 2)}
        if case["ground_truth"]:
            options["ground_truth"] = target[..., 0]
    terms = token_label_loss(output, aux, **options, lam=lam.double(), **weights)
    torch.testing.assert_close(terms.total, golden(f"{name}/loss"), rtol=1e-6, atol=0)
    plain = token_label_loss(output, aux, **options, lam=lam.double(), dense_weight=1.0)
    torch.testing.assert_close(plain.classes, golden(f"{name}/loss_cls"), rtol=1e-6, atol=0)
    torch.testing.assert_close(plain.tokens, golden(f"{name}/loss_aux"), rtol=1e-6, atol=0)
    terms.total.backward()
    torch.testing.assert_close(output.grad, golden(f"{name}/grad_output"), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(aux.grad, golden(f"{name}/grad_aux"), rtol=1e-5, atol=1e-8)


def test_targets_that_stand_once_for_a_repeated_batch_match_the_release():
    x = golden("soft_tiled/x").requires_grad_()
    loss = soft_cross_entropy(x, golden("soft_tiled/target"))
    torch.testing.assert_close(loss, golden("soft_tiled/loss"))
    loss.backward()
    torch.testing.assert_close(x.grad, golden("soft_tiled/grad_x"))


def test_image_labels_alone_match_the_release():
    x = golden("relabel/x").requires_grad_()
    loss = soft_cross_entropy(x, golden("relabel/target")[..., 1])
    torch.testing.assert_close(loss, golden("relabel/loss"))
    loss.backward()
    torch.testing.assert_close(x.grad, golden("relabel/grad_x"))


def test_gradients_against_finite_differences():
    target, tokens = random(3, 5, seed=1).softmax(-1), random(3, 4, 5, seed=2).softmax(-1)
    weight = random(3, 4, seed=3).sigmoid()

    def total(a: Tensor, b: Tensor) -> Tensor:
        return token_label_loss(a, b, target, tokens, ground_truth=target.flip(1), lam=0.3, token_weight=weight).total

    gradcheck(total, (random(3, 5).requires_grad_(), random(3, 4, 5, seed=4).requires_grad_()))


def test_the_annotator_keeps_more_where_it_disagrees():
    image = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(blended(image, truth), torch.tensor([[0.9, 0.1], [0.72, 0.28]]))


def test_a_token_without_weight_teaches_nothing_and_the_loss_is_a_mean_over_all():
    logits, target = random(2, 6, 5).requires_grad_(), random(2, 6, 5, seed=1).softmax(-1)
    weight = torch.ones(2, 6)
    weight[0, 2] = 0
    loss = soft_cross_entropy(logits, target, weight)
    loss.backward()
    assert (logits.grad[0, 2] == 0).all()
    assert (logits.grad[0, 1] != 0).any()
    torch.testing.assert_close(soft_cross_entropy(logits, target, weight * 0.5), loss * 0.5)
    twice = soft_cross_entropy(logits.repeat(2, 1, 1), target.repeat(2, 1, 1), weight.repeat(2, 1))
    torch.testing.assert_close(twice, loss)


def test_the_loss_does_not_depend_on_the_batch_or_the_number_of_tokens():
    a, b, y, t = random(2, 7), random(2, 9, 7, seed=1), random(2, 7).softmax(-1), random(2, 9, 7).softmax(-1)
    one = token_label_loss(a, b, y, t)
    many = token_label_loss(a.repeat(3, 1), b.repeat(3, 4, 1), y.repeat(3, 1), t.repeat(3, 4, 1))
    torch.testing.assert_close(one, many)


def test_half_precision_is_lifted():
    a, b, y, t = random(2, 7), random(2, 9, 7, seed=1), random(2, 7).softmax(-1), random(2, 9, 7).softmax(-1)
    found = token_label_loss(a.bfloat16(), b.bfloat16(), y.float(), t.float())
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), token_label_loss(a, b, y, t).total, rtol=1e-2, atol=0)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 9, 7\) and soft targets \(2, 4, 7\)"):
        token_label_loss(random(2, 7), random(2, 9, 7), random(2, 7), random(2, 4, 7))
    with pytest.raises(ValueError, match=r"logits \(3, 7\) and soft targets \(2, 7\)"):
        soft_cross_entropy(random(3, 7), random(2, 7))


# ---- targets


def test_mixed_class_labels_match_the_release():
    labels = torch.from_numpy(MAPS["mixup_int_target"])
    want = torch.from_numpy(MAPS["mixup_int_lam0.3"])
    torch.testing.assert_close(mixed(smoothed(labels, 12, 0.1), 0.3), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sums_of_targets(normalized, smoothing):
    soft = soft_targets(
        random(2, 5).float(), random(2, 5, 3, 4).float(), torch.tensor([4, 0]), smoothing, normalized=normalized
    )
    total = 1.0 if normalized else 1 + smoothing / 5
    assert soft.tokens.shape == (2, 12, 5)
    torch.testing.assert_close(soft.ground_truth.sum(-1), torch.ones(2))
    torch.testing.assert_close(soft.image.sum(-1), torch.full((2,), total))
    torch.testing.assert_close(soft.tokens.sum(-1), torch.full((2, 12), total))
    assert soft.ground_truth.argmax(-1).tolist() == [4, 0]
    assert soft.tokens[1, 7].argmax() == random(2, 5, 3, 4)[1, :, 1, 3].argmax()


def test_fills_by_hand():
    scores = torch.tensor([3.0, -1.0]).reshape(1, 2, 1, 1)
    indices = torch.tensor([2, 0]).reshape(1, 2, 1, 1)
    assert dense_logits(scores, indices, 4, "zero").flatten().tolist() == [-1, 0, 3, 0]
    assert dense_logits(scores, indices, 4, "min").flatten().tolist() == [-1, -1, 3, -1]
    assert torch.equal(dense_logits(scores, indices, 4), dense_logits(scores, indices, 4, "min"))
    assert torch.equal(dense_logits(scores, indices, 1000), dense_logits(scores, indices, 1000, "zero"))
    with pytest.raises(ValueError, match="fill must be"):
        dense_logits(scores, indices, 4, "mean")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    fill=st.sampled_from(["zero", "min"]),
)
def test_pooling_the_kept_classes_is_interpolating_all_logits(seed, height, width, fill):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, height, width, generator=g) * 4
    indices = torch.rand(2, 8, height, width, generator=g).argsort(1)[:, :3]
    points = torch.rand(2, 5, 4, 2, generator=g, dtype=torch.float64) * torch.tensor([width, height])
    weights = torch.rand(2, 5, 4, generator=g, dtype=torch.float64)
    weights[:, 0] = 0
    dense = dense_logits(scores, indices, 8, fill)
    on_grid = points / torch.tensor([width, height]) * 2 - 1
    sampled = torch.nn.functional.grid_sample(dense.double(), on_grid, padding_mode="border", align_corners=False)
    want = (sampled * weights[:, None]).sum(-1).transpose(1, 2)
    found = pool(scores, indices, points, weights, 8, fill)
    torch.testing.assert_close(found.double(), want, atol=1e-4, rtol=1e-4)
    assert (found[:, 0] == 0).all()


# ---- MixToken


def test_boxes_match_the_release():
    """Numpy draws as the release does: lam, then the centre along either side. VOLO's tokens are 28 x 28, its boxes on
    a grid of half as many."""
    for rows, scale in ((BOXES["rows"], 1), (BOXES["volo_rows"], 2)):
        for seed, high, wide, lam, *box, kept in rows.tolist():
            rng = np.random.RandomState(int(seed))
            assert rng.beta(1, 1) == lam
            grid = int(high) // scale, int(wide) // scale
            cy, cx = rng.randint(grid[0]), rng.randint(grid[1])
            found = mix_box(lam, cy, cx, grid)
            assert found.tolist() == [int(b) for b in box]
            tensors = mix_box(torch.tensor(lam, dtype=torch.float64), torch.tensor(cy), torch.tensor(cx), grid)
            assert torch.equal(found, tensors)
            assert float(realised(found, grid)) == pytest.approx(kept, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(1, 5))
def test_mixing_twice_gives_the_batch_back(seed, height, width, batch):
    box = draw_box((height, width), torch.Generator().manual_seed(seed))
    x = random(batch, 3, height, width, seed=seed)
    once = mix(x, box, "bchw")
    assert torch.equal(mix(once, box, "bchw"), x)
    y1, x1, y2, x2 = box.tolist()
    want = x.clone()
    want[:, :, y1:y2, x1:x2] = x.flip(0)[:, :, y1:y2, x1:x2]
    assert torch.equal(once, want)
    last = x.permute(0, 2, 3, 1)
    assert torch.equal(mix(last, box, "bhwc"), once.permute(0, 2, 3, 1))
    tokens = last.flatten(1, 2)
    assert torch.equal(mix(tokens, box, "bnc", (height, width)), once.permute(0, 2, 3, 1).flatten(1, 2))
    assert float(realised(box, (height, width))) == pytest.approx(1 - (y2 - y1) * (x2 - x1) / (height * width))


def test_a_finer_grid_is_mixed_in_the_same_places():
    """VOLO draws on its 14 x 14 grid and mixes on the 28 x 28 one."""
    box = mix_box(0.5, 3, 9, (14, 14))
    x = random(4, 28, 28, 2)
    pooled = torch.nn.functional.avg_pool2d(mix(x, box * 2, "bhwc").permute(0, 3, 1, 2), 2)
    clean = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(pooled, mix(clean, box, "bchw"))


def test_unmixing_outputs_is_mixing_labels():
    """A network that treats every token by itself: the loss of unmixed outputs and clean labels is that of outputs as
    they are and mixed labels."""
    grid = (5, 4)
    box = mix_box(0.4, 2, 2, grid)
    x, labels = random(4, 20, 6), random(4, 20, 7, seed=1).softmax(-1)
    weight = random(6, 7, seed=2)
    out = mix(x, box, "bnc", grid).tanh() @ weight
    unmixed = soft_cross_entropy(mix(out, box, "bnc", grid), labels)
    assert float(1 - realised(box, grid)) > 0
    torch.testing.assert_close(unmixed, soft_cross_entropy(out, mix(labels, box, "bnc", grid)))
    # and the image label mixed by area is the mean of the mixed token labels, where all tokens of a picture agree
    image = random(4, 7, seed=3).softmax(-1)
    everywhere = mix(image[:, None].expand(-1, 20, -1), box, "bnc", grid).mean(1)
    torch.testing.assert_close(mixed(image, realised(box, grid)), everywhere)


def test_drawn_boxes_replace_half_of_the_grid_on_average():
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([realised(draw_box((14, 14), generator), (14, 14)) for _ in range(2000)])
    rng = np.random.default_rng(0)
    same = [
        float(realised(mix_box(rng.random(), rng.integers(14), rng.integers(14), (14, 14)), (14, 14)))
        for _ in range(2000)
    ]
    assert float(kept.mean()) == pytest.approx(np.mean(same), abs=0.02)
    assert float(kept.std()) == pytest.approx(np.std(same), abs=0.02)
    again = torch.Generator().manual_seed(0)
    assert draw_box((14, 14), again).dtype == torch.int64
    assert torch.equal(draw_box((14, 14), torch.Generator().manual_seed(5)), draw_box((14, 14), again.manual_seed(5)))


def test_layouts_that_do_not_fit_are_named():
    box = mix_box(0.5, 1, 1, (3, 4))
    for tokens, layout, grid, said in (
        (random(2, 12, 5), "bnc", None, r"need the grid \(h, w\) with h \* w = 12, got None"),
        (random(2, 13, 5), "bnc", (3, 4), "h \\* w = 13, got \\(3, 4\\)"),
        (random(2, 12, 5), "bchw", None, "has 4 dimensions"),
        (random(2, 5, 3, 4), "bchw", (4, 3), "have the grid \\(3, 4\\), got \\(4, 3\\)"),
        (random(2, 5, 3, 4), "nchw", None, "layout must be"),
    ):
        with pytest.raises(ValueError, match=said):
            mix(tokens, box, layout, grid)


def test_mixing_compiles_without_a_graph_break():
    grid = (4, 4)

    def step(x: Tensor, a: Tensor, b: Tensor, y: Tensor, t: Tensor) -> Tensor:
        box = draw_box(grid)
        put_back = mix(mix(x, box, "bchw"), box, "bchw")
        terms = token_label_loss(a, mix(b, box, "bnc", grid), y, t, lam=realised(box, grid), ground_truth=y.flip(1))
        return terms.total + (put_back - x).abs().sum()

    inputs = random(4, 3, 4, 4), random(4, 7), random(4, 16, 7), random(4, 7).softmax(-1), random(4, 16, 7).softmax(-1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    found = compiled(*inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(found, step(*inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_is_read_on_the_host():
    grid = (4, 4)
    x, a, b, y, t = (
        z.cuda()
        for z in (
            random(4, 3, 4, 4),
            random(4, 7),
            random(4, 16, 7),
            random(4, 7).softmax(-1),
            random(4, 16, 7).softmax(-1),
        )
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        box = draw_box(grid, device="cuda")
        mix(x, box, "bchw")
        token_label_loss(a, mix(b, box, "bnc", grid), y, t, lam=realised(box, grid), ground_truth=y)
        soft_targets(
            a, random(4, 7, 4, 4).pin_memory().to("cuda", non_blocking=True), torch.zeros(4, device="cuda").long()
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
