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
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .. import _check
from ..metrics.curves import correctness
from ..runs import checkpoints
from ..runs.recorder import Recorder, Run
from ..runs.retention import Keep
from ..training import data, distributed

logger = logging.getLogger(__name__)
OutputsOf = Callable[[Any, Any], tuple[Any, ...]]
_SCORES = ("logits", "scores", "probs", "preds", "predictions")
_LABELS = ("labels", "targets", "label", "target", "y")
_INDEX = ("index", "indices", "idx")
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _callback_class() -> Any:
    """Of the Lightning that is imported already, or else installed: it comes under two names, which do not mix."""
    for name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or "?"):
                raise  # it is there, but lacks something
    raise ImportError('this needs Lightning: pip install "fmn_ref[lightning]"')


class RecorderCallback(_callback_class()):  # type: ignore[misc]
    """Correctness history and checkpoints of a `trainer.fit`, one epoch per validation; the sanity check is left out.

    `validation_step` returns what it predicts: a dict with "logits" (or "scores", "probs") (n, n_classes), or "preds"
    (n,), or that tensor alone. Labels are the dict's "labels" or "targets", else the batch's: its second element, or
    under the same names. Logs max_e F_e so far as "peak_forget_fraction", for every logger and for `monitor=`; of
    another dataloader than the first as "peak_forget_fraction/dataloader_idx_1", which is how Lightning names things.

    Parameters
    ----------
    run_dir, keep, half
        As `fmn_ref.Recorder`.
    model : nn.Module, optional
        The part of the LightningModule that is stored, and that `run` evaluates; default: the whole, by its `forward`.
    forward_fn : callable(model, batch) -> (logits, labels), optional
        How `run` evaluates a batch, if not by model(batch[0]); see `fmn_ref.train`.
    outputs_of : callable(outputs, batch) -> (scores, labels) or (scores, labels, index), optional
        Instead of the above; `outputs` is what validation_step returned.
    dataloader_idx : int
        Which one is recorded, where several validate.
    overwrite : bool
        A trainer that starts from the beginning drops the run that is in `run_dir`, instead of refusing it.

    Raises
    ------
    ValueError, TypeError
        In the sanity check: nothing to record in the outputs, not what `fmn_ref.correctness` takes, a shuffled loader.
        When training starts: no validation; `run_dir` holds another run; weights to be kept that are spread over
        processes (FSDP, DeepSpeed). Later: as `Recorder.record`.

    Notes
    -----
    Rows stand in the order of the data set. With a DistributedSampler, which Lightning puts into loaders itself, the
    rows of all processes are joined by sample number, and repeated ones dropped. Any other sampler that shuffles or
    divides needs each sample's number, as "index" in the outputs.

    Weights are taken as Lightning saves them, by `trainer.strategy.lightning_module_state_dict()`, while they are
    validated (so they are the averaged ones, where a callback averages for validation), and written as a plain
    state_dict. Files of `trainer.save_checkpoint` would hold the optimizer's state, may pickle hyper-parameters, and
    fit the LightningModule alone; these fit any nn.Module, load without running code, and obey `keep`. ModelCheckpoint
    goes on keeping what a training resumes from.

    Resuming, `fit(ckpt_path=...)`, drops what was recorded after that checkpoint. Save after validation, as
    ModelCheckpoint does unless told otherwise: Lightning does not catch up on a validation that follows a checkpoint.

    An epoch's number is Lightning's, or the next free one where it validates more often.

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
        self.run_dir = Path(run_dir)
        self._keep, self._stores, self._half = keep, Keep.of(keep).rule != "none", half
        self._model, self._forward_fn, self._overwrite = model, forward_fn, overwrite
        self._outputs_of = outputs_of or outputs_and_labels
        self._dataloader_idx: int = _check.number(dataloader_idx, 0, 2**31, "dataloader_idx", int)
        self._module: Any = None
        self._rehearses = False
        self._recorder: Recorder | None = None  # in the first process
        self._weights: dict[str, Any] = {}
        self._parts: list[tuple[Any, Any, Any]] = []
        self._next_epoch, self._n_batches = 0, -1  # of the recorded epochs; training batches before the last of them

    @property
    def run(self) -> Run:
        """What is recorded, with the model: for `fuse`, `FusedModel`, `distill`. In any process that sees `run_dir`."""
        if self._rehearses:
            raise ValueError("run: fast_dev_run records nothing")
        model = self._module if self._model is None else self._model
        return Run.open(self.run_dir, model, self._forward_fn)

    @property
    def state_key(self) -> str:
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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.enable_validation:
            raise ValueError("validation: nothing to record; fit needs a loader and the module a validation_step")
        if self._stores and type(trainer.strategy).__name__ in _SHARDED:
            raise ValueError("keep: no process has all weights to store them; use keep='none'")
        self._rehearses = bool(trainer.fast_dev_run)
        if not self._rehearses:
            self.run_dir = distributed.on_rank_zero(lambda: self._open(trainer))

    def _open(self, trainer: Any) -> Path:
        """The recorder, with nothing recorded that the trainer has yet to do."""
        if trainer.current_epoch == trainer.global_step == 0:
            self._next_epoch, self._n_batches = 0, -1
        self._recorder = Recorder(self.run_dir, keep=self._keep, half=self._half)
        start, found = max(trainer.current_epoch, self._next_epoch), self._recorder.next_epoch
        n_epochs = len(self._recorder.run.history) if found else 0
        if start == 0 and n_epochs == 1:  # killed before the first checkpoint
            logger.warning("%s: holds one epoch, which is dropped: the trainer starts anew", self.run_dir)
        elif start == 0 and n_epochs > 1 and not self._overwrite:
            hint = "fit(ckpt_path=...) continues it, overwrite=True drops it; or choose another folder"
            raise ValueError(f"run_dir: {self.run_dir} holds {n_epochs} epochs, but the trainer starts anew; {hint}")
        if 0 < found < self._next_epoch:
            was = f"ends before epoch {found}, but the checkpoint to resume from was saved before {self._next_epoch}"
            raise ValueError(f"run_dir: the history in {self.run_dir} {was}; restore it or choose another folder")
        dropped = self._recorder.rewind(start)
        if dropped and start:
            logger.warning("%s: dropped epochs %s, recorded after the checkpoint to go on from", self.run_dir, dropped)
        return self.run_dir

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._parts = []

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != "fit" or dataloader_idx != self._dataloader_idx:
            return
        scores, labels, *index = self._outputs_of(outputs, batch)
        right = correctness(scores, labels)
        if right.ndim != 1:
            raise ValueError(f"validation_step: expected (n, n_classes) scores, got correctness of shape {right.shape}")
        if not self._parts and self._stores and not _rehearsal(trainer):
            if self._model is None:  # in every process: the strategy may have to gather them
                state = trainer.strategy.lightning_module_state_dict()
            else:
                state = checkpoints.unwrap(self._model).state_dict()
            if trainer.is_global_zero:
                self._weights = checkpoints.to_cpu(_without_histories(state), copy=True)
        number = _check.labels(index[0], len(right), name="index") if index and index[0] is not None else None
        self._parts.append((right, _check.labels(labels), number))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        parts, self._parts = self._parts, []
        if not parts:
            raise ValueError(f"dataloader_idx: no validation batch came from dataloader {self._dataloader_idx}")
        right, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        given = all(index is not None for _, _, index in parts)
        numbers = np.concatenate([p[2] for p in parts]) if given else self._numbers(trainer, len(right))
        name = "peak_forget_fraction"
        if self._dataloader_idx:
            name += f"/dataloader_idx_{self._dataloader_idx}"
        if trainer.fast_dev_run:
            pl_module.log(name, 0.0, add_dataloader_idx=False)  # somebody may monitor it
        if _rehearsal(trainer):
            return
        right, labels = _sorted_rows(numbers, right, labels, pl_module.device)
        where = trainer.current_epoch, trainer.fit_loop.total_batch_idx
        peak, self._next_epoch = distributed.on_rank_zero(lambda: self._record(*where, right, labels))
        self._n_batches, self._weights = where[1], {}
        pl_module.log(name, peak, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)

    def _record(self, epoch: int, n_batches: int, right: Any, labels: Any) -> tuple[float, int]:
        assert self._recorder is not None
        if n_batches != self._n_batches:  # Lightning before 2.6 validates again, on one batch, when it resumes
            number = max(epoch, self._recorder.next_epoch)
            self._recorder.record_correct(number, right, labels, weights=self._weights or None)
        return self._recorder.peak_forget_fraction, self._recorder.next_epoch

    def _numbers(self, trainer: Any, n: int) -> NDArray[np.int64]:
        """Which samples of the data set the n rows of this process are, from the sampler; it is iterated once more."""
        loaders = getattr(trainer.val_dataloaders, "flattened", trainer.val_dataloaders)
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        loader = loaders[self._dataloader_idx] if isinstance(loaders, (tuple, list)) else loaders
        batches = getattr(loader, "batch_sampler", None)
        samplers = [s for s in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)) if s is not None]
        if any(isinstance(s, DistributedSampler) and s.dataset is loader.dataset for s in samplers):
            each = samplers[0] if batches is None else (i for batch in batches for i in batch)
            return np.array(list(each)[:n], np.int64)
        if trainer.world_size > 1 or any(isinstance(s, _RANDOM) for s in samplers):
            kind = type(samplers[0] if samplers else loader).__name__
            hint = 'give their numbers, "index" (n,), in what validation_step returns, or do not shuffle'
            raise ValueError(f"validation: a {kind} does not say again which samples it drew; {hint}")
        return np.arange(n)


def outputs_and_labels(outputs: Any, batch: Any) -> tuple[Any, Any, Any]:
    """(scores or predictions, labels, sample numbers or None), by the names that `RecorderCallback` knows."""
    if isinstance(outputs, Tensor) and outputs.ndim:
        outputs = {"logits": outputs}
    given = outputs if isinstance(outputs, Mapping) else {}
    beside = batch if isinstance(batch, Mapping) else {}
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        beside = {"labels": batch[1]}
    scores, labels, index = _first(_SCORES, given), _first(_LABELS, given, beside), _first(_INDEX, given)
    hint = 'return {"logits": (n, n_classes)} from it, or give RecorderCallback an outputs_of=function'
    if scores is None:
        got = f"a dict with {sorted(given)}" if given else "a loss" if isinstance(outputs, Tensor) else repr(outputs)
        raise ValueError(f"validation_step: expected the predictions of a batch, got {got}; {hint}")
    if labels is None:
        raise ValueError(f'validation_step: no "labels", neither in what it returns nor in the batch; {hint}')
    return scores, labels, index


def _first(names: tuple[str, ...], *sources: Mapping[str, Any]) -> Any:
    return next((source[name] for source in sources for name in names if name in source), None)


def _without_histories(state: dict[str, Any]) -> dict[str, Any]:
    """Weights do not hold the history of a ForgetFraction in the module, which goes without when they are loaded."""
    for name in [k for k, v in state.items() if isinstance(v, Mapping) and "labels_sha256" in v]:
        del state[name]
    return state


def _rehearsal(trainer: Any) -> bool:
    return bool(trainer.sanity_checking or trainer.fast_dev_run)


def _sorted_rows(numbers: NDArray[np.int64], right: Any, labels: Any, device: torch.device) -> tuple[Any, Any]:
    """Rows of all processes in the order of their numbers, each once."""
    if distributed.world_size() == 1:
        _, where, back = np.unique(numbers, return_index=True, return_inverse=True)
        if (labels[where][back] != labels).any():
            raise ValueError("index: expected each sample's own number, got one with several labels")
        return right[where], labels[where]
    ids, *parts = (torch.from_numpy(a).to(device) for a in (numbers, right.view(np.uint8), labels))
    right, labels = (part.cpu().numpy() for part in distributed.gather_rows(ids, *parts))
    return right.view(bool), labels
