"""`distillkit run`: the teacher first where it is to be trained, then every row, then the table and the report."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from distillkit import recipe as schema
from distillkit.recipe import Recipe
from distillkit.training import build, checkpoint
from distillkit.training.errors import RunError
from distillkit.training.evaluate import plain, score
from distillkit.training.loop import Job, fit
from distillkit.training.processes import processes
from distillkit.training.report import write_report
from distillkit.training.table import rich_table, write_table

PACKAGES = (
    "distillkit",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "accelerate",
    "pydantic",
    "pycocotools",
    "faster-coco-eval",
)


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
        RunError: the folder holds a run of another recipe, or the recipe cannot be run.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    state = processes()
    console = console or Console()
    if not state.is_main_process:
        console = Console(quiet=True)
    folder = Path(recipe.output) / recipe.name
    if state.is_main_process:
        open_folder(folder, recipe, fresh)
    state.wait_for_everyone()
    jobs = Jobs(recipe, folder, console, command)
    teachers = {name: jobs.teacher(name, config) for name, config in build.teacher_configs(recipe).items()}
    students = {row.row: jobs.row(row, teachers) for row in recipe.compare}
    if state.is_main_process:
        write_table(folder, jobs.table)
        console.print(rich_table(jobs.table))
        write_report(recipe, folder, jobs.table, jobs.judged, jobs.folders, teachers, students)
        console.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    state.wait_for_everyone()
    return folder


class Jobs:
    """The trainings of one run; ``table`` grows by a row with each."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console, command: str):
        self.recipe, self.folder, self.console, self.command = recipe, folder, console, command
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

    def teacher(self, name: str, config: schema.TeacherModel) -> nn.Module:
        """A teacher as it comes, or trained now if its block says so; evaluated either way."""
        folder = self._folder(name, build.teacher_folder(name))
        model = self._model(config)
        minutes = None
        if config.train is not None and config.checkpoint is None:
            minutes = self._fit(name, folder, model, schema.train_of(self.recipe, config.train), "none", {})["minutes"]
        self._judge(name, folder, model, minutes)
        return model

    def row(self, row: schema.Row, teachers: Mapping[str, nn.Module]) -> nn.Module:
        """One student, trained as its row says."""
        model = self._model(schema.student_of(self.recipe, row.student))
        folder = self._folder(row.row, schema.slug(row.row))
        train = schema.train_of(self.recipe, row.train)
        result = self._fit(row.row, folder, model, train, row.distillers, teachers)
        self._judge(row.row, folder, model, result["minutes"])
        return model

    def _folder(self, name: str, below: str) -> Path:
        folder = self.folder / below
        if folder in self.folders.values():
            raise RunError(f"two rows would be written to {folder}: give {name!r} another name")
        self.folders[name] = folder
        return folder

    def _model(self, config: schema.Model | schema.TeacherModel) -> nn.Module:
        checkpoint.seed_everything(self.recipe.seed)
        return build.build_model(config, self.classes, self.recipe.evaluate)

    def _fit(
        self,
        name: str,
        folder: Path,
        model: nn.Module,
        train: schema.Train,
        distillers: Any,
        teachers: Mapping[str, nn.Module],
    ) -> dict[str, Any]:
        """Train ``model`` unless it was; it holds its final weights afterwards."""
        if not (folder / "result.json").exists():
            data = self.recipe.data
            wrapped = build.build_wrapped(
                self.recipe, model, teachers, build.build_distillers(self.recipe, distillers, self.classes)
            )
            job = Job(
                name=name,
                folder=folder,
                model=wrapped,
                data=self.train,
                evaluate=lambda student: plain(score(student, self.val, data.batch, data.workers)),
                train=train,
                seed=self.recipe.seed,
                batch=data.batch,
                workers=data.workers,
                resume=self.command,
            )
            try:
                fit(job, self.console)
            finally:
                wrapped.unwrap()
        else:
            self.console.print(f"{name}: done already", markup=False, highlight=False)
        checkpoint.load_into(model, folder / "final.safetensors")
        return checkpoint.read_json(folder / "result.json")

    def _judge(self, name: str, folder: Path, model: nn.Module, minutes: float | None) -> None:
        """Score the model on the recipe's split, once, and add its row to the table."""
        path = folder / f"scores-{self.recipe.evaluate.split}.json"
        if not path.exists():
            scores = plain(score(model, self.judged, self.recipe.data.batch, self.recipe.data.workers))
            if processes().is_main_process:
                checkpoint.write_json(path, scores)
            processes().wait_for_everyone()
        scores = checkpoint.read_json(path)
        parameters = sum(p.numel() for p in model.parameters())
        measured = {key: scores[key] for key in ("AP", "AP50", "AP75")}
        self.table.append({"row": name, **measured, "parameters": parameters, "minutes": minutes})


def open_folder(folder: Path, recipe: Recipe, fresh: bool) -> None:
    """Make the run folder, or check that it belongs to this recipe.

    Raises:
        RunError: it holds a run whose recipe differs, or files that are no run.
    """
    record = folder / "recipe.yaml"
    if folder.exists() and any(folder.iterdir()):
        if not record.exists():
            raise RunError(f"{folder} is not empty and holds no recipe.yaml: not a run; choose another name or output")
        if fresh:
            shutil.rmtree(folder)
        else:
            _check_same(record, recipe)
    if not record.exists():
        checkpoint.write_json(folder / "versions.json", versions(recipe))
        checkpoint.write_text(record, schema.resolved(recipe))


def _check_same(record: Path, recipe: Recipe) -> None:
    there, here = (
        _flat(yaml.safe_load(text)) for text in (record.read_text(encoding="utf-8"), schema.resolved(recipe))
    )
    keys = [k for k in sorted(there.keys() | here.keys()) if k != "output" and there.get(k) != here.get(k)]
    if keys:
        changes = "; ".join(f"{k} was {there.get(k)!r}, is {here.get(k)!r}" for k in keys[:5])
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise RunError(
            f"{record.parent} holds a run of another recipe ({changes}{more}): start over with --fresh, or give this "
            "run another name, as in name=second"
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping from dotted path to value."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, below in pairs for k, v in _flat(below, f"{path}.{key}" if path else str(key)).items()}
    return {path: value}


def versions(recipe: Recipe) -> dict[str, Any]:
    """What this run is made with: packages, machine, commit, seed."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": recipe.train.threads or torch.get_num_threads(),
        "processes": processes().num_processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processes().device.type,
        "commit": _commit(),
        "seed": recipe.seed,
        "command": " ".join(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the working folder, with "+" where files differ from it; None outside git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
