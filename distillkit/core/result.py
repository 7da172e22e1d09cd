"""What a training call returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

OUTPUT = "output"


class Losses(dict[str, Any]):
    """One weighted scalar per loss by name, and the student's own output under ``"output"``.

    A plain dict in every respect (it can be built from one): FSDP2 and Accelerate rebuild it from its items.
    """

    @property
    def total(self) -> Tensor:
        """The sum of all losses; call ``.backward()`` on it."""
        terms = [loss for name, loss in self.items() if name != OUTPUT]
        return sum(terms[1:], start=terms[0])
