"""Each method against a slow twin in plain loops, with and without bounds."""

import importlib
import math

import numpy as np
import pytest
from inputs import random_probs

import fmn_ref as fmn
from fmn_ref.fusion.methods import Problem

fuse = importlib.import_module("fmn_ref.fusion.fuse")  # the package shows the function under this name
BOUNDS = [{}, {"max_members": 1}, {"max_members": 3}, *({"max_forward_passes": n} for n in (1, 2, 3, 4, 5, 6, 8))]


def window_of(epoch, window, n_epochs):
    return set(range(max(0, epoch - window), min(n_epochs, epoch + window + 1)))


def knowledge_fusion(p, labels, window, max_members=math.inf, max_forward_passes=math.inf):
    """Algorithm 1 of arXiv 2412.12968 among the epochs whose windows are within the bounds."""
    n, current, members = len(p), p[-1], []
    accuracy = (current.argmax(1) == labels).mean()
    while len(members) < max_members:
        known = set().union(*(window_of(e, window, n) for e, _ in members))
        known |= {n - 1} if all(eps < 1 for _, eps in members) else set()
        allowed = [e for e in range(n) if len(known | window_of(e, window, n)) <= max_forward_passes]
        if not allowed:
            break
        wrong = current.argmax(1) != labels
        a = max(allowed, key=lambda e: ((p[e].argmax(1) == labels) & wrong).sum())
        mean = p[sorted(window_of(a, window, n))].mean(0)
        scores = [((g / 100 * mean + (1 - g / 100) * current).argmax(1) == labels).mean() for g in range(101)]
        if max(scores) <= accuracy:
            break
        eps, accuracy = int(np.argmax(scores)) / 100, max(scores)
        members.append((a, eps))
        current = eps * mean + (1 - eps) * current
    return members


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [0, 1, 2])
def test_knowledge_fusion_within_its_bounds(window, bound):
    for seed in range(6):
        p, labels = random_probs(np.random.default_rng(seed), n_epochs=6)
        plan = fmn.fuse(p, labels, window=window, folds=0, **bound)
        assert list(plan.members) == knowledge_fusion(p, labels, window, **bound)


@pytest.mark.parametrize(
    ("members", "epoch", "needed"),
    [
        ((), 2, 4),  # 1, 2, 3 and the final model
        ((), 5, 2),
        ((), 0, 3),
        (((2, 0.5),), 3, 5),
        (((2, 0.5),), 2, 4),
        (((2, 1.0),), 3, 4),  # the final model has no weight then
        (((0, 0.5), (2, 1.0)), 3, 5),
    ],
)
def test_forward_passes_that_one_more_member_needs(members, epoch, needed):
    for most in range(1, 7):
        problem = Problem([None] * 6, None, None, 1, "grid", None, 9, most)
        assert problem.affordable(members, epoch) == (needed <= most)
        final = float(all(eps < 1 for _, eps in members))
        assert problem.within([*(e for e, _ in members), epoch], final) == (needed <= most)
        assert problem.most_epochs() == most
    assert Problem([None] * 6, None, None, 1, "grid", None, 2, 4).most_epochs() == 2
    assert Problem([None] * 6, None, None, 1, "grid", None, 9, 9).most_epochs() == 6


def mean_of_windows(weights, final, window, n_epochs):
    """Weights of single epochs, scaled to 1."""
    w = np.zeros(n_epochs)
    w[-1] = final
    for epoch, weight in weights.items():
        around = sorted(window_of(epoch, window, n_epochs))
        w[around] += weight / len(around)
    return w / w.sum()


def dense(plan):
    w = np.zeros(plan.n_epochs)
    w[list(plan.weights)] = list(plan.weights.values())
    return w


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [0, 1])
def test_bagging_is_the_mean_of_greedy_plans(window, bound):
    p, labels = random_probs(np.random.default_rng(3), n_epochs=7, n_samples=90)
    draw, total, final = np.random.default_rng(0), dict.fromkeys(range(7), 0.0), 0.0
    for _ in range(5):
        drawn = np.bincount(draw.integers(0, 90, 90), minlength=90)
        greedy = fmn.fuse(p, labels, method="greedy", window=window, sample_weight=drawn, folds=0, **bound)
        for i, (epoch, eps) in enumerate(greedy.members):
            total[epoch] += eps * math.prod(1 - later for _, later in greedy.members[i + 1 :]) / 5
        final += math.prod(1 - eps for _, eps in greedy.members) / 5
    kept = sorted((e for e in total if total[e] >= 0.01), key=lambda e: -total[e])[: bound.get("max_members")]
    while kept and len({6} | set().union(*(window_of(e, window, 7) for e in kept))) > bound.get(
        "max_forward_passes", 7
    ):
        kept.pop()
    plan = fmn.fuse(p, labels, method="bagged", window=window, folds=0, **bound)
    expected = mean_of_windows({e: total[e] for e in kept}, final, window, 7) if kept else np.eye(7)[-1]
    np.testing.assert_allclose(dense(plan), expected, atol=1e-12)


@pytest.mark.parametrize("bound", [{}, {"max_members": 2}, {"max_forward_passes": 3}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_coverage_by_a_loop(bound, weighted):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        p, labels = random_probs(rng, n_epochs=9, n_samples=200)  # a sample is a share of 0.005, the least that counts
        w = rng.integers(0, 4, 200) if weighted else np.ones(200)
        right = p.argmax(2) == labels
        share, covered = {}, np.zeros(200, bool)
        for e in sorted(range(9), key=lambda e: -w[right[e]].sum()):
            share[e] = w[right[e] & ~covered].sum() / w.sum()
            covered |= right[e]
        most = min([9, *bound.values()])
        kept = sorted((e for e in share if share[e] >= 0.005), key=lambda e: (-share[e], e))[:most]
        expected = np.zeros(9)
        expected[kept] = [share[e] for e in kept]
        weight = {"sample_weight": w} if weighted else {}
        plan = fmn.fuse(p, labels, method="coverage", folds=0, **weight, **bound)
        np.testing.assert_allclose(dense(plan), expected / expected.sum(), atol=1e-12)


SIZES = {6: [*range(1, 7)], 40: [*range(1, 9), 10, 12, 15, 18, 22, 27, 33, 40]}  # each a quarter above the one before


@pytest.mark.parametrize("method", ["equal", "last", "top"])
@pytest.mark.parametrize("n_epochs", SIZES)
@pytest.mark.parametrize("bound", [{}, {"max_members": 4}, {"max_forward_passes": 9}], ids=str)
def test_plain_means_by_a_loop(method, n_epochs, bound):
    """The first of equally good numbers of epochs; the final model if none is better."""
    for seed in range(5):
        p, labels = random_probs(np.random.default_rng(seed), n_epochs=n_epochs, n_samples=50)
        n_right = (p.argmax(2) == labels).sum(1)
        orders = {
            "last": lambda k: range(n_epochs - k, n_epochs),
            "top": lambda k, n_right=n_right: sorted(range(n_epochs), key=lambda e: -n_right[e])[:k],
            "equal": lambda k: [n_epochs - 1 - i * n_epochs // k for i in range(k)],
        }
        most = min([n_epochs, *bound.values()])
        sizes = SIZES[n_epochs] if method == "equal" else range(1, n_epochs + 1)
        sizes = [k for k in sizes if k <= most] + ([most] if method == "equal" else [])
        best, chosen = n_right[-1], [n_epochs - 1]
        for k in sizes:
            epochs = sorted(orders[method](k))
            right = (p[epochs].mean(0).argmax(1) == labels).sum()
            if right > best:
                best, chosen = right, epochs
        plan = fmn.fuse(p, labels, method=method, folds=0, **bound)
        assert plan.weights == pytest.approx(dict.fromkeys(chosen, 1 / len(chosen)))


@pytest.mark.parametrize("bound", [{}, {"max_members": 2}, {"max_forward_passes": 4}], ids=str)
@pytest.mark.parametrize("window", [0, 1])
def test_likelihood_by_many_steps_of_expectation_maximisation(window, bound):
    """Components below 0.01 leave, and where bounds bind the lightest one, until the rest fits."""
    p, labels = random_probs(np.random.default_rng(5), n_epochs=6, n_samples=80)
    of_label = p[:, np.arange(80), labels]
    parts = [sorted(window_of(e, window, 6)) for e in range(6)] + [[5]]
    components = np.array([of_label[part].mean(0) for part in parts])
    alive = [i for i in range(7) if i == 6 or parts[i] != [5]]  # the final model is no member
    while True:
        q = np.full(len(alive), 1 / len(alive))
        for _ in range(100):
            q = q * (components[alive] / (q @ components[alive])).mean(1)
        light = [i for i, share in zip(alive, q, strict=True) if share < min(0.01, q.max())]
        passes = len(set().union(*(parts[i] for i in alive)))
        n_members = sum(i < 6 for i in alive)
        if light:
            alive = [i for i in alive if i not in light]
        elif passes > bound.get("max_forward_passes", 6) or n_members > bound.get("max_members", 6):
            del alive[int(q.argmin())]
        else:
            break
    share = dict(zip(alive, q, strict=True))
    expected = mean_of_windows({i: v for i, v in share.items() if i < 6}, share.get(6, 0), window, 6)
    plan = fmn.fuse(p, labels, method="likelihood", window=window, folds=0, **bound)
    np.testing.assert_allclose(dense(plan), expected, atol=1e-6)


def unseen(p, labels, method, weight, folds):
    """Predictions for each fold by the plan that was chosen on the others."""
    fold = np.random.default_rng(0).permutation(len(labels)) % folds
    found = np.empty(p.shape[1:])
    for k in range(folds):
        others = np.where(fold == k, 0, weight)
        plan = fmn.fuse(p, labels, method=method, sample_weight=others, folds=0)
        found[fold == k] = plan.apply(p)[fold == k]
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("method", ["forget", "pool", "top", "auto"])
def test_cross_validation_by_a_loop(method, folds, weighted):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        p, labels = random_probs(rng, n_epochs=6, n_samples=90)
        weight = rng.integers(0, 3, 90) if weighted else np.ones(90, int)
        share = weight / weight.sum()
        right = p[-1].argmax(1) == labels
        fused = unseen(p, labels, "pool" if method == "auto" else method, weight, folds)
        lost = (right * 1.0 - (fused.argmax(1) == labels)) * share
        of_label = (np.log(np.maximum(q[np.arange(90), labels], 1e-6)) @ share for q in (fused, p[-1]))
        better, final = of_label
        alone = method == "auto" and not (better > final and lost.sum() <= np.sqrt(90) * lost.std())
        expected = right @ share if alone else (fused.argmax(1) == labels) @ share
        given = {"sample_weight": weight} if weighted else {}
        plan = fmn.fuse(p, labels, method=method, folds=folds, **given)
        assert plan.cv_accuracy == pytest.approx(expected)
        assert plan.final_model_alone or not alone
        gain = ((fused.argmax(1) == labels) * 1.0 - right) * (not alone)
        mean = gain @ share
        error = np.sqrt(90) * np.std((gain - mean) * share)  # of a ratio of two sums, by its linear part
        np.testing.assert_allclose(plan.gain_interval, [mean - 1.96 * error, mean + 1.96 * error], atol=0.02)


@pytest.mark.parametrize(
    ("n_samples", "options", "folds"),
    [
        (49, {}, 0),
        (50, {}, 5),
        (4, {"method": "auto"}, 4),
        (49, {"method": "auto"}, 5),
        (49, {"folds": 3}, 3),
        (60, {"folds": 0}, 0),
        (2, {"folds": 2}, 2),
        (4999, {}, 5),
        (5000, {}, 2),
        (5000, {"method": "auto"}, 2),
    ],
)
def test_the_number_of_folds(monkeypatch, n_samples, options, folds):
    p = np.random.default_rng(0).dirichlet([1, 1], (2, n_samples))
    labels, used = np.arange(n_samples) % 2, []
    real = fuse._predict_unseen
    monkeypatch.setattr(fuse, "_predict_unseen", lambda *given: used.append(given[-1]) or real(*given))
    for given in (p, list(p), tuple(p)):
        fmn.fuse(given, labels, **options)
    assert used == [folds] * 3 * (folds > 0)
    lazy = type("Lazy", (), {"__len__": lambda self: 2, "__getitem__": lambda self, e: p[e]})()
    used.clear()
    fmn.fuse(lazy, labels, **options)
    assert used == ([folds] if options and folds else [])  # reading an epoch may be expensive
