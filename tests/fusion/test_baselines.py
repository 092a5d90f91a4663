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


def test_equally_spaced_epochs_end_with_the_last_one():
    for n_epochs in range(1, 25):
        for k in range(1, n_epochs + 1):
            weights = baselines.equally_spaced(n_epochs, k)
            gaps = np.diff([max(weights) - n_epochs, *sorted(weights)])  # around the end: as from the last to the first
            assert list(weights) == sorted(weights)
            assert (len(weights), max(weights)) == (k, n_epochs - 1)
            assert set(weights.values()) == {1 / k}
            assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("n_epochs", "decay"), [(1, 0.9), (2, 0.9), (2, 1e-4), (40, 0.5), (200, 0.9), (200, 0.99)])
def test_moving_averages_against_their_updates(n_epochs, decay):
    w = np.eye(n_epochs)[0]  # the first update copies
    for e in range(1, n_epochs):
        w = decay * w + (1 - decay) * np.eye(n_epochs)[e]
    found = baselines.ema_weights(n_epochs, decay)
    assert found == pytest.approx({e: w[e] for e in range(n_epochs) if w[e] > 0.99999e-4})


def test_the_last_quarter_is_averaged():
    assert [len(baselines.swa_weights(n)) for n in (3, 4, 7, 8, 12)] == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("window", [0, 1, 3, 9])
def test_the_best_window_against_all_of_them(rng, window):
    """The earliest of equal ones, and each window is clipped at the ends."""
    for _ in range(10):
        p, labels = random_probs(rng, n_epochs=7, n_samples=12, n_classes=3)
        p[4] = p[2]
        windows = [range(max(0, e - window), min(7, e + window + 1)) for e in range(7)]
        n_right = [(p[list(w)].sum(0).argmax(1) == labels).sum() for w in windows]
        chosen = windows[int(np.argmax(n_right))]
        assert baselines.best_window(p, labels, window) == dict.fromkeys(chosen, 1 / len(chosen))


def test_the_mean_of_a_window_is_not_rounded_to_16_bits():
    for seed in range(10):
        p, labels = random_probs(
            np.random.default_rng(seed), n_epochs=30, n_samples=400, n_classes=10, dtype=np.float16
        )
        p = (p * 0.01 + 0.099).astype(np.float16)  # close scores
        expected = baselines.best_window(p.astype(float), labels, 4)
        assert baselines.best_window(p, labels, 4) == expected
