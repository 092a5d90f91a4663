"""The same numbers for matrices larger than memory, in parts, on an accelerator, in any layout and type."""

import mmap
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from fresh_process import python
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from inputs import BACKENDS, history_of

import fmn_ref as fmn
from fmn_ref import _check
from fmn_ref.kernels.backend import import_kernels
from fmn_ref.metrics import matrix, overview


def everything(correct, groups, weights):
    """Every metric's numbers, as one list of arrays."""
    stats = fmn.sample_statistics(correct, never_learned="deepcore", progress=True)
    return [
        fmn.forgetting_curves(correct, reference=2, progress=True).counts,
        fmn.forgetting_curves(correct, groups=groups).counts,
        fmn.forgetting_curves(correct, sample_weight=weights).counts,
        fmn.forgetting_curves(correct, groups=groups, sample_weight=weights).counts,
        fmn.forgetting_matrix(correct, progress=True),
        *stats.columns().values(),
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(matrix, "_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(matrix, "_LEAST_SAMPLES", 512)


@pytest.fixture
def correct(rng):
    return rng.random((7, 5003)) < 0.6


@pytest.mark.parametrize("form", ["bool", "uint8", "int64", ">i2", "fortran", "rows", "copy on write", "history"])
def test_a_mapped_file_in_blocks_gives_the_same_bits(each_backend, small_blocks, tmp_path, rng, correct, form):
    groups, weights = rng.integers(0, 3, 5003), rng.random(5003)
    expected = everything(correct, groups, weights)
    path = tmp_path / "c.npy"
    if form == "history":
        history_of(correct, tmp_path / "h.fmnh")
        mapped = fmn.CorrectnessHistory.open(tmp_path / "h.fmnh")
    elif form == "rows":
        np.save(path, np.repeat(correct, 2, axis=0)[::-1])
        mapped = np.load(path, mmap_mode="r")[::-2][:7]
    else:
        dtype = form if form in ("uint8", "int64", ">i2") else bool
        np.save(path, correct.astype(dtype, order="F" if form == "fortran" else "C"))
        mapped = np.load(path, mmap_mode="c" if form == "copy on write" else "r")
    if form == "copy on write":
        mapped[0] = ~mapped[0]
        expected = everything(np.array(mapped), groups, weights)
    blocks = [part for part, _ in matrix.Matrix(mapped).blocks()]
    assert len(blocks) > 1 or form == "copy on write"
    for got, want in zip(everything(mapped, groups, weights), expected, strict=True):
        if each_backend == "torch" and got.dtype == np.float64:
            np.testing.assert_allclose(got, want, rtol=1e-12)
        else:
            np.testing.assert_array_equal(got, want)


def ends(correct):
    """Where the blocks end that the matrix is read in; they must follow each other."""
    parts = [(part, rows.shape[1]) for part, rows in matrix.Matrix(correct).blocks()]
    assert [part.start for part, _ in parts] == [0, *(part.stop for part, _ in parts[:-1])]
    return [part.stop for part, _ in parts]


@pytest.mark.parametrize(
    ("shape", "dtype", "first"),
    [
        ((10, 9_000_000), "?", 2**26 // 10 // 512 * 512),
        ((4, 5_000_000), "i4", 2**26 // 16),
        ((10_000, 20_000), "?", 2**14),  # fewer would be short reads
    ],
)
def test_a_mapped_file_is_read_in_blocks_of_64_mb(tmp_path, shape, dtype, first):
    sparse = np.lib.format.open_memmap(tmp_path / "c.npy", "w+", dtype, shape)
    assert ends(sparse) == [first, shape[1]]


@pytest.mark.parametrize(("backend", "bits_first"), [("cpp", 4608), ("numpy", 512)])
def test_what_needs_memory_is_read_in_blocks(small_blocks, tmp_path, use_backend, correct, backend, bits_first):
    """Blocks of 4096 bytes: of a file, and of what must be converted. What the kernels read as it is, is one block."""
    use_backend(backend)
    history_of(correct, tmp_path / "h.fmnh")
    mapped = fmn.CorrectnessHistory.open(tmp_path / "h.fmnh")
    np.save(tmp_path / "c.npy", correct[:, :1024])
    assert ends(correct) == ends(history_of(correct)) == [5003]
    assert ends(mapped)[0] == bits_first
    assert ends(mapped)[-1] == 5003
    assert ends(correct[:2].astype("i2"))[:2] == [1024, 2048]
    assert ends(correct[:2, :1024].astype("i2")) == [1024]
    assert ends(correct[:2, :1025].astype("i2")) == [1024, 1025]
    assert ends(np.load(tmp_path / "c.npy", mmap_mode="r")) == [512, 1024]


def test_the_bits_of_a_history_are_read_directly(each_backend, monkeypatch, rng, correct):
    """Not through an array of bool, which is eight times as large."""
    groups, weights = rng.integers(0, 3, 5003), rng.random(5003)
    expected, history = everything(correct, groups, weights), history_of(correct)
    monkeypatch.setattr(fmn.CorrectnessHistory, "__array__", None)
    monkeypatch.setattr(fmn.CorrectnessHistory, "__getitem__", None)
    for got, want in zip(everything(history, groups, weights), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12 if got.dtype == np.float64 else 0)


@pytest.mark.parametrize("attribute", ["packed", "n_samples"])
def test_an_array_with_an_attribute_of_that_name_is_no_history(attribute):
    class Named(np.ndarray):
        pass

    named = np.eye(3, dtype=bool).view(Named)
    setattr(named, attribute, 2)
    np.testing.assert_array_equal(fmn.forgetting_matrix(named), 1 - np.eye(3))


@pytest.mark.parametrize(
    "function", [fmn.forgetting_curves, fmn.forgetting_matrix, fmn.sample_statistics, overview.curves_and_forgotten]
)
def test_a_bar_is_shown_only_if_asked_for_and_counts_every_sample(small_blocks, tmp_path, monkeypatch, function):
    """With None the bar decides by itself: it is shown on a terminal."""
    np.save(tmp_path / "c.npy", np.zeros((7, 5003), bool))
    mapped, bars, real = np.load(tmp_path / "c.npy", mmap_mode="r"), [], matrix._stderr.progress_bar

    def progress_bar(*arguments, **options):
        bars.append((arguments, options, []))
        bar = real(*arguments, **options)
        monkeypatch.setattr(bar, "update", bars[-1][2].append)
        return bar

    monkeypatch.setattr(matrix._stderr, "progress_bar", progress_bar)
    function(mapped)
    function(mapped, progress=True)
    assert [options["progress"] for _, options, _ in bars] == [False, None]
    for arguments, options, updates in bars:
        assert arguments == (None, "reading", 5003)
        assert (options["unit"], options["unit_scale"]) == (" samples", True)
        assert sum(updates) == 5003
        assert len(updates) > 1


def test_pages_that_hold_data_are_not_dropped(small_blocks, tmp_path, correct):
    """Private and anonymous maps would lose their data."""
    (tmp_path / "a").write_bytes(bytes(correct.size))
    with open(tmp_path / "a", "r+b") as file:
        for private in (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), mmap.mmap(-1, correct.size)):
            a = np.ndarray(correct.shape, bool, buffer=private)
            a[:] = correct
            np.testing.assert_array_equal(fmn.forgetting_curves(a).counts, fmn.forgetting_curves(correct).counts)
            np.testing.assert_array_equal(a, correct)
            del a
            private.close()


def test_a_mapped_file_may_end_with_a_page(small_blocks, tmp_path, rng):
    """The reader requests no page past its end."""
    a = np.memmap(tmp_path / "a", bool, "w+", shape=(4, 4096))
    a[:] = rng.random(a.shape) < 0.6
    np.testing.assert_array_equal(fmn.forgetting_curves(a).counts, fmn.forgetting_curves(np.array(a)).counts)


def test_a_wrong_value_in_a_late_block_is_an_error(small_blocks, tmp_path):
    a = np.zeros((3, 9000), np.int32)
    a[1, 8888] = 2
    np.save(tmp_path / "c.npy", a)
    with pytest.raises(ValueError, match="correct: expected 0 and 1, got values from 0 to 2"):
        fmn.forget_fraction(np.load(tmp_path / "c.npy", mmap_mode="r"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_is_bounded(tmp_path):
    """A (sparse) file of 1.2 GB is streamed in less than 300 MB."""
    path = tmp_path / "c.npy"
    np.lib.format.open_memmap(path, "w+", bool, (300, 4_000_000)).flush()
    code = (
        "import numpy as np, fmn_ref as fmn, re, sys\n"
        "curves = fmn.forgetting_curves(np.load(sys.argv[1], mmap_mode='r'))\n"
        "assert (curves.counts == 0).all() and curves.n_samples == 4_000_000\n"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    assert int(python(code, path)) < 300_000  # KiB


def test_parts_of_several_machines_add_up(each_backend, rng, correct):
    cut = 1234
    parts = correct[:, :cut], correct[:, cut:]
    np.testing.assert_array_equal(
        sum(fmn.forgetting_curves(p) for p in parts).counts, fmn.forgetting_curves(correct).counts
    )
    np.testing.assert_array_equal(sum(fmn.forgetting_matrix(p) for p in parts), fmn.forgetting_matrix(correct))
    each = [fmn.sample_statistics(p) for p in parts]
    joined = fmn.SampleStatistics.concatenate(each).columns()
    assert len(joined) == 6
    for name, whole in fmn.sample_statistics(correct).columns().items():
        np.testing.assert_array_equal(joined[name], whole)
    with pytest.raises(ValueError, match=r"^parts: expected at least one"):
        fmn.SampleStatistics.concatenate([])
    for other in (fmn.sample_statistics(correct[1:]), fmn.sample_statistics(correct, never_learned="toneva")):
        with pytest.raises(ValueError, match=r"^parts: expected one number of epochs and one never_learned"):
            fmn.SampleStatistics.concatenate([each[0], other])


def test_tensors_on_an_accelerator_take_the_torch_path(monkeypatch, rng, correct):
    """Needs no accelerator: CPU tensors are treated as such, and NumPy must not read them."""
    groups, weights = rng.integers(0, 3, 5003), rng.random(5003)
    scores, labels = rng.integers(0, 3, (2, 90, 4)).astype(np.float32), rng.integers(0, 4, 90)
    expected = everything(correct, groups, weights), fmn.correctness(scores, labels)
    monkeypatch.setattr(_check, "on_device", _check.is_tensor)
    monkeypatch.setattr(torch.Tensor, "__array__", None)
    tensors = torch.tensor(correct), torch.tensor(correct).int()
    assert matrix.Matrix(tensors[0]).kernels is import_kernels("torch")
    for tensor in tensors:
        for got, want in zip(everything(tensor, groups, weights), expected[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12 if got.dtype == np.float64 else 0)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        np.testing.assert_array_equal(fmn.correctness(torch.tensor(scores).to(dtype), labels), expected[1])
    for dtype in (torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64):  # torch compares few of these
        predictions = torch.tensor(scores.argmax(-1)).to(dtype)
        np.testing.assert_array_equal(fmn.correctness(predictions, labels), expected[1])
        forget = fmn.forget_fraction(torch.tensor(correct).to(dtype))
        np.testing.assert_array_equal(forget, fmn.forget_fraction(tensors[0]))
    past_int64 = torch.from_numpy(np.array([2**64 - 1, 3], np.uint64))
    np.testing.assert_array_equal(fmn.correctness(past_int64, [1, 3]), [False, True])
    with pytest.raises(ValueError, match="0 and 1"):
        fmn.forget_fraction(tensors[1] * 2)
    with pytest.raises(TypeError, match="float32"):
        fmn.forget_fraction(tensors[0].float())
    with pytest.raises(ValueError, match=r"NaN at index \(0, 1\)"):
        fmn.correctness(torch.tensor([[0.0, np.nan]]), [0])


def test_unsigned_numbers_past_int64(each_backend):
    np.testing.assert_array_equal(fmn.correctness(np.array([2**64 - 1, 3], np.uint64), [1, 3]), [False, True])
    with pytest.raises(ValueError, match="labels"):
        fmn.correctness([0], np.array([2**63], np.uint64))


def test_nan_is_found_in_every_type(each_backend):
    scores = np.zeros((3, 4, 5), np.float32)
    scores[2, 1, 3] = np.nan
    for s in (scores, scores.astype("f2"), scores.astype(">f8"), torch.tensor(scores), torch.tensor(scores).bfloat16()):
        with pytest.raises(ValueError, match=r"NaN at index \(2, 1, 3\)"):
            fmn.correctness(s, [0, 1, 2, 3])


def layouts(rng, a):
    """The same values in every memory layout and byte order."""
    yield a
    yield np.asfortranarray(a)
    yield a.astype(a.dtype.newbyteorder())
    yield np.repeat(a, 3, axis=-1)[..., ::3]
    yield np.ascontiguousarray(a[:, ::-1])[:, ::-1]
    yield (
        np.concatenate([np.zeros(1, np.uint8), np.ascontiguousarray(a).view(np.uint8).ravel()])[1:]
        .view(a.dtype)
        .reshape(a.shape)
    )


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g", "bfloat16", *"bBhHiIlLqQ"])
def test_correctness_of_every_dtype(each_backend, rng, dtype):
    for n, n_classes in ((1, 1), (7, 2), (65, 10), (70, 33), (130, 1000)):
        labels = rng.integers(0, min(n_classes, 120), n)
        if dtype in "bBhHiIlLqQ":
            a = rng.integers(0, min(n_classes, 120), (2, n)).astype(dtype)
            expected = a == labels
        else:
            a = rng.integers(-4, 5, (n, n_classes)).astype("f4" if dtype == "bfloat16" else dtype)  # with ties
            a[rng.random(a.shape) < 0.1] = -0.0
            a[rng.random(a.shape) < 0.02] = np.inf
            expected = a.argmax(-1) == labels
        forms = [torch.tensor(a).bfloat16()] if dtype == "bfloat16" else layouts(rng, a)
        for form in forms:
            np.testing.assert_array_equal(fmn.correctness(form, labels), expected)


@settings(max_examples=60)
@given(data=st.data())
def test_any_view_gives_the_counts_of_the_definition(data, use_backend):
    """Every backend, on any strided view of any small matrix."""
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 140)))
    base = data.draw(arrays(data.draw(st.sampled_from(["?", "i1", "u8", ">i4"])), shape, elements=st.integers(0, 1)))
    steps = st.sampled_from([1, 2, 3, -1, -2])
    view = base[:: data.draw(steps), :: data.draw(steps)]
    c = view != 0
    for backend in BACKENDS:
        use_backend(backend)
        counts = fmn.forgetting_curves(view).counts
        np.testing.assert_array_equal(counts, [c.sum(1), (c & ~c[-1]).sum(1), (~c & c[-1]).sum(1), (c & c[-1]).sum(1)])
        matrix = fmn.forgetting_matrix(view)
        np.testing.assert_array_equal(matrix, [[(a & ~b).sum() for b in c] for a in c])
        np.testing.assert_array_equal(fmn.sample_statistics(view).correctness, c.sum(0))
