"""Seal and check the zip archives that torch.save writes, before torch reads them. Standard library only.

torch finds the entries of a zip file by one reader, Python by another. Where damage makes them differ, torch may return
memory that nobody wrote. `check` accepts one form only: stored entries without gaps from the first byte to the
directory, described alike in both places. `seal` puts a CRC-32 of the whole file into the archive's comment.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Set
from typing import IO, Any, NamedTuple

from .pickles import LONGEST_NAME, scan

_LOCAL = struct.Struct("<4s2x2H4x3I2H")  # of the zip format: before each entry, in the directory, and at the end
_CENTRAL = struct.Struct("<4s4x2H4x3I4H2x2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ4x2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_STREAMED, _UTF8, _FOLDER = 0x8, 0x800, 0x10  # sizes follow the data; names are UTF-8; a folder of MS-DOS
_FULL = 0xFFFFFFFF  # the value is in a field of 64 bits
_SEAL = b"fmn_ref crc32 "  # and eight hexadecimal digits: the CRC-32 of all bytes before them
_SEALED = len(_SEAL) + 8
_CHUNK = 1 << 18
_NESTING, _NESTED = (b"(", b"\x85", b"\x86", b"\x87"), 5000  # a tuple needs one of these; a few thousand can do no harm
# Bytes of an element in each kind of storage that torch.save writes.
_ELEMENT = {b"torch.storage\nUntypedStorage": 1}
_ELEMENT |= {b"torch\n%sStorage" % name: 1 for name in (b"Byte", b"Char", b"Bool", b"QUInt8", b"QInt8")}
_ELEMENT |= {b"torch\n%sStorage" % name: 1 for name in (b"QUInt4x2", b"QUInt2x4", b"Untyped")}
_ELEMENT |= {b"torch\n%sStorage" % name: 2 for name in (b"Half", b"BFloat16", b"Short")}
_ELEMENT |= {b"torch\n%sStorage" % name: 4 for name in (b"Float", b"Int", b"QInt32")}
_ELEMENT |= {b"torch\n%sStorage" % name: 8 for name in (b"Double", b"Long", b"ComplexFloat")}
_ELEMENT |= {b"torch\nComplexDoubleStorage": 16}


class _Entry(NamedTuple):
    """An entry as the directory describes it."""

    name: bytes
    flags: int
    crc: int
    size: int
    header: int  # offset of its local header


def seal(archive: memoryview, file: IO[bytes]) -> None:
    """Write an archive that has no comment, with the seal as its comment."""
    head, tail = archive[:-2], struct.pack("<H", _SEALED) + _SEAL
    file.write(head)
    file.write(tail + b"%08x" % zlib.crc32(tail, zlib.crc32(head)))


def is_sealed(file: IO[bytes]) -> bool:
    """Tell whether `seal` wrote the file."""
    file.seek(max(0, file.seek(0, 2) - _SEALED))
    return file.read(len(_SEAL)) == _SEAL


def check(file: IO[bytes], scanned: bool = True, dropped: Set[bytes] = frozenset()) -> None:
    """Check a file before torch.load reads it; a ValueError says what is wrong.

    A sealed file must match its checksum. The entries of another one must match theirs, and their own headers.

    Parameters
    ----------
    file : file opened to read
    scanned : bool, default True
        Scan the pickle, and compare what it says of the tensors' storages with the entries. If False, only a pickle
        that could be harmful is scanned.
    dropped : set of bytes
        As for `scan`.
    """
    size, sealed = file.seek(0, 2), is_sealed(file)
    if sealed and b"%08x" % _crc(file, 0, size - 8) != _read(file, size - 8, 8):
        raise ValueError("its checksum does not match")
    entries, directory = _directory(file, size, _SEALED if sealed else 0)
    for entry, after in zip(entries, [*(e.header for e in entries[1:]), directory], strict=True):
        _require(entry.header + _LOCAL.size + len(entry.name) + entry.size <= after, "its entries overlap")
    if not sealed:
        _check_entries(file, entries, directory)
    sizes = {entry.name.partition(b"/")[2]: entry for entry in entries}
    _require(len(sizes) == len(entries) and b"data.pkl" in sizes, "it has no data.pkl, as torch.save writes")
    pickled = sizes[b"data.pkl"]
    data = _read(file, _check_local(file, pickled, pickled.header)[0], pickled.size)
    long = max(map(len, data.split()), default=0) > LONGEST_NAME  # as a name without spaces might be
    if scanned or long or b"bytearray" in data or sum(map(data.count, _NESTING)) > _NESTED:
        _check_storages(scan(data, contents=True, dropped=dropped), sizes)


def check_legacy(file: IO[bytes], dropped: Set[bytes] = frozenset()) -> None:
    """Check a file that torch before 1.6 wrote: five pickles, then the bytes of the storages, without a checksum.

    A ValueError says what is wrong. `dropped` as for `scan`.
    """
    size = file.seek(0, 2)
    _require(size > 0, "it is empty")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _require(data[:2] == b"\x80\2", "torch.save writes no such file")
        for identifier in scan(data, contents=True, count=5, dropped=dropped):
            match identifier:
                case [b"storage", kind, bytes(), _, int(n), _] if kind in _ELEMENT:
                    _require(0 <= n * _ELEMENT[kind] <= size, "a tensor is larger than the file")
                case _:
                    raise ValueError("it refers to a tensor that it does not contain")


def _check_entries(file: IO[bytes], entries: list[_Entry], directory: int) -> None:
    end = 0
    for entry in entries:
        start, end = _check_local(file, entry, end)
        if _crc(file, start, entry.size) != entry.crc:
            raise ValueError(f"the checksum of {entry.name.decode(errors='replace')} does not match")
    _require(end == directory, "something stands between the entries and the directory")


def _check_storages(identifiers: list[Any], entries: dict[bytes, _Entry]) -> None:
    for identifier in identifiers:
        match identifier:
            case [b"storage", kind, bytes(key), _, int(n)] if kind in _ELEMENT and b"data/" + key in entries:
                _require(0 <= n * _ELEMENT[kind] <= entries[b"data/" + key].size, "a tensor is larger than its entry")
            case _:
                raise ValueError("it refers to a tensor that it does not contain")


def _directory(file: IO[bytes], size: int, comment: int) -> tuple[list[_Entry], int]:
    """Entries and offset of the directory, which reaches to the records at the end of the file."""
    at = size - comment - _END.size
    _require(at >= 0, "it is too short")
    magic, *disks, here, count, length, start, found = _END.unpack(_read(file, at, _END.size))
    _require(
        magic == b"PK\5\6" and not any(disks) and here == count and found == comment, "it does not end as a zip file"
    )
    before = at - _LOCATOR.size - _END64.size
    if before >= 0 and _read(file, at - _LOCATOR.size, 4) == b"PK\6\7":
        _, disk, where, n_disks = _LOCATOR.unpack(_read(file, at - _LOCATOR.size, _LOCATOR.size))
        magic, left, *disks, here, n, long, far = _END64.unpack(_read(file, before, _END64.size))
        alike = count in (n, 0xFFFF) and length in (long, _FULL) and start in (far, _FULL)
        sound = (magic, left, disk, where, n_disks) == (b"PK\6\6", 44, 0, before, 1) and not any(disks) and here == n
        _require(alike and sound, "it does not end as a zip file")
        at, count, length, start = before, n, long, far
    _require(start + length == at, "its directory is not where its end says")
    return _entries(_read(file, start, length), count), start


def _entries(directory: bytes, count: int) -> list[_Entry]:
    found, at = [], 0
    for _ in range(count):
        fixed, at = directory[at : at + _CENTRAL.size], at + _CENTRAL.size
        _require(len(fixed) == _CENTRAL.size and fixed.startswith(b"PK\1\2"), "its directory is damaged")
        _, flags, method, crc, packed, size, n_name, n_extra, n_comment, disk, kind, header = _CENTRAL.unpack(fixed)
        name, extra = directory[at : at + n_name], directory[at + n_name : at + n_name + n_extra]
        size, packed, header = widened(extra, size, packed, header)
        simple = (method, packed, disk, n_comment) == (0, size, 0, 0) and not flags & ~(_STREAMED | _UTF8)
        _require(simple, "an entry is not simply stored")
        _require(name and not name.endswith(b"/") and not kind & _FOLDER, "an entry is a folder")
        found.append(_Entry(name, flags, crc, size, header))
        at += n_name + n_extra
    _require(at == len(directory), "its directory is damaged")
    return found


def widened(extra: bytes, *values: int) -> list[int]:
    """Replace each value that does not fit 32 bits by its 64 bits in the extra field."""
    if _FULL not in values:
        return list(values)
    at = 0
    while extra[at : at + 2] not in (b"\1\0", b""):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    n = values.count(_FULL)
    _require(len(extra) >= at + 4 + 8 * n, "its directory is damaged")
    wide = iter(struct.unpack_from(f"<{n}Q", extra, at + 4))
    return [next(wide) if value == _FULL else value for value in values]


def _check_local(file: IO[bytes], entry: _Entry, at: int) -> tuple[int, int]:
    """Compare the entry at an offset with the directory; return where its data begin and where all of it ends."""
    _require(entry.header == at, "there is a gap between its entries")
    magic, flags, method, crc, packed, size, n_name, n_extra = _LOCAL.unpack(_read(file, at, _LOCAL.size))
    name, later = _read(file, at + _LOCAL.size, n_name), (0,) if flags & _STREAMED else ()
    alike = (magic, flags, method, name) == (b"PK\3\4", entry.flags, 0, entry.name)
    sizes = {size, packed} <= {entry.size, _FULL, *later}
    _require(alike and sizes and crc in (entry.crc, *later), "an entry differs from the directory")
    start = at + _LOCAL.size + n_name + n_extra
    end = start + entry.size
    return start, end + (_descriptor_size(file, entry, end) if flags & _STREAMED else 0)


def _descriptor_size(file: IO[bytes], entry: _Entry, at: int) -> int:
    file.seek(at)
    found = file.read(24)
    for form in ("<4sI2Q", "<4s3I"):
        if found.startswith(struct.pack(form, b"PK\7\x08", entry.crc, entry.size, entry.size)):
            return struct.calcsize(form)
    raise ValueError("an entry differs from the directory")


def _read(file: IO[bytes], at: int, n: int) -> bytes:
    file.seek(at)
    found = file.read(n)
    _require(len(found) == n, "it is too short")
    return found


def _crc(file: IO[bytes], at: int, n: int) -> int:
    """CRC-32 of a part of the file."""
    file.seek(at)
    crc, chunk = 0, memoryview(bytearray(min(n, _CHUNK)))
    while n > 0:
        got = file.readinto(chunk[: min(n, _CHUNK)])  # type: ignore[attr-defined]
        _require(got, "it is too short")
        crc, n = zlib.crc32(chunk[:got], crc), n - got
    return crc


def _require(condition: Any, fault: str) -> None:
    if not condition:
        raise ValueError(fault)
