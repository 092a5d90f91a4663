"""The package: what importing it loads, which backend it picks, its public names, its examples."""

import doctest
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, random_probs

import fmn_ref as fmn
from fmn_ref.kernels import backend
from fmn_ref.kernels.protocol import Kernels

PACKAGE = Path(fmn.__file__).parent
ROOMS = ("kernels", "metrics", "runs", "fusion", "training", "reporting")
MODULES = ["fmn_ref", "fmn_ref.cli", "fmn_ref.demo", "fmn_ref._check", "fmn_ref._files"]
MODULES += sorted(f"fmn_ref.{p.parent.name}.{p.stem}" for room in ROOMS for p in (PACKAGE / room).glob("*.py"))
MODULES.remove("fmn_ref.kernels.numba")


def python(code, *args, **env):
    """Run code in a fresh interpreter and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_run_on_the_installed_package():
    assert Path(__file__).parents[2] not in Path(fmn.__file__).parents or "site-packages" in fmn.__file__


def test_importing_loads_neither_torch_nor_numba():
    loaded = python("import sys, fmn_ref; print([m for m in ('torch', 'numba', 'matplotlib') if m in sys.modules])")
    assert loaded == "[]\n"


def test_importing_is_fast():
    """Under 60 ms above NumPy's own import, in the best of five processes."""
    code = "import time, numpy; start = time.perf_counter(); import fmn_ref; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(5)) < 0.06


def test_metric_fusion_plan_and_recorder_work_without_torch(tmp_path):
    p, labels = random_probs(np.random.default_rng(0))
    np.savez(tmp_path / "p.npz", probs=p, labels=labels)
    python(
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, fmn_ref as fmn\n"
        f"folder = {str(tmp_path)!r}\n"
        "f = np.load(folder + '/p.npz'); p, y = f['probs'], f['labels']\n"
        "recorder = fmn.Recorder(folder + '/run', save=lambda path: path.write_bytes(b'weights'))\n"
        "for epoch, q in enumerate(p): recorder.record(epoch, q, y)\n"
        "history = fmn.Run.open(folder + '/run').history\n"
        "assert fmn.forget_fraction(history).shape == (8,)\n"
        "plan = fmn.fuse(p, y, correct=history); plan.save(folder + '/plan.json')\n"
        "fmn.FusionPlan.load(folder + '/plan.json').apply(p)\n"
        "fmn.compare_probabilities(p[:, :30], y[:30], p[:, 30:], y[30:]).to_markdown()\n"
        "fmn.symmetric_noise(y, 0.2, 5, 0)\n"
        "from fmn_ref.cli import main\n"
        "assert main(['metric', folder + '/run/history.fmnh', '--json']) == 0\n"
        "assert main(['fuse', folder + '/p.npz', '-o', folder + '/plan2.json']) == 0\n"
        "assert main(['info']) == 0\n"
    )
    assert fmn.FusionPlan.load(tmp_path / "plan2.json") == fmn.FusionPlan.load(tmp_path / "plan.json")


def test_every_public_name_resolves_is_documented_and_listed():
    namespace = {}
    exec("from fmn_ref import *", namespace)
    assert set(fmn.__all__) == namespace.keys() - {"__builtins__"}
    assert fmn.__all__ == sorted(fmn.__all__)
    for name in fmn.__all__:
        assert getattr(fmn, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing"):
        _ = fmn.nothing


@pytest.mark.parametrize("name", ["baselines", "checkpoints", "expectation", "plot", "report"])
def test_modules_can_be_reached_from_the_root(name):
    """As attributes and by `from fmn_ref import`, in a fresh process; `import fmn_ref` alone loads no plots."""
    code = f"import fmn_ref as fmn; from fmn_ref import {name}; assert fmn.{name} is {name}; print({name}.__name__)"
    assert python(code).strip().endswith(f".{name}")
    assert name in dir(fmn)


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


def test_every_public_name_has_a_test():
    tests = "".join(p.read_text() for p in Path(__file__).parents[1].glob("*/test_*.py"))
    assert [n for n in fmn.__all__ if not re.search(rf"fmn\.{n}\b", tests)] == []


def test_results_are_of_the_public_classes(tmp_path):
    p, labels = random_probs(np.random.default_rng(0))
    assert isinstance(fmn.backend(), fmn.Backend)
    assert isinstance(fmn.forgetting_curves([[1]]), fmn.ForgettingCurves)
    assert isinstance(fmn.sample_statistics([[1]]), fmn.SampleStatistics)
    assert isinstance(fmn.fuse(p, labels), fmn.FusionPlan)
    assert isinstance(fmn.compare_probabilities(p, labels, p, labels, allow_overlap=True), fmn.Comparison)
    recorder = fmn.Recorder(tmp_path)
    recorder.record(0, [0], [0])
    assert isinstance(recorder.run, fmn.Run)
    assert fmn.Recipe(lr=0.5).lr == 0.5
    assert issubclass(fmn.Probabilities, Sequence)


@pytest.mark.parametrize("name", MODULES)
def test_documented_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


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
    python(code, Path(__file__).parents[1] / "metrics/test_metrics.py", FMN_ISA=isa)


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


def test_noise_rates_and_classes():
    y = np.arange(10_000) % 10
    noisy = fmn.symmetric_noise(y, 0.4, 10, seed=1)
    assert (noisy != y).sum() == 4000
    counts = np.bincount((noisy - y)[noisy != y] % 10, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 350  # uniform over the other nine: 444 each
    np.testing.assert_array_equal(noisy, fmn.symmetric_noise(y, 0.4, 10, seed=1))
    assert (noisy != fmn.symmetric_noise(y, 0.4, 10, seed=2)).any()
    pairs = fmn.asymmetric_noise(y, 0.25, 10, seed=1)
    assert (pairs != y).sum() == 2500
    np.testing.assert_array_equal(pairs[pairs != y], (y[pairs != y] + 1) % 10)
    half = np.eye(10) * 0.5 + np.roll(np.eye(10), 3, 1) * 0.5
    moved = fmn.transition_noise(y, half, seed=1)
    assert set((moved - y) % 10) == {0, 3}
    assert abs((moved != y).mean() - 0.5) < 0.03
    np.testing.assert_array_equal(y, np.arange(10_000) % 10)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fmn.symmetric_noise([0, 1], 1.5, 2, 0), ValueError, "rate"),
        (lambda: fmn.symmetric_noise([0, 1], "half", 2, 0), TypeError, "rate"),
        (lambda: fmn.symmetric_noise([0, 2], 0.5, 2, 0), ValueError, "labels"),
        (lambda: fmn.symmetric_noise([0.0, 1.0], 0.5, 2, 0), TypeError, "labels"),
        (lambda: fmn.symmetric_noise([], 0.5, 2, 0), TypeError, "labels"),
        (lambda: fmn.symmetric_noise([0, 0], 0.5, 1, 0), ValueError, "n_classes"),
        (lambda: fmn.asymmetric_noise([0, 1], 0.5, 2, -1), ValueError, "seed"),
        (lambda: fmn.asymmetric_noise([0, 1], 0.5, 2.0, 0), TypeError, "n_classes"),
        (lambda: fmn.transition_noise([0, 1], [[1.0, 0.5], [0.0, 1.0]], 0), ValueError, "transition"),
        (lambda: fmn.transition_noise([0, 1], [[0.5, 0.5]], 0), ValueError, "square"),
    ],
)
def test_bad_noise(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_no_framework_is_required():
    required = [line for line in importlib.metadata.requires("fmn_ref") if "extra" not in line]
    assert sorted(re.match(r"\w+", line).group() for line in required) == ["numpy", "torch", "tqdm"]
