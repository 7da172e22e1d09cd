"""Distillers of classifiers: each against its formula in plain loops, what it does not change with, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

import distillkit
from distillkit import DIST, DKD, AttentionTransfer, ClassLogits, Distiller, Features, HardToken, LogitKD, RelationalKD
from distillkit.bench.counting import Dispatched
from distillkit.core.errors import ViewError
from distillkit.losses.dkd import decoupled_kl
from distillkit.losses.relations import angles, pearson, relative_distances

B, C = 6, 5
AT = {"student_at": "a", "teacher_at": "b"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(seed: int, grad: bool = False) -> ClassLogits:
    return ClassLogits((2 * random(B, C, seed=seed)).requires_grad_(grad))


def maps(seed: int, grad: bool = False) -> Features:
    return Features(tuple(random(B, c, 4, 3, seed=seed + i).requires_grad_(grad) for i, c in enumerate((4, 2))))


def embeddings(seed: int, grad: bool = False) -> Features:
    return Features((random(B, 7, seed=seed).requires_grad_(grad),))


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
#: name: (distiller, its views)
ALL: dict[str, tuple[Callable[[], Distiller], Callable[..., Any]]] = {
    "kd": (lambda: LogitKD(temperature=4), logits),
    "dkd": (DKD, logits),
    "dist": (DIST, logits),
    "dist inter": (lambda: DIST(gamma=0, temperature=2), logits),
    "hard": (HardToken, logits),
    "attention": (lambda: AttentionTransfer(**AT), maps),
    "attention release": (lambda: AttentionTransfer(**AT, convention="release"), maps),
    "rkd": (lambda: RelationalKD(**AT), embeddings),
    "rkd release": (lambda: RelationalKD(**AT, convention="release", normalize=True), embeddings),
}
OVER_PICTURES = [name for name in ALL if not name.startswith("rkd")]  # the others depend on how many there are


def tensors(view: Any) -> tuple[Tensor, ...]:
    return (view.logits,) if isinstance(view, ClassLogits) else view.maps


def changed(view: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(view, ClassLogits):
        return ClassLogits(change(view.logits))
    return Features(tuple(change(m) for m in view.maps))


def loss_of(name: str, student: Any, teacher: Any, labels: Tensor = LABELS) -> Tensor:
    return ALL[name][0]()(student, teacher, labels)


# ---- the formulas, in numpy and float64, with loops


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def huber(a: float, b: float) -> float:
    d = abs(a - b)
    return 0.5 * d * d if d < 1 else d - 0.5


def numbers(view: Any) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors(view)]


def test_logit_kd_is_hintons() -> None:
    (s,), (t,) = numbers(logits(0)), numbers(logits(1))
    want = sum(16 * kl(softmax(t[i] / 4), softmax(s[i] / 4)) for i in range(B)) / B
    assert loss_of("kd", logits(0), logits(1)).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1, 8, 4), (0.5, 0, 1), (0, 2, 3)])
def test_dkd_is_its_formula(alpha: float, beta: float, temperature: float) -> None:
    (s,), (t,) = numbers(logits(0)), numbers(logits(1))
    total = 0.0
    for i, y in enumerate(LABELS.tolist()):
        p, q = softmax(t[i] / temperature), softmax(s[i] / temperature)
        target = kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
        others = [c for c in range(C) if c != y]
        non_target = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        total += temperature**2 * (alpha * target + beta * non_target)
    loss = DKD(alpha, beta, temperature)(logits(0), logits(1), LABELS)
    assert loss.item() == pytest.approx(total / B, rel=1e-10)


def test_the_two_terms_of_dkd_make_up_hintons_loss() -> None:
    s, t = logits(0).logits, logits(1).logits
    target, non_target = decoupled_kl(s, t, LABELS, 4.0)
    p = (t / 4).softmax(1).gather(1, LABELS[:, None])[:, 0]
    whole = (target + (1 - p) * non_target).mean()
    torch.testing.assert_close(whole, loss_of("kd", ClassLogits(s), ClassLogits(t)))


def test_dkd_of_a_teacher_that_is_sure_beyond_rounding_is_finite() -> None:
    student = torch.zeros(2, 4, requires_grad=True)
    teacher = torch.tensor([[1e3, 0, 0, 0], [0, 0, -1e3, 1e3]])
    loss = DKD(temperature=1)(ClassLogits(student), ClassLogits(teacher), torch.tensor([0, 2]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1, 1, 1), (2, 0, 1), (0, 3, 1), (1, 1, 4)])
def test_dist_is_its_formula(beta: float, gamma: float, temperature: float) -> None:
    (s,), (t,) = numbers(logits(0)), numbers(logits(1))
    q, p = (np.stack([softmax(row / temperature) for row in z]) for z in (s, t))
    inter = sum(1 - correlation(q[i], p[i]) for i in range(B)) / B
    intra = sum(1 - correlation(q[:, c], p[:, c]) for c in range(C)) / C
    loss = DIST(beta, gamma, temperature)(logits(0), logits(1), None)
    assert loss.item() == pytest.approx(temperature**2 * (beta * inter + gamma * intra), rel=1e-5)  # but for the 1e-8


def test_pearson_is_numpys() -> None:
    a, b = random(3, 4, 20), random(3, 4, 20, seed=1)
    for i in range(3):
        for j in range(4):
            assert pearson(a, b)[i, j].item() == pytest.approx(np.corrcoef(a[i, j], b[i, j])[0, 1], rel=1e-8)
    assert not pearson(torch.ones(2, 5), torch.randn(2, 5)).any()


def test_hard_token_is_its_formula() -> None:
    (s,), (t,) = numbers(logits(0)), numbers(logits(1))
    want = sum(-math.log(softmax(s[i])[t[i].argmax()]) for i in range(B)) / B
    assert loss_of("hard", logits(0), logits(1)).item() == pytest.approx(want, rel=1e-12)


def unit_attention(x: np.ndarray, p: float) -> np.ndarray:
    """(C, H, W) -> (H * W,)."""
    q = sum(np.abs(channel.reshape(-1)) ** p for channel in x) / len(x)
    return q / math.sqrt((q * q).sum())


@pytest.mark.parametrize("p", [1, 2, 4])
def test_attention_transfer_is_its_formula(p: float) -> None:
    norms = squares = 0.0
    for s, t in zip(numbers(maps(0)), numbers(maps(7)), strict=True):
        differences = [unit_attention(s[i], p) - unit_attention(t[i], p) for i in range(B)]
        norms += sum(math.sqrt((d * d).sum()) for d in differences) / B
        squares += sum((d * d).sum() for d in differences) / (B * 12)
    for convention, want in (("default", norms), ("release", squares)):
        loss = AttentionTransfer(**AT, p=p, convention=convention)(maps(0), maps(7), None)
        assert loss.item() == pytest.approx(want, rel=1e-10)


def test_attention_of_tokens_and_of_widths_that_differ() -> None:
    student, teacher = maps(0).maps[0], maps(7).maps[1]  # 4 and 2 channels
    want = AttentionTransfer(**AT)(Features((student,)), Features((teacher,)), None)
    tokens = [Features((m.flatten(2).mT,)) for m in (student, teacher)]
    torch.testing.assert_close(AttentionTransfer(**AT)(*tokens, None), want)


def test_a_larger_map_of_the_teacher_is_averaged_over_the_students_cells() -> None:
    student, teacher = random(B, 4, 4, 3), random(B, 4, 8, 9, seed=1)
    q = teacher.square().mean(1).unflatten(2, (3, 3)).unflatten(1, (4, 2)).mean((2, 4))  # (B, 4, 3)
    loss = AttentionTransfer(**AT)(Features((student,)), Features((teacher,)), None)
    same = AttentionTransfer(**AT)(Features((student,)), Features((q.sqrt()[:, None],)), None)
    torch.testing.assert_close(loss, same)


def distance(x: np.ndarray, i: int, j: int) -> float:
    return math.sqrt(((x[i] - x[j]) ** 2).sum())


def mean_distance(x: np.ndarray) -> float:
    pairs = [(i, j) for i in range(B) for j in range(B) if i != j]
    return sum(distance(x, i, j) for i, j in pairs) / len(pairs)


def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
    lengths = distance(x, i, j) * distance(x, j, k)
    return float((x[i] - x[j]) @ (x[k] - x[j])) / lengths if lengths else 0.0


@pytest.mark.parametrize("coincide", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_relational_kd_is_its_formula(normalize: bool, coincide: bool) -> None:
    student, teacher = embeddings(0), Features((random(B, 3, seed=1),))  # of another width
    if coincide:
        student.maps[0][1] = student.maps[0][0]
    (s,), (t,) = numbers(student), numbers(teacher)
    if normalize:
        s, t = (x / np.sqrt((x * x).sum(1, keepdims=True)) for x in (s, t))
    mean_s, mean_t = mean_distance(s), mean_distance(t)
    pairs = [(i, j) for i in range(B) for j in range(B) if i != j]
    triplets = [(i, j, k) for i in range(B) for j in range(B) for k in range(B) if len({i, j, k}) == 3]
    distances = sum(huber(distance(s, i, j) / mean_s, distance(t, i, j) / mean_t) for i, j in pairs)
    turns = sum(huber(cosine(s, *triplet), cosine(t, *triplet)) for triplet in triplets)
    want = 25 * distances / len(pairs) + 50 * turns / len(triplets)
    options: dict[str, Any] = {**AT, "normalize": normalize}
    assert RelationalKD(**options)(student, teacher, None).item() == pytest.approx(want, rel=1e-10)
    if coincide:  # the release counts the angle of a picture with itself, which then is none
        return
    release = RelationalKD(**options, convention="release")(student, teacher, None)
    assert release.item() == pytest.approx(25 * distances / B**2 + 50 * turns / B**3, rel=1e-10)


def test_maps_are_related_by_their_means_over_places() -> None:
    s, t = maps(0), maps(7)
    pooled = [changed(v, lambda m: m.mean((2, 3))) for v in (s, t)]
    torch.testing.assert_close(RelationalKD(**AT)(s, t, None), RelationalKD(**AT)(*pooled, None))
    apart = [Features((m,)) for v in pooled for m in v.maps]
    total = sum(RelationalKD(**AT)(apart[i], apart[2 + i], None) for i in range(2))
    torch.testing.assert_close(RelationalKD(**AT)(s, t, None), total)


def test_relations_of_embeddings_that_coincide_have_finite_gradients() -> None:
    student = torch.zeros(4, 3, requires_grad=True)
    RelationalKD(**AT)(Features((student,)), Features((torch.randn(4, 3),)), None).backward()
    assert not student.grad.any()
    two = torch.tensor([[1.0, 0], [1, 0], [0, 2], [3, 1]], requires_grad=True)
    RelationalKD(**AT)(Features((two,)), Features((torch.randn(4, 3),)), None).backward()
    assert two.grad.isfinite().all()
    assert two.grad.abs().max() < 1e3


# ---- what holds for all of them


@pytest.mark.parametrize("name", list(ALL))
def test_gradients(name: str) -> None:
    distiller, views = ALL[name][0](), ALL[name][1]
    teacher, student = views(7), tensors(views(0, grad=True))

    def loss(*student: Tensor) -> Tensor:
        return distiller(ClassLogits(*student) if views is logits else Features(student), teacher, LABELS)

    assert gradcheck(loss, student)


@pytest.mark.parametrize("function", [relative_distances, angles, lambda x: pearson(x[0], x)])
def test_gradients_of_relations(function: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(function, (random(4, 5).requires_grad_(),))


@pytest.mark.parametrize("name", [name for name in ALL if name != "hard"])
def test_equal_sides_are_the_minimum(name: str) -> None:
    student, teacher = ALL[name][1](0, grad=True), ALL[name][1](0)
    loss = loss_of(name, student, teacher)
    assert loss.abs() < 1e-5  # DIST adds 1e-8 to a product of norms
    for gradient in torch.autograd.grad(loss, tensors(student)):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", list(ALL))
def test_the_order_of_pictures_does_not_matter(name: str) -> None:
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    student, teacher = (ALL[name][1](seed) for seed in (0, 7))
    shuffled = loss_of(name, *(changed(v, lambda t: t[order]) for v in (student, teacher)), LABELS[order])
    torch.testing.assert_close(shuffled, loss_of(name, student, teacher))


@pytest.mark.parametrize("name", OVER_PICTURES)
def test_pictures_twice_over_change_nothing(name: str) -> None:
    student, teacher = (ALL[name][1](seed) for seed in (0, 7))
    twice = [changed(v, lambda t: torch.cat([t, t])) for v in (student, teacher)]
    torch.testing.assert_close(
        loss_of(name, *twice, torch.cat([LABELS, LABELS])), loss_of(name, student, teacher), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", [name for name in OVER_PICTURES if name != "dist"])  # which relates pictures
def test_the_mean_of_two_ranks_is_the_loss_of_all(name: str) -> None:
    student, teacher = (ALL[name][1](seed) for seed in (0, 7))
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        mine = [changed(v, lambda t, part=part: t[part]) for v in (student, teacher)]
        halves.append(loss_of(name, *mine, LABELS[part]))
    torch.testing.assert_close((halves[0] + halves[1]) / 2, loss_of(name, student, teacher))


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name][1] is logits])
def test_a_shift_of_all_logits_of_a_picture_changes_nothing(name: str) -> None:
    student, teacher = logits(0), logits(7)
    shift = 3 * random(B, 1, seed=5)
    moved = [changed(v, lambda t: t + shift) for v in (student, teacher)]
    torch.testing.assert_close(loss_of(name, *moved), loss_of(name, student, teacher))


@pytest.mark.parametrize("name", ["attention", "attention release", "rkd", "rkd release"])
def test_the_scale_of_features_changes_nothing(name: str) -> None:
    student, teacher = (ALL[name][1](seed) for seed in (0, 7))
    scaled = loss_of(name, changed(student, lambda t: 5 * t), changed(teacher, lambda t: 0.1 * t))
    torch.testing.assert_close(scaled, loss_of(name, student, teacher))


def test_a_turn_and_a_shift_of_embeddings_change_no_relation() -> None:
    student, teacher = embeddings(0), embeddings(7)
    turn = torch.linalg.qr(random(7, 7, seed=3)).Q
    moved = changed(student, lambda t: t @ turn + random(7, seed=4))
    torch.testing.assert_close(loss_of("rkd", moved, teacher), loss_of("rkd", student, teacher))


@pytest.mark.parametrize("name", list(ALL))
def test_no_gradient_reaches_the_teacher_and_nothing_waits_for_the_device(name: str) -> None:
    student, teacher = ALL[name][1](0, grad=True), ALL[name][1](7, grad=True)
    with Dispatched() as counted:
        loss_of(name, student, teacher).backward()
    assert not counted.syncs
    assert all(t.grad is None for t in tensors(teacher))
    assert all(t.grad is not None and t.grad.any() for t in tensors(student))


@pytest.mark.parametrize("name", list(ALL))
def test_half_precision_is_computed_in_float32(name: str) -> None:
    low = [changed(ALL[name][1](seed), lambda t: t.bfloat16()) for seed in (0, 7)]
    loss = loss_of(name, *low)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, loss_of(name, *(changed(v, lambda t: t.float()) for v in low)), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", list(ALL))
def test_they_compile_whole(name: str) -> None:
    distiller, (student, teacher) = ALL[name][0](), (ALL[name][1](seed) for seed in (0, 7))
    compiled = torch.compile(distiller, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher, LABELS), distiller(student, teacher, LABELS))


# ---- what is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DKD(temperature=0.5), "temperature must be at least 1"),
        (lambda: DKD(alpha=0, beta=0), "not both 0, got 0 and 0"),
        (lambda: DKD(beta=-1), "0 or more"),
        (lambda: DIST(temperature=0), "temperature must be at least 1"),
        (lambda: DIST(beta=0, gamma=0), "not both 0"),
        (lambda: AttentionTransfer(**AT, p=0.5), "p must be at least 1"),
        (lambda: AttentionTransfer(**AT, convention="paper"), "'default' or 'release', got 'paper'"),
        (lambda: RelationalKD(**AT, convention="paper"), "'default' or 'release', got 'paper'"),
        (lambda: RelationalKD(**AT, distance_weight=0, angle_weight=0), "not both 0"),
    ],
)
def test_options_that_make_no_sense_are_named(build: Callable[[], Distiller], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("targets", "got"),
    [
        (torch.rand(B, C), rf"got torch.float32 \({B}, {C}\)\. Mixup"),
        (torch.zeros(B, C, dtype=torch.int64), rf"got torch.int64 \({B}, {C}\)"),
        (torch.zeros(B), rf"integers \({B},\), as targets; got torch.float32 \({B},\)"),
        (LABELS[:2], r"got torch.int64 \(2,\)"),
        (None, "got NoneType"),
        ([0, 1], "got list"),
    ],
)
def test_dkd_refuses_soft_targets(targets: Any, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        DKD()(logits(0), logits(1), targets)


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name][1] is logits])
def test_logits_that_do_not_fit_are_named(name: str) -> None:
    def of(*shape: int) -> ClassLogits:
        return ClassLogits(random(*shape))

    with pytest.raises(ValueError, match="teacher"):
        ALL[name][0]()(of(B, 4), of(B, 5), LABELS)
    with pytest.raises(ValueError, match=r"at least|over one class"):
        ALL[name][0]()(of(B, 1), of(B, 1), LABELS)
    if name != "kd":
        with pytest.raises(ValueError, match=r"must be \(B, C\), got"):
            ALL[name][0]()(of(B, 9, 5), of(B, 9, 5), LABELS)


def test_relations_of_two_are_refused() -> None:
    two = [ClassLogits(random(2, C, seed=seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"2 picture\(s\) on this rank.*gamma=0.*drop_last"):
        DIST()(*two, None)
    assert DIST(gamma=0)(*two, None) > 0
    classes = [ClassLogits(random(B, 2, seed=seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="at least 3 classes, the models have 2"):
        DIST()(*classes, None)
    assert DIST(beta=0)(*classes, None) > 0
    with pytest.raises(ValueError, match=r"2 picture\(s\) on this rank"):
        RelationalKD(**AT)(*(Features((random(2, 4),)) for _ in range(2)), None)


def test_features_that_do_not_fit_are_named() -> None:
    def of(*shapes: tuple[int, ...]) -> Features:
        return Features(tuple(random(*shape) for shape in shapes))

    attention, relations = AttentionTransfer(**AT), RelationalKD(**AT)
    with pytest.raises(ValueError, match="teacher gives 2 feature maps, student 1"):
        attention(of((B, 4, 3, 3)), of((B, 4, 3, 3), (B, 4, 3, 3)), None)
    with pytest.raises(ValueError, match=r"map 0 is \(6, 9, 4\) in the student and \(6, 10, 4\) in the teacher"):
        attention(of((B, 9, 4)), of((B, 10, 4)), None)
    with pytest.raises(ValueError, match=r"map 0 is \(6, 9, 4\) in the student and \(6, 4, 3, 3\)"):
        attention(of((B, 9, 4)), of((B, 4, 3, 3)), None)
    with pytest.raises(ValueError, match=r"got \(6, 4\): name a layer before pooling"):
        attention(of((B, 4)), of((B, 4)), None)
    with pytest.raises(ValueError, match=r"got \(6, 9, 4\); of a transformer name"):
        relations(of((B, 9, 4)), of((B, 4)), None)
    with pytest.raises(ValueError, match="6 embeddings of the student, 5 of the teacher"):
        relations(of((B, 4)), of((5, 4)), None)


# ---- in a training step


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(name, num_classes=C, zero_init_last=False) for name in ("resnet10t", "resnet14t")
    )
    return student, teacher


def batch(side: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(1)), LABELS


@pytest.mark.parametrize(
    ("distiller", "untouched"),
    [
        (lambda: LogitKD(), set()),
        (lambda: DKD(weight=0.5), set()),
        (lambda: DIST(), set()),
        (lambda: HardToken(), set()),
        (lambda: AttentionTransfer(["layer2", "layer3"], ["layer2", "layer3"]), {"layer4", "fc"}),
        (lambda: RelationalKD("global_pool", "global_pool"), {"fc"}),
    ],
)
def test_one_step_of_a_timm_pair(distiller: Callable[[], Distiller], untouched: set[str]) -> None:
    student, teacher = pair()
    made = distiller()
    losses = distillkit.wrap(student, teacher, [made], criterion=cross_entropy)(*batch())
    assert list(losses) == ["task", made.name, "output"]
    losses[made.name].backward(retain_graph=True)
    reached = {n.split(".")[0] for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n.split(".")[0] for n, _ in student.named_parameters()} - untouched
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_all_of_them_in_one_step_without_targets_or_task() -> None:
    student, teacher = pair()
    places = {"student_at": "layer4", "teacher_at": "layer4"}
    distillers = [DIST(), HardToken(), AttentionTransfer(**places), RelationalKD(**places, angle_weight=0)]
    losses = distillkit.wrap(student, teacher, distillers)(batch()[0])
    assert list(losses) == ["dist", "hard_token", "attention", "rkd", "output"]
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_what_a_distiller_refuses_has_its_name_before_it() -> None:
    x, y = batch()
    model = distillkit.wrap(*pair(), [DKD()], criterion=cross_entropy)
    with pytest.raises(ViewError, match="distiller 'dkd': this loss needs the class of every picture"):
        model(x, nn.functional.one_hot(y, C).float())


# ---- the distillation token


def distilled_vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": C}
    return timm.create_model("deit_tiny_distilled_patch16_224", **sizes)


def of_the_class_token(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return cross_entropy(output[0], y)


def test_the_distillation_token_learns_the_teachers_class_and_the_class_token_the_label() -> None:
    student, teacher, (x, y) = distilled_vit(), pair()[1], batch()
    student.set_distilled_training(True)
    model = distillkit.wrap(student, teacher, [HardToken(student_at="head_dist")], criterion=of_the_class_token)
    losses = model(x, y)
    losses.total.backward()
    heads = {name: getattr(student, name).weight.grad.clone() for name in ("head", "head_dist")}
    student.zero_grad()
    with torch.no_grad():
        named = teacher.eval()(x).argmax(1)
    classes, distilled = student(x)
    wanted = {"head": cross_entropy(classes, y), "head_dist": cross_entropy(distilled, named)}
    torch.testing.assert_close(losses["task"], wanted["head"])
    torch.testing.assert_close(losses["hard_token"], wanted["head_dist"])
    sum(wanted.values()).backward()
    for name, gradient in heads.items():
        torch.testing.assert_close(gradient, getattr(student, name).weight.grad)
    model.eval()
    classes, distilled = (getattr(student, n)(student.forward_features(x)[:, i]) for i, n in enumerate(heads))
    torch.testing.assert_close(model(x), (classes + distilled) / 2)


def test_without_distilled_training_the_label_reaches_both_heads() -> None:
    """What the docstring warns of: timm's model returns the mean of both heads until it is told."""
    student, (x, y) = distilled_vit(), batch()
    model = distillkit.wrap(student, pair()[1], [HardToken("head_dist")], criterion=cross_entropy)
    model(x, y)["task"].backward()
    assert student.head_dist.weight.grad.any()
    student = distilled_vit()
    student.set_distilled_training(True)
    model = distillkit.wrap(student, pair()[1], [HardToken("head_dist")], criterion=of_the_class_token)
    model(x, y)["task"].backward()
    assert student.head_dist.weight.grad is None
