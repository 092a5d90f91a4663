"""train: one clear loop for classifiers, recorded epoch by epoch and resumable at any moment.

    run = fmn.train(model, (x_train, y_train), (x_val, y_val), epochs=40, run_dir="runs/a")

Everything random about an epoch is a function of (seed, epoch), so a run that was killed continues from its last
finished epoch and ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import _check, checkpoints, data
from .recorder import Recorder, Run, claim

logger = logging.getLogger(__name__)
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of `train` and `distill`, passed to them by keyword.

    The defaults are METHOD's recipe for CIFAR with ResNet-18 (the papers give none).
    """

    batch_size: int = 128
    optimizer: str = "sgd"  # "sgd" (Nesterov momentum) or "adamw"
    lr: float = 0.1
    momentum: float = 0.9  # sgd only
    weight_decay: float = 5e-4
    schedule: str = "cosine"  # "cosine" to 0, "step" or "constant"; changes between epochs
    milestones: tuple[int, ...] = ()  # epochs at which "step" multiplies lr by gamma
    gamma: float = 0.1
    amp: bool = False  # bfloat16 autocast
    seed: int = 0

    def __post_init__(self) -> None:
        number = {"batch_size": _check.number(self.batch_size, 1, 2**31, "batch_size", int)}
        _check.choice(self.optimizer, ("sgd", "adamw"), "optimizer")
        _check.choice(self.schedule, ("cosine", "step", "constant"), "schedule")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            number[name] = _check.number(getattr(self, name), 0, 1e6, name)
        number["seed"] = _check.number(self.seed, 0, 2**32, "seed", int)
        if not isinstance(self.amp, bool):
            raise TypeError(f"amp: expected True or False, got {self.amp!r}")
        if not isinstance(self.milestones, (list, tuple)):
            raise TypeError(f"milestones: expected a tuple of epochs, got {self.milestones!r}")
        for epoch in self.milestones:
            _check.number(epoch, 0, 2**31, "milestones", int)
        for name, value in number.items():
            object.__setattr__(self, name, value)  # plain numbers, also where NumPy's were given

    @classmethod
    def of(cls, options: dict[str, Any]) -> Recipe:
        """A recipe from keywords; an unknown one is named, with those there are."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"{name}: not an option; there are {', '.join(known)}")
        return cls(**options)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
        )

    def make_scheduler(self, optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        milestones = self.milestones if self.schedule == "step" else ()
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), self.gamma)


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
    progress : bool, optional
        A bar on stderr with validation accuracy and peak forget fraction; default: when stderr is a terminal.
    **recipe
        Fields of `Recipe`: batch_size, optimizer, lr, momentum, weight_decay, schedule, milestones, gamma, amp, seed.

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
    Bit-identical resuming holds on the same machine with the same thread count, and for randomness from torch's
    generators (NumPy's and Python's are the caller's affair, as are a DataLoader's persistent workers). The global
    generator is put back afterwards; the model is left in evaluation mode.

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
    claim(Path(run_dir), config, resume)
    recorder = Recorder(run_dir, model, keep, half=half, forward_fn=forward_fn)
    resume_path = recorder.run_dir / "resume.pt"
    if recorder.next_epoch == epochs and not resume_path.exists():  # complete, and tidied up by somebody
        checkpoints.load_into(model, recorder.run.checkpoints[-1]).eval()
        return recorder.run

    fit(
        model,
        train_data,
        epochs,
        settings,
        augment=augment,
        forward_fn=forward_fn,
        loss_fn=loss_fn,
        progress=progress,
        resume_path=resume_path,
        **recording_hooks(recorder, resume_path, model, val_data, forward_fn),
    )
    model.eval()
    return recorder.run


def recording_hooks(
    recorder: Recorder, resume_path: Path, model: nn.Module, val_data: Any, forward_fn: data.Forward | None
) -> dict[str, Any]:
    """What `fit` calls to record every epoch, and before it goes on after an interruption."""

    def rewind(start: int) -> None:
        """Go back to where resume.pt is: at most one epoch, if nobody meddled."""
        if not start <= recorder.next_epoch <= start + 1:
            found = f"after {start} epochs" if resume_path.exists() else "missing"
            raise ValueError(
                f"{resume_path}: is {found}, but the history has {recorder.next_epoch}; restore either file"
            )
        recorder.rewind(start)

    def record(epoch: int) -> dict[str, str]:
        probs, labels = data.predict(model, val_data, forward_fn=forward_fn)
        recorder.record(epoch, probs, labels)
        accuracy = (probs.argmax(1) == labels).double().mean().item()
        return {"val": f"{accuracy:.2%}", "peak F_e": f"{recorder.peak_forget_fraction:.2%}"}

    return {"rewind": rewind, "after_epoch": record}


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


def fit(
    model: nn.Module,
    train_data: Any,
    epochs: int,
    recipe: Recipe,
    *,
    augment: Callable[[Tensor], Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], tuple[Tensor, Any]] | None = None,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    progress: bool | None = None,
    description: str = "train",
    resume_path: Path | None = None,
    rewind: Callable[[int], None] = lambda epoch: None,
    after_epoch: Callable[[int], dict[str, str]] = lambda epoch: {},
) -> None:
    """The loop itself: what `train` and `distill` share. Model and loss may be anything that steps on batches."""
    device = data.device_of(model)
    optimizer = recipe.make_optimizer(model)
    scheduler = recipe.make_scheduler(optimizer, epochs)
    parts: dict[str, Any] = {"model": checkpoints.unwrap(model), "optimizer": optimizer, "scheduler": scheduler}
    start = _resume(parts, resume_path)
    if start == epochs:
        logger.info("%s is complete: nothing to train", resume_path and resume_path.parent)
    rewind(start)
    devices = [device] if device.type == "cuda" else []
    bar = tqdm(range(start, epochs), description, epochs, initial=start, disable=_disabled(progress), unit="epoch")
    with torch.random.fork_rng(devices), bar:
        for epoch in bar:
            data.reseed(train_data, recipe.seed, epoch)
            model.train()
            loss = None
            for batch in data.batches(train_data, recipe.batch_size, device, shuffle=True):
                if augment is not None:
                    batch = (augment(batch[0]), *batch[1:])
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
                    outputs, targets = (forward_fn or data.default_forward)(model, batch)
                    loss = _loss(loss_fn, outputs, targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if loss is None:
                raise ValueError("train_data: expected at least one batch")
            if not torch.isfinite(loss):  # of the last batch: one look an epoch, no synchronisation in between
                raise FloatingPointError(f"epoch {epoch}: the loss is {loss.item()}; lower lr?")
            scheduler.step()
            bar.set_postfix(after_epoch(epoch))
            if resume_path is not None:
                state = {name: part.state_dict() for name, part in parts.items()}
                checkpoints.save(checkpoints.to_cpu({"epoch": epoch, **state}), resume_path)


def _loss(loss_fn: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Any) -> Tensor:
    try:
        return loss_fn(outputs, targets)
    except IndexError as error:  # torch: "Target 5 is out of bounds."
        raise ValueError(f"labels: outside the {outputs.shape[-1]} classes of the model ({error})") from None


def _resume(parts: dict[str, Any], path: Path | None) -> int:
    """Load the state after the last finished epoch; the number of the next."""
    if path is None or not path.exists():
        return 0
    state = checkpoints.load(path)
    if not isinstance(state, dict) or state.keys() != {"epoch", *parts} or not isinstance(state["epoch"], int):
        raise ValueError(f"{path}: not what train or distill left to resume from")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: does not fit this model and optimizer: {error}") from None
    logger.info("resuming %s after epoch %d", path.parent, state["epoch"])
    return int(state["epoch"]) + 1


def _disabled(progress: bool | None) -> bool | None:
    """tqdm's own meaning of None: off unless stderr is a terminal."""
    return None if progress is None else not progress
