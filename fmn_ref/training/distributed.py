"""Several processes, started by torchrun: who this one is, what it takes of a set of samples, and how parts are joined.

Everything is torch.distributed's; without an initialised process group all of this is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def shared(value: Any) -> Any:
    """What the first process has, in all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def by_the_first(function: Callable[[], Any]) -> Any:
    """What the function gives in the first process, in all; its error too, or the others would wait for ever."""
    outcome: tuple[Any, Exception | None] = None, None
    if rank() == 0:
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
    result, fault = shared(outcome)
    if fault is not None:
        raise fault
    return result


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def parallel(model: nn.Module) -> nn.Module:
    """The model with its gradients averaged over the processes."""
    if world_size() == 1 or isinstance(model, DistributedDataParallel):
        return model
    parameter = next(model.parameters(), None)
    on_gpu = parameter is not None and parameter.device.type == "cuda"
    return DistributedDataParallel(model, device_ids=[parameter.device] if on_gpu and parameter is not None else None)


def same_buffers(model: nn.Module) -> None:
    """Running statistics as the first process has them, which are the ones that are stored."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def joined(ids: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Rows of all processes in the order of their sample numbers, each sample once, in every process.

    ids : (n,) int64, of this process's rows; DistributedSampler gives some samples twice to make the parts equal
    parts : (n, ...) tensors
    """
    numbers, where = torch.sort(_gathered(ids), stable=True)
    new = torch.ones_like(numbers, dtype=torch.bool)
    new[1:] = numbers[1:] != numbers[:-1]
    return tuple(_gathered(part)[where[new]] for part in parts)


def _gathered(part: Tensor) -> Tensor:
    """The rows of all processes, one process after the other; they may have different numbers of rows."""
    counts = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(part)], device=part.device))
    longest = int(max(counts))
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(n)] for p, n in zip(parts, counts, strict=True)])
