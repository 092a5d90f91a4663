"""Cost against size: time and memory as epochs, samples, classes, members and parameters grow tenfold.

    fmn-ref bench scale -o benchmarks/results [--only REGEX]

A piece is a work and the size that grows, as in "fuse greedy: samples". `--only` runs some pieces; those of an earlier
scale.json in the folder stay. Each point is measured in a process of its own, on random data. A curve ends at
the sizes of MOST, or where the next tenfold step would take more than a minute with its preparation, or not fit into
memory or on the disk.

The growth is the exponent of the last step: 1 for a cost in proportion to the size. It compares the time of all
processors, which other programs on the machine change least.

The last piece, "tokens", is a history of 10^9 samples and 150 epochs: 19 GB on disk, more than memory as bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import fmn_ref as fmn
from fmn_ref import _stderr
from fmn_ref.reporting.report import write_report
from fmn_ref.reporting.tables import markdown_table
from fmn_ref.runs.folder import RunFolder
from fmn_ref.runs.importers import softmax

from ..common import in_new_process, machine, peak_kib, write_result

Call = Callable[[], object]
SECONDS = 60.0  # of a step, with its preparation
STARTS = {"epochs": 10, "samples": 1_000, "classes": 10, "members": 1, "parameters": 10_000}  # of the curves
MOST = {"epochs": 100_000, "samples": 10_000_000, "classes": 100_000, "members": 1_000, "parameters": 100_000_000}
TOKENS = 150, 10**9  # epochs, samples
SLICE = 10_000_000  # samples whose statistics fit in memory


class Work(NamedTuple):
    """What is measured: `prepare(folder, **sizes, **fixed)` makes the data and returns the call to time."""

    prepare: Callable[..., Call]
    sizes: Mapping[str, int]  # one grows, the others stay
    fixed: Mapping[str, Any] = MappingProxyType({})
    grows: tuple[str, ...] = ()  # sizes that grow; empty: all
    most: Mapping[str, int] = MappingProxyType({})  # largest sizes, where they are not those of MOST


def random_rows(epochs: int, samples: int) -> NDArray[np.bool_]:
    """Correctness (epochs, samples): random bits, which repeat after 2^27."""
    width = -(-samples // 8)
    bits = np.frombuffer(np.random.default_rng(0).bytes(min(epochs * width, 1 << 24)), np.uint8)
    bits = np.resize(bits, (epochs, width))
    return np.unpackbits(bits, axis=1, count=samples).view(np.bool_)


def random_run(epochs: int, samples: int, classes: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Draw float16 probabilities of a run that learns, drifts and forgets, and the labels.

    The noise of an epoch is a random stretch of one long array: drawing it anew would take longer than what is timed.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, samples)
    base, drift = (rng.normal(0, s, (samples, classes)).astype(np.float32) for s in (1.5, 2))
    base[np.arange(samples), labels] += 3
    noise = rng.normal(0, 1.5, 2 * base.size).astype(np.float32)
    probs = np.empty((epochs, samples, classes), np.float16)
    for e, start in enumerate(rng.integers(0, base.size, epochs)):
        t = (e + 1) / epochs
        z = base * min(1, 0.1 + 3.3 * t) + noise[start : start + base.size].reshape(base.shape)
        probs[e] = softmax(z + drift * max(0, 1.25 * (t - 0.2)), "logits")
    return probs, labels


def recorded_run(folder: Path, epochs: int, samples: int, classes: int) -> NDArray[np.int64]:
    """Record a run of random correctness; return the labels. Without waiting for the disk after each epoch."""
    labels = np.arange(samples) % classes
    fmn.Recorder(folder).close()
    rows = random_rows(min(epochs, 64), samples)
    with mock.patch("os.fsync", int):  # does nothing
        history = fmn.CorrectnessHistory(samples, RunFolder(folder).history, labels=labels)
        for e in range(epochs):
            history.append(rows[e % len(rows)])
    return labels


# --- what is timed ---


def curves(folder: Path, epochs: int, samples: int, classes: int = 0) -> Call:
    """The four curves of a matrix in memory; of each class, if there are any."""
    groups = np.arange(samples) % classes if classes else None
    return partial(fmn.forgetting_curves, random_rows(epochs, samples), groups=groups)


def statistics(folder: Path, epochs: int, samples: int) -> Call:
    """The statistics of each sample of a matrix in memory."""
    return partial(fmn.sample_statistics, random_rows(epochs, samples))


def fusion(folder: Path, epochs: int, samples: int, classes: int, method: str, members: int | None = None) -> Call:
    """One fusion of probabilities in memory, without cross-validation."""
    probs, labels = random_run(epochs, samples, classes)
    return partial(fmn.fuse, probs, labels, method=method, max_members=members, folds=0)


def opening(folder: Path, epochs: int, samples: int) -> Call:
    """Open a history file and check every row."""
    recorded_run(folder / "run", epochs, samples, 10)
    return partial(fmn.CorrectnessHistory.open, RunFolder(folder / "run").history)


def record(folder: Path, epochs: int, samples: int, classes: int) -> Call:
    """Record float32 scores of one epoch after `epochs` others, with a budget of ten checkpoints of one byte."""
    labels = recorded_run(folder / "run", epochs, samples, classes)
    recorder = fmn.Recorder(folder / "run", keep="budget:10", save=lambda path: path.write_bytes(b"0"))
    scores = np.random.default_rng(0).random((samples, classes), np.float32)
    numbers = itertools.count(epochs)
    return lambda: recorder.record(next(numbers), scores, labels)


def average(folder: Path, members: int, parameters: int) -> Call:
    """Average checkpoints of one float32 tensor: links to two files in turn."""
    import torch

    for i in range(2):
        torch.save({"weight": torch.rand(parameters)}, folder / f"{i}.pt")
    paths = [folder / f"epoch_{i}.pt" for i in range(members)]
    for i, path in enumerate(paths):
        os.link(folder / f"{i % 2}.pt", path)
    numbers, weights = itertools.count(), dict.fromkeys(range(members), 1.0)
    return lambda: fmn.average_checkpoints(paths, weights, folder / f"mean_{next(numbers)}")


def report(folder: Path, epochs: int, samples: int, classes: int) -> Call:
    """Write the report of a recorded run, with labels."""
    labels = recorded_run(folder / "run", epochs, samples, classes)
    return partial(write_report, folder / "run", folder / "report.html", labels=labels)


_MATRIX = {"epochs": 100, "samples": 100_000}
_PROBS = {"epochs": 100, "samples": 1_000, "classes": 10}
_BOUNDED = {"epochs": 100, "samples": 10_000, "classes": 10, "members": 10}
_RUN = {"epochs": 100, "samples": 10_000, "classes": 10}
WORKS = {
    "forgetting_curves": Work(curves, _MATRIX, most={"epochs": 10_000}),
    "forgetting_curves of groups": Work(curves, _MATRIX | {"classes": 10}, {}, ("classes",)),
    "sample_statistics": Work(statistics, _MATRIX, most={"epochs": 10_000}),
    "CorrectnessHistory.open": Work(opening, {"epochs": 100, "samples": 10_000}),
    **{f"fuse {m}": Work(fusion, _PROBS, {"method": m}) for m in ("forget", "pool", "greedy")},
    "fuse greedy, bounded": Work(fusion, _BOUNDED, {"method": "greedy"}, ("samples", "members"), {"members": 10}),
    "Recorder.record": Work(record, _RUN),
    "average_checkpoints": Work(average, {"members": 10, "parameters": 1_000_000}),
    "write_report": Work(report, _RUN, most={"classes": 10_000}),
}


# --- the curves ---


def point(name: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Measure one work at one size, in this process."""
    work = WORKS[name]
    with tempfile.TemporaryDirectory() as toy:  # loads the libraries
        work.prepare(Path(toy), **{axis: STARTS[axis] for axis in sizes}, **work.fixed)()
    before = peak_kib()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        call = work.prepare(Path(folder), **sizes, **work.fixed)
        prepared, highest = time.perf_counter() - start, peak_kib()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the call alone, with the data that it needs
        found, seconds, cpu = _timed(call)
        files = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    members = {"found": len(found.members)} if isinstance(found, fmn.FusionPlan) else {}
    memory = {"peak_mib": peak_kib() / 1024, "added_mib": (max(highest, peak_kib()) - before) / 1024}
    return {"seconds": seconds, "cpu": cpu, "prepared": prepared, **memory, "files_mib": files / 2**20, **members}


def _timed(call: Call) -> tuple[Any, float, float]:
    """Result, and the medians of the time and the processor time of several calls, or of one of seconds."""
    times = list[tuple[float, float]]()
    while (total := sum(t for t, _ in times)) < 0.2 or (total < 2 and len(times) < 3):
        start = time.perf_counter(), time.process_time()
        found = call()
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds, cpu = np.median(times, axis=0).tolist()
    return found, seconds, cpu


def curve(name: str, axis: str) -> dict[str, Any]:
    """Measure a work at ten times larger sizes, one after another, until a bound ends them."""
    work, size, points, end = WORKS[name], STARTS[axis], list[dict[str, Any]](), ""
    while not end:
        points.append({"size": size, **in_new_process(point, name, {**work.sizes, axis: size})})
        size *= 10
        end = "largest" if size > work.most.get(axis, MOST[axis]) else _bound(points)
    others = {other: n for other, n in work.sizes.items() if other != axis}
    return {"work": name, "axis": axis, "others": others, "points": points, "growth": _growth(points), "end": end}


def _bound(points: list[dict[str, Any]]) -> str:
    """What the next step would exceed: "time", "memory", "disk", or "" for nothing."""
    last = points[-1]
    factor = 10 ** max(1.0, _growth(points))
    known = re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
    memory = int(known[1]) / 1024 if known else math.inf
    if factor * (last["seconds"] + last["prepared"]) > SECONDS:
        return "time"
    if 10 * last["added_mib"] > 0.9 * memory:
        return "memory"
    return "disk" if 10 * last["files_mib"] > 0.9 * shutil.disk_usage(tempfile.gettempdir()).free / 2**20 else ""


def _growth(points: list[dict[str, Any]]) -> float:
    """Exponent of the last step, of the processor time; 0 for a single point."""
    return math.log10(points[-1]["cpu"] / points[-2]["cpu"]) if len(points) > 1 else 0.0


# --- more samples than fit in memory ---


def token_step(step: str, folder: str, epochs: int, samples: int) -> dict[str, Any]:
    """Measure "append", which makes the file, "open", "curves" or "statistics" of a large history, in this process."""
    path, sums = Path(folder, "history.fmnh"), Path(folder, "right.json")
    if step == "append":
        seconds, right = _append_all(path, epochs, samples)
        sums.write_text(json.dumps(right))
    else:
        right = json.loads(sums.read_text())
        start = time.perf_counter()
        history = fmn.CorrectnessHistory.open(path, verify=step == "open")
        if step == "curves":
            found: Any = fmn.forgetting_curves(history).counts[0].tolist()
        else:
            found = _right_of_slices(history) if step == "statistics" else len(history)
        seconds = time.perf_counter() - start
        if found != {"open": epochs, "curves": right, "statistics": sum(right)}[step]:
            raise AssertionError(f"{step}: the history does not give back what was appended")
    return {"step": step, "seconds": seconds, "peak_mib": peak_kib() / 1024}


def _append_all(path: Path, epochs: int, samples: int) -> tuple[float, list[int]]:
    """Append epochs that differ in every n-th sample; return the time, and how many samples each has right."""
    history, row, seconds, right = fmn.CorrectnessHistory(samples, path), random_rows(1, samples)[0], 0.0, []
    for e in range(epochs):
        row[e::epochs] ^= True
        right.append(int(np.count_nonzero(row)))
        start = time.perf_counter()
        history.append(row)
        seconds += time.perf_counter() - start
    return seconds, right


def _right_of_slices(history: fmn.CorrectnessHistory) -> int:
    """Statistics of every sample, a slice at a time; return the sum of their correctness."""
    total = 0
    for start in range(0, history.n_samples, SLICE):
        part = history.select(samples=slice(start, start + SLICE))
        total += int(fmn.sample_statistics(part).counts[3].sum(dtype=np.int64))
    return total


def tokens() -> dict[str, Any]:
    """Append, open, curves and statistics of a history with TOKENS epochs and samples."""
    with tempfile.TemporaryDirectory() as folder:
        steps = [in_new_process(token_step, s, folder, *TOKENS) for s in ("append", "open", "curves", "statistics")]
        size = Path(folder, "history.fmnh").stat().st_size
    return {"epochs": TOKENS[0], "samples": TOKENS[1], "file_gb": size / 1e9, "steps": steps}


# --- results ---


def benchmark(output: str | None = None, only: str = "") -> dict[str, Any]:
    """Measure the pieces whose names match `only`; write scale.json, scale.md and scale.png into `output`."""
    pieces: dict[str, Call] = {
        f"{name}: {axis}": partial(curve, name, axis)
        for name, work in WORKS.items()
        for axis in work.grows or work.sizes
    }
    pieces["tokens"] = tokens
    chosen = [name for name in pieces if re.search(only, name)]
    if not chosen:
        raise ValueError(f"--only: no piece matches {only!r}; there are {', '.join(pieces)}")
    known = Path(output, "scale.json") if output is not None else None
    found = json.loads(known.read_text())["pieces"] if known is not None and only and known.exists() else {}
    for name in (bar := _stderr.progress_bar(chosen, "scale")):
        bar.set_postfix_str(name)
        found[name] = pieces[name]()
        result = {"machine": machine(), "pieces": {name: found[name] for name in pieces if name in found}}
        if output is not None:  # after each piece: the later ones may not fit on the disk
            draw(result, write_result(output, "scale", result, markdown(result)) / "scale.png")
    return result


def markdown(result: dict[str, Any]) -> str:
    """The tables, and the machine."""
    return "\n".join(["# Cost against size\n", *tables(result), f"Machine: {json.dumps(result['machine'])}\n"])


def tables(result: dict[str, Any]) -> list[str]:
    """The table of the curves, and that of the large history."""
    names = ["work", "grows", "up to", "the others", "seconds", "of processors", "peak memory, MiB"]
    pieces = dict(result["pieces"])
    large = pieces.pop("tokens", None)
    found = [markdown_table([*names, "growth", "members", "next step"], map(_cells, pieces.values()), 2)]
    if large is not None:
        rows = [[s["step"], f"{s['seconds']:.3g}", f"{s['peak_mib']:.0f}"] for s in large["steps"]]
        size = f"{large['epochs']} x {large['samples']}"
        found.append(markdown_table([f"history of {size}", "seconds", "peak memory, MiB"], rows))
    return found


_ENDS = {"time": "over a minute", "memory": "memory", "disk": "disk", "largest": "not tried"}


def _cells(c: dict[str, Any]) -> list[str]:
    last = c["points"][-1]
    found = " to ".join(str(p["found"]) for p in c["points"][-2:] if "found" in p)
    others = " x ".join(f"{n} {axis}" for axis, n in c["others"].items())
    sizes = [c["work"], c["axis"], str(last["size"]), others]
    cost = [f"{last['seconds']:.3g}", f"{last['cpu']:.3g}", f"{last['peak_mib']:.0f}", f"{c['growth']:.2f}", found]
    return [*sizes, *cost, _ENDS[c["end"]]]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the time of every work against each size; skipped where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return _stderr.say("scale.png: not drawn, matplotlib is not installed")
    figure = Figure((9.6, 6.0), dpi=120, layout="constrained")
    grid = figure.subplots(2, 3).reshape(-1)
    for axes, axis in zip(grid, STARTS, strict=False):
        some = [c for c in result["pieces"].values() if c.get("axis") == axis]
        for c in some:
            i = list(WORKS).index(c["work"])
            x, y = ([p[key] for p in c["points"]] for key in ("size", "seconds"))
            axes.loglog(x, y, "osv^Dx"[i % 6] + "-", color=f"C{i % 10}", label=c["work"], markersize=3, linewidth=1)
        axes.set(xlabel=axis, ylabel="seconds")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.5)
    lines = {name: line for axes in grid for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid[-1].axis("off")
    grid[-1].legend(lines.values(), lines.keys(), frameon=False, fontsize=8, loc="center")
    figure.savefig(path)
