"""Summaries in one reading: against the definitions, whatever form the matrix has."""

import numpy as np
import pytest
from inputs import history_of

import fmn_ref as fmn
from fmn_ref.metrics import matrix
from fmn_ref.metrics.overview import curves_and_forgotten, first_samples


@pytest.mark.parametrize("reference", [-1, 0, 2])
@pytest.mark.parametrize("form", [np.asarray, history_of, lambda c: c.astype(np.int16), lambda c: c.tolist()])
def test_the_curves_and_the_samples_that_were_right_once(each_backend, monkeypatch, rng, form, reference):
    monkeypatch.setattr(matrix, "_BLOCK_BYTES", 1 << 10)  # integers are read in several blocks
    monkeypatch.setattr(matrix, "_LEAST_SAMPLES", 512)
    correct = rng.random((4, 1300)) < 0.4
    curves, n_forgotten = curves_and_forgotten(form(correct), reference=reference)
    expected = fmn.forgetting_curves(correct, reference=reference)
    for field in ("counts", "n_samples", "total", "reference"):
        np.testing.assert_array_equal(getattr(curves, field), getattr(expected, field))
    assert curves.counts.dtype == np.int64
    assert n_forgotten == (correct.any(0) & ~correct[reference]).sum()


def test_the_last_epoch_is_the_reference():
    assert curves_and_forgotten([[1, 1, 0], [1, 0, 1], [0, 0, 1]])[1] == 2


def test_another_epoch_than_there_is():
    with pytest.raises(ValueError, match=r"^reference: .* got 2"):
        curves_and_forgotten([[1, 0], [0, 1]], reference=2)


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((3, 10), 10),
        ((3, 70_000), 65536),
        ((2**11, 40_000), 2**15),  # 64 MB in all
        ((2**26 // 808, 900), 808),  # whole bytes of a history
        ((2**20 + 1, 70), 64),
    ],
)
def test_the_first_samples_are_at_most_64_mb(shape, n):
    correct = np.broadcast_to(np.arange(shape[1]) % 3 == 1, shape)
    found = first_samples(correct)
    assert found.shape == (shape[0], n)
    np.testing.assert_array_equal(found[-1], correct[-1, :n])


@pytest.mark.parametrize("n_samples", [1, 8, 13, 70_000])
def test_the_first_samples_of_a_history(rng, n_samples):
    correct = rng.random((3, n_samples)) < 0.5
    found = first_samples(history_of(correct))
    assert found.dtype.itemsize == 1
    np.testing.assert_array_equal(found, correct[:, :65536])
