"""fit: the training loop that `train` and `distill` share, on one device or on one per process.

Nothing in an epoch waits for the device: the loss is read once, at the end, and correctness leaves the device as one
vector. `Store` writes files while the next epoch trains.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .._stderr import progress_bar, shows
from ..metrics.curves import correctness
from ..runs import adapters, checkpoints
from ..runs.complete import check_complete
from . import data, distributed
from .averages import averaged_tensors
from .copies import independent
from .ensemble import frozen_norms
from .logits import TAKE_FORWARD, Step
from .memory_format import either_format, set_channels_last, set_contiguous
from .order import reseed
from .recipe import Recipe, take_step
from .store import Store

logger = logging.getLogger(__name__)
Loss = Callable[[Tensor, Any], Tensor]
Evaluate = Callable[[nn.Module], tuple[Tensor, Tensor]]  # probabilities (n, n_classes) and labels (n,)


class Average:
    """Exponential moving average (EMA) of a network's weights and running statistics, updated after every step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if any(map(nn.parameter.is_lazy, model.parameters())):
            raise ValueError("model: expected layers with shapes, to average them; run a batch through the lazy ones")
        self.model = independent(checkpoints.unwrap(model))
        self._own = dict(chain(self.model.named_parameters(), self.model.named_buffers()))
        self._averaged = averaged_tensors(self.model).keys()
        self._fold = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._steps = torch.tensor(0)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Fold the weights and the running statistics in, the first ones by copying; copy the other buffers."""
        groups = defaultdict[Any, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
        folds = self._steps > 0
        for (name, own), new in zip(self._own.items(), chain(model.parameters(), model.buffers()), strict=True):
            if folds and name in self._averaged:
                own_group, new_group = groups[own.device, own.dtype]
                own_group.append(own)
                new_group.append(new.detach().to(own.device))
            else:
                own.copy_(new)
        for own_group, new_group in groups.values():
            self._fold(own_group, new_group, self._steps)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"weights": adapters.state_of(self.model), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        adapters.load_state(self.model, state["weights"])
        self._steps.copy_(state["steps"])


class EarlyStopping:
    """Epoch with the best validation accuracy so far, the first of equal ones, and its weights."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: dict[str, Any] = {"epoch": -1, "accuracy": -1.0, "weights": {}}

    def update(self, epoch: int, accuracy: float, model: nn.Module) -> None:
        if accuracy > self.best["accuracy"]:
            weights = checkpoints.snapshot(adapters.state_of(model))
            self.best = {"epoch": epoch, "accuracy": accuracy, "weights": weights}

    def exhausted(self, epoch: int) -> bool:
        """Return whether training should stop after this epoch."""
        best: int = self.best["epoch"]
        return 0 <= best <= epoch - self.patience

    def state_dict(self) -> dict[str, Any]:
        return self.best

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = {name: state[name] for name in self.best}


class Weights:
    """The weights that the checkpoints of a network hold, as a part of a resume state."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return adapters.state_of(self._model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        adapters.load_state(self._model, state)


class Loop:
    """A network with everything that changes while it trains.

    `stepped` is the network that takes the steps: wrapped for several processes, and compiled. `result` is the one to
    evaluate: the averaged one if there is one. A resume state holds `parts`.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, epochs: int, average: Average | None, stopping: EarlyStopping | None
    ) -> None:
        if recipe.channels_last:
            set_channels_last(model)
        self.model, self.recipe = checkpoints.unwrap(model), recipe
        self.frozen, self._has_run = frozen_norms(model), False
        self.average, self.stopping = average, stopping
        self.result = self.model if average is None else average.model
        wrapped = distributed.wrap_ddp(model)
        self.stepped: Any = wrapped if recipe.compile == "none" else torch.compile(wrapped, mode=recipe.compile)
        self.optimizer = recipe.make_optimizer(model)
        self.scheduler = recipe.make_scheduler(self.optimizer, epochs)
        self.parts: dict[str, Any] = {
            "model": Weights(self.model),
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }
        self.parts |= {k: v for k, v in {"average": average, "stopping": stopping}.items() if v is not None}

    def state(self, epoch: int) -> dict[str, Any]:
        return {"epoch": epoch, **{name: part.state_dict() for name, part in self.parts.items()}}

    def evaluate(self, evaluate: Evaluate, epoch: int) -> tuple[Any, Any]:
        """Correctness and labels of the validation set, both (n,)."""
        distributed.broadcast_buffers(self.result)
        probs, labels = evaluate(self.result)
        right = correctness(probs, labels)
        if self.stopping is not None:
            self.stopping.update(epoch, float(right.mean()), self.result)
        return right, labels

    def train(self) -> None:
        """Put the network into training mode, except for frozen BatchNorm layers."""
        self.stepped.train()
        for norm in self.frozen.values():
            norm.eval()

    def outputs(self, step: Step, batches: data.Batches, batch: Any) -> tuple[Tensor, Any]:
        """Call `step`. The first call of a network that fails in channels_last format starts again without it."""
        if self._has_run:
            return step(self.stepped, batch)
        buffers = [b for b in self.model.buffers() if not nn.parameter.is_lazy(b)]
        values, draws = checkpoints.snapshot(buffers), _generator_states(batches.device)

        def undo() -> bool:
            nonlocal batch
            batch = checkpoints.each_tensor(batch, Tensor.contiguous)
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
            _generator_states(batches.device, draws)
            return False

        formats = partial(set_contiguous, self.model), batches.set_contiguous
        found = either_format(lambda: step(self.stepped, batch), *formats, undo)
        self._has_run = True
        return found

    def finish(self) -> None:
        """Leave the result in the model: the best epoch's weights, or the average."""
        if self.stopping is not None and self.stopping.best["weights"]:
            adapters.load_state(self.model, self.stopping.best["weights"])
        elif self.average is not None:
            adapters.load_state(self.model, adapters.state_of(self.average.model))


def fit(
    model: nn.Module,
    batches: data.Batches | Callable[[int], data.Batches],
    epochs: int,
    recipe: Recipe,
    *,
    step: Step = data.default_forward,
    loss_fn: Loss = F.cross_entropy,
    augment: data.Augment | None = None,
    evaluate: Evaluate | None = None,
    store: Store | None = None,
    average: Average | None = None,
    stopping: EarlyStopping | None = None,
    progress: bool | None = None,
    names: tuple[str, str] = ("train", "val"),
    notes: dict[str, str] | None = None,
) -> None:
    """Train `model` in place. With `average` or `stopping`, it ends with their weights.

    Parameters
    ----------
    batches : Batches, or callable(epoch) -> Batches
    evaluate : callable(model) -> (probabilities, labels), optional
        Predicts the validation set after each epoch; `store` records the correctness.
    names : (str, str)
        Names of the progress bar and of its validation accuracy.
    notes : dict, optional
        Shown at the end of the bar.
    """
    loop, device = Loop(model, recipe, epochs, average, stopping), data.device_of(model)
    start = _resume(loop, store)
    bar = progress_bar(range(start, epochs), names[0], epochs, progress=shown(progress), initial=start, unit="epoch")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), bar:
        for epoch in bar:
            if stopping is not None and stopping.exhausted(epoch - 1):
                break
            todo = batches(epoch) if callable(batches) else batches
            reseed(todo.source, recipe.seed, epoch)
            loss = train_one_epoch(loop, todo, step, loss_fn, augment)
            if not torch.isfinite(loss):  # of the last batch
                raise FloatingPointError(f"epoch {epoch}: the loss is {loss.item()}; lower lr?")
            loop.scheduler.step()
            outcome = None if evaluate is None else loop.evaluate(evaluate, epoch)
            if store is not None:
                store.write(loop.state(epoch), outcome)
                if epoch == epochs - 1:
                    store.wait()
            if outcome is not None:
                peak = {} if store is None else {"peak F_e": f"{store.peak:.2%}"}
                bar.set_postfix({names[1]: f"{outcome[0].mean():.2%}", **peak, **(notes or {})})
    distributed.barrier()
    loop.finish()


def train_one_epoch(
    loop: Loop, batches: data.Batches, step: Step, loss_fn: Loss, augment: data.Augment | None
) -> Tensor:
    """Take one pass over the batches; return the loss of the last one."""
    loop.train()
    loss = None
    for batch in batches:
        if augment is not None:
            batch = data.augmented(batch, augment)
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=loop.recipe.amp):
            loss = _loss(loss_fn, *loop.outputs(step, batches, batch))
        loop.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        take_step(loop.optimizer, loop.model)
        if loop.average is not None:
            loop.average.update(loop.model)
    if loss is None:
        raise ValueError("train_data: expected at least one batch")
    return loss.detach()


def _generator_states(device: torch.device, states: list[Tensor] | None = None) -> list[Tensor]:
    """Return the states of torch's generators on the CPU and on `device`; set them if given."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(
            torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        )
    for generator, state in zip(generators, states or (), strict=False):
        generator.set_state(state)
    return [generator.get_state() for generator in generators]


def _loss(loss_fn: Loss, outputs: Tensor, targets: Any) -> Tensor:
    try:
        return loss_fn(outputs, targets)
    except IndexError as error:  # torch: "Target 5 is out of bounds."
        raise ValueError(f"labels: outside the {outputs.shape[-1]} classes of the model ({error})") from None
    except (TypeError, AttributeError):
        if isinstance(outputs, Tensor):
            raise
        hint = f"a forward_fn may pick them ({TAKE_FORWARD})"
        got = f"which loss_fn cannot take, got {type(outputs).__name__}"
        raise TypeError(f"model: expected logits (n, n_classes), {got}; {hint}") from None


def _resume(loop: Loop, store: Store | None) -> int:
    """Load the state after the last finished epoch, in every process; return the number of the next."""
    if store is None:
        return 0
    if adapters.adapter_of(loop.model) is None:  # else by its definition
        check_complete(loop.model.state_dict(), loop.model)
    state = distributed.on_rank_zero(partial(store.load, set(loop.parts)))
    if state is None:
        return 0
    try:
        for name, part in loop.parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{store.folder.resume}: does not fit this model and optimizer: {error}") from None
    logger.info("resuming %s after epoch %d", store.folder.path, state["epoch"])
    return int(state["epoch"]) + 1


def shown(progress: bool | None) -> bool:
    """Tell whether this process shows a bar: rank zero alone, by default if stderr is a terminal."""
    return distributed.rank() == 0 and shows(progress)
