"""`train`: the optimizer, its schedule, and the loop around them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distillkit.schema.base import Count, Decay, NotNegative, Positive, Share, Strict


class _Optimizer(Strict):
    lr: Positive = 0.01
    weight_decay: NotNegative = 1e-4
    backbone_lr: NotNegative = 1.0
    """Factor on the learning rate of the backbone."""
    no_decay_norm: bool = True
    """No weight decay on norms, biases, scales, and what a timm model says of itself (position embedding)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate of each layer against the one behind it; for timm's classifiers."""


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"]
    momentum: Decay = 0.9
    nesterov: bool = False
    """Nesterov's momentum: the gradient counts where the momentum is about to lead."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true, and momentum is 0; leave one of the two out")
        return self


class AdamW(_Optimizer):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"]
    eps: Positive = 1e-8
    """Added to the root of the squared gradients' average."""
    bias_correction: bool = True
    """The averages of gradients are corrected for their start at 0; false: as in the releases of BERT and ELECTRA."""


Optimizer = Annotated[SGD | AdamW, Field(discriminator="kind")]


class _Schedule(Strict):
    warmup: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps over which the learning rate rises linearly; null: a tenth of all steps, at most 500."""
    warmup_factor: Share = 0.001
    """Factor at the first step."""


class StepSchedule(_Schedule):
    """The learning rate falls at given epochs."""

    kind: Literal["step"]
    milestones: list[Count] = [8, 11]
    gamma: Share = 0.1


class CosineSchedule(_Schedule):
    """The learning rate falls along half a cosine, from the end of the warm-up on."""

    kind: Literal["cosine"]
    min_factor: Share = 0.0
    """What is left of it at the end."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """Epochs at the end, out of `epochs`, that stay there."""


class PolySchedule(_Schedule):
    """The learning rate falls with every step, as (1 - share of the run that is done) ** power, from the end of the
    warm-up on."""

    kind: Literal["poly"]
    power: Positive = 0.9


class ConstantSchedule(_Schedule):
    """The learning rate stays."""

    kind: Literal["constant"]


Schedule = Annotated[StepSchedule | CosineSchedule | PolySchedule | ConstantSchedule, Field(discriminator="kind")]


class Train(Strict):
    """How a model is trained."""

    epochs: Annotated[int, Field(ge=0)] = 12
    """0: evaluated as it is."""
    optimizer: Optimizer = SGD(kind="sgd")
    schedule: Schedule = StepSchedule(kind="step")
    clip: Positive | None = None
    """Largest norm of the gradient."""
    accumulate: Count = 1
    """Batches an optimizer step."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    ema: Decay | None = None
    """Decay of the running average of the weights that is evaluated and saved; null: none."""
    freeze_bn: bool = False
    """BatchNorm statistics stay as loaded."""
    evaluate_every: Count = 1
    """Epochs between evaluations."""
    save_every: Count = 50
    """Optimizer steps between checkpoints; there is one at each epoch's end too."""
    channels_last: bool = False
    """Weights lie with their channels last, and so then do activations: faster convolutions on accelerators under AMP
    and, up to twice, on CPUs."""
    threads: Count | None = None
    """CPU threads of torch; null: torch's own choice."""
