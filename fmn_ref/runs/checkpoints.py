"""Checkpoints on disk: tensors and plain values only, written atomically with a checksum, loaded without running code.

torch is imported inside the functions, so that runs without torch checkpoints do not need it.
"""

from __future__ import annotations

import copy
import io
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _files
from . import adapters, archive, references
from .folder import AnyPath
from .torch_files import load as load
from .torch_files import reason

if TYPE_CHECKING:
    from torch import Tensor, nn

ROUNDING = 2.0**-11  # relative error of 16 bits
DEEPEST = 100  # parts within parts of a state: Python bounds the depth of the recursions that store and read it
_PLAIN = (type(None), bool, float, str)  # `load` reads them back, and integers


def save_state(model: nn.Module, path: AnyPath, *, half: bool = False) -> None:
    """Store `model.state_dict()` under the names that the model has without torch.compile; of a PeftModel, the adapter.

    Parameters
    ----------
    model : nn.Module
    path : path
    half : bool, default False
        Store float32 and float64 parameters as float16, except tensors in which a weight would lose more than the
        rounding of 16 bits: see `_halved`. `load_into` converts them back. Buffers stay as they are: they may hold
        large means, or places in a table.
    """
    inner = unwrap(model)
    save_weights(adapters.state_of(inner), path, half=half and parameter_names(inner))


def save_weights(state: dict[str, Any], path: AnyPath, *, half: bool | Set[str] = False) -> None:
    """Store a state_dict; see `save_state`. `half` may be the names of the parameters; True takes all for such."""
    state = copy.copy(renamed(state, {}))
    names = state.keys() & half if isinstance(half, Set) else set(state) if half else ()
    tensors = {name: state[name] for name in names if hasattr(state[name], "layout")}
    state.update(_each_once(tensors, _halved))
    save(state, path)


def parameter_names(model: nn.Module) -> Set[str]:
    """Names of a model's parameters in its checkpoints."""
    inner = unwrap(model)
    names = {uncompiled(name) for name, _ in inner.named_parameters(remove_duplicate=False)}
    return names if adapters.adapter_of(inner) is None else names | adapters.state_of(inner).keys()


def uncompiled(name: Any) -> Any:
    """Remove the prefix that torch.compile puts into the names of a part."""
    return re.sub(r"\b_orig_mod\.|\._orig_mod$", "", name) if isinstance(name, str) else name


def renamed(state: Any, own: Any) -> Any:
    """Give a state_dict the names of `own`, from the same model with other parts compiled; else uncompiled names."""
    if not isinstance(state, dict) or all(name == uncompiled(name) for name in (*state, *own)):
        return state
    names = {uncompiled(name): name for name in own}
    found: Any = OrderedDict((names.get(uncompiled(n), uncompiled(n)), value) for n, value in state.items())
    versions = {uncompiled(name): value for name, value in getattr(state, "_metadata", {}).items()}
    modules = getattr(own, "_metadata", None) or versions
    found._metadata = {name: versions[uncompiled(name)] for name in modules if uncompiled(name) in versions}
    return found


def _halved(value: Any) -> Any:
    """Round a tensor of 32 or 64 bits to 16, unless the error of a weight is large.

    An error is small if it is at most 2^-11 of the weight, or of the largest weight in each of the tensor's rows,
    columns and so on that the weight is in. So a weight near zero among large ones may be lost, but neither a row, a
    column or an element of a vector that is small as a whole, nor a number too large for 16 bits.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
        return value
    small, size = value.half(), value.abs()
    outside = (size < 2.0**-14) | (size > 65504)  # of the numbers that 16 bits hold with full precision
    if outside.any():
        error, bound = (small[outside].to(value.dtype) - value[outside]).abs(), size[outside]
        if size.ndim > 1:
            others = [[d for d in range(size.ndim) if d != dim] for dim in range(size.ndim)]
            largest = [size.amax(dims, keepdim=True).expand_as(size)[outside] for dims in others]
            bound = bound.maximum(torch.stack(largest).amin(0).nan_to_num(0, posinf=0))
        if (error > ROUNDING * bound).any():
            return value
    return small


def unwrap(model: Any) -> nn.Module:
    """Return the model inside torch.compile, DataParallel and DistributedDataParallel."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", ()):  # a PeftModel has the attributes of its base
            model = model._orig_mod
        else:
            return model  # type: ignore[no-any-return]


def check_readable(content: Any, name: str = "state") -> None:
    """Raise a TypeError that names the entry, unless `load` can read back what `save` writes of the content."""
    for where, value in _unusual(content, name):
        try:
            _round_trip(value)
        except Exception as error:  # of somebody else's class
            fault = f"{where}: {type(value).__name__} could not be read back ({reason(error)})"
            hint = "give a tensor, a number, a text, or a list or dict of them"
            raise TypeError(f"{fault}; {hint}") from error


def _unusual(content: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield names and values that are neither plain numbers, texts and tensors nor dicts, lists and tuples of them."""
    import torch

    if depth > DEEPEST:
        raise TypeError(f"{name:.80}...: expected parts at most {DEEPEST} deep; it is deeper, or a part of itself")
    kind = type(content)
    if kind in (dict, OrderedDict):
        parts = {**content, **getattr(content, "__dict__", {})}  # a state_dict has _metadata
        for key, value in parts.items():
            if type(key) is not str:
                yield from _unusual(key, f"{name}: key {key!r}", depth + 1)
            if not _is_plain(value):
                yield from _unusual(value, f"{name}.{key}", depth + 1)
    elif kind in (list, tuple):
        for i, value in enumerate(content):
            if not _is_plain(value):
                yield from _unusual(value, f"{name}[{i}]", depth + 1)
    elif not _is_plain(content.detach() if kind is torch.nn.Parameter else content):
        yield name, content


def _is_plain(value: Any) -> bool:
    """Tell whether `load` surely reads a value back."""
    import torch

    kind = type(value)
    if kind is torch.Tensor:
        return bool(value.layout is torch.strided and not value.is_meta and not value.is_nested)
    return kind in _PLAIN or (kind is int and abs(value) < 2**63)


def _round_trip(value: Any) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save(_compact(value), buffer)
    buffer.seek(0)
    found = torch.load(buffer, map_location="cpu", weights_only=True)
    if type(found) is not type(value):
        raise TypeError(f"it becomes {type(found).__name__}")


def save(content: Any, path: AnyPath) -> None:
    """Write `content` as torch.save does, but whole or not at all, with a checksum that other readers ignore.

    The file is built in memory: torch.save reports an interruption or a full disk as an error of its zip writer.
    """
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(_compact(content), buffer)
    except (MemoryError, RuntimeError) as error:  # torch hides the former behind an error of its writer
        if not isinstance(error.__context__ or error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryError(f"{path}: storing {_nbytes(content)} bytes of tensors needs as much memory more") from error
    _files.write_atomic(path, partial(archive.seal, buffer.getbuffer()))


def _nbytes(content: Any) -> int:
    sizes: list[int] = []
    each_tensor(content, lambda t: sizes.append(t.nbytes) or t)  # type: ignore[func-returns-value]
    return sum(sizes)


def _compact(content: Any) -> Any:
    """Move tensors to the CPU, and copy those that are parts of larger ones: torch.save would store those whole."""
    import torch

    def alone(t: Tensor) -> Tensor:
        t = t.detach().to("cpu")
        if type(t) is not torch.Tensor or t.layout != torch.strided or t.untyped_storage().nbytes() <= t.nbytes:
            return t
        return t.clone()

    return _each_once(content, alone)


def is_own(path: AnyPath) -> bool:
    """Tell whether `save` wrote the file."""
    with _files.reading(path, "a checkpoint") as file:
        return archive.is_sealed(file)


def load_into(model: nn.Module, path: AnyPath) -> nn.Module:
    """Load a checkpoint into `model`; ValueError, which names the file, if names or shapes do not fit."""
    inner = unwrap(model)
    if references.is_reference(path):
        return load_weights(model, references.load_state(Path(path), inner), references.target_of(Path(path)))
    return load_weights(model, renamed(load(path), inner.state_dict()), path)


def load_weights(model: nn.Module, state: dict[str, Any], path: AnyPath) -> nn.Module:
    """Load a state_dict, which `path` names in errors, into `model`."""
    inner = unwrap(model)
    try:
        adapters.load_state(inner, state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = _other_shapes(inner, state) or " ".join(str(error).split())
        raise ValueError(f"{path}: does not fit the model: {reason}") from None
    drop_derived(inner)
    return model


def _other_shapes(model: nn.Module, state: dict[str, Any]) -> str:
    """List weights whose shapes alone do not fit; empty where names differ too."""
    own = model.state_dict()
    if not isinstance(state, Mapping) or own.keys() != state.keys():
        return ""
    shapes = {name: (getattr(state[name], "shape", None), getattr(value, "shape", None)) for name, value in own.items()}
    differ = [f"{name} is {tuple(a)}, not {tuple(b)}" for name, (a, b) in shapes.items() if a and b and a != b]
    return ", ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")


def drop_derived(model: nn.Module) -> None:
    """Let a model drop what it has derived from its weights; those that keep it for evaluation drop it in `train()`."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def to_cpu(content: Any, *, copy: bool = False) -> Any:
    """Copy nested dicts and lists with every tensor moved to the CPU; `copy` copies those that are there already.

    Tensors that share their memory, as tied weights do, share it afterwards.
    """
    return _each_once(content, lambda t: t.detach().to("cpu", copy=copy))


def _each_once(content: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy as `each_tensor` does, with one result for all tensors that share their memory: tied weights stay tied."""
    found = dict[Any, Any]()

    def once(t: Tensor) -> Tensor:
        key = memory(t)
        if key not in found:
            found[key] = function(t)
        return found[key]  # type: ignore[no-any-return]

    return each_tensor(content, once)


def memory(t: Tensor) -> Any:
    """Return what is equal for tensors with the same elements in memory, as tied weights are."""
    import torch

    if type(t) not in (torch.Tensor, torch.nn.Parameter) or t.layout != torch.strided or t.is_meta or not t.numel():
        return id(t)
    return t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg()


def snapshot(content: Any) -> Any:
    """Copy nested dicts and lists with a copy of every tensor, on its device. Tied weights stay tied."""
    return _each_once(content, lambda t: t.detach().clone())


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
