"""The methods of `fuse`: equal to brute force, within their bounds, estimated without bias, repeatable to the bit."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from inputs import BACKENDS, random_probs

import fmn_ref as fmn
from fmn_ref.fusion.epsilon import Target
from fmn_ref.fusion.methods import Method, method_names, summaries
from fmn_ref.fusion.mixtures import mixture

METHODS = method_names()


@pytest.fixture(scope="module")
def problem():
    """Twelve epochs that learn and then forget a part."""
    rng = np.random.default_rng(7)
    return random_probs(rng, n_epochs=12, n_samples=150, n_classes=6, dtype=np.float32)


@pytest.fixture(scope="module")
def plans(problem):
    return {m: fmn.fuse(*problem, method=m) for m in METHODS}


def accuracy(p, labels):
    return (p.argmax(1) == labels).mean()


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_what_it_says(problem, plans, method, tmp_path):
    p, labels = problem
    plan = plans[method]
    fused = plan.apply(p)
    assert accuracy(fused, labels) == plan.accuracy[-1]
    assert accuracy(p[-1], labels) == plan.accuracy[0]
    assert plan.accuracy[-1] > plan.accuracy[0]
    assert plan.forward_passes == len(plan.weights)
    if plan.combine == "linear":
        assert sum(plan.weights.values()) == pytest.approx(1)
        np.testing.assert_allclose(mixture(p, plan.weights), fused, atol=1e-12)
    else:
        product = np.prod([np.maximum(p[e].astype(float), 1e-6) ** w for e, w in plan.weights.items()], axis=0)
        np.testing.assert_allclose(product / product.sum(1, keepdims=True), fused, atol=1e-12)
    low, high = plan.gain_interval
    assert low <= plan.cv_accuracy - plan.accuracy[0] <= high
    assert f"{plan.cv_accuracy:.2%}" in str(plan)
    plan.save(tmp_path / "plan.json")
    loaded = fmn.FusionPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert (loaded.cv_accuracy, loaded.gain_interval) == (plan.cv_accuracy, plan.gain_interval)


def test_plans_give_the_same_bits_in_a_fresh_process(problem, plans, tmp_path):
    p, _ = problem
    np.save(tmp_path / "probs.npy", p)
    for method, plan in plans.items():
        plan.save(tmp_path / f"{method}.json")
    program = (
        "import sys, numpy as np, fmn_ref as fmn\n"
        "p = np.load('probs.npy')\n"
        "for m in sys.argv[1:]: np.save(m, fmn.FusionPlan.load(m + '.json').apply(p))\n"
    )
    subprocess.run([sys.executable, "-c", program, *plans], cwd=tmp_path, check=True)
    for method, plan in plans.items():
        assert np.load(tmp_path / f"{method}.npy").tobytes() == plan.apply(p).tobytes()


def test_a_pool_has_ten_members_unless_a_bound_is_given():
    rng = np.random.default_rng(0)
    p, labels = random_probs(rng, n_epochs=30, n_samples=400)
    for bound, n_members in (({}, 10), ({"max_members": 12}, 12), ({"max_forward_passes": 4}, 4)):
        assert len(fmn.fuse(p, labels, method="pool", folds=0, **bound).members) == n_members


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bound", [{"max_members": 2}, {"max_members": 1}, {"max_forward_passes": 4}])
def test_bounds(problem, plans, method, bound):
    plan, ((name, most),) = fmn.fuse(*problem, method=method, **bound), bound.items()
    used, free = (
        {"max_members": len(p.members), "max_forward_passes": p.forward_passes} for p in (plan, plans[method])
    )
    assert used[name] <= most
    assert free[name] > most or plan.accuracy == plans[method].accuracy  # a bound that does not bind changes nothing


@pytest.mark.parametrize("window", [0, 1, 2])
def test_greedy_takes_the_best_window_each_round(problem, window):
    p, labels = problem
    plan = fmn.fuse(p, labels, method="greedy", window=window, folds=0)
    current = p[-1].astype(float)
    for (epoch, eps), reached in zip(plan.members, plan.accuracy[1:], strict=True):
        means = [p[max(0, e - window) : e + window + 1].astype(float) for e in range(len(p))]
        means = [m.sum(0) / len(m) for m in means]
        best = [fmn.best_epsilon(current, m, labels, search="exact")[1] for m in means]
        assert reached == max(best)
        assert epoch == int(np.argmax(best))
        current = eps * means[epoch] + (1 - eps) * current
    assert all(fmn.best_epsilon(current, m, labels, search="exact")[1] <= plan.accuracy[-1] for m in means)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("window", "passes"), [(1, 1), (1, 2), (2, 1), (2, 3), (2, 4), (20, 1), (20, 11)])
def test_no_window_may_be_affordable(problem, each_backend, method, window, passes):
    """Then the answer is the final model, or a single epoch where the method takes those."""
    plan = fmn.fuse(*problem, method=method, window=window, max_forward_passes=passes, folds=2)
    assert plan.forward_passes <= passes
    if plan.window and passes <= window:
        assert plan.final_model_alone


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(np.eye(24)[7], id="one sample has all the weight"),
        pytest.param(np.where(np.arange(24) == 7, 1.0, 1e-30), id="one has nearly all"),
        pytest.param(np.isin(np.arange(24), (3, 7, 9)) * 1.0, id="three samples"),
        pytest.param(np.full(24, 5e-324), id="the smallest number"),
        pytest.param(10.0 ** (np.arange(24) * 25 - 300), id="every magnitude"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("folds", [2, 24])
def test_folds_and_draws_without_weight(method, weight, folds, use_backend):
    """A fold that leaves no weight chooses the final model; values are finite and equal on every backend."""
    problem = random_probs(np.random.default_rng(2), n_epochs=6, n_samples=24, n_classes=3, dtype=np.float32)
    found = []
    for name in BACKENDS:
        use_backend(name)
        for search in ("grid", "exact"):
            plan = fmn.fuse(*problem, method=method, sample_weight=weight, folds=folds, search=search)
            assert np.isfinite([plan.cv_accuracy, *plan.gain_interval, *plan.accuracy]).all()
            found.append((search, plan, plan.cv_accuracy, plan.gain_interval))
            if np.count_nonzero(weight > 1e-20) == 1:  # the fold that predicts it was chosen without weight
                assert plan.cv_accuracy == plan.accuracy[0]
                assert plan.gain_interval == (0, 0)
    assert found == found[:2] * len(BACKENDS)


def test_a_method_sees_no_sample():
    """Not even a method that divides by the weights is asked."""

    def divides(problem, target):
        return ((0, float(target.each.sum() / target.total)),)

    labels = np.arange(9) % 3
    for total, members in ((1, ((0, 1.0),)), (0, ())):
        target = Target(labels).weighted(np.where(np.arange(len(labels)) == 0, total, 0))
        assert Method("divides", divides).members(None, target) == members


@pytest.mark.parametrize("options", [{"folds": 2}, {"method": "auto"}])
def test_one_sample_cannot_be_divided_into_folds(options):
    with pytest.raises(ValueError, match=r"^folds: .*at least 2 samples, got 1"):
        fmn.fuse([[[0.5, 0.5]]], [0], **options)
    assert fmn.fuse([[[0.5, 0.5]]], [0]).final_model_alone


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_summary(method):
    """One sentence, for the command line's help and the docs."""
    assert re.fullmatch(r"[A-Z][^\n]{20,150}\.", summaries()[method])


def test_likelihood_is_at_the_maximum(problem):
    p, labels = problem
    of_label = p[:, np.arange(len(labels)), labels].astype(float)

    def value(weights):
        return np.log(weights @ of_label).mean()

    found = np.zeros(len(p))
    for epoch, weight in fmn.fuse(p, labels, method="likelihood", window=0, folds=0).weights.items():
        found[epoch] = weight
    rng = np.random.default_rng(0)
    others = [np.full(len(p), 1 / len(p)), *np.eye(len(p)), *rng.dirichlet(np.ones(len(p)), 500)]
    others += [0.95 * found + 0.05 * other for other in others]
    assert value(found) > max(map(value, others)) - 1e-3


def test_coverage_by_hand():
    """Epoch 1 is the most accurate (3 of 4 right); only epoch 0 is right on the last sample."""
    correct = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0]], bool)
    p = np.where(correct[..., None] == [False, True], 0.9, 0.1)
    plan = fmn.fuse(p, [1] * 4, method="coverage", folds=0)
    assert plan.weights == pytest.approx({1: 0.75, 0: 0.25})


def test_plain_means_are_the_best_of_their_kind(problem, plans):
    p, labels = problem
    order = np.argsort(-(p.argmax(2) == labels).sum(1), kind="stable")
    assert plans["top"].accuracy[-1] == max(accuracy(p[order[:k]].mean(0), labels) for k in range(1, 13))
    assert plans["last"].accuracy[-1] == max(accuracy(p[-k:].mean(0), labels) for k in range(1, 13))
    assert set(plans["last"].weights) == set(range(12 - plans["last"].forward_passes, 12))
    assert 11 in plans["equal"].weights


def test_the_final_model_alone(problem):
    p, _ = problem
    for method in METHODS:
        plan = fmn.fuse(p, p[-1].argmax(1), method=method)
        if method not in ("pool", "likelihood", "coverage"):  # they do not maximise accuracy
            assert plan.final_model_alone
            assert plan.gain_interval == (0, 0)
            assert "final model alone" in str(plan)


def test_cross_validation_does_not_flatter():
    """Predictions and labels are random: the accuracy on the selection set is a fluke."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), (30, 400))
    labels = rng.integers(0, 4, 400)
    plan = fmn.fuse(p, labels, method="greedy")
    assert plan.accuracy[-1] > 0.29
    assert abs(plan.cv_accuracy - 0.25) < 0.05
    assert plan.gain_interval[0] < 0


def test_auto_loses_nothing_where_no_member_helps():
    """All epochs are worse than the final one and err at random. The pool only calibrates the final model."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 300)
    p = np.full((6, 300, 5), 0.1)
    for e, right in enumerate((0.3, 0.3, 0.3, 0.3, 0.3, 0.97)):
        said = np.where(rng.random(300) < right, labels, (labels + 1) % 5)
        p[e, np.arange(300), said] = 0.6
    plan = fmn.fuse(p, labels, method="auto")
    assert plan.cv_accuracy == plan.accuracy[0]
    assert (plan.apply(p).argmax(1) == p[-1].argmax(1)).all()


def test_auto_falls_back_on_the_final_model():
    """Few samples, and a final model that is right and calibrated: weights that fit them fit others less."""
    rng = np.random.default_rng(2)
    z = rng.normal(0, 2, (12, 60, 4))
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    labels = (p[-1].cumsum(1) > rng.random((60, 1))).argmax(1)
    plan = fmn.fuse(p, labels, method="auto")
    assert plan.final_model_alone
    assert plan.cv_accuracy == plan.accuracy[0]
    np.testing.assert_array_equal(plan.apply(p), p[-1])


# "bagged" and "auto" draw samples by number; the prior of "pool" goes by the number of samples that count
@pytest.mark.parametrize("method", sorted({*METHODS} - {"bagged", "auto", "pool"}))
def test_weights_of_samples(problem, method):
    """A weight of two is the sample twice; a weight of zero is the sample left out."""
    p, labels = problem
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 3, len(labels))
    weighted = fmn.fuse(p, labels, method=method, sample_weight=weight, folds=0)
    rows = np.repeat(np.arange(len(labels)), weight)
    repeated = fmn.fuse(p[:, rows], labels[rows], method=method, folds=0)
    assert [e for e, _ in weighted.members] == [e for e, _ in repeated.members]
    np.testing.assert_allclose([x for _, x in weighted.members], [x for _, x in repeated.members], atol=1e-6)
    np.testing.assert_allclose(weighted.accuracy, repeated.accuracy)


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_the_weights_does_not_matter(problem, method):
    p, labels = problem
    weight = np.random.default_rng(0).integers(0, 3, len(labels))
    plans = [fmn.fuse(p, labels, method=method, sample_weight=w) for w in (weight, weight * 1e-3)]
    assert [e for e, _ in plans[0].members] == [e for e, _ in plans[1].members]
    np.testing.assert_allclose([x for _, x in plans[0].members], [x for _, x in plans[1].members], atol=1e-6)


def test_balanced_accuracy():
    rng = np.random.default_rng(3)
    labels = np.where(rng.random(300) < 0.9, 0, rng.integers(1, 4, 300))
    current, candidate = rng.dirichlet(np.ones(4), (2, 300))
    for search in ("grid", "exact"):
        eps, balanced = fmn.best_epsilon(current, candidate, labels, search=search, sample_weight="balanced")
        right = (eps * candidate + (1 - eps) * current).argmax(1) == labels
        assert balanced == pytest.approx(np.mean([right[labels == c].mean() for c in range(4)]))
    plain, _ = fmn.best_epsilon(current, candidate, labels, search="exact")
    right = (plain * candidate + (1 - plain) * current).argmax(1) == labels
    assert balanced >= np.mean([right[labels == c].mean() for c in range(4)])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", np.float64, "bfloat16"])
def test_every_type_gives_the_plan_of_its_values(problem, dtype):
    p, labels = problem
    given = torch.from_numpy(p).bfloat16() if dtype == "bfloat16" else p.astype(dtype)
    wide = given.double().numpy() if dtype == "bfloat16" else given.astype(np.float64)
    for method in ("forget", "greedy", "likelihood"):
        plan = fmn.fuse(given, labels, method=method, search="exact", folds=0)
        assert plan == fmn.fuse(wide, labels, method=method, search="exact", folds=0)
        np.testing.assert_array_equal(plan.apply(given), plan.apply(wide))


@pytest.mark.parametrize("method", ["forget", "greedy", "bagged", "auto"])
def test_backends_agree(problem, plans, method, use_backend):
    for name in ("cpp", "numba", "numpy"):
        use_backend(name)
        plan = fmn.fuse(*problem, method=method)
        assert (plan, plan.cv_accuracy, plan.gain_interval) == (
            plans[method],
            plans[method].cv_accuracy,
            plans[method].gain_interval,
        )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"folds": 1}, ValueError, "folds"),
        ({"folds": 1000}, ValueError, "folds"),
        ({"folds": 151}, ValueError, r"folds: .*\[2, 150\]"),
        ({"folds": 2.0}, TypeError, "folds"),
        ({"method": "auto", "folds": 0}, ValueError, "folds: .*'auto'"),
        ({"max_members": 0}, ValueError, "max_members"),
        ({"max_forward_passes": 1.5}, TypeError, "max_forward_passes"),
        ({"sample_weight": "equal"}, ValueError, "sample_weight"),
        ({"sample_weight": [1, 2]}, ValueError, "sample_weight"),
        ({"sample_weight": -np.ones(150)}, ValueError, "sample_weight"),
        ({"method": "weights"}, ValueError, "method"),
    ],
)
def test_bad_options(problem, options, error, words):
    with pytest.raises(error, match=f"^{words}"):
        fmn.fuse(*problem, **options)


def test_plan_from_weights(problem, tmp_path):
    p, _ = problem
    plan = fmn.FusionPlan.from_weights({0: 1.0, 5: 3.0, 11: 4.0}, 12)
    assert plan.weights == pytest.approx({0: 0.125, 5: 0.375, 11: 0.5})
    np.testing.assert_allclose(plan.apply(p), mixture(p, plan.weights))
    for weights, error in (({}, ValueError), ({12: 1.0}, ValueError), ({0: -1.0}, ValueError), ([1], TypeError)):
        with pytest.raises(error):
            fmn.FusionPlan.from_weights(weights, 12)


@pytest.mark.parametrize("change", [{"cv_accuracy": 2}, {"gain_interval": [0.5, 0.1]}, {"gain_interval": "wide"}])
def test_damaged_certainty(plans, change, tmp_path):
    path = tmp_path / "plan.json"
    plans["greedy"].save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"plan\.json"):
        fmn.FusionPlan.load(path)
