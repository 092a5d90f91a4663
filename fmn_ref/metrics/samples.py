"""Learning and forgetting of each sample: first learned, forgetting events, forgotten at the end. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .matrix import Matrix

NEVER_LEARNED = ("nan", "toneva", "cartography", "datadiet", "deepcore")


@dataclass(frozen=True, eq=False)
class SampleStatistics:
    """Learning and forgetting of each sample; all arrays are (n_samples,).

    Attributes
    ----------
    first_learned : float64
        First epoch at which the sample was right; nan if there is none.
    last_correct : float64
        Last epoch at which it was right; nan if there is none.
    forgetting_events : float64
        Changes from right to wrong between recorded epochs (Toneva et al. 2019). The argument `never_learned` gives the
        value for samples that were never right.
    correctness : int64
        Number of epochs at which it was right.
    presentations_needed : int64
        Epochs until the sample stayed right: one past the last wrong epoch; n_epochs if it is wrong at the end.
    forgotten : bool
        Right at some epoch and wrong at the last one.
    """

    first_learned: NDArray[np.float64]
    last_correct: NDArray[np.float64]
    forgetting_events: NDArray[np.float64]
    correctness: NDArray[np.int64]
    presentations_needed: NDArray[np.int64]
    forgotten: NDArray[np.bool_]

    @classmethod
    def concatenate(cls, parts: Sequence[SampleStatistics]) -> SampleStatistics:
        """Join the statistics of disjoint samples over the same epochs (shards, blocks, machines), in the given order.

        Raises
        ------
        ValueError
            `parts` is empty.
        """
        if not parts:
            raise ValueError("parts: expected at least one")
        return cls(**{name: np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0])})


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
    value = dict(zip(NEVER_LEARNED, (np.nan, m.n_epochs, 1000.0, np.inf, 0.0), strict=True))[never_learned]
    counts = [m.kernels.sample_counts(rows, part.stop - part.start) for part, rows in m.blocks(progress)]
    first, last, events, right, last_wrong = counts[0] if len(counts) == 1 else np.concatenate(counts, axis=1)
    never = first < 0
    return SampleStatistics(
        first_learned=np.where(never, np.nan, first),
        last_correct=np.where(never, np.nan, last),
        forgetting_events=np.where(never, value, events),
        correctness=right.astype(np.int64),
        presentations_needed=last_wrong.astype(np.int64) + 1,
        forgotten=~never & (last_wrong == m.n_epochs - 1),
    )
