"""train: one clear loop for classifiers, recorded epoch by epoch and resumable at any moment.

    run = fmn.train(model, (x_train, y_train), (x_val, y_val), epochs=40, run_dir="runs/a")

Everything random about an epoch is a function of (seed, epoch), so a run that was killed continues from its last
finished epoch and ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from ..runs.run import Run
from . import data
from .engine import Loss, fit
from .recipe import Recipe
from .store import Store


def train(
    model: nn.Module,
    train_data: Any,
    val_data: Any,
    *,
    epochs: int,
    run_dir: str | os.PathLike[str],
    resume: bool = True,
    keep: str = "all",
    half: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    forward_fn: data.Forward | None = None,
    loss_fn: Loss = F.cross_entropy,
    disk_wait: float = 3600.0,
    progress: bool | None = None,
    **recipe: Any,
) -> Run:
    """Train a classifier; store every epoch's checkpoint and which validation samples it gets right.

    Parameters
    ----------
    model : nn.Module
        Trained in place, on the device where its parameters are.
    train_data, val_data
        (inputs, labels) tensors or arrays, a torch Dataset, or a DataLoader (then `batch_size` is the loader's).
        Validation data must keep its order.
    epochs : int
    run_dir : path
    resume : bool
        Continue (or just return) the run that is in `run_dir`. False: refuse a folder with a run in it.
    keep, half
        Which checkpoints to keep, and in how many bits: as `Recorder`.
    augment : callable, optional
        inputs -> inputs, on training batches; draws from torch's generator.
    forward_fn : callable(model, batch) -> (logits, labels), optional
        For batches that are neither (inputs, labels) nor dicts with "labels". With `augment`, batches must be tuples.
    loss_fn : callable(logits, labels) -> scalar
        Default: cross-entropy.
    disk_wait : float
        Seconds to wait for room when the disk is full, before its error ends the run (which can be resumed).
    progress : bool, optional
        A bar on stderr with validation accuracy and peak forget fraction; default: when stderr is a terminal.
    **recipe
        Fields of `Recipe`: batch_size, optimizer, lr, momentum, weight_decay, schedule, milestones, gamma, amp,
        channels_last, compile, seed.

    Returns
    -------
    Run
        With history, checkpoints, and probabilities(data). Epochs count from 0: the state after the first pass.

    Raises
    ------
    FileExistsError
        A run is there and `resume` is False.
    ValueError, TypeError
        A recipe value out of range, data that does not fit, or a run in `run_dir` made with another configuration.
    FloatingPointError
        The loss became NaN or infinite; what was recorded before is intact.

    Notes
    -----
    Files are written by a thread while the next epoch runs; a run that is killed goes on from the last epoch whose
    state is whole on disk. In several processes (`torchrun`, after `torch.distributed.init_process_group`) every one
    calls `train` with the same arguments: each takes its part of every batch and of the validation set, the first
    one writes; `run_dir` must be on a disk that all of them see.

    Bit-identical resuming holds on the same machine with the same thread count (on a GPU: with
    ``torch.use_deterministic_algorithms(True)``), and for randomness from torch's generators
    (NumPy's and Python's are the caller's affair, as are a DataLoader's persistent workers). The global generator is
    put back afterwards; the model is left in evaluation mode.

    Examples
    --------
    >>> import tempfile, torch
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> run = train(torch.nn.Linear(8, 2), (x, y), (x, y), epochs=3, run_dir=tempfile.mkdtemp())
    >>> len(run.history), len(run.checkpoints), run.history.n_samples
    (3, 3, 64)
    """
    settings = Recipe.of(recipe)
    epochs = _check.number(epochs, 1, 2**31, "epochs", int)
    data.check_module(model, "model")
    config = {"epochs": epochs, **asdict(settings), "data": data_digest(train_data), "val_data": data_digest(val_data)}
    options: dict[str, Any] = {"half": half, "forward_fn": forward_fn, "disk_wait": disk_wait}
    with Store(run_dir, config, model, keep, resume=resume, **options) as store:
        device = data.device_of(model)
        val = data.Batches(val_data, 256, device, split=True)
        if not store.load_final(model, epochs):
            fit(
                model,
                data.Batches(train_data, settings.batch_size, device, shuffle=True, split=True),
                epochs,
                settings,
                step=forward_fn or data.default_forward,
                loss_fn=loss_fn,
                augment=augment,
                evaluate=partial(data.predict, data=val, forward_fn=forward_fn),
                store=store,
                progress=progress,
            )
    model.eval()
    return Run.open(run_dir, model, forward_fn) if store.recorder is None else store.recorder.run


def data_digest(samples: Any) -> str | None:
    """Notices that a run is continued on other data: of the labels and a few inputs of arrays; None for other data."""
    if not data.is_arrays(samples):
        return None
    inputs, *rest = data.as_tensors(samples)
    return tensors_digest([inputs[:: max(1, len(inputs) // 100)], *rest])


def tensors_digest(tensors: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        if isinstance(t, Tensor):
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
