"""The kernels that fusion uses, against the reference."""

import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref._check import BFLOAT16
from fmn_ref.kernels import backend, reference


def test_no_sample_has_weight(each_backend):
    """As in a fold that holds all the weight: nothing is right, on every backend."""
    p, y = np.full((2, 3, 2), 0.5), np.zeros(3, np.int64)
    for n in (0, 3):
        found = backend.kernels().best_epsilons(
            p[0, :n], [p[1, :n]], y[:n], y[:n], np.array([[0, 0]]), np.arange(3) / 2
        )
        assert [a.tolist() for a in found] == [[0.5], [0], [0]]


@pytest.mark.parametrize("kind", ["floats", "ties"])
def test_kernels_agree(kind, each_backend):
    """Epsilons, weights and bounds of many small problems, bit for bit with the reference."""
    rng = np.random.default_rng(5)
    kernels = backend.kernels()
    for case in range(150):
        n, k, e = (int(v) for v in rng.integers([1, 2, 1], [40, 20, 6]))
        m = int(rng.choice([4, 10, 64]))
        p = (
            rng.dirichlet(np.ones(k), (e + 1, n))
            if kind == "floats"
            else rng.multinomial(m, np.ones(k) / k, (e + 1, n)) / m
        )
        dtype = [np.float64, np.float32, np.float16, BFLOAT16][case % 4]
        epochs = [
            (q.astype("f4").view("u4") >> 16).astype("u2").view(dtype) if dtype is BFLOAT16 else q.astype(dtype)
            for q in p[1:]
        ]
        weights = None if case % 3 else rng.integers(0, 2**40, n) + (np.arange(n) == 0)
        first = rng.integers(0, e, 3)
        windows = np.stack([first, rng.integers(first, e)], axis=1)
        grid = np.arange(101) / 100
        args = p[0], epochs, rng.integers(0, k, n), weights
        for got, expected in zip(
            kernels.best_epsilons(*args, windows, grid),
            reference.best_epsilons(*args, windows, grid),
            strict=True,
        ):
            np.testing.assert_array_equal(got, expected)
        right = kernels.mixture_right(*args, grid)
        np.testing.assert_array_equal(right, reference.mixture_right(*args, grid))


@pytest.mark.parametrize("k", [3, 12, 33_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_what_was_seen_of_windows_changes_no_result(k, dtype, each_backend):
    """Exact results stay those of the reference while predictor and weights change, and bounds are bounds."""
    rng, kernels = np.random.default_rng(k), backend.kernels()
    n = 4 if k > 1000 else 200
    scale = np.where(np.arange(k) < k - 12, 0.01, 1)  # the last classes win, whose numbers are the highest
    epochs = [(rng.random((n, k)) * scale).round(2).astype(dtype) for _ in range(5)]
    labels = rng.integers(max(0, k - 12), k, n)
    windows = np.array([[0, 1], [2, 4], [3, 3]])
    seen = np.zeros((3, n), np.uint16)
    for weights in (None, rng.integers(0, 3, n), None, rng.integers(0, 3, n)):
        problem = (rng.random((n, k)) * scale).round(2), epochs, labels, weights, windows, np.empty(0)
        eps, right, _ = reference.best_epsilons(*problem)
        for exact in (False, True, False):
            found = kernels.best_epsilons(*problem, seen, exact)
            assert (found[1] >= right).all()
            if exact:
                np.testing.assert_array_equal(found[0], eps)
                np.testing.assert_array_equal(found[1], right)
            else:
                assert found[1].max() <= (n if weights is None else weights.sum())


def test_seen_must_fit(each_backend):
    if fmn.backend().name != "cpp":
        pytest.skip("other backends do not read it")
    p, y = np.full((2, 3, 2), 0.5), np.zeros(3, np.int64)
    for seen in np.zeros((1, 2), np.uint16), np.zeros((3, 1), np.uint16).T[:, ::-1], np.zeros(3, np.uint16):
        with pytest.raises(ValueError, match="seen: expected adjacent values"):
            backend.kernels().best_epsilons(p[0], [p[1]], y, None, np.array([[0, 0]]), np.empty(0), seen)
