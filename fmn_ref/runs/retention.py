"""Which checkpoints to keep while a run goes on, decided from the bits of its history. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Keep(NamedTuple):
    """A rule: "all", "none", "every" or "budget"; the last two with a number."""

    rule: str
    n: int = 0

    @classmethod
    def of(cls, text: str) -> Keep:
        """ "all", "none", "every:n" (each n-th epoch) or "budget:n" (the n worth most); ValueError otherwise."""
        rule, _, number = text.partition(":") if isinstance(text, str) else (text, "", "")
        if text in ("all", "none"):
            return cls(text)
        if rule in ("every", "budget") and number.isdecimal() and int(number) > 0:
            return cls(rule, int(number))
        raise ValueError(f"keep: expected 'all', 'none', 'every:n' or 'budget:n' with n >= 1, got {text!r}")

    def dropped(self, epochs: Iterable[int], correct: NDArray[np.bool_]) -> list[int]:
        """Of the stored epochs, ascending, those to drop now. The latest is always kept, beyond the budget.

        correct : (n_stored, n_samples) bool, a row for each stored epoch
        """
        stored = list(epochs)
        if self.rule == "every":
            return [e for e in stored[:-1] if (e + 1) % self.n]
        dropped = []
        while self.rule == "budget" and len(stored) > self.n + 1:
            i = int(values(correct).argmin())
            dropped.append(stored.pop(i))
            correct = np.delete(correct, i, axis=0)
        return dropped


def values(correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What each stored epoch but the latest is worth: (n_stored - 1,).

    A sample that an epoch gets right counts one, shared with the other stored epochs that get it right: what the latest
    model has forgotten and what nobody else covers count most. Of equal ones the earliest is dropped first.
    """
    share = correct / np.maximum(correct.sum(0), 1)
    return np.asarray(share[:-1].sum(1))
