"""The backends: their choice, their instruction sets and their threads."""

import inspect
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import python
from inputs import BACKENDS

import fmn_ref as fmn
from fmn_ref.kernels import backend
from fmn_ref.kernels.protocol import Kernels


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_every_kernel(name):
    """With the parameters of the Protocol, where Python can see them."""
    kernels = backend.import_kernels(name)
    assert kernels.reads_bits is (name == "cpp")
    kernel_names = [n for n in vars(Kernels) if not n.startswith("_")]
    assert len(kernel_names) > 12
    for kernel in kernel_names:
        given = getattr(kernels, kernel)
        if name != "cpp" and not isinstance(given, partial):
            wanted = list(inspect.signature(getattr(Kernels, kernel)).parameters)[1:]
            assert list(inspect.signature(given).parameters) == wanted, kernel


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_can_be_forced(name):
    code = "import json, fmn_ref as fmn; print(json.dumps(fmn.backend()._asdict()))"
    b = json.loads(python(code, FMN_BACKEND=name))
    assert b["name"] == name
    assert "forced" in b["reason"]
    assert b["threads"] >= 1


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "neon"])
def test_every_instruction_set_gives_the_counts_of_the_oracle(isa):
    """On every awkward array; the sets that this processor lacks run in test_cpp.py, emulated."""
    if python("from fmn_ref.kernels import _kernels as k; print(k.instruction_set())", FMN_ISA=isa).strip() != isa:
        pytest.skip(f"this processor has no {isa}")
    code = "import fmn_ref, pytest, sys; fmn_ref.backend(); "
    code += "sys.exit(pytest.main(['-qx', '-k', 'bit_identical', sys.argv[1]]))"
    python(code, Path(__file__).parents[1] / "metrics/test_metrics.py", FMN_ISA=isa, FMN_BACKEND="cpp")


def test_threads_can_be_limited():
    assert python("import fmn_ref; print(fmn_ref.backend().threads)", FMN_BACKEND="cpp", FMN_NUM_THREADS="3") == "3\n"


@pytest.mark.parametrize("variable", ["FMN_BACKEND", "FMN_ISA"])
def test_an_unknown_backend_or_instruction_set_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "fortran")
    backend.choose_again()
    with pytest.raises(ValueError, match=rf"{variable}.*fortran"):
        fmn.backend()
    monkeypatch.undo()
    backend.choose_again()


@pytest.mark.parametrize(("blocked", "left"), [(("_kernels",), "numba"), (("_kernels", "numba"), "numpy")])
def test_fallback_says_why(blocked, left):
    code = (
        f"import sys; sys.modules.update({{'fmn_ref.kernels.' + b: None for b in {blocked!r}}})\n"
        "import fmn_ref as fmn; b = fmn.backend(); print(b.name, '|', b.reason)"
    )
    name, reason = python(code, FMN_BACKEND="").strip().split(" | ")
    assert name == left
    assert reason.count("not importable") == len(blocked)


def test_autocast_does_not_round_counts(use_backend, rng):
    correct = rng.random((3, 100_001)) < 0.9
    expected = fmn.forgetting_matrix(correct)
    use_backend("torch")
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(fmn.forgetting_matrix(correct), expected)


@pytest.mark.parametrize("name", ["cpp", "numba"])
def test_eight_threads_at_once(name, use_backend, rng):
    use_backend(name)
    matrices = [rng.integers(0, 2, (20, 300_000), np.uint8).view(bool) for _ in range(8)]
    fmn.forgetting_curves(matrices[0])  # compiled before the threads start
    with ThreadPoolExecutor(8) as pool:
        curves = list(pool.map(fmn.forgetting_curves, matrices))
    for c, m in zip(curves, matrices, strict=True):
        np.testing.assert_array_equal(c.counts[1], (m & ~m[-1]).sum(1))


def test_kernels_release_the_gil(use_backend, rng):
    """Python code runs while a kernel does, on a busy machine in one of a hundred calls at least."""
    use_backend("cpp")
    correct, counts = rng.integers(0, 2, (400, 400_000), np.uint8).view(bool), np.zeros((400, 400), np.int64)
    kernel, interval = backend.kernels().overlap_counts, sys.getswitchinterval()
    runs, seen, over = threading.Event(), threading.Event(), threading.Event()

    def look():
        while not over.is_set():
            if runs.is_set():
                seen.set()
            time.sleep(0)

    thread = threading.Thread(target=look)
    thread.start()
    sys.setswitchinterval(1000)  # from here, a thread runs until it releases the lock
    try:
        for _ in range(100):
            runs.set()
            kernel(correct, 400_000, counts)
            runs.clear()
            if seen.is_set():
                break
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()
    assert seen.is_set()
