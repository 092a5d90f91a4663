"""Label noise: its rates, and the classes that it moves labels to."""

import numpy as np
import pytest

import fmn_ref as fmn


def test_noise_rates_and_classes():
    y = np.arange(10_000) % 10
    noisy = fmn.symmetric_noise(y, 0.4, 10, seed=1)
    assert (noisy != y).sum() == 4000
    counts = np.bincount((noisy - y)[noisy != y] % 10, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 350  # uniform over the other nine: 444 each
    np.testing.assert_array_equal(noisy, fmn.symmetric_noise(y, 0.4, 10, seed=1))
    assert (noisy != fmn.symmetric_noise(y, 0.4, 10, seed=2)).any()
    pairs = fmn.asymmetric_noise(y, 0.25, 10, seed=1)
    assert (pairs != y).sum() == 2500
    np.testing.assert_array_equal(pairs[pairs != y], (y[pairs != y] + 1) % 10)
    half = np.eye(10) * 0.5 + np.roll(np.eye(10), 3, 1) * 0.5
    moved = fmn.transition_noise(y, half, seed=1)
    assert set((moved - y) % 10) == {0, 3}
    assert abs((moved != y).mean() - 0.5) < 0.03
    np.testing.assert_array_equal(y, np.arange(10_000) % 10)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fmn.symmetric_noise([0, 1], 1.5, 2, 0), ValueError, "rate"),
        (lambda: fmn.symmetric_noise([0, 1], "half", 2, 0), TypeError, "rate"),
        (lambda: fmn.symmetric_noise([0, 2], 0.5, 2, 0), ValueError, "labels"),
        (lambda: fmn.symmetric_noise([0.0, 1.0], 0.5, 2, 0), TypeError, "labels"),
        (lambda: fmn.symmetric_noise([], 0.5, 2, 0), TypeError, "labels"),
        (lambda: fmn.symmetric_noise([0, 0], 0.5, 1, 0), ValueError, "n_classes"),
        (lambda: fmn.asymmetric_noise([0, 1], 0.5, 2, -1), ValueError, "seed"),
        (lambda: fmn.asymmetric_noise([0, 1], 0.5, 2.0, 0), TypeError, "n_classes"),
        (lambda: fmn.transition_noise([0, 1], [[1.0, 0.5], [0.0, 1.0]], 0), ValueError, "transition"),
        (lambda: fmn.transition_noise([0, 1], [[0.5, 0.5]], 0), ValueError, "square"),
    ],
)
def test_bad_noise(call, error, words):
    with pytest.raises(error, match=words):
        call()
