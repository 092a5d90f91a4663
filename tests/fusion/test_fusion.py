"""Knowledge Fusion against a transcription of the papers' algorithm, best_epsilon against rational arithmetic."""

import dataclasses
import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from inputs import history_of, random_probs

import fmn_ref as fmn
from fmn_ref.fusion.epsilon import Target, grid_of
from fmn_ref.fusion.mixtures import members_from_weights, mixture


def fuse_by_algorithm_1(p, labels, window):
    """Algorithm 1 in plain NumPy; shares no code with the package."""
    n = len(p)
    cur, members = p[-1], []
    accuracy = (cur.argmax(1) == labels).mean()
    while True:
        wrong = cur.argmax(1) != labels
        a = int(np.argmax([((q.argmax(1) == labels) & wrong).mean() for q in p]))
        mean = p[max(0, a - window) : min(n, a + window + 1)].mean(0)
        scores = [((g / 100 * mean + (1 - g / 100) * cur).argmax(1) == labels).mean() for g in range(101)]
        best = int(np.argmax(scores))
        if scores[best] <= accuracy:
            return members, accuracy
        accuracy = scores[best]
        members.append((a, best / 100))
        cur = best / 100 * mean + (1 - best / 100) * cur


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [0, 1, 2])
def test_fuse_follows_the_method(seed, window):
    p, labels = random_probs(np.random.default_rng(seed))
    plan = fmn.fuse(p, labels, window=window)
    members, accuracy = fuse_by_algorithm_1(p, labels, window)
    assert list(plan.members) == members
    assert plan.accuracy[-1] == accuracy


@pytest.mark.parametrize("search", ["grid", "exact"])
@pytest.mark.parametrize("seed", range(8))
def test_plan(seed, search, tmp_path):
    rng = np.random.default_rng(seed)
    p, labels = random_probs(rng, dtype=np.float32)
    plan = fmn.fuse(p, labels, search=search)
    assert all(b > a for a, b in pairwise(plan.accuracy))
    fused = plan.apply(p)
    assert (fused.argmax(1) == labels).mean() == plan.accuracy[-1]
    assert sum(plan.weights.values()) == pytest.approx(1)
    np.testing.assert_allclose(mixture(p, plan.weights), fused, atol=1e-12)
    plan.save(tmp_path / "plan.json")
    assert fmn.FusionPlan.load(tmp_path / "plan.json") == plan


def test_exact_search_is_never_below_the_grid_in_any_round(rng):
    for _ in range(20):
        p, labels = random_probs(rng, n_epochs=5, n_samples=40)
        one = [fmn.fuse(p, labels, search=s, max_members=1).accuracy[-1] for s in ("grid", "exact")]
        assert one[1] >= one[0]


@st.composite
def epsilon_problems(draw):
    """Probabilities that are multiples of 1 / m, so that ties abound and fractions are exact."""
    n, k, m = draw(st.integers(1, 8)), draw(st.integers(2, 4)), draw(st.sampled_from([2, 4, 8, 10, 64, 100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    current, candidate = (rng.multinomial(m, np.ones(k) / k, n) for _ in range(2))
    return current, candidate, m, rng.integers(0, k, n)


def exact_accuracy(current, candidate, m, labels, eps):
    right = 0
    for c, q, y in zip(current.tolist(), candidate.tolist(), labels.tolist(), strict=True):
        mixed = [eps * Fraction(b, m) + (1 - eps) * Fraction(a, m) for a, b in zip(c, q, strict=True)]
        right += mixed.index(max(mixed)) == y
    return right / len(labels)


@settings(max_examples=300)
@given(epsilon_problems())
def test_exact_epsilon_against_rational_arithmetic(problem):
    current, candidate, m, labels = problem
    eps, accuracy = fmn.best_epsilon(current / m, candidate / m, labels, search="exact")
    mixed = eps * (candidate / m) + (1 - eps) * (current / m)
    assert accuracy == (mixed.argmax(1) == labels).mean()  # the returned accuracy is that of the mixture
    assert accuracy >= fmn.best_epsilon(current / m, candidate / m, labels)[1]
    gaps = [
        Fraction(int(c[y] - c[k]), int(c[y] - c[k] - q[y] + q[k]))
        for c, q, y in zip(current, candidate, labels, strict=True)
        for k in range(len(c))
        if c[y] - c[k] != q[y] - q[k]
    ]
    ends = sorted({Fraction(0), Fraction(1), *(g for g in gaps if 0 < g < 1)})
    stretches = [(a + b) / 2 for a, b in pairwise(ends)]
    best = max(exact_accuracy(current, candidate, m, labels, x) for x in (*stretches, Fraction(0), Fraction(1)))
    assert accuracy >= best - 1e-12


def test_exact_epsilon_of_a_single_tie():
    """Only eps = 1/2 exactly makes both right, since equal scores go to class 0."""
    current, candidate = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    assert fmn.best_epsilon(current, candidate, [0, 0], search="exact") == (0.5, 1.0)


@pytest.mark.parametrize("search", ["grid", "exact"])
def test_epsilon_is_0_if_nothing_is_better(rng, search):
    p, labels = random_probs(rng, n_epochs=1)
    accuracy = (p[0].argmax(1) == labels).mean()
    for worse in (p[0], np.eye(5)[(labels + 1) % 5]):
        assert fmn.best_epsilon(p[0], worse, labels, search=search) == (0, accuracy)
    certain = np.eye(5)[labels]
    assert fmn.best_epsilon(certain, p[0], labels, search=search) == (0, 1)


def test_the_grid_and_the_search_by_default(rng):
    for step, points in ((0.25, [0, 0.25, 0.5, 0.75, 1]), (1, [0, 1]), (1 / 3, [0, 1 / 3, 2 / 3, 1])):
        np.testing.assert_array_equal(grid_of(step), points)
    assert len(grid_of(1e-6)) == 10**6 + 1
    p, labels = random_probs(rng, n_epochs=2)
    assert fmn.best_epsilon(*p, labels) == fmn.best_epsilon(*p, labels, search="grid", step=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_exact_is_not_below_the_grid_where_rounding_decides(seed):
    """Saturated float32 softmax against ties: differences far below the spacing of the numbers around them."""
    rng = np.random.default_rng(seed)
    for _ in range(150):
        n, k = rng.integers(2, 12), 3
        z = rng.normal(0, 30, (n, k))
        saturated = np.exp(z - z.max(1, keepdims=True)).astype(np.float32)
        saturated /= saturated.sum(1, keepdims=True)
        tied = rng.choice([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]], n)
        nearly = tied + rng.integers(-2, 3, (n, k)) * 1e-16
        labels = rng.integers(0, k, n)
        for pair in ((saturated, tied), (tied, saturated), (tied, nearly.clip(0)), (nearly.clip(0), saturated)):
            grid, exact = (fmn.best_epsilon(*pair, labels, search=s)[1] for s in ("grid", "exact"))
            assert exact >= grid


def test_a_history_of_other_samples_is_refused(rng):
    p, labels = random_probs(rng)
    history = history_of(fmn.correctness(p, labels), labels=labels)
    assert fmn.fuse(p, labels, correct=history) == fmn.fuse(p, labels)
    with pytest.raises(ValueError, match=r"^correct: .*other labels, or in another order$"):
        fmn.fuse(p, labels[::-1], correct=history)
    with pytest.raises(ValueError, match=r"^correct: .*other labels.*\(60 samples, not 59\)$"):
        fmn.fuse(p[:, 1:], labels[1:], correct=history)
    with pytest.raises(ValueError, match=r"^correct: .*disagrees"):
        fmn.fuse(p[:, ::-1], labels, correct=history)
    with pytest.raises(ValueError, match=r"^correct: .*disagrees .*on 1 of 1 samples"):
        fmn.fuse(p[:, :1], labels[:1], correct=~fmn.correctness(p, labels)[:, :1])


def test_a_history_recorded_in_half_precision_is_accepted():
    """Many arg-maxes differ there, all of them between scores that are nearly equal."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(3, 0.3, (3, 2000, 50)))
    labels = rng.integers(0, 50, 2000)
    correct = fmn.correctness(logits.bfloat16(), labels)
    probs = logits.softmax(2).numpy()
    assert (correct[-1] != fmn.correctness(probs, labels)[-1]).any()
    assert fmn.fuse(probs, labels, correct=correct).n_epochs == 3


@pytest.mark.parametrize("n_samples", [1, 7, 1000])
def test_weights_become_integers_whose_sum_is_exact(rng, n_samples):
    """By a power of two, as large as 2^58 in all allows: equal ones stay equal, and none overflows."""
    weights = rng.random(n_samples) * 10.0 ** rng.integers(-3, 3)
    target = Target(np.zeros(n_samples, np.int64), weights)
    scale = target.weights.max() / weights.max()
    np.testing.assert_array_equal(target.weights, np.rint(weights * 2.0 ** np.rint(np.log2(scale))))
    assert target.total == int(target.weights.sum()) <= 2**58
    assert target.weights.max() > 2**56 / n_samples
    balanced = Target(np.array([0, 0, 0, 1]), "balanced")
    assert balanced.weights[:3].sum() == pytest.approx(balanced.weights[3], rel=1e-15)
    plain = Target(np.arange(4))
    assert (plain.weights, plain.total, plain.each.tolist()) == (None, 4, [1, 1, 1, 1])
    other = balanced.weighted(np.array([5, 0, 2, 0]))
    assert (other.total, other.each.tolist(), other.labels.tolist()) == (7, [5, 0, 2, 0], [0, 0, 0, 1])
    assert other.score(np.array([True, True, False, True])) == 5


def test_large_input_is_done_in_blocks(rng):
    current, candidate = rng.dirichlet(np.ones(50), (2, 30_000))
    labels = np.where(rng.random(30_000) < 0.5, current.argmax(1), candidate.argmax(1))
    eps, accuracy = fmn.best_epsilon(current, candidate, labels, search="exact")
    assert accuracy >= fmn.best_epsilon(current, candidate, labels, step=0.1)[1]
    assert ((eps * candidate + (1 - eps) * current).argmax(1) == labels).mean() == accuracy


class Reads:
    """A sequence of arrays that remembers what was read."""

    def __init__(self, probs):
        self.probs, self.read = probs, set()

    def __len__(self):
        return len(self.probs)

    def __getitem__(self, epoch):
        self.read.add(epoch)
        return self.probs[epoch]


def test_only_the_chosen_windows_are_read(rng):
    p, labels = random_probs(rng, n_epochs=40)
    source = Reads(p)
    plan = fmn.fuse(source, labels, correct=fmn.correctness(p, labels), max_members=2)
    assert plan == fmn.fuse(p, labels, max_members=2)
    assert len(source.read) <= 1 + 3 * 3  # the last, two windows, and one that may not have helped
    source.read.clear()
    plan.apply(source)
    assert source.read == {*plan.weights, 39}


def test_final_model_alone(rng):
    p, _ = random_probs(rng, n_epochs=4)
    plan = fmn.fuse(p, p[-1].argmax(1))  # the final model is always right
    assert plan.final_model_alone
    assert plan.members == ()
    assert plan.weights == {3: 1.0}
    np.testing.assert_array_equal(plan.apply(p), p[-1])


def test_one_epoch_and_one_sample():
    plan = fmn.fuse([[[0.2, 0.8]]], [0])
    assert (plan.n_epochs, plan.members, plan.accuracy) == (1, (), (0.0,))


def test_eps_of_one_drops_the_final_model():
    assert fmn.FusionPlan(((0, 1.0),), 3, 0, (0.0, 1.0)).weights == {0: 1.0}


P = np.full((3, 4, 2), 0.5)
Y = [0, 1, 0, 1]


def spoiled(value, where=(1, 2, 0)):
    p = P.copy()
    p[where] = value
    return p


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fmn.fuse(P[0], Y), ValueError, r"probs: .*n_epochs, n_samples, n_classes.*got shape \(4, 2\)"),
        (lambda: fmn.fuse(P[:0], Y), ValueError, r"probs: .*at least one epoch, got shape \(0, 4, 2\)"),
        (lambda: fmn.fuse([], Y), ValueError, "probs: .*at least one epoch, got none"),
        (lambda: fmn.fuse(P[:, :0], []), ValueError, r"probs\[2\]: .*empty"),
        (lambda: fmn.fuse(P, Y[:3]), ValueError, "labels"),
        (lambda: fmn.fuse(P, [0, 1, 0, 2]), ValueError, "labels"),
        (lambda: fmn.fuse(P, [0.0] * 4), TypeError, "labels"),
        (lambda: fmn.fuse(spoiled(np.nan), Y), ValueError, r"probs\[1\].*nan.*\(2, 0\)"),
        (lambda: fmn.fuse(spoiled(-0.1), Y), ValueError, r"probs\[1\].*-0.1"),
        (lambda: fmn.fuse(spoiled(0.9), Y), ValueError, r"probs\[1\]: .*sum to 1"),
        (lambda: fmn.fuse(P.astype(int), Y), TypeError, r"probs\[2\]: .*floating-point"),
        (lambda: fmn.fuse(P.astype(str), Y), TypeError, r"probs\[2\]: .*dtype"),
        (lambda: fmn.fuse(7, Y), TypeError, "probs"),
        (lambda: fmn.fuse([P[0], P[0, :3], P[0]], Y), ValueError, r"probs\[1\].*shape"),
        (lambda: fmn.fuse(P, Y, correct=np.ones((2, 4), bool)), ValueError, "correct"),
        (lambda: fmn.fuse(P, Y, method="magic"), ValueError, "method"),
        (lambda: fmn.fuse(P, Y, search="magic"), ValueError, "search"),
        (lambda: fmn.fuse(P, Y, window=-1), ValueError, "window"),
        (lambda: fmn.fuse(P, Y, window=0.5), TypeError, "window"),
        (lambda: fmn.fuse(P, Y, max_members=0), ValueError, "max_members"),
        (lambda: fmn.fuse(P, Y, window=2**31 + 1), ValueError, "window"),
        (lambda: fmn.fuse(P, Y, step=0.3), ValueError, "step: .*divides 1"),
        (lambda: fmn.fuse(P, Y, step=2), ValueError, "step"),
        (lambda: fmn.fuse(P, Y, step=5e-7), ValueError, "step"),
        (lambda: fmn.fuse(P, Y, step=0), ValueError, "step"),
        (lambda: fmn.best_epsilon(P[0], P[0, :3], Y), ValueError, "candidate"),
        (lambda: fmn.best_epsilon(P[0, :3] * 2, P[0], Y), ValueError, "current"),
        (lambda: fmn.best_epsilon(P[0], P[0], Y[:3]), ValueError, "labels: expected 4 samples, got 3"),
        (lambda: fmn.best_epsilon(P[0], P[0], [0, 1, 0, 2]), ValueError, r"labels: .*\[0, 2\)"),
        (lambda: fmn.best_epsilon(P[0], P[0], Y, search="magic"), ValueError, "search"),
        (lambda: fmn.best_epsilon(P[0], P[0], Y, sample_weight="magic"), ValueError, "sample_weight"),
        (lambda: fmn.fuse(P, Y).apply(P[:2]), ValueError, "probs: .*3 epochs .* got 2"),
        (lambda: fmn.FusionPlan.from_weights([1], 3), TypeError, "weights: .* got list"),
        (lambda: fmn.FusionPlan.from_weights({0: 1}, 3, "magic"), ValueError, "combine"),
        (lambda: fmn.FusionPlan.from_weights({0: 0}, 3), ValueError, "weights"),
        (lambda: fmn.FusionPlan.from_weights({3: 1}, 3), ValueError, "epoch"),
        (lambda: fmn.FusionPlan.from_weights({-1: 1}, 3), ValueError, "epoch"),
        (lambda: fmn.FusionPlan.from_weights({0: -1}, 3), ValueError, "weights"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=f"^{words}"):
        call()


def plan_of(members=((1, 0.5),), n_epochs=3, window=1, accuracy=(0.5, 0.6), **others):
    return fmn.FusionPlan(members, n_epochs, window, accuracy, **others)


def pool_of(*members, window=0):
    return plan_of(members, window=window, combine="geometric")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: plan_of((), 0, accuracy=(0.5,)), "n_epochs"),
        (lambda: plan_of(n_epochs=2**31 + 1), "n_epochs"),
        (lambda: plan_of(window=-1), "window"),
        (lambda: plan_of(window=2**31 + 1), "window"),
        (lambda: plan_of(combine="magic"), "combine"),
        (lambda: plan_of(((3, 0.5),)), "epoch"),
        (lambda: plan_of(((-1, 0.5),)), "epoch"),
        (lambda: plan_of(((1, 1.5),)), "eps"),
        (lambda: plan_of(((1, -0.5),)), "eps"),
        (lambda: pool_of((1, -0.5)), "weight"),
        (lambda: pool_of((1, 1e6 + 1)), "weight"),
        (lambda: pool_of((1, 0.5), (1, 0.5)), "members"),
        (lambda: pool_of((1, 0.5), window=1), "members"),
        (lambda: plan_of(accuracy=(0.5,)), "accuracy: expected 2 values, got 1"),
        (lambda: plan_of(accuracy=(0.5, 1.1)), "accuracy"),
        (lambda: plan_of(accuracy=(-0.1, 0.5)), "accuracy"),
        (lambda: plan_of(cv_accuracy=1.1), "accuracy"),
        (lambda: plan_of(gain_interval=(0.2, 0.1)), "gain_interval"),
        (lambda: plan_of(gain_interval=(-1.1, 0.1)), "gain_interval"),
        (lambda: plan_of(gain_interval=(0, 1.1)), "gain_interval"),
        (lambda: plan_of(method="magic"), "method"),
        (lambda: plan_of(search="magic"), "search"),
        (lambda: plan_of(epochs=(1, 2)), "epochs: expected 3 ascending numbers, got 2"),
        (lambda: plan_of(epochs=(1, 3, 2)), "epochs"),
        (lambda: plan_of(epochs=(1, 2, 2)), "epochs"),
    ],
)
def test_a_plan_names_the_value_at_fault(call, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        call()


def test_a_plan_takes_the_ends_of_every_range():
    plan_of(((0, 0.0), (2, 1.0)), accuracy=(0, 1, 0), gain_interval=(-1, 1), cv_accuracy=1)
    plan_of(n_epochs=2**31, window=2**31, gain_interval=(0.1, 0.1), cv_accuracy=0, epochs=())
    pool_of((0, 0.0), (1, 1e6))
    plan_of((), 1, accuracy=(0.5,), epochs=(2**63 - 1,), method="weights", search="exact")


@pytest.mark.parametrize(
    ("weights", "final", "members"),
    [
        ({0: 1, 2: 3}, None, ((2, 1.0), (0, 0.25))),  # the heaviest first, each by its share of those so far
        ({0: 1, 3: 3}, None, ((0, 0.25),)),  # the last epoch is where mixing starts
        ({0: 1, 1: 0, 2: 1}, 2.0, ((0, 1 / 3), (2, 0.25))),
        ({3: 1}, 1.0, ((3, 0.5),)),  # of windows, the last one beside the last epoch
        ({3: 2}, None, ()),
        ({}, 1.0, ()),
        ({1: 1e300}, 0.0, ((1, 1.0),)),
    ],
)
def test_members_that_give_the_weights(weights, final, members):
    assert members_from_weights(weights, 4, final=final) == members


def test_the_text_of_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = fmn.FusionPlan(((2, 0.5),), 5, 1, (0.5, 0.75))
    rows = ["   row  weight", "     1  0.1667", "     2  0.1667", "     3  0.1667", "     4  0.5000"]
    words = "forget: 4 checkpoints and forward passes, 75.00% on the selection set, the final model 50.00%"
    assert str(plan).splitlines() == [*rows, f"{words}; not cross-validated (folds=5 does it)"]
    estimated = dataclasses.replace(plan, cv_accuracy=0.625, gain_interval=(-0.025, 0.15), epochs=(5, 10, 15, 20, 25))
    named = estimated.with_files({1: tmp_path / "a.pt", 2: Path("/elsewhere/b.pt")}.get)
    assert named.files == {1: tmp_path / "a.pt", 2: Path("/elsewhere/b.pt")}
    assert str(named).splitlines() == [
        " epoch  weight  file",
        "    10  0.1667  a.pt",
        "    15  0.1667  /elsewhere/b.pt",
        "    20  0.1667",
        "    25  0.5000",
        f"{words}; cross-validated 62.50%, -2.5 to +15.0 points from the final model's",
    ]
    assert [named.epoch_of(row) for row in range(5)] == [5, 10, 15, 20, 25]
    assert [plan.epoch_of(row) for row in range(5)] == [0, 1, 2, 3, 4]
    alone = fmn.FusionPlan((), 5, 1, (0.5,), "greedy")
    assert str(alone) == "greedy: the final model alone is best, 50.00% on the selection set"
    given = fmn.FusionPlan.from_weights({4: 1, 0: 1}, 5)
    assert "cross-validated" not in str(given)
    assert (given.method, given.search, given.accuracy, given.window) == ("weights", "grid", (0.0, 0.0), 0)


def test_plans_are_equal_if_they_predict_the_same():
    """Estimates, and what the rows and the samples are called, do not count."""
    plan = plan_of()
    known = {"epochs": (1, 2, 3), "samples_sha256": "ab", "files": {1: Path("a.pt")}}
    same = dataclasses.replace(plan, cv_accuracy=0.5, gain_interval=(0, 0.1), **known)
    assert same == plan
    for change in ({"method": "greedy"}, {"search": "exact"}, {"window": 0}, {"labels_sha256": "ab"}):
        assert dataclasses.replace(plan, **change) != plan
    assert not any(f", {name}=" in repr(same) for name in ("labels_sha256", *known))
    assert "cv_accuracy=0.5, gain_interval=(0, 0.1)" in repr(same)


def test_the_file_of_a_plan_is_the_documented_one(tmp_path):
    plan = plan_of(((2, 0.5),), 4, 1, (0.5, 0.75), labels_sha256="ab", samples_sha256="cd", cv_accuracy=0.6)
    dataclasses.replace(plan, gain_interval=(0, 0.2), epochs=(1, 3, 5, 7)).save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "format": "fmn_ref.plan",
        "version": 2,
        "method": "forget",
        "combine": "linear",
        "search": "grid",
        "window": 1,
        "n_epochs": 4,
        "members": [{"row": 2, "eps": 0.5}],
        "weights": {"1": pytest.approx(1 / 6), "2": pytest.approx(1 / 6), "3": pytest.approx(2 / 3)},
        "epochs": [1, 3, 5, 7],
        "selection_accuracy": [0.5, 0.75],
        "selection_labels_sha256": "ab",
        "selection_samples_sha256": "cd",
        "cv_accuracy": 0.6,
        "gain_interval": [0, 0.2],
    }
    found = fmn.FusionPlan.load(tmp_path / "a.json")
    assert (found.labels_sha256, found.samples_sha256, found.epochs) == ("ab", "cd", (1, 3, 5, 7))
    assert (found.cv_accuracy, found.gain_interval, found.files) == (0.6, (0, 0.2), {})


def test_the_samples_that_chose_a_plan_are_known(rng):
    p, labels = random_probs(rng)
    plan, order = fmn.fuse(p, labels), rng.permutation(len(labels))
    assert plan.was_chosen_on(p, labels)
    assert plan.was_chosen_on(p[:, order], labels[order])
    assert plan.was_chosen_on(p.astype(np.float32), labels)
    other = p.copy()
    other[-1] = other[-1][:, ::-1]
    assert not plan.was_chosen_on(other, labels)
    other = p.copy()
    other[:-1] = other[:-1, ::-1]
    assert plan.was_chosen_on(other, labels)  # the last row counts
    by_labels = dataclasses.replace(plan, samples_sha256="")
    assert by_labels.was_chosen_on(other[:, ::-1], labels)
    assert not by_labels.was_chosen_on(p[:, order], labels[order])


class TestPlanFile:
    @pytest.fixture
    def plan(self, tmp_path):
        path = tmp_path / "plan.json"
        fmn.FusionPlan(((2, 0.5),), 5, 1, (0.5, 0.75)).save(path)
        return path

    @pytest.mark.parametrize(
        "change",
        [
            {"members": [{"epoch": 5, "eps": 0.5}]},
            {"members": [{"epoch": 2, "eps": 1.5}]},
            {"members": [{"epoch": 2}]},
            {"members": "all"},
            {"members": []},
            {"n_epochs": 0},
            {"n_epochs": "many"},
            {"window": -1},
            {"method": 7},
            {"search": "fast"},
            {"version": 3},
            {"combine": "harmonic"},
            {"combine": "geometric", "window": 0},  # its members have weights
            {"combine": "geometric", "members": [{"epoch": 2, "weight": 0.5}]},  # and no window
            {"format": "other"},
            {"selection_accuracy": [0.5, float("nan")]},
        ],
    )
    def test_invalid(self, plan, change):
        plan.write_text(json.dumps(json.loads(plan.read_text()) | change))
        with pytest.raises(ValueError, match=r"plan\.json"):
            fmn.FusionPlan.load(plan)

    def test_version_1(self, plan):
        """The first release wrote no `combine` and no `epochs`, and called a row an epoch."""
        content = json.loads(plan.read_text()) | {"version": 1, "members": [{"epoch": 2, "eps": 0.5}]}
        del content["combine"], content["epochs"]
        plan.write_text(json.dumps(content))
        assert fmn.FusionPlan.load(plan) == fmn.FusionPlan(((2, 0.5),), 5, 1, (0.5, 0.75))

    @pytest.mark.parametrize(
        "change",
        [
            {"weights": {"1": 1}},
            {"weights": {}},
            {"weights": [0.5]},
            {"weights": {"1": "a"}},
            {"members": [{"row": 2, "eps": 0.75}]},
            {"members": [{"row": 3, "eps": 0.5}]},
            {"window": 2},
        ],
    )
    def test_weights_that_are_not_those_of_the_members(self, plan, change):
        """Other languages read `weights` alone: an edited file would give two plans."""
        content = json.loads(plan.read_text())
        plan.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=r"^\S+plan\.json: not a valid plan: "):
            fmn.FusionPlan.load(plan)
        plan.write_text(json.dumps(content | {"weights": {"1": 1 / 6, "2": 1 / 6, "4": 0.5}}))
        with pytest.raises(ValueError, match=r"plan\.json: not a valid plan: weights: missing row 3, whose"):
            fmn.FusionPlan.load(plan)
        added = content["weights"] | {"0": 0.0}
        plan.write_text(json.dumps(content | {"weights": added}))
        with pytest.raises(ValueError, match=r"plan\.json: not a valid plan: weights: expected 4 rows .* got 5"):
            fmn.FusionPlan.load(plan)
        rounded = {row: float(f"{weight:.8g}") for row, weight in content["weights"].items()}
        plan.write_text(json.dumps(content | {"weights": rounded}))
        assert fmn.FusionPlan.load(plan).members == ((2, 0.5),)

    def test_recorded_epochs(self, plan, rng):
        """What people see are the recorded numbers, of the history, or of the probabilities."""
        p, labels = random_probs(rng)
        history = fmn.CorrectnessHistory(len(labels), labels=labels)
        numbers = tuple(range(100, 100 * len(p) + 1, 100))
        for number, q in zip(numbers, p, strict=True):
            history.append(fmn.correctness(q, labels), number)
        made = fmn.fuse(p, labels, correct=history)
        made.save(plan)
        for found in (made, fmn.FusionPlan.load(plan)):
            assert found.epochs == numbers
            shown = [line.split() for line in str(found).splitlines()]
            assert shown[0] == ["epoch", "weight"]
            assert shown[1:-1] == [[str(100 * (row + 1)), f"{w:.4f}"] for row, w in found.weights.items()]
        assert ", epochs=" not in repr(made)
        assert str(fmn.fuse(p, labels)).split()[0] == "row"
        with pytest.raises(ValueError, match="epochs: expected 8 ascending numbers"):
            dataclasses.replace(made, epochs=numbers[::-1])

    def test_geometric(self, plan):
        made = fmn.FusionPlan.from_weights({3: 0.25, 0: 0, 1: 2.5}, 5, combine="geometric")
        assert (made.members, made.weights) == (((1, 2.5), (3, 0.25)), {1: 2.5, 3: 0.25})
        made.save(plan)
        assert fmn.FusionPlan.load(plan) == made
        assert fmn.FusionPlan((), 5, 0, (0.5,), combine="geometric").combine == "linear"  # the final model as it is
        with pytest.raises(ValueError, match="each once"):
            fmn.FusionPlan(((1, 0.5), (1, 0.5)), 5, 0, (0.5, 0.75), combine="geometric")
        with pytest.raises(ValueError, match="weight"):
            fmn.FusionPlan(((1, -0.5),), 5, 0, (0.5, 0.75), combine="geometric")

    @pytest.mark.parametrize(
        "content", [b"", b"[" * 100_000, b"{", b"[]", b"\x80\x04K\x01.", b'{"format": "fmn_ref.plan", "version": 1}']
    )
    def test_not_a_plan(self, plan, content):
        plan.write_bytes(content)
        with pytest.raises(ValueError, match=r"plan\.json"):
            fmn.FusionPlan.load(plan)

    @pytest.mark.parametrize(
        "change",
        [
            {"members": 7},
            {"members": [[1, 0.5]]},
            {"members": [{"epoch": 1, "eps": None}]},
            {"members": [{"epoch": 1e400, "eps": 0.5}]},
            {"selection_accuracy": None},
            {"gain_interval": [0.1]},
            {"gain_interval": 3},
            {"window": "1"},
            {"n_epochs": 10**400},
            {"combine": []},
            {"search": {}},
        ],
    )
    def test_other_kinds_of_values_are_named(self, plan, change):
        content = json.loads(plan.read_text())
        plan.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=r"^\S+plan\.json: not a valid plan: "):
            fmn.FusionPlan.load(plan)

    def test_a_plan_of_many_epochs_needs_no_memory(self, plan):
        """300 bytes can say that a plan has 2^31 epochs: only those with a weight count."""
        content = json.loads(plan.read_text())
        weights = dict.fromkeys("01234", 0.1) | {str(2**31 - 1): 0.5}
        plan.write_text(json.dumps(content | {"n_epochs": 2**31, "window": 2, "weights": weights}))
        found = fmn.FusionPlan.load(plan)
        assert found.weights == {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 2**31 - 1: 0.5}
        assert found.forward_passes == 6
        assert "6 checkpoints" in str(found)
        with pytest.raises(ValueError, match="expected 2147483648 epochs"):
            found.apply(np.ones((2, 1, 1)))
        for window in (2**20, 2**31):
            plan.write_text(json.dumps(content | {"n_epochs": 2**31, "window": window}))
            with pytest.raises(ValueError, match=r"plan\.json: not a valid plan: window"):
                fmn.FusionPlan.load(plan)

    def test_a_window_wider_than_the_run_is_honest(self, plan):
        made = fmn.FusionPlan(((2, 0.5), (0, 0.25)), 5, 2**31, (0.5, 0.5, 0.5))
        made.save(plan)
        assert fmn.FusionPlan.load(plan) == made
        assert len(made.weights) == 5
        for members in ((), ((5, 0.0),), ((0, 0.0), (2**31 - 1, 1.0))):  # windows without a weight
            alone = fmn.FusionPlan(members, 2**31, 2**20 if len(members) < 2 else 0, (0.5,) * (len(members) + 1))
            alone.save(plan)
            assert fmn.FusionPlan.load(plan) == alone
            assert alone.weights == {2**31 - 1: 1}

    def test_overlapping_windows_are_honest(self, plan):
        """Hundreds of members around the same epochs: few epochs have a weight."""
        members = tuple((5000 + i % 40, 0.01) for i in range(400))
        made = fmn.FusionPlan(members, 100_000, 200, (0.5,) * 401)
        made.save(plan)
        assert fmn.FusionPlan.load(plan) == made
        assert len(made.weights) == 441

    @pytest.mark.parametrize("window", [0, 1, 3, 100])
    def test_weights_are_those_of_every_epoch_written_out(self, rng, window):
        for _ in range(50):
            n = int(rng.integers(1, 20))
            members = tuple(
                (int(rng.integers(n)), float(rng.choice([0, 1, rng.random()]))) for _ in range(rng.integers(8))
            )
            w = np.zeros(n)
            w[-1] = 1
            for epoch, eps in members:
                w *= 1 - eps
                around = slice(max(epoch - window, 0), epoch + window + 1)
                w[around] += eps / len(w[around])
            plan = fmn.FusionPlan(members, n, window, (0.5,) * (len(members) + 1))
            assert plan.weights == {e: w[e] for e in range(n) if w[e]}

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            fmn.FusionPlan.load(tmp_path / "none.json")


def test_probabilities_by_epoch_number_are_named(rng):
    """A dict has no rows: its first key may be 5."""
    p, labels = random_probs(rng)
    for keyed in ({5: p[0], 6: p[1]}, {0: p[0], 1: p[1]}):
        with pytest.raises(TypeError, match="probs: expected an array or a sequence of arrays, got dict"):
            fmn.fuse(keyed, labels)
        with pytest.raises(TypeError, match="logits: expected an array or a sequence of arrays, got dict"):
            fmn.from_logits(keyed)
