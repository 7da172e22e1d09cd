"""Distillation inside transformers' ``Trainer``.

    class DistilledTrainer(Distilled, Trainer):
        pass

    trainer = DistilledTrainer(model=distillkit.wrap(student, teacher, [LogitKD()]), args=..., train_dataset=...)

``Distilled`` stands before the Trainer that you use now, your own subclass too. It imports nothing of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillkit.core.adapter import comes_from
from distillkit.core.errors import WrapError
from distillkit.core.result import OUTPUT
from distillkit.core.wrap import DistilledModel

#: beside the student's own files in every checkpoint: what else is trained, and the step
REST = "distillkit.pt"
STUDENT = "student."


class Distilled:
    """Mixed into a ``Trainer``: it trains the wrapped model, and evaluates and saves its student.

    - The loss is ``Losses.total``; each loss is logged by itself, as ``loss/task``, ``loss/kd`` and so on: the mean of
      its weighted value since the last log, over processes too.
    - In evaluation the model is the student: metrics get its outputs, and ``eval_loss`` is its own loss.
    - Checkpoints and ``save_model`` hold the student as ``student.save_pretrained`` writes it, for
      ``from_pretrained``, and ``distillkit.pt`` with the distillers' own parameters, from which
      ``resume_from_checkpoint`` goes on. Frozen teachers are in neither.

    Args:
        model: a model of ``distillkit.wrap`` without a criterion: its student computes its own loss from the labels.
        The others as in ``Trainer``.

    Raises:
        WrapError: a model that is not wrapped, or wrapped with a criterion; label smoothing or a ``compute_loss_func``,
            which would replace the losses; several GPUs in one process, where the teacher would be on one of them.
    """

    model: Any
    _sums: dict[str, Tensor]
    _steps: int

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any):
        _check(model)
        given = kwargs.get("args", args[0] if args else None)
        if getattr(given, "label_smoothing_factor", 0) or kwargs.get("compute_loss_func") is not None:
            raise WrapError(
                "label_smoothing_factor and compute_loss_func replace the losses of a wrapped model: leave them out: "
                "the student's own loss and those of the distillers are what is trained"
            )
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise WrapError(
                f"{trainer.args.n_gpu} GPUs in one process (DataParallel): start one process a GPU, as in "
                "torchrun --nproc_per_node 2 train.py, or choose one with CUDA_VISIBLE_DEVICES"
            )
        # what it found out about the wrapper is to be known about the student
        trainer.model_accepts_loss_kwargs = False  # a mean over each batch: accumulated ones are averaged
        if trainer.args.label_names is None:
            trainer.label_names = [name for name in _arguments(model.student) if "label" in name]
        self._sums, self._steps = {}, 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The total in train mode, the student's own loss in eval mode; with the student's output if that is asked."""
        result = model(**inputs)
        if not model.training:
            loss = result["loss"] if isinstance(result, dict) else result[0]
            return (loss, result) if return_outputs else loss
        for name, value in result.items():
            if name != OUTPUT:
                self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        self._steps += 1
        return (result.total, result[OUTPUT]) if return_outputs else result.total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if "loss" in logs and self._sums:
            self.model.check_finite()  # as the device is waited for anyway
            means = trainer.accelerator.reduce(torch.stack(list(self._sums.values())) / self._steps, "mean").tolist()
            logs = {**logs, **{f"loss/{name}": mean for name, mean in zip(self._sums, means, strict=True)}}
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **kwargs: Any
    ) -> Any:
        if ignore_keys is None:
            config = getattr(self.model.student, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", [])
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)  # type: ignore[misc]

    # ---- where the Trainer is to see the student

    @contextmanager
    def _as_student(self) -> Iterator[None]:
        wrapper, self.model = self.model, self.model.student
        try:
            yield
        finally:
            self.model = wrapper

    def _set_signature_columns_if_needed(self) -> None:
        with self._as_student():
            super()._set_signature_columns_if_needed()  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trainer: Any = self
        state = self.model.state_dict() if state_dict is None else state_dict
        own = {name.removeprefix(STUDENT): value for name, value in state.items() if name.startswith(STUDENT)}
        with self._as_student():
            super()._save(output_dir, None if state_dict is None else own)  # type: ignore[misc]
        if trainer.args.should_save:
            rest = {name: value for name, value in state.items() if not name.startswith(STUDENT)}
            torch.save(rest, Path(output_dir or trainer.args.output_dir) / REST)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if getattr(self, "is_fsdp_enabled", False):  # its files hold the wrapper
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        if comes_from(self.model.student, "transformers.modeling_utils"):
            self._load_pretrained(resume_from_checkpoint)
        else:
            with self._as_student():
                super()._load_from_checkpoint(resume_from_checkpoint, self.model)  # type: ignore[misc]
        self._load_rest(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        trainer: Any = self
        if getattr(self, "is_fsdp_enabled", False):
            super()._load_best_model()  # type: ignore[misc]
            return
        if comes_from(self.model.student, "transformers.modeling_utils"):
            self._load_pretrained(trainer.state.best_model_checkpoint)
        else:
            with self._as_student():
                super()._load_best_model()  # type: ignore[misc]
        self._load_rest(trainer.state.best_model_checkpoint)

    def _load_pretrained(self, checkpoint: str) -> None:
        """The student's weights. A file may call them otherwise than the model does (ViT's), and the Trainer, which
        loads files as they are, would go on with weights that it has not loaded."""
        student = self.model.student
        student.load_state_dict(type(student).from_pretrained(checkpoint).state_dict())

    def _load_rest(self, checkpoint: str) -> None:
        """The distillers' parameters and the step; the student's are loaded already."""
        path = Path(checkpoint) / REST
        if not path.exists():
            raise WrapError(
                f"{path} is missing: this is no checkpoint of a distilling Trainer. To start from a student's weights, "
                "load them with from_pretrained before wrap()"
            )
        wrapper = self.model
        loaded = wrapper.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
        missing = [name for name in loaded.missing_keys if not name.startswith(STUDENT)]
        if missing or loaded.unexpected_keys:
            raise WrapError(
                f"{path} is of other distillers: missing {missing or 'nothing'}, unexpected "
                f"{loaded.unexpected_keys or 'nothing'}; wrap the model as in the run that wrote it"
            )


def _check(model: Any) -> None:
    if not isinstance(model, DistilledModel):
        raise WrapError(
            f"model: expected a wrapped model, got {type(model).__name__}: "
            "model=distillkit.wrap(student, teacher, distillers)"
        )
    if not model.student_takes_targets:
        raise WrapError(
            "a Trainer calls model(**batch) and takes the student's own loss: wrap a model that computes it from "
            "labels=, and leave out criterion= and distillers that hold the task's loss"
        )


def _arguments(student: nn.Module) -> list[str]:
    return list(inspect.signature(student.forward).parameters)
