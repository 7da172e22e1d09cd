"""What can go wrong in a run, beside what core.errors names."""

from distillkit.core.errors import DistillError


class CheckpointError(DistillError):
    """A file that should hold a checkpoint or weights does not, or does not fit."""


class RunError(DistillError):
    """A run cannot be started, or continued, as asked."""


class Interrupted(DistillError):  # noqa: N818  (it is an event; nothing is wrong)
    """Ctrl-C or SIGTERM: the running step was finished and saved."""
