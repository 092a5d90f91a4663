"""Models made from several checkpoints: `FusedModel` combines predictions, `averaged_model` averages weights."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _files
from ..fusion.plan import FusionPlan
from ..metrics.scores import FLOOR
from ..runs import checkpoints, references
from ..runs.run import Run
from . import data
from .averages import is_statistic, load_mean, open_sources, shares_of
from .copies import duplicate, independent
from .logits import check_logits
from .memory_format import either_format, set_channels_last, set_contiguous

logger = logging.getLogger(__name__)


class FusedModel(nn.Module):
    """Ensemble of a plan's checkpoints as a module; one forward pass for each checkpoint.

    Calling it returns log-probabilities, shape (batch, n_classes), dtype float32: softmax, arg-max and cross-entropy
    work on them. The run's network must return logits (batch, n_classes) or an object with such `.logits`: it is called
    directly, without the run's `forward_fn`. (Pass that to `distill`, which calls it for each member.) One that returns
    more axes, as for pixels or tokens, is refused when it is called. Members are frozen and always in evaluation mode.
    To store the ensemble, keep the plan and the run directory, or use `save`.

    Attributes: `plan`, and `members`, one network for each of the plan's weights.

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
        self._set_members(_load_members(model, paths.values()), plan)

    @classmethod
    def of_members(cls, members: Iterable[nn.Module], plan: FusionPlan) -> FusedModel:
        """Make an ensemble of loaded models, one for each of the plan's weights."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_members(members, plan)
        return self

    def save(self, folder: _files.AnyPath) -> None:
        """Write the ensemble to a folder: plan.json, and the weights of each member.

        Without a run directory, this is all that predicting needs. For a Transformers model, use `save_fused` instead.

        Parameters
        ----------
        folder : path
            Created if missing; an ensemble in it is replaced. member_00003.pt is row 3 of the run.

        Raises
        ------
        OSError
            The folder cannot be written.
        """
        target = _files.absolute(folder)
        _files.make_folder(target)
        (target / "plan.json").unlink(missing_ok=True)  # never a plan beside the members of another
        _files.sync(target)
        for stale in target.glob("member_*.pt"):
            if re.fullmatch(r"member_\d{5,}\.pt", stale.name):  # not a file of the user's
                stale.unlink()
        for path, member in zip(_member_paths(target, self.plan), self.members, strict=True):
            checkpoints.save_state(member, path)
        self.plan.save(target / "plan.json")

    @classmethod
    def load(cls, folder: _files.AnyPath, model: nn.Module) -> FusedModel:
        """Load an ensemble that `save` wrote.

        Parameters
        ----------
        folder : path
        model : nn.Module
            A network of the members' architecture, on the device to use. Its own weights do not change.

        Raises
        ------
        TypeError
            `model` is no module.
        FileNotFoundError
            `folder` contains no plan.json, or a member is missing.
        ValueError
            A file is damaged, or a member does not fit the model. The message names it.

        Examples
        --------
        >>> fused.save("fused")  # doctest: +SKIP
        >>> fused = fmn.FusedModel.load("fused", make_model())  # doctest: +SKIP
        """
        data.check_module(model, "model")
        source = _files.absolute(folder)
        plan = FusionPlan.load(source / "plan.json")
        return cls.of_members(_load_members(checkpoints.unwrap(model), _member_paths(source, plan)), plan)

    def _set_members(self, members: Iterable[nn.Module], plan: FusionPlan) -> None:
        self.plan, self.combine = plan, plan.combine
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

        fused = self._fmn_forward_batch(None, logits)[0]
        if fused.ndim > 2:  # of pixels or tokens: which axis holds the classes cannot be told
            hint = "plan.apply(run.probabilities(data)) goes by the run's forward_fn, and so does distill"
            raise ValueError(f"model: expected logits (n, n_classes), got shape {tuple(fused.shape)}; {hint}")
        return fused

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


def _load_members(model: nn.Module, paths: Iterable[Path]) -> list[nn.Module]:
    network = independent(model)
    with torch.no_grad():  # a ScriptModule's tensors would be copied with a graph
        return [duplicate(checkpoints.load_into(network, path)) for path in paths]


def _member_paths(folder: Path, plan: FusionPlan) -> list[Path]:
    return [folder / f"member_{row:05d}.pt" for row in plan.weights]


def _drop_derived(model: nn.Module, keys: Any) -> None:
    for member in model.members:  # type: ignore[union-attr]
        checkpoints.drop_derived(member)


def averaged_model(run: Run, weights: dict[int, float], train_data: Any, *, batch_size: int = 512) -> nn.Module:
    """Average the weights of checkpoints into one model: averaged KF, SWA, or EMA over epochs.

    The files are read in parts: memory holds the network twice, whatever the number of checkpoints. To write the
    average of networks that are too large for that, use `average_checkpoints`.

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
        No weight above 0; an epoch out of range; no model attached; a checkpoint that does not fit, or holds NaN;
        infinite, 8-bit or adapter weights that differ; a ScriptModule with BatchNorm.
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
    shares = shares_of(weights, len(run.history))
    paths = ((run.checkpoint(epoch), share) for epoch, share in shares)
    steady = load_mean(model, open_sources(paths, model))
    with data.computing(model, keep=True) as network:
        frozen = steady if len(shares) > 1 else {*frozen_norms(network), *_scripted_norms(network)}
        recompute_batchnorm(network, train_data, batch_size=batch_size, forward_fn=run.forward_fn, frozen=frozen)
        if hasattr(type(network), "_fmn_in_place"):  # caught in this pass: see `copies.Watch`
            return averaged_model(run, weights, train_data, batch_size=batch_size)
    checkpoints.drop_derived(model)
    return model.eval()


def frozen_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Layers, by name, whose running statistics are frozen: those that are in evaluation mode on purpose.

    They are so inside a network in training mode, or if all of their parameters are frozen too.
    """

    def is_frozen(layer: nn.Module) -> bool:
        return model.training or {p.requires_grad for p in layer.parameters()} == {False}

    layers = {n: m for n, m in model.named_modules() if any(map(is_statistic, dict(m.named_buffers(recurse=False))))}
    return {name: layer for name, layer in layers.items() if not layer.training and is_frozen(layer)}


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
        if run.suffix not in (".pt", references.SUFFIX):
            hint = f"this is for networks of torch, and its checkpoints are {run.suffix} files"
        raise ValueError(f"run: no model attached; {hint}")
    return checkpoints.unwrap(run.model)
