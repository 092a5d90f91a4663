"""Speed of the metric on torch tensors of a device, beside the rate at which the device reads its own memory.

    fmn-ref bench metric --device cuda [--epochs 200] [--samples 1281167] [-o FOLDER]

A row is one function on random correctness of the device, by one program:

- kernel: the function of `fmn_ref/kernels/torch.py` on the whole tensor;
- public: the public function, which reads the tensor in blocks; tensors of "cpu" take the host's kernels there;
- the others count the forget fraction, or by group, in another way that torch offers. They show what could be faster.

A call lasts until its counts are on the host. The device reads the same bytes by its fastest reduction, in turns with
the call; ten reductions are queued, so that their launches cost nothing. All results are compared with the host's.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fmn_ref as fmn
from fmn_ref.kernels.backend import import_kernels, kernels
from fmn_ref.reporting.tables import markdown_table

from ..common import check_device, device_name, machine, median_seconds, on_zeros, write_result

N_GROUPS = 100
QUEUED = 10  # reductions between two waits for the device

Array = NDArray[Any]
Calls = dict[str, Callable[[], Any]]
Row = dict[str, Any]


def wait_for(device: str) -> None:
    """Wait until the device has done what was queued."""
    if device == "cuda":
        torch.cuda.synchronize()


def fastest_reading(t: Tensor) -> Callable[[], None]:
    """Make a call that reads the tensor's bytes `QUEUED` times, by the reduction that is fastest here."""
    n_bytes = t.numel() // 8 * 8
    words = t.flatten()[:n_bytes].view(torch.int64)
    reductions: list[Callable[[], Tensor]] = [words.sum, words.amax, words.view(torch.int32).amax]

    def queued(reduction: Callable[[], Tensor]) -> None:
        for _ in range(QUEUED):
            reduction()
        wait_for(t.device.type)

    return min((partial(queued, r) for r in reductions), key=lambda read: median_seconds(read, 0.1))


def in_turns(call: Callable[[], Any], read: Callable[[], None], rounds: int = 9) -> tuple[float, float]:
    """Median seconds of a call, and of reading the tensor once."""
    times = []
    for _ in range(rounds):
        stamps = [time.perf_counter()]
        for timed in (call, read):
            timed()
            stamps.append(time.perf_counter())
        times.append((stamps[1] - stamps[0], (stamps[2] - stamps[1]) / QUEUED))
    ours, reading = (statistics.median(column) for column in zip(*times, strict=True))
    return ours, reading


def sums_of_words(x: Tensor) -> Tensor:
    """Sums of rows of bytes 0 and 1, eight bytes at a time: 255 words are added before a byte could overflow."""
    n = x.shape[1] // (8 * 255) * (8 * 255)
    words = x[:, :n].contiguous().view(torch.int64).view(len(x), -1, 255).sum(2)
    return words.view(torch.uint8).flatten(1).sum(1) + x[:, n:].sum(1)


def ways_to_sum(t: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of (n_epochs, n_samples) bool that sum each row."""
    wide = torch.float16 if t.device.type == "cuda" else torch.float32  # a GPU adds products of 16 bits in 32 bits
    return {
        "int64 sums": lambda x: x.sum(1),
        "int32 sums": lambda x: x.view(torch.uint8).sum(1, dtype=torch.int32),
        "sums of words": lambda x: sums_of_words(x.view(torch.uint8)),
        "float32 sums": lambda x: x.sum(1, dtype=torch.float32) if x.shape[1] < 1 << 24 else x.sum(1),
        "blocks of products": lambda x: sum_by_products(x, wide),
    }


def sum_by_products(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of rows as matrix products with ones; a block of 2048 samples is exact in 16 bits."""
    n = x.shape[1] // 2048 * 2048
    blocks = x[:, :n].reshape(-1, 2048).to(dtype)
    ones = torch.ones(2048, 1, dtype=dtype, device=x.device)
    return (blocks @ ones).view(len(x), -1).long().sum(1) + x[:, n:].sum(1)


def forget_calls(t: Tensor) -> Calls:
    """Ways to count the samples that each epoch has right and the last one wrong."""

    def counted(row_sums: Callable[[Tensor], Tensor], compiled: bool = False) -> Callable[[], Array]:
        def forgotten(x: Tensor) -> Tensor:
            return row_sums(x & ~x[-1])

        # on a CPU, "eager" runs the traced graph without a C++ compiler
        run = torch.compile(forgotten, backend="inductor" if t.is_cuda else "eager") if compiled else forgotten
        return lambda: np.asarray(run(t).long().cpu())

    ways = ways_to_sum(t)
    calls: Calls = {name: counted(way) for name, way in ways.items()}
    for name in ("int64 sums", "int32 sums"):
        calls[f"{name}, compiled"] = counted(ways[name], compiled=True)
    return calls


def group_products(t: Tensor, groups: Tensor) -> Array:
    """Samples that each epoch has right and the last one wrong, by group: products with the groups' indicators."""
    counts = torch.zeros(N_GROUPS, len(t), dtype=torch.int64, device=t.device)
    for part in torch.arange(t.shape[1], device=t.device).split(1 << 18):  # type: ignore[no-untyped-call]
        rows = slice(int(part[0]), int(part[-1]) + 1)
        c = t[:, rows]
        indicators = torch.nn.functional.one_hot(groups[rows], N_GROUPS).float()
        counts += ((c & ~c[-1]).float() @ indicators).long().T
    return np.asarray(counts.cpu())


def cases(t: Tensor, c: Array, groups: Array) -> Iterator[tuple[str, Callable[[], Any], Calls]]:
    """Each function: its name, the host's call, and the calls on the device."""
    host, ours = kernels(), import_kernels("torch")
    n_epochs, n = c.shape
    bits, last, on_device = host.pack(c, n), n_epochs - 1, torch.from_numpy(groups).to(t.device)
    four, by_group, pairs = (4, n_epochs), (4, N_GROUPS, n_epochs), (n_epochs, n_epochs)
    expected = on_zeros(host.curve_counts, four, c, n, last)
    yield "forget fraction", lambda: expected()[1], forget_calls(t)
    calls: Calls = {"kernel": on_zeros(ours.curve_counts, four, t, n, last)}
    yield "four curves", expected, calls | {"public": lambda: fmn.forgetting_curves(t).counts}
    grouped = on_zeros(host.group_sums, by_group, c, n, last, groups, N_GROUPS, None)
    yield "100 groups, forgotten", lambda: grouped()[1], {"products": lambda: group_products(t, on_device)}
    calls = {"kernel": on_zeros(ours.group_sums, by_group, t, n, last, groups, N_GROUPS, None)}
    yield "100 groups", grouped, calls | {"public": lambda: fmn.forgetting_curves(t, groups=groups).counts}
    calls = {"kernel": lambda: ours.sample_counts(t, n)}
    yield "per sample", lambda: host.sample_counts(c, n), calls
    calls = {"kernel": on_zeros(ours.overlap_counts, pairs, t, n)}
    yield "all pairs", on_zeros(host.overlap_counts, pairs, bits, n), calls


def rows_of(t: Tensor, c: Array, groups: Array) -> Iterator[Row]:
    """Check and time each call; a row for each that runs."""
    read = fastest_reading(t)
    for function, host, calls in cases(t, c, groups):
        expected, on_host = host(), median_seconds(host, 0.1)
        for program, call in calls.items():
            try:
                found = call()
                seconds, reading = in_turns(call, read)
            except RuntimeError as error:  # too little memory, or the device lacks an operation: the others go on
                print(f"{function}, {program}: {error}", file=sys.stderr)
                continue
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=f"{function}, {program}")
            row: Row = {"function": function, "program": program, "ms": 1e3 * seconds, "GB/s": c.nbytes / seconds / 1e9}
            row |= {"read GB/s": c.nbytes / reading / 1e9, "share of read bandwidth": reading / seconds}
            yield row | {"host ms": 1e3 * on_host}


def benchmark(epochs: int, samples: int, device: str, output: str | None = None) -> str:
    """Time everything; write metric_tensors.json and metric_tensors.md into `output`; return the Markdown.

    Raises
    ------
    ValueError
        There is no such device.
    """
    check_device(device)
    rng = np.random.default_rng(0)
    c = rng.random((epochs, samples), np.float32) < 0.7
    groups = np.concatenate([np.arange(N_GROUPS), rng.integers(0, N_GROUPS, samples)])[:samples]  # every group, if room
    t = torch.from_numpy(c).to(device)
    result = {
        "format": "fmn_ref.metric-tensors",
        "version": 1,
        "machine": machine() | {"device": device_name(device)},
        "shape": [epochs, samples],
        "rows": list(rows_of(t, c, groups)),
    }
    if output:
        write_result(output, "metric_tensors", result, markdown(result))
    return markdown(result)


def markdown(result: dict[str, Any]) -> str:
    """All rows."""
    head = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    columns = ["function", "program", "ms", "GB/s", "reading GB/s", "share of it", "ms on the host", "x host"]
    rows = [
        [
            *(row[key] for key in ("function", "program")),
            *(f"{row['ms']:.3f}", f"{row['GB/s']:.1f}", f"{row['read GB/s']:.1f}"),
            *(f"{row['share of read bandwidth']:.1%}", f"{row['host ms']:.3f}", f"{row['host ms'] / row['ms']:.2g}"),
        ]
        for row in result["rows"]
    ]
    shape = " x ".join(map(str, result["shape"]))
    return f"{head}\n\nThe metric on {shape} bool values on the device.\n\n{markdown_table(columns, rows, 2)}"
