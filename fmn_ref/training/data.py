"""Batches for training and evaluation, and what a model says about them.

Data is either a tuple of tensors or arrays with one row per sample (inputs, labels), which is sliced where it lies, or
a torch DataLoader, or a Dataset. Batches are what those give: tuples, or dicts with a key "labels".
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import distributed

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(logits, labels) of a batch (inputs, labels), or of a dict with "labels" beside the model's keyword arguments."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            hint = "rename it (a Trainer's own loader does), or pass a forward_fn (Run.open takes it)"
            raise ValueError(f"batch: expected a key 'labels', got {sorted(batch)}; {hint}")
        output = model(**{k: v for k, v in batch.items() if k != "labels"})
        labels = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        output, labels = model(batch[0]), batch[1]
    else:
        got = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
        raise ValueError(
            f"batch: expected (inputs, labels) or a dict, got {got}; pass a forward_fn (Run.open takes it)"
        )
    if labels.is_floating_point() or labels.ndim != 1:
        raise TypeError(f"labels: expected integers of shape (n,), got {labels.dtype} of shape {tuple(labels.shape)}")
    return getattr(output, "logits", output), labels.long()


def forward(model: nn.Module, batch: Any, forward_fn: Forward | None) -> tuple[Tensor, Tensor]:
    """(logits, labels); an ensemble runs the function on each of its members (FusedModel)."""
    function = forward_fn or default_forward
    ensemble = getattr(model, "_fmn_forward_batch", None)
    return function(model, batch) if ensemble is None else ensemble(batch, function)


def is_arrays(data: Any) -> bool:
    """Whether data is a tuple of tensors or arrays rather than a Dataset or a DataLoader."""
    return isinstance(data, (tuple, list)) and bool(data) and all(hasattr(a, "shape") for a in data)


def as_tensors(data: Any) -> tuple[Tensor, ...]:
    """The arrays of a tuple as tensors, where they are, checked to be of one length."""
    tensors = tuple(_as_tensor(a) for a in data)
    if len(tensors) < 2 or any(t.ndim == 0 or len(t) != len(tensors[0]) for t in tensors) or len(tensors[0]) == 0:
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(f"data: expected (inputs, labels) with one row per sample, not empty, got shapes {shapes}")
    if len(tensors) == 2 and not tensors[1].is_floating_point() and (tensors[1] < 0).any():
        raise ValueError(f"labels: expected classes from 0, got {int(tensors[1].min())}")  # torch ignores -100
    return tensors


def _as_tensor(a: Any) -> Tensor:
    """NumPy's default float64 becomes torch's default float32, which is what networks have."""
    if isinstance(a, Tensor):
        return a
    a = np.asarray(a)
    if any(stride < 0 for stride in a.strides):
        a = np.ascontiguousarray(a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only array (a memory-mapped file): nothing here writes to it
        return torch.as_tensor(a, dtype=torch.get_default_dtype() if a.dtype == np.float64 else None)


def check_module(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")


class Batches:
    """A data set as batches on a device, pass after pass.

    Arrays that fit are moved there once, and shuffled and sliced there; larger ones stay where they are and follow
    batch by batch, as a Dataset's samples do. A DataLoader is taken as it is.

    shuffle : by torch's global generator, at each pass
    split : each process takes its part of every batch; a DataLoader is expected to have a DistributedSampler
    """

    def __init__(
        self, data: Any, batch_size: int, device: torch.device, *, shuffle: bool = False, split: bool = False
    ) -> None:
        self.device, self._batch_size, self._shuffle = device, batch_size, shuffle
        self._rank, self._world = (distributed.rank(), distributed.world_size()) if split else (0, 1)
        if shuffle and batch_size % self._world:
            raise ValueError(f"batch_size: expected a multiple of the {self._world} processes, got {batch_size}")
        self.source = data
        self._arrays: tuple[Tensor, ...] | None = None
        if is_arrays(data):
            self._arrays = as_tensors(data)
            if device.type != "cpu" and _fits(self._arrays, device):
                self._arrays = tuple(_resident(t, device) for t in self._arrays)
        elif isinstance(data, IterableDataset):
            if self._world > 1:
                raise ValueError("data: a stream cannot be split over processes; pass a DataLoader that does it")
            self.source = DataLoader(data, batch_size)
        elif not isinstance(data, Dataset) and (
            not hasattr(data, "__iter__") or isinstance(data, (Tensor, np.ndarray, str, Iterator))
        ):
            raise TypeError(f"data: expected (inputs, labels), a Dataset or a DataLoader, got {type(data).__name__}")

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """On the device if they fit; none for other data."""
        return self._arrays or ()

    @property
    def is_split(self) -> bool:
        return self._world > 1

    def __iter__(self) -> Iterator[Any]:
        if self._arrays is not None:
            for rows in self._rows(len(self._arrays[0])):
                yield tuple(_take(t, rows, self._shuffle or self._world > 1, self.device) for t in self._arrays)
            return
        loader: Iterable[Any] = self.source
        if isinstance(self.source, Dataset):
            sampler = [rows.tolist() for rows in self._rows(len(self.source))]  # type: ignore[arg-type]
            own = torch.Generator()  # or the loader would draw from the global one, and change what the model draws
            loader = DataLoader(
                self.source, batch_sampler=sampler, generator=own, pin_memory=self.device.type == "cuda"
            )
        for batch in loader:
            yield to_device(batch, self.device)

    def _rows(self, n: int) -> list[Tensor]:
        """Row numbers of this process's part of each batch.

        What is left over joins the last batch where it is a single sample for each process: BatchNorm cannot train on
        one. Shuffled, parts are of equal size, so that the mean over processes is the mean over the batch; fewer
        samples than there are processes sit out.
        """
        order = torch.randperm(n) if self._shuffle else torch.arange(n)
        if self._shuffle and self._world > 1:
            order = order[: n - n % self._world]
            torch.manual_seed(torch.initial_seed() + self._rank)  # what is drawn from here on differs between them
        if self._shuffle and self._arrays is not None:
            order = order.to(self._arrays[0].device)
        rows = list(torch.split(order, self._batch_size))
        if len(rows) > 1 and len(rows[-1]) < 2 * self._world:
            rows[-2:] = [torch.cat(rows[-2:])]
        return [r[self._rank :: self._world] for r in rows]

    def ids(self) -> Tensor:
        """The numbers of the samples that this process is given, in order (n,) int64, on the device."""
        if self._arrays is not None:
            rows = torch.cat(self._rows(len(self._arrays[0])))
        elif isinstance(self.source, Dataset):
            rows = torch.cat(self._rows(len(self.source)))  # type: ignore[arg-type]
        else:
            batches = getattr(self.source, "batch_sampler", None)
            if batches is None:
                raise ValueError("data: a stream cannot be split over processes; pass arrays or a Dataset")
            rows = torch.tensor([i for batch in batches for i in batch])
        return rows.to(self.device)


def _fits(arrays: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether they take at most half of the memory that is free; other accelerators than CUDA do not say."""
    if device.type != "cuda":
        return False
    return 2 * sum(t.nbytes for t in arrays) <= torch.cuda.mem_get_info(device)[0]


def _resident(t: Tensor, device: torch.device) -> Tensor:
    t = t.to(device)
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def _take(t: Tensor, rows: Tensor, scattered: bool, device: torch.device) -> Tensor:
    """Rows of an array on the device; consecutive ones without a copy."""
    if not scattered:
        return t[int(rows[0]) : int(rows[-1]) + 1].to(device, non_blocking=True)
    if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
        taken = t.movedim(1, -1)[rows].movedim(-1, 1)
    else:
        taken = t[rows.to(t.device)]
    if t.device.type == "cpu" and device.type == "cuda":
        taken = taken.pin_memory()
    return taken.to(device, non_blocking=True)


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(v, device) for v in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)  # a namedtuple stays one
    return batch


def reseed(data: Any, seed: int, epoch: int) -> None:
    """Make everything random about one epoch a function of (seed, epoch): what resuming needs."""
    torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)
    batch_sampler = getattr(data, "batch_sampler", None)
    holders: list[Any] = [data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    for holder in holders:
        if isinstance(getattr(holder, "generator", None), torch.Generator):
            holder.generator.manual_seed((seed * 1_000_003 + epoch) % 2**63)
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 256,
    forward_fn: Forward | None = None,
    log: bool = False,
    amp: bool = False,
    split: bool = False,
) -> tuple[Tensor, Tensor]:
    """Probabilities (log: their logarithms) (n_samples, n_classes) float32 and labels (n_samples,), where the model is.

    Nothing leaves the device in between. amp: the network in bfloat16. split: every process calls this, evaluates its
    part, and gets the whole.
    """
    if not isinstance(data, Batches):
        data = Batches(data, batch_size, device_of(model), split=split)
    parts: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for batch in data:
            with torch.autocast(data.device.type, torch.bfloat16, enabled=amp):
                logits, labels = forward(model, batch, forward_fn)
            if not parts:
                check_logits(logits, "a forward_fn may convert them (Run.open takes it)")
            logits = logits.float()
            parts.append((logits.log_softmax(1) if log else logits.softmax(1), labels))
    if not parts:
        raise ValueError("data: expected at least one batch")
    probs, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if data.is_split:
        probs, labels = distributed.joined(data.ids(), probs, labels)
    return probs, labels


def check_logits(logits: Any, hint: str) -> None:
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[-1] < 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits (n, n_classes), got {got}; {hint}")
    if (
        logits.numel()
        and (logits >= 0).all()
        and torch.allclose(logits.float().sum(-1), torch.ones(1, device=logits.device))
    ):
        raise ValueError(f"model: expected logits or log-probabilities, got probabilities; {hint}")


def inputs_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch that are not its labels: the first of a tuple, all of a dict but "labels"."""
    if isinstance(batch, Mapping):
        return [v for k, v in sorted(batch.items()) if k != "labels" and isinstance(v, Tensor)]
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(f"batch: expected a tuple or a dict, got {type(batch).__name__}")
    return [batch[0]]


def fingerprints(data: Any) -> set[bytes]:
    """A hash of each sample's inputs, to notice samples that stand in two sets."""
    seen = set()
    for batch in Batches(data, 512, torch.device("cpu")):
        arrays = [v.detach().contiguous().reshape(len(v), -1).view(torch.uint8).numpy() for v in inputs_of(batch)]
        for row in zip(*arrays, strict=True):
            seen.add(hashlib.blake2b(b"".join(r.tobytes() for r in row), digest_size=16).digest())
    return seen
