"""CorrectnessHistory: correctness of every sample and epoch as bits, in memory or in an append-only file. NumPy only.

The file has a 64-byte header, then one record per epoch: a 64-byte record header, then the row of bits, padded with
zeros to a multiple of 64 bytes. Every row is therefore aligned, and the whole file can be memory-mapped. All integers
are little-endian. docs/reference/formats.md describes it.

    header  8s magic  u32 version  u32 zero  u64 n_samples  32s SHA-256 of the labels (zeros: unknown)
            u32 CRC-32 of the 56 bytes before it  4 zeros
    record  4s magic  u32 CRC-32 of the epoch's 8 bytes and the row  i64 epoch  48 zeros  row

Every byte is checked: by its CRC-32, or to be the one that must be there.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from ..kernels.backend import kernels
from .matrix import adjacent

_HEADER = struct.Struct("<8sIIQ32s")
_RECORD = struct.Struct("<4sIq")
_MAGIC, _RECORD_MAGIC = b"FMNHIST\0", b"EPOC"
_PAD = 64
NO_LABELS = bytes(32)


def labels_digest(labels: Any, n_samples: int | None = None) -> bytes:
    """SHA-256 of the labels as little-endian int64: equal for two files of the same samples in the same order."""
    y = _check.labels(labels, n_samples, copy=False)
    return hashlib.sha256(np.ascontiguousarray(y, "<i8").data).digest()


class CorrectnessHistory:
    """Append-only (n_epochs, n_samples) matrix of bits.

    Parameters
    ----------
    n_samples : int >= 1
        Number of samples, the same at every epoch.
    path : path, optional
        A new file (by convention history.fmnh). Each append is on disk when it returns. Default: keep the history in
        memory.
    labels : (n_samples,) integers, optional
        True classes. The file stores their digest, so that a history is not continued on other samples. Default: the
        labels are unknown.

    Attributes
    ----------
    epochs : tuple of int
        Epoch number of each row, ascending.
    packed : (n_epochs, ceil(n_samples / 8)) uint8, read-only
        Bits, least significant first, with zeros past the last sample; a view of the file if there is one.

    Raises
    ------
    FileExistsError
        `path` exists: `CorrectnessHistory.open` continues it.

    Examples
    --------
    >>> h = CorrectnessHistory(3)
    >>> h.append([True, False, True])
    >>> h.append([True, True, False])
    >>> h.correct()
    array([[ True, False,  True],
           [ True,  True, False]])
    >>> h[1]
    array([ True,  True, False])
    >>> import numpy as np, fmn_ref as fmn
    >>> fmn.forget_fraction(h)
    array([0.33333333, 0.        ])
    """

    def __init__(self, n_samples: int, path: str | os.PathLike[str] | None = None, *, labels: Any = None) -> None:
        self.n_samples: int = _check.number(n_samples, 1, 2**48, "n_samples", int)
        self.digest = NO_LABELS if labels is None else labels_digest(labels, self.n_samples)
        self.path = None if path is None else _files.absolute(path)
        self._numbers: list[int] = []  # of the epochs: `append` would copy a tuple
        self._epochs: tuple[int, ...] = ()  # the same, as far as they were read
        self._width = -(-self.n_samples // 8)
        self._rows = np.zeros((0, self._width), np.uint8)  # of a history in memory; grows by doubling
        self._record_size: int = _PAD + -(-self._width // _PAD) * _PAD
        if self.path is not None:
            self._create(self.path)

    def _create(self, path: Path) -> None:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists; CorrectnessHistory.open continues it")
        header = _HEADER.pack(_MAGIC, 1, 0, self.n_samples, self.digest)
        header = (header + struct.pack("<I", zlib.crc32(header))).ljust(_PAD, b"\0")
        try:
            _files.write_bytes(path, header)
        except BaseException:
            path.unlink(missing_ok=True)  # its folder could not be synced: the next try must find no file
            raise
        self._state = _state(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> CorrectnessHistory:
        """Open a history file, memory-mapped; appending continues it.

        A torn last record, from a process or machine that died while writing it, is dropped with a warning. The next
        append overwrites it; opening never changes the file.

        Parameters
        ----------
        path : path
        verify : bool
            Default: True. Check every row's CRC-32, which reads the whole file once. False checks only the record
            headers.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is no history, of a newer version, or corrupt; the message names the file and the offset.
        """
        with _files.reading(path, "a readable history") as file:
            n_samples, digest = _read_header(file.read(_PAD), path)
            self = cls(n_samples)
            self.path, self.digest = _files.absolute(path), digest
            self._state = _state(file.fileno())
            self._scan(verify)
            return self

    def _scan(self, verify: bool) -> None:
        """Read the epoch numbers of the intact records."""
        n, rest = divmod(self._state[0] - _PAD, self._record_size)
        epochs: list[int] = []
        fault = ""
        records = self._map(n)
        mapping = _files.mapping(records)
        for record in records:
            fault = _record_fault(record, self.n_samples, epochs, verify)
            if fault:
                break
            epochs.append(_RECORD.unpack(record[:16].tobytes())[2])
            _files.drop_pages(mapping)
        self._numbers = epochs
        kept, offset = len(epochs), self._end(len(epochs))
        if fault and (rest or kept < n - 1):
            raise ValueError(f"{self.path}: corrupt record at offset {offset}: {fault}")
        if fault or rest:
            torn = f"dropped the torn last record at offset {offset} ({fault or 'incomplete'})"
            warnings.warn(f"{self.path}: {torn}; {kept} epochs kept", stacklevel=3)

    def _end(self, n: int) -> int:
        """Size of the file with n records."""
        return _PAD + n * self._record_size

    def _map(self, n: int) -> NDArray[np.uint8]:
        """The first n records of the file, (n, record_size)."""
        if n == 0:
            return np.zeros((0, self._record_size), np.uint8)
        assert self.path is not None
        with _files.reading(self.path, "a readable history") as file:
            if _state(file.fileno())[1:] != self._state[1:]:
                raise ValueError(
                    f"{self.path}: another process discarded epochs since it was opened here; open it again"
                )
            return np.memmap(file, np.uint8, "r", offset=_PAD, shape=(n, self._record_size))

    @property
    def epochs(self) -> tuple[int, ...]:
        if len(self._epochs) != len(self._numbers):
            self._epochs = tuple(self._numbers)
        return self._epochs

    @property
    def packed(self) -> NDArray[np.uint8]:
        n = len(self)
        rows = self._rows[:n] if self.path is None else self._map(n)[:, _PAD : _PAD + self._width]
        rows = rows.view(np.ndarray)
        rows.flags.writeable = False
        return rows

    def append(self, correct: Any, epoch: int | None = None) -> None:
        """Add one epoch.

        Parameters
        ----------
        correct : (n_samples,) bool or 0 and 1
            Whether each sample was classified correctly.
        epoch : int, optional
            Epoch number, above the last one. Default: the next number, from 0.

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or length, an epoch that is not above the last; another writer changed the file.
        OSError
            The disk is full or the file cannot be written. The history is then unchanged.
        """
        a = _check.array(correct, "correct")
        row = _check.bool_matrix(a[None] if a.ndim == 1 else a)
        if row.shape != (1, self.n_samples):
            raise ValueError(f"correct: expected shape ({self.n_samples},), got shape {a.shape}")
        last = self._numbers[-1] if self._numbers else -1
        epoch = last + 1 if epoch is None else _check.number(epoch, 0, 2**62, "epoch", int)
        if epoch <= last:
            raise ValueError(f"epoch: expected a number above {last}, the last epoch of this history, got {epoch}")
        packed = kernels().pack(adjacent(row), self.n_samples)[0]
        if self.path is None:
            self._append_in_memory(packed)
        else:
            self._append_to_file(packed, epoch)
        self._numbers.append(epoch)

    def _append_in_memory(self, packed: NDArray[np.uint8]) -> None:
        n = len(self)
        if n == len(self._rows):
            grown = np.zeros((max(16, 2 * n), self._width), np.uint8)  # pages past n are not touched yet
            grown[:n] = self._rows
            self._rows = grown
        self._rows[n] = packed

    def _append_to_file(self, packed: NDArray[np.uint8], epoch: int) -> None:
        assert self.path is not None
        self.check_unchanged()
        record = np.zeros(self._record_size, np.uint8)
        record[_PAD : _PAD + self._width] = packed
        _RECORD.pack_into(record.data, 0, _RECORD_MAGIC, _checksum(epoch, record), epoch)
        end = self._end(len(self))
        with open(self.path, "r+b", buffering=0) as file:
            file.truncate(end)  # removes a torn record
            file.seek(end)
            try:
                todo = record.data
                while todo:  # a signal, a limit or a nearly full disk may cut a write short
                    todo = todo[file.write(todo) :]
                os.fsync(file.fileno())
            except OSError as error:
                error.filename = str(self.path)
                with contextlib.suppress(OSError):  # the first error tells more; the next append truncates as well
                    file.truncate(end)
                raise
            finally:
                self._state = _state(file.fileno())

    def truncate(self, n_epochs: int) -> None:
        """Keep the first `n_epochs` rows and drop the others, also in the file."""
        n: int = _check.number(n_epochs, 0, len(self), "n_epochs", int)
        if self.path is not None:
            self.check_unchanged()
            with _files.reading(self.path, "a readable history") as file:
                kept = file.read(self._end(n))
            try:  # a new file, so that views of the old one stay valid
                _files.write_bytes(self.path, kept)
            finally:  # it is there even if its folder could not be synced
                self._state = _state(self.path)
                if self._state[0] == len(kept):
                    self._drop_from(n)
        self._rows = self._rows.copy()  # views of the old rows keep their values
        self._drop_from(n)

    def _drop_from(self, n: int) -> None:
        """Drop the numbers of row n and all later ones."""
        self._numbers, self._epochs = self._numbers[:n], self.epochs[:n]

    def check_unchanged(self) -> None:
        """Raise ValueError if another writer changed the file since it was opened here."""
        if self.path is not None and _state(self.path) != self._state:
            raise ValueError(f"{self.path}: changed since it was opened here; a history has one writer")

    def correct(self) -> NDArray[np.bool_]:
        """(n_epochs, n_samples) bool, a new array of eight times the size of the bits."""
        return self[:]

    def __getitem__(self, row: Any) -> NDArray[np.bool_]:
        """``history[i]`` is (n_samples,) bool, ``history[a:b]`` is (b - a, n_samples) bool; both are new arrays."""
        bits = self.packed[row if isinstance(row, slice) else operator.index(row)]
        return np.unpackbits(bits, axis=-1, count=self.n_samples, bitorder="little").view(np.bool_)

    @classmethod
    def concatenate(
        cls, histories: Sequence[CorrectnessHistory], path: str | os.PathLike[str] | None = None
    ) -> CorrectnessHistory:
        """Join histories of the same epochs over their samples, in the given order (shards of one evaluation).

        Raises
        ------
        ValueError
            `histories` is empty, or their epochs differ.
        """
        if not histories:
            raise ValueError("histories: expected at least one")
        if any(h.epochs != histories[0].epochs for h in histories):
            raise ValueError("histories: expected the same epochs in all")
        joined = cls(sum(h.n_samples for h in histories), path)
        for i, epoch in enumerate(histories[0].epochs):
            joined.append(np.concatenate([h[i] for h in histories]), epoch)
        return joined

    def select(self, rows: Any = None, *, samples: slice = slice(None)) -> CorrectnessHistory:
        """Copy some rows, in ascending order, or some samples of each, to a history in memory.

        Parameters
        ----------
        rows : sequence of int, optional
            Default: all.
        samples : slice, optional
            Begins at a multiple of 8. Default: all. The per-sample statistics of more samples than fit in memory come
            a slice at a time.

        Raises
        ------
        TypeError, ValueError
            Rows out of range or not ascending; samples that do not begin at a multiple of 8, or are none.
        """
        chosen = [_check.index(i, len(self), "rows") for i in (range(len(self)) if rows is None else rows)]
        if chosen != sorted(set(chosen)):
            raise ValueError(f"rows: expected them ascending, got {chosen}")
        try:
            start, stop, step = samples.indices(self.n_samples)
        except (AttributeError, TypeError, ValueError):
            raise TypeError(f"samples: expected a slice of integers, got {samples!r}") from None
        if start % 8 or stop <= start or step != 1:
            raise ValueError(f"samples: expected a slice from a multiple of 8, in steps of 1, got {samples}")
        part = CorrectnessHistory(stop - start)
        part.digest = self.digest if part.n_samples == self.n_samples else NO_LABELS
        part._rows = np.ascontiguousarray(self.packed[chosen, start // 8 : -(-stop // 8)])
        part._rows[:, -1] &= 0xFF >> -stop % 8  # zeros past the last sample
        part._numbers = [self._numbers[i] for i in chosen]
        return part

    def __len__(self) -> int:
        return len(self._numbers)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a CorrectnessHistory holds bits: an array of bool is always a copy")
        return self.correct().astype(bool if dtype is None else dtype, copy=False)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return f"CorrectnessHistory(n_epochs={len(self)}, n_samples={self.n_samples}, {where})"


def _state(file: Path | int) -> tuple[int, int, int]:
    """Size and identity of a file: rewinding makes a new one."""
    found = os.stat(file)
    return found.st_size, found.st_dev, found.st_ino


def _checksum(epoch: int, record: NDArray[np.uint8]) -> int:
    return zlib.crc32(record[_PAD:].data, zlib.crc32(struct.pack("<q", epoch)))


def _read_header(header: bytes, path: str | os.PathLike[str]) -> tuple[int, bytes]:
    if len(header) < _PAD or not header.startswith(_MAGIC):
        raise ValueError(f"{path}: not a history file (bad magic or shorter than its header, offset 0)")
    _, version, _, n_samples, digest = _HEADER.unpack(header[: _HEADER.size])
    crc, zeros = struct.unpack_from("<II", header, _HEADER.size)
    if zlib.crc32(header[: _HEADER.size]) != crc or zeros or not 1 <= n_samples <= 2**48:
        raise ValueError(f"{path}: corrupt header (CRC-32, offset 0)")
    if version != 1:
        raise ValueError(f"{path}: history version {version} is not known to this release")
    return int(n_samples), digest


def _record_fault(record: NDArray[np.uint8], n_samples: int, before: Sequence[int], verify: bool) -> str:
    """Describe the fault of a record after the epochs `before`; empty if it is intact."""
    magic, crc, epoch = _RECORD.unpack(record[:16].tobytes())
    last = before[-1] if before else None
    if magic != _RECORD_MAGIC:
        return "bad magic"
    if record[_RECORD.size : _PAD].any():
        return "zeros expected after the epoch"
    if verify and _checksum(epoch, record) != crc:
        return "CRC-32 does not match"
    if epoch < 0 or (last is not None and epoch <= last):
        return f"epoch {epoch} after {last}"
    if verify and n_samples % 8 and record[_PAD + n_samples // 8] >> (n_samples % 8):
        return "bits set past the last sample"
    return ""
