"""Knowledge Fusion: choose epochs by what the current predictor gets wrong, and mix them in. NumPy only.

Input is what every epoch's checkpoint predicts on a labelled selection set. After arXiv 2412.12968, Algorithm 1, and
arXiv 2507.08686, Section IV; where the papers are silent (ties, the ends of the range) the docstrings say what was
decided.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _check, _files
from .history import NO_LABELS, CorrectnessHistory, labels_digest

Float = NDArray[np.float64]
Int = NDArray[np.int64]
_BLOCK = 1 << 16  # elements of (n_samples, n_classes) worked on at a time: the fastest of 2^12, 2^14, 2^16 and 2^20
_ROUNDING = 4e-15  # bounds the error of a difference of two mixed probabilities, and of a crossing times its slope


@dataclass(frozen=True)
class FusionPlan:
    """The outcome of a fusion: which epochs, with which epsilon, in which order.

    Attributes
    ----------
    members : tuple of (epoch, eps)
        In the order found; fused <- eps * mean of the window around epoch + (1 - eps) * fused, starting from the last
        epoch. Epochs are row numbers of the probabilities, from 0. Empty when the final model alone is best.
    n_epochs : int
    window : int
        A member is the mean over epochs A - window .. A + window, clipped to the range.
    accuracy : tuple of float
        Accuracy on the selection set: of the final model, then after each round. Never falls.
    method, search : str
    labels_sha256 : str
        Digest of the selection labels, to notice scoring on the samples that chose the plan.
    """

    members: tuple[tuple[int, float], ...]
    n_epochs: int
    window: int
    accuracy: tuple[float, ...]
    method: str = "forget"
    search: str = "grid"
    labels_sha256: str = ""

    def __post_init__(self) -> None:
        n_epochs = _check.number(self.n_epochs, 1, 2**31, "n_epochs", int)
        _check.number(self.window, 0, 2**31, "window", int)
        for epoch, eps in self.members:
            _check.number(epoch, 0, n_epochs - 1, "epoch", int)
            _check.number(eps, 0, 1, "eps")
        for value in self.accuracy:
            _check.number(value, 0, 1, "accuracy")
        if len(self.accuracy) != len(self.members) + 1:
            raise ValueError("accuracy: expected one more value than members")
        _check.choice(self.method, ("forget",), "method")
        _check.choice(self.search, ("grid", "exact"), "search")

    @property
    def final_model_alone(self) -> bool:
        """True when no member helped: the fused model is the final one."""
        return not self.members

    @property
    def weights(self) -> dict[int, float]:
        """{epoch: weight}, windows spread out, sum 1, zeros left out: the fused prediction is sum_e weight_e * p_e."""
        w = np.zeros(self.n_epochs)
        w[-1] = 1
        for epoch, eps in self.members:
            w *= 1 - eps
            chosen = window_epochs(epoch, self.window, self.n_epochs)
            w[chosen] += eps / len(chosen)
        return {int(e): float(w[e]) for e in np.flatnonzero(w)}

    def apply(self, probs: Any) -> Float:
        """Replay the plan on other samples.

        Parameters
        ----------
        probs : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
            Only the epochs of the plan are read.

        Returns
        -------
        (n_samples, n_classes) float64
            Fused probabilities; on the selection set their accuracy is exactly `accuracy[-1]`.

        Raises
        ------
        TypeError, ValueError
            Another number of epochs, or probabilities that are none.
        """
        epochs = Epochs(probs)
        if len(epochs) != self.n_epochs:
            raise ValueError(f"probs: expected {self.n_epochs} epochs as in the plan, got {len(epochs)}")
        fused = epochs[self.n_epochs - 1]
        for epoch, eps in self.members:
            fused = _mix(fused, window_mean(epochs, epoch, self.window), eps)
        return fused

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON (docs/formats.md)."""
        _files.write_json(
            path,
            {
                "format": "fmn_ref.plan",
                "version": 1,
                "method": self.method,
                "search": self.search,
                "window": self.window,
                "n_epochs": self.n_epochs,
                "members": [{"epoch": epoch, "eps": eps} for epoch, eps in self.members],
                "weights": {str(epoch): weight for epoch, weight in self.weights.items()},
                "selection_accuracy": list(self.accuracy),
                "selection_labels_sha256": self.labels_sha256,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionPlan:
        """Read a plan; ValueError naming the file for anything that is not one. Runs no code from the file."""
        content = _files.read_json(path, "fmn_ref.plan")
        try:
            return cls(
                members=tuple((m["epoch"], m["eps"]) for m in content["members"]),
                n_epochs=content["n_epochs"],
                window=content["window"],
                accuracy=tuple(content["selection_accuracy"]),
                method=content["method"],
                search=content["search"],
                labels_sha256=str(content["selection_labels_sha256"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: not a valid plan: {reason}") from None


def fuse(
    probs: Any,
    labels: Any,
    *,
    correct: Any = None,
    method: str = "forget",
    window: int = 1,
    max_rounds: int | None = None,
    search: str = "grid",
    step: float = 0.01,
) -> FusionPlan:
    """Knowledge Fusion: find the epochs that know what the final model forgot, and their weights.

    Each round takes the epoch that is right most often where the fused predictor is wrong (ties: the earliest),
    averages its window, and mixes that in with the epsilon of the best selection accuracy; it stops when accuracy no
    longer rises. An epoch may be chosen again.

    Parameters
    ----------
    probs : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
        Predicted probabilities of every epoch on the selection set; float64 inside. With `correct` given, only the last
        epoch and the chosen windows are read, so the sequence may compute them on demand (`Run.probabilities`).
    labels : (n_samples,) integers
    correct : (n_epochs, n_samples) bool or 0 and 1, optional
        The correctness history on the same samples; default: from `probs`.
    method : {"forget"}
    window : int >= 0
        Half width of the window; the papers use 1. Clipped at the first and last epoch.
    max_rounds : int >= 1, optional
        None: to the end, "KF(inf)"; 1 is "KF(1)".
    search : {"grid", "exact"}
        See `best_epsilon`.
    step : float
        Of the grid.

    Returns
    -------
    FusionPlan

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit, labels out of range, non-finite or negative probabilities, rows that do not sum to 1;
        a history of other samples.

    Examples
    --------
    The first epoch knows sample 1, which the last one forgot:

    >>> p = [[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [[0.9, 0.1], [0.65, 0.35], [0.2, 0.8]]]
    >>> plan = fuse(p, [0, 1, 1], window=0)
    >>> plan.members, plan.accuracy
    (((0, 0.34),), (0.6666666666666666, 1.0))
    >>> plan.apply(p).argmax(1)
    array([0, 1, 1])

    References
    ----------
    arXiv 2412.12968, Algorithm 1; arXiv 2507.08686, Section IV.
    """
    _check.choice(method, ("forget",), "method")
    pick, grid = _SEARCHES[_check.choice(search, ("grid", "exact"), "search")], _grid(step)
    window = _check.number(window, 0, 2**31, "window", int)
    if max_rounds is not None:
        max_rounds = _check.number(max_rounds, 1, 2**31, "max_rounds", int)
    probs = Epochs(probs)
    n_epochs = len(probs)
    current = probs[n_epochs - 1]
    y = _check.labels(labels, *current.shape)
    if correct is None:
        right = np.stack([probs[e].argmax(1) == y for e in range(n_epochs)])
    else:
        right = _recorded(correct, n_epochs, y, current)
    members: list[tuple[int, float]] = []
    accuracy = [_accuracy(current, y)]
    while max_rounds is None or len(members) < max_rounds:
        forgotten = right[:, current.argmax(1) != y].sum(1)  # n * F_e against the current predictor
        epoch = int(forgotten.argmax())
        candidate = window_mean(probs, epoch, window)
        eps, best = pick(current, candidate, y, grid)
        if best <= accuracy[-1]:
            break
        current = _mix(current, candidate, eps)
        members.append((epoch, eps))
        accuracy.append(best)
    return FusionPlan(tuple(members), n_epochs, window, tuple(accuracy), method, search, labels_digest(y).hex())


def best_epsilon(
    current: Any, candidate: Any, labels: Any, *, search: str = "grid", step: float = 0.01
) -> tuple[float, float]:
    """The epsilon in [0, 1] with the best accuracy of eps * candidate + (1 - eps) * current.

    Parameters
    ----------
    current, candidate : (n_samples, n_classes) probabilities
    labels : (n_samples,) integers
    search : {"grid", "exact"}
        "grid" tries 0, step, ..., 1 (ties: the smallest). "exact" finds the best over the whole interval: each sample
        is right on one sub-interval, so one pass gives their ends and one sort the best count; it returns the middle of
        the first best stretch (or its end, where only equal scores make it best), and 0 when nothing is better than
        `current`. Never below the grid.
    step : float
        1 / step must be a whole number.

    Returns
    -------
    eps, accuracy : float, float

    Raises
    ------
    TypeError, ValueError
        As `fuse`.

    Examples
    --------
    >>> current, candidate = [[0.65, 0.35], [0.9, 0.1]], [[0.1, 0.9], [0.6, 0.4]]
    >>> best_epsilon(current, candidate, [1, 0])
    (0.28, 1.0)
    >>> eps, accuracy = best_epsilon(current, candidate, [1, 0], search="exact")
    >>> round(eps, 3), accuracy
    (0.636, 1.0)
    """
    cur = _check.probabilities(current, name="current")
    new = _check.probabilities(candidate, cur.shape, name="candidate")
    y = _check.labels(labels, *cur.shape)
    return _SEARCHES[_check.choice(search, ("grid", "exact"), "search")](cur, new, y, _grid(step))


def _recorded(correct: Any, n_epochs: int, y: Int, final: Float) -> NDArray[np.bool_]:
    """The correctness history, checked to be of these samples: its last row is compared with the last predictions."""
    if isinstance(correct, CorrectnessHistory) and correct.digest not in (NO_LABELS, labels_digest(y)):
        raise ValueError("correct: a history of other labels, or in another order")
    right = _check.correctness(correct)
    if right.shape != (n_epochs, len(y)):
        raise ValueError(f"correct: expected shape {(n_epochs, len(y))} as probs, got shape {right.shape}")
    top = np.sort(final, axis=1)[:, -2:]
    decided = top[:, -1] - top[:, 0] > 0.02  # the others may differ by rounding: in half precision, on another device
    differ = int(((right[-1] != (final.argmax(1) == y)) & decided).sum())
    if differ > 0.01 * len(y):
        reason = "other samples, order or preprocessing, or recorded without model.eval()?"
        raise ValueError(f"correct: last row disagrees with probs[-1] on {differ} of {len(y)} samples: {reason}")
    return right


def window_epochs(epoch: int, window: int, n_epochs: int) -> range:
    """epoch - window .. epoch + window, clipped to the range."""
    return range(max(epoch - window, 0), min(epoch + window, n_epochs - 1) + 1)


def window_mean(probs: Epochs, epoch: int, window: int) -> Float:
    """Mean probabilities of a window."""
    chosen = window_epochs(epoch, window, len(probs))
    total = probs[chosen[0]]
    for e in chosen[1:]:
        total = total + probs[e]
    return np.asarray(total / len(chosen))


def mixture(probs: Any, weights: dict[int, float]) -> Float:
    """sum_e weight_e * p_e, reading each epoch once."""
    probs = Epochs(probs)
    return np.asarray(sum(weight * probs[epoch] for epoch, weight in sorted(weights.items())))


class Epochs:
    """Probabilities of all epochs, read one at a time and checked as they are read: (n_samples, n_classes) float64."""

    def __init__(self, probs: Any, name: str = "probs") -> None:
        if not hasattr(probs, "__getitem__") or not hasattr(probs, "__len__"):
            raise TypeError(f"{name}: expected an array or a sequence of arrays, got {type(probs).__name__}")
        shape = getattr(probs, "shape", None)
        if (shape is not None and len(shape) != 3) or len(probs) == 0:
            got = "none" if shape is None else f"shape {tuple(shape)}"
            raise ValueError(
                f"{name}: expected shape (n_epochs, n_samples, n_classes) with at least one epoch, got {got}"
            )
        self._probs, self._name = probs, name
        self._shape: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._probs)

    def __getitem__(self, epoch: int) -> Float:
        epoch = _check.index(epoch, len(self), "epoch")
        p = _check.probabilities(self._probs[epoch], self._shape, f"{self._name}[{epoch}]")
        self._shape = (p.shape[0], p.shape[1])
        return p


def _mix(current: Float, candidate: Float, eps: float) -> Float:
    return eps * candidate + (1 - eps) * current


def _accuracy(probs: Float, y: Int) -> float:
    return float((probs.argmax(1) == y).mean())


def _accuracies(cur: Float, new: Float, y: Int, eps: Float) -> Float:
    """Accuracy at each epsilon, by blocks of samples."""
    n_right = np.zeros(len(eps), np.int64)
    for block in _blocks(*cur.shape):
        for i, e in enumerate(eps):
            n_right[i] += (_mix(cur[block], new[block], e).argmax(1) == y[block]).sum()
    return n_right / len(y)


def _blocks(n_samples: int, n_classes: int) -> list[slice]:
    rows = max(1, _BLOCK // n_classes)
    return [slice(start, start + rows) for start in range(0, n_samples, rows)]


def _grid(step: float) -> Float:
    n_steps = round(1 / _check.number(step, 1e-6, 1, "step"))
    if abs(n_steps * step - 1) > 1e-9:
        raise ValueError(f"step: expected a value that divides 1, got {step}")
    return np.asarray(np.arange(n_steps + 1) / n_steps)


def _best_on_grid(cur: Float, new: Float, y: Int, grid: Float) -> tuple[float, float]:
    scores = _accuracies(cur, new, y, grid)
    best = int(np.argmax(scores))
    return float(grid[best]), float(scores[best])


def _best_exactly(cur: Float, new: Float, y: Int, grid: Float) -> tuple[float, float]:
    lo, hi, lo_closed, hi_closed = _intervals(cur, new, y)
    ends = np.unique(np.concatenate([lo, hi, [0.0, 1.0]]))
    middles = (ends[:-1] + ends[1:]) / 2
    at_ends = _n_inside(lo, hi, ends)
    for values in (lo[~lo_closed], hi[~hi_closed]):  # an open end is not part of its interval
        values.sort()
        at_ends -= np.searchsorted(values, ends, "right") - np.searchsorted(values, ends, "left")
    # A grid point where rounding could make more samples right than the intervals say is evaluated with the others.
    on_grid = _n_inside(*_intervals(cur, new, y, slack=_ROUNDING)[:2], grid)
    candidates = np.concatenate([middles, ends, grid])
    bound = np.concatenate([_n_inside(lo, hi, middles), at_ends, on_grid]) / len(y)
    best_eps, best = 0.0, _accuracy(cur, y)
    for i in np.lexsort((candidates, np.arange(len(bound)) >= len(middles), -bound)):
        if bound[i] <= best:
            break
        accuracy = float(_accuracies(cur, new, y, candidates[i : i + 1])[0])
        if accuracy > best:
            best_eps, best = float(candidates[i]), accuracy
    return best_eps, best


_SEARCHES = {"grid": _best_on_grid, "exact": _best_exactly}


def _n_inside(lo: Float, hi: Float, x: Float) -> Int:
    """How many of the closed intervals each x lies in."""
    return np.searchsorted(np.sort(lo), x, "right") - np.searchsorted(np.sort(hi), x, "left")


def _intervals(
    cur: Float, new: Float, y: Int, slack: float = 0.0
) -> tuple[Float, Float, NDArray[np.bool_], NDArray[np.bool_]]:
    """Ends of each right sample's interval of epsilon, and whether they belong to it; samples never right are left out.

    Sample i is right where d_k = (cur_y - cur_k) + eps * slope_k is positive for every k < y and not negative for every
    k > y (arg-max takes the first of equal scores): each k bounds epsilon from one side. With slack, d_k may fall short
    by that much: the widest interval that rounding could make of it.
    """
    parts = [_interval_block(cur[b], new[b], y[b, None], slack) for b in _blocks(*cur.shape)]
    lo, hi, lo_closed, hi_closed = (np.concatenate(p) for p in zip(*parts, strict=True))
    some = (lo < hi) | ((lo == hi) & lo_closed & hi_closed)
    return lo[some], hi[some], lo_closed[some], hi_closed[some]


def _interval_block(
    cur: Float, new: Float, y: Int, slack: float
) -> tuple[Float, Float, NDArray[np.bool_], NDArray[np.bool_]]:
    at_zero = np.take_along_axis(cur, y, 1) - cur  # (B, K)
    slope = np.take_along_axis(new, y, 1) - new - at_zero
    at_zero += slack
    k = np.arange(cur.shape[1])
    beats_equal = (k > y) | (slack > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        crossing = -at_zero / slope
    lost = (slope == 0) & ~((at_zero > 0) | ((at_zero == 0) & beats_equal)) & (k != y)
    rising, falling = (slope > 0) & (k != y), (slope < 0) & (k != y)

    def bound(mask: NDArray[np.bool_], default: float, pick: Callable[..., Float]) -> Float:
        return pick(np.where(mask, crossing, default), axis=1)

    lo_open, lo_equal = bound(rising & ~beats_equal, -1.0, np.max), bound(rising & beats_equal, 0.0, np.max)
    hi_open, hi_equal = bound(falling & ~beats_equal, 2.0, np.min), bound(falling & beats_equal, 1.0, np.min)
    lo, hi = np.maximum(lo_open, np.maximum(lo_equal, 0.0)), np.minimum(hi_open, np.minimum(hi_equal, 1.0))
    hi = np.where(lost.any(1), -1.0, hi)  # never right: an empty interval
    return lo, hi, lo > lo_open, hi < hi_open
