"""Read arrays, labels and correctness from .npy, .npz and .fmnh files and from run directories."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files, _stderr
from ..metrics.curves import correctness
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from . import arrays, importers
from .content import content_of
from .folder import DOOR, RunFolder

# Options of the command line that are files.
INPUTS = ["file", "run_dir", "path", "plan", "probs", "labels", "correct", "ids", "images", "comparison", "class_names"]
INPUTS += ["select", "select_labels", "test", "test_labels"]
OUTPUTS = ["output", "per_sample"]


def check_outputs(options: Mapping[str, Any]) -> None:
    """Refuse an output of a command that is one of its inputs, an epoch of a folder, or a file of any run.

    `fuse` may replace the plan of a run.
    """
    given = [options[name] for name in INPUTS if options.get(name)]
    paths = [path for value in given for path in (value if isinstance(value, list) else [value])]
    sources = [_files.absolute(path).resolve() for path in paths]
    for output in filter(None, map(options.get, OUTPUTS)):
        path, run = _files.absolute(output).resolve(), RunFolder.of(output)
        if run is not None and path.name == run.plan.name and options.get("command") == "fuse":
            run = None
        for source in sources:
            beside_epochs = path.suffix == ".npy" and path.parent == source
            beside_epochs |= path.suffix == ".jsonl" and source in path.parents
            if path == source or beside_epochs or (run is not None and run.path == source):
                raise ValueError(f"{output}: is one of the files to read; choose another output name")
        if run is not None:
            raise ValueError(f"{output}: is a file of the run in {run.path}; choose another output name")


# Names of arguments in messages, and the options of the command line from which they may have been read.
_OPTIONS = {
    "probs": ("probs",),
    "select_probs": ("select",),
    "test_probs": ("test",),
    "logits": ("probs",),
    "labels": ("labels", "select_labels", "probs", "select", "file"),
    "test_labels": ("test_labels", "test"),
    "correct": ("correct", "file"),
    "images": ("images",),
    "class_names": ("class_names",),
    "sample_ids": ("path",),
}


# What an option reads, in words and as `content_of` tells it; the others read text or folders of many files.
_ARRAYS, _KINDS = "arrays (.npy or .npz)", {"npy", "npz"}
_HISTORY = f"a run directory, a history (.fmnh) or {_ARRAYS}", {*_KINDS, "correctness", "history"}
_READS: dict[str, tuple[str, set[str]]] = {"file": _HISTORY, "correct": _HISTORY}
_READS |= dict.fromkeys(("probs", "select", "test"), (_ARRAYS, _KINDS))
_READS |= {name: (_ARRAYS, {*_KINDS, "correctness"}) for name in ("labels", "select_labels", "test_labels", "images")}
_READS |= {"plan": ("a plan that `fmn-ref fuse` wrote", {"plan"}), "run_dir": ("a run directory", set())}


def error_line(error: Exception, options: Mapping[str, Any]) -> str:
    """One line about an error, with its file; where the command cannot read such a file, what it is."""
    line = _line_with_file(error, options)
    outputs = [options.get(name) for name in OUTPUTS]
    for option, (expected, kinds) in _READS.items():
        file = options.get(option)
        content = content_of(file) if file and file not in outputs and line.startswith(f"{file}: ") else None
        if content is not None and content.kind not in kinds:
            return f"{file}: expected {expected}, got {content.words}"
    return line


def _line_with_file(error: Exception, options: Mapping[str, Any]) -> str:
    line = " ".join(str(error).splitlines())
    if isinstance(error, OSError) and error.filename is not None and error.strerror and line.startswith("[Errno"):
        given = [str(v) for v in options.values() if isinstance(v, str) and _files.absolute(v) == Path(error.filename)]
        return f"{(given or [error.filename])[0]}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    if "softmax" in line and options.get("logits") is False:
        line += " (--logits does it)"
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError, FloatingPointError)):
        return f"{type(error).__name__}: {line}"
    name = re.match(r"(\w+)[:\[, ]", line)
    for option in _OPTIONS.get(name[1], ()) if name else ():
        if file := options.get(option):
            file = " ".join(file) if isinstance(file, list) else file
            return line if str(file) in line else f"{file}: {line}"
    return line


def load_array(path: str, *names: str) -> NDArray[Any]:
    """Load a .npy file, memory-mapped, or the first of `names` that an .npz file contains."""
    a: NDArray[Any] | CorrectnessHistory = load_named(path, *names)[0]
    if isinstance(a, CorrectnessHistory):
        raise ValueError(f"{path}: holds correctness, not {names[0]}; `fmn-ref predict` writes a run's probabilities")
    return a


def load_epochs(path: str, logits: bool = False) -> Any:
    """Load the probabilities of all epochs: one array, or a folder with one file per epoch."""
    folder = RunFolder(path).path.is_dir() and not RunFolder(path).history.is_file()
    names = ["probs", "logits", "scores"] if logits else ["probs"]
    epochs = importers.epoch_files(path) if folder else load_array(path, *names)
    return importers.from_logits(epochs) if logits else epochs


def load_epoch_numbers(path: str, n_epochs: int) -> tuple[int, ...]:
    """Load the epoch or step of each row, if an .npz file of probabilities names them; else empty."""
    if not path.endswith(".npz") or "epochs" not in arrays.npz_names(path):
        return ()
    found = arrays.load_npz(path, ["epochs"])[0]
    numbers = tuple(map(int, found)) if found.ndim == 1 and found.dtype.kind in "iu" else ()
    ascending = all(a < b for a, b in pairwise((-1, *numbers, 2**62)))
    if len(numbers) != n_epochs or not ascending:
        raise ValueError(f"{path}: epochs: expected {n_epochs} ascending integers from 0, got shape {found.shape}")
    return numbers


def load_named(path: str, *names: str, verify: bool = True) -> tuple[Any, str]:
    """Load an array or a history, and the array's name in an .npz file ("" for other files).

    A run directory stands for the history in it.
    """
    if RunFolder(path).history.is_file():
        path = str(RunFolder(path).history)
    if RunFolder(path).path.is_dir():
        raise FileNotFoundError(f"{path}: a folder, and no run there (history.fmnh is missing){DOOR}")
    if path.endswith(".fmnh"):
        return CorrectnessHistory.open(path, verify=verify), ""
    if path.endswith(".npz"):
        return arrays.load_npz(path, names)
    content = content_of(path)
    if content is not None and content.kind == "npz":
        raise ValueError(f"{path}: an .npz file; rename it to end in .npz")
    return arrays.open_npy(path), ""


def load_labels(path: str | None, beside: str, option: str = "--labels") -> NDArray[np.int64]:
    """Load labels from their own file, or from `beside`, the .npz file with the probabilities."""
    if path is None and not beside.endswith(".npz"):
        raise ValueError(f"{option}: needed, since {beside} is not an .npz file with 'labels'")
    return _check.labels(load_array(path or beside, "labels"), name=f"{path or beside}: labels")


def has_labels(path: str) -> bool:
    """Tell whether a file contains labels beside the probabilities."""
    return path.endswith(".npz") and "labels" in arrays.npz_names(path)


def load_correct(path: str, labels: str | None, verify: bool = True) -> Any:
    """Load correctness from a history, a matrix of 0 and 1, or predictions or scores with labels.

    `draws`, grades of several answers per question, come as they are: (n_checkpoints, n_questions, n_draws).
    """
    a, name = load_named(path, "correct", "draws", "predictions", "probs", "scores", verify=verify)
    if name == "draws":
        return _check.draws(a, path)
    if isinstance(a, CorrectnessHistory):
        if labels is not None and a.digest not in (NO_LABELS, labels_digest(load_labels(labels, path))):
            raise ValueError(f"{labels}: not the labels that {path} was recorded with")
        return a
    scores = a.dtype.kind == "f" and a.ndim == 3
    without_labels = labels is None and not path.endswith(".npz") and not scores
    if name == "correct" or without_labels:
        correct = _check.correct_matrix(a, path)
        epochs = load_epoch_numbers(path, len(correct))
        return _numbered(correct, epochs) if epochs else correct
    source = path if labels is None else f"{path} with {labels}"
    return history_of(a, load_labels(labels, path), source, load_epoch_numbers(path, len(a)))


def _numbered(correct: NDArray[np.bool_], epochs: tuple[int, ...]) -> CorrectnessHistory:
    history = CorrectnessHistory(correct.shape[1])
    for row, epoch in zip(correct, epochs, strict=True):
        history.append(row, epoch)
    return history


def history_of(a: Any, labels: NDArray[np.int64], source: str, epochs: tuple[int, ...] = ()) -> CorrectnessHistory:
    """Correctness of predictions (n_epochs, n_samples) or scores (n_epochs, n_samples, n_classes).

    Reads one epoch at a time and keeps bits, so a memory-mapped file may be larger than memory. Errors name `source`.
    """
    if a.ndim != {"f": 3, "i": 2, "u": 2}.get(a.dtype.kind) or len(a) == 0:
        expected = "integer predictions (n_epochs, n_samples) or floating-point scores (n_epochs, n_samples, n_classes)"
        raise ValueError(f"{source}: expected {expected}, got shape {a.shape}, dtype {a.dtype}")
    history = CorrectnessHistory(len(labels))
    mapping = _files.mapping(a)
    for i, epoch in enumerate(_stderr.progress_bar(a, "reading")):
        try:
            history.append(correctness(epoch, labels), epochs[i] if epochs else None)
        except ValueError as error:
            raise ValueError(f"{source}: epoch {i}: {error}") from None
        _files.drop_pages(mapping)
    return history
