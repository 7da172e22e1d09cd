"""distillkit bench: what it refuses, what fails it, that a report is made of its JSON alone; cheap suites, run."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from distillkit import cli
from distillkit.bench import command, contenders, invariance, kernels, peers, report, syncs, timing
from distillkit.bench.peers import Peer
from distillkit.bench.suite import SUITES, Check, Result, Table

GOOD = Check("syncs, a count", True, "0; 0")
BAD = Check("syncs, another count", False, "3; 0")


def call(*words: str):
    return CliRunner().invoke(cli.app, ["bench", *words])


@pytest.fixture
def fake(monkeypatch):
    """Every suite has one table, and the checks that are given to this; what each was called with."""
    calls, checks = [], []

    def run(quick, rounds, tell):
        calls.append((quick, rounds))
        tell("something", 1, 2)
        return Result("What?", [Table("A table", ["a | b", "n"], [["x", "1"]], "A note.")], list(checks), {"n": 1})

    monkeypatch.setattr(command, "suite", lambda name: run)
    return SimpleNamespace(calls=calls, checks=checks)


# ---- the call


def test_an_unknown_suite_is_an_error_that_names_those_there_are(fake):
    done = call("step", "speed")
    assert done.exit_code == 2
    assert f"no suite 'speed'; there are: {', '.join(SUITES)}" in done.output
    assert not fake.calls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "1"], "--rounds: at least 2"),
        (["--write", "{}/there.md"], "there.md: the tables would stand between"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(fake, tmp_path, words, said):
    (tmp_path / "there.md").write_text("# A file without a place\n")
    done = call(*(word.format(tmp_path) for word in words))
    assert done.exit_code == 2
    assert said in done.output
    assert not fake.calls


def test_a_check_that_fails_is_said_and_is_exit_code_1(fake, tmp_path):
    fake.checks += [GOOD, BAD]
    done = call("syncs", "--json", str(tmp_path / "a.json"))
    assert done.exit_code == 1
    assert "failed: syncs, another count: 3; 0" in done.output
    assert "failed: syncs, a count" not in done.output
    assert (tmp_path / "a.json").exists(), "numbers are kept all the same"
    fake.checks.remove(BAD)
    assert call("syncs").exit_code == 0


def test_suites_run_in_their_order_as_often_as_is_said(fake):
    threads = torch.get_num_threads()
    done = call("syncs", "step", "--quick")
    assert done.exit_code == 0
    assert fake.calls == [(True, 5)] * 2
    assert done.output.index("## step") < done.output.index("## syncs")
    fake.calls.clear()
    assert call("--rounds", "3").exit_code == 0
    assert fake.calls == [(False, 3)] * len(SUITES)
    assert torch.get_num_threads() == threads


def test_an_interruption_writes_nothing_and_is_exit_code_130(monkeypatch, tmp_path):
    def interrupted(quick, rounds, tell):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "suite", lambda name: interrupted)
    done = call("step", "--json", str(tmp_path / "a.json"), "--write", str(tmp_path / "a.md"))
    assert done.exit_code == 130
    assert not list(tmp_path.iterdir())


def test_help_has_examples():
    assert "distillkit bench --quick" in call("--help").output


def test_every_suite_is_there():
    for name in SUITES:
        assert callable(command.suite(name)), name


# ---- the report


def test_the_tables_are_made_of_the_json_alone(fake, tmp_path):
    fake.checks += [GOOD]
    path = tmp_path / "a.json"
    done = call("step", "kernels", "--json", str(path), "--rounds", "7")
    kept = json.loads(path.read_text())
    text = report.markdown(kept)
    assert text.strip() in done.output
    for part in (
        "`distillkit bench step kernels --rounds 7`",
        kept["date"],
        kept["machine"],
        "A note.",
        "| a \\| b | n |",
    ):
        assert part in text
    assert kept["suites"]["step"]["data"] == {"n": 1}
    assert kept["versions"]["torch"] == torch.__version__
    assert kept["rounds"] == 7
    kept["suites"]["step"]["tables"][0]["rows"][0][1] = "42"
    assert "| x | 42 |" in report.markdown(kept)


def test_only_what_is_between_the_marks_is_written(fake, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Mine\n\n{report.BEGIN}\nold\n{report.END}\n\nMy last words.\n")
    call("step", "--write", str(path))
    text = path.read_text()
    assert text.startswith(f"# Mine\n\n{report.BEGIN}\n\n`distillkit bench step`")
    assert text.endswith(f"{report.END}\n\nMy last words.\n")
    assert "old" not in text
    new = tmp_path / "deeper" / "new.md"
    call("step", "--write", str(new))
    assert new.read_text().startswith(report.BEGIN)


def test_columns_of_numbers_are_on_the_right_and_text_is_not():
    rows = [["1", "+2.5 ± 1", "yes", "absent"], ["2", "", "**no**", "absent"], ["3", "absent: pip", "-", "absent"]]
    text = report.table(["a", "b", "c", "d"], rows)
    assert text.splitlines()[1] == "|---|---:|---|---|"


def test_a_cell_begins_no_tag_and_a_long_table_is_folded():
    assert "| got \\<class 'int'> |" in report.table(["a"], [["got <class 'int'>"]])
    suite = asdict(Result("What?", [Table("Long", ["a"], [["1"]], "A note.", folded=True)]))
    about = {"command": "", "date": "", "machine": "", "threads": 1, "versions": {}, "peers": []}
    shown = report.markdown({**about, "suites": {"step": suite}})
    assert "<details><summary>Long</summary>\n\nA note.\n\n| a |\n|---|\n| 1 |\n\n</details>" in shown
    assert "### Long" not in shown


def test_a_peer_that_is_absent_is_named_with_how_to_get_it(monkeypatch, fake):
    nobody = Peer("nobody", "no_such_module", "no-such-package", "pip install nobody")
    assert nobody.version is None
    assert nobody.label == "nobody"
    entries = {"ideal": contenders.LOGITS["ideal"], "nobody": contenders.Entry(contenders.torchdistill, nobody)}
    there, missing = contenders.made(entries, contenders.pair_of_small())
    assert list(there) == ["ideal"]
    assert missing == {"nobody": "absent: pip install nobody"}
    monkeypatch.setattr(command, "PEERS", (nobody,))
    assert "nobody (absent: pip install nobody)" in call("step").output


def test_a_peer_that_fails_is_named_with_its_error_and_ours_is_an_error():
    def broken(pair):
        raise RuntimeError("no longer")

    there = Peer("torch", "torch", "torch", "pip install torch")
    _, missing = contenders.made({"torch": contenders.Entry(broken, there)}, contenders.pair_of_small())
    assert missing == {there.label: "fails: RuntimeError: no longer"}
    with pytest.raises(RuntimeError, match="no longer"):
        contenders.made({"distillkit": contenders.Entry(broken)}, contenders.pair_of_small())


# ---- the gate


def test_a_budget_holds_with_three_times_the_noise_and_no_more():
    again = [0.98, 1.0, 1.0, 1.01, 1.02, 1.0, 0.99, 1.0]
    assert timing.quartiles(again) == (1.0, 1.0)
    noisy = [0.9, 0.9, 0.9, 1.0, 1.0, 1.1, 1.1, 1.1]
    assert timing.spread(noisy, 1.0) == pytest.approx(0.1)
    assert timing.within("x", [1.3, 1.34, 9.0], 1.05, noisy, 1.0, "{:.2f}").ok
    wrong = timing.within("x", [1.3, 1.36, 9.0], 1.05, noisy, 1.0, "{:.2f}")
    assert not wrong.ok
    assert wrong.said == "1.36; at most 1.05 and 3 x 0.10 of noise"


def test_contenders_take_turns_and_are_called_as_often_as_is_said():
    calls = []
    seconds = timing.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, times=2)
    assert {name: len(took) for name, took in seconds.items()} == {"a": 3, "b": 3}
    assert calls.count("a") == calls.count("b") == 2 * 2 * (3 + 1)
    assert calls[:8] == calls[:8][::-1], "an order, and the same backwards"


# ---- contenders


@pytest.mark.parametrize("table", ["LOGITS", "FOUR_LAYERS"])
def test_all_contenders_compute_the_same_loss_on_the_same_weights(table):
    pair = contenders.pair_of_resnets(2, 32)
    there, missing = contenders.made(getattr(contenders, table), pair)
    assert len(there) + len(missing) == len(getattr(contenders, table))
    weight = pair.student.get_submodule("conv1").weight
    for name, contender in there.items():
        assert any(p is weight for p in contender.student.parameters()), name
    losses = {name: contender.loss().item() for name, contender in there.items()}
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["ideal"], rel=1e-4), name


# ---- suites


def test_repeated_pictures_change_no_loss_and_a_sum_is_found_out():
    found = invariance.of_copies(invariance.CASES["GFL"])
    assert len(found) == 7
    for name, values in found.items():
        assert len(values) == 4
        assert invariance.equal(name, values).ok, name
    assert not invariance.equal("a sum", [1.0, 2.0, 4.0, 8.0]).ok
    assert not invariance.equal("NaN, which max() passes over", [1.0, 1.0, float("nan"), 1.0]).ok
    assert invariance.shown([0.5, 1.0, 2.0, 4.0])[1:] == ["2.000000", "4.000000", "8.000000", "7e+00"]


def test_ours_holds_nothing_and_stops_at_the_last_layer_that_is_read():
    pair = contenders.pair_of_resnets(2, 32)
    there, _ = contenders.made({"distillkit": contenders.FOUR_LAYERS["distillkit"]}, pair)
    counted = syncs.counts(there["distillkit"], syncs.leaves(pair.teacher), pair.student, compiled=False)
    assert (counted.syncs, counted.held, counted.held_after_error) == (0, 0, 0)
    assert counted.of - counted.ran == syncs.HEAD_OF_RESNET
    by_hand = contenders.ideal_layers(pair)
    by_hand.step()
    assert syncs.held(by_hand, lambda: syncs.failing(by_hand)) > 0, "hooks by hand keep what they caught: it is seen"


def test_a_step_that_was_to_fail_and_does_not_is_an_error(monkeypatch):
    pair = contenders.pair_of_small()
    monkeypatch.setattr(syncs, "last_run", lambda contender, modules: nn.Linear(1, 1))
    with pytest.raises(AssertionError, match="did not come through"):
        syncs.failing(contenders.ideal(pair))


def test_forms_of_a_kernel_agree_and_one_that_differs_is_seen():
    x = torch.rand(100)
    rows = kernels.timed({"usual": x.clone, "same": lambda: x * 1, "other": lambda: x + 0.1}, 2)
    assert rows["same"]["difference"] == 0
    assert rows["other"]["difference"] > 0.05
    assert rows["usual"]["ratio"] == 1


def test_a_result_is_what_json_knows():
    result = Result("a", [Table("t", ["h"], [["c"]])], [BAD], {"x": [1.0]})
    assert json.loads(json.dumps(asdict(result)))["checks"][0] == {"name": BAD.name, "ok": False, "said": BAD.said}


@pytest.mark.integration
def test_the_quick_selection_passes(tmp_path):
    """All counted checks, of all suites but the trainings; what is timed is not the matter here."""
    done = call("invariance", "syncs", "--quick", "--json", str(tmp_path / "a.json"))
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "a.json").read_text())
    assert {peer["name"] for peer in kept["peers"]} == {peer.name for peer in peers.PEERS}
