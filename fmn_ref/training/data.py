"""Batches for training and evaluation, and a model's predictions on them.

Data is a tuple (inputs, labels) of tensors or arrays with one row per sample, a torch Dataset, a list of dicts, or a
DataLoader. A batch is a tuple, or a dict with a key "labels".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .. import _check
from ..runs import checkpoints
from . import distributed, samples
from .logits import TAKE_FORWARD, check_logits, check_pair, conversion_hint
from .memory_format import either_format, set_contiguous
from .order import Listener, Order

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
Augment = Callable[[Tensor], Tensor]
Output = Callable[[Tensor], Tensor]


def default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return (logits, labels) of a batch.

    The batch is (inputs, labels), or a dict of "labels" and the model's keyword arguments. The model returns logits, or
    an object with `.logits`.
    """
    hint = f"pass a forward_fn ({TAKE_FORWARD})"
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            hint = f"rename the labels' key (a Trainer's loader does so), or {hint}"
            raise ValueError(f"batch: expected a key 'labels', got {sorted(batch)}; {hint}")
        output = model(**{k: v for k, v in batch.items() if k != "labels"})
        labels = batch["labels"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        output, labels = model(batch[0]), batch[1]
    else:
        got = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
        raise ValueError(f"batch: expected (inputs, labels) or a dict, got {got}; {hint}")
    if isinstance(labels, (np.ndarray, list, tuple)):
        labels = torch.from_numpy(_check.labels(labels)).to(device_of(model))
    logits = getattr(output, "logits", output)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected integers of shape (n,), got {got}{conversion_hint(labels, logits)}")
    return logits, labels.long()


def forward(model: nn.Module, batch: Any, forward_fn: Forward | None) -> tuple[Tensor, Tensor]:
    """Return (logits, labels) of a batch; a `FusedModel` calls the function for each member."""
    function = default_forward if forward_fn is None else forward_fn
    if hasattr(type(model), "_fmn_in_place"):
        with computing(model) as network:
            return forward(network, batch, forward_fn)
    watch = getattr(model, "_fmn_watch", None)  # of a copy that has not computed yet
    if watch is not None and not (torch.jit.is_tracing() or torch.compiler.is_compiling()):  # type: ignore[attr-defined, no-untyped-call]
        watched: tuple[Tensor, Tensor] = watch(model, partial(forward, model, batch, forward_fn))
        return watched
    ensemble = getattr(type(model), "_fmn_forward_batch", None)
    outcome = function(model, batch) if ensemble is None else ensemble(model, batch, function)
    if not isinstance(outcome, (tuple, list)) or len(outcome) != 2:
        got = f"{len(outcome)} values" if isinstance(outcome, (tuple, list)) else type(outcome).__name__
        raise TypeError(f"forward_fn: expected (logits, labels), got {got}")
    return outcome[0], outcome[1]


def computing(model: nn.Module, keep: bool = False) -> AbstractContextManager[nn.Module]:
    """Context with the network that computes with the model's weights; see `InPlace` for one that is another module."""
    in_place = getattr(type(model), "_fmn_in_place", None)
    return nullcontext(model) if in_place is None else in_place(model, keep)


def augmented(batch: Any, augment: Augment) -> tuple[Any, ...]:
    """Augment the inputs of a batch, its first item."""
    if not isinstance(batch, tuple):
        hint = "augment in the data set, or pass (inputs, labels) and a forward_fn"
        raise TypeError(f"augment: expected batches that are tuples, got {type(batch).__name__}; {hint}")
    return augment(batch[0]), *batch[1:]


def is_arrays(data: Any) -> bool:
    """Tell whether data is a tuple of tensors or arrays, rather than a Dataset or a DataLoader."""
    return isinstance(data, (tuple, list)) and bool(data) and all(hasattr(a, "shape") for a in data)


def as_tensors(data: Any) -> tuple[Tensor, ...]:
    """Convert a tuple of arrays to tensors, on the device where they are; check their lengths and labels."""
    tensors = tuple(_as_tensor(a) for a in data)
    if len(tensors) < 2 or any(t.ndim == 0 or len(t) != len(tensors[0]) for t in tensors) or len(tensors[0]) == 0:
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(f"data: expected (inputs, labels) with one row per sample, not empty, got shapes {shapes}")
    if len(tensors) == 2 and not tensors[1].is_floating_point() and (_check.computable(tensors[1]) < 0).any():
        raise ValueError(f"labels: expected classes from 0, got {int(tensors[1].min())}")  # torch would ignore -100
    return tensors


def _as_tensor(a: Any) -> Tensor:
    """Convert one array; NumPy's float64 becomes torch's default type, which networks have."""
    if isinstance(a, Tensor):
        return a
    a = _check.array(a, "data", kinds="biufc")
    if any(stride < 0 for stride in a.strides) or not a.dtype.isnative:
        a = np.ascontiguousarray(a, a.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of read-only arrays (memory-mapped files); nothing here writes to them
        return torch.as_tensor(a, dtype=torch.get_default_dtype() if a.dtype == np.float64 else None)


def check_module(model: Any, name: str) -> None:
    """Raise a TypeError where `model` is not a torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")


class Batches:
    """Iterable over the batches of a data set, on a device; each iteration is one pass.

    Arrays move to the device once if they take at most half of its free memory, and are shuffled and sliced there.
    Larger arrays, and the samples of a Dataset, move batch by batch. The batches of a DataLoader are used as they are.

    Parameters
    ----------
    data : (inputs, labels), torch Dataset or DataLoader
    batch_size : int
        Over all processes; ignored for a DataLoader.
    device : torch.device
    shuffle : bool, default False
        Draw a new order from torch's global generator in each pass; ignored for a DataLoader.
    split : bool, default False
        Each process takes its part of every batch. A DataLoader must have a DistributedSampler.

    Attributes
    ----------
    source
        What `reseed` takes: the data, or the DataLoader of a stream.
    arrays : tuple of tensors
        On the device if they fit; empty for other data.
    is_split : bool
        This process gets only its part of the data.

    Raises
    ------
    TypeError
        Data of another kind.
    ValueError
        Arrays of different lengths, empty or with negative labels; a `batch_size` that the processes cannot share
        equally; a stream with `split` in several processes.

    Examples
    --------
    >>> data = torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 1])
    >>> [len(labels) for inputs, labels in Batches(data, 2, torch.device("cpu"))]
    [2, 3]
    """

    def __init__(
        self, data: Any, batch_size: int, device: torch.device, *, shuffle: bool = False, split: bool = False
    ) -> None:
        data, self.device, self._batch_size, self._shuffle = samples.as_dataset(data), device, batch_size, shuffle
        self._rank, self._world = (distributed.rank(), distributed.world_size()) if split else (0, 1)
        if shuffle and batch_size % self._world:
            raise ValueError(f"batch_size: expected a multiple of the {self._world} processes, got {batch_size}")
        self.source, self.is_split, self.arrays = data, self._world > 1, tuple[Tensor, ...]()
        if is_arrays(data):
            self.arrays = as_tensors(data)
            size = sum(t.nbytes for t in self.arrays)  # accelerators other than CUDA do not report their free memory
            if device.type == "cuda" and 2 * size <= torch.cuda.mem_get_info(device)[0]:
                self.arrays = tuple(_resident(t, device) for t in self.arrays)
        elif isinstance(data, IterableDataset):
            if self.is_split:
                raise ValueError("data: a stream cannot be split over processes; pass a DataLoader that does it")
            self.source = DataLoader(data, batch_size)
        elif not isinstance(data, Dataset):
            samples.check_batches(data)

    def __iter__(self) -> Iterator[Any]:
        if self.arrays:
            for rows in self._rows():
                taken = (_take(t, rows, self._shuffle or self.is_split, self.device) for t in self.arrays)
                yield tuple(map(_check.computable, taken))
        else:
            for batch in self._loader():
                there = checkpoints.each_tensor(samples.moved(batch, self.device), _check.computable)
                yield tuple(there) if isinstance(there, list) else there

    def _loader(self) -> Iterable[Any]:
        if not isinstance(self.source, Dataset):
            return cast(Iterable[Any], self.source)
        sampler = [rows.tolist() for rows in self._rows()]
        own = torch.Generator()  # the loader would draw from the global one, and change what the model draws
        return DataLoader(self.source, batch_sampler=sampler, generator=own, pin_memory=self.device.type == "cuda")

    def _rows(self) -> list[Tensor]:
        """Draw the row numbers of this process's part of each batch.

        A last batch with less than two samples for each process joins the batch before: BatchNorm cannot train on one
        sample. When shuffled, all processes get equally many samples, so that the mean over processes is the mean over
        the batch; at most world_size - 1 samples are left out of the pass.
        """
        n = len(self.arrays[0] if self.arrays else self.source)
        order = torch.randperm(n) if self._shuffle else torch.arange(n)
        if self._shuffle and self.is_split:
            order = order[: n - n % self._world]
            torch.manual_seed(torch.initial_seed() + self._rank)  # later draws differ between processes
        if self._shuffle and self.arrays:
            order = order.to(self.arrays[0].device)
        rows = list(torch.split(order, self._batch_size))
        if len(rows) > 1 and len(rows[-1]) < 2 * self._world:
            rows[-2:] = [torch.cat(rows[-2:])]
        return [r[self._rank :: self._world] for r in rows]

    def set_contiguous(self) -> bool:
        """Convert images that moved to the device in channels_last format; return whether there were some."""
        arrays = self.arrays
        self.arrays = tuple(t.contiguous() if t.ndim == 4 else t for t in arrays)
        return any(new is not old for new, old in zip(self.arrays, arrays, strict=True))

    def ids(self) -> Tensor:
        """Numbers of the samples that this process gets, in order: (n,) int64, on the device."""
        if self.arrays or isinstance(self.source, Dataset):
            rows = torch.cat(self._rows())
        else:
            batches = getattr(self.source, "batch_sampler", None)
            if batches is None:
                raise ValueError("data: a stream cannot be split over processes; pass arrays or a Dataset")
            rows = torch.tensor([i for batch in batches for i in batch])
        return rows.to(self.device)


def _resident(t: Tensor, device: torch.device) -> Tensor:
    t = t.to(device)
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def _take(t: Tensor, rows: Tensor, scattered: bool, device: torch.device) -> Tensor:
    """Copy rows of an array to the device; rows that are not `scattered` are sliced."""
    if not scattered:
        return t[int(rows[0]) : int(rows[-1]) + 1].to(device, non_blocking=True)
    if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
        taken = t.movedim(1, -1)[rows].movedim(-1, 1)
    else:
        taken = t[rows.to(t.device)]
    if t.device.type == "cpu" and device.type == "cuda":
        taken = taken.pin_memory()
    return taken.to(device, non_blocking=True)


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter, or of the first buffer; the CPU for a model without either."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def evaluating(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Put the model into evaluation mode, on `device` if given; afterwards restore its device and every mode."""
    modes, home = [(m, m.training) for m in model.modules()], device_of(model)
    checkpoints.drop_derived(model)  # an average's weights change without `load_into`
    model.eval()
    try:
        if device is not None:
            model.to(device)
        yield
    finally:
        if device is not None:
            model.to(home)
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
    output: Output | None = None,
    amp: bool = False,
    split: bool = False,
    order: Order | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict a data set; nothing leaves the model's device.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode; afterwards its mode is restored.
    data : (inputs, labels), torch Dataset, DataLoader or Batches
    batch_size : int, default 256
    forward_fn : callable(model, batch) -> (logits, labels), optional
    log : bool, default False
        Return log-probabilities.
    output : callable(logits) -> (n, ...) tensor, optional
        What is returned in place of probabilities, such as `logits.predicted_classes`.
    amp : bool, default False
        Run the network in bfloat16.
    split : bool, default False
        In several processes: each calls this function, evaluates its part, and gets the whole result.
    order : Order, optional
        The passes over the data before this one; a change is an error.

    Returns
    -------
    probabilities : (n_samples, n_classes) float32 tensor
    labels : (n_samples,) int64 tensor

    Raises
    ------
    TypeError, ValueError
        No batch; a batch or a model's output of another kind; probabilities where logits are expected; other samples,
        or another order, than in the first pass.
    """
    if not isinstance(data, Batches):
        data = Batches(data, batch_size, device_of(model), split=split)
    convert, n_classes = output or partial(torch.log_softmax if log else torch.softmax, dim=1), 0

    def output_of(logits: Tensor) -> Tensor:
        nonlocal n_classes
        n_classes = logits.shape[1]
        return convert(logits)

    def predicted() -> tuple[Listener, list[tuple[Tensor, Tensor]]]:
        listener, kind = Listener(order, fixed=bool(data.arrays)), type(model)
        with evaluating(model), computing(model) as network, listener.listening(network):
            parts = list(_predict_batches(network, data, forward_fn, output_of, amp, listener))
        return (listener, parts) if type(model) is kind else predicted()  # it was caught: see `copies.Watch`

    listener, parts = either_format(predicted, partial(set_contiguous, model), data.set_contiguous)
    if not parts:
        raise ValueError("data: expected at least one batch")
    probs, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if order is not None:  # predictions that are judged; soft targets do not use the labels
        _check.labels(labels.cpu(), n_classes=n_classes)
    if data.is_split:
        ids = data.ids()
        if len(ids) != len(labels):
            raise ValueError(f"split: expected one row for each of {len(ids)} samples, got {len(labels)}")
        probs, labels = distributed.gather_rows(ids, probs, labels)
    listener.check(labels, data.is_split)
    return probs, labels


def _predict_batches(
    network: nn.Module, batches: Batches, forward_fn: Forward | None, output: Output, amp: bool, listener: Listener
) -> Iterator[tuple[Tensor, Tensor]]:
    for i, batch in enumerate(batches):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=amp):
            logits, labels = forward(network, batch, forward_fn)
        if i == 0:
            check_logits(logits, f"a forward_fn may convert them ({TAKE_FORWARD})")
        check_pair(logits, labels)
        listener.add(batch, labels)
        yield output(logits.float()), labels


def fingerprints(data: Any) -> set[int]:
    """Hash each sample's inputs, to detect samples that two sets share; no forward_fn."""
    order, nothing, labels = Order(None), _Nothing(), torch.empty(0)
    listener = Listener(order)
    with listener.listening(nothing):
        for batch in Batches(data, 512, torch.device("cpu")):
            labels = default_forward(nothing, batch)[1]
            listener.add(batch, labels)
    listener.check(labels)
    return order.fingerprints


class _Nothing(nn.Module):
    """A network that ignores what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> None: ...


def arrays_digest(data: Any) -> str | None:
    """Hash the labels and about 100 inputs of arrays, as version 1 of targets.json does; None for other kinds."""
    if not is_arrays(data):
        return None
    inputs, *rest = as_tensors(data)
    return samples.tensors_digest([inputs[:: max(1, len(inputs) // 100)], *rest])


def full_digest(data: Any) -> str | None:
    """Hash every input and label of arrays, to detect a run resumed on other data; None for other kinds."""
    return samples.named_digest(dict(enumerate(as_tensors(data)))) if is_arrays(data) else None
