"""Checkpoints on disk: tensors only, written atomically, loaded without running code from the file."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from .. import _files


def save_state(model: nn.Module, path: str | os.PathLike[str], *, half: bool = False) -> None:
    """Store `model.state_dict()`, moved to the CPU, under the names of the plain model, compiled parts or not.

    half: float32 and float64 as float16, but for tensors that hold a number too large for it. `load_into` widens them.
    """
    save_weights(unwrap(model).state_dict(), path, half=half)


def save_weights(state: dict[str, Any], path: str | os.PathLike[str], *, half: bool = False) -> None:
    """Store a state_dict, as `save_state`."""
    state = _renamed(to_cpu(state), {})
    if half:
        state.update({name: _halved(value) for name, value in state.items()})
    save(state, path)


def _plain(name: Any) -> Any:
    """Without what torch.compile puts into the names of a part."""
    return re.sub(r"\b_orig_mod\.|\._orig_mod$", "", name) if isinstance(name, str) else name


def _renamed(state: Any, own: Any) -> Any:
    """A state_dict under the names that `own` has, of the same model with other parts compiled; else plain names."""
    if not isinstance(state, dict) or all(name == _plain(name) for name in (*state, *own)):
        return state
    names = {_plain(name): name for name in own}
    renamed: Any = OrderedDict((names.get(_plain(name), _plain(name)), value) for name, value in state.items())
    versions = {_plain(name): value for name, value in getattr(state, "_metadata", {}).items()}
    modules = getattr(own, "_metadata", None) or versions
    renamed._metadata = {name: versions[_plain(name)] for name in modules if _plain(name) in versions}
    return renamed


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


def check(path: str | os.PathLike[str]) -> None:
    """ValueError that names the file if it is no zip archive, cut short, or a checksum does not match."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums it wrote
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, NotImplementedError) as error:
        raise _unreadable(path, error) from None
    if damaged is not None:
        raise _unreadable(path, f"checksum of {damaged} does not match")


def _unreadable(path: str | os.PathLike[str], error: Exception | str) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"{path}: not a readable checkpoint of tensors: {lines[0]}")


def load(path: str | os.PathLike[str]) -> Any:
    """What `save` stored, on the CPU.

    Raises
    ------
    FileNotFoundError
    ValueError
        Truncated, damaged (a checksum does not match), not a checkpoint, or a pickle that holds more than tensors and
        plain containers.
    """
    check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from None


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint into `model`; ValueError naming the file where names or shapes do not fit."""
    plain, state = unwrap(model), load(path)
    try:
        plain.load_state_dict(_renamed(state, plain.state_dict()))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit the model: {error}") from None
    return model


def to_cpu(content: Any, *, copy: bool = False) -> Any:
    """The same nested dicts and lists with every tensor on the CPU; copy: those that are there already, too."""
    return _each_tensor(content, lambda t: t.detach().to("cpu", copy=copy))


def snapshot(content: Any) -> Any:
    """The same nested dicts and lists with a copy of every tensor, on its device."""
    return _each_tensor(content, lambda t: t.detach().clone())


def _each_tensor(content: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(content, torch.Tensor):
        return function(content)
    if isinstance(content, dict):
        copied = type(content)((key, _each_tensor(value, function)) for key, value in content.items())
        if hasattr(content, "_metadata"):  # versions of a state_dict's modules
            copied._metadata = content._metadata  # type: ignore[attr-defined]
        return copied
    if isinstance(content, (list, tuple)):
        return type(content)(_each_tensor(value, function) for value in content)
    return content
