"""Open .npy and .npz files. What a header promises is compared with the size of the file first. NumPy only."""

from __future__ import annotations

import math
import re
import weakref
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _files
from .._files import AnyPath

NPY = "an .npy file of numbers"
EXPANSION = 1032  # most bytes that deflate makes of one
MOST_MAPPED = 64  # files of a folder that may be mapped at once: each mapping holds a descriptor


class Header(NamedTuple):
    """Content of the header of an .npy file, and the offset of the array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    def map(self, file: IO[bytes]) -> np.memmap[Any, Any]:
        return np.memmap(file, self.dtype, "r", self.offset, self.shape, "F" if self.fortran else "C")


def open_npy(path: AnyPath) -> np.memmap[Any, Any]:
    """Open an .npy file, memory-mapped."""
    with _files.reading(path, NPY) as file:
        return _checked_header(file).map(file)


def _checked_header(file: IO[bytes]) -> Header:
    header = _header(file)
    _check_size(header, file.seek(0, 2) - header.offset, exact=False)
    return header


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
        header = _header(file)
        _check_size(header, info.file_size - header.offset, exact=True)
    with archive.open(info) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # at the end, the checksum is compared
        return np.asarray(array)


def _header(file: IO[bytes]) -> Header:
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
    return Header(shape, fortran, dtype, file.tell())


def _check_size(header: Header, size: int, exact: bool) -> None:
    needed = math.prod(header.shape) * header.dtype.itemsize
    if min(header.shape, default=0) < 0 or needed > size or (exact and needed < size):
        raise ValueError(f"shape {header.shape} of {header.dtype} needs {needed} bytes, and {size} are there")


def write_epochs(
    path: AnyPath, epochs: Iterable[NDArray[Any]], others: Callable[[], Mapping[str, Any]]
) -> tuple[int, ...]:
    """Write arrays of equal shape as one, with one in memory at a time.

    Parameters
    ----------
    path : path
        An .npy file; or an .npz file, in which the array is called "probs".
    epochs : sized iterable of arrays
    others : callable() -> dict of arrays
        For an .npz file: what else to store. It is called after the last epoch.

    Returns
    -------
    tuple of int
        Shape of what was written.

    Raises
    ------
    ValueError
        Another suffix; there is no epoch.
    """
    suffix = _files.absolute(path).suffix
    if suffix not in (".npy", ".npz"):
        raise ValueError(f"output: expected a name ending in .npy or .npz, got {str(path)!r}")
    shape: tuple[int, ...] = ()

    def write(file: IO[bytes]) -> None:
        nonlocal shape
        if suffix == ".npy":
            shape = _write_npy(file, epochs)
            return
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            with archive.open("probs.npy", "w", force_zip64=True) as member:
                shape = _write_npy(member, epochs)
            for name, value in others().items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)

    _files.write_atomic(path, write)
    return shape


def _write_npy(file: IO[bytes], epochs: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = ()
    for epoch in epochs:
        if not shape:
            shape = (len(epochs), *epoch.shape)
            header = {"descr": np.lib.format.dtype_to_descr(epoch.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(epoch).data)
    if not shape:
        raise ValueError("epochs: expected at least one")
    return shape


def differing_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Number in each name, if the names differ in one number and in nothing else; else empty."""
    if len({re.sub(r"\d+", "\0", name) for name in names}) != 1:  # no name holds \0
        return ()
    numbers = zip(*(re.findall(r"\d+", name) for name in names), strict=True)
    differ = [column for column in numbers if len(set(column)) > 1]
    return tuple(map(int, differ[0])) if len(differ) == 1 else ()


class EpochFiles(Sequence[NDArray[Any]]):
    """Arrays of several .npy files, each opened when it is read.

    A mapped file holds a descriptor. While MOST_MAPPED arrays are in use, others are read into memory.

    Attributes
    ----------
    paths : list of Path
    """

    def __init__(self, paths: Sequence[AnyPath]) -> None:
        self.paths: list[Path] = [_files.absolute(path) for path in paths]
        self._headers = [_header_of_numbers(path) for path in self.paths]
        self._mapped: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def epochs(self) -> tuple[int, ...]:
        """Number in the name of each file, if the names differ in one number; else empty."""
        return differing_numbers([path.name for path in self.paths])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, epoch: Any) -> Any:
        if isinstance(epoch, slice):
            return [self[i] for i in range(*epoch.indices(len(self)))]
        with _files.reading(self.paths[epoch], NPY) as file:
            array = self._headers[epoch].map(file)
        if len(self._mapped) < MOST_MAPPED:
            self._mapped.add(_files.mapping(array))
            return array
        copied = np.array(array, subok=True)  # still an np.memmap, to tell its file's name
        copied.filename = array.filename
        return copied


def _header_of_numbers(path: Path) -> Header:
    with _files.reading(path, NPY) as file:
        header = _checked_header(file)
        if header.dtype.kind not in "biuf":
            raise ValueError(f"dtype {header.dtype}")
        return header
