"""Check an installed wheel with NumPy alone: `python check_wheel.py [cpp|numba|numpy]` names the backend to expect.

For platforms where the test suite cannot run, since torch has no wheels for them. The counts are those of other
projects' code. On a free-threaded Python, the compiled kernels must leave the GIL off.
"""

import json
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import fmn_ref as fmn

here = Path(__file__).resolve().parent
golden = json.loads((here.parent / "data" / "forgetting_golden.json").read_text())
correct = np.array(golden["matrix_epochs_x_samples"], bool)

assert here.parents[1] not in Path(fmn.__file__).parents, f"{fmn.__file__} is the checkout, not an installed wheel"
expected = sys.argv[1] if len(sys.argv) > 1 else "cpp"
assert fmn.backend().name == expected, f"expected the backend {expected}, got {fmn.backend()}"

curves = fmn.forgetting_curves(correct)
assert curves.forget.tolist() == golden["fmn_forget_fraction_F_e"]
assert curves.accuracy.tolist() == golden["accuracy_e"]
assert fmn.forgetting_matrix(correct)[:, -1].tolist() == golden["fmn_forget_count_e"]
with tempfile.TemporaryDirectory() as folder:
    history = fmn.CorrectnessHistory(correct.shape[1], Path(folder, "history.fmnh"))
    for epoch, row in enumerate(correct):
        history.append(row, epoch)
    assert (fmn.CorrectnessHistory.open(Path(folder, "history.fmnh")).correct() == correct).all()

rng = np.random.default_rng(0)
probs, labels = rng.dirichlet(np.ones(3), (5, 400)), rng.integers(3, size=400)
plan = fmn.fuse(probs, labels)
assert (plan.apply(probs).argmax(1) == labels).mean() >= (probs[-1].argmax(1) == labels).mean()

large = [rng.random((9, 20_000)) < 0.5 for _ in range(8)]
alone = [fmn.forgetting_matrix(a) for a in large]
with ThreadPoolExecutor(8) as pool:
    assert all((a == b).all() for a, b in zip(pool.map(fmn.forgetting_matrix, large), alone, strict=True))
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    assert not sys._is_gil_enabled(), "importing the package turned the GIL on"
print(f"fmn_ref {fmn.__version__} on Python {sys.version.split()[0]}: {fmn.backend()}")
