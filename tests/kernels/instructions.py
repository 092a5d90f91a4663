"""Count the instructions of every kernel and of public calls, under callgrind.

    python tests/kernels/instructions.py            # print the counts beside the recorded ones
    python tests/kernels/instructions.py --renew    # record them in instructions.json

Instruction counts repeat where times do not, even on a busy machine. The counted program runs each call twice to warm
up, and calls getppid before and after the third. At each getppid, callgrind writes the count since the one before.
Valgrind knows no AVX-512, so the kernels run with AVX2 and with the base instruction set. Public calls run with AVX2.
All use one thread.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import fmn_ref as fmn
from fmn_ref.kernels.backend import import_kernels

RECORD = Path(__file__).with_suffix(".json")
BOUND = 0.1  # change of a count that fails; counts of two installs differ by up to 0.013
RENEW = "if the change is wanted, run python tests/kernels/instructions.py --renew and commit instructions.json"


def kernel_calls():
    """Every function of the protocol, on each kind of input."""
    k, rng = import_kernels("cpp"), np.random.default_rng(0)
    n, n_groups = 20_000, 100
    correct = rng.random((200, n)) < 0.7
    few = np.ascontiguousarray(correct[:, :4000])
    grid, windows = np.arange(101) / 100, np.array([[0, 0], [0, 1]])
    groups, weights = rng.integers(0, n_groups, n), rng.random(n)
    for kind, rows, some in ("bytes", correct, few), ("bits", k.pack(correct, n), k.pack(few, 4000)):
        yield f"curve_counts {kind}", partial(k.curve_counts, rows, n, 199, np.zeros((4, 200), "i8"))
        sums = np.zeros((4, n_groups, 200))
        group_sums = partial(k.group_sums, rows, n, 199, groups, n_groups)
        yield f"group_sums {kind}", partial(group_sums, None, sums.astype("i8"))
        yield f"group_sums {kind} weighted", partial(group_sums, weights, sums)
        yield f"sample_counts {kind}", partial(k.sample_counts, rows, n)
        yield f"overlap_counts {kind}", partial(k.overlap_counts, some, 4000, np.zeros((200, 200), "i8"))
    yield "pack", partial(k.pack, correct, n)
    yield "unpack", partial(k.unpack, rows, n)
    labels = rng.integers(0, 10, n)
    yield "pack_predictions int64", partial(k.pack_predictions, rng.integers(0, 10, (20, n)), labels)
    for dtype in "float16", "float32", "float64":
        p = rng.dirichlet(np.ones(10), (3, n)).astype(dtype)
        yield f"pack_scores {dtype}", partial(k.pack_scores, p[0], labels)
        yield f"check_probabilities {dtype}", partial(k.check_probabilities, p[0], 0.01)
        mixture = p[0, :1000], list(p[1:, :1000]), labels[:1000], None
        yield f"mixture_right {dtype}", partial(k.mixture_right, *mixture, grid)
        yield f"best_epsilons {dtype}", partial(k.best_epsilons, *mixture, windows, grid)
        seen = np.zeros((2, 1000), np.uint16)
        yield f"best_epsilons {dtype}, bounds", partial(k.best_epsilons, *mixture, windows, np.empty(0), seen, False)


def public_calls(folder):
    """Calls that users wait for, or make often."""
    rng = np.random.default_rng(0)
    n = 20_000
    correct = rng.random((200, n)) < 0.7
    groups, labels, scores = rng.integers(0, 100, n), rng.integers(0, 10, n), rng.random((n, 10), "f4")
    yield "forget_fraction 10 x 1000", partial(fmn.forget_fraction, correct[:10, :1000])
    yield "forget_fraction", partial(fmn.forget_fraction, correct)
    yield "forgetting_curves", partial(fmn.forgetting_curves, correct)
    yield "forgetting_curves groups", partial(fmn.forgetting_curves, correct, groups=groups)
    yield "sample_statistics", lambda: fmn.sample_statistics(correct).forgetting_events
    history = fmn.CorrectnessHistory(n, path=folder / "history.fmnh")
    for row in correct[:50]:
        history.append(row)
    yield "CorrectnessHistory.open", partial(fmn.CorrectnessHistory.open, folder / "history.fmnh")
    yield "CorrectnessHistory.append", partial(history.append, correct[50])
    recorder = fmn.Recorder(folder / "run", save=lambda path: path.write_bytes(b""), suffix=".weights")
    epochs = iter(range(3))
    yield "Recorder.record", lambda: recorder.record(next(epochs), scores, labels)
    p, y = rng.dirichlet(np.ones(10), (6, 500)), labels[:500]
    plan = fmn.fuse(p, y)
    yield "fuse forget", partial(fmn.fuse, p, y)
    yield "fuse pool", partial(fmn.fuse, p[:, :100], y[:100], method="pool")
    yield "FusionPlan.save", partial(plan.save, folder / "plan.json")
    yield "FusionPlan.load", partial(fmn.FusionPlan.load, folder / "plan.json")
    yield "FusionPlan.apply", partial(plan.apply, p)
    yield "compare_probabilities", partial(fmn.compare_probabilities, p[:4, :60], y[:60], p[:4, 60:120], y[60:120])


def run_counted(folder):
    """Run every call between two markers, and print the names."""
    gc.disable()
    isa = fmn.backend().instruction_set
    assert isa == os.environ["FMN_ISA"], f"this processor has no {os.environ['FMN_ISA']}"
    calls = [(f"{isa} {name}", call) for name, call in kernel_calls()]
    calls += public_calls(Path(folder)) if isa == "avx2" else []
    for _, call in calls:
        call()
        call()
        os.getppid()
        call()
        os.getppid()
    print(json.dumps([name for name, _ in calls]))


def counts_of(isa):
    """Instructions of each call on one instruction set, by its name."""
    same = {"FMN_ISA": isa, "FMN_BACKEND": "cpp", "FMN_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    same |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell"}
    same |= {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # calls with files count the depth of the path
        files = Path(folder, "files")  # apart from the dumps: a call that writes a file reads the names beside it
        files.mkdir()
        valgrind = ["valgrind", "--tool=callgrind", "--dump-after=getppid", f"--callgrind-out-file={folder}/dump"]
        command = [*valgrind, sys.executable, __file__, "--counted", str(files)]
        done = subprocess.run(command, env=same, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the counted program failed on {isa}:\n{done.stderr}")
        names = json.loads(done.stdout)
        dumps = [Path(folder, f"dump.{2 * i + 2}").read_text() for i in range(len(names))]  # from 1; odd ones warm up
    return {n: int(re.search(r"^totals: (\d+)$", d, re.MULTILINE)[1]) for n, d in zip(names, dumps, strict=True)}


def counts():
    """Instructions of each call, by its name."""
    with ThreadPoolExecutor() as pool:
        return {name: count for part in pool.map(counts_of, ["avx2", "base"]) for name, count in part.items()}


def versions():
    """What the counts depend on, besides our code. The extension names its compiler."""
    extension = Path(import_kernels("cpp").__file__).read_bytes()
    compiler = re.search(rb"GCC: \([^)]*\) (\d+)|clang version (\d+)", extension)
    return {
        "machine": platform.machine(),
        "compiler": compiler[0].decode() if compiler else "unknown",
        "libc": " ".join(platform.libc_ver()),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
    }


def changes(now, recorded):
    """A line for each count that differs from the recorded one by more than the bound, or has none."""
    lines = [f"{name}: not recorded" for name in now.keys() - recorded.keys()]
    lines += [f"{name}: recorded, but not counted" for name in recorded.keys() - now.keys()]
    for name in now.keys() & recorded.keys():
        more = now[name] - recorded[name]
        if abs(more) > BOUND * recorded[name]:
            lines.append(f"{name}: {now[name]} instructions, recorded {recorded[name]} ({more / recorded[name]:+.1%})")
    return sorted(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="record the counts")
    parser.add_argument("--counted", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.counted:
        return run_counted(arguments.counted)
    now = counts()
    recorded = json.loads(RECORD.read_text())["instructions"] if RECORD.exists() else {}
    for name, count in now.items():
        before = f"{count / recorded[name] - 1:+8.2%}" if name in recorded else "     new"
        print(f"{count:12,} {before}  {name}")
    if arguments.renew:
        RECORD.write_text(json.dumps({"versions": versions(), "instructions": now}, indent=1) + "\n")


if __name__ == "__main__":
    main()
