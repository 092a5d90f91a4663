"""The package: what importing it loads, its public names, the examples of its docstrings."""

import doctest
import importlib
import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest
from fresh_process import python
from inputs import random_probs

import fmn_ref as fmn

PACKAGE = Path(fmn.__file__).parent
ROOMS = ("kernels", "metrics", "runs", "fusion", "training", "reporting")
MODULES = ["fmn_ref", "fmn_ref.cli", "fmn_ref.demo", "fmn_ref._check", "fmn_ref._files"]
MODULES += sorted(f"fmn_ref.{p.parent.name}.{p.stem}" for room in ROOMS for p in (PACKAGE / room).glob("*.py"))
MODULES.remove("fmn_ref.kernels.numba")


def test_the_tests_run_on_the_installed_package():
    assert Path(__file__).parents[2] not in Path(fmn.__file__).parents or "site-packages" in fmn.__file__


def test_importing_loads_neither_torch_nor_numba():
    loaded = python("import sys, fmn_ref; print([m for m in ('torch', 'numba', 'matplotlib') if m in sys.modules])")
    assert loaded == "[]\n"


def test_importing_is_fast():
    """It takes less than half of the processor time of NumPy's own import, in the best of five processes."""
    code = "from time import process_time as now; start = now(); import numpy; middle = now(); import fmn_ref\n"
    code += "print((now() - middle) / (middle - start))"
    assert min(float(python(code)) for _ in range(5)) < 0.5


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


@pytest.mark.parametrize("name", ["train", "distill", "FusedModel"])
def test_a_name_that_needs_torch_says_so(name):
    code = f"try: fmn_ref.{name}\nexcept ImportError as error: print(error)"
    found = python("import sys, fmn_ref; sys.modules['torch'] = None\n" + code)
    assert found.startswith(f"fmn_ref.{name} needs torch: pip install torch")


def test_public_names_are_those_of_the_reference():
    """docs/reference/api.md lists every public name; each loads, also the lazy ones."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text().split("## Integrations")[0]
    assert sorted(re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE)) == fmn.__all__
    for name in fmn.__all__:
        assert getattr(fmn, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = fmn.nothing


@pytest.mark.parametrize("name", ["baselines", "checkpoints", "expectation", "plot", "report"])
def test_modules_can_be_reached_from_the_root(name):
    """As attributes and by `from fmn_ref import`, in a fresh process."""
    code = f"import fmn_ref as fmn; first = fmn.{name}; from fmn_ref import {name}; assert first is {name}; "
    assert python(code + f"print({name}.__name__)").strip().endswith(f".{name}")
    assert name in dir(fmn)


@pytest.mark.parametrize("name", MODULES)
def test_documented_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_no_framework_is_required():
    required = [line for line in importlib.metadata.requires("fmn_ref") if "extra" not in line]
    assert sorted(re.match(r"\w+", line).group() for line in required) == ["numpy", "torch", "tqdm"]
