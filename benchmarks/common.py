"""Functions that the benchmarks share: timing, memory, the machine, new processes and result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import fmn_ref as fmn
from fmn_ref import _files
from fmn_ref.kernels.backend import import_kernels


def median_seconds(call: Callable[[], Any], seconds: float = 0.5, most: int = 2000, pause: float = 0.0) -> float:
    """Time a call, after one call that does not count.

    Parameters
    ----------
    call : callable()
    seconds : float, default 0.5
        Calls are repeated, three times at least, until they took this long together.
    most : int, default 2000
        Number of calls at most.
    pause : float, default 0.0
        Seconds to sleep after the first call.
    """
    call()
    time.sleep(pause)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < most):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def on_zeros(
    kernel: Callable[..., Any], shape: tuple[int, ...], *args: Any, dtype: DTypeLike = np.int64
) -> Callable[[], NDArray[Any]]:
    """Make a call of a kernel that adds to its last argument; the call returns that argument."""

    def call() -> NDArray[Any]:
        out = np.zeros(shape, dtype)
        kernel(*args, out)
        return out

    return call


def check_device(device: str) -> None:
    """Raise a ValueError where torch has no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")


def device_name(device: str) -> str:
    """The GPU's name, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def peak_kib() -> int:
    """Peak memory of this process in KiB. Linux only; getrusage would include the parent process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def machine() -> dict[str, Any]:
    """Describe processor, cores, kernels and library versions."""
    import torch

    processor = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    built = {"instruction set": fmn.backend().instruction_set}
    if fmn.backend().name == "cpp":
        compiled: Any = import_kernels("cpp")
        built["compiler"] = compiled.compiler
    libraries = {"fmn_ref": fmn.__version__, "python": platform.python_version(), "numpy": np.__version__}
    libraries["torch"] = torch.__version__
    if "numba" in sys.modules:
        libraries["numba"] = sys.modules["numba"].__version__
    return {"processor": processor, "cores": os.cpu_count()} | built | libraries


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module's function in a new process. Its arguments must be literals, its result must fit in JSON."""
    code = f"import json; from {function.__module__} import {function.__name__} as f; print(json.dumps(f(*{args!r})))"
    home = Path(fmn.__file__).parents[1]  # Python looks for modules in the current folder first
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=home)
    return json.loads(done.stdout)


def write_result(output: str, name: str, result: dict[str, Any], text: str | None = None) -> Path:
    """Write NAME.json, and NAME.md where there is text, into the folder `output`; return the folder."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _files.write_json(folder / f"{name}.json", result)
    if text is not None:
        _files.write_atomic(folder / f"{name}.md", lambda file: file.write(text.encode()))
    return folder
