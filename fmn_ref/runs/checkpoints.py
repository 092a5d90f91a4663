"""Checkpoints on disk: tensors only, written atomically, loaded without running code from the file.

torch is imported inside the functions, so that runs without torch checkpoints do not need it.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .. import _files
from .folder import AnyPath

if TYPE_CHECKING:
    from torch import Tensor, nn


def save_state(model: nn.Module, path: AnyPath, *, half: bool = False) -> None:
    """Store `model.state_dict()` under the names that the model has without torch.compile.

    Parameters
    ----------
    model : nn.Module
    path : path
    half : bool, default False
        Store float32 and float64 as float16, except tensors that hold a number too large for it. `load_into` converts
        them back.
    """
    save_weights(unwrap(model).state_dict(), path, half=half)


def save_weights(state: dict[str, Any], path: AnyPath, *, half: bool = False) -> None:
    """Store a state_dict; see `save_state`."""
    state = _renamed(to_cpu(state), {})
    if half:
        state.update({name: _halved(value) for name, value in state.items()})
    save(state, path)


def _uncompiled(name: Any) -> Any:
    """Remove the prefix that torch.compile puts into the names of a part."""
    return re.sub(r"\b_orig_mod\.|\._orig_mod$", "", name) if isinstance(name, str) else name


def _renamed(state: Any, own: Any) -> Any:
    """Give a state_dict the names of `own`, from the same model with other parts compiled; else uncompiled names."""
    if not isinstance(state, dict) or all(name == _uncompiled(name) for name in (*state, *own)):
        return state
    names = {_uncompiled(name): name for name in own}
    renamed: Any = OrderedDict((names.get(_uncompiled(n), _uncompiled(n)), value) for n, value in state.items())
    versions = {_uncompiled(name): value for name, value in getattr(state, "_metadata", {}).items()}
    modules = getattr(own, "_metadata", None) or versions
    renamed._metadata = {name: versions[_uncompiled(name)] for name in modules if _uncompiled(name) in versions}
    return renamed


def _halved(value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
        return value
    small = value.half()
    return small if torch.equal(small.isfinite(), value.isfinite()) else value


def unwrap(model: Any) -> nn.Module:
    """Return the model inside torch.compile, DataParallel and DistributedDataParallel."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model  # type: ignore[no-any-return]


def save(content: Any, path: AnyPath) -> None:
    """Write `content` as torch.save does, but whole or not at all.

    The file is built in memory: torch.save reports an interruption or a full disk as an error of its zip writer.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    _files.write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def load(path: AnyPath) -> Any:
    """Load a file that `save` wrote, to the CPU.

    Raises
    ------
    FileNotFoundError
    ValueError
        The file is truncated or damaged (a checksum does not match), is no checkpoint, or is a pickle that holds more
        than tensors and plain containers.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums it wrote
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a readable checkpoint of tensors: {reason[0]}") from None


def load_into(model: nn.Module, path: AnyPath) -> nn.Module:
    """Load a checkpoint into `model`; ValueError, which names the file, if names or shapes do not fit."""
    inner, state = unwrap(model), load(path)
    try:
        inner.load_state_dict(_renamed(state, inner.state_dict()))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit the model: {error}") from None
    drop_derived(inner)
    return model


def drop_derived(model: nn.Module) -> None:
    """Let a model drop what it has derived from its weights; those that keep it for evaluation drop it in `train()`."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def to_cpu(content: Any, *, copy: bool = False) -> Any:
    """Copy nested dicts and lists with every tensor moved to the CPU; `copy` copies those that are there already."""
    return each_tensor(content, lambda t: t.detach().to("cpu", copy=copy))


def snapshot(content: Any) -> Any:
    """Copy nested dicts and lists with a copy of every tensor, on its device."""
    return each_tensor(content, lambda t: t.detach().clone())


def each_tensor(content: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested dicts, lists and tuples with `function` applied to every tensor."""
    import torch

    if isinstance(content, torch.Tensor):
        return function(content)
    if isinstance(content, Mapping):
        copied = copy.copy(content) if isinstance(content, dict) else dict(content)  # with a state_dict's _metadata
        for key, value in content.items():
            copied[key] = each_tensor(value, function)
        return copied
    if isinstance(content, (list, tuple)):
        parts = [each_tensor(value, function) for value in content]
        return type(content)(*parts) if hasattr(content, "_fields") else type(content)(parts)
    return content
