"""Checkpoints of Keras: a run of those that exist, and the predictions of the epochs of a run.

`fmn_ref.integrations.keras` has the same functions beside the callback.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from ..metrics.curves import correctness
from ..runs import references
from ..runs.discovery import find_checkpoints
from ..runs.existing import check_apart, record_each, refusal, unrecorded
from ..runs.folder import AnyPath, RunFolder
from ..runs.importers import softmax
from ..runs.recorder import Recorder
from ..runs.run import Run
from ..runs.torch_files import KERAS
from ..training.predictions import StoredPredictions

try:
    import h5py
    import keras
except ImportError as error:
    if error.name in ("keras", "h5py"):
        raise ImportError('Keras is not installed: pip install "fmn_ref[keras]"') from None
    hint = "set KERAS_BACKEND to one that is installed, torch or jax, before Keras is imported"
    raise ImportError(f"Keras cannot load its backend ({error}): {hint}") from error

SUFFIX = ".weights.h5"
_MADE_BY = "keras.from_checkpoints"
_INSIDE = "model.weights.h5"  # the weights in a .keras archive
_SHOWN = 5  # names in a message


def from_checkpoints(
    source: AnyPath | Iterable[AnyPath],
    model: Any,
    x: Any,
    y: Any,
    run_dir: AnyPath,
    *,
    batch_size: int | None = None,
    from_logits: bool | None = None,
    progress: bool | None = None,
) -> Run:
    """Evaluate the checkpoints of a Keras training that is over, and make a run of them.

    Each checkpoint is evaluated once, in the order of epochs. The run refers to the files: it needs them, unchanged. If
    interrupted, call it again to go on; called again later, it adds checkpoints that are new. Of a file, the weights
    alone are read; nothing from it is executed.

    Parameters
    ----------
    source : path, pattern or list of paths
        A folder of files that `ModelCheckpoint`, `save_weights` or `save` of Keras wrote: .weights.h5, .keras, .h5. A
        text such as "out/model_*.keras" is a pattern. Epochs come from the names, as in `fmn_ref.from_checkpoints`.
    model : keras.Model
        A model that the weights fit. It gets its own back afterwards.
    x : array or data set
        What `model.predict` takes: data that the model was not trained on, the same samples in the same order each
        time. Labels in it are ignored.
    y : (n_samples,) or (n_samples, 1) integers, or (n_samples, n_classes) one-hot
        Labels of `x`.
    run_dir : path
        Folder of the run; created if missing.
    batch_size : int, optional
        As in `model.predict`.
    from_logits : bool, optional
        Whether the model returns logits. Default: as the loss says that the model was compiled with, else False.
    progress : bool, optional
        Show a progress bar; default: if standard error is a terminal.

    Returns
    -------
    Run
        Its epochs are the numbers in the names. `probabilities` takes it.

    Raises
    ------
    FileNotFoundError
        No checkpoint is there.
    TypeError, ValueError
        A checkpoint is damaged, does not fit the model (what is missing or left over is listed) or changed since it was
        recorded; two files claim one epoch; `run_dir` holds another run, or one of other data; the model returns
        neither probabilities nor declared logits.

    Examples
    --------
    >>> run = from_checkpoints("out", model, x_val, y_val, "runs/imported")  # doctest: +SKIP
    >>> probs = probabilities(run, model, x_val)  # doctest: +SKIP
    """
    predictor, labels = Predictor(model, x, batch_size, from_logits), class_labels(y, "y")
    files = find_checkpoints(source, endings=KERAS)
    check_apart(run_dir, files)
    if not RunFolder(run_dir).run_json.exists():  # what does not fit is refused before anything is written
        _correct(predictor, next(iter(files.values())), labels)
    read = dict[str, Any]()

    def record(epoch: int, path: Path) -> float:
        stamp = references.stamp(path)  # before it is read: it may change meanwhile
        correct = _correct(predictor, path, labels)
        read.update(target=path, key="", files=stamp)
        recorder.record_correct(epoch, correct, labels)
        return float(correct.mean())

    options: dict[str, Any] = {"config": {"made_by": _MADE_BY}, "suffix": references.SUFFIX}
    with Recorder(run_dir, save=lambda path: references.write_reference(path, **read), **options) as recorder:
        new = unrecorded(recorder, files)
        _check_latest(recorder, files, predictor, labels)
        record_each(recorder, new, record, progress)
        return recorder.run


def _correct(predictor: Predictor, path: Path, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Correctness (n_samples,) of a checkpoint."""
    columns = predictor.columns(path)
    if len(columns) != len(labels):
        raise ValueError(f"y: expected {len(columns)} labels, as x has samples, got {len(labels)}")
    return correctness(columns, labels)


def _check_latest(recorder: Recorder, files: dict[int, Path], predictor: Predictor, labels: NDArray[np.int64]) -> None:
    """Evaluate the latest recorded checkpoint that is there once more: the data may not be other."""
    epochs = recorder.run.history.epochs if recorder.next_epoch else ()
    there = [row for row, epoch in enumerate(epochs) if epoch in files]
    if there:
        path, history = files[epochs[there[-1]]], recorder.run.history
        correct = _correct(predictor, path, labels)
        if len(correct) != history.n_samples or np.mean(history[there[-1]] != correct) >= 0.05:  # another device rounds
            raise refusal(recorder.folder, f"{path}, or of other data")


class Predictor:
    """Predicts data with the weights of each checkpoint. The model has its own back after each prediction.

    Parameters
    ----------
    model, x, batch_size, from_logits
        As in `from_checkpoints`.
    """

    def __init__(self, model: Any, x: Any, batch_size: int | None, from_logits: bool | None) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"model: expected a keras.Model, got {type(model).__name__}")
        self._model, self._x, self._batch_size = model, x, batch_size
        self.logits = gives_logits(model) if from_logits is None else from_logits

    def columns(self, path: Path) -> NDArray[Any]:
        """Logits or probabilities (n_samples, n_classes) of a checkpoint, which may be a reference."""
        file = references.check_unchanged(path) if references.is_reference(path) else path
        ensure_built(self._model, self._x, self._batch_size)
        before = self._model.get_weights()
        try:
            self._load(file)
            with random_state_kept():
                outputs = self._model.predict(self._x, batch_size=self._batch_size, verbose=0)
        finally:
            self._model.set_weights(before)
        try:
            return class_columns(outputs, self.logits)
        except ValueError as error:
            raise ValueError(f"{error} (with the weights of {file})") from error

    def _load(self, path: Path) -> None:
        with _unpacked(path) as file:
            self._check_sizes(_sizes(file, path), path)
            skip = None if file.suffixes[-2:] != [".weights", ".h5"] else getattr(self._model, "optimizer", None)
            load_weights(self._model, file, skip, name=path)

    def _check_sizes(self, found: dict[str, int], path: Path) -> None:
        """Refuse weights of another network, of which Keras might load a part.

        Sums are compared: versions of Keras give layers other names. A file may also hold other numbers than
        `model.weights` does, such as a metric's.
        """
        n = sum(found.values())
        if n == self._model.count_params() or n == sum(self._own_sizes.values()):
            return
        parts = {"missing": self._own_sizes.keys() - found.keys(), "left over": found.keys() - self._own_sizes.keys()}
        listed = "; ".join(f"{what} {', '.join(sorted(names)[:_SHOWN])}" for what, names in parts.items() if names)
        counts = f"it holds {n} numbers, and the model {sum(self._own_sizes.values())}"
        raise ValueError(f"{path}: does not fit the model: {counts}" + f" ({listed})" * bool(listed))

    @cached_property
    def _own_sizes(self) -> dict[str, int]:
        """Sizes of the arrays that a checkpoint of the model holds."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, _INSIDE)
            self._model.save_weights(path)
            return _sizes(path, path)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Yield the HDF5 file of a checkpoint: the file itself, or a copy of the weights in a .keras archive."""
    if path.suffix != ".keras":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        with _files.reading(path, "a .keras file") as file, zipfile.ZipFile(file) as archive:
            found = [info for info in archive.infolist() if info.filename == _INSIDE]
            if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"expected {_INSIDE} in it, once and not compressed")
            with archive.open(found[0]) as member, open(Path(folder, _INSIDE), "wb") as copy:
                shutil.copyfileobj(member, copy)  # compares the checksum at the end
        yield Path(folder, _INSIDE)


def _sizes(path: Path, name: Path) -> dict[str, int]:
    """Sizes of the arrays in an HDF5 file, without the optimizer's; ValueError for what lies in another file."""
    sizes = dict[str, int]()

    def outside(part: str, link: Any) -> str | None:
        item = file[part] if isinstance(link, h5py.HardLink) else None
        if item is None or (isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)):
            return part
        if isinstance(item, h5py.Dataset) and not part.startswith("optimizer"):
            sizes[part] = item.size
        return None

    with _fitting(name), _files.opened(path) as opened, h5py.File(opened, "r") as file:
        if (part := file.visititems_links(outside)) is not None:
            raise ValueError(f"{part} in it leads elsewhere")
    return sizes


@contextlib.contextmanager
def _fitting(name: Path) -> Iterator[None]:
    """Turn an error of a reader into a ValueError of one line that names the checkpoint."""
    try:
        yield
    except Exception as error:  # of h5py, for any damage
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise ValueError(f"{name}: damaged, or does not fit the model: {reason}") from error


class probabilities(StoredPredictions):
    """Predictions of each recorded epoch on `x`, computed when read; the latest 4 GiB stay in memory.

    ``probabilities(run, model, x)[i]`` is (n_samples, n_classes) float32 for row i of the history. A single output
    counts as two classes.

    Parameters
    ----------
    run : Run
        ``callback.run``, that of `from_checkpoints`, ``Run.open(run_dir)``, or `kept` of one.
    model : keras.Model
        Loads each epoch's weights to predict, and gets its own back afterwards.
    x : array or data set
        What `model.predict` takes.
    batch_size : int, optional
        As in `model.predict`.
    from_logits : bool, optional
        Whether the model returns logits. Default: as the loss says that the model was compiled with, else False.

    Raises
    ------
    TypeError, ValueError
        Here: `run` was not recorded with Keras. When read: a checkpoint is damaged or does not fit; the model returns
        neither probabilities nor declared logits.
    FileNotFoundError
        When read: `keep` deleted the checkpoint. Use `run.kept`.

    Examples
    --------
    >>> fused = plan.apply(probabilities(run, model, x_test))  # doctest: +SKIP
    """

    def __init__(
        self, run: Run, model: Any, x: Any, *, batch_size: int | None = None, from_logits: bool | None = None
    ) -> None:
        if not isinstance(run, Run):
            raise TypeError(f"run: expected a Run, got {type(run).__name__}")
        if run.suffix != SUFFIX and run.config.get("made_by") != _MADE_BY:
            raise ValueError(f"run: {run.run_dir} was not recorded with Keras (no {SUFFIX} files)")
        super().__init__(run)
        self._predictor = Predictor(model, x, batch_size, from_logits)

    def _evaluate(self, row: int) -> NDArray[np.float32]:
        columns = self._predictor.columns(self._run.checkpoint(row))
        return softmax(columns, "model") if self._predictor.logits else columns.astype(np.float32)


def class_labels(y: Any, name: str) -> NDArray[np.int64]:
    """Return classes (n_samples,) of labels in any form that Keras's losses take: floats, a column, one-hot."""
    a = _check.array(y, name)
    if a.dtype.kind in "bf" and (a == np.floor(a)).all():
        a = a.astype(np.int64)
    if a.ndim == 2 and a.shape[1] == 1:
        a = a[:, 0]
    elif a.ndim == 2:
        if not ((a == 0) | (a == 1)).all() or not (a.sum(1) == 1).all():
            raise ValueError(f"{name}: expected classes, or rows with a single 1 (one-hot), got shape {a.shape}")
        a = a.argmax(1)
    return _check.labels(a, name=name)


def class_columns(outputs: Any, logits: bool) -> NDArray[Any]:
    """Return logits or probabilities (n_samples, n_classes); a single output becomes the second of two classes."""
    if isinstance(outputs, (dict, list, tuple)):
        hint = "record one of several by fmn.Recorder in a callback of your own (docs/integrations/loops.md)"
        raise TypeError(f"model: expected one output, got {len(outputs)}; {hint}")
    z = np.asarray(outputs)
    z = z.astype(np.float64 if z.dtype == np.float64 else np.float32)  # NumPy does not know bfloat16
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"model: expected predictions of shape (n_samples, n_classes), got shape {z.shape}")
    if z.shape[1] == 1:
        z = np.concatenate([np.zeros_like(z) if logits else 1 - z, z], axis=1)
    _check_columns(z, logits)
    return z


def _check_columns(z: NDArray[Any], logits: bool) -> None:
    """Refuse probabilities that were declared logits, and the reverse."""
    if logits:
        if (z >= 0).all() and (z <= 1).all() and _check.sums_to_one(z):
            raise ValueError("from_logits: the model gives probabilities (rows sum to 1), not logits")
        return
    try:
        _check.probabilities(z, name="model")
    except ValueError as error:
        finite = np.isfinite(z).all()
        hint = "if it gives logits, say from_logits=True" if finite else "what was recorded before is intact"
        raise ValueError(f"{error}; {hint}") from None


def gives_logits(model: Any) -> bool:
    """Read `from_logits` of the loss that the model was compiled with."""
    loss = getattr(model, "loss", None)
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    return bool(config.get("from_logits", False))


def ensure_built(model: Any, x: Any, batch_size: int | None) -> None:
    """Predict once if the model has no weights yet: without an Input, it gets them from its first data."""
    if not model.built:
        with random_state_kept():
            model.predict(x, batch_size=batch_size, verbose=0)


def random_state_kept() -> contextlib.AbstractContextManager[Any]:
    """Restore torch's random state afterwards: there `predict` draws from the generator that training uses."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    from torch.random import fork_rng

    return fork_rng(devices=[])


def load_weights(model: Any, path: Path, skip: Any = None, name: Path | None = None) -> None:
    """Load a file into the model, but for the part `skip`; a ValueError calls the file `name`."""
    with _fitting(name or path), warnings.catch_warnings():
        # Keras only warns if the checkpoint holds the state of another kind of optimizer, or lacks nested layers.
        warnings.filterwarnings("error", "Skipping variable loading for optimizer")
        warnings.filterwarnings("error", "Skipping nested container")
        keras.saving.load_weights(model, path, objects_to_skip=None if skip is None else [skip])
