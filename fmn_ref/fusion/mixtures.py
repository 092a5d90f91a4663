"""Combinations of epochs' probabilities, linear and geometric, and the members that give a set of weights. NumPy only.

linear      fused  =  sum_e w_e p_e                               w >= 0, sum 1
geometric   fused  proportional to  exp( sum_e w_e log p_e )      w >= 0, any sum: the log-linear pool
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from .. import _check
from .._check import Array, Float
from ..kernels.mixing import widened
from ..metrics.scores import FLOOR
from .probabilities import ProbabilityReader

Members = tuple[tuple[int, float], ...]  # linear: (epoch, eps) in the order of mixing; geometric: (epoch, weight)
COMBINATIONS = ("linear", "geometric")


def window_epochs(epoch: int, window: int, n_epochs: int) -> range:
    """epoch - window .. epoch + window, clipped to the range of epochs."""
    return range(max(epoch - window, 0), min(epoch + window, n_epochs - 1) + 1)


def mix(current: Float, candidate: Float, eps: float) -> Float:
    """One mixing step (arXiv 2412.12968, Algorithm 1)."""
    mixed = eps * candidate
    mixed += (1 - eps) * current
    return mixed


def replay(probs: ProbabilityReader, members: Members, window: int, combine: str) -> Iterator[Float]:
    """Fused probabilities: those of the last epoch, then after each linear member, or of the geometric members."""
    current = probs[len(probs) - 1]
    yield current
    if combine == "geometric" and members:
        yield log_linear_pool(probs, dict(members))
        return
    for epoch, eps in members:
        current = mix(current, probs.mean(window_epochs(epoch, window, len(probs))), eps)
        yield current


def mixture(probs: Any, weights: dict[int, float]) -> Float:
    """sum_e weight_e * p_e, reading each epoch once."""
    reader = ProbabilityReader.of(probs)
    return np.asarray(sum(weight * reader[epoch] for epoch, weight in sorted(weights.items())))


def log_linear_pool(probs: Any, weights: Mapping[int, float]) -> Float:
    """exp(sum_e weight_e * log p_e), normalised; reads each epoch once.

    Probabilities below FLOOR count as FLOOR, so no single epoch can veto a class.

    References
    ----------
    C. Genest and J. V. Zidek, "Combining probability distributions", Statistical Science 1 (1986).
    """
    reader = ProbabilityReader.of(probs)
    z: Any = 0.0
    for epoch, weight in sorted(weights.items()):
        p = reader.stored(epoch)
        z = z + weight * floored_log(p).reshape(p.shape)
    return softmax(z)[0]


def floored_log(p: Array, out: Float | None = None) -> Float:
    """Logarithms of the probabilities, from log(FLOOR) to 0, flat; into `out` if given."""
    flat = np.ascontiguousarray(p).reshape(-1)
    out = np.empty(len(flat)) if out is None else out
    if flat.dtype == np.float16:  # a table: faster than widening
        return np.take(_logs_of_halves(), flat.view(np.uint16), out=out, mode="clip")
    return np.log(np.clip(widened(flat), FLOOR, 1), out=out)


@cache
def _logs_of_halves() -> Float:
    """The logarithm of every 16-bit number, by its bits."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return np.asarray(np.log(np.clip(np.nan_to_num(every).astype(np.float64), FLOOR, 1)))


def softmax(z: Float) -> tuple[Float, Float]:
    """Softmax of the rows, and its logarithm."""
    z = z - z.max(1, keepdims=True)
    q = np.exp(z)
    total = q.sum(1, keepdims=True)
    return q / total, z - np.log(total)


def members_from_weights(weights: dict[int, float], n_epochs: int, final: float | None = None) -> Members:
    """(epoch, eps) in order, the heaviest first, for a convex combination of members.

    Parameters
    ----------
    weights : {epoch: weight}
        Not negative; scaled to sum 1 together with `final`.
    n_epochs : int
    final : float, optional
        Weight of the last epoch alone, when members are means of windows. Default: members are single epochs, and the
        last epoch's weight is among `weights`.
    """
    checked = {
        _check.number(e, 0, n_epochs - 1, "epoch", int): _check.number(w, 0, 1e300, "weights")
        for e, w in weights.items()
    }
    total = checked.pop(n_epochs - 1, 0.0) if final is None else final
    if total + sum(checked.values()) == 0:
        raise ValueError("weights: expected at least one above 0")
    members = []
    for epoch, w in sorted(checked.items(), key=lambda item: -item[1]):
        if w > 0:
            total += w
            members.append((epoch, w / total))
    return tuple(members)
