"""Every method and metric gives the same bits on every backend, instruction set and number of threads.

tests/data/digests.json holds the digests, so every machine that runs the tests compares itself with all others.
`helpers/on_aarch64.py` does it for an emulated processor.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import BACKENDS
from numpy._core import _multiarray_umath

TESTS = Path(__file__).parents[1]
EXPECTED = json.loads((TESTS / "data" / "digests.json").read_text())
SETTINGS = [("cpp", "base", 1), ("cpp", "avx2", 3), ("cpp", "avx512", 2), ("cpp", "neon", 3)]
SETTINGS += [("numba", "", 2), ("numpy", "", 3), ("torch", "", 2)]


def narrowest_vectors():
    """Make NumPy and OpenBLAS, which choose instructions of their own, take those that every processor has."""
    found = [f for f in _multiarray_umath.__cpu_dispatch__ if _multiarray_umath.__cpu_features__[f]]
    core = {"OPENBLAS_CORETYPE": "Prescott"} if platform.machine() in ("x86_64", "AMD64") else {}
    return core | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)}


@pytest.mark.parametrize(("backend", "isa", "threads"), [s for s in SETTINGS if s[0] in BACKENDS])
def test_results_have_the_same_bits_on_every_backend_instruction_set_and_number_of_threads(backend, isa, threads):
    """Those of an exponential or a logarithm agree to 1e-12."""
    libraries = ("FMN", "OMP", "OPENBLAS", "MKL", "NUMBA")
    env = {f"{name}_NUM_THREADS": str(threads) for name in libraries} | {"FMN_BACKEND": backend, "FMN_ISA": isa}
    env |= narrowest_vectors() if backend == "numpy" else {}
    program = [sys.executable, TESTS / "helpers" / "result_digests.py"]
    done = subprocess.run(program, env=os.environ | env, capture_output=True, text=True, check=False, timeout=600)
    if "this processor cannot run" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["digests"].keys() == EXPECTED["digests"].keys()
    assert [g for g, digest in found["digests"].items() if digest != EXPECTED["digests"][g]] == []
    for group, values in EXPECTED["values"].items():
        np.testing.assert_allclose(found["values"][group], values, rtol=1e-12, atol=0, err_msg=group)
