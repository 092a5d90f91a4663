"""Arrays of awkward kinds, given to all functions that take arrays: the values count, or the argument is named."""

import numpy as np
import pytest
import torch
from torch.masked import masked_tensor

import fmn_ref as fmn
from fmn_ref import _check
from fmn_ref.metrics.scores import scores
from fmn_ref.reporting import plot

RNG = np.random.default_rng(0)
N = 30
LABELS = RNG.integers(0, 3, N)
PROBS = RNG.dirichlet(np.ones(3), (4, N))
CORRECT = fmn.correctness(PROBS, LABELS)
TAKES = {  # name of the argument in messages: (value, calls with it)
    "correct": (
        CORRECT,
        [fmn.forgetting_curves, fmn.forgetting_matrix, fmn.sample_statistics, fmn.expected_gain, plot.matrix],
    ),
    "predictions_or_scores": (PROBS.argmax(-1), [lambda a: fmn.correctness(a, LABELS)]),
    "labels": (
        LABELS,
        [
            lambda a: fmn.correctness(PROBS, a),
            lambda a: fmn.fuse(PROBS, a),
            lambda a: scores(PROBS[0], a),
            lambda a: fmn.symmetric_noise(a, 0.2, 3, 0),
            lambda a: fmn.CorrectnessHistory(N, labels=a),
        ],
    ),
    "groups": (LABELS, [lambda a: fmn.forgetting_curves(CORRECT, groups=a)]),
    "sample_weight": (
        np.ones(N),
        [lambda a: fmn.forget_fraction(CORRECT, sample_weight=a), lambda a: fmn.fuse(PROBS, LABELS, sample_weight=a)],
    ),
    "probs": (PROBS, [lambda a: fmn.fuse(a, LABELS)]),
    "current": (PROBS[0], [lambda a: fmn.best_epsilon(a, PROBS[1], LABELS)]),
    "logits": (np.log(PROBS), [lambda a: fmn.from_logits(a)[0]]),
}
CALLS = [
    pytest.param(name, call, id=f"{name} {i}") for name, (_, calls) in TAKES.items() for i, call in enumerate(calls)
]


def some_masked(a):
    return np.ma.array(a, mask=RNG.random(np.shape(a)) < 0.3)


class Variable:
    """An array that its file or library reads when NumPy asks, as a netCDF variable."""

    def __init__(self, a):
        self.a, self.shape, self.dtype = a, np.shape(a), a.dtype

    def __array__(self, dtype=None, copy=None):
        return self.a

    def __len__(self):
        return len(self.a)

    def __getitem__(self, i):
        return self.a[i]


class Lazy(Variable):
    """An array of dask's kind: `__array__` drops the mask that `compute` gives."""

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.a)

    def __getitem__(self, i):
        return Lazy(self.a[i])

    def __dask_graph__(self):
        return {}

    def compute(self):
        return self.a


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_masked_values_are_refused(name, call):
    """NumPy shows what is under the mask: accuracies of samples whose label is unknown, in silence."""
    value = TAKES[name][0]
    forms = [some_masked(value), [*map(some_masked, value)], torch.tensor(value).to_sparse()]
    if value.ndim == 1:
        forms = [some_masked(value), [np.ma.masked, *value[1:].tolist()]]
    for form in forms:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.*(masked|Sparse)"):
            call(form)
    with pytest.warns(UserWarning, match="prototype"), pytest.raises(TypeError, match=rf"^{name}\b"):
        call(masked_tensor(torch.tensor(value), torch.tensor(RNG.random(value.shape) < 0.5)))


@pytest.mark.parametrize("kind", [Variable, Lazy])
@pytest.mark.parametrize(("name", "call"), CALLS)
def test_masked_values_behind_other_objects_are_refused(name, call, kind):
    masked = some_masked(TAKES[name][0])
    forms = [kind(masked)]
    if masked.ndim > 1:
        forms += [[*map(kind, masked)], tuple(map(kind, masked))]
    for form in forms:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.*masked"):
            call(form)


def test_masked_arrays_of_dask():
    da = pytest.importorskip("dask.array")
    masked = some_masked(CORRECT)
    form = da.ma.masked_array(da.from_array(masked.data, chunks=(2, 10)), mask=masked.mask)
    with pytest.raises(TypeError, match=r"^correct: .*masked"):
        fmn.forgetting_curves(form)
    whole = fmn.forgetting_curves(da.from_array(CORRECT, chunks=(2, 10)))
    np.testing.assert_array_equal(whole.accuracy, CORRECT.mean(1))


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_a_mask_that_hides_nothing_is_no_mask(name, call):
    value = TAKES[name][0]
    for kind in (Variable, Lazy):
        call(kind(np.ma.array(value)))
    for form in (np.ma.array(value), np.ma.array(value, mask=np.zeros(value.shape, bool)), [*map(np.ma.array, value)]):
        call(form if value.ndim > 1 or not isinstance(form, list) else value.tolist())


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_no_form_of_an_argument_crashes(name, call):
    """Whatever comes, a message names the argument."""
    value = TAKES[name][0]
    circle = []
    circle.append(circle)
    structured = np.zeros(value.shape, [("a", "f8"), ("b", "i4")])
    forms = [value.astype(object), value.astype(complex), value.astype("S5"), structured, circle, object(), {0: 1}]
    forms += [torch.zeros(value.shape, device="meta"), torch.zeros(value.shape).to(torch.float8_e4m3fn)]
    forms += [value[..., :0], value[..., None], value.ravel()[0]]
    forms += [value[:0]] if name not in ("predictions_or_scores", "logits") else []  # no epochs: an empty result
    for form in forms:
        if name == "groups" and isinstance(form, np.ndarray) and form.dtype.kind in "OS":
            continue  # labels of any kind name groups
        with pytest.raises((TypeError, ValueError), match=rf"^({name}|scores|predictions)\b"):
            call(form)


INTEGERS = [*"bBhHiIlLqQ", *(f">{c}" for c in "hHiIqQ"), "uint8", "uint16", "uint32", "uint64", "int16", "int64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_type_of_integers(dtype, each_backend):
    """Signed and unsigned, in both byte orders, and as tensors of the same name."""
    forms = [lambda a: a.astype(dtype)] + ([lambda a: torch.from_numpy(a.astype(dtype))] if "int" in dtype else [])
    for form in forms:
        y = form(LABELS)
        np.testing.assert_array_equal(fmn.correctness(PROBS, y), CORRECT)
        np.testing.assert_array_equal(fmn.correctness(form(PROBS.argmax(-1)), y), CORRECT)
        np.testing.assert_array_equal(fmn.forget_fraction(form(CORRECT * 1)), fmn.forget_fraction(CORRECT))
        assert fmn.fuse(PROBS, y) == fmn.fuse(PROBS, LABELS)
        curves, expected = (fmn.forgetting_curves(CORRECT, groups=g) for g in (y, LABELS))
        np.testing.assert_array_equal(curves.counts, expected.counts)
        np.testing.assert_array_equal(curves.groups, expected.groups)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS.astype(float), r"float64; \.astype\(int\) converts"),
        (np.where(LABELS == 1, np.nan, LABELS), "NaN; leave these samples out; np.unique"),
        (LABELS.astype(object), "object; np.unique"),
        (LABELS == 1, "bool; np.unique"),
    ],
)
def test_labels_that_are_no_integers(labels, words):
    with pytest.raises(TypeError, match=f"^labels: expected integers, got .*{words}"):
        fmn.correctness(PROBS, labels)


@pytest.mark.parametrize("n", [2, 5, 60])
def test_float_predictions_are_told_to_be_integers(n):
    """np.loadtxt and columns with gaps give floats, which are scores; the message was about the number of labels."""
    for predictions in (np.zeros((n, 61)), np.zeros((3, n, 61), np.float32), np.zeros(61)):
        with pytest.raises(ValueError, match=r"predicted classes must be integers \(.astype\(int\), without NaN\)"):
            fmn.correctness(predictions, np.zeros(61, int))
    with pytest.raises(ValueError, match="scores must be floating-point"):
        fmn.correctness(np.zeros((3, 61, 4), int), np.zeros(61, int))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.where(np.arange(N) == 7, np.nan, 1), "got nan at sample 7"),
        (np.where(np.arange(N) == 7, -0.5, 1), "got -0.5 at sample 7"),
        (np.where(np.arange(N) == 7, np.inf, 1), "got a sum of inf"),
        (np.full(N, np.longdouble("1e4000")), "got a sum of inf"),
        (np.where(np.arange(N) < 2, [np.inf, -np.inf] * (N // 2), 1), "got -inf at sample 1"),
        (np.zeros(N), "got a sum of 0.0"),
        (np.ones((N, 1)), "got shape"),
    ],
)
def test_weights_that_cannot_be_used(weights, words, each_backend):
    for call in TAKES["sample_weight"][1]:
        with pytest.raises(ValueError, match=f"^sample_weight: .*{words}"):
            call(weights)


def test_a_mapped_array_names_its_file(tmp_path):
    np.save(tmp_path / "a.npy", PROBS)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert _check.of_file(mapped[2]) == f" ({tmp_path / 'a.npy'})"
    assert _check.of_file(np.array(mapped)) == _check.of_file(PROBS.tolist()) == ""


@pytest.mark.parametrize("dtype", ["i1", "u1", ">i2", "u8", "f2", "f4", "f8", "g"])
def test_numbers_of_numpy_are_compared_as_they_are(dtype):
    """A bound of 1e300 is infinite in 32 bits, and 2**31 has no place in 8."""
    one = np.ones(1, dtype)[0]
    assert fmn.FusionPlan.from_weights({0: one, 2: one}, 4).weights == {0: 0.5, 2: 0.5}
    if np.dtype(dtype).kind == "f":
        with pytest.raises(TypeError, match=r"^window: expected an integer"):
            fmn.fuse(PROBS, LABELS, window=one)
        with pytest.raises(ValueError, match=r"^weights: expected a value in"):
            fmn.FusionPlan.from_weights({0: one * np.nan}, 4)
    else:
        assert fmn.fuse(PROBS, LABELS, window=one) == fmn.fuse(PROBS, LABELS)
