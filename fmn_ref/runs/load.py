"""Arrays, labels and correctness from files that anybody wrote: .npy, .npz, .fmnh and run directories. What is large is
memory-mapped."""

from __future__ import annotations

import math
import os
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import _check, _files
from ..metrics.curves import correctness
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from . import importers

_MAPPED_FROM = 1 << 26  # bytes of an .npz member


def load(path: str, *names: str) -> NDArray[Any]:
    """An array of a file: .npy (memory-mapped), or the first of `names` in an .npz."""
    a: NDArray[Any] | CorrectnessHistory = load_named(path, *names)[0]
    if isinstance(a, CorrectnessHistory):
        raise ValueError(f"{path}: holds correctness, not {names[0]}; save what run.probabilities gives as .npy")
    return a


def load_epochs(path: str, logits: bool = False) -> Any:
    """Probabilities of all epochs: an array, or a folder with a file per epoch."""
    folder = Path(path).is_dir() and not (Path(path) / "history.fmnh").is_file()
    epochs = importers.epoch_files(path) if folder else load(path, "probs", *(["logits", "scores"] if logits else []))
    return importers.from_logits(epochs) if logits else epochs


def load_named(path: str, *names: str, verify: bool = True) -> tuple[Any, str]:
    """The array, and the name it had in an .npz. A run directory stands for its history."""
    if (Path(path) / "history.fmnh").is_file():
        path = str(Path(path) / "history.fmnh")
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path}: a folder, and no run there (history.fmnh is missing)")
    try:
        if path.endswith(".fmnh"):
            return CorrectnessHistory.open(path, verify=verify), ""
        if not path.endswith(".npz"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                array.close()
                raise ValueError("an .npz file; its name must say so")
            return array, ""
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            for name in names:
                if name in content:
                    return _member(path, content, name), name
            raise ValueError(f"expected an array named {' or '.join(map(repr, names))}, found {list(content)}")
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error)
        if "pickle" in reason:  # NumPy suggests to unpickle it
            reason = "not an .npy file of numbers"
        raise ValueError(reason if path in reason else f"{path}: {reason}") from None


def load_labels(path: str | None, beside: str, option: str = "--labels") -> NDArray[np.int64]:
    """Labels from their own file, or from the .npz that holds the probabilities."""
    if path is None and not beside.endswith(".npz"):
        raise ValueError(f"{option}: needed, since {beside} is not an .npz with 'labels' in it")
    return _check.labels(load(path or beside, "labels"))


def has_labels(path: str) -> bool:
    if not path.endswith(".npz"):
        return False
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
        return "labels" in content


def load_correct(path: str, labels: str | None, verify: bool = True) -> Any:
    """Correctness from a history, a matrix of 0 and 1, or predictions or scores with labels."""
    a, name = load_named(path, "correct", "predictions", "probs", "scores", verify=verify)
    if isinstance(a, CorrectnessHistory):
        if labels is not None and a.digest not in (NO_LABELS, labels_digest(load_labels(labels, path))):
            raise ValueError(f"{labels}: not the labels that {path} was recorded with")
        return a
    without_labels = labels is None and not path.endswith(".npz") and a.dtype.kind != "f"
    if name == "correct" or without_labels:
        return _check.correct_matrix(a, path)
    return correctness_of(a, load_labels(labels, path))


def correctness_of(a: Any, labels: NDArray[np.int64]) -> CorrectnessHistory:
    """Of predictions (n_epochs, n_samples) or scores (n_epochs, n_samples, n_classes).

    One epoch at a time, as bits, so that a memory-mapped file is never held whole.
    """
    if a.ndim != {"f": 3, "i": 2, "u": 2}.get(a.dtype.kind) or len(a) == 0:
        expected = "predictions (n_epochs, n_samples), or scores (n_epochs, n_samples, n_classes)"
        raise ValueError(f"expected {expected}, got shape {a.shape}, dtype {a.dtype}")
    history = CorrectnessHistory(len(labels))
    mapping = _files.mapping(a)
    for i, epoch in enumerate(tqdm(a, "reading", disable=None)):
        try:
            history.append(correctness(epoch, labels))
        except ValueError as error:
            raise ValueError(f"epoch {i}: {error}") from None
        _files.drop_pages(mapping)
    return history


def _member(path: str, content: Any, name: str) -> NDArray[Any]:
    """An array of an .npz; a large one memory-mapped, where it lies or, if compressed, from a temporary file.

    Its CRC-32 is checked, which reads it once.
    """
    if f"{name}.npy" not in content.zip.namelist() or content.zip.getinfo(f"{name}.npy").file_size < _MAPPED_FROM:
        return np.asarray(content[name])
    info = content.zip.getinfo(f"{name}.npy")
    file: IO[bytes]
    if info.compress_type == zipfile.ZIP_STORED:
        with content.zip.open(info) as stored:
            while stored.read(1 << 20):
                pass
        file = open(path, "rb")  # noqa: SIM115
        file.seek(info.header_offset + 26)  # of the local header: lengths of the name and the extra field, then both
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        with content.zip.open(info) as packed:
            shutil.copyfileobj(packed, file)
        file.seek(0)
    with file:
        begin = file.tell()
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        size = file.tell() - begin + dtype.itemsize * math.prod(shape)
        if dtype.hasobject or size != info.file_size:
            raise ValueError(f"{name}: not an array of numbers as long as its header says")
        order: Any = "F" if fortran_order else "C"
        return np.memmap(file, dtype, "r", file.tell(), shape, order)
