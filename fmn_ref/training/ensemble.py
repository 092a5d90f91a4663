"""What stored epochs predict, and models made of them: FusedModel mixes predictions, averaged_model mixes weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from .. import _check
from ..fusion.plan import FusionPlan
from ..runs import checkpoints
from ..runs.run import Run
from . import data
from .predictions import Epochs


class Probabilities(Epochs):
    """Predictions of every checkpoint of a run on one data set, computed when read; up to 4 GiB stay in memory.

    One network is on the device at a time, whatever the number of epochs. `amp`: in bfloat16, which changes
    probabilities in the third digit. `split`: in several processes, all of which read the same rows in the same order,
    each evaluates its part.

    ``probabilities[i]`` is (n_samples, n_classes) float32 for row i of the run's history; ``labels`` is (n_samples,)
    int64. `fuse(probabilities, labels, correct=history)` reads the last epoch and the chosen windows only.
    """

    def __init__(
        self, run: Run, samples: Any, *, batch_size: int = 256, amp: bool = False, split: bool = False
    ) -> None:
        self._model = copy.deepcopy(model_of(run)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(run)
        self._amp = amp
        size = _check.number(batch_size, 1, 2**31, "batch_size", int)
        self._batches = data.Batches(samples, size, data.device_of(self._model), split=split)
        self._labels: NDArray[np.int64] | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """In the order of evaluation, as the run's forward_fn gives them; evaluates the last epoch if none was yet."""
        if self._labels is None:
            self[-1]
        assert self._labels is not None
        return self._labels

    def _evaluate(self, row: int) -> NDArray[np.float32]:
        checkpoints.load_into(self._model, self._run.checkpoint(row))
        probs, labels = data.predict(self._model, self._batches, forward_fn=self._run.forward_fn, amp=self._amp)
        y = labels.cpu().numpy().astype(np.int64)
        if self._labels is not None and not np.array_equal(y, self._labels):
            raise ValueError("data: gave other labels, or another order, than before; evaluation data must not shuffle")
        self._labels = y
        return probs.cpu().numpy()


class FusedModel(nn.Module):
    """The fused predictor as a module: as many forward passes as the plan has checkpoints.

    Parameters
    ----------
    plan : FusionPlan
    run : Run
        With its model attached (``Run.open(run_dir, model)``).
    together : bool
        Run the members as one network with stacked weights (torch.func), rather than one after the other, where batches
        are tensors or tuples without `forward_fn`. It needs the weights twice. On two CPU cores it took more
        than twice as long (`docs/training.md`); on a GPU, which small batches leave idle, it was not measured.

    Returns log-probabilities (batch, n_classes) float32, so that softmax, arg-max and cross-entropy just work. It calls
    the network as it is, which must return logits: a run's forward_fn is not used. Members are frozen and stay in
    evaluation mode. `plan.json` and the run directory are its permanent form; its own state_dict loads back too.

    Raises
    ------
    ValueError
        The run has no model, another number of epochs than the plan, or a checkpoint is damaged or does not fit.
    FileNotFoundError
        A checkpoint is missing.
    """

    weights: Tensor
    _checked = False

    def __init__(self, plan: FusionPlan, run: Run, *, together: bool = False) -> None:
        model, paths = members_of(plan, run)
        members = (checkpoints.load_into(copy.deepcopy(model), path) for path in paths.values())
        self._hold(members, plan.weights.values(), together)

    @classmethod
    def of_members(
        cls, members: Iterable[nn.Module], weights: Iterable[float], *, together: bool = False
    ) -> FusedModel:
        """A mixture of models that are loaded already, with positive weights of sum 1."""
        self = cls.__new__(cls)
        self._hold(members, weights, together)
        return self

    def _hold(self, members: Iterable[nn.Module], weights: Iterable[float], together: bool) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.members.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._together = together
        self._stacked: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self.register_buffer("weights", torch.tensor(list(weights)))
        self.eval()

    def train(self, mode: bool = True) -> FusedModel:
        """Members always stay in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> FusedModel:
        self._stacked = None  # the members move to another device or type
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._stacked = None
        return super().load_state_dict(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._together:
            return self._forward_together(args, kwargs)

        def logits(member: nn.Module) -> Tensor:
            output = member(*args, **kwargs)
            return cast(Tensor, getattr(output, "logits", output))

        return self._mix(logits)

    def _forward_together(self, args: Any, kwargs: Any) -> Tensor:
        if self._stacked is None:
            self._stacked = stack_module_state(list(self.members))
        skeleton = self.members[0]

        def logits(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            output = functional_call(skeleton, (weights, buffers), args, kwargs)
            return cast(Tensor, getattr(output, "logits", output))

        each = iter(vmap(logits)(*self._stacked))  # (members, B, K)
        return self._mix(lambda member: next(each))

    def _fmn_forward_batch(self, batch: Any, forward_fn: data.Forward) -> tuple[Tensor, Tensor]:
        """(log-probabilities, labels) of a batch, by a function that gives (logits, labels) for a single member."""
        if self._together and forward_fn is data.default_forward:
            return forward_fn(self, batch)
        labels: list[Tensor] = []

        def logits(member: nn.Module) -> Tensor:
            output, y = forward_fn(member, batch)
            labels[:] = [y]
            return output

        return self._mix(logits), labels[0]

    def _mix(self, logits: Callable[[nn.Module], Tensor]) -> Tensor:
        """log sum_e weight_e softmax(logits of member e), one member after the other."""

        def probabilities(member: nn.Module) -> Tensor:
            found = logits(member)
            tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]
            if not (self._checked or tracing):
                with contextlib.suppress(RuntimeError):  # vmap, meta: no values to look at
                    data.check_logits(found, "plan.apply(run.probabilities(data)) goes by the run's forward_fn")
                    self._checked = True
            return found.float().softmax(-1)

        parts = (w * probabilities(m) for w, m in zip(self.weights, self.members, strict=True))
        mixed: Tensor = reduce(torch.add, parts)
        return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()


def averaged_model(run: Run, weights: dict[int, float], train_data: Any, *, batch_size: int = 512) -> nn.Module:
    """One model whose weights are the weighted mean of checkpoints: averaged KF, SWA, EMA over epochs.

    Parameters
    ----------
    run : Run
        With its model attached.
    weights : {epoch: weight}
        Rows of the history; positive, scaled to sum 1. For averaged KF, ``plan.weights``.
    train_data
        For the BatchNorm statistics, which an average of weights invalidates: recomputed in one pass, each batch
        weighed by its samples.

    Returns
    -------
    nn.Module
        A new model in evaluation mode. Integer buffers come from the latest epoch.

    Raises
    ------
    ValueError
        No weights, or not positive; no model; a checkpoint missing or unfit.

    References
    ----------
    arXiv 2507.08686 ("averaged KF"); Izmailov et al. 2018 (SWA).
    """
    n_epochs, model = len(run_of(run).history), copy.deepcopy(model_of(run))
    if not isinstance(weights, dict):
        raise TypeError(f"weights: expected {{epoch: weight}}, got {type(weights).__name__}")
    rows = [(_check.index(e, n_epochs, "epoch"), _check.number(w, 0, 1e300, "weights")) for e, w in weights.items()]
    total = sum(w for _, w in rows)
    if total == 0:
        raise ValueError("weights: expected at least one above 0")
    mean: dict[str, Tensor] = {}
    for epoch, weight in sorted(rows):
        state = checkpoints.load_into(model, run.checkpoint(epoch)).state_dict()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                mean[name] = mean.get(name, 0) + weight / total * value.double()
    with torch.no_grad():  # what is not a floating-point number stays as in the latest epoch
        for name, average in mean.items():
            state[name].copy_(average)
    recompute_batchnorm(model, train_data, batch_size=batch_size, forward_fn=run.forward_fn)
    return model.eval()


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module, train_data: Any, *, batch_size: int = 512, forward_fn: data.Forward | None = None
) -> None:
    """Set running means and variances to the average over the data, each batch weighed by its number of samples."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    for batch in data.Batches(train_data, batch_size, data.device_of(model)):
        n = len(data.inputs_of(batch)[0])
        for norm in norms:
            norm.momentum = n / (seen + n)
        try:
            data.forward(model, batch, forward_fn)
        except ValueError:
            if n > 1:
                raise
            continue  # torch: a single value per channel has no variance
        seen += n
    if not seen:
        raise ValueError("train_data: expected at least one batch of two or more samples, for BatchNorm")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def members_of(plan: Any, run: Any) -> tuple[nn.Module, dict[int, Path]]:
    """The model of a run, and the checkpoint of each row that a plan uses."""
    if not isinstance(plan, FusionPlan):
        raise TypeError(f"plan: expected a FusionPlan, got {type(plan).__name__}")
    if plan.n_epochs != len(run_of(run).history):
        raise ValueError(f"plan: made for {plan.n_epochs} epochs, the run has {len(run.history)}")
    return model_of(run), {row: run.checkpoint(row) for row in plan.weights}


def run_of(run: Any) -> Run:
    if not isinstance(run, Run):
        raise TypeError(f"run: expected a Run, got {type(run).__name__}")
    return run


def model_of(run: Any) -> nn.Module:
    run = run_of(run)
    if not isinstance(run.model, nn.Module):
        hint = f"use Run.open({str(run.run_dir)!r}, model=...)"
        if run.suffix != ".pt":
            hint = f"this is for networks of torch, and its checkpoints are {run.suffix} files"
        raise ValueError(f"run: no model attached; {hint}")
    return checkpoints.unwrap(run.model)
