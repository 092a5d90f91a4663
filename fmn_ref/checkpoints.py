"""Checkpoints on disk: tensors only, written atomically, loaded without running code from the file."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import Any, cast

import torch
from torch import nn

from . import _files


def save_state(model: nn.Module, path: str | os.PathLike[str], *, half: bool = False) -> None:
    """Store `model.state_dict()`, moved to the CPU, under the names of the plain model.

    half: float32 and float64 as float16, but for tensors that hold a number too large for it. `load_into` widens them.
    """
    state = to_cpu(unwrap(model).state_dict())
    if half:
        state.update({name: _halved(value) for name, value in state.items()})
    save(state, path)


def _halved(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
        return value
    small = value.half()
    return small if torch.equal(small.isfinite(), value.isfinite()) else value


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """torch.save that never leaves half a file.

    By way of memory: an interruption or a full disk inside torch.save would surface as an error of its zip writer.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    _files.write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str | os.PathLike[str]) -> Any:
    """What `save` stored, on the CPU.

    Raises
    ------
    FileNotFoundError
    ValueError
        Truncated, damaged (a checksum does not match), not a checkpoint, or a pickle that holds more than tensors and
        plain containers.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums it wrote
            if damaged is not None:
                raise ValueError(f"checksum of {damaged} does not match")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{path}: not a readable checkpoint of tensors: {reason}") from None


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint into `model`; ValueError naming the file where names or shapes do not fit."""
    try:
        unwrap(model).load_state_dict(load(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit the model: {error}") from None
    return model


def to_cpu(content: Any) -> Any:
    """The same nested dicts and lists with every tensor on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.detach().cpu()
    if isinstance(content, dict):
        copied = type(content)((key, to_cpu(value)) for key, value in content.items())
        if hasattr(content, "_metadata"):  # versions of a state_dict's modules
            copied._metadata = content._metadata  # type: ignore[attr-defined]
        return copied
    if isinstance(content, (list, tuple)):
        return type(content)(to_cpu(value) for value in content)
    return content
