"""The expected gain: the rule, and the features that it reads."""

import numpy as np
import pytest
from inputs import history_of

import fmn_ref as fmn
from fmn_ref.fusion import expectation


def test_features_against_a_loop(rng):
    correct = rng.random((6, 50)) < 0.6
    accuracy = [row.mean() for row in correct]
    forget = [sum(a and not b for a, b in zip(row, correct[-1], strict=True)) / 50 for row in correct]
    churn = [sum(correct[e] & ~correct[e + 1]) / 50 for e in range(5)]
    expected = {"peak": max(forget), "churn": np.mean(churn), "drop": max(accuracy) - accuracy[-1]}
    assert expectation.features(correct) == pytest.approx(expected)
    assert expectation.features(history_of(correct)) == expectation.features(correct)


def test_a_single_epoch_has_nothing_to_gain():
    assert expectation.features([[1, 0, 1]]) == {"peak": 0, "churn": 0, "drop": 0}


# Of [[1, 1, 1, 0], [1, 0, 0, 1]]: epoch 0 has 3 samples right, of which the final epoch has lost 2.
BY_HAND = {"constant": 1, "peak": 0.5, "churn": 0.5, "drop": 0.25}


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
    """The more a run forgets, the more it gains; the error is small enough to tell the two runs apart."""
    assert expectation.RULE.keys() == {"constant", *expectation.features([[1]])}
    forgets, error = fmn.expected_gain([[1, 1, 1, 0], [1, 0, 0, 1]])
    keeps, same_error = fmn.expected_gain([[1, 0, 0, 0], [1, 1, 0, 1]])
    assert keeps < 0.02 < forgets - error
    assert forgets == pytest.approx(sum(expectation.RULE[k] * v for k, v in BY_HAND.items()))
    assert 0 < error == same_error
