"""losses/: golden values of the published implementations, closed forms, gradients, invariances."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from distillkit.boxes.maps import Maps
from distillkit.losses.focal import distribution_focal, quality_focal
from distillkit.losses.gfl import gfl_losses
from distillkit.losses.iou import giou_loss
from distillkit.losses.kl import kl_divergence
from distillkit.losses.reduce import mean_over_ranks

GOLDEN = Path(__file__).parent / "golden"
KL = np.load(GOLDEN / "ld_kl_a.npz")
TASK = np.load(GOLDEN / "ld_gfl_losses_a.npz")
HEAD = np.load(GOLDEN / "ld_head_gfl_a.npz")
KL_CASES = json.loads(str(KL["meta"]))["cases"]
HEAD_CASES = json.loads(str(HEAD["meta"]))["cases"]
QFL_CASES = json.loads(str(TASK["meta"]))["qfl"]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def wide(file, key: str) -> Tensor:
    """An array of a golden file; floats as float64, in which these files were computed."""
    x = torch.from_numpy(file[key])
    return x.double() if x.is_floating_point() else x


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest entry."""
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance * float(want.abs().max()) + 1e-12)


# ---- kl_divergence


@pytest.mark.parametrize("case", range(len(KL_CASES)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_matches_the_release(case: int, dtype: torch.dtype) -> None:
    facts = KL_CASES[case]
    student = wide(KL, f"case{case}_pred").to(dtype).requires_grad_()
    rows = kl_divergence(student, wide(KL, f"case{case}_soft").to(dtype), facts["T"])
    close(rows, wide(KL, f"case{case}_none"), 1e-5)
    close(rows.mean(), wide(KL, f"case{case}_mean"), 1e-5)
    weighted = facts["loss_weight"] * (rows * wide(KL, f"case{case}_weight")).sum() / facts["avg_factor"]
    close(weighted, wide(KL, f"case{case}_wavg"), 1e-5)
    close(torch.autograd.grad(weighted, student, retain_graph=True)[0], wide(KL, f"case{case}_grad"), 1e-4)
    close(torch.autograd.grad(rows.mean(), student)[0], wide(KL, f"case{case}_grad_mean"), 1e-4)


@settings(max_examples=25, deadline=None)
@given(bins=st.integers(2, 40), temperature=st.floats(1, 30), scale=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_kl_gradient_is_the_difference_of_the_distributions(bins, temperature, scale, seed) -> None:
    student = random(3, bins, seed=seed, scale=scale).requires_grad_()
    teacher = random(3, bins, seed=seed + 100, scale=scale)
    kl_divergence(student, teacher, temperature).sum().backward()
    want = temperature / bins * (F.softmax(student / temperature, -1) - F.softmax(teacher / temperature, -1))
    torch.testing.assert_close(student.grad, want.detach())


def test_kl_becomes_the_variance_of_the_difference_at_high_temperature() -> None:
    student, teacher = random(50, 17), random(50, 17, seed=1)
    limit = (student - teacher).var(-1, unbiased=False) / (2 * 17)
    torch.testing.assert_close(kl_divergence(student, teacher, 1e4), limit, rtol=1e-3, atol=0)
    at_ten = kl_divergence(student, teacher, 10.0)
    assert float((at_ten.mean() / limit.mean() - 1).abs()) < 0.05


def test_kl_invariances() -> None:
    student, teacher = random(9, 17, scale=3), random(9, 17, seed=1, scale=3)
    rows = kl_divergence(student, teacher, 5.0)
    torch.testing.assert_close(kl_divergence(student + 7, teacher - 100, 5.0), rows)
    torch.testing.assert_close(kl_divergence(3 * student, 3 * teacher, 15.0), 9 * rows)
    torch.testing.assert_close(kl_divergence(student, teacher, 5.0, "sum"), 17 * rows)
    assert (rows > 0).all()
    torch.testing.assert_close(kl_divergence(teacher + 2, teacher, 5.0), torch.zeros(9).double())


def test_kl_survives_underflow_and_half_precision() -> None:
    student = torch.zeros(1, 17, requires_grad=True)
    teacher = torch.linspace(0, 1e4, 17)[None]
    rows = kl_divergence(student, teacher)
    rows.sum().backward()
    torch.testing.assert_close(rows, torch.tensor([np.log(17) / 17], dtype=torch.float32))
    assert student.grad is not None
    assert student.grad.isfinite().all()
    never = torch.tensor([[0.0, -torch.inf, 0.0]])
    torch.testing.assert_close(kl_divergence(torch.zeros(1, 3), never)[0], torch.tensor(1.5).log() / 3)
    half = kl_divergence(random(64, 17).half(), random(64, 17, seed=1).half(), 10.0)
    assert half.dtype is torch.float32
    torch.testing.assert_close(
        half.double(), kl_divergence(random(64, 17), random(64, 17, seed=1), 10.0), rtol=0.02, atol=0
    )


def test_kl_gives_the_teacher_no_gradient_and_one_class_none_to_the_student() -> None:
    student, teacher = random(4, 1).requires_grad_(), random(4, 1, seed=1).requires_grad_()
    kl_divergence(student, teacher, 2.0).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_a_step_follows_a_shifted_teacher() -> None:
    bins = torch.arange(17, dtype=torch.float64)
    student = (-((bins - 7) ** 2) / 4)[None].requires_grad_()
    teacher = -((bins - 8) ** 2)[None] / 4
    loss = kl_divergence(student, teacher, 10.0).sum()
    loss.backward()
    assert loss > 0
    assert student.grad is not None
    expected = [(F.softmax(x, -1) @ bins).item() for x in (student.detach(), student.detach() - 0.1 * student.grad)]
    assert expected[1] > expected[0]


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        (((5, 17), (5, 8)), {}, r"\(5, 17\) and \(5, 8\)"),
        (((5, 17), (5, 17)), {"temperature": 0.5}, "temperature must be at least 1, got 0.5"),
        (((5, 17), (5, 17)), {"bin_reduction": "batchmean"}, "'batchmean'"),
    ],
)
def test_kl_refuses(shapes, options, said) -> None:
    with pytest.raises(ValueError, match=said):
        kl_divergence(random(*shapes[0]), random(*shapes[1]), **options)


# ---- the losses of the generalized focal loss


@pytest.mark.parametrize("case", [0, 1])
def test_distribution_focal_matches_the_release(case: int) -> None:
    logits = wide(TASK, f"dfl{case}_pred").requires_grad_()
    rows = distribution_focal(logits, wide(TASK, f"dfl{case}_label"))
    close(rows, wide(TASK, f"dfl{case}_none"), 1e-5)
    facts = json.loads(str(TASK["meta"]))["dfl"][case]
    weighted = (rows * wide(TASK, f"dfl{case}_weight")).sum() / facts["avg_factor"]
    close(weighted, wide(TASK, f"dfl{case}_wavg"), 1e-5)
    close(torch.autograd.grad(weighted, logits)[0], wide(TASK, f"dfl{case}_grad"), 1e-4)


@pytest.mark.parametrize("case", range(len(QFL_CASES)))
def test_quality_focal_matches_the_release(case: int) -> None:
    facts = QFL_CASES[case]
    x = wide(TASK, f"qfl{case}_pred").requires_grad_()
    labels, scores = wide(TASK, f"qfl{case}_label"), wide(TASK, f"qfl{case}_score")
    rows = quality_focal(x, labels, scores, facts["beta"], from_probabilities=not facts["use_sigmoid"])
    close(rows, wide(TASK, f"qfl{case}_none"), 1e-5)
    weighted = (rows * wide(TASK, f"qfl{case}_weight")).sum() / facts["avg_factor"]
    close(weighted, wide(TASK, f"qfl{case}_wavg"), 1e-5)
    close(torch.autograd.grad(weighted, x)[0], wide(TASK, f"qfl{case}_grad"), 1e-4)


def test_giou_matches_the_release() -> None:
    pred = wide(TASK, "giou0_pred").requires_grad_()
    loss = 2.0 * (giou_loss(pred, wide(TASK, "giou0_target")) * wide(TASK, "giou0_weight")).sum()
    close(loss, wide(TASK, "giou0_loss"), 1e-5)
    close(torch.autograd.grad(loss, pred)[0], wide(TASK, "giou0_grad"), 1e-4)


def test_both_forms_of_quality_focal_agree() -> None:
    logits, labels = random(12, 4), torch.arange(12) % 5
    scores = torch.linspace(0, 1, 12, dtype=torch.float64)
    torch.testing.assert_close(
        quality_focal(logits, labels, scores), quality_focal(logits.sigmoid(), labels, scores, from_probabilities=True)
    )
    ends = torch.tensor([[0.0, 1.0]], requires_grad=True)
    quality_focal(ends, torch.tensor([0]), torch.ones(1), from_probabilities=True).sum().backward()
    assert ends.grad is not None
    assert ends.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        rows = quality_focal(logits.sigmoid(), labels, scores, from_probabilities=True)
    torch.testing.assert_close(rows, quality_focal(logits, labels, scores))


def test_distribution_focal_is_least_for_the_distribution_around_its_target() -> None:
    target = torch.tensor([2.25], dtype=torch.float64)
    ideal = torch.tensor([[1e-9, 1e-9, 0.75, 0.25, 1e-9]], dtype=torch.float64).log()
    least = distribution_focal(ideal, target)
    torch.testing.assert_close(least, torch.tensor([-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))]), atol=1e-6, rtol=0)
    assert (distribution_focal(ideal + random(100, 5, scale=0.3), target.expand(100)) > least).all()
    last_bin = distribution_focal(torch.zeros(1, 5), torch.tensor([4.0]))
    torch.testing.assert_close(last_bin, torch.tensor([5.0]).log())


def test_giou_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).repeat(3, 1)
    b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [3.0, 0.0, 5.0, 2.0]])
    # same box; overlap 2 of union 6 in an enclosing 6; apart by 1 in an enclosing 10 with union 8
    torch.testing.assert_close(giou_loss(a, b), torch.tensor([0.0, 1 - 2 / 6, 1 + 2 / 10]))


def test_gradients_against_finite_differences() -> None:
    student, teacher = random(3, 5).requires_grad_(), random(3, 5, seed=1)
    gradcheck(lambda x: kl_divergence(x, teacher, 3.0), student)
    gradcheck(lambda x: distribution_focal(x, torch.tensor([0.3, 2.0, 3.9]).double()), student)
    gradcheck(lambda x: quality_focal(x, torch.tensor([0, 5, 2]), torch.tensor([0.4, 0.0, 0.9])), student)
    a = torch.tensor([[0.0, 0.0, 4.0, 5.0], [1.0, 2.0, 3.0, 9.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 1.5, 6.0, 7.0], [8.0, 2.5, 9.0, 3.0]], dtype=torch.float64)
    gradcheck(lambda x: giou_loss(x, b), a)


# ---- gfl_losses

STRIDES = (8, 16, 32)
SIZES = ((16, 20), (8, 10), (4, 5))
BOXES = [[10.0, 12.0, 70.0, 90.0], [60.0, 30.0, 150.0, 120.0], [100.0, 5.0, 118.0, 22.0]]


def head(images: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    classes = [random(1, 3, h, w, seed=h).to(dtype).repeat(images, 1, 1, 1).requires_grad_() for h, w in SIZES]
    edges = [random(1, 68, h, w, seed=h + 1).to(dtype).repeat(images, 1, 1, 1).requires_grad_() for h, w in SIZES]
    return classes, edges


def losses_of(classes: list[Tensor], edges: list[Tensor], boxes: list[Tensor], **options) -> dict[str, Tensor]:
    labels = [torch.arange(len(b)) % 3 for b in boxes]
    maps = Maps(tuple(classes), (3,)), Maps(tuple(edges), (4, 17))
    return gfl_losses(*maps, boxes, labels, [(128, 160)] * len(boxes), strides=STRIDES, **options)


@pytest.mark.parametrize("case", range(len(HEAD_CASES)))
@pytest.mark.parametrize("dense", [False, True])
def test_gfl_losses_match_the_release(case: int, dense: bool) -> None:
    facts = HEAD_CASES[case]

    def array(key: str, like: Tensor | None = None) -> Tensor:
        name = f"c{case}_{key}"
        return torch.from_numpy(HEAD[name]) if name in HEAD or like is None else torch.zeros_like(like)

    classes = [array(f"s_cls_l{i}").requires_grad_() for i in range(5)]
    edges = [array(f"s_box_l{i}").requires_grad_() for i in range(5)]
    losses = gfl_losses(
        Maps(tuple(classes), (facts["nc"],)),
        Maps(tuple(edges), (4, 17)),
        [array(f"gt{i}") for i in range(len(facts["counts"]))],
        [array(f"labels{i}") for i in range(len(facts["counts"]))],
        [tuple(size) for size in facts["pad_shapes"]],
        strides=facts["strides"],
        dense=dense,
    )
    for name, value in losses.items():
        close(value, array(f"loss_{name}").sum(), 1e-5)
    sum(losses.values()).backward()
    for i in range(5):
        # the file holds the gradient of all losses together and of the distillation losses
        for kind, level, others in (("box", edges[i], ("loss_ld", "loss_ld_vlr")), ("cls", classes[i], ("loss_kd",))):
            want = array(f"g_total_d{kind}_l{i}", level) - sum(array(f"g_{o}_d{kind}_l{i}", level) for o in others)
            torch.testing.assert_close(level.grad, want, rtol=0, atol=1e-4 * float(want.abs().max()) + 1e-8)


def test_gfl_losses_on_probabilities_match_the_release_of_gflv2() -> None:
    file = np.load(GOLDEN / "ld_head_gflv2_a.npz")
    facts = json.loads(str(file["meta"]))["cases"][0]
    levels = range(len(facts["strides"]))
    classes, quality, edges = (
        [torch.from_numpy(file[f"c0_s_{kind}_l{i}"]) for i in levels] for kind in ("cls", "qual", "box")
    )
    channels = (classes[0].shape[1],)
    scores = Maps(tuple(c.sigmoid() * q for c, q in zip(classes, quality, strict=True)), channels)
    truth = [torch.from_numpy(file["c0_gt0"])], [torch.from_numpy(file["c0_labels0"])], [tuple(facts["pad_shapes"][0])]
    maps = Maps(tuple(classes), channels), Maps(tuple(edges), (4, 17))
    for name, value in gfl_losses(*maps, *truth, strides=facts["strides"], scores=scores).items():
        close(value, torch.from_numpy(file[f"c0_loss_{name}"]).sum(), 1e-5)


def test_gfl_losses_do_not_depend_on_the_batch() -> None:
    one = losses_of(*head(1), [torch.tensor(BOXES)])
    for images in (2, 4, 8):
        many = losses_of(*head(images), [torch.tensor(BOXES)] * images)
        for name, value in many.items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=0)


def test_gfl_losses_of_both_paths_agree() -> None:
    boxes = [torch.tensor(BOXES), torch.zeros(0, 4), torch.tensor(BOXES[:1])]
    grads = []
    for dense in (False, True):
        classes, edges = head(3)
        losses = losses_of(classes, edges, boxes, dense=dense)
        sum(losses.values()).backward()
        grads.append([*losses.values(), *(x.grad for x in classes + edges)])
    for gathered, everywhere in zip(*grads):
        torch.testing.assert_close(gathered, everywhere, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("objects", [[], [[1000.0, 1000.0, 1100.0, 1100.0]]], ids=["no objects", "no positives"])
def test_gfl_losses_without_positives_are_zero_and_differentiable(dense: bool, objects: list) -> None:
    classes, edges = head(2)
    losses = losses_of(classes, edges, [torch.tensor(objects).reshape(-1, 4)] * 2, dense=dense)
    assert losses["loss_bbox"] == 0
    assert losses["loss_dfl"] == 0
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(x.grad is not None and (x.grad == 0).all() for x in edges)
    assert all(x.grad is not None and x.grad.abs().sum() > 0 and x.grad.isfinite().all() for x in classes)


def test_gfl_losses_ignore_the_padding() -> None:
    classes, edges = head(1)
    maps = Maps(tuple(classes), (3,)), Maps(tuple(edges), (4, 17))
    losses = gfl_losses(*maps, [torch.tensor(BOXES[:1])], [torch.tensor([0])], [(96, 80)], strides=STRIDES)
    sum(losses.values()).backward()
    for (h, w), stride, level in zip(SIZES, STRIDES, classes, strict=True):
        touched = (level.grad != 0).any(1)[0]
        want = (torch.arange(h)[:, None] * stride < 96) & (torch.arange(w) * stride < 80)
        assert (touched == want).all()


def test_gfl_losses_on_probabilities_equal_those_on_logits() -> None:
    classes, edges = head(1)
    logits = losses_of(classes, edges, [torch.tensor(BOXES)])
    scores = Maps(tuple(x.sigmoid() for x in classes), (3,))
    for name, value in losses_of(classes, edges, [torch.tensor(BOXES)], scores=scores).items():
        torch.testing.assert_close(value, logits[name])


def test_gfl_losses_name_what_does_not_fit() -> None:
    classes, edges = head(1)
    with pytest.raises(ValueError, match="the head saw 1 pictures, the targets describe 2"):
        losses_of(classes, edges, [torch.zeros(0, 4)] * 2)
    with pytest.raises(ValueError, match="they must agree level by level"):
        losses_of(classes[:1], edges, [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match="one anchor a cell and 4 edges"):
        gfl_losses(Maps(tuple(classes), (1,), 3), Maps(tuple(edges), (4, 17)), [], [], [], strides=STRIDES)


def test_gfl_losses_compile_without_a_graph_break() -> None:
    classes, edges = head(2, torch.float32)
    boxes = [torch.tensor(BOXES), torch.tensor(BOXES[:2])]
    eager = losses_of(classes, edges, boxes, dense=True)
    compiled = torch.compile(losses_of, fullgraph=True, backend="aot_eager")(classes, edges, boxes, dense=True)
    for name, value in compiled.items():
        torch.testing.assert_close(value, eager[name])


# ---- ranks


def test_mean_over_ranks_of_one_process_is_the_number_itself() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    assert mean_over_ranks(x) == 3
    assert not mean_over_ranks(x).requires_grad


def test_two_ranks_give_the_losses_and_gradients_of_one_process(tmp_path: Path) -> None:
    classes, edges = head(2)
    boxes = [torch.tensor(BOXES), torch.tensor(BOXES[:1])]
    whole = losses_of(classes, edges, boxes)
    sum(whole.values()).backward()
    mp.spawn(_half_of_the_batch, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(h[name] for h in halves) / 2, value.detach(), rtol=1e-5, atol=0)
    # each rank differentiates its own loss; averaged over ranks, as DDP does, that is half of each image's gradient
    for rank, half in enumerate(halves):
        for grad, level in zip(half["grads"], classes + edges, strict=True):
            torch.testing.assert_close(grad[0] / 2, level.grad[rank], rtol=1e-5, atol=1e-12)


def _half_of_the_batch(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    classes, edges = head(1)
    losses = losses_of(classes, edges, [torch.tensor(BOXES if rank == 0 else BOXES[:1])])
    sum(losses.values()).backward()
    found = {name: value.detach() for name, value in losses.items()}
    torch.save({**found, "grads": [x.grad for x in classes + edges]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
