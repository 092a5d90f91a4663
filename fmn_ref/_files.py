"""Files: atomic writing, guarded reading, JSON files with a format name, and the pages of memory-mapped files.

Writing. A file is written under a temporary name in the same folder, synced, renamed, and the folder is synced: it is
whole or absent. The temporary name is unpredictable, the file is created anew (a link in its place is not followed) and
locked while it is written. The next write of the same file deletes what killed writers left.

Reading. Only regular files are read, and any fault of a file is one ValueError with its name and the cause.

Every room may use this file; it imports none of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AnyPath = str | os.PathLike[str]
_DAY = 86_400.0  # seconds
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp[.\w]*", re.DOTALL)  # the name of the file is in the first group
_NO_LINKS, _NO_WAITING = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_CANNOT_SYNC = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def absolute(path: AnyPath) -> Path:
    """Return the path from the root, with the home for `~`: it leads to the same file whatever folder is current."""
    return Path(os.path.expanduser(path)).absolute()


# --- writing ---


def write_atomic(path: AnyPath, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write(file)` on a temporary file and move it to `path`; on any error `path` is unchanged."""
    with _replacement(path, "") as file:
        write(file)


@contextlib.contextmanager
def replacing(path: AnyPath, ending: str = "") -> Iterator[Path]:
    """Yield a temporary file's name to write to, then move it to `path`; on any error `path` is unchanged.

    The file is closed and not locked: HDF5 locks what it writes. So the caller holds the lock of the folder's run.

    Parameters
    ----------
    path : path
    ending : str
        How the temporary name ends after ".tmp": some writers choose the format by it.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    ValueError
        `path` is a folder, a device or anything else but a regular file.
    """
    with _replacement(path, ending) as file:
        file.close()
        yield Path(file.name)


@contextlib.contextmanager
def _replacement(path: AnyPath, ending: str) -> Iterator[IO[bytes]]:
    target = absolute(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {target.parent} does not exist")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path}: expected a regular file to replace; something else has this name")
    try:
        remove_leftovers(target.parent, target.name)
        with _locked_new(target, ending) as file:
            try:
                yield file
                if not file.closed:
                    file.flush()
                with open(file.name, "r+b") as written:  # whoever wrote it
                    os.fsync(written.fileno())
                if fcntl is None:
                    file.close()  # Windows moves no open file
                os.replace(file.name, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
        sync(target.parent)
    except OSError as error:
        known = None if error.filename is None else Path(str(error.filename))
        if known in (None, target.parent) or known.name.startswith(f".{target.name}."):
            error.filename = str(target)  # the error of a full disk has no file name
        raise


def _locked_new(target: Path, ending: str) -> IO[bytes]:
    """Create a file of an unpredictable name beside `target`, and lock it: see `remove_leftovers`."""
    while True:
        file = open(unpredictable(target, ending), "xb")  # noqa: SIM115 - the caller closes it
        if not try_lock(file.fileno(), wait=True) or is_open_at(file.fileno(), Path(file.name)):
            return file
        file.close()  # another process took it for a leftover before it was locked


def unpredictable(path: Path, ending: str = "") -> Path:
    """A new temporary name beside the path's, which nobody can have taken."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp{ending}")


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Delete the temporary files that killed writers left in `parent`: those for the file `name`, or all.

    A file that nobody has locked has no writer. Where files cannot be locked, one that is a day old has none. Folders
    of such names are checkpoints that are being deleted.
    """
    with contextlib.suppress(OSError):
        for found in filter(None, map(_TEMPORARY.fullmatch, os.listdir(parent))):
            if name in (None, found[1]):
                _remove_leftover(parent / found[0])


def _remove_leftover(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError, ValueError), opened(path, _NO_WAITING | _NO_LINKS) as file:
        free = try_lock(file.fileno())
        if free or (free is None and time.time() - path.stat().st_mtime > _DAY):
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if it is missing; it survives a power loss."""
    path.mkdir(parents=True, exist_ok=True)
    for above in path.parents:  # also of a folder that a killed process made and did not sync
        sync(above)


def sync_tree(path: Path) -> None:
    """Make a file, or a folder with all that is in it, survive a power loss, whoever wrote it."""
    for found in (path, *path.rglob("*"), path.parent):
        if found.is_file() or found.is_dir():
            sync(found)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power loss. Windows cannot sync folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            error.filename = str(path)
            raise


def try_lock(descriptor: int, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed.

    Returns
    -------
    bool or None
        False if another process has locked it; None if the system cannot lock it.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def is_open_at(descriptor: int, path: Path) -> bool:
    """Tell whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Write a file of this content."""
    write_atomic(path, lambda file: file.write(content))


def write_json(path: AnyPath, content: Any) -> None:
    """Write an indented JSON file."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def flush_output() -> None:
    """Write what was printed. If that fails, drop the rest: the interpreter would fail on it once more at its end.

    There may be no standard output (pythonw, a service, `1>&-`): then what is printed goes nowhere.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


# --- reading ---


def opened(path: AnyPath, flags: int = _NO_WAITING) -> IO[bytes]:
    """Open a regular file to read. ValueError for anything else: reading a FIFO or a device could wait for ever."""
    try:
        file = open(absolute(path), "rb", opener=lambda p, reading: os.open(p, reading | flags))  # noqa: SIM115
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    except IsADirectoryError:
        pass
    raise ValueError(f"{path}: expected a regular file")


@contextlib.contextmanager
def naming(path: AnyPath, what: str) -> Iterator[None]:
    """Turn any error into a ValueError of one line: the file's name, "not `what`", and the cause.

    A MemoryError stays one, and says how much was needed. Warnings pass. That the file is gone, or that the process may
    open no more files, is no damage: it stays an OSError.
    """
    try:
        yield
    except Warning:
        raise
    except Exception as error:
        text, unmapped = cause(error), getattr(error, "errno", None) == errno.ENOMEM
        for limit in (errno.EMFILE, errno.ENFILE):
            if os.strerror(limit) in text:  # torch makes a RuntimeError of it
                raise OSError(limit, os.strerror(limit), str(absolute(path))) from error
        if _is_about(error, path) and not unmapped:
            raise
        if unmapped or isinstance(error, MemoryError):
            needed = f"reading {os.path.getsize(absolute(path))} bytes needs more memory"
            raise MemoryError(f"{path}: {needed if unmapped or not str(error) else text}") from error
        raise ValueError(text if text.startswith(str(path)) else f"{path}: not {what}: {text}") from error


@contextlib.contextmanager
def reading(path: AnyPath, what: str) -> Iterator[IO[bytes]]:
    """Open a regular file to read; an error while it is read is that of `naming`.

    Raises
    ------
    OSError
        The file does not exist, or may not be read.
    ValueError, MemoryError
    """
    with opened(path) as file, naming(path, what):
        yield file


def _is_about(error: BaseException, path: AnyPath) -> bool:
    """Tell whether the system names this file, or one below this folder, in an error."""
    name = error.filename if isinstance(error, OSError) else None
    return isinstance(name, (str, os.PathLike)) and absolute(name).is_relative_to(absolute(path))


def cause(error: BaseException) -> str:
    """The message of an error in one line, with the error's name where the message alone says little."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"missing {text}"  # of a dict in the file
    known = isinstance(error, (ValueError, TypeError, OSError, MemoryError, RuntimeError))
    return text if known and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def read_bytes(path: AnyPath) -> bytes:
    """Read a whole file."""
    with reading(path, "a readable file") as file:
        return file.read()


def read_json(path: AnyPath, format: str, newest: int = 1) -> dict[str, Any]:
    """Read a JSON object of the format, of version 1 to `newest`; a ValueError names a file that is none."""
    with reading(path, f"a {format} file") as file:
        content = json.loads(file.read())
        if not isinstance(content, dict) or content.get("format") != format:
            raise ValueError(f"{path}: not a {format} file")
        if content.get("version") not in range(1, newest + 1):
            raise ValueError(f"{path}: {format} version {content.get('version')!r} is not known to this release")
        return content


# --- pages of mapped files ---


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
