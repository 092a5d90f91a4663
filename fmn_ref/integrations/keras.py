"""Keras 3: a callback that records the correctness of each epoch, and the predictions of the recorded epochs.

callback = RecorderCallback("runs/mine", x_val, y_val)
model.fit(x, y, epochs=30, initial_epoch=callback.restore(model), callbacks=[callback])
plan = fmn.fuse(probabilities(callback.run, model, x_val), y_val, correct=callback.run.history)

Checkpoints are files of `model.save_weights`: weights and the optimizer's state, no code.
"""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from ..runs.recorder import Recorder
from ..runs.run import Run
from .keras_checkpoints import (  # first, for what it says where Keras is missing
    SUFFIX,
    class_columns,
    class_labels,
    ensure_built,
    from_checkpoints,
    gives_logits,
    load_weights,
    probabilities,
    random_state_kept,
)

import keras  # isort: skip

__all__ = ["RecorderCallback", "from_checkpoints", "probabilities"]
logger = logging.getLogger(__name__)
_RECORDED: weakref.WeakSet[Any] = weakref.WeakSet()  # models that a callback has recorded in this process


class RecorderCallback(keras.callbacks.Callback):
    """Predict the validation data after each epoch, and store its correctness and the weights.

    The callback adds max_e F_e so far to the logs as "peak_forget_fraction".

    Parameters
    ----------
    run_dir : path
        Folder of the run. A run in it is continued.
    x_val : array or data set
        What `model.predict` takes. It must yield the same samples in the same order each time; labels in it are
        ignored.
    y_val : (n_samples,) or (n_samples, 1) integers, or (n_samples, n_classes) one-hot
        Labels of `x_val`.
    keep : str, default "all"
        Which checkpoints stay on disk; see `fmn_ref.Recorder`.
    from_logits : bool, optional
        Whether the model returns logits. Default: as the loss says that the model was compiled with, else False.
    batch_size : int, optional
        As in `model.predict`.
    seed : int, optional
        Seeds Keras and the model's dropout before each epoch, from this number and the epoch. A resumed training then
        shuffles and drops out as an unbroken one does. Default: random numbers are left alone.

    Attributes
    ----------
    recorder : Recorder
    run : Run
        History and checkpoints so far.
    labels : (n_samples,) int64
        The classes of `y_val`, as `fuse` takes them.

    Raises
    ------
    TypeError, ValueError
        Here: `y_val` holds no labels; unknown `keep`; another process writes in `run_dir`. When `fit` begins: the model
        returns neither probabilities nor declared logits. Later: NaN, or an epoch that does not follow the recorded
        ones.

    Notes
    -----
    The callback holds the folder's lock from its construction to the end of `fit`, and in each later `fit` from the
    first recorded epoch. Keras does not tell callbacks of an exception: after one, ``callback.recorder.close()``
    releases the lock, and so does the end of the process.

    Examples
    --------
    See the beginning of this file and docs/integrations/keras.md.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        x_val: Any,
        y_val: Any,
        keep: str = "all",
        *,
        from_logits: bool | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.labels = class_labels(y_val, "y_val")
        self._seed = None if seed is None else _check.number(seed, 0, 2**31, "seed", int)
        self._x, self._from_logits, self._batch_size = x_val, from_logits, batch_size
        self._begins, self._has_recorded = True, False
        self.recorder = Recorder(run_dir, keep=keep, save=self._save, suffix=SUFFIX)

    @property
    def run(self) -> Run:
        """History and checkpoints so far."""
        return self.recorder.run

    def restore(self, model: Any) -> int:
        """Load weights and optimizer state of the last recorded epoch into `model`.

        Returns
        -------
        int
            The epoch to go on with: ``initial_epoch`` of `fit`. 0 if nothing is recorded; the model is left as it is.

        Raises
        ------
        FileNotFoundError
            The checkpoint does not exist: keep="none" stores none.
        ValueError
            The model is not compiled; the checkpoint is damaged or does not fit.
        """
        if self.recorder.next_epoch == 0:
            return 0
        path = self.run.checkpoints[-1]
        if not path.is_file():
            hint = "keep='none' stores none; keras.callbacks.BackupAndRestore does"
            raise FileNotFoundError(f"{path}: no weights to go on from ({hint})")
        if getattr(model, "optimizer", None) is None:
            raise ValueError("model: compile it before `restore`, which loads the optimizer's state too")
        ensure_built(model, self._x, self._batch_size)
        if not model.optimizer.built:  # Keras would skip its state, with a warning
            model.optimizer.build(model.trainable_variables)
        before = model.get_weights()
        try:
            load_weights(model, path)
        except ValueError:
            model.set_weights(before)
            raise
        return self.recorder.next_epoch

    def on_train_begin(self, logs: Any = None) -> None:
        """Predict once, twice if `x_val` is a loader: what cannot be recorded fails before hours of training."""
        self._begins = True
        arrays = hasattr(self._x, "shape") or isinstance(self._x, (list, tuple, dict))
        with random_state_kept():  # one for both passes, such that a loader that shuffles draws two orders
            first, *second = [self._predict() for _ in range(1 if arrays else 2)]
        if len(first) != len(self.labels):
            raise ValueError(f"y_val: expected {len(first)} labels, as x_val has samples, got {len(self.labels)}")
        if any(z.shape != first.shape or not np.allclose(z, first, rtol=1e-3, atol=1e-4) for z in second):
            what = "it must not shuffle, and the model must not draw random numbers"
            raise ValueError(f"x_val: gave other predictions, or another order, the second time; {what}")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._begins:
            self._begins = False
            self._align_history(epoch)
        if self._seed is not None:
            _seed_epoch(self.model, self._seed, epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with random_state_kept():
            columns = self._predict()
        self.recorder.record(epoch, columns, self.labels)
        self._has_recorded = True
        _RECORDED.add(self.model)
        if logs is not None:  # for later callbacks and the progress bar
            logs["peak_forget_fraction"] = self.recorder.peak_forget_fraction

    def on_train_end(self, logs: Any = None) -> None:
        self.recorder.close()

    def _align_history(self, epoch: int) -> None:
        """Make the history end where training begins, which BackupAndRestore may have moved.

        A crash leaves its backup and our history one epoch apart, either way.
        """
        n, fresh = self.recorder.next_epoch, not self._has_recorded
        fresh &= epoch > 0 or self.model not in _RECORDED  # a loop around `fit` may make a callback for each epoch
        self._check_begin(epoch, n, fresh)
        if n == epoch + 1:
            logger.warning("%s: epoch %d was recorded, but is trained again", self.recorder.run_dir, epoch)
            self.recorder.rewind(epoch)
        elif n == epoch - 1 and fresh:  # the model has the weights after epoch n
            self.on_epoch_end(n)

    def _check_begin(self, epoch: int, n: int, fresh: bool) -> None:
        """Refuse to begin with `epoch` if the run of n epochs is further from it than a crash leaves them."""
        ways = ["initial_epoch=callback.restore(model)", "another run_dir"]
        if n > epoch + 1 or (n > epoch and not fresh):
            ways.append(f"callback.recorder.rewind({epoch}) first")
            text = f"has epochs up to {n - 1}, and training begins with {epoch}"
        elif 0 < n < epoch - 1:
            text = f"ends with epoch {n - 1}, training begins with {epoch}"
        else:
            return
        raise ValueError(f"{self.recorder.run_dir}: {text}; use {' or '.join(ways)}")

    def _predict(self) -> NDArray[Any]:
        logits = gives_logits(self.model) if self._from_logits is None else self._from_logits
        outputs = self.model.predict(self._x, batch_size=self._batch_size, verbose=0)
        return class_columns(outputs, logits)

    def _save(self, path: Path) -> None:
        with _files.replacing(path, SUFFIX) as temporary:  # Keras insists on the suffix
            self.model.save_weights(temporary)


def _seed_epoch(model: Any, seed: int, epoch: int) -> None:
    """Seed Keras and the generators of the model's layers from `seed` and `epoch` alone."""
    draws = np.random.SeedSequence([seed, epoch])
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    first, *others = draws.generate_state(1 + len(states)) % 2**31
    keras.utils.set_random_seed(int(first))
    for variable, value in zip(states, others, strict=True):
        variable.assign([int(value), 0])
