"""Teachers that are trained in the same step: compiled, checkpointed, in half precision, saved, stopped and resumed."""

import copy
import io
import os
import pickle
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distillkit
from distillkit import EMATeacher, LocalToGlobal, Losses, wrap
from distillkit.core.errors import NonFiniteLossError, UnreachedStudentError
from distillkit.distillers import local_to_global
from distillkit.losses.local_to_global import cut, draw_boxes
from distillkit.recipe import Train
from distillkit.training.loop import Interrupted, Job, fit
from tests.test_local_to_global import Cam, pictures
from tests.tiny import MSE


def transfer(student: nn.Module | None = None, seed: int = 0, **options) -> distillkit.core.wrap.DistilledModel:
    torch.manual_seed(seed)
    options = {"crops": 2, "student_at": "maps", "local_at": "maps"} | options
    return wrap(student or Cam(), distillers=[LocalToGlobal(**options)])


def salient(n: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    x, labels = pictures(n)
    saliency = torch.zeros(n, 1, 56, 56)
    saliency[:, :, 10:40, 20:] = 1
    return x, {"labels": labels, "saliency": saliency, "has_saliency": torch.arange(n) % 2 == 0}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# ---- the batch


@pytest.mark.parametrize("times", [2, 8])
@pytest.mark.parametrize("saliency", [False, True])
def test_pictures_that_stand_in_the_batch_several_times_change_no_loss_and_no_gradient(monkeypatch, times, saliency):
    model = transfer(saliency="targets" if saliency else None).double()
    x, targets = salient()
    boxes = draw_boxes(2, 2, (56, 56), (40, 40))
    monkeypatch.setattr(local_to_global, "draw_boxes", lambda n, *args: boxes.repeat(n // 2, 1, 1))
    once = model(x.double(), targets)
    once.total.backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    many = {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in targets.items()}
    again = model(x.double().repeat(times, 1, 1, 1), many)
    again.total.backward()
    for name in ("local", "local_to_global"):
        assert once[name] > 0
        torch.testing.assert_close(again[name], once[name], rtol=1e-12, atol=0)
    same(gradients(model), wanted, rtol=1e-9, atol=1e-12)


def test_crops_have_the_memory_layout_of_their_pictures():
    """A network may be several times slower on the other one."""
    boxes = draw_boxes(2, 3, (20, 24), (8, 8))
    x = torch.randn(2, 3, 20, 24)
    crops = cut(x, boxes, (8, 8))
    assert crops.is_contiguous()
    last = cut(x.to(memory_format=torch.channels_last), boxes, (8, 8))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, crops)
    part = torch.cat([x, x], 3)[..., :24]  # in neither layout
    assert torch.equal(cut(part, boxes, (8, 8)), crops)


def test_crops_hand_a_gradient_back_to_their_pictures():
    boxes = torch.tensor([[[0, 1, 4, 5], [2, 2, 6, 6]], [[1, 0, 5, 4], [1, 0, 5, 4]]])
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    cut(x, boxes, (4, 4)).sum().backward()
    wanted = torch.zeros(2, 2, 6, 7, dtype=torch.float64)
    for i, of_picture in enumerate(boxes.tolist()):
        for x1, y1, x2, y2 in of_picture:
            wanted[i, :, y1:y2, x1:x2] += 1
    assert torch.equal(x.grad, wanted)


# ---- torch.compile, activation checkpoints, half precision


@pytest.mark.parametrize("saliency", [False, True])
def test_transfer_compiles_without_a_graph_break_and_gives_the_same(saliency):
    options = {"saliency": "targets" if saliency else None}
    model, twin = transfer(**options), transfer(**options)
    x, targets = salient()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        a = compiled(x, targets if saliency else targets["labels"])
        torch.manual_seed(seed)
        b = twin(x, targets if saliency else targets["labels"])
        assert isinstance(a, Losses)
        assert list(a) == list(b) == ["local", "local_to_global", "output"]
        same(dict(a), dict(b))
        a.total.backward()
        b.total.backward()
    same(gradients(model), gradients(twin))
    assert model.step == 3
    assert model.distillers["local_to_global"]._drawn is None
    model.check_finite()


class Checkpointed(Cam):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x.detach().requires_grad_(), use_reentrant=self.reentrant)


def test_activation_checkpointing_of_both_networks():
    student = Checkpointed()
    student.load_state_dict(transfer().student.state_dict())
    model, plain = transfer(student), transfer()
    for each in (model, plain):
        torch.manual_seed(1)
        each(*pictures()).total.backward()
    assert isinstance(model.online["local"], Checkpointed)
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    same(gradients(model), gradients(plain))
    for side in (model._student_side, *model._teacher_sides.values()):
        assert not side.taps.caught
    reentrant = Checkpointed()
    reentrant.reentrant = True
    with pytest.raises(UnreachedStudentError, match="use_reentrant=False"):
        transfer(reentrant)(*pictures())


def test_half_precision_ends_before_targets_and_losses(monkeypatch):
    seen = []

    def remember(function):
        def called(*args, **kwargs):
            out = function(*args, **kwargs)
            seen.append((function.__name__, out.dtype))
            return out

        return called

    for function in (local_to_global.local_targets, local_to_global.at_boxes, local_to_global.transfer_loss):
        monkeypatch.setattr(local_to_global, function.__name__, remember(function))
    model, plain = transfer(saliency="targets"), transfer(saliency="targets")
    dtypes = []
    model.online["local"].maps.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*salient())
    losses.total.backward()
    assert dtypes == [torch.bfloat16]
    assert seen == [(name, torch.float32) for name in ("local_targets", "at_boxes", "transfer_loss")]
    assert all(losses[name].dtype == torch.float32 for name in ("local", "local_to_global"))
    assert all(grad.isfinite().all() and grad.any() for grad in gradients(model).values())
    torch.manual_seed(1)
    wanted = plain(*salient())
    for name in ("local", "local_to_global"):
        torch.testing.assert_close(losses[name], wanted[name], rtol=0.05, atol=0)
        assert losses[name] != wanted[name]
    model.check_finite()


def test_a_local_network_that_diverges_is_named():
    model = transfer()
    with torch.no_grad():
        model.online["local"].maps.weight.fill_(torch.inf)
    model(*pictures())
    with pytest.raises(NonFiniteLossError, match="'local' since step 0"):
        model.check_finite()


# ---- saved, copied, averaged


def test_a_wrapper_and_its_local_network_are_saved_and_loaded(tmp_path):
    model = transfer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(*pictures()).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    student = {f"student.{name}" for name in model.student.state_dict()}
    local = {f"online.local.{name}" for name in model.student.state_dict()}
    assert model.state_dict().keys() == student | local | {"step"}
    other = transfer(seed=1)
    assert not torch.equal(other.online["local"].maps.weight, model.online["local"].maps.weight)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert other.step == 2
    losses = []
    for each in (model, other):
        torch.manual_seed(5)
        losses.append({name: loss for name, loss in each(*pictures()).items() if name != "output"})
    assert losses[0] == losses[1]
    with pytest.raises(RuntimeError, match=r"online\.local\.maps\.weight"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "online.local.maps.weight"})


def test_a_wrapper_is_neither_copied_nor_pickled_and_its_networks_are_without_taps():
    model = transfer()
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"model\.student"):
            how(model)
    for network in (model.student, model.online["local"]):
        assert network.maps._forward_hooks
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert not any(module._forward_hooks for module in twin.modules())
            assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), network.parameters(), strict=True))


def test_a_running_average_of_the_student_teaches_beside_the_local_network():
    torch.manual_seed(0)
    distillers = [LocalToGlobal(crops=2, student_at="maps", local_at="maps"), MSE("maps", teacher="ema")]
    model = wrap(Cam(), {"ema": EMATeacher(0.5)}, distillers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(2):
        losses = model(*pictures())
        assert list(losses) == ["local", "local_to_global", "mse", "output"]
        assert (losses["mse"] > 0) == (step > 0)  # in the first step the average is the student
        losses.total.backward()
        assert all(p.grad is None for p in model.averages.parameters())
        optimizer.step()
        optimizer.zero_grad()
    keys = set(model.state_dict())
    assert {"averages.ema.maps.weight", "online.local.maps.weight", "student.maps.weight"} <= keys


def test_the_mode_of_the_local_network_is_that_of_the_wrapper():
    model = transfer()
    assert model.online["local"].training
    model.eval()
    assert not model.online["local"].training
    x, _ = pictures()
    ran = []
    model.online["local"].register_forward_hook(lambda *args: ran.append(1))
    assert torch.equal(model(x), model.student(x))
    assert not ran


# ---- the loop


class Pictures:
    """Pictures with labels; a sample depends on its index alone. ``at``: a signal while that one is read."""

    def __init__(self, at: tuple[int, int] | None = None):
        self.x, self.y = pictures(10)
        self.at = at

    def __len__(self):
        return len(self.x)

    def __getitem__(self, key):
        if key == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.x[key[1]], self.y[key[1]]


def _fit(folder, data: Pictures | None = None, model=None, **train):
    model = model or transfer()

    def stacked(items):
        return tuple(torch.stack(part) for part in zip(*items))

    settings = {"epochs": 3, "optimizer": {"kind": "adamw", "lr": 0.02}, "schedule": {"kind": "cosine", "warmup": 1}}
    job = Job(
        "cam",
        folder,
        model,
        data or Pictures(),
        lambda student: {"AP": float(student.maps.weight.detach().mean())},
        Train.model_validate(settings | train),
        seed=3,
        batch=4,
        workers=0,
        collate=stacked,
    )
    fit(job, Console(quiet=True, file=io.StringIO()))
    return load_file(folder / "final.safetensors"), model


def test_a_run_that_was_stopped_goes_on_to_the_same_networks(tmp_path):
    straight, model = _fit(tmp_path / "straight", ema=0.9)
    with pytest.raises(Interrupted, match=r"saved after step [45]"):
        _fit(tmp_path / "stopped", Pictures(at=(1, 3)), ema=0.9)
    resumed, other = _fit(tmp_path / "stopped", model=transfer(seed=9), ema=0.9)
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    same(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    rows = [(tmp_path / f / "metrics.jsonl").read_bytes() for f in ("straight", "stopped")]
    assert rows[0] == rows[1]
    assert b'"local_to_global"' in rows[0]


def test_the_average_of_a_run_is_the_students_alone(tmp_path):
    final, model = _fit(tmp_path, ema=0.9)
    assert final.keys() == model.student.state_dict().keys()
    assert not torch.equal(final["maps.weight"], model.student.maps.weight)


def test_accelerate_prepares_both_networks():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # of tests before this one
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = transfer()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = prepared(*pictures())
    assert isinstance(losses, Losses)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    accelerator.backward(losses.total)
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
