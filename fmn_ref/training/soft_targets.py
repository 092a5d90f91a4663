"""What the teacher says about the training samples: asked once and kept (cached), once for each of a few augmented
views (cached-views), or on each of the student's batches (online).

Each way gives `fit` the batches of an epoch and a step: (model, batch) -> (logits, (labels, log-probabilities)).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _files
from . import data, distributed

Targets = tuple[Tensor, Tensor]  # labels (B,), the teacher's log-probabilities (B, K)
Augment = Callable[[Tensor], Tensor]
CHUNK = 512  # images of a view that are augmented together, always the same ones


def online(
    teacher: nn.Module, forward_fn: data.Forward | None, student: nn.Module, batch: Any
) -> tuple[Tensor, Targets]:
    """A step that asks the teacher about the student's own batch."""
    logits, labels = data.forward(student, batch, forward_fn)
    with torch.no_grad():
        return logits, (labels, data.forward(teacher, batch, forward_fn)[0].float().log_softmax(1))


class Cached:
    """The teacher's answers on R views of the training samples; epoch e uses view e mod R.

    Parameters
    ----------
    teacher : nn.Module
        On the student's device, in evaluation mode.
    train_data : arrays
    augment : callable, optional
        With it, a view is what it makes of the samples in their order after `torch.manual_seed(seed of the view)`:
        computed anew in each epoch, and the same each time. Without, there is one view, the samples themselves.
    folder : Path, optional
        Where the answers are kept, a NumPy file for each view, read as memory maps, and targets.json, which says what
        they are answers to; default: in memory.
    identity : dict
        What the answers depend on: a folder that was made with another is refused.
    top_k : int, optional
        Keep the k likeliest classes of each sample in 16 bits; what is left is spread evenly over the others.
    """

    def __init__(
        self,
        teacher: nn.Module,
        train_data: Any,
        batch_size: int,
        device: torch.device,
        *,
        augment: Augment | None,
        view_seeds: list[int],
        forward_fn: data.Forward | None,
        folder: Path | None,
        identity: dict[str, Any],
        top_k: int | None,
    ) -> None:
        if folder is not None and distributed.rank() == 0:
            _claim(folder, identity)
        distributed.barrier()
        self._arrays = data.Batches(train_data, batch_size, device).arrays
        self._batch_size, self._device, self._augment = batch_size, device, augment
        self._seeds, self._forward_fn = view_seeds, forward_fn
        self._targets = [self._of_view(teacher, view, folder, top_k) for view in range(len(view_seeds))]

    def _of_view(self, teacher: nn.Module, view: int, folder: Path | None, top_k: int | None) -> tuple[Any, ...]:
        """(log-probabilities (n, K),), or (log-probabilities, classes), both (n, top_k)."""
        names = ["log_probs"] if top_k is None else ["log_probs", "classes"]
        paths = [folder / f"view_{view:05d}.{name}.npy" for name in names] if folder is not None else []
        if not distributed.shared(bool(paths) and all(p.exists() for p in paths)):
            log_probs, _ = data.predict(teacher, self._view(view), forward_fn=self._forward_fn, log=True, split=True)
            found = (log_probs,) if top_k is None else compressed(log_probs, top_k)
            if folder is None:
                return found
            if distributed.rank() == 0:
                for path, array in zip(paths, found, strict=True):
                    _files.write_atomic(path, partial(np.save, arr=array.cpu().numpy()))
            distributed.barrier()
        return tuple(np.load(path, mmap_mode="r") for path in paths)

    def _view(self, view: int) -> tuple[Any, ...]:
        if self._augment is None:
            return self._arrays
        inputs = self._arrays[0]
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._seeds[view])
            augmented = [self._augment(part.to(self._device)) for part in torch.split(inputs, CHUNK)]
        return torch.cat(augmented), *self._arrays[1:]

    def batches(self, epoch: int) -> data.Batches:
        view = epoch % len(self._targets)
        arrays = (*self._view(view), *self._targets[view])
        return data.Batches(arrays, self._batch_size, self._device, shuffle=True, split=True)

    def step(self, student: nn.Module, batch: Any) -> tuple[Tensor, Targets]:
        n = len(self._targets[0])
        logits, labels = data.forward(student, batch[:-n], self._forward_fn)
        log_probs = batch[-1] if n == 1 else expanded(batch[-2], batch[-1], logits.shape[1])
        return logits, (labels, log_probs)


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder with its targets.json, or refuse it."""
    path = folder / "targets.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _files.write_json(path, {"format": "fmn_ref.targets", "version": 1, **identity})
    found = _files.read_json(path, "fmn_ref.targets")
    for key, value in identity.items():
        if found.get(key) != value:
            raise ValueError(f"{key}: the targets in {folder} were made with {found.get(key)!r}, not {value!r}")


def view_seed(seed: int, view: int) -> int:
    """The seed of torch's generator from which a view is drawn."""
    return (seed * 1_000_003 + view) * 2 + 1


def compressed(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (n, k) float16, and where they stand (n, k) int32."""
    top = log_probs.topk(min(k, log_probs.shape[1]))
    return top.values.half(), top.indices.int()


def expanded(values: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """Log-probabilities (n, n_classes) float32 from `compressed` ones; the rest evenly over the other classes."""
    known = values.float()
    left = (1 - known.exp().sum(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    others = max(1, n_classes - values.shape[1])
    return (left / others).log().expand(-1, n_classes).scatter(1, classes.long(), known)
