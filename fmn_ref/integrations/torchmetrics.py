"""torchmetrics: ForgetFraction, what a model has forgotten since its best, beside accuracy and the others.

metric.update(logits, labels) per batch; metric.compute(), metric.reset() per epoch
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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
    """The peak forget fraction max_e F_e of the epochs so far, against the latest: right at e, wrong now.

    An epoch is what is updated between two resets. `compute` adds it to the history, which outlives `reset`; more
    updates and another `compute` before the reset replace it; a `reset` without a `compute` since the last update drops
    it. What has fewer samples than another epoch is a rehearsal, as Lightning's sanity check, and no epoch; where that
    covers the whole set (two batches or less, or `num_sanity_val_steps=-1`), say `Trainer(num_sanity_val_steps=0)`. So
    both usual ways are right::

        for epoch in range(epochs):                      def validation_step(self, batch, batch_idx):
            for x, y in val_loader:                          self.forget(self(batch[0]), batch[1])
                metric.update(model(x), y)                   self.log("peak_forget_fraction", self.forget)
            value = metric.compute()
            metric.reset()

    Calling the metric, `metric(preds, target)`, updates it and returns the value of the last `compute` (0 before the
    first): a batch has none of its own.

    The history is part of `state_dict()` and so of checkpoints, and of pickles and clones; `metric.history` is what
    `fmn_ref.forget_fraction`, `fuse` and `plot` take. Use another instance for another data set, and for training and
    validation, as always with torchmetrics.

    Parameters
    ----------
    **kwargs
        Of `torchmetrics.Metric`.

    Raises
    ------
    ValueError, TypeError
        `update`: as `fmn_ref.correctness`; sample numbers in some batches only. `compute`: nothing was updated; other
        samples than in the epochs before.

    Notes
    -----
    In several processes `compute` joins the rows of all. A DistributedSampler repeats samples to make the parts equal;
    give `index`, each sample's number, and they count once, in the order of the numbers. `index` also undoes shuffling.

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

    rows: list[Tensor]  # of a batch (n, 3) int64: sample number or -1, target, 1 where right

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self._closed: CorrectnessHistory | None = None
        self._open: CorrectnessHistory | None = None  # with the epoch that was computed and may yet change
        self._last = torch.zeros(())
        self._rows_computed = 0  # rows at the last compute since a reset

    @property
    def history(self) -> CorrectnessHistory:
        """Every epoch that was computed.

        Raises
        ------
        ValueError
            None was.
        """
        history = self._open or self._closed
        if history is None:
            raise ValueError("history: compute() was not called yet")
        return history

    def update(self, preds: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Add a batch.

        Parameters
        ----------
        preds : (n,) integers or (n, n_classes) floating-point
            Predicted classes, or scores.
        target : (n,) integers
        index : (n,) integers >= 0, optional
            Sample numbers.
        """
        right = correctness(preds, target)
        if right.ndim != 1:
            raise ValueError(f"preds: expected shape (n,) or (n, n_classes), got correctness of shape {right.shape}")
        number = np.full(len(right), -1) if index is None else _check.labels(index, len(right), name="index")
        rows = np.stack([number, _check.labels(target), right], 1).astype(np.int64)
        self.rows.append(torch.from_numpy(rows).to(self.device))
        self._open = None

    def compute(self) -> Tensor:
        """max_e F_e, a scalar of torch's default type. After a rehearsal, the value before it, with a warning."""
        if not len(self.rows):
            raise ValueError("compute: nothing was updated since the last reset")
        rows = self.rows if isinstance(self.rows, Tensor) else torch.cat(self.rows)  # joined: in several processes
        epoch = rows.cpu().numpy()
        first, second = np.array_split(epoch[:, :2], 2)
        if len(first) == self._rows_computed and np.array_equal(first, second):
            rank_zero_warn("ForgetFraction: the same targets twice in one epoch: was reset() forgotten?")
        self._rows_computed = len(epoch)
        self._open = _with_epoch(self._closed, epoch)
        self._last = self._peak()
        return self._last

    def _peak(self) -> Tensor:
        history = self._open or self._closed
        peak = forget_fraction(history).max() if history else 0.0
        return torch.tensor(peak, dtype=self.dtype, device=self.device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """`update`, and the value of the last `compute`."""
        self.update(*args, **kwargs)
        return self._last.clone()

    def reset(self) -> None:
        """Begin the next epoch."""
        if self._open is not None:
            self._closed, self._open = self._open, None
        self._rows_computed = 0
        super().reset()

    def get_extra_state(self) -> dict[str, Any]:
        """The history, as torch asks for it: plain tensors and numbers."""
        history = self._open or self._closed
        if history is None:
            return {"n_samples": 0, "labels_sha256": None}
        packed, digest = (torch.from_numpy(a.copy()) for a in (history.packed, np.frombuffer(history.digest, np.uint8)))
        return {"n_samples": history.n_samples, "packed": packed, "labels_sha256": digest}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Weights of a model that had no such metric, or left it out, are fine: the history stays as it is."""
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._closed = self._open = None
        if state["n_samples"]:
            self._closed = CorrectnessHistory(state["n_samples"])
            self._closed.digest = state["labels_sha256"].cpu().numpy().tobytes()
            for bits in state["packed"].cpu().numpy():
                self._closed.append(np.unpackbits(bits, count=state["n_samples"], bitorder="little"))
        self._last = self._peak()


def _with_epoch(closed: CorrectnessHistory | None, rows: Any) -> CorrectnessHistory | None:
    """A history with one epoch more; rows as ForgetFraction keeps them. None: they are no epoch."""
    if (rows[:, 0] >= 0).all():
        rows = rows[np.unique(rows[:, 0], return_index=True)[1]]
    elif (rows[:, 0] >= 0).any():
        raise ValueError("index: expected sample numbers in every batch or in none")
    target, right, before = np.ascontiguousarray(rows[:, 1]), rows[:, 2] == 1, 0 if closed is None else closed.n_samples
    if len(rows) < before:
        rank_zero_warn(
            f"ForgetFraction: {len(rows)} samples, not the {before} of the epochs before: a rehearsal, not recorded"
        )
        return None
    if closed is None or (len(closed) == 1 and before < len(rows)):
        history = CorrectnessHistory(len(rows), labels=target)
    elif len(rows) > before or closed.digest != labels_digest(target):
        more = f"{len(rows)} samples, not the {before} of the epochs before"
        counts = more if len(rows) > before else "other samples than in the epochs before, or in another order"
        raise ValueError(f"target: {counts}; give index=, or begin with a new ForgetFraction")
    else:
        history = closed.select(range(len(closed)))
    history.append(right)
    return history
