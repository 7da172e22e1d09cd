"""The behaviour matrix: distillkit handles every fault, the judges can say no, and peers are asked where they are."""

import importlib
import logging
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from distillkit.bench import behaviour
from distillkit.bench.behaviour import CONTENDERS, OURS, kit, ours, parallel, process, provoke, rows
from distillkit.bench.behaviour.rows import BY_KEY, ROWS, Outcome
from distillkit.bench.peers import Peer
from distillkit.core.checks import check_reaches
from distillkit.core.taps import Taps
from distillkit.core.teacher import Teacher
from distillkit.core.wrap import DistilledModel

OWN_PROCESSES = ("two_ranks", "loss_parameters", "compiled_before", "accelerate", "runner_checkpoint")
INSTALLED = [name for name, peer in CONTENDERS.items() if peer.version]


@pytest.fixture(autouse=True)
def logs_as_they_were():
    """The matrix is told no warnings of its own small models."""
    logger = logging.getLogger("distillkit")
    level, disabled = logger.level, logging.root.manager.disable
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
    logging.disable(disabled)


@pytest.mark.parametrize("key", [key for key in BY_KEY if key not in OWN_PROCESSES])
def test_distillkit_handles(key):
    outcome = process.probe(OURS, key)()
    assert outcome.ok is True, outcome.saw


@pytest.mark.integration
def test_distillkit_handles_what_needs_a_process_of_its_own():
    seen = behaviour.observed([OURS], list(OWN_PROCESSES))[OURS]
    assert {key: outcome.saw for key, outcome in seen.items() if not outcome.ok and key != "runner_checkpoint"} == {}
    assert seen["runner_checkpoint"].ok in (True, None)  # None: no mmengine here to write such a file


@pytest.mark.parametrize("name", [OURS, *CONTENDERS])
def test_every_contender_answers_every_row(name):
    module = importlib.import_module(f"distillkit.bench.behaviour.{name}")
    assert all(callable(process.probe(name, key)) for key in BY_KEY)
    assert isinstance(module.KIT, kit.Kit)


# ---- a fault that comes back is found


def keep_in_train_mode(monkeypatch):
    """As though wrap left the teacher as it is, and no step looked."""
    monkeypatch.setattr(Teacher, "check_mode", lambda self: None)
    whole = Teacher.__init__

    def init(self, model, *args, **kwargs):
        whole(self, model, *args, **kwargs)
        self.model.train()

    monkeypatch.setattr(Teacher, "__init__", init)


def register_the_teacher(monkeypatch):
    whole = DistilledModel.__init__

    def init(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        self.frozen = nn.ModuleList(teacher.model for teacher in self._frozen.values())

    monkeypatch.setattr(DistilledModel, "__init__", init)


def keep_what_was_caught(monkeypatch):
    def stop(self):
        self.recording = False
        return self.caught

    monkeypatch.setattr(Taps, "stop", stop)


def never_look(monkeypatch):
    monkeypatch.setattr(DistilledModel, "check_finite", lambda self: None)


def never_check_reach(monkeypatch):
    monkeypatch.setattr("distillkit.core.wrap.check_reaches", lambda *args: None)


def name_no_path(monkeypatch):
    whole = Taps.__init__

    def init(self, *args, **kwargs):
        try:
            whole(self, *args, **kwargs)
        except Exception:
            raise KeyError("path") from None

    monkeypatch.setattr(Taps, "__init__", init)


def leave_the_taps(monkeypatch):
    def unwrap(self):
        self._unwrapped = True
        return self.student

    monkeypatch.setattr(DistilledModel, "unwrap", unwrap)


def weigh_once(monkeypatch):
    monkeypatch.setattr("distillkit.core.schedule.Weight.applied", lambda self, loss, step: loss)


def sum_over_pictures(monkeypatch):
    whole = ours.LogitKD.forward
    monkeypatch.setattr(ours.LogitKD, "forward", lambda self, s, t, targets: whole(self, s, t, targets) * len(s.logits))


def feed_as_it_is(monkeypatch):
    monkeypatch.setattr("distillkit.core.wrap.renormalisation", lambda *args: None)


def tap_for_good(monkeypatch):
    from distillkit.core.taps import TappedHooks

    monkeypatch.delattr(TappedHooks, "__deepcopy__")
    monkeypatch.delattr(TappedHooks, "__reduce_ex__")


def loss_in_low_precision(monkeypatch):
    def forward(self, student, teacher, targets):
        return (student.logits.log_softmax(-1) - teacher.logits.log_softmax(-1)).pow(2).mean().float()

    monkeypatch.setattr(ours.LogitKD, "forward", forward)


FAULTS = {
    "teacher_mode": (keep_in_train_mode, "BatchNorm's mean moved by"),
    "teacher_switched": (keep_in_train_mode, "moved by"),
    "teacher_hidden": (register_the_teacher, "parameters"),
    "after_exception": (keep_what_was_caught, "bytes after an exception"),
    "teacher_nan": (never_look, "60 steps without a word"),
    "wrong_path": (name_no_path, "no word of"),
    "trains_nothing": (never_check_reach, "without a word"),
    "repeated_images": (sum_over_pictures, "8: 3."),
    "normalisation": (feed_as_it_is, "off by"),
    "unwrap": (leave_the_taps, "hooks are left"),
    "weight": (weigh_once, "1 times"),
    "bf16": (loss_in_low_precision, "log_softmax in bfloat16"),
}


@pytest.mark.parametrize("key", FAULTS)
def test_a_fault_that_comes_back_is_found(key, monkeypatch):
    fault, said = FAULTS[key]
    fault(monkeypatch)
    outcome = process.run_probe(OURS, key)
    assert outcome.ok is False
    assert not outcome.broken
    assert said in outcome.saw


def test_copies_with_taps_are_found(monkeypatch):
    tap_for_good(monkeypatch)
    outcome = process.run_probe(OURS, "copies")
    assert outcome.ok is False


def test_a_gradient_that_reaches_the_teacher_is_found():
    student, teacher = kit.Net(), kit.Net(1)

    def forward(x, y):
        loss = (student(x) - teacher(x)).pow(2).mean()
        return loss, loss

    def start():
        return kit.Running(student, teacher, forward, student, student.train, kit.Net)

    outcome = provoke.teacher_gradient(kit.classifiers(start, lambda projection: start()))
    assert outcome.ok is False
    assert outcome.saw == "9 of its parameters have a gradient, 9 are in the graph"


def test_a_provocation_that_provokes_nothing_is_said(monkeypatch):
    running = ours.start(logits=False)
    outcome = provoke.trains_nothing(ours.KIT, running, lambda name: False)
    assert outcome.broken
    assert "nothing was provoked" in outcome.saw


def test_the_check_of_reach_is_the_one_that_is_taken_away():
    """Of the test above: the name that is patched is the one that the wrapper calls."""
    from distillkit.core import wrap

    assert wrap.check_reaches is check_reaches


# ---- judges


def test_an_error_has_to_name_what_is_wrong_and_what_would_be_right():
    assert rows.named(KeyError("no 'a.b'; nearest: 'a.c'"), ["'a.b'", "'a.c'"]).ok
    missing = rows.named(KeyError("no 'a.b'"), ["'a.b'", "'a.c'"])
    assert missing.ok is False
    assert missing.saw == "KeyError: \"no 'a.b'\" (no word of 'a.c')"
    assert rows.named(None, ["'a.b'"]) == Outcome(False, "accepted without a word")


def test_a_message_has_to_say_what_and_of_whom():
    assert rows.said(["loss kd is not finite"], ("nan", "finite"), ("kd",), "silent").ok
    assert rows.said(["not finite"], ("nan", "finite"), ("kd",), "silent").ok is False
    assert rows.said([], ("nan",), ("kd",), "silent") == Outcome(False, "silent")


def test_values_are_equal_relative_to_the_first():
    assert rows.equal({"1": 100.0, "2": 100.001}, 1e-4, "losses").ok
    grown = rows.equal({"1": 0.5, "2": 1.0, "4": 2.0}, 1e-4, "losses")
    assert grown == Outcome(False, "losses relative to the first: 1: 1, 2: 2, 4: 4")
    assert rows.equal({"1": 0.5, "2": float("nan"), "4": 0.5}, 1e-4, "losses").ok is False
    assert rows.equal({"1": 0.0, "2": 0.0}, 1e-4, "losses").broken, "nothing was distilled"


def test_gradients_are_those_of_one_process_only_with_the_same_names_and_numbers(monkeypatch):
    whole, nothing = {"a": torch.ones(2), "b": torch.ones(2)}, float("nan")

    def judged(*halves):
        monkeypatch.setattr(parallel, "gradient", lambda *args: whole)
        return parallel._as_one([{"gradient": half, "error": ""} for half in halves], ours.KIT, {})

    assert judged(whole, whole).ok
    assert judged({"a": torch.ones(2)}, {"a": torch.ones(2)}).saw == "gradients on one side alone: b"
    lost = {"a": torch.ones(2), "b": torch.full((2,), nothing)}
    assert judged(lost, lost).ok is False


def test_nan_of_a_teacher_that_the_student_holds_is_not_counted_as_the_students(monkeypatch):
    student, teacher = kit.Net(), kit.Net(1)
    student.teacher = teacher

    def start():
        def forward(x, y):
            loss = student(x).square().mean()
            return loss, loss

        return kit.Running(student, teacher, forward, student, student.train, kit.Net)

    outcome = provoke.teacher_nan(kit.classifiers(start, lambda projection: start()))
    assert outcome.saw == "60 steps without a word; 0 of the student's parameters are NaN"


def test_a_long_message_is_cut_around_what_matters_and_has_no_folder():
    text = "In the recipe that was read, and that was made by somebody: " * 3 + "/tmp/x1/recipe.yaml:6: temprature"
    cut = rows.cut_around(text, ["temprature"])
    assert "recipe.yaml:6: temprature" in cut
    assert "/tmp" not in cut
    assert len(cut) <= 113


# ---- the matrix


def seen(**others: Outcome) -> behaviour.Seen:
    found = {OURS: {key: Outcome(True, "as it should be") for key in BY_KEY}}
    for contender, outcome in others.items():
        found[contender] = dict.fromkeys(BY_KEY, outcome)
    return found


def test_peers_that_are_not_installed_are_named(monkeypatch):
    absent = Peer("torchdistill", "no_such_module", "no-such-package", "pip install torchdistill")
    monkeypatch.setitem(CONTENDERS, "torchdistill", absent)
    matrix, observed, asked = behaviour.tables(seen())
    assert "torchdistill (absent: pip install torchdistill)" in matrix.note
    column = matrix.head.index("torchdistill")
    assert {row[column] for row in matrix.rows} == {"absent"}
    assert len(matrix.rows) == len(observed.rows) == len(asked.rows) == len(ROWS)


def test_only_what_is_installed_is_asked(monkeypatch):
    asked = []
    for name in CONTENDERS:
        monkeypatch.setitem(CONTENDERS, name, Peer(name, "no_such_module", "no-such-package", "pip install it"))

    def probed(contender, keys, note):
        asked.append(contender)
        for key in keys:
            note(key, Outcome(True, "fine"))

    monkeypatch.setattr(behaviour, "probed", probed)
    told = []
    result = behaviour.run(True, 2, lambda *what: told.append(what))
    assert asked == [OURS]
    assert all(check.ok for check in result.checks)
    assert len(result.checks) == sum(not row.needs or find_spec(row.needs) is not None for row in ROWS)
    assert told[-1][1:] == (len(ROWS), len(ROWS))
    assert result.data[OURS]["unwrap"] == {"ok": True, "saw": "fine", "broken": False}


def test_cells_are_what_was_seen():
    found = seen(modelopt=Outcome(False, "41 | bytes"), mmdet_ld=Outcome(None, "no layers"))
    matrix, observed, _ = behaviour.tables(found)
    assert matrix.rows[0][1:6] == ["yes", "absent", "**no**", "absent", "-"]
    assert observed.rows[0][3] == "41 | bytes"
    assert observed.rows[0][5] == "no layers"


def test_checks_hold_distillkit_its_probes_and_the_faults_of_peers():
    fine = behaviour.checks(seen(torchdistill=Outcome(False, "drifted")))
    assert all(check.ok for check in fine)
    found = seen(torchdistill=Outcome(True, "handled"), modelopt=Outcome(False, "no such name", broken=True))
    found[OURS]["unwrap"] = Outcome(False, "its keys are others")
    failed = {check.name: check.said for check in behaviour.checks(found) if not check.ok}
    assert failed[f"behaviour, distillkit: {BY_KEY['unwrap'].asks}"] == "its keys are others"
    assert any(name.startswith("behaviour, the probe unwrap of nvidia-modelopt") for name in failed)
    assert "handled" in failed[f"behaviour, the fault shows in a peer: {BY_KEY['teacher_mode'].asks}"]


def test_a_row_that_nobody_can_be_asked_without_a_package_fails_no_run(monkeypatch):
    monkeypatch.setattr(behaviour, "find_spec", lambda module: None)
    found = seen()
    found[OURS]["runner_checkpoint"] = Outcome(None, "needs mmengine, which writes such files")
    assert all(check.ok for check in behaviour.checks(found))
    monkeypatch.setattr(behaviour, "find_spec", lambda module: True)
    assert not all(check.ok for check in behaviour.checks(found))


def test_a_probe_that_raises_is_broken_and_says_nothing_of_the_contender(monkeypatch):
    monkeypatch.setattr(ours, "unwrap", lambda: 1 / 0, raising=False)
    outcome = process.run_probe(OURS, "unwrap")
    assert outcome == Outcome(False, "the probe failed: ZeroDivisionError: division by zero", broken=True)
    assert behaviour.verdict({OURS: {"unwrap": outcome}}, OURS, "unwrap") == "?"


@pytest.mark.integration
def test_a_probe_that_hangs_or_dies_holds_up_nobody(monkeypatch, tmp_path):
    """In a contender of its own, put on the path of the process that asks it."""
    package = tmp_path / "sitecustomize.py"
    package.write_text(
        "import sys, types, os, time\n"
        "m = types.ModuleType('distillkit.bench.behaviour.odd')\n"
        "m.load = lambda: __import__('torch')\n"
        "m.hangs = lambda: time.sleep(60)\n"
        "m.dies = lambda: os._exit(3)\n"
        "sys.modules['distillkit.bench.behaviour.odd'] = m\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    found = {}
    process.probed("odd", ["hangs", "dies", "missing"], found.__setitem__, limit=5)
    assert found["hangs"] == Outcome(False, "no answer within 5 seconds", broken=True)
    assert found["dies"] == Outcome(False, "its process ended with status 3", broken=True)
    assert found["missing"].broken


@pytest.mark.integration
@pytest.mark.skipif(not INSTALLED, reason='needs a peer: pip install "distillkit[bench]"')
@pytest.mark.parametrize("name", INSTALLED)
def test_the_known_faults_of_a_peer_show(name):
    known = [row.key for row in ROWS if CONTENDERS[name].name in row.fails]
    assert known
    found = behaviour.observed([name], known)[name]
    assert {key: outcome.saw for key, outcome in found.items() if outcome.ok is not False or outcome.broken} == {}
