"""Distillation inside Lightning's ``Trainer``.

    class Distillation(Distilled, lightning.LightningModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer.fit(Distillation(distillkit.wrap(student, teacher, [LogitKD()], criterion=cross_entropy)), loader)

``Distilled`` stands before ``lightning.LightningModule`` or ``pytorch_lightning.LightningModule``, whichever package
you use: it imports neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distillkit.core.errors import WrapError
from distillkit.core.result import OUTPUT, Losses
from distillkit.core.wrap import DistilledModel


class Distilled:
    """Mixed into a ``LightningModule``: a training step on the wrapped model.

    A batch that is a tuple or list is the wrapped model's arguments, one that is a mapping those by name; write
    ``losses(batch)`` for others. Each loss is logged, weighted, as ``train/task``, ``train/kd`` and so on, the sum as
    ``train/loss``.

    Checkpoints hold what is trained (``model.student.*``, ``model.distillers.*``) and the step, and no frozen teacher.
    ``self.model.student`` is what to save for use, and ``self(x)`` in ``validation_step`` is the student's own call.

    Args:
        model: a model of ``distillkit.wrap``. A student that is in eval mode when fitting begins, as
            ``from_pretrained`` and a teacher's training leave it, is put in train mode.

    Raises:
        WrapError: a model that is not wrapped.
    """

    model: DistilledModel

    def __init__(self, model: DistilledModel):
        if not isinstance(model, DistilledModel):
            raise WrapError(
                f"model: expected a wrapped model, got {type(model).__name__}: distillkit.wrap(student, teacher, ...)"
            )
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def losses(self, batch: Any) -> Losses:
        """The losses of a batch."""
        if isinstance(batch, Mapping):
            return self.model(**batch)
        if isinstance(batch, tuple | list):
            return self.model(*batch)
        raise WrapError(
            f"a batch is a {type(batch).__name__}, expected a tuple (inputs, targets) or a mapping of arguments: write "
            "losses(self, batch), which calls self.model with what is in it"
        )

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        module: Any = self
        losses = self.losses(batch)
        named = {f"train/{name}": loss.detach() for name, loss in losses.items() if name != OUTPUT}
        size = _batch_size(batch)
        module.log_dict({**named, "train/loss": losses.total.detach()}, batch_size=size)
        return losses.total

    def on_fit_start(self) -> None:
        if not self.model.student.training:
            self.model.train()
        getattr(super(), "on_fit_start", lambda: None)()

    def on_train_epoch_end(self) -> None:
        self.model.check_finite()
        getattr(super(), "on_train_epoch_end", lambda: None)()


def _batch_size(batch: Any) -> int | None:
    """Of the first tensor of a batch, or the length of its first list of tensors; None: for Lightning to guess."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((len(value) for value in values if isinstance(value, Tensor | list)), None)
