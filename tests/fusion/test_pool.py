"""The log-linear pool: against an independent solver, its optimality conditions, weights as counts, hard cases, bounds,
the same bits for any number of threads."""

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fmn_ref import fuse
from fmn_ref.fusion.mixtures import log_linear_pool
from fmn_ref.fusion.pool import SHRINKAGE, TOLERANCE, pool_weights
from fmn_ref.metrics.scores import FLOOR


def random_problem(rng, n_epochs=None, n=None, n_classes=None):
    """Epochs that share a part of what they know, from confident to vague."""
    n_epochs = n_epochs or int(rng.integers(1, 25))
    n, n_classes = n or int(rng.integers(5, 200)), n_classes or int(rng.integers(2, 12))
    labels = rng.integers(0, n_classes, n)
    z = rng.normal(0, 1, (n_epochs, n, n_classes)) + rng.normal(0, 1, (n, n_classes))
    z[:, np.arange(n), labels] += rng.uniform(0, 2, (n_epochs, 1))
    return softmax(z * rng.uniform(0.3, 4, (n_epochs, 1, 1))), labels


def softmax(z):
    q = np.exp(z - z.max(-1, keepdims=True))
    return q / q.sum(-1, keepdims=True)


def objective(probs, labels, shrinkage, sample_weight=None):
    """Value and gradient, written down as the docstring says it."""
    logs = np.log(np.maximum(np.asarray(probs, np.float64), FLOOR))
    s = np.ones(len(labels)) if sample_weight is None else sample_weight
    final = np.eye(len(probs))[-1]

    def f(w):
        z = np.tensordot(w, logs, 1)
        top = z.max(1)
        nll = np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(z)), labels]
        residual = softmax(z)
        residual[np.arange(len(z)), labels] -= 1
        gradient = np.einsum("ejk,jk,j->e", logs, residual, s)
        penalty = shrinkage / 2 * ((w - final) ** 2).sum()
        return ((nll * s).sum() + penalty) / s.sum(), (gradient + shrinkage * (w - final)) / s.sum()

    return f


def dense(weights, n_epochs):
    w = np.zeros(n_epochs)
    w[list(weights)] = list(weights.values())
    return w


def assert_optimal(f, w, shrinkage, n):
    """The objective is a tangent plus a quadratic at least, which bounds its minimum over v >= 0 from below."""
    ridge = shrinkage / n + 1e-8  # 1e-8 is the curvature that is always there
    gradient = f(w)[1] + 1e-8 * (w - np.eye(len(w))[-1])
    d = np.maximum(-gradient / ridge, -w)
    assert -(gradient * d + ridge / 2 * d * d).sum() < 1.01 * TOLERANCE


def best(f, n_epochs):
    """Least value that scipy finds."""
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 30}
    bounds = [(0, None)] * n_epochs
    return minimize(f, np.full(n_epochs, 0.5), jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun


@pytest.mark.parametrize("shrinkage", [0.0, SHRINKAGE])
def test_the_optimum_of_200_random_problems_is_scipys(shrinkage):
    n_checked = 0
    for seed in range(200):
        probs, labels = random_problem(np.random.default_rng(seed))
        w = dense(pool_weights(probs, labels, shrinkage=shrinkage), len(probs))
        f = objective(probs, labels, shrinkage)
        assert (w >= 0).all(), seed
        if (w**2).sum() < 100:  # beyond, the maximum-likelihood weights are infinite
            n_checked += 1
            assert f(w)[0] <= best(f, len(probs)) + 1e-6, seed
            assert_optimal(f, w, shrinkage, len(labels))
    assert n_checked > 150


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types_of_the_same_values_agree(dtype):
    probs, labels = random_problem(np.random.default_rng(1), 12, 150, 5)
    probs = probs.astype(np.float16)
    expected, found = pool_weights(probs, labels), pool_weights(probs.astype(dtype), labels)
    np.testing.assert_allclose(dense(found, 12), dense(expected, 12), atol=1e-5)
    np.testing.assert_allclose(
        log_linear_pool(probs.astype(dtype), expected), log_linear_pool(probs, expected), atol=1e-6
    )


def test_bfloat16_is_read_as_stored():
    probs, labels = random_problem(np.random.default_rng(2), 6, 80, 4)
    stored = torch.from_numpy(probs).to(torch.bfloat16)
    wide = stored.float().numpy()
    assert fuse(stored, labels, method="pool").members == fuse(wide, labels, method="pool").members
    weights = {0: 1.0, 3: 0.5}
    np.testing.assert_array_equal(log_linear_pool(stored, weights), log_linear_pool(wide, weights))


def test_pool_is_the_formula():
    probs, _ = random_problem(np.random.default_rng(3), 5, 40, 3)
    probs[1, 0] = [0, 0, 1]
    p = np.maximum(probs, FLOOR)
    product = p[1] ** 0.7 * p[4] ** 1.2
    expected = product / product.sum(1, keepdims=True)
    np.testing.assert_allclose(log_linear_pool(probs, {4: 1.2, 1: 0.7}), expected, atol=1e-14)


def test_samples_of_weight_zero_are_as_if_they_were_not_there():
    rng = np.random.default_rng(4)
    for n, n_classes in ((60, 4), (4000, 100)):
        probs, labels = random_problem(rng, 8, n, n_classes)
        count = rng.integers(0, 3, n)
        kept = count > 0
        expected = pool_weights(np.ascontiguousarray(probs[:, kept]), labels[kept], count[kept])
        assert pool_weights(probs, labels, count) == expected


def test_a_weight_counts_a_sample_several_times():
    rng = np.random.default_rng(5)
    probs, labels = random_problem(rng, 10, 90, 4)
    count = rng.integers(0, 4, 90)
    repeated = pool_weights(probs.repeat(count, axis=1), labels.repeat(count))
    np.testing.assert_allclose(dense(pool_weights(probs, labels, count), 10), dense(repeated, 10), atol=1e-6)
    f = objective(probs, labels, SHRINKAGE, count)
    assert f(dense(repeated, 10))[0] <= best(f, 10) + 1e-8


def test_a_large_problem_whose_hessian_is_estimated():
    probs, labels = random_problem(np.random.default_rng(6), 20, 2500, 100)
    probs = probs.astype(np.float16)
    w = dense(pool_weights(probs, labels), 20)
    f = objective(probs, labels, SHRINKAGE)
    assert np.count_nonzero(w) > 1
    assert_optimal(f, w, SHRINKAGE, 2500)
    assert f(w)[0] < f(np.eye(20)[-1])[0]


def test_zero_probabilities_do_not_veto():
    probs = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.7, 0.3], [0.4, 0.6]]])
    weights = pool_weights(probs, np.array([0, 1]))
    assert np.isfinite(log_linear_pool(probs, weights)).all()
    assert log_linear_pool(probs, weights)[1, 1] > 0.01


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 30, 2), (5, 1, 3), (4, 2, 2)])
def test_smallest_problems(shape):
    probs, labels = random_problem(np.random.default_rng(7), *shape)
    w = dense(pool_weights(probs, labels), shape[0])
    f = objective(probs, labels, SHRINKAGE)
    assert f(w)[0] <= best(f, shape[0]) + 1e-7


def test_few_samples_stay_close_to_the_final_model():
    probs, labels = random_problem(np.random.default_rng(8), 6, 1, 3)
    w = dense(pool_weights(probs, labels, shrinkage=1e6), 6)
    np.testing.assert_allclose(w, np.eye(6)[-1], atol=1e-4)


def test_an_epoch_that_is_always_right_has_a_finite_weight():
    rng = np.random.default_rng(9)
    probs, labels = random_problem(rng, 5, 100, 4)
    probs[2] = 0.2
    probs[2, np.arange(100), labels] = 0.4
    for shrinkage, least in ((SHRINKAGE, 1), (0.0, 5)):
        weights = pool_weights(probs, labels, shrinkage=shrinkage)
        assert least < weights[2] < 1e3
        assert (log_linear_pool(probs, weights).argmax(1) == labels).all()


def test_identical_epochs():
    probs, labels = random_problem(np.random.default_rng(10), 3, 60, 3)
    twice = np.concatenate([probs, probs])
    f = objective(twice, labels, 0.0)
    assert f(dense(pool_weights(twice, labels, shrinkage=0), 6))[0] <= best(f, 6) + 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_max_members(k):
    rng = np.random.default_rng(11)
    labels = rng.integers(0, 5, 300)
    probs = softmax(rng.normal(0, 1, (12, 300, 5)) + 1.5 * np.eye(5)[labels] * rng.uniform(0.2, 1, (12, 1, 1)))
    f = objective(probs, labels, SHRINKAGE)
    free = pool_weights(probs, labels)
    weights = pool_weights(probs, labels, max_members=k)
    assert 1 <= len(weights) <= k < len(free)

    def refitted(epochs):
        return best(lambda v: restricted(f, epochs, v, 12), len(epochs))

    value = f(dense(weights, 12))[0]
    of_all_subsets = sorted(refitted(list(epochs)) for epochs in combinations(range(12), k))
    assert value <= refitted(list(weights)) + 1e-6
    assert value <= of_all_subsets[1] + 1e-6  # the best or second best, where every epoch knows something else
    assert pool_weights(probs, labels, max_members=12) == free


def restricted(f, epochs, v, n_epochs):
    w = np.zeros(n_epochs)
    w[epochs] = v
    value, gradient = f(w)
    return value, gradient[epochs]


SCRIPT = """
import numpy as np
from fmn_ref.fusion.mixtures import log_linear_pool
from fmn_ref.fusion.pool import pool_weights
rng = np.random.default_rng(0)
z = rng.normal(0, 1, (12, 4500, 100)) + 2 * rng.normal(0, 1, (4500, 100))
y = z.sum(0).argmax(1)
p = np.exp(z); p /= p.sum(-1, keepdims=True)
w = pool_weights(p.astype(np.float16), y, max_members=8)
print(len(w), [v.hex() for v in w.values()], log_linear_pool(p, w).tobytes().hex()[:4000])
"""


def test_the_number_of_threads_does_not_matter():
    def run(threads):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "FMN_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=True).stdout

    assert run("1") == run("2") == run("3")
