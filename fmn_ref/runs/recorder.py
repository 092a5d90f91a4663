"""Recorder: store the correctness history and the checkpoints of a run while it goes on.

NumPy only: torch is loaded when the state of a torch model is saved. docs/reference/formats.md describes the files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import _check, _files
from .._check import Bool, Int
from ..metrics.curves import correctness, forget_fraction
from ..metrics.history import CorrectnessHistory, labels_digest
from .folder import AnyPath, RunFolder, checked_suffix, remove_checkpoint, row_of
from .lock import RunLock
from .retention import Keep
from .run import Run

logger = logging.getLogger(__name__)


class Recorder:
    """Record a training loop of your own in three lines.

    Parameters
    ----------
    run_dir : path
        Created if missing. A run that is already there is continued after its last epoch.
    model : torch.nn.Module, optional
        Its state is stored at each `record`.
    keep : str, default "all"
        Which checkpoints stay on disk: "all"; "none", the history alone; "every:n", each n-th recorded epoch; or
        "budget:n", the n most valuable epochs by the history so far. For the value of an epoch, each sample is one
        point, split among the kept epochs that classify it correctly. The latest checkpoint always stays, beside the n.
        Fuse `run.kept` afterwards.
    half : bool or set of str, default False
        Store floating-point parameters in 16 bits, which halves the disk space and rounds them by 2^-11;
        docs/results.md measures the effect. A tensor in which a weight would lose more stays as it is: too large for 16
        bits, or too small as are all weights of its row or column. So do buffers, such as BatchNorm's statistics.
        Names of parameters tell them apart if `model` is None; True then takes all tensors for parameters.
    save : callable(path), optional
        Stores the weights of another framework at `path`, as a file or a folder, instead of `model`'s. Everything must
        be on disk when it returns.
    suffix : str, default ".pt"
        How the names of checkpoints end; another suffix needs `save`. run.json keeps it.
    config : dict, optional
        Written to run.json; anything that JSON can hold. A run that was made with another one is not continued.
    forward_fn : callable, optional
        Passed on to `run`; see `train`.
    overwrite : bool, default False
        Delete a run that is in `run_dir`, with its checkpoints, and begin anew.

    Raises
    ------
    TypeError, ValueError
        Unknown `keep`; another process writes in `run_dir`; the run was made with another `config`, or is damaged.
    OSError
        The folder cannot be written.

    Notes
    -----
    The process that records holds the folder's lock until `close`, the end of the process, or until the Recorder is
    garbage. It is a context manager that closes itself.

    `record` logs a warning, once, if a part of `model` with dropout or BatchNorm is in training mode: then the scores
    probably come from a network that drops units at random.

    Examples
    --------
    >>> import tempfile
    >>> recorder = Recorder(tempfile.mkdtemp())
    >>> for epoch, predictions in enumerate([[0, 1, 1], [0, 0, 1]]):
    ...     recorder.record(epoch, predictions, labels=[0, 1, 1])
    >>> recorder.peak_forget_fraction, recorder.next_epoch
    (0.3333333333333333, 2)
    """

    def __init__(
        self,
        run_dir: AnyPath,
        model: Any = None,
        keep: str = "all",
        *,
        half: bool | Set[str] = False,
        save: Callable[[Path], object] | None = None,
        suffix: str = ".pt",
        config: dict[str, Any] | None = None,
        forward_fn: Any = None,
        overwrite: bool = False,
    ) -> None:
        if model is not None and not hasattr(model, "state_dict"):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if save is not None and not callable(save):
            raise TypeError(f"save: expected a function of a path, got {type(save).__name__}")
        self.folder = RunFolder(run_dir)
        self.run_dir, self.model, self.forward_fn = self.folder.path, model, forward_fn
        self._keep, self._save, self._half, self._suffix = Keep.of(keep), save, half, checked_suffix(suffix)
        if suffix != ".pt" and save is None:
            raise ValueError(f"suffix: {suffix!r} needs `save`, which writes such files")
        self._history: CorrectnessHistory | None = None
        self._warned = False
        self._complete = False  # whether the model's state has been checked
        self._numbers: list[Any] = []  # those of the samples of the epochs recorded here, once there are some
        self._lock: RunLock | None = self.folder.claim(config, suffix=suffix, overwrite=overwrite)
        self.folder.checkpoints.mkdir(exist_ok=True)
        if self.folder.history.exists():
            _files.sync(self.run_dir)  # a process that rewound the history may have been killed before it did
            self._history = CorrectnessHistory.open(self.folder.history)
            self.rewind(self.next_epoch)  # deletes a history without epochs, which a crash may leave
            self._prune()  # of a crash too: knowing the next epoch, a budget would decide otherwise

    def record(self, epoch: int, scores_or_predictions: Any, labels: Any, *, index: Any = None) -> None:
        """Store one epoch: its checkpoint first, then its row of the history.

        Parameters
        ----------
        epoch : int
            Greater than the last recorded epoch.
        scores_or_predictions, labels
            As for `correctness`; the same samples in the same order at every epoch. The Recorder does not see samples:
            it notices other labels, but not that samples of one class change places.
        index : (n_samples,) integers, optional
            Each sample's number, for a loader that shuffles or repeats samples. The row is stored in the order of the
            numbers, each once. All epochs need the same numbers.

        Raises
        ------
        TypeError, ValueError
            As `correctness`; other labels than before; an epoch that is recorded already (`rewind` discards it);
            another Recorder has recorded here since this one was made; an entry of the model's state that could not be
            read back, by name. At the first record: a state that the model does not load, or that leaves out a weight
            with a gradient, in a plain list for example. Nothing is written then.
        OSError
            A file cannot be written; everything recorded before is intact.
        """
        right = correctness(scores_or_predictions, labels)
        if right.ndim != 1:
            raise ValueError(f"scores_or_predictions: expected one epoch, got correctness of shape {right.shape}")
        numbers: Any = None
        if index is not None:
            numbers, right, labels = in_sample_order(index, right, labels)
        if self._numbers and not np.array_equal(self._numbers[0], numbers):
            raise ValueError(
                "index: not the sample numbers of the epochs before; give the same, or none, at every epoch"
            )
        self.record_correct(epoch, right, labels)
        self._numbers = [numbers]
        self._warn_of_training_mode(epoch)

    def _warn_of_training_mode(self, epoch: int) -> None:
        part = None if self._warned or self.model is None else _random_part(self.model)
        if part is not None:
            hint = "compute the scores in model.eval(), and call model.train() after `record`"
            logger.warning("%s: epoch %d: a %s of the model is in training mode; %s", self.run_dir, epoch, part, hint)
            self._warned = True

    def record_correct(self, epoch: int, correct: Any, labels: Any, *, weights: dict[str, Any] | None = None) -> None:
        """Store one epoch whose correctness is known already.

        Parameters
        ----------
        epoch, labels
            As for `record`.
        correct : (n_samples,) bool or 0 and 1
        weights : dict, optional
            The state_dict to store; default: the current one of `model`.
        """
        correct = _check.bool_matrix(_check.array(correct, "correct")[None])[0]
        digest = labels_digest(labels, len(correct))
        epoch = _check.number(epoch, 0, 2**62, "epoch", int)
        with self._taken_lock().turn:
            self._check_new(epoch, len(correct), digest)
            self._store(epoch, correct, labels, weights)

    def _store(self, epoch: int, correct: Any, labels: Any, weights: dict[str, Any] | None) -> None:
        stores = self._keep.rule != "none" and not (self._save is None and weights is None and self.model is None)
        if stores:
            write = self._writer(weights)
            if self._keep.limited:
                self.folder.remove_unrecorded(self._epochs, self._suffix)
            self.folder.write_checkpoint(epoch, self._suffix, write)
        else:
            self.folder.discard(epoch, self._suffix)
        if self._history is None:
            self._history = CorrectnessHistory(len(correct), self.folder.history, labels=labels)
        self._history.append(correct, epoch)
        if stores:
            self._prune()

    def _writer(self, weights: dict[str, Any] | None) -> Callable[[Path], object]:
        """Return what writes the checkpoint; TypeError or ValueError if it could not be read or loaded back."""
        if self._save is not None:
            return self._save
        from . import adapters, checkpoints
        from .complete import check_complete

        state = adapters.state_of(checkpoints.unwrap(self.model)) if weights is None else weights
        checkpoints.check_readable(state, "state_dict")
        if self.model is not None and not self._complete:
            if adapters.adapter_of(checkpoints.unwrap(self.model)) is None:  # else by its definition
                check_complete(state, checkpoints.unwrap(self.model))
            self._complete = True
        half = self._half if self._half is not True or self.model is None else checkpoints.parameter_names(self.model)
        return partial(checkpoints.save_weights, state, half=half)

    def _prune(self) -> None:
        """Delete the checkpoints that `keep` does not keep. The epoch is recorded: an error is only logged."""
        if self._history is None or not self._keep.limited:
            return
        try:
            found = self.folder.stored(self._suffix).items()
            stored = {row_of(epoch, self._epochs): path for epoch, path in found if path.exists()}
            rows = sorted(row for row in stored if row is not None)
            for row in self._keep.dropped(rows, self._history.select(rows).correct()):
                remove_checkpoint(stored[row])
                _files.sync(self.folder.checkpoints)
        except OSError as error:
            logger.error("%s; deleted after the next epoch instead", error)

    def _check_new(self, epoch: int, n_samples: int, digest: bytes) -> None:
        """Refuse, before anything is written, an epoch that cannot follow what is on disk."""
        if self._history is None and self.folder.history.exists():
            raise ValueError(f"{self.folder.history}: made since this Recorder was; a run has one writer")
        if self._history is not None:
            self._history.check_unchanged()
            if self._history.digest != digest:
                was = self._history.n_samples
                differ = "" if was == n_samples else f": {n_samples} samples, not {was}"
                raise ValueError(f"labels: not the labels (or not in the order) that this run has recorded{differ}")
        if epoch < self.next_epoch:
            hint = f"go on with {self.next_epoch} (recorder.next_epoch), or drop it with recorder.rewind({epoch})"
            raise ValueError(f"epoch: {self.run_dir} is already recorded past {epoch}; {hint}")

    def _taken_lock(self) -> RunLock:
        if self._lock is None or not self._lock.valid:  # after `close`, in a copy or a forked child
            self._lock = RunLock.of(self.run_dir)
        return self._lock

    def rewind(self, epoch: int) -> list[int]:
        """Discard `epoch` and all later ones, with their checkpoints.

        Call it when your loop resumes from an earlier state than the last recorded epoch. If no epoch remains, the
        folder's plan.json and comparison.json are deleted too. In a folder that `train` or `distill` made, their resume
        states of discarded epochs are deleted as well, so that they go on from what remains.

        Returns
        -------
        list of int
            The epochs that were discarded.

        Raises
        ------
        TypeError, ValueError
            `train` or `distill` made the folder and have no state to go on from after the epochs that would remain;
            another process writes in the folder. Nothing is changed then.
        """
        epoch = _check.number(epoch, 0, 2**62, "epoch", int)
        if self._history is None:
            return []
        with self._taken_lock().turn:
            dropped = [e for e in self._epochs if e >= epoch]
            if dropped:
                # First: after a crash, the states must not be ahead of the history.
                self.folder.delete(*self._stale_states(len(self._epochs) - len(dropped)))
                self._history.truncate(len(self._history) - len(dropped))
            for e in dropped:  # a checkpoint that stayed would be taken for that of the epoch recorded next
                self.folder.discard(e, self._suffix)
            if not len(self._history):  # other samples may be recorded now
                self.folder.clear()
                self._history, self._numbers = None, []
        return dropped

    def _stale_states(self, n_rows: int) -> list[Path]:
        """List the resume states that are further than the first rows of the history."""
        from . import checkpoints

        paths = [p for p in (self.folder.resume, self.folder.previous_resume) if p.is_file() and checkpoints.is_own(p)]
        if not (n_rows and paths):
            return paths
        after = {path: checkpoints.load(path, scan=True)["epoch"] for path in paths}
        last = self._epochs[n_rows - 1]
        if last not in after.values():
            known = " or ".join(str(e + 1) for e in sorted(after.values()))
            raise ValueError(
                f"epoch: the training in {self.run_dir} can go on from epoch {known} only; rewind to it, or 0"
            )
        return [path for path in paths if after[path] > last]

    def close(self) -> None:
        """Release the folder's lock; a later `record` or `rewind` takes it again."""
        self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}  # a copy takes the lock when it writes

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _epochs(self) -> tuple[int, ...]:
        return () if self._history is None else self._history.epochs

    @property
    def next_epoch(self) -> int:
        """One past the last recorded epoch; 0 for a new run."""
        return self._epochs[-1] + 1 if self._epochs else 0

    @property
    def peak_forget_fraction(self) -> float:
        """Peak forget fraction max_e F_e so far, against the latest epoch."""
        return float(forget_fraction(self._history).max()) if self.next_epoch else 0.0

    @property
    def run(self) -> Run:
        """The run so far; ValueError before the first epoch."""
        if self._history is None or not len(self._history):
            raise ValueError(f"{self.run_dir}: nothing recorded yet")
        return Run(self.folder, self._history, self.model, self.forward_fn)

    def __repr__(self) -> str:
        return f"Recorder({str(self.folder.given)!r}, next_epoch={self.next_epoch})"


def _random_part(model: Any) -> str | None:
    """Name the class of a layer in training mode that computes otherwise than in evaluation mode."""
    layers = model.modules() if callable(getattr(model, "modules", None)) else ()
    classes = (type(layer).__name__ for layer in layers if getattr(layer, "training", False))
    return next((name for name in classes if re.search("Drop|BatchNorm", name)), None)


def in_sample_order(index: Any, correct: Any, labels: Any) -> tuple[Int, Bool, Int]:
    """Sort the rows of an epoch by sample number, each number once: (numbers, correct, labels)."""
    numbers = _check.labels(index, len(correct), name="index")
    labels = _check.labels(labels, len(correct))
    unique, where, back = np.unique(numbers, return_index=True, return_inverse=True)
    if (labels[where][back] != labels).any():
        raise ValueError("index: expected each sample's own number, got one with several labels")
    return unique, correct[where], labels[where]
