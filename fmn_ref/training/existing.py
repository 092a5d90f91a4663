"""from_checkpoints: a run of the checkpoints that another program saved, each evaluated once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import _check
from ..metrics.curves import correctness
from ..metrics.history import labels_digest
from ..runs import adapters, checkpoints, foreign, references
from ..runs.discovery import find_checkpoints
from ..runs.existing import check_apart, record_each, refusal, unrecorded
from ..runs.folder import AnyPath, RunFolder
from ..runs.recorder import Recorder
from ..runs.run import Run
from .copies import InPlace, independent
from .data import Batches, Forward, Output, arrays_digest, check_module, device_of, predict
from .kept import KeptPredictions, data_digest
from .logits import predicted_classes
from .order import Order

logger = logging.getLogger(__name__)


def from_checkpoints(
    source: AnyPath | Iterable[AnyPath],
    model: nn.Module,
    data: Any,
    run_dir: AnyPath,
    *,
    key: str | None = None,
    forward_fn: Forward | None = None,
    link: bool = True,
    keep: str = "all",
    half: bool = False,
    keep_predictions: bool = False,
    batch_size: int = 256,
    progress: bool | None = None,
) -> Run:
    """Evaluate the checkpoints of a training that is over, and make a run of them.

    Each checkpoint is evaluated once, in the order of epochs or steps, with one network in memory. If interrupted, call
    it again to go on; called again later, it adds checkpoints that are new. Nothing from a file is executed.

    Parameters
    ----------
    source : path, pattern or list of paths
        A folder of files (.pt, .pth, .pth.tar, .ckpt, .bin, .safetensors), or of folders with one of these, with shards
        and their index, or of torch.distributed.checkpoint. A text such as "runs/a/epoch_*.pt" is a pattern. Epochs
        come from the names: the number after "epoch", after "step", after "checkpoint", else the one that differs;
        without numbers, from "epoch" or "global_step" in the files. A folder's links and files named "last" or "best"
        are left out with a warning.
    model : torch.nn.Module
        A network that the checkpoints fit, on the device to use. Its own weights do not change; a copy is evaluated.
    data : (inputs, labels), torch Dataset or DataLoader
        Labelled data that the network was not trained on, always in the same order.
    run_dir : path
        Folder of the run; created if missing.
    key : str, optional
        Where the weights are in a file, if several state_dicts fit: "model_ema", or "a.b" for one inside another.
        By default averaged copies (names with "ema", "swa") are not taken. Prefixes of names such as "module.",
        "_orig_mod.", "model." and "net." are removed where the names of the model then fit exactly.
    forward_fn : callable(model, batch) -> (logits, labels), optional
        See `train`.
    link : bool, default True
        Refer to the files where they are; the run then needs them, unchanged. If False, the weights are copied.
    keep : str, default "all"
        Of `Recorder`: which copies, or references, stay.
    half : bool, default False
        Store copies in 16 bits; needs ``link=False``.
    keep_predictions : bool, default False
        Store the probabilities, as float16, so that `run.probabilities` of the same data reads instead of evaluating.
    batch_size : int, default 256
        Ignored for a DataLoader.
    progress : bool, optional
        Show a progress bar; default: if standard error is a terminal.

    Returns
    -------
    Run
        Its epochs are the numbers of the checkpoints, `run.history.epochs`. `run.model` has the weights of the latest
        one, unless the network cannot be copied.

    Raises
    ------
    FileNotFoundError
        No checkpoint is there.
    TypeError, ValueError
        A checkpoint is damaged, does not fit the model (what is missing and left over is listed) or changed since it
        was recorded; two files claim one epoch; `run_dir` holds another run, or one of other data; the network returns
        no finite logits.

    Examples
    --------
    >>> import tempfile, torch, fmn_ref as fmn
    >>> model, folder = torch.nn.Linear(8, 2), tempfile.mkdtemp()
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> for epoch in (1, 2, 10):
    ...     torch.save({"epoch": epoch, "model": model.state_dict()}, f"{folder}/epoch_{epoch}.pt")
    >>> run = fmn.from_checkpoints(folder, model, (x, y), tempfile.mkdtemp())
    >>> run.history.epochs
    (1, 2, 10)
    """
    check_module(model, "model")
    if half and link:
        raise ValueError("half: copies are stored in 16 bits, and nothing is copied; pass link=False")
    files = find_checkpoints(source, _read_counter)
    first = next(iter(files.values()))
    check_apart(run_dir, files)
    loader = _Loader(key)
    evaluation = Evaluation(model, data, loader.load, forward_fn=forward_fn, batch_size=batch_size)
    digest = data_digest(data) if keep_predictions else ""
    if digest is None:
        raise TypeError("keep_predictions: the data holds objects by which it could not be recognised later")
    if not RunFolder(run_dir).run_json.exists():
        evaluation.prepare(first, digest)
    config = {"made_by": "from_checkpoints", "key": key, "link": link, "data": arrays_digest(data)}
    options: dict[str, Any] = {"suffix": references.SUFFIX, "save": loader.refer} if link else {"half": half}
    with Recorder(run_dir, model, keep, config=config, forward_fn=forward_fn, **options) as recorder:
        return evaluation.record(recorder, files, digest=digest, progress=progress)


def _read_counter(path: Path, name: str) -> int | None:
    return foreign.counter_of(foreign.read_content(path), name)


_Evaluated = tuple[dict[str, Any], Tensor, Tensor, NDArray[np.bool_]]  # weights, outputs, labels, correctness


class _Loader:
    """Reads checkpoints, and refers to the latest one."""

    def __init__(self, key: str | None) -> None:
        self._key, self._loaded = key, dict[str, Any]()

    def load(self, network: nn.Module, path: Path) -> None:
        """Load a checkpoint into the network."""
        files = references.stamp(path)  # before it is read: it may change meanwhile
        state, key = foreign.read_state(path, network, self._key)
        checkpoints.load_weights(network, state, path)
        self._loaded = {"target": path, "key": key, "files": files}

    def refer(self, path: Path) -> None:
        """Write a reference to the checkpoint that was loaded last."""
        references.write_reference(path, **self._loaded)


class Evaluation:
    """One network that is evaluated with the weights of each checkpoint.

    Parameters
    ----------
    model : nn.Module
        It does not change.
    data, forward_fn, batch_size
        As in `from_checkpoints`.
    load : callable(network, path)
        Loads a checkpoint into the network.
    name : str
        Of the argument `data`, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        load: Callable[[nn.Module, Path], object],
        *,
        forward_fn: Forward | None = None,
        batch_size: int = 256,
        name: str = "data",
    ) -> None:
        self._network = independent(checkpoints.unwrap(model))
        size = _check.number(batch_size, 1, 2**31, "batch_size", int)
        self._batches, self._order = Batches(data, size, device_of(self._network)), Order(data, name)
        self._load, self._forward_fn, self._name = load, forward_fn, name
        self._prepared: dict[Path, _Evaluated] = {}

    def prepare(self, path: Path, digest: str) -> None:
        """Evaluate the first checkpoint before there is a run: what is refused then leaves nothing behind."""
        self._prepared[path] = self._evaluated(path, digest)

    def load(self, path: Path) -> dict[str, Any]:
        """Load a checkpoint into the network; return its weights."""
        self._load(self._network, path)
        return adapters.state_of(self._network)

    def record(
        self, recorder: Recorder, files: dict[int, Path], *, digest: str = "", progress: bool | None = None
    ) -> Run:
        """Record the checkpoints that are not recorded yet, and keep predictions if there is a digest of the data."""
        new = unrecorded(recorder, files)
        self._check_recorded(recorder, files)
        record_each(recorder, new, partial(self._record_one, recorder, digest), progress)
        run = recorder.run
        if not isinstance(self._network, InPlace):
            if not new and references.exists(run.checkpoints[-1]):
                checkpoints.load_into(self._network, run.checkpoints[-1])
            run.model = self._network  # as after a training: with the latest weights
        if new and self._order.labels is not None:
            _warn_of_guessing(run, self._order.labels)
        return run

    def _record_one(self, recorder: Recorder, digest: str, epoch: int, path: Path) -> float:
        prepared = self._prepared.pop(path) if path in self._prepared else self._evaluated(path, digest)
        weights, outputs, labels, correct = prepared
        if digest:
            kept = KeptPredictions(recorder.folder)
            kept.begin(digest, labels.numpy())
            kept.write(epoch, outputs.softmax(1).numpy())
        recorder.record_correct(epoch, correct, labels, weights=weights)
        return float(correct.mean())

    def _evaluated(self, path: Path, digest: str) -> _Evaluated:
        weights = self.load(path)
        return weights, *self._evaluate(path, _unchanged if digest else predicted_classes)

    def _evaluate(self, path: Path, output: Output = predicted_classes) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
        """Predict with the checkpoint that is loaded, whose path is for errors: (outputs, labels, correctness)."""
        try:
            forward_fn, order = self._forward_fn, self._order
            outputs, labels = predict(self._network, self._batches, forward_fn=forward_fn, output=output, order=order)
            return outputs.cpu(), labels.cpu(), correctness(outputs.cpu(), labels.cpu())
        except ValueError as error:
            raise ValueError(f"{error} (with the weights of {path})") from error

    def _check_recorded(self, recorder: Recorder, files: dict[int, Path]) -> None:
        """Compare the latest checkpoint that is recorded, unless a reference and a digest tell that all is the same."""
        there = [epoch for epoch in (recorder.run.history.epochs if recorder.next_epoch else ()) if epoch in files]
        if not there:
            return
        stored = recorder.folder.checkpoint(there[-1], recorder.run.suffix)
        referred = references.is_reference(stored) and stored.exists()
        if not (referred and recorder.run.config.get("data")):
            self._check_latest(recorder.run, there[-1], files[there[-1]])

    def _check_latest(self, run: Run, epoch: int, path: Path) -> None:
        """Evaluate the latest recorded checkpoint once more: neither its weights nor the data may be others."""
        row, weights = run.history.epochs.index(epoch), checkpoints.snapshot(self.load(path))
        _, labels, correct = self._evaluate(path)
        same = run.history.digest == labels_digest(labels)
        same = same and bool(np.mean(run.history[row] != correct) < 0.05)  # another device may round differently
        stored = run.checkpoints[row]
        if same and stored.exists() and not references.is_reference(stored):
            copied = adapters.state_of(checkpoints.load_into(self._network, stored))
            pairs = [(value, copied[name]) for name, value in weights.items() if isinstance(value, Tensor)]
            same = all(torch.allclose(a.float(), b.float(), 1e-3, 1e-7, equal_nan=True) for a, b in pairs)  # of 16 bits
        if not same:
            raise refusal(run.folder, f"{path}, or of other {self._name}")


def _warn_of_guessing(run: Run, labels: Tensor) -> None:
    """Log a warning if no checkpoint is better than an answer that is always the same: the data may be other data."""
    best = max(float(run.history[row].mean()) for row in range(len(run.history)))
    guess = float(torch.bincount(labels).max()) / len(labels)
    if best <= guess < 1:
        hint = "are the inputs scaled, and the classes numbered, as in the training?"
        logger.warning(
            "no checkpoint is right more often (%.1f %%) than the most frequent label is (%.1f %%): %s",
            100 * best,
            100 * guess,
            hint,
        )


def _unchanged(logits: Tensor) -> Tensor:
    return logits
