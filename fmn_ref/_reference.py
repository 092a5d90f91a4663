"""The kernels as short NumPy functions: the oracle of the tests, and the backend "numpy".

Every backend has these five names. `correct` is (n_epochs, n_samples) bool; four-row results are, in order, right,
forgotten, learned and retained against the reference epoch (METHOD: F_e is forgotten / n, L_e is learned / n).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]


def _four(correct: Bool, reference: int) -> tuple[Bool, Bool, Bool, Bool]:
    at_end = correct[reference]
    return correct, correct & ~at_end, ~correct & at_end, correct & at_end


def curve_counts(correct: Bool, reference: int) -> NDArray[np.int64]:
    """(4, n_epochs) counts."""
    return np.stack([c.sum(1, dtype=np.int64) for c in _four(correct, reference)])


def group_counts(correct: Bool, reference: int, groups: NDArray[np.int64], n_groups: int) -> NDArray[np.int64]:
    """(4, n_groups, n_epochs) counts within groups 0 .. n_groups - 1."""
    return group_sums(correct, reference, groups, n_groups, np.ones(len(groups))).astype(np.int64)


def group_sums(
    correct: Bool, reference: int, groups: NDArray[np.int64], n_groups: int, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(4, n_groups, n_epochs) sums of weights; bincount adds in the order of the samples, and so do all backends."""
    return np.array(
        [[np.bincount(groups, weights * row, n_groups) for row in c] for c in _four(correct, reference)]
    ).transpose(0, 2, 1)


def sample_counts(correct: Bool) -> NDArray[np.int32]:
    """(5, n_samples): first right, last right, right-to-wrong changes, times right, last wrong; -1 for never."""
    n = len(correct)

    def first(c: Bool) -> NDArray[np.int64]:
        return np.where(c.any(0), c.argmax(0), -1)

    def last(c: Bool) -> NDArray[np.int64]:
        return np.where(c.any(0), n - 1 - c[::-1].argmax(0), -1)

    events = (correct[:-1] & ~correct[1:]).sum(0)
    rows = [first(correct), last(correct), events, correct.sum(0), last(~correct)]
    return np.stack(rows).astype(np.int32)


def overlap_counts(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(n_epochs, n_epochs) number of bits set in both rows; float64 products of 0 and 1 are exact up to 2^53."""
    counts = np.zeros((len(packed), len(packed)))
    for start in range(0, packed.shape[1], 8192):  # unpacked blocks of 64 Ki samples bound the memory
        bits = np.unpackbits(packed[:, start : start + 8192], axis=1).astype(np.float64)
        counts += bits @ bits.T
    return counts.astype(np.int64)
