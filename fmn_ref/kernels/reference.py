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


def correct_of(rows: Rows, n_samples: int) -> Bool:
    """(n_epochs, n_samples) bool."""
    # `!= 0`: a bool array viewed from other bytes holds other values than 0 and 1, which NumPy may add up as they are
    return unpack(rows, n_samples) if rows.dtype == np.uint8 else rows.view(np.uint8) != 0


def _four(correct: Bool, reference: int) -> tuple[Bool, Bool, Bool, Bool]:
    at_end = correct[reference]
    return correct, correct & ~at_end, ~correct & at_end, correct & at_end


def curve_counts(rows: Rows, n_samples: int, reference: int, counts: Int) -> None:
    """Adds to (4, n_epochs) counts."""
    counts += np.stack([c.sum(1, dtype=np.int64) for c in _four(correct_of(rows, n_samples), reference)])


def group_counts(rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, counts: Int) -> None:
    """Adds to (4, n_groups, n_epochs) counts within groups 0 .. n_groups - 1."""
    for row, c in enumerate(_four(correct_of(rows, n_samples), reference)):
        counts[row] += np.array([np.bincount(groups[of_epoch], minlength=n_groups) for of_epoch in c]).T


def group_sums(
    rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, weights: Float, sums: Float
) -> None:
    """Adds weights to (4, n_groups, n_epochs) sums, in the order of the samples, as all backends do."""
    for row, c in enumerate(_four(correct_of(rows, n_samples), reference)):
        for e, of_epoch in enumerate(c):
            np.add.at(sums[row, :, e], groups, weights * of_epoch)


def sample_counts(rows: Rows, n_samples: int) -> NDArray[np.int32]:
    """(5, n_samples): first right, last right, right-to-wrong changes, times right, last wrong; -1 for never."""
    correct = correct_of(rows, n_samples)
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
        c = correct_of(piece, n).astype(np.float64)
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


# Mixtures: eps * window + (1 - eps) * current, both probabilities (n_samples, n_classes). `epochs` are arrays of one
# type, uint16 with bfloat16; `windows` (n_windows, 2) the first and the last of each, whose mean is taken; `weights`
# (n_samples,) or None.

_ROUNDING = 4e-15  # bounds the error of a difference of two mixed probabilities, and of a crossing times its slope
_BLOCK = 1 << 16  # elements of (n_samples, n_classes) worked on at a time: the fastest of 2^12, 2^14, 2^16 and 2^20


def widened(scores: NDArray[Any], bfloat16: bool = False) -> Float:
    """Any floating-point type as float64."""
    return ((scores.astype(np.uint32) << 16).view(np.float32) if bfloat16 else scores).astype(np.float64)


def mean(epochs: list[NDArray[Any]], bfloat16: bool = False) -> Float:
    """Mean of arrays: the sum in order, divided by their number."""
    total = widened(epochs[0], bfloat16)
    for e in epochs[1:]:
        total += widened(e, bfloat16)
    out: Float = total / len(epochs)
    return out


def check_probabilities(scores: NDArray[Any], tolerance: float, bfloat16: bool = False) -> bool:
    """Whether every row is finite, not negative and sums to 1 within the tolerance."""
    for block in _blocks(*scores.shape):
        p = widened(scores[block], bfloat16)
        sums = np.einsum("ij->i", p)
        if not (p.min() >= 0 and sums.min() >= 1 - tolerance and sums.max() <= 1 + tolerance):
            return False
    return True


def mixture_right(
    current: NDArray[Any],
    epochs: list[NDArray[Any]],
    labels: Int,
    weights: Int | None,
    epsilon: Float,
    bfloat16: bool = False,
) -> Int:
    """(n_epsilons,) weight of the samples that the mixture with the mean of all the epochs gets right."""
    w = np.ones(len(labels), np.int64) if weights is None else weights
    right = np.zeros(len(epsilon), np.int64)
    for block in _blocks(*current.shape):
        then = mean([e[block] for e in epochs], bfloat16)
        for i, eps in enumerate(epsilon):
            mixed = eps * then + (1 - eps) * widened(current[block])
            right[i] += w[block][mixed.argmax(1) == labels[block]].sum()
    return right


def best_epsilons(
    current: NDArray[Any],
    epochs: list[NDArray[Any]],
    labels: Int,
    weights: Int | None,
    windows: Int,
    grid: Float,
    bfloat16: bool = False,
    intervals: Any = None,
) -> tuple[Float, Int, Int]:
    """For each window: the best epsilon, the weight right there, and a bound of the weight right on the grid.

    The best epsilon is the middle of the first stretch of [0, 1] where the most weight is right and that is longer than
    1e-12; of the first one if none is.
    """
    if weights is not None:  # a sample without weight is as if it were not there
        some = weights > 0
        current, epochs, labels = current[some], [e[some] for e in epochs], labels[some]
    w = np.ones(len(labels), np.int64) if weights is None else weights[some]
    found = []
    for first, last in windows:
        parts = []
        for block in _blocks(*current.shape):
            then = mean([e[block] for e in epochs[first : last + 1]], bfloat16)
            parts.append((intervals or _intervals)(widened(current[block]), then, labels[block]))
        lo, hi, widest_lo, widest_hi = np.concatenate(parts, axis=1)
        on_grid = _inside(widest_lo, widest_hi, w, grid).max() if len(grid) else 0
        found.append((*_best_stretch(lo, hi, w), on_grid))
    return tuple(np.array(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def _blocks(n_samples: int, n_classes: int) -> list[slice]:
    rows = max(1, _BLOCK // n_classes)
    return [slice(start, start + rows) for start in range(0, n_samples, rows)]


def _intervals(now: Float, then: Float, y: Int) -> Float:
    """(4, n_samples): the interval of epsilon on which each sample is right, and the widest rounding could make of it.

    A sample is right where its lead over each other class k, a + eps * (b - a), is positive for k < y and not negative
    for k > y (arg-max takes the first of equal scores): a lead that is lost at one end alone is lost on one side of its
    crossing. An open end is given as the next double; lo > hi where the sample is never right.
    """
    at_y = y[:, None]
    a, b = np.take_along_axis(now, at_y, 1) - now, np.take_along_axis(then, at_y, 1) - then
    before = np.arange(now.shape[1]) < at_y
    lost_now, lost_then = np.where(before, a <= 0, a < 0), np.where(before, b <= 0, b < 0)

    def highest(mask: Bool, values: Float, default: float) -> Float:
        return np.asarray(np.where(mask, values, default).max(1))

    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = np.maximum(a / (a - b), np.finfo(float).smallest_subnormal)
        wide_a, wide_b = a + _ROUNDING, b + _ROUNDING
        wide_crossing = wide_a / (wide_a - wide_b)
    lo, open_lo = highest(lost_now & ~before, crossing, 0.0), highest(lost_now & before, crossing, -1.0)
    hi, open_hi = -highest(lost_then & ~before, -crossing, -1.0), -highest(lost_then & before, -crossing, -2.0)
    lo = np.where(open_lo >= lo, np.minimum(np.nextafter(open_lo, 2), 1), lo)
    hi = np.where(open_hi <= hi, np.nextafter(open_hi, -1), hi)
    widest_lo, widest_hi = highest(wide_a < 0, wide_crossing, 0.0), -highest(wide_b < 0, -wide_crossing, -1.0)
    never, surely_never = (lost_now & lost_then).any(1), ((wide_a < 0) & (wide_b < 0)).any(1)
    lo, hi = np.where(never, 1.0, lo), np.where(never, 0.0, hi)
    return np.stack([lo, hi, np.where(surely_never, 1.0, widest_lo), np.where(surely_never, 0.0, widest_hi)])


def _inside(lo: Float, hi: Float, w: Int, x: Float) -> Int:
    """Weight of the closed intervals, empty ones left out, in which each x lies."""
    some = lo <= hi
    lo, hi, w = lo[some], hi[some], w[some]
    return _sum_to(lo, w, x, "right") - _sum_to(hi, w, x, "left")


def _sum_to(at: Float, w: Int, x: Float, side: Any) -> Int:
    """Weight at places up to x; with side "left", below it."""
    order = np.argsort(at)
    return np.concatenate([[0], np.cumsum(w[order])])[np.searchsorted(at[order], x, side)]


def _best_stretch(lo: Float, hi: Float, w: Int) -> tuple[float, int]:
    stops = np.append(np.sort(hi[(lo <= hi) & (hi < 1)]), 1.0)
    begin = np.unique(np.append(lo[(lo <= hi) & (lo > 0)], 0.0))
    right = _inside(lo, hi, w, begin)
    end = stops[np.searchsorted(stops, begin)]
    best = np.flatnonzero(right == right.max())
    long = best[end[best] - begin[best] > 1e-12]
    chosen = long[0] if len(long) else best[0]
    return float((begin[chosen] + end[chosen]) / 2), int(right[chosen])
