"""Learning and forgetting of each sample: first learned, forgetting events, forgotten at the end. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .matrix import Matrix

NEVER_LEARNED = ("nan", "toneva", "cartography", "datadiet", "deepcore")
COLUMNS = ("first_learned", "last_correct", "forgetting_events", "correctness", "presentations_needed", "forgotten")


@dataclass(frozen=True, eq=False)
class SampleStatistics:
    """Learning and forgetting of each sample: (n_samples,) arrays, each computed from the counts when it is first read.

    Attributes
    ----------
    counts : (5, n_samples) int32
        First and last row right, number of right-to-wrong changes, number of rows right, last row wrong; -1 for none.
    n_epochs : int
        Number of rows.
    never_learned : str
        As in `sample_statistics`.
    """

    counts: NDArray[np.int32]
    n_epochs: int
    never_learned: str = "nan"

    @cached_property
    def first_learned(self) -> NDArray[np.float64]:
        """First epoch at which the sample was right; nan if there is none."""
        return self._where_learned(self.counts[0], np.nan)

    @cached_property
    def last_correct(self) -> NDArray[np.float64]:
        """Last epoch at which it was right; nan if there is none."""
        return self._where_learned(self.counts[1], np.nan)

    @cached_property
    def forgetting_events(self) -> NDArray[np.float64]:
        """Changes from right to wrong between recorded epochs (Toneva et al. 2019).

        The argument `never_learned` gives the value for samples that were never right.
        """
        values = dict(zip(NEVER_LEARNED, (np.nan, self.n_epochs, 1000.0, np.inf, 0.0), strict=True))
        return self._where_learned(self.counts[2], values[self.never_learned])

    @cached_property
    def correctness(self) -> NDArray[np.int64]:
        """Number of epochs at which it was right."""
        return np.asarray(self.counts[3], np.int64)

    @cached_property
    def presentations_needed(self) -> NDArray[np.int64]:
        """Epochs until it stayed right: one past the last wrong epoch; n_epochs if it is wrong at the end."""
        return np.asarray(self.counts[4], np.int64) + 1

    @cached_property
    def forgotten(self) -> NDArray[np.bool_]:
        """Right at some epoch and wrong at the last one: bool."""
        return np.asarray((self.counts[0] >= 0) & (self.counts[4] == self.n_epochs - 1))

    def _where_learned(self, values: NDArray[np.int32], otherwise: float) -> NDArray[np.float64]:
        return np.where(self.counts[0] < 0, otherwise, values)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The six arrays by name, for a table."""
        return {name: getattr(self, name) for name in COLUMNS}

    @classmethod
    def concatenate(cls, parts: Sequence[SampleStatistics]) -> SampleStatistics:
        """Join the statistics of disjoint samples over the same epochs (shards, blocks, machines), in the given order.

        Raises
        ------
        ValueError
            `parts` is empty, or its parts differ in `n_epochs` or `never_learned`.
        """
        if not parts:
            raise ValueError("parts: expected at least one")
        forms = {(p.n_epochs, p.never_learned) for p in parts}
        if len(forms) > 1:
            raise ValueError(f"parts: expected one number of epochs and one never_learned, got {sorted(forms)}")
        return cls(np.concatenate([p.counts for p in parts], axis=1), *forms.pop())


def sample_statistics(correct: Any, *, never_learned: str = "nan", progress: bool = False) -> SampleStatistics:
    """Per-sample learning and forgetting, in one pass.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1
    never_learned : {"nan", "toneva", "cartography", "datadiet", "deepcore"}
        Forgetting events of a sample that was never right: nan, n_epochs, 1000, infinity or 0. The names are those of
        the projects that use the value.
    progress : bool
        As in `forgetting_curves`.

    Returns
    -------
    SampleStatistics

    Raises
    ------
    TypeError, ValueError
        As in `forgetting_curves`; an unknown convention.

    Examples
    --------
    >>> s = sample_statistics([[1, 0, 0], [0, 0, 1], [1, 0, 0]])
    >>> s.forgetting_events, s.forgotten
    (array([ 1., nan,  1.]), array([False, False,  True]))

    References
    ----------
    Toneva et al., "An Empirical Study of Example Forgetting", ICLR 2019; arXiv 2507.08686, Section III.
    """
    m = Matrix(correct)
    _check.choice(never_learned, NEVER_LEARNED, "never_learned")
    counts = [m.kernels.sample_counts(rows, part.stop - part.start) for part, rows in m.blocks(progress)]
    joined = counts[0] if len(counts) == 1 else np.concatenate(counts, axis=1)
    return SampleStatistics(joined, m.n_epochs, never_learned)
