"""Groups of samples: the distinct labels, and each sample's place among them. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check


def group_members(groups: Any, n_samples: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Distinct labels, sorted, and each sample's index among them."""
    g = _check.array(groups, "groups", kinds="biufUSTO")
    if g.shape != (n_samples,) or g.dtype.kind == "f":
        raise ValueError(
            f"groups: expected {n_samples} integers or strings, one per sample, got shape {g.shape}, dtype {g.dtype}"
        )
    if g.dtype.kind in "US" and not hasattr(groups, "dtype"):
        g = np.asarray(groups, object)  # of a list with gaps: NumPy turns NaN into the string "nan"
    if g.dtype.kind in "iu" and int(g.max()) - int(g.min()) < 4 * n_samples:
        return _integer_members(g)
    if g.dtype.kind not in "TO":
        names, member = np.unique(g, return_inverse=True)
        return names, member.astype(np.int64)
    g = g.astype(object)
    _check_one_type(g)
    names, member = np.unique(g, return_inverse=True)
    return np.array(names.tolist()), member.astype(np.int64)


def _integer_members(g: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """As np.unique with its inverse, for integers of a small range: by a table, without sorting."""
    least = g.min()
    place = g.astype(np.int64) - np.int64(least) if least <= np.iinfo(np.int64).max else (g - least).astype(np.int64)
    used = np.bincount(place) > 0
    names = np.flatnonzero(used)
    return (names.astype(g.dtype) + least).astype(g.dtype), (np.cumsum(used) - 1)[place]


def _check_one_type(groups: NDArray[Any]) -> None:
    """Raise a ValueError where an array of objects, such as a column of pandas, holds more than one type of labels."""
    known: tuple[tuple[type, ...], ...] = ((str,), (bytes,), (int, np.integer, np.bool_))
    expected = next((types for types in known if isinstance(groups[0], types)), ())
    for i, value in enumerate(groups):
        if not isinstance(value, expected):
            raise ValueError(f"groups: expected only integers or only strings, got {value!r:.40} at sample {i}")


def joined_groups(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """The groups of both, sorted. A ValueError where NumPy would turn numbers into strings, or integers into floats."""
    text = [g.dtype.kind if g.dtype.kind in "US" else "" for g in (a, b)]
    if text[0] != text[1] or np.result_type(a, b).kind == "f":
        raise ValueError(f"ForgettingCurves: can only add groups of one type, got {a.dtype} and {b.dtype}")
    return np.union1d(a, b)
