"""TargetFolder: cached soft targets on disk, which one process at a time checks and completes."""

from __future__ import annotations

import contextlib
import logging
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _files
from ..runs.arrays import open_npy
from ..runs.folder import AnyPath, check_same
from ..runs.lock import sole_user
from . import distributed

logger = logging.getLogger(__name__)
FORMAT, VERSION = "fmn_ref.targets", 2
Arrays = dict[str, NDArray[Any]]


class TargetFolder(contextlib.ExitStack):
    """Folder of arrays with a checksum for each; a context manager that others wait to enter.

    All processes of a distributed job enter it together. Then rank zero reads and writes, and all may call `map`.

    targets.json says what the targets depend on and describes each file. A file that does not fit its description is
    made again. So are those of version 1, which has no checksums.

    Parameters
    ----------
    path : path
        Created if missing.
    identity : dict
        What the targets depend on. A folder of another identity is refused.
    first_identity : dict
        The same as version 1 stored it.

    Raises
    ------
    ValueError
        On entering: the folder holds targets of another identity, or its targets.json is damaged.
    """

    def __init__(self, path: AnyPath, identity: dict[str, Any], first_identity: dict[str, Any]) -> None:
        super().__init__()
        self.path, self._identity, self._first_identity = _files.absolute(path), identity, first_identity
        self._files: dict[str, Any] = {}
        self.n_classes = 0

    def __enter__(self) -> TargetFolder:
        try:
            distributed.on_rank_zero(self._open)
        except BaseException:
            self.close()
            raise
        return self

    def _open(self) -> None:
        _files.make_folder(self.path)
        self.enter_context(sole_user(self.path))
        self._read()

    def _read(self) -> None:
        """Read targets.json, if there is one."""
        path = self.path / "targets.json"
        if path.exists():
            found = _files.read_json(path, FORMAT, VERSION)
            identity = self._first_identity if found["version"] == 1 else self._identity
            check_same(f"the targets in {self.path} were", {key: found.get(key) for key in identity}, identity)
            if found["version"] == VERSION:
                self._files, self.n_classes = _checked(found, path)
                return
            logger.warning("%s: of an earlier version, without checksums; the targets are made again", path)

    def _write(self) -> None:
        content = {
            "format": FORMAT,
            "version": VERSION,
            **self._identity,
            "n_classes": self.n_classes,
            "files": self._files,
        }
        _files.write_json(self.path / "targets.json", content)

    def load(self, names: list[str]) -> list[NDArray[Any]] | None:
        """Memory-map stored arrays after a look at their checksums; None if one is missing or damaged."""
        found = []
        for name in names:
            if name not in self._files or not (self.path / name).is_file():
                return None
            try:
                found.append(self.map(name))
                damaged = _description(found[-1]) != self._files[name]
            except Exception:  # a file that is no array may raise any
                damaged = True
            if damaged:
                logger.warning("%s: damaged; the soft targets are made again", self.path / name)
                return None
        return found

    def map(self, name: str) -> NDArray[Any]:
        """Memory-map a stored array."""
        return open_npy(self.path / name)

    def save(self, arrays: Arrays, n_classes: int) -> None:
        """Store arrays under their names, then their checksums and the teacher's number of classes."""
        self.n_classes = n_classes
        for name, array in arrays.items():
            if (self.path / name).is_symlink():
                (self.path / name).unlink()
            _files.write_atomic(self.path / name, partial(np.save, arr=array))
            self._files[name] = _description(array)
        self._write()


def _checked(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], int]:
    files, n_classes = content.get("files"), content.get("n_classes")
    if not isinstance(files, dict) or not isinstance(n_classes, int):
        raise ValueError(f"{path}: expected files and n_classes; delete the folder")
    return files, n_classes


def _description(array: NDArray[Any]) -> dict[str, Any]:
    checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": checksum}
