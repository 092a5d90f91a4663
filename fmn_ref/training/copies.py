"""Networks for other weights than the original's: a copy that shares nothing with it, or the original itself.

`copy.deepcopy` copies no function. A forward or a hook that was replaced on an instance goes on with the original's
weights, and so does a method that names the network by its global variable. `independent` searches each copy for such
a way back to the original. Where there is one, or where no copy can be made, `InPlace` computes in the original.
"""

from __future__ import annotations

import copy
import dis
import functools
import gc
import logging
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runs import adapters, checkpoints
from . import data

logger = logging.getLogger(__name__)
_LOCK = threading.RLock()  # one for all networks: they may share modules
_ENDS: tuple[type, ...] = (str, bytes, int, float, complex, type(None), types.ModuleType, types.CodeType)
_ENDS += (types.FrameType, types.TracebackType, logging.Logger)  # log records keep the frames of errors
_ENDS += (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # no part of a network's computation
_HOLDERS: tuple[type, ...] = (nn.Module, Tensor, types.FunctionType, types.MethodType, functools.partial, weakref.ref)
_HOLDERS += (property, staticmethod, classmethod, functools.cached_property)


def independent(model: nn.Module) -> nn.Module:
    """Return a network that computes as `model` does with weights of its own, in evaluation mode.

    It is a copy if `proven_copy` can make one, else `InPlace`. Networks with an adapter share the base.
    """
    try:
        return proven_copy(model)
    except ValueError as error:
        if adapters.adapter_of(checkpoints.unwrap(model)) is not None:
            raise
        logger.info("%s; its weights are swapped in place", error)
        return InPlace(model)


def proven_copy(model: nn.Module) -> nn.Module:
    """Copy a network, in evaluation mode; ValueError if it cannot be copied, or the copy still reaches the original.

    A tensor with a graph that is kept on a module (an activation, the weight that weight_norm computes) is copied
    without its graph.
    """
    name = type(model).__name__
    base = [t for _, t in adapters.base_of(model)]
    try:
        memo = _memo(model) | {id(t): t for t in base}
        with torch.no_grad():  # the tensors of a ScriptModule would be copied with a graph
            copied = copy.deepcopy(model, memo)
    except Exception as error:  # of any object that somebody keeps on a module
        raise ValueError(f"model: expected a network that can be copied, got a {name}: {error}") from None
    for own, original in zip(copied.parameters(), model.parameters(), strict=True):
        own.requires_grad = original.requires_grad
    part = shared_part(copied, model, base)
    if part is not None:
        hint = "a forward, a hook or a method names it"
        raise ValueError(
            f"model: expected a network that can be copied, but the copy uses {part} of the {name}: {hint}"
        )
    return copied.eval()


def _memo(model: nn.Module) -> dict[int, Any]:
    """Copy the tensors that `copy.deepcopy` refuses: those with a graph, and those of a lazy layer that has no shape.

    ValueError for one that it would copy wrongly.
    """
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    storages, memo = {_storage(t) for t in stored.values()}, dict[int, Any]()
    for found in reachable(model, *model.buffers()):
        if not issubclass(type(found), Tensor):
            continue
        if nn.parameter.is_lazy(found):
            lazy_type: Any = type(found)
            memo[id(found)] = lazy_type(found.requires_grad, found.device, found.dtype)
        elif id(found) not in stored:
            if _storage(found) in storages:
                raise ValueError("it keeps a tensor that shares the memory of its weights")
            if not found.is_leaf:
                memo[id(found)] = copy.deepcopy(found.detach(), memo)
    return memo


def duplicate(model: nn.Module) -> nn.Module:
    """Copy a network that `independent` returned; copies of one with an adapter share the base."""
    return copy.deepcopy(model, {id(t): t for _, t in adapters.base_of(model)})


def shared_part(copied: nn.Module, model: nn.Module, base: Iterable[Tensor] = ()) -> str | None:
    """Name a module or a tensor of `model`, outside its base, that code of the copy can reach; None if none."""
    shared, storages_shared = {id(t) for t in base}, {_storage(t) for t in base}
    parts = {id(part): f"{name or 'all'!r}" for name, part in (*model.named_modules(), *_named_tensors(model))}
    parts = {key: name for key, name in parts.items() if key not in shared}
    storages = {_storage(t): f"{name!r}" for name, t in _named_tensors(model) if _storage(t) not in storages_shared}
    for found in reachable(copied, *(t for _, t in _named_tensors(copied))):
        if id(found) in parts:
            return parts[id(found)]
        if issubclass(type(found), Tensor) and _storage(found) in storages:
            return storages[_storage(found)]
    return None


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _storage(t: Tensor) -> int:
    """Address of a tensor's memory, the same for all views; that of the object if it has no memory of its own."""
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
    if not issubclass(kind, type):
        return gc.get_referents(found)
    classes = [c for c in found.__mro__ if issubclass(found, nn.Module) and not _knows_no_network(c.__module__)]
    return [value for c in classes for value in _own_values(vars(c).values(), c.__module__)]


def _knows_no_network(module: str) -> bool:
    root = module.partition(".")[0]
    return root == "torch" or root in sys.stdlib_module_names


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

    These are networks, tensors, methods and the module's own functions and objects. Objects of other libraries are left
    out: from a logger or an import hook, everything in the process can be reached.
    """
    queue, seen = list(values), set[int]()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple, set)):
            queue += value
        elif isinstance(value, _HOLDERS) or module in (getattr(value, "__module__", None), type(value).__module__):
            yield value


@functools.lru_cache(4096)
def _names_read(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the global variables and of the attributes that code reads, with the functions inside."""
    inner = [_names_read(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    variables = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    attributes = frozenset(code.co_names)
    return frozenset(variables).union(*(v for v, _ in inner)), attributes.union(*(a for _, a in inner))


class _Lent:
    """A network that others compute with; copies of them share it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lent:
        return self


class InPlace(nn.Module):
    """Weights of its own for a network that cannot be copied.

    They have the network's names. For each call they are copied into the network; its own are put back afterwards,
    also after an error. Calls of other threads wait. Outputs have no gradients. While a call runs, nobody else may use
    the network.

    Parameters
    ----------
    network : nn.Module
        Its current weights are copied.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._fmn_lent = _Lent(network)
        _mirror(network, self, {})
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._fmn_in_place() as network:
            return network(*args, **kwargs)

    @contextmanager
    def _fmn_in_place(self, keep: bool = False) -> Iterator[nn.Module]:
        """Yield the network with these weights in evaluation mode; `keep` what the caller makes of them."""
        network = self._fmn_lent.network
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
            raise ValueError(f"model: a {type(network).__name__} that computes in place cannot be traced or compiled")
        with _LOCK, torch.no_grad(), data.evaluating(network, data.device_of(self)):
            saved = {name: t.clone() for name, t in _named_tensors(network)}
            own = dict(_named_tensors(self))
            if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in saved.items()}:
                raise ValueError(f"model: the {type(network).__name__} has other layers than when this was made")
            try:
                _put(own, network)
                yield network
                if keep:
                    _put(dict(_named_tensors(network)), self)
            finally:
                _put(saved, network)


def _put(values: dict[str, Tensor], network: nn.Module) -> None:
    for name, t in _named_tensors(network):
        t.data.copy_(values[name])  # unlike t.copy_, it lets a graph that has saved t run backward
    checkpoints.drop_derived(network)


def _mirror(network: nn.Module, target: nn.Module, made: dict[int, Any]) -> None:
    """Give `target` copies of the network's tensors, under its names; what is there twice stays one."""
    target._version = network._version
    for name, p in network.named_parameters(recurse=False, remove_duplicate=False):
        target.register_parameter(name, made.setdefault(id(p), nn.Parameter(p.detach().clone(), p.requires_grad)))
    temporary = getattr(network, "_non_persistent_buffers_set", ())
    for name, b in network.named_buffers(recurse=False, remove_duplicate=False):
        target.register_buffer(name, made.setdefault(id(b), b.detach().clone()), persistent=name not in temporary)
    for name, part in network._modules.items():
        if part is not None:
            if id(part) not in made:
                made[id(part)] = nn.Module()
                _mirror(part, made[id(part)], made)
            target.add_module(name, made[id(part)])
