"""Which checkpoints a run keeps while it goes on, decided from the bits of its history. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Keep(NamedTuple):
    """Retention rule: "all", "none", "every" or "budget"; the last two with a number. All count recorded rows."""

    rule: str
    n: int = 0

    @classmethod
    def of(cls, text: str) -> Keep:
        """Parse "all", "none", "every:n" (each n-th row) or "budget:n" (the n most valuable); else ValueError."""
        rule, _, number = text.partition(":") if isinstance(text, str) else (text, "", "")
        if text in ("all", "none"):
            return cls(text)
        if rule in ("every", "budget") and number.isdecimal() and int(number) > 0:
            return cls(rule, int(number))
        raise ValueError(f"keep: expected 'all', 'none', 'every:n' or 'budget:n' with n >= 1, got {text!r}")

    @property
    def limited(self) -> bool:
        """True if checkpoints are deleted while the run goes on."""
        return self.rule in ("every", "budget")

    def dropped(self, rows: Iterable[int], correct: NDArray[np.bool_]) -> list[int]:
        """List the rows whose checkpoints are to be deleted now. The latest always stays, beside a budget.

        Parameters
        ----------
        rows : iterable of int
            Rows of the history whose checkpoints are stored, ascending.
        correct : (n_stored, n_samples) bool
            Correctness of these rows.
        """
        stored = list(rows)
        if self.rule == "every":
            return [row for row in stored[:-1] if (row + 1) % self.n]
        dropped = []
        while self.rule == "budget" and len(stored) > self.n + 1:
            i = int(values(correct).argmin())
            dropped.append(stored.pop(i))
            correct = np.delete(correct, i, axis=0)
        return dropped


def values(correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Value of each stored epoch but the latest: (n_stored - 1,).

    Each sample is one point, split among the stored epochs that classify it correctly. So samples that the latest model
    has forgotten, and that no other epoch covers, count most. Of equal epochs, callers drop the earliest first.
    """
    share = correct / np.maximum(correct.sum(0), 1)
    return np.asarray(share[:-1].sum(1))
