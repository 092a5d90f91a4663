"""The parts of the pool's solver, each against SciPy or a formula in plain NumPy: the pool itself hides a slow step."""

import threading

import numpy as np
import pytest
from scipy.optimize import minimize_scalar, nnls

from fmn_ref.fusion import pool
from fmn_ref.metrics.scores import FLOOR

RIDGE = 0.01


def problem(seed, n_epochs=5, n=40, n_classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    z = rng.normal(0, 1.5, (n_epochs, n, n_classes)) + np.eye(n_classes)[labels]
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    p[0, 0] = np.eye(n_classes)[1]  # below FLOOR
    return p, labels, rng.random(n) + 0.1


def value_of(p, labels, weight, w, ridge=RIDGE):
    """Mean negative log-likelihood, sample by sample, and the ridge."""
    total = 0.0
    for i, y in enumerate(labels):
        z = np.asarray(w) @ np.log(np.clip(p[:, i], FLOOR, 1))
        total += weight[i] / weight.sum() * (np.log(np.exp(z).sum()) - z[y])
    return total + ridge / 2 * ((w - np.eye(len(p))[-1]) ** 2).sum()


def objective_of(p, labels, weight, rows=None):
    rows = np.arange(len(labels)) if rows is None else rows
    return pool._Objective(list(p), labels[rows], weight[rows] / weight[rows].sum(), rows, RIDGE)


@pytest.mark.parametrize("block", [1, 4, 12, 100, 10**6])
@pytest.mark.parametrize("some", [False, True])
def test_derivatives_against_differences_in_blocks_of_any_size(monkeypatch, block, some):
    """One sample at a time, three, all; with samples left out between the others."""
    monkeypatch.setattr(pool, "_BLOCK", block)
    p, labels, weight = problem(1)
    rows = np.array([2, 3, 5, 6, 7, 20, 21, 39]) if some else np.arange(40)
    objective, given = objective_of(p, labels, weight, rows), (p[:, rows], labels[rows], weight[rows])
    for w in (np.array([0.3, 0.0, 0.5, 0.0, 0.7]), np.zeros(5), np.full(5, 0.4)):
        for epochs in (np.arange(5), np.array([1, 4])):
            value, gradient = objective(w, epochs)
            assert value == pytest.approx(value_of(*given, w), rel=1e-13)
            differences = [(value_of(*given, w + d) - value_of(*given, w - d)) / 2e-5 for d in 1e-5 * np.eye(5)]
            np.testing.assert_allclose(gradient, np.array(differences)[epochs], atol=1e-8)
        steps = 1e-5 * np.eye(5)
        slopes = [(objective(w + d, np.arange(5))[1] - objective(w - d, np.arange(5))[1]) / 2e-5 for d in steps]
        epochs = np.union1d(np.flatnonzero(w), [1])
        expected = np.array(slopes)[np.ix_(epochs, epochs)]
        np.testing.assert_allclose(objective.hessian(w, epochs), expected, atol=1e-7)


@pytest.mark.parametrize("few", [0, 3])
def test_gradient_of_more_probabilities_than_numpy_adds_at_once(few):
    """Blocks of 16 200 probabilities, against one product in plain NumPy; also where most weights are 0."""
    p, labels, weight = problem(2, n=200, n_classes=200)
    w = np.array([0.3, 0.2, 0.5, 0.1, 0.7]) * (np.arange(5) >= few)
    z = np.tensordot(w, np.log(np.clip(p, FLOOR, 1)), 1)
    q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    residual = (q - np.eye(200)[labels]) * (weight / weight.sum())[:, None]
    expected = (np.log(np.clip(p, FLOOR, 1)) * residual).sum((1, 2)) + RIDGE * (w - np.eye(5)[-1])
    np.testing.assert_allclose(objective_of(p, labels, weight)(w, np.arange(5))[1], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "n_classes", "rows"),
    [
        (999, 100, range(999)),  # under twice 500 samples: all
        (1000, 100, range(0, 1000, 2)),
        (1600, 200, range(0, 1600, 3)),
        (3331, 30, range(3331)),  # under twice 50 000 // 30 samples
        (3332, 30, range(0, 3332, 2)),
        (3000, 4, range(3000)),
    ],
)
def test_the_samples_that_estimate_the_hessian(n, n_classes, rows):
    weight = np.random.default_rng(0).random(n)
    given = np.arange(n) + 7
    probs = [np.broadcast_to(np.float32(1 / n_classes), (n + 7, n_classes))]
    objective = pool._Objective(probs, np.arange(n) % n_classes, weight, given, RIDGE)
    coarse, chosen = objective.coarse, np.array(rows)
    np.testing.assert_array_equal(coarse.rows, chosen + 7)
    np.testing.assert_array_equal(coarse.labels, chosen % n_classes)
    expected = weight[chosen] / weight[chosen].sum() if len(chosen) < n else weight
    np.testing.assert_allclose(coarse.weight, expected)
    assert (coarse.ridge, coarse is objective) == (RIDGE, len(chosen) == n)


def test_the_gap_is_the_least_value_of_the_tangent_with_its_curvature():
    """Each coordinate alone, over v >= 0."""
    p, labels, weight = problem(2)
    objective = objective_of(p, labels, weight)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        w, gradient = rng.random(5) * rng.integers(0, 2, 5), rng.normal(0, 0.01, 5)
        least = 0.0
        for at, slope in zip(w, gradient, strict=True):
            bound = (lambda d, slope=slope: slope * d + RIDGE / 2 * d * d), (-at, 5)
            least += min(0, minimize_scalar(bound[0], bounds=bound[1], options={"xatol": 1e-10}).fun)
        assert objective.gap(w, gradient) == pytest.approx(-least, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_nonnegative_least_squares_against_scipy(seed):
    """From a start inside, on the border, and at the minimum itself."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    a, b = rng.normal(size=(n + 3, n)), rng.normal(size=n + 3)
    expected, _ = nnls(a, b)
    for start in (np.zeros(n), np.ones(n), rng.random(n) * rng.integers(0, 2, n), expected):
        found = pool._nonnegative_minimum(a.T @ a, a.T @ b, start.copy())
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_nonnegative_minimum_of_every_scale():
    """Gradients far below 1 count too, and what rounding leaves of them does not."""
    h, c = np.diag([1.0, 2.0, 4.0]), np.array([1e-9, -1.0, 2e-9])
    np.testing.assert_allclose(pool._nonnegative_minimum(h, c, np.zeros(3)), [1e-9, 0, 5e-10], rtol=1e-12)
    rounding = np.array([1e-14, 1e6, 1e-8])  # 1e-13 of the largest
    np.testing.assert_allclose(pool._nonnegative_minimum(h, rounding, np.zeros(3)), [0, 5e5, 0], atol=1e-20)


def test_an_update_of_the_hessian_is_the_formula():
    """Nocedal and Wright, Numerical Optimization, equation 6.19; left out if the curvature is not positive."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        a = rng.normal(size=(4, 6))
        h, step = a @ a.T, rng.normal(size=4)
        change = h @ step + rng.normal(0, 0.1, 4)
        s, y = step[:, None], change[:, None]
        expected = h - h @ s @ s.T @ h / (s.T @ h @ s) + y @ y.T / (y.T @ s)
        found = pool._bfgs(h, step, change)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        np.testing.assert_allclose(found @ step, change, atol=1e-9)
    for curvature, updated in ((-1.0, False), (0.0, False), (0.99e-8, False), (1.01e-8, True), (0.5, True)):
        for h in (np.array([[2.0]]), np.array([[1e-4]])):
            found = pool._bfgs(h, np.array([3.0]), h[0] * 3 * curvature)
            assert (found is not h) == updated
            assert not updated or found[0, 0] == pytest.approx(h[0, 0] * curvature)


class Wrong:
    """An objective whose Hessian is wrong by a factor: steps are too long, or too short."""

    def __init__(self, objective, factor):
        self.objective, self.factor, self.coarse, self.tried = objective, factor, self, []
        self.ridge = objective.ridge

    def hessian(self, w, epochs):
        return self.factor * self.objective.hessian(w, epochs)

    def __call__(self, w, epochs):
        self.tried.append(w.copy())
        return self.objective(w, epochs)


@pytest.mark.parametrize("factor", [1e-4, 0.01, 0.3, 1.0, 30.0])
def test_a_step_decreases_the_objective_and_is_halved_until_it_does(monkeypatch, factor):
    monkeypatch.setattr(pool, "_ROUNDS", 1)
    every = np.arange(5)
    for seed in range(5):
        p, labels, weight = problem(seed)
        objective = Wrong(objective_of(p, labels, weight), factor)
        w = np.array([0.2, 0.1, 0.5, 0.3, 1.5])
        value, gradient = objective.objective(w, every)
        found = pool._newton(objective, w, every, value, gradient, 0.0)
        np.testing.assert_array_equal(found, objective.tried[-1])
        values = [objective.objective(v, every)[0] for v in objective.tried]
        promised = [-1e-4 / 2 * gradient @ (v - w) for v in objective.tried]  # Armijo's condition
        accepted = [v <= value - d + 1e-14 for v, d in zip(values, promised, strict=True)]
        assert accepted == [False] * (len(values) - 1) + [True]
        first = objective.tried[0] - w
        for i, v in enumerate(objective.tried):
            np.testing.assert_allclose(v - w, first / 2**i, atol=1e-12)
        h = objective.hessian(w, every)
        root = np.linalg.cholesky(h)
        expected = nnls(root.T, np.linalg.solve(root, h @ w - gradient))[0]
        np.testing.assert_allclose(objective.tried[0], expected, atol=1e-7)
        assert len(values) > 1 or factor >= 0.3


@pytest.mark.parametrize("new_epochs", [1, 64])
def test_epochs_that_join_by_and_by_reach_the_same_minimum(monkeypatch, new_epochs):
    p, labels, weight = problem(3, n_epochs=9, n=30)
    p[3:7] = p[3:7, ::-1]  # of other samples: without a weight in the end
    objective = objective_of(p, labels, weight)
    final = np.eye(9)[-1]
    expected = pool._minimise(objective, final)
    monkeypatch.setattr(pool, "_NEW_EPOCHS", new_epochs)
    for tolerance in (1e-8, -1.0):  # the latter: as close as rounding allows
        found = pool._minimise(objective, final, tolerance)
        gradient = objective(found, np.arange(9))[1]
        assert objective.gap(found, gradient) <= 1e-8
        np.testing.assert_allclose(found, expected, atol=1e-3)
    assert objective.gap(found, gradient) <= 1e-15
    assert np.count_nonzero(found) > 3
    assert 0 in found


@pytest.mark.parametrize("most", [1, 2, 4])
def test_what_is_left_after_removals_is_refitted(most):
    """The weights left are the minimum on their epochs; removal takes what costs least by the quadratic model."""
    for seed in range(6):
        p, labels, weight = problem(seed, n_epochs=8, n=60)
        objective = objective_of(p, labels, weight)
        whole = pool._minimise(objective, np.eye(8)[-1])
        assert np.count_nonzero(whole) > 4
        found = pool._prune(objective, whole, most)
        members = np.flatnonzero(found)
        assert 1 <= len(members) <= most
        gradient = objective(found, members)[1]
        np.testing.assert_allclose(gradient, 0, atol=1e-6)
        assert pool._prune(objective, found, most) is found


def test_the_epoch_whose_removal_costs_least_goes_first():
    """By the quadratic model at the minimum, where the other weights follow."""
    for seed in range(10):
        p, labels, weight = problem(seed, n_epochs=5, n=300)
        objective = objective_of(p, labels, weight)
        whole = pool._minimise(objective, np.eye(5)[-1])
        members = np.flatnonzero(whole)
        if len(members) < 3:
            continue
        h = objective.hessian(whole, members)
        costs = {}
        for i, e in enumerate(members):
            rest = np.arange(len(members)) != i
            change = np.linalg.solve(h[np.ix_(rest, rest)], h[rest, i]) * whole[e]
            step = np.where(rest, 0, -whole[e])
            step[rest] = change
            costs[e] = step @ h @ step / 2
        found = pool._prune(objective, whole, len(members) - 1)
        gone = min(costs, key=costs.__getitem__)
        assert found[gone] == 0


@pytest.mark.parametrize(
    ("probs", "labels", "chosen"),
    [
        ([[[0.64, 0.36], [0.42, 0.58]], [[0.05, 0.95], [0.56, 0.44]], [[0.86, 0.14], [0.69, 0.31]]], [1, 1], 1),
        ([[[0, 1], [0.6145, 0.3855], [1, 0]], [[1, 0], [0.4703, 0.5297], [0, 1]]], [1, 0, 1], 0),
    ],
)
def test_removals_leave_the_epoch_that_helps_alone(probs, labels, chosen):
    """Two epochs fit every sample together, and one of them has no use alone: an IndexError, or no weight at all."""
    probs, labels = np.array(probs), np.array(labels)
    assert len(pool.pool_weights(probs, labels, shrinkage=0)) == 2
    weights = pool.pool_weights(probs, labels, shrinkage=0, max_members=1)
    alone = minimize_scalar(lambda w: value_of(probs[[chosen]], labels, np.ones(len(labels)), [w], 0), (0, 1))
    assert weights == pytest.approx({chosen: alone.x}, rel=1e-3)


def test_a_step_that_changes_nothing_is_the_last(monkeypatch):
    """Rounding may keep the bound of the distance from the minimum above the tolerance."""
    p, labels, weight = problem(0)
    objective, start, tried = objective_of(p, labels, weight), np.full(5, 0.3), []
    monkeypatch.setattr(pool, "_newton", lambda _, w, *others: tried.append(others) or w.copy())
    np.testing.assert_array_equal(pool._minimise(objective, start, -1.0), start)
    assert len(tried) == 1


@pytest.mark.parametrize("gone", [[], [5], [5, 9], [0, 1], [38, 39], [5, 6, 9]])
def test_samples_left_out_here_and_there(gone):
    p, labels, weight = problem(4)
    rows, w = np.delete(np.arange(40), gone), np.array([0.3, 0.0, 0.5, 0.0, 0.7])
    value, gradient = objective_of(p, labels, weight, rows)(w, np.arange(5))
    given = p[:, rows], labels[rows], weight[rows]
    assert value == pytest.approx(value_of(*given, w), rel=1e-13)
    differences = [(value_of(*given, w + d) - value_of(*given, w - d)) / 2e-5 for d in 1e-5 * np.eye(5)]
    np.testing.assert_allclose(gradient, differences, atol=1e-8)


@pytest.mark.parametrize("n_classes", [4, 5])
@pytest.mark.parametrize("some", [False, True])
def test_threads_change_no_bit(monkeypatch, n_classes, some):
    """Samples in blocks of three, in chunks of one to eight blocks, with a smaller block at the end."""
    p, labels, weight = problem(2, n_epochs=9, n=100, n_classes=n_classes)
    rows = np.delete(np.arange(100), [0, 17, 60]) if some else np.arange(100)
    monkeypatch.setattr(pool, "_BLOCK", 3 * n_classes)
    w, used = np.array([0.3, 0, 0.5, 0, 0.7, 0, 0, 0.1, 0]), set()

    def results(n_threads, chunk):
        monkeypatch.setattr(pool, "_CHUNK", chunk)
        monkeypatch.setattr(pool, "n_threads_for", lambda size, most: max(1, min(most, n_threads)))
        objective = objective_of(p, labels, weight, rows)
        found = [objective(w, epochs) for epochs in (np.arange(9), np.array([1, 2, 8]))]
        return [np.hstack(x).tobytes() for x in (*found, objective.hessian(w, np.arange(9)))]

    floored_log = pool.floored_log
    monkeypatch.setattr(pool, "floored_log", lambda *a: used.add(threading.get_ident()) or floored_log(*a))
    expected = results(1, 8)
    assert used == {threading.get_ident()}
    for n_threads in (2, 3, 8):
        for chunk in (1, 2, 8):
            assert results(n_threads, chunk) == expected
    assert len(used) > 1


def test_an_error_in_a_thread_reaches_the_caller_and_no_thread_stays(monkeypatch):
    def no_memory(*_):
        raise MemoryError("no room")

    p, labels, weight = problem(3)
    monkeypatch.setattr(pool, "_BLOCK", 4)
    monkeypatch.setattr(pool, "_CHUNK", 1)
    monkeypatch.setattr(pool, "n_threads_for", lambda size, most: 2)
    monkeypatch.setattr(pool, "floored_log", no_memory)
    before = threading.active_count()
    with pytest.raises(MemoryError, match="no room"):
        objective_of(p, labels, weight)(np.full(5, 0.4), np.arange(5))
    assert threading.active_count() == before
