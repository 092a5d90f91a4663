"""Times the exact search of epsilon beside a grid written in torch, and every way to fuse on a large run.

    fmn-ref bench fusion [-o benchmarks/results]

The grid in torch is what one would write: 101 times a mixture, an arg-max and a count, on all threads. Medians; each
program is timed alone, after a pause, since torch's and BLAS's threads go on spinning for a while. Accuracies are
compared before anything is timed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fmn_ref as fmn

from .metric import machine

SIZES = [(n, k) for n in (10_000, 50_000) for k in (10, 100, 1000)]
LARGE = 200, 10_000, 100
METHODS = ("forget", "greedy", "bagged", "likelihood", "coverage", "top", "auto")


def predictions(n: int, k: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], ...]:
    """Two correlated predictors, right on a quarter to a half of the samples."""
    z = rng.normal(0, 2, (n, k)).astype(np.float32)
    labels = rng.integers(0, k, n)
    z[np.arange(n), labels] += 4
    return (*(softmax(z + rng.normal(0, 1.5, z.shape).astype(np.float32)) for _ in range(2)), labels)


def softmax(z: NDArray[np.float32]) -> NDArray[np.float32]:
    p = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True))


def torch_grid(current: torch.Tensor, candidate: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    best, found = -1, 0
    for i in range(101):
        right = int((torch.lerp(current, candidate, i / 100).argmax(1) == labels).sum())
        if right > best:
            best, found = right, i
    return found / 100, best / len(labels)


def seconds(call: Callable[[], Any], least: int = 3, budget: float = 2.0) -> float:
    call()
    time.sleep(0.3)
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def search_row(n: int, k: int, dtype: str, rng: np.random.Generator) -> dict[str, Any]:
    current, candidate, labels = predictions(n, k, rng)
    pair = [torch.from_numpy(p).to(getattr(torch, dtype)) for p in (current, candidate)]
    given = [p if dtype == "bfloat16" else p.numpy() for p in pair]
    y = torch.from_numpy(labels)
    wide = [p.float() for p in pair]  # torch's fastest type here
    of_torch = torch_grid(*wide, y)
    of_exact = fmn.best_epsilon(*given, labels, search="exact")
    if of_exact[1] < fmn.best_epsilon(*given, labels)[1]:
        raise AssertionError(f"exact {of_exact} is below the grid")
    slow = seconds(lambda: torch_grid(*wide, y), budget=1)
    fast = seconds(lambda: fmn.best_epsilon(*given, labels, search="exact"))
    grid = seconds(lambda: fmn.best_epsilon(*given, labels), budget=1)
    return {
        "n_samples": n,
        "n_classes": k,
        "dtype": dtype,
        "torch_grid_ms": 1e3 * slow,
        "exact_ms": 1e3 * fast,
        "grid_ms": 1e3 * grid,
        "times": slow / fast,
        "accuracy": {"torch_grid": of_torch[1], "exact": of_exact[1]},
    }


def large_run(n_epochs: int, n: int, k: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """A run that learns, drifts, and forgets: float16 probabilities of every epoch."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, k, n)
    base = rng.normal(0, 1.5, (n, k)).astype(np.float32)
    base[np.arange(n), labels] += 3
    drift, state = rng.normal(0, 2, (n, k)).astype(np.float32), np.zeros((n, k), np.float32)
    probs = np.empty((n_epochs, n, k), np.float16)
    for e in range(n_epochs):
        t = e / n_epochs
        state = 0.95 * state + rng.normal(0, 0.46, (n, k)).astype(np.float32)
        probs[e] = softmax(base * min(1, 0.1 + 3.3 * t) + state + drift * max(0, 1.25 * (t - 0.2)))
    return probs, labels


def fuse_row(method: str, folds: int, path: str) -> dict[str, Any]:
    """Time and peak memory of one fusion of a file's probabilities, read into memory: `benchmark` starts a process for
    each."""
    probs, labels = np.load(path), np.load(path.replace("probs", "labels"))
    fmn.fuse(probs[:2, :100], labels[:100], method=method, folds=2)  # loads what is loaded once
    before = peak_kib()
    start = time.perf_counter()
    plan = fmn.fuse(probs, labels, method=method, folds=folds)
    took = time.perf_counter() - start
    added = (peak_kib() - before) / 1024
    return {
        "method": method,
        "folds": folds,
        "seconds": took,
        "probabilities_mib": probs.nbytes / 2**20,
        "added_mib": added,
        "members": len(plan.members),
        "final": plan.accuracy[0],
        "accuracy": plan.accuracy[-1],
        "cv_accuracy": plan.cv_accuracy,
    }


def peak_kib() -> int:
    """Of this process alone: what getrusage says is handed down from the parent."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])


def benchmark(output: str | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    searches = [search_row(n, k, "float32", rng) for n, k in SIZES]
    searches += [search_row(*SIZES[1], dtype, rng) for dtype in ("float16", "bfloat16", "float64")]
    fusions = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probs.npy"
        for name, a in zip(("probs", "labels"), large_run(*LARGE), strict=True):
            np.save(path.with_name(f"{name}.npy"), a)
        for method in METHODS:
            for folds in (5,) if method == "auto" else (0, 5):
                call = f"from fmn_ref.benchmarks import fusion_speed as f; f.main({method!r}, {folds}, {str(path)!r})"
                done = subprocess.run([sys.executable, "-c", call], check=True, capture_output=True, text=True)
                fusions.append(json.loads(done.stdout))
    result = {"machine": machine(), "shape": list(LARGE), "search": searches, "fuse": fusions}
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fusion_speed.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "fusion_speed.md").write_text(markdown(result))
    return result


def main(method: str, folds: int, path: str) -> None:
    print(json.dumps(fuse_row(method, folds, path)))


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Speed of the fusion", "", "One epsilon: 101 points in torch beside the exact search.", ""]
    lines += ["| samples x classes | type | grid in torch, ms | grid here, ms | exact, ms | torch / exact |"]
    lines += ["|---|---|--:|--:|--:|--:|"]
    lines += [
        f"| {r['n_samples']} x {r['n_classes']} | {r['dtype']} | {r['torch_grid_ms']:.4g} | {r['grid_ms']:.3g} | "
        f"{r['exact_ms']:.3g} | {r['times']:.0f} |"
        for r in result["search"]
    ]
    e, n, k = result["shape"]
    lines += [
        "",
        f"A whole fusion of {e} epochs x {n} samples x {k} classes, float16; with folds, as many runs more.",
        "",
    ]
    lines += ["| method | folds | seconds | memory added, MiB | members | accuracy | cross-validated |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for r in result["fuse"]:
        cv = "" if r["cv_accuracy"] is None else f"{r['cv_accuracy']:.2%}"
        lines.append(
            f"| {r['method']} | {r['folds']} | {r['seconds']:.2f} | {r['added_mib']:.0f} | {r['members']} | "
            f"{r['accuracy']:.2%} | {cv} |"
        )
    mib = result["fuse"][0]["probabilities_mib"]
    lines += ["", f"The probabilities take {mib:.0f} MiB. Machine: {json.dumps(result['machine'])}", ""]
    return "\n".join(lines)
