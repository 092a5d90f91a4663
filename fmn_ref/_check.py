"""Checks at the public edge: each turns an argument into one known kind of array, or raises an error that names it.

Every room may use this file; it imports none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-2  # of the sum of a row of probabilities: bfloat16 rounds that much
FINE_TOLERANCE = 1e-4  # of the sum of a row of probabilities that no 16-bit type has rounded
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # the bits of a type that NumPy lacks
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]
Float = NDArray[np.float64]
Array = NDArray[Any]  # of any type; for probabilities a floating-point type, BFLOAT16 included

# How to get a module that may be missing.
_INSTALL = {
    "torch": "pip install torch (docs/installation.md: the smaller build)",
    "numba": 'pip install "fmn_ref[numba]"',
    "fmn_ref.kernels._kernels": "install a C++ compiler, then fmn_ref again; in the checkout, run Python elsewhere",
    "sklearn": 'pip install "fmn_ref[demo]"',
    **dict.fromkeys(("xgboost", "lightgbm"), 'pip install "fmn_ref[boosting]"'),
}


@contextlib.contextmanager
def naming_packages(name: str) -> Iterator[None]:
    """Where a module is missing, raise a ModuleNotFoundError that says that `name` needs it, and how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        known = [m for m in (error.name or "", (error.name or "").partition(".")[0]) if m in _INSTALL]
        if not known:
            raise
        raise ModuleNotFoundError(f"{name} needs {known[0]}: {_INSTALL[known[0]]}", name=error.name) from None


def array(x: Any, name: str, bfloat16: bool = False, kinds: str = "biuf") -> Array:
    """View anything that NumPy can view; copy only tensors on an accelerator or of a type that NumPy lacks.

    Every array that a user passes comes through here. Masked values are refused, in lists and behind `__array__` too:
    NumPy would show what is under the mask. `kinds` are those of the accepted dtypes. A bfloat16 tensor becomes
    float32, or with `bfloat16` an array of dtype BFLOAT16, without a copy.
    """
    try:
        a = _viewed(x, bfloat16)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: expected an array, got {type(x).__name__} ({error})") from None
    if a.dtype.kind not in kinds and not (bfloat16 and a.dtype == BFLOAT16):
        expected = "booleans, numbers or strings" if "U" in kinds else "booleans or numbers"
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__} of dtype {a.dtype}")
    return a


def _viewed(x: Any, bfloat16: bool) -> Array:
    if type(x) is np.ndarray and x.dtype.isbuiltin == 1:
        return x
    if is_tensor(x):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            import torch

            x = x.view(torch.int16).numpy().view(BFLOAT16) if bfloat16 else x.float()
    elif hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        x = np.from_dlpack(x)
    else:
        x = _unmasked(x)
    a = np.asarray(x)
    return a.astype(np.float32) if a.dtype.name == "bfloat16" else a  # from ml_dtypes, which JAX uses


def _unmasked(x: Any) -> Any:
    """Ask objects with `__array__` for their arrays, in lists and tuples too; ValueError if values are masked."""
    if isinstance(x, (list, tuple)):
        types = set(map(type, x))
        nested = any(issubclass(t, (list, tuple)) or _gives_array(t) for t in types)
        return [_unmasked(value) for value in x] if nested else x
    if not _gives_array(type(x)):
        return x
    a = np.asanyarray(x.compute() if hasattr(x, "__dask_graph__") else x)  # dask's own `__array__` drops the mask
    if isinstance(a, np.ma.MaskedArray) and (n := int(np.ma.getmaskarray(a).view(np.uint8).sum())):
        raise ValueError(f"{n} of its values are masked; leave them out first")
    return a


def _gives_array(kind: type) -> bool:
    return hasattr(kind, "__array__") and not issubclass(kind, np.generic)


def of_file(x: Any) -> str:
    """Name of the file that is mapped into an array, as an addition to the array's name; empty for other arrays."""
    return f" ({x.filename})" if isinstance(x, np.memmap) and x.filename else ""


def is_tensor(x: Any) -> bool:
    """Tell whether `x` is a torch tensor, without importing torch."""
    return not isinstance(x, np.ndarray) and hasattr(x, "detach") and hasattr(x, "cpu")


def on_device(x: Any) -> bool:
    """Tell whether `x` is a torch tensor on an accelerator."""
    return is_tensor(x) and x.device.type not in ("cpu", "meta")  # a meta tensor has no data to reduce


def computable(t: Any) -> Any:
    """The tensor as int64 if torch can do little with its type: unsigned integers above 8 bits."""
    return t.long() if str(t.dtype) in ("torch.uint16", "torch.uint32", "torch.uint64") else t


def kind(a: Any) -> str:
    """Kind of an array's or a tensor's dtype: "b", "i" (signed or not) or "f" (BFLOAT16 too)."""
    if isinstance(a, np.ndarray):
        k = a.dtype.kind
        return k if k in "bi" else "i" if k == "u" else "f"
    return "f" if a.dtype.is_floating_point else "b" if str(a.dtype) == "torch.bool" else "i"


def correct_matrix(x: Any, name: str = "correct") -> Any:
    """(n_epochs, n_samples) array, or tensor on its accelerator, of bool or integers; values are not checked."""
    a = computable(x.detach()) if on_device(x) else array(x, name)
    if kind(a) == "f":
        raise TypeError(f"{name}: expected bool or integers 0 and 1, got dtype {a.dtype}; see fmn_ref.correctness")
    if a.ndim != 2:
        raise ValueError(f"{name}: expected shape (n_epochs, n_samples), got shape {tuple(a.shape)}")
    return a


def zeros_and_ones(a: Any, name: str) -> Any:
    """Turn an array or a tensor of 0 and 1 into bool; any other number is an error."""
    if kind(a) == "b":
        return a
    if a.min() < 0 or a.max() > 1:
        raise ValueError(f"{name}: expected 0 and 1, got values from {int(a.min())} to {int(a.max())}")
    return a != 0


def bool_matrix(x: Any, name: str = "correct") -> Bool:
    """(n_epochs, n_samples) bool array in memory, with at least one epoch and one sample."""
    a = correct_matrix(array(x, name), name)
    if 0 in a.shape:
        raise ValueError(f"{name}: expected at least one epoch and one sample, got shape {a.shape}")
    return np.asarray(zeros_and_ones(a, name))


def draws(x: Any, name: str = "correct") -> Bool:
    """(n_checkpoints, n_questions, n_draws) bool, not empty."""
    a = array(x, name, kinds="biu")
    if a.ndim != 3 or 0 in a.shape:
        hint = "; for one draw each: correct[..., None]" if a.ndim == 2 else ""
        expected = "expected shape (n_checkpoints, n_questions, n_draws), not empty"
        raise ValueError(f"{name}: {expected}, got shape {a.shape}{hint}")
    return np.asarray(zeros_and_ones(a, name))


def labels(
    x: Any, n_samples: int | None = None, n_classes: int | None = None, name: str = "labels", copy: bool = True
) -> Int:
    """(n_samples,) int64 in [0, n_classes)."""
    a = array(x, name, kinds="biufcmMOSUV")  # the hint comes with the dtype
    if a.dtype.kind not in "iu":
        hint = "" if name == "index" else "; np.unique(..., return_inverse=True) numbers other labels"
        if a.dtype.kind == "f":
            gaps = np.isnan(a).any()
            hint = f"{' with NaN; leave these samples out' if gaps else '; .astype(int) converts whole numbers'}{hint}"
        raise TypeError(f"{name}: expected integers, got {type(x).__name__} of dtype {a.dtype}{hint}")
    if a.ndim != 1 or len(a) == 0:
        raise ValueError(f"{name}: expected shape (n_samples,) with at least one sample, got shape {a.shape}")
    if n_samples is not None and len(a) != n_samples:
        raise ValueError(f"{name}: expected {n_samples} samples, got {len(a)}")
    if a.min() < 0 or (n_classes is not None and a.max() >= n_classes):
        bound = "n_classes" if n_classes is None else n_classes
        hint = "; do they count from 1?" if a.min() == 1 and a.max() == n_classes else ""
        hint = "; for one score a sample give classes, score > 0 as integers" if n_classes == 1 else hint
        raise ValueError(f"{name}: expected classes in [0, {bound}), got values from {a.min()} to {a.max()}{hint}")
    if a.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected classes below 2^63, got {a.max()}")
    return a.astype(np.int64, copy=copy)


def class_names(x: Any, classes: Int) -> list[str]:
    """Names of the classes 0, 1, ..., at least up to the highest of `classes`; the number itself for an empty name."""
    names = np.asarray(x, object)  # an array of strings would pad every name to the longest
    if names.ndim != 1 or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names: expected a list of strings, got {type(x).__name__}")
    if classes.max() >= len(names):
        raise ValueError(f"class_names: expected at least {classes.max() + 1} names, got {len(names)}")
    return [name.strip() or str(k) for k, name in enumerate(names)]


def sums_to_one(scores: Any) -> bool:
    """Tell whether every row of `scores` sums to 1, within the rounding of the type that holds all its values.

    Values of a 16-bit type may come in a wider one.
    """
    a = array(scores, "scores").astype(np.float64)
    with np.errstate(all="ignore"):
        single = a.astype(np.float32)
        bfloat16, float16 = single.view(np.uint32) % 2**16 == 0, single.astype(np.float16) == single
    rounded = (single == a).all() and (bfloat16.all() or float16.all())
    return bool((np.abs(a.sum(-1) - 1) <= (TOLERANCE if rounded else FINE_TOLERANCE)).all())


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


def weights(x: Any, n_samples: int, name: str = "sample_weight") -> Float:
    """(n_samples,) float64: finite, not negative, not all zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        a = array(x, name).astype(np.float64)
        total = a.sum()
    if a.shape != (n_samples,):
        raise ValueError(f"{name}: expected shape ({n_samples},), got shape {a.shape}")
    bad = np.flatnonzero(~(a >= 0))  # NaN too
    if len(bad):
        raise ValueError(f"{name}: expected weights >= 0, got {a[bad[0]]} at sample {bad[0]}")
    if not 0 < total < np.inf:
        raise ValueError(f"{name}: expected weights with a finite sum above 0, got a sum of {total}")
    return a


def index(i: Any, n: int, name: str) -> int:
    """An epoch in [-n, n), as its row from the start."""
    if isinstance(i, bool) or not isinstance(i, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(i).__name__}")
    if not -n <= i < n:
        raise ValueError(f"{name}: expected an epoch in [-{n}, {n}), got {i}")
    return int(i) % n


def choice(value: Any, options: tuple[str, ...], name: str) -> str:
    """One of the options."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return str(value)


def number(value: Any, low: float, high: float, name: str, kind: type = float) -> Any:
    """A finite number (an integer for kind=int) in [low, high]."""
    if isinstance(value, np.generic):
        value = value.item()  # NumPy would round the bounds to the value's type
    accepted = int if kind is int else (int, float, np.floating)  # the last: of long double
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name}: expected {'an integer' if kind is int else 'a number'}, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a value in [{low}, {high}], got {value}")
    return kind(value)
