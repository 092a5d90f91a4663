"""Check an installed package without pytest: `python check_wheel.py [cpp|numba|numpy]` names the backend to expect.

For wheels of platforms where the test suite cannot run, since torch has no wheels for them, and for the environments of
clean_room.py. The counts are those of other projects' code. On a free-threaded Python, the compiled kernels must leave
the GIL off. Without torch, what needs it must name what to install.
"""

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import fmn_ref as fmn

here = Path(__file__).resolve().parent
rng = np.random.default_rng(0)
NEEDS_TORCH = "needs torch: pip install torch"


def main():
    assert here.parents[1] not in Path(fmn.__file__).parents, f"{fmn.__file__} is the checkout, not an installed wheel"
    expected = sys.argv[1] if len(sys.argv) > 1 else "cpp"
    assert fmn.backend().name == expected, f"expected the backend {expected}, got {fmn.backend()}"
    for part in (metrics, fusion, training) if importlib.util.find_spec("torch") else (metrics, fusion, without_torch):
        with tempfile.TemporaryDirectory() as folder:
            part(Path(folder))
        print(f"{part.__name__}: works")
    assert importlib.util.find_spec("fmn_ref.benchmarks.speed.metric"), "the benchmarks are missing"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert not sys._is_gil_enabled(), "importing the package turned the GIL on"
    print(f"fmn_ref {fmn.__version__} on Python {sys.version.split()[0]}: {fmn.backend()}")


def metrics(folder):
    """Curves, matrix, a history on disk, several threads."""
    golden = json.loads((here.parent / "data" / "forgetting_golden.json").read_text())
    correct = np.array(golden["matrix_epochs_x_samples"], bool)
    curves = fmn.forgetting_curves(correct)
    assert curves.forget.tolist() == golden["fmn_forget_fraction_F_e"]
    assert curves.accuracy.tolist() == golden["accuracy_e"]
    assert fmn.forgetting_matrix(correct)[:, -1].tolist() == golden["fmn_forget_count_e"]
    history = fmn.CorrectnessHistory(correct.shape[1], folder / "history.fmnh")
    for epoch, row in enumerate(correct):
        history.append(row, epoch)
    assert (fmn.CorrectnessHistory.open(folder / "history.fmnh").correct() == correct).all()
    large = [rng.random((9, 20_000)) < 0.5 for _ in range(8)]
    alone = [fmn.forgetting_matrix(a) for a in large]
    with ThreadPoolExecutor(8) as pool:
        assert all((a == b).all() for a, b in zip(pool.map(fmn.forgetting_matrix, large), alone, strict=True))
    for a, matrix in zip(large, alone, strict=True):
        last = a[-1].tolist()
        counted = [sum(now and not end for now, end in zip(row.tolist(), last, strict=True)) for row in a]
        assert counted == matrix[:, -1].tolist() == (fmn.forget_fraction(a) * len(last)).round().tolist()


def fusion(folder):
    """A plan from arrays, and the same from the command line."""
    probs, labels = rng.dirichlet(np.ones(3), (5, 400)), rng.integers(3, size=400)
    plan = fmn.fuse(probs, labels)
    assert (plan.apply(probs).argmax(1) == labels).mean() >= (probs[-1].argmax(1) == labels).mean()
    np.savez(folder / "select.npz", probs=probs, labels=labels)
    command("fuse", str(folder / "select.npz"), "-o", str(folder / "plan.json"))
    assert fmn.FusionPlan.load(folder / "plan.json") == plan


def training(folder):
    """Train, fuse and distil a linear network."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(60, 5)
    data = x, x.argmax(1)
    run = fmn.train(torch.nn.Linear(5, 5), data, data, epochs=3, run_dir=folder / "run", progress=False)
    plan = fmn.fuse(run.probabilities(data), data[1], correct=run.history, method="pool")
    fused = fmn.FusedModel(plan, run)
    student = fmn.distill(torch.nn.Linear(5, 5), fused, data, epochs=2, progress=False)
    predicted = fused(x).exp().detach().numpy()
    assert np.allclose(predicted, plan.apply(run.probabilities(data)), atol=1e-5)
    assert student(x).shape == (60, 5)
    assert "peak_forget_fraction" in json.loads(command("metric", str(folder / "run"), "--json"))


def without_torch(folder):
    """What needs torch says which package to install."""
    recorder = fmn.Recorder(folder / "run", save=lambda path: path.write_bytes(b"weights"))
    for epoch in range(2):
        recorder.record(epoch, [[0.5, 0.5]] * 4, [0, 1, 0, 1])
    data = np.zeros((4, 2)), [0, 1, 0, 1]
    run = fmn.Run.open(folder / "run")
    for call in (lambda: fmn.train, lambda: run.probabilities(data), lambda: fmn.compare(run, data, data)):
        assert NEEDS_TORCH in error_of(call)
    printed = command("demo", "-o", str(folder / "demo"), status=1)
    assert printed.count("\n") == 1, printed
    assert NEEDS_TORCH in printed, printed


def error_of(call):
    """The message of the ImportError that a call raises; "" without one."""
    try:
        call()
    except ImportError as error:
        return str(error)
    return ""


def command(*arguments, status=0):
    """Run fmn-ref, which must end with a status; return what it printed."""
    words = [sys.executable, "-m", "fmn_ref", *arguments]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == status, done.stdout
    return done.stdout


if __name__ == "__main__":
    main()
