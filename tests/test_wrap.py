"""The wrapper: what it returns, what it leaves alone, and every way in which it refuses to train nothing in silence."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import distillkit
from distillkit import Adapter, EMATeacher, FeatureImitation, LogitKD, Losses, Teacher, Weight
from distillkit.core.errors import (
    NonFiniteLossError,
    StudentModeError,
    TapError,
    TeacherModeError,
    UnreachedStudentError,
    ViewError,
    WrapError,
)
from distillkit.core.taps import Place, Taps
from distillkit.core.wrap import CHECK_EVERY
from tests.tiny import KL, MSE, Net, batch


def wrapped(distillers=None, student=None, teacher=None, **kwargs):
    torch.manual_seed(0)
    student = Net() if student is None else student
    teacher = Net() if teacher is None else teacher
    return distillkit.wrap(
        student, teacher, distillers or [KL()], criterion=kwargs.pop("criterion", cross_entropy), **kwargs
    )


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


# ---- what a training call is


def test_losses_are_named_weighted_and_summed():
    model = wrapped([KL(weight=2.0), MSE("blocks.1", weight=0.5)])
    x, y = batch()
    torch.manual_seed(1)
    losses = model(x, y)
    assert list(losses) == ["task", "kl", "mse", "output"]
    student, teacher = model.student, model._frozen["teacher"].model
    torch.manual_seed(1)
    logits = student(x)
    with torch.no_grad():
        wanted = nn.functional.kl_div(logits.log_softmax(-1), teacher(x).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses["output"], logits)
    torch.testing.assert_close(losses["task"], cross_entropy(logits, y))
    torch.testing.assert_close(losses["kl"], 2 * wanted)
    torch.testing.assert_close(losses.total, losses["task"] + losses["kl"] + losses["mse"])
    rebuilt = Losses(dict(losses))
    torch.testing.assert_close(rebuilt.total, losses.total)


def test_training_in_a_bare_loop_lowers_the_loss_of_a_timm_pair():
    torch.manual_seed(0)
    student, teacher = (timm.create_model(name, num_classes=5) for name in ("test_resnet", "test_efficientnet"))
    x, y = torch.randn(8, 3, 64, 64), torch.randint(0, 5, (8,))
    model = distillkit.wrap(student, teacher, [LogitKD(temperature=4.0)], criterion=cross_entropy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(12):
        losses = model(x, y)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        seen.append(losses.total.item())
    assert seen[-1] < 0.5 * seen[0]


def test_eval_mode_is_the_students_call():
    model = wrapped()
    x, _ = batch()
    model.eval()
    assert torch.equal(model(x), model.student(x))


def test_a_student_that_computes_its_own_losses_needs_no_criterion():
    class Detector(Net):
        def forward(self, x, targets=None):
            logits = super().forward(x)
            return {"loss_cls": cross_entropy(logits, targets)} if self.training else logits

    class Fixed(MSE):
        def forward(self, student, teacher, targets):
            assert targets is y
            return super().forward(student, teacher, targets)

    x, y = batch()
    model = distillkit.wrap(Detector(), Net(), [Fixed("stem")])
    assert list(model(x, y)) == ["loss_cls", "mse", "output"]
    assert list(model(x, targets=y)) == ["loss_cls", "mse", "output"]


def test_pure_distillation_without_targets():
    model = wrapped(criterion=None)
    assert list(model(batch()[0])) == ["kl", "output"]


class Own(Net):
    """A student that computes its own losses: ``form`` says how it returns them."""

    def __init__(self, form):
        super().__init__()
        self.drop, self.form = nn.Identity(), form

    def forward(self, x, targets=None):
        logits = super().forward(x)
        return logits if targets is None else self.form(cross_entropy(logits, targets), logits)


FORMS = {
    "lists, as OpenMMLab's": lambda loss, _: {"loss_cls": [loss, 2 * loss], "loss_bbox": [3 * loss]},
    "shape (1,) and metrics": lambda loss, _: {"loss_cls": loss.reshape(1), "acc": torch.tensor([90.0]), "lr": 0.1},
    "a metric of the loss": lambda loss, _: {"loss_cls": loss, "loss_seen": loss.detach()},
    "a tuple": lambda loss, logits: (loss, logits),
    "a dict in a tuple": lambda loss, logits: ({"loss_cls": loss}, logits),
    "a total": lambda loss, logits: {"loss": loss, "loss_cls": loss, "logits": logits},
}
TOTALS = {
    "lists, as OpenMMLab's": {"loss_cls": 3, "loss_bbox": 3},
    "a tuple": {"task": 1},
    "a total": {"task": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_in_which_students_return_their_losses(form):
    x, y = batch()
    student = Own(FORMS[form])
    model = distillkit.wrap(student, Net(), [MSE("stem")])
    loss = cross_entropy(Net.forward(student, x), y)
    losses = model(x, y)
    wanted = TOTALS.get(form, {"loss_cls": 1})
    assert list(losses) == [*wanted, "mse", "output"]
    for name, times in wanted.items():
        torch.testing.assert_close(losses[name], times * loss)
    torch.testing.assert_close(losses.total, sum(wanted.values()) * loss + losses["mse"])


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda loss, logits: logits, r"no task loss but a tensor of shape \(4, 5\).*criterion="),
        (lambda loss, logits: {"acc": 90.0, "logits": logits}, r"no task loss but a dict of 'acc', 'logits'"),
        (lambda loss, logits: (logits, loss), r"no task loss but a tuple of 2"),
        (lambda loss, logits: {"loss_cls": loss.item()}, r"'loss_cls' must be a tensor of one element, got a float"),
        (lambda loss, logits: {"loss_cls": logits}, r"'loss_cls' must be .* got a tensor of shape \(4, 5\)"),
        (lambda loss, logits: {"loss": logits}, r"'loss' must be|'task' must be"),
        (lambda loss, logits: {"loss_cls": [logits]}, r"'loss_cls' must be .* got a list of 1"),
    ],
)
def test_targets_that_give_no_loss_are_not_dropped_in_silence(form, said):
    with pytest.raises(WrapError, match=said):
        distillkit.wrap(Own(form), Net(), [MSE("stem")])(*batch())


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        (lambda o, y: cross_entropy(o, y, reduction="none"), r"'task' must be .* got a tensor of shape \(4,\)"),
        (lambda o, y: {"ce": cross_entropy(o, y), "acc": 0.5}, r"'acc' must be .* got a float"),
    ],
)
def test_a_criterion_whose_loss_is_no_scalar(criterion, said):
    with pytest.raises(WrapError, match=said):
        wrapped(criterion=criterion)(*batch())


def test_every_input_of_the_student_reaches_the_teacher():
    class Masked(Net):
        def forward(self, x, mask):
            self.seen = mask
            return super().forward(x * mask)

    (x, y), mask = batch(), torch.rand(4, 1, 16, 16)
    teacher = Masked()
    model = wrapped(student=Masked(), teacher=Teacher(teacher, fold_bn=True))
    teacher_run = model._frozen["teacher"].model
    model(x, mask, y)
    assert teacher_run.seen is mask
    del teacher_run.seen
    model(x, mask, targets=y)
    assert teacher_run.seen is mask


@pytest.mark.parametrize("name", ["loss_cls", "output"])
def test_a_loss_is_never_overwritten_by_another_of_its_name(name):
    model = wrapped([KL(name="loss_cls")], criterion=lambda output, y: {name: cross_entropy(output, y)})
    with pytest.raises(WrapError, match=f"'{name}'"):
        model(*batch())


def test_a_student_in_eval_mode_is_not_trained():
    model = wrapped(student=Net().eval())
    with pytest.raises(StudentModeError, match=r"model\.train\(\)"):
        model(*batch())
    model.train()
    assert "task" in model(*batch())
    model.student.stem[1].eval()  # a frozen BatchNorm is not the student's mode
    model(*batch())
    model.student.eval()
    with pytest.raises(StudentModeError):
        model(*batch())


def test_without_any_loss_total_says_so():
    model = distillkit.wrap(Net(), None, [])
    with pytest.raises(WrapError, match="criterion="):
        model(batch()[0])


def test_the_student_is_left_as_it_was():
    student = Net()
    keys, kind, attributes = list(student.state_dict()), type(student), set(vars(student))
    model = wrapped([MSE("stem")], student=student)
    model(*batch())
    assert list(student.state_dict()) == keys
    assert type(student) is kind
    assert set(vars(student)) == attributes
    assert model.unwrap() is student
    assert hooks_of(student) == 0
    with pytest.raises(WrapError, match="unwrapped"):
        model(*batch())
    wrapped([MSE("stem")], student=student).unwrap()  # and can be wrapped again


def test_a_wrapper_that_is_thrown_away_lets_its_student_go():
    student, teacher = Net(), Net()
    model = wrapped([MSE("stem")], student=student, teacher=teacher)
    model(*batch())
    del model
    gc.collect()
    assert hooks_of(student) == hooks_of(teacher) == 0
    wrapped([MSE("stem")], student=student, teacher=teacher)


def test_after_a_first_step_that_fails_the_student_can_be_wrapped_anew():
    student = Net(classes=7)
    failed = wrapped(student=student)
    with pytest.raises(ViewError):
        failed(*batch())
    model = wrapped(student=student, teacher=Net(classes=7))
    model(*batch())
    with pytest.raises(WrapError, match="unwrapped"):
        failed(*batch())
    with pytest.raises(WrapError, match="already"):
        wrapped(student=student)
    with pytest.raises(TypeError):
        model(batch()[0])  # a later step that fails is no reason to let go
    with pytest.raises(WrapError, match="already"):
        wrapped(student=student)


def test_a_hook_registered_while_wrapped_is_the_users_to_remove_afterwards():
    student = Net()
    seen: list[str] = []
    early = student.stem.register_forward_hook(Recorder(seen))
    model = wrapped([MSE("stem")], student=student)
    late = student.stem.register_forward_hook(Recorder(seen))
    model.unwrap()
    student(batch()[0])
    assert len(seen) == hooks_of(student) == 2
    twin = pickle.loads(pickle.dumps(student))
    assert type(twin.stem._forward_hooks) is type(Net().stem._forward_hooks)
    assert hooks_of(twin) == 2
    seen.clear()
    late.remove()
    student(batch()[0])
    assert len(seen) == 1
    early.remove()
    student(batch()[0])
    assert len(seen) == 1
    wrapped([MSE("stem")], student=student).unwrap()
    assert hooks_of(student) == 0


# ---- teachers


def test_frozen_teachers_are_outside_the_module_tree():
    teacher = Net().train()
    model = wrapped(teacher=teacher)
    assert not teacher.training
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in model.parameters()}
    assert sorted(model.state_dict()) == sorted(["step", *(f"student.{k}" for k in Net().state_dict())])
    before = copy.deepcopy(teacher.state_dict())
    model.train()
    model(*batch()).total.backward()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_moves_of_dtype_stay_with_the_student():
    model = wrapped()
    teacher = model._frozen["teacher"].model
    model.double()
    assert model.student.head.weight.dtype == torch.float64
    assert teacher.head.weight.dtype == torch.float32


def test_moves_of_device_reach_the_teacher():
    original = Net()
    model = wrapped(teacher=Teacher(original, fold_bn=True))
    model.to("meta")
    assert model._frozen["teacher"].model.head.weight.device.type == "meta"
    assert original.head.weight.device.type == "meta"  # the first step proves the folding on it


def test_a_teacher_is_brought_to_where_the_student_is():
    class Moves(Teacher):
        def to(self, device):
            self.moved_to = device

    assert wrapped(teacher=Moves(Net()))._frozen["teacher"].moved_to == torch.device("cpu")


def test_what_the_wrapper_adds_is_where_the_student_is():
    student = Net(width=8).to("meta")
    model = wrapped([FeatureImitation(student_at="blocks.1", teacher_at="blocks.1")], student=student, teacher=Net(12))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


def test_several_teachers_by_name():
    torch.manual_seed(0)
    model = distillkit.wrap(
        Net(), {"a": Net(), "b": Net()}, [KL(teacher="a"), KL(teacher="b", name="kl_b")], criterion=cross_entropy
    )
    losses = model(*batch())
    assert losses["kl"] != losses["kl_b"]
    with pytest.raises(WrapError, match="which teacher"):
        distillkit.wrap(Net(), {"a": Net(), "b": Net()}, [KL()])
    with pytest.raises(WrapError, match="'c'"):
        distillkit.wrap(Net(), {"a": Net()}, [KL(teacher="c")])
    with pytest.raises(WrapError, match="no distiller uses the teacher 'b'"):
        distillkit.wrap(Net(), {"a": Net(), "b": Net()}, [KL(teacher="a")])


class FromAverage(KL):
    """Brings its own teacher."""

    short_name = "average"

    def own_teacher(self):
        return EMATeacher(0.9)


def test_a_distiller_that_brings_its_teacher_stands_beside_one_that_does_not():
    given = Net()
    model = wrapped([FromAverage(name="by.itself"), KL()], teacher=given)
    assert model._uses == {"by.itself": "by.itself", "kl": "teacher"}
    assert model._frozen["teacher"].model is given
    assert list(model(*batch())) == ["task", "by.itself", "kl", "output"]
    alone = distillkit.wrap(Net(), None, [FromAverage(), KL()])
    assert alone._uses["kl"] == "average"  # there is no other
    with pytest.raises(WrapError, match="which teacher"):
        distillkit.wrap(Net(), {"a": Net(), "b": Net()}, [FromAverage(), KL()])
    with pytest.raises(WrapError, match="two teachers would be called 'teacher'"):
        wrapped([FromAverage(name="teacher")], teacher=given)


def test_the_student_as_its_own_teacher():
    student = Net()
    with pytest.raises(WrapError, match="EMATeacher"):
        wrapped(student=student, teacher=student)


def test_a_teacher_in_bf16_leaves_the_original_and_stays_close():
    teacher = Net()
    x, y = batch()
    torch.manual_seed(3)
    plain = wrapped(teacher=teacher)
    low = wrapped(teacher=Teacher(teacher, dtype=torch.bfloat16), student=copy.deepcopy(plain.student))
    assert teacher.head.weight.dtype == torch.float32
    assert low._frozen["teacher"].model.head.weight.dtype == torch.bfloat16
    for model in (plain, low):
        torch.manual_seed(4)
        model.result = model(x, y)
    torch.testing.assert_close(low.result["kl"], plain.result["kl"], rtol=0.1, atol=1e-3)


def test_folded_batchnorm_gives_the_same_logits():
    torch.manual_seed(0)
    teacher = timm.create_model("resnet10t", num_classes=5)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    x = torch.randn(2, 3, 64, 64)
    folded = Teacher(teacher, fold_bn=True)
    left = [name for name, m in folded.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == []
    torch.testing.assert_close(folded.model(x), teacher(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(WrapError, match="no BatchNorm2d"):
        Teacher(nn.Linear(3, 3), fold_bn=True)


def test_a_batchnorm_that_does_not_follow_its_convolution_is_found_out():
    class Twisted(Net):  # registered conv, bn; run bn before conv
        def forward(self, x):
            conv, norm, act = self.stem
            x = act(conv(x))
            x = norm(self.blocks[0](x))
            return self.head(self.blocks[1](x).mean((2, 3)))

    teacher = Twisted().eval()
    nn.init.uniform_(teacher.stem[1].running_mean, 1, 2)
    with pytest.raises(WrapError, match="fold_bn"):
        wrapped(teacher=Teacher(teacher, fold_bn=True))(*batch())


def test_input_is_renormalised_for_the_teacher():
    class Sees(Net):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    teacher = Sees()
    mine, theirs = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    model = wrapped(teacher=Teacher(teacher, mean=theirs[0], std=theirs[1]), adapter=Adapter(*mine))
    picture = torch.rand(2, 3, 16, 16)
    as_tensor = lambda v: torch.tensor(v).view(3, 1, 1)  # noqa: E731
    model((picture - as_tensor(mine[0])) / as_tensor(mine[1]), torch.tensor([0, 1]))
    torch.testing.assert_close(
        teacher.seen, (picture - as_tensor(theirs[0])) / as_tensor(theirs[1]), rtol=1e-5, atol=1e-5
    )


def test_timm_models_say_what_they_expect():
    student, teacher = (timm.create_model("test_resnet", num_classes=5) for _ in range(2))
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.1, 0.1), "std": (0.5, 0.5, 0.5)}
    assert wrapped(student=student, teacher=teacher)._renormalise
    assert not wrapped(student=timm.create_model("test_resnet"), teacher=timm.create_model("test_resnet"))._renormalise
    with pytest.raises(WrapError, match="mean"):
        wrapped(teacher=Teacher(Net(), mean=(0, 0, 0), std=(1, 1, 1)))


def test_a_teacher_takes_the_students_mean_only_where_it_has_none_of_its_own():
    mine, theirs = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.1, 0.1), (0.5, 0.5, 0.5))
    student, teacher = (timm.create_model("test_resnet", num_classes=5) for _ in range(2))
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": theirs[0], "std": theirs[1]}
    change = wrapped(student=student, teacher=teacher, adapter=Adapter(*mine))._renormalise["teacher"]
    white = torch.ones(1, 3, 1, 1)
    as_seen = [(white - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1) for m, s in (mine, theirs)]
    torch.testing.assert_close(change(as_seen[0]), as_seen[1])
    assert not wrapped(adapter=Adapter(*mine))._renormalise


def test_a_normalisation_that_was_added_is_said_once(caplog):
    model = wrapped(teacher=Teacher(Net(), mean=(0.5,) * 3, std=(0.5,) * 3), adapter=Adapter((0,) * 3, (1,) * 3))
    model(*batch())
    model(*batch())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "re-normalised" in record.getMessage()


def test_what_has_no_partner_is_said_once(caplog):
    class Some(distillkit.ClassLogits):
        def unmatched(self, student):
            return ["class 'tram' is left out"]

    class SomeLogits(Adapter):
        def view(self, model, kind, tensors, output):
            return Some(output)

    model = wrapped([KL(), KL(name="second")], adapter=SomeLogits())
    model(*batch())
    model(*batch())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "teacher 'teacher': class 'tram' is left out"


def test_input_given_by_name_is_renormalised_too():
    model = wrapped(teacher=Teacher(Net(), mean=(0.5,) * 3, std=(0.5,) * 3), adapter=Adapter((0,) * 3, (1,) * 3))
    model.student.drop = nn.Identity()
    x, y = batch()
    torch.testing.assert_close(model(targets=y, x=x)["kl"], model(x, y)["kl"])


def test_the_teacher_runs_no_further_than_its_last_tap():
    teacher = Net()
    ran = []
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    wrapped([MSE("blocks.0")], teacher=teacher)(*batch())
    assert "blocks.0" in ran
    assert "blocks.1" not in ran
    assert "head" not in ran


def test_an_ema_teacher_follows_the_student_and_is_saved():
    model = wrapped([MSE("head", teacher="ema")], teacher={"ema": EMATeacher(0.9)})
    start = copy.deepcopy(model.student.state_dict())
    assert any(k.startswith("averages.ema") for k in model.state_dict())
    assert not any("averages" in k for k in model.student.state_dict())
    with torch.no_grad():
        model.student.head.weight.add_(1.0)
    model(*batch())
    torch.testing.assert_close(model.averages["ema"].head.weight, start["head.weight"] + 0.1)
    assert not model.averages["ema"].training
    with pytest.raises(WrapError, match="decay"):
        EMATeacher(1.0)


# ---- schedules


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        (Weight(2.0), [2, 2, 2, 2, 2, 2]),
        (Weight(2.0, "warmup", 4), [0, 0.5, 1, 1.5, 2, 2]),
        (Weight(2.0, "linear", 4, end=1.0), [2, 1.75, 1.5, 1.25, 1, 1]),
        (Weight(2.0, "cosine", 4), [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0]),
        (Weight(2.0, "until", 2), [2, 2, 0, 0, 0, 0]),
    ],
)
def test_weight_schedules(weight, wanted):
    got = [float(weight.at(torch.tensor(step))) for step in range(6)]
    assert got == pytest.approx(wanted, abs=1e-6)


def test_the_wrapper_counts_steps_for_the_schedule_and_saves_the_count():
    model = wrapped([MSE("stem", weight=Weight(1.0, "until", 2))])
    values = [model(*batch())["mse"].item() for _ in range(3)]
    assert values[1] > 0
    assert values[2] == 0
    assert model.state_dict()["step"] == 3


class Infinite(KL):
    """A loss that is infinite from step 2 on."""

    def forward(self, student, teacher, targets):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(student, teacher, targets) + (float("inf") if self.calls > 2 else 0.0)


def test_a_distiller_whose_weight_stays_0_rests_and_so_does_its_teacher():
    teachers = {"a": Net(), "b": Net()}
    ran = []
    for name, teacher in teachers.items():
        teacher.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    imitation = FeatureImitation(
        student_at="stem", teacher_at="stem", teacher="b", weight=Weight(1.0, "linear", 2, end=0.0), name="imitation"
    )
    distillers = [Infinite(Weight(1.0, "until", 2), teacher="a"), KL(teacher="b", name="kl_b"), imitation]
    model = distillkit.wrap(Net(), teachers, distillers, criterion=cross_entropy)
    for _ in range(2):
        model(*batch()).total.backward()
    assert ran.count("a") == ran.count("b") == 2
    for parameter in model.parameters():
        parameter.grad = None
    losses = model(*batch())
    assert list(losses) == ["task", "kl", "kl_b", "imitation", "output"]
    assert losses["kl"] == losses["imitation"] == 0
    losses.total.backward()
    model.check_finite()
    assert ran.count("a") == 2
    assert ran.count("b") == 3
    assert all(p.grad is not None for p in model.parameters())  # of the projection too: DDP waits for it

    model.load_state_dict({**model.state_dict(), "step": torch.tensor(0)})  # back to an earlier checkpoint
    model(*batch())
    assert ran.count("a") == 3


@pytest.mark.parametrize("weight", [Weight(1.0, "until", 2), Weight(1.0, "cosine", 2), Weight(2.0, "warmup", 2), 0])
def test_a_weight_of_0_also_silences_an_infinite_loss(weight):
    weight = distillkit.core.schedule.weight_of(weight)
    step = torch.tensor(0 if weight.kind == "warmup" else 2)
    loss = torch.tensor(float("inf"))
    assert weight.applied(loss, step) == 0
    assert weight.applied(torch.tensor(3.0), step + 1) == (3.0 if weight.kind == "warmup" else 0.0)


@pytest.mark.parametrize(
    ("weight", "over"),
    [
        (Weight(1.0), [False, False, False]),
        (Weight(0.0), [True, True, True]),
        (Weight(1.0, "until", 1), [False, True, True]),
        (Weight(1.0, "linear", 2), [False, False, True]),
        (Weight(1.0, "cosine", 2, end=0.5), [False, False, False]),
        (Weight(1.0, "warmup", 2), [False, False, False]),
    ],
)
def test_when_a_weight_is_0_for_good(weight, over):
    assert [weight.is_over(step) for step in range(3)] == over


@pytest.mark.parametrize("bad", [{"kind": "sometimes"}, {"kind": "warmup"}, {"value": float("nan")}])
def test_bad_schedules(bad):
    with pytest.raises(ValueError, match=r"schedule|finite"):
        Weight(**{"value": 1.0, **bad})


# ---- failing loudly


def test_a_path_that_does_not_exist_lists_the_nearest():
    with pytest.raises(TapError, match=r"student: no module is called 'block\.1'; nearest: 'blocks\.1'"):
        wrapped([MSE("block.1")])
    with pytest.raises(TapError, match="teacher: no module"):
        wrapped([MSE("stem", "stemm")])
    with pytest.raises(TapError, match="expected \\[index\\]"):
        wrapped([MSE("stem[first]")])(*batch())


def test_a_failed_wrap_leaves_no_hook():
    class Unprepared(MSE):
        def prepare(self, student_widths, teacher_widths):
            raise ValueError("no widths")

    student, teacher = Net(), Net()
    with pytest.raises(TapError):
        wrapped([MSE("stem"), MSE("stem", "nowhere", name="second")], student=student, teacher=teacher)
    assert hooks_of(student) == hooks_of(teacher) == 0
    with pytest.raises(ViewError, match="distiller 'mse': no widths"):
        wrapped([Unprepared("stem")], student=student, teacher=teacher)
    assert hooks_of(student) == hooks_of(teacher) == 0
    wrapped([MSE("stem")], student=student)


def test_a_tap_that_never_fires():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(1, 1)

    with pytest.raises(TapError, match="'extra' never fired"):
        wrapped([MSE("extra", "head")], student=Unused())(*batch())


def test_a_tap_that_fires_too_often():
    class Twice(Net):
        def forward(self, x):
            super().forward(x)
            return super().forward(x)

    with pytest.raises(TapError, match="'stem' fired 2 times in one forward, declared 1"):
        wrapped([MSE("stem")], student=Twice())(*batch())


def test_a_tap_on_something_that_is_not_a_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x + 1

    class WithPair(Net):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return super().forward(self.pair(x)[1])

    with pytest.raises(TapError, match=r"returns a tuple"):
        wrapped([MSE("pair", "stem")], student=WithPair())(*batch())
    student, teacher = nn.Sequential(Net(3), nn.Identity()), WithPair()
    losses = wrapped([MSE("0.stem[1:3]", "pair[1][:2]")], student=student, teacher=teacher)
    with pytest.raises(
        RuntimeError, match=r"size of tensor a \(8\)"
    ):  # 8 x 8 cells of the stem, 16 x 16 of the picture
        losses(*batch())


def test_a_teacher_put_in_train_mode():
    teacher = Net()
    model = wrapped(teacher=teacher)
    model(*batch())
    teacher.train()
    with pytest.raises(TeacherModeError, match="train mode"):
        model(*batch())
    teacher.eval()
    teacher.drop.train()  # one module is enough
    with pytest.raises(TeacherModeError, match="Dropout"):
        model(*batch())


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    class Bad(KL):
        def forward(self, student, teacher, targets):
            Bad.calls += 1
            return super().forward(student, teacher, targets) * (float("nan") if Bad.calls == 4 else 1.0)

    Bad.calls = 0
    model = wrapped([Bad(name="bad")])
    x, y = batch()
    for _ in range(CHECK_EVERY - 1):
        model(x, y)
    with pytest.raises(NonFiniteLossError, match="'bad' since step 3 "):
        model(x, y)
    Bad.calls = 3
    model(x, y)
    with pytest.raises(NonFiniteLossError, match=f"'bad' since step {CHECK_EVERY} "):
        model.check_finite()
    model.check_finite()


def test_a_loss_that_comes_and_goes_hides_no_other():
    turns = iter([{}, {"extra": torch.zeros(())}])
    model = wrapped(criterion=lambda output, y: {"nan": output.sum() * float("nan"), **next(turns)})
    model(*batch())
    with pytest.raises(NonFiniteLossError, match="'nan' since step 0"):
        model(*batch())


@pytest.mark.parametrize("how", ["detached", "frozen", "constant"])
def test_a_distiller_that_reaches_no_student_parameter(how):
    class Cut(MSE):
        def forward(self, student, teacher, targets):
            loss = super().forward(student, teacher, targets)
            return loss.detach() if how == "detached" else torch.tensor(1.0) if how == "constant" else loss

    student = Net()
    if how == "frozen":
        student.stem.requires_grad_(False)
    model = wrapped([Cut("stem")], student=student)
    with pytest.raises(UnreachedStudentError, match="'mse' reaches no parameter"):
        model(*batch())


def test_an_input_that_requires_a_gradient_does_not_count_as_the_student():
    student = Net().requires_grad_(False)
    x, y = batch()
    model = wrapped([MSE("stem")], student=student, criterion=lambda output, y: {"task": output.sum()})
    with pytest.raises(UnreachedStudentError, match="'mse' reaches no parameter"):
        model(x.requires_grad_(), y)


def test_a_distillers_own_parameters_do_not_count_as_the_student():
    class Projected(MSE):
        def __init__(self, at):
            super().__init__(at)
            self.project = nn.Conv2d(8, 8, 1)

        def forward(self, student, teacher, targets):
            return (self.project(student.maps[0].detach()) - teacher.maps[0]).pow(2).mean()

    with pytest.raises(UnreachedStudentError):
        wrapped([Projected("stem")])(*batch())


def test_different_numbers_of_classes():
    with pytest.raises(ViewError, match=r"7.*5|5.*7"):
        wrapped(student=Net(classes=7))(*batch())


def test_what_a_distiller_refuses_is_an_error_with_its_name():
    class Refuses(KL):
        def forward(self, student, teacher, targets):
            raise ValueError("not these logits")

    with pytest.raises(ViewError) as error:
        wrapped([Refuses()])(*batch())
    assert str(error.value) == "distiller 'kl': not these logits"
    assert isinstance(error.value, ValueError)


def test_a_compiled_student_is_refused():
    with pytest.raises(WrapError, match="compiled"):
        wrapped(student=torch.compile(Net(), backend="eager"))
    inside = Net()
    inside.stem.compile(backend="eager")
    with pytest.raises(WrapError, match=r"compiled \(stem\)"):
        wrapped(student=inside)


def test_a_second_wrapper_is_refused():
    model = wrapped([MSE("stem")])
    with pytest.raises(WrapError, match="already"):
        wrapped(student=model.student)
    with pytest.raises(WrapError, match=r"\(itself\) is read by another wrapper"):
        wrapped(student=model.student.stem)
    with pytest.raises(WrapError, match=r"\(0\.stem\) is read by another wrapper"):
        wrapped(student=nn.Sequential(model.student))


def test_a_student_that_is_wrapped_otherwise_is_refused():
    model = wrapped()
    for student in (model, nn.Sequential(model)):
        with pytest.raises(WrapError, match="wrapped model"):
            wrapped(student=student)
    with pytest.raises(WrapError, match="DataParallel"):
        wrapped(student=nn.DataParallel(Net()))


@pytest.mark.parametrize("names", [("kl", "kl"), ("a.b", "a_b"), ("a", "output")])
def test_two_losses_of_one_name(names):
    with pytest.raises(WrapError, match=f"'{names[1]}'"):
        wrapped([KL(name=name) for name in names])


def test_something_else_than_a_teacher_or_distiller():
    with pytest.raises(WrapError, match=r"expected a torch\.nn\.Module or a Teacher, got str"):
        wrapped(teacher="resnet50")
    with pytest.raises(WrapError, match="expected Distiller objects"):
        wrapped([nn.MSELoss()])
    with pytest.raises(WrapError, match=r"expected a list, as in \[LogitKD\(\)\], got LogitKD"):
        distillkit.wrap(Net(), Net(), LogitKD())
    with pytest.raises(WrapError, match="student: expected"):
        distillkit.wrap("resnet18", Net(), [KL()])


def test_a_call_without_targets():
    with pytest.raises(TypeError, match="targets"):
        wrapped()(batch()[0])


def test_a_distiller_that_needs_targets_and_gets_none():
    class Regions(KL):
        def forward(self, student, teacher, targets):
            return super().forward(student, teacher, targets) * len(targets.boxes)

    with pytest.raises(ViewError, match="distiller 'kl' needs targets"):
        wrapped([Regions()], criterion=None)(batch()[0])


def test_activation_checkpointing():
    class Checkpointed(Net):
        reentrant = False

        def forward(self, x):
            x = x.requires_grad_()
            x = checkpoint(self.stem, x, use_reentrant=self.reentrant)
            for block in self.blocks:
                x = block(x).relu()
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    plain, student = Net(), Checkpointed()
    plain.drop = nn.Identity()
    student.load_state_dict(plain.state_dict())
    teacher = Net()
    grads = []
    for net in (plain, student):
        model = wrapped([MSE("stem.0")], student=net, teacher=teacher)
        model(*batch()).total.backward()
        grads.append(net.stem[0].weight.grad)
        assert not model._student_side.taps.caught
    torch.testing.assert_close(*grads)

    reentrant = Checkpointed()
    reentrant.reentrant = True
    with pytest.raises(UnreachedStudentError, match="use_reentrant=False"):
        wrapped([MSE("stem.0")], student=reentrant, teacher=teacher)(*batch())


def test_copies_and_pickles_of_a_wrapped_student_carry_no_tap():
    student = Net()
    seen = []
    handle = student.stem.register_forward_hook(Recorder(seen))
    model = wrapped([MSE("stem"), MSE("blocks.0", name="second")], student=student)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert hooks_of(twin) == 1  # the user's own
        assert type(twin.blocks[0]._forward_hooks) is type(Net().stem._forward_hooks)
        model._student_side.taps.start()
        twin(batch()[0])
        assert not any(model._student_side.taps.stop().values())
        wrapped([MSE("stem")], student=twin)
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"model\.student"):
            how(model)
    seen.clear()
    handle.remove()  # a hook from before the wrap is still the user's to remove
    student(batch()[0])
    assert seen == []
    later = student.stem.register_forward_hook(Recorder(seen))
    model.unwrap()
    student(batch()[0])
    assert seen == ["Sequential"]
    assert hooks_of(student) == 1
    del later


class Recorder:
    def __init__(self, seen):
        self.seen = seen

    def __call__(self, module, args, output):
        self.seen.append(type(module).__name__)


def test_an_exception_in_the_students_forward_leaves_nothing_behind():
    class Fails(Net):
        def forward(self, x):
            super().forward(x)
            Fails.tensor = weakref.ref(self.last)
            raise RuntimeError("broken")

    student = Fails()

    def keep_a_reference(module, args, output):
        student.last = output

    student.stem.register_forward_hook(keep_a_reference)
    model = wrapped([MSE("stem")], student=student)
    with pytest.raises(RuntimeError, match="broken"):
        model(*batch())
    taps = model._student_side.taps
    assert not taps.recording
    assert not taps.caught
    del student.last
    gc.collect()
    assert Fails.tensor() is None
    model.unwrap()
    assert hooks_of(student) == 1


def test_nothing_is_retained_between_steps():
    model = wrapped([MSE("stem"), KL()])
    refs = []
    model.student.stem.register_forward_hook(lambda m, a, o: refs.append(weakref.ref(o)))
    model._frozen["teacher"].model.stem.register_forward_hook(lambda m, a, o: refs.append(weakref.ref(o)))
    losses = model(*batch())
    losses.total.backward()
    del losses
    gc.collect()
    assert len(refs) == 2
    assert [r() for r in refs] == [None, None]


# ---- torch.compile, AMP


def test_compiles_without_a_graph_break_and_gives_the_same():
    torch.manual_seed(0)
    student, teacher = Net(), Net()
    student.drop = nn.Identity()
    model = wrapped([MSE("blocks.0", weight=Weight(1.0, "warmup", 4)), KL()], student=student, teacher=teacher)
    twin = wrapped(
        [MSE("blocks.0", weight=Weight(1.0, "warmup", 4)), KL()], student=copy.deepcopy(student), teacher=teacher
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x, y = batch(seed=seed)
        a, b = compiled(x, y), twin(x, y)
        assert isinstance(a, Losses)
        assert list(a) == list(b)
        for name in b:
            torch.testing.assert_close(a[name], b[name])
        a.total.backward()
        b.total.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    model.check_finite()


def test_a_compiled_first_step_leaves_the_checks_to_the_first_eager_one():
    class Cut(MSE):
        def forward(self, student, teacher, targets):
            return super().forward(student, teacher, targets).detach()

    model = wrapped([Cut("stem")])
    torch.compile(model, backend="eager", fullgraph=True)(*batch())
    with pytest.raises(UnreachedStudentError):
        model(*batch())


def test_a_teacher_may_share_an_activation_with_the_student_and_no_dropout():
    """All models of ultralytics share their SiLU: its mode is that of whichever was set last, and means nothing."""
    student, teacher = Net(), Net()
    student.act = teacher.act = nn.SiLU()
    x, y = batch()
    assert distillkit.wrap(student, teacher, [KL()], criterion=nn.functional.cross_entropy).train()(x, y)["kl"] > 0
    for module in (nn.Dropout(), nn.RReLU()):
        student, teacher = Net(), Net()
        student.act = teacher.act = module
        with pytest.raises(TeacherModeError, match=type(module).__name__):
            distillkit.wrap(student, teacher, [KL()], criterion=nn.functional.cross_entropy).train()(x, y)


def test_amp_through_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # of tests before this one
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = wrapped([MSE("stem"), LogitKD(temperature=2.0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = prepared(*batch())
    assert isinstance(losses, Losses)
    assert {v.dtype for v in losses.values()} == {torch.float32}
    accelerator.backward(losses.total)
    before = model.student.head.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.student.head.weight)


def test_outputs_that_have_names_are_read_by_number_too():
    """As transformers' are; where the names are numbers themselves, a number is a name."""

    class Named(nn.Module):
        def forward(self, x):
            return OrderedDict(logits=x + 1, hidden=x + 2)

    class Levels(nn.Module):
        def forward(self, x):
            return OrderedDict({"1": x + 1, "0": x + 2})

    student = nn.ModuleDict({"named": Named(), "levels": Levels()})
    student.forward = lambda x: (student["named"](x), student["levels"](x))
    taps = Taps(student, [Place(("named[0]", "named[-1]", "levels[0]"))], "student")
    taps.start()
    student(torch.zeros(1))
    caught = taps.stop()
    assert [t.item() for t in taps.read(caught, Place(("named[0]", "named[-1]", "levels[0]")))] == [1, 2, 2]
    with pytest.raises(TapError, match="no entry '2', only 'logits', 'hidden'"):
        taps.read(caught, Place(("named[2]",)))
    with pytest.raises(TapError, match="no entry '2', only '1', '0'"):
        taps.read(caught, Place(("levels[2]",)))
