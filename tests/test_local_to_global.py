"""L2G: crops, targets and loss against the published step; a local network that is trained beside the student."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import distillkit
from distillkit import LocalToGlobal, OnlineTeacher
from distillkit.core.errors import ViewError, WrapError
from distillkit.losses.local_to_global import at_boxes, cut, draw_boxes, local_targets, placed_boxes, transfer_loss
from tests.tiny import MSE, Net, batch

GOLDEN = Path(__file__).parent / "golden"
STEP = np.load(GOLDEN / "dense_l2g_step_a.npz")
CASES = json.loads(str(STEP["meta"]))["cases"]


class Cam(nn.Module):
    """A classifier whose last map has a channel for each class, and one for the background."""

    def __init__(self, classes: int = 3, background: bool = True):
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.maps = nn.Conv2d(8, classes + background, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(self.stem(x))[:, : self.classes].mean((2, 3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 2, size: int = 56) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 3, size, size, generator=seeded())
    return x, torch.tensor([[1.0, 0, 1], [0, 1, 0]]).repeat(n // 2, 1)


def wrapped(student: nn.Module | None = None, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = student or Cam()
    local = copy.deepcopy(student)
    options = {"student_at": "maps", "local_at": "maps"} | options
    return distillkit.wrap(student, distillers=[LocalToGlobal(local, **options)]), local


# ---- the published step


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_published_one(case):
    made = CASES[case]

    def array(name: str) -> Tensor:
        return torch.from_numpy(STEP[f"{case}/{name}"])

    labels = array("label").repeat_interleave(made["K"], 0)
    target = local_targets(
        array("local_feat"),
        labels,
        saliency=array("crop_sal").flatten(0, 1),
        threshold=made["bg_thr"],
        soft_background=made["kind"] == "coco",
        empty_saliency="zero",
    )
    assert torch.equal(target, array("assembled"))
    whole = array("global_feat").requires_grad_()
    picture = (made["in_size"],) * 2
    seen = at_boxes(whole, array("boxes")[..., 1:], picture, tuple(target.shape[2:]), aligned=False)
    torch.testing.assert_close(seen.softmax(1), array("aligned"), rtol=1e-9, atol=1e-12)
    loss = made["kd_weight"] * transfer_loss(seen, target)
    torch.testing.assert_close(loss, array("loss_kd"), rtol=1e-9, atol=0)
    loss.backward()
    torch.testing.assert_close(whole.grad, array("grad_global_feat"), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_classification_loss_of_the_local_network_is_the_published_one(case):
    from distillkit.distillers.local_to_global import classification_loss

    logits = torch.from_numpy(STEP[f"{case}/local_logits"]).requires_grad_()
    labels = torch.from_numpy(STEP[f"{case}/label"]).repeat_interleave(CASES[case]["K"], 0)
    loss = classification_loss(logits, labels)
    torch.testing.assert_close(loss, torch.from_numpy(STEP[f"{case}/loss_cls_local"]), rtol=1e-9, atol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.from_numpy(STEP[f"{case}/grad_local_logits"]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("kind", "corners"), [("voc", True), ("coco", False)])
def test_boxes_are_placed_as_published(kind, corners):
    wanted = np.load(GOLDEN / "dense_l2g_boxes_a.npz")[kind]
    random = wanted.shape[1] - 4 * corners
    np.random.seed(11)
    offsets = np.random.randint(0, 128, size=(len(wanted), random, 2))  # y, then x, box by box
    y, x = (np.pad(offsets[..., i], ((0, 0), (4 * corners, 0))) for i in (0, 1))
    boxes = placed_boxes(torch.from_numpy(y), torch.from_numpy(x), (448, 448), (320, 320), corners)
    assert np.array_equal(boxes.numpy(), wanted[..., 1:])


# ---- crops


def test_boxes_cover_every_place_and_the_release_leaves_out_the_last():
    torch.manual_seed(0)
    boxes = draw_boxes(200, 8, (12, 14), (9, 9))
    assert set(boxes[..., 0].flatten().tolist()) == set(range(6))
    assert set(boxes[..., 1].flatten().tolist()) == set(range(4))
    assert (boxes[..., 2:] - boxes[..., :2] == 9).all()
    released = draw_boxes(200, 8, (12, 14), (9, 9), convention="release")
    assert set(released[..., 0].flatten().tolist()) == set(range(5))


def test_crops_are_copies_of_the_picture():
    x = torch.randn(3, 2, 11, 13, generator=seeded())
    boxes = draw_boxes(3, 5, (11, 13), (4, 6))
    crops = cut(x, boxes, (4, 6))
    for i, (x1, y1, x2, y2) in enumerate(boxes.flatten(0, 1).tolist()):
        assert torch.equal(crops[i], x[i // 5, :, y1:y2, x1:x2])


def test_crops_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"crops of \(9, 4\) .* do not fit into pictures of \(8, 8\)"):
        draw_boxes(1, 1, (8, 8), (9, 4))
    with pytest.raises(ValueError, match="corners=True takes four crops, crops is 3"):
        draw_boxes(1, 3, (8, 8), (4, 4), corners=True)


# ---- the target


def test_target_has_one_channel_a_cell_and_no_absent_class():
    maps = torch.randn(6, 5, 7, 7, generator=seeded())
    labels = (torch.rand(6, 4, generator=seeded(1)) > 0.5).float()
    for saliency in (None, torch.rand(6, 1, 28, 28, generator=seeded(2)).round()):
        target = local_targets(maps, labels, saliency=saliency)
        assert ((target > 0).sum(1) <= 1).all()
        assert not target[:, :4][labels == 0].any()
        assert target.min() >= 0
        assert target.max() <= 1


def test_attention_target_by_hand():
    maps = torch.tensor([[[2.0, 1.0]], [[-1.0, 3.0]], [[1.0, 0.4]]])[
        None
    ]  # two classes, then the background; two cells
    target = local_targets(maps, torch.tensor([[1, 0]]))
    # cell 0: class 0 has 1, background 1; the first wins. Cell 1: class 0 has 1/2, background 0.4
    torch.testing.assert_close(target, torch.tensor([[[1.0, 0.5]], [[0.0, 0.0]], [[0.0, 0.0]]])[None])


def test_without_a_background_channel_only_saliency_says_what_is_background():
    maps = torch.tensor([[[4.0, 1.0]], [[2.0, 8.0]]])[None]
    target = local_targets(maps, torch.tensor([[1, 0]]), background=False)
    torch.testing.assert_close(target, torch.tensor([[[1.0, 0.25]], [[0.0, 0.0]], [[0.0, 0.0]]])[None])
    saliency = torch.tensor([[[[0.75, 0.25]]]])
    target = local_targets(maps, torch.tensor([[1, 0]]), background=False, saliency=saliency)
    torch.testing.assert_close(target, torch.tensor([[[0.75, 0.25]], [[0.0, 0.0]], [[0.25, 0.75]]])[None])


def test_crops_without_saliency_learn_attention_as_in_the_paper_or_nothing_as_released():
    maps = torch.randn(2, 4, 5, 5, generator=seeded())
    labels = torch.ones(2, 3)
    saliency = torch.zeros(2, 1, 20, 20)
    saliency[1, 0, :10] = 1
    attention, paper = local_targets(maps, labels), local_targets(maps, labels, saliency=saliency)
    release = local_targets(maps, labels, saliency=saliency, empty_saliency="zero")
    assert torch.equal(paper[0], attention[0])
    assert not release[0, :3].any()
    assert torch.equal(paper[1], release[1])
    assert not torch.equal(paper[1], attention[1])
    without = local_targets(
        maps, labels, saliency=saliency, empty_saliency="zero", has_saliency=torch.tensor([False, True])
    )
    assert torch.equal(without, paper)


def test_half_precision_maps_keep_their_zeros():
    maps = torch.zeros(1, 3, 2, 2, dtype=torch.float16)
    assert local_targets(maps, torch.ones(1, 2)).isfinite().all()


def test_labels_of_another_size_are_named():
    with pytest.raises(ValueError, match=r"expected labels \(2, 3\) for 2 crops of 3 classes, got \(2, 4\)"):
        local_targets(torch.randn(2, 4, 3, 3), torch.ones(2, 4))


# ---- the loss


def test_boxes_on_whole_cells_are_slices():
    maps = torch.randn(2, 4, 7, 7, generator=seeded(), dtype=torch.float64)
    boxes = torch.tensor([[[0, 0, 40, 40], [16, 8, 56, 48]], [[8, 16, 48, 56], [0, 16, 40, 56]]])
    seen = at_boxes(maps, boxes, (56, 56), (5, 5))
    for i, (x1, y1, x2, y2) in enumerate((boxes // 8).flatten(0, 1).tolist()):
        torch.testing.assert_close(seen[i], maps[i // 2, :, y1:y2, x1:x2], rtol=0, atol=1e-12)


def test_loss_gradient_is_that_of_finite_differences():
    target = local_targets(torch.randn(2, 4, 3, 3, generator=seeded()), torch.ones(2, 3)).double()
    logits = torch.randn(2, 4, 3, 3, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: transfer_loss(z, target), logits)


def test_a_student_without_background_has_the_logit_0_for_it():
    target = torch.zeros(1, 3, 1, 1)
    loss = transfer_loss(torch.zeros(1, 2, 1, 1), target)
    assert loss.item() == pytest.approx(1 / 9)


def test_maps_that_are_not_square_are_named():
    with pytest.raises(ValueError, match="sides are multiples of the stride"):
        at_boxes(torch.randn(1, 2, 4, 4), torch.tensor([[[0, 0, 8, 8]]]), (16, 20), (2, 2))


# ---- wrapped


def test_each_network_learns_from_its_own_loss_alone():
    model, local = wrapped()
    losses = model(*pictures())
    assert set(losses) == {"local", "local_to_global", "output"}
    losses["local_to_global"].backward(retain_graph=True)
    assert all(p.grad is None for p in local.parameters())
    assert all(p.grad is not None for p in model.student.parameters())
    before = [p.grad.clone() for p in model.student.parameters()]
    losses["local"].backward()
    assert all(p.grad is not None for p in local.stem.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.student.parameters()))


def test_local_network_is_a_registered_child_and_not_part_of_the_student():
    student = Cam()
    keys = set(student.state_dict())
    model, local = wrapped(student)
    assert model.online["local"] is local
    ids = {id(p) for p in model.parameters()}
    assert all(id(p) in ids for p in [*student.parameters(), *local.parameters()])
    assert set(student.state_dict()) == keys
    assert any(key.startswith("online.local.") for key in model.state_dict())
    assert model.unwrap() is student
    assert not any(module._forward_hooks for module in [*student.modules(), *local.modules()])


def test_both_networks_learn():
    model, _ = wrapped(crops=3, share=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x, labels = pictures(4)
    first = last = None
    for _ in range(40):
        losses = model(x, labels)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = {name: losses[name].item() for name in ("local", "local_to_global")}
        first = first or last
    assert last["local"] < 0.8 * first["local"]
    assert last["local_to_global"] < first["local_to_global"]


def test_loss_is_that_of_the_formula():
    model, local = wrapped(crops=2, share=5 / 7)
    x, labels = pictures()
    torch.manual_seed(3)
    loss = model(x, labels)["local_to_global"]
    torch.manual_seed(3)
    boxes = draw_boxes(2, 2, (56, 56), (40, 40))
    crops = cut(x, boxes, (40, 40))
    target = local_targets(local.maps(local.stem(crops)), labels.repeat_interleave(2, 0))
    seen = at_boxes(model.student.maps(model.student.stem(x)), boxes, (56, 56), (10, 10))
    assert loss.item() == pytest.approx(10 * transfer_loss(seen, target).item(), rel=1e-5)


def test_saliency_of_the_targets_and_from_a_function():
    x, labels = pictures()
    saliency = torch.zeros(2, 1, 56, 56)
    saliency[:, :, :28] = 1
    totals = []
    for asked, targets in (
        ("targets", {"labels": labels, "saliency": saliency}),
        (lambda p: saliency, labels),
        (None, labels),
    ):
        model, _ = wrapped(saliency=asked)
        torch.manual_seed(1)
        totals.append(model(x, targets)["local_to_global"].item())
    assert totals[0] == totals[1] != totals[2]


def test_any_timm_classifier_without_names():
    for name, options in (
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True, "depth": 2}),
    ):
        torch.manual_seed(0)
        student = timm.create_model(name, num_classes=3, **options)
        model = distillkit.wrap(student, distillers=[LocalToGlobal(copy.deepcopy(student), crops=2, share=0.5)])
        losses = model(*pictures(size=64))
        losses.total.backward()
        assert losses["local_to_global"].item() > 0
        assert all(p.grad is not None for p in student.parameters()), name


def test_classes_of_single_label_pictures():
    x, transferred = pictures()[0], []
    for labels in (torch.tensor([0, 2]), torch.tensor([[1.0, 0, 0], [0, 0, 1]])):
        model, local = wrapped()
        torch.manual_seed(1)
        losses = model(x, labels)
        transferred.append(losses["local_to_global"].item())
        if labels.dim() == 1:
            torch.manual_seed(1)
            crops = cut(x, draw_boxes(2, 4, (56, 56), (40, 40)), (40, 40))
            wanted = nn.functional.cross_entropy(local(crops), labels.repeat_interleave(4))
            assert losses["local"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert transferred[0] == transferred[1]


def test_a_step_that_fails_leaves_nothing():
    model, _ = wrapped(saliency="targets")
    with pytest.raises(ViewError, match=r"reads maps .* that come with the targets"):
        model(*pictures())
    x, labels = pictures()
    with pytest.raises(ViewError, match=r"saliency maps are \(2, 1, 28, 28\), expected \(2, 1, 56, 56\)"):
        model(x, {"labels": labels, "saliency": torch.ones(2, 1, 28, 28)})
    assert model(x, {"labels": labels, "saliency": torch.ones(2, 1, 56, 56)}).total.isfinite()
    assert model.distillers["local_to_global"]._drawn is None


def test_two_networks_of_other_classes():
    torch.manual_seed(0)
    model = distillkit.wrap(Cam(3), distillers=[LocalToGlobal(Cam(4), student_at="maps", local_at="maps")])
    with pytest.raises(ValueError, match=r"gives logits \(8, 4\) of the crops, whose labels are \(8, 3\)"):
        model(*pictures())


def test_messages_of_wrap():
    student = Cam()
    with pytest.raises(WrapError, match="is the student itself"):
        distillkit.wrap(student, distillers=[LocalToGlobal(student, student_at="maps", local_at="maps")])
    half = Cam()
    half.stem = student.stem
    with pytest.raises(WrapError, match="shares weights with the student"):
        distillkit.wrap(student, distillers=[LocalToGlobal(half, student_at="maps", local_at="maps")])
    with pytest.raises(ViewError, match="say which module returns its class activation maps"):
        distillkit.wrap(student, distillers=[LocalToGlobal(Cam())])
    with pytest.raises(ViewError, match=r"expected class activation maps \(B, 3, h, w\)"):
        distillkit.wrap(student, distillers=[LocalToGlobal(Cam(), student_at="stem.0", local_at="maps")])(*pictures())


# ---- any online teacher


def test_online_teacher_teaches_and_learns_in_one_step():
    student, teacher = Net(), Net(width=8)
    online = OnlineTeacher(teacher, nn.functional.cross_entropy)
    model = distillkit.wrap(
        student, online, distillers=[MSE("stem", name="mimic")], criterion=nn.functional.cross_entropy
    )
    losses = model(*batch())
    assert set(losses) == {"task", "teacher", "mimic", "output"}
    losses["teacher"].backward(retain_graph=True)
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in teacher.parameters())


def test_a_loss_that_reaches_only_the_online_teacher_is_an_error():
    class Wrong(MSE):
        def forward(self, student, teacher, targets):
            return teacher.maps[0].pow(2).mean()

    model = distillkit.wrap(
        Net(),
        OnlineTeacher(Net(), nn.functional.cross_entropy),
        distillers=[Wrong("stem")],
        criterion=nn.functional.cross_entropy,
    )
    with pytest.raises(distillkit.core.errors.UnreachedStudentError, match="reaches no parameter of the student"):
        model(*batch())


def test_an_online_teacher_that_nobody_reads_any_more_rests():
    weight = distillkit.Weight(1.0, "until", 1)
    teacher = Net()
    model = distillkit.wrap(
        Net(),
        OnlineTeacher(teacher, nn.functional.cross_entropy),
        distillers=[MSE("stem", weight=weight)],
        criterion=nn.functional.cross_entropy,
    )
    model(*batch()).total.backward()
    model.zero_grad()
    losses = model(*batch())
    losses.total.backward()
    assert losses["teacher"].item() == 0
    assert not any(p.grad.any() for p in teacher.parameters())


def test_an_online_teacher_with_another_normalisation_gets_a_renormalised_batch():
    class Said(Net):
        def __init__(self, mean, std):
            super().__init__()
            self.pretrained_cfg = {"mean": mean, "std": std}
            self.seen: list[Tensor] = []
            self.stem.register_forward_pre_hook(lambda module, args: self.seen.append(args[0]))

    student, teacher = Said((0.5,) * 3, (0.5,) * 3), Said((0.0,) * 3, (1.0,) * 3)
    model = distillkit.wrap(
        student,
        OnlineTeacher(teacher, nn.functional.cross_entropy),
        distillers=[MSE("stem")],
        criterion=nn.functional.cross_entropy,
    )
    x, labels = batch()
    model(x, labels)
    torch.testing.assert_close(teacher.seen[-1], x * 0.5 + 0.5)
    assert torch.equal(student.seen[-1], x)


def test_a_saliency_function_sees_the_students_pictures():
    class Said(Cam):
        def __init__(self, mean):
            super().__init__()
            self.pretrained_cfg = {"mean": mean, "std": (0.5,) * 3}

    seen = []

    def saliency(x):
        seen.append(x)
        return torch.ones(len(x), 1, *x.shape[2:])

    local = Said((0.1,) * 3)
    fed = []
    local.stem.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    distiller = LocalToGlobal(local, share=1.0, crops=1, saliency=saliency, student_at="maps", local_at="maps")
    x, labels = pictures()
    distillkit.wrap(Said((0.5,) * 3), distillers=[distiller])(x, labels)
    assert seen[0] is x
    torch.testing.assert_close(fed[0], x + 0.8)


def test_a_student_that_fails_leaves_no_crops():
    class Broken(Cam):
        fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("out of something")
            return super().forward(x)

    student = Broken()
    model = distillkit.wrap(student, distillers=[LocalToGlobal(Cam(), student_at="maps", local_at="maps")])
    student.fails = True
    with pytest.raises(RuntimeError, match="out of something"):
        model(*pictures())
    assert model.distillers["local_to_global"]._drawn is None


def test_a_task_that_ends_is_refused():
    ends = distillkit.Weight(10.0, "until", 100)
    with pytest.raises(WrapError, match="has the student's only task loss, and its weight ends at 0"):
        wrapped(weight=ends)
    local = LocalToGlobal(Cam(), student_at="maps", local_at="maps", weight=ends)
    distillkit.wrap(Cam(), distillers=[local], criterion=nn.MultiLabelSoftMarginLoss())
