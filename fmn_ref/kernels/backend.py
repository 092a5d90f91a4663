"""Picks the kernels once: the compiled extension, else numba, else NumPy; FMN_BACKEND=cpp|numba|numpy|torch forces."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

_MODULES = {"cpp": "_kernels", "numba": "numba", "numpy": "reference", "torch": "torch"}


class Backend(NamedTuple):
    """Which kernels are in use, and why.

    Attributes
    ----------
    name : {"cpp", "numba", "numpy", "torch"}
        "torch" only if forced; tensors that live on an accelerator are reduced by torch whatever is said here.
    instruction_set : str
        "avx512", "avx2", "neon" or "base" for "cpp"; the others choose for themselves: "llvm", "numpy", "torch".
    threads : int
        Threads that one call may use (NumPy's matrix products may use more).
    reason : str
        Why this backend and not an earlier one.
    """

    name: str
    instruction_set: str
    threads: int
    reason: str


@cache
def load() -> tuple[ModuleType, Backend]:
    """The kernel module and its description."""
    forced = os.environ.get("FMN_BACKEND")
    if forced:
        if forced not in _MODULES:
            raise ValueError(f"FMN_BACKEND: expected one of {', '.join(_MODULES)}, got {forced!r}")
        return _describe(forced, f"forced by FMN_BACKEND={forced}")
    missing: list[str] = []
    for name in ("cpp", "numba", "numpy"):
        try:
            return _describe(name, "; ".join(missing) or "compiled extension found")
        except (ImportError, RuntimeError) as error:  # numba's RuntimeError: nowhere to keep its cache
            missing.append(f"{name} not importable ({error})")
    raise AssertionError("the NumPy backend always imports")


def _describe(name: str, reason: str) -> tuple[ModuleType, Backend]:
    module = importlib.import_module(f"fmn_ref.kernels.{_MODULES[name]}")
    if name == "cpp":
        isa = os.environ.get("FMN_ISA") or module.instruction_set()
        if isa != module.instruction_set():
            raise ValueError(
                f"FMN_ISA: {isa!r} is not to be had here; expected {module.instruction_set()!r} or a lesser one"
            )
        return module, Backend(name, module.instruction_set(), module.threads(), reason)
    threads = module.threads() if name == "torch" else 1
    return module, Backend(name, "llvm" if name == "numba" else name, threads, reason)


def kernels_for(a: Any) -> ModuleType:
    """The kernels in use, or torch's for a tensor that is no NumPy array since it lives on an accelerator."""
    if not isinstance(a, np.ndarray):
        return importlib.import_module("fmn_ref.kernels.torch")
    if a.dtype.itemsize > 8:  # long double, which NumPy alone has
        return importlib.import_module("fmn_ref.kernels.reference")
    return load()[0]


def backend() -> Backend:
    """Describe the kernels that compute the metrics.

    Returns
    -------
    Backend
        name, instruction_set, threads, reason.

    Raises
    ------
    ValueError
        FMN_BACKEND names no backend.
    ImportError
        FMN_BACKEND forces one that is not installed.

    Examples
    --------
    >>> import fmn_ref as fmn
    >>> fmn.backend().name in ("cpp", "numba", "numpy", "torch")
    True
    """
    return load()[1]


def import_kernels(name: str) -> ModuleType:
    """Import the kernels of one backend: "cpp", "numba", "numpy" or "torch".

    Raises
    ------
    ImportError
        The extension was not built, or numba or torch is not installed.
    """
    return importlib.import_module(f"fmn_ref.kernels.{_MODULES[name]}")
