"""Soft targets of a teacher: its log-probabilities for the samples that the student trains on.

"cached" predicts each sample once and keeps the result. "cached-views" does so for each of a few augmented versions
(views) of the samples. "online" predicts every batch of the student.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..runs import checkpoints
from ..runs.folder import AnyPath
from . import data, distributed, samples
from .recipe import Recipe
from .store import IN_FULL
from .target_files import TargetFolder

Targets = tuple[Tensor, Tensor]  # labels (B,), the teacher's log-probabilities (B, K)
CHUNK = 512  # images that are augmented in one call; fixed, because it decides what the generator draws
PROBED = 256  # samples of each stored view that the teacher answers again: the first batch of `predict`
PROBE_TOLERANCE = 0.02  # of a log-probability, absolute and relative: another device may round that much


@dataclass
class SoftTargets:
    """Options for making soft targets, checked against each other.

    Parameters
    ----------
    teacher : nn.Module
    train_data : (inputs, labels), torch Dataset or DataLoader
        Arrays, unless `targets` is "online".
    recipe : Recipe
        Its `batch_size` and `seed` are used.
    targets : {"auto", "cached", "cached-views", "online"}, default "auto"
        "auto" becomes "cached" for arrays without `augment`, else "online".
    views : int, default 1
        For "cached-views": number of augmented versions.
    top_k : int, optional
        Keep the k largest log-probabilities of each sample in 16 bits (`compressed`).
    augment : callable, optional
    forward_fn : callable(model, batch) -> (logits, labels), optional
    folder : path, optional
        Where cached targets are stored; default: in memory.

    Raises
    ------
    ValueError, TypeError
        An option out of range, or one that does not fit the others.
    """

    teacher: nn.Module
    train_data: Any
    recipe: Recipe
    targets: str = "auto"
    views: int = 1
    top_k: int | None = None
    augment: data.Augment | None = None
    forward_fn: data.Forward | None = None
    folder: AnyPath | None = None
    _opened: dict[torch.device, Cached] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check.choice(self.targets, ("auto", "cached", "cached-views", "online"), "targets")
        has_arrays, augmented = data.is_arrays(self.train_data), self.augment is not None
        if self.targets == "auto":
            self.targets = "cached" if has_arrays and not augmented else "online"
        if self.targets != "online" and not has_arrays:
            raise ValueError(f"targets: {self.targets!r} needs train_data as arrays, in an order that does not change")
        if self.targets == "cached" and augmented:
            raise ValueError("targets: 'cached' ignores augmentation; use 'cached-views' or 'online'")
        if self.targets == "cached-views" and not augmented:
            raise ValueError("targets: 'cached-views' needs augment; without it, 'cached' is the same")
        if self.top_k is not None:
            _check.number(self.top_k, 1, 2**31, "top_k", int)
            if self.targets == "online":
                raise ValueError("top_k: compresses cached targets, and 'online' caches none")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Describe what the targets depend on, for run.json."""
        digests = {"data": data.arrays_digest(self.train_data)}
        digests["teacher"] = samples.tensors_digest(self.teacher.state_dict().values())
        seeds = {"view_seeds": self.view_seeds} if self.targets == "cached-views" else {}
        return {"targets": self.targets, "top_k": self.top_k, **digests, **seeds}

    @cached_property
    def full_identity(self) -> dict[str, Any]:
        """Describe it for targets.json: with every input, and every weight and buffer by its name.

        Code is not in it, such as that of `forward_fn`: the teacher's answers are compared instead (`check_answers`).
        """
        teacher = checkpoints.unwrap(self.teacher)
        state = dict(chain(teacher.named_buffers(), teacher.state_dict().items()))
        return self.identity | {"data": data.full_digest(self.train_data), "teacher": samples.named_digest(state)}

    @property
    def identity_in_full(self) -> dict[str, Any]:
        """Entries of run.json beside `identity`."""
        return {f"{name}{IN_FULL}": self.full_identity[name] for name in ("data", "teacher")}

    def answers(self, arrays: tuple[Any, ...]) -> Tensor:
        """The teacher's log-probabilities for the first samples, on the CPU."""
        probe = tuple(a[:PROBED] for a in arrays)
        return data.predict(self.teacher, probe, forward_fn=self.forward_fn, log=True)[0].cpu()

    @property
    def view_seeds(self) -> list[int]:
        """Seeds of torch's generator from which the views are drawn."""
        n = self.views if self.targets == "cached-views" else 1
        return [(self.recipe.seed * 1_000_003 + view) * 2 + 1 for view in range(n)]

    def open(self, device: torch.device) -> Cached | Online:
        """Make the targets, or read stored ones; the teacher must be on the device and in evaluation mode.

        A second call for the same device returns what the first one did.
        """
        if self.targets == "online":
            return Online(self, device)
        if device not in self._opened:
            self._opened[device] = Cached(self, device)
        return self._opened[device]


class Online:
    """Soft targets that the teacher predicts for each of the student's batches.

    With arrays and a folder, its subfolder "online" holds the first answers of the teacher. A teacher that answers
    otherwise is refused, be it because of its `forward_fn`.

    Like `Cached`, it gives `fit` the batches of an epoch, an augmentation, and a step: (model, batch) ->
    (logits, (labels, log-probabilities)).
    """

    def __init__(self, source: SoftTargets, device: torch.device) -> None:
        self._source, self.augment = source, source.augment
        self._batches = data.Batches(source.train_data, source.recipe.batch_size, device, shuffle=True, split=True)
        if self._batches.arrays and source.folder is not None:
            with TargetFolder(Path(source.folder) / "online", source.full_identity, source.identity) as folder:
                distributed.on_rank_zero(lambda: self._compare_answers(folder))
            return
        first = next(iter(data.Batches(source.train_data, source.recipe.batch_size, device)), None)
        if first is not None:  # a teacher without logits is refused before the first epoch
            data.predict(source.teacher, [first], forward_fn=source.forward_fn)

    def _compare_answers(self, folder: TargetFolder) -> None:
        """Compare the teacher's answers with those of the distillation that is resumed; store those of a new one."""
        found, stored = self._source.answers(self._batches.arrays), folder.load(["answers.npy"])
        if stored is None:
            folder.save({"answers.npy": found.numpy()}, found.shape[1])
        else:
            check_answers(found, (torch.tensor(stored[0]),), folder)

    def batches(self, epoch: int) -> data.Batches:
        return self._batches

    def step(self, student: nn.Module, batch: Any) -> tuple[Tensor, Targets]:
        logits, labels = data.forward(student, batch, self._source.forward_fn)
        with torch.no_grad():
            teacher_logits, _ = data.forward(self._source.teacher, batch, self._source.forward_fn)
            return logits, (labels, teacher_logits.float().log_softmax(1))


class Cached:
    """Soft targets on R views of the training samples; epoch e trains on view e mod R.

    With `augment`, a view is what it makes of the samples in their order after `torch.manual_seed(seed of the view)`:
    computed anew in each epoch, with the same result. Without `augment` there is one view, the samples themselves.

    A folder holds a NumPy file for each view, read as a memory map, and targets.json with
    `SoftTargets.full_identity`. A folder of another identity is refused. So is one whose first answers are not those
    that the teacher gives now, because its code, `forward_fn` or `augment` changed.
    """

    augment = None  # batches are augmented already

    def __init__(self, source: SoftTargets, device: torch.device) -> None:
        self._source, self._device, self._n_classes = source, device, 0
        self._arrays = data.Batches(source.train_data, source.recipe.batch_size, device).arrays
        if source.augment is not None:
            self._check_augment()
        views = range(len(source.view_seeds))
        if source.folder is None:
            self._targets: list[tuple[Any, ...]] = [self._predict(self._view(view)) for view in views]
            return
        with TargetFolder(source.folder, source.full_identity, source.identity) as folder:
            self._targets = [self._load_or_predict(folder, view) for view in views]
            self._n_classes = distributed.broadcast(folder.n_classes)

    def _load_or_predict(self, folder: TargetFolder, view: int) -> tuple[Any, ...]:
        """Return (log-probabilities (n, K),), or with top_k (log-probabilities, classes), both (n, top_k)."""
        kinds = ["log_probs"] if self._source.top_k is None else ["log_probs", "classes"]
        names = [f"view_{view:05d}.{kind}.npy" for kind in kinds]
        if not distributed.on_rank_zero(lambda: self._is_stored(folder, names, view)):
            found = self._predict(self._view(view))
            arrays = {name: array.cpu().numpy() for name, array in zip(names, found, strict=True)}
            distributed.on_rank_zero(lambda: folder.save(arrays, self._n_classes))
        return tuple(folder.map(name) for name in names)

    def _is_stored(self, folder: TargetFolder, names: list[str], view: int) -> bool:
        """Tell whether the files are sound; a ValueError if they hold other answers than the teacher gives."""
        stored = folder.load(names)
        if stored is None:
            return False
        found = self._source.answers(self._view(view, CHUNK))
        check_answers(found, tuple(torch.tensor(a[:PROBED]) for a in stored), folder)
        return True

    def _check_augment(self) -> None:
        """Refuse an augmentation that makes other views of the same samples for the same seed."""
        first, again = (self._view(0, CHUNK)[0] for _ in range(2))
        same = first.shape == again.shape and first.is_floating_point() and torch.allclose(first, again, equal_nan=True)
        if not (same or torch.equal(first, again)):
            cause = "it must draw from torch's generators alone, and keep no state; or use targets='online'"
            raise ValueError(f"augment: 'cached-views' cannot repeat what it makes of the same samples: {cause}")

    def _predict(self, arrays: tuple[Any, ...]) -> tuple[Tensor, ...]:
        source = self._source
        log_probs, _ = data.predict(source.teacher, arrays, forward_fn=source.forward_fn, log=True, split=True)
        self._n_classes = log_probs.shape[1]
        return (log_probs,) if source.top_k is None else compressed(log_probs, source.top_k)

    def _view(self, view: int, n: int | None = None) -> tuple[Any, ...]:
        """Arrays of one view: the inputs, augmented if there is an augmentation, and the others unchanged.

        With `n`, a multiple of CHUNK, the first n rows.
        """
        augment, arrays = self._source.augment, tuple(a[:n] for a in self._arrays)
        if augment is None:
            return arrays
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._source.view_seeds[view])
            augmented = [augment(part.to(self._device)) for part in torch.split(arrays[0], CHUNK)]
        return torch.cat(augmented), *arrays[1:]

    def batches(self, epoch: int) -> data.Batches:
        view = epoch % len(self._targets)
        arrays = (*self._view(view), *self._targets[view])
        return data.Batches(arrays, self._source.recipe.batch_size, self._device, shuffle=True, split=True)

    def step(self, student: nn.Module, batch: Any) -> tuple[Tensor, Targets]:
        n = len(self._targets[0])
        logits, labels = data.forward(student, batch[:-n], self._source.forward_fn)
        log_probs = batch[-1] if n == 1 else expanded(batch[-2], batch[-1], self._n_classes)
        return logits, (labels, log_probs)


def check_answers(found: Tensor, stored: tuple[Tensor, ...], folder: TargetFolder) -> None:
    """Raise a ValueError where the teacher answers otherwise than is stored: log-probabilities and, cut, classes."""
    log_probs, *classes = stored
    same = found.shape[1] == folder.n_classes
    if same:
        found = found.gather(1, classes[0].long()) if classes else found
        same = torch.allclose(log_probs.float(), found, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE)
    if not same:
        cause = "its code, forward_fn or augment is another; choose another folder"
        raise ValueError(f"teacher: gives other answers than the targets in {folder.path}: {cause}")


def compressed(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row (n, k) as float16, and their classes (n, k) as int32."""
    top = log_probs.topk(min(k, log_probs.shape[1]))
    return top.values.half(), top.indices.int()


def expanded(values: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """Restore log-probabilities (n, n_classes) float32 from `compressed`; the other classes share the rest equally."""
    known = values.float()
    rest = (1 - known.exp().sum(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    others = max(1, n_classes - values.shape[1])
    return (rest / others).log().expand(-1, n_classes).scatter(1, classes.long(), known)
