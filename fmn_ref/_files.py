"""Atomic writing of files, JSON files with a format name, and the pages of memory-mapped files.

A file is written under a temporary name in the same folder, synced, renamed, and the folder is synced: it is never
half-written. Every room may use this file; it imports none of them.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


def write_atomic(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Call `write(file)` on a temporary file and move it to `path`; on any error `path` is unchanged."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], ending: str = "") -> Iterator[Path]:
    """Yield a temporary name to write to, then move it to `path`; on any error `path` is unchanged.

    The name is fixed, so that the next process overwrites the file of a killed one.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist")
    temporary = target.with_name(f".{target.name}.tmp{ending}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(target)  # the error of a full disk has no file name
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power loss. Does nothing on Windows: it cannot open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write an indented JSON file."""
    write_atomic(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def read_json(path: str | os.PathLike[str], format: str, newest: int = 1) -> dict[str, Any]:
    """Read a JSON object of the format, of version 1 to `newest`; a ValueError names a file that is none."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a {format} file: {error}") from None
    if not isinstance(content, dict) or content.get("format") != format:
        raise ValueError(f"{path}: not a {format} file")
    if content.get("version") not in range(1, newest + 1):
        raise ValueError(f"{path}: {format} version {content.get('version')!r} is not known to this release")
    return content


def mapping(a: Any) -> mmap.mmap | None:
    """The file mapping behind an np.memmap or a view of one.

    None for other arrays, and for a copy-on-write map: its pages hold data that is not in the file.
    """
    found = None
    while isinstance(a, np.ndarray):
        if isinstance(a, np.memmap):
            found = a
        a = a.base
    return a if isinstance(a, mmap.mmap) and found is not None and found.mode != "c" else None


def drop_pages(mapped: mmap.mmap | None) -> None:
    """Release mapped pages from this process; they stay in the system's cache."""
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def own_read_ahead(mapped: mmap.mmap | None) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Yield a function that makes the system read rows of a mapped matrix in the background.

    The system's own read-ahead is off meanwhile. It guesses wrong at the end of each row and maps up to 2 MB for each,
    all resident at once.
    """
    if mapped is None or not hasattr(mmap, "MADV_RANDOM"):
        yield lambda rows: None
        return
    first = np.frombuffer(mapped, np.uint8, 1).ctypes.data
    mapped.madvise(mmap.MADV_RANDOM)

    def will_need(rows: NDArray[Any]) -> None:
        if rows.size == 0 or rows.strides[1] != rows.itemsize:
            return
        for row in rows:
            begin = (row.ctypes.data - first) // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, begin, row.ctypes.data - first + row.nbytes - begin)

    try:
        yield will_need
    finally:
        mapped.madvise(mmap.MADV_NORMAL)
        drop_pages(mapped)
