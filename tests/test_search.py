"""Evolution: what it keeps and what it never does; budgets; the log, killed anywhere; workers that change nothing."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from distillkit.bench.ranks import on_two_ranks
from distillkit.search import Budget, Evolution, InProcess, OverProcesses, OverRay, SearchError, evolve
from distillkit.search.budgets import Latency, multiply_adds, parameters
from distillkit.search.engine import tournament
from distillkit.search.log import read
from distillkit.search.plots import plot_fitness, plot_front
from tests.orders import FEW, SMALL, Orders, fitness, of_a

# -- evolution --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_best_of_n_wins_a_tournament_as_often_as_it_is_drawn(size):
    rng, n, rounds = random.Random(0), 10, 4000
    wins = sum(tournament(range(n), size, rng, lambda x: x) == n - 1 for _ in range(rounds))
    expected = 1 - (1 - 1 / n) ** size
    assert abs(wins / rounds - expected) < 4 * math.sqrt(expected * (1 - expected) / rounds)


def test_no_genome_is_evaluated_twice_and_none_outside_of_the_budgets():
    evaluated = []
    found = evolve(Orders(), lambda g: evaluated.append(g) or fitness(g), SMALL, [FEW])
    assert len(evaluated) == len(set(evaluated)) == len(found.candidates) == 12 * 7
    assert all(of_a(g) <= 4 for g in evaluated)
    assert [c.genome for c in found.candidates] == evaluated
    assert all(c.costs == {"a": of_a(c.genome)} and c.scores["right"] == int(c.fitness) for c in found.candidates)


def test_the_population_is_the_fittest_of_all_that_were_evaluated():
    found = evolve(Orders(), fitness, SMALL, [FEW])
    ranked = sorted(found.candidates, key=lambda c: (-c.fitness, c.index))
    assert found.population == ranked[:12]
    assert found.best == ranked[0]
    best = [g["fitness"] for g in found.generations]
    assert best == sorted(best)
    assert found.best.fitness > found.generations[0]["fitness"]


def test_parents_are_earlier_candidates_and_children_come_of_them():
    found = evolve(Orders(), fitness, SMALL)
    for c in found.candidates:
        parents = [found.candidates[i] for i in c.parents]
        assert all(p.generation < c.generation for p in parents)
        if c.origin == "mutation":
            assert sum(x != y for x, y in zip(c.genome, parents[0].genome)) == 1
        if c.origin == "crossover":
            assert all(x in pair for x, *pair in zip(c.genome, *(p.genome for p in parents)))
    assert {c.origin for c in found.candidates} >= {"random", "mutation", "crossover"}


def test_what_is_drawn_is_a_function_of_the_seed():
    one, again = (evolve(Orders(), fitness, SMALL) for _ in range(2))
    assert one == again
    other = evolve(Orders(), fitness, Evolution(12, 6, 3, seed=4))
    assert [c.genome for c in one.candidates] != [c.genome for c in other.candidates]


def test_the_front_is_what_none_beats():
    found = evolve(Orders(), fitness, SMALL, [Budget("a", of_a)])

    def beaten(c):
        return any(
            (d.costs["a"] <= c.costs["a"] and d.fitness > c.fitness)
            or (d.costs["a"] < c.costs["a"] and d.fitness >= c.fitness)
            for d in found.candidates
        )

    front = found.front("a")
    assert {(c.costs["a"], c.fitness) for c in front} == {
        (c.costs["a"], c.fitness) for c in found.candidates if not beaten(c)
    }
    assert [c.costs["a"] for c in front] == sorted({c.costs["a"] for c in front})


def test_a_search_begins_with_what_it_is_given():
    found = evolve(Orders(), fitness, SMALL, start=["abcabcabcabc", "a" * 12])
    assert [(c.genome, c.origin) for c in found.candidates[:2]] == [("abcabcabcabc", "start"), ("a" * 12, "start")]
    assert found.best.index == 0


class Few:
    """Three genomes in all, nested tuples."""

    def random(self, rng):
        return ((rng.randrange(3),), "x")

    def mutate(self, genome, rng):
        return self.random(rng)

    def crossover(self, a, b, rng):
        return a

    def check(self, genome):
        assert len(genome) == 2


def test_a_space_that_has_no_more_ends_the_search(tmp_path):
    log = tmp_path / "log"
    found = evolve(Few(), lambda g: g[0][0], Evolution(5, 9), log=log)
    assert sorted(c.genome for c in found.candidates) == [((i,), "x") for i in range(3)]
    assert found.best.genome == ((2,), "x")
    assert evolve(Few(), None, Evolution(5, 9), log=log) == found  # tuples come back from the log


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_budget_that_nothing_keeps_to_says_how_far_off_it_is():
    with pytest.raises(
        SearchError, match=r"none of 200 random genomes .* nearest has weight (\d+), expected at most 3"
    ):
        evolve(Orders(), fitness, SMALL, [Budget("weight", lambda g: 10 + of_a(g), most=3)])


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (["a" * 12], r"start: 'aaaaaaaaaaaa' is outside of the budgets: a 12, expected at most 4"),
        (["b" * 12, "b" * 12], "is given twice"),
        (["abd"], r"start: 'abd' is no genome of Orders: expected 12"),
    ],
)
def test_a_start_that_cannot_be(start, what):
    with pytest.raises(SearchError, match=what):
        evolve(Orders(), fitness, SMALL, [FEW], start=start)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (float("nan"), "fitness is nan; expected a finite number"),
        ({"top1": 1.0}, "a mapping with 'fitness', got"),
        ("good", "expected numbers"),
    ],
)
def test_a_fitness_that_is_none_names_the_genome(value, what):
    with pytest.raises(SearchError, match=rf"fitness of '[abc]{{12}}': .*{what}"):
        evolve(Orders(), lambda g: value, SMALL)


def test_operators_that_make_what_the_space_refuses():
    class Careless(Orders):
        def mutate(self, genome, rng):
            return genome[1:]

    with pytest.raises(SearchError, match=r"mutation: '[abc]{11}' is no genome of Careless"):
        evolve(Careless(), fitness, Evolution(4, 3, crossover=0.0))


@pytest.mark.parametrize("wrong", [{"population": 0}, {"tournament": 0}, {"crossover": 1.5}, {"generations": -1}])
def test_numbers_that_make_no_search(wrong):
    with pytest.raises(SearchError, match="must be"):
        Evolution(**wrong)


# -- the log ----------------------------------------------------------------------------------------------------------


def test_every_candidate_has_its_line(tmp_path):
    found = evolve(Orders(), fitness, SMALL, [FEW], log=tmp_path / "log.jsonl")
    lines = read(tmp_path / "log.jsonl")
    assert lines[0]["kind"] == "search"
    assert lines[0]["budgets"] == {"a": [None, 4]}
    candidates = [line for line in lines if line["kind"] == "candidate"]
    assert [(c["genome"], c["fitness"]) for c in candidates] == [(c.genome, c.fitness) for c in found.candidates]
    costs = [line for line in lines if line["kind"] == "costs"]
    assert len({line["genome"] for line in costs}) == len(costs)
    assert any(not line["within"] for line in costs)
    assert [line["generation"] for line in lines if line["kind"] == "generation"] == list(range(7))


def test_a_log_cut_at_any_byte_grows_again_to_the_same(tmp_path):
    log = tmp_path / "log.jsonl"
    whole_search = evolve(Orders(), fitness, SMALL, [FEW], log=log)
    whole, rng = log.read_bytes(), random.Random(0)
    for cut in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(12))]:
        log.write_bytes(whole[:cut])
        left = whole[:cut].count(b'"kind": "candidate"') - (not whole[:cut].endswith(b"\n") and _torn(whole[:cut]))
        evaluated = []
        found = evolve(Orders(), lambda g, seen=evaluated: seen.append(g) or fitness(g), SMALL, [FEW], log=log)
        assert found == whole_search
        assert log.read_bytes() == whole
        assert len(evaluated) == len(found.candidates) - left


def _torn(text):
    return b'"kind": "candidate"' in text.rpartition(b"\n")[2]


def test_measured_costs_are_not_measured_again(tmp_path):
    log, rng = tmp_path / "log.jsonl", random.Random(1)
    whole = evolve(Orders(), fitness, SMALL, [Budget("seconds", lambda g: rng.random(), most=0.7)], log=log)
    text = log.read_bytes()
    log.write_bytes(text[: len(text) * 2 // 3])
    known = {line["genome"] for line in read(log) if line["kind"] == "costs"}
    measured = []
    evolve(Orders(), fitness, SMALL, [Budget("seconds", lambda g: measured.append(g) or 0.5, most=0.7)], log=log)
    assert known
    assert not known & set(measured)
    assert read(log)[: len(known)] == [json.loads(line) for line in text.splitlines()[: len(known)]]
    assert whole.candidates[0].costs["seconds"] <= 0.7


def test_more_generations_may_be_asked_for_later(tmp_path):
    straight = evolve(Orders(), fitness, SMALL, log=tmp_path / "straight")
    evolve(Orders(), fitness, Evolution(12, 2, 3, seed=3), log=tmp_path / "later")
    assert evolve(Orders(), fitness, SMALL, log=tmp_path / "later") == straight
    assert (tmp_path / "later").read_bytes() == (tmp_path / "straight").read_bytes()


def test_a_log_of_another_search_is_named_with_its_line(tmp_path):
    log = tmp_path / "log"
    evolve(Orders(), fitness, SMALL, log=log)
    with pytest.raises(SearchError, match=rf"{log}:1: another search wrote this log: it has .*\"seed\": 3"):
        evolve(Orders(), fitness, Evolution(12, 6, 3, seed=5), log=log)
    log.write_text('{"kind": "search"}\nnot json\n')
    with pytest.raises(SearchError, match=rf"{log}:2: not JSON"):
        evolve(Orders(), fitness, SMALL, log=log)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from distillkit.search import evolve
from tests.orders import FEW, SMALL, Orders, fitness

def slow(genome):
    time.sleep(0.005)
    return fitness(genome)

print("begins", flush=True)
print(evolve(Orders(), slow, SMALL, [FEW], log={log!r}).best.genome)
"""


def test_a_search_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    straight = evolve(Orders(), fitness, SMALL, [FEW], log=tmp_path / "straight")
    log, rng = tmp_path / "killed", random.Random(time.time_ns())
    script = KILLED.format(tests=str(Path(__file__).parents[1]), log=str(log))
    killed = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        time.sleep(rng.uniform(0.01, 0.35))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        process.stdout.close()
    assert killed
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == straight.best.genome
    assert log.read_bytes() == (tmp_path / "straight").read_bytes()


# -- workers ----------------------------------------------------------------------------------------------------------


def _on_a_rank(rank, folder):
    os.environ.update(ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    evaluated = []
    found = evolve(
        Orders(),
        lambda g: evaluated.append(g) or fitness(g),
        SMALL,
        [FEW],
        log=f"{folder}/log" if rank == 0 else None,
        evaluator=OverProcesses(),
    )
    genomes, fitnesses = [c.genome for c in found.candidates], [c.fitness for c in found.candidates]
    return [genomes, fitnesses, len(evaluated), _failing_on_a_rank(rank)]


def _failing_on_a_rank(rank):
    def fails(genome):
        if rank == 1:
            raise RuntimeError("out of memory")
        return 1.0

    try:
        evolve(Orders(), fails, SMALL, evaluator=OverProcesses())
    except SearchError as error:
        return str(error)
    return ""


def test_two_processes_find_what_one_finds_share_the_work_and_hear_of_errors(tmp_path):
    one = evolve(Orders(), fitness, SMALL, [FEW], log=tmp_path / "one")
    first, second = on_two_ranks(_on_a_rank, str(tmp_path))
    assert first[0] == second[0] == [c.genome for c in one.candidates]
    assert first[1] == second[1] == [c.fitness for c in one.candidates]
    assert first[2] == second[2] == len(one.candidates) / 2
    assert (tmp_path / "log").read_bytes() == (tmp_path / "one").read_bytes()
    assert "failed: RuntimeError: out of memory" in first[3]
    assert "ended in its leading process" in second[3]


@pytest.mark.integration
def test_a_ray_cluster_finds_what_one_process_finds(tmp_path):
    ray = pytest.importorskip("ray")
    try:
        found = evolve(Orders(), fitness, SMALL, [FEW], log=tmp_path / "ray", evaluator=OverRay(workers=2))
        with pytest.raises(SearchError, match=r"fitness of '[abc]+' failed: .*of no use"):
            evolve(Orders(), _of_no_use, SMALL, evaluator=OverRay(workers=2))
    finally:
        ray.shutdown()
    assert found == evolve(Orders(), fitness, SMALL, [FEW], log=tmp_path / "one", evaluator=InProcess())
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "one").read_bytes()


def _of_no_use(genome):
    raise RuntimeError("of no use")


def test_without_ray_its_evaluator_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SearchError, match=r'pip install "distillkit\[ray\]"'):
        OverRay()


# -- costs, pictures --------------------------------------------------------------------------------------------------


def test_costs_of_a_model_are_those_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.Flatten())
    model.append(nn.Linear(8 * 5 * 4, 7))
    assert parameters(model) == (27 * 8 + 8) + 16 + (25 * 8 + 8) + (160 * 7 + 7)
    assert multiply_adds(model, torch.zeros(4, 3, 9, 8)) == (27 * 8 + 25 * 8) * 20 + 160 * 7
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_latency_runs_the_model_as_often_as_it_says():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            assert not self.training
            Counting.calls += 1
            return x

    assert Latency(lambda genome: Counting(), (torch.zeros(1),), repeats=5, warmup=2)("a") >= 0
    assert Counting.calls == 7


def test_pictures_and_progress_of_a_search(tmp_path):
    seen = []
    found = evolve(Orders(), fitness, SMALL, [FEW], progress=lambda *at: seen.append(at))
    plot_fitness(found, tmp_path / "fitness.png")
    plot_front(found, "a", tmp_path / "more" / "front.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.rglob("*.png"))
    assert [done for done, *_ in seen] == list(range(1, 85))
    assert {total for _, total, *_ in seen} == {84}


def test_the_engine_needs_no_torch():
    code = "import sys, distillkit.search.engine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
