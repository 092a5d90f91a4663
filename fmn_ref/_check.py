"""Checks at the public edge: each turns what a caller passed into one known kind of array, or says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels.backend import load

TOLERANCE = 1e-2  # of a sum of probabilities: room for bfloat16
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]
Float = NDArray[np.float64]


def array(x: Any, name: str) -> NDArray[Any]:
    """Anything that NumPy can view; a copy only for tensors that live on an accelerator or have no NumPy dtype."""
    if is_tensor(x):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            x = x.float()
    elif hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        x = np.from_dlpack(x)
    try:
        a = np.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {type(x).__name__} ({error})") from None
    if a.dtype.name == "bfloat16":  # of ml_dtypes, as JAX has them
        a = a.astype(np.float32)
    if a.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected booleans or numbers, got {type(x).__name__} of dtype {a.dtype}")
    return a


def is_tensor(x: Any) -> bool:
    """A torch tensor, told without importing torch."""
    return not isinstance(x, np.ndarray) and hasattr(x, "detach") and hasattr(x, "cpu")


def on_device(x: Any) -> bool:
    """A torch tensor that lives on an accelerator."""
    return is_tensor(x) and x.device.type != "cpu"


def kind(a: Any) -> str:
    """ "b", "i" (signed or not) or "f", of an array or a tensor."""
    if isinstance(a, np.ndarray):
        return "i" if a.dtype.kind == "u" else str(a.dtype.kind)
    return "f" if a.dtype.is_floating_point else "b" if str(a.dtype) == "torch.bool" else "i"


def matrix(x: Any, name: str = "correct") -> Any:
    """(n_epochs, n_samples) array, or tensor on its accelerator, of bool or integers; values are not checked yet."""
    a = x.detach() if on_device(x) else array(x, name)
    if kind(a) == "f":
        raise TypeError(f"{name}: expected bool or integers 0 and 1, got dtype {a.dtype}; see fmn_ref.correctness")
    if a.ndim != 2:
        raise ValueError(f"{name}: expected shape (n_epochs, n_samples), got shape {tuple(a.shape)}")
    return a


def predictions_or_scores(x: Any) -> tuple[Any, bool]:
    """Array, or tensor on its accelerator, of integers or floats; and whether it is uint16 that hold bfloat16."""
    name = "predictions_or_scores"
    bfloat16 = is_tensor(x) and str(x.dtype) == "torch.bfloat16"
    if on_device(x):
        a = x.detach()
    elif bfloat16:
        import torch

        a = x.detach().view(torch.int16).numpy().view(np.uint16)
    else:
        a = array(x, name)
    if kind(a) == "b":
        hint = "is it correctness already? Classes are integers"
        raise TypeError(f"{name}: expected class numbers or scores, got bool; {hint}")
    return a, bfloat16


def first_nan(a: Any, bfloat16: bool) -> tuple[int, ...]:
    """Where the first NaN is, in an array or tensor that has one."""
    nan = (a & 0x7FFF) > 0x7F80 if bfloat16 and isinstance(a, np.ndarray) else a != a
    return tuple(int(i) for i in np.unravel_index(int((nan * 1).reshape(-1).argmax()), tuple(a.shape)))


def plain(a: Any) -> Any:
    """The same with native bytes and adjacent values along the last axis; tensors as they are."""
    if not isinstance(a, np.ndarray):
        return a
    a = a.astype(a.dtype.newbyteorder("="), copy=False)
    return a if a.size < 2 or a.shape[-1] == 1 or a.strides[-1] == a.itemsize else np.ascontiguousarray(a)


def zeros_and_ones(a: Any, name: str) -> Any:
    """The same as bool, where it holds no other numbers than 0 and 1."""
    if kind(a) == "b":
        return a
    if a.min() < 0 or a.max() > 1:
        raise ValueError(f"{name}: expected 0 and 1, got values from {int(a.min())} to {int(a.max())}")
    return a != 0


def correctness(x: Any, name: str = "correct") -> Bool:
    """(n_epochs, n_samples) bool in memory."""
    a = matrix(array(x, name), name)
    if 0 in a.shape:
        raise ValueError(f"{name}: expected at least one epoch and one sample, got shape {a.shape}")
    return np.asarray(zeros_and_ones(a, name))


def labels(x: Any, n_samples: int | None = None, n_classes: int | None = None, name: str = "labels") -> Int:
    """(n_samples,) int64 in [0, n_classes)."""
    others = "" if name == "index" else "; np.unique(..., return_inverse=True) numbers other labels"
    try:
        a = array(x, name)
    except TypeError as error:
        raise TypeError(f"{error}{others}") from None
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {a.dtype}{others}")
    if a.ndim != 1 or len(a) == 0:
        raise ValueError(f"{name}: expected shape (n_samples,) with at least one sample, got shape {a.shape}")
    if n_samples is not None and len(a) != n_samples:
        raise ValueError(f"{name}: expected {n_samples} samples, got {len(a)}")
    if a.min() < 0 or (n_classes is not None and a.max() >= n_classes):
        bound = "n_classes" if n_classes is None else n_classes
        hint = "; for one score a sample give classes, score > 0 as integers" if n_classes == 1 else ""
        raise ValueError(f"{name}: expected classes in [0, {bound}), got values from {a.min()} to {a.max()}{hint}")
    if a.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected classes below 2^63, got {a.max()}")
    return a.astype(np.int64)


def probabilities(x: Any, shape: tuple[int, int] | None = None, name: str = "probs") -> Float:
    """(n_samples, n_classes) float64: finite, not negative, rows summing to 1 within TOLERANCE."""
    a = array(x, name)
    if a.dtype.kind != "f":
        raise TypeError(f"{name}: expected floating-point probabilities, got dtype {a.dtype}")
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"{name}: expected shape (n_samples, n_classes), not empty, got shape {a.shape}")
    if shape is not None and a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} as in the other epochs, got shape {a.shape}")
    a = a.astype(np.float64)
    bad = ~np.isfinite(a) | (a < 0)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{name}: expected finite probabilities >= 0 (after softmax), got {a[index]} at {index}")
    off = np.abs(a.sum(1) - 1)
    if off.max() > TOLERANCE:
        i = int(off.argmax())
        raise ValueError(
            f"{name}: expected rows that sum to 1, got {a[i].sum():.6g} at sample {i}; apply softmax first"
        )
    return a


def native_probabilities(
    x: Any, shape: tuple[int, int] | None = None, name: str = "probs"
) -> tuple[NDArray[Any], bool]:
    """The same checks, but the values as they are stored: contiguous, of 16 to 64 bits; and whether they are bfloat16
    in uint16."""
    bfloat16 = is_tensor(x) and str(x.dtype) == "torch.bfloat16"
    if bfloat16:
        import torch

        a = x.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    else:
        a = array(x, name)
        if a.dtype.kind == "f" and a.dtype.itemsize > 8:
            a = a.astype(np.float64)
    sound = (a.dtype.kind == "f" or bfloat16) and a.ndim == 2 and 0 not in a.shape and shape in (None, a.shape)
    if sound:
        a = np.ascontiguousarray(a.astype(a.dtype.newbyteorder("="), copy=False))
        sound = load()[0].check_probabilities(a, TOLERANCE, bfloat16)
    if not sound:
        probabilities(x, shape, name)  # says why
    return a, bfloat16


def weights(x: Any, n_samples: int, name: str = "sample_weight") -> Float:
    """(n_samples,) float64: finite, not negative, not all zero."""
    a = array(x, name).astype(np.float64)
    if a.shape != (n_samples,):
        raise ValueError(f"{name}: expected shape ({n_samples},), got shape {a.shape}")
    with np.errstate(over="ignore"):
        total = a.sum()
    if not np.isfinite(total) or (a < 0).any() or not a.any():
        raise ValueError(f"{name}: expected weights >= 0 with a finite sum above 0")
    return a


def index(i: Any, n: int, name: str) -> int:
    """An integer in [-n, n), counted from the start."""
    if isinstance(i, bool) or not isinstance(i, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(i).__name__}")
    if not -n <= i < n:
        raise ValueError(f"{name}: expected an epoch in [-{n}, {n}), got {i}")
    return int(i) % n


def choice(value: Any, options: tuple[str, ...], name: str) -> str:
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return str(value)


def number(value: Any, low: float, high: float, name: str, kind: type = float) -> Any:
    """A finite number (an integer for kind=int) in [low, high]."""
    accepted = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name}: expected {'an integer' if kind is int else 'a number'}, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a value in [{low}, {high}], got {value}")
    return kind(value)
