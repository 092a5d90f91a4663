"""The best epsilon of a mixture: on a grid, or exactly over [0, 1]. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _check
from .._check import Array, Bool, Float, Int
from ..kernels import mixing
from ..kernels.backend import kernels
from ..kernels.protocol import Seen
from .probabilities import stored_probabilities

_TOTAL = 1 << 58  # sum of the weights as integers: their sums are exact in any order


class Target:
    """Objective of a fusion: the total weight of the samples that are right.

    Weights are integers, so that sums are exact. Samples of weight zero do not count: so cross-validation hides a fold.

    Attributes
    ----------
    labels : (n_samples,) int64
    weights : (n_samples,) int64, or None for 1 each
    total : int
        Sum of the weights.
    """

    def __init__(self, labels: Int, sample_weight: Any = None) -> None:
        self.labels = labels
        self.weights: Int | None = None
        if isinstance(sample_weight, str):
            _check.choice(sample_weight, ("balanced",), "sample_weight")
            sample_weight = 1 / np.bincount(labels)[labels]
        if sample_weight is not None:
            w = _check.weights(sample_weight, len(labels))
            scale = np.frexp(_TOTAL / len(labels))[1] - 1 - np.frexp(w.max())[1]
            self.weights = np.rint(np.ldexp(w, scale)).astype(np.int64)  # a power of two keeps equal weights equal
        self.total = len(labels) if self.weights is None else int(self.weights.sum())

    def weighted(self, weights: Int) -> Target:
        """The same labels with other weights."""
        other = Target(self.labels)
        other.weights, other.total = weights, int(weights.sum())
        return other

    @property
    def each(self) -> Int:
        """The weight of every sample, (n_samples,)."""
        return np.ones(len(self.labels), np.int64) if self.weights is None else self.weights

    def score(self, right: Bool) -> int:
        """Weight of the samples that are right."""
        return int(right.sum() if self.weights is None else self.weights[right].sum())

    def score_of(self, probs: Float) -> int:
        """Weight of the samples whose arg-max is the label."""
        return self.score(probs.argmax(1) == self.labels)

    def mixture_right(self, current: Array, epochs: list[Array], epsilon: Float) -> Int:
        """Weight that is right for each epsilon, with the mean of `epochs` mixed into `current`."""
        return kernels().mixture_right(current, epochs, self.labels, self.weights, epsilon)

    def best_epsilons(self, current: Array, epochs: list[Array], windows: Int, grid: Float) -> tuple[Float, Int, Int]:
        """For windows of `epochs`, which have one type: the results of `Kernels.best_epsilons`."""
        return kernels().best_epsilons(current, epochs, self.labels, self.weights, windows, grid)

    def best_windows(
        self, current: Array, epochs: list[Array], windows: Int, seen: Seen, *, exact: bool
    ) -> tuple[Float, Int]:
        """The same for the searches of one method: epsilons, and weights or, unless `exact`, upper bounds."""
        arrays = current, epochs, self.labels, self.weights
        return kernels().best_epsilons(*arrays, windows, np.empty(0), seen, exact)[:2]


def weight_right(right: Bool, weights: Int) -> Int:
    """Weight of the samples that each epoch has right."""
    # A product of integer matrices takes 3 to 16 times as long: the more samples, the longer for each.
    return np.asarray(np.einsum("en,n->e", right, weights))


def grid_of(step: float) -> Float:
    """0, step, ..., 1."""
    n_steps = round(1 / _check.number(step, 1e-6, 1, "step"))
    if abs(n_steps * step - 1) > 1e-9:
        raise ValueError(f"step: expected a value that divides 1, got {step}")
    return np.asarray(np.arange(n_steps + 1) / n_steps)


def best_on_grid(current: Array, epochs: list[Array], target: Target, grid: Float) -> tuple[float, int]:
    """The first best point of the grid for the mean of `epochs`, and the weight that is right there."""
    right = target.mixture_right(current, epochs, grid)
    best = int(np.argmax(right))
    return float(grid[best]), int(right[best])


def best_exactly(current: Array, epochs: list[Array], target: Target, grid: Float) -> tuple[float, int]:
    """The same over [0, 1], never below the grid; epsilon is 0 if nothing is better than `current`."""
    all_epochs = np.array([[0, len(epochs) - 1]])
    found, bound, on_grid = target.best_epsilons(current, epochs, all_epochs, grid)
    right, at_zero = target.mixture_right(current, epochs, np.array([found[0], 0])).tolist()
    eps, best = (float(found[0]), right) if right > at_zero else (0.0, at_zero)
    if max(int(bound[0]), int(on_grid[0])) > best:  # equal scores, which rounding may decide: look closer
        return _closer(mixing.widened(current), mixing.mean(epochs), target, grid, (eps, best))
    return eps, best


def _closer(
    current: Float, candidate: Float, target: Target, grid: Float, best: tuple[float, int]
) -> tuple[float, int]:
    """Try the middles and ends of all stretches, and the grid, in the order of their bounds."""
    parts = [mixing.intervals(current[b], candidate[b], target.labels[b]) for b in mixing.blocks(*current.shape)]
    lo, hi, widest_lo, widest_hi = np.concatenate(parts, axis=1)
    w = target.each
    some = lo <= hi
    ends = np.unique(np.concatenate([lo[some], hi[some], [0.0, 1.0]]))
    middles = (ends[:-1] + ends[1:]) / 2
    tried = np.concatenate([middles, ends, grid])
    bounds = [mixing.weight_inside(lo, hi, w, x) for x in (middles, ends)]
    bound = np.concatenate([*bounds, mixing.weight_inside(widest_lo, widest_hi, w, grid)])
    eps, right = best
    for i in np.lexsort((tried, np.arange(len(bound)) >= len(middles), -bound)):
        if bound[i] <= right:
            break
        now = target.mixture_right(current, [candidate], tried[i : i + 1])
        if now[0] > right:
            eps, right = float(tried[i]), int(now[0])
    return eps, right


SEARCHES = {"grid": best_on_grid, "exact": best_exactly}


def best_epsilon(
    current: Any, candidate: Any, labels: Any, *, search: str = "grid", step: float = 0.01, sample_weight: Any = None
) -> tuple[float, float]:
    """The epsilon in [0, 1] with the best accuracy of eps * candidate + (1 - eps) * current.

    Parameters
    ----------
    current, candidate : (n_samples, n_classes) probabilities
        Of 16, 32 or 64 bits, bfloat16 tensors included; mixed as float64.
    labels : (n_samples,) integers
    search : {"grid", "exact"}
        Default: "grid", which tries 0, step, ..., 1 and takes the smallest of equally good ones. "exact" finds the best
        epsilon of the whole interval and is never below the grid. Each sample is right on one sub-interval: one pass
        gives their ends, one sort the best count. The result is the middle of the first best stretch (or its end, if
        only equal scores make it best), and 0 if nothing is better than `current`.
    step : float
        Default: 0.01. Distance of the grid's points; 1 / step must be a whole number.
    sample_weight : (n_samples,) floats >= 0, or "balanced", optional
        Default: 1 each. Maximise weighted accuracy; "balanced" gives every class the same weight.

    Returns
    -------
    eps, accuracy : float, float

    Raises
    ------
    TypeError, ValueError
        As `fuse`.

    Examples
    --------
    >>> current, candidate = [[0.65, 0.35], [0.9, 0.1]], [[0.1, 0.9], [0.6, 0.4]]
    >>> best_epsilon(current, candidate, [1, 0])
    (0.28, 1.0)
    >>> eps, accuracy = best_epsilon(current, candidate, [1, 0], search="exact")
    >>> round(eps, 3), accuracy
    (0.636, 1.0)
    """
    find, grid = SEARCHES[_check.choice(search, tuple(SEARCHES), "search")], grid_of(step)
    now = stored_probabilities(current, None, "current")
    then = stored_probabilities(candidate, now.shape, "candidate")
    target = Target(_check.labels(labels, *now.shape), sample_weight)
    eps, right = find(now, [then], target, grid)
    return eps, right / target.total
