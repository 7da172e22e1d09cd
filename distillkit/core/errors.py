"""What can go wrong while distilling, each with its own name."""


class DistillError(Exception):
    """Base of distillkit's own errors."""


class WrapError(DistillError):
    """The student or a teacher cannot be wrapped as it is."""


class TapError(DistillError):
    """A module path does not exist, or the module did not run as often as declared."""


class TeacherModeError(DistillError):
    """A frozen teacher was found in train mode."""


class StudentModeError(DistillError):
    """The wrapper is in train mode and its student is not."""


class UnreachedStudentError(DistillError):
    """A distiller's loss cannot change any parameter of the student."""


class NonFiniteLossError(DistillError):
    """A loss became infinite or NaN."""


class AdapterError(DistillError):
    """The tapped outputs do not explain the model's own predictions."""


class ViewError(DistillError, ValueError):
    """A view cannot be made, or a distiller cannot compare those of teacher and student."""
