"""The metrics on every backend, against the golden counts of other projects' code, the identities, and plain NumPy."""

import itertools
import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from inputs import BACKENDS, awkward, history_of

import fmn_ref as fmn
from fmn_ref.kernels import reference as oracle

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "forgetting_golden.json").read_text())
MATRIX = np.array(GOLDEN["matrix_epochs_x_samples"])


def numbers(values, never=np.nan):
    return np.array([never if v is None else v for v in values], float)


def test_golden_curves(each_backend):
    curves = fmn.forgetting_curves(MATRIX)
    assert fmn.backend().name == each_backend
    np.testing.assert_array_equal(curves.counts[1], GOLDEN["fmn_forget_count_e"])
    np.testing.assert_array_equal(curves.counts[2], GOLDEN["learned_late_count_e"])
    np.testing.assert_array_equal(curves.accuracy, GOLDEN["accuracy_e"])
    np.testing.assert_array_equal(fmn.forget_fraction(MATRIX), GOLDEN["fmn_forget_fraction_F_e"])
    np.testing.assert_array_equal(fmn.forgetting_matrix(MATRIX)[:, -1], GOLDEN["fmn_forget_count_e"])
    np.testing.assert_array_equal(fmn.forgetting_matrix(MATRIX)[-1], GOLDEN["learned_late_count_e"])


@pytest.mark.parametrize(
    ("convention", "events"),
    [
        ("toneva", numbers(GOLDEN["mtoneva_forgetting_counts"])),
        ("cartography", numbers(GOLDEN["cartography_forgetfulness"])),
        ("datadiet", numbers(GOLDEN["data_diet_forget_scores"], float(GOLDEN["data_diet_never_correct_value"]))),
        ("deepcore", numbers(GOLDEN["deepcore_forgetting_events"])),
        ("nan", numbers(GOLDEN["data_diet_forget_scores"])),
    ],
)
def test_golden_samples(each_backend, convention, events):
    s = fmn.sample_statistics(MATRIX, never_learned=convention)
    np.testing.assert_array_equal(s.forgetting_events, events)
    np.testing.assert_array_equal(s.first_learned, numbers(GOLDEN["mtoneva_first_learned"]))
    np.testing.assert_array_equal(s.correctness, GOLDEN["cartography_correctness"])
    np.testing.assert_array_equal(s.presentations_needed, GOLDEN["mtoneva_presentations_needed_to_learn"])
    assert s.forgotten.sum() == GOLDEN["ever_correct_wrong_at_end"]


@pytest.mark.parametrize("correct", awkward(np.random.default_rng(7)))
def test_backends_are_bit_identical(correct, use_backend, rng):
    """Values of every metric, on every layout, equal those of the oracle on a plain copy."""
    plain = np.ascontiguousarray(np.asarray(correct).astype(bool))
    n_epochs, n_samples = plain.shape
    reference = n_epochs // 2
    groups, weights = rng.integers(0, 4, n_samples), rng.random(n_samples)
    names, member = np.unique(groups, return_inverse=True)
    expected = [
        added(oracle.curve_counts, (4, n_epochs), plain, n_samples, reference),
        added(oracle.group_sums, (4, len(names), n_epochs), plain, n_samples, reference, member, len(names), None),
        added(oracle.group_sums, (4, len(names), n_epochs), plain, n_samples, reference, member, len(names), weights),
        oracle.sample_counts(plain, n_samples),
        np.array([[(a & ~b).sum() for b in plain] for a in plain]),
    ]
    history = history_of(plain)
    for backend, form in itertools.product(BACKENDS, (correct, history)):
        use_backend(backend)
        stats = fmn.sample_statistics(form)
        got = [
            fmn.forgetting_curves(form, reference=reference).counts,
            fmn.forgetting_curves(form, reference=reference, groups=groups).counts,
            fmn.forgetting_curves(form, reference=reference, groups=groups, sample_weight=weights).counts,
            np.stack(
                [
                    np.nan_to_num(stats.first_learned, nan=-1),
                    np.nan_to_num(stats.last_correct, nan=-1),
                    np.nan_to_num(stats.forgetting_events, nan=0),
                    stats.correctness,
                    stats.presentations_needed - 1,
                ]
            ),
            fmn.forgetting_matrix(form),
        ]
        for g, e in zip(got, expected, strict=True):
            if g.dtype == np.float64 and backend == "torch":
                np.testing.assert_allclose(g, e, rtol=1e-12, err_msg=backend)  # weights in the device's own order
            else:
                np.testing.assert_array_equal(g, e, err_msg=backend, strict=False)


def added(kernel, shape, *args):
    """Output of a counting kernel that starts from zeros: float64 for sums of weights, else int64."""
    out = np.zeros(shape, np.float64 if kernel is oracle.group_sums and args[-1] is not None else np.int64)
    kernel(*args, out)
    return out


matrices = st.tuples(st.integers(1, 9), st.integers(1, 70)).flatmap(lambda shape: arrays(bool, shape))


@given(correct=matrices, data=st.data())
def test_identities(each_backend, correct, data):
    reference = data.draw(st.integers(-len(correct), len(correct) - 1))
    c = fmn.forgetting_curves(correct, reference=reference)
    right, forgotten, learned, retained = c.counts
    np.testing.assert_array_equal(right[reference], right + learned - forgotten)  # acc(E) = acc(e) + L_e - F_e
    np.testing.assert_array_equal(right, retained + forgotten)
    assert forgotten[reference] == learned[reference] == 0
    matrix = fmn.forgetting_matrix(correct)
    np.testing.assert_array_equal(matrix[:, reference], forgotten)
    np.testing.assert_array_equal(matrix[reference], learned)
    s = fmn.sample_statistics(correct)
    assert s.correctness.sum() == right.sum()
    np.testing.assert_array_equal(s.forgotten, ~np.isnan(s.last_correct) & (s.last_correct < len(correct) - 1))


@given(correct=matrices, data=st.data())
def test_curves_of_disjoint_samples_add(each_backend, correct, data):
    n = correct.shape[1]
    groups = np.array(data.draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n)))
    cut = data.draw(st.integers(0, n))
    whole = fmn.forgetting_curves(correct, groups=groups)
    if 0 < cut < n:
        parts = [fmn.forgetting_curves(correct[:, s], groups=groups[s]) for s in (slice(cut), slice(cut, None))]
        added = sum(parts)
        np.testing.assert_array_equal(added.counts, whole.counts)
        np.testing.assert_array_equal(added.groups, whole.groups)
        np.testing.assert_array_equal(added.forget, whole.forget)
    for name, row in zip(whole.groups, whole.forget, strict=True):
        np.testing.assert_array_equal(row, fmn.forget_fraction(correct[:, groups == name]))


@pytest.mark.parametrize("groups", [None, np.arange(60) % 3, np.arange(60) // 25])
@pytest.mark.parametrize("weighted", [(), (0,), (1,), (0, 1)])
def test_added_curves_are_those_of_all_samples(rng, groups, weighted):
    """In every field; curves with and without weights add too, and groups may be in one part only."""
    correct, weights, parts = rng.random((4, 60)) < 0.5, np.ones(60), []
    for i, samples in enumerate((slice(40), slice(40, None))):
        of_part = {} if groups is None else {"groups": groups[samples]}
        if i in weighted:
            weights[samples] = of_part["sample_weight"] = rng.integers(0, 9, 60)[samples]
        parts.append(fmn.forgetting_curves(correct[:, samples], reference=1, **of_part))
    whole = fmn.forgetting_curves(correct, reference=1, groups=groups, sample_weight=weights if weighted else None)
    for added in (parts[0] + parts[1], parts[1] + parts[0], sum(parts)):
        for field in ("counts", "n_samples", "total", "reference", "accuracy", "learned", "retained"):
            np.testing.assert_array_equal(getattr(added, field), getattr(whole, field), err_msg=field)
        assert added.counts.dtype == whole.counts.dtype
        assert (added.groups is None) if groups is None else added.groups.tolist() == whole.groups.tolist()


class Column:
    """Shows its values as pandas shows a column: through `__array__`, as objects."""

    def __init__(self, values):
        self.dtype, self.values = "category", values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, object)


@pytest.mark.parametrize("column", [Column, lambda v: np.array(v, object), list, np.array, tuple])
@pytest.mark.parametrize("values", ["cab", [7, 300, 2], [np.int16(7), 300, True], [b"x", b"y", b"z"]], ids=str)
def test_groups_of_objects(each_backend, column, values):
    """Columns of strings or integers, categorical ones too, give the groups of their values."""
    correct = np.random.default_rng(1).random((4, 30)) < 0.5
    of_sample = np.arange(30) % 3
    curves = fmn.forgetting_curves(correct, groups=column([values[i] for i in of_sample]))
    order = sorted(range(3), key=lambda i: values[i])
    assert curves.groups.tolist() == [values[i] for i in order]
    assert curves.groups.dtype != object
    for row, i in zip(curves.forget, order, strict=True):
        np.testing.assert_array_equal(row, fmn.forget_fraction(correct[:, of_sample == i]))


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="needs NumPy 2")
def test_groups_of_strings_of_any_length():
    given = np.array(["b", "a" * 50, "b"], np.dtypes.StringDType())
    assert fmn.forgetting_curves(GOOD, groups=given).groups.tolist() == ["a" * 50, "b"]
    gaps = np.array(["b", np.nan, "b"], np.dtypes.StringDType(na_object=np.nan))
    with pytest.raises(ValueError, match=r"groups: expected .*nan at sample 1"):
        fmn.forgetting_curves(GOOD, groups=gaps)


@pytest.mark.parametrize("gap", [None, np.nan, 1, 0.5, b"a"], ids=repr)
@pytest.mark.parametrize("column", [Column, lambda v: np.array([*v, 0], object)[:-1], list])
def test_groups_with_gaps_are_refused(column, gap):
    """NumPy would make the groups "None", "nan" and "1" of them."""
    with pytest.raises(ValueError, match=r"groups: expected .* at sample 2|groups: expected 3 "):
        fmn.forgetting_curves(GOOD, groups=column(["a", "b", gap]))


def test_curves_of_groups_of_several_types_do_not_add(each_backend):
    """NumPy would turn numbers into strings, and large integers into floats."""
    names, numbers, large = (
        fmn.forgetting_curves(GOOD, groups=g)
        for g in (["0", "1", "2"], [0, 1, 2], np.array([0, 2**63, 2**63 + 1], np.uint64))
    )
    in_bytes = fmn.forgetting_curves(GOOD, groups=[b"0", b"1", b"2"])
    for a, b in itertools.permutations((names, numbers, large, in_bytes), 2):
        with pytest.raises(ValueError, match=r"^ForgettingCurves: .*groups of one type"):
            a + b
    small = fmn.forgetting_curves(GOOD, groups=np.array([0, 1, 200], np.uint8))
    assert (small + numbers).groups.tolist() == [0, 1, 2, 200]


def test_weights(each_backend, rng):
    correct = rng.random((6, 50)) < 0.5
    doubled = np.repeat(correct, 2, axis=1)
    curves = fmn.forgetting_curves(correct, sample_weight=np.full(50, 2))
    np.testing.assert_array_equal(curves.counts, fmn.forgetting_curves(doubled).counts)
    one = np.zeros(50)
    one[3] = 5
    weighted = fmn.forget_fraction(correct, sample_weight=one)
    np.testing.assert_array_equal(weighted, fmn.forget_fraction(correct[:, [3]]))
    learned = fmn.learned_fraction(correct, sample_weight=one)
    np.testing.assert_array_equal(learned, fmn.learned_fraction(correct[:, [3]]))


def test_many_samples_use_threads(each_backend, rng):
    """Counts are exact above the size at which the compiled kernels start threads."""
    correct = rng.random((30, 400_000)) < 0.5
    expected = added(oracle.curve_counts, (4, 30), correct, 400_000, 29)
    np.testing.assert_array_equal(fmn.forgetting_curves(correct).counts, expected)
    overlap = added(oracle.overlap_counts, (30, 30), correct, 400_000)
    np.testing.assert_array_equal(fmn.forgetting_matrix(correct), correct.sum(1)[:, None] - overlap)
    np.testing.assert_array_equal(fmn.sample_statistics(correct).correctness, correct.sum(0))


def test_inputs_are_not_modified(each_backend, rng):
    correct = (rng.random((5, 40)) < 0.5).astype(np.int16)
    before = correct.copy()
    fmn.forgetting_curves(correct, groups=np.arange(40) % 3)
    fmn.sample_statistics(correct)
    np.testing.assert_array_equal(correct, before)


class TestCorrectness:
    def test_predictions_and_scores_agree(self, rng):
        scores = rng.normal(size=(4, 30, 6))
        labels = rng.integers(0, 6, 30)
        expected = scores.argmax(-1) == labels
        for s in (scores, scores.astype(np.float32), scores.astype(np.float16).astype(float), torch.tensor(scores)):
            np.testing.assert_array_equal(fmn.correctness(s, labels), np.asarray(s).argmax(-1) == labels)
        np.testing.assert_array_equal(fmn.correctness(scores.argmax(-1), labels), expected)

    def test_bfloat16_and_gradients(self):
        scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]], dtype=torch.bfloat16, requires_grad=True)
        np.testing.assert_array_equal(fmn.correctness(scores, torch.tensor([1, 1])), [True, False])

    def test_ties_take_the_first_class(self):
        np.testing.assert_array_equal(fmn.correctness([[0.5, 0.5], [0.5, 0.5]], [0, 1]), [True, False])

    def test_dlpack(self):
        class OnlyDlpack:
            def __init__(self, a):
                self.a = a

            def __dlpack__(self, **keywords):
                return self.a.__dlpack__(**keywords)

            def __dlpack_device__(self):
                return self.a.__dlpack_device__()

        np.testing.assert_array_equal(fmn.correctness(OnlyDlpack(np.array([1, 2])), [1, 1]), [True, False])

    def test_log_probabilities_may_be_minus_infinity(self):
        np.testing.assert_array_equal(fmn.correctness([[-np.inf, 0.0]], [1]), [True])


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ([True, False], ValueError, "n_epochs, n_samples"),
        (np.zeros((2, 3, 4), bool), ValueError, "n_epochs, n_samples"),
        (np.zeros((0, 3), bool), ValueError, "at least one epoch"),
        (np.zeros((3, 0), bool), ValueError, "at least one epoch"),
        (np.zeros((2, 3)), TypeError, "float64"),
        (np.full((2, 3), np.nan), TypeError, "float64"),
        (np.array([["a", "b"]]), TypeError, "dtype"),
        (np.array([[None, 1]], object), TypeError, "dtype"),
        ([[True], [True, False]], TypeError, "array"),
        (np.array([[0, 2]]), ValueError, "0 and 1"),
        (np.array([[0, -1]]), ValueError, "0 and 1"),
        ("abc", TypeError, "dtype"),
        (None, TypeError, "dtype"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        fmn.forget_fraction,
        fmn.learned_fraction,
        fmn.forgetting_curves,
        fmn.forgetting_matrix,
        fmn.sample_statistics,
    ],
)
def test_bad_correctness(function, bad, error, words):
    with pytest.raises(error, match=f"correct.*{words}"):
        function(bad)


GOOD = np.eye(3, dtype=bool)
CURVES = fmn.forgetting_curves(GOOD)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fmn.forget_fraction(GOOD, reference=3), ValueError, "reference"),
        (lambda: fmn.forget_fraction(GOOD, reference=-4), ValueError, "reference"),
        (lambda: fmn.forget_fraction(GOOD, reference=0.5), TypeError, "reference"),
        (lambda: fmn.forget_fraction(GOOD, sample_weight=[1, 2]), ValueError, "sample_weight"),
        (lambda: fmn.forget_fraction(GOOD, sample_weight=[1, -2, 1]), ValueError, "sample_weight"),
        (lambda: fmn.forget_fraction(GOOD, sample_weight=[1, np.nan, 1]), ValueError, "sample_weight"),
        (lambda: fmn.forget_fraction(GOOD, sample_weight=[0, 0, 0]), ValueError, "sample_weight"),
        (lambda: fmn.forget_fraction(GOOD, sample_weight=[1e308] * 3), ValueError, "sample_weight"),
        (lambda: fmn.forget_fraction(GOOD, sample_weight=["a", "b", "c"]), TypeError, "sample_weight"),
        (lambda: fmn.forgetting_curves(GOOD, groups=[0, 1]), ValueError, "groups"),
        (lambda: fmn.forgetting_curves(GOOD, groups=[[0], [1, 2], [3]]), TypeError, "groups"),
        (lambda: fmn.forgetting_curves(GOOD, groups=np.zeros(3, "M8[s]")), TypeError, "groups"),
        (lambda: fmn.forgetting_curves(GOOD, groups=[0.5, 1, 2]), ValueError, "groups"),
        (lambda: fmn.forgetting_curves(GOOD, groups=[None, "a", "b"]), ValueError, "groups: .*None at sample 0"),
        (lambda: fmn.sample_statistics(GOOD, never_learned="zero"), ValueError, "never_learned"),
        (lambda: fmn.correctness([0, 1], [0, 1, 2]), ValueError, "predictions"),
        (lambda: fmn.correctness([0.1, 0.9], [0, 1]), ValueError, "scores"),
        (lambda: fmn.correctness([[0.1, 0.9]], [2]), ValueError, "labels"),
        (lambda: fmn.correctness([[0.1, 0.9]], [-1]), ValueError, "labels"),
        (lambda: fmn.correctness([[0.1, 0.9]], [0.0]), TypeError, "labels"),
        (lambda: fmn.correctness([[0.1, 0.9]], ["a"]), TypeError, "labels"),
        (lambda: fmn.correctness([[0.1, 0.9]], [[0]]), ValueError, "labels"),
        (lambda: fmn.correctness([[0.1, 0.9]], [0, 1]), ValueError, "scores: .* with 2 samples"),
        (lambda: fmn.correctness([[0.1, np.nan]], [0]), ValueError, r"scores: .*NaN at index \(0, 1\)"),
        (lambda: fmn.correctness(np.zeros((1, 0)), [0]), ValueError, "scores"),
        (lambda: fmn.correctness([], []), ValueError, "scores"),
        (lambda: fmn.correctness(np.zeros((2, 3, 0)), [0] * 3), ValueError, "scores"),
        (lambda: fmn.correctness(np.zeros((1, 4, 2)), [0, 0, 0, 2]), ValueError, r"labels: .*\[0, 2\)"),
        (lambda: fmn.correctness([True, False], [0, 1]), TypeError, "predictions_or_scores: .*bool"),
        (lambda: fmn.correctness(["cat"], [0]), TypeError, "predictions_or_scores"),
        (lambda: CURVES + fmn.forgetting_curves(GOOD[:2], reference=1), ValueError, "ForgettingCurves: .*epochs"),
        (lambda: CURVES + fmn.forgetting_curves(GOOD, reference=1), ValueError, "ForgettingCurves: .*reference"),
        (lambda: CURVES + fmn.forgetting_curves(GOOD, groups=[0, 1, 2]), ValueError, "ForgettingCurves: .*groups"),
        (lambda: fmn.forgetting_curves(GOOD, groups=[0, 1, 2]) + CURVES, ValueError, "ForgettingCurves: .*groups"),
        (lambda: CURVES + 1, TypeError, "unsupported"),
        (lambda: 1 + CURVES, TypeError, "unsupported"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=f"^{words}"):
        call()


def test_curves_name_their_size_and_their_peak():
    correct = [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]
    expected = "ForgettingCurves(3 epochs, 4 samples{}, peak forget fraction {})"
    assert repr(fmn.forgetting_curves(correct)) == expected.format("", "0.5000")
    assert repr(fmn.forgetting_curves(correct, groups=[0, 0, 0, 1])) == expected.format(", 2 groups", "0.6667")


def test_any_epoch_may_be_the_reference(each_backend, rng):
    correct = rng.random((5, 40)) < 0.5
    for reference in (0, 2, -1):
        end = correct[reference]
        forget, learned = (f(correct, reference=reference) for f in (fmn.forget_fraction, fmn.learned_fraction))
        np.testing.assert_array_equal(forget, (correct & ~end).mean(1))
        np.testing.assert_array_equal(learned, (~correct & end).mean(1))


def test_statistics_of_given_counts_have_the_default_convention():
    counts = np.array([[0, -1], [1, -1], [3, 0], [4, 0], [2, 5]], np.int32)
    np.testing.assert_array_equal(fmn.SampleStatistics(counts, 6).forgetting_events, [3, np.nan])


def test_a_group_without_weight_has_no_fractions(each_backend):
    curves = fmn.forgetting_curves(GOOD, groups=[5, 5, 7], sample_weight=[1, 1, 0])
    np.testing.assert_array_equal(curves.accuracy, [[0.5, 0.5, 0], [np.nan] * 3])


def test_results_have_the_documented_types(each_backend):
    """Counts are whole numbers and correctness is bool, also where a float or an int would be equal."""
    for scores_or_classes in ([[0.9, 0.1], [0.2, 0.8]], [0, 1]):
        assert fmn.correctness(scores_or_classes, [0, 1]).dtype == bool
    plain, grouped = fmn.forgetting_curves(GOOD), fmn.forgetting_curves(GOOD, groups=[0, 1, 1])
    weighted = fmn.forgetting_curves(GOOD, sample_weight=[1, 1, 2])
    assert (plain.counts.dtype, grouped.counts.dtype, weighted.counts.dtype) == (np.int64, np.int64, np.float64)
    assert (plain + plain).counts.dtype == (grouped + grouped).counts.dtype == np.int64
    assert fmn.forgetting_matrix(GOOD).dtype == np.int64
    types = [column.dtype for column in fmn.sample_statistics(GOOD).columns().values()]
    assert types == [np.float64, np.float64, np.float64, np.int64, np.int64, bool]


def test_one_epoch_one_sample(each_backend):
    np.testing.assert_array_equal(fmn.forget_fraction([[True]]), [0.0])
    np.testing.assert_array_equal(fmn.forgetting_matrix([[1]]), [[0]])
    assert fmn.sample_statistics([[False]]).presentations_needed == [1]
