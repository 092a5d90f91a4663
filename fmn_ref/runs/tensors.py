"""Tensors of checkpoint files, read in parts, and safetensors files, written in parts. torch loads inside functions.

The safetensors library maps a file as a whole and writes what is whole in memory. Parts keep the memory small whatever
the size of a file or of a tensor. docs/reference/formats.md describes what is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .. import _files
from . import torch_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AnyPath = _files.AnyPath
PART = 1 << 20  # elements that are read or written at once: 8 MB in float64
_MOST_HEADER = 100_000_000  # bytes, the library's bound
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder: one file, or an index of that name and shards
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"}
_DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"}
_DTYPES |= {f"{kind}{n}": f"{name}{n}" for kind, name in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)}
_NAMES = {name: short for short, name in _DTYPES.items()}


class FileTensor(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self, start: int, stop: int) -> Tensor:
        """Read elements of the flattened tensor: (stop - start,)."""
        import torch

        content = bytearray((stop - start) * self.dtype.itemsize)
        with _files.reading(self.path, "a safetensors file") as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            if file.readinto(content) != len(content):  # type: ignore[attr-defined]
                raise ValueError("it is too short")
        return torch.frombuffer(content, dtype=self.dtype) if content else torch.empty(0, dtype=self.dtype)


def parts(value: Any) -> Iterator[Tensor]:
    """Read a tensor, or one in a file, in flat parts of at most PART elements."""
    n, read = math.prod(value.shape), getattr(value, "read", None)
    if read is None:
        flat = value.detach().resolve_conj().resolve_neg().reshape(-1)
        read = lambda start, stop: flat[start:stop]  # noqa: E731
    for start in range(0, n, PART):
        yield read(start, min(n, start + PART))


def loaded(value: Any) -> Any:
    """Read a tensor in a file as a whole; other values are returned as they are."""
    return value.read(0, math.prod(value.shape)).reshape(value.shape) if isinstance(value, FileTensor) else value


def is_dense(value: Any) -> bool:
    """Tell whether a value is a tensor with an element for each place, or one in a file."""
    import torch

    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
    return isinstance(value, FileTensor) or (dense and not value.is_meta)


def read_state(path: AnyPath) -> dict[str, Any]:
    """Open the state_dict in a checkpoint without reading the tensors.

    Parameters
    ----------
    path : path
        A file of torch.save or of safetensors, or a folder that holds model.safetensors or pytorch_model.bin, or their
        shards with an index.

    Returns
    -------
    dict
        Tensors of a torch file are mapped to it. Those of a safetensors file are FileTensors.

    Raises
    ------
    FileNotFoundError
        The file or a shard is missing.
    ValueError
        The file is damaged or contains no state_dict.
    """
    source = _files.absolute(path)
    return _read_folder(source) if source.is_dir() else _read_file(source)


def _read_file(path: Path) -> dict[str, Any]:
    with _files.opened(path) as file:
        zipped = file.read(2) == b"PK"
    state = torch_files.load(path, scan=True, mapped=True) if zipped else read_safetensors(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: does not fit: expected a state_dict of tensors, got {type(state).__name__}")
    return state


def _read_folder(folder: Path) -> dict[str, Any]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_file(folder / name)
        if index.is_file():
            return _read_shards(folder, index)
    raise FileNotFoundError(f"{folder}: expected {' or '.join(_WEIGHTS)}, or shards with an index; none is there")


def _read_shards(folder: Path, index: Path) -> dict[str, Any]:
    with _files.reading(index, "an index of shards") as file:
        weight_map = dict(json.loads(file.read())["weight_map"])
        if any(not isinstance(n, str) or re.search(r"[/\\\0]|^\.*$", n) for n in weight_map.values()):
            raise ValueError("a shard is not in its folder")
        os.fsencode("".join(weight_map.values()))  # a name that no file can have
    shards = {name: _read_file(folder / name) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ValueError(f"{folder / shard}: lacks {name}, which {index.name} says is there")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """Read the header, and check that its tensors fill the file without gaps."""
    with _files.reading(path, "a checkpoint of torch or safetensors") as file:
        size = file.seek(0, 2)
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MOST_HEADER):
            raise ValueError("it does not begin as a safetensors file")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            found[name], after = _entry(path, entry, 8 + length), entry["data_offsets"][1]
            if entry["data_offsets"][0] != end:
                raise ValueError(f"there is a gap before {name}")
            end = after
        if end != size - 8 - length:
            raise ValueError(f"its tensors have {end} bytes, and {size - 8 - length} are there")
    return {name: found[name] for name in header}


def _entry(path: Path, entry: dict[str, Any], begin: int) -> FileTensor:
    import torch

    (first, last), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), getattr(torch, _DTYPES[entry["dtype"]])
    if any(type(n) is not int or n < 0 for n in (first, last, *shape)):
        raise ValueError("a shape or an offset is no natural number")
    if math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"a tensor of shape {shape} does not have {last - first} bytes")
    return FileTensor(path, dtype, shape, begin + first)


class NewTensor(NamedTuple):
    """A tensor to write: its name, its form, and a function that yields its flat parts."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, tensors: Iterable[NewTensor], tied: dict[str, str], most: int) -> None:
    """Write model.safetensors, or where it would have more than `most` bytes, shards and their index.

    Parameters
    ----------
    folder : Path
    tensors : iterable of NewTensor
    tied : dict of {str: str}
        Names that stand for another tensor, as the library's `load_model` reads them.
    most : int
        Bytes of a shard. A larger tensor has a shard of its own.

    Raises
    ------
    ValueError
        safetensors has no such dtype. Nothing is written then.
    """
    shards, size = list[list[NewTensor]](), most
    for tensor in tensors:
        if str(tensor.dtype).removeprefix("torch.") not in _NAMES or tensor.name == "__metadata__":
            raise ValueError(f"{tensor.name}: safetensors cannot hold this name with {tensor.dtype}")
        if size + tensor.nbytes > most or not shards:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    n = len(shards)
    names = ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard, tied)
    if n > 1:
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard)}
        _files.write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where})


def _write_safetensors(path: Path, tensors: list[NewTensor], tied: dict[str, str]) -> None:
    """Write the widest types first: then each tensor begins at a multiple of its type's size, as readers need it."""
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    header, end = dict[str, Any](), 0
    names = {t.name for t in tensors}
    header["__metadata__"] = {"format": "pt", **{alias: name for alias, name in tied.items() if name in names}}
    for t in tensors:
        dtype = _NAMES[str(t.dtype).removeprefix("torch.")]
        header[t.name] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            for part in t.parts():
                file.write(_bytes_of(part, t.dtype))

    _files.write_atomic(path, write)


def _bytes_of(part: Tensor, dtype: torch.dtype) -> memoryview:
    import torch

    return part.to(dtype).contiguous().view(torch.uint8).numpy().data
