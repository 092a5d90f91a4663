"""Predictions of a run's stored epochs, computed when they are read.

This module imports NumPy only, so that `fmn_ref.integrations.keras` works without torch; `Probabilities` imports torch
when it is created.
"""

from __future__ import annotations

import operator
import threading
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..runs import references
from ..runs.run import Run

CACHE_BYTES = 4 << 30


class _Lock:
    """A lock that copies and pickles as a new one."""

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


class StoredPredictions(Sequence[NDArray[np.float32]]):
    """Sequence of predicted probabilities, one array for each row of a run's history.

    Item i has shape (n_samples, n_classes), dtype float32. It is computed at the first read; the latest 4 GiB stay in
    memory. Threads may read; one evaluates at a time. A subclass implements `_evaluate`.

    Parameters
    ----------
    run : Run
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._cache: dict[int, NDArray[np.float32]] = {}
        self._lock, self._evaluating = _Lock(), False

    @abstractmethod
    def _evaluate(self, row: int) -> NDArray[np.float32]:
        """Predict the data set with the checkpoint of one row."""

    @property
    def epochs(self) -> tuple[int, ...]:
        """Recorded epoch or step of each row."""
        return self._run.history.epochs

    def file_of(self, row: int) -> Path | None:
        """The file of a row's checkpoint, or None if there is none."""
        return references.file_of(self._run.folder, self.epochs[row])

    @property
    def evaluated(self) -> tuple[int, ...]:
        """Rows that are in memory, in ascending order."""
        return tuple(sorted(self._cache))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._run}, evaluated={self.evaluated})"

    def __len__(self) -> int:
        return len(self._run.history)

    def __getitem__(self, epoch: Any) -> Any:
        if isinstance(epoch, slice):
            return [self[i] for i in range(*epoch.indices(len(self)))]
        if not -len(self) <= operator.index(epoch) < len(self):
            raise IndexError(f"epoch: expected a row in [-{len(self)}, {len(self)}), got {epoch}")
        row = operator.index(epoch) % len(self)
        with self._lock.held:
            if row not in self._cache:
                self._cache[row] = self._evaluate_alone(row)
                while len(self._cache) > 2 and sum(p.nbytes for p in self._cache.values()) > CACHE_BYTES:
                    del self._cache[next(iter(self._cache))]
            return self._cache[row]

    def _evaluate_alone(self, row: int) -> NDArray[np.float32]:
        """Refuse a read from inside an evaluation, which would load other weights into the network that computes."""
        if self._evaluating:
            raise ValueError(f"epoch: {row} is read while another epoch is evaluated; use a second run.probabilities")
        self._evaluating = True
        try:
            return self._evaluate(row)
        finally:
            self._evaluating = False


class Probabilities(StoredPredictions):
    """Probabilities that each checkpoint of a torch run predicts on one data set, computed when they are read.

    ``probabilities[i]`` is the (n_samples, n_classes) float32 array of row i of the run's history. The latest 4 GiB
    stay in memory. One network is on the device at a time, whatever the number of epochs. Predictions that the run
    keeps of the same data (see `from_checkpoints`) are read instead.
    ``fuse(probabilities, labels, correct=run.history)`` reads only the last epoch and the chosen windows.

    Parameters
    ----------
    run : Run
        With its model attached (``Run.open(run_dir, model)``). Its weights do not change: a copy is evaluated, or if it
        cannot be copied, the model itself with weights swapped in and put back.
    samples : (inputs, labels), torch Dataset or DataLoader
        Must keep its order from one pass to the next.
    batch_size : int, default 256
        Ignored where `samples` is a DataLoader.
    amp : bool, default False
        Run the network in bfloat16, which changes probabilities in the third digit.
    split : bool, default False
        Divide each evaluation among the processes of torch.distributed. Every process must read the same rows in the
        same order, and gets the whole array.

    Raises
    ------
    TypeError
        `run` is not a Run, or the data is of no known kind.
    ValueError
        The run has no model attached. When an item is read: a damaged checkpoint, or one that does not fit the model;
        data that shuffles, or gives other samples than in an earlier pass.
    FileNotFoundError
        When an item is read: its checkpoint is missing.

    Examples
    --------
    >>> probs = run.probabilities((x, y))  # doctest: +SKIP
    >>> plan = fuse(probs, probs.labels, correct=run.history)  # doctest: +SKIP
    """

    def __init__(
        self, run: Run, samples: Any, *, batch_size: int = 256, amp: bool = False, split: bool = False
    ) -> None:
        with _check.naming_packages("run.probabilities"):
            from . import data
            from .copies import independent
            from .ensemble import attached_model
            from .memory_format import set_channels_last

        self._model = independent(attached_model(run))
        set_channels_last(self._model)
        super().__init__(run)
        self._amp = amp
        size = _check.number(batch_size, 1, 2**31, "batch_size", int)
        self._batches = data.Batches(samples, size, data.device_of(self._model), split=split)

    @cached_property
    def order(self) -> Any:
        """Common facts of the passes over the data, an `Order`; a loader that shuffles is refused here."""
        from .order import Order

        return Order(self._batches.source)

    @cached_property
    def _kept(self) -> Any:
        """Predictions of the same data that the run keeps, or None."""
        from .kept import KeptPredictions

        return KeptPredictions.matching(self._run.folder, self._batches.source)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (n_samples,) in the order of evaluation; evaluates the last epoch if none has been read yet."""
        if self.order.labels is None and self._kept is not None:
            return self._kept.labels  # type: ignore[no-any-return]
        if self.order.labels is None:
            self[-1]
        labels: NDArray[np.int64] = self.order.labels.numpy().copy()
        return labels

    def _evaluate(self, row: int) -> NDArray[np.float32]:
        from ..runs import checkpoints
        from .data import predict

        kept = None if self._kept is None else self._kept.read(self._run.history.epochs[row])
        if kept is not None:
            references.check_unless_gone(self._run.checkpoints[row])
            return kept  # type: ignore[no-any-return]
        checkpoints.load_into(self._model, self._run.checkpoint(row))
        options = {"forward_fn": self._run.forward_fn, "amp": self._amp, "order": self.order}
        return predict(self._model, self._batches, **options)[0].cpu().numpy()
