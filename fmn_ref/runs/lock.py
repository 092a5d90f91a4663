"""RunLock: the right of one process to write in a run folder; `sole_user`, for folders that processes share."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from .._files import is_open_at

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunLock:
    """A locked `.lock` file in a run folder; `RunLock.of` makes or shares it.

    All holders in a process share one lock per folder: a notebook may make a second Recorder, and `CorrectnessHistory`
    notices if both write. The lock ends with the last reference to it, or with the process, a kill included. A forked
    child does not have it. Readers need none.
    """

    _of_process: ClassVar[weakref.WeakValueDictionary[Path, RunLock]] = weakref.WeakValueDictionary()
    _mutex: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor, self._owner = path, _lock_file(path), os.getpid()
        self.turn = threading.RLock()  # held while something is checked and written: holders may be threads
        weakref.finalize(self, _unlock, path, self._descriptor, self._owner)

    @classmethod
    def of(cls, folder: Path) -> RunLock:
        """Lock a folder for this process; ValueError if another process has it."""
        path = folder.resolve() / ".lock"
        with cls._mutex:
            lock = cls._of_process.get(path)
            if lock is None or not lock.valid:
                lock = cls._of_process[path] = cls(path)
            return lock

    @property
    def valid(self) -> bool:
        """False in a forked child, and if the folder was deleted since."""
        return self._owner == os.getpid() and (self._descriptor < 0 or is_open_at(self._descriptor, self.path))

    @classmethod
    def forget(cls) -> None:
        """Close the files that a forked child inherited: the lock would live as long as the child."""
        for lock in cls._of_process.values():
            if lock._descriptor >= 0:
                os.close(lock._descriptor)
        cls._of_process, cls._mutex = weakref.WeakValueDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RunLock.forget)


def _lock_file(path: Path) -> int:
    """Open and lock the file; return its descriptor, or -1 where nothing can be locked."""
    if fcntl is None:
        return -1
    while True:
        try:
            descriptor = _opened(path)
        except OSError as error:
            if error.errno in _NO_PERMISSION:  # a folder to read from: whatever writes there fails by itself
                return -1
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _warn(path, error)
                return descriptor
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            hint = "of the processes of a distributed job, one records"
            raise ValueError(f"run_dir: {owner} writes in {path.parent}; a run has one writer: {hint}") from None
        if is_open_at(descriptor, path):
            with contextlib.suppress(OSError):  # a full disk; the text only serves the message above
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
            return descriptor
        os.close(descriptor)  # its holder deleted the file while we opened it: try again


def _warn(path: Path, error: OSError) -> None:
    """Tell of a file system without locks."""
    import logging  # slow to import

    text = "%s: %s; nothing keeps a second process from writing here"
    logging.getLogger(__name__).warning(text, path, error.strerror)


def _opened(path: Path) -> int:
    """Descriptor of a regular file; links are not followed, and a FIFO does not block."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP):
            raise
    raise ValueError(f"{path}: expected a regular file, the lock of the run; remove what is there")


def _unlock(path: Path, descriptor: int, owner: int) -> None:
    if owner != os.getpid() or descriptor < 0:
        return
    try:
        if is_open_at(descriptor, path):  # not the lock of another process in a folder of the same name
            with contextlib.suppress(OSError):
                os.unlink(path)
    finally:  # an interrupt may come in between
        os.close(descriptor)


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Wait until nobody else is in this `with` for the folder, such as a cache that several trainings share.

    Nothing waits where the system cannot lock files, or where this process may not write.
    """
    path, owner = folder / ".lock", os.getpid()
    descriptor = _waited_for(path)
    try:
        yield
    finally:
        _unlock(path, descriptor, owner)


def _waited_for(path: Path) -> int:
    while fcntl is not None:
        try:
            descriptor = _opened(path)
        except OSError as error:
            if error.errno in _NO_PERMISSION:
                break
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            _warn(path, error)
        if is_open_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its holder deleted the file
    return -1
