"""Picks the kernels once: the compiled extension, else numba, else NumPy; FMN_BACKEND=cpp|numba|numpy|torch forces."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np

from .. import _check
from .protocol import Kernels

_MODULES = {"cpp": "_kernels", "numba": "numba", "numpy": "reference", "torch": "torch"}


class Backend(NamedTuple):
    """The kernels in use, and the reason.

    Attributes
    ----------
    name : {"cpp", "numba", "numpy", "torch"}
        "torch" only if forced. Tensors on an accelerator are reduced by torch on any backend.
    instruction_set : str
        "avx512", "avx2", "neon" or "base" for "cpp". The other backends choose it themselves: "llvm", "numpy", "torch".
    threads : int
        Most threads of one call (NumPy's matrix products may use more).
    reason : str
        Why an earlier backend of the list was not taken.
    """

    name: str
    instruction_set: str
    threads: int
    reason: str


def kernels() -> Kernels:
    """The kernels in use."""
    return _chosen()[0]


def kernels_for(a: Any) -> Kernels:
    """The kernels for an array: those in use, torch's for a tensor on an accelerator, NumPy's for long double."""
    if not isinstance(a, np.ndarray):
        return import_kernels("torch")
    if a.dtype.itemsize > 8:
        return import_kernels("numpy")
    return _chosen()[0]


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
        FMN_BACKEND forces a backend that is not installed.

    Examples
    --------
    >>> import fmn_ref as fmn
    >>> fmn.backend().name in ("cpp", "numba", "numpy", "torch")
    True
    """
    return _chosen()[1]


def import_kernels(name: str) -> Kernels:
    """Import the kernels of one backend: "cpp", "numba", "numpy" or "torch".

    Raises
    ------
    ImportError
        The extension was not built, or numba or torch is not installed.
    """
    with _check.naming_packages(f"the backend {name}"):
        return cast(Kernels, importlib.import_module(f"fmn_ref.kernels.{_MODULES[name]}"))


@cache
def _chosen() -> tuple[Kernels, Backend]:
    forced = os.environ.get("FMN_BACKEND")
    if forced:
        if forced not in _MODULES:
            raise ValueError(f"FMN_BACKEND: expected one of {', '.join(_MODULES)}, got {forced!r}")
        return _described(forced, f"forced by FMN_BACKEND={forced}")
    missing: list[str] = []
    for name in ("cpp", "numba", "numpy"):
        try:
            return _described(name, "; ".join(missing) or "compiled extension found")
        except (ImportError, RuntimeError) as error:  # RuntimeError: numba found no folder for its cache
            missing.append(f"{name} not importable ({error})")
    raise AssertionError("the NumPy backend always imports")


choose_again = _chosen.cache_clear
"""Forget the choice: the next call reads FMN_BACKEND again. For tests."""


def _described(name: str, reason: str) -> tuple[Kernels, Backend]:
    k = import_kernels(name)
    found, wanted = k.instruction_set(), os.environ.get("FMN_ISA")
    if name == "cpp" and wanted and wanted != found:  # the extension reads FMN_ISA itself, and falls back
        raise ValueError(f"FMN_ISA: this processor cannot run {wanted!r}; expected {found!r} or a lesser set")
    return k, Backend(name, found, k.threads(), reason)
