"""Summaries of a whole run for the command line and the report, in one reading of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .curves import ForgettingCurves
from .matrix import Matrix


def curves_and_forgotten(correct: Any, *, reference: int = -1, progress: bool = False) -> tuple[ForgettingCurves, int]:
    """Count the curves and the forgotten samples in one pass.

    Parameters
    ----------
    correct, reference, progress
        As `forgetting_curves`.

    Returns
    -------
    curves : ForgettingCurves
    n_forgotten : int
        Samples that are right at some epoch and wrong at the reference epoch.
    """
    m = Matrix(correct)
    r = _check.index(reference, m.n_epochs, "reference")
    counts, ever_counts = np.zeros((4, m.n_epochs), np.int64), np.zeros((4, 2), np.int64)
    for part, rows in m.blocks(progress):
        n = part.stop - part.start
        m.kernels.curve_counts(rows, n, r, counts)
        ever_right = np.stack([np.bitwise_or.reduce(rows, axis=0), rows[r]])
        m.kernels.curve_counts(ever_right, n, 1, ever_counts)
    return ForgettingCurves(counts, m.n_samples, m.n_samples, r), int(ever_counts[1, 0])


def first_samples(correct: Any) -> NDArray[Any]:
    """The first samples of a matrix or a history, one byte each: at most 65 536, and about 64 MB in all."""
    n_epochs = len(correct)
    n = min(65536, max(64, (1 << 26) // n_epochs // 8 * 8))
    if not hasattr(correct, "packed"):
        return np.asarray(correct[:, :n])
    n = min(n, correct.n_samples)
    bits = correct.packed[:, : -(-n // 8)]
    return np.unpackbits(bits, axis=1, count=n, bitorder="little")
