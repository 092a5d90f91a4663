"""What every recorded epoch predicts, computed when read: the part that frameworks have in common. NumPy only."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runs.run import Run

CACHE_BYTES = 4 << 30


class Epochs(Sequence[NDArray[np.float32]]):
    """``epochs[i]`` is (n_samples, n_classes) float32 for row i of the run's history; the latest 4 GiB stay in memory.

    Subclasses set `_run` and `_known` by `super().__init__(run)` and say how an epoch is evaluated.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: dict[int, NDArray[np.float32]] = {}

    @abstractmethod
    def _evaluate(self, row: int) -> NDArray[np.float32]: ...

    @property
    def evaluated(self) -> tuple[int, ...]:
        """Rows that are in memory."""
        return tuple(sorted(self._known))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._run}, evaluated={self.evaluated})"

    def __len__(self) -> int:
        return len(self._run.history)

    def __getitem__(self, epoch: Any) -> Any:
        if isinstance(epoch, slice):
            return [self[i] for i in range(*epoch.indices(len(self)))]
        if not -len(self) <= operator.index(epoch) < len(self):
            raise IndexError(f"epoch: expected a row in [-{len(self)}, {len(self)}), got {epoch}")
        i = operator.index(epoch) % len(self)
        if i not in self._known:
            self._known[i] = self._evaluate(i)
            while len(self._known) > 2 and sum(p.nbytes for p in self._known.values()) > CACHE_BYTES:
                del self._known[next(iter(self._known))]
        return self._known[i]
