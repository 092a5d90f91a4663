"""The kernels compiled by numba: the fallback if there was no C++ compiler. `protocol.py` says what each computes."""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .._check import Array, Bool, Float, Int
from . import mixing
from .protocol import Rows
from .reference import check_probabilities, mixture_right, pack, pack_predictions, pack_scores, threads, unpack  # noqa: F401

reads_bits = False


def instruction_set() -> str:
    return "llvm"


def _unpacked(rows: Rows, n_samples: int) -> Bool:
    return unpack(rows, n_samples) if rows.dtype == np.uint8 else rows


@njit(cache=True, nogil=True)
def _add_curves(correct, reference, counts):  # type: ignore[no-untyped-def]
    at_end = correct[reference]
    right_at_end = at_end.sum()
    for e in range(correct.shape[0]):
        now = correct[e]
        right = retained = 0
        for i in range(correct.shape[1]):
            right += now[i]
            retained += now[i] & at_end[i]
        counts[0, e] += right
        counts[1, e] += right - retained
        counts[2, e] += right_at_end - retained
        counts[3, e] += retained


@njit(cache=True, nogil=True)
def _add_groups(correct, reference, groups, weights, sums):  # type: ignore[no-untyped-def]
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
def _count_samples(correct, counts):  # type: ignore[no-untyped-def]
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
def _add_overlaps(packed, popcount, counts):  # type: ignore[no-untyped-def]
    for i in range(packed.shape[0]):
        for j in range(i, packed.shape[0]):
            total = 0
            for b in range(packed.shape[1]):
                total += popcount[packed[i, b] & packed[j, b]]
            counts[i, j] += total
            if i != j:
                counts[j, i] += total


@njit(cache=True, nogil=True)
def _find_intervals(now, then, labels):  # type: ignore[no-untyped-def]
    rounding, least = 4e-15, 5e-324  # as in mixing.py; the least double above 0
    out = np.empty((4, len(labels)))
    for i in range(len(labels)):
        y = labels[i]
        lo, hi, open_lo, open_hi, widest_lo, widest_hi = 0.0, 1.0, -1.0, 2.0, 0.0, 1.0
        never = surely_never = False
        for k in range(now.shape[1]):
            a, b = now[i, y] - now[i, k], then[i, y] - then[i, k]
            lost_now, lost_then = a < 0 or (a == 0 and k < y), b < 0 or (b == 0 and k < y)
            wide_a, wide_b = a + rounding, b + rounding
            if wide_a < 0 and wide_b < 0:
                surely_never = True
                break
            if wide_a < 0:
                widest_lo = max(widest_lo, wide_a / (wide_a - wide_b))
            if wide_b < 0:
                widest_hi = min(widest_hi, wide_a / (wide_a - wide_b))
            if lost_now and lost_then:
                never = True
            elif lost_now and k < y:
                open_lo = max(open_lo, a / (a - b), least)
            elif lost_now:
                lo = max(lo, a / (a - b), least)
            elif lost_then and k < y:
                open_hi = min(open_hi, max(a / (a - b), least))
            elif lost_then:
                hi = min(hi, max(a / (a - b), least))
        if open_lo >= lo:
            lo = min(np.nextafter(open_lo, 2.0), 1.0)
        if open_hi <= hi:
            hi = np.nextafter(open_hi, -1.0)
        if never or surely_never:
            lo, hi = 1.0, 0.0
        if surely_never:
            widest_lo, widest_hi = 1.0, 0.0
        out[0, i], out[1, i], out[2, i], out[3, i] = lo, hi, widest_lo, widest_hi
    return out


best_epsilons = partial(mixing.best_epsilons, _find_intervals)


def curve_counts(rows: Rows, n_samples: int, reference: int, counts: Int) -> None:
    _add_curves(_unpacked(rows, n_samples), reference, counts)


def group_sums(
    rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, weights: Float | None, sums: Array
) -> None:
    w = np.ones(n_samples, np.int64) if weights is None else weights
    _add_groups(_unpacked(rows, n_samples), reference, groups, w, sums)


def sample_counts(rows: Rows, n_samples: int) -> NDArray[np.int32]:
    counts = np.full((5, n_samples), -1, np.int32)
    counts[2:4] = 0
    _count_samples(_unpacked(rows, n_samples), counts)
    return counts


def overlap_counts(rows: Rows, n_samples: int, counts: Int) -> None:
    popcount = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.int64)
    _add_overlaps(pack(_unpacked(rows, n_samples), n_samples), popcount, counts)
