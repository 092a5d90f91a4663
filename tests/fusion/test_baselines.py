"""The controls' weights, by hand."""

import numpy as np
import pytest
from inputs import random_probs

from fmn_ref.fusion import baselines


def test_weights_of_the_controls():
    correct = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]])
    assert baselines.last_epochs(5) == {4: 1.0}
    assert baselines.last_epochs(5, 9) == baselines.equal_weights(range(5))
    assert baselines.last_epochs(5, 2) == {3: 0.5, 4: 0.5}
    assert baselines.equally_spaced(9, 3) == baselines.equal_weights([2, 5, 8])
    assert baselines.equally_spaced(9, 1) == {8: 1.0}
    assert len(baselines.equally_spaced(40, 7)) == 7
    assert baselines.best_epoch(correct) == {1: 1.0}
    assert baselines.top_epochs(correct, 2) == {1: 0.5, 2: 0.5}
    assert baselines.swa_weights(8) == {6: 0.5, 7: 0.5}
    assert baselines.swa_weights(1) == {0: 1.0}
    assert baselines.ema_weights(3, 0.5) == {0: 0.25, 1: 0.25, 2: 0.5}
    assert sum(baselines.ema_weights(200, 0.9).values()) == pytest.approx(1, abs=2e-3)


def test_best_window(rng):
    p, labels = random_probs(rng)
    scores = [(p[max(0, e - 1) : e + 2].mean(0).argmax(1) == labels).mean() for e in range(len(p))]
    best = int(np.argmax(scores))
    assert set(baselines.best_window(p, labels, 1)) == set(range(max(0, best - 1), min(len(p), best + 2)))
