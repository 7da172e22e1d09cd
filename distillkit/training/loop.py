"""The loop of one job, on Hugging Face Accelerate.

A job stopped anywhere, by ``kill -9`` too, and started again ends with the same weights, bit for bit, and the same rows
in metrics.jsonl, as if it had not been stopped (on the CPU, with the same number of threads). Three things make it so:
order and augmentation of the samples depend on (seed, epoch, index) alone; a checkpoint holds all else that a step
reads, the global random generators among it; and nothing that may happen more or less often, such as starting the
loader's workers or an evaluation, draws from those.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object, send_to_device
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from distillkit.core.result import OUTPUT
from distillkit.data.sampler import collate, epoch_batches
from distillkit.training import checkpoint
from distillkit.training.errors import CheckpointError, Interrupted, RunError
from distillkit.training.metrics import Metrics
from distillkit.training.optim import MovingAverage, build_optimizer, learning_rate_factor
from distillkit.training.processes import processes
from distillkit.training.progress import Progress
from distillkit.training.table import percent

if TYPE_CHECKING:
    from distillkit.core.wrap import DistilledModel
    from distillkit.schema import Train

#: Optimizer steps between two looks at the losses: the only place, beside checkpoints, where we wait for the device.
LOOK_EVERY = 10

#: Ctrl-C, and what schedulers and `kill` send
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


class Samples(Protocol):
    """A training set: ``data[(epoch, index)]`` -> (image, target), a function of its arguments alone."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]: ...


def as_they_are(pictures: Any, targets: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call ``model(pictures, targets)``."""
    return (pictures, targets), {}


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        name: for messages and the progress line.
        folder: gets last.pt, best.safetensors, final.safetensors, metrics.jsonl, tensorboard/ and result.json.
        model: the wrapped student.
        data: the training set.
        evaluate: from the student, in eval mode, to its scores; a number under ``score`` chooses the best checkpoint.
        train: the recipe's ``train`` block.
        seed, batch, workers: of samples and loader; ``batch`` counts images of one process.
        resume: the command that goes on after an interruption, for the message.
        collate: from samples to (images, targets).
        prepare: from these, on the device, to others.
        call: from those to what the model is called with, (args, kwargs).
        drop_last: an epoch ends with its last whole batch.
    """

    name: str
    folder: Path
    model: DistilledModel
    data: Samples
    evaluate: Callable[[nn.Module], dict[str, Any]]
    train: Train
    seed: int
    batch: int
    workers: int
    score: str = "AP"
    resume: str = "the same command"
    collate: Callable[..., tuple[Any, Any]] = collate
    prepare: Callable[[Any, Any], tuple[Any, Any]] | None = None
    call: Callable[[Any, Any], tuple[tuple[Any, ...], dict[str, Any]]] = as_they_are
    drop_last: bool = False


@dataclass
class Position:
    """Where a job stands: ``batch`` batches of epoch ``epoch`` are done, ``step`` optimizer steps in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    scores: dict[str, Any] = field(default_factory=dict)


def fit(job: Job, console: Console) -> dict[str, Any]:
    """Train ``job`` to its end, from its last checkpoint where there is one, and return what result.json holds.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the step was finished and saved.
        NonFiniteLossError: names the loss and the step, seen at most ``LOOK_EVERY`` steps late.
        CheckpointError: the job's last.pt cannot be read.
    """
    with _settings(job.train), _interruptible(console) as interrupt:
        run = Run(job, console)
        with run.progress:
            while run.at.epoch < job.train.epochs:
                for window in run.windows():
                    run.step(window)
                    stop = run.stopped(interrupt)
                    if stop or run.at.step % job.train.save_every == 0:
                        run.save()
                    if stop:
                        raise run.interruption()
                run.end_epoch()
                if run.stopped(interrupt, together=True):
                    raise run.interruption()
            if not run.at.scores:
                run.evaluate()
        return run.finish()


def check_settings(train: Train, length: int, batch: int, drop_last: bool = False) -> None:
    """What can be said of a training on ``length`` pictures before any model is built.

    Raises:
        RunError: a precision that this machine lacks, or a schedule that does not fit into the run.
    """
    with _settings(train):
        world = _accelerator(train.amp).num_processes
    batches = epoch_batches(length, batch, world=world, drop_last=drop_last)
    if total := _optimizer_steps(train, len(batches)):
        learning_rate_factor(0, total, train.epochs, train.schedule)


def _optimizer_steps(train: Train, batches: int) -> int:
    """Of a whole run, whose epochs have ``batches`` batches for each process."""
    return math.ceil(batches / train.accumulate) * train.epochs


class Run:
    """The moving parts of one job."""

    def __init__(self, job: Job, console: Console):
        self.job = job
        self.accelerator = _accelerator(job.train.amp)
        self.total = _optimizer_steps(job.train, len(self._batches(epoch=0, start=0)))
        checkpoint.seed_everything(job.seed + self.accelerator.process_index)

        self.core = job.model
        if job.train.channels_last:
            self.core.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = build_optimizer(self.core, job.train.optimizer)
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = self.accelerator.prepare(self.core, optimizer)
        self.student = self.core.student
        self.average = MovingAverage(self.student, job.train.ema) if job.train.ema is not None else None
        self.at = Position()
        length = self._restore() if (job.folder / "last.pt").exists() else 0
        self.main = self.accelerator.is_main_process
        self.metrics = Metrics(job.folder, length, self.at.step) if self.main else None
        self.progress = Progress(job.name, self.total, self.at.step, job.train.epochs, console if self.main else None)
        if self.at.step:
            self.progress.say(f"goes on after step {self.at.step}")
        self.seen: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.started = time.monotonic() - self.at.seconds
        self._train_mode()

    def windows(self) -> Iterator[list]:
        """What is left of this epoch: for each optimizer step its ``accumulate`` batches, fewer in the last one."""
        loader: DataLoader = DataLoader(
            self.job.data,  # type: ignore[arg-type]
            batch_sampler=self._batches(self.at.epoch, self.at.batch),
            num_workers=self.job.workers,
            collate_fn=self.job.collate,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_the_loop,
            generator=torch.Generator(),  # its own: starting the workers must not move the global one
        )
        batches = iter(loader)
        while window := list(islice(batches, self.job.train.accumulate)):
            yield window

    def _batches(self, epoch: int, start: int) -> BatchSampler:
        job, rank, world = self.job, self.accelerator.process_index, self.accelerator.num_processes
        return epoch_batches(len(job.data), job.batch, job.seed, epoch, start, rank, world, drop_last=job.drop_last)

    def step(self, window: list) -> None:
        """One optimizer step on the mean over the images of ``window``."""
        train, images = self.job.train, sum(len(pictures) for pictures, _ in window)
        factor = learning_rate_factor(self.at.step, self.total, train.epochs, train.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        sums: dict[str, Tensor] = {}
        for i, (pictures, targets) in enumerate(window):
            pictures, targets = send_to_device((pictures, targets), self.accelerator.device, non_blocking=True)
            share = len(pictures) / images
            if self.job.prepare is not None:
                pictures, targets = self.job.prepare(pictures, targets)
            with self.accelerator.no_sync(self.model) if i + 1 < len(window) else nullcontext():
                args, kwargs = self.job.call(pictures, targets)
                losses = self.model(*args, **kwargs)
                self.accelerator.backward(losses.total * share)
            sums = {k: sums.get(k, 0.0) + share * v.detach() for k, v in losses.items() if k != OUTPUT}
        if train.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(self.student)

        self.at.step += 1
        self.at.batch += len(window)
        row = {"kind": "train", "step": self.at.step, "epoch": self.at.epoch + 1, "lr": self.base_rates[0] * factor}
        self.seen.append((row, sums))
        if self.at.step % LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        """Read the losses of the steps since the last look and write their rows; stop if one of them is not finite."""
        if not self.seen:
            return
        table = torch.stack([torch.stack([value.float() for value in losses.values()]) for _, losses in self.seen])
        values = self.accelerator.reduce(table, "mean").tolist()
        named: dict[str, float] = {}
        for (row, losses), numbers in zip(self.seen, values, strict=True):
            named = dict(zip(losses, numbers, strict=True))
            if self.metrics:
                self.metrics.add(row | {"loss": sum(numbers), "losses": named})
        self.progress.show(self.at.step, self.at.epoch, named)
        self.seen.clear()
        if self.metrics:
            self.metrics.flush()
        self.core.check_finite()

    def interruption(self) -> Interrupted:
        return Interrupted(f"{self.job.name}: saved after step {self.at.step}; go on with: {self.job.resume}")

    def stopped(self, interrupt: threading.Event, together: bool = False) -> bool:
        """Whether any process was interrupted. Several ask each other at the looks only, or where they meet anyway
        (``together``), and all of them stop there."""
        if self.accelerator.num_processes == 1:
            return interrupt.is_set()
        if not together and self.at.step % LOOK_EVERY:
            return False
        if interrupt.is_set():
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def end_epoch(self) -> None:
        """Evaluate where it is due, keep the best weights, and go on to the next epoch."""
        train = self.job.train
        if (self.at.epoch + 1) % train.evaluate_every == 0 or self.at.epoch + 1 == train.epochs:
            self.save()
            self.evaluate()
        self.at.epoch, self.at.batch = self.at.epoch + 1, 0
        self.save()

    def evaluate(self) -> None:
        """Score the weights that are kept, the average where there is one, and save them if they are the best yet."""
        with self._weights_to_keep(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            self.student.eval()
            self.at.scores = scores = self.job.evaluate(self.student)
            if scores[self.job.score] > self.at.best:
                self.at.best = scores[self.job.score]
                if self.main:
                    checkpoint.save_weights(self.job.folder / "best.safetensors", self.student.state_dict())
        self._train_mode()
        epoch = min(self.at.epoch + 1, self.job.train.epochs)
        numbers = {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
        if self.metrics:
            self.metrics.add({"kind": "evaluation", "step": self.at.step, "epoch": epoch, **numbers})
        when = f"after epoch {epoch}" if epoch else "as it came"
        self.progress.say(
            f"{when}: " + "  ".join(f"{k} {percent(v)}" for k, v in list(numbers.items())[:3] if k != "loss")
        )

    def _weights_to_keep(self) -> AbstractContextManager[None]:
        return self.average.in_place_of(self.student) if self.average else nullcontext()

    def _train_mode(self) -> None:
        self.core.train()
        if self.job.train.freeze_bn:
            for module in (*self.student.modules(), *self.core.online.modules()):
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def save(self) -> None:
        """Write last.pt: all that the next step reads."""
        self.look()
        self.at.seconds = time.monotonic() - self.started
        states = gather_object([checkpoint.random_state(self.accelerator.device)])
        if not self.metrics:
            return
        scaler = self.accelerator.scaler
        state = {
            "at": asdict(self.at),
            "model": self.core.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "average": self.average.state_dict() if self.average else None,
            "random": states,
            "metrics": self.metrics.sync(),
        }
        checkpoint.save(self.job.folder / "last.pt", state)

    def _restore(self) -> int:
        """Read last.pt; the length of metrics.jsonl that belongs to it."""
        path = self.job.folder / "last.pt"
        state = checkpoint.load(path)
        if len(state["random"]) != self.accelerator.num_processes:
            raise CheckpointError(
                f"{path} was written by {len(state['random'])} processes, now there are "
                f"{self.accelerator.num_processes}: samples would be dealt differently; use as many, or --fresh"
            )
        try:
            self.core.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit this student: {error}; start again with --fresh") from error
        self.optimizer.load_state_dict(state["optimizer"])
        checkpoint.check_moments(path, self.optimizer)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        checkpoint.set_random_state(state["random"][self.accelerator.process_index], self.accelerator.device)
        self.at = Position(**state["at"])
        return state["metrics"]

    def finish(self) -> dict[str, Any]:
        """Write final.safetensors, then result.json, whose presence says that the job is done."""
        result = {
            "name": self.job.name,
            "steps": self.at.step,
            "epochs": self.at.epoch,
            "minutes": self.at.seconds / 60,
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "best": self.at.best,
            "scores": self.at.scores,
        }
        with self._weights_to_keep():
            if self.metrics:
                checkpoint.save_weights(self.job.folder / "final.safetensors", self.student.state_dict())
                self.metrics.close()
                checkpoint.write_json(self.job.folder / "result.json", result)
        self.accelerator.wait_for_everyone()
        return result


def _accelerator(amp: str) -> Accelerator:
    AcceleratorState._reset_state()  # the jobs of one run may differ in precision; Accelerate keeps the first one's
    if amp == "fp16" and not torch.accelerator.is_available():
        raise RunError("train.amp is fp16, which needs an accelerator, and this machine shows none; use bf16 or no")
    processes()  # joins them, before Accelerator would miss those on the CPU
    accelerator = Accelerator(mixed_precision=amp)
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise RunError(
            f"this loop runs on one process or with DDP, not with {accelerator.distributed_type.value}; choose DDP in "
            "`accelerate launch`, or wrap the student in a loop of your own"
        )
    if accelerator.device.type == "cpu":  # gathering anchors has a backward pass that is only repeatable when asked for
        torch.use_deterministic_algorithms(True, warn_only=True)
    return accelerator


@contextmanager
def _settings(train: Train) -> Iterator[None]:
    """The recipe's number of threads; afterwards torch's global settings as they were."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if train.threads:
        torch.set_num_threads(train.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict, warn_only=warn)


@contextmanager
def _interruptible(console: Console) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets. A second one does what it did before, as a rule interrupt at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(*_: Any) -> None:
        event.set()
        restore()
        with suppress(RuntimeError):  # Python allows no print in the middle of another one
            console.print("stopping after this step (or evaluation); Ctrl-C again stops at once", highlight=False)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, note) for number in INTERRUPTS}
    try:
        yield event
    finally:
        restore()


def _leave_interrupts_to_the_loop(_: int) -> None:
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
