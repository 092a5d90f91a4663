"""Times the metric kernels beside NumPy, numba and torch doing the same, in one process.

    fmn-ref bench metric [--samples 1281167] [-o benchmarks/results]
    python benchmarks/metric_throughput.py           the same; metric_throughput.cpp is its twin without Python

A row is one function on one input by one program: median ms of the calls of half a second (3 at least), GB/s of the bytes
of input, its share of the bandwidth at which as many threads read the same bytes (NumPy's fastest reduction, measured
between the rows), and how many times as fast as NumPy's, numba's and torch's row it is. All results of a case are
compared with NumPy's before anything is timed; rows that lose are printed like the others.
"""

import importlib
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import fmn_ref as fmn
from fmn_ref import _backend, _reference


@dataclass
class Case:
    """One function on one input; `calls` gives each program's way to compute it, `size` the bytes it reads."""

    function: str
    input: str
    size: int
    calls: dict = field(default_factory=dict)
    bandwidth_of: object = None  # the array whose reading it is compared with; None in cache


def median_seconds(call, seconds=0.5):
    call()
    times = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 2000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth(a, threads):
    """GB/s at which NumPy's fastest reductions read an array, an equal part in each thread; the best of three tries."""
    words = a.reshape(-1).view(np.uint8)
    words = words[: len(words) // (64 * threads) * (64 * threads)].view(np.int64)
    parts = np.split(words, threads)
    with ThreadPoolExecutor(threads) as pool:

        def read(reduction):
            return lambda: list(pool.map(reduction, parts))

        seconds = min(median_seconds(read(r), 0.2) for r in (np.bitwise_xor.reduce, np.max, np.add.reduce))
    return words.nbytes / seconds / 1e9


def on_zeros(kernel, shape, *args, dtype=np.int64):
    """A call of a kernel that adds to its last argument."""

    def call():
        out = np.zeros(shape, dtype)
        kernel(*args, out)
        return out

    return call


def kernel_modules():
    found = {}
    for name in ("cpp", "numba", "numpy"):
        try:
            found[name] = importlib.import_module(f"fmn_ref.{_backend._MODULES[name]}")
        except ImportError as error:
            print(f"{name}: not here ({error})", file=sys.stderr)
    return found


def numba_forget():
    """The best numba version of F_e that we know: bytes, rows in parallel."""
    import numba

    @numba.njit(parallel=True)
    def forget(c):
        counts = np.zeros(len(c), np.int64)
        for e in numba.prange(len(c)):
            n = 0
            for i in range(c.shape[1]):
                n += c[e, i] & (1 - c[-1, i])
            counts[e] = n
        return counts

    return lambda c: forget(c.view(np.uint8))


def curve_cases(modules, c, bits, rng):
    import torch

    n_epochs, n = c.shape
    last, groups, weights = n_epochs - 1, rng.integers(0, 100, n), rng.random(n)
    t = torch.from_numpy(c)
    forget = Case("forget fraction", "bool", c.nbytes, bandwidth_of=c)
    forget.calls["numpy"] = lambda: (c & ~c[-1]).sum(1)
    forget.calls["torch"] = lambda: (t & ~t[-1]).sum(1).numpy()
    if "numba" in modules:
        by_numba = numba_forget()
        forget.calls["numba"] = lambda: by_numba(c)
    four = on_zeros(modules["cpp"].curve_counts, (4, n_epochs), c, n, last)
    forget.calls["cpp"] = lambda: four()[1]
    yield forget
    for kind, rows in (("bool", c), ("bits", bits)):

        def case(name, call, kind=kind, rows=rows):
            return Case(name, kind, rows.nbytes, {m: call(k, rows) for m, k in modules.items()}, rows)

        yield case("four curves", lambda k, r: on_zeros(k.curve_counts, (4, n_epochs), r, n, last))
        if kind == "bool":
            shape = (4, 100, n_epochs)
            yield case("100 groups", lambda k, r, s=shape: on_zeros(k.group_counts, s, r, n, last, groups, 100))
            yield case(
                "100 groups, weighted",
                lambda k, r, s=shape: on_zeros(k.group_sums, s, r, n, last, groups, 100, weights, dtype=float),
            )
        yield case("per sample", lambda k, r: lambda: k.sample_counts(r, n))
    matrix = Case("all pairs", "bits", bits.nbytes, bandwidth_of=bits)
    for name, k in modules.items():
        if name != "numpy" or n < 2_000_000:
            matrix.calls[name] = on_zeros(k.overlap_counts, (n_epochs, n_epochs), bits, n)

    def matmul():
        total = torch.zeros((n_epochs, n_epochs), dtype=torch.float64)
        for part in t.split(1 << 17, dim=1):
            f = part.float()
            total += f @ f.T
        return total.long().numpy()

    matrix.calls["torch"] = matmul
    yield matrix


def packing_cases(modules, c, rng):
    import torch

    n_epochs, n = c.shape
    labels = rng.integers(0, 1000, n)
    predictions = np.where(c[: max(1, n_epochs // 8)], labels, labels + 1)
    scores = rng.random((max(8, c.size // 4000), 1000), np.float32)
    y = labels[: len(scores)] if len(scores) <= n else rng.integers(0, 1000, len(scores))
    t, yt = torch.from_numpy(scores), torch.from_numpy(y)
    yield Case("pack", "bool", c.nbytes, {m: (lambda k=k: k.pack(c, n)) for m, k in modules.items() if m != "numba"}, c)
    by = {m: (lambda k=k: k.pack_predictions(predictions, labels)) for m, k in modules.items() if m != "numba"}
    yield Case("pack", "int64 predictions", predictions.nbytes, by, predictions)
    for name, s in (("float32", scores), ("float16", scores.astype(np.float16))):
        by = {m: (lambda k=k, s=s: k.pack_scores(s, y)) for m, k in modules.items() if m != "numba"}
        if name == "float32":
            by["torch"] = lambda: np.packbits((t.argmax(1) == yt).numpy(), bitorder="little")
        yield Case("pack", f"{name} scores x 1000", s.nbytes, by, s)


def loop_of_toneva(c):
    """Forgetting events as github.com/mtoneva/example_forgetting counts them: one sample at a time."""
    events = np.zeros(c.shape[1], np.int64)
    for i in range(c.shape[1]):
        transitions = np.diff(c[:, i].astype(np.int8))
        events[i] = len(np.where(transitions == -1)[0]) if len(np.where(c[:, i])[0]) > 0 else len(c)
    return events


def whole_function_cases(rng):
    small, c = rng.random((10, 1000)) < 0.7, rng.random((200, 50_000)) < 0.7
    yield Case(
        "fmn.forget_fraction, 10 x 1000",
        "bool",
        small.nbytes,
        {"numpy": lambda: (small & ~small[-1]).sum(1) / 1000, "cpp": lambda: fmn.forget_fraction(small)},
    )
    yield Case(
        "fmn.sample_statistics, 200 x 50000 (NumPy: mtoneva's loop)",
        "bool",
        c.nbytes,
        {
            "numpy": lambda: loop_of_toneva(c),
            "cpp": lambda: fmn.sample_statistics(c, never_learned="toneva").forgetting_events,
        },
    )


def verify(case):
    expected = case.calls.get("numpy", case.calls.get("torch"))()
    for name, call in case.calls.items():
        np.testing.assert_array_equal(np.asarray(call()), np.asarray(expected), err_msg=f"{case.function}, {name}")


def set_threads(threads):
    import torch

    os.environ["FMN_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if "numba" in sys.modules:
        sys.modules["numba"].set_num_threads(threads)


def time_case(case, shape, threads):
    """Rows of one case, on one and on all threads; NumPy has one."""
    seconds, rows = {}, []
    bandwidth = {t: read_bandwidth(case.bandwidth_of, t) for t in threads} if case.bandwidth_of is not None else {}
    for t in threads:
        set_threads(t)
        for name, call in case.calls.items():
            if name == "numpy" and t > 1:
                seconds[name, t] = seconds[name, 1]
                continue
            seconds[name, t] = median_seconds(call)
    for (name, t), s in seconds.items():
        if name == "numpy" and t > 1:
            continue
        row = {"function": case.function, "input": case.input, "shape": shape, "program": name, "threads": t}
        row |= {"ms": 1e3 * s, "GB/s": case.size / s / 1e9}
        row["share of read bandwidth"] = row["GB/s"] / bandwidth[t] if bandwidth else None
        for other in ("numpy", "numba", "torch"):
            row[f"x {other}"] = seconds[other, t] / s if (other, t) in seconds and other != name else None
        rows.append(row)
    return rows, bandwidth


def benchmark(epochs, samples, output=None):
    """All rows; written to the folder `output` as Markdown and JSON too."""
    modules, rng, rows = kernel_modules(), np.random.default_rng(0), []
    threads = sorted({1, fmn.backend().threads})
    for n_epochs, n in ((50, 4000), (epochs, samples)):
        c = rng.random((n_epochs, n), np.float32) < 0.7
        bits = modules["cpp"].pack(c, n)
        for case in (*curve_cases(modules, c, bits, rng), *packing_cases(modules, c, rng)):
            verify(case)
            if n == 4000:
                case.bandwidth_of = None  # in cache: no memory to compare with
            added, bandwidth = time_case(case, f"{n_epochs} x {n}", threads)
            report(added, bandwidth)
            rows += added
    # Bits out of cache need eight times the samples.
    bits = rng.integers(0, 256, (epochs, samples), np.uint8)
    large = Case("four curves", "bits", bits.nbytes, bandwidth_of=bits)
    large.calls["cpp"] = on_zeros(modules["cpp"].curve_counts, (4, epochs), bits, 8 * samples, epochs - 1)
    reference = on_zeros(_reference.curve_counts, (4, 8), bits[-8:, :4096], 8 * 4096, 7)()
    part = on_zeros(modules["cpp"].curve_counts, (4, 8), bits[-8:, :4096], 8 * 4096, 7)()
    np.testing.assert_array_equal(part, reference)
    rows += time_case(large, f"{epochs} x {8 * samples}", threads)[0]
    for case in whole_function_cases(rng):
        verify(case)
        rows += time_case(case, "", [1])[0]
    result = {"machine": machine(), "rows": rows}
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)
        Path(output, "metric_throughput.md").write_text(markdown(result))
        Path(output, "metric_throughput.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def report(rows, bandwidth):
    read = ", ".join(f"{t} threads read {b:.1f} GB/s" for t, b in bandwidth.items())
    best = max((r for r in rows if r["program"] == "cpp"), key=lambda r: r["threads"])
    print(f"{best['function']}, {best['input']}, {best['shape']}: {best['GB/s']:.1f} GB/s; {read}", file=sys.stderr)


def machine():
    import torch

    processor = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    versions = {"fmn_ref": fmn.__version__, "python": platform.python_version(), "numpy": np.__version__}
    versions["torch"] = torch.__version__
    if "numba" in sys.modules:
        versions["numba"] = sys.modules["numba"].__version__
    b = fmn.backend()
    built = {"instruction set": b.instruction_set, "compiler": importlib.import_module("fmn_ref._kernels").compiler}
    return {"processor": processor, "cores": os.cpu_count()} | built | versions


def markdown(result):
    head = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    names = ["function", "input", "shape", "program", "threads", "ms", "GB/s", "share of read bandwidth"]
    names += ["x numpy", "x numba", "x torch"]
    lines = [head, "", "| " + " | ".join(names) + " |", "|" + "---|" * 4 + "--:|" * 7]
    for row in result["rows"]:
        cells = [str(row[n]) for n in names[:5]] + [f"{row['ms']:.3f}", f"{row['GB/s']:.1f}"]
        share = row["share of read bandwidth"]
        cells.append("" if share is None else f"{share:.0%}")
        cells += ["" if row[n] is None else f"{row[n]:.2g}" if row[n] < 10 else f"{row[n]:.0f}" for n in names[8:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(importlib.import_module("fmn_ref.cli").main(["bench", "metric", *sys.argv[1:]]))
