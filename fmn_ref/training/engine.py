"""fit: the loop that `train` and `distill` share, on one device or on one for each process.

Nothing in an epoch waits for the device: the loss is looked at once, at its end, and correctness leaves the device as
one vector. What is kept on disk is written by a thread while the next epoch runs (`Store`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..metrics.curves import correctness
from ..runs import checkpoints
from . import data, distributed
from .recipe import Recipe
from .store import Store
from .writer import Writer

logger = logging.getLogger(__name__)
Loss = Callable[[Tensor, Any], Tensor]
Step = Callable[[nn.Module, Any], tuple[Tensor, Any]]  # (model, batch) -> outputs, targets
Evaluate = Callable[[nn.Module], tuple[Tensor, Tensor]]  # probabilities (n, n_classes) and labels (n,)


class Average:
    """Exponential moving average of a network's weights and running statistics, taken after every step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.averaged = AveragedModel(checkpoints.unwrap(model), multi_avg_fn=average, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        return self.averaged.module

    def update(self, model: nn.Module) -> None:
        self.averaged.update_parameters(checkpoints.unwrap(model))

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.model.state_dict(), "steps": self.averaged.n_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["weights"])
        self.averaged.n_averaged.copy_(state["steps"])


class EarlyStopping:
    """The epoch with the best validation accuracy so far, and its weights; the first of equals."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.epoch, self.accuracy, self.weights = -1, -1.0, dict[str, Any]()

    def update(self, epoch: int, accuracy: float, model: nn.Module) -> None:
        if accuracy > self.accuracy:
            self.epoch, self.accuracy = epoch, accuracy
            self.weights = checkpoints.snapshot(model.state_dict())

    def exhausted(self, epoch: int) -> bool:
        """Whether there is no use in going on after this epoch."""
        return self.epoch >= 0 and epoch - self.epoch >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "accuracy": self.accuracy, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.accuracy, self.weights = state["epoch"], state["accuracy"], state["weights"]


def fit(
    model: nn.Module,
    batches: data.Batches | Callable[[int], data.Batches],
    epochs: int,
    recipe: Recipe,
    *,
    step: Step = data.default_forward,
    loss_fn: Loss = F.cross_entropy,
    augment: Callable[[Tensor], Tensor] | None = None,
    evaluate: Evaluate | None = None,
    store: Store | None = None,
    average: Average | None = None,
    stopping: EarlyStopping | None = None,
    progress: bool | None = None,
    names: tuple[str, str] = ("train", "val"),
    notes: dict[str, str] | None = None,
) -> None:
    """Train `model` in place; with `average` or `stopping`, what they hold is the result.

    batches : or a function of the epoch that gives them
    evaluate : what the model says about the validation set; recorded by `store`
    names : of the progress bar, and of the validation accuracy there
    notes : shown at the end of the bar
    """
    device = data.device_of(model)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = recipe.make_optimizer(model)
    parts: dict[str, Any] = {"model": checkpoints.unwrap(model), "optimizer": optimizer}
    parts["scheduler"] = scheduler = recipe.make_scheduler(optimizer, epochs)
    parts |= {k: v for k, v in {"average": average, "stopping": stopping}.items() if v is not None}
    start = _resume(parts, store)
    stepped = distributed.wrap_ddp(model)
    if recipe.compile != "none":
        stepped = torch.compile(stepped, mode=recipe.compile)  # type: ignore[assignment]
    result = checkpoints.unwrap(model) if average is None else average.model
    bar = tqdm(range(start, epochs), names[0], epochs, initial=start, disable=hidden(progress), unit="epoch")
    writer = Writer(store.disk_wait) if store is not None else nullcontext()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), bar, writer:
        for epoch in bar:
            if stopping is not None and stopping.exhausted(epoch - 1):
                break
            todo = batches(epoch) if callable(batches) else batches
            data.reseed(todo.source, recipe.seed, epoch)
            loss = _pass(stepped, todo, optimizer, recipe, step, loss_fn, augment, average)
            if not torch.isfinite(loss):  # of the last batch
                raise FloatingPointError(f"epoch {epoch}: the loss is {loss.item()}; lower lr?")
            scheduler.step()
            outcome = None
            if evaluate is not None:
                distributed.broadcast_buffers(result)
                probs, labels = evaluate(result)
                outcome = correctness(probs, labels), labels
                accuracy = float(outcome[0].mean())
                if stopping is not None:
                    stopping.update(epoch, accuracy, result)
            if isinstance(writer, Writer) and store is not None and distributed.rank() == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                store.write(writer, {"epoch": epoch, **state}, outcome)
                if epoch == epochs - 1:
                    writer.wait()
            if outcome is not None:
                peak = {} if store is None else {"peak F_e": f"{store.peak:.2%}"}
                bar.set_postfix({names[1]: f"{accuracy:.2%}", **peak, **(notes or {})})
    distributed.barrier()
    if stopping is not None and stopping.weights:
        checkpoints.unwrap(model).load_state_dict(stopping.weights)
    elif average is not None:
        checkpoints.unwrap(model).load_state_dict(average.model.state_dict())


def _pass(
    model: nn.Module,
    batches: data.Batches,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    step: Step,
    loss_fn: Loss,
    augment: Callable[[Tensor], Tensor] | None,
    average: Average | None,
) -> Tensor:
    """One epoch; the last batch's loss."""
    model.train()
    loss = None
    for batch in batches:
        if augment is not None:
            batch = (augment(batch[0]), *batch[1:])
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=recipe.amp):
            loss = _loss(loss_fn, *step(model, batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if average is not None:
            average.update(model)
    if loss is None:
        raise ValueError("train_data: expected at least one batch")
    return loss.detach()


def _loss(loss_fn: Loss, outputs: Tensor, targets: Any) -> Tensor:
    try:
        return loss_fn(outputs, targets)
    except IndexError as error:  # torch: "Target 5 is out of bounds."
        raise ValueError(f"labels: outside the {outputs.shape[-1]} classes of the model ({error})") from None


def _resume(parts: dict[str, Any], store: Store | None) -> int:
    """Load the state after the last finished epoch, in every process; the number of the next."""
    if store is None:
        return 0
    state = distributed.broadcast(store.load(set(parts)) if distributed.rank() == 0 else None)
    if state is None:
        return 0
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{store.path}: does not fit this model and optimizer: {error}") from None
    logger.info("resuming %s after epoch %d", store.path.parent, state["epoch"])
    return int(state["epoch"]) + 1


def hidden(progress: bool | None) -> bool | None:
    """tqdm's own meaning of None: off unless stderr is a terminal. One bar for all processes."""
    if distributed.rank() != 0:
        return True
    return None if progress is None else not progress
