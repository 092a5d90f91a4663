"""Read text files in one way: byte-order marks, line ends, and bytes that are not text. NumPy only."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _files

_MARKS = (  # the mark of UTF-32 begins with that of UTF-16; no encoding: the bytes are UTF-8 already
    (codecs.BOM_UTF8, ""),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
BYTES = "surrogateescape"  # keeps bytes that are no UTF-8: encode what `read_ids` returns with this handler


def read_lines(path: str | Path) -> list[bytes]:
    r"""Lines of a text file, without their ends, in UTF-8.

    A byte-order mark tells the encoding and is dropped, also where files were joined. Without a mark the bytes stay as
    they are. A line ends with \n, \r\n or \r, and nowhere else.

    Raises
    ------
    ValueError
        The file contains NUL, or does not fit its byte-order mark. The message names the file.
    """
    raw = _files.read_bytes(path)
    mark, encoding = next(((m, e) for m, e in _MARKS if raw.startswith(m)), (b"", ""))
    try:
        raw = raw[len(mark) :].decode(encoding).encode() if encoding else raw[len(mark) :]
    except UnicodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from None
    if b"\0" in raw:
        raise ValueError(f"{path}: not a text file: NUL at byte {raw.index(0)}")
    return [line.removeprefix(codecs.BOM_UTF8) for line in raw.splitlines()]


def read_ids(path: str | Path) -> list[str]:
    """Sample ids, one per line."""
    return [line.decode("utf-8", BYTES) for line in read_lines(path)]


def id_array(sample_ids: list[str]) -> NDArray[Any]:
    """Sample ids as an array of text. NumPy pads every id to the longest one, and drops NUL at the end.

    Raises
    ------
    ValueError
        One long id would make the array much larger than all ids together; an id ends in NUL.
    """
    longest = max(map(len, sample_ids), default=0)
    if longest > 1000 and longest * len(sample_ids) > 64 * sum(map(len, sample_ids)):
        raise ValueError(f"sample_ids: expected ids of similar length, got one of {longest} characters")
    if any(i.endswith("\0") for i in sample_ids):
        raise ValueError("sample_ids: expected ids that do not end in NUL")
    return np.array(sample_ids)


def natural(name: str) -> list[Any]:
    """Key that sorts names by the numbers in them: "epoch_2" comes before "epoch_10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
