"""The expected gain of a fusion, estimated from the correctness history alone. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _check
from ..metrics.curves import forgetting_curves

# Least squares over the settings of the benchmark suite (docs/results.md): `fit_rule` in
# benchmarks/experiments/tables.py. ERROR is the root mean square on settings that were left out.
RULE = {"constant": -0.015, "peak": 0.6709, "churn": -0.0965, "drop": 0.4915}
ERROR = 0.0192


def features(correct: Any) -> dict[str, float]:
    """The rule's inputs, as shares of the samples.

    Returns
    -------
    dict
        peak: the peak forget fraction; churn: samples right at an epoch and wrong at the next, mean over the epochs;
        drop: best accuracy of any epoch minus the final accuracy.
    """
    right = _check.bool_matrix(correct)
    curves = forgetting_curves(right)
    churn = (right[:-1] & ~right[1:]).mean() if len(right) > 1 else 0.0
    drop = curves.accuracy.max() - curves.accuracy[-1]
    return {"peak": float(curves.forget.max()), "churn": float(churn), "drop": float(drop)}


def expected_gain(correct: Any) -> tuple[float, float]:
    """Estimate the accuracy that fusing a run's checkpoints adds to the final model, and the error of the estimate.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1, or a CorrectnessHistory

    Returns
    -------
    gain, error : float, float
        As shares of the samples. The rule is linear and was fitted on image classifiers (Results in the documentation
        says how): a hint.

    Examples
    --------
    >>> gain, error = expected_gain([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]])
    """
    f = features(correct)
    gain = RULE["constant"] + sum(RULE[name] * value for name, value in f.items())
    return float(np.clip(gain, 0, 1)), ERROR
