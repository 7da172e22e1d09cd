"""Which loss was first not finite, and at which step: kept on the device, and read once in a while."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NEVER = 2**62


class FirstBad:
    """The first step at which each loss was infinite or NaN since the last look.

    An eager step costs one operation, which copies its losses into a row of a table; a look at the device goes through
    the rows. A compiled step, of which the host does not know how many came before it, keeps the first step itself.

    Args:
        every: the rows of the table, and so the most eager steps between two looks.
    """

    def __init__(self, every: int):
        self.every = every
        self.names: tuple[str, ...] = ()
        self._first: Tensor | None = None  # of compiled steps: int64, one a loss
        self._rows: list[Tensor] = []
        self._used = 0

    def fits(self, losses: Mapping[str, Tensor]) -> bool:
        """False: these are other losses than those that wait to be looked at."""
        return self.names == tuple(losses)

    @torch.no_grad()
    def see(self, losses: Mapping[str, Tensor]) -> None:
        """Of an eager step."""
        values = list(losses.values())
        if not self._rows or not self.fits(losses):
            self.names, self._used = tuple(losses), 0
            self._rows = list(torch.stack(values).new_empty(self.every, len(values)).unbind())
        torch.stack(values, out=self._rows[self._used])
        self._used += 1

    @torch.no_grad()
    def see_compiled(self, losses: Mapping[str, Tensor], step: Tensor) -> None:
        values = torch.stack([loss.float() for loss in losses.values()])
        if self._first is None:
            self.names = tuple(losses)
            self._first = torch.full((len(losses),), NEVER, dtype=torch.int64, device=values.device)
        self._first = torch.where(values.isfinite(), self._first, torch.minimum(self._first, step))

    @property
    def full(self) -> bool:
        """The next eager step has no row."""
        return self._used == self.every

    @torch.no_grad()
    def look(self, step: Tensor) -> dict[str, int]:
        """The first bad step of each loss that had one, and forgets; ``step`` is the next. Waits for the device."""
        found = [] if self._first is None else [self._first]
        if self._used:
            finite = torch.stack(self._rows[: self._used]).isfinite()
            steps = torch.arange(self._used, device=finite.device)[:, None] + (step - self._used)
            found.append(torch.where(finite, NEVER, steps).amin(0))
        self._first, self._used = None, 0
        first = torch.stack(found).amin(0).tolist() if found else []
        return {name: at for name, at in zip(self.names, first, strict=bool(first)) if at < NEVER}
