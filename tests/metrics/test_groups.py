"""Curves by group: labels of any integer type, and groups of more samples than a 16-bit count holds."""

import numpy as np
import pytest

import fmn_ref as fmn


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64", ">i4"])
@pytest.mark.parametrize("where", ["least", "most", "whole range"])
def test_integer_groups_are_those_of_unique(rng, dtype, where):
    limits = np.iinfo(dtype)
    low = limits.max - 20 if where == "most" else limits.min
    high = limits.min + 20 if where == "least" else limits.max
    groups = rng.integers(low, high, 500, dtype=np.dtype(dtype).newbyteorder("="), endpoint=True).astype(dtype)
    correct = rng.random((3, 500)) < 0.5
    curves = fmn.forgetting_curves(correct, groups=groups)
    names, member = np.unique(groups, return_inverse=True)
    assert curves.groups.dtype == groups.dtype
    np.testing.assert_array_equal(curves.groups, names)
    np.testing.assert_array_equal(curves.n_samples, np.bincount(member))
    for e in range(3):
        np.testing.assert_array_equal(curves.counts[0, :, e], np.bincount(member, correct[e]))


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_group_of_more_than_65535_samples(each_backend, rng, share):
    """One sample more than 16 bits count, always right; the other groups are small."""
    n = 66_000
    groups = np.where(np.arange(n) < share * n, 7, rng.integers(0, 3, n))
    correct = np.ones((33, n), bool)
    correct[-1] = rng.random(n) < 0.5
    curves = fmn.forgetting_curves(correct, groups=groups)
    for row, g in enumerate(np.unique(groups)):
        size, end = (groups == g).sum(), correct[-1, groups == g].sum()
        np.testing.assert_array_equal(curves.counts[0, row], [size] * 32 + [end])
        np.testing.assert_array_equal(curves.counts[1, row], [size - end] * 32 + [0])
        np.testing.assert_array_equal(curves.counts[3, row], [end] * 33)


def test_weights_of_groups_are_added_in_the_order_of_the_samples(each_backend, rng):
    """In double, one after the other: the next power of two swallows what came before in another order."""
    if each_backend == "torch":
        pytest.skip("a device adds in its own order")
    groups, weights = rng.integers(0, 3, 4100), 2.0 ** rng.integers(-40, 40, 4100)
    correct = rng.random((11, 4100)) < 0.6
    curves = fmn.forgetting_curves(correct, groups=groups, sample_weight=weights)
    for g in range(3):
        for e in range(11):
            total = 0.0
            for w in weights[(groups == g) & correct[e]]:
                total += w
            assert curves.counts[0, g, e] == total
