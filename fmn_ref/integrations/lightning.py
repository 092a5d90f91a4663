"""PyTorch Lightning: RecorderCallback records every validation of `trainer.fit` as one epoch of a run.

recorder = RecorderCallback("runs/mine"); Trainer(callbacks=[recorder]).fit(module, ...); recorder.run
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from .. import _check, _files
from ..metrics.curves import correctness
from ..runs import checkpoints
from ..runs.recorder import Recorder, in_sample_order
from ..runs.retention import Keep
from ..runs.run import Run
from ..training import data, distributed
from ..training.order import RANDOM, Listener, Order, samplers_of

logger = logging.getLogger(__name__)
OutputsOf = Callable[[Any, Any], tuple[Any, ...]]
_SCORES = ("logits", "scores", "probs", "preds", "predictions")
_LABELS = ("labels", "targets", "label", "target", "y")
_INDEX = ("index", "indices", "idx")
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_RETURN = 'return {"logits": (n, n_classes)} from it, or give RecorderCallback an outputs_of=function'


def _callback_class() -> Any:
    """Return Callback of the Lightning that is imported already, else of an installed one.

    Lightning comes under two names, whose classes do not mix.
    """
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "?"):
                raise  # Lightning is installed, but lacks a package of its own
    raise ImportError('this needs Lightning: pip install "fmn_ref[lightning]"')


class RecorderCallback(_callback_class()):  # type: ignore[misc]
    """Record a `trainer.fit`: correctness history and checkpoints, one epoch per validation.

    `validation_step` returns the predictions of a batch: a dict with "logits", "scores" or "probs" (n, n_classes) or
    "preds" (n,), or that tensor alone. Labels come from the same dict ("labels" or "targets"), else from the batch: its
    second element, or under the same names.

    The callback logs max_e F_e so far as "peak_forget_fraction", for every logger and for `monitor=`. For a dataloader
    other than the first, the name ends in "/dataloader_idx_1", as Lightning's names do.

    Parameters
    ----------
    run_dir : path
        Folder of the run. A run in it is continued if the trainer resumes.
    keep : str, default "all"
        Which checkpoints stay on disk; see `fmn_ref.Recorder`.
    half : bool, default False
        Store weights in 16 bits; see `fmn_ref.Recorder`.
    model : nn.Module, optional
        Part of the LightningModule that is stored and that `run` evaluates. Default: the whole, through its `forward`.
    forward_fn : callable(model, batch) -> (logits, labels), optional
        How `run` evaluates a batch; see `fmn_ref.train`. Default: model(batch[0]).
    outputs_of : callable(outputs, batch) -> (scores, labels) or (scores, labels, index), optional
        Reads predictions, labels and sample numbers; `outputs` is the return value of `validation_step`. Default: by
        the names above.
    dataloader_idx : int, default 0
        Which validation dataloader is recorded, if there are several.
    overwrite : bool, default False
        If the trainer starts anew, discard a run in `run_dir` instead of refusing it.

    Attributes
    ----------
    run_dir : Path
    run : Run
        The recorded run with its model, for `fuse`, `FusedModel` and `distill`.

    Raises
    ------
    TypeError, ValueError
        In the sanity check: outputs without predictions, predictions that `fmn_ref.correctness` refuses, or a shuffled
        loader. When training starts: no validation; another run, or another process that writes, in `run_dir`; weights
        to keep that are sharded over processes (FSDP, DeepSpeed). Later: as `Recorder.record`.

    Notes
    -----
    **Order.** Rows of the history follow the order of the data set. Lightning adds a DistributedSampler to loaders
    itself: then the callback gathers the rows of all processes by sample number and drops repeated ones. Any other
    sampler that shuffles or divides needs each sample's number, as "index" in the outputs. Fingerprints of the batches
    notice samples that change places unseen, as in a stream that shuffles.

    **Weights.** The callback stores a plain state_dict of the weights that are validated, as
    `trainer.strategy.lightning_module_state_dict()` returns them. If another callback averages weights for validation,
    these are the averages. Unlike the files of `trainer.save_checkpoint`, which may pickle hyper-parameters, they load
    into any nn.Module without running code. Keep ModelCheckpoint to resume from.

    **Resuming.** `fit(ckpt_path=...)` discards the epochs recorded after that checkpoint. Let ModelCheckpoint save
    after validation, which is its default: Lightning does not repeat a validation that follows a checkpoint.

    **Numbers.** An epoch has Lightning's number, or the next free one if there are several validations in an epoch.

    **Lock.** The callback holds the folder's lock from the start of `fit` to its end or its failure.

    Examples
    --------
    >>> recorder = RecorderCallback("runs/mine", keep="budget:8")
    >>> trainer = lightning.Trainer(max_epochs=40, callbacks=[recorder])  # doctest: +SKIP
    >>> trainer.fit(module, train_loader, val_loader)  # doctest: +SKIP
    >>> probs = recorder.run.kept.probabilities(val_loader)  # doctest: +SKIP
    >>> plan = fmn_ref.fuse(probs, probs.labels)  # doctest: +SKIP
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        keep: str = "all",
        *,
        half: bool = False,
        model: nn.Module | None = None,
        forward_fn: data.Forward | None = None,
        outputs_of: OutputsOf | None = None,
        dataloader_idx: int = 0,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        if model is not None:
            data.check_module(model, "model")
        if outputs_of is not None and not callable(outputs_of):
            raise TypeError(f"outputs_of: expected a function, got {type(outputs_of).__name__}")
        self.run_dir = _files.absolute(run_dir)
        self._keep, self._stores, self._half = keep, Keep.of(keep).rule != "none", half
        self._model, self._forward_fn, self._overwrite = model, forward_fn, overwrite
        self._outputs_of = outputs_of or outputs_and_labels
        self._dataloader_idx: int = _check.number(dataloader_idx, 0, 2**31, "dataloader_idx", int)
        self._module: Any = None
        self._fast_dev_run = False
        self._recorder: Recorder | None = None  # in the first process, during fit
        self._weights: dict[str, Any] | None = None  # of the validation that goes on
        self._batches: list[tuple[Any, Any, Any]] = []  # (correct, labels, sample numbers or None) of each
        self._order = Order(None, "validation")
        self._listener = Listener(None)  # of the validation that goes on
        self._next_epoch, self._n_batches = 0, -1  # of the recorded epochs; training batches before the last of them

    @property
    def run(self) -> Run:
        """The recorded run with its model, in any process that sees `run_dir`."""
        if self._fast_dev_run:
            raise ValueError("run: fast_dev_run records nothing")
        model = self._module if self._model is None else self._model
        return Run.open(self.run_dir, model, self._forward_fn)

    @property
    def state_key(self) -> str:
        """Name of this callback's state in Lightning's checkpoints."""
        return f"fmn_ref.RecorderCallback[{self._dataloader_idx}]"

    def state_dict(self) -> dict[str, Any]:
        return {"next_epoch": self._next_epoch, "n_batches": self._n_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._next_epoch, self._n_batches = state_dict["next_epoch"], state_dict["n_batches"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._module = pl_module
        if self._model is not None and all(m is not checkpoints.unwrap(self._model) for m in pl_module.modules()):
            got = type(self._model).__name__
            raise ValueError(f"model: expected a module inside the LightningModule, got another {got}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()  # Lightning does not call `teardown` then

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.enable_validation:
            raise ValueError("validation: nothing to record; fit needs a loader and the module a validation_step")
        if self._stores and type(trainer.strategy).__name__ in _SHARDED:
            raise ValueError("keep: no process has all weights to store them; use keep='none'")
        self._order = Order(None, "validation")
        self._fast_dev_run = bool(trainer.fast_dev_run)
        if not self._fast_dev_run:
            self.run_dir = distributed.on_rank_zero(lambda: self._open(trainer))

    def _open(self, trainer: Any) -> Path:
        """Open the run and discard the epochs that the trainer will repeat."""
        if trainer.current_epoch == trainer.global_step == 0:
            self._next_epoch, self._n_batches = 0, -1
        half = self._half and checkpoints.parameter_names(self._model or trainer.lightning_module)
        self._recorder = Recorder(self.run_dir, keep=self._keep, half=half)
        start = max(trainer.current_epoch, self._next_epoch)
        self._check_start(start, self._recorder)
        dropped = self._recorder.rewind(start)
        if dropped and start:
            logger.warning("%s: dropped epochs %s, recorded after the checkpoint to go on from", self.run_dir, dropped)
        return self.run_dir

    def _check_start(self, start: int, recorder: Recorder) -> None:
        """Refuse a run that the trainer does not continue; a single epoch is left by a kill before a checkpoint."""
        n_epochs = len(recorder.run.history) if recorder.next_epoch else 0
        if start == 0 and n_epochs == 1:
            logger.warning("%s: holds one epoch, which is dropped: the trainer starts anew", self.run_dir)
        elif start == 0 and n_epochs > 1 and not self._overwrite:
            hint = "fit(ckpt_path=...) continues it, overwrite=True drops it; or choose another folder"
            raise ValueError(f"run_dir: {self.run_dir} holds {n_epochs} epochs, but the trainer starts anew; {hint}")
        found = recorder.next_epoch
        if 0 < found < self._next_epoch:
            was = f"ends before epoch {found}, but the checkpoint to resume from was saved before {self._next_epoch}"
            raise ValueError(f"run_dir: the history in {self.run_dir} {was}; restore it or choose another folder")

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._batches, self._weights = [], None
        self._listener = Listener(None if _records_nothing(trainer) else self._order)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != "fit" or dataloader_idx != self._dataloader_idx:
            return
        scores, labels, *index = self._outputs_of(outputs, batch)
        correct = correctness(scores, labels)
        if correct.ndim != 1:
            got = f"correctness of shape {correct.shape}"
            raise ValueError(f"validation_step: expected (n, n_classes) scores, got {got}")
        if not self._batches and self._stores and not _records_nothing(trainer):
            self._weights = self._copy_weights(trainer)  # now, since a callback may swap them before the end
        numbers = _check.labels(index[0], len(correct), name="index") if index and index[0] is not None else None
        labels = _check.labels(labels)
        self._batches.append((correct, labels, numbers))
        if numbers is None:
            self._listener.add(batch, torch.from_numpy(labels))

    def _copy_weights(self, trainer: Any) -> dict[str, Any] | None:
        """Copy the weights that are validated; None in all processes but the first."""
        if self._model is None:  # in every process: the strategy may have to gather them
            state = trainer.strategy.lightning_module_state_dict()
        else:
            state = checkpoints.unwrap(self._model).state_dict()
        if not trainer.is_global_zero:
            return None
        copied: dict[str, Any] = checkpoints.to_cpu(_without_histories(state), copy=True)
        return copied

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        if not self._batches:
            raise ValueError(f"dataloader_idx: no validation batch came from dataloader {self._dataloader_idx}")
        rows = self._rows(trainer)
        name = f"peak_forget_fraction/dataloader_idx_{self._dataloader_idx}".removesuffix("/dataloader_idx_0")
        if trainer.fast_dev_run:
            pl_module.log(name, 0.0, add_dataloader_idx=False)  # a callback may monitor it
        if _records_nothing(trainer):
            return
        correct, labels = _in_sample_order(*rows, pl_module.device)
        where = trainer.current_epoch, trainer.fit_loop.total_batch_idx
        peak, self._next_epoch = distributed.on_rank_zero(lambda: self._record(*where, correct, labels))
        self._n_batches, self._weights = where[1], None
        pl_module.log(name, peak, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)

    def _rows(self, trainer: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """Join this process's batches: sample numbers, correctness and labels."""
        corrects, classes, numbers = zip(*self._batches, strict=True)
        self._batches = []
        correct, labels = np.concatenate(corrects), np.concatenate(classes)
        if all(part is not None for part in numbers):
            return np.concatenate(numbers), correct, labels
        number = self._numbers_of_sampler(trainer, len(correct))
        if number is None:
            number = np.arange(len(correct))
            if trainer.fit_loop.total_batch_idx != self._n_batches:
                self._listener.check(torch.from_numpy(labels))
        return number, correct, labels

    def _record(self, epoch: int, n_batches: int, correct: Any, labels: Any) -> tuple[float, int]:
        assert self._recorder is not None
        if n_batches != self._n_batches:  # Lightning before 2.6 validates again, on one batch, when it resumes
            number = max(epoch, self._recorder.next_epoch)
            self._recorder.record_correct(number, correct, labels, weights=self._weights)
        return self._recorder.peak_forget_fraction, self._recorder.next_epoch

    def _numbers_of_sampler(self, trainer: Any, n: int) -> NDArray[np.int64] | None:
        """Find the sample numbers of this process's n rows by iterating over the sampler once more.

        None where the rows come in the order of the data set.
        """
        loaders = getattr(trainer.val_dataloaders, "flattened", trainer.val_dataloaders)
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        loader = loaders[self._dataloader_idx] if isinstance(loaders, (tuple, list)) else loaders
        batches = getattr(loader, "batch_sampler", None)
        samplers = samplers_of(loader)
        if any(isinstance(s, DistributedSampler) and s.dataset is loader.dataset for s in samplers):
            each = samplers[0] if batches is None else (i for batch in batches for i in batch)
            return np.array(list(each)[:n], np.int64)
        if trainer.world_size > 1 or any(isinstance(s, RANDOM) for s in samplers):
            kind = type(samplers[0] if samplers else loader).__name__
            hint = 'return their numbers, "index" (n,), from validation_step, or do not shuffle'
            raise ValueError(f"validation: a {kind} does not say again which samples it drew; {hint}")
        return None


def outputs_and_labels(outputs: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Find (scores or predictions, labels, sample numbers or None) by the names that `RecorderCallback` knows."""
    if isinstance(outputs, Tensor) and outputs.ndim:
        outputs = {"logits": outputs}
    given = outputs if isinstance(outputs, Mapping) else {}
    beside = batch if isinstance(batch, Mapping) else {}
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        beside = {"labels": batch[1]}
    scores, labels, index = _find(_SCORES, given), _find(_LABELS, given, beside), _find(_INDEX, given)
    if scores is None:
        got = f"a dict with {sorted(given)}" if given else "a loss" if isinstance(outputs, Tensor) else repr(outputs)
        raise ValueError(f"validation_step: expected the predictions of a batch, got {got}; {_RETURN}")
    if labels is None:
        raise ValueError(f'validation_step: no "labels", neither in what it returns nor in the batch; {_RETURN}')
    return scores, labels, index


def _find(names: tuple[str, ...], *sources: Mapping[str, Any]) -> Any:
    """Return the first value under one of the names; None if there is none."""
    return next((source[name] for source in sources for name in names if name in source), None)


def _without_histories(state: dict[str, Any]) -> dict[str, Any]:
    """Remove the history of each ForgetFraction in the module, which is no weight."""
    for name in [k for k, v in state.items() if isinstance(v, Mapping) and "labels_sha256" in v]:
        del state[name]
    return state


def _records_nothing(trainer: Any) -> bool:
    return bool(trainer.sanity_checking or trainer.fast_dev_run)


def _in_sample_order(
    numbers: NDArray[np.int64], correct: Any, labels: Any, device: torch.device
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Gather the rows of all processes in the order of their sample numbers, each sample once."""
    if distributed.world_size() == 1:
        return in_sample_order(numbers, correct, labels)[1:]
    ids, *parts = (torch.from_numpy(a).to(device) for a in (numbers, correct.view(np.uint8), labels))
    correct, labels = (part.cpu().numpy() for part in distributed.gather_rows(ids, *parts))
    return correct.view(bool), labels
