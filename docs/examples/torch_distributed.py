"""Accuracy and forget fraction per epoch of samples on several ranks: each rank counts, all_reduce adds the counts.

    python -c 'import numpy as np; np.save("correct.npy", np.random.rand(5, 1001) < 0.6)'   # (n_epochs, n_samples) bool
    torchrun --nproc-per-node 2 docs/examples/torch_distributed.py correct.npy

Counts are integers, so the curves equal those of one process exactly. Give each sample to one rank only. A
DistributedSampler repeats some samples to make shards of equal size; with drop_last=True it leaves some out instead.
"""

import sys
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

import fmn_ref as fmn


def all_reduce(curves: fmn.ForgettingCurves) -> fmn.ForgettingCurves:
    """Curves of all ranks' samples, on every rank."""
    counts, n_samples = torch.tensor(curves.counts), torch.tensor(curves.n_samples)
    dist.all_reduce(counts)
    dist.all_reduce(n_samples)
    return replace(curves, counts=counts.numpy(), n_samples=int(n_samples), total=int(n_samples))


def main(path: str) -> None:
    dist.init_process_group("gloo")
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    try:
        correct = np.lib.format.open_memmap(path, mode="r")  # reads only the pages that this rank counts
        if correct.ndim != 2 or correct.shape[1] < n_ranks:
            raise ValueError(
                f"expected (n_epochs, n_samples) with a sample for each of {n_ranks} ranks, got {correct.shape}"
            )
        begin, end = (correct.shape[1] * r // n_ranks for r in (rank, rank + 1))
        curves = all_reduce(fmn.forgetting_curves(correct[:, begin:end]))
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    finally:
        dist.destroy_process_group()
    if rank == 0:
        print("epoch accuracy      F_e")
        for epoch, (accuracy, forget) in enumerate(zip(curves.accuracy, curves.forget, strict=True)):
            print(f"{epoch:5} {accuracy:8.6f} {forget:8.6f}")


if __name__ == "__main__":
    main(sys.argv[1])
