"""Accuracy, log-likelihood and calibration error: against scikit-learn and a bin by bin sum."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from fmn_ref.metrics.scores import scores


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scores_are_those_of_scikit_learn_and_of_the_definition(dtype):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(6, 0.4), 400).astype(dtype)
    y = np.where(rng.random(400) < 0.6, p.argmax(1), rng.integers(0, 6, 400))  # over- and underconfident bins
    p[(y == 0) & (rng.random(400) < 0.5), 0] = 0
    p = (p / p.sum(1, keepdims=True)).astype(dtype)
    sure = p.max(1) >= 13 / 15
    y[sure] = p.argmax(1)[sure]  # right, and less than certain
    p[:9], y[:9] = np.eye(6)[1], 0  # certain and wrong: in the last bin with some of those
    found, wide = scores(p, y), p.astype(np.float64)
    assert found.accuracy == accuracy_score(y, wide.argmax(1))
    floored = np.maximum(wide, 1e-6)
    expected = -np.log(floored[np.arange(400), y]).mean()
    assert found.nll == pytest.approx(expected, rel=1e-12)
    if dtype == np.float64:
        assert found.nll == pytest.approx(log_loss(y, floored / floored.sum(1, keepdims=True)), abs=1e-5)
    confidence, right, ece = wide.max(1), wide.argmax(1) == y, 0.0
    for low, high in itertools.pairwise([*np.arange(15) / 15, np.inf]):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.ece == pytest.approx(ece, abs=1e-12)


def test_extremes():
    assert scores([[0.0, 1.0], [1.0, 0.0]], [1, 0]) == (1.0, 0.0, 0.0)
    wrong = scores([[0.0, 1.0]], [0])
    assert (wrong.accuracy, wrong.ece) == (0, 1)
    assert wrong.nll == pytest.approx(-np.log(1e-6))


def test_no_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"^probs: .*sum to 1"):
        scores([[2.0, 1.0]], [0])
    with pytest.raises(ValueError, match=r"^labels: .*\[0, 2\)"):
        scores([[0.5, 0.5]], [2])
    with pytest.raises(ValueError, match=r"^labels: expected 1 samples, got 2"):
        scores([[0.5, 0.5]], [0, 1])


def test_they_are_written_with_their_names():
    assert str(scores([[0.9, 0.1], [0.4, 0.6]], [0, 0])) == "accuracy 50.00%, NLL 0.511, calibration error 0.350"
