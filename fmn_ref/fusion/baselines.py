"""Simple choices of epochs that a fusion has to beat, each as {epoch: weight} over the rows of the history. NumPy only.

`FusionPlan.from_weights(weights, n_epochs)` turns them into a plan, `averaged_model(run, weights, ...)` into one model
with averaged weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .mixtures import window_epochs

Weights = dict[int, float]


def equal_weights(epochs: Any) -> Weights:
    """The same weight for each of the epochs."""
    chosen = sorted({int(e) for e in epochs})
    return {e: 1 / len(chosen) for e in chosen}


def last_epochs(n_epochs: int, k: int = 1) -> Weights:
    """The last k epochs ("horizontal")."""
    return equal_weights(range(max(0, n_epochs - k), n_epochs))


def equally_spaced(n_epochs: int, k: int) -> Weights:
    """k epochs at equal distances, the last one among them ("fixed jumps")."""
    return equal_weights(n_epochs - 1 - (np.arange(k) * n_epochs) // k)


def best_epoch(correct: Any) -> Weights:
    """The epoch with the best selection accuracy; the earliest of equal ones."""
    return top_epochs(correct, 1)


def top_epochs(correct: Any, k: int) -> Weights:
    """The k epochs with the best selection accuracy; earlier ones first among equals."""
    n_right = _check.bool_matrix(correct).sum(1)
    return equal_weights(np.argsort(-n_right, kind="stable")[:k])


def best_window(probs: Any, labels: NDArray[np.int64], window: int) -> Weights:
    """The mean over e - window .. e + window with the best selection accuracy; the earliest of equal ones."""
    windows = [window_epochs(e, window, len(probs)) for e in range(len(probs))]
    n_right: list[int] = []
    held: dict[int, NDArray[np.float64]] = {}
    for w in windows:  # hold one window at a time
        held = {e: held[e] if e in held else np.asarray(probs[e], np.float64) for e in w}
        total = held[w[0]].copy()
        for e in w[1:]:
            total += held[e]
        n_right.append(int((total.argmax(1) == labels).sum()))
    return equal_weights(windows[int(np.argmax(n_right))])


def ema_weights(n_epochs: int, decay: float) -> Weights:
    """Exponential moving average over the epochs; the first update copies. Weights under 1e-4 are dropped."""
    w = (1 - decay) * decay ** np.arange(n_epochs)[::-1]
    w[0] = decay ** (n_epochs - 1)
    return {e: float(w[e]) for e in range(n_epochs) if w[e] >= 1e-4}


def swa_weights(n_epochs: int) -> Weights:
    """The plain mean over the last quarter of the run (stochastic weight averaging)."""
    return last_epochs(n_epochs, max(1, n_epochs // 4))
