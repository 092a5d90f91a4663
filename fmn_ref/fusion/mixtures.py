"""Convex combinations of epochs: windows, one mixing step, and the members that give a set of weights. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import _check
from .._check import Float
from .probabilities import ProbabilityReader

Members = tuple[tuple[int, float], ...]  # (epoch, eps) in the order of mixing


def window_epochs(epoch: int, window: int, n_epochs: int) -> range:
    """epoch - window .. epoch + window, clipped to the range of epochs."""
    return range(max(epoch - window, 0), min(epoch + window, n_epochs - 1) + 1)


def mix(current: Float, candidate: Float, eps: float) -> Float:
    """One mixing step (arXiv 2412.12968, Algorithm 1)."""
    return eps * candidate + (1 - eps) * current


def replay(current: Float, probs: ProbabilityReader, members: Members, window: int) -> Iterator[Float]:
    """Fused probabilities: `current`, those of the last epoch, then the mixture after each member."""
    yield current
    for epoch, eps in members:
        current = mix(current, probs.mean(window_epochs(epoch, window, len(probs))), eps)
        yield current


def mixture(probs: Any, weights: dict[int, float]) -> Float:
    """sum_e weight_e * p_e, reading each epoch once."""
    reader = ProbabilityReader.of(probs)
    return np.asarray(sum(weight * reader[epoch] for epoch, weight in sorted(weights.items())))


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
