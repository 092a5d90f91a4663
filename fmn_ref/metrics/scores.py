"""How good predicted probabilities are: accuracy, negative log-likelihood and calibration error. NumPy only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _check

FLOOR = 1e-6  # smaller probabilities count as this one: half precision rounds them to 0
BINS = 15


class Scores(NamedTuple):
    """Scores of predicted probabilities on labelled samples.

    Attributes
    ----------
    accuracy : float
        Share of the samples whose arg-max is the label.
    nll : float
        Negative log-likelihood: the mean of -log p(label), in nats.
    ece : float
        Expected calibration error: the mean distance between confidence and accuracy, in [0, 1].
    """

    accuracy: float
    nll: float
    ece: float

    def __str__(self) -> str:
        """The three numbers with their names."""
        return f"accuracy {self.accuracy:.2%}, NLL {self.nll:.3f}, calibration error {self.ece:.3f}"


def scores(probs: Any, labels: Any) -> Scores:
    """Score predicted probabilities on labelled samples.

    Parameters
    ----------
    probs : (n_samples, n_classes) probabilities
        For the negative log-likelihood, values below 1e-6 count as 1e-6.
    labels : (n_samples,) integers

    Returns
    -------
    Scores
        The calibration error takes 15 bins of equal width of the largest probability.

    Raises
    ------
    TypeError, ValueError
        As `fuse`.

    References
    ----------
    Guo et al. 2017, arXiv 1706.04599, Equation 3 (calibration error).

    Examples
    --------
    >>> accuracy, nll, ece = scores([[0.9, 0.1], [0.6, 0.4]], [0, 1])
    >>> accuracy, round(nll, 3), round(ece, 3)
    (0.5, 0.511, 0.35)
    """
    p = _check.probabilities(probs)
    y = _check.labels(labels, *p.shape)
    confidence, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gap = np.bincount(bins, right - confidence)
    of_label = np.maximum(p[np.arange(len(y)), y], FLOOR)
    return Scores(float(right.mean()), float(-np.log(of_label).mean()), float(np.abs(gap).sum() / len(y)))
