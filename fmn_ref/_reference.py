"""The kernels as short NumPy functions: the oracle of the tests, and the backend "numpy".

Every backend has these names. `rows` is the correctness of all epochs for n_samples samples: (n_epochs, n_samples)
bool, or bits (n_epochs, ceil(n_samples / 8)) uint8, the least significant first. Counting functions add to their last
argument, so that a matrix can be given in pieces of its samples. Four-row results are, in order, right, forgotten,
learned and retained against the reference epoch (METHOD: F_e is forgotten / n, L_e is learned / n).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]
Bool = NDArray[np.bool_]
Bits = NDArray[np.uint8]
Int = NDArray[np.int64]
Float = NDArray[np.float64]


def _correct(rows: Rows, n_samples: int) -> Bool:
    # `!= 0`: a bool array viewed from other bytes holds other values than 0 and 1, which NumPy may add up as they are
    return unpack(rows, n_samples) if rows.dtype == np.uint8 else rows.view(np.uint8) != 0


def _four(correct: Bool, reference: int) -> tuple[Bool, Bool, Bool, Bool]:
    at_end = correct[reference]
    return correct, correct & ~at_end, ~correct & at_end, correct & at_end


def curve_counts(rows: Rows, n_samples: int, reference: int, counts: Int) -> None:
    """Adds to (4, n_epochs) counts."""
    counts += np.stack([c.sum(1, dtype=np.int64) for c in _four(_correct(rows, n_samples), reference)])


def group_counts(rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, counts: Int) -> None:
    """Adds to (4, n_groups, n_epochs) counts within groups 0 .. n_groups - 1."""
    for row, c in enumerate(_four(_correct(rows, n_samples), reference)):
        counts[row] += np.array([np.bincount(groups[of_epoch], minlength=n_groups) for of_epoch in c]).T


def group_sums(
    rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, weights: Float, sums: Float
) -> None:
    """Adds weights to (4, n_groups, n_epochs) sums, in the order of the samples, as all backends do."""
    for row, c in enumerate(_four(_correct(rows, n_samples), reference)):
        for e, of_epoch in enumerate(c):
            np.add.at(sums[row, :, e], groups, weights * of_epoch)


def sample_counts(rows: Rows, n_samples: int) -> NDArray[np.int32]:
    """(5, n_samples): first right, last right, right-to-wrong changes, times right, last wrong; -1 for never."""
    correct = _correct(rows, n_samples)
    n = len(correct)

    def first(c: Bool) -> Int:
        return np.where(c.any(0), c.argmax(0), -1)

    def last(c: Bool) -> Int:
        return np.where(c.any(0), n - 1 - c[::-1].argmax(0), -1)

    events = (correct[:-1] & ~correct[1:]).sum(0)
    return np.stack([first(correct), last(correct), events, correct.sum(0), last(~correct)]).astype(np.int32)


def overlap_counts(rows: Rows, n_samples: int, counts: Int) -> None:
    """Adds to (n_epochs, n_epochs): samples right at both; products of 0 and 1 in float64 are exact up to 2^53."""
    step = 65536  # samples at a time bound the memory
    for start in range(0, n_samples, step):
        n = min(step, n_samples - start)
        packed = rows.dtype == np.uint8
        piece = rows[:, start // 8 : (start + step) // 8] if packed else rows[:, start : start + step]
        c = _correct(piece, n).astype(np.float64)
        counts += (c @ c.T).astype(np.int64)


def pack(rows: Bool, n_samples: int) -> Bits:
    """(n_epochs, ceil(n_samples / 8)) bits, zero past the last sample."""
    return np.packbits(rows, axis=1, bitorder="little")


def unpack(rows: Bits, n_samples: int) -> Bool:
    """(n_epochs, n_samples) bool."""
    return np.unpackbits(rows, axis=1, count=n_samples, bitorder="little").view(np.bool_)


def pack_predictions(predictions: NDArray[Any], labels: Int) -> Bits:
    """(n_epochs, ceil(n_samples / 8)) bits: whether predictions (n_epochs, n_samples) are the labels."""
    return pack(predictions == labels, len(labels))


def pack_scores(scores: NDArray[Any], labels: Int, bfloat16: bool = False) -> Bits | None:
    """(ceil(n_samples / 8),) bits: whether the arg-max of scores (n_samples, n_classes) is the label; None for a NaN.

    With bfloat16, scores are uint16 that hold the upper halves of float32.
    """
    a = (scores.astype(np.uint32) << 16).view(np.float32) if bfloat16 else scores
    if np.isnan(a).any():
        return None
    row: Bits = pack((a.argmax(-1) == labels)[None], len(labels))[0]
    return row
