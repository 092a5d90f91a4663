"""The controls that a fusion has to beat, each as {epoch: weight} over the rows of the history. NumPy only.

`mixture(probs, weights)` turns such weights into predictions, `averaged_model(run, weights, ...)` into one averaged
model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .plan import window_epochs

Weights = dict[int, float]


def equal(epochs: Any) -> Weights:
    """The same weight for each of the epochs."""
    chosen = sorted({int(e) for e in epochs})
    return {e: 1 / len(chosen) for e in chosen}


def last(n_epochs: int, k: int = 1) -> Weights:
    """The last k epochs ("horizontal")."""
    return equal(range(max(0, n_epochs - k), n_epochs))


def equally_spaced(n_epochs: int, k: int) -> Weights:
    """k epochs at equal distances, the last one among them ("fixed jumps")."""
    return equal(n_epochs - 1 - (np.arange(k) * n_epochs) // k)


def best_epoch(correct: Any) -> Weights:
    """The epoch with the best selection accuracy; the earliest of equal ones."""
    return top(correct, 1)


def top(correct: Any, k: int) -> Weights:
    """The k epochs with the best selection accuracy; earlier ones first among equals."""
    n_right = _check.correctness(correct).sum(1)
    return equal(np.argsort(-n_right, kind="stable")[:k])


def best_window(probs: Any, labels: NDArray[np.int64], window: int) -> Weights:
    """The mean over e - window .. e + window with the best selection accuracy; the earliest of equal ones."""
    windows = [window_epochs(e, window, len(probs)) for e in range(len(probs))]
    n_right: list[int] = []
    held: dict[int, NDArray[np.float64]] = {}
    for w in windows:  # one window is held at a time
        held = {e: held[e] if e in held else np.asarray(probs[e], np.float64) for e in w}
        n_right.append(int((np.sum(list(held.values()), axis=0).argmax(1) == labels).sum()))
    return equal(windows[int(np.argmax(n_right))])


def ema(n_epochs: int, decay: float) -> Weights:
    """Exponential moving average over the epochs; the first update copies. Weights under 1e-4 are dropped."""
    w = (1 - decay) * decay ** np.arange(n_epochs)[::-1]
    w[0] = decay ** (n_epochs - 1)
    return {e: float(w[e]) for e in range(n_epochs) if w[e] >= 1e-4}


def swa(n_epochs: int) -> Weights:
    """The plain mean over the last quarter of the run."""
    return last(n_epochs, max(1, n_epochs // 4))
