"""The closer look at an epsilon where rounding decides: on its own it finds what rational arithmetic finds."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref.fusion import epsilon
from fmn_ref.kernels import mixing


def n_right(current, candidate, labels, eps):
    right = 0
    for c, q, y in zip(current.tolist(), candidate.tolist(), labels.tolist(), strict=True):
        mixed = [eps * b + (1 - eps) * a for a, b in zip(c, q, strict=True)]
        right += mixed.index(max(mixed)) == y
    return right


def crossings(current, candidate, labels):
    """Every epsilon within [0, 1] at which the label meets another class, and both ends."""
    found = {Fraction(0), Fraction(1)}
    for c, q, y in zip(current.tolist(), candidate.tolist(), labels.tolist(), strict=True):
        for k in range(len(c)):
            if c[y] - c[k] != q[y] - q[k]:
                found.add(Fraction(c[y] - c[k], c[y] - c[k] - q[y] + q[k]))
    return sorted(eps for eps in found if 0 <= eps <= 1)


@pytest.mark.parametrize("block", [1, 6, 1 << 16])
def test_the_best_stretch_of_all(monkeypatch, block):
    """Whole numbers stand for probabilities: only their order counts."""
    monkeypatch.setattr(mixing, "_BLOCK", block)
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(1, 9)), int(rng.integers(2, 5))
        current, candidate = rng.multinomial(64, np.ones(k) / k, (2, n))
        labels = rng.integers(0, k, n)
        ends = crossings(current, candidate, labels)
        in_stretch = {(a + b) / 2: 0 for a, b in pairwise(ends)}
        in_stretch = {eps: n_right(current, candidate, labels, eps) for eps in in_stretch}
        at_zero = n_right(current, candidate, labels, Fraction(0))
        target, ends_of_grid = epsilon.Target(labels), np.array([0.0, 1.0])
        eps, right = epsilon._closer(current / 64, candidate / 64, target, ends_of_grid, (0.0, at_zero))
        assert 0 <= eps <= 1
        assert right >= max(in_stretch.values())
        mixed = eps * (candidate / 64) + (1 - eps) * (current / 64)
        assert right == (mixed.argmax(1) == labels).sum()
        if right == max(in_stretch.values()) > at_zero:
            inside += 1
            best = [(b - a, (a + b) / 2) for a, b in pairwise(ends) if in_stretch[(a + b) / 2] == right]
            assert any(abs(eps - middle) < width / 2 for width, middle in best)  # not at an end
    assert inside > 20


def test_a_single_point():
    current, candidate = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    target, grid = epsilon.Target(np.array([0, 0])), np.array([0.0, 1.0])
    assert epsilon._closer(current, candidate, target, grid, (0.0, 1)) == (0.5, 2)
    assert epsilon._closer(current, candidate, target, grid, (0.0, 2)) == (0.0, 2)  # nothing is better


def test_a_sample_that_is_right_at_one_point_alone():
    """All three scores are equal there, and the first one counts."""
    current, candidate = np.array([[4.0, 5.0, 3.0]]), np.array([[4.0, 1.0, 7.0]])
    target = epsilon.Target(np.array([0]))
    assert epsilon._closer(current, candidate, target, np.array([0.0, 1.0]), (0.0, 0)) == (0.25, 1)


@pytest.mark.parametrize("n_samples", [1, 3, 4, 7, 8, 1000])
def test_equal_weights_use_the_range_of_integers(n_samples):
    """At least a quarter of it: 2^58 is the bound of their sum."""
    weights = epsilon.Target(np.zeros(n_samples, np.int64), np.ones(n_samples)).weights
    assert 2**56 < n_samples * int(weights[0]) <= 2**58
    assert (weights == weights[0]).all()


@pytest.mark.parametrize("seed", range(10))
def test_a_weight_counts_like_repeated_samples(seed):
    rng = np.random.default_rng(seed)
    current, candidate = rng.dirichlet(np.ones(4), (2, 60))
    labels, times = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    expected = fmn.best_epsilon(*(np.repeat(a, times, 0) for a in (current, candidate, labels)), search="exact")
    assert fmn.best_epsilon(current, candidate, labels, search="exact", sample_weight=times) == pytest.approx(expected)
