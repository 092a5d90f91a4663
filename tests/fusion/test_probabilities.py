"""Probabilities of every epoch: types, checks, what is read once and what again, the digest of the samples."""

import hashlib
import struct
import threading

import numpy as np
import pytest
import torch

from fmn_ref._check import BFLOAT16
from fmn_ref.fusion import probabilities
from fmn_ref.fusion.probabilities import ProbabilityReader, samples_digest, stored_probabilities
from fmn_ref.runs.arrays import MOST_MAPPED

P = np.array([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], [[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]])  # exact in 16 bits


class Lazy:
    """Epochs that are computed when they are read; remembers the reads."""

    def __init__(self, epochs, views):
        self.kept, self.views, self.read = epochs, views, []

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, epoch):
        self.read.append(epoch)
        return self.kept[epoch][:] if self.views else self.kept[epoch].copy()


class Files(Lazy):
    """Epochs as a folder of files gives them."""

    paths = ("a.npy",)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (P, np.float64),
        (P.astype(np.float32), np.float32),
        (P.astype(np.float16), np.float16),
        (P.astype(">f4"), np.float32),
        (P.astype(">f8"), np.float64),
        (P.astype(np.longdouble), np.float64),
        (torch.from_numpy(P).bfloat16(), BFLOAT16),
        (torch.from_numpy(P).half(), np.float16),
        (np.asfortranarray(P.astype(np.float32)), np.float32),
        (P.tolist(), np.float64),
    ],
    ids=lambda value: str(getattr(value, "dtype", "list")) if not isinstance(value, type) else value.__name__,
)
def test_an_epoch_keeps_its_type_and_is_read_as_float64(given, dtype):
    reader = ProbabilityReader(given)
    for epoch in (0, 1, -1):
        stored = reader.stored(epoch)
        assert stored.dtype == dtype
        assert stored.dtype.isnative
        assert stored.flags.c_contiguous
        assert reader[epoch].dtype == np.float64
        np.testing.assert_array_equal(reader[epoch], P[epoch])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_needs_no_change_is_not_copied(dtype):
    given = P.astype(dtype)
    assert all(np.shares_memory(ProbabilityReader(given).stored(e), given) for e in range(2))
    assert np.shares_memory(stored_probabilities(given[0]), given)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (P[1, :, :2], ValueError, r"shape \(2, 3\) as in the other epochs, got shape \(2, 2\)"),
        (P[1, :1], ValueError, r"shape \(2, 3\) as in the other epochs, got shape \(1, 3\)"),
        (P[1, :0], ValueError, r"shape \(n_samples, n_classes\), not empty, got shape \(0, 3\)"),
        (P[1, 0], ValueError, r"shape \(n_samples, n_classes\), not empty, got shape \(3,\)"),
        (P, ValueError, r"shape \(n_samples, n_classes\), not empty, got shape \(2, 2, 3\)"),
        (P[1].astype(int), TypeError, "floating-point probabilities, got dtype int64"),
        (P[1] > 0, TypeError, "floating-point probabilities, got dtype bool"),
        (P[1].astype(str), TypeError, "booleans or numbers"),
        (P[1] * 1.1, ValueError, "rows that sum to 1, got 1.1 at sample 0"),
        (P[1] - [0.5, 0, -0.5], ValueError, r"finite probabilities >= 0 \(after softmax\), got -0.25 at \(0, 0\)"),
        (np.where(P[1] == 1, np.nan, P[1]), ValueError, r"finite probabilities .*got nan at \(1, 0\)"),
        (np.where(P[1] == 1, np.inf, P[1]).astype(np.float16), ValueError, r"finite .*got inf at \(1, 0\)"),
    ],
)
@pytest.mark.parametrize("name", ["probs", "test_probs"])
def test_the_epoch_at_fault_is_named(bad, error, words, name):
    reader = ProbabilityReader([P[0], bad], name) if name != "probs" else ProbabilityReader([P[0], bad])
    reader.stored(0)
    with pytest.raises(error, match=rf"^{name}\[1\]: expected {words}"):
        reader.stored(1)
    if "other epochs" not in words:
        with pytest.raises(error, match=f"^probs: expected {words}"):
            stored_probabilities(bad)


def test_the_file_at_fault_is_named(tmp_path):
    np.save(tmp_path / "a.npy", P[0] * 2)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    with pytest.raises(ValueError, match=rf"^probs\[0\] \({tmp_path}/a\.npy\): expected rows that sum to 1"):
        ProbabilityReader([mapped]).stored(0)


def test_rows_outside_and_containers_without_rows_are_refused():
    reader = ProbabilityReader(P, "probs")
    for epoch in (2, -3):
        with pytest.raises(ValueError, match=rf"^epoch: expected an epoch in \[-2, 2\), got {epoch}"):
            reader.stored(epoch)
    with pytest.raises(TypeError, match=r"^epoch: expected an integer, got float"):
        reader.stored(1.0)
    endless = type("Endless", (), {"__getitem__": lambda self, e: P[0]})()
    for given in ({1, 2}, endless, {0: P[0]}, 7):  # lengths alone, rows alone, keys, neither
        with pytest.raises(TypeError, match=r"^probs: expected an array or a sequence of arrays, got "):
            ProbabilityReader(given)
    for given, got in ((P[0], r"shape \(2, 3\)"), (P[:0], r"shape \(0, 2, 3\)"), ([], "none")):
        with pytest.raises(ValueError, match=f"^logits: expected shape .*at least one epoch, got {got}$"):
            ProbabilityReader.of(given, "logits")
    assert ProbabilityReader.of(reader, "logits") is reader


def test_what_the_probabilities_know_of_their_run():
    plain = ProbabilityReader(P)
    assert (plain.epochs, plain.file_of, len(plain)) == ((), None, 2)
    source = Lazy(P, views=True)
    source.epochs, source.file_of = (10, 20), str
    found = ProbabilityReader(source)
    assert (found.epochs, found.file_of, len(found)) == ((10, 20), str, 2)
    source.epochs = [10, 20]  # of somebody else's class: not known to be numbers of rows
    assert ProbabilityReader(source).epochs == ()


def test_reading_again_is_cheap_where_epochs_are_in_memory_or_in_files():
    for given in (P, torch.from_numpy(P), list(P), tuple(P), Files(P, views=True)):
        assert ProbabilityReader(given).in_memory
    assert not ProbabilityReader(Lazy(P, views=True)).in_memory


@pytest.mark.parametrize(("n_files", "views", "n_read"), [(64, True, 1), (65, True, 2), (2, False, 2)])
def test_views_of_few_files_are_kept(n_files, views, n_read):
    """Each mapped file holds a descriptor; an array of its own would hold memory."""
    assert MOST_MAPPED == 64
    source = Files([P[e % 2] for e in range(n_files)], views)
    reader = ProbabilityReader(source)
    for _ in range(2):
        np.testing.assert_array_equal(reader.stored(1), P[1])
    assert source.read == [1] * n_read


def test_only_what_is_computed_anew_is_checked_again():
    """A pass over arrays in memory is a large part of the time that a fusion takes."""
    for source, checked_again in ((Files(P.copy(), views=False), False), (Lazy(P.copy(), views=False), True)):
        reader = ProbabilityReader(source)
        reader.stored(0)
        source.kept[:] = 2.0
        if checked_again:
            with pytest.raises(ValueError, match=r"^probs\[0\]: expected rows that sum to 1"):
                reader.stored(0)
        else:
            assert (reader.stored(0) == 2).all()
        with pytest.raises(ValueError, match=r"^probs\[1\]: expected rows that sum to 1"):
            reader.stored(1)
    assert (stored_probabilities(P[0] * 2, checked=True) == P[0] * 2).all()
    with pytest.raises(ValueError, match=r"^probs: expected rows that sum to 1"):
        stored_probabilities(P[0] * 2)


def test_epochs_of_several_types_become_alike():
    same = ProbabilityReader([P[0].astype(np.float32), P[1].astype(np.float32), P[0].astype(np.float32)])
    assert {p.dtype for p in same.alike([0, 1])} == {np.dtype(np.float32)}
    mixed = ProbabilityReader([P[0].astype(np.float16), torch.from_numpy(P[1]).bfloat16(), P[1]])
    found = mixed.alike([0, 1, 2])
    assert {p.dtype for p in found} == {np.dtype(np.float64)}
    for p, expected in zip(found, (P[0], P[1], P[1]), strict=True):
        np.testing.assert_array_equal(p, expected)
    assert mixed.alike([0])[0].dtype == np.float16
    np.testing.assert_array_equal(mixed.mean([0, 1, 2]), (P[0] + P[1] + P[1]) / 3)
    np.testing.assert_array_equal(same.mean([2, 1]), (P[0] + P[1]) / 2)


def test_the_digest_of_the_samples_is_that_of_their_bits():
    """In Python's integers; plan files hold it, so it may not change."""
    factors = struct.unpack("<3Q", hashlib.shake_256(b"classes").digest(24))
    rows = [[struct.unpack("<I", struct.pack("<f", value))[0] for value in row] for row in P.reshape(-1, 3)]
    sums = sorted(sum(f * bits for f, bits in zip(factors, row, strict=True)) % 2**64 for row in rows)
    expected = hashlib.sha256(struct.pack("<4Q", *sums)).hexdigest()
    assert samples_digest(P.reshape(-1, 3)) == samples_digest(P[::-1, ::-1].reshape(-1, 3)) == expected
    assert samples_digest(P[0]) != samples_digest(P[0][:, ::-1])


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_correctness_on_several_threads(monkeypatch, n_threads):
    monkeypatch.setattr(probabilities, "_LARGE", 1)
    monkeypatch.setattr(probabilities, "n_threads_for", lambda size, most: n_threads)
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(4), (7, 30)), rng.integers(0, 4, 30)
    np.testing.assert_array_equal(ProbabilityReader(p).correctness(labels), p.argmax(2) == labels)
    p[[3, 4, 5], [1, 0, 0]] = np.nan  # the first epoch at fault is named, whichever thread reads it
    with pytest.raises(ValueError, match=r"probs\[3\].* at \(1, 0\)"):
        ProbabilityReader(p).correctness(labels)


def test_correctness_of_large_epochs(monkeypatch):
    """Two million values: enough for two threads."""
    monkeypatch.setenv("FMN_NUM_THREADS", "2")
    p, labels = np.full((8, 2**17, 2), 0.5, np.float16), np.arange(2**17) % 2
    p[:, 1::4] = [0.25, 0.75]
    expected = np.arange(2**17) % 2 == np.isin(np.arange(2**17) % 4, 1)
    np.testing.assert_array_equal(ProbabilityReader(p).correctness(labels), np.broadcast_to(expected, (8, 2**17)))


def test_a_sequence_is_read_in_order_by_the_caller(monkeypatch):
    monkeypatch.setenv("FMN_NUM_THREADS", "3")
    large, threads = np.full((2**18, 4), 0.25, np.float16), set()

    class Watched(Lazy):
        def __getitem__(self, epoch):
            threads.add(threading.get_ident())
            return super().__getitem__(epoch)

    given = Watched([large] * 4, views=True)
    ProbabilityReader(given).correctness(np.zeros(2**18, np.int64))
    assert (given.read, threads) == ([0, 1, 2, 3], {threading.get_ident()})
