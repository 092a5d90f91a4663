"""Times the metric kernels on every backend that is installed, side by side in one process.

    python benchmarks/metric_throughput.py [--epochs 200] [--samples 1281167]

A row: function, backend, median ms of 7 calls (NumPy: 3), GB/s of correctness bytes (epochs x samples), ratio to NumPy.
Each result is compared with NumPy's before it is timed; inputs are bool bytes (packed bits for the matrix) in memory.
"""

import argparse
import importlib
import platform
import statistics
import time

import numpy as np

import fmn_ref as fmn
from fmn_ref import _backend, _reference


def cpu():
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def median_ms(call, n=7):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--samples", type=int, default=200_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    correct = rng.random((args.epochs, args.samples), np.float32) < 0.7
    packed, groups = np.packbits(correct, axis=1), rng.integers(0, 100, args.samples)
    calls = {
        "curve_counts": lambda k: k.curve_counts(correct, args.epochs - 1),
        "group_counts": lambda k: k.group_counts(correct, args.epochs - 1, groups, 100),
        "sample_counts": lambda k: k.sample_counts(correct),
        "overlap_counts": lambda k: k.overlap_counts(packed),
    }
    b = fmn.backend()
    print(f"{cpu()}, {b.threads} threads, {b.instruction_set}; fmn_ref {fmn.__version__}, NumPy {np.__version__}")
    print(f"{args.epochs} epochs x {args.samples} samples\n")
    print("| function | backend | ms | GB/s | x NumPy |\n|---|---|--:|--:|--:|")
    for name, call in calls.items():
        expected = call(_reference)
        slow = median_ms(lambda call=call: call(_reference), 3)
        for backend, module in _backend._MODULES.items():
            try:
                kernels = importlib.import_module(f"fmn_ref.{module}")
            except ImportError:
                continue
            np.testing.assert_array_equal(call(kernels), expected)
            ms = slow if backend == "numpy" else median_ms(lambda call=call, kernels=kernels: call(kernels))
            print(f"| {name} | {backend} | {ms:.1f} | {correct.size / ms / 1e6:.1f} | {slow / ms:.1f} |")


if __name__ == "__main__":
    main()
