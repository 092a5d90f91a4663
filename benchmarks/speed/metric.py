"""Times the metric kernels beside NumPy, numba and torch doing the same, in one process.

    fmn-ref bench metric [--samples 1281167] [-o benchmarks/results]
    python benchmarks/speed/metric.py           the same; metric.cpp is its twin without Python

A row is one function on one input by one program: median ms of the calls of half a second (3 at least), GB/s of the
bytes of input, and how many times as fast as NumPy's, numba's and torch's row it is. Rows of the compiled kernels on
inputs larger than the caches add their share of the bandwidth at which as many threads read the same bytes, timed in
turns. All results of a case are compared with NumPy's before anything is timed; rows that lose are printed like the
others.
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
from fmn_ref.kernels import backend

IN_CACHE = 200, 20_000  # 4 MB of bytes, half a MB of bits
TONEVA = 200, 50_000


@dataclass
class Case:
    """One function on one input; `calls` gives each program's way to compute it, `size` the bytes it reads."""

    function: str
    input: str
    size: int
    calls: dict = field(default_factory=dict)
    bandwidth_of: object = None  # the array whose reading it is compared with; None in cache
    shape: str = ""


def median_seconds(call, seconds=0.5):
    call()
    times = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 2000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def share_of_bandwidth(call, size, a, threads):
    """Rate of the call over the rate at which as many threads read the array, in turns, since a machine's rate drifts.

    Returns that share and the GB/s of reading: NumPy's fastest reduction, an equal part of the array in each thread.
    """
    words = a.reshape(-1).view(np.uint8)
    words = words[: len(words) // (64 * threads) * (64 * threads)].view(np.int64)
    parts = np.split(words, threads)
    with ThreadPoolExecutor(threads) as pool:
        reads = [lambda r=r: list(pool.map(r, parts)) for r in (np.bitwise_xor.reduce, np.max, np.add.reduce)]
        read = min(reads, key=lambda read: median_seconds(read, 0.1))
        rounds = [(median_seconds(call, 0), median_seconds(read, 0)) for _ in range(9)]
    ours, reading = (statistics.median(times) for times in zip(*rounds, strict=True))
    return size / ours * reading / words.nbytes, words.nbytes / reading / 1e9


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
            found[name] = backend.import_kernels(name)
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
    small, c = rng.random((10, 1000)) < 0.7, rng.random(TONEVA) < 0.7
    yield Case(
        "fmn.forget_fraction",
        "bool",
        small.nbytes,
        {"numpy": lambda: (small & ~small[-1]).sum(1) / 1000, "cpp": lambda: fmn.forget_fraction(small)},
        shape="10 x 1000",
    )
    yield Case(
        "fmn.sample_statistics (NumPy: mtoneva's loop)",
        "bool",
        c.nbytes,
        {
            "numpy": lambda: loop_of_toneva(c),
            "cpp": lambda: fmn.sample_statistics(c, never_learned="toneva").forgetting_events,
        },
        shape=" x ".join(map(str, TONEVA)),
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
    seconds, shares, rows = {}, {}, []
    for t in threads:
        set_threads(t)
        for name, call in case.calls.items():
            if name == "numpy" and t > 1:
                continue
            seconds[name, t] = median_seconds(call)
            if name == "cpp" and case.bandwidth_of is not None:
                shares[t] = share_of_bandwidth(call, case.size, case.bandwidth_of, t)
    for (name, t), s in seconds.items():
        row = {"function": case.function, "input": case.input, "shape": shape, "program": name, "threads": t}
        row |= {"ms": 1e3 * s, "GB/s": case.size / s / 1e9}
        measured = name == "cpp" and t in shares
        row["share of read bandwidth"], row["read GB/s"] = shares[t] if measured else (None, None)
        for other in ("numpy", "numba", "torch"):
            theirs = seconds.get((other, 1 if other == "numpy" else t))
            row[f"x {other}"] = theirs / s if theirs and other != name else None
        rows.append(row)
    return rows


def benchmark(epochs, samples, output=None):
    """All rows; written to the folder `output` as Markdown and JSON too."""
    modules, rng, rows = kernel_modules(), np.random.default_rng(0), []
    if "cpp" not in modules:
        raise ImportError("the benchmark needs the compiled kernels: install with a C++ compiler at hand")
    threads = sorted({1, fmn.backend().threads})
    for n_epochs, n in (IN_CACHE, (epochs, samples)):
        c = rng.random((n_epochs, n), np.float32) < 0.7
        bits = modules["cpp"].pack(c, n)
        for case in (*curve_cases(modules, c, bits, rng), *packing_cases(modules, c, rng)):
            verify(case)
            if n == IN_CACHE[1]:
                case.bandwidth_of = None  # in cache: no memory to compare with
            rows += time_case(case, f"{n_epochs} x {n}", threads)
            print(f"{case.function}, {case.input}, {n_epochs} x {n}: done", file=sys.stderr)
    # Bits out of cache need eight times the samples.
    bits = rng.integers(0, 256, (epochs, samples), np.uint8)
    large = Case("four curves", "bits", bits.nbytes, bandwidth_of=bits)
    large.calls["cpp"] = on_zeros(modules["cpp"].curve_counts, (4, epochs), bits, 8 * samples, epochs - 1)
    corner = bits[-8:, :4096]
    corners = [
        on_zeros(k.curve_counts, (4, len(corner)), corner, 8 * corner.shape[1], len(corner) - 1)()
        for k in (modules["cpp"], modules["numpy"])
    ]
    np.testing.assert_array_equal(*corners)
    rows += time_case(large, f"{epochs} x {8 * samples}", threads)
    for case in whole_function_cases(rng):
        verify(case)
        rows += time_case(case, case.shape, [1])
    result = {"machine": machine(), "rows": rows}
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)
        Path(output, "metric_throughput.md").write_text(markdown(result))
        Path(output, "metric_throughput.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


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
    built = {
        "instruction set": b.instruction_set,
        "compiler": importlib.import_module("fmn_ref.kernels._kernels").compiler,
    }
    return {"processor": processor, "cores": os.cpu_count()} | built | versions


def summary(result):
    """The compiled kernels' rows on all threads, as the README shows them."""
    names = [
        "function",
        "input",
        "epochs x samples",
        "ms",
        "GB/s",
        "of read bandwidth",
        "x NumPy",
        "x numba",
        "x torch",
    ]
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|" + "--:|" * 6]
    best = {}
    for row in result["rows"]:
        if row["program"] == "cpp":
            best[row["function"], row["input"], row["shape"]] = row
    for (function, kind, shape), row in best.items():
        cells = [function, kind, shape, f"{row['ms']:.3g}", f"{row['GB/s']:.1f}", percent(row)]
        lines.append("| " + " | ".join([*cells, *ratios(row)]) + " |")
    return "\n".join(lines) + "\n"


def percent(row):
    share = row["share of read bandwidth"]
    return "" if share is None else f"{share:.0%}"


def ratios(row):
    values = [row[f"x {other}"] for other in ("numpy", "numba", "torch")]
    return ["" if v is None else f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in values]


def markdown(result):
    head = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    names = ["function", "input", "shape", "program", "threads", "ms", "GB/s", "reading GB/s", "share of it"]
    names += ["x numpy", "x numba", "x torch"]
    lines = [head, "", "| " + " | ".join(names) + " |", "|" + "---|" * 4 + "--:|" * 8]
    for row in result["rows"]:
        cells = [str(row[n]) for n in names[:5]] + [f"{row['ms']:.3f}", f"{row['GB/s']:.1f}"]
        cells.append("" if row["read GB/s"] is None else f"{row['read GB/s']:.1f}")
        lines.append("| " + " | ".join([*cells, percent(row), *ratios(row)]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(importlib.import_module("fmn_ref.cli").main(["bench", "metric", *sys.argv[1:]]))
