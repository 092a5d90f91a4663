"""Keras 3: a callback that records what each epoch gets right, and what the recorded epochs predict.

callback = RecorderCallback("runs/mine", x_val, y_val)
model.fit(x, y, epochs=30, initial_epoch=callback.restore(model), callbacks=[callback])
plan = fmn.fuse(probabilities(callback.run, model, x_val), y_val, correct=callback.run.history)

Checkpoints are what `model.save_weights` writes (with the optimizer's state, as Keras does): weights, no code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from ..runs.importers import softmax
from ..runs.recorder import Recorder, Run
from ..training.predictions import StoredPredictions

try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError('Keras is not installed: pip install "fmn_ref[keras]"') from None
    hint = "set KERAS_BACKEND to one that is installed, torch or jax, before Keras is imported"
    raise ImportError(f"Keras cannot load its backend ({error}): {hint}") from error

logger = logging.getLogger(__name__)
SUFFIX = ".weights.h5"
_RECORDED: weakref.WeakSet[Any] = weakref.WeakSet()  # models that a callback has recorded in this process


class RecorderCallback(keras.callbacks.Callback):
    """After each epoch: predict the validation data, store what is right, and the weights.

    Parameters
    ----------
    run_dir : path
        Created if missing; a run that is already there is continued.
    x_val
        What `model.predict` takes; it must give the same samples in the same order each time. Labels in it are ignored.
    y_val : (n_samples,) or (n_samples, 1) integers, or (n_samples, n_classes) one-hot
    keep : str
        Which checkpoints to keep: see `Recorder`.
    from_logits : bool, optional
        Whether the model gives logits. Default: what the loss that it was compiled with says; False where that says
        nothing.
    batch_size : int, optional
        As `model.predict`.
    seed : int, optional
        Seed Keras, and the model's dropout, anew for every epoch by this and its number: a run that was resumed then
        shuffles and drops out what an unbroken one does. Default: leave random numbers alone.

    Attributes
    ----------
    recorder : Recorder
    labels : (n_samples,) int64
        The classes of `y_val`, as `fuse` takes them.

    Raises
    ------
    TypeError, ValueError
        Here: labels that are none, unknown `keep`. In `fit`: a model that gives neither probabilities nor, if so
        declared, logits (when training begins); NaN; an epoch that does not follow on what is recorded.

    Examples
    --------
    The beginning of this file, and docs/integrations/keras.md.
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
        self.labels = _classes(y_val)
        self._seed = None if seed is None else _check.number(seed, 0, 2**31, "seed", int)
        self._x, self._from_logits, self._batch_size = x_val, from_logits, batch_size
        self._begins, self._has_recorded = True, False
        self.recorder = Recorder(run_dir, keep=keep, save=self._save, suffix=SUFFIX)

    @property
    def run(self) -> Run:
        """The history and the checkpoints so far."""
        return self.recorder.run

    def restore(self, model: Any) -> int:
        """Load the weights and the optimizer's state of the last recorded epoch; the number of the one to go on with.

        0, and the model as it is, where nothing is recorded yet.

        Raises
        ------
        FileNotFoundError
            keep="none" stored no weights, or they were deleted.
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
        _build(model, self._x, self._batch_size)
        if not model.optimizer.built:  # or Keras would skip its state, with a warning
            model.optimizer.build(model.trainable_variables)
        before = model.get_weights()
        try:
            _load(model, path)
        except ValueError:
            model.set_weights(before)
            raise
        return self.recorder.next_epoch

    def on_train_begin(self, logs: Any = None) -> None:
        self._begins = True
        arrays = hasattr(self._x, "shape") or isinstance(self._x, (list, tuple, dict))
        with _numbers_kept():  # what cannot be recorded fails before hours of training
            passes = [self._predict() for _ in range(1 if arrays else 2)]
        first, *second = (_columns(outputs, self._logits()) for outputs in passes)
        if len(first) != len(self.labels):
            raise ValueError(f"y_val: expected {len(first)} labels, as x_val has samples, got {len(self.labels)}")
        if any(z.shape != first.shape or not np.allclose(z, first, rtol=1e-3, atol=1e-4) for z in second):
            what = "neither it may shuffle, nor the model draw random numbers"
            raise ValueError(f"x_val: gave other predictions, or another order, the second time; {what}")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._begins:
            self._begins = False
            self._line_up(epoch)
        if self._seed is not None:
            _draw_anew(self.model, self._seed, epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with _numbers_kept():
            outputs = self._predict()
        self.recorder.record(epoch, _columns(outputs, self._logits()), self.labels)
        self._has_recorded = True
        _RECORDED.add(self.model)
        if logs is not None:  # for the callbacks that follow, and the bar
            logs["peak_forget_fraction"] = self.recorder.peak_forget_fraction

    def _line_up(self, epoch: int) -> None:
        """Put the history to the epoch that training begins with, which BackupAndRestore may have set: a crash leaves
        its backup and our history an epoch apart, either way."""
        n, fresh = self.recorder.next_epoch, not self._has_recorded
        fresh &= epoch > 0 or self.model not in _RECORDED  # a loop of one's own around `fit`, a callback for each
        if n > epoch + 1 or (n > epoch and not fresh):
            hint = f"initial_epoch=callback.restore(model), another run_dir, or callback.recorder.rewind({epoch}) first"
            text = f"has epochs up to {n - 1}, and training begins with {epoch}; use {hint}"
            raise ValueError(f"{self.recorder.run_dir}: {text}")
        if 0 < n < epoch - 1:
            hint = "use initial_epoch=callback.restore(model), or another run_dir"
            raise ValueError(f"{self.recorder.run_dir}: ends with epoch {n - 1}, training begins with {epoch}; {hint}")
        if n == epoch + 1:
            logger.warning("%s: epoch %d was recorded, but is trained again", self.recorder.run_dir, epoch)
            self.recorder.rewind(epoch)
        elif n == epoch - 1 and fresh:  # the weights are those after that epoch
            self.on_epoch_end(n)

    def _predict(self) -> Any:
        return self.model.predict(self._x, batch_size=self._batch_size, verbose=0)

    def _logits(self) -> bool:
        return _gives_logits(self.model) if self._from_logits is None else self._from_logits

    def _save(self, path: Path) -> None:
        with _files.replacing(path, SUFFIX) as temporary:  # Keras insists on the end of the name
            self.model.save_weights(temporary)


class probabilities(StoredPredictions):
    """What each recorded epoch predicts on `x`: computed when read; the latest 4 GiB stay in memory.

    ``probabilities(run, model, x)[i]`` is (n_samples, n_classes) float32 for row i of the history; a single output
    counts as two classes.

    Parameters
    ----------
    run : Run
        ``callback.run``, ``Run.open(run_dir)``, or their `kept`.
    model : keras.Model
        The epochs' weights are loaded into it to predict, and its own put back after.
    x
        What `model.predict` takes.
    batch_size, from_logits
        As `RecorderCallback`.

    Raises
    ------
    TypeError, ValueError
        Here: no run of Keras. When read: a checkpoint that is damaged or does not fit; a model that gives neither
        probabilities nor, if so declared, logits.
    FileNotFoundError
        When read: a checkpoint that `keep` dropped; `run.kept` goes without.

    Examples
    --------
    >>> fused = plan.apply(probabilities(run, model, x_test))  # doctest: +SKIP
    """

    def __init__(
        self, run: Run, model: Any, x: Any, *, batch_size: int | None = None, from_logits: bool | None = None
    ) -> None:
        if not isinstance(run, Run):
            raise TypeError(f"run: expected a Run, got {type(run).__name__}")
        if not all(path.name.endswith(SUFFIX) for path in run.checkpoints):
            raise ValueError(f"run: {run.run_dir} was not recorded with Keras (no {SUFFIX} files)")
        super().__init__(run)
        self._model, self._x, self._batch_size = model, x, batch_size
        self._logits = _gives_logits(model) if from_logits is None else from_logits

    def _evaluate(self, row: int) -> NDArray[np.float32]:
        columns = _columns(self._outputs(self._run.checkpoint(row)), self._logits)
        return softmax(columns, "model") if self._logits else columns.astype(np.float32)

    def _outputs(self, path: Path) -> Any:
        _build(self._model, self._x, self._batch_size)
        before = self._model.get_weights()
        try:
            _load(self._model, path, skip=getattr(self._model, "optimizer", None))
            with _numbers_kept():
                return self._model.predict(self._x, batch_size=self._batch_size, verbose=0)
        finally:
            self._model.set_weights(before)


def _classes(y: Any) -> NDArray[np.int64]:
    """(n_samples,) classes of labels as Keras's losses take them: floating-point, in a column, one-hot."""
    a = _check.array(y, "y_val")
    if a.dtype.kind in "bf" and (a == np.floor(a)).all():
        a = a.astype(np.int64)
    if a.ndim == 2 and a.shape[1] == 1:
        a = a[:, 0]
    elif a.ndim == 2:
        if not ((a == 0) | (a == 1)).all() or not (a.sum(1) == 1).all():
            raise ValueError(f"y_val: expected classes, or rows with a single 1 (one-hot), got shape {a.shape}")
        a = a.argmax(1)
    return _check.labels(a, name="y_val")


def _columns(outputs: Any, logits: bool) -> NDArray[Any]:
    """(n_samples, n_classes) logits or probabilities; a single output becomes the second of two classes."""
    if isinstance(outputs, (dict, list, tuple)):
        hint = "record one of several by fmn.Recorder in a callback of your own (docs/integrations/loops.md)"
        raise TypeError(f"model: expected one output, got {len(outputs)}; {hint}")
    z = np.asarray(outputs)
    z = z.astype(np.float64 if z.dtype == np.float64 else np.float32)  # also from bfloat16, which NumPy does not know
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"model: expected predictions of shape (n_samples, n_classes), got shape {z.shape}")
    if z.shape[1] == 1:
        z = np.concatenate([np.zeros_like(z) if logits else 1 - z, z], axis=1)
    if logits:
        if (z >= 0).all() and (z <= 1).all() and np.allclose(z.sum(1), 1, atol=1e-4):
            raise ValueError("from_logits: the model gives probabilities (rows sum to 1), not logits")
        return z
    try:
        _check.probabilities(z, name="model")
    except ValueError as error:
        finite = np.isfinite(z).all()
        hint = "if it gives logits, say from_logits=True" if finite else "what was recorded before is intact"
        raise ValueError(f"{error}; {hint}") from None
    return z


def _gives_logits(model: Any) -> bool:
    """What the loss that the model was compiled with says about its outputs."""
    loss = getattr(model, "loss", None)
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    return bool(config.get("from_logits", False))


def _build(model: Any, x: Any, batch_size: int | None) -> None:
    """A model without an Input gets its weights when it first sees data."""
    if not model.built:
        with _numbers_kept():
            model.predict(x, batch_size=batch_size, verbose=0)


def _numbers_kept() -> contextlib.AbstractContextManager[Any]:
    """On torch, `predict` draws from the global generator: put back, or training would go on with other numbers."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    from torch.random import fork_rng

    return fork_rng(devices=[])


def _load(model: Any, path: Path, skip: Any = None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Skipping variable loading for optimizer")  # it is of another kind
            keras.saving.load_weights(model, path, objects_to_skip=None if skip is None else [skip])
    except (OSError, ValueError, KeyError, UserWarning) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise ValueError(f"{path}: damaged, or does not fit the model: {reason}") from error


def _draw_anew(model: Any, seed: int, epoch: int) -> None:
    """Seed Keras and what the model's layers draw from, by the epoch alone."""
    draws = np.random.SeedSequence([seed, epoch])
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    first, *others = draws.generate_state(1 + len(states)) % 2**31
    keras.utils.set_random_seed(int(first))
    for variable, value in zip(states, others, strict=True):
        variable.assign([int(value), 0])
