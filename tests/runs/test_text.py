"""Text files are read alike, whatever system wrote them; ids keep their bytes."""

import codecs

import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref.runs.text import BYTES, id_array, read_ids, read_lines

IDS = ["a", "", "ünï", "a b", " c ", "x\x0by", "p\x0cq", "f\x1cg", "n\x85m", "l\u2028p", "\U0001d4b3", "#", "0"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("last", ["", "end"])
def test_marks_and_line_ends(tmp_path, encoding, end, last):
    """A line ends with \\n, \\r\\n or \\r: not with the characters that str.splitlines takes besides."""
    (tmp_path / "ids.txt").write_bytes((end.join(IDS) + (end if last else "")).encode(encoding))
    assert read_ids(tmp_path / "ids.txt") == IDS


@pytest.mark.parametrize(("mark", "encoding"), [(codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_BE, "utf-32-be")])
def test_marks_of_big_endian_text(tmp_path, mark, encoding):
    (tmp_path / "ids.txt").write_bytes(mark + "\n".join(IDS).encode(encoding))
    assert read_ids(tmp_path / "ids.txt") == IDS


def test_joined_files_have_marks_within(tmp_path):
    (tmp_path / "ids.txt").write_bytes("a\nb\n".encode("utf-8-sig") + "c\nd\n".encode("utf-8-sig"))
    assert read_ids(tmp_path / "ids.txt") == ["a", "b", "c", "d"]


def test_ids_keep_their_bytes(tmp_path):
    raw = [b"caf\xe9", b"\xff\xfe"[::-1], b"\x80", "é".encode()]
    (tmp_path / "ids.txt").write_bytes(b"\n".join(raw))
    assert [i.encode("utf-8", BYTES) for i in read_ids(tmp_path / "ids.txt")] == raw


@pytest.mark.parametrize(
    "raw", [b"a\nb\0\n", "a\nb\n".encode("utf-16-le"), codecs.BOM_UTF16_LE + b"a", codecs.BOM_UTF32_LE + b"\xff" * 4]
)
def test_what_is_no_text_is_named(tmp_path, raw):
    (tmp_path / "ids.txt").write_bytes(raw)
    with pytest.raises(ValueError, match=r"ids\.txt: not a text file: "):
        read_lines(tmp_path / "ids.txt")


def test_an_empty_file(tmp_path):
    (tmp_path / "ids.txt").write_bytes(codecs.BOM_UTF8)
    assert read_ids(tmp_path / "ids.txt") == []


def test_one_long_id_does_not_fill_the_memory():
    """NumPy pads every id to the longest one: 8 GB for this list of 2 MB."""
    with pytest.raises(ValueError, match=r"sample_ids: .*2000000 characters"):
        id_array(["x" * 2_000_000, *map(str, range(999))])
    assert id_array(["x" * 2_000_000]).nbytes == 8_000_000
    assert id_array(["x" * 900, *"abc"] * 10)[0] == "x" * 900


def test_ids_that_numpy_would_change():
    with pytest.raises(ValueError, match=r"sample_ids: .*NUL"):
        id_array(["a", "a\0"])
    kept = ["", "ünï", "a\0b", "\udcff"]
    assert id_array(kept).tolist() == kept
    assert np.array_equal(id_array([]), np.array([]))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_that_an_editor_saved(tmp_path, encoding):
    plan = fmn.FusionPlan(((0, 0.5),), 3, 1, (0.5, 0.75))
    plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes((tmp_path / "plan.json").read_text().replace("\n", "\r\n").encode(encoding))
    assert fmn.FusionPlan.load(tmp_path / "plan.json") == plan
