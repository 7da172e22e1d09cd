"""LV-BERT on WikiText-2: a search over orders of layers, what its winner is worth, and what distillation adds.

    DISTILLKIT_DATA=/data python -m benchmarks.lv_bert --write benchmarks/results/lv_bert.md

A supernet is pretrained, evolution finds an order, and that order, the interleaved and the published one, all within a
hundredth of the same parameters, are pretrained for as many steps from each seed. Then the found one is taught
Banking77 and polarity, and teaches a student of a quarter of its depth. All goes on where it was stopped. ``--quick``
does a step or two of everything, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import heading, write
from distillkit.bench.report import table
from distillkit.models.lvbert import SEARCHED, LVBertConfig, encoder_parameters, interleaved
from distillkit.recipe import load
from distillkit.search import Evolution
from distillkit.text.corpus import Corpus, lines_of, write_tokens
from distillkit.text.electra import judge
from distillkit.text.pretrain import (
    Pretraining,
    build_electra,
    electra_training,
    judged_batches,
    pretrain,
    scores_over_steps,
)
from distillkit.text.search import InheritedAccuracy, search_orders, with_order
from distillkit.text.vocabulary import Vocabulary, learn_vocabulary
from distillkit.training import checkpoint
from distillkit.training.run import run

PIECES, LENGTH, BATCH, RATE = 4000, 64, 32, 2e-3
SIZES = {"hidden_size": 64, "embedding_size": 64, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
ORDERS = ("found", "interleaved", "published")
TASKS = ("banking77", "polarity")
SAME = 0.01  # parameters of all orders are within this share of those of the published one
STUDENT = (0, 1, 2, 0, 2, 1)


class Study:
    """Where everything is, and how much of it is done."""

    def __init__(self, folder: Path, quick: bool, seeds: int):
        self.folder, self.quick, self.seeds = folder, quick, 1 if quick else seeds
        self.data = Path(os.environ["DISTILLKIT_DATA"]) / "text_mini"
        self.steps = (8, 4) if quick else (1240, 828)  # of the supernet, of each order
        self.evolution = Evolution(4, 1, 2) if quick else Evolution(population=32, generations=10, tournament=4)
        self.batch = 4 if quick else BATCH
        self.epochs = (1, 1) if quick else (4, 5)  # of the teacher, of a student

    def prepared(self) -> tuple[Vocabulary, Corpus, Corpus]:
        """WikiText-2 without its <unk>, which stands for rare words."""
        file = self.folder / "vocab.txt"
        for split in ("train", "val"):
            text = self.folder / f"{split}.txt"
            if not text.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                lines = (line.replace("<unk>", "") for line in lines_of(self.data / "wikitext2" / f"{split}.txt"))
                checkpoint.write_text(text, "\n".join(lines) + "\n")
        if not file.exists():
            pieces = learn_vocabulary(lines_of(self.folder / "train.txt"), PIECES).pieces
            checkpoint.write_text(file, "".join(f"{piece}\n" for piece in pieces))
        vocabulary = Vocabulary.read(file)
        sets = []
        for split in ("train", "val"):
            index = write_tokens([self.folder / f"{split}.txt"], vocabulary, self.folder / "tokens" / split)
            sets.append(Corpus(index, vocabulary, LENGTH, shift=split == "train"))
        return vocabulary, *sets  # type: ignore[return-value]

    def how(self, order: Sequence[int], steps: int, seed: int = 0, supernet: bool = False) -> Pretraining:
        vocabulary, train, val = self.prepared()
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # so few steps leave nothing to fit
        config = LVBertConfig(vocab_size=len(vocabulary), layer_order=order, **SIZES, **quiet)
        plan = electra_training(steps, len(train), self.batch, RATE, threads=torch.get_num_threads(), save_every=100)
        if self.quick:
            few = Corpus(self.folder / "tokens" / "val" / "index.json", vocabulary, LENGTH)
            few.starts[-1] = (steps * self.batch + 1) * (LENGTH - 2)
            train, plan = few, electra_training(steps, len(few), self.batch, RATE)
        return Pretraining(
            config,
            train,
            val,
            plan,
            batch=self.batch,
            seed=seed,
            share=0.5,
            supernet=supernet,
            most=8 if not self.quick else 1,
        )

    def order(self, name: str) -> tuple[int, ...]:
        if name == "found":
            return tuple(json.loads((self.folder / "found.json").read_text())["order"])
        return interleaved(24) if name == "interleaved" else SEARCHED

    # ---- the parts

    def search(self) -> None:
        """Pretrain the supernet, evolve orders."""
        if (self.folder / "found.json").exists():
            return
        how = self.how(interleaved(24), self.steps[0], supernet=True)
        began = time.monotonic()
        supernet = pretrain(how, self.folder / "supernet", Console())
        trained = time.monotonic() - began
        batches, size = judged_batches(how), encoder_parameters(how.config, SEARCHED)
        limits = {"most": size * (1 + SAME), "least": size * (1 - SAME)}
        fitness = InheritedAccuracy(supernet, batches)
        found = search_orders(supernet, batches, self.evolution, log=self.folder / "orders.jsonl", **limits)
        checkpoint.write_json(
            self.folder / "found.json",
            {
                "order": list(found.best.genome),
                "fitness": found.best.fitness,
                "inherited": {name: fitness(self.order(name))["fitness"] for name in ("published", "interleaved")},
                "candidates": len(found.candidates),
                "supernet seconds": trained,
                "search seconds": time.monotonic() - began - trained,
                "cost": candidate_cost(supernet, how, batches[:2], 3 if self.quick else 15),
            },
        )

    def one_order(self, name: str, seed: int) -> None:
        torch.set_num_threads(1)
        pretrain(self.how(self.order(name), self.steps[1], seed), self.folder / f"{name}-{seed}")

    def one_task(self, task: str, seed: int) -> None:
        file = self.folder / f"{task}.yaml"
        if not file.exists():
            checkpoint.write_text(file, self.recipe(task))
        teacher = self.folder / f"found-{seed}" / "discriminator"
        recipe = load(file, [f"seed={seed}", f"name={task}-{seed}", f"teacher.pretrained={teacher}"])
        run(recipe, console=Console(quiet=True))

    def recipe(self, task: str) -> str:
        teacher, student = self.epochs
        folder, split = self.data / task, "val" if self.quick else "train"
        labels = f"{folder}/labels.txt" if task == "banking77" else '["0", "1"]'
        order, layers = self.order("found"), list(STUDENT)
        looking = [i for i, kind in enumerate(order) if kind == 1][-1:]  # its last attention layer
        attention = "" if not looking else (
            f"\n  - {{kind: attention-maps, student_at: 'lvbert.layers.5.attention[1]', "
            f"teacher_at: 'lvbert.layers.{looking[0]}.attention[1]'}}"
        )  # fmt: skip
        sizes = {"vocab_size": PIECES, **SIZES, "layer_order": layers, "attn_implementation": "eager"}
        return f"""task: text
output: {self.folder}/tasks
data: {{kind: tsv, train: {folder}/{split}.tsv, val: {folder}/val.tsv, test: {folder}/test.tsv, labels: {labels},
  vocabulary: {self.folder}/vocab.txt, length: {LENGTH}, batch: 32}}
teacher:
  kind: transformers
  pretrained: to be given
  options: {{attn_implementation: eager, hidden_dropout_prob: 0.1}}
  train: {{epochs: {teacher}, optimizer: {{kind: adamw, lr: 1e-3, weight_decay: 0.01, layer_decay: 0.9}}}}
student: {{kind: transformers, model_type: lvbert, options: {json.dumps(sizes)}}}
distillers:
  - {{kind: logit-kd, temperature: 4, weight: 1}}
  - kind: hidden-states
    student_at: [lvbert.layers.2, lvbert.layers.5]
    teacher_at: [lvbert.layers.11, lvbert.layers.23]{attention}
train:
  epochs: {student}
  optimizer: {{kind: adamw, lr: 1e-3, weight_decay: 0.01}}
  schedule: {{kind: poly, power: 1.0, warmup: {2 if self.quick else 100}}}
  clip: 1
  evaluate_every: 100
  threads: 1
evaluate: {{split: test}}
compare: [student, distilled]
"""

    def rows(self) -> list[dict[str, Any]]:
        """All that was measured, one row a training."""
        rows: list[dict[str, Any]] = [{"part": "search", **json.loads((self.folder / "found.json").read_text())}]
        for name in ORDERS:
            for seed in range(self.seeds):
                for scores in scores_over_steps(self.folder / f"{name}-{seed}"):
                    rows.append({"part": "pretraining", "order": name, "seed": seed, **scores})
        for task in TASKS:
            for seed in range(self.seeds):
                found = json.loads((self.folder / "tasks" / f"{task}-{seed}" / "table.json").read_text())
                rows += [{"part": "task", "task": task, "seed": seed, **row} for row in found]
        return rows


@torch.no_grad()
def candidate_cost(supernet: Any, how: Pretraining, batches: Sequence[torch.Tensor], times: int = 15) -> float:
    """CPU seconds to judge a candidate by inherited weights over those of its own network, the least of each."""
    alone = build_electra(Pretraining(**{**vars(how), "config": with_order(how.config, SEARCHED), "supernet": False}))
    alone.eval(), supernet.eval()
    taken: dict[bool, list[float]] = {True: [], False: []}
    for i in range(times):
        for net in (alone, supernet) if i % 2 else (supernet, alone):
            began = time.process_time()
            if net is supernet:
                net.choose(SEARCHED)
            judge(net, batches)
            taken[net is supernet].append(time.process_time() - began)
    return min(taken[True]) / min(taken[False])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lv_bert"), help="everything but the tables")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, of a thread each")
    parser.add_argument("--quick", action="store_true", help="a step of everything")
    parser.add_argument("--write", type=Path, help="write the table to this file, and its rows to .jsonl beside it")
    parser.add_argument("--only", nargs=3, metavar=("PART", "NAME", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    study = Study(
        args.output.with_name(args.output.name + "-quick") if args.quick else args.output, args.quick, args.seeds
    )
    if args.only:
        part, name, seed = args.only
        (study.one_order if part == "order" else study.one_task)(name, int(seed))
        return
    began = time.monotonic()
    torch.set_num_threads(args.jobs)
    study.search()
    print(f"search: {time.monotonic() - began:.0f} s", flush=True)
    for part, names in (("order", ORDERS), ("task", TASKS)):
        together(args, part, [(name, seed) for seed in range(study.seeds) for name in names])
        print(f"{part}s: {time.monotonic() - began:.0f} s", flush=True)
    report(study, args)


def together(args: argparse.Namespace, part: str, what: Sequence[tuple[str, int]]) -> None:
    """Each in a process of its own, ``jobs`` at a time; those that are done end at once."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    again = ["--output", str(args.output), *(["--quick"] if args.quick else [])]

    def one(job: tuple[str, int]) -> None:
        command = [sys.executable, "-m", "benchmarks.lv_bert", *again, "--only", part, job[0], str(job[1])]
        subprocess.run(command, env=env, check=True)
        print(f"{part} {job[0]}, seed {job[1]}: done", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, what))


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation, in per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.2f} ± {100 * deviation:.2f}"


def report(study: Study, args: argparse.Namespace) -> None:
    rows = study.rows()
    search, trained = rows[0], [row for row in rows if row["part"] == "pretraining"]
    sizes = {name: encoder_parameters(study.how(study.order(name), 1).config) for name in ORDERS}
    steps = sorted({row["step"] for row in trained})
    curves = []
    for name in ORDERS:
        for key in ("rtd_accuracy", "mlm_accuracy", "rtd"):
            at = [[row[key] for row in trained if row["order"] == name and row["step"] == step] for step in steps]
            cells = [cell(values) if key != "rtd" else f"{sum(values) / len(values):.3f}" for values in at]
            curves.append([name, f"{sizes[name]:,}", key, *cells])
    tasks = []
    for task in TASKS:
        of = [row for row in rows if row["part"] == "task" and row["task"] == task]
        for name in dict.fromkeys(row["row"] for row in of):
            mine = [row for row in of if row["row"] == name]
            tasks.append([task, name, f"{mine[0]['parameters'] / 1e6:.2f} M", cell([row["accuracy"] for row in mine])])
    command = f"python -m benchmarks.lv_bert --seeds {args.seeds}"
    inherited = ", ".join(f"{name} {value:.4f}" for name, value in search["inherited"].items())
    text = [
        heading("LV-BERT: orders of layers, found and given", command, seed=", ".join(map(str, range(study.seeds)))),
        f"WikiText-2 without its `<unk>` ({LENGTH} tokens a sample, {BATCH} samples a step, {PIECES} pieces), 24 "
        f"layers of width {SIZES['hidden_size']}, generator of half the width; parameters within {SAME:.0%} of the "
        f"published order's. Supernet: {search['supernet seconds']:.0f} s; {search['candidates']} candidates in "
        f"{search['search seconds']:.0f} s, each at {search['cost']:.3f} of the time of its own network's forward "
        f"pass. Inherited accuracy: found {search['fitness']:.4f}, {inherited}. Found: `{search['order']}`.",
        "## Pretraining, by optimizer step, on held-out text",
        table(["order", "parameters", "", *map(str, steps)], curves),
        "## Tasks, test accuracy",
        "The teacher is the found order, pretrained; the student has six layers and random weights.",
        table(["task", "row", "parameters", "accuracy"], tasks),
    ]
    write("\n\n".join(text), args.write)
    if args.write:
        checkpoint.write_text(args.write.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
