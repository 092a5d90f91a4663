"""Label noise for experiments: symmetric, asymmetric, or from a transition matrix. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check

Int = NDArray[np.int64]


def symmetric_noise(labels: Any, rate: float, n_classes: int, seed: int) -> Int:
    """Replace a share of the labels by another class, drawn uniformly.

    Exactly round(rate * n_samples) labels become wrong. The papers do not say whether the true class may be drawn; here
    it may not.

    Parameters
    ----------
    labels : (n_samples,) integers
        Classes in [0, n_classes).
    rate : float
        Share of wrong labels, in [0, 1].
    n_classes : int
        At least 2.
    seed : int
        At least 0.

    Returns
    -------
    (n_samples,) int64 array
        A new array.

    Raises
    ------
    TypeError, ValueError
        `labels`, `rate`, `n_classes` or `seed` of the wrong type or out of range.

    Examples
    --------
    >>> int((symmetric_noise([0] * 10, 0.4, 3, seed=0) != 0).sum())
    4
    """
    return _shift(labels, rate, n_classes, seed, lambda generator, n: generator.integers(1, n_classes, n))


def asymmetric_noise(labels: Any, rate: float, n_classes: int, seed: int) -> Int:
    """Replace a share of the labels by the next class, and the last class by class 0 (pair flips).

    For another pattern use `transition_noise`.

    Parameters
    ----------
    labels, rate, n_classes, seed
        As in `symmetric_noise`.

    Returns
    -------
    (n_samples,) int64 array
        A new array.

    Raises
    ------
    TypeError, ValueError
        As in `symmetric_noise`.

    Examples
    --------
    >>> asymmetric_noise([0, 1, 2], 1.0, 3, seed=0)
    array([1, 2, 0])
    """
    return _shift(labels, rate, n_classes, seed, lambda generator, n: np.ones(n, np.int64))


def transition_noise(labels: Any, transition: Any, seed: int) -> Int:
    """Draw each label from the row of its class in a transition matrix.

    Parameters
    ----------
    labels : (n_samples,) integers
        Classes in [0, n_classes).
    transition : (n_classes, n_classes) floats
        transition[i, j] is the probability that a sample of class i gets label j; rows sum to 1.
    seed : int
        At least 0.

    Returns
    -------
    (n_samples,) int64 array
        A new array.

    Raises
    ------
    TypeError, ValueError
        `transition` is not square or its rows are no probabilities; `labels` or `seed` out of range.

    Examples
    --------
    >>> transition_noise([0, 1], [[0.0, 1.0], [0.0, 1.0]], seed=0)
    array([1, 1])
    """
    matrix = _check.probabilities(transition, name="transition")
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"transition: expected a square matrix, got shape {matrix.shape}")
    y = _check.labels(labels, n_classes=len(matrix))
    u = _generator(seed).random(len(y))
    cumulative = np.cumsum(matrix, axis=1)
    noisy = np.empty_like(y)
    for c in np.unique(y):  # inverse transform sampling
        noisy[y == c] = np.searchsorted(cumulative[c], u[y == c] * cumulative[c, -1], "right")
    return noisy


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(_check.number(seed, 0, 2**63, "seed", int))


def _shift(labels: Any, rate: float, n_classes: int, seed: int, draw: Callable[[np.random.Generator, int], Int]) -> Int:
    """Add drawn numbers, modulo n_classes, to round(rate * n_samples) labels chosen at random."""
    n_classes = _check.number(n_classes, 2, 2**31, "n_classes", int)
    noisy = _check.labels(labels, n_classes=n_classes)
    n_wrong = round(_check.number(rate, 0, 1, "rate") * len(noisy))
    generator = _generator(seed)
    chosen = generator.permutation(len(noisy))[:n_wrong]
    noisy[chosen] = (noisy[chosen] + draw(generator, n_wrong)) % n_classes
    return noisy
