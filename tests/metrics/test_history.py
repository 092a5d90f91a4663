"""The history: rows come back as they were appended; a torn last record is dropped, other damage is an error."""

import contextlib
import hashlib
import itertools
import os
import struct
import tracemalloc
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from folders import flip_bit, full_disk
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from inputs import history_of

import fmn_ref as fmn
from fmn_ref.metrics.history import CorrectnessHistory

CORRECT = np.random.default_rng(3).random((5, 77)) < 0.5
RECORD = 64 + 64  # up to 512 bits fit one padded row


def filled(path, correct=CORRECT):
    return history_of(correct, path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.fmnh"


@settings(max_examples=40)
@given(correct=st.tuples(st.integers(1, 20), st.integers(1, 1100)).flatmap(lambda s: arrays(bool, s)))
def test_round_trip(tmp_path, correct):
    path = tmp_path / f"{np.random.default_rng().integers(2**60)}.fmnh"
    on_disk, in_memory = filled(path, correct), filled(None, correct)
    again = CorrectnessHistory.open(path)
    for h in (on_disk, in_memory, again):
        np.testing.assert_array_equal(h.correct(), correct)
        np.testing.assert_array_equal(np.asarray(h), correct)
        np.testing.assert_array_equal(h.packed, np.packbits(correct, axis=1, bitorder="little"))
        assert h.epochs == tuple(range(len(correct)))
        assert len(h) == len(correct)
    np.testing.assert_array_equal(fmn.forget_fraction(again), fmn.forget_fraction(correct))


def test_layout_is_the_documented_one(path):
    filled(path)
    raw = path.read_bytes()
    assert len(raw) == 64 + 5 * RECORD
    magic, version, zero, n_samples = struct.unpack_from("<8sIIQ", raw)
    assert (magic, version, zero, n_samples) == (b"FMNHIST\0", 1, 0, 77)
    assert struct.unpack_from("<4sIq", raw, 64 + RECORD)[::2] == (b"EPOC", 1)
    row = np.frombuffer(raw, np.uint8, 10, 64 + RECORD + 64)
    np.testing.assert_array_equal(np.unpackbits(row, bitorder="little")[:77], CORRECT[1])


def test_appending_continues_a_file(path):
    filled(path)
    h = CorrectnessHistory.open(path)
    h.append(CORRECT[0], epoch=9)
    assert CorrectnessHistory.open(path).epochs == (0, 1, 2, 3, 4, 9)


def test_packed_is_memory_mapped_and_read_only(path):
    packed = filled(path).packed
    with pytest.raises(ValueError, match="read-only"):
        packed[0, 0] = 1
    assert isinstance(packed.base, np.memmap)


@pytest.mark.parametrize("kept", [1, 15, 64, RECORD - 1])
def test_torn_tail_is_dropped_with_a_warning_and_overwritten(path, kept):
    filled(path)
    whole = path.read_bytes()
    torn = whole[: len(whole) - RECORD + kept]
    path.write_bytes(torn)
    with pytest.warns(UserWarning, match=f"offset {64 + 4 * RECORD}.*4 epochs kept"):
        h = CorrectnessHistory.open(path)
    np.testing.assert_array_equal(h.correct(), CORRECT[:4])
    assert path.read_bytes() == torn  # opening changes nothing
    h.append(CORRECT[4])
    assert path.read_bytes() == whole


def test_last_record_of_zeros_is_a_torn_one(path):
    """Some file systems leave zeros in a block that was allocated but not yet written."""
    filled(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-RECORD] + bytes(RECORD))
    with pytest.warns(UserWarning, match="torn last record"):
        assert len(CorrectnessHistory.open(path)) == 4


@pytest.mark.parametrize("n_samples", [1, 77, 511, 512])
def test_every_bit_of_a_record_is_checked(path, n_samples):
    """Zeros and padding included: corruption is an error that names the offset, or a torn last record."""
    filled(path, np.random.default_rng(3).random((3, n_samples)) < 0.5)
    assert path.stat().st_size == 64 + 3 * RECORD
    for at, bit in itertools.product(range(RECORD), range(8)):
        second, last = 64 + RECORD, 64 + 2 * RECORD
        with flipped(path, second + at, bit), pytest.raises(ValueError, match=rf"history\.fmnh.*offset {second}"):
            CorrectnessHistory.open(path)
        with flipped(path, last + at, bit), pytest.warns(UserWarning, match=rf"torn last record at offset {last}"):
            assert len(CorrectnessHistory.open(path)) == 2
    assert len(CorrectnessHistory.open(path)) == 3


@pytest.mark.parametrize("verify", [True, False])
def test_every_bit_of_the_header_is_checked(path, verify):
    filled(path)
    for at, bit in itertools.product(range(64), range(8)):
        with flipped(path, at, bit), pytest.raises(ValueError, match=r"history\.fmnh"):
            CorrectnessHistory.open(path, verify=verify)


@contextlib.contextmanager
def flipped(path, at, bit):
    flip_bit(path, at, 1 << bit)
    yield
    flip_bit(path, at, 1 << bit)


def test_without_verifying_only_headers_are_read(path):
    filled(path)
    flip_bit(path, 64 + 2 * RECORD + 64)
    assert len(CorrectnessHistory.open(path, verify=False)) == 5


@pytest.mark.parametrize(
    "content",
    [b"", b"FMN", b"\x80\x04K\x01.", bytes(64), b"FMNHIST\0" + bytes(56)],
    ids=["empty", "short", "pickle", "zeros", "bad CRC"],
)
def test_not_a_history(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: (not a history file|corrupt header) .*offset 0\)$"):
        CorrectnessHistory.open(path)


def record(epoch, row, magic=b"EPOC", past=b""):
    """A record as docs/reference/formats.md describes it."""
    crc = zlib.crc32(row, zlib.crc32(struct.pack("<q", epoch)))
    return (struct.pack("<4sIq", magic, crc, epoch) + past).ljust(64, b"\0") + row


ROW, OTHER_ROW = bytes(9) + b"\x1f" + bytes(54), bytes(9) + b"\x20" + bytes(54)  # 77 samples end with bit 5 of byte 9


@pytest.mark.parametrize(
    ("damaged", "fault", "checked"),
    [
        (record(1, ROW, magic=b"EPIC"), "bad magic", "always"),
        (record(1, ROW, past=b"\1"), "zeros expected after the epoch", "always"),
        (record(1, ROW, past=bytes(47) + b"\1"), "zeros expected after the epoch", "always"),
        (record(0, ROW), "epoch 0 after 0", "always"),
        (record(-1, ROW), "epoch -1 after 0", "always"),
        (record(1, OTHER_ROW)[:64] + ROW, "CRC-32 does not match", "rows"),
        (record(2, ROW)[:8] + record(1, ROW)[8:], "CRC-32 does not match", "rows"),
        (record(1, OTHER_ROW), "bits set past the last sample", "rows"),
    ],
)
def test_a_damaged_record_is_refused_with_its_place(path, damaged, fault, checked):
    """Amid others it is an error, as the last one it was torn. Only headers are checked if rows are not."""
    header = struct.pack("<8sIIQ32s", b"FMNHIST\0", 1, 0, 77, bytes(32))
    header = (header + struct.pack("<I", zlib.crc32(header))).ljust(64, b"\0")
    for verify in (True, False):
        path.write_bytes(header + record(0, ROW) + damaged + record(2, ROW))
        if verify or checked == "always":
            with pytest.raises(ValueError, match=rf"^{path}: corrupt record at offset {64 + RECORD}: {fault}$"):
                CorrectnessHistory.open(path, verify=verify)
        else:
            assert CorrectnessHistory.open(path, verify=False).epochs == (0, 1, 2)
        path.write_bytes(header + record(0, ROW) + damaged)
        if verify or checked == "always":
            with pytest.warns(UserWarning, match=rf"last record at offset {64 + RECORD} \({fault}\); 1 epochs kept$"):
                assert CorrectnessHistory.open(path, verify=verify).epochs == (0,)
        else:
            assert CorrectnessHistory.open(path, verify=False).epochs == (0, 1)
    path.write_bytes(header + record(5, ROW) + record(7, ROW))
    assert CorrectnessHistory.open(path).epochs == (5, 7)
    assert CorrectnessHistory.open(path).correct().sum(1).tolist() == [5, 5]


def test_epochs_that_another_process_discarded_are_noticed(path):
    filled(path)
    opened, writer = CorrectnessHistory.open(path), CorrectnessHistory.open(path)
    writer.truncate(1)
    for row in CORRECT[1:]:
        writer.append(~row)
    with pytest.raises(ValueError, match=rf"^{path}: another process discarded epochs"):
        opened.correct()
    np.testing.assert_array_equal(CorrectnessHistory.open(path).correct()[1:], ~CORRECT[1:])


def write_with_checksum(path, raw):
    """Write a history whose header was changed, with the header's new checksum."""
    raw[56:60] = struct.pack("<I", zlib.crc32(bytes(raw[:56])))
    path.write_bytes(raw)


def test_a_newer_version_is_refused(path):
    filled(path)
    raw = bytearray(path.read_bytes())
    raw[8] = 2
    write_with_checksum(path, raw)
    with pytest.raises(ValueError, match=rf"^{path}: history version 2 "):
        CorrectnessHistory.open(path)


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, b"FMNHISTO", "not a history file"),
        (60, b"\1", "corrupt header"),  # zeros must follow the checksum
        (63, b"\1", "corrupt header"),
        (16, struct.pack("<Q", 0), "corrupt header"),
        (16, struct.pack("<Q", 2**48 + 1), "corrupt header"),
        (8, struct.pack("<I", 0), "history version 0"),
    ],
)
def test_a_header_with_a_right_checksum_is_checked_too(path, at, value, error):
    CorrectnessHistory(77, path)
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    write_with_checksum(path, raw)
    with pytest.raises(ValueError, match=rf"^{path}: {error}"):
        CorrectnessHistory.open(path)


def test_bits_past_the_last_sample_are_refused(path):
    h = CorrectnessHistory(80, path)
    h.append(np.ones(80, bool))
    h.append(np.ones(80, bool))
    raw = bytearray(path.read_bytes())
    raw[16:24] = struct.pack("<Q", 77)
    write_with_checksum(path, raw)
    with pytest.raises(ValueError, match="past the last sample"):
        CorrectnessHistory.open(path)


@pytest.mark.parametrize("n_samples", [7, 8, 63, 64, 72, 511, 512])
def test_bits_past_the_last_sample_are_looked_for_in_every_width(path, n_samples):
    filled(path, np.ones((2, n_samples), bool))
    assert CorrectnessHistory.open(path).correct().all()
    if n_samples % 8:
        raw = bytearray(path.read_bytes())
        raw[16:24] = struct.pack("<Q", n_samples - 1)
        write_with_checksum(path, raw)
        with pytest.raises(ValueError, match="past the last sample"):
            CorrectnessHistory.open(path)


def test_a_full_disk_leaves_the_history_as_it_was(path, monkeypatch):
    h = filled(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space.*history\.fmnh"):
        h.append(CORRECT[0])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert len(h) == 5
    h.append(CORRECT[0])
    assert len(CorrectnessHistory.open(path)) == 6


def test_two_writers_are_noticed(path):
    a = filled(path)
    b = CorrectnessHistory.open(path)
    a.append(CORRECT[0])
    for change in (lambda: b.append(CORRECT[1]), lambda: b.truncate(1)):
        with pytest.raises(ValueError, match=rf"^{path}: .*one writer"):
            change()
    np.testing.assert_array_equal(CorrectnessHistory.open(path).correct(), CORRECT[[0, 1, 2, 3, 4, 0]])


@pytest.mark.parametrize("on_disk", [True, False])
def test_truncating_leaves_open_views_alone(path, on_disk):
    h = filled(path if on_disk else None)
    packed = h.packed
    h.truncate(0)
    h.append(~CORRECT[0])
    np.testing.assert_array_equal(packed, np.packbits(CORRECT, axis=1, bitorder="little"))


def test_the_matrix_of_a_history(path):
    np.testing.assert_array_equal(fmn.forgetting_matrix(filled(path)), fmn.forgetting_matrix(CORRECT))
    with pytest.raises(ValueError, match="at least one epoch"):
        fmn.forgetting_matrix(CorrectnessHistory(3))


@pytest.mark.parametrize("on_disk", [True, False])
def test_rows(path, on_disk):
    history = filled(path if on_disk else None)
    assert history[1].dtype == bool
    np.testing.assert_array_equal(history[np.int64(1)], CORRECT[1])
    np.testing.assert_array_equal(history[-1], CORRECT[-1])
    np.testing.assert_array_equal(history[1:3], CORRECT[1:3])
    np.testing.assert_array_equal(list(history), CORRECT)
    with pytest.raises(IndexError):
        history[5]
    with pytest.raises(TypeError):
        history["1"]


def test_appending_costs_no_more_after_many_epochs():
    """A tuple of all epochs, made anew by each append, took sixteen times as long after 100 000 of them."""
    h, peaks = CorrectnessHistory(8), []
    for n in range(20_005):
        if n >= 20_000:
            tracemalloc.start()
        h.append(CORRECT[0, :8])
        if n >= 20_000:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert min(peaks) < 40_000  # at some appends a list finds a larger place


@pytest.mark.parametrize("in_memory", [True, False])
def test_epochs_follow_what_was_truncated_and_appended(path, in_memory):
    h = filled(None if in_memory else path)
    before = h.epochs
    h.truncate(3)
    h.append(CORRECT[0], epoch=7)
    h.append(CORRECT[1])
    assert h.epochs == (0, 1, 2, 7, 8)
    assert before == (0, 1, 2, 3, 4)


def test_truncate(path):
    for h in (filled(path), filled(None)):
        h.truncate(2)
        np.testing.assert_array_equal(h.correct(), CORRECT[:2])
        assert h.path is None or CorrectnessHistory.open(path).epochs == (0, 1)
        h.append(CORRECT[3])
        np.testing.assert_array_equal(h.correct(), CORRECT[[0, 1, 3]])
    assert len(CorrectnessHistory.open(path)) == 3


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (8, 77), (64, 65), (16, 40), (0, 77), (72, 1000)])
def test_select_some_samples(path, start, stop):
    for h in (filled(path), filled(None)):
        part = h.select(samples=slice(start, stop))
        np.testing.assert_array_equal(part.correct(), CORRECT[:, start:stop])
        np.testing.assert_array_equal(part.packed, np.packbits(CORRECT[:, start:stop], axis=1, bitorder="little"))
        np.testing.assert_array_equal(
            h.select([1, 4], samples=slice(start, stop)).correct(), CORRECT[[1, 4], start:stop]
        )
        part.append(CORRECT[0, start:stop])
        assert (part.epochs, len(h)) == ((0, 1, 2, 3, 4, 5), 5)


@pytest.mark.parametrize("samples", [slice(4, 20), slice(16, 16), slice(80, 99), slice(0, 16, 2), slice(16, 0, -1)])
def test_select_refuses_samples_that_are_no_whole_bytes(samples):
    with pytest.raises(ValueError, match="samples: expected a slice from a multiple of 8"):
        filled(None).select(samples=samples)


@pytest.mark.parametrize("samples", [8, None, [0, 8], "0:8", slice(0, 8.0), slice(0, 8, 0)])
def test_select_takes_samples_as_a_slice(samples):
    with pytest.raises(TypeError, match="samples: expected a slice of integers, got"):
        filled(None).select(samples=samples)


def test_select_of_a_history_without_epochs(path):
    for h in (CorrectnessHistory(77, path), CorrectnessHistory(77)):
        part = h.select(samples=slice(8, 20))
        assert (len(part), part.n_samples, part.packed.shape) == (0, 12, (0, 2))


def test_a_part_of_the_samples_has_other_labels():
    h = CorrectnessHistory(77, labels=np.arange(77))
    h.append(CORRECT[0])
    assert h.select(samples=slice(0, 77)).digest == h.digest
    assert h.select(samples=slice(0, 76)).digest == bytes(32)


def test_concatenate(tmp_path):
    parts = [filled(None, CORRECT[:, :30]), filled(None, CORRECT[:, 30:31]), filled(tmp_path / "c", CORRECT[:, 31:])]
    np.testing.assert_array_equal(CorrectnessHistory.concatenate(parts).correct(), CORRECT)
    joined = CorrectnessHistory.concatenate(parts, tmp_path / "joined.fmnh")
    assert joined.epochs == parts[0].epochs
    np.testing.assert_array_equal(CorrectnessHistory.open(tmp_path / "joined.fmnh").correct(), CORRECT)
    np.testing.assert_array_equal(CorrectnessHistory.concatenate(parts[:1]).correct(), CORRECT[:, :30])
    some = [history_of(CORRECT[:3], epochs=(0, 2, 9)), history_of(CORRECT[:3], epochs=(0, 2, 9))]
    assert CorrectnessHistory.concatenate(some).epochs == (0, 2, 9)
    with pytest.raises(ValueError, match=r"^histories: "):
        CorrectnessHistory.concatenate([*some, history_of(CORRECT[:3])])
    parts[1].append([True])
    for bad in ([], parts):
        with pytest.raises(ValueError, match=r"^histories: "):
            CorrectnessHistory.concatenate(bad)


def test_select(path):
    on_disk = history_of(CORRECT, path, np.arange(77), (0, 2, 3, 7, 9))
    for rows, chosen in (
        ([1, 3, 4], [1, 3, 4]),
        ((1, 3, -1), [1, 3, 4]),
        (iter([1, 3]), [1, 3]),
        (np.array([0, 2]), [0, 2]),
        (range(5), [0, 1, 2, 3, 4]),
        ([], []),
    ):
        part = on_disk.select(rows)
        np.testing.assert_array_equal(part.correct(), CORRECT[chosen])
        assert part.epochs == tuple((0, 2, 3, 7, 9)[i] for i in chosen)
        assert (part.digest, part.path) == (on_disk.digest, None)
        part.append(~CORRECT[0])
        np.testing.assert_array_equal(part.correct()[:-1], CORRECT[chosen])
    assert len(on_disk) == 5
    np.testing.assert_array_equal(CorrectnessHistory.open(path).correct(), CORRECT)
    for rows, error in (([3, 1], ValueError), ([1, 1], ValueError), ([5], ValueError), ([True, False], TypeError)):
        with pytest.raises(error, match=r"^rows: expected"):
            on_disk.select(rows)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda h: h.append(CORRECT[0, :5]), ValueError, r"correct: expected shape \(77,\), got shape \(5,\)"),
        (lambda h: h.append(CORRECT), ValueError, "correct"),
        (lambda h: h.append(CORRECT[:0]), ValueError, "correct"),
        (lambda h: h.append(CORRECT[0].astype(float)), TypeError, "correct"),
        (lambda h: h.append(["a"] * 77), TypeError, "correct"),
        (lambda h: h.append(np.full(77, 3)), ValueError, "correct"),
        (lambda h: h.append(CORRECT[0], epoch=4), ValueError, "epoch: expected a number above 4, .* got 4"),
        (lambda h: h.append(CORRECT[0], epoch=-1), ValueError, "epoch"),
        (lambda h: h.append(CORRECT[0], epoch=2**62 + 1), ValueError, "epoch"),
        (lambda h: h.append(CORRECT[0], epoch=5.0), TypeError, "epoch"),
        (lambda h: h.append(CORRECT[0], epoch="five"), TypeError, "epoch"),
        (lambda h: h.truncate(6), ValueError, "n_epochs"),
        (lambda h: h.truncate(-1), ValueError, "n_epochs"),
        (lambda h: h.truncate(2.0), TypeError, "n_epochs"),
        (lambda h: h.select([5]), ValueError, "rows"),
        (lambda h: h.__array__(copy=False), ValueError, "a CorrectnessHistory"),
        (lambda h: CorrectnessHistory(0), ValueError, "n_samples"),
        (lambda h: CorrectnessHistory(2**48 + 1), ValueError, "n_samples"),
        (lambda h: CorrectnessHistory(2.0), TypeError, "n_samples"),
        (lambda h: CorrectnessHistory(3, labels=[0, 1]), ValueError, "labels"),
        (lambda h: CorrectnessHistory(3, h.path), FileExistsError, r"\S+history\.fmnh exists; .*open"),
        (lambda h: CorrectnessHistory.open(h.path.parent / "none"), FileNotFoundError, ".*none"),
        (lambda h: CorrectnessHistory(3, h.path.parent / "none" / "h.fmnh"), FileNotFoundError, ".*none"),
    ],
)
def test_bad_input_loses_nothing(path, call, error, words):
    h = filled(path)
    before = path.read_bytes()
    with pytest.raises(error, match=f"^{words}"):
        call(h)
    assert path.read_bytes() == before
    np.testing.assert_array_equal(h.correct(), CORRECT)


def test_the_ends_of_every_range_are_taken(path):
    assert CorrectnessHistory(2**48).n_samples == 2**48
    for h in (CorrectnessHistory(1), CorrectnessHistory(1, path)):
        h.append([True], 0)
        h.append([[1]], 2**62)  # a row of a matrix is a row too
        assert h.epochs == (0, 2**62)
        h.truncate(2)
        h.truncate(0)
        h.append([0])
        assert h.epochs == (0,)
    assert CorrectnessHistory.open(path).epochs == (0,)


def test_a_history_tells_its_size_and_its_file(path):
    assert repr(filled(None)) == "CorrectnessHistory(n_epochs=5, n_samples=77, in memory)"
    assert repr(filled(path)) == f"CorrectnessHistory(n_epochs=5, n_samples=77, {path})"


def test_it_becomes_an_array_of_the_type_that_is_asked_for(path):
    for h in (filled(path), filled(None)):
        assert np.asarray(h).dtype == bool
        numbers = np.asarray(h, np.float32)
        assert numbers.dtype == np.float32
        np.testing.assert_array_equal(numbers, CORRECT)


def test_the_warning_points_at_the_caller(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"^{path}: dropped the torn last record .*\(incomplete\)") as caught:
        CorrectnessHistory.open(path)
    assert [w.filename for w in caught] == [__file__]


def test_an_empty_history_has_rows_of_bits(path):
    for h in (CorrectnessHistory(9), CorrectnessHistory(9, path)):
        assert (h.packed.shape, h.packed.dtype, h.packed.flags.writeable) == ((0, 2), np.uint8, False)
        assert (h.correct().shape, h.correct().dtype) == ((0, 9), bool)


def test_labels_are_known_by_their_values_and_their_order():
    expected = hashlib.sha256(struct.pack("<3q", 2, 0, 1)).digest()
    for dtype in ("i1", "u2", ">i4", "i8"):
        assert CorrectnessHistory(3, labels=np.array([2, 0, 1], dtype)).digest == expected
    assert CorrectnessHistory(3).digest == bytes(32)


def test_the_digest_of_the_labels_is_stored(path):
    made = CorrectnessHistory(3, path, labels=[2, 0, 1])
    assert CorrectnessHistory.open(path).digest == made.digest == path.read_bytes()[24:56]


class FullOnce:
    """A disk that is full at one call of fsync."""

    def __init__(self, monkeypatch, at):
        self.calls, self.at, self.real = 0, at, os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor):
        self.calls += 1
        if self.calls == self.at:
            full_disk(descriptor)
        self.real(descriptor)


@pytest.mark.parametrize("at", [1, 2])  # the file, its folder
def test_what_failed_can_be_tried_again(path, monkeypatch, at):
    with monkeypatch.context() as patch:
        FullOnce(patch, at)
        with pytest.raises(OSError, match=r"No space.*history\.fmnh"):
            CorrectnessHistory(77, path)
        h = CorrectnessHistory(77, path)
    for row in CORRECT:
        h.append(row)
    with monkeypatch.context() as patch:
        FullOnce(patch, at)
        with pytest.raises(OSError, match="No space"):
            h.truncate(2)
        assert len(h) == len(CorrectnessHistory.open(path)) == (5 if at == 1 else 2)
        h.truncate(2)
    h.append(CORRECT[4])
    np.testing.assert_array_equal(h.correct(), CORRECT[[0, 1, 4]])
    np.testing.assert_array_equal(CorrectnessHistory.open(path).correct(), CORRECT[[0, 1, 4]])


def test_a_link_in_its_place_is_not_followed(path):
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(FileExistsError, match="open"):
        CorrectnessHistory(3, path)
    assert not path.with_name("elsewhere").exists()


def test_another_working_directory_does_not_matter(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    h, again = filled("history.fmnh"), CorrectnessHistory.open("history.fmnh")
    monkeypatch.chdir("/")
    h.append(CORRECT[0])
    assert len(CorrectnessHistory.open(path)) == 6
    assert again.packed.shape == (5, 10)
    with pytest.raises(ValueError, match="one writer"):
        again.append(CORRECT[0])


def test_the_home_is_filled_in(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    filled("~/history.fmnh")
    assert len(CorrectnessHistory.open("~/history.fmnh")) == len(CorrectnessHistory.open(path)) == 5


def test_sizes_beyond_the_file_ask_for_no_memory(path):
    filled(path)
    raw = bytearray(path.read_bytes()[:64])
    raw[16:24] = struct.pack("<Q", 2**48)
    write_with_checksum(path, raw)
    assert CorrectnessHistory.open(path).packed.shape == (0, 2**45)
