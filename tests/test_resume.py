"""A job killed anywhere and started again ends as if it had not been: the same weights, bit for bit, the same rows."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from distillkit import LD, Main, Valuable, wrap
from distillkit.data.scenes import Scenes
from distillkit.models.gfl import GFL
from distillkit.recipe import Train
from distillkit.training.checkpoint import seed_everything
from distillkit.training.loop import Job, fit
from distillkit.training.metrics import read

SCENES, BATCH, EPOCHS = 40, 2, 2
STEPS = SCENES // BATCH // 2 * EPOCHS  # two batches an optimizer step


class DeadlyScenes:
    """Scenes; reading sample ``at`` = (epoch, index), in a worker, kills the process that trains."""

    def __init__(self, at):
        self.scenes, self.at = Scenes(SCENES, 64, digits=(1, 3)), at

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, key):
        if key == self.at:
            os.kill(os.getppid(), signal.SIGKILL)
        return self.scenes[key]


def _detector():
    return GFL(10, "lcnet_050", strides=(8, 16, 32), channels=16, convs=1, groups=4, bins=9)


def _train(folder, sample=None, rename=None, evaluation=None):
    """One job, from its start or its checkpoint; killed at a sample, a file's renaming or an evaluation (from 0)."""
    multiprocessing.set_start_method("fork", force=True)  # for the loader, so that its workers are our children
    torch.set_num_threads(1)
    seed_everything(0)
    student, teacher = _detector(), _detector()
    events = {"os.rename": 0, "evaluation": 0}

    def count(event, _arguments=None):
        if event in events:
            if events[event] == {"os.rename": rename, "evaluation": evaluation}[event]:
                os.kill(os.getpid(), signal.SIGKILL)
            events[event] += 1

    def evaluate(student):
        count("evaluation")
        return {"AP": float(student.head.gfl_cls.weight.mean())}

    sys.addaudithook(count)
    train = {
        "epochs": EPOCHS,
        "accumulate": 2,
        "ema": 0.9,
        "clip": 10.0,
        "save_every": 3,
        "optimizer": {"kind": "adamw", "lr": 0.002},
        "schedule": {"kind": "cosine", "warmup": 3},
    }
    model = wrap(student, teacher, [LD(Main()), LD(Valuable())])
    job = Job("job", folder, model, DeadlyScenes(sample), evaluate, Train.model_validate(train), 3, BATCH, workers=2)
    fit(job, Console(quiet=True))


def _in_a_process(folder, **kill):
    """Exit code of ``_train`` in a process of its own, forked from one that has imported all and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_train, args=(folder,), kwargs=kill)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert _in_a_process(folder) == 0
    return folder


def _same(a, b):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for name in ("final.safetensors", "best.safetensors"):
        mine, theirs = load_file(a / name), load_file(b / name)
        assert mine.keys() == theirs.keys()
        assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


def test_every_step_has_one_row(uninterrupted):
    rows = read(uninterrupted / "metrics.jsonl")
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in rows if r["kind"] == "evaluation"] == [1, 2]
    assert {"ld_main", "ld_valuable"} < rows[0]["losses"].keys()


@pytest.mark.parametrize("seed", [0, 1])
def test_three_kills_change_nothing(uninterrupted, tmp_path, seed):
    draw = random.Random(seed)
    kills = [
        {"sample": (0, draw.randrange(SCENES))},  # somewhere in the first epoch, perhaps before any checkpoint
        {"rename": draw.randrange(5)},  # a file is written, but has not got its name
        {"sample": (1, draw.randrange(SCENES))} if seed else {"evaluation": 0},
    ]
    for kill in kills:
        assert _in_a_process(tmp_path, **kill) == -signal.SIGKILL
        assert not (tmp_path / "result.json").exists()
    assert _in_a_process(tmp_path) == 0
    _same(uninterrupted, tmp_path)


RECIPE = """
name: killed
data: {kind: scenes, train: 80, val: 8, size: 64, batch: 2, workers: 2}
teacher: {kind: gfl, backbone: lcnet_050, channels: 32, convs: 1, strides: [8, 16, 32], train: {epochs: 1}}
student: {kind: gfl, backbone: lcnet_050, channels: 16, convs: 1, strides: [8, 16, 32]}
distillers: [{kind: ld, region: main}, {kind: ld, region: valuable}]
train: {epochs: 2, ema: 0.9, save_every: 7, threads: 1, schedule: {kind: cosine, warmup: 5}}
compare: [distilled]
"""


@pytest.mark.integration
def test_a_whole_run_killed_from_outside(tmp_path):
    (tmp_path / "killed.yaml").write_text(RECIPE)

    def start(output):
        command = [sys.executable, "-m", "distillkit", "run", str(tmp_path / "killed.yaml"), "--out", str(output)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    process = start(straight)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed

    draw, kills = random.Random(0), 0
    for job, first, last in (("teacher", 3, 25), ("distilled", 3, 25), ("distilled", 45, 65)):
        rows = stopped / "killed" / job / "metrics.jsonl"
        wanted = draw.randrange(first, last)
        process = start(stopped)
        while process.poll() is None and _lines(rows) < wanted:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    process = start(stopped)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    for job in ("teacher", "distilled"):
        _same(straight / "killed" / job, stopped / "killed" / job)
    tables = [json.loads((f / "killed" / "table.json").read_text()) for f in (straight, stopped)]
    for row in tables[0] + tables[1]:
        row.pop("minutes")
    assert tables[0] == tables[1]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
