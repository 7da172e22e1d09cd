"""`distillkit run`: the teacher first where it is to be trained, then every row, then the table and the report."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from distillkit import recipe as recipes
from distillkit import schema
from distillkit.schema import Recipe
from distillkit.training import build, checkpoint
from distillkit.training.batches import batches, drop_last
from distillkit.training.errors import CheckpointError, RunError
from distillkit.training.evaluate import check_submission, judged, plain, predicted, score, submit
from distillkit.training.folder import alone_in, changed_versions, check_owner, open_folder, versions
from distillkit.training.loop import Job, check_settings, fit
from distillkit.training.possible import (
    check_optimizer,
    check_same_classes,
    check_teacher,
    planned,
    teacher_place,
)
from distillkit.training.processes import processes
from distillkit.training.progress import reading, scoring
from distillkit.training.report import write_report
from distillkit.training.table import rich_table, write_table
from distillkit.training.tasks import Trained, task_of
from distillkit.training.tiles import cut_tiles

__all__ = ["Jobs", "open_folder", "run", "versions"]


def run(recipe: Recipe, fresh: bool = False, console: Console | None = None, command: str = "the same command") -> Path:
    """Do all that a recipe says, going on where an earlier call stopped, and return the run folder.

    The folder ``output/name`` gets recipe.yaml (resolved), versions.json, a folder a job, table.md, table.json,
    report.html and its pictures. Jobs that have a result.json are not trained again. Every job starts from the recipe's
    seed, so that rows with the same student start from the same weights and see the same pictures.

    Args:
        recipe: as ``distillkit.recipe.load`` gives it.
        fresh: throw away what an earlier run of this name left.
        console: where progress and the table are printed.
        command: what to type to go on after an interruption.

    Raises:
        RunError: the folder holds a run of another recipe, another process works in it, or the recipe cannot be run.
            Nothing was changed then.
        Interrupted, KeyboardInterrupt: Ctrl-C or SIGTERM; the run can be resumed.
    """
    state = processes()
    console = console or Console()
    if not state.is_main_process:
        console = Console(quiet=True)
    folder = Path(recipe.output) / recipe.name
    if state.is_main_process:
        check_owner(folder)
    jobs = Jobs(recipe, folder, console, command)
    jobs.check(fresh)
    with _sigterm_as_ctrl_c(), alone_in(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            open_folder(folder, recipe, fresh)
            _say_changes(changed_versions(folder, recipe), console)
        state.wait_for_everyone()
        _do(jobs)
    return folder


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say_changes(changes: list[str], console: Console) -> None:
    if changes:
        text = f"since this run was begun: {'; '.join(changes)}; results may differ a little from those without a break"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _do(jobs: Jobs) -> None:
    """All trainings, then what is written of them."""
    recipe, folder, console, state = jobs.recipe, jobs.folder, jobs.console, processes()
    teachers = {name: jobs.teacher(name, config) for name, config in build.teacher_configs(recipe).items()}
    students = {row.row: jobs.row(row, teachers) for row in recipe.compare}
    if state.is_main_process:
        write_table(folder, jobs.table)
        console.print(rich_table(jobs.table))
        configs = build.teacher_configs(recipe)
        shown = {name: model for name, model in teachers.items() if not build.differs(configs[name])}
        write_report(recipe, folder, jobs.table, Trained(jobs.judged, jobs.folders, shown, students))
        console.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    state.wait_for_everyone()


class Jobs:
    """The trainings of one run; ``table`` grows by a row with each."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console, command: str):
        self.recipe, self.folder, self.console, self.command = recipe, folder, console, command
        with reading(console) as progress:
            cut_tiles(recipe, ["train", "val", recipe.evaluate.split], progress)
        self.val = build.build_data(recipe, "val", augmented=False)
        self.classes = len(self.val.classes)
        split = recipe.evaluate.split
        self.judged = self.val if split == "val" else build.build_data(recipe, split, augmented=False)
        self.train = build.build_data(recipe, "train", augmented=True)
        self._check_classes()
        self.table: list[dict[str, Any]] = []
        self.folders: dict[str, Path] = {}

    def _check_classes(self) -> None:
        """Labels are places in the list of classes: with another list in another split they would mean other things."""
        for split, data in (("train", self.train), (self.recipe.evaluate.split, self.judged)):
            if data.classes != self.val.classes:
                raise RunError(
                    f"data.{split} has the classes {', '.join(data.classes)}; "
                    f"data.val has {', '.join(self.val.classes)}: the splits need the same classes in the same order"
                )

    def check(self, fresh: bool = False) -> None:
        """Find now what would stop the run hours later, in all trainings that are still to be done.

        Args:
            fresh: none is done yet, whatever the folder holds.

        Raises:
            RunError: names the part of the recipe that cannot be done.
        """
        steps = [p for p in planned(self.recipe) if fresh or not (self.folder / p.folder / "result.json").exists()]
        if any(step.train.epochs for step in steps):
            task_of(self.recipe).check_taught("train", self.train)
        task_of(self.recipe).check_judged(self.recipe.evaluate.split, self.judged)
        for name, config in build.teacher_configs(self.recipe).items():
            check_teacher(teacher_place(name), config, self.val.classes)
        check_submission(self.recipe, self.judged)
        for step in steps:
            try:
                train = self.train
                if step.recipe is not self.recipe:  # raises where its files are not there
                    train = build.build_data(step.recipe, "train", augmented=True)
                    check_same_classes(step, self.recipe, train.classes, self.train.classes)
                check_settings(step.train, len(train), step.recipe.data.batch, drop_last(step.recipe))
                if step.train.epochs:
                    build.check_start(step.model)
                check_optimizer(step, self._model(step.model))
            except RunError as error:
                raise RunError(f"{step.where}: {error}") from error

    def teacher(self, name: str, config: schema.AnyTeacher) -> nn.Module:
        """A teacher as it comes, or trained now if its block says so; evaluated either way."""
        folder = self._folder(name, build.teacher_folder(name))
        model = self._model(config)
        minutes = None
        if config.train is not None and config.checkpoint is None:
            minutes = self._fit(name, folder, model, recipes.train_of(self.recipe, config.train), "none", {})
        if build.own_classes(config) in (None, self.val.classes):
            self._judge(name, folder, model, minutes)
        else:
            text = f"{name}: its classes are not those of the data, so that it is not scored"
            self.console.print(text, markup=False, highlight=False)
        return model

    def row(self, row: schema.Row, teachers: Mapping[str, nn.Module]) -> nn.Module:
        """One student, trained as its row says."""
        model = self._model(recipes.student_of(self.recipe, row.student))
        folder = self._folder(row.row, recipes.slug(row.row))
        train = recipes.train_of(self.recipe, row.train)
        minutes = self._fit(row.row, folder, model, train, row.distillers, teachers, row.data)
        self._judge(row.row, folder, model, minutes)
        self.table[-1] |= task_of(self.recipe).further(self, row, model)
        return model

    def _folder(self, name: str, below: str) -> Path:
        folder = self.folder / below
        if folder in self.folders.values():
            raise RunError(f"two rows would be written to {folder}: give {name!r} another name")
        self.folders[name] = folder
        return folder

    def _model(self, config: schema.AnyModel) -> nn.Module:
        checkpoint.seed_everything(self.recipe.seed)
        return build.build_model(config, self.val.classes, self.recipe.evaluate, self.recipe.data.size)

    def _fit(
        self,
        name: str,
        folder: Path,
        model: nn.Module,
        train: schema.Train,
        distillers: Any,
        teachers: Mapping[str, nn.Module],
        changes: dict[str, Any] | None = None,
    ) -> float | None:
        """Train ``model`` unless it was; it holds its final weights afterwards. The minutes; None without epochs.

        changes: in the recipe's data, of what it is trained on.
        """
        if not (folder / "result.json").exists():
            taught = recipes.taught_by(self.recipe, changes or {})
            wrapped = build.build_wrapped(
                self.recipe,
                model,
                teachers,
                build.build_distillers(self.recipe, distillers, self.classes, train),
                self.val.classes,
            )
            job = Job(
                name=name,
                folder=folder,
                model=wrapped,
                data=build.build_data(taught, "train", augmented=True) if changes else self.train,
                evaluate=lambda student: plain(score(self.recipe, student, self.val)),
                train=train,
                seed=self.recipe.seed,
                batch=taught.data.batch,
                workers=taught.data.workers,
                resume=self.command,
                score=self.recipe.SCORES[0],
                **batches(taught, model, self.classes),
            )
            try:
                fit(job, self.console)
            finally:
                wrapped.unwrap()
        else:
            self.console.print(f"{name}: done already", markup=False, highlight=False)
        final, result = folder / "final.safetensors", folder / "result.json"
        if not final.exists():
            raise CheckpointError(
                f"{final}: no such file, but {result} says that this training is done; put the weights back, or delete "
                "result.json: the training goes on from last.pt, and writes them again"
            )
        checkpoint.load_into(model, final)
        return checkpoint.read_json(result)["minutes"] if train.epochs else None

    def _judge(self, name: str, folder: Path, model: nn.Module, minutes: float | None) -> None:
        """Score the model on the recipe's split, once, and add its row to the table."""
        split = self.recipe.evaluate.split
        path = folder / f"scores-{split}.json"
        if not path.exists():
            with scoring(f"{name}: scoring on {split}", len(self.judged), self.console) as progress:
                found = predicted(self.recipe, model, self.judged, progress)
            if processes().is_main_process:
                if task := getattr(self.recipe.evaluate, "submission", None):
                    archive = submit(folder / f"{task}-{split}", found, self.judged, task)
                    self.console.print(f"{name}: {archive}", markup=False, highlight=False, soft_wrap=True)
                checkpoint.write_json(path, plain(judged(self.recipe, found, self.judged)))
            processes().wait_for_everyone()
        scores = checkpoint.read_json(path)
        parameters = sum(p.numel() for p in model.parameters())
        measured = {key: scores[key] for key in self.recipe.scores}
        self.table.append({"row": name, **measured, "parameters": parameters, "minutes": minutes})
