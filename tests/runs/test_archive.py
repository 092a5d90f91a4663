"""Archives of torch.save: a damaged or contradictory one is refused before torch reads it."""

import io
import struct
import zipfile
import zlib

import pytest
import torch
from folders import flip_bit

from fmn_ref.runs import archive, checkpoints

STATE = {"w": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0), "n": torch.tensor(3), "x": [1, 2.5, "s", None]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.pt"


def written(path, kind):
    """Write STATE with the checksum of this package, as torch does, or as another zip tool does."""
    if kind == "own":
        checkpoints.save(STATE, path)
    else:
        torch.save(STATE, path)
    if kind == "zip":
        repacked(path, lambda name, data: data)
    return path.read_bytes()


def repacked(path, change, method=zipfile.ZIP_STORED):
    """Write an archive anew with Python's zip tool, with other contents."""
    with zipfile.ZipFile(path) as old:
        contents = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in contents.items():
            new.writestr(name, data)


def same(found):
    return (
        isinstance(found, dict)
        and found.keys() == STATE.keys()
        and found["x"] == STATE["x"]
        and all(found[k].dtype == STATE[k].dtype and torch.equal(found[k], STATE[k]) for k in ("w", "empty", "n"))
    )


KINDS = ["own", "torch", "zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_comes_back(path, kind):
    written(path, kind)
    assert same(checkpoints.load(path))
    assert same(checkpoints.load(path, scan=True))
    assert same(torch.load(path))  # what other tools read
    assert checkpoints.is_own(path) == (kind == "own")
    with zipfile.ZipFile(path) as archive_of_all:
        assert archive_of_all.testzip() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_never_gives_other_values(path, kind, rng):
    """Each byte of the directory and of the first header, and some of the others; a foreign file has idle bytes."""
    raw = written(path, kind)
    places = {*range(64), *range(raw.index(b"PK\1\2"), len(raw)), *rng.integers(0, len(raw), 200).tolist()}
    refused = 0
    for at in sorted(places):
        flip_bit(path, at, 1 << int(rng.integers(8)))
        found = loaded_or_fault(path)
        refused += isinstance(found, str) and str(path) in found
        assert isinstance(found, str) or same(found), at
        path.write_bytes(raw)
    assert refused == len(places) if kind == "own" else refused > len(places) // 2


def loaded_or_fault(path):
    try:
        return checkpoints.load(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_no_beginning_of_a_file_is_taken_for_the_whole(path, kind):
    raw = written(path, kind)
    for n in range(0, len(raw), 7):
        path.write_bytes(raw[:n])
        with pytest.raises(ValueError, match=r"a\.pt: not a readable checkpoint of tensors"):
            checkpoints.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_may_follow_or_precede(path, kind):
    raw = written(path, kind)
    for other in (raw + b"\0", raw + raw, b"\0" + raw, raw[:-2] + struct.pack("<H", 4) + b"note"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"a\.pt"):
            checkpoints.load(path)


def patched(raw, at, form, value):
    return raw[:at] + struct.pack(form, value) + raw[at + struct.calcsize(form) :]


def entry_of_data(raw, name=b"/data/0"):
    """Offset of the directory's record of the first tensor."""
    return raw.rindex(b"PK\1\2", 0, raw.rindex(name))


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (38, "<I", 0x10, "folder"),  # torch then returns memory that nobody wrote
        (10, "<H", 8, "not simply stored"),  # deflated
        (8, "<H", 0x801, "not simply stored"),  # encrypted
        (20, "<I", 5, "not simply stored"),
        (24, "<I", 2**31, "not simply stored"),
        (42, "<I", 0, "overlap|gap"),
        (28, "<H", 2, "folder|damaged"),
        (34, "<H", 1, "not simply stored"),
    ],
)
def test_a_contradictory_directory_is_refused_also_with_a_valid_checksum(path, offset, form, value, words):
    """A stranger can compute the checksum too."""
    raw = written(path, "torch")
    for sealed in (False, True):
        changed = patched(raw, entry_of_data(raw) + offset, form, value)
        if sealed:
            buffer = io.BytesIO()
            archive.seal(memoryview(changed), buffer)
            changed = buffer.getvalue()
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"a\.pt: .*({words})"):
            checkpoints.load(path)


def test_an_entry_that_is_there_twice_is_refused(path):
    written(path, "zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr(file.namelist()[0], b".")
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoints.load(path)


def test_compressed_entries_are_refused(path):
    written(path, "torch")
    repacked(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="not simply stored"):
        checkpoints.load(path)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("data.pkl", lambda data: b".", "IndexError|not there"),
        ("data.pkl", lambda data: data[:40], "no end|ends within|not an allowed global"),
        ("data.pkl", lambda data: b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "too deep"),
        (
            "data.pkl",
            lambda data: b"\x80\x02co" + b"a" * 20_000 + b"\nx\n.",
            "name is too long",
        ),  # 5 s in torch's message
        ("data.pkl", lambda data: b"\x80\x02cbuiltins\nbytearray\nq\0\x8a\x05\0\0\0\0\x10\x85Rq\1.", "memory"),
        ("data/0", lambda data: data[:4], "larger than its entry|does not match expected size"),
    ],
)
def test_small_files_of_strangers(path, name, change, words, sealed):
    """They neither kill the interpreter nor read past the file or ask for more memory than it has."""
    written(path, "zip")
    repacked(path, lambda n, data: change(data) if n.endswith(f"/{name}") else data)
    if sealed:
        raw = path.read_bytes()
        with open(path, "wb") as file:
            archive.seal(memoryview(raw), file)
    with pytest.raises(ValueError, match=rf"a\.pt: .*({words})"):
        checkpoints.load(path)


def test_a_tensor_larger_than_its_entry_is_refused_by_the_scan(path):
    """Older versions of torch read on, past the entry."""
    written(path, "zip")
    repacked(path, lambda n, data: data[:4] if n.endswith("/data/0") else data)
    with pytest.raises(ValueError, match="larger than its entry"):
        checkpoints.load(path, scan=True)


def test_the_checksum_is_that_of_all_bytes_before_it(path):
    raw = written(path, "own")
    assert raw[-22:-8] == b"fmn_ref crc32 "
    assert int(raw[-8:], 16) == zlib.crc32(raw[:-8])


def test_entries_beyond_four_gigabytes():
    """Offsets and sizes of 64 bits stand in an extra field; those of 32 bits are full."""
    full, other = 2**32 - 1, struct.pack("<HH2s", 9, 2, b"xx")
    wide = struct.pack("<HH3Q", 1, 24, 2**33, 2**33, 2**34)
    assert archive.widened(other + wide, full, full, full) == [2**33, 2**33, 2**34]
    assert archive.widened(struct.pack("<HHQ", 1, 8, 2**34), 5, 5, full) == [5, 5, 2**34]
    with pytest.raises(ValueError, match="directory"):
        archive.widened(other, 5, 5, full)
