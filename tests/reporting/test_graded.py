"""The table of graded answers."""

import numpy as np

import fmn_ref as fmn
from fmn_ref.reporting.graded import answers_summary


def test_questions_are_corrected_with_their_own_number_of_options(rng):
    """Of 10 questions with two options, 20 with five and 30 open ones: each group by itself, then the mean."""
    n_choices = np.repeat([2, 5, 0], [10, 20, 30])
    draws = rng.random((4, 60, 3)) < 0.6
    content, text = answers_summary(draws, ["a", "b", "c", "d"], n_choices)
    expected = np.zeros(4)
    for k in (2, 5, 0):
        of_group = fmn.expected_curves(draws[:, n_choices == k].mean(-1))
        chance = (1 - of_group.accuracy) * (1 - of_group.accuracy[-1]) / (k - 1) if k else 0
        expected += np.maximum(of_group.forget - chance, 0) * (n_choices == k).mean()
    np.testing.assert_allclose(content["corrected_forget_fraction"], expected, atol=1e-12)
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["a", "b", "c", "d"]


def test_the_row_of_the_last_checkpoint_shows_what_sampling_changes(rng):
    same = rng.random((1, 40, 4)) < 0.5
    content, text = answers_summary(np.concatenate([same, same]))
    assert content["forget_fraction"][-1] > 0
    assert "two draws" in text
    content, text = answers_summary(same[..., :1])
    assert content["forget_fraction"] == [0]
    assert "two draws" not in text
