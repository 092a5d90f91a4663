"""Speed of the fusion: the search of one epsilon beside a grid in torch, and every method on a large run.

Beside them: a comparison of all methods, and the recording of an epoch compared with its packing alone.

    fmn-ref bench fusion [-o benchmarks/results]

The grid in torch is the code that a user would write: 101 mixtures, each with an arg-max and a count, on all threads.
Times are medians. Each program is timed alone after a pause, because the threads of torch and of BLAS stay busy for a
while after a call. The accuracies are compared before anything is timed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fmn_ref as fmn
from fmn_ref.fusion.methods import method_names
from fmn_ref.kernels.backend import kernels
from fmn_ref.reporting.tables import markdown_table
from fmn_ref.runs.importers import softmax

from ..common import in_new_process, machine, median_seconds, peak_kib, write_result

SIZES = [(n, k) for n in (10_000, 50_000) for k in (10, 100, 1000)]  # samples, classes
LARGE = 200, 10_000, 100  # epochs, samples, classes
RECORDED = 1_281_167, 1000  # samples, classes
METHODS = tuple(m for m in method_names() if m not in ("equal", "last"))  # those two cost what "top" costs

Probs = NDArray[np.float32]
Labels = NDArray[np.int64]
Call = Callable[[], object]


def predictions(n: int, k: int, rng: np.random.Generator) -> tuple[list[Probs], Labels]:
    """Draw two correlated predictors that classify a quarter to a half of the samples correctly."""
    z = rng.normal(0, 2, (n, k)).astype(np.float32)
    labels = rng.integers(0, k, n)
    z[np.arange(n), labels] += 4
    return [softmax(z + rng.normal(0, 1.5, z.shape).astype(np.float32), "logits") for _ in range(2)], labels


def torch_grid(current: torch.Tensor, candidate: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Search epsilon in steps of 0.01 with torch; return (epsilon, accuracy)."""
    best, found = -1, 0
    for i in range(101):
        right = int((torch.lerp(current, candidate, i / 100).argmax(1) == labels).sum())
        if right > best:
            best, found = right, i
    return found / 100, best / len(labels)


def search_row(n: int, k: int, dtype: str, rng: np.random.Generator) -> dict[str, Any]:
    """Time three searches of one epsilon on predictions of one size and type."""
    probs, labels = predictions(n, k, rng)
    tensors = [torch.from_numpy(p).to(getattr(torch, dtype)) for p in probs]
    current, candidate = (p if dtype == "bfloat16" else p.numpy() for p in tensors)
    in_torch = partial(torch_grid, tensors[0].float(), tensors[1].float(), torch.from_numpy(labels))  # fastest type
    exact = partial(fmn.best_epsilon, current, candidate, labels, search="exact")
    grid = partial(fmn.best_epsilon, current, candidate, labels)
    accuracy = {"torch_grid": in_torch()[1], "exact": exact()[1]}
    if accuracy["exact"] < grid()[1]:
        raise AssertionError(f"accuracy of the exact search {accuracy['exact']} is below the grid's {grid()[1]}")
    calls = {"torch_grid_ms": (in_torch, 1), "exact_ms": (exact, 2), "grid_ms": (grid, 1)}
    times = {name: 1e3 * median_seconds(call, s, most=200, pause=0.3) for name, (call, s) in calls.items()}
    row: dict[str, Any] = {"n_samples": n, "n_classes": k, "dtype": dtype, **times}
    return row | {"times": times["torch_grid_ms"] / times["exact_ms"], "accuracy": accuracy}


def large_run(n_epochs: int, n: int, k: int) -> tuple[NDArray[np.float16], Labels]:
    """Draw float16 probabilities (n_epochs, n, k) of a run that learns, drifts and forgets, and the labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, k, n)
    base = rng.normal(0, 1.5, (n, k)).astype(np.float32)
    base[np.arange(n), labels] += 3
    drift, state = rng.normal(0, 2, (n, k)).astype(np.float32), np.zeros((n, k), np.float32)
    probs = np.empty((n_epochs, n, k), np.float16)
    for e in range(n_epochs):
        t = e / n_epochs
        state = 0.95 * state + rng.normal(0, 0.46, (n, k)).astype(np.float32)
        probs[e] = softmax(base * min(1, 0.1 + 3.3 * t) + state + drift * max(0, 1.25 * (t - 0.2)), "logits")
    return probs, labels


def fuse_row(method: str, folds: int, path: str) -> dict[str, Any]:
    """Measure time and peak memory of one fusion of probabilities in a file, which is read into memory first."""
    probs, labels = np.load(path), np.load(path.replace("probs", "labels"))
    fmn.fuse(probs[:2, :100], labels[:100], method=method, folds=2)  # loads the libraries
    before = peak_kib()
    start = time.perf_counter()
    found = fmn.fuse(probs, labels, method=method, folds=folds)
    took = time.perf_counter() - start
    return {
        "method": method,
        "folds": folds,
        "seconds": took,
        "probabilities_mib": probs.nbytes / 2**20,
        "added_mib": (peak_kib() - before) / 1024,
        "members": len(found.members),
        "final": found.accuracy[0],
        "accuracy": found.accuracy[-1],
        "cv_accuracy": found.cv_accuracy,
    }


def compare_row(path: str) -> dict[str, Any]:
    """Time a comparison of all methods, with the probabilities as selection set and as test set."""
    probs, labels = np.load(path), np.load(path.replace("probs", "labels"))
    start = time.perf_counter()
    fmn.compare_probabilities(probs, labels, probs, labels, allow_overlap=True)
    took = 1e3 * (time.perf_counter() - start)
    return {"call": "compare_probabilities", "shape": list(probs.shape), "ms": took, "packing_ms": None}


def record_rows(n: int, k: int) -> list[dict[str, Any]]:
    """Time the recording of an epoch of float16 logits, and of its correctness in memory, beside the packing alone."""
    rng = np.random.default_rng(0)
    some = rng.normal(0, 1, (min(n, 20_000), k)).astype(np.float16)
    logits, labels = np.resize(some, (n, k)), rng.integers(0, k, n)
    correct, history, epochs = fmn.correctness(logits, labels), fmn.CorrectnessHistory(n), count()
    pack = kernels()
    with tempfile.TemporaryDirectory() as folder, fmn.Recorder(folder) as recorder:
        calls: list[tuple[str, tuple[int, ...], Call, Call]] = [
            ("CorrectnessHistory.append", (n,), partial(history.append, correct), partial(pack.pack, correct[None], n)),
            (
                "Recorder.record",
                (n, k),
                lambda: recorder.record(next(epochs), logits, labels),
                partial(pack.pack_scores, logits, labels),
            ),
        ]
        return [
            {
                "call": name,
                "shape": list(shape),
                "ms": 1e3 * median_seconds(call, 3, most=100),
                "packing_ms": 1e3 * median_seconds(packing, 3, most=100),
            }
            for name, shape, call, packing in calls
        ]


def large_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure every method, and the calls beside them, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probs.npy"
        probs, labels = large_run(*LARGE)
        np.save(path, probs)
        np.save(path.with_name("labels.npy"), labels)
        for method in METHODS:
            for folds in (5,) if method == "auto" else (0, 5):
                rows.append(in_new_process(fuse_row, method, folds, str(path)))
        compared = in_new_process(compare_row, str(path))
    return rows, [compared, *in_new_process(record_rows, *RECORDED)]


def benchmark(output: str | None = None) -> dict[str, Any]:
    """Time all searches and fusions; write fusion_speed.json and fusion_speed.md into `output`."""
    rng = np.random.default_rng(0)
    searches = [search_row(n, k, "float32", rng) for n, k in SIZES]
    searches += [search_row(*SIZES[1], dtype, rng) for dtype in ("float16", "bfloat16", "float64")]
    fusions, calls = large_rows()
    result = {"machine": machine(), "shape": list(LARGE), "search": searches, "fuse": fusions, "calls": calls}
    if output is not None:
        write_result(output, "fusion_speed", result, markdown(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """Three tables: the search of one epsilon, whole fusions, and the calls beside them."""
    e, n, k = result["shape"]
    mib = result["fuse"][0]["probabilities_mib"]
    return "\n".join(
        [
            "# Speed of the fusion\n",
            "Search of one epsilon: a grid of 101 points in torch, the same grid here, and the exact search.\n",
            _search_table(result["search"]),
            f"One fusion of {e} epochs x {n} samples x {k} classes, float16. With 5 folds it runs 5 more times.\n",
            _fuse_table(result["fuse"]),
            "A comparison of all methods on these arrays; recording in memory and on disk, beside the packing alone.\n",
            _call_table(result["calls"]),
            f"The probabilities take {mib:.0f} MiB. Machine: {json.dumps(result['machine'])}\n",
        ]
    )


def _search_table(rows: list[dict[str, Any]]) -> str:
    columns = ["samples x classes", "type", "grid in torch, ms", "grid here, ms", "exact, ms", "torch / exact"]
    cells = [
        [
            f"{r['n_samples']} x {r['n_classes']}",
            r["dtype"],
            f"{r['torch_grid_ms']:.4g}",
            f"{r['grid_ms']:.3g}",
            f"{r['exact_ms']:.3g}",
            f"{r['times']:.0f}",
        ]
        for r in rows
    ]
    return markdown_table(columns, cells, 2)


def _call_table(rows: list[dict[str, Any]]) -> str:
    columns = ["call", "shape", "ms", "packing, ms", "call / packing"]
    cells = []
    for r in rows:
        packing = "", ""
        if r["packing_ms"] is not None:
            packing = f"{r['packing_ms']:.3g}", f"{r['ms'] / r['packing_ms']:.2f}"
        cells.append([r["call"], " x ".join(map(str, r["shape"])), f"{r['ms']:.4g}", *packing])
    return markdown_table(columns, cells, 2)


def _fuse_table(rows: list[dict[str, Any]]) -> str:
    columns = ["method", "folds", "seconds", "memory added, MiB", "members", "accuracy", "cross-validated"]
    cells = [
        [
            r["method"],
            str(r["folds"]),
            f"{r['seconds']:.2f}",
            f"{r['added_mib']:.0f}",
            str(r["members"]),
            f"{r['accuracy']:.2%}",
            "" if r["cv_accuracy"] is None else f"{r['cv_accuracy']:.2%}",
        ]
        for r in rows
    ]
    return markdown_table(columns, cells)
