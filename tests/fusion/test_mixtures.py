"""Logarithms of probabilities in every type, members of given weights, and what the registry says of each method."""

import math

import numpy as np
import pytest
import torch
from inputs import random_probs

import fmn_ref as fmn
from fmn_ref._check import BFLOAT16
from fmn_ref.fusion import baselines, methods
from fmn_ref.fusion.methods import AUTO, summaries
from fmn_ref.fusion.mixtures import floored_log, members_from_weights
from fmn_ref.metrics.scores import FLOOR

VALUES = [0.0, 6e-8, 1e-6, 2.0**-14, 0.1, 0.3, 0.5, 0.999, 1.0, 1.0078125]  # a rounded row may exceed 1


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, "bfloat16"])
def test_logarithms_by_a_loop(dtype, into):
    if dtype == "bfloat16":
        tensor = torch.tensor(VALUES, dtype=torch.bfloat16)
        stored, values = tensor.view(torch.int16).numpy().view(BFLOAT16), tensor.double().tolist()
    else:
        stored = np.array(VALUES, dtype)
        values = stored.astype(float).tolist()
    expected = [math.log(min(max(value, FLOOR), 1)) for value in values]
    for shaped, order in ((stored, range(10)), (stored.reshape(2, 5).T, [0, 5, 1, 6, 2, 7, 3, 8, 4, 9])):
        out = np.full(10, np.nan) if into else None
        found = floored_log(shaped, out)
        assert (found.shape, found.dtype) == ((10,), np.float64)
        assert not into or found is out
        np.testing.assert_allclose(found, np.array(expected)[order], rtol=1e-15)


def test_every_number_of_16_bits_has_its_logarithm():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    within = every[(every >= 0) & (every <= 1)]
    np.testing.assert_allclose(floored_log(within), [math.log(max(float(v), FLOOR)) for v in within], rtol=1e-15)


@pytest.mark.parametrize("row", [-1, 4, 5, 6])
def test_weights_of_rows_that_are_not_there(row):
    with pytest.raises(ValueError, match=rf"^epoch: expected a value in \[0, 3\], got {row}"):
        members_from_weights({0: 1.0, row: 1.0}, 4)


def test_what_the_registry_says_of_each_method():
    windowed, controls = {"forget", "greedy", "bagged", "likelihood"}, {"equal", "last", "top"}
    registry = methods.METHODS.values()
    assert {m.name for m in registry if m.windowed} == windowed
    assert {m.name for m in registry if m.control} == controls
    assert {m.name for m in registry if m.exact} == {"greedy"}
    assert {m.name for m in registry if m.combine == "geometric"} == {"pool"}
    assert {*methods.method_names()} == windowed | controls | {"pool", "coverage", AUTO}


def test_the_docstring_of_fuse_lists_the_methods_that_it_takes():
    lines = [line.strip() for line in fmn.fuse.__doc__.splitlines()]
    listed = [f'- "{name}": {text}' for name, text in summaries().items()]
    first = lines.index(listed[0])
    assert lines[first : first + len(listed)] == listed
    assert listed[-1].startswith(f'- "{AUTO}"')
    assert lines[first - 2].endswith('"auto", which needs folds.')
    for name in summaries():
        assert fmn.fuse(np.full((2, 4, 2), 0.5), [0, 1, 0, 1], method=name, folds=2).n_epochs == 2


def test_the_search_that_a_plan_names(rng):
    p = rng.dirichlet(np.ones(3), (4, 30))
    labels = rng.integers(0, 3, 30)
    for method in ("forget", "greedy", "pool", "top"):
        for search in ("grid", "exact"):
            expected = "exact" if method == "greedy" else search
            assert fmn.fuse(p, labels, method=method, search=search, folds=0).search == expected


@pytest.mark.parametrize("n_epochs", [3, 40, 200, 1000])
def test_of_many_equal_epochs_the_earliest_are_taken(n_epochs):
    assert baselines.top_epochs(np.ones((n_epochs, 4), bool), 3) == dict.fromkeys(range(3), 1 / 3)
    p = np.full((n_epochs, n_epochs, 2), [0.9, 0.1])
    p[np.arange(n_epochs), np.arange(n_epochs)] = [0.1, 0.9]  # each is right on one sample
    if n_epochs <= 200:  # of the samples, at least MIN_COVERAGE
        plan = fmn.fuse(p, np.ones(n_epochs, int), method="coverage", max_members=3, folds=0)
        assert plan.weights == pytest.approx(dict.fromkeys(range(3), 1 / 3))


def test_more_than_a_hundred_equal_windows_keep_their_weights():
    """None is light beside the others, though each has less than the least weight."""
    p = np.tile([[0.6, 0.4], [0.3, 0.7]], (120, 1, 1))
    plan = fmn.fuse(p, [0, 1], method="likelihood", window=0, folds=0)
    assert plan.weights == pytest.approx(dict.fromkeys(range(120), 1 / 120), abs=1e-5)


def test_members_of_a_pool():
    """The heaviest first; the prior goes by the samples that count."""
    p, labels = random_probs(np.random.default_rng(4), n_epochs=7, n_samples=80)
    counts = np.arange(80) % 3 > 0
    plan = fmn.fuse(p, labels, method="pool", sample_weight=counts * 1.0, folds=0)
    weights = [w for _, w in plan.members]
    assert weights == sorted(weights, reverse=True)
    assert [e for e, _ in plan.members] != sorted(e for e, _ in plan.members)
    assert min(weights) > 0
    assert plan.members == fmn.fuse(p[:, counts], labels[counts], method="pool", folds=0).members


def test_auto_takes_a_pool_that_changes_no_answer():
    """It makes the final model's probabilities sharper: better likelihood, equal accuracy."""
    labels = np.arange(200) % 3
    p = np.where(labels[:, None] == np.arange(3), 0.5, 0.25)
    p[:4] = [0.3, 0.35, 0.35]  # wrong on a few
    plan = fmn.fuse(np.stack([p, p]), labels, method="auto")
    assert not plan.final_model_alone
    assert plan.gain_interval == (0, 0)
    assert sum(plan.weights.values()) > 1.5
