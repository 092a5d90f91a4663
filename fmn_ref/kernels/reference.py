"""The kernels in NumPy, a few lines each and obviously right: the oracle of the tests, and the backend "numpy".

`protocol.py` says what each function computes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._check import BFLOAT16, Array, Bool, Float, Int
from . import mixing
from .protocol import Bits, Rows

reads_bits = False


def instruction_set() -> str:
    return "numpy"


def threads() -> int:
    return 1


def correct_of(rows: Rows, n_samples: int) -> Bool:
    """(n_epochs, n_samples) bool from either form of rows."""
    # `!= 0`: a bool array viewed from other bytes holds other values than 0 and 1, which NumPy may add up as they are
    return unpack(rows, n_samples) if rows.dtype == np.uint8 else rows.view(np.uint8) != 0


def four_outcomes(correct: Any, reference: int) -> tuple[Any, Any, Any, Any]:
    """Right, forgotten, learned and retained: four bool arrays or tensors (n_epochs, n_samples)."""
    at_end = correct[reference]
    return correct, correct & ~at_end, ~correct & at_end, correct & at_end


def curve_counts(rows: Rows, n_samples: int, reference: int, counts: Int) -> None:
    outcomes = four_outcomes(correct_of(rows, n_samples), reference)
    counts += np.stack([c.sum(1, dtype=np.int64) for c in outcomes])


def group_sums(
    rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, weights: Float | None, sums: Array
) -> None:
    w = np.ones(n_samples, np.int64) if weights is None else weights
    for row, c in enumerate(four_outcomes(correct_of(rows, n_samples), reference)):
        for e, of_epoch in enumerate(c):
            np.add.at(sums[row, :, e], groups, w * of_epoch)


def sample_counts(rows: Rows, n_samples: int) -> NDArray[np.int32]:
    correct = correct_of(rows, n_samples)
    n = len(correct)

    def first(c: Bool) -> Int:
        return np.where(c.any(0), c.argmax(0), -1)

    def last(c: Bool) -> Int:
        return np.where(c.any(0), n - 1 - c[::-1].argmax(0), -1)

    events = (correct[:-1] & ~correct[1:]).sum(0)
    return np.stack([first(correct), last(correct), events, correct.sum(0), last(~correct)]).astype(np.int32)


def overlap_counts(rows: Rows, n_samples: int, counts: Int) -> None:
    """Products of 0 and 1 in float64 are exact up to 2^53."""
    step = 65536  # samples per block, to bound the memory
    for start in range(0, n_samples, step):
        n = min(step, n_samples - start)
        packed = rows.dtype == np.uint8
        piece = rows[:, start // 8 : (start + step) // 8] if packed else rows[:, start : start + step]
        c = correct_of(piece, n).astype(np.float64)
        counts += (c @ c.T).astype(np.int64)


def pack(rows: Bool, n_samples: int) -> Bits:
    return np.packbits(rows, axis=1, bitorder="little")


def unpack(rows: Bits, n_samples: int) -> Bool:
    return np.unpackbits(rows, axis=1, count=n_samples, bitorder="little").view(np.bool_)


def pack_predictions(predictions: Array, labels: Int) -> Bits:
    return pack(predictions == labels, len(labels))


def pack_scores(scores: Array, labels: Int) -> Bits | None:
    a = mixing.widened(scores) if scores.dtype == BFLOAT16 else scores
    if np.isnan(a).any():
        return None
    return np.packbits(a.argmax(-1) == labels, bitorder="little")


def check_probabilities(scores: Array, tolerance: float) -> bool:
    for block in mixing.blocks(*scores.shape):
        p = mixing.widened(scores[block])
        sums = np.einsum("ij->i", p)
        if not (p.min() >= 0 and sums.min() >= 1 - tolerance and sums.max() <= 1 + tolerance):
            return False
    return True


def mixture_right(current: Array, epochs: list[Array], labels: Int, weights: Int | None, epsilon: Float) -> Int:
    w = np.ones(len(labels), np.int64) if weights is None else weights
    right = np.zeros(len(epsilon), np.int64)
    for block in mixing.blocks(*current.shape):
        then = mixing.mean([e[block] for e in epochs])
        for i, eps in enumerate(epsilon):
            mixed = eps * then + (1 - eps) * mixing.widened(current[block])
            right[i] += w[block][mixed.argmax(1) == labels[block]].sum()
    return right


best_epsilons = partial(mixing.best_epsilons, mixing.intervals)
