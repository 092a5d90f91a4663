"""Open .npy and .npz files. What a header promises is compared with the size of the file first. NumPy only."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .. import _files
from .._files import AnyPath

NPY = "an .npy file of numbers"
EXPANSION = 1032  # most bytes that deflate makes of one
MOST_MAPPED = 64  # files of a folder that may be mapped at once: each mapping holds a descriptor


def open_npy(path: AnyPath) -> np.memmap[Any, Any]:
    """Open an .npy file, memory-mapped."""
    with _files.reading(path, NPY) as file:
        shape, fortran, dtype = _header(file)
        offset, size = file.tell(), file.seek(0, 2)
        _check_size(shape, dtype, size - offset, exact=False)
        return np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")


def load_npz(path: AnyPath, names: Sequence[str]) -> tuple[NDArray[Any], str]:
    """Load the first of the named arrays that an .npz file contains, and return its name too."""
    with _files.reading(path, "an .npz file of arrays") as file, zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for name in names:
            if name in members:
                return _member(archive, members[name]), name
        raise ValueError(f"{path}: expected an array named {' or '.join(map(repr, names))}, found {list(members)}")


def npz_names(path: AnyPath) -> list[str]:
    """List the names of the arrays in an .npz file."""
    with _files.reading(path, "an .npz file of arrays") as file, zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not known or info.file_size > EXPANSION * info.compress_size + EXPANSION:
        raise ValueError(f"{info.filename}: its {info.compress_size} bytes cannot hold an array of {info.file_size}")
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
        _check_size(shape, dtype, info.file_size - file.tell(), exact=True)
    with archive.open(info) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # at the end, the checksum is compared
        return np.asarray(array)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array, and the file at its first byte."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except MemoryError:  # of the parser, for a header of some kilobytes
        raise ValueError("its header cannot be parsed") from None
    if dtype.hasobject:
        raise ValueError("it contains objects")
    return shape, fortran, dtype


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], size: int, exact: bool) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > size or (exact and needed < size):
        raise ValueError(f"shape {shape} of {dtype} needs {needed} bytes, and {size} are there")


class EpochFiles(Sequence[NDArray[Any]]):
    """Arrays of several .npy files, each opened when it is read.

    Attributes
    ----------
    paths : list of Path
    """

    def __init__(self, paths: Sequence[AnyPath]) -> None:
        self.paths: list[Path] = [_files.absolute(path) for path in paths]
        for path in self.paths:
            _check_numbers(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, epoch: Any) -> Any:
        if isinstance(epoch, slice):
            return [self[i] for i in range(*epoch.indices(len(self)))]
        array = open_npy(self.paths[epoch])
        if len(self) > MOST_MAPPED:
            array = np.array(array, subok=True)  # still an np.memmap, to tell its file's name
            array.filename = self.paths[epoch]
        return array


def _check_numbers(path: Path) -> None:
    with _files.reading(path, NPY):
        dtype = open_npy(path).dtype
        if dtype.kind not in "biuf":
            raise ValueError(f"dtype {dtype}")
