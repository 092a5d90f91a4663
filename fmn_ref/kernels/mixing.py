"""Probabilities of two predictors mixed by epsilon: what the NumPy and numba kernels and the fusion share.

The mixture is eps * then + (1 - eps) * now, both (n_samples, n_classes). A sample is right on one interval of eps,
which `intervals` finds. The best epsilon lies where intervals of the most weight overlap (arXiv 2507.08686, Section
IV, searches a grid instead).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._check import BFLOAT16, Array, Bool, Float, Int

_ROUNDING = 4e-15  # bounds the error of a difference of two mixed probabilities, and of a crossing times its slope
_BLOCK = 1 << 16  # elements of (n_samples, n_classes) per block: the fastest of 2^12, 2^14, 2^16 and 2^20


def widened(values: Array) -> Float:
    """Any floating-point type, BFLOAT16 included, as float64; always a copy."""
    if values.dtype == BFLOAT16:
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def mean(epochs: list[Array]) -> Float:
    """Mean of arrays: the sum in order, divided by their number, as every backend computes it."""
    total = widened(epochs[0])
    for e in epochs[1:]:
        total += widened(e)
    total /= len(epochs)
    return total


def blocks(n_samples: int, n_classes: int) -> list[slice]:
    """Slices of the samples that bound the memory of temporary arrays."""
    rows = max(1, _BLOCK // n_classes)
    return [slice(start, start + rows) for start in range(0, n_samples, rows)]


def intervals(now: Float, then: Float, labels: Int) -> Float:
    """The interval of eps in which each sample is right, and the widest one that rounding could make of it.

    A sample is right where its lead over each other class k, a + eps * (b - a), is positive for k < label and not
    negative for k > label (arg-max takes the first of equal scores). A lead that is lost at one end only is lost on one
    side of its crossing. The next double stands for an open end.

    Returns
    -------
    (4, n_samples)
        lo, hi, widest lo, widest hi; lo > hi where the sample is never right.
    """
    at_y = labels[:, None]
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


def weight_inside(lo: Float, hi: Float, w: Int, x: Float) -> Int:
    """Weight of the closed intervals that contain each x; intervals with lo > hi are empty."""
    some = lo <= hi
    lo, hi, w = lo[some], hi[some], w[some]
    return _weight_up_to(lo, w, x, "right") - _weight_up_to(hi, w, x, "left")


def _weight_up_to(at: Float, w: Int, x: Float, side: Any) -> Int:
    """Weight of the places <= x, or < x with side "left"."""
    order = np.argsort(at)
    return np.concatenate([[0], np.cumsum(w[order])])[np.searchsorted(at[order], x, side)]


def best_epsilons(
    find_intervals: Callable[[Float, Float, Int], Float],
    current: Array,
    epochs: list[Array],
    labels: Int,
    weights: Int | None,
    windows: Int,
    grid: Float,
    seen: Array | None = None,
    exact: bool = True,
) -> tuple[Float, Int, Int]:
    """The kernel `Kernels.best_epsilons`, with `intervals` or a faster function of the same results."""
    if weights is not None:  # a sample without weight changes nothing
        some = weights > 0
        current, epochs, labels = current[some], [e[some] for e in epochs], labels[some]
    w = np.ones(len(labels), np.int64) if weights is None else weights[some]
    epsilon, right, on_grid = np.zeros(len(windows)), *np.zeros((2, len(windows)), np.int64)
    for i, (first, last) in enumerate(windows):
        parts = [np.empty((4, 0))]  # of no samples there are no blocks
        for block in blocks(*current.shape):
            then = mean([e[block] for e in epochs[first : last + 1]])
            parts.append(find_intervals(widened(current[block]), then, labels[block]))
        lo, hi, widest_lo, widest_hi = np.concatenate(parts, axis=1)
        epsilon[i], right[i] = _best_stretch(lo, hi, w)
        if len(grid):
            on_grid[i] = weight_inside(widest_lo, widest_hi, w, grid).max()
    return epsilon, right, on_grid


def _best_stretch(lo: Float, hi: Float, w: Int) -> tuple[float, int]:
    """Middle of the best stretch of [0, 1], and the weight that is right there."""
    stops = np.append(np.sort(hi[(lo <= hi) & (hi < 1)]), 1.0)
    begin = np.unique(np.append(lo[(lo <= hi) & (lo > 0)], 0.0))
    right = weight_inside(lo, hi, w, begin)
    end = stops[np.searchsorted(stops, begin)]
    best = np.flatnonzero(right == right.max())
    long = best[end[best] - begin[best] > 1e-12]
    chosen = long[0] if len(long) else best[0]
    return float((begin[chosen] + end[chosen]) / 2), int(right[chosen])
