"""ELECTRA pretraining by the loop of `distillkit run`: resumable, killed and gone on with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor

from distillkit.api import wrap
from distillkit.models.lvbert.config import LVBertConfig
from distillkit.schema import AdamW, PolySchedule, Train
from distillkit.text.corpus import Corpus, stacked
from distillkit.text.electra import Electra, ElectraAdapter, judge
from distillkit.text.masking import SHARE
from distillkit.training import checkpoint
from distillkit.training.loop import Job, fit


def electra_training(steps: int, samples: int, batch: int, lr: float = 5e-4, **changes: Any) -> Train:
    """A ``train`` block as published for the small size, in whole epochs: as many as come nearest to ``steps``.

    AdamW, decay 0.01, gradients clipped at 1, a hundredth of the steps to warm up, then falling to 0 in a line. In the
    published code Adam's averages are not corrected for their start at 0; that is ``release_adam`` of this.
    """
    epochs = max(1, round(steps / max(1, samples // batch)))
    total = epochs * max(1, samples // batch)
    plain = {
        "epochs": epochs,
        "optimizer": AdamW(kind="adamw", lr=lr, weight_decay=0.01, eps=1e-6),
        "schedule": PolySchedule(kind="poly", power=1.0, warmup=max(1, total // 100) if total > 1 else 0),
        "clip": 1.0,
    }
    return Train(**{**plain, **changes})


@dataclass(frozen=True)
class Pretraining:
    """One pretraining.

    Args:
        config: of the discriminator.
        data, judged: what is learned from, and what is judged on after each epoch that ``train`` says.
        train: as in a recipe, see ``electra_training``.
        batch: samples a process and step; those at the end of an epoch that fill none are left out.
        share, supernet, mask, convention: as in ``Electra``.
        most: batches of ``judged`` that are looked at; None: all.
    """

    config: LVBertConfig
    data: Corpus
    judged: Corpus
    train: Train
    batch: int = 128
    seed: int = 0
    share: float = 1 / 4
    supernet: bool = False
    mask: float = SHARE
    convention: Literal["default", "release"] = "default"
    most: int | None = None
    workers: int = 0
    resume: str = "the same command"
    name: str = "pretraining"


def pretrain(how: Pretraining, folder: str | Path, console: Console | None = None) -> Electra:
    """Pretrain in ``folder``, going on where an earlier call stopped, and return the networks as they ended.

    The folder gets what a job of a run leaves (metrics.jsonl, last.pt, final.safetensors, result.json), and
    ``discriminator``, for ``from_pretrained``, unless it is a supernet's.

    Raises:
        Interrupted: after Ctrl-C; NonFiniteLossError, CheckpointError: as ``fit``.
    """
    folder = Path(folder)
    checkpoint.seed_everything(how.seed)
    electra = build_electra(how)
    if not (folder / "result.json").exists():
        batches = judged_batches(how)
        model = wrap(electra, None, [], adapter=ElectraAdapter())
        job = Job(
            name=how.name,
            folder=folder,
            model=model,
            data=how.data,
            evaluate=lambda student: judge(student, batches),  # type: ignore[arg-type]
            train=how.train,
            seed=how.seed,
            batch=how.batch,
            workers=how.workers,
            score="accuracy",
            resume=how.resume,
            collate=stacked,
            call=lambda ids, _: ((ids,), {}),
            drop_last=True,
        )
        try:
            fit(job, console or Console(quiet=True))
        finally:
            model.unwrap()
    checkpoint.load_into(electra, folder / "final.safetensors")
    if not how.supernet:
        electra.discriminator.save_pretrained(folder / "discriminator")
    return electra


def build_electra(how: Pretraining) -> Electra:
    return Electra(how.config, how.data.vocabulary, how.share, how.supernet, how.mask, convention=how.convention)


def judged_batches(how: Pretraining) -> list[Tensor]:
    """The samples that candidates and epochs are judged on, in batches."""
    count = len(how.judged) if how.most is None else min(len(how.judged), how.most * how.batch)
    items: Sequence[Any] = [how.judged[0, i] for i in range(count)]
    return [stacked(items[i : i + how.batch])[0] for i in range(0, len(items), how.batch)]


def scores_over_steps(folder: str | Path) -> list[dict[str, Any]]:
    """The judgements of a pretraining, by optimizer step."""
    from distillkit.training.metrics import read

    return [row for row in read(Path(folder) / "metrics.jsonl") if row["kind"] == "evaluation"]


def release_adam(train: Train) -> Train:
    """The same training with Adam as published: without the correction for its averages' start at 0."""
    changed = train.optimizer.model_copy(update={"bias_correction": False})
    return train.model_copy(update={"optimizer": changed})
