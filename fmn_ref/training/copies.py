"""Networks for other weights than the original's: a copy that shares nothing with it, or the original itself.

`copy.deepcopy` copies no function. A forward or a hook that was replaced on an instance goes on with the original's
weights, and so does a method that names the network by its global variable. `independent` searches each copy for such
a way back to the original. Where there is one, or where no copy can be made, `InPlace` computes in the original. No
search finds every way: `Watch` looks at the tensors with which a copy computes its first batch.
"""

from __future__ import annotations

import copy
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..runs import adapters, checkpoints
from . import data
from .reachable import named_tensors, reachable, shared_part, storage

logger = logging.getLogger(__name__)
T = TypeVar("T")
_LOCK = threading.RLock()  # one for all networks: they may share modules
_VERSIONS = itertools.count(1 << 20)  # no version that a tensor has had, in an earlier call or by training
_CAUGHT = weakref.WeakSet[nn.Module]()  # networks of which a copy was seen to compute with the original's weights


def independent(model: nn.Module) -> nn.Module:
    """Return a network that computes as `model` does with weights of its own, in evaluation mode.

    It is a copy if `proven_copy` can make one, else `InPlace`. `data.forward` watches the copy's first batch. Networks
    with an adapter share the base.
    """
    if model in _CAUGHT:
        return InPlace(model)
    try:
        copied = proven_copy(model)
    except ValueError as error:
        if adapters.adapter_of(checkpoints.unwrap(model)) is not None:
            raise
        logger.info("%s; its weights are swapped in place", error)
        return InPlace(model)
    if not any(map(_is_compiled, copied.modules())):
        vars(copied)["_fmn_watch"] = Watch(model)
    return copied


def _is_compiled(module: nn.Module) -> bool:
    """Tell whether a module runs code that torch would leave aside, or could not look into, while it is watched."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch.jit.ScriptModule)


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
    storages, memo = {storage(t) for t in stored.values()}, dict[int, Any]()
    for found in reachable(model, *model.buffers()):
        if isinstance(found, np.ndarray) and storage(found) in storages:
            raise ValueError("it keeps an array that shares the memory of its weights")
        if not issubclass(type(found), Tensor):
            continue
        if nn.parameter.is_lazy(found):
            lazy_type: Any = type(found)
            memo[id(found)] = lazy_type(found.requires_grad, found.device, found.dtype)
        elif id(found) not in stored:
            if storage(found) in storages:
                raise ValueError("it keeps a tensor that shares the memory of its weights")
            if not found.is_leaf:
                memo[id(found)] = copy.deepcopy(found.detach(), memo)
    return memo


def duplicate(model: nn.Module) -> nn.Module:
    """Copy a network that `independent` returned; copies of one with an adapter share the base."""
    return copy.deepcopy(model, {id(t): t for _, t in adapters.base_of(model)})


class Watch:
    """Watch of a copy's first batch: with which tensors torch computes, however the code of the copy has found them.

    If there is one of the original's, the copy becomes an `InPlace`. Nothing is changed in the original, and not a bit
    in what the copy computes. Not seen are numbers and arrays that code reads past torch, and compiled code.

    Parameters
    ----------
    original : nn.Module
    """

    def __init__(self, original: nn.Module) -> None:
        self._original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a pickled copy leaves the original behind

    def __call__(self, copied: nn.Module, compute: Callable[[], T]) -> T:
        """Call a function that runs the copy."""
        with _LOCK:
            vars(copied).pop("_fmn_watch", None)
            outcomes, seen = list[T](), _Seeing(self._original)
            try:
                with suppress(Exception), _eager(), seen:  # of the network, or of code that must not be watched
                    outcomes.append(compute())
                if seen.part is not None:
                    self._catch(copied, seen.part)
                if seen.part is not None or not outcomes:
                    outcomes = [compute()]
                return outcomes[0]
            finally:
                if not outcomes:  # after an error: `either_format` may try again
                    vars(copied)["_fmn_watch"] = self

    def _catch(self, copied: nn.Module, part: str) -> None:
        name = type(self._original).__name__
        if adapters.adapter_of(self._original) is not None:
            raise ValueError(f"model: expected a {name} that can be copied, but a copy computes with its {part}")
        logger.info("a copy of the %s computes with %s of the original; its weights are swapped in place", name, part)
        _CAUGHT.add(self._original)
        names = [[n for n, _ in named_tensors(network)] for network in (self._original, copied)]
        if names[0] != names[1]:
            raise ValueError(f"model: the {name} has other layers than when it was copied")
        own = zip(named_tensors(self._original), named_tensors(copied), strict=True)
        stand_in = InPlace(self._original, {id(theirs): t for (_, theirs), (_, t) in own})
        copied.__class__ = InPlace
        vars(copied).clear()
        vars(copied).update(vars(stand_in))


def _eager() -> AbstractContextManager[Any]:
    """Context without compiled code, which cannot be looked into; there is none before torch's compiler is loaded."""
    set_stance: Any = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None or "torch._dynamo" not in sys.modules else set_stance("force_eager")


class _Seeing(TorchDispatchMode):
    """Remember a part of the original with whose tensors torch computes."""

    supports_higher_order_operators = True

    def __init__(self, original: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        base = {storage(t) for _, t in adapters.base_of(original)}  # which copies share
        self._parts = {storage(t): repr(name) for name, t in named_tensors(original) if storage(t) not in base}
        self.part: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would load its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_iter((args, kwargs)):
            if self.part is None and issubclass(type(t), Tensor):
                self.part = self._parts.get(storage(t))
        return func(*args, **(kwargs or {}))


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
    own : dict of {int: Tensor}, optional
        Tensors to use in place of a copy, by the id of the network's.
    """

    def __init__(self, network: nn.Module, own: dict[int, Any] | None = None) -> None:
        super().__init__()
        self._fmn_lent, self._fmn_extra = _Lent(network), _extra_states(network)
        _mirror(network, self, dict(own or {}))
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._fmn_in_place() as network:
            return network(*args, **kwargs)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return what the network's own method makes of these weights."""
        with self._fmn_in_place() as network:
            state = checkpoints.snapshot(network.state_dict())
        if destination is None:
            return state
        versions = getattr(state, "_metadata", {})
        destination.update((prefix + name, value) for name, value in state.items())
        destination._metadata.update((f"{prefix}{name}".strip("."), value) for name, value in versions.items())
        return destination

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take the weights that the network's own method makes of a state."""
        with self._fmn_in_place(keep=True) as network:
            return network.load_state_dict(state_dict, **({} if strict else {"strict": False}))

    @contextmanager
    def _fmn_in_place(self, keep: bool = False) -> Iterator[nn.Module]:
        """Yield the network with these weights in evaluation mode; `keep` what the caller makes of them."""
        network = self._fmn_lent.network
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
            raise ValueError(f"model: a {type(network).__name__} that computes in place cannot be traced or compiled")
        with _LOCK, torch.no_grad(), data.evaluating(network, data.device_of(self)):
            saved, extra = {name: t.clone() for name, t in named_tensors(network)}, _extra_states(network)
            own = dict(named_tensors(self))
            if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in saved.items()}:
                raise ValueError(f"model: the {type(network).__name__} has other layers than when this was made")
            versions = [0 if t.is_inference() else t._version for _, t in named_tensors(network)]
            try:
                _put(own, self._fmn_extra, network)
                _set_versions(network, itertools.repeat(next(_VERSIONS)))
                yield network
                if keep:
                    _put(dict(named_tensors(network)), {}, self)
                    self._fmn_extra = _extra_states(network)
            finally:
                _put(saved, extra, network)
                _set_versions(network, versions)


def _put(values: dict[str, Tensor], extra: dict[str, Any], network: nn.Module) -> None:
    for name, t in named_tensors(network):
        t.data.copy_(values[name])  # unlike t.copy_, it lets a graph that has saved t run backward
    for name, state in extra.items():
        network.get_submodule(name).set_extra_state(checkpoints.snapshot(state))
    checkpoints.drop_derived(network)


def _set_versions(network: nn.Module, versions: Iterable[int]) -> None:
    """Set the counters of changes, by which torch checks a graph, and some networks what they have derived."""
    set_versions: Any = torch._C._autograd._unsafe_set_version_counter
    for (_, t), version in zip(named_tensors(network), versions, strict=False):
        if not t.is_inference():
            try:
                set_versions((t,), (version,))
            except TypeError:  # before torch 2.7
                set_versions(t, version)


def _extra_states(network: nn.Module) -> dict[str, Any]:
    """Copy what modules keep beside tensors, by name of the module."""
    plain = nn.Module.get_extra_state
    modules = {n: m for n, m in network.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    keeps = {n: m for n, m in modules.items() if type(m).get_extra_state is not plain}
    return {name: checkpoints.snapshot(module.get_extra_state()) for name, module in keeps.items()}


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
