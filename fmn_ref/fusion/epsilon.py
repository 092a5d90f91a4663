"""The best epsilon of a mixture: on a grid, or exactly over [0, 1]; of one candidate, or of every window at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..kernels import reference
from ..kernels.backend import load
from ..metrics.curves import correctness

Float = NDArray[np.float64]
Int = NDArray[np.int64]
_TOTAL = 1 << 58  # what weights add up to, as whole numbers: sums are exact, in any order


class Target:
    """What is maximised: the labels, and the samples' weights as whole numbers (None: 1 each)."""

    def __init__(self, labels: Int, sample_weight: Any = None) -> None:
        self.labels = labels
        self.weights: Int | None = None
        if isinstance(sample_weight, str):
            _check.choice(sample_weight, ("balanced",), "sample_weight")
            sample_weight = 1 / np.bincount(labels)[labels]
        if sample_weight is not None:
            w = _check.weights(sample_weight, len(labels))
            scale = np.frexp(_TOTAL / len(labels))[1] - 1 - np.frexp(w.max())[1]
            self.weights = np.rint(np.ldexp(w, scale)).astype(np.int64)  # a power of two: what is even stays so
        self.total = len(labels) if self.weights is None else int(self.weights.sum())

    def weighted(self, weights: Int) -> Target:
        """The same with other weights; samples of weight 0 are as if they were not there."""
        other = Target(self.labels)
        other.weights, other.total = weights, int(weights.sum())
        return other

    @property
    def each(self) -> Int:
        """The weight of every sample."""
        return np.ones(len(self.labels), np.int64) if self.weights is None else self.weights

    def score(self, right: NDArray[np.bool_]) -> int:
        """Weight of the samples that are right."""
        return int(right.sum() if self.weights is None else self.weights[right].sum())


def grid_of(step: float) -> Float:
    n_steps = round(1 / _check.number(step, 1e-6, 1, "step"))
    if abs(n_steps * step - 1) > 1e-9:
        raise ValueError(f"step: expected a value that divides 1, got {step}")
    return np.asarray(np.arange(n_steps + 1) / n_steps)


def best_on_grid(
    cur: NDArray[Any], epochs: list[Any], bfloat16: bool, target: Target, grid: Float
) -> tuple[float, int]:
    """The first best point of the grid for the mean of `epochs`, and the weight that is right there."""
    right = load()[0].mixture_right(cur, epochs, target.labels, target.weights, grid, bfloat16)
    best = int(np.argmax(right))
    return float(grid[best]), int(right[best])


def best_exactly(
    cur: NDArray[Any], epochs: list[Any], bfloat16: bool, target: Target, grid: Float
) -> tuple[float, int]:
    """The same over [0, 1], and nowhere below the grid; 0 when nothing is better than the current predictor."""
    kernels = load()[0]
    all_of_them = np.array([[0, len(epochs) - 1]])
    args = cur, epochs, target.labels, target.weights
    found, bound, on_grid = kernels.best_epsilons(*args, all_of_them, grid, bfloat16)
    right = int(kernels.mixture_right(*args, found, bfloat16)[0])
    at_zero = target.score(correctness(cur, target.labels))
    eps, best = (float(found[0]), right) if right > at_zero else (0.0, at_zero)
    if max(int(bound[0]), int(on_grid[0])) > best:  # equal scores, which rounding may decide: look closer
        return _closer(reference.widened(cur), reference.mean(epochs, bfloat16), target, grid, (eps, best))
    return eps, best


def _closer(cur: Float, new: Float, target: Target, grid: Float, best: tuple[float, int]) -> tuple[float, int]:
    """Try all middles and ends of stretches, and the grid, the most promising first."""
    parts = [reference._intervals(cur[b], new[b], target.labels[b]) for b in reference._blocks(*cur.shape)]
    lo, hi, widest_lo, widest_hi = np.concatenate(parts, axis=1)
    w = target.each
    some = lo <= hi
    ends = np.unique(np.concatenate([lo[some], hi[some], [0.0, 1.0]]))
    middles = (ends[:-1] + ends[1:]) / 2
    candidates = np.concatenate([middles, ends, grid])
    bounds = [reference._inside(lo, hi, w, x) for x in (middles, ends)]
    bound = np.concatenate([*bounds, reference._inside(widest_lo, widest_hi, w, grid)])
    eps, right = best
    for i in np.lexsort((candidates, np.arange(len(bound)) >= len(middles), -bound)):
        if bound[i] <= right:
            break
        now = load()[0].mixture_right(cur, [new], target.labels, target.weights, candidates[i : i + 1])
        if now[0] > right:
            eps, right = float(candidates[i]), int(now[0])
    return eps, right


SEARCHES = {"grid": best_on_grid, "exact": best_exactly}
