"""Search of what a copy of a network can reach: its code may lead back to the original, or to its tensors."""

from __future__ import annotations

import dis
import functools
import gc
import logging
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ENDS: tuple[type, ...] = (str, bytes, int, float, complex, type(None), types.ModuleType, types.CodeType)
_ENDS += (types.FrameType, types.TracebackType, logging.Logger)  # log records keep the frames of errors
_ENDS += (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # no part of a network's computation
_HOLDERS: tuple[type, ...] = (nn.Module, Tensor, types.FunctionType, types.MethodType, functools.partial, weakref.ref)
_HOLDERS += (property, staticmethod, classmethod, functools.cached_property, np.ndarray)
_CONTAINERS = ("argparse", "collections", "types", "weakref")  # modules of the standard library with containers


def shared_part(copied: nn.Module, model: nn.Module, base: Sequence[Tensor] = ()) -> str | None:
    """Name a module or a tensor of `model`, outside its base, that code of the copy can reach; None if none."""
    shared = {storage(t) for t in base}
    own = [(name, t) for name, t in named_tensors(model) if storage(t) not in shared]
    parts = {id(part): f"{name or 'all'!r}" for name, part in (*model.named_modules(), *own)}
    storages = {storage(t): f"{name!r}" for name, t in own}
    for found in reachable(copied, *(t for _, t in named_tensors(copied))):
        if id(found) in parts:
            return parts[id(found)]
        if issubclass(type(found), (Tensor, np.ndarray)) and storage(found) in storages:
            return storages[storage(found)]
    return None


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the names and tensors of a network: parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]


def storage(t: Any) -> int:
    """Address of the memory of a tensor or array, the same for all views; of the object if it has none of its own."""
    if isinstance(t, np.ndarray):
        return storage(t.base) if isinstance(t.base, (np.ndarray, Tensor)) else int(t.ctypes.data)
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, lazy and wrapped tensors
        return id(t)


def reachable(*roots: object) -> Iterator[Any]:
    """Yield each object that the roots and their code can reach through attributes, containers and variables."""
    seen, queue = dict[int, object](), list(roots)
    while queue:
        found = queue.pop()
        if id(found) not in seen and not issubclass(type(found), _ENDS):
            seen[id(found)] = found
            yield found
            queue += _next_to(found)


def _next_to(found: Any) -> list[Any]:
    kind = type(found)
    if issubclass(kind, types.FunctionType):
        return [found.__closure__, found.__defaults__, found.__kwdefaults__, vars(found), *_globals_of(found)]
    if issubclass(kind, weakref.ref):
        return [found()]
    if issubclass(kind, np.ndarray):
        return [found.base, *(found.flat if found.dtype.hasobject else ())]
    if not issubclass(kind, type):
        return gc.get_referents(found)
    classes = [c for c in found.__mro__ if issubclass(found, nn.Module) and not _knows_no_network(c.__module__)]
    return [value for c in classes for value in _own_values(vars(c).values(), c.__module__)]


def _root(module: Any) -> str:
    """Name of a module's package."""
    return str(module).partition(".")[0]


def _knows_no_network(module: str) -> bool:
    return _root(module) == "torch" or _root(module) in sys.stdlib_module_names - {"__main__"}


def _globals_of(function: types.FunctionType) -> Iterator[Any]:
    """Values of the global variables that a function reads, also as attributes of modules."""
    known = function.__globals__
    if _knows_no_network(known.get("__name__", "")):
        return
    names, attributes = _names_read(function.__code__)
    values = [known[name] for name in names if name in known]
    yield from _own_values(values, known.get("__name__", ""))
    for module in values:
        if isinstance(module, types.ModuleType) and not _knows_no_network(module.__name__):
            yield from _own_values([v for name, v in vars(module).items() if name in attributes], module.__name__)


def _own_values(values: Iterable[Any], module: str) -> Iterator[Any]:
    """Select the values of variables of a Python module that may hold a network, also in containers.

    These are networks, tensors, arrays, methods, and functions and objects of the module's package. Those of others are
    left out: from a logger or an import hook, everything in the process can be reached.
    """
    queue, seen, package = list(values), set[int](), _root(module)
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple, set)):
            queue += value
        elif type(value).__module__ in _CONTAINERS:
            queue += gc.get_referents(value)
        elif isinstance(value, _HOLDERS) or package in map(
            _root, (getattr(value, "__module__", None), type(value).__module__)
        ):
            yield value


@functools.lru_cache(4096)
def _names_read(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the global variables and of the attributes that code reads, with the functions inside."""
    inner = [_names_read(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    variables = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    attributes = frozenset(code.co_names)
    return frozenset(variables).union(*(v for v, _ in inner)), attributes.union(*(a for _, a in inner))
