"""The gain to expect: what is looked at, and the rule."""

import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref.fusion import expectation


def test_features_against_a_loop(rng):
    correct = rng.random((6, 50)) < 0.6
    accuracy = [row.mean() for row in correct]
    forget = [sum(a and not b for a, b in zip(row, correct[-1], strict=True)) / 50 for row in correct]
    churn = [sum(correct[e] & ~correct[e + 1]) / 50 for e in range(5)]
    expected = {"peak": max(forget), "churn": np.mean(churn), "drop": max(accuracy) - accuracy[-1]}
    assert expectation.features(correct) == pytest.approx(expected)
    history = fmn.CorrectnessHistory(50)
    for row in correct:
        history.append(row)
    assert expectation.features(history) == expectation.features(correct)


def test_a_single_epoch_has_nothing_to_gain():
    assert expectation.features([[1, 0, 1]]) == {"peak": 0, "churn": 0, "drop": 0}


@pytest.mark.parametrize(
    ("constant", "peak", "churn", "drop", "gain"),
    [(0.125, 0.5, 0.25, 1.0, 0.53125), (-1.0, 0.5, 0.0, 0.0, 0.0), (0.0, 9.0, 0.0, 0.0, 1.0)],
)
def test_the_rule_is_linear_and_a_share(monkeypatch, constant, peak, churn, drop, gain):
    monkeypatch.setattr(expectation, "RULE", {"constant": constant, "peak": peak, "churn": churn, "drop": drop})
    correct = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert expectation.features(correct) == {"peak": 0.25, "churn": 0.125, "drop": 0.25}
    assert fmn.expected_gain(correct)[0] == gain


def test_the_fitted_rule():
    gain, error = fmn.expected_gain([[1, 1, 1, 0], [1, 0, 0, 1]])
    assert expectation.RULE.keys() == {"constant", *expectation.features([[1]])}
    assert 0 <= gain <= 1
    assert error >= 0
