"""Speed of the metric kernels beside NumPy, numba, torch and NumKong, in one process.

    fmn-ref bench metric [--samples 1281167] [-o benchmarks/results]

metric_tensors.py has the rows of `--device cuda`. metric.cpp is the same benchmark without Python. A row of the table
is one function on one input by one program. It gives the median milliseconds of the calls of half a second (at least
three calls), GB of input per second, and the speedup over the other programs. NumKong counts packed bits; it takes part
where it is installed. For inputs larger than the caches, a row of the compiled kernels also gives its share of the read
bandwidth: the rate at which as many threads read the same bytes, timed in turns with the kernel. All results of a case
are compared with NumPy's before anything is timed. Slower rows are kept.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fmn_ref as fmn
from fmn_ref.kernels.backend import import_kernels
from fmn_ref.reporting.tables import markdown_table

from ..common import machine, median_seconds, on_zeros, write_result
from . import metric_tensors

IN_CACHE = 200, 20_000  # epochs, samples: 4 MB of bytes, half a MB of bits
TONEVA = 200, 50_000
PROGRAMS = ("numpy", "numba", "torch", "numkong")  # that ours is compared with

Array = NDArray[Any]
Call = Callable[[], Any]
Row = dict[str, Any]
Modules = dict[str, Any]  # kernels by the name of their backend


@dataclass
class Case:
    """One function on one input.

    Attributes
    ----------
    function, input : str
        Names in the table.
    size : int
        Bytes that a call reads.
    calls : dict
        A call for each program.
    bandwidth_of : array, optional
        Array that is read for the bandwidth; None: the input fits the caches.
    """

    function: str
    input: str
    size: int
    calls: dict[str, Call] = field(default_factory=dict)
    bandwidth_of: Array | None = None


def share_of_bandwidth(call: Call, size: int, a: Array, threads: int) -> tuple[float, float]:
    """Compare a call's rate with the rate at which as many threads read the array.

    The two are timed in turns, because a machine's rate drifts. Each thread reads an equal part of the array, by
    NumPy's fastest reduction.

    Returns
    -------
    share : float
    read : float
        GB/s of reading.
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


def kernel_modules() -> Modules:
    """Kernels of the backends that are installed."""
    found = {}
    for name in ("cpp", "numba", "numpy"):
        try:
            found[name] = import_kernels(name)
        except ImportError as error:
            print(f"{name}: not installed ({error})", file=sys.stderr)
    if "cpp" not in found:
        raise ImportError("the benchmark needs the compiled kernels: install again with a C++ compiler")
    return found


def numba_forget() -> Callable[[Array], Array]:
    """Compile F_e's counts with numba, on bytes and with rows in parallel: the fastest numba version that we know."""
    import numba

    @numba.njit(parallel=True)
    def forget(c: Any) -> Any:
        counts = np.zeros(len(c), np.int64)
        for e in numba.prange(len(c)):
            n = 0
            for i in range(c.shape[1]):
                n += c[e, i] & (1 - c[-1, i])
            counts[e] = n
        return counts

    return lambda c: np.asarray(forget(c.view(np.uint8)))


def torch_matmul(t: torch.Tensor) -> Array:
    """Overlap counts of all pairs of epochs, as a matrix product in torch."""
    total = torch.zeros((len(t), len(t)), dtype=torch.float64)
    for part in t.split(1 << 17, dim=1):  # type: ignore[no-untyped-call]
        f = part.float()
        total += f @ f.T
    return total.long().numpy()


def numkong_overlaps(bits: Array) -> Call | None:
    """Overlap counts of all pairs from NumKong's Hamming distances, each thread a part of the rows; None without it.

    A row of zeros is at distance |a| from row a, and the overlap of a and b is (|a| + |b| - distance) / 2.
    """
    try:
        import numkong  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    rows = np.concatenate([bits, np.zeros_like(bits[:1])])
    n = len(rows)

    def call() -> Array:
        threads = int(os.environ["FMN_NUM_THREADS"])
        # row i is compared with n - i rows: the bounds cut that triangle into equal parts
        bounds = [round(n - n * (1 - part / threads) ** 0.5) for part in range(threads + 1)]
        out = numkong.zeros((n, n), dtype="uint32")

        def fill(part: int) -> None:
            options = {"dtype": "uint1", "out": out, "start_row": bounds[part], "end_row": bounds[part + 1]}
            numkong.hammings_symmetric(rows, **options)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(threads)))
        distances = np.triu(np.asarray(out).astype(np.int64))
        distances += distances.T
        size = distances[-1, :-1]
        return (size[:, None] + size - distances[:-1, :-1]) // 2

    return call


def forget_case(modules: Modules, c: Array) -> Case:
    """The forget fraction's counts alone."""
    t, last = torch.from_numpy(c), len(c) - 1
    four = on_zeros(modules["cpp"].curve_counts, (4, len(c)), c, c.shape[1], last)
    calls: dict[str, Call] = {"numpy": lambda: (c & ~c[-1]).sum(1), "torch": lambda: (t & ~t[-1]).sum(1).numpy()}
    if "numba" in modules:
        calls["numba"] = partial(numba_forget(), c)
    calls["cpp"] = lambda: four()[1]
    return Case("forget fraction", "bool", c.nbytes, calls, c)


def pairs_case(modules: Modules, c: Array, bits: Array) -> Case:
    """The overlap of all pairs of epochs. NumPy is left out where it would take minutes."""
    n_epochs, n = c.shape
    calls: dict[str, Call] = {
        name: on_zeros(k.overlap_counts, (n_epochs, n_epochs), bits, n)
        for name, k in modules.items()
        if name != "numpy" or n < 2_000_000
    }
    calls["torch"] = partial(torch_matmul, torch.from_numpy(c))
    packed = numkong_overlaps(bits)
    if packed is not None:
        calls["numkong"] = packed
    return Case("all pairs", "bits", bits.nbytes, calls, bits)


def curve_cases(modules: Modules, c: Array, bits: Array, rng: np.random.Generator) -> Iterator[Case]:
    """Cases that count: curves, groups, samples and pairs of epochs."""
    n_epochs, n = c.shape
    last, groups, weights = n_epochs - 1, rng.integers(0, 100, n), rng.random(n)
    of_groups = 4, 100, n_epochs
    yield forget_case(modules, c)
    for kind, rows in (("bool", c), ("bits", bits)):

        def case(name: str, call: Callable[[Any, Array], Call], kind: str = kind, rows: Array = rows) -> Case:
            return Case(name, kind, rows.nbytes, {m: call(k, rows) for m, k in modules.items()}, rows)

        yield case("four curves", lambda k, r: on_zeros(k.curve_counts, (4, n_epochs), r, n, last))
        if kind == "bool":
            yield case("100 groups", lambda k, r: on_zeros(k.group_sums, of_groups, r, n, last, groups, 100, None))
            yield case(
                "100 groups, weighted",
                lambda k, r: on_zeros(k.group_sums, of_groups, r, n, last, groups, 100, weights, dtype=float),
            )
        yield case("per sample", lambda k, r: lambda: k.sample_counts(r, n))
    yield pairs_case(modules, c, bits)


def packing_cases(modules: Modules, c: Array, rng: np.random.Generator) -> Iterator[Case]:
    """Cases that pack correctness, predictions or scores into bits."""
    n_epochs, n = c.shape
    packers = {name: k for name, k in modules.items() if name != "numba"}
    labels = rng.integers(0, 1000, (n,))
    predictions = np.where(c[: max(1, n_epochs // 8)], labels, labels + 1)
    scores = rng.random((max(8, c.size // 4000), 1000), np.float32)
    y = labels[: len(scores)] if len(scores) <= n else rng.integers(0, 1000, len(scores))
    t, yt = torch.from_numpy(scores), torch.from_numpy(y)
    yield Case("pack", "bool", c.nbytes, {m: partial(k.pack, c, n) for m, k in packers.items()}, c)
    by: dict[str, Call] = {m: partial(k.pack_predictions, predictions, labels) for m, k in packers.items()}
    yield Case("pack", "int64 predictions", predictions.nbytes, by, predictions)
    for name, s in (("float32", scores), ("float16", scores.astype(np.float16))):
        by = {m: partial(k.pack_scores, s, y) for m, k in packers.items()}
        if name == "float32":
            by["torch"] = lambda: np.packbits((t.argmax(1) == yt).numpy(), bitorder="little")
        yield Case("pack", f"{name} scores x 1000", s.nbytes, by, s)


def large_case(modules: Modules, epochs: int, samples: int, rng: np.random.Generator) -> Case:
    """Four curves of packed bits larger than the caches: eight times the samples. NumPy checks a corner of it."""
    bits = rng.integers(0, 256, (epochs, samples), np.uint8)
    corner = bits[-8:, :4096]
    ours, numpys = (
        on_zeros(modules[name].curve_counts, (4, len(corner)), corner, 8 * corner.shape[1], len(corner) - 1)()
        for name in ("cpp", "numpy")
    )
    np.testing.assert_array_equal(ours, numpys)
    call = on_zeros(modules["cpp"].curve_counts, (4, epochs), bits, 8 * samples, epochs - 1)
    return Case("four curves", "bits", bits.nbytes, {"cpp": call}, bits)


def loop_of_toneva(c: Array) -> Array:
    """Count forgetting events one sample at a time, as github.com/mtoneva/example_forgetting does."""
    events = np.zeros(c.shape[1], np.int64)
    for i in range(c.shape[1]):
        transitions = np.diff(c[:, i].astype(np.int8))
        events[i] = len(np.where(transitions == -1)[0]) if len(np.where(c[:, i])[0]) > 0 else len(c)
    return events


def whole_function_cases(rng: np.random.Generator) -> Iterator[tuple[Case, str]]:
    """Cases of public functions, checks of the input included; with each, the shape of its input."""
    small, c = rng.random((10, 1000)) < 0.7, rng.random(TONEVA) < 0.7
    calls: dict[str, Call] = {
        "numpy": lambda: (small & ~small[-1]).sum(1) / 1000,
        "cpp": lambda: fmn.forget_fraction(small),
    }
    yield Case("fmn.forget_fraction", "bool", small.nbytes, calls), "10 x 1000"
    calls = {
        "numpy": lambda: loop_of_toneva(c),
        "cpp": lambda: fmn.sample_statistics(c, never_learned="toneva").forgetting_events,
    }
    name = "fmn.sample_statistics (NumPy: mtoneva's loop)"
    yield Case(name, "bool", c.nbytes, calls), " x ".join(map(str, TONEVA))


def check_results(case: Case) -> None:
    """Compare the results of all programs with NumPy's, or with torch's where NumPy has none."""
    expected = case.calls.get("numpy", case.calls.get("torch", lambda: None))()
    for name, call in case.calls.items():
        np.testing.assert_array_equal(np.asarray(call()), np.asarray(expected), err_msg=f"{case.function}, {name}")


def set_threads(threads: int) -> None:
    """Set the number of threads of the kernels, torch and numba."""
    os.environ["FMN_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if "numba" in sys.modules:
        sys.modules["numba"].set_num_threads(threads)


def time_case(case: Case, shape: str, threads: list[int]) -> list[Row]:
    """Rows of one case for each number of threads; NumPy has one thread."""
    seconds: dict[tuple[str, int], float] = {}
    shares: dict[tuple[str, int], tuple[float, float]] = {}
    for t in threads:
        set_threads(t)
        for name, call in case.calls.items():
            if name == "numpy" and t > 1:
                continue
            seconds[name, t] = median_seconds(call)
            if name == "cpp" and case.bandwidth_of is not None:
                shares[name, t] = share_of_bandwidth(call, case.size, case.bandwidth_of, t)
    rows = []
    for (name, t), s in seconds.items():
        row: Row = {"function": case.function, "input": case.input, "shape": shape, "program": name, "threads": t}
        row |= {"ms": 1e3 * s, "GB/s": case.size / s / 1e9}
        row["share of read bandwidth"], row["read GB/s"] = shares.get((name, t), (None, None))
        rows.append(row | speedups(name, t, seconds))
    return rows


def speedups(name: str, threads: int, seconds: dict[tuple[str, int], float]) -> dict[str, float | None]:
    """Speedups of a program over the others on as many threads; NumPy has one."""
    found: dict[str, float | None] = {}
    for other in PROGRAMS:
        theirs = seconds.get((other, 1 if other == "numpy" else threads))
        found[f"x {other}"] = theirs / seconds[name, threads] if theirs and other != name else None
    return found


def matrix_rows(modules: Modules, n_epochs: int, n: int, rng: np.random.Generator, threads: list[int]) -> list[Row]:
    """Rows of all kernels on one random matrix."""
    rows: list[Row] = []
    c = rng.random((n_epochs, n), np.float32) < 0.7
    bits = modules["cpp"].pack(c, n)
    for case in (*curve_cases(modules, c, bits, rng), *packing_cases(modules, c, rng)):
        check_results(case)
        if n == IN_CACHE[1]:
            case.bandwidth_of = None
        rows += time_case(case, f"{n_epochs} x {n}", threads)
        print(f"{case.function}, {case.input}, {n_epochs} x {n}: done", file=sys.stderr)
    return rows


def benchmark(epochs: int, samples: int, output: str | None = None, device: str | None = None) -> dict[str, Any] | str:
    """Time everything; write metric_throughput.json and metric_throughput.md into `output`.

    `epochs` and `samples` are the size of the large matrix. With a `device`, the matrix is a torch tensor there, and
    `metric_tensors` times it.
    """
    if device:
        return metric_tensors.benchmark(epochs, samples, device, output)
    modules, rng = kernel_modules(), np.random.default_rng(0)
    threads = sorted({1, fmn.backend().threads})
    rows = matrix_rows(modules, *IN_CACHE, rng, threads)
    rows += matrix_rows(modules, epochs, samples, rng, threads)
    rows += time_case(large_case(modules, epochs, samples, rng), f"{epochs} x {8 * samples}", threads)
    for case, shape in whole_function_cases(rng):
        check_results(case)
        rows += time_case(case, shape, [1])
    result = {"machine": machine(), "rows": rows}
    if output:
        write_result(output, "metric_throughput", result, markdown(result))
    return result


def summary(result: dict[str, Any]) -> str:
    """The compiled kernels' rows on all threads, as docs/speed.md shows them."""
    columns = ["function", "input", "epochs x samples", "ms", "GB/s", "of read bandwidth"]
    columns += ["x NumPy", "x numba", "x torch", "x NumKong"]
    keys = "function", "input", "shape"
    compiled = [row for row in result["rows"] if row["program"] == "cpp"]
    best = {tuple(row[k] for k in keys): row for row in compiled}  # the last of equal ones: all threads
    rows = [
        [*key, f"{row['ms']:.3g}", f"{row['GB/s']:.1f}", _share_text(row), *_speedup_texts(row)]
        for key, row in best.items()
    ]
    return markdown_table(columns, rows, 3)


def markdown(result: dict[str, Any]) -> str:
    """All rows."""
    head = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    names = ["function", "input", "shape", "program", "threads"]
    columns = [*names, "ms", "GB/s", "reading GB/s", "share of it", *(f"x {name}" for name in PROGRAMS)]
    rows = []
    for row in result["rows"]:
        rate = "" if row["read GB/s"] is None else f"{row['read GB/s']:.1f}"
        numbers = [f"{row['ms']:.3f}", f"{row['GB/s']:.1f}", rate, _share_text(row), *_speedup_texts(row)]
        rows.append([*(str(row[n]) for n in names), *numbers])
    return f"{head}\n\n{markdown_table(columns, rows, 4)}"


def _share_text(row: Row) -> str:
    share = row["share of read bandwidth"]
    return "" if share is None else f"{share:.0%}"


def _speedup_texts(row: Row) -> list[str]:
    values = [row[f"x {name}"] for name in PROGRAMS]
    return ["" if v is None else f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in values]
