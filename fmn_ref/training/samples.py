"""Batches of any form, and what a sample in them is: everything that the network is called with for it.

Fingerprints of that find samples that two data sets share, and a data set that changes its order (order.py).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

_DEPTH = 6  # levels of containers that are searched
_BLOCK = 1024  # words of 4 bytes of a row that are hashed together
_CACHED = 1 << 20  # bytes that are hashed at once on a CPU, so that their products stay near the core
_ODD = -7046029254386353131  # 2^64 divided by the golden ratio, as int64


def moved(batch: Any, device: torch.device) -> Any:
    """Copy a batch with its tensors on the device: tuples, dicts, data classes and objects that have a method `to`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if callable(getattr(batch, "to", None)):
        there = batch.to(device)
        return batch if there is None else there  # it may move itself
    if isinstance(batch, Mapping):
        copied = copy.copy(batch) if isinstance(batch, dict) else dict(batch)
        copied.update((key, moved(value, device)) for key, value in batch.items())
        return copied
    if isinstance(batch, (list, tuple)):
        parts = [moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if is_dataclass(batch) and not isinstance(batch, type):
        same: Any = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(same, field.name, moved(getattr(batch, field.name), device))
        return same
    return batch


class Samples(Dataset[Any]):
    """A sequence of dicts, one for each sample, as a data set. Lists of numbers in them become tensors."""

    def __init__(self, sequence: Any) -> None:
        self._sequence = sequence

    def __len__(self) -> int:
        return len(self._sequence)

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample = self._sequence[i]
        return {key: torch.tensor(v) if isinstance(v, list) else v for key, v in sample.items()}


def as_dataset(data: Any) -> Any:
    """Return `Samples` of a list of dicts, and of a Hugging Face data set; other data as they are.

    A list of dicts may be one of batches too. In a sample, the label is a number, or a part is a list of numbers.
    """
    of_dicts = isinstance(data, Sequence) and all(isinstance(sample, Mapping) for sample in data)
    foreign = type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "__getitem__")
    if not (of_dicts or foreign) or not hasattr(data, "__len__") or not len(data) or not isinstance(data[0], Mapping):
        return data
    label = data[0].get("labels")
    is_number = isinstance(label, (int, np.integer)) or (isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0)
    return Samples(data) if is_number or any(isinstance(v, list) for v in data[0].values()) else data


# --- fingerprints ---


def fingerprints(inputs: Any, n: int, labels: Tensor | None = None, head: int | None = None) -> Tensor:
    """Hash what each of n samples has in `inputs`.

    Parameters
    ----------
    inputs : Any
        Tensors, arrays and lists of texts, in tuples, dicts and other objects. Samples lie along the first or second
        axis, whichever has their number. A part without such an axis counts for every sample of its batch.
    n : int
        Number of labels. Where no axis has it, as with labels of tokens, samples lie along the first axis if it is
        equally long in all tensors.
    labels : (n,) tensor, optional
        Left out where `inputs` holds them beside something else.
    head : int, optional
        Number of samples to look at, the first ones. Default: all.

    Returns
    -------
    (n_samples,) int64 tensor
        On the device of the inputs. Zeros at the end of a sample do not count: padding adds them. Empty where nothing
        can be hashed.
    """
    leaves = _leaves(inputs, n, _DEPTH)
    leaves = [leaf for leaf in leaves if not _equal(leaf, labels)] or leaves
    axes = [_axis(leaf, n) for leaf in leaves]
    rows = [
        leaf.movedim(axis, 0) if axis else leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is not None
    ]
    rest = [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is None]
    if not rows and len({len(t) if t.ndim else None for t in rest}) == 1 and rest[0].ndim:
        rows, rest = rest, []
    hashes = _joined([*(_hash_rows(t[:head]) for t in rows), *(_hash_rows(t[None]) for t in rest)])
    return hashes if rows or not rest else hashes.repeat(n)[:head]


def _leaves(tree: Any, n: int, depth: int, in_object: bool = False) -> list[Tensor]:
    """Find the tensors in a tree; a list of n texts, or of n tensors of other sizes, becomes a tensor of n hashes."""
    if isinstance(tree, np.ndarray):
        tree = _numbers(tree)
    elif isinstance(tree, Tensor) and tree.is_nested:
        tree = list(tree.unbind())
    if isinstance(tree, Tensor):
        return [_plain(tree)]
    is_object = not isinstance(tree, (Mapping, list, tuple))
    if depth == 0 or (is_object and in_object):  # an object may lead to a whole data set
        return []
    leaves = [leaf for part in _parts(tree) for leaf in _leaves(part, n, depth - 1, in_object or is_object)]
    if isinstance(tree, (list, tuple)) and len(tree) == n and not _mostly_rows(leaves, n):
        hashes = [_hash_item(item, depth) for item in tree]
        return [torch.tensor(hashes)] if n and None not in hashes else leaves
    return leaves


def _plain(t: Tensor) -> Tensor:
    """View a sparse or quantized tensor, or one of a class of its own, as torch's dense kind."""
    t = t.detach()
    if t.layout != torch.strided:
        return t.to_dense()
    return t.int_repr() if t.is_quantized else t.as_subclass(Tensor)


def _mostly_rows(leaves: list[Tensor], n: int) -> bool:
    """Tell columns of n samples from a list of n samples, which may have some axes of that length by chance."""
    return 2 * sum(_axis(leaf, n) is not None for leaf in leaves) > len(leaves)


def _numbers(a: Any) -> Any:
    """View an array as a tensor; one of texts or objects becomes a list."""
    if a.dtype.kind not in "biufc":
        return a.tolist()
    a = np.ascontiguousarray(a.astype(a.dtype.newbyteorder("="), copy=False))
    return torch.from_numpy(a if a.flags.writeable else a.copy())


def _parts(tree: Any) -> list[Any]:
    """List what a container or an object holds."""
    if isinstance(tree, Mapping):
        return [tree[key] for key in sorted(tree, key=str)]
    if isinstance(tree, (list, tuple)):
        return list(tree)
    return [] if isinstance(tree, (type, nn.Module)) else list(getattr(tree, "__dict__", {}).values())


def _axis(t: Tensor, n: int) -> int | None:
    """Find the axis of n samples: the first or the second."""
    if t.ndim and t.shape[0] == n:
        return 0
    return 1 if t.ndim > 1 and t.shape[1] == n else None


def _equal(leaf: Tensor, labels: Tensor | None) -> bool:
    if labels is None or leaf.numel() != labels.numel():
        return False
    return bool((leaf.flatten() == labels.flatten().to(leaf.device)).all())


def _hash_item(item: Any, depth: int) -> int | None:
    """Hash one sample's part; None for an object of unknown content."""
    if hasattr(item, "__array_interface__"):  # an image of PIL
        item = _numbers(np.asarray(item))
    if isinstance(item, Tensor):
        return int(_hash_rows(_plain(item)[None]))
    if isinstance(item, (str, bytes, int, float, complex, type(None))):
        content = item if isinstance(item, bytes) else repr(item).encode(errors="backslashreplace")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
    parts = [_hash_item(part, depth - 1) for part in _parts(item)] if depth else []
    known = [torch.tensor([part]) for part in parts if part is not None]
    return int(_joined(known)) if known else None


def _joined(columns: list[Tensor]) -> Tensor:
    """Hash several hashes of each row into one; one of a single row counts for all rows."""
    joined = columns[0] if columns else torch.empty(0, dtype=torch.int64)
    for column in columns[1:]:
        joined = (joined + (joined >> 32)) * _ODD + column.to(joined.device)
    return joined


def _hash_rows(t: Tensor) -> Tensor:
    """Hash each row of a tensor, on its device: (n,) int64. Zeros at the end of a row do not count."""
    content = _bytes_of_rows(t)
    at_once = _CACHED if t.device.type == "cpu" else 64 * _CACHED
    parts = torch.split(content, max(1, at_once // max(1, content.shape[1])))
    return torch.cat([_hash_blocks(part) for part in parts])


def _hash_blocks(content: Tensor) -> Tensor:
    """Hash (n, n_bytes) uint8 in two steps: each block of a row, then the row of these hashes."""
    n_bytes = max(4, content.shape[1])
    missing = -n_bytes % (4 if n_bytes <= 4 * _BLOCK else 4 * _BLOCK) + n_bytes - content.shape[1]
    if missing or content.storage_offset() % 4:
        content = nn.functional.pad(content, (0, missing)).clone()
    words = content.view(torch.int32)
    size = min(words.shape[1], _BLOCK)
    blocks = _weighted(words.view(len(words), words.shape[1] // size, size))
    return _weighted(blocks.add(blocks >> 32).view(torch.int32))


def _weighted(words: Tensor) -> Tensor:
    """Sum up int32 along the last axis, each times a random odd number of its place: int64.

    The low bits of a word get its high ones first: a product of 1.0 or -1.0, whose low bits are zeros, would lose most
    bits of the random number.
    """
    mixed = (words >> 16).add_(words).long()
    return mixed.mul_(_weights(words.shape[-1], words.device)).sum(-1)


def _bytes_of_rows(t: Tensor) -> Tensor:
    """View a tensor as (n, n_bytes) uint8."""
    if t.is_complex():
        t = t.resolve_conj().resolve_neg()
    return (t.flatten(1) if t.ndim > 1 else t[:, None]).contiguous().view(torch.uint8)


def _weights(n: int, device: torch.device) -> Tensor:
    return _many_weights(max(_BLOCK, 1 << (n - 1).bit_length()), device)[:n]


@lru_cache
def _many_weights(n: int, device: torch.device) -> Tensor:
    """Pseudorandom odd numbers (splitmix64), the same in every process: (n,) int64."""
    z = torch.arange(1, n + 1) * _ODD
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ (z >> shift)) * factor
    return (z | 1).to(device)


def tensors_digest(tensors: Iterable[Any]) -> str:
    """Hash the bytes of tensors; other objects are skipped."""
    digest = hashlib.sha256()
    for t in tensors:
        if isinstance(t, Tensor):
            for part in torch.split(t.detach().reshape(1) if t.ndim == 0 else t.detach(), _rows_at_once(t)):
                digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def named_digest(tensors: dict[Any, Any]) -> str:
    """Hash tensors with their names, types and shapes, in the order of the names; other objects are skipped."""
    described = [
        (str(name), str(t.dtype), tuple(t.shape), tensors_digest([t]))
        for name, t in sorted(tensors.items(), key=lambda pair: str(pair[0]))
        if isinstance(t, Tensor)
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _rows_at_once(t: Tensor) -> int:
    """Rows of a tensor that take about 16 MiB: one from a memory map is not read as a whole."""
    return max(1, (16 << 20) * max(1, len(t)) // max(1, t.nbytes)) if t.ndim else 1


def check_batches(data: Any) -> None:
    """Raise a TypeError where data is no iterable of batches."""
    if not hasattr(data, "__iter__") or isinstance(data, (Tensor, np.ndarray, str, Mapping, Iterator)):
        raise TypeError(f"data: expected (inputs, labels), a Dataset or a DataLoader, got {type(data).__name__}")
    plain = isinstance(data, (tuple, list)) and all(isinstance(part, (tuple, list)) for part in data)
    if plain and any(isinstance(item, (int, float)) for part in data for item in part[:1]):
        kinds = " and ".join(type(part).__name__ for part in data[:2])
        raise TypeError(f"data: expected arrays (inputs, labels), got {kinds} of numbers; numpy.array makes arrays")
    if isinstance(data, (tuple, list)) and any(hasattr(part, "shape") or isinstance(part, str) for part in data):
        got = ", ".join(type(part).__name__ for part in data[:4])
        hint = "a torch Dataset of (inputs, label) takes inputs of several parts, and texts"
        raise TypeError(f"data: expected arrays (inputs, labels), got {type(data).__name__} of {got}; {hint}")
