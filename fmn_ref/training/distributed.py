"""Helpers for training in several processes (torchrun), built on torch.distributed.

Without an initialised process group there is one process, of rank 0, and every function returns its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait until every process has reached this call."""
    if world_size() > 1:
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every rank; the value must pickle."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_rank_zero(function: Callable[[], Any]) -> Any:
    """Call the function on rank 0 only, and return its result on every rank.

    An exception is raised on every rank as well: otherwise the other ranks would wait for ever.
    """
    outcome: tuple[Any, Exception | None] = None, None
    if rank() == 0:
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
    result, fault = broadcast(outcome)
    if fault is not None:
        raise fault
    return result


def on_any_rank(fault: bool, split: bool = True) -> bool:
    """Tell whether any process has a fault, so that all can fail together; without `split`, whether this one has."""
    if not split or world_size() == 1:
        return fault
    faults = [False] * world_size()
    dist.all_gather_object(faults, fault)
    return any(faults)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel, which averages gradients over the ranks; unchanged on a single one."""
    if world_size() == 1 or isinstance(model, DistributedDataParallel):
        return model
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return DistributedDataParallel(model, device_ids=list(gpus) or None)


def broadcast_buffers(model: nn.Module) -> None:
    """Overwrite every rank's buffers (BatchNorm's running statistics) with those of rank 0, which are stored."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_rows(ids: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Collect the rows of all ranks, sorted by sample number, each sample once; every rank gets the result.

    Parameters
    ----------
    ids : (n,) int64
        Sample numbers of this rank's rows. DistributedSampler repeats some samples to make the parts equal; the first
        of equal numbers is kept.
    *parts : (n, ...) tensors
        On the same device as `ids`.

    Returns
    -------
    tuple of (n_samples, ...) tensors
        One for each of `parts`.
    """
    numbers, order = torch.sort(_gather(ids), stable=True)
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[1:] = numbers[1:] != numbers[:-1]
    return tuple(_gather(part)[order[first]] for part in parts)


def _gather(part: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, whose numbers of rows may differ."""
    counts = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(part)], device=part.device))
    longest = int(max(counts))
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(n)] for p, n in zip(parts, counts, strict=True)])
