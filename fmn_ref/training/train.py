"""train: train a classifier, record every epoch, and resume after an interruption.

    run = fmn.train(model, (x_train, y_train), (x_val, y_val), epochs=40, run_dir="runs/a")

All random numbers of an epoch depend on (seed, epoch) only. A killed run therefore resumes from its last finished epoch
and ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from .. import _check
from ..runs.checkpoints import parameter_names
from ..runs.run import Run
from . import data
from .engine import Loss, fit
from .order import Order
from .recipe import Recipe
from .store import IN_FULL, Store, base_digest


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
    augment: data.Augment | None = None,
    forward_fn: data.Forward | None = None,
    loss_fn: Loss = F.cross_entropy,
    disk_wait: float = 3600.0,
    progress: bool | None = None,
    **recipe: Any,
) -> Run:
    """Train a classifier; record each epoch's checkpoint and which validation samples it classifies correctly.

    Parameters
    ----------
    model : nn.Module
        Trained in place, on the device where its parameters are. It returns logits, or an object with `.logits`.
    train_data : (inputs, labels), torch Dataset or DataLoader
        Inputs and labels are tensors or arrays with one row per sample. A DataLoader's own batch size replaces
        `batch_size`. A list of dicts with a key "labels", one for each sample, is taken as a Dataset.
    val_data : (inputs, labels), torch Dataset or DataLoader
        Must keep its order from one pass to the next. A sampler that shuffles is refused, and so is a pass that shows
        the samples of the first one in another order, as far as it is looked at (see `Order` in training/order.py).
    epochs : int
        Number of passes over `train_data`, at least 1.
    run_dir : path
        Folder of the run; created if missing.
    resume : bool, default True
        Continue the run in `run_dir`, or return it if it is finished. False: refuse a folder that holds a run. A run of
        other options is refused; one of other data if both are arrays, every input of which is read for it. Not
        compared: Datasets, DataLoaders, the initial weights, and the code of `forward_fn`, `loss_fn` and `augment`.
    keep : str, default "all"
        Which checkpoints to keep: "all", "none", "every:n" or "budget:n", as in `Recorder`.
    half : bool, default False
        Store checkpoints in 16 bits, as in `Recorder`.
    augment : callable, optional
        Maps the inputs of a training batch to new inputs, with draws from torch's generator; for example `crop_flip`.
        Batches must be tuples.
    forward_fn : callable(model, batch) -> (logits, labels), optional
        Evaluates batches of another form than (inputs, labels) or a dict with "labels".
    loss_fn : callable(logits, labels) -> scalar tensor, default cross-entropy
    disk_wait : float, default 3600.0
        Seconds to wait for free space on a full disk. After that the run ends with the error; it can be resumed.
    progress : bool, optional
        Show a bar on stderr with validation accuracy and peak forget fraction. Default: if stderr is a terminal.
    **recipe
        Fields of `Recipe`: batch_size, optimizer, lr, momentum, weight_decay, schedule, milestones, gamma, amp,
        channels_last, compile, seed.

    Returns
    -------
    Run
        With `history`, `checkpoints` and `probabilities(data)`. Epoch 0 is the state after the first pass. The model is
        left in evaluation mode.

    Raises
    ------
    FileExistsError
        `run_dir` holds a run and `resume` is False.
    TypeError, ValueError
        A recipe value out of range; data of the wrong kind or shape; a run in `run_dir` that was made with another
        configuration.
    FloatingPointError
        The loss became NaN or infinite. Earlier epochs remain recorded.

    Notes
    -----
    Frozen BatchNorm layers keep their statistics: those in evaluation mode, inside a model in training mode or with
    parameters that require no gradients. All other layers are put into training mode.

    A thread writes the files while the next epoch runs. A killed run resumes from the last epoch whose state is
    complete on disk.

    In several processes (`torchrun`, after `torch.distributed.init_process_group`), every process calls `train` with
    the same arguments. Each takes its part of every batch and of the validation set; rank 0 writes. All processes must
    see `run_dir`.

    A resumed run ends with the same bits as an uninterrupted one on the same machine with the same number of threads
    (on a GPU: with ``torch.use_deterministic_algorithms(True)``). That covers draws from torch's generators. It does
    not cover NumPy's and Python's generators, nor a DataLoader's persistent workers. torch's global generator is
    restored at the end.

    Examples
    --------
    >>> import tempfile, torch
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> run = train(torch.nn.Linear(8, 2), (x, y), (x, y), epochs=3, run_dir=tempfile.mkdtemp())
    >>> len(run.history), len(run.checkpoints), run.history.n_samples
    (3, 3, 64)

    References
    ----------
    arXiv 2507.08686, Section III (what is recorded).
    """
    settings = Recipe.of(recipe)
    epochs = _check.number(epochs, 1, 2**31, "epochs", int)
    data.check_module(model, "model")
    config = {"epochs": epochs, **asdict(settings), **_digests(data=train_data, val_data=val_data)}
    config |= base_digest(model)
    device = data.device_of(model)
    val, order = data.Batches(val_data, 256, device, split=True), Order(val_data, "val_data")
    with Store(run_dir, config, keep, resume, half and parameter_names(model), disk_wait) as store:
        if not store.load_final(model, epochs):
            fit(
                model,
                data.Batches(train_data, settings.batch_size, device, shuffle=True, split=True),
                epochs,
                settings,
                step=partial(data.forward, forward_fn=forward_fn),
                loss_fn=loss_fn,
                augment=augment,
                evaluate=partial(data.predict, data=val, forward_fn=forward_fn, order=order),
                store=store,
                progress=progress,
            )
    model.eval()
    return Run.open(store.folder, model, forward_fn)  # the working directory may be another one now


def _digests(**sets: Any) -> dict[str, Any]:
    """Digests of data sets, for run.json."""
    short = {name: data.arrays_digest(set_) for name, set_ in sets.items()}
    return short | {f"{name}{IN_FULL}": data.full_digest(set_) for name, set_ in sets.items()}
