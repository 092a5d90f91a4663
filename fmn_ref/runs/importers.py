"""Read the records of other tools: cartography's training dynamics, mtoneva's example statistics, one file per epoch,
logits. No reader executes code from a file.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from . import standins
from .arrays import EpochFiles
from .pickles import scan
from .text import natural, read_lines

_MOST = 2.0**128 - 2.0**103  # what float32 rounds to infinity
Row = tuple[list[float], int]  # logits and label of a sample


class from_logits(Sequence[NDArray[np.float32]]):
    """Probabilities of logits: a sequence of float32 arrays, each computed when it is read.

    Parameters
    ----------
    logits : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
        Logits of any floating-point type, memory-mapped or in memory.

    Raises
    ------
    TypeError, ValueError
        When an epoch is read that is not floating-point, has another shape, contains NaN or positive infinity, or holds
        probabilities.

    Examples
    --------
    >>> from_logits([[[0.0, 0.0]]])[0]
    array([[0.5, 0.5]], dtype=float32)
    """

    def __init__(self, logits: Any) -> None:
        sequence = hasattr(logits, "__getitem__") and hasattr(logits, "__len__")
        if not sequence or isinstance(logits, Mapping) or getattr(logits, "shape", None) == ():
            raise TypeError(f"logits: expected an array or a sequence of arrays, got {type(logits).__name__}")
        self._logits, self.epochs = logits, getattr(logits, "epochs", ())

    def __len__(self) -> int:
        return len(self._logits)

    def __getitem__(self, epoch: Any) -> Any:
        return softmax(self._logits[epoch], f"logits[{epoch}]")


def softmax(logits: Any, name: str) -> NDArray[np.float32]:
    """Convert (n_samples, n_classes) logits to probabilities; the largest logit of each row must be finite."""
    z, file = _check.array(logits, name), _check.of_file(logits)
    if z.dtype.kind != "f" or z.ndim != 2 or 0 in z.shape:
        got = f"shape {z.shape}, dtype {z.dtype}"
        raise ValueError(f"{name}{file}: expected floating-point (n_samples, n_classes), got {got}")
    with np.errstate(over="ignore"):
        z = z.astype(np.float32)
        highest = z.max(1, keepdims=True)
        bad = ~np.isfinite(highest)
        if bad.any():
            row, value = int(bad.argmax()), highest[bad][0]
            raise ValueError(f"{name}, row {row}{file}: expected finite numbers, the highest is {value}")
        if (highest <= 1).all() and z.min() >= 0 and (z % 1).any() and _check.sums_to_one(z):  # 0 and 1 may be logits
            raise ValueError(f"{name}{file}: expected logits or log-probabilities, got probabilities")
        p = np.exp(z - highest)
    return np.asarray(p / p.sum(1, keepdims=True))


def epoch_files(folder: str | Path, pattern: str = "*.npy") -> Sequence[NDArray[Any]]:
    """Find one .npy file per epoch; each is opened when it is read.

    Parameters
    ----------
    folder : path
    pattern : str
        Names of the files; default: all .npy files. They are ordered by the numbers in them: "epoch_2" comes before
        "epoch_10". Nothing but numbers may differ, so that labels or a copy are not counted as an epoch. If several
        numbers differ, all must give one order: "acc0.91-epoch0" is refused if accuracies fall, and so are two seeds.

    Returns
    -------
    sequence of arrays
        Memory-mapped. While 64 of them are in use, others are read into memory: each mapping holds a descriptor.

    Raises
    ------
    FileNotFoundError
        No file matches.
    ValueError
        A file is not an array of numbers, or is not named like the others; the message names the file.
    """
    return EpochFiles(_in_order(folder, pattern))


def _in_order(folder: str | Path, pattern: str) -> list[Path]:
    """List one file per epoch, ordered by the numbers in their names; FileNotFoundError where no name matches.

    A ValueError names a file whose name differs from the others in more than numbers, or has the same numbers.
    """
    paths = sorted(_files.absolute(folder).glob(pattern), key=lambda path: natural(path.name))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {pattern} there")
    frames = [re.sub(r"\d+", "\0", path.name) for path in paths]  # no name holds \0
    usual = Counter(frames).most_common(1)[0][0]
    for path, frame in zip(paths, frames, strict=True):
        if frame != usual:
            like = paths[frames.index(usual)].name
            raise ValueError(f"{path}: not an epoch like {like}? Names may differ in numbers only; move or rename it")
    for before, path in pairwise(paths):
        if natural(before.name) == natural(path.name):
            raise ValueError(f"{path}: the same epoch as {before.name}")
    _check_order(paths)
    return paths


def _check_order(paths: list[Path]) -> None:
    """Refuse names whose numbers give several orders: an accuracy before the epoch, or the epochs of several seeds."""
    numbers = [[int(n) for n in re.findall(r"\d+", path.name)] for path in paths]
    steps = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(numbers)]
    counted = any(min(column) > 0 for column in zip(*steps, strict=True))
    for (before, path), step in zip(pairwise(paths), steps, strict=True):
        if not counted or min(step) < 0:
            hint = "rename the files, or choose some by `pattern`, such that one number counts the epochs"
            raise ValueError(
                f"{path}: an epoch after {before.name}? The numbers in their names give two orders; {hint}"
            )


def from_cartography(folder: str | Path) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Read the training dynamics that dataset cartography writes: dynamics_epoch_0.jsonl and so on.

    Each line is {"guid": ..., "logits_epoch_E": [...], "gold": class} (Swayamdipta et al. 2020).

    Returns
    -------
    logits : (n_epochs, n_samples, n_classes) float32
    labels : (n_samples,) int64
    guids : list of str
        Sample ids, in the order of the first file.

    Raises
    ------
    FileNotFoundError
        The folder contains no dynamics.
    ValueError
        A malformed line, values of other types, an epoch that differs from the file's name; samples, labels or numbers
        of classes that differ between files. The message names the file and the line or sample.
    """
    paths = _in_order(folder, "dynamics_epoch_*.jsonl")
    epochs: list[dict[str, Row]] = []
    for path in paths:
        epochs.append(_read_dynamics(path))
        if epochs[-1].keys() != epochs[0].keys() or not epochs[-1]:
            raise ValueError(f"{path}: expected the samples of {paths[0].name}, and at least one")
    first = epochs[0]
    n_classes = len(next(iter(first.values()))[0])
    for path, rows in zip(paths, epochs, strict=True):
        for guid, (logits, gold) in rows.items():
            if len(logits) != n_classes or gold != first[guid][1]:
                raise ValueError(f"{path}: sample {guid!r} has {len(logits)} logits and label {gold}, unlike before")
    dynamics = np.array([[rows[guid][0] for guid in first] for rows in epochs], np.float32)
    name = f"{paths[0]}: gold"
    labels = _check.labels([gold for _, gold in first.values()], n_classes=n_classes, name=name)
    return dynamics, labels, list(first)


def _read_dynamics(path: Path) -> dict[str, Row]:
    """Logits and label of each sample at one epoch."""
    name = re.fullmatch(r"dynamics_epoch_(\d+)\.jsonl", path.name)
    if name is None:
        raise ValueError(f"{path}: expected a name like dynamics_epoch_0.jsonl")
    rows: dict[str, Row] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            guid, row = _row_of(json.loads(line), f"logits_epoch_{int(name[1])}")
        except Exception as error:  # a line from a stranger may fail in any way
            reason = f"missing {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}:{number}: not a line of training dynamics ({reason})") from None
        if guid in rows:
            raise ValueError(f"{path}:{number}: sample {guid!r} is there twice")
        rows[guid] = row
    return rows


def _row_of(line: Any, key: str) -> tuple[str, Row]:
    """Sample id, logits and label; a TypeError or ValueError for other types than those that cartography writes."""
    guid, logits, gold = line["guid"], line[key], line["gold"]
    if type(guid) not in (str, int) or type(gold) is not int:
        raise TypeError(f"expected a string or an integer as guid, an integer as gold, got {guid!r:.40}, {gold!r:.40}")
    if not isinstance(logits, list) or not set(map(type, logits)) <= {int, float}:
        raise TypeError(f"{key}: expected a list of numbers, got {logits!r:.40}")
    if not all(-_MOST < v < _MOST or v == -np.inf for v in logits):  # no NaN; -inf masks a class
        raise ValueError(f"{key}: expected numbers that fit 32 bits, got {logits!r:.40}")
    return str(guid), (logits, gold)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of dicts, lists, tuples, strings and numbers (also NumPy's); refuses to import or call anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return standins.NumberType
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return standins.Number
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only plain containers and numbers are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside the file")


def from_toneva(path: str | Path) -> tuple[NDArray[np.bool_], list[int]]:
    """Read the statistics that mtoneva/example_forgetting pickles.

    The file contains {index: [losses, accuracies, margins]}, each a list over the presentations. The pickle is parsed
    but not executed.

    Returns
    -------
    correct : (n_epochs, n_samples) bool
    indices : list of int
        Indices of the samples, ascending.

    Raises
    ------
    ValueError
        Not such a file, or a pickle that contains anything but plain containers and numbers; the message names the file
        and the cause.
    """
    with _files.reading(path, "example statistics") as file:
        data = file.read()
        scan(data)
        content = _PlainUnpickler(io.BytesIO(data)).load()
        samples = {k: v for k, v in content.items() if isinstance(k, int) and not isinstance(k, bool)}
        indices = sorted(samples)
        correct = np.array([samples[i][1] for i in indices], np.float64)
        if correct.ndim != 2 or 0 in correct.shape or not np.isin(correct, (0, 1)).all():
            raise ValueError("expected the same number of accuracies, 0 or 1, for every sample")
        return np.ascontiguousarray(correct.T == 1), indices
