"""Order: whether a data set gives the same samples in the same order in every pass; Listener: what one pass gave.

The form of a batch does not matter: a Listener hears what the network is called with, whatever a `forward_fn` makes of
the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from . import distributed
from .samples import fingerprints

logger = logging.getLogger(__name__)
BY_CHANCE = 0.01  # largest share of samples found twice that means nothing: real data holds a few equal images
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_HEAD = 16  # samples of a batch that are looked at in later passes
_WATCHED = {0, *(4**power for power in range(32))}  # batches that are looked at in later passes, beside the last one


class Order:
    """Notice a data set that gives other samples, or another order, than in its first pass.

    The first pass is looked at as a whole, later ones in some places: the first 16 samples of batches 0, 1, 4, 16, 64,
    ... and of the last one. Not noticed are an order that changes together with the inputs (a stream that shuffles and
    augments), a change elsewhere in a later pass (in the middle one of three loaders, say), and samples that are
    exchanged between one process and a later one below equal labels.

    Parameters
    ----------
    data : Any
        What the passes read.
    name : str
        Of the argument, for messages.

    Attributes
    ----------
    labels : (n_samples,) int64 tensor or None
        Of the first pass; None before it.
    wanted : bool
        Whether fingerprints are taken of arrays as well, whose order cannot change. Set it before the first pass.

    Raises
    ------
    ValueError
        Here: a sampler that draws another order in each pass. In `check`: another order.
    """

    def __init__(self, data: Any, name: str = "data") -> None:
        self.labels: Tensor | None = None
        self.wanted = False
        self._first: list[Tensor] = []  # fingerprints of each batch
        self._name, self._warned = name, False
        for sampler in samplers_of(data):
            if isinstance(sampler, RANDOM):
                what = f"a {type(sampler).__name__} draws another order in each pass"
                raise ValueError(f"{name}: {what}; its loader must not shuffle")

    @property
    def n_batches(self) -> int:
        """Number of batches in the first pass."""
        return len(self._first)

    @property
    def fingerprints(self) -> set[int]:
        """Those of all samples."""
        return set(torch.cat(self._first).tolist()) if self._first else set()

    def check(self, labels: Tensor, hashes: list[Tensor | None], split: bool = False) -> None:
        """Compare a pass with the first one; raise a ValueError if the samples or their order differ.

        Parameters
        ----------
        labels : (n_samples,) tensor
        hashes : list of tensors or None
            Fingerprints of the first samples of each batch; None for a batch that was not looked at. An empty list: the
            pass was not.
        split : bool, default False
            The processes have looked at parts of the data; one that finds a fault makes all fail.
        """
        labels, found = labels.cpu().long(), [None if h is None else h.cpu() for h in hashes]
        if self.labels is None:
            self.labels, self._first = labels, [h for h in found if h is not None]
            return
        relabelled = not torch.equal(labels, self.labels)
        if relabelled or (found and distributed.on_any_rank(self._moved(found), split)):
            what = "labels or their order" if relabelled else "the samples or their order"
            raise ValueError(f"{self._name}: {what} changed since the last pass; its loader must not shuffle")

    def _moved(self, found: list[Tensor | None]) -> bool:
        """Tell samples that moved from inputs that are drawn anew in each pass, which are allowed."""
        if len(found) != len(self._first):
            return True
        pairs = [(now, before[: len(now)]) for now, before in zip(found, self._first, strict=True) if now is not None]
        if any(len(now) != len(before) for now, before in pairs):
            return True
        changed = [now[now != before] for now, before in pairs]
        if not any(map(len, changed)):
            return False
        if torch.isin(torch.cat(changed), torch.cat(self._first)).double().mean() > BY_CHANCE:
            return True
        self.warn("gives other inputs in each pass")
        return False

    def warn(self, reason: str) -> None:
        """Log, once, why another order would not be noticed."""
        if not self._warned:
            logger.warning("%s: %s; whether it shuffles cannot be told", self._name, reason)
        self._warned = True


class Listener:
    """Fingerprints of the samples that a network evaluates in one pass.

    Parameters
    ----------
    order : Order or None
        What the pass is compared with; None: no fingerprints are taken.
    fixed : bool, default False
        The data are arrays, which are looked at in the first pass only, if `order.wanted`.
    """

    def __init__(self, order: Order | None, fixed: bool = False) -> None:
        self._order = order
        self._first = order is not None and order.labels is None
        self._active = order is not None and (not fixed or (self._first and order.wanted))
        self._hashes = list[Tensor | None]()
        self._calls = list[Any]()
        self._model: nn.Module | None = None
        self._hook: Any = None

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Listen to what the network is called with; forget what was heard before."""
        self._model = model if self._active else None
        self._hashes.clear()
        self._attach()
        try:
            yield
        finally:
            self._detach()
            self._model = None

    def _attach(self) -> None:
        if self._model is not None and self._hook is None:
            with suppress(RuntimeError):  # a ScriptModule takes no hooks
                self._hook = self._model.register_forward_pre_hook(self._hear, with_kwargs=True)

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._calls.clear()

    def _hear(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls.append({**dict(enumerate(args)), **kwargs})

    def add(self, batch: Any, labels: Tensor) -> None:
        """Take fingerprints of the batch that was just evaluated, if it is watched.

        Where the network itself was not called, but a method of it, the whole batch counts.
        """
        if not self._active:
            return
        hashes = None
        if self._watches(len(self._hashes)):
            hashes = self._fingerprints(dict(enumerate(self._calls)) or batch, labels)
        self._hashes.append(hashes)
        self._calls.clear()
        if self._watches(len(self._hashes)):
            self._attach()
        else:
            self._detach()

    def _fingerprints(self, heard: Any, labels: Tensor) -> Tensor:
        try:
            return fingerprints(heard, len(labels), labels, None if self._first else _HEAD)
        except (RuntimeError, TypeError, ValueError) as error:  # a tensor of a kind for which torch lacks operations
            assert self._order is not None
            self._order.warn(f"holds what has no fingerprint ({error})")
            return torch.empty(0, dtype=torch.int64)

    def _watches(self, number: int) -> bool:
        """Every batch of the first pass; then batches 0, 1, 4, 16, 64, ... and the last one."""
        return self._first or number in _WATCHED or (self._order is not None and number == self._order.n_batches - 1)

    def check(self, labels: Tensor, split: bool = False) -> None:
        """Compare the pass with the first one; see `Order.check`."""
        if self._order is not None:
            self._order.check(labels, self._hashes, split)


def samplers_of(loader: Any) -> list[Any]:
    """Samplers and batch samplers of a DataLoader, and those from which they draw."""
    found, holders = list[Any](), [loader]
    for holder in holders:
        for inner in (getattr(holder, "sampler", None), getattr(holder, "batch_sampler", None)):
            if inner is not None and all(inner is not other for other in found):
                found.append(inner)
                holders.append(inner)
    return found


def reseed(data: Any, seed: int, epoch: int) -> None:
    """Seed torch's global generator and the data's samplers from (seed, epoch): resuming needs the same draws."""
    torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)
    for holder in (data, *samplers_of(data)):
        if isinstance(getattr(holder, "generator", None), torch.Generator):
            holder.generator.manual_seed((seed * 1_000_003 + epoch) % 2**63)
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)
