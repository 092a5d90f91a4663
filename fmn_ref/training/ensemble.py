"""Models made from several checkpoints: `FusedModel` combines predictions, `averaged_model` averages weights."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Collection, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..fusion.plan import FusionPlan
from ..metrics.scores import FLOOR
from ..runs import checkpoints
from ..runs.run import Run
from . import data
from .copies import independent
from .logits import check_logits
from .memory_format import either_format, set_channels_last, set_contiguous

logger = logging.getLogger(__name__)


class FusedModel(nn.Module):
    """Ensemble of a plan's checkpoints as a module; one forward pass for each checkpoint.

    Calling it returns log-probabilities, shape (batch, n_classes), dtype float32: softmax, arg-max and cross-entropy
    work on them. The run's network must return logits or an object with `.logits`: it is called directly, without the
    run's `forward_fn`. (Pass that to `distill`, which calls it for each member.) Members are frozen and always in
    evaluation mode. To store the ensemble, keep the plan and the run directory; its own `state_dict` loads back too.

    Members are copies of the run's model. If it cannot be copied, they compute in the model itself: one call at a time,
    with weights swapped in and put back, without gradients, and not under torch.export or torch.compile. So do members
    whose first batch shows that they compute with the model's weights.

    Parameters
    ----------
    plan : FusionPlan
        Made from this run.
    run : Run
        With its model attached (``Run.open(run_dir, model)``).

    Raises
    ------
    TypeError
        `plan` or `run` is of another type.
    ValueError
        The run has no model, or another number of epochs than the plan; a checkpoint is damaged or does not fit.
    FileNotFoundError
        A checkpoint is missing.

    Examples
    --------
    >>> import tempfile, torch, fmn_ref as fmn
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> run = fmn.train(torch.nn.Linear(8, 2), (x, y), (x, y), epochs=3, run_dir=tempfile.mkdtemp())
    >>> plan = fmn.fuse(run.probabilities((x, y)), y, correct=run.history)
    >>> FusedModel(plan, run)(x).shape
    torch.Size([64, 2])

    References
    ----------
    arXiv 2412.12968, Algorithm 1 (the fused predictor); Genest and Zidek 1986 (log-linear pool).
    """

    weights: Tensor
    _checked = False

    def __init__(self, plan: FusionPlan, run: Run) -> None:
        super().__init__()
        model, paths = plan_checkpoints(plan, run)
        network = independent(model)
        with torch.no_grad():  # a ScriptModule's tensors would be copied with a graph
            members = [copy.deepcopy(checkpoints.load_into(network, path)) for path in paths.values()]
        self._set_members(members, plan)

    @classmethod
    def of_members(cls, members: Iterable[nn.Module], plan: FusionPlan) -> FusedModel:
        """Make an ensemble of loaded models, one for each of the plan's weights."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_members(members, plan)
        return self

    def _set_members(self, members: Iterable[nn.Module], plan: FusionPlan) -> None:
        self.combine = plan.combine
        self.members = nn.ModuleList(members)
        self.members.requires_grad_(False)
        set_channels_last(self.members)
        self.register_buffer("weights", torch.tensor(list(plan.weights.values())))
        if plan.combine == "geometric":  # so that neither a state nor a digest of it fits the other kind
            self.register_buffer("geometric", torch.tensor(True))
        self.register_load_state_dict_post_hook(_drop_derived)  # type: ignore[no-untyped-call]
        self.eval()

    def train(self, mode: bool = True) -> FusedModel:
        """Keep the members in evaluation mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute log-probabilities (batch, n_classes) from what a single network takes."""

        def logits(member: nn.Module, batch: None) -> tuple[Tensor, Any]:
            output = member(*args, **kwargs)
            return getattr(output, "logits", output), None

        return self._fmn_forward_batch(None, logits)[0]

    def _fmn_forward_batch(self, batch: Any, forward_fn: data.Forward) -> tuple[Tensor, Tensor]:
        """Compute (log-probabilities of the ensemble, labels), one member after the other.

        `forward_fn` gives (logits, labels) of the batch for a single member.
        """
        geometric, total = self.combine == "geometric", torch.zeros(())
        for weight, member in zip(self.weights, self.members, strict=True):
            logits, labels = self._member_outputs(member, batch, forward_fn)
            # as in `log_linear_pool`, a member's probabilities below FLOOR count as FLOOR
            part = logits.log_softmax(-1).clamp_min(math.log(FLOOR)) if geometric else logits.softmax(-1)
            total = total + weight * part
        fused = total.log_softmax(-1) if geometric else total.clamp_min(torch.finfo(total.dtype).tiny).log()
        return fused, labels

    def _member_outputs(self, member: nn.Module, batch: Any, forward_fn: data.Forward) -> tuple[Tensor, Tensor]:
        """Compute a member's logits in float32, and labels; check the first logits with values."""
        if self._checked or torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
            logits, labels = data.forward(member, batch, forward_fn)
        else:
            call = partial(data.forward, member, batch, forward_fn)
            logits, labels = either_format(call, partial(set_contiguous, self.members))
            with contextlib.suppress(RuntimeError):  # under vmap and on meta tensors values cannot be read
                check_logits(logits, "plan.apply(run.probabilities(data)) goes by the run's forward_fn")
                self._checked = True
        return logits.float(), labels


def _drop_derived(model: nn.Module, keys: Any) -> None:
    for member in model.members:  # type: ignore[union-attr]
        checkpoints.drop_derived(member)


def averaged_model(run: Run, weights: dict[int, float], train_data: Any, *, batch_size: int = 512) -> nn.Module:
    """Average the weights of checkpoints into one model: averaged KF, SWA, or EMA over epochs.

    Parameters
    ----------
    run : Run
        With its model attached.
    weights : dict of {int: float}
        Weight of each row of the history, at least 0; scaled to sum 1. Checkpoints of weight 0 are not read. For
        averaged KF: ``plan.weights``.
    train_data : (inputs, labels), torch Dataset or DataLoader
        Data of one pass that recomputes the BatchNorm statistics, which averaging invalidates. Each layer weighs a
        batch by the number of values per channel that reach it; one that no batch reaches keeps the average of its
        statistics, with a warning. Not read where the model has no BatchNorm, or where it is frozen: its statistics are
        the same in all the epochs, or for a single epoch, none of its parameters is trained.
    batch_size : int, default 512
        Of that pass.

    Returns
    -------
    nn.Module
        A new model in evaluation mode. Parameters and running statistics are averaged. Other buffers come from the
        latest epoch with a weight above 0. If the run's model cannot be copied, the new one computes in it, as the
        members of a `FusedModel` do. That a copy computes with the model's weights is noticed in the pass over
        `train_data`, or because `run.probabilities` or a `FusedModel` has noticed it before.

    Raises
    ------
    TypeError
        `run` is not a Run, or `weights` is not a dict of numbers.
    ValueError
        No weight above 0; an epoch out of range; no model attached; a checkpoint that does not fit, or whose weights
        are not all finite; a ScriptModule with BatchNorm.
    FileNotFoundError
        A checkpoint is missing.

    Examples
    --------
    >>> import tempfile, torch, fmn_ref as fmn
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> run = fmn.train(torch.nn.Linear(8, 2), (x, y), (x, y), epochs=4, run_dir=tempfile.mkdtemp())
    >>> averaged_model(run, {2: 0.5, 3: 0.5}, (x, y))
    Linear(in_features=8, out_features=2, bias=True)

    References
    ----------
    arXiv 2507.08686 ("averaged KF"); Izmailov et al. 2018, arXiv 1803.05407 (SWA).
    """
    model = independent(attached_model(run))
    shares = _shares(weights, len(run.history))
    steady = _load_average(model, [(run.checkpoint(epoch), share) for epoch, share in shares])
    with data.computing(model, keep=True) as network:
        frozen = steady if len(shares) > 1 else {*frozen_norms(network), *_scripted_norms(network)}
        recompute_batchnorm(network, train_data, batch_size=batch_size, forward_fn=run.forward_fn, frozen=frozen)
        if hasattr(type(network), "_fmn_in_place"):  # caught in this pass: see `copies.Watch`
            return averaged_model(run, weights, train_data, batch_size=batch_size)
    checkpoints.drop_derived(model)
    return model.eval()


@torch.no_grad()
def _load_average(model: nn.Module, shares: list[tuple[Path, float]]) -> set[str]:
    """Load the weighted mean of checkpoints; return the names of layers with the same running statistics in all."""
    mean, first, moved = dict[str, Tensor](), dict[str, Tensor](), set[str]()
    for path, share in shares:
        for name, value in averaged_tensors(checkpoints.load_into(model, path)).items():
            if not value.isfinite().all():
                raise ValueError(
                    f"{path}: {name} holds NaN or infinity, which no average can have; leave the epoch out"
                )
            wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
            mean[name] = mean.get(name, 0) + share * wide
            if _is_statistic(name) and not torch.equal(first.setdefault(name, value.clone()), value):
                moved.add(name.rpartition(".")[0])
    for name, value in averaged_tensors(model).items():
        value.copy_(mean[name])
    return {name.rpartition(".")[0] for name in first} - moved


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a network, by name, that an average of networks averages: parameters and running statistics.

    Running statistics are buffers with names that begin with "running_". Other buffers are not averaged, such as the
    unit vectors of a power iteration and counters; nor are integers.
    """
    named = chain(model.named_parameters(), ((n, b) for n, b in model.named_buffers() if _is_statistic(n)))
    return {name: t for name, t in named if t.is_floating_point() or t.is_complex()}


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2].startswith("running_")


def frozen_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Layers, by name, whose running statistics are frozen: those that are in evaluation mode on purpose.

    They are so inside a network in training mode, or if all of their parameters are frozen too.
    """

    def is_frozen(layer: nn.Module) -> bool:
        return model.training or {p.requires_grad for p in layer.parameters()} == {False}

    layers = {n: m for n, m in model.named_modules() if any(map(_is_statistic, dict(m.named_buffers(recurse=False))))}
    return {name: layer for name, layer in layers.items() if not layer.training and is_frozen(layer)}


def _shares(weights: Any, n_epochs: int) -> list[tuple[int, float]]:
    """Check the weights; return (row, weight) in order of rows, with weights of sum 1."""
    if not isinstance(weights, dict):
        raise TypeError(f"weights: expected {{epoch: weight}}, got {type(weights).__name__}")
    rows = [(_check.index(e, n_epochs, "epoch"), _check.number(w, 0, 1e300, "weights")) for e, w in weights.items()]
    total = sum(w for _, w in rows)
    if total == 0:
        raise ValueError("weights: expected at least one above 0")
    return [(row, weight / total) for row, weight in sorted(rows) if weight / total > 0]


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module,
    train_data: Any,
    *,
    batch_size: int = 512,
    forward_fn: data.Forward | None = None,
    frozen: Collection[str] = (),
) -> None:
    """Set BatchNorm's running statistics to their mean over the data.

    Each layer weighs a batch by the number of values per channel that reach it, whatever form the batch has. One that
    no batch reaches keeps its statistics, and a warning names it. The model is left in evaluation mode.
    `torch.optim.swa_utils.update_bn` weighs a short last batch like a full one.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    train_data : (inputs, labels), torch Dataset or DataLoader
    batch_size : int, default 512
    forward_fn : callable(model, batch) -> (logits, labels), optional
    frozen : collection of str, default ()
        Names of layers that keep their statistics; those of momentum 0 keep them too.

    Raises
    ------
    ValueError
        The model has BatchNorm layers, and no batch has two samples; such layers of a ScriptModule.
    """
    model.eval()
    scripted = _scripted_norms(model).difference(frozen)
    if scripted:
        hint = "attach the network that it was made from; its checkpoints fit"
        raise ValueError(f"model: the statistics of a ScriptModule's {min(scripted)} cannot be recomputed; {hint}")
    kinds = nn.modules.batchnorm._BatchNorm
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m.track_running_stats}
    norms = [m for name, m in found.items() if name not in frozen and m.momentum != 0]
    if not norms:
        return
    seen, before = dict.fromkeys(norms, 0), {norm: checkpoints.snapshot(dict(norm.named_buffers())) for norm in norms}
    with contextlib.ExitStack() as stack:
        if hasattr(torch.compiler, "set_stance"):  # compiled code would not call the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for norm in norms:
            norm.reset_running_stats()
            stack.callback(setattr, norm, "momentum", norm.momentum)
            stack.callback(norm.register_forward_pre_hook(partial(_weigh, seen), with_kwargs=True).remove)
            stack.callback(norm.eval)
        for batch in data.Batches(train_data, batch_size, data.device_of(model)):
            data.forward(model, batch, forward_fn)
            if hasattr(type(model), "_fmn_in_place"):  # its layers are not those that compute
                return
    if not any(seen.values()):
        raise ValueError("train_data: expected at least one batch of two or more samples, for BatchNorm")
    for name, norm in found.items():
        if seen.get(norm) == 0:
            logger.warning("train_data: no batch of two or more samples reaches %s, which keeps its statistics", name)
            norm.load_state_dict(before[norm], strict=False)


def _weigh(seen: dict[Any, int], norm: Any, args: Any, kwargs: Any) -> None:
    """Weigh a batch by its values per channel; a single one, which torch refuses, has no variance."""
    n_channels = len(norm.running_mean)
    tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 1)
    values = next((v for v in tensors if v.shape[1] == n_channels), None)
    if values is None:
        raise ValueError(f"model: expected a tensor of {n_channels} channels as an argument of {type(norm).__name__}")
    n = values.numel() // max(1, n_channels)
    norm.train(n > 1)
    if n > 1:
        norm.momentum = n / (seen[norm] + n)
        seen[norm] += n


def _scripted_norms(model: nn.Module) -> set[str]:
    """Names of BatchNorm layers with a momentum that cannot be set."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    return {n for n, m in layers.items() if "BatchNorm" in m.original_name and hasattr(m, "running_mean")}


def plan_checkpoints(plan: Any, run: Any) -> tuple[nn.Module, dict[int, Path]]:
    """Check that a plan fits a run; return the run's model and the checkpoint file of each row that the plan uses."""
    if not isinstance(plan, FusionPlan):
        raise TypeError(f"plan: expected a FusionPlan, got {type(plan).__name__}")
    model = attached_model(run)
    if plan.n_epochs != len(run.history):
        raise ValueError(f"plan: made for {plan.n_epochs} epochs, the run has {len(run.history)}")
    if plan.epochs and plan.epochs != run.history.epochs:
        known = set(plan.epochs).difference(run.history.epochs) or set(run.history.epochs).difference(plan.epochs)
        raise ValueError(f"plan: made for other epochs than the run's; only one of them has epoch {min(known)}")
    return model, {row: run.checkpoint(row) for row in plan.weights}


def attached_model(run: Any) -> nn.Module:
    """Return the torch model of a Run, without wrappers, or raise an error that says how to attach one."""
    if not isinstance(run, Run):
        raise TypeError(f"run: expected a Run, got {type(run).__name__}")
    if not isinstance(run.model, nn.Module):
        hint = f"use Run.open({str(run.run_dir)!r}, model=...)"
        if run.suffix != ".pt":
            hint = f"this is for networks of torch, and its checkpoints are {run.suffix} files"
        raise ValueError(f"run: no model attached; {hint}")
    return checkpoints.unwrap(run.model)
