"""Label noise for experiments: symmetric, asymmetric, or from any transition matrix. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _check

Int = NDArray[np.int64]


def symmetric_noise(labels: Any, rate: float, n_classes: int, seed: int) -> Int:
    """Replace a share of the labels by a uniformly drawn OTHER class.

    Exactly round(rate * n) labels become wrong (the papers do not say whether the true class may be drawn again: ours
    may not).

    Parameters
    ----------
    labels : (n_samples,) integers in [0, n_classes)
    rate : float in [0, 1]
    n_classes : int >= 2
    seed : int >= 0

    Returns
    -------
    (n_samples,) int64, a new array

    Raises
    ------
    TypeError, ValueError
        Labels, rate, n_classes or seed out of range.

    Examples
    --------
    >>> int((symmetric_noise([0] * 10, 0.4, 3, seed=0) != 0).sum())
    4
    """
    other = (1.0 - np.eye(_check.number(n_classes, 2, 2**31, "n_classes", int))) / (n_classes - 1)
    return _replace(labels, rate, other, seed)


def asymmetric_noise(labels: Any, rate: float, n_classes: int, seed: int) -> Int:
    """Replace a share of the labels by the next class, the last one by class 0 (pair flips).

    Parameters, result and errors are those of `symmetric_noise`. For another pattern see `transition_noise`.

    Examples
    --------
    >>> asymmetric_noise([0, 1, 2], 1.0, 3, seed=0)
    array([1, 2, 0])
    """
    following = np.roll(np.eye(_check.number(n_classes, 2, 2**31, "n_classes", int)), 1, axis=1)
    return _replace(labels, rate, following, seed)


def transition_noise(labels: Any, transition: Any, seed: int) -> Int:
    """Draw each label anew from the row of its class in a transition matrix.

    Parameters
    ----------
    labels : (n_samples,) integers in [0, n_classes)
    transition : (n_classes, n_classes) floats
        transition[i, j] is the probability that a sample of class i is labelled j; rows sum to 1.
    seed : int >= 0

    Returns
    -------
    (n_samples,) int64, a new array

    Raises
    ------
    TypeError, ValueError
        A matrix that is not square or not stochastic, labels out of range.

    Examples
    --------
    >>> transition_noise([0, 1], [[0.0, 1.0], [0.0, 1.0]], seed=0)
    array([1, 1])
    """
    matrix = _check.probabilities(transition, name="transition")
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"transition: expected a square matrix, got shape {matrix.shape}")
    return _draw(_check.labels(labels, n_classes=len(matrix)), matrix, _generator(seed))


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(_check.number(seed, 0, 2**63, "seed", int))


def _draw(labels: Int, matrix: NDArray[np.float64], generator: np.random.Generator) -> Int:
    """One draw per label from its row, by the inverse of the cumulative distribution."""
    cumulative = np.cumsum(matrix, axis=1)
    u = generator.random(len(labels)) * cumulative[labels, -1]
    return np.asarray((u[:, None] >= cumulative[labels]).sum(1), np.int64)


def _replace(labels: Any, rate: float, matrix: NDArray[np.float64], seed: int) -> Int:
    noisy = _check.labels(labels, n_classes=len(matrix))
    n_wrong = round(_check.number(rate, 0, 1, "rate") * len(noisy))
    generator = _generator(seed)
    chosen = generator.permutation(len(noisy))[:n_wrong]
    noisy[chosen] = _draw(noisy[chosen], matrix, generator)
    return noisy
