"""Checkpoints, schedules, the moving average, metrics rows and the loop on small models."""

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from distillkit import wrap
from distillkit.core.errors import NonFiniteLossError
from distillkit.recipe import Train
from distillkit.training import checkpoint
from distillkit.training.errors import CheckpointError, Interrupted, RunError
from distillkit.training.loop import Job, fit
from distillkit.training.metrics import Metrics, read
from distillkit.training.optim import MovingAverage, build_optimizer, learning_rate_factor, warmup_steps

# ---- files


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    crash = f"""
import os, pathlib
from distillkit.training.checkpoint import atomically
def half(path):
    path.write_bytes(b"half of a checkp")
    os.kill(os.getpid(), 9)
atomically(pathlib.Path({str(path)!r}), half)
"""
    assert subprocess.run([sys.executable, "-c", crash], check=False).returncode == -9
    assert checkpoint.load(path)["step"] == 1
    checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 2
    assert os.listdir(tmp_path) == ["last.pt"]  # the half-written file is gone as well


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})

    def half(p):
        p.write_text("{")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.atomically(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["table.json"]


def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save_weights(tmp_path / "final.safetensors", nn.Linear(2, 3).state_dict())
        checkpoint.write_json(tmp_path / "result.json", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", "truncated", "foreign", "code"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "last.pt"
    if content == "truncated":
        checkpoint.save(path, {"weights": torch.arange(10000)})
        path.write_bytes(path.read_bytes()[:-2000])
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "code":
        torch.save(SimpleNamespace(a=1), path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt.*--fresh"):
        checkpoint.load(path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "final.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load_into(nn.Linear(2, 3), path)
    checkpoint.save_weights(path, nn.Linear(2, 3).state_dict())
    with pytest.raises(CheckpointError, match=r"final\.safetensors does not fit Linear.*bias is \(3,\)"):
        checkpoint.load_into(nn.Linear(2, 4), path)
    path.write_bytes(b"\0\1\2")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        checkpoint.load_into(nn.Linear(2, 3), path)


def test_random_generators_go_on_where_they_stood(tmp_path):
    def draw():
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]

    checkpoint.seed_everything(3)
    random.gauss(0, 1), np.random.randn()  # both keep a second normal number for later
    checkpoint.save(tmp_path / "r.pt", {"random": checkpoint.random_state(torch.device("cpu"))})
    want = draw()
    draw()
    checkpoint.set_random_state(checkpoint.load(tmp_path / "r.pt")["random"], torch.device("cpu"))
    assert draw() == want


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, 0, 0)
    metrics.add({"kind": "train", "step": 1, "epoch": 1, "loss": 0.5, "losses": {"a": 0.5}})
    length = metrics.sync()
    metrics.add({"kind": "train", "step": 2, "epoch": 1, "loss": math.nan, "losses": {"a": math.nan}})
    metrics.close()
    assert read(tmp_path / "metrics.jsonl")[1]["losses"] == {"a": None}
    metrics = Metrics(tmp_path, length, 1)
    metrics.add({"kind": "train", "step": 2, "epoch": 1, "loss": 0.25, "losses": {"a": 0.25}})
    metrics.close()
    assert [row["loss"] for row in read(tmp_path / "metrics.jsonl")] == [0.5, 0.25]
    with pytest.raises(CheckpointError, match="rows are lost"):
        Metrics(tmp_path, 10_000, 2)


# ---- optimizer


def _schedule(**changes):
    plain = {"kind": "constant", "milestones": [], "gamma": 0.1, "warmup": 0, "warmup_factor": 0.001, "min_factor": 0.0}
    plain["cooldown"] = 0
    return SimpleNamespace(**plain | changes)


def _optimizer(**changes):
    plain = {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "backbone_lr": 1.0, "no_decay_norm": True}
    plain |= {"layer_decay": 1.0, "nesterov": False, "eps": 1e-8, "bias_correction": True}
    return SimpleNamespace(**plain | changes)


def test_learning_rates():
    step = _schedule(kind="step", milestones=[2, 3], warmup=4, warmup_factor=0.2)
    factors = [learning_rate_factor(s, 40, 4, step) for s in range(40)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:20] == [1.0] * 15
    assert factors[20:30] == pytest.approx([0.1] * 10)
    assert factors[30:] == pytest.approx([0.01] * 10)

    cosine = _schedule(kind="cosine", warmup=10, warmup_factor=0.0, min_factor=0.1)
    assert learning_rate_factor(5, 110, 1, cosine) == pytest.approx(0.5)
    assert learning_rate_factor(10, 110, 1, cosine) == 1.0
    assert learning_rate_factor(60, 110, 1, cosine) == pytest.approx(0.55)
    falling = [learning_rate_factor(s, 110, 1, cosine) for s in range(10, 110)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] > 0.1
    cosine = _schedule(kind="cosine", warmup=0, min_factor=0.1, cooldown=2)
    assert learning_rate_factor(40, 100, 10, cosine) == pytest.approx(0.55)
    assert {learning_rate_factor(s, 100, 10, cosine) for s in range(80, 100)} == {0.1}
    with pytest.raises(RunError, match="cooldown is 9 of 10 epochs, for which the warm-up leaves no room"):
        learning_rate_factor(0, 100, 10, _schedule(kind="cosine", warmup=10, cooldown=9))

    assert {learning_rate_factor(s, 9, 3, _schedule()) for s in range(9)} == {1.0}
    with pytest.raises(RunError, match="warmup is 500 steps, but the whole run has 300"):
        learning_rate_factor(0, 300, 3, _schedule(warmup=500))
    assert [warmup_steps(total, _schedule(warmup=None)) for total in (0, 3, 40, 9000)] == [0, 0, 4, 500]
    assert learning_rate_factor(2, 40, 1, _schedule(warmup=None, warmup_factor=0.5)) == pytest.approx(0.75)


def _small():
    return nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "head": nn.Conv2d(4, 2, 1)})


def test_parameter_groups():
    model = _small()
    model["backbone"][0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, _optimizer(backbone_lr=0.1))
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    by_name = {name: settings.get(id(p)) for name, p in model.named_parameters()}
    assert by_name["backbone.0.weight"] is None  # frozen
    assert by_name["backbone.1.weight"] == (pytest.approx(0.01), 0.0)
    assert by_name["head.weight"] == (0.1, 1e-4)
    assert by_name["head.bias"] == (0.1, 0.0)
    decayed = build_optimizer(model, _optimizer(kind="adamw", no_decay_norm=False))
    assert [g["weight_decay"] for g in decayed.param_groups] == [1e-4]
    with pytest.raises(RunError, match="backbone_lr"):
        build_optimizer(nn.Linear(1, 1), _optimizer(backbone_lr=0.5))
    with pytest.raises(RunError, match="nothing to train"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False), _optimizer())


def test_nesterov_looks_where_the_momentum_leads():
    """Two steps by hand: v = m v + g; the weight moves by lr (g + m v), and by lr v without."""
    gradients, moved = (2.0, -1.0), {}
    for nesterov in (False, True):
        weight = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(weight.weight)
        config = _optimizer(lr=0.1, momentum=0.5, weight_decay=0.0, nesterov=nesterov)
        optimizer = build_optimizer(weight, config)
        for gradient in gradients:
            weight.weight.grad = torch.full((1, 1), gradient)
            optimizer.step()
        moved[nesterov] = weight.weight.item()
    assert moved[False] == pytest.approx(-0.1 * (2 + (0.5 * 2 - 1)))
    assert moved[True] == pytest.approx(-0.1 * ((2 + 0.5 * 2) + (-1 + 0.5 * (0.5 * 2 - 1))))


def test_moving_average_is_its_formula():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    average = MovingAverage(model, decay=0.3)
    want = {k: v.double().clone() for k, v in model.state_dict().items()}
    for n in range(12):
        model(torch.randn(4, 2))  # moves BatchNorm's buffers
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(model)
        decay = min(0.3, (1 + n) / (10 + n))
        want = {k: decay * want[k] + (1 - decay) * v.double() for k, v in model.state_dict().items()}
    assert average.weights["1.num_batches_tracked"] == 12
    for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(average.weights[name].double(), want[name], rtol=1e-5, atol=1e-6)

    own = {k: v.clone() for k, v in model.state_dict().items()}
    with average.in_place_of(model):
        assert all(torch.equal(v, average.weights[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())


# ---- the loop, on a least-squares line


class Points:
    """x, with y = 3x - 1 and noise; a sample depends on its index alone."""

    def __init__(self, length=23):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(length, 4, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, key):
        _, index = key
        return self.x[index], {"y": 3 * self.x[index].sum() - 1}


class Line(nn.Module):
    """Its loss is a mean over pictures, so that batches can be cut in parts."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.line = nn.Linear(4, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images, targets=None):
        y = self.line(self.dropout(torch.stack(list(images))))[:, 0]
        return {"square": (y - torch.stack([t["y"] for t in targets])).square().mean()} if self.training else y


def _train(**changes):
    defaults = {"epochs": 3, "optimizer": {"kind": "sgd", "lr": 0.05}, "schedule": {"kind": "constant", "warmup": 0}}
    return Train.model_validate(defaults | changes)


def _fit(folder, batch=4, dropout=0.0, data=None, evaluate=None, model=None, console=None, **train):
    torch.manual_seed(0)
    model = model or Line(dropout)
    data = data or Points()

    def distance(student):
        return {"AP": -float((student.line.weight - 3).square().sum().detach())}

    job = Job("line", folder, wrap(model), data, evaluate or distance, _train(**train), seed=7, batch=batch, workers=0)
    result = fit(job, console or Console(quiet=True))
    return result, load_file(folder / "final.safetensors")


def test_the_loop_learns_and_keeps_its_files(tmp_path):
    result, _ = _fit(tmp_path, schedule={"kind": "cosine", "warmup": 2}, epochs=8)
    rows = read(tmp_path / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 49))  # 23 pictures in batches of 4: 6 steps an epoch
    assert [row["epoch"] for row in steps] == [1 + s // 6 for s in range(48)]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == list(range(6, 54, 6))
    assert steps[-1]["loss"] < 0.02 * steps[0]["loss"]
    assert steps[-1]["loss"] == steps[-1]["losses"]["square"]
    assert steps[2]["lr"] == pytest.approx(0.05)
    assert steps[-1]["lr"] < 0.001
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["parameters"] == 5
    assert result["best"] == max(row["AP"] for row in rows if row["kind"] == "evaluation")
    assert {p.name for p in tmp_path.iterdir()} == {
        "best.safetensors", "final.safetensors", "last.pt", "metrics.jsonl", "result.json", "tensorboard"
    }  # fmt: skip


def test_a_step_schedule_and_evaluation_every_other_epoch(tmp_path):
    _fit(tmp_path, schedule={"kind": "step", "milestones": [2], "warmup": 0}, evaluate_every=2)
    rows = read(tmp_path / "metrics.jsonl")
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates == pytest.approx([0.05] * 12 + [0.005] * 6)
    assert [row["epoch"] for row in rows if row["kind"] == "evaluation"] == [2, 3]  # and after the last


@pytest.mark.parametrize("optimizer", [{"kind": "sgd", "lr": 0.05}, {"kind": "adamw", "lr": 0.05}])
def test_accumulation_equals_a_big_batch(tmp_path, optimizer):
    # 23 pictures: 6 batches of 4, the last window of 4 batches holds 2 batches, the last batch 3 pictures
    _, parts = _fit(tmp_path / "parts", batch=4, accumulate=4, optimizer=optimizer, clip=1.0)
    _, whole = _fit(tmp_path / "whole", batch=16, optimizer=optimizer, clip=1.0)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)
    rows = [read(tmp_path / f / "metrics.jsonl") for f in ("parts", "whole")]
    losses = [[row["loss"] for row in rs if row["kind"] == "train"] for rs in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 6


def test_the_average_is_evaluated_and_saved(tmp_path):
    seen = []

    def evaluate(student):
        seen.append(student.line.weight.detach().clone())
        return {"AP": 0.0}

    model = Line()
    _, final = _fit(tmp_path, evaluate=evaluate, model=model, ema=0.9)
    assert torch.equal(final["line.weight"], seen[-1])
    assert not torch.equal(final["line.weight"], model.line.weight)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    data = Points()
    data.x[3] = math.inf
    with pytest.raises(NonFiniteLossError, match="square"):
        _fit(tmp_path, data=data)


def test_no_epochs_is_an_evaluation(tmp_path):
    result, final = _fit(tmp_path, epochs=0)
    torch.manual_seed(0)
    assert torch.equal(final["line.weight"], Line().line.weight)
    assert result["scores"]["AP"] < 0


class Interrupts(Points):
    """A signal while the third sample of the second epoch is read."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __getitem__(self, key):
        if key == (1, 3):
            os.kill(os.getpid(), self.number)
        return super().__getitem__(key)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_weights(tmp_path, number):
    printed = Console(record=True, width=200, file=io.StringIO())
    before = signal.getsignal(number)
    _, straight = _fit(tmp_path / "straight", dropout=0.5, ema=0.9)
    with pytest.raises(Interrupted, match="saved after step") as raised:
        _fit(tmp_path / "stopped", dropout=0.5, data=Interrupts(number), ema=0.9, console=printed)
    assert "stopping after this step (or evaluation); Ctrl-C again stops at once\n" in printed.export_text()
    _, resumed = _fit(tmp_path / "stopped", dropout=0.5, ema=0.9, console=printed)
    assert signal.getsignal(number) is before
    (step,) = re.findall(r"saved after step (\d+)", str(raised.value))
    assert f"line: goes on after step {step}\n" in printed.export_text()
    assert all(torch.equal(resumed[k], v) for k, v in straight.items())
    files = [(tmp_path / f / "metrics.jsonl").read_bytes() for f in ("straight", "stopped")]
    assert files[0] == files[1]


def test_ctrl_c_in_the_last_evaluation_is_heard(tmp_path):
    def evaluate(student):
        os.kill(os.getpid(), signal.SIGINT)
        return {"AP": 0.0}

    with pytest.raises(Interrupted, match="after step 6"):
        _fit(tmp_path, epochs=1, evaluate=evaluate)
    assert not (tmp_path / "result.json").exists()
    result, _ = _fit(tmp_path, epochs=1, evaluate=lambda student: pytest.fail("it was evaluated already"))
    assert result["scores"] == {"AP": 0.0}


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    _fit(tmp_path)
    with pytest.raises(CheckpointError, match=r"last\.pt does not fit"):
        _fit(tmp_path, model=nn.ModuleDict({"line": nn.Linear(4, 1), "more": nn.Linear(4, 1)}))


def test_moments_of_another_shape_are_refused(tmp_path):
    _fit(tmp_path)
    (tmp_path / "result.json").unlink()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    moments = next(iter(state["optimizer"]["state"].values()))
    name = next(key for key, value in moments.items() if key != "step" and value is not None)
    moments[name] = moments[name][None]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=rf"last\.pt: the optimizer's {name} is \(1, "):
        _fit(tmp_path)


def test_half_precision_needs_an_accelerator(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(RunError, match="use bf16"):
        _fit(tmp_path, amp="fp16")
    result, _ = _fit(tmp_path, amp="bf16")
    assert result["steps"] == 18


TWO = """
import sys
from pathlib import Path
from tests.test_training import Points, _fit
from distillkit.training.processes import processes
assert processes().num_processes == 2
_fit(Path(sys.argv[1]), batch=2, data=Points(24), ema=0.9, clip=1.0)
"""


@pytest.mark.integration
def test_two_processes_train_as_one_with_a_batch_twice_as_big(tmp_path):
    _, one = _fit(tmp_path / "one", batch=4, data=Points(24), ema=0.9, clip=1.0)
    (tmp_path / "two.py").write_text(TWO)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        str(tmp_path / "two.py"),
        str(tmp_path / "two"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    printed = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    two = load_file(tmp_path / "two" / "final.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    rows = [[r for r in read(tmp_path / f / "metrics.jsonl") if r["kind"] == "train"] for f in ("one", "two")]
    assert [r["step"] for r in rows[1]] == list(range(1, 19))
    assert [r["loss"] for r in rows[1]] == pytest.approx([r["loss"] for r in rows[0]], rel=1e-4)
