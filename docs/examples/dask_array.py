"""Accuracy and forget fraction per epoch of a dask.array larger than memory: the sum of its blocks' counts.

    pip install "fmn_ref[dask]"
    python -c 'import numpy as np; np.save("correct.npy", np.random.rand(5, 1001) < 0.6)'   # (n_epochs, n_samples) bool
    python docs/examples/dask_array.py correct.npy

A block must hold all epochs of its samples. `correct.rechunk((-1, "auto"))` makes such blocks.
"""

import argparse

import dask
import dask.array as da
import numpy as np

import fmn_ref as fmn


def forgetting_curves(correct: da.Array) -> fmn.ForgettingCurves:
    """Compute fmn.forgetting_curves of an array in blocks of (all epochs, some samples)."""
    if correct.numblocks[0] != 1:
        raise ValueError("a block must hold all epochs of its samples: rechunk((-1, 'auto'))")
    blocks = correct.to_delayed().ravel()
    return dask.delayed(sum)([dask.delayed(fmn.forgetting_curves)(block) for block in blocks]).compute()


def main() -> None:
    parser = argparse.ArgumentParser(description="accuracy and forget fraction per epoch")
    parser.add_argument("path", help="correct.npy, (n_epochs, n_samples) bool")
    parser.add_argument("--block", type=int, default=1_000_000, help="samples per block")
    args = parser.parse_args()
    try:
        on_disk = np.lib.format.open_memmap(args.path, mode="r")
        curves = forgetting_curves(da.from_array(on_disk, chunks=(-1, args.block)))
    except (OSError, TypeError, ValueError) as error:
        parser.exit(1, f"{args.path}: {error}\n")
    print("epoch accuracy      F_e")
    for epoch, (accuracy, forget) in enumerate(zip(curves.accuracy, curves.forget, strict=True)):
        print(f"{epoch:5} {accuracy:8.6f} {forget:8.6f}")


if __name__ == "__main__":
    main()
