"""torchmetrics: ForgetFraction, the peak forget fraction of a training so far.

Call metric.update(logits, labels) for each batch, then metric.compute() and metric.reset() at the end of each epoch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check
from ..metrics.curves import correctness, forget_fraction
from ..metrics.history import CorrectnessHistory, labels_digest

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import rank_zero_warn
except ImportError:
    raise ImportError('this needs torchmetrics: pip install "fmn_ref[torchmetrics]"') from None


class ForgetFraction(Metric):
    """Peak forget fraction max_e F_e of all epochs so far (arXiv 2507.08686).

    F_e is the fraction of samples that epoch e classifies correctly and the latest epoch does not. An epoch is all that
    you pass to `update` between two resets; `compute` adds it to a history, which `reset` does not clear. Both usual
    ways of calling a metric work::

        for epoch in range(epochs):                      def validation_step(self, batch, batch_idx):
            for x, y in val_loader:                          self.forget(self(batch[0]), batch[1])
                metric.update(model(x), y)                   self.log("peak_forget_fraction", self.forget)
            value = metric.compute()
            metric.reset()

    Parameters
    ----------
    **kwargs
        Passed on to `torchmetrics.Metric`.

    Attributes
    ----------
    history : CorrectnessHistory
        All computed epochs, for `fmn_ref.forget_fraction`, `fmn_ref.fuse` and the plots. ValueError before the first.

    Raises
    ------
    TypeError, ValueError
        `update`: as `fmn_ref.correctness`. `compute`: no batch since the last reset; `index` given for some batches
        only; other samples than in the epochs before.

    Notes
    -----
    Use one instance per data set. ``metric(preds, target)`` calls `update` and returns the value of the last `compute`,
    or 0 before the first, because a single batch has no forget fraction. A `compute` after more updates replaces the
    epoch of the `compute` before it. A `reset` without a `compute` discards the batches.

    An epoch with fewer samples than the others is not recorded: Lightning's sanity check calls `compute` after a few
    batches. If the sanity check covers the whole data set (two batches or less, or `num_sanity_val_steps=-1`), disable
    it with `Trainer(num_sanity_val_steps=0)`.

    The history is part of `state_dict()`, pickles and clones, and so of checkpoints.

    In several processes, `compute` gathers the rows of all. A DistributedSampler repeats samples so that all processes
    have equally many. Pass each sample's number as `index`: then each sample counts once, in the order of the numbers.
    `index` also undoes shuffling.

    Examples
    --------
    >>> import torch
    >>> metric = ForgetFraction()
    >>> for preds in ([0, 1, 1], [0, 0, 1]):
    ...     metric.update(torch.tensor(preds), torch.tensor([0, 1, 1]))
    ...     print(metric.compute())
    ...     metric.reset()
    tensor(0.)
    tensor(0.3333)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    rows: list[Tensor]  # one (n, 3) int64 per batch: sample number or -1, target, 1 if correct

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self._before: CorrectnessHistory | None = None  # epochs that a reset has completed
        self._current: CorrectnessHistory | None = None  # these and the epoch that further updates may replace
        self._value = torch.zeros(())
        self._n_computed = 0  # rows at the last compute since a reset

    @property
    def history(self) -> CorrectnessHistory:
        """All computed epochs; ValueError before the first."""
        history = self._current or self._before
        if history is None:
            raise ValueError("history: compute() was not called yet")
        return history

    def update(self, preds: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Add a batch to the epoch.

        Parameters
        ----------
        preds : (n,) integers or (n, n_classes) floating-point
            Predicted classes, or scores.
        target : (n,) integers
            Classes.
        index : (n,) integers >= 0, optional
            Each sample's number in the data set.
        """
        correct = correctness(preds, target)
        if correct.ndim != 1:
            raise ValueError(f"preds: expected shape (n,) or (n, n_classes), got correctness of shape {correct.shape}")
        number = np.full(len(correct), -1) if index is None else _check.labels(index, len(correct), name="index")
        rows = np.stack([number, _check.labels(target), correct], 1).astype(np.int64)
        self.rows.append(torch.from_numpy(rows).to(self.device))
        self._current = None

    def compute(self) -> Tensor:
        """Add the epoch to the history and return max_e F_e, a scalar of torch's default type.

        For an epoch that is not recorded, warn and return the value before it.
        """
        if not len(self.rows):
            raise ValueError("compute: nothing was updated since the last reset")
        gathered = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)  # a Tensor in several processes
        rows = gathered.cpu().numpy()
        first, second = np.array_split(rows[:, :2], 2)
        if len(first) == self._n_computed and np.array_equal(first, second):
            rank_zero_warn("ForgetFraction: the same targets twice in one epoch: was reset() forgotten?")
        self._n_computed = len(rows)
        self._current = _with_epoch(self._before, _by_number(rows))
        self._value = self._peak()
        return self._value

    def _peak(self) -> Tensor:
        history = self._current or self._before
        peak = forget_fraction(history).max() if history else 0.0
        return torch.tensor(peak, dtype=self.dtype, device=self.device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call `update`; return the value of the last `compute`."""
        self.update(*args, **kwargs)
        return self._value.clone()

    def reset(self) -> None:
        """Begin the next epoch."""
        if self._current is not None:
            self._before, self._current = self._current, None
        self._n_computed = 0
        super().reset()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the history as tensors and numbers; torch stores it in the state_dict."""
        history = self._current or self._before
        if history is None:
            return {"n_samples": 0, "labels_sha256": None}
        packed, digest = (torch.from_numpy(a.copy()) for a in (history.packed, np.frombuffer(history.digest, np.uint8)))
        return {"n_samples": history.n_samples, "packed": packed, "labels_sha256": digest}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace the history by what `get_extra_state` returned."""
        self._before = self._current = None
        if state["n_samples"]:
            self._before = CorrectnessHistory(state["n_samples"])
            self._before.digest = state["labels_sha256"].cpu().numpy().tobytes()
            for bits in state["packed"].cpu().numpy():
                self._before.append(np.unpackbits(bits, count=state["n_samples"], bitorder="little"))
        self._value = self._peak()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Keep the history if the state_dict comes from a model without this metric."""
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _by_number(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort the rows of one epoch by sample number, each number once; rows without numbers stay as they are."""
    numbered = rows[:, 0] >= 0
    if not numbered.any():
        return rows
    if not numbered.all():
        raise ValueError("index: expected sample numbers in every batch or in none")
    return rows[np.unique(rows[:, 0], return_index=True)[1]]


def _with_epoch(before: CorrectnessHistory | None, rows: NDArray[np.int64]) -> CorrectnessHistory | None:
    """Copy a history with one epoch more; None for fewer samples than before."""
    target, correct = np.ascontiguousarray(rows[:, 1]), rows[:, 2] == 1
    n_before = 0 if before is None else before.n_samples
    counts = f"{len(rows)} samples, not the {n_before} of the epochs before"
    if len(rows) < n_before:
        rank_zero_warn(f"ForgetFraction: {counts}: not recorded, as after a sanity check")
        return None
    if before is None or (len(before) == 1 and n_before < len(rows)):  # a single shorter epoch was a sanity check
        history = CorrectnessHistory(len(rows), labels=target)
    elif len(rows) > n_before or before.digest != labels_digest(target):
        other = counts if len(rows) > n_before else "other samples than in the epochs before, or in another order"
        raise ValueError(f"target: {other}; pass index=, or use a new ForgetFraction")
    else:
        history = before.select(range(len(before)))
    history.append(correct)
    return history
