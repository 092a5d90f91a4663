"""The kernels of `_reference.py`, compiled by numba: the fallback where no C++ compiler was at hand."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def _curve_counts(correct, reference, counts):  # type: ignore[no-untyped-def]
    at_end = correct[reference]
    for e in range(correct.shape[0]):
        now = correct[e]
        right = retained = 0
        for i in range(correct.shape[1]):
            right += now[i]
            retained += now[i] & at_end[i]
        counts[0, e] = right
        counts[3, e] = retained
    for e in range(correct.shape[0]):
        counts[1, e] = counts[0, e] - counts[3, e]
        counts[2, e] = counts[0, reference] - counts[3, e]


@njit(cache=True, nogil=True)
def _group_sums(correct, reference, groups, weights, sums):  # type: ignore[no-untyped-def]
    at_end = correct[reference]
    for e in range(correct.shape[0]):
        now = correct[e]
        for i in range(correct.shape[1]):
            g, w = groups[i], weights[i]
            if now[i]:
                sums[0, g, e] += w
                sums[3 if at_end[i] else 1, g, e] += w
            elif at_end[i]:
                sums[2, g, e] += w


@njit(cache=True, nogil=True)
def _sample_counts(correct, counts):  # type: ignore[no-untyped-def]
    for e in range(correct.shape[0]):
        for i in range(correct.shape[1]):
            if correct[e, i]:
                counts[3, i] += 1
                counts[1, i] = e
                if counts[0, i] < 0:
                    counts[0, i] = e
            else:
                counts[4, i] = e
                if e > 0 and correct[e - 1, i]:
                    counts[2, i] += 1


@njit(cache=True, nogil=True)
def _overlap_counts(packed, popcount, counts):  # type: ignore[no-untyped-def]
    for i in range(packed.shape[0]):
        for j in range(i, packed.shape[0]):
            total = 0
            for b in range(packed.shape[1]):
                total += popcount[packed[i, b] & packed[j, b]]
            counts[i, j] = counts[j, i] = total


def curve_counts(correct: NDArray[np.bool_], reference: int) -> NDArray[np.int64]:
    counts = np.zeros((4, len(correct)), np.int64)
    _curve_counts(correct, reference, counts)
    return counts


def group_counts(
    correct: NDArray[np.bool_], reference: int, groups: NDArray[np.int64], n_groups: int
) -> NDArray[np.int64]:
    counts = np.zeros((4, n_groups, len(correct)), np.int64)
    _group_sums(correct, reference, groups, np.ones(len(groups), np.int64), counts)
    return counts


def group_sums(
    correct: NDArray[np.bool_],
    reference: int,
    groups: NDArray[np.int64],
    n_groups: int,
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    sums = np.zeros((4, n_groups, len(correct)))
    _group_sums(correct, reference, groups, weights, sums)
    return sums


def sample_counts(correct: NDArray[np.bool_]) -> NDArray[np.int32]:
    counts = np.full((5, correct.shape[1]), -1, np.int32)
    counts[2:4] = 0
    _sample_counts(correct, counts)
    return counts


def overlap_counts(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    popcount = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.int64)
    counts = np.zeros((len(packed), len(packed)), np.int64)
    _overlap_counts(packed, popcount, counts)
    return counts
